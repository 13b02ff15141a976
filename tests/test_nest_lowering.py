"""Kernels lowered from loop nests against the nests' oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nest_support import check, execute, random_array

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Symbol, Var
from pagoda.compiler.loop_nest import Builder
from pagoda.compiler.nest_lowering import Blocks, lower

I0, I1, I2, I3 = (Var(d) for d in range(4))
S = Symbol("s")


def rms_norm(width, dtype="float32"):
    """y = x * rsqrt(mean(x^2) + eps) * w over rows of a symbolic number."""
    b = Builder([S, Const(width)], 1)
    x = b.load("x", dtype, I0 * width + I1)
    total = b.reduce("sum", b.pointwise("mul", x, x))
    mean = b.pointwise("div", total, b.constant(float(width), "float32"))
    scale = b.pointwise("rsqrt", b.pointwise("add", mean, b.constant(1e-5, "float32")))
    y = b.pointwise("mul", b.pointwise("mul", x, scale), b.load("w", dtype, I1))
    b.store("y", dtype, I0 * width + I1, y)
    return b.build()[0]


def softmax(columns, dtype="float32"):
    """Rows of `columns`, an expression; two reductions."""
    b = Builder([S, columns], 1)
    x = b.load("x", dtype, I0 * columns + I1)
    e = b.pointwise("exp", b.pointwise("sub", x, b.reduce("max", x)))
    b.store("y", dtype, I0 * columns + I1, b.pointwise("div", e, b.reduce("sum", e)))
    return b.build()[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 64), (7, 131), (20, 576)])
def test_rms_norm(rows, width, dtype):
    nest = rms_norm(width, dtype)
    x, w = random_array(dtype, rows * width), random_array(dtype, width, 1)
    check(nest, [x, w, np.zeros_like(x)], [rows])


def test_no_rows():
    nothing = np.zeros(0, np.float32)
    lowered = lower(rms_norm(8), Blocks(4, 64))
    execute(lowered, [nothing, random_array("float32", 8), nothing], [0], cores=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, width", [(3, 1), (4, 97), (2, 300)])
def test_softmax(rows, width, dtype):
    x = random_array(dtype, rows * width)
    check(softmax(Const(width), dtype), [x, np.zeros_like(x)], [rows])
    check(softmax(Symbol("n"), dtype), [x, np.zeros_like(x)], [rows, width])


def test_softmax_with_minus_infinity():
    x = random_array("float32", 4 * 70)
    x[::3] = -np.inf
    check(softmax(Const(70)), [x, np.zeros_like(x)], [4])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_silu_mul(dtype):
    b = Builder([S, Const(96)])
    x = b.load("x", dtype, I0 * 96 + I1)
    y = b.load("y", dtype, I0 * 96 + I1)
    b.store("z", dtype, I0 * 96 + I1, b.pointwise("mul", b.pointwise(
        "mul", x, b.pointwise("sigmoid", x)), y))  # fmt: skip
    nest = b.build()[0]
    arrays = [random_array(dtype, 7 * 96, k) for k in range(3)]
    check(nest, arrays, [7])


def test_contiguous_dimensions_merge():
    b = Builder([S, Const(3), Const(4)])
    x = b.load("x", "float32", I0 * 12 + I1 * 4 + I2)
    b.store("y", "float32", I0 * 12 + I1 * 4 + I2, b.pointwise("neg", x))
    kernel = lower(b.build()[0], Blocks(8, 64)).kernel
    assert str(kernel) == GOLDEN_MERGED


GOLDEN_MERGED = """\
kernel nest_0321a0bc(p0: f32[] strides (), p1: f32[] strides (), n0) rows=1 cols=64
  for i0 in range((core_id * 64), (n0 * 12), (core_count * 64)):
    cols = min(64, ((n0 * 12) - i0))
    tile p0_2: f32[1, 64] sram
    p0_2 = load p0[(i0 * 4) bytes; rows 0] 1 x cols
    tile out: f32[1, 64] sram
    out = fneg(p0_2) 1 x cols
    store p1[(i0 * 4) bytes; rows 0] = out 1 x cols
"""


def test_residual_add_in_place():
    b = Builder([S, Const(100)], 1)
    x = b.pointwise(
        "add", b.load("x", "bfloat16", I0 * 100 + I1), b.load("y", "bfloat16", I0 * 100 + I1)
    )
    b.store("x", "bfloat16", I0 * 100 + I1, x)
    total = b.reduce("sum", x)
    b.store("z", "float32", I0 * 100 + I1, b.pointwise("mul", x, total))
    nest = b.build()[0]
    arrays = [random_array("bfloat16", 500, k) for k in range(2)]
    check(nest, [*arrays, np.zeros(500, np.float32)], [5])


def test_layer_norm_by_welford():
    b = Builder([S, Const(80)], 1)
    x = b.load("x", "float32", I0 * 80 + I1)
    mean, m2, count = b.welford(x)
    variance = b.pointwise("div", m2, count)
    scale = b.pointwise("rsqrt", b.pointwise("add", variance, b.constant(1e-5, "float32")))
    b.store("y", "float32", I0 * 80 + I1, b.pointwise("mul", b.pointwise("sub", x, mean), scale))
    b.store("m", "float32", I0, mean)
    x = random_array("float32", 240)
    check(b.build()[0], [x, np.zeros_like(x), np.zeros(3, np.float32)], [3])


@pytest.mark.parametrize("kind", ["sum", "prod", "max", "min", "any", "argmax", "argmin"])
@pytest.mark.parametrize("dtype", ["float32", "int64", "int8", "bool"])
@pytest.mark.parametrize("width", [1, 67, 200])
def test_reductions(kind, dtype, width):
    if dtype == "bool" and kind not in ("sum", "any"):
        pytest.skip("not asked for by Inductor")
    b = Builder([S, Const(width)], 1)
    r = b.reduce(kind, b.load("x", dtype, I0 * width + I1))
    b.store("y", b.dtype(r), I0, r)
    nest, _, _ = b.build()
    x = random_array(dtype, 5 * width, limit=3 if kind == "prod" else 50)
    if kind == "prod" and dtype == "int64":
        x = 1 + (x == 2)
        x[20:] = 1
    result = {"int64": np.int64, "int8": np.int8, "bool": np.bool_}.get(b.dtype(r), np.float32)
    if kind == "sum" and dtype == "int8":
        x[:] = x % 2 - (x % 3 == 1)
        if width == 200:
            x[:] = x % 2
    check(nest, [x, np.zeros(5, result)], [5], rtol=1e-4)


def test_argmax_of_nan_and_ties():
    b = Builder([Const(4), Const(90)], 1)
    b.store("y", "int64", I0, b.reduce("argmax", b.load("x", "float32", I0 * 90 + I1)))
    x = np.zeros((4, 90), np.float32)
    x[1, [70, 80]] = 3
    x[2, [5, 77]] = np.nan
    x[3, :] = -np.inf
    found = check(b.build()[0], [x.ravel(), np.zeros(4, np.int64)])
    np.testing.assert_array_equal(found[1], [0, 70, 5, 0])


def test_reduction_over_two_separate_dimensions():
    """Batch norm's sum: over images and pixels, per channel."""
    b = Builder([Const(3), S, Const(49)], 2)
    x = b.load("x", "float32", I0 * 49 + I1 * 147 + I2)
    b.store("y", "float32", I0, b.reduce("sum", x))
    b.store("k", "int64", I0, b.reduce("argmax", x))
    x = random_array("float32", 4 * 147)
    check(b.build()[0], [x, np.zeros(3, np.float32), np.zeros(3, np.int64)], [4])


def test_reduction_across_rows():
    """A bias gradient: the contiguous dimension is not the reduced one."""
    b = Builder([Const(70), S], 1)
    b.store("y", "float32", I0, b.reduce("sum", b.load("x", "float32", I0 + I1 * 70)))
    nest = b.build()[0]
    for rows in (0, 1, 100):
        x = random_array("float32", rows * 70)
        check(nest, [x, np.full(70, 7, np.float32)], [rows])


def test_full_reduction():
    b = Builder([S], 1)
    b.store("y", "float32", Const(0), b.reduce("sum", b.load("x", "float32", I0)))
    x = random_array("float32", 1000)
    check(b.build()[0], [x, np.zeros(1, np.float32)], [1000])


def test_empty_sum_is_plus_zero():
    b = Builder([Const(3), S], 1)
    b.store("y", "float32", I0, b.reduce("sum", b.load("x", "float32", I0 * S + I1)))
    found = check(b.build()[0], [np.zeros(0, np.float32), np.ones(3, np.float32)], [0])
    assert not np.signbit(found[1]).any()


def rotary_embedding(dtype="bfloat16"):
    """x * cos + rotate_half(x) * sin, rotate_half as Inductor writes it: two masked loads."""
    b = Builder([Const(3), S, Const(64)])
    at = I0 * 64 + I1 * 192
    low = b.pointwise("lt", b.index(I2, "int64"), b.constant(32, "int64"))
    high = b.pointwise("ge", b.index(I2, "int64"), b.constant(32, "int64"))
    left = b.pointwise("neg", b.load("x", dtype, at + I2 + 32, low, 0.0))
    right = b.load("x", dtype, at + I2 - 32, high, 0.0)
    rotated = b.pointwise("where", low, left, right)
    cos, sin = b.load("c", "float32", I1 * 64 + I2), b.load("n", "float32", I1 * 64 + I2)
    x = b.load("x", dtype, at + I2)
    y = b.pointwise("add", b.pointwise("mul", x, cos), b.pointwise("mul", rotated, sin))
    b.store("y", dtype, I0 * 64 * S + I1 * 64 + I2, y)
    nest, names, _ = b.build()
    arrays = {"x": random_array(dtype, 5 * 192), "y": np.zeros_like(random_array(dtype, 960))}
    arrays |= {k: random_array("float32", 320, 3) for k in "cn"}
    return nest, [arrays[n] for n in names], [5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_embedding(dtype):
    check(*rotary_embedding(dtype))


def test_cat_along_columns_and_rows():
    n = Symbol("n")
    b = Builder([n, Const(10), Const(3)])
    first = b.pointwise("lt", b.index(I0, "int64"), b.index(S, "int64"))
    later = b.pointwise("ge", b.index(I0, "int64"), b.index(S, "int64"))
    old = b.load("a", "float32", I0 * 30 + I1 * 3 + I2, first, 0.0)
    new = b.load("b", "float32", (I0 - S) * 30 + I1 * 3 + I2, later, 0.0)
    b.store("y", "float32", I0 * 30 + I1 * 3 + I2, b.pointwise("where", first, old, new))
    nest, names, symbols = b.build()
    arrays = {"a": random_array("float32", 120), "b": random_array("float32", 60, 2)}
    arrays["y"] = np.zeros(180, np.float32)
    sizes = {"n": 6, "s": 4}
    check(nest, [arrays[k] for k in names], [sizes[k] for k in symbols])


def embedding(indices="int64"):
    b = Builder([S, Const(70)])
    row = b.indirect(b.cast(b.load("i", indices, I0), "int64"), Const(11))
    b.store("y", "bfloat16", I0 * 70 + I1, b.load("w", "bfloat16", row * 70 + I1))
    nest, names, _ = b.build()
    i = random_array(indices, 9, limit=11)
    i[3] = -2
    arrays = {"i": i, "w": random_array("bfloat16", 770), "y": np.zeros(630, np.uint16)}
    return nest, [arrays[n] for n in names], [9]


@pytest.mark.parametrize("indices", ["int64", "int32"])
def test_embedding(indices):
    nest, arrays, symbols = embedding(indices)
    check(nest, arrays, symbols)
    arrays[0][5] = 11  # one too many
    with pytest.raises(AssertionError, match="OUT_OF_SLOT"):
        execute(lower(nest, Blocks(4, 64)), arrays, symbols)


def index_put():
    b = Builder([S, Const(20)])
    row = b.indirect(b.load("i", "int64", I0), Const(6))
    b.store("y", "float32", row * 20 + I1, b.load("x", "float32", I0 * 20 + I1), "add")
    b.store("z", "float32", row * 20 + I1, b.load("x", "float32", I0 * 20 + I1))
    nest, names, _ = b.build()
    arrays = {"i": random_array("int64", 13, limit=6), "x": random_array("float32", 260)}
    arrays |= {"y": random_array("float32", 120, 4), "z": random_array("float32", 120, 5)}
    return nest, [arrays[n] for n in names], [13]


def test_index_put_and_accumulate():
    check(*index_put())


def test_indirect_column():
    """y[i, j] = x[i, k[j]], and a scatter to it."""
    b = Builder([S, Const(9)])
    column = b.indirect(b.load("k", "int64", I1), Const(30))
    x = b.load("x", "bfloat16", I0 * 30 + column)
    b.store("y", "bfloat16", I0 * 9 + I1, x)
    b.store("z", "float32", I0 * 30 + column, x)
    nest, names, _ = b.build()
    arrays = {"k": np.random.default_rng(0).permutation(30)[:9], "y": np.zeros(45, np.uint16)}
    arrays |= {"x": random_array("bfloat16", 150), "z": np.zeros(150, np.float32)}
    check(nest, [arrays[n] for n in names], [5])


def causal_mask():
    """Values of an index on both dimensions; a mask that no rectangle describes."""
    b = Builder([S, S])
    past = b.pointwise("le", b.index(I1, "int64"), b.index(I0, "int64"))
    low = b.constant(float(np.finfo(np.float32).min), "float32")
    b.store("m", "bool", I0 * S + I1, past)
    f = b.pointwise("where", past, b.constant(0.0, "float32"), low)
    b.store("f", "bfloat16", I0 * S + I1, f)
    b.store("g", "float32", I0 * S + I1, b.load("x", "float32", I0 * S + I1, past, -1.5))
    nest, names, _ = b.build()
    n = 37
    arrays = {"m": np.zeros(n * n, np.bool_), "f": np.zeros(n * n, np.uint16)}
    arrays |= {"x": random_array("float32", n * n), "g": np.zeros(n * n, np.float32)}
    return nest, [arrays[k] for k in names], [n]


def test_causal_mask():
    check(*causal_mask())


def transposing_copy(dtype="bfloat16"):
    b = Builder([Const(33), S])
    b.store("y", dtype, I0 * S + I1, b.load("x", dtype, I1 * 33 + I0))
    x = random_array(dtype, 33 * 21)
    return b.build()[0], [x, np.zeros_like(x)], [21]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_transposing_copy(dtype):
    check(*transposing_copy(dtype))


def test_broadcasts_of_every_shape():
    b = Builder([Const(5), S, Const(70)])
    total = b.load("s", "float32", Const(0))
    for name, index in (("r", I1), ("c", I2), ("p", I0), ("x", (I0 * S + I1) * 70 + I2)):
        total = b.pointwise("add", total, b.load(name, "float32", index))
    b.store("y", "float32", (I0 * S + I1) * 70 + I2, total)
    b.store("z", "float32", I0, b.load("p", "float32", I0))
    nest, names, _ = b.build()
    sizes = {"s": 1, "r": 3, "c": 70, "p": 5, "x": 1050, "y": 1050, "z": 5}
    arrays = {k: random_array("float32", n, n) for k, n in sizes.items()}
    check(nest, [arrays[n] for n in names], [3])


def test_strided_and_reversed_columns():
    b = Builder([Const(4), Const(30)])
    x = b.load("x", "float32", I0 * 90 + I1 * 3)
    b.store("y", "float32", I0 * 60 + I1 * 2, b.pointwise(
        "add", x, b.load("x", "float32", I0 * 90 - I1 + 60)))  # fmt: skip
    x = random_array("float32", 400)
    check(b.build()[0], [x, np.zeros(300, np.float32)])


def test_division_in_an_index():
    """A transpose through a flattened dimension splits; an uneven quotient is gathered."""
    b = Builder([S, Const(24)])
    b.store("y", "float32", I0 * 24 + I1, b.load("x", "float32", I0 * 24 + I1 % 4 * 6 + I1 // 4))
    b.store("z", "float32", I0 * 24 + I1, b.load("x", "float32", (I0 * 24 + I1 * 5) // 7))
    b.store("k", "int64", I0 * 24 + I1, b.index((I0 + I1) // 3 * 2 + (I0 + I1) % 8, "int64"))
    nest, names, _ = b.build()
    arrays = {k: random_array("float32", 7 * 24, 1) for k in "xyz"} | {"k": np.zeros(168, np.int64)}
    check(nest, [arrays[n] for n in names], [7])


def test_casts():
    b = Builder([S])
    x = b.load("x", "float32", I0)
    b.store("a", "float32", I0, b.cast(x, "bfloat16", rounds=True))
    b.store("b", "int32", I0, b.cast(x, "int32"))
    b.store("c", "bool", I0, b.cast(x, "bool"))
    i = b.load("i", "int64", I0)
    b.store("d", "int8", I0, b.cast(i, "int8"))
    b.store("e", "uint8", I0, b.cast(i, "uint8"))
    b.store("f", "bfloat16", I0, b.cast(i, "float32"))
    b.store("g", "int32", I0, b.bitcast(x, "int32"))
    nest, names, _ = b.build()
    types = {"x": "float32", "a": "float32", "b": "int32", "c": "bool", "i": "int64", "d": "int8"}
    types |= {"e": "uint8", "f": "bfloat16", "g": "int32"}
    arrays = {k: random_array(t, 150, 7) for k, t in types.items()}
    arrays["x"] = (arrays["x"] * 20).astype(np.float32)
    arrays["x"][::5] = 0
    arrays["i"] = np.random.default_rng(1).integers(-1000, 1000, 150)
    check(nest, [arrays[n] for n in names], [150])


def test_no_dimensions():
    b = Builder([])
    b.store("y", "float32", Const(0), b.pointwise("exp", b.load("x", "float32", Const(0))))
    check(b.build()[0], [random_array("float32", 1), np.zeros(1, np.float32)])


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=3, max_size=3),
    order=st.permutations([0, 1, 2]),
    blocks=st.tuples(st.integers(1, 20), st.integers(1, 70)),
    cores=st.integers(1, 4),
)
def test_permuted_copies(sizes, order, blocks, cores):
    """y = x permuted, plus a broadcast, for any order of three dimensions."""
    names = [Symbol(f"s{d}") for d in range(3)]
    b = Builder(names)
    index = Const(0)
    for d in order:
        index = index * names[d] + Var(d)
    out = (I0 * names[1] + I1) * names[2] + I2
    x = b.pointwise("add", b.load("x", "float32", index), b.load("r", "float32", I1))
    b.store("y", "float32", out, x)
    nest, _, symbols = b.build()
    count = int(np.prod(sizes))
    x = random_array("float32", count)
    r = random_array("float32", sizes[1], 1)
    values = dict(zip(("s0", "s1", "s2"), sizes, strict=True))
    arrays = [x, r, np.zeros_like(x)]
    check(nest, arrays, [values[k] for k in symbols], blocks=[blocks], cores=[cores])


@settings(max_examples=20)
@given(
    rows=st.integers(1, 30),
    width=st.integers(1, 300),
    blocks=st.tuples(st.integers(1, 20), st.integers(1, 300)),
    cores=st.integers(1, 4),
)
def test_softmax_bits_do_not_depend_on_blocks(rows, width, blocks, cores):
    x = random_array("float32", rows * width)
    arrays = [x, np.zeros_like(x)]
    check(softmax(Symbol("n")), arrays, [rows, width], [blocks, (64, 320)], [cores])


def test_float64_is_refused():
    b = Builder([S])
    b.store("y", "float64", I0, b.load("x", "float64", I0))
    with pytest.raises(CompileError) as caught:
        lower(b.build()[0], Blocks(8, 64))
    assert str(caught.value) == (
        "parameter p0: the chip computes in float32 and int32 and stores bfloat16, int8 and int64 "
        "besides, but the type is float64; convert it to float32 first"
    )


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("low, high", [(-128, 127), (0, 127), (-5, 100)])
def test_int8_between_two_bounds(low, high, dtype):
    """The cast need not wrap, and the store saturates by itself."""
    b = Builder([S, Const(33)])
    x = b.load("x", dtype, I0 * 33 + I1)
    x = b.pointwise("round", x) if dtype == "float32" else x
    at_least = b.pointwise("maximum", x, b.constant(low, dtype))
    bounded = b.pointwise("minimum", at_least, b.constant(high, dtype))
    b.store("y", "int8", I0 * 33 + I1, b.cast(bounded, "int8"))
    nest = b.build()[0]
    x = np.linspace(-300, 300, 5 * 33).astype(dtype)
    if dtype == "float32":
        x[1:9] = [np.inf, -np.inf, 3e9, -3e9, 0.5, 1.5, 126.5, 127.5]
        x[0] = np.nan
    check(nest, [x, np.zeros(x.size, np.int8)], [5])
    blocks = Blocks(4, 64)
    assert "shl" not in str(lower(nest, blocks).kernel)
    assert ("imin" in str(lower(nest, blocks).kernel)) == (high != 127 and dtype == "int32")
