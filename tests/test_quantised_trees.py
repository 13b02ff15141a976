"""Trees with i2fmul and faddq: the same bits, and one command where there were three."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tile_ir_oracle import evaluate_tree

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.quantised_trees import with_quantised_functions
from pagoda.compiler.schedule import Vector, pack_elementwise
from pagoda.compiler.tile_ir import Apply, Read, Row, apply, splat, walk
from pagoda.isa.numbers import DType

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e9, -3e9, 127.5, -128.5, 0.5, -0.5, 1e-40]


def packed(build, dtype):
    """(f1, f2) of the commands for build(sums, floats, a row of scales)."""
    b = KernelBuilder("trees")
    sums, floats = b.tile(DType.I32, 8, 16), b.tile(DType.F32, 8, 16)
    scales, out = b.tile(DType.F32, 1, 16), b.tile(dtype, 8, 16)
    b.elementwise(out, build(Read(sums.view()), Read(floats.view()), Row(scales.view())))
    found = walk(pack_elementwise(b.build()).body)
    return [(s.f1, s.f2) for s in found if isinstance(s, Vector)]


def scaled(sums, scale):
    return apply("fmul", apply("i2f", sums), scale)


def int8(x, *bounds):
    """int8 of a float, rounded; bounds: functions of floats with an integer."""
    x = apply("fround", x)
    for function, limit in bounds:
        x = apply(function, x, splat(float(limit)))
    return apply("f2i", x)


def between(x, low=-128, high=127):
    return apply("imin", apply("imax", x, splat(low)), splat(high))


def test_requantisation_is_one_command():
    one = [("i2fmul", "faddq")]
    assert packed(lambda s, x, r: int8(apply("fadd", scaled(s, r), r)), DType.I8) == one
    assert packed(lambda s, x, r: int8(apply("fadd", r, apply("fmul", r, apply("i2f", s)))),
                  DType.I8) == one  # fmt: skip
    assert packed(lambda s, x, r: int8(scaled(s, r)), DType.I8) == one
    added = packed(lambda s, x, r: between(int8(apply("fadd", scaled(s, r), x))), DType.I32)
    assert added == one
    assert packed(lambda s, x, r: apply("fadd", scaled(s, r), r), DType.F32) == [("i2fmul", "fadd")]
    assert packed(lambda s, x, r: int8(x), DType.I8) == [("mov", "faddq")]
    assert packed(lambda s, x, r: int8(x, ("fmax", 0)), DType.I8) == [("fmax", "faddq")]


def test_bounds_take_another_command():
    def build(s, x, r):
        return int8(apply("fadd", scaled(s, r), r), ("fmax", 3 * -1), ("fmin", 100))

    assert packed(build, DType.I8) == [("i2fmul", "faddq"), ("imax", "imin")]


def test_a_residual_takes_another_command():
    """The pair that leaves the fewest commands: not the sum with what is added to it."""

    def build(s, x, r):
        return int8(apply("fadd", apply("fadd", scaled(s, r), r), apply("fabs", x)))

    assert packed(build, DType.I8) == [("i2fmul", "fadd"), ("fabs", "faddq")]


def test_what_is_no_int8_stays():
    assert packed(lambda s, x, r: int8(apply("fadd", x, r)), DType.I32) == [
        ("fadd", "mov"), ("fround", "f2i")
    ]  # fmt: skip
    twice = packed(lambda s, x, r: apply("fadd", scaled(s, r), apply("i2f", s)), DType.F32)
    assert twice == [("i2f", "mov"), ("fmul", "fadd")]
    wide = packed(lambda s, x, r: between(int8(apply("fadd", x, r)), -100, 127), DType.I32)
    assert ("fadd", "faddq") not in wide


@st.composite
def int_trees(draw, depth=4):
    kind = draw(st.sampled_from(("int8", "int8", "bound", "bound", "between", "iadd", "leaf")))
    if depth == 0 or kind == "leaf":
        return SUMS
    if kind == "int8":
        limits = st.tuples(st.sampled_from(("fmax", "fmin")), st.integers(-140, 140))
        return int8(draw(float_trees(depth - 1)), *draw(st.lists(limits, max_size=2)))
    inner = draw(int_trees(depth - 1))
    if kind == "between":
        return between(inner)
    if kind == "iadd":
        return apply("iadd", inner, draw(int_trees(depth - 1)))
    limit = splat(draw(st.integers(-140, 140)))
    arguments = (inner, limit) if draw(st.booleans()) else (limit, inner)
    return apply(draw(st.sampled_from(("imax", "imin"))), *arguments)


@st.composite
def float_trees(draw, depth=3):
    kind = draw(st.sampled_from(("fadd", "fadd", "fmul", "i2f", "leaf")))
    if depth <= 0 or kind == "leaf":
        return draw(st.sampled_from((FLOATS, splat(0.5), splat(-3.0))))
    if kind == "i2f":
        return apply("fmul", apply("i2f", draw(int_trees(depth - 1))), FLOATS)
    return apply(kind, draw(float_trees(depth - 1)), draw(float_trees(depth - 1)))


_B = KernelBuilder("leaves")
SUMS, FLOATS = (Read(_B.tile(t, 1, 64).view()) for t in (DType.I32, DType.F32))


@given(int_trees(), st.booleans(), st.integers(0, 99))
def test_the_bits_stay(tree, saturates, seed):
    rng = np.random.default_rng(seed)
    lanes = {
        SUMS: rng.integers(-(2**31), 2**31, 64) >> rng.integers(0, 31, 64),
        FLOATS: np.concatenate([SPECIAL, rng.integers(-300, 300, 52) / 2]).astype(np.float32),
    }
    lanes[SUMS] = lanes[SUMS].astype(np.int32)

    def value(tree):
        found = evaluate_tree(tree, lambda leaf: lanes[leaf].view(np.uint32), lambda s: s.value)
        found = np.broadcast_to(found.view(np.int32), 64)
        return np.clip(found, -128, 127) if saturates else found

    rewritten = with_quantised_functions(tree, saturates)
    np.testing.assert_array_equal(value(rewritten), value(tree))


@pytest.mark.parametrize("limit", [0.5, float("inf"), float("nan")])
def test_bounds_that_are_no_integers_stay(limit):
    tree = apply("f2i", apply("fmax", apply("fround", FLOATS), splat(limit)))
    assert with_quantised_functions(tree, True) == tree
    assert isinstance(tree, Apply)
