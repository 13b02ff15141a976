"""`pagoda run MODEL`: figures per layer, inputs and outputs as files, and bad model files."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

from pagoda.compiler.errors import ModelFileError
from pagoda.isa import load_chip
from pagoda.pytorch.layer_work import layer_work
from pagoda.pytorch.model_file import load_model_file
from pagoda.pytorch.model_run import compare

DEFINE = (
    "define `model` (a torch.nn.Module) and `inputs` (a tensor, a tuple of arguments or a "
    "dictionary of named ones), or load() -> (module, inputs) or (module, inputs, expected)"
)
NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

def load():
    model = Net().bfloat16().eval()
    inputs = torch.randn(2, 3, 10, 10).bfloat16()
    with torch.no_grad():
        return model, inputs, model(inputs)
"""
MACS = {
    "stem": 2 * 8 * 64 * 27, "blocks.0.conv": 2 * 8 * 64 * 72, "blocks.1.conv": 2 * 8 * 64 * 72,
    "head": 2 * 8 * 10,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def relu_model(path, shape=(2, 3), kind=TensorProto.FLOAT):
    values = [helper.make_tensor_value_info(name, kind, list(shape)) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


@pytest.mark.parametrize("how", ["compiled", "--eager"])
def test_a_python_file(pagoda, folder, how):
    (folder / "net.py").write_text(NET)
    options = ["--check", "--json", "--save-outputs", "y.npz"] + ["--eager"] * (how != "compiled")
    code, out, err = pagoda("run", "net.py", *options)
    assert (code, err) == (0, "")
    *_, fallbacks, last = out.splitlines()
    assert fallbacks == "CPU fallbacks: 0"
    assert "equals torch on the CPU: largest error " in out
    assert "equals the file's expected result: largest error " in out
    found = json.loads(last)
    rows = {row["layer"]: row for row in found["layers"]}
    assert {name: rows[name]["macs"] for name in MACS} == MACS
    assert found["macs"] == sum(MACS.values()) == sum(row["macs"] for row in found["layers"])
    assert found["cycles"] == sum(row["cycles"] for row in found["layers"])
    assert found["dram_bytes"] == sum(row["dram_bytes"] for row in found["layers"])
    assert rows["stem"]["shape"] == [2, 8, 8, 8] and rows["head"]["operation"] == "Linear"
    assert rows["blocks.0.conv"]["operation"].startswith("Conv2d")
    peak = load_chip("edge").macs_per_cycle
    wanted = MACS["stem"] / (rows["stem"]["cycles"] * peak)
    assert rows["stem"]["utilisation"] == pytest.approx(wanted, abs=1e-4)
    assert found["outputs"] == {"output0": [2, 10]}
    assert np.load("y.npz")["output0"].shape == (2, 10)


def test_the_example_of_the_documents(pagoda, folder):
    text = (Path(__file__).parents[1] / "docs/models.md").read_text()
    (example,) = re.findall(r"say `net.py`:\n\n```python\n(.*?)```", text, re.DOTALL)
    shown = re.findall(r"```\n(net.py on edge.*?)```", text, re.DOTALL)[0].splitlines()
    (folder / "net.py").write_text(example)
    code, out, _ = pagoda("run", "net.py", "--check")
    assert code == 0

    def words(lines):
        return [line.split()[0] for line in lines if line.strip() and not line.startswith(" ")]

    printed = words(out.splitlines())
    assert [word for word in words(shown) if word not in printed] == []
    command = importlib.import_module("pagoda.cli.run").run
    options = {name for option in command.params for name in option.opts if name[:2] == "--"}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options


def test_a_kernel_goes_before_a_file_of_its_name(pagoda, folder):
    (folder / "softmax").write_text("")
    assert pagoda("run", "softmax", "rows=2", "cols=8", "--chip", "tiny")[0] == 0


def test_an_onnx_file(pagoda, folder):
    relu_model("m.onnx", ("batch", 3))
    np.save("x.npy", np.array([[-1, 2, -3]], np.float32))
    code, out, err = pagoda("run", "m.onnx", "--input", "x=x.npy", "--save-outputs", "y.npz")
    assert (code, err) == (0, "") and "m.onnx on edge, compiled, seed 0" in out
    assert np.load("y.npz")["y"].tolist() == [[0, 2, 0]]
    shapes = []
    for size in ("4", "5"):
        out = pagoda("run", "m.onnx", "--dim", f"batch={size}", "--json")[1]
        shapes.append(json.loads(out.splitlines()[-1])["outputs"]["y"])
    assert shapes == [[4, 3], [5, 3]]


def test_the_seed_draws_weights_and_inputs(folder):
    (folder / "net.py").write_text(NET)
    first, again, other = (load_model_file(folder / "net.py", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.args[0], again.args[0])
    assert not torch.equal(first.args[0], other.args[0])
    assert torch.equal(first.module.head.weight, again.module.head.weight)


def test_a_wrong_result_is_an_error(pagoda, folder):
    text = "import torch\nmodel = torch.nn.ReLU()\ninputs = torch.ones(4)\nexpected = 2 * inputs\n"
    (folder / "m.py").write_text(text)
    code, _, err = pagoda("run", "m.py")
    assert code == 1 and err == (
        "Error: m.py on edge: the result must equal the file's expected result to 0.001 of the "
        "largest value, but is off by 0.5; if the model computes in bfloat16, try float32, and "
        "report what remains\n"
    )


def test_work_of_recurrent_layers_and_of_values():
    """Where torch has one operation for a layer, and where a forward looks at values."""
    lstm = torch.nn.LSTM(4, 8)
    assert layer_work(lstm, [torch.ones(5, 2, 4)], {}).macs[""] == 5 * 2 * 4 * 8 * (4 + 8)

    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 8)

        def forward(self, x):
            return self.fc(x) if x.sum().item() > 0 else x

    assert layer_work(Looks(), [torch.ones(2, 4)], {}).macs == {"": 0, "fc": 64}


def test_compare():
    a = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    assert compare("x", [a], [a.clone()]).good
    assert compare("x", a[:2], torch.tensor([1.0, 4.0])).error == 0.5
    assert not compare("x", a, torch.ones(4)).good
    assert not compare("x", torch.tensor([1]), torch.tensor([2])).good


# Bad input ----------------------------------------------------------------------------------------

WRITTEN = "write it with numpy.savez or numpy.save"
BAD = {  # file name, its text, options, message
    "missing": ("", None, (), "gone.py: no such file; give the path of a .py or .onnx model file"),
    "ending": (
        "m.txt", "", (),
        ("m.txt: a model file ends in .py or .onnx, but this one in '.txt'; export the model to "
        "ONNX, or write a Python file that loads it"),
    ),
    "nothing": ("m.py", "x = 1\n", (), f"m.py: defines no model; {DEFINE}"),
    "no module": (
        "m.py", "model = 3\n", (), f"m.py: `model` is a int, not a torch.nn.Module; {DEFINE}",
    ),
    "no inputs": (
        "m.py", "import torch\nmodel = torch.nn.ReLU()\n", (),
        f"m.py: states no inputs to run the model on; {DEFINE}",
    ),
    "fails": (
        "m.py", "import torch\n\ndef load():\n    return torch.nn.Linear(3)\n", (),
        ("m.py, line 4: the file itself failed at `return torch.nn.Linear(3)`: TypeError: "
        "Linear.__init__() missing 1 required positional argument: 'out_features'"),
    ),
    "float64": (
        "m.py", "import torch\nmodel = torch.nn.Linear(3, 2).double()\ninputs = torch.ones(3)\n",
        (),
        ("m.py: parameter 'weight' (and 1 more) is float64, which the chip stores but cannot "
        "compute with; convert model and inputs to float32: model.float(), x.float()"),
    ),
    "wrong inputs": (
        "m.py", "import torch\nmodel = torch.nn.Linear(3, 2)\ninputs = torch.ones(2, 4)\n", (),
        ("m.py: the model cannot be called with its inputs (float32[2, 4]), on the CPU either: "
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x4 and 3x2); check the inputs' "
        "number, shapes and types"),
    ),
    "dimension of a Python file": (
        "m.py", "import torch\nmodel = torch.nn.ReLU()\ninputs = torch.ones(2)\n", ("--dim", "n=3"),
        ("m.py: --dim sets open dimensions of ONNX models; a Python file states its inputs: change "
        "them there, or give them with --input"),
    ),
    "unknown parameter": (
        "m.py", "import torch\nmodel = torch.nn.ReLU()\n", ("--input", "z=ok.npy"),
        "m.py: has no input 'z'; the parameters of the module's forward are input",
    ),
    "no such input file": (
        "m.py", "", ("--input", "gone.npz"), "--input gone.npz: no such file; check the path",
    ),
    "not arrays": (
        "m.py", "", ("--input", "m.py"),
        ("--input m.py: must be FILE.npz or NAME=FILE.npy; write such a file with numpy.savez or "
        "numpy.save"),
    ),
    "damaged arrays": (
        "bad.npz", "hello", ("--input", "bad.npz"),
        f"--input bad.npz: is not a file of numpy arrays; {WRITTEN}",
    ),
    "wrong type": (
        "m.onnx", None, ("--input", "x=int.npy"),
        ("m.onnx: input 'x' must be float32, but the array given is int32; convert it: "
        "array.astype('float32')"),
    ),
    "wrong shape": (
        "m.onnx", None, ("--input", "x=ok.npy"),
        ("m.onnx: the input given has shape [4], but the model takes x: float32[2, 3]; give an "
        "array of that shape"),
    ),
    "float64 in ONNX": (
        "double.onnx", None, (),
        ("double.onnx: input 'x' is float64, which the chip stores but cannot compute with; export "
        "the model in float32"),
    ),
    "too large": (
        "m.py", ("import torch\nmodel = torch.nn.Linear(1 << 13, 1 << 14)\n"
        "inputs = torch.ones(1 << 13)\n"), ("--chip", "tiny"),
        ("parameter 'weight', a float32 tensor of shape [16384, 8192]: device memory is full: "
        "536,870,912 bytes asked for, 268,435,392 of 268,435,392 free (largest piece 268,435,392); "
        "free tensors, use a smaller batch or sequence, or choose a chip with more DRAM"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(pagoda, folder, what):
    file, text, options, message = BAD[what]
    np.save("ok.npy", np.ones(4, np.float32))
    np.save("int.npy", np.ones((2, 3), np.int32))
    relu_model("m.onnx")
    relu_model("double.onnx", kind=TensorProto.DOUBLE)
    if text is not None:
        (folder / file).write_text(text)
    name = file if file.endswith((".py", ".onnx", ".txt")) else "gone.py"
    assert pagoda("run", name, *options) == (1, "", f"error: {message}\n")
    assert pagoda("run", "m.onnx")[0] == 0  # the device is still usable


HOST = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.matmul(x, torch.ones(3, 2))

model, inputs = Net(), torch.ones(2, 3)
"""


def test_a_forward_that_makes_tensors_on_the_cpu(pagoda, folder):
    (folder / "m.py").write_text(HOST)
    start = "m.py, line 6: the model runs on the CPU, but fails on the device at `return "
    told = (
        "operation aten.mm.default got tensors on device pagoda and, as argument 'mat2', one of "
        "shape (3, 2) on device cpu. All must be on one device; only numbers, tensors without "
        'dimensions, may stay on the CPU. Move it with .to("pagoda").\n'
    )
    code, out, err = pagoda("run", "m.py", "--eager")
    assert (code, out, err) == (
        1, "", f"error: {start}torch.matmul(x, torch.ones(3, 2))`: {told}"
    )  # fmt: skip
    code, out, err = pagoda("run", "m.py")
    assert (code, out) == (1, "") and err == (
        "error: m.py: the model runs on the CPU, but fails on the device: Tensor device mismatch "
        f"Explanation: {told}"
    )


def test_a_syntax_error(folder):
    (folder / "m.py").write_text("import torch\nmodel = (\n")
    with pytest.raises(ModelFileError) as raised:
        load_model_file(folder / "m.py")
    assert str(raised.value) == (
        f"{folder / 'm.py'}, line 2: is not Python: '(' was never closed: model = ("
    )


USAGE = (
    "Usage: pagoda run [OPTIONS] KERNEL [NAME=VALUE]...\nTry 'pagoda run --help' for help.\n\n"
    "Error: "
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["m.onnx", "a=3"],
            (
                "m.onnx is a model file: NAME=VALUE, --machine, --vcd and --cycles are for "
                "kernels; leave them out (the size of an open dimension is --dim NAME=SIZE)"
            ),
        ),
        (
            ["m.onnx", "--dim", "batch=0"],
            (
                "Invalid value for --dim: 'batch=0': must be NAME=SIZE with a size of at least 1, "
                "as in batch=4"
            ),
        ),
        (
            ["matmul", "--check"],
            (
                "matmul is a kernel: --input, --dim, --check, --eager and --save-outputs are for "
                "model files (.py or .onnx); leave them out (a kernel is always checked)"
            ),
        ),
    ],
)
def test_wrong_usage(pagoda, folder, words, message):
    relu_model("m.onnx")
    assert pagoda("run", *words) == (2, "", f"{USAGE}{message}\n")
