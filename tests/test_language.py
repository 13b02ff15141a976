"""The kernel language: what kernels mean, and what is refused, with the place and the remedy."""

import re
from pathlib import Path

import numpy as np
import pytest
from compiler_support import bfloat16, run_kernel
from golden_text import check_golden

from pagoda.compiler.errors import CompileError
from pagoda.compiler.language import (
    Tensor,
    TensorType,
    add_to,
    barrier,
    block,
    cdiv,
    core_count,
    core_id,
    core_tiles,
    dot,
    exp2,
    fma,
    full,
    iota,
    kernel,
    load,
    maximum,
    recip,
    state,
    store,
    tiles,
    to,
    to_float,
    to_int,
    trap,
    where,
    word,
    zeros,
)
from pagoda.isa.chip import PRESETS
from pagoda.isa.numbers import DType
from pagoda.isa.tables import exp2 as table_exp2
from pagoda.isa.tables import reciprocal

TINY, EDGE, CAR = (PRESETS[name] for name in ("tiny", "edge", "car"))
F32, BF16 = TensorType.dynamic(DType.F32, 2), TensorType.dynamic(DType.BF16, 2)
I32 = TensorType.dynamic(DType.I32, 2)
SHIFT = 3


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@kernel
def scale(y: Tensor, x: Tensor, factor: float, shift: int, *, ROWS, COLS):
    """y = x * factor + shift * SHIFT."""
    for i in core_tiles(x.size(0), ROWS):
        for j in tiles(x.size(1), COLS):
            store(y[i, j], load(x[i, j]) * factor + to_float(iota(i, j, 0, 0, shift * SHIFT)))


@pytest.mark.parametrize("chip", [TINY, EDGE, CAR], ids=lambda chip: chip.name)
def test_scale(chip):
    ir = scale.build(y=BF16, x=F32, ROWS=4, COLS=16)
    x, y = random((13, 37)), np.zeros((13, 37), bfloat16)
    bits = int(np.float32(1.5).view(np.uint32))
    run_kernel(chip, ir, x=x, y=y, factor=bits, shift=-2)
    assert np.array_equal(y, (x * np.float32(1.5) - 6).astype(bfloat16))


def test_ir_of_scale():
    ir = scale.build(y=BF16, x=F32, ROWS=4, COLS=16)
    check_golden("scale.ir.txt", str(ir))


@kernel
def softmax(y: Tensor, x: Tensor, *, ROWS):
    """Rows of known length; log2-based."""
    for i in tiles(x.size(0), ROWS):
        row = load(x[i, :])
        top = max(row, 1)
        power = exp2((row - top) * 1.4426950408889634)
        store(y[i, :], power * recip(sum(power, 1)))


def test_softmax():
    fixed = TensorType(DType.F32, (None, 70), (None, 4))
    x, y = random((9, 70)), np.zeros((9, 70), np.float32)
    run_kernel(EDGE, softmax.build(y=fixed, x=fixed, ROWS=4), x=x, y=y)
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(y, exact / exact.sum(1, keepdims=True), rtol=2e-6)


@kernel
def running_maximum(y: Tensor, x: Tensor, *, COLS):
    """Carried over a loop: the tile `best` is changed in place."""
    best = load(x[0, full(COLS)])
    for i in range(1, x.size(0)):
        best = maximum(best, load(x[i, full(COLS)]))
        store(y[i, full(COLS)], best)
    store(y[0, full(COLS)], best)


def test_tiles_carried_over_a_loop():
    x, y = random((6, 20)), np.zeros((6, 20), np.float32)
    run_kernel(TINY, running_maximum.build(y=F32, x=F32, COLS=20), x=x, y=y)
    assert np.array_equal(y[1:], np.maximum.accumulate(x)[1:])
    assert np.array_equal(y[0], x.max(0))


@kernel
def row_sums(y: Tensor, x: Tensor, *, ROWS, COLS):
    for i in tiles(x.size(0), ROWS):
        s = state("fsum", i)
        for j in tiles(x.size(1), COLS):
            s.add(load(x[i, j]), j)
        store(y[i, full(1)], s.finish())


def test_chunks_of_a_reduction_give_the_same_bits():
    x, results = random((7, 300)), []
    for chip, cols in ((TINY, 64), (EDGE, 128), (EDGE, 320)):
        y = np.zeros((7, 1), np.float32)
        run_kernel(chip, row_sums.build(y=F32, x=F32, ROWS=4, COLS=cols), x=x, y=y)
        results.append(y)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    np.testing.assert_allclose(results[0][:, 0], x.sum(1), rtol=1e-4)


@kernel
def integers(y: Tensor, n: int):
    """A collatz walk with a branch, then rows filled through a variable bound again."""
    steps = 0
    value = n
    for _ in range(200):
        if value > 1:
            steps = steps + 1
            if value % 2 == 0:
                value = value // 2
            else:
                value = 3 * value + 1
    low = min(steps, 5) if steps > 3 and n != 0 else -1
    store(y[0, full(4)], iota(1, 4, 0, low, steps))


def test_run_time_integers():
    y = np.zeros((1, 4), np.int32)
    run_kernel(TINY, integers.build(y=I32), y=y, n=27)
    assert y[0].tolist() == [111, 116, 121, 126]


@kernel
def embedding(y: Tensor, ids: Tensor, table: Tensor, *, ROWS, COLS):
    for i in core_tiles(y.size(0), ROWS):
        rows = load(ids[i])
        for j in tiles(y.size(1), COLS):
            store(y[i, j], load(table[rows, j]))


@pytest.mark.parametrize("chip", [TINY, CAR], ids=lambda chip: chip.name)
def test_embedding(chip):
    table = random((50, 40)).astype(bfloat16)
    ids = np.random.default_rng(1).integers(0, 50, 23)
    y = np.zeros((23, 40), np.float32)
    types = {"y": F32, "ids": TensorType.dynamic(DType.I64, 1), "table": BF16}
    run_kernel(chip, embedding.build(**types, ROWS=8, COLS=32), y=y, ids=ids, table=table)
    assert np.array_equal(y, table[ids].astype(np.float32))


@kernel
def skip_rows(y: Tensor, lengths: Tensor, x: Tensor, *, COLS):
    """Data-dependent control: each row is copied up to its own length."""
    for i in range(x.size(0)):
        length = word(load(lengths[i, full(1)]))
        for j in tiles(length, COLS):
            store(y[i, j], load(x[i, j]))


def test_lengths_read_from_memory():
    x, y = random((4, 50)), np.zeros((4, 50), np.float32)
    lengths = np.array([[0], [50], [17], [33]], np.int32)
    ir = skip_rows.build(y=F32, lengths=I32, x=F32, COLS=16)
    run_kernel(TINY, ir, x=x, y=y, lengths=lengths)
    for row, expected, length in zip(y, x, lengths[:, 0], strict=True):
        assert np.array_equal(row[:length], expected[:length]) and not row[length:].any()


@kernel
def everything(y: Tensor, x: Tensor, *, N):
    """One of each function."""
    i, j = full(N), full(N)
    a = load(x[i, j])
    b = where(a > 0, a, -a) + abs(a)
    c = fma(b, b, 1.0) / maximum(b, 0.5)
    d = to_float(to_int(c * 4.0) // 3 % 7 & 5 | 2 ^ 1)
    e = max(a, 0) + min(a, 0)
    store(y[i, j], to(c + d - e, DType.BF16))


def test_one_of_each_function():
    x, y = random((8, 8)), np.zeros((8, 8), np.float32)
    run_kernel(TINY, everything.build(y=F32, x=F32, N=8), x=x, y=y)
    b = np.where(x > 0, x, -x) + np.abs(x)
    c = (b.astype(np.float64) * b + 1).astype(np.float32) / np.maximum(b, np.float32(0.5))
    d = ((c * 4).astype(np.int32) // 3 % 7 & 5 | 2 ^ 1).astype(np.float32)
    expected = (c + d - (x.max(0) + x.min(0))).astype(bfloat16).astype(np.float32)
    assert np.array_equal(y, expected)


@kernel
def product(y: Tensor, a: Tensor, b: Tensor, *, N, TWICE):
    """zeros used as a value, parts of a tile, a product of its own name."""
    i = full(N)
    acc = zeros(i, i)
    total = zeros(i, i) + 1.0
    x = load(a[i, i])
    for k in tiles(N, 4):
        acc += dot(x[:, k], load(b[k, i]))
    if TWICE:
        again = dot(to(x, DType.BF16), load(b[i, i]))
        total = total + again
    store(y[i, i], acc + total)


@pytest.mark.parametrize("twice", [False, True])
def test_products(twice):
    a, b = (random((8, 8), seed).round(1).astype(bfloat16) for seed in (0, 1))
    y = np.zeros((8, 8), np.float32)
    run_kernel(TINY, product.build(y=F32, a=BF16, b=BF16, N=8, TWICE=twice), y=y, a=a, b=b)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(y, exact * (1 + twice) + 1, rtol=1e-4, atol=1e-5)


@kernel
def any_strides(y: Tensor, x: Tensor, *, ROWS, COLS):
    for i in tiles(x.size(0), ROWS):
        for j in tiles(x.size(1), COLS):
            store(y[i, j], load(x[i, j]) + 1.0)


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_transposed_operands(turned):
    """Storage with contiguous columns, on either side."""
    x, y = random((5, 11)), np.zeros((5, 11), np.float32)
    if turned[0]:
        x = np.asfortranarray(x)
    if turned[1]:
        y = np.asfortranarray(y)
    types = [TensorType.dynamic(DType.F32, 2, -2 if t else -1) for t in turned]
    run_kernel(TINY, any_strides.build(y=types[1], x=types[0], ROWS=4, COLS=8), x=x, y=y)
    assert np.array_equal(y, x + 1)


def test_no_contiguous_dimension():
    storage = random((10, 44))
    x, y = storage[::2, ::4], np.zeros((15, 33), np.float32)[1::3, 2::3]
    strided = TensorType(DType.F32, (None, None), (None, None))
    run_kernel(TINY, any_strides.build(y=strided, x=strided, ROWS=4, COLS=8), x=x, y=y)
    assert np.array_equal(y, x + 1)
    assert np.count_nonzero(y.base) <= y.size


@kernel
def shared_total(y: Tensor, x: Tensor, *, COLS):
    """Every core adds its rows; core 0 negates the total after the barrier."""
    for i in range(core_id(), x.size(0), core_count()):
        if i < 1:
            add_to(y[0, full(COLS)], load(x[i, full(COLS)]))
    barrier()
    if core_id() == 0:
        store(y[0, full(COLS)], -load(y[0, full(COLS)]))


def test_barrier():
    x, y = random((4, 16)), np.ones((1, 16), np.float32)
    fixed = TensorType.fixed(DType.F32, 4, 16)
    run_kernel(CAR, shared_total.build(y=F32, x=fixed, COLS=16), x=x, y=y)
    assert np.array_equal(y[0], -(1 + x[0]))


@kernel
def optional(y: Tensor, bias: Tensor | None, *, N):
    i = block(0, y.size(0), N)
    tile = zeros(i, full(N))
    if bias is None:
        store(y[i, full(N)], tile + 2.0)
    else:
        store(y[i, full(N)], tile + load(bias[full(N)]))


@pytest.mark.parametrize("present", [False, True])
def test_optional_tensors(present):
    y, bias = np.zeros((3, 4), np.float32), random(4)
    types = {"y": F32, "bias": TensorType.dynamic(DType.F32, 1) if present else None}
    run_kernel(TINY, optional.build(**types, N=4), y=y, **({"bias": bias} if present else {}))
    assert np.array_equal(y, np.broadcast_to(bias if present else np.float32(2), (3, 4)))


def test_the_tables_are_the_contracts():
    """exp2 and recip of a kernel are the definition's, bit for bit."""

    @kernel
    def tables(y: Tensor, x: Tensor):
        store(y[full(2), full(50)], exp2(load(x[full(2), full(50)])))
        store(y[full(2), full(50)], recip(load(y[full(2), full(50)])))

    x, y = random((2, 50)), np.zeros((2, 50), np.float32)
    run_kernel(TINY, tables.build(y=F32, x=F32), x=x, y=y)
    assert np.array_equal(y, reciprocal(table_exp2(x)))


# Errors ------------------------------------------------------------------------------------------


@kernel
def undefined_name(y: Tensor, *, N):
    store(y[full(N), full(N)], missing)  # noqa: F821


@kernel
def wrong_rank(y: Tensor, *, N):
    store(y[full(N)], zeros(full(N), full(N)))


@kernel
def run_time_block(y: Tensor, *, N):
    for i in tiles(y.size(0), y.size(1)):
        store(y[i, full(N)], zeros(i, full(N)))


@kernel
def while_loop(y: Tensor, *, N):
    while N:
        pass


@kernel
def unknown_call(y: Tensor, *, N):
    print(N)


@kernel
def bad_shapes(y: Tensor, *, N):
    a = load(y[full(N), full(4)]) + load(y[full(N), full(8)])
    store(y[full(N), full(8)], a)


@kernel
def mixed_classes(y: Tensor, *, N):
    a = load(y[full(N), full(N)])
    store(y[full(N), full(N)], a + iota(full(N), full(N)))


@kernel
def whole_run_time_extent(y: Tensor, *, N):
    store(y[full(N), :], zeros(full(N), full(N)))


@kernel
def product_without_zeros(y: Tensor, *, N):
    a = load(y[full(N), full(N)])
    b = 0
    b += dot(a, a)


@kernel
def refused_assertion(y: Tensor, *, N):
    assert N % 4 == 0, "N is a multiple of 4"
    trap(cdiv(N, 4))


@kernel
def inner_mismatch(y: Tensor, *, N):
    acc = dot(load(y[full(4), full(N)]), load(y[full(8), full(N)]))
    store(y[full(4), full(N)], acc)


@kernel
def range_as_number(y: Tensor, *, N):
    for i in tiles(y.size(0), N):
        trap(i + 1)


ERRORS = [
    (
        undefined_name, 1, 32,
        ("name `missing`: a name is a parameter, a variable assigned before, or a number of the "
        "module, but it is none of them here; in scope are y, N"),
    ),
    (
        wrong_rank, 1, 11,
        "index of y: it has one index per dimension, 2, but there are 1; index every dimension",
    ),
    (
        run_time_block, 1, 5,
        ("`tiles(y.size(0), y.size(1))`: tiles(extent, BLOCK) takes a compile-time BLOCK >= 1, but "
        "the arguments are y.size[0], y.size[1]; pass BLOCK after *"),
    ),
    (
        while_loop, 1, 5,
        ("`while N:`: a kernel consists of assignments, for, if, assert and calls, but this is "
        "While; write it with those"),
    ),
    (
        bad_shapes, 1, 9,
        ("`load(y[full(N), full(4)]) + load(y[full(N), full(8)])`: operands have equal block "
        "sizes, or 1, but columns are 4 and 8; index them with the same ranges"),
    ),
    (
        mixed_classes, 2, 32,
        ("tile arithmetic: both operands are float or both integer, but they are float and int; "
        "convert with to_float(...) or to_int(...)"),
    ),
    (
        whole_run_time_extent, 1, 11,
        ("full(extent): the extent is known at compile time, but it is a run-time integer; fix the "
        "size in the TensorType, or loop with tiles(extent, BLOCK)"),
    ),
    (
        product_without_zeros, 3, 5,
        ("`b`: a product is added to zeros(...), but `b` is 0; write `b = zeros(i, j)` before the "
        "loop and `b += dot(...)` in it"),
    ),
    (
        refused_assertion, 1, 5,
        ("kernel refused_assertion: N is a multiple of 4, but it does not hold; choose other "
        "compile-time values"),
    ),
    (
        inner_mismatch, 1, 11,
        ("dot: the columns of the first tile are the rows of the second, but they are 4 x 6 and "
        "8 x 6; index both with the same range"),
    ),
    (
        range_as_number, 2, 14,
        ("operator +: its operands are integers, numbers or tiles, but one is a range; use .start "
        "or .size of a range, load(...) of a window"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "line", "column", "message"), ERRORS, ids=[e[0].name for e in ERRORS]
)
def test_errors(function, line, column, message):
    place = f"{Path(__file__)}:{function.first_line + 1 + line}:{column}: "
    with pytest.raises(CompileError, match=f"^{re.escape(place + message)}$"):
        function.build(y=F32, N=6)


@kernel
def divides_by_zero(y: Tensor, *, N):
    store(y[0, full(N)], 1 / (N - 6))


def test_a_compile_time_value_that_there_is_not():
    message = (
        "`1 / (N - 6)`: a compile-time expression has a value, but 1 / 0 raised "
        "ZeroDivisionError: division by zero; correct its operands"
    )
    with pytest.raises(CompileError, match=re.escape(message) + "$"):
        divides_by_zero.build(y=F32, N=6)


def test_unknown_function():
    rule = "call of `print`: a kernel calls functions of the kernel language, but it is none; use"
    with pytest.raises(CompileError, match=re.escape(rule)):
        unknown_call.build(y=F32, N=6)


def test_build_takes_the_parameters():
    with pytest.raises(CompileError, match="build takes y, x, ROWS, COLS, but COLS is missing"):
        scale.build(y=F32, x=F32, ROWS=4)
    with pytest.raises(CompileError, match="but DEPTH is none of them; name exactly those$"):
        scale.build(y=F32, x=F32, ROWS=4, COLS=4, DEPTH=3)
    with pytest.raises(CompileError, match="only a parameter `Tensor | None` may be absent"):
        scale.build(y=None, x=F32, ROWS=4, COLS=4)


def test_parameters_need_types():
    with pytest.raises(CompileError, match="parameter x: a kernel's parameters are Tensor"):

        @kernel
        def untyped(x):
            pass


def test_the_functions_mean_something_only_in_kernels():
    with pytest.raises(RuntimeError, match=r"^load\(\.\.\.\) means something only inside an @kern"):
        load(None)


@kernel
def shared_k(y: Tensor, a: Tensor, b: Tensor, *, N, BK):
    """Each core its share of k; a core without one still has its zeros."""
    i = full(N)
    acc = zeros(i, i)
    for k in core_tiles(a.size(1), BK):
        acc += dot(load(a[i, k]), load(b[k, i]))
    store(y[core_id(), i, i], acc)


def test_a_product_whose_loop_may_be_empty():
    a, b = random((4, 12)).astype(bfloat16), random((12, 4), 1).astype(bfloat16)
    y = np.ones((4, 4, 4), np.float32)
    types = {"y": TensorType.dynamic(DType.F32, 3), "a": BF16, "b": BF16}
    run_kernel(CAR, shared_k.build(**types, N=4, BK=4), y=y, a=a, b=b)
    np.testing.assert_allclose(y.sum(0), a.astype(np.float64) @ b.astype(np.float64), rtol=1e-5)
    assert not y[3].any()
