"""From `mm`, `bmm` and `addmm` steps to kernels: layouts, extents of one, dtypes, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from compiler_support import bfloat16, run_kernel

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Symbol
from pagoda.compiler.region import KernelCall, LibraryCall, View
from pagoda.isa.chip import PRESETS
from pagoda.kernels.matmul_call import matmul_for
from pagoda.sim.machine import Simulator

TINY, EDGE = PRESETS["tiny"], PRESETS["edge"]
NAMES = {np.dtype(np.float32): "float32", bfloat16: "bfloat16", np.dtype(np.int8): "int8",
         np.dtype(np.int32): "int32"}  # fmt: skip


def view(buffer, array):
    strides = tuple(Const(stride // array.itemsize) for stride in array.strides)
    return View(buffer, Const(0), tuple(map(Const, array.shape)), strides, NAMES[array.dtype])


def step(name, *arrays, alpha=1, beta=1, precision="highest"):
    attributes = (("alpha", alpha), ("beta", beta)) if name == "addmm" else ()
    views = tuple(view(number, array) for number, array in enumerate(arrays))
    return KernelCall(LibraryCall(name, attributes, precision), views)


def windowed(array, found):
    """The view's elements, as a numpy view of the array that owns the memory."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    sizes = [int(size.evaluate({})) for size in found.sizes]
    strides = [int(s.evaluate({})) * array.itemsize for s in found.strides]
    memory = owner.reshape(-1, order="A").view(np.uint8)
    return np.ndarray(sizes, array.dtype, memory, start, strides)


def run(name, *arrays, chip=TINY, precision="highest"):
    """Runs the step and returns the first array, its result."""
    kernel, views = matmul_for(step(name, *arrays, precision=precision), chip, {})
    arguments = {v: windowed(arrays[found.buffer], found) for v, found in views.items()}
    run_kernel(chip, kernel, Simulator(chip, checking=True), **arguments)
    return arrays[0]


def numbers(*shape, dtype=np.float32, seed=0):
    """Small multiples of 1/8: products and their sums are exact in every type."""
    whole = np.random.default_rng(seed).integers(-8, 9, shape)
    return (whole if dtype == np.int8 else whole / 8).astype(dtype)


def turned(array):
    """The same numbers, stored with the last two dimensions exchanged."""
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)


def gaps(array):
    """The same numbers, every other element of a larger array."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


LAYOUTS = {"upright": np.array, "turned": turned, "gaps": gaps}
FLOATS = pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["float32", "bfloat16"])


def product(a, b):
    return a.astype(np.float32) @ b.astype(np.float32)


@FLOATS
@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_b", LAYOUTS)
def test_mm_of_every_layout(dtype, of_a, of_b):
    a = LAYOUTS[of_a](numbers(5, 9, dtype=dtype))
    b = LAYOUTS[of_b](numbers(9, 7, dtype=dtype, seed=1))
    out = LAYOUTS[of_a](np.zeros((5, 7), np.float32))
    assert np.array_equal(run("mm", out, a, b), product(a, b))


@FLOATS
@pytest.mark.parametrize(
    "sizes", [(1, 9, 7), (5, 1, 7), (5, 9, 1), (1, 1, 7), (1, 9, 1), (1, 1, 1)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_extents_of_one(dtype, sizes, layout):
    m, k, n = sizes
    a, b = (LAYOUTS[layout](numbers(*s, dtype=dtype, seed=s[0])) for s in ((m, k), (k, n)))
    out = LAYOUTS[layout](np.zeros((m, n), np.float32))
    assert np.array_equal(run("mm", out, a, b), product(a, b))


@pytest.mark.parametrize("out", [np.float32, bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_bmm_in_float32(out, precision):
    a, b = numbers(3, 4, 10), turned(numbers(3, 10, 6, seed=1))
    c = run("bmm", np.zeros((3, 4, 6), out), a, b, precision=precision, chip=EDGE)
    assert np.array_equal(c, product(a, b).astype(out))


def test_an_operand_repeated_over_the_batch():
    a, b = numbers(3, 4, 10), np.broadcast_to(numbers(10, 6, seed=1), (3, 10, 6))
    assert np.array_equal(run("bmm", np.zeros((3, 4, 6), np.float32), a, b), product(a, b))


@FLOATS
@pytest.mark.parametrize("of_bias", ["row", "repeated row", "row with gaps", "one number"])
def test_the_bias_of_addmm(dtype, of_bias):
    a, b = numbers(4, 10, dtype=dtype), turned(numbers(10, 6, dtype=dtype, seed=1))
    bias = numbers(6, dtype=dtype, seed=2)
    if of_bias == "row with gaps":
        bias = gaps(bias)
    elif of_bias == "repeated row":
        bias = np.broadcast_to(bias, (4, 6))
    elif of_bias == "one number":
        bias = np.broadcast_to(bias[:1], (4, 6))
    c = run("addmm", np.zeros((4, 6), dtype), bias, a, b)
    expected = product(a, b) + bias.astype(np.float32)
    assert np.array_equal(c, expected.astype(dtype))


def test_int8():
    a, b = numbers(4, 10, dtype=np.int8), turned(numbers(10, 6, dtype=np.int8, seed=1))
    c = run("mm", np.zeros((4, 6), np.int32), a, b)
    assert np.array_equal(c, a.astype(np.int32) @ b.astype(np.int32))


def test_precision_decides_the_accuracy():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 50), np.float32), rng.standard_normal((50, 8), np.float32)
    exact = a.astype(np.float64) @ b
    errors = [
        np.abs(run("mm", np.zeros((8, 8), np.float32), a, b, precision=precision) - exact).max()
        for precision in ("medium", "high", "highest")
    ]
    assert errors[2] < 4e-6 < 10 * errors[2] < errors[1] < 1e-3 < errors[0]


@FLOATS
def test_strides_of_extents_of_one_do_not_make_another_kernel(dtype):
    b, out = numbers(9, 7, dtype=dtype), np.zeros((1, 7), np.float32)
    rows = numbers(4, 9, dtype=dtype)
    kernels = [matmul_for(step("mm", out, a, b), TINY, {})[0] for a in (rows[:1], rows[::2][:1])]
    assert kernels[0] == kernels[1]


@FLOATS
def test_one_kernel_for_every_number_of_rows(dtype):
    """A symbolic extent is an argument word, and `symbols` says what to choose blocks for."""
    name, rows = NAMES[np.dtype(dtype)], Symbol("s0")
    args = (
        View(0, Const(0), (rows, Const(7)), (Const(7), Const(1)), name),
        View(1, Const(0), (rows, Const(9)), (Const(9), Const(1)), name),
        View(2, Const(0), (Const(9), Const(7)), (Const(1), Const(9)), name),
    )
    call = KernelCall(LibraryCall("mm"), args)
    kernel, views = matmul_for(call, TINY, {"s0": 3})
    assert ("c", "size", 1) in kernel.words() and views["c"].sizes[1] == rows
    for m in (1, 3, 20):
        a, b = numbers(1, m, 9, dtype=dtype), turned(numbers(1, 9, 7, dtype=dtype, seed=1))
        c = np.zeros((1, m, 7), dtype)
        run_kernel(TINY, kernel, Simulator(TINY, checking=True), c=c, a=a, b=b)
        assert np.array_equal(c, product(a, b).astype(dtype))


# Errors ------------------------------------------------------------------------------------------

F32 = np.zeros((4, 4), np.float32)
BF16, I8, I32 = F32.astype(bfloat16), F32.astype(np.int8), F32.astype(np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (step("mm", F32, F32, BF16),
         ("mm: both operands have one dtype, but they are float32 and bfloat16; convert one of "
         "them")),
        (step("bmm", F32[None], BF16[None], I8[None]),
         "bmm: both operands have one dtype, but they are bfloat16 and int8; convert one of them"),
        (step("mm", F32, I32, F32),
         "mm: its operands are bfloat16 or float32 or int8, but one is int32; convert it first"),
        (step("mm", I32, F32, F32),
         ("mm: its result and bias for float32 operands are bfloat16 or float32, but one is int32; "
         "convert it first")),
        (step("mm", F32, I8, I8),
         ("mm: its result and bias for int8 operands are int32, but one is float32; convert it "
         "first")),
        (step("addmm", F32, I32[0], F32, F32),
         ("addmm: its result and bias for float32 operands are bfloat16 or float32, but one is "
         "int32; convert it first")),
        (step("addmm", F32, F32[0], F32, F32, alpha=2),
         ("addmm: alpha and beta are 1, but the call is addmm(alpha=2, beta=1); scale the result "
         "or the bias in an operation of its own")),
        (step("addmm", F32, F32, F32, F32),
         ("addmm: the bias is one row, repeated, but it is a matrix with strides 4, 1; add it in "
         "an operation of its own")),
    ],
    ids=["mixed", "mixed-int8", "operand", "result", "int8-result", "bias", "alpha", "matrix"],
)  # fmt: skip
def test_what_the_kernels_do_not_take(call, message):
    with pytest.raises(CompileError) as error:
        matmul_for(call, TINY, {})
    assert str(error.value) == message


@pytest.mark.parametrize("array", [BF16, I8], ids=["bfloat16", "int8"])
def test_a_chip_whose_matrix_engine_lacks_the_type(array):
    lacks, has = ("int8", "bf16") if array is I8 else ("bf16", "int8")
    chip = replace(TINY, name="small", matrix_types=(has,))
    with pytest.raises(CompileError) as error:
        matmul_for(step("mm", I32 if array is I8 else F32, array, array), chip, {})
    assert str(error.value) == (
        f"{lacks} matmul: it needs a matrix engine that multiplies {lacks}, but chip small has "
        f"{has}; convert the operands to {has}, or use another chip"
    )
