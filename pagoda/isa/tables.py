"""The five table functions: exp2, log2, reciprocal, rsqrt, sin2pi on binary32.

They are defined in integers, so that every execution (this one, the simulator, the RTL) gives the
same bits. Each is a range reduction, one table row, a quadratic, and one rounding, and each is
within 2 ulp of the true value for every input, subnormal inputs and results included.

**Words used below.** `>>` is the arithmetic shift (floor). All values fit in signed 64 bits; the
widths are given per function. `FRACTION` = 30 is the fixed-point scale of tables and of y.

**Unpack.** x is split into its sign, an integer M and an exponent e, |x| = M * 2^e. *Normalised*
means 2^23 <= M < 2^24, for subnormal x too (M shifted left, e lowered).

**Quadratic.** A table has rows (C0, C1, C2), scaled by 2^30, for equal segments of the argument.
With d the position inside the segment as a `w`-bit integer, 0 <= d < 2^w:

    y = C0 + (((C1 + ((C2 * d) >> w)) * d) >> w)

**Pack.** `pack(sign, S, e)` is (-1)^sign * S * 2^e rounded to nearest even, for 0 <= S < 2^62:

    L = bit length of S;  q = max(L + e - 24, -149)          # weight of the last kept bit
    n = q - e;  k = S << -n if n <= 0, else S >> n rounded to nearest even (0 if n > 62)
    pattern = min((q + 149) * 2^23 + k, 0x7F800000) | sign << 31       (zero if S = 0)

**Coefficients.** For each segment, the quadratic through the function's values at 17/256, 128/256
and 239/256 of it (nearly the Chebyshev points), rounded to nearest. They are computed here from
power series in 96-bit integers: no host's libm has a say.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pagoda.isa.numbers import CANONICAL_NAN, F32

I64 = NDArray[np.int64]

FRACTION = 30
_INF = 0x7F800000
_SIGN = 0x80000000

# --- Coefficients ----------------------------------------------------------------------------

_P = 96
_ONE = 1 << _P
_GUARD = 8  # log2 of the subdivisions of a segment that locate the interpolation points
_REACH = 111  # distance of the outer points from the middle one, in 1/256 of a segment


def _table(function: Callable[[int], int], rows: int) -> I64:
    """Table (rows, 3) of int64; `function` takes a position in 1/256 of a segment."""
    table = []
    for row in range(rows):
        middle = (row << _GUARD) + 128
        low, mid, high = (function(middle + step) for step in (-_REACH, 0, _REACH))
        # p(u) = mid + slope * (u - 1/2) + bend * (u - 1/2)^2 over the segment, 0 <= u < 1.
        slope = ((high - low) << _GUARD) // (2 * _REACH)
        bend = ((high + low - 2 * mid) << (2 * _GUARD)) // (2 * _REACH * _REACH)
        exact = (mid - slope // 2 + bend // 4, slope - bend, bend)
        half = 1 << (_P - FRACTION - 1)
        table.append([(c + half) >> (_P - FRACTION) for c in exact])
    result = np.array(table, np.int64)
    result.setflags(write=False)
    return result


def _odd_series(q: int, sign: int) -> int:
    """sum of sign^j * q^-(2j+1) / (2j+1): atanh(1/q) for sign 1, atan(1/q) for sign -1."""
    total, power, j = 0, _ONE // q, 0
    while power:
        total += sign**j * power // (2 * j + 1)
        power //= q * q
        j += 1
    return total


_LN2 = 2 * _odd_series(3, 1)
_TWO_PI = 2 * (16 * _odd_series(5, -1) - 4 * _odd_series(239, -1))


def _exp2_value(v: int) -> int:
    """2^(v / 2^15): the exponential series of v * ln 2."""
    z = (v * _LN2) >> 15
    total, term, j = 0, _ONE, 1
    while term:
        total += term
        term = (term * z >> _P) // j
        j += 1
    return total


def _log2_value(v: int) -> int:
    """log2(1 + t) / t with t = v / 2^16 - 1/4: the series of 2 atanh(z), z = t / (2 + t)."""
    t = v - (1 << 14)
    divisor = t + (1 << 17)
    square = t * t * _ONE // (divisor * divisor)
    total, power, j = 0, _ONE, 0
    while power:
        total += power // (2 * j + 1)
        power = power * square >> _P
        j += 1
    return (total << 18) * _ONE // (divisor * _LN2) >> 1


def _reciprocal_value(v: int) -> int:
    """1 / (1 + v / 2^16)."""
    return (_ONE << 16) // ((1 << 16) + v)


def _rsqrt_value(v: int) -> int:
    """1 / sqrt(1 + v / 2^15) for v < 2^15, then 1 / sqrt(2 (1 + (v - 2^15) / 2^15))."""
    argument = (1 << 15) + v if v < 1 << 15 else 2 * v
    return isqrt((_ONE * _ONE << 15) // argument)


def _sin2pi_value(v: int) -> int:
    """sin(2 pi x) / x with x = v / 2^17."""
    z = (v * _TWO_PI) >> 17
    square = z * z >> _P
    total, term, j = 0, _TWO_PI, 1
    while term:
        total += term if j % 4 == 1 else -term
        term = (term * square >> _P) // ((j + 1) * (j + 2))
        j += 2
    return total


EXP2_TABLE = _table(_exp2_value, 128)
"""2^f, 0 <= f < 1, in segments of 2^-7."""
LOG2_TABLE = _table(_log2_value, 192)
"""log2(1 + t) / t, -1/4 <= t < 1/2, in segments of 2^-8."""
RECIPROCAL_TABLE = _table(_reciprocal_value, 256)
"""1 / m, 1 <= m < 2, in segments of 2^-8."""
RSQRT_TABLE = _table(_rsqrt_value, 256)
"""1 / sqrt(m), 1 <= m < 2, then 1 / sqrt(2m), each in segments of 2^-7."""
SIN2PI_TABLE = _table(_sin2pi_value, 128)
"""sin(2 pi x) / x, 0 <= x < 1/4, in segments of 2^-9."""

# --- Shared steps ----------------------------------------------------------------------------


def _unpack(pattern: I64) -> tuple[I64, I64, I64]:
    """(sign, M, e) of finite patterns, not normalised: M < 2^24 and e >= -149."""
    field = (pattern >> 23) & 0xFF
    significand = (pattern & 0x7FFFFF) | np.where(field != 0, 1 << 23, 0)
    return pattern >> 31, significand, np.maximum(field, 1) - 150


def _unpack_normalised(pattern: I64) -> tuple[I64, I64, I64]:
    """(sign, M, e) of finite nonzero patterns with 2^23 <= M < 2^24; zero gives M = 0."""
    sign, significand, exponent = _unpack(pattern)
    shift = 24 - _bit_length(significand)
    return sign, significand << shift, exponent - shift


def _bit_length(value: I64) -> I64:
    """Bits of each 0 <= value < 2^63; 0 for 0."""
    length = np.zeros_like(value)
    for step in (32, 16, 8, 4, 2, 1):
        big = value >= np.int64(1) << step
        length += np.where(big, step, 0)
        value = np.where(big, value >> step, value)
    return length + (value > 0)


def _quadratic(table: I64, row: I64, d: I64, width: int) -> I64:
    c0, c1, c2 = table[row, 0], table[row, 1], table[row, 2]
    return c0 + (((c1 + ((c2 * d) >> width)) * d) >> width)


def pack(sign: I64, magnitude: I64, exponent: I64 | int) -> I64:
    """The binary32 pattern of (-1)^sign * magnitude * 2^exponent, rounded to nearest even."""
    last = np.maximum(_bit_length(magnitude) + exponent - 24, -149)
    shift = last - exponent
    left, right = np.clip(-shift, 0, 62), np.clip(shift, 0, 63)
    kept = (magnitude << left) >> right
    rest = magnitude - (kept << np.minimum(right, 62))  # kept is 0 where right is 63
    half = np.where(right > 0, np.int64(1) << np.clip(right - 1, 0, 62), 0)
    up = (right > 0) & ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    pattern = np.minimum(((last + 149) << 23) + kept + up, _INF)
    return np.where(magnitude == 0, 0, pattern) | (sign << 31)


def _patterns(x: ArrayLike) -> I64:
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)


def _choose(result: I64, *cases: tuple[NDArray[np.bool_], int | I64]) -> F32:
    """Patterns to binary32, after overriding `result` where a case's mask holds (first wins)."""
    pattern = np.select([mask for mask, _ in cases], [value for _, value in cases], result)
    return pattern.astype(np.uint32).view(np.float32)


# --- The functions ---------------------------------------------------------------------------


def exp2(x: ArrayLike) -> F32:
    """2^x.

    Special: NaN -> NaN; x >= 128 (and +inf) -> +inf; x <= -150 (and -inf) -> +0.
    Otherwise, with x = (-1)^sign * M * 2^e:

    1. v = floor(x * 2^30): (-1)^sign * M shifted left by e + 30, or right (floor) by -(e + 30),
       39 bits signed.
    2. n = v >> 30; row = bits 29..23 of v; d = bits 22..0 of v.
    3. y = quadratic(EXP2_TABLE, row, d, w=23); products below 2^48.
    4. pack(0, y, n - 30).

    Integers give exact powers of two, subnormal ones included.
    """
    pattern = _patterns(x)
    magnitude = pattern & 0x7FFFFFFF
    negative = pattern >= _SIGN
    nan = magnitude > _INF
    over = ~negative & (magnitude >= 0x43000000)  # 128.0
    under = negative & (magnitude >= 0x43160000)  # 150.0
    sign, m, e = _unpack(np.where(nan | over | under, 0, pattern))
    signed = np.where(sign == 1, -m, m)
    v = (signed << np.clip(e + FRACTION, 0, 62)) >> np.clip(-(e + FRACTION), 0, 63)
    y = _quadratic(EXP2_TABLE, (v >> 23) & 127, v & 0x7FFFFF, 23)
    result = pack(np.zeros_like(y), y, (v >> FRACTION) - FRACTION)
    return _choose(result, (nan, CANONICAL_NAN), (over, _INF), (under, 0))


def log2(x: ArrayLike) -> F32:
    """The binary logarithm of x.

    Special: NaN and x < 0 -> NaN; +-0 -> -inf; +inf -> +inf.
    Otherwise, with x = M * 2^e normalised and E = e + 23:

    1. If M >= 3 * 2^22: T = M - 2^24 and E = E + 1; else T = 2 * (M - 2^23). Now
       x = 2^E * (1 + t) with t = T / 2^24 and -1/4 <= t < 1/2: x near 1 has E = 0 on both sides,
       so nothing cancels.
    2. z = T + 2^22; row = z >> 16 (0..191); d = z & 0xFFFF.
    3. y = quadratic(LOG2_TABLE, row, d, w=16), that is log2(1 + t) / t; products below 2^40.
    4. S = E * 2^54 + T * y; |S| < 2^62.
    5. pack(S < 0, |S|, -54).

    Powers of two give exact integers; log2(1) is +0.
    """
    pattern = _patterns(x)
    nan = ((pattern & 0x7FFFFFFF) > _INF) | (pattern > _SIGN)
    zero = (pattern & 0x7FFFFFFF) == 0
    infinite = pattern == _INF
    one = 0x3F800000
    _, m, e = _unpack_normalised(np.where(nan | zero | infinite, one, pattern))
    upper = m >= 3 << 22
    t = np.where(upper, m - (1 << 24), 2 * (m - (1 << 23)))
    z = t + (1 << 22)
    y = _quadratic(LOG2_TABLE, z >> 16, z & 0xFFFF, 16)
    total = ((e + 23 + upper) << 54) + t * y
    result = pack((total < 0).astype(np.int64), np.abs(total), -54)
    return _choose(result, (nan, CANONICAL_NAN), (zero, _INF | _SIGN), (infinite, _INF))


def reciprocal(x: ArrayLike) -> F32:
    """1 / x (`fdiv` is the correctly rounded one).

    Special: NaN -> NaN; +-0 -> +-inf; +-inf -> +-0.
    Otherwise, with |x| = M * 2^e normalised:

    1. u = M - 2^23; row = u >> 15 (0..255); d = u & 0x7FFF.
    2. y = quadratic(RECIPROCAL_TABLE, row, d, w=15); products below 2^38.
    3. pack(sign, y, -53 - e): overflow gives an infinity, |x| > 2^126 a subnormal.

    Powers of two give exact results.
    """
    pattern = _patterns(x)
    magnitude = pattern & 0x7FFFFFFF
    nan, zero, infinite = magnitude > _INF, magnitude == 0, magnitude == _INF
    one = 0x3F800000
    _, m, e = _unpack_normalised(np.where(nan | zero | infinite, one, magnitude))
    u = m - (1 << 23)
    y = _quadratic(RECIPROCAL_TABLE, u >> 15, u & 0x7FFF, 15)
    sign = pattern >> 31
    result = pack(sign, y, -53 - e)
    signed_infinity = _INF | (sign << 31)
    return _choose(result, (nan, CANONICAL_NAN), (zero, signed_infinity), (infinite, sign << 31))


def rsqrt(x: ArrayLike) -> F32:
    """1 / sqrt(x).

    Special: NaN and x < 0 -> NaN; +-0 -> +-inf (IEEE 754 rSqrt); +inf -> +0.
    Otherwise, with x = M * 2^e normalised and E = e + 23:

    1. odd = E & 1; k = E >> 1; x = 4^k * (1 + odd) * (M / 2^23).
    2. u = M - 2^23; row = 128 * odd + (u >> 16) (0..255); d = u & 0xFFFF.
    3. y = quadratic(RSQRT_TABLE, row, d, w=16); products below 2^39.
    4. pack(0, y, -30 - k). Results are never subnormal.

    Powers of four give exact results.
    """
    pattern = _patterns(x)
    zero = (pattern & 0x7FFFFFFF) == 0
    nan = ((pattern & 0x7FFFFFFF) > _INF) | (pattern > _SIGN)
    infinite = pattern == _INF
    one = 0x3F800000
    _, m, e = _unpack_normalised(np.where(nan | zero | infinite, one, pattern))
    odd, k = (e + 23) & 1, (e + 23) >> 1
    u = m - (1 << 23)
    y = _quadratic(RSQRT_TABLE, 128 * odd + (u >> 16), u & 0xFFFF, 16)
    result = pack(np.zeros_like(y), y, -FRACTION - k)
    return _choose(result, (nan, CANONICAL_NAN), (zero, pattern | _INF), (infinite, 0))


def sin2pi(x: ArrayLike) -> F32:
    """sin(2 pi x), x in turns; cosine is sin2pi(x + 1/4).

    Special: NaN and +-inf -> NaN. |x| >= 2^23 is an integer: a zero.
    Otherwise, with |x| = M * 2^e (not normalised; e < 0) and the result's sign that of x:

    1. F = M mod 2^-e: the fraction, F * 2^e < 1, exactly (F = M when e <= -24).
    2. If F * 2^e > 1/2: F = 2^-e - F and the sign flips. If F * 2^e > 1/4 now: F = 2^(-e-1) - F.
       Both are exact; F * 2^e <= 1/4.
    3. z = min(floor(F * 2^(e + 30)), 2^28 - 1); row = z >> 21 (0..127); d = z & 0x1FFFFF.
    4. y = quadratic(SIN2PI_TABLE, row, d, w=21), that is sin(2 pi f) / f; products below 2^48.
    5. pack(sign, F * y, e - 30); F * y < 2^57.

    Multiples of 1/4 give exactly 0, 1 or -1; every zero has the sign of x.
    """
    pattern = _patterns(x)
    magnitude = pattern & 0x7FFFFFFF
    nan = magnitude >= _INF
    whole = magnitude >= 0x4B000000  # 2^23
    _, m, e = _unpack(np.where(whole, 0, magnitude))
    # An exponent of -26 or less means |x| < 1/4: no step of the folding applies.
    turn = np.int64(1) << np.clip(-e, 0, 26)
    small = e < -25
    f = np.where(small, m, m & (turn - 1))
    flip = ~small & (2 * f > turn)
    f = np.where(flip, turn - f, f)
    f = np.where(~small & (4 * f > turn), (turn >> 1) - f, f)
    z = (f << np.clip(e + FRACTION, 0, 62)) >> np.clip(-(e + FRACTION), 0, 63)
    z = np.minimum(z, (1 << 28) - 1)
    y = _quadratic(SIN2PI_TABLE, z >> 21, z & 0x1FFFFF, 21)
    sign = pattern >> 31
    result = pack(sign ^ flip, f * y, e - FRACTION)
    return _choose(result, (nan, CANONICAL_NAN), (whole, sign << 31))
