"""Pointwise operations of loop nests as compositions of the chip's element-wise functions.

`compose` turns one operation of `loop_nest.POINTWISE` into a tile IR tree, `convert` a cast. The
composition is part of a kernel's meaning: it depends on nothing but the operation and its types,
so results are the same bits on every chip and for every tile size.

Integers of every width live in int32 lanes (int64 too), bool is 0 or 1; int8 and uint8
results wrap to their width. float32 functions and their error bounds (ulp of the result, against
the exact value; subnormal results count in units of the smallest subnormal):

    exact rounding   add sub mul div fma sqrt floor ceil trunc round minimum maximum abs neg
    2                exp2 log2 reciprocal rsqrt (the chip's tables)
    3                exp log
    4                expm1 log1p log10 sin cos atan asin tanh erf sinh cosh pow
    6                sigmoid acos tan atan2
    12               erfc (while the result is normal)

sin, cos and tan subtract multiples of pi in three parts: for |x| <= 1e5 the error is at most the
bound above or 2e-12, whichever is greater; the error grows with |x| beyond. `remainder`, `fmod` and
`floordiv` of floats are exact while the quotient is below 2^22 in magnitude.

Polynomials are weighted least-squares fits on Chebyshev points that were reweighted to an even
relative error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pagoda.compiler.errors import CompileError
from pagoda.compiler.tile_ir import Splat, Tree, apply, splat

Keep = Callable[[Tree], Tree]
"""Stores a value that is used several times and returns a tree that reads it back."""

WRAPPED = {"int8": (24, "sra"), "uint8": (24, "shr"), "int16": (16, "sra")}
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def check_dtype(dtype: str, what: str) -> None:
    """Raises CompileError for a type the chip cannot hold in its lanes."""
    if dtype in ("float64", "float16", "int16"):
        near = {"float64": "float32", "float16": "bfloat16", "int16": "int32"}[dtype]
        raise CompileError(
            what, "the chip computes in float32 and int32 and stores bfloat16, int8 and int64 "
            "besides", f"the type is {dtype}", f"convert it to {near} first",
        )  # fmt: skip


def compose(name: str, dtype: str, operand_dtype: str, args: tuple[Tree, ...], keep: Keep) -> Tree:
    """The tree of operation `name`. operand_dtype: type of the operands (of `where`: the type of
    the values); dtype: of the result. Raises CompileError for types the chip lacks."""
    check_dtype(operand_dtype, f"operation {name}")
    if name == "where":
        return apply("select", *args)
    if is_float(operand_dtype):
        return _FLOAT[name](keep, *args)
    if name not in _INT:
        raise CompileError(
            f"operation {name}", "it is defined for floating-point operands",
            f"they are {operand_dtype}", "convert them to float32 first",
        )  # fmt: skip
    if operand_dtype == "bool" and name in _BOOL:
        return apply(_BOOL[name], *args)
    if operand_dtype == "bool" and name == "bitwise_not":
        return apply("xor", args[0], splat(1))
    return wrapped(_INT[name](keep, *args), dtype)


def convert(value: Tree, source: str, target: str) -> Tree:
    """A conversion between types held in lanes. Rounding to bfloat16 takes a tile (see `lanes`
    of the caller), so here bfloat16 counts as float32."""
    check_dtype(target, f"a conversion from {source}")
    if is_float(target):
        return value if is_float(source) else apply("i2f", value)
    if target == "bool":
        if source == "bool":
            return value
        return apply("fne", value, splat(0.0)) if is_float(source) else apply("i2b", value)
    lanes = apply("f2i", value) if is_float(source) else value
    return lanes if source == "bool" else wrapped(lanes, target)


def bitcast(value: Tree, source: str, target: str) -> Tree:
    """The same bits as another type. Raises CompileError unless both are 32 bits or 8 bits wide."""
    pairs = {("float32", "int32"): "as_int", ("int32", "float32"): "as_float"}
    if (source, target) in pairs:
        return apply(pairs[source, target], value)
    if {source, target} <= {"int8", "uint8"}:
        return wrapped(value, target)
    raise CompileError(
        "a bit cast", "both types must be held in 32 bits, or be int8 and uint8",
        f"they are {source} and {target}", "convert with .to(dtype), or do it on the CPU",
    )  # fmt: skip


def wrapped(value: Tree, dtype: str) -> Tree:
    """int32 lanes reduced to the width of `dtype`."""
    if dtype not in WRAPPED:
        return value
    shift, right = WRAPPED[dtype]
    return apply(right, apply("shl", value, splat(shift)), splat(shift))


# Shorthands --------------------------------------------------------------------------------------


def _f(function: str, *args: Tree | float) -> Tree:
    return apply(function, *(splat(float(a)) if isinstance(a, (int, float)) else a for a in args))


def _i(function: str, *args: Tree | int) -> Tree:
    return apply(function, *(splat(a) if isinstance(a, int) else a for a in args))


def _select(condition: Tree, yes: Tree | float, no: Tree | float) -> Tree:
    return _f("select", condition, yes, no)


def _polynomial(x: Tree, coefficients: tuple[float, ...]) -> Tree:
    """sum(c[k] * x^k), by Horner's rule with fused steps; `x` is a leaf."""
    total: Tree = splat(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = _f("fma", total, x, c)
    return total


def _with_sign_of(magnitude: Tree, x: Tree) -> Tree:
    """A nonnegative value, negated where the sign bit of x is set."""
    sign = _i("and", apply("as_int", x), -(2**31))
    return apply("as_float", apply("or", apply("as_int", magnitude), sign))


# Exponentials and logarithms ---------------------------------------------------------------------

_LOG2E, _LOG2E_LOW = 1.4426950216293335, 1.925963033500011e-08
_LN2 = 0.6931471824645996


def _exp(keep: Keep, x: Tree) -> Tree:
    """2^t (1 + ln2 e) with t = x log2(e) rounded and e what rounding t lost. The clamp keeps
    infinities out of e and covers every x whose exponential is neither 0 nor infinite."""
    x = keep(_f("fmin", _f("fmax", x, -110.0), 90.0))
    t = keep(_f("fmul", x, _LOG2E))
    lost = _f("fma", x, _LOG2E, _f("fneg", t))
    factor = _f("fma", _f("fma", x, _LOG2E_LOW, lost), _LN2, 1.0)
    return _f("fmul", _f("exp2", t), factor)


_EXPM1 = (
    0.1666666716337204, 0.0416666679084301, 0.008333141915500164, 0.0013888598186895251,
    0.0001997362560359761, 2.496023262210656e-05,
)  # fmt: skip


def _expm1(keep: Keep, x: Tree) -> Tree:
    """|x| <= 1/2: x + x^2/2 + x^3 P(x); otherwise exp(x) - 1."""
    x = keep(x)
    square = keep(_f("fmul", x, x))
    small = _f("fma", _polynomial(x, _EXPM1), x, 0.5)
    small = _f("fma", small, square, x)
    # Where x is tiny, `small` is x itself, and keeps its sign.
    return _select(
        _f("fle", _f("fabs", x), 0.5),
        _select(_f("feq", square, 0.0), x, small),
        _f("fsub", _exp(keep, x), 1.0),
    )


def _log(keep: Keep, x: Tree) -> Tree:
    return _f("fmul", _f("log2", x), _LN2)


def _log10(keep: Keep, x: Tree) -> Tree:
    return _f("fmul", _f("log2", x), 0.3010300099849701)


def _log1p(keep: Keep, x: Tree) -> Tree:
    """log(u) x / (u - 1) with u = 1 + x rounded: the quotient makes up for the rounding."""
    x = keep(x)
    u = keep(_f("fadd", x, 1.0))
    above = keep(_f("fadd", u, -1.0))
    ratio = _select(_f("feq", above, x), 1.0, _f("fdiv", x, above))
    return _select(_f("feq", above, 0.0), x, _f("fmul", _log(keep, u), ratio))


def _sigmoid(keep: Keep, x: Tree) -> Tree:
    return _f("recip", _f("fadd", _exp(keep, _f("fneg", x)), 1.0))


_TANH = (
    -0.3333326280117035, 0.1333089917898178, -0.05369295924901962, 0.020483294501900673,
    -0.005528612993657589,
)  # fmt: skip
_SINH = (0.1666666716337204, 0.008333350531756878, 0.0001983606634894386, 2.817439735736116e-06)


def _odd(x: Tree, square: Tree, coefficients: tuple[float, ...]) -> Tree:
    """x + x z P(z), z = x^2; both given as leaves."""
    return _f("fma", _f("fmul", _polynomial(square, coefficients), square), x, x)


def _tanh(keep: Keep, x: Tree) -> Tree:
    """|x| < 0.65: x + x z P(z); otherwise 1 - 2 / (exp(2 |x|) + 1)."""
    x = keep(x)
    size = keep(_f("fabs", x))
    square = keep(_f("fmul", x, x))
    power = _exp(keep, _f("fmul", size, 2.0))
    large = _f("fsub", splat(1.0), _f("fmul", _f("recip", _f("fadd", power, 1.0)), 2.0))
    small = _odd(size, square, _TANH)
    return _with_sign_of(keep(_select(_f("flt", size, 0.65), small, large)), x)


def _sinh(keep: Keep, x: Tree) -> Tree:
    """|x| < 1: x + x z P(z); otherwise (h h - 1 / (h h)) / 2 with h = exp(|x| / 2), which is finite
    wherever the result is."""
    x = keep(x)
    size = keep(_f("fabs", x))
    square = keep(_f("fmul", x, x))
    half, inverse = _half_squares(keep, size)
    small, large = _odd(size, square, _SINH), _f("fsub", half, inverse)
    return _with_sign_of(keep(_select(_f("flt", size, 1.0), small, large)), x)


def _cosh(keep: Keep, x: Tree) -> Tree:
    half, inverse = _half_squares(keep, _f("fabs", x))
    return _f("fadd", half, inverse)


def _half_squares(keep: Keep, size: Tree) -> tuple[Tree, Tree]:
    """exp(size) / 2 and exp(-size) / 2 for size >= 0, without overflow in between."""
    h = keep(_exp(keep, _f("fmul", size, 0.5)))
    half = keep(_f("fmul", _f("fmul", h, 0.5), h))
    return half, _f("fmul", _f("recip", half), 0.25)


# Powers ------------------------------------------------------------------------------------------

_LOG2_TAIL = (0.9617967009544373, 0.5770798325538635, 0.411896675825119, 0.33670634031295776)
_TWO_LOG2E, _TWO_LOG2E_LOW = 2.885390043258667, 3.851926067000022e-08
_SQRT_HALF = 0x3F3504F3  # bits of sqrt(1/2)


def _log2_two(keep: Keep, size: Tree) -> tuple[Tree, Tree]:
    """log2 of size >= 0 as an unevaluated sum of two float32, to about 2^-31.

    size = 2^e m with m in [sqrt(1/2), sqrt(2)); log2(m) = 2/ln2 (s + s^3/3 + ...) for
    s = (m - 1) / (m + 1), with s and the leading term in two parts.
    """
    subnormal = keep(_f("flt", size, 2.0**-126))
    bits = keep(apply("as_int", _select(subnormal, _f("fmul", size, 2.0**24), size)))
    exponent = keep(_i("sra", _i("isub", bits, _SQRT_HALF), 23))
    m = keep(apply("as_float", _i("isub", bits, _i("shl", exponent, 23))))
    e = keep(_f("fadd", apply("i2f", exponent), _select(subnormal, -24.0, 0.0)))
    f = keep(_f("fadd", m, -1.0))
    g = keep(_f("fadd", m, 1.0))
    g_low = _f("fsub", m, _f("fadd", g, -1.0))
    inverse = keep(_f("recip", g))
    s = keep(_f("fmul", f, inverse))
    negative = keep(_f("fneg", s))
    s_low = _f("fmul", _f("fma", negative, g_low, _f("fma", negative, g, f)), inverse)
    square = keep(_f("fmul", s, s))
    high = keep(_f("fmul", s, _TWO_LOG2E))
    low = _f("fma", s, _TWO_LOG2E, _f("fneg", high))
    low = _f("fma", s, _TWO_LOG2E_LOW, low)
    low = _f("fma", s_low, _TWO_LOG2E, low)
    tail = _f("fmul", _polynomial(square, _LOG2_TAIL), square)
    low = keep(_f("fma", tail, s, low))
    total = keep(_f("fadd", e, high))
    low = keep(_f("fadd", _f("fadd", _f("fsub", e, total), high), low))
    high = keep(_f("fadd", total, low))
    low = _f("fadd", _f("fsub", total, high), low)
    infinite = _f("feq", size, math.inf)
    limit = _select(_f("feq", size, 0.0), -math.inf, _select(infinite, math.inf, high))
    return keep(limit), keep(low)


def _pow(keep: Keep, x: Tree, y: Tree) -> Tree:
    """2^(y log2 |x|), logarithm and product in two float32 each; small constant powers by
    multiplication. Special cases as in C's pow."""
    if isinstance(y, Splat) and y in _POWERS:
        return _POWERS[y](keep, keep(x))
    x = keep(x)
    y = keep(_f("fmin", _f("fmax", y, -3e38), 3e38))  # 3e38 is an even integer, like infinity
    size = keep(_f("fabs", x))
    high, low = _log2_two(keep, size)
    product = keep(_f("fmul", y, high))
    p = keep(_f("fmin", _f("fmax", product, -300.0), 300.0))  # 0 or infinite beyond
    lost = _f("fma", y, low, _f("fma", y, high, _f("fneg", product)))
    lost = _select(_f("feq", p, product), lost, 0.0)
    whole = keep(_f("ffloor", p))
    fraction = _f("exp2", _f("fsub", p, whole))
    lower = keep(_f("ffloor", _f("fmul", whole, 0.5)))
    value = _f("fmul", fraction, _f("fma", lost, _LN2, 1.0))
    value = _f("fmul", value, _f("exp2", lower))
    value = keep(_f("fmul", value, _f("exp2", _f("fsub", whole, lower))))
    # The sign: odd y keeps that of x; a finite negative x has only integer powers.
    odd = _f("fne", _f("ffloor", _f("fmul", y, 0.5)), _f("fmul", y, 0.5))
    fractional = keep(_f("fne", _f("ffloor", y), y))
    odd = _i("and", odd, _i("xor", fractional, 1))
    signed = _select(odd, _with_sign_of(value, x), value)
    finite_negative = _i("and", _f("flt", x, 0.0), _f("fgt", x, -math.inf))
    undefined = _i("or", _i("and", fractional, finite_negative), _f("fne", x, x))
    signed = _select(undefined, math.nan, signed)
    one = _i("or", _f("feq", x, 1.0), _f("feq", y, 0.0))
    return _select(one, 1.0, signed)


_POWERS: dict[Splat, Callable[[Keep, Tree], Tree]] = {
    splat(0.5): lambda keep, x: _f("fsqrt", x),
    splat(-0.5): lambda keep, x: _f("rsqrt", x),
    splat(1.0): lambda keep, x: x,
    splat(-1.0): lambda keep, x: _f("fdiv", splat(1.0), x),
    splat(2.0): lambda keep, x: _f("fmul", x, x),
    splat(-2.0): lambda keep, x: _f("fdiv", splat(1.0), _f("fmul", x, x)),
    splat(3.0): lambda keep, x: _f("fmul", _f("fmul", x, x), x),
    splat(4.0): lambda keep, x: _square(keep(_f("fmul", x, x))),
}


def _square(x: Tree) -> Tree:
    return _f("fmul", x, x)


# Trigonometry ------------------------------------------------------------------------------------

_PI = (3.1415927410125732, -8.742277657347586e-08, -3.4302490200117637e-15)  # their sum is pi
_HALF_PI, _HALF_PI_LOW = 1.5707963705062866, -4.371138828673793e-08
_INVERSE_PI = 0.31830987334251404


def _minus_multiple_of_pi(x: Tree, multiple: Tree) -> Tree:
    """x - multiple * pi, each step rounded once."""
    for part in _PI:
        x = _f("fma", multiple, -part, x)
    return x


def _alternate(value: Tree, count: Tree) -> Tree:
    """value * (-1)^count."""
    return apply("as_float", apply("xor", apply("as_int", value), _i("shl", count, 31)))


def _sine_of_rest(rest: Tree) -> Tree:
    """sin(rest) for |rest| <= pi / 2."""
    return _f("sin2pi", _f("fmul", rest, _INVERSE_PI / 2))


def _sin(keep: Keep, x: Tree) -> Tree:
    """sin(n pi + r) = (-1)^n sin(r)."""
    x = keep(x)
    n = keep(_f("fround", _f("fmul", x, _INVERSE_PI)))
    sine = keep(_sine_of_rest(_minus_multiple_of_pi(x, n)))
    return _select(_f("feq", x, 0.0), x, _alternate(sine, apply("f2i", n)))


def _cos(keep: Keep, x: Tree) -> Tree:
    """cos((n + 1/2) pi + r) = -(-1)^n sin(r)."""
    x = keep(x)
    n = keep(_f("ffloor", _f("fmul", x, _INVERSE_PI)))
    sine = keep(_sine_of_rest(_minus_multiple_of_pi(x, keep(_f("fadd", n, 0.5)))))
    return _alternate(sine, _i("iadd", apply("f2i", n), 1))


def _tan(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return _f("fdiv", _sin(keep, x), _cos(keep, x))


_ATAN = (
    -0.333333283662796, 0.1999969184398651, -0.14280129969120026, 0.11060242354869843,
    -0.08818840235471725, 0.06759552657604218, -0.04494616761803627, 0.02276010252535343,
    -0.007422524504363537, 0.0011348555563017726,
)  # fmt: skip
_ASIN = (
    0.16666659712791443, 0.07500510662794113, 0.04451572149991989, 0.03181760385632515,
    0.01440263818949461, 0.03756515309214592,
)  # fmt: skip


def _complement(value: Tree) -> Tree:
    """pi / 2 - value."""
    return _f("fadd", _f("fsub", _HALF_PI, value), _HALF_PI_LOW)


def _atan(keep: Keep, x: Tree) -> Tree:
    """x + x z P(z) up to 1, pi/2 - atan(1 / x) above."""
    x = keep(x)
    size = keep(_f("fabs", x))
    large = keep(_f("fgt", size, 1.0))
    t = keep(_select(large, _f("fdiv", splat(1.0), size), size))
    angle = keep(_odd(t, keep(_f("fmul", t, t)), _ATAN))
    return _with_sign_of(keep(_select(large, _complement(angle), angle)), x)


def _atan2(keep: Keep, y: Tree, x: Tree) -> Tree:
    x, y = keep(x), keep(y)
    across, up = keep(_f("fabs", x)), keep(_f("fabs", y))
    larger, smaller = keep(_f("fmax", across, up)), keep(_f("fmin", across, up))
    ratio = _select(_f("feq", smaller, math.inf), 1.0, _f("fdiv", smaller, larger))
    t = keep(_select(_f("feq", larger, 0.0), 0.0, ratio))
    angle = keep(_odd(t, keep(_f("fmul", t, t)), _ATAN))
    angle = keep(_select(_f("fgt", up, across), _complement(angle), angle))
    left = _i("shr", apply("as_int", x), 31)
    behind = _f("fadd", _f("fsub", _PI[0], angle), _PI[1])
    return _with_sign_of(keep(_select(left, behind, angle)), y)


def _half_angle(keep: Keep, x: Tree) -> tuple[Tree, Tree]:
    """Whether |x| > 1/2, and then asin(sqrt((1 - |x|) / 2)), else asin(|x|)."""
    size = keep(_f("fabs", x))
    large = keep(_f("fgt", size, 0.5))
    rest = _f("fmul", _f("fsub", 1.0, size), 0.5)
    square = keep(_select(large, rest, _f("fmul", size, size)))
    s = keep(_select(large, _f("fsqrt", square), size))
    return large, keep(_odd(s, square, _ASIN))


def _asin(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    large, angle = _half_angle(keep, x)
    result = _select(large, _complement(_f("fmul", angle, 2.0)), angle)
    return _with_sign_of(keep(result), x)


def _acos(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    large, angle = _half_angle(keep, x)
    twice = keep(_f("fmul", angle, 2.0))
    behind = _f("fadd", _f("fsub", _PI[0], twice), _PI[1])
    outer = _select(_f("flt", x, 0.0), behind, twice)
    return _select(large, outer, _complement(_with_sign_of(angle, x)))


# Error functions ---------------------------------------------------------------------------------

_ERF = (
    1.1283791065216064, -0.3761262595653534, 0.11283600330352783, -0.026854444295167923,
    0.005189535208046436, -0.000802083988673985, 7.889114931458607e-05,
)  # fmt: skip
_ERFC = (
    0.2820866107940674, 0.28231531381607056, 0.24428999423980713, 0.19266466796398163,
    0.019778219982981682, 0.14939235150814056, -0.2678559124469757, 0.05936868488788605,
    0.06870393455028534, -0.030772380530834198,
)  # fmt: skip


def _erfc_positive(keep: Keep, size: Tree) -> Tree:
    """erfc(a) = exp(-a^2) t P(t) with t = 1 / (1 + a / 2), for a >= 1/2; the exponent is -a^2 in
    two parts. erfc(10.5) is 0 in float32."""
    a = keep(_f("fmin", size, 10.5))
    square = keep(_f("fmul", a, a))
    lost = _f("fma", a, a, _f("fneg", square))
    power = keep(_f("fmul", _exp(keep, _f("fneg", square)), _f("fsub", 1.0, lost)))
    t = keep(_f("recip", _f("fma", a, splat(0.5), splat(1.0))))
    return keep(_f("fmul", _f("fmul", _polynomial(t, _ERFC), t), power))


def _erf(keep: Keep, x: Tree) -> Tree:
    """|x| < 1: x P(x^2); otherwise 1 - erfc(|x|)."""
    x = keep(x)
    size = keep(_f("fabs", x))
    square = keep(_f("fmul", x, x))
    large = keep(_f("fsub", 1.0, _erfc_positive(keep, size)))
    small = _f("fmul", _polynomial(square, _ERF), x)
    return _select(_f("flt", size, 1.0), small, _with_sign_of(large, x))


def _erfc(keep: Keep, x: Tree) -> Tree:
    """|x| < 1/2: 1 - erf(x); otherwise by `_erfc_positive`, and erfc(-x) = 2 - erfc(x)."""
    x = keep(x)
    size = keep(_f("fabs", x))
    square = keep(_f("fmul", x, x))
    large = _erfc_positive(keep, size)
    small = _f("fsub", 1.0, _f("fmul", _polynomial(square, _ERF), x))
    outer = _select(_f("flt", x, 0.0), _f("fsub", 2.0, large), large)
    return _select(_f("flt", size, 0.5), small, outer)


# Division and rounding ---------------------------------------------------------------------------


def _floordiv(keep: Keep, a: Tree, b: Tree) -> Tree:
    """floor(a / b), one less where the quotient was rounded up across an integer."""
    a, b = keep(a), keep(b)
    q = keep(_f("ffloor", _f("fdiv", a, b)))
    rest = _f("fma", _f("fneg", q), b, a)
    return _select(_f("flt", _f("fmul", rest, b), 0.0), _f("fadd", q, -1.0), q)


def _remainder(keep: Keep, a: Tree, b: Tree) -> Tree:
    """a - floor(a / b) b, which has the sign of b."""
    a, b = keep(a), keep(b)
    q = _f("ffloor", _f("fdiv", a, b))
    rest = keep(_f("fma", _f("fneg", q), b, a))
    return _select(_f("flt", _f("fmul", rest, b), 0.0), _f("fadd", rest, b), rest)


def _fmod(keep: Keep, a: Tree, b: Tree) -> Tree:
    """|a| - floor(|a| / |b|) |b|, with the sign of a."""
    a = keep(a)
    rest = _remainder(keep, _f("fabs", a), _f("fabs", b))
    return _with_sign_of(keep(rest), a)


def _truncdiv_int(keep: Keep, a: Tree, b: Tree) -> Tree:
    a, b = keep(a), keep(b)
    q = keep(_i("idiv", _abs_int(keep, a), _abs_int(keep, b)))
    return _i("select", _i("ilt", _i("xor", a, b), 0), _i("isub", splat(0), q), q)


def _fmod_int(keep: Keep, a: Tree, b: Tree) -> Tree:
    a, b = keep(a), keep(b)
    return _i("isub", a, _i("imul", _truncdiv_int(keep, a, b), b))


def _abs_int(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return _i("imax", x, _i("isub", splat(0), x))


def _sign(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return apply("i2f", _i("isub", _f("fgt", x, 0.0), _f("flt", x, 0.0)))


def _sign_int(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return _i("isub", _i("ilt", splat(0), x), _i("ilt", x, 0))


# The tables --------------------------------------------------------------------------------------


def _one(function: str) -> Callable[..., Tree]:
    return lambda keep, *args: apply(function, *args)


def _swapped(function: str) -> Callable[..., Tree]:
    return lambda keep, a, b: apply(function, b, a)


def _isnan(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return apply("fne", x, x)


_FLOAT: dict[str, Callable[..., Tree]] = {
    **{n: _one(f"f{n}") for n in ("add", "sub", "mul", "div", "neg", "abs", "sqrt", "floor")},
    **{n: _one(f"f{n}") for n in ("ceil", "trunc", "round", "lt", "le", "gt", "ge", "eq", "ne")},
    "minimum": _one("fmin"), "maximum": _one("fmax"), "fma": _one("fma"), "sign": _sign,
    "reciprocal": _one("recip"), "rsqrt": _one("rsqrt"), "exp2": _one("exp2"),
    "log2": _one("log2"), "exp": _exp, "expm1": _expm1, "log": _log, "log10": _log10,
    "log1p": _log1p, "pow": _pow, "sigmoid": _sigmoid, "tanh": _tanh, "sinh": _sinh,
    "cosh": _cosh, "sin": _sin, "cos": _cos, "tan": _tan, "asin": _asin, "acos": _acos,
    "atan": _atan, "atan2": _atan2, "erf": _erf, "erfc": _erfc, "floordiv": _floordiv,
    "remainder": _remainder, "fmod": _fmod, "isnan": _isnan,
    "truncdiv": lambda keep, a, b: _f("ftrunc", _f("fdiv", a, b)),
    "isinf": lambda keep, x: _f("feq", _f("fabs", x), math.inf),
    "signbit": lambda keep, x: _i("shr", apply("as_int", x), 31),
    "logical_not": lambda keep, x: _f("feq", x, 0.0),
}  # fmt: skip

_INT: dict[str, Callable[..., Tree]] = {
    "add": _one("iadd"), "sub": _one("isub"), "mul": _one("imul"), "minimum": _one("imin"),
    "maximum": _one("imax"), "floordiv": _one("idiv"), "remainder": _one("imod"),
    "truncdiv": _truncdiv_int, "fmod": _fmod_int, "bitwise_and": _one("and"),
    "bitwise_or": _one("or"), "bitwise_xor": _one("xor"), "shift_left": _one("shl"),
    "shift_right": _one("sra"), "lt": _one("ilt"), "le": _one("ile"), "eq": _one("ieq"),
    "ne": _one("ine"), "gt": _swapped("ilt"), "ge": _swapped("ile"), "abs": _abs_int,
    "sign": _sign_int, "neg": lambda keep, x: _i("isub", splat(0), x),
    "bitwise_not": lambda keep, x: _i("xor", x, -1),
    "logical_not": lambda keep, x: _i("ieq", x, 0),
    "floor": lambda keep, x: x, "ceil": lambda keep, x: x, "trunc": lambda keep, x: x,
    "round": lambda keep, x: x, "isnan": lambda keep, x: splat(0),
    "isinf": lambda keep, x: splat(0), "signbit": lambda keep, x: _i("ilt", x, 0),
}  # fmt: skip

_BOOL = {"add": "or", "mul": "and", "maximum": "or", "minimum": "and"}
