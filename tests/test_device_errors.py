"""What device "pagoda" says to tensors of other devices, to float64, and out of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pagoda.compiler.cache import Cache
from pagoda.isa import load_chip
from pagoda.pytorch import chip as chip_module
from pagoda.runtime import OutOfDeviceMemory

P = "pagoda"
REMEDY = "free tensors, use a smaller batch or sequence, or choose a chip with more DRAM"


@pytest.fixture(autouse=True)
def small_chip(tmp_path):
    chip_module.use_chip(replace(load_chip("tiny"), dram_bytes=1 << 20), Cache(tmp_path))
    yield
    chip_module.use_chip("edge")


def works() -> bool:
    """The device is still usable."""
    return (torch.ones(3).to(P) + 1).cpu().tolist() == [2, 2, 2]


def told(op, argument, shape):
    """What an operation says of its argument on the CPU."""
    return (
        f"operation {op} got tensors on device pagoda and, as argument {argument!r}, one of shape "
        f"{shape} on device cpu. All must be on one device; only numbers, tensors without "
        'dimensions, may stay on the CPU. Move it with .to("pagoda").'
    )


X, C = torch.ones(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x, c: x + c, told("aten.add.Tensor", "other", (2, 3))),
        (lambda x, c: c.clone().mul_(x), told("aten.mul_.Tensor", "self", (2, 3))),
        (lambda x, c: torch.cat([x, c]), told("aten.cat.default", "tensors[1]", (2, 3))),
        (lambda x, c: torch.where(c > 0, x, x), told("aten.where.self", "condition", (2, 3))),
        (lambda x, c: x @ c.T, told("aten.mm.default", "mat2", (3, 2))),
    ],
)
def test_a_tensor_on_the_cpu(function, text):
    with pytest.raises(RuntimeError) as raised:
        function(X.to(P), C)
    assert str(raised.value) == text
    with pytest.raises(RuntimeError) as raised:
        torch.compile(function, backend=P)(X.to(P), C)
    assert str(raised.value).startswith(f"Tensor device mismatch\n  Explanation: {text}\n")
    assert works()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(3, 4), told("aten.addmm.default", "mat1", (2, 3))),
        (nn.LSTM(3, 4), told("aten.lstm.input", "input", (2, 1, 3))),
        (nn.GRU(3, 4), told("aten.gru.input", "input", (2, 1, 3))),
        (nn.LayerNorm(3), told("aten.addcmul.default", "tensor1", (2, 3))),
        (nn.BatchNorm1d(3), told("aten.native_batch_norm.default", "input", (2, 3))),
    ],
)
def test_inputs_of_a_model_on_the_cpu(module, text):
    with pytest.raises(RuntimeError) as raised:
        module.to(P)(C)
    assert str(raised.value) == text
    assert works()


class Shared(nn.Module):
    """What two devices may share in torch, but not in one graph: copies from one to the other."""

    def __init__(self):
        super().__init__()
        self.norm, self.kept = nn.Linear(3, 3), torch.zeros(2, 3)

    def forward(self, x, given):
        return self.norm(x).copy_(given["mask"]) + x.clone().copy_(self.kept)


def test_which_tensors_of_a_compiled_model_are_on_the_cpu():
    model = Shared().to(P)
    with pytest.raises(Exception) as raised:
        torch.compile(model, backend=P)(X.to(P), {"mask": C})
    assert (
        'torch.compile(..., backend="pagoda") compiles for device "pagoda", but these tensors are '
        "on the CPU: given['mask'] of shape (2, 3), self.kept of shape (2, 3). Move them with "
        '.to("pagoda").\n'
    ) in str(raised.value)
    assert works()


@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_on_the_cpu(compiled):
    """As in torch, they mix with what is on the device, first or last, given or made."""

    def mixed(x, number):
        two = torch.tensor(2.0)
        return (
            number * x, x - number, (number + 1) * x, torch.maximum(two, x), x / (two + 1),
            torch.where(x > 1, number, x), number.to(x.device) + 1, torch.tensor(3) - x,
        )  # fmt: skip

    x, number = torch.tensor([0.5, 3.0]), torch.tensor(1.5)
    run = torch.compile(mixed, backend=P, fullgraph=True) if compiled else mixed
    for found, want in zip(run(x.to(P), number), mixed(x, number), strict=True):
        assert found.device.type == P
        torch.testing.assert_close(found.cpu(), want)


def test_indices_on_the_cpu():
    """As in torch, they are copied over."""
    x = torch.arange(6.0).reshape(3, 2)
    d = x.to(P)
    assert d[torch.tensor([2, 0])].tolist() == [[4, 5], [0, 1]]
    assert d[x > 2].tolist() == [3, 4, 5]
    d[torch.tensor([1])] = 7.0
    d[x > 4] = -1.0
    assert d.tolist() == [[0, 1], [7, 7], [4, -1]]
    made = torch.compile(lambda x: x[torch.tensor([2, 0])], backend=P, fullgraph=True)(x.to(P))
    assert made.tolist() == [[4, 5], [0, 1]]


def test_float64():
    x = torch.ones(3, dtype=torch.float64).to(P)
    with pytest.raises(NotImplementedError) as raised:
        torch.exp(x)
    assert str(raised.value) == (
        "operation aten.exp.out cannot run on device pagoda: the chip stores torch.float64 but "
        "cannot compute with it. Use float32: convert tensors with .to(dtype) before they are "
        "moved to the device."
    )
    assert x.cpu().tolist() == [1, 1, 1] and works()


def test_a_float64_number_beside_float32():
    """As on the CPU, it does not change the type of the result."""
    x, number = torch.ones(2).to(P), torch.tensor(2.5, dtype=torch.float64)
    for found in (x * number, number - x, torch.pow(x, number), x.mul_(number)):
        assert found.dtype == torch.float32
    assert x.cpu().tolist() == [2.5, 2.5]


def test_no_memory_for_a_tensor():
    with pytest.raises(OutOfDeviceMemory) as raised:
        torch.empty(512, 1024, dtype=torch.bfloat16, device=P)
    assert str(raised.value) == (
        "a bfloat16 tensor of shape [512, 1024]: device memory is full: 1,048,576 bytes asked for, "
        f"1,048,512 of 1,048,512 free (largest piece 1,048,512); {REMEDY}"
    )
    assert works()


def test_no_memory_for_a_module():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(512, 1024))
    with pytest.raises(OutOfDeviceMemory) as raised:
        module.to(P)
    assert str(raised.value) == (
        "parameter '1.weight', a float32 tensor of shape [1024, 512]: device memory is full: "
        "2,097,152 bytes asked for, 1,048,384 of 1,048,512 free (largest piece 1,048,384); "
        f"{REMEDY}"
    )
    assert works()


def test_no_memory_for_intermediate_results():
    """Two products in a row: the first one's result is wider than all memory."""

    def wide(x, w):
        return (x @ w) @ w.t()

    x, w = torch.ones(512, 4).to(P), torch.ones(4, 1024).to(P)
    with pytest.raises(OutOfDeviceMemory) as raised, torch.no_grad():
        torch.compile(wide, backend=P)(x, w)
    message = str(raised.value)
    assert message.startswith("intermediate results of a compiled graph, 1 tensors that share ")
    assert "2,097,152 bytes, the largest 'buf" in message and message.endswith(REMEDY)
    assert works()
