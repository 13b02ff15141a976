"""Every composed function against float64, over its whole interesting range."""

import math

import numpy as np
import pytest
import torch
from tile_ir_oracle import evaluate_tree

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Var
from pagoda.compiler.loop_nest import Builder, Pointwise
from pagoda.compiler.nest_simplify import simplify
from pagoda.compiler.pointwise import bitcast, compose, convert
from pagoda.compiler.tile_ir import Read, Tile, Tree, splat
from pagoda.isa.numbers import DType

RANDOM = np.random.default_rng(0)


def run(name, *arrays, dtype="float32", result=None):
    """The composition evaluated on numpy arrays of one shape."""
    leaves = {}
    trees = []
    kind = DType.F32 if dtype == "float32" else DType.I32
    for k, array in enumerate(arrays):
        if isinstance(array, Tree):
            trees.append(array)
            continue
        tile = Tile(f"x{k}", DType.I32 if array.dtype == np.bool_ else kind, 1, 1)
        leaves[tile] = array
        trees.append(Read(tile.view()))
    tree = compose(name, result or dtype, dtype, tuple(trees), lambda t: t)

    def leaf(node):
        array = leaves[node.view.tile]
        lanes = np.float32 if array.dtype == np.float32 else np.int32
        return array.astype(lanes).view(np.uint32)

    lanes = evaluate_tree(tree, leaf, lambda s: s.value)
    return lanes.view(np.float32 if tree.kind == "float" else np.int32)


def ulps(found, exact):
    """Errors in units of the last place of the exact value; infinite where only one is finite."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        unit = np.maximum(np.spacing(np.abs(rounded)).astype(np.float64), 2.0**-149)
        error = np.abs(found.astype(np.float64) - exact) / unit
        same = (found == rounded) | (np.isnan(found) & np.isnan(rounded))
        return np.where(same, 0, np.where(np.isfinite(error), error, np.inf))


def spread(low, high, count=40000):
    """Values of both signs with evenly spread exponents, and evenly spread values."""
    even = RANDOM.uniform(low, high, count)
    scale = np.exp(RANDOM.uniform(-40, 0, count))
    return np.concatenate([even, even * scale]).astype(np.float32)


ERFC = np.vectorize(math.erfc, otypes=[np.float64])
ERF = np.vectorize(math.erf, otypes=[np.float64])
UNARY = {
    "exp": (np.exp, (-104, 89), 2),
    "expm1": (np.expm1, (-20, 89), 3),
    "log": (np.log, (1e-38, 3e38), 2),
    "log10": (np.log10, (1e-38, 3e38), 2),
    "log1p": (np.log1p, (-0.999, 1e30), 2),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), (-87, 100), 4),
    "recip1p_exp2": (lambda x: 1 / (1 + np.exp2(x)), (-140, 125), 4),
    "tanh": (np.tanh, (-12, 12), 2),
    "sinh": (np.sinh, (-89, 89), 8),
    "cosh": (np.cosh, (-89, 89), 8),
    "sin": (np.sin, (-3, 3), 3),
    "cos": (np.cos, (-1.5, 1.5), 3),
    "tan": (np.tan, (-1.5, 1.5), 4),
    "asin": (np.arcsin, (-1, 1), 3),
    "acos": (np.arccos, (-1, 1), 2),
    "atan": (np.arctan, (-1e6, 1e6), 2),
    "erf": (ERF, (-5, 5), 3),
    "erfc": (ERFC, (-5, 9), 8),
    "rsqrt": (lambda x: 1 / np.sqrt(x), (1e-38, 3e38), 2),
    "reciprocal": (lambda x: 1 / x, (-1e30, 1e30), 2),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary_error(name):
    exact, (low, high), bound = UNARY[name]
    x = spread(low, high)
    x = x[(x >= low) & (x <= high)]
    with np.errstate(all="ignore"):
        error = ulps(run(name, x), exact(x.astype(np.float64)))
    assert error.max() <= bound, (name, error.max(), x[error.argmax()])


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_angles(name):
    x = spread(-1e5, 1e5)
    exact, found = getattr(np, name)(x.astype(np.float64)), run(name, x)
    assert np.minimum(ulps(found, exact) / 3, np.abs(found - exact) / 2e-10).max() <= 1


INF, NAN = np.float32(np.inf), np.float32(np.nan)
SPECIAL = {
    "exp": ([-INF, INF, NAN, 0.0, 88.8], [0, INF, NAN, 1, INF]),
    "expm1": ([-INF, INF, NAN, -0.0], [-1, INF, NAN, -0.0]),
    "log": ([0.0, INF, -1.0, NAN, 1.0], [-INF, INF, NAN, NAN, 0]),
    "log1p": ([-1.0, INF, -2.0, -0.0, 1e-30], [-INF, INF, NAN, -0.0, 1e-30]),
    "sigmoid": ([-INF, INF, NAN, 0.0], [0, 1, NAN, 0.5]),
    "tanh": ([-INF, INF, NAN, -0.0], [-1, 1, NAN, -0.0]),
    "sinh": ([-INF, INF, NAN], [-INF, INF, NAN]),
    "cosh": ([-INF, INF, NAN, 0.0], [INF, INF, NAN, 1.0]),
    "sin": ([INF, NAN, -0.0], [NAN, NAN, -0.0]),
    "cos": ([-INF, NAN, 0.0], [NAN, NAN, 1.0]),
    "asin": ([2.0, NAN, 1.0], [NAN, NAN, 1.5707964]),
    "acos": ([1.0, NAN, -2.0], [0, NAN, NAN]),
    "atan": ([-INF, INF, NAN, -0.0], [-1.5707964, 1.5707964, NAN, -0.0]),
    "erf": ([-INF, INF, NAN], [-1, 1, NAN]),
    "erfc": ([-INF, INF, NAN], [2, 0, NAN]),
    "sign": ([-3.0, 0.0, NAN, INF], [-1, 0, 0, 1]),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name):
    x, wanted = (np.array(v, np.float32) for v in SPECIAL[name])
    found = run(name, x)
    np.testing.assert_array_equal(found, wanted)
    zeros = wanted == 0
    np.testing.assert_array_equal(np.signbit(found[zeros]), np.signbit(wanted[zeros]))


def test_pow():
    x, y = np.abs(spread(-1e4, 1e4)), RANDOM.uniform(-30, 30, 80000).astype(np.float32)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.float64), y.astype(np.float64))
    fits = (exact < 3.4e38) & (x > 0)
    error = ulps(run("pow", x, y), exact)[fits]
    assert error.max() <= 4, error.max()


def test_pow_special_values():
    values = np.array([-INF, -2.5, -2, -1, -0.5, -0.0, 0, 0.5, 1, 2, 3, 2.5, INF, NAN], np.float32)
    x, y = (a.ravel().copy() for a in np.meshgrid(values, values))
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.float64), y.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(run("pow", x, y), exact, rtol=4e-7)


@pytest.mark.parametrize("exponent", [0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 3.0, 4.0])
def test_constant_powers(exponent):
    x = np.abs(spread(0.01, 100))
    exact = np.power(x.astype(np.float64), exponent)
    assert ulps(run("pow", x, splat(exponent)), exact).max() <= 2.5


def test_atan2():
    y, x = spread(-10, 10), spread(-10, 10)
    RANDOM.shuffle(x)
    exact = np.arctan2(y.astype(np.float64), x.astype(np.float64))
    assert ulps(run("atan2", y, x), exact).max() <= 4
    zero = np.array([0.0, 0.0, -0.0, INF], np.float32)
    other = np.array([1.0, -1.0, -1.0, INF], np.float32)
    np.testing.assert_allclose(run("atan2", zero, other), np.arctan2(zero, other), rtol=2e-7)


def test_quotient_that_is_a_sigmoid():
    """x / (1 + exp(-y)) is recognised either way round, and is as exact as documented."""
    builder = Builder([Const(8)])
    x = builder.load("x", "float32", Var(0))
    one = builder.constant(1.0, "float32")
    power = builder.pointwise("exp", builder.pointwise("neg", x))
    for name, terms in (("left", (one, power)), ("right", (power, one))):
        total = builder.pointwise("add", *terms)
        builder.store(name, "float32", Var(0), builder.pointwise("div", x, total))
    small = simplify(builder.build()[0])
    used = [op.name for op in small.body if isinstance(op, Pointwise)]
    assert sorted(used) == ["mul", "mul", "sigmoid", "sigmoid"]

    values = spread(-104, 104)
    found = run("mul", values, run("sigmoid", values))
    exact = values.astype(np.float64) / (1 + np.exp(-values.astype(np.float64)))
    error = ulps(found, exact)
    assert error[values > -87].max() <= 5
    assert error[values > -88.7].max() <= 16


@pytest.mark.parametrize("name", ["floordiv", "remainder", "fmod"])
def test_float_division(name):
    a = RANDOM.uniform(-1000, 1000, 20000).astype(np.float32)
    b = RANDOM.uniform(-3, 3, 20000).astype(np.float32)
    a[:100] = b[:100] * np.arange(100, dtype=np.float32)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    exact = {"floordiv": np.floor_divide, "remainder": np.remainder, "fmod": np.fmod}[name](
        a64, b64
    )
    np.testing.assert_array_equal(run(name, a, b), exact.astype(np.float32))


@pytest.mark.parametrize("name", ["remainder", "fmod"])
def test_infinite_operands(name):
    inf = np.inf
    a = np.array([5, -5, 5, -5, 0, 7.5, inf, inf, np.nan], np.float32)
    b = np.array([inf, inf, -inf, -inf, inf, 2, 2, inf, inf], np.float32)
    wanted = getattr(torch, name)(torch.tensor(a), torch.tensor(b)).numpy()
    np.testing.assert_array_equal(run(name, a, b), wanted)


INTEGER = {
    "truncdiv": lambda a, b: np.trunc(a / b), "floordiv": np.floor_divide, "fmod": np.fmod,
    "remainder": np.remainder, "sign": lambda a: np.sign(a), "abs": np.abs,
    "shift_left": lambda a, b: a << np.abs(b), "bitwise_not": np.invert, "neg": np.negative,
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGER)
def test_integers(name):
    a = RANDOM.integers(-1000, 1000, 5000).astype(np.int32)
    b = RANDOM.integers(1, 20, 5000).astype(np.int32)
    if name != "shift_left":
        b *= RANDOM.choice([-1, 1], 5000).astype(np.int32)
    operands = (a, b)[: INTEGER[name].__code__.co_argcount if name == "sign" else 2]
    if name in ("abs", "bitwise_not", "neg", "sign"):
        operands = (a,)
    wanted = INTEGER[name](*(o.astype(np.int64) for o in operands))
    np.testing.assert_array_equal(run(name, *operands, dtype="int32"), wanted)


def test_narrow_integers_wrap():
    a = np.array([100, -100, 127], np.int32)
    wide = run("add", a, a, dtype="int8")
    np.testing.assert_array_equal(wide, [-56, 56, -2])
    wide = run("sub", np.array([3], np.int32), np.array([5], np.int32), dtype="uint8")
    np.testing.assert_array_equal(wide, [254])


def test_types_without_lanes_are_refused():
    x = Read(Tile("x", DType.F32, 1, 1).view())
    with pytest.raises(CompileError) as caught:
        compose("add", "float64", "float64", (x, x), lambda t: t)
    assert str(caught.value) == (
        "operation add: the chip computes in float32 and int32 and stores bfloat16, int8 and "
        "int64 besides, but the type is float64; convert it to float32 first"
    )
    with pytest.raises(CompileError) as caught:
        convert(x, "float32", "float16")
    assert str(caught.value) == (
        "a conversion from float32: the chip computes in float32 and int32 and stores bfloat16, "
        "int8 and int64 besides, but the type is float16; convert it to bfloat16 first"
    )
    with pytest.raises(CompileError) as caught:
        bitcast(x, "float32", "int64")
    assert str(caught.value) == (
        "a bit cast: both types must be held in 32 bits, or be int8 and uint8, but they are "
        "float32 and int64; convert with .to(dtype), or do it on the CPU"
    )
