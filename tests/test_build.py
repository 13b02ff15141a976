"""Regions to executables, and executables on a device, without torch."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from pagoda.compiler.errors import CompileError
from pagoda.compiler.executable import Executable
from pagoda.compiler.index_expr import Const, Expr, Symbol, Var
from pagoda.compiler.loop_nest import Builder
from pagoda.compiler.region import (
    Buffer,
    KernelCall,
    LibraryCall,
    Region,
    TensorArg,
    TensorInput,
    View,
)
from pagoda.isa import PRESETS
from pagoda.kernels.build import build
from pagoda.runtime import Device, DeviceFault
from pagoda.runtime.executor import LoadedExecutable

TINY = PRESETS["tiny"]
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BF16, "int64": np.dtype(np.int64)}
N = Symbol("n")


def flat(buffer: int, size: Expr, dtype: str) -> View:
    return View(buffer, Const(0), (size,), (Const(1),), dtype)


def region(buffers: dict[str, tuple[str, Expr | int]], steps: list[KernelCall], written=("out",)):
    """All buffers are arguments; those in `written` are mutated."""
    sized = {name: (dtype, size if isinstance(size, Expr) else Const(size))
             for name, (dtype, size) in buffers.items()}  # fmt: skip
    return Region(
        "test",
        tuple(TensorInput(flat(n, size, dtype)) for n, (dtype, size) in enumerate(sized.values())),
        (),
        (),
        tuple(
            Buffer(name, dtype, size, "input", mutated=name in written)
            for name, (dtype, size) in sized.items()
        ),
        tuple(steps),
    )


def run(made: Region, arrays: list[np.ndarray], symbols=None, chip=TINY) -> list[np.ndarray]:
    """The arrays after the region has run on them."""
    device, symbols = Device(chip), symbols or {}
    executable = Executable.from_bytes(build(made, chip, symbols).to_bytes())
    addresses = [device.place(array) for array in arrays]
    arguments = [TensorArg(device.pointer(a), (), (), "") for a in addresses]
    LoadedExecutable(device, executable).run(arguments, [], symbols)
    return [device.array(a, x.shape, x.dtype) for a, x in zip(addresses, arrays, strict=True)]


def test_copy_transposes_and_converts():
    out = View(0, Const(0), (N, Const(5)), (Const(5), Const(1)), "bfloat16")
    source = View(1, Const(3), (N, Const(5)), (Const(1), N), "float32")
    made = region(
        {"out": ("bfloat16", N * 5), "a": ("float32", N * 5 + 3)},
        [KernelCall(LibraryCall("copy"), (out, source))],
    )
    a = np.arange(38, dtype=np.float32)
    found, _ = run(made, [np.zeros((7, 5), BF16), a], {"n": 7})
    assert np.array_equal(found, a[3:].reshape(5, 7).T.astype(BF16))


def scale(factor: float, size: int) -> KernelCall:
    """out = a * factor; the factor is part of the code, so every factor is a kernel of its own."""
    builder = Builder([Const(size)])
    value = builder.load("a", "float32", Var(0))
    product = builder.pointwise("mul", value, builder.constant(factor, "float32"))
    builder.store("out", "float32", Var(0), product)
    nest, names, _ = builder.build()
    views = {name: flat(n, Const(size), "float32") for n, name in enumerate(("out", "a"))}
    return KernelCall(nest, tuple(views[name] for name in names))


def test_code_beyond_imem_becomes_several_launches():
    chip = replace(TINY, imem_bytes=4096)
    steps = [scale(float(k), 64) for k in range(40)]
    made = region({"out": ("float32", 64), "a": ("float32", 64)}, steps)
    executable = build(made, chip, {})
    assert len(executable.launches) > 1
    assert sum(len(launch.calls) for launch in executable.launches) == 40
    assert all(len(launch.program.code) <= 4096 for launch in executable.launches)
    out, a = run(made, [np.zeros(64, np.float32), np.arange(64, dtype=np.float32)], chip=chip)
    assert np.array_equal(out, a * 39)


def test_equal_kernels_share_code():
    made = region({"out": ("float32", 64), "a": ("float32", 64)}, [scale(2.0, 64)] * 30)
    (launch,) = build(made, TINY, {}).launches
    assert len({call.entry for call in launch.calls}) == 1


def embedding() -> Region:
    """out[i] = table[index[0], i], for 8 columns of a table of 5 rows."""
    builder = Builder([Const(8)])
    row = builder.indirect(builder.load("index", "int64", Const(0)), Const(5))
    builder.store("out", "float32", Var(0), builder.load("table", "float32", row * 8 + Var(0)))
    nest, names, _ = builder.build()
    buffers = {"out": ("float32", 8), "table": ("float32", 40), "index": ("int64", 1)}
    views = {name: flat(n, Const(size), dtype)
             for n, (name, (dtype, size)) in enumerate(buffers.items())}  # fmt: skip
    return region(buffers, [KernelCall(nest, tuple(views[n] for n in names), origin="embedding")])


def test_indirect_rows():
    table = np.arange(40, dtype=np.float32).reshape(5, 8)
    for index in (0, 4, -1):
        out, *_ = run(embedding(), [np.zeros(8, np.float32), table, np.array([index])])
        assert np.array_equal(out, table[index])


def test_a_fault_names_kernel_and_tensor():
    table = np.zeros((5, 8), np.float32)
    message = r"kernel 'nest_\w+'.*GATHER_INDEX.*tensor '(table|index)'"
    with pytest.raises(DeviceFault, match=message):
        run(embedding(), [np.zeros(8, np.float32), table, np.array([5])])


def test_a_step_no_kernel_does():
    wide = flat(0, Const(8), "float64")
    made = region(
        {"out": ("float64", 8), "a": ("float64", 8)},
        [KernelCall(LibraryCall("copy"), (wide, wide), origin="aten.copy")],
    )
    with pytest.raises(CompileError, match="float64") as caught:
        build(made, TINY, {})
    assert caught.value.__notes__ == ["in the step aten.copy"]
    assert re.search("float32", str(caught.value))
