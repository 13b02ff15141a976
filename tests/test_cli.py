"""The `pagoda` command: what every subcommand prints, and what it says to bad input."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import numpy as np
import pytest

from pagoda import __version__, cli
from pagoda.cli import dump, library
from pagoda.cli.library import LIBRARY, Attention
from pagoda.compiler.errors import Unsupported
from pagoda.compiler.stages import STAGES
from pagoda.isa.commands import COMMANDS
from pagoda.isa.manual import manual
from pagoda.runtime.stalls import IDLE

ROOT = Path(__file__).parents[1]
WORKING = [name for name in cli.COMMANDS if name != "chat"]
SMALL = ["--chip", "tiny"]
KERNELS = """
from pagoda.compiler.language import Tensor, TensorType, core_tiles, kernel, load, store, tiles
from pagoda.isa.numbers import DType

@kernel
def scale(y: Tensor, x: Tensor, w: Tensor | None, factor: float, *, ROWS, COLS):
    for i in core_tiles(x.size(0), ROWS):
        for j in tiles(x.size(1), COLS):
            store(y[i, j], load(x[i, j]) * factor)

layout = TensorType.dynamic(DType.BF16, 2)
built = scale.build(y=layout, x=layout, w=None, ROWS=4, COLS=64)
"""


@pytest.fixture
def kernel_file(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    return "mine.py"


def usage(command: str, arguments: str, message: str) -> str:
    """What click prints for wrong usage of a subcommand."""
    return (
        f"Usage: pagoda {command} {arguments}\nTry 'pagoda {command} --help' for help.\n\n"
        f"Error: {message}\n"
    )


KERNEL_ARGUMENTS = "[OPTIONS] KERNEL [NAME=VALUE]..."

# Help --------------------------------------------------------------------------------------------


def test_help_lists_every_command(pagoda):
    code, out, _ = pagoda("--help")
    assert code == 0
    for name, summary in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", out, re.MULTILINE)


@pytest.mark.parametrize("name", WORKING)
def test_help_of_every_command(pagoda, name):
    code, out, _ = pagoda(name, "--help")
    assert code == 0 and out.startswith(f"Usage: pagoda {name} ")


@pytest.mark.parametrize("name", ["run", "dump"])
def test_help_names_kernels_and_an_example(pagoda, name):
    out = pagoda(name, "--help")[1]
    assert all(kernel in out for kernel in LIBRARY)
    assert f"  pagoda {name} matmul m=" in out


def test_help_loads_nothing_heavy():
    """Best of three: half a second is plenty, even on a busy machine."""
    code = (
        "import sys; sys.argv = ['pagoda', '--help']\n"
        "from pagoda.cli import main; main()\n"
        "assert not {'numpy', 'numba', 'torch', 'llvmlite'} & sys.modules.keys()"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_version(pagoda):
    assert pagoda("--version") == (0, f"pagoda, version {__version__}\n", "")


# chips -------------------------------------------------------------------------------------------


def test_chips(pagoda):
    code, out, _ = pagoda("chips")
    assert code == 0 and re.search(r"edge +1 +1000 +16x16 +256.0", out)
    assert re.search(r"sram_bytes +524288 \(512 KiB\)", pagoda("chips", "edge")[1])


# isa ---------------------------------------------------------------------------------------------


def test_isa_prints_the_manual(pagoda):
    assert pagoda("isa") == (0, manual(), "")


@pytest.mark.parametrize("name", COMMANDS)
def test_isa_shows_every_command(pagoda, name):
    code, out, _ = pagoda("isa", name)
    assert code == 0
    assert out.startswith(f"{name}: bank {COMMANDS[name].bank}, engine {COMMANDS[name].engine}\n")
    for field in COMMANDS[name].fields:
        assert re.search(rf"^{field.word} +[\d:]+ +{field.name} +{field.kind} ", out, re.MULTILINE)


def test_isa_shows_instructions(pagoda):
    assert pagoda("isa", "beq") == (
        0,
        (
            "assembly  beq rs1, rs2, offset\n"
            "encoding  offset[12|10:5] rs2 rs1 000 offset[4:1|11] 1100011 (bit 31 first)\n"
            "meaning   Branch to pc + offset if rs1 = rs2.\n"
            "cycles    5 taken, 3 not taken\n"
        ),
        "",
    )
    assert pagoda("isa", "ecall")[1].endswith("cycles    none: it faults\n")


def test_isa_decode(pagoda):
    assert pagoda("isa", "--decode", "00c32283", "0xfe0296e3", "ffffffff") == (
        0,
        (
            "0000  00c32283  lw x5, 12(x6)\n"
            "0004  fe0296e3  bne x5, x0, -20\n"
            "0008  ffffffff  .word 0xffffffff\n"
        ),
        "",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decode"], "--decode takes words, but none is given; write some in hex."),
        (
            ["--decode", "lw"],
            "word 'lw': it is a 32-bit number in hex; write for example 00c32283.",
        ),
        (
            ["--decode", "100000000"],
            "word '100000000': it is a 32-bit number in hex; write for example 00c32283.",
        ),
        (
            ["matmull"],
            (
                f"'matmull' is no instruction; the tensor commands are {', '.join(COMMANDS)}; "
                "did you mean matmul or mul?"
            ),
        ),
        (
            ["qqq"],
            (
                f"'qqq' is no instruction; the tensor commands are {', '.join(COMMANDS)}; "
                "pagoda isa prints them all."
            ),
        ),
    ],
)
def test_isa_bad_input(pagoda, words, message):
    expected = usage("isa", "[OPTIONS] [COMMAND|WORD]...", message)
    assert pagoda("isa", *words) == (2, "", expected)


# dump --------------------------------------------------------------------------------------------


def test_dump_summary(pagoda):
    code, out, _ = pagoda("dump", "matmul", "m=8", "n=8", "k=8", *SMALL)
    assert code == 0 and out.startswith("matmul")
    assert set(dump._SUMMARIES) == set(STAGES)
    for stage in STAGES:
        assert re.search(rf"^  {stage} +\d+ lines ", out, re.MULTILINE)
    assert re.search(r"^  code +\d+ bytes of 16,384 of instruction memory$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("ir", "      acc = dot a_2, transpose b_2"),
        ("commands", "\nmatmul.n = 8\n"),
        ("llvm", 'target triple = "riscv32'),
        ("asm", "\tret"),
    ],
)
def test_dump_stages(pagoda, stage, line):
    code, out, _ = pagoda("dump", "matmul", "m=8", "n=8", "k=8", "--stage", stage, *SMALL)
    assert code == 0 and line in out


def test_dump_all_stages(pagoda):
    out = pagoda("dump", "softmax", "rows=2", "cols=8", "--stage", "all", *SMALL)[1]
    headings = [line for line in out.splitlines() if line.startswith("---- ")]
    assert headings == [f"---- {stage}: {dump._SUMMARIES[stage]}" for stage in STAGES]


@pytest.mark.parametrize("name", LIBRARY)
def test_dump_takes_every_kernel(pagoda, name):
    code, out, _ = pagoda("dump", name, "--stage", "ir", *SMALL)
    assert code == 0 and out.startswith("kernel ")


def test_dump_a_kernel_of_a_file(pagoda, kernel_file):
    settings = ["y=bf16:Nx64", "x=f32:Nx64", "ROWS=16", "COLS=32"]
    code, out, _ = pagoda("dump", f"{kernel_file}:scale", *settings, "--stage", "ir")
    assert code == 0
    assert out.startswith(
        "kernel scale(y: bf16[?, 64] strides (128, 2), x: f32[?, 64] strides (256, 4), factor) "
        "ROWS=16 COLS=32\n"
    )


def test_dump_a_built_kernel(pagoda, kernel_file):
    code, out, _ = pagoda("dump", f"{kernel_file}:built", "--stage", "ir")
    assert code == 0 and out.startswith("kernel scale(y: bf16[?, ?] strides (?, 2), ")


DTYPES = "f32, bf16, i32, i8, f8e4m3, i4, i64, bool, u8"
TENSOR = "DTYPE:SIZExSIZE..., like bf16:Nx64, where a capital letter is a run-time size"
LIBRARY_RULE = (
    f"the library has {', '.join(LIBRARY)}; name one of those "
    "(pagoda dump also takes FILE.py:NAME)."
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["matmull"], f"kernel 'matmull': {LIBRARY_RULE}"),
        (
            ["matmul", "--stage", "tokens"],
            (
                "Invalid value for '--stage': 'tokens' is not one of 'ir', 'commands', 'llvm', "
                "'asm', 'all'."
            ),
        ),
        (
            ["mine.py:scale", "x=bf16"],
            f"scale: x is a tensor, {TENSOR}, but it is 'bf16'; the dtypes are {DTYPES}.",
        ),
        (
            ["mine.py:scale", "x=bf16:3x-1"],
            f"scale: x is a tensor, {TENSOR}, but it is 'bf16:3x-1'; the dtypes are {DTYPES}.",
        ),
        (
            ["mine.py:scale", "ROWS=big"],
            (
                f"scale: ROWS is a whole number or one of {DTYPES}, but it is 'big'; write for "
                "example ROWS=16."
            ),
        ),
        (
            ["mine.py:scale", "factor=2"],
            "scale: factor is a run-time scalar and has no value yet; leave it out.",
        ),
        (
            ["mine.py:built", "ROWS=2"],
            "mine.py:built: it is a built kernel and takes no settings; leave 'ROWS=2' out.",
        ),
    ],
)
def test_dump_wrong_usage(pagoda, kernel_file, words, message):
    assert pagoda("dump", *words) == (2, "", usage("dump", KERNEL_ARGUMENTS, message))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["mine.py:nothing"],
            (
                "mine.py:nothing: it names an @kernel function or what its build(...) returned, "
                "but 'nothing' is not there; check the name after the colon"
            ),
        ),
        (
            ["mine.py:layout"],
            (
                "mine.py:layout: it names an @kernel function or what its build(...) returned, but "
                "'layout' is a TensorType; check the name after the colon"
            ),
        ),
        (
            ["mine.py:scale", "y=bf16:4x4", "x=bf16:4x4", "ROWS=4"],
            (
                "{here}:6:1: kernel scale: build takes y, x, w, ROWS, COLS, but COLS is missing; "
                "name exactly those"
            ),
        ),
        (
            ["mine.py:scale", "y=bf16:NxM", "x=bf16:NxM", "ROWS=4096", "COLS=4096"],
            (
                "{here}:9:13: kernel scale: the tiles alive at one time must fit the 523264 bytes "
                "of SRAM it may use, but they need 67108864 bytes (x_2 4096x4096 BF16 = 33554432, "
                "y_2 4096x4096 BF16 = 33554432); choose smaller blocks, or a chip with more SRAM"
            ),
        ),
        (
            ["absent.py:scale"],
            (
                "kernel file absent.py: it can be imported, but that raised FileNotFoundError: "
                "[Errno 2] No such file or directory: '{folder}/absent.py'; correct the file or "
                "the path"
            ),
        ),
        (
            ["broken.py:scale"],
            (
                "kernel file broken.py: it can be imported, but that raised ZeroDivisionError: "
                "division by zero; correct the file or the path"
            ),
        ),
        (
            ["leaves.py:scale"],
            (
                "kernel file leaves.py: it can be imported, but that raised SystemExit: 4; correct "
                "the file or the path"
            ),
        ),
    ],
)
def test_dump_errors(pagoda, kernel_file, words, message):
    Path("broken.py").write_text("1 / 0\n")
    Path("leaves.py").write_text("raise SystemExit(4)\n")
    folder = Path.cwd()
    expected = message.format(here=folder / "mine.py", folder=folder)
    path = list(sys.path)
    assert pagoda("dump", *words) == (1, "", f"error: {expected}\n")
    assert sys.path == path


# run ---------------------------------------------------------------------------------------------

RUNS = {
    "matmul": ["m=9", "n=21", "k=33", "batch=2", "bias=yes"],
    "attention": ["queries=3", "keys=70", "head_dim=16"],
    "rms_norm": ["rows=5", "cols=100"],
    "softmax": ["rows=5", "cols=100", "dtype=f32"],
    "silu_mul": ["rows=3", "cols=70"],
}


@pytest.mark.parametrize("name", LIBRARY)
def test_run(pagoda, name):
    code, out, err = pagoda("run", name, *RUNS[name], *SMALL, "--json")
    assert (code, err) == (0, "")
    assert out.startswith(f"{name} on tiny: ")
    found = json.loads(out.splitlines()[-1])
    assert (found["kernel"], found["chip"], found["seed"]) == (name, "tiny", 0)
    assert found["correct"] and found["check"]["wrong"] == 0 < found["check"]["elements"]
    assert found["cycles"] > 0 and 0 < found["roofline"] <= 1
    assert {f"{key}={found[key]}" for key in ("rows", "m", "queries") if key in found} <= {
        *RUNS[name]
    }


@pytest.mark.parametrize(
    "words",
    [
        ["matmul", "dtype=int8", "bias=yes", "--chip", "tiny8"],
        ["matmul", "transpose_a=yes", "transpose_b=no", "m=5", "--chip", "car"],
        ["matmul", "m=0"],
        ["matmul", "m=1", "n=1", "k=1", "--seed", "7"],
        ["attention", "queries=4", "keys=2", "--chip", "tiny"],
        ["attention", "queries=0"],
        ["attention", "keys=0", "queries=2", "causal=no"],
        ["rms_norm", "rows=0"],
    ],
    ids=" ".join,
)
def test_run_other_shapes(pagoda, words):
    assert pagoda("run", *words)[0] == 0


def test_run_is_reproducible(pagoda):
    first, again, other = (
        pagoda("run", "attention", *RUNS["attention"], *SMALL, "--seed", seed, "--json")[1]
        for seed in ("1", "1", "2")
    )
    assert first == again != other
    cycles = [json.loads(out.splitlines()[-1])["cycles"] for out in (first, other)]
    assert cycles[0] == cycles[1]  # they do not depend on the data


def test_a_wrong_result_is_an_error(pagoda, monkeypatch):
    true_product = library.accumulation.matmul

    def broken(a, b, start):
        result = true_product(a, b, start)
        result[0, 0] += 1
        return result

    monkeypatch.setattr(library.accumulation, "matmul", broken)
    code, out, err = pagoda("run", "matmul", "m=4", "n=4", "k=4", *SMALL)
    assert code == 1 and "15 of 16 elements equal" in out
    expected = (
        r"Error: matmul on tiny: every element must equal numpy's sum over k = 0, 1, 2, \.\.\. in "
        r"order, bit for bit, but 1 of 16 are not \(largest error [\d.]+\); this is a bug of "
        r"Pagoda: please report the command line\.\n"
    )
    assert re.fullmatch(expected, err)


def test_a_chip_file(pagoda, tmp_path):
    file = tmp_path / "wide.toml"
    file.write_text('base = "tiny"\nlanes = 16\n')
    code, out, _ = pagoda("run", "rms_norm", "rows=4", "--chip", str(file))
    assert code == 0 and out.startswith("rms_norm on wide: ")


SIZE_RULE = "a whole number from 0 to 1048576"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conv"], f"kernel 'conv': {LIBRARY_RULE}"),
        (["matmul", "m=x"], f"matmul: m is {SIZE_RULE}, but it is 'x'; the default is 128."),
        (["matmul", "m=-1"], f"matmul: m is {SIZE_RULE}, but it is '-1'; the default is 128."),
        (["matmul", "k=1.5"], f"matmul: k is {SIZE_RULE}, but it is '1.5'; the default is 128."),
        (
            ["attention", "head_dim=257"],
            (
                "attention: head_dim is a whole number from 1 to 256, but it is '257'; the default "
                "is 64."
            ),
        ),
        (
            ["softmax", "m=4"],
            "softmax: m is none of its parameters; they are rows, cols, dtype.",
        ),
        (
            ["matmul", "dtype=f64"],
            "matmul: dtype is bf16 or int8, but it is 'f64'; the default is bf16.",
        ),
        (
            ["matmul", "bias=true"],
            "matmul: bias is yes or no, but it is 'true'; the default is no.",
        ),
        (["matmul", "128"], "setting '128': it has the form NAME=VALUE; write for example m=128."),
        (["matmul", "m=1", "m=2"], "setting 'm=2': m is given twice; drop one."),
        (["matmul", "--seed", "-1"], "Invalid value for '--seed': -1 is not in the range x>=0."),
        ([], "Missing argument 'KERNEL'."),
    ],
)
def test_run_wrong_usage(pagoda, words, message):
    assert pagoda("run", *words) == (2, "", usage("run", KERNEL_ARGUMENTS, message))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["matmul", "--chip", "nano"],
            (
                "chip 'nano': unknown; presets are tiny, tiny8, edge, car, cloud; or give the path "
                "of a .toml or .py chip file"
            ),
        ),
        (
            ["matmul", "--chip", "odd.toml"],
            "chip 'odd': rows = 12: must be a power of two, 2 to 512; try 8",
        ),
        (
            ["matmul", "--chip", "absent.toml"],
            "chip file absent.toml: cannot be read (No such file or directory); check the path",
        ),
        (
            ["matmul", "--chip", "tiny8"],
            (
                "matmul: dtype is one that the array of chip tiny8 multiplies (int8), but it is "
                "bf16; use dtype=int8, or another chip"
            ),
        ),
        (
            ["attention", "--chip", "tiny8"],
            (
                "attention: it needs a matrix engine that multiplies bf16, but chip tiny8 has "
                "int8; use another chip"
            ),
        ),
        (
            ["attention", "heads=3"],
            (
                "attention: heads is a multiple of kv_heads, but heads=3 and kv_heads=2; change "
                "one of them"
            ),
        ),
        (
            ["matmul", "m=1000000", "n=1000000"],
            (
                "matmul: all tensors together take at most 268435456 bytes, since numpy works the "
                "result out too, but they take 2000512000000; choose smaller sizes"
            ),
        ),
        (
            ["softmax", "rows=2000", "cols=512", "--chip", "small.toml"],
            (
                "device memory is full: 2,048,000 bytes asked for, 1,048,512 of 1,048,512 free "
                "(largest piece 1,048,512); free tensors, use a smaller batch or sequence, or "
                "choose a chip with more DRAM"
            ),
        ),
    ],
)
def test_run_errors(pagoda, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("odd.toml").write_text('base = "edge"\nrows = 12\n')
    Path("small.toml").write_text('base = "edge"\ndram_bytes = 1048576\n')
    assert pagoda("run", *words) == (1, "", f"error: {message}\n")


def test_a_bug_keeps_its_traceback(pagoda, monkeypatch):
    def fail(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(Attention, "build", fail)
    with pytest.raises(KeyError):
        pagoda("run", "attention")


@pytest.mark.parametrize("packed", [False, True])
def test_what_cannot_be_compiled_is_told(pagoda, monkeypatch, packed):
    """Also where torch.compile has packed the error in one of its own."""

    def fail(*_):
        error = Unsupported("operation inv is not supported on device pagoda.")
        if not packed:
            raise error
        outer = RuntimeError("backend='pagoda' raised")
        outer.inner_exception = error
        raise outer

    monkeypatch.setattr(Attention, "build", fail)
    message = "error: operation inv is not supported on device pagoda.\n"
    assert pagoda("run", "attention") == (1, "", message)


def test_telling_an_error_does_not_load_torch():
    code = (
        "import sys; sys.argv = ['pagoda', 'run', 'matmul', 'dtype=int8', '--chip', 'nowhere.toml']"
        "\nfrom pagoda.cli import main\n"
        "try: main()\n"
        "finally: assert 'pagoda.cli.errors' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith(b"error: "), done.stderr


def test_ctrl_c(pagoda, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Attention, "build", interrupt)
    code, out, err = pagoda("run", "attention")
    assert (code, out, err.strip()) == (130, "", "interrupted")


def test_a_plain_kill_ends_what_was_started(pagoda, monkeypatch):
    ended = []

    def kill(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Attention, "build", kill)
    assert pagoda("run", "attention") == (143, "", "")
    assert ended and signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_in_a_callback_of_native_code(pagoda, monkeypatch):
    """Python drops what is raised there; it comes again."""

    def interrupt(*_):
        def press(_first, _second):
            raise KeyboardInterrupt

        compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(press)
        compare(None, None)
        for _ in range(100):
            time.sleep(0.1)

    monkeypatch.setattr(Attention, "build", interrupt)
    code, out, err = pagoda("run", "attention")
    assert (code, out, err.strip()) == (130, "", "interrupted")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_output_that_cannot_be_written():
    code = "import sys; sys.argv = ['pagoda', 'chips']; from pagoda.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=False, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr.decode()) == (
        1,
        ("error: the output: it must be written, but No space left on device; free some space or "
        "write elsewhere\n"),
    )


def test_a_warning_is_one_line(pagoda, monkeypatch):
    formatted = []

    def warn(*_):
        formatted.append(warnings.formatwarning("no room", RuntimeWarning, "file.py", 3))
        raise KeyboardInterrupt

    monkeypatch.setattr(Attention, "build", warn)
    pagoda("run", "attention")
    assert formatted == ["warning: no room\n"]


def test_unknown_command(pagoda):
    code, _, err = pagoda("fly")
    assert code == 2 and err.endswith("Error: No such command 'fly'.\n")


# Figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [0, 1, 3, 7])
@pytest.mark.parametrize("keys", [0, 1, 4, 9])
def test_macs_of_attention(queries, keys, causal):
    what = Attention(queries=queries, keys=keys, causal=causal, heads=2, head_dim=16)
    visible = np.ones((queries, keys), bool)
    if causal:
        visible = np.tril(visible, what.offset)
    assert what.macs == 2 * 2 * 16 * np.count_nonzero(visible)


@pytest.mark.parametrize("chip", ["tiny", "car"])
def test_every_cycle_is_accounted_for(pagoda, chip):
    cores = {"tiny": 1, "car": 4}[chip]
    out = pagoda("run", "attention", "queries=40", "--chip", chip, "--json")[1]
    found = json.loads(out.splitlines()[-1])
    for row in found["stalls"].values():
        assert min(row.values()) >= 0
        assert row["busy"] + sum(row[cause] for cause in IDLE) == cores * found["cycles"]
    assert sum(row["commands"] for row in found["stalls"].values()) == found["commands"]


def test_commands_are_click_commands():
    for name in WORKING:
        assert isinstance(cli.pagoda.get_command(click.Context(cli.pagoda), name), click.Command)
