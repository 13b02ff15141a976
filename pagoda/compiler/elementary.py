"""Elementary functions of float32 as compositions of the chip's element-wise functions.

Error bounds, in ulp of the result against the exact value (subnormal results count in units of the
smallest subnormal):

    2   exp log log10 log1p tanh acos atan, and the chip's own tables (exp2, log2, ...)
    3   expm1 sin cos asin erf
    4   sigmoid recip1p_exp2 tan pow atan2
    8   sinh cosh erfc

sin, cos and tan subtract multiples of pi in three parts: up to |x| = 1e5 the error is within the
bound or below 2e-10, whichever is greater; it grows with |x| beyond.

Polynomials are weighted least-squares fits on Chebyshev points that were reweighted to an even
relative error.

`keep` stores a value that is used several times and returns a tree that reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pagoda.compiler.tile_ir import Splat, Tree, apply, splat

Keep = Callable[[Tree], Tree]

# Shorthands --------------------------------------------------------------------------------------


def f32(function: str, *args: Tree | float) -> Tree:
    """`apply`, with numbers as float32 constants."""
    return apply(function, *(splat(float(a)) if isinstance(a, (int, float)) else a for a in args))


def i32(function: str, *args: Tree | int) -> Tree:
    """`apply`, with numbers as int32 constants."""
    return apply(function, *(splat(a) if isinstance(a, int) else a for a in args))


def choose(condition: Tree, yes: Tree | float, no: Tree | float) -> Tree:
    return f32("select", condition, yes, no)


def _polynomial(x: Tree, coefficients: tuple[float, ...]) -> Tree:
    """sum(c[k] * x^k), by Horner's rule with fused steps; `x` is a leaf."""
    total: Tree = splat(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = f32("fma", total, x, c)
    return total


def with_sign_of(magnitude: Tree, x: Tree) -> Tree:
    """A nonnegative value, negated where the sign bit of x is set."""
    sign = i32("and", apply("as_int", x), -(2**31))
    return apply("as_float", apply("or", apply("as_int", magnitude), sign))


# Exponentials and logarithms ---------------------------------------------------------------------

_LOG2E, _LOG2E_LOW = 1.4426950216293335, 1.925963033500011e-08
_LN2 = 0.6931471824645996


def exp(keep: Keep, x: Tree) -> Tree:
    return _exp(keep, x, 1.0)


def _exp(keep: Keep, x: Tree, sign: float) -> Tree:
    """e^y of y = sign x, sign 1 or -1, as 2^t (1 + ln2 e) with t = y log2(e) rounded and e what
    rounding t lost. The clamp keeps infinities out of e and covers every y whose exponential is
    neither 0 nor infinite."""
    low, high = (-110.0, 90.0) if sign > 0 else (-90.0, 110.0)
    x = keep(f32("fmin", f32("fmax", x, low), high))
    t = keep(f32("fmul", x, sign * _LOG2E))
    gained = f32("fma", x, -sign * _LOG2E, t)
    factor = f32("fma", f32("fma", x, -sign * _LOG2E_LOW, gained), -_LN2, 1.0)
    return f32("fmul", f32("exp2", t), factor)


_EXPM1 = (
    0.1666666716337204, 0.0416666679084301, 0.008333141915500164, 0.0013888598186895251,
    0.0001997362560359761, 2.496023262210656e-05,
)  # fmt: skip


def expm1(keep: Keep, x: Tree) -> Tree:
    """|x| <= 1/2: x + x^2/2 + x^3 P(x); otherwise exp(x) - 1."""
    x = keep(x)
    square = keep(f32("fmul", x, x))
    small = f32("fma", _polynomial(x, _EXPM1), x, 0.5)
    small = f32("fma", small, square, x)
    # Where x is tiny, `small` is x itself, and keeps its sign.
    return choose(
        f32("fle", f32("fabs", x), 0.5),
        choose(f32("feq", square, 0.0), x, small),
        f32("fsub", exp(keep, x), 1.0),
    )


def log(keep: Keep, x: Tree) -> Tree:
    return f32("fmul", f32("log2", x), _LN2)


def log10(keep: Keep, x: Tree) -> Tree:
    return f32("fmul", f32("log2", x), 0.3010300099849701)


def log1p(keep: Keep, x: Tree) -> Tree:
    """log(u) x / (u - 1) with u = 1 + x rounded: the quotient makes up for the rounding."""
    x = keep(x)
    u = keep(f32("fadd", x, 1.0))
    above = keep(f32("fadd", u, -1.0))
    ratio = choose(f32("feq", above, x), 1.0, f32("fdiv", x, above))
    return choose(f32("feq", above, 0.0), x, f32("fmul", log(keep, u), ratio))


def sigmoid(keep: Keep, x: Tree) -> Tree:
    return f32("recip", f32("fadd", _exp(keep, x, -1.0), 1.0))


def recip1p_exp2(keep: Keep, x: Tree) -> Tree:
    """1 / (1 + 2^x)."""
    return f32("recip", f32("fadd", f32("exp2", x), 1.0))


_TANH = (
    -0.3333326280117035, 0.1333089917898178, -0.05369295924901962, 0.020483294501900673,
    -0.005528612993657589,
)  # fmt: skip
_SINH = (0.1666666716337204, 0.008333350531756878, 0.0001983606634894386, 2.817439735736116e-06)


def _odd(x: Tree, square: Tree, coefficients: tuple[float, ...]) -> Tree:
    """x + x z P(z), z = x^2; both given as leaves."""
    return f32("fma", f32("fmul", _polynomial(square, coefficients), square), x, x)


def tanh(keep: Keep, x: Tree) -> Tree:
    """|x| < 0.65: x + x z P(z); otherwise 1 - 2 / (exp(2 |x|) + 1)."""
    x = keep(x)
    size = keep(f32("fabs", x))
    square = keep(f32("fmul", x, x))
    power = exp(keep, f32("fmul", size, 2.0))
    large = f32("fsub", splat(1.0), f32("fmul", f32("recip", f32("fadd", power, 1.0)), 2.0))
    small = _odd(size, square, _TANH)
    return with_sign_of(keep(choose(f32("flt", size, 0.65), small, large)), x)


def sinh(keep: Keep, x: Tree) -> Tree:
    """|x| < 1: x + x z P(z); otherwise (h h - 1 / (h h)) / 2 with h = exp(|x| / 2), which is finite
    wherever the result is."""
    x = keep(x)
    size = keep(f32("fabs", x))
    square = keep(f32("fmul", x, x))
    half, inverse = _half_squares(keep, size)
    small, large = _odd(size, square, _SINH), f32("fsub", half, inverse)
    return with_sign_of(keep(choose(f32("flt", size, 1.0), small, large)), x)


def cosh(keep: Keep, x: Tree) -> Tree:
    half, inverse = _half_squares(keep, f32("fabs", x))
    return f32("fadd", half, inverse)


def _half_squares(keep: Keep, size: Tree) -> tuple[Tree, Tree]:
    """exp(size) / 2 and exp(-size) / 2 for size >= 0, without overflow in between."""
    h = keep(exp(keep, f32("fmul", size, 0.5)))
    half = keep(f32("fmul", f32("fmul", h, 0.5), h))
    return half, f32("fmul", f32("recip", half), 0.25)


# Powers ------------------------------------------------------------------------------------------

_LOG2_TAIL = (0.9617967009544373, 0.5770798325538635, 0.411896675825119, 0.33670634031295776)
_TWO_LOG2E, _TWO_LOG2E_LOW = 2.885390043258667, 3.851926067000022e-08
_SQRT_HALF = 0x3F3504F3  # bits of sqrt(1/2)


def _log2_two(keep: Keep, size: Tree) -> tuple[Tree, Tree]:
    """log2 of size >= 0 as an unevaluated sum of two float32, to about 2^-31.

    size = 2^e m with m in [sqrt(1/2), sqrt(2)); log2(m) = 2/ln2 (s + s^3/3 + ...) for
    s = (m - 1) / (m + 1), with s and the leading term in two parts.
    """
    subnormal = keep(f32("flt", size, 2.0**-126))
    bits = keep(apply("as_int", choose(subnormal, f32("fmul", size, 2.0**24), size)))
    exponent = keep(i32("sra", i32("isub", bits, _SQRT_HALF), 23))
    m = keep(apply("as_float", i32("isub", bits, i32("shl", exponent, 23))))
    e = keep(f32("fadd", apply("i2f", exponent), choose(subnormal, -24.0, 0.0)))
    f = keep(f32("fadd", m, -1.0))
    g = keep(f32("fadd", m, 1.0))
    g_low = f32("fsub", m, f32("fadd", g, -1.0))
    inverse = keep(f32("recip", g))
    s = keep(f32("fmul", f, inverse))
    negative = keep(f32("fneg", s))
    s_low = f32("fmul", f32("fma", negative, g_low, f32("fma", negative, g, f)), inverse)
    square = keep(f32("fmul", s, s))
    high = keep(f32("fmul", s, _TWO_LOG2E))
    low = f32("fma", s, _TWO_LOG2E, f32("fneg", high))
    low = f32("fma", s, _TWO_LOG2E_LOW, low)
    low = f32("fma", s_low, _TWO_LOG2E, low)
    tail = f32("fmul", _polynomial(square, _LOG2_TAIL), square)
    low = keep(f32("fma", tail, s, low))
    total = keep(f32("fadd", e, high))
    low = keep(f32("fadd", f32("fadd", f32("fsub", e, total), high), low))
    high = keep(f32("fadd", total, low))
    low = f32("fadd", f32("fsub", total, high), low)
    infinite = f32("feq", size, math.inf)
    limit = choose(f32("feq", size, 0.0), -math.inf, choose(infinite, math.inf, high))
    return keep(limit), keep(low)


def power(keep: Keep, x: Tree, y: Tree) -> Tree:
    """2^(y log2 |x|), logarithm and product in two float32 each; small constant powers by
    multiplication. Special cases as in C's pow."""
    if isinstance(y, Splat) and y in _POWERS:
        return _POWERS[y](keep, keep(x))
    x = keep(x)
    y = keep(f32("fmin", f32("fmax", y, -3e38), 3e38))  # 3e38 is an even integer, like infinity
    size = keep(f32("fabs", x))
    high, low = _log2_two(keep, size)
    product = keep(f32("fmul", y, high))
    p = keep(f32("fmin", f32("fmax", product, -300.0), 300.0))  # 0 or infinite beyond
    lost = f32("fma", y, low, f32("fma", y, high, f32("fneg", product)))
    lost = choose(f32("feq", p, product), lost, 0.0)
    whole = keep(f32("ffloor", p))
    fraction = f32("exp2", f32("fsub", p, whole))
    lower = keep(f32("ffloor", f32("fmul", whole, 0.5)))
    value = f32("fmul", fraction, f32("fma", lost, _LN2, 1.0))
    value = f32("fmul", value, f32("exp2", lower))
    value = keep(f32("fmul", value, f32("exp2", f32("fsub", whole, lower))))
    # The sign: odd y keeps that of x; a finite negative x has only integer powers.
    odd = f32("fne", f32("ffloor", f32("fmul", y, 0.5)), f32("fmul", y, 0.5))
    fractional = keep(f32("fne", f32("ffloor", y), y))
    odd = i32("and", odd, i32("xor", fractional, 1))
    signed = choose(odd, with_sign_of(value, x), value)
    finite_negative = i32("and", f32("flt", x, 0.0), f32("fgt", x, -math.inf))
    undefined = i32("or", i32("and", fractional, finite_negative), f32("fne", x, x))
    signed = choose(undefined, math.nan, signed)
    one = i32("or", f32("feq", x, 1.0), f32("feq", y, 0.0))
    return choose(one, 1.0, signed)


_POWERS: dict[Splat, Callable[[Keep, Tree], Tree]] = {
    splat(0.5): lambda keep, x: f32("fsqrt", x),
    splat(-0.5): lambda keep, x: f32("rsqrt", x),
    splat(1.0): lambda keep, x: x,
    splat(-1.0): lambda keep, x: f32("fdiv", splat(1.0), x),
    splat(2.0): lambda keep, x: f32("fmul", x, x),
    splat(-2.0): lambda keep, x: f32("fdiv", splat(1.0), f32("fmul", x, x)),
    splat(3.0): lambda keep, x: f32("fmul", f32("fmul", x, x), x),
    splat(4.0): lambda keep, x: _square(keep(f32("fmul", x, x))),
}


def _square(x: Tree) -> Tree:
    return f32("fmul", x, x)


# Trigonometry ------------------------------------------------------------------------------------

_PI = (3.1415927410125732, -8.742277657347586e-08, -3.4302490200117637e-15)  # their sum is pi
_HALF_PI, _HALF_PI_LOW = 1.5707963705062866, -4.371138828673793e-08
_INVERSE_PI = 0.31830987334251404


def _minus_multiple_of_pi(x: Tree, multiple: Tree) -> Tree:
    """x - multiple * pi, each step rounded once."""
    for part in _PI:
        x = f32("fma", multiple, -part, x)
    return x


def _alternate(value: Tree, count: Tree) -> Tree:
    """value * (-1)^count."""
    return apply("as_float", apply("xor", apply("as_int", value), i32("shl", count, 31)))


def _sine_of_rest(rest: Tree) -> Tree:
    """sin(rest) for |rest| <= pi / 2."""
    return f32("sin2pi", f32("fmul", rest, _INVERSE_PI / 2))


def sin(keep: Keep, x: Tree) -> Tree:
    """sin(n pi + r) = (-1)^n sin(r)."""
    x = keep(x)
    n = keep(f32("fround", f32("fmul", x, _INVERSE_PI)))
    sine = keep(_sine_of_rest(_minus_multiple_of_pi(x, n)))
    return choose(f32("feq", x, 0.0), x, _alternate(sine, apply("f2i", n)))


def cos(keep: Keep, x: Tree) -> Tree:
    """cos((n + 1/2) pi + r) = -(-1)^n sin(r)."""
    x = keep(x)
    n = keep(f32("ffloor", f32("fmul", x, _INVERSE_PI)))
    sine = keep(_sine_of_rest(_minus_multiple_of_pi(x, keep(f32("fadd", n, 0.5)))))
    return _alternate(sine, i32("iadd", apply("f2i", n), 1))


def tan(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return f32("fdiv", sin(keep, x), cos(keep, x))


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
    return f32("fadd", f32("fsub", _HALF_PI, value), _HALF_PI_LOW)


def atan(keep: Keep, x: Tree) -> Tree:
    """x + x z P(z) up to 1, pi/2 - atan(1 / x) above."""
    x = keep(x)
    size = keep(f32("fabs", x))
    large = keep(f32("fgt", size, 1.0))
    t = keep(choose(large, f32("fdiv", splat(1.0), size), size))
    angle = keep(_odd(t, keep(f32("fmul", t, t)), _ATAN))
    return with_sign_of(keep(choose(large, _complement(angle), angle)), x)


def atan2(keep: Keep, y: Tree, x: Tree) -> Tree:
    x, y = keep(x), keep(y)
    across, up = keep(f32("fabs", x)), keep(f32("fabs", y))
    larger, smaller = keep(f32("fmax", across, up)), keep(f32("fmin", across, up))
    ratio = choose(f32("feq", smaller, math.inf), 1.0, f32("fdiv", smaller, larger))
    t = keep(choose(f32("feq", larger, 0.0), 0.0, ratio))
    angle = keep(_odd(t, keep(f32("fmul", t, t)), _ATAN))
    angle = keep(choose(f32("fgt", up, across), _complement(angle), angle))
    left = i32("shr", apply("as_int", x), 31)
    behind = f32("fadd", f32("fsub", _PI[0], angle), _PI[1])
    return with_sign_of(keep(choose(left, behind, angle)), y)


def _half_angle(keep: Keep, x: Tree) -> tuple[Tree, Tree]:
    """Whether |x| > 1/2, and then asin(sqrt((1 - |x|) / 2)), else asin(|x|)."""
    size = keep(f32("fabs", x))
    large = keep(f32("fgt", size, 0.5))
    rest = f32("fmul", f32("fsub", 1.0, size), 0.5)
    square = keep(choose(large, rest, f32("fmul", size, size)))
    s = keep(choose(large, f32("fsqrt", square), size))
    return large, keep(_odd(s, square, _ASIN))


def asin(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    large, angle = _half_angle(keep, x)
    result = choose(large, _complement(f32("fmul", angle, 2.0)), angle)
    return with_sign_of(keep(result), x)


def acos(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    large, angle = _half_angle(keep, x)
    twice = keep(f32("fmul", angle, 2.0))
    behind = f32("fadd", f32("fsub", _PI[0], twice), _PI[1])
    outer = choose(f32("flt", x, 0.0), behind, twice)
    return choose(large, outer, _complement(with_sign_of(angle, x)))


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
    a = keep(f32("fmin", size, 10.5))
    square = keep(f32("fmul", a, a))
    lost = f32("fma", a, a, f32("fneg", square))
    power = keep(f32("fmul", exp(keep, f32("fneg", square)), f32("fsub", 1.0, lost)))
    t = keep(f32("recip", f32("fma", a, splat(0.5), splat(1.0))))
    return keep(f32("fmul", f32("fmul", _polynomial(t, _ERFC), t), power))


def erf(keep: Keep, x: Tree) -> Tree:
    """|x| < 1: x P(x^2); otherwise 1 - erfc(|x|)."""
    x = keep(x)
    size = keep(f32("fabs", x))
    square = keep(f32("fmul", x, x))
    large = keep(f32("fsub", 1.0, _erfc_positive(keep, size)))
    small = f32("fmul", _polynomial(square, _ERF), x)
    return choose(f32("flt", size, 1.0), small, with_sign_of(large, x))


def erfc(keep: Keep, x: Tree) -> Tree:
    """|x| < 1/2: 1 - erf(x); otherwise by `_erfc_positive`, and erfc(-x) = 2 - erfc(x)."""
    x = keep(x)
    size = keep(f32("fabs", x))
    square = keep(f32("fmul", x, x))
    large = _erfc_positive(keep, size)
    small = f32("fsub", 1.0, f32("fmul", _polynomial(square, _ERF), x))
    outer = choose(f32("flt", x, 0.0), f32("fsub", 2.0, large), large)
    return choose(f32("flt", size, 0.5), small, outer)


ELEMENTARY: dict[str, Callable[..., Tree]] = {
    "exp": exp, "expm1": expm1, "log": log, "log10": log10, "log1p": log1p, "pow": power,
    "sigmoid": sigmoid, "tanh": tanh, "sinh": sinh, "cosh": cosh, "sin": sin, "cos": cos,
    "tan": tan, "asin": asin, "acos": acos, "atan": atan, "atan2": atan2, "erf": erf,
    "erfc": erfc, "recip1p_exp2": recip1p_exp2,
}  # fmt: skip
