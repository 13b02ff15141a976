"""Products with an epilogue: the same bits as in two steps, and only where that is allowed."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

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
from pagoda.kernels.fusion import FusedCall, fuse
from pagoda.runtime import Device
from pagoda.runtime.executor import LoadedExecutable

BF16 = np.dtype(ml_dtypes.bfloat16)
ROWS = Symbol("s")
NAMES = ("out", "x", "a", "b", "gate", "bias")


def silu_times(cols: int, rows: Expr = ROWS, name: str = "r") -> tuple[Builder, Expr]:
    """out = silu(gate) * x over rows x cols elements, the way Inductor writes it."""
    builder = Builder([rows.substitute({ROWS: Symbol(name)}) * cols])
    here = Var(0)
    gate = builder.load("gate", "bfloat16", here)
    power = builder.pointwise("exp", builder.pointwise("neg", gate))
    below = builder.pointwise("add", power, builder.constant(1.0, "float32"))
    x = builder.load("x", "bfloat16", here)
    product = builder.pointwise("mul", builder.pointwise("div", gate, below), x)
    builder.store("out", "bfloat16", here, product)
    return builder, here


def row_scaled(cols: int) -> Builder:
    """out[i, j] = max(x[i, j] * gate[j], 0)."""
    builder = Builder([Symbol("r"), Const(cols)])
    here = Var(0) * cols + Var(1)
    scale = builder.load("gate", "bfloat16", Var(1))
    scaled = builder.pointwise("mul", builder.load("x", "bfloat16", here), scale)
    zero = builder.constant(0.0, "float32")
    builder.store("out", "bfloat16", here, builder.pointwise("maximum", scaled, zero))
    return builder


def matrix(buffer: int, rows: Expr | int, cols: int) -> View:
    size = rows if isinstance(rows, Expr) else Const(rows)
    return View(buffer, Const(0), (size, Const(cols)), (Const(cols), Const(1)), "bfloat16")


def flat(buffer: int, size: Expr) -> View:
    return View(buffer, Const(0), (size,), (Const(1),), "bfloat16")


def make(builder: Builder, cols: int, k: int, *, bias=False, kind="temporary") -> Region:
    """x = a b^T (+ bias); then the nest, which writes out."""
    sizes = [ROWS * cols, ROWS * cols, ROWS * k, Const(k * cols), ROWS * cols, Const(cols)]
    nest, names, symbols = builder.build()
    operands = (matrix(2, ROWS, k), replace(matrix(3, k, cols), strides=(Const(1), Const(k))))
    if bias:
        call = LibraryCall("addmm", (("alpha", 1), ("beta", 1)))
        product = KernelCall(call, (matrix(1, ROWS, cols), flat(5, Const(cols)), *operands))
    else:
        product = KernelCall(LibraryCall("mm"), (matrix(1, ROWS, cols), *operands))
    views = tuple(flat(NAMES.index(name), sizes[NAMES.index(name)]) for name in names)
    follower = KernelCall(nest, views, tuple(ROWS for _ in symbols))
    kinds = ["input", kind, *["input"] * 4]
    buffers = tuple(
        Buffer(name, "bfloat16", size, kind, mutated=name in ("out", "x") and kind == "input")
        for name, size, kind in zip(NAMES, sizes, kinds, strict=True)
    )
    inputs = tuple(
        TensorInput(flat(n, sizes[n])) for n, buffer in enumerate(buffers) if buffer.kind == "input"
    )
    return Region("test", inputs, (), (), buffers, (product, follower))


def in_two_steps(made: Region) -> Region:
    """Something that reads the product between the two keeps them apart."""
    product, nest = made.steps
    size = Const(1)
    copy = KernelCall(LibraryCall("copy"), (flat(len(made.buffers), size), flat(1, size)))
    between = Buffer("between", "bfloat16", size, "temporary")
    return replace(made, buffers=(*made.buffers, between), steps=(product, copy, nest))


def run(
    made: Region, arrays: dict[str, np.ndarray], rows: int, chip, result: str = "out"
) -> np.ndarray:
    device, symbols = Device(chip), {"s": rows}
    executable = build(made, chip, symbols)
    wanted = [made.buffers[entry.view.buffer].name for entry in made.inputs]
    places = {name: device.place(arrays[name]) for name in wanted}
    arguments = [TensorArg(device.pointer(places[name]), (), (), "") for name in wanted]
    LoadedExecutable(device, executable).run(arguments, [], symbols)
    return device.array(places[result], arrays[result].shape, np.uint16).copy()


def tensors(rows: int, cols: int, k: int, gate_rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows * cols)
    shapes = {
        "out": (rows, cols), "x": (rows, cols), "a": (rows, k), "b": (cols, k),
        "gate": (gate_rows, cols), "bias": (cols,),
    }  # fmt: skip
    return {name: rng.normal(size=shape).astype(BF16) for name, shape in shapes.items()}


@pytest.mark.parametrize("chip", ["tiny", "edge", "car"])
@pytest.mark.parametrize(("rows", "cols", "k"), [(1, 64, 32), (37, 96, 40), (5, 7, 3)])
def test_same_bits_as_two_steps(chip, rows, cols, k):
    arrays = tensors(rows, cols, k, rows)
    builder, _ = silu_times(cols)
    fused, apart = make(builder, cols, k), in_two_steps(make(builder, cols, k))
    assert isinstance(fuse(fused)[0], FusedCall) and len(fuse(apart)) == 3
    found = run(fused, arrays, rows, PRESETS[chip])
    assert np.array_equal(found, run(apart, arrays, rows, PRESETS[chip]))
    gate = arrays["gate"].astype(np.float64)
    x = (arrays["a"].astype(np.float64) @ arrays["b"].astype(np.float64).T).astype(BF16)
    wanted = gate / (1 + np.exp(-gate)) * x.astype(np.float64)
    assert np.allclose(found.view(BF16).astype(np.float64), wanted, rtol=2e-2, atol=1e-2)


def test_bias_and_row_operands():
    arrays = tensors(19, 48, 24, 1)
    fused = make(row_scaled(48), 48, 24, bias=True)
    apart = in_two_steps(fused)
    assert isinstance(fuse(fused)[0], FusedCall)
    for chip in ("tiny", "edge", "car"):
        found = run(fused, arrays, 19, PRESETS[chip])
        assert np.array_equal(found, run(apart, arrays, 19, PRESETS[chip]))


@pytest.mark.parametrize("chip", ["tiny", "edge", "car"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_is_used_again_is_stored_too(chip, bias):
    arrays = tensors(37, 96, 40, 37)
    builder, _ = silu_times(96)
    kept = make(builder, 96, 40, kind="input", bias=bias)
    (step,) = fuse(kept)
    assert isinstance(step, FusedCall) and step.epilogue.keep
    out, x = (run(kept, arrays, 37, PRESETS[chip], name) for name in ("out", "x"))
    apart = in_two_steps(kept)
    assert np.array_equal(out, run(apart, arrays, 37, PRESETS[chip]))
    assert np.array_equal(x, run(apart, arrays, 37, PRESETS[chip], "x"))


def test_a_product_waits_for_its_nest():
    builder, _ = silu_times(8)
    made = make(builder, 8, 4)
    product, nest = made.steps
    other = KernelCall(LibraryCall("copy"), (flat(5, Const(8)), flat(4, Const(8))))
    assert [type(step) for step in fuse(replace(made, steps=(product, other, nest)))] == [
        KernelCall, FusedCall,
    ]  # fmt: skip


def test_a_product_does_not_wait_while_its_operand_is_overwritten():
    builder, _ = silu_times(8)
    made = make(builder, 8, 4)
    product, nest = made.steps
    other = KernelCall(LibraryCall("copy"), (flat(2, Const(8)), flat(4, Const(8))))
    assert len(fuse(replace(made, steps=(product, other, nest)))) == 3


def test_not_fused_where_another_reads_the_product_first():
    builder, _ = silu_times(8)
    made = make(builder, 8, 4)
    product, nest = made.steps
    other = KernelCall(LibraryCall("copy"), (flat(5, Const(8)), flat(1, Const(8))))
    assert len(fuse(replace(made, steps=(product, other, nest)))) == 3


def test_not_fused_where_the_nest_writes_what_the_product_reads():
    builder, _ = silu_times(8)
    made = make(builder, 8, 8)
    follower = made.steps[1]
    into_a = tuple(replace(view, buffer=2) if view.buffer == 0 else view for view in follower.args)
    assert len(fuse(replace(made, steps=(made.steps[0], replace(follower, args=into_a))))) == 2


def test_not_fused_where_elements_move():
    builder = Builder([Symbol("r"), Const(8)])
    x = builder.load("x", "bfloat16", Var(0) * 8 + Var(1))
    builder.store("out", "bfloat16", Var(1) * Symbol("r") + Var(0), x)
    assert len(fuse(make(builder, 8, 4))) == 2
