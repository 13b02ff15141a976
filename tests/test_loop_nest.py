"""Loop nests and index expressions: normal form, text, meaning, splitting."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.compiler.index_expr import Const, Expr, Symbol, Var, ceildiv, maximum, minimum
from pagoda.compiler.loop_nest import Builder, LoopNest
from pagoda.compiler.loop_nest_oracle import (
    bfloat16_to_float32,
    evaluate,
    float32_to_bfloat16,
)
from pagoda.compiler.loop_nest_split import split

I0, I1, I2, N = Var(0), Var(1), Var(2), Symbol("n")


def expressions() -> st.SearchStrategy[Expr]:
    atoms = st.sampled_from([I0, I1, N]) | st.integers(-4, 9).map(Const)
    divisors = st.integers(1, 8)

    def grow(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        pairs = st.tuples(children, children)
        return (
            pairs.map(lambda p: p[0] + p[1])
            | pairs.map(lambda p: p[0] - p[1])
            | pairs.map(lambda p: p[0] * p[1])
            | pairs.map(lambda p: minimum(*p))
            | pairs.map(lambda p: maximum(*p))
            | st.tuples(children, divisors).map(lambda p: p[0] // p[1])
            | st.tuples(children, divisors).map(lambda p: p[0] % p[1])
        )

    return st.recursive(atoms, grow, max_leaves=8)


def python_value(expression: Expr, values: dict[str, int]) -> int:
    return eval(str(expression), {"min": min, "max": max}, values)


@given(expressions(), expressions(), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_arithmetic_keeps_the_value(a: Expr, b: Expr, i0: int, i1: int, n: int) -> None:
    def value(expression: Expr) -> int:
        return expression.evaluate({"n": n}, {0: i0, 1: i1})

    assert value(a + b) == value(a) + value(b)
    assert value(a - b) == value(a) - value(b)
    assert value(a * b) == value(a) * value(b)
    assert value((a + 8 * b) // 8) == (value(a) + 8 * value(b)) // 8
    assert value((a + 8 * b) % 8) == value(a) % 8
    assert value(a) == python_value(a, {"i0": i0, "i1": i1, "n": n})


@given(expressions(), expressions())
def test_equal_polynomials_are_equal_objects(a: Expr, b: Expr) -> None:
    assert a + b == b + a and hash(a + b) == hash(b + a)
    assert (a + b) * 3 == a * 3 + b * 3
    assert a - a == Const(0)
    assert pickle.loads(pickle.dumps(a)) == a


def test_affine() -> None:
    affine = ((I0 * N + I1) * 2 + N * 3 + 1).affine()
    assert affine.coefficients == {0: N * 2, 1: Const(2)}
    assert affine.offset == N * 3 + 1
    assert (I0 // 4).affine() is None
    assert (I0 * I1).affine() is None
    assert ceildiv(N, 4).evaluate({"n": 9}) == 3


def rms_norm(names: tuple[str, str, str], size: str = "s3") -> tuple[LoopNest, list, list]:
    b = Builder([Symbol(size), Const(8)], reduced=1)
    x = b.load(names[0], "bfloat16", I0 * 8 + I1)
    mean = b.pointwise("div", b.reduce("sum", b.pointwise("mul", x, x)), b.constant(8, "float32"))
    scale = b.pointwise("rsqrt", b.pointwise("add", mean, b.constant(1e-5, "float32")))
    w = b.load(names[1], "float32", I1)
    y = b.pointwise("mul", b.pointwise("mul", x, scale), w)
    b.store(names[2], "bfloat16", I0 * 8 + I1, y)
    return b.build()


def test_text() -> None:
    nest, names, symbols = rms_norm(("x", "w", "y"))
    assert (names, symbols) == (["x", "w", "y"], ["s3"])
    expected = """\
loop_nest(p0: read bfloat16, p1: read float32, p2: write bfloat16; n0)
for i0 in n0, reduce i1 in 8:
  %0 = load p0[8*i0 + i1] : float32
  %1 = mul %0 %0 : float32
  %2 = sum %1 : float32
  %3 = const 8.0 : float32
  %4 = div %2 %3 : float32
  %5 = const 1e-05 : float32
  %6 = add %4 %5 : float32
  %7 = rsqrt %6 : float32
  %8 = load p1[i1] : float32
  %9 = mul %0 %7 : float32
  %10 = mul %9 %8 : float32
  store p2[8*i0 + i1] = %10"""
    assert str(nest) == expected


def test_names_do_not_matter() -> None:
    first, _, _ = rms_norm(("x", "w", "y"))
    second, _, _ = rms_norm(("arg7", "arg1", "buf3"), size="s99")
    assert first == second and hash(first) == hash(second) and first.key == second.key
    assert pickle.loads(pickle.dumps(first)) == first


def test_dims_of_values() -> None:
    nest, _, _ = rms_norm(("x", "w", "y"))
    dims = nest.dims_of()
    assert dims[0] == {0, 1} and dims[2] == {0} and dims[8] == {1} and dims[11] == {0, 1}


def test_rms_norm_value() -> None:
    nest, _, _ = rms_norm(("x", "w", "y"))
    rng = np.random.default_rng(0)
    x = bfloat16_to_float32(float32_to_bfloat16(rng.standard_normal((3, 8), np.float32)))
    w = rng.standard_normal(8, np.float32)
    y = np.zeros(24, np.uint16)
    evaluate(nest, [float32_to_bfloat16(x).ravel(), w, y], [3])
    expected = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(bfloat16_to_float32(y).reshape(3, 8), expected, rtol=1e-2)


def test_bfloat16_rounding() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 4096, np.uint64).astype(np.uint32).view(np.float32)
    values = np.concatenate([values, np.array([1.00390625, 1.01171875, np.inf, -0.0], np.float32)])
    finite = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        expected = finite.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert (float32_to_bfloat16(finite) == expected).all()
    assert (float32_to_bfloat16(np.array([np.nan], np.float32)) == 0x7FC0).all()


def test_argmax_takes_the_first_nan_then_the_lowest_index() -> None:
    b = Builder([Const(3), Const(4)], reduced=1)
    x = b.load("x", "float32", I0 * 4 + I1)
    b.store("y", "int64", I0, b.reduce("argmax", x))
    nest, _, _ = b.build()
    x = np.array([[1, 5, 5, 2], [1, np.nan, 9, np.nan], [3, 3, 3, 3]], np.float32)
    y = np.zeros(3, np.int64)
    evaluate(nest, [x.ravel(), y])
    assert y.tolist() == [1, 1, 0]


@pytest.mark.parametrize("kind", ["sum", "max", "any"])
def test_reductions_over_no_rows(kind: str) -> None:
    b = Builder([N, Const(3)], reduced=1)
    row = b.load("x", "float32", I0 * 3 + I1)
    value = b.reduce(kind, b.pointwise("ne", row, row) if kind == "any" else row)
    b.store("y", "bool" if kind == "any" else "float32", I0, value)
    nest, _, _ = b.build()
    y = np.ones(1, np.float32)
    evaluate(nest, [np.zeros(0, np.float32), y], [0])
    assert y[0] == 1


def test_welford_is_two_passes() -> None:
    b = Builder([Const(2), Const(5)], reduced=1)
    mean, m2, count = b.welford(b.load("x", "float32", I0 * 5 + I1))
    b.store("mean", "float32", I0, mean)
    b.store("m2", "float32", I0, m2)
    b.store("count", "float32", I0, count)
    nest, _, _ = b.build()
    x = np.random.default_rng(2).standard_normal((2, 5), np.float32)
    out = [np.zeros(2, np.float32) for _ in range(3)]
    evaluate(nest, [x.ravel(), *out])
    np.testing.assert_allclose(out[0], x.mean(1), rtol=1e-6)
    np.testing.assert_allclose(out[1], x.var(1) * 5, rtol=1e-5)
    assert out[2].tolist() == [5, 5]


def gather(rows: int) -> LoopNest:
    b = Builder([N, Const(4)])
    row = b.indirect(b.load("index", "int64", I0), Const(rows))
    b.store("y", "float32", I0 * 4 + I1, b.load("table", "float32", row * 4 + I1))
    return b.build()[0]


def test_indirect_index() -> None:
    table, y = np.arange(12, dtype=np.float32), np.zeros(8, np.float32)
    evaluate(gather(3), [np.array([2, -3]), table, y], [2])
    assert y.tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    with pytest.raises(IndexError, match="outside 12 elements"):
        evaluate(gather(3), [np.array([3, 0]), table, y], [2])


def test_accumulating_store_adds_in_order() -> None:
    b = Builder([Const(4)])
    row = b.indirect(b.load("index", "int64", I0), Const(2))
    b.store("y", "float32", row, b.load("x", "float32", I0), mode="add")
    nest, _, _ = b.build()
    assert nest.params[-1].access == "accumulate"
    y = np.array([10, 20], np.float32)
    evaluate(nest, [np.array([0, 1, 0, 0]), np.array([1, 2, 3, 4], np.float32), y])
    assert y.tolist() == [18, 22]


def concatenation() -> LoopNest:
    """y[i, j] = past[i, j] below n, new[i, j - n] from there on; like a key/value cache."""
    b = Builder([Const(2), N + 3, Const(4)])
    here, bound = b.index(I1, "int64"), b.index(N, "int64")
    below, above = b.pointwise("lt", here, bound), b.pointwise("ge", here, bound)
    past = b.load("past", "float32", I0 * N * 4 + I1 * 4 + I2, below)
    new = b.load("new", "float32", I0 * 12 + (I1 - N) * 4 + I2, above)
    b.store("y", "float32", (I0 * (N + 3) + I1) * 4 + I2, b.pointwise("where", below, past, new))
    return b.build()[0]


def rotation() -> LoopNest:
    """The rotary embedding's half swap, with its table indexed modulo the half."""
    b = Builder([N, Const(16)])
    here, half = b.index(I1, "int64"), b.constant(8, "int64")
    low, high = b.pointwise("lt", here, half), b.pointwise("ge", here, half)
    left = b.pointwise("neg", b.load("x", "float32", I0 * 16 + I1 + 8, low))
    right = b.load("x", "float32", I0 * 16 + I1 - 8, high)
    turned = b.pointwise("where", low, left, right)
    angle = b.load("t", "float32", I1 % 8)
    b.store("y", "float32", I0 * 16 + I1, b.pointwise("mul", turned, angle))
    return b.build()[0]


def run_pieces(nest: LoopNest, buffers: list[np.ndarray], symbols: list[int]) -> None:
    for piece, params, used in split(nest):
        evaluate(piece, [buffers[p] for p in params], [symbols[s] for s in used])


@given(st.integers(0, 5))
@settings(deadline=None)
def test_split_concatenation(n: int) -> None:
    nest = concatenation()
    past, new = np.arange(8 * n, dtype=np.float32), -np.arange(24, dtype=np.float32)
    whole, parts = (np.zeros(8 * (n + 3), np.float32) for _ in range(2))
    evaluate(nest, [past, new, whole], [n])
    run_pieces(nest, [past, new, parts], [n])
    assert (whole == parts).all()
    assert (whole.reshape(2, n + 3, 4)[:, n:] == new.reshape(2, 3, 4)).all()


def test_split_leaves_copies() -> None:
    pieces = [piece for piece, _, _ in split(concatenation())]
    assert [p.vocabulary() for p in pieces] == [["load", "store"], ["load", "store"]]
    expected = """\
loop_nest(p0: read float32, p1: write float32; n0)
for i0 in 2, i1 in n0, i2 in 4:
  %0 = load p0[4*i0*n0 + 4*i1 + i2] : float32
  store p1[12*i0 + 4*i0*n0 + 4*i1 + i2] = %0"""
    assert str(pieces[0]) == expected


@given(st.integers(1, 3))
@settings(deadline=None)
def test_split_rotation(n: int) -> None:
    nest = rotation()
    pieces = [piece for piece, _, _ in split(nest)]
    assert len(pieces) == 2
    assert all(index.affine() for p in pieces for op in p.body for index in op.indices())
    assert all("where" not in p.vocabulary() for p in pieces)
    rng = np.random.default_rng(n)
    x, t = rng.standard_normal(16 * n, np.float32), rng.standard_normal(8, np.float32)
    whole, parts = (np.zeros(16 * n, np.float32) for _ in range(2))
    evaluate(nest, [x, t, whole], [n])
    run_pieces(nest, [x, t, parts], [n])
    assert (whole == parts).all()


def test_split_unfolds_a_modulus() -> None:
    b = Builder([Const(24)])
    b.store("y", "float32", I0, b.load("x", "float32", I0 % 8 * 3 + I0 // 8))
    ((piece, _, _),) = split(b.build()[0])
    assert str(piece).splitlines()[1:] == [
        "for i0 in 3, i1 in 8:",
        "  %0 = load p0[i0 + 3*i1] : float32",
        "  store p1[8*i0 + i1] = %0",
    ]


def test_split_keeps_what_it_cannot_cut() -> None:
    b = Builder([Const(4), Const(4)])
    causal = b.pointwise("le", b.index(I1, "int64"), b.index(I0, "int64"))
    b.store("y", "bool", I0 * 4 + I1, causal)
    nest = b.build()[0]
    assert split(nest) == [(nest, [0], [])]
