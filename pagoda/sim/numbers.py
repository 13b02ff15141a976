"""Arithmetic of one lane: the rules of the contract's numbers, written for the compiler.

A lane is a 32-bit pattern. Functions on binary32 take and return float32, functions on integers
int32, table functions patterns as int64. The loops that call them are written so that LLVM can
vectorise them: no branches that a select cannot replace.
"""

from __future__ import annotations

import numpy as np

from pagoda.sim.jit import (
    float_bits,
    jit,
    leading_zeros,
    load_i64,
    round_even_f32,
    store_i64,
)

INFINITY = 0x7F800000
NAN = 0x7FC00000
SIGN = 0x80000000
ONE = 0x3F800000
_CANONICAL = np.float32(np.uint32(NAN).view(np.float32))


@jit
def canonical(value):
    """A result of arithmetic: every NaN is the one canonical NaN."""
    return _CANONICAL if np.isnan(value) else value


@jit
def ordered(value):
    """An int32 that orders binary32 numerically, -0 below +0; NaN lie outside the infinities."""
    bits = float_bits(value)
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit
def float_max(a, b):
    greater = a if ordered(a) >= ordered(b) else b
    return _CANONICAL if np.isnan(a) | np.isnan(b) else greater


@jit
def float_min(a, b):
    smaller = a if ordered(a) <= ordered(b) else b
    return _CANONICAL if np.isnan(a) | np.isnan(b) else smaller


@jit
def float_to_int(value):
    """Toward zero, saturating; NaN is 0."""
    if np.isnan(value):
        return np.int32(0)
    bounded = min(max(np.float64(value), -2147483648.0), 2147483647.0)
    return np.int32(bounded)


@jit
def float_to_int8(value):
    """To nearest, ties to even, saturating; NaN is 0."""
    bounded = max(np.float32(-128.0), value)  # in this order: of NaN the first
    bounded = min(np.float32(127.0), bounded)
    return np.int32(0) if np.isnan(value) else np.int32(round_even_f32(bounded))


@jit
def floor_quotient(a, b):
    """floor(a / b) in 64 bits; by 0 it is -1."""
    if b == 0:
        return np.int64(-1)
    a = np.int64(a)
    b = np.int64(b)
    quotient = np.int64(abs(a) // abs(b))
    if (a < 0) == (b < 0):
        return quotient
    return -quotient - np.int64(quotient * abs(b) != abs(a))


@jit
def floor_remainder(a, b):
    """a - b * floor(a / b); by 0 it is a."""
    return np.int64(a) if b == 0 else np.int64(a) - np.int64(b) * floor_quotient(a, b)


# Storage formats ---------------------------------------------------------------------------------


@jit
def bf16_code(bits):
    """A lane (int32) rounded to nearest even into 16 bits; a NaN is 0x7FC0."""
    word = np.uint32(bits)
    rounded = (np.int64(word) + 0x7FFF + ((np.int64(word) >> 16) & 1)) >> 16
    return np.int32(0x7FC0 if (np.int64(word) & 0x7FFFFFFF) > INFINITY else rounded)


@jit
def f8_code(bits):
    """A lane (int32) rounded into F8E4M3, saturated at 448; NaN keeps its sign."""
    word = np.int64(np.uint32(bits))
    magnitude = word & 0x7FFFFFFF
    field = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | (np.int64(field != 0) << 23)
    exponent = max(field, 1) - 120
    unit = max(exponent, 1)
    drop = min(20 + unit - exponent, 62)
    kept = significand >> drop
    rest = significand - (kept << drop)
    half = np.int64(1) << (drop - 1)
    kept += np.int64((rest > half) | ((rest == half) & ((kept & 1) == 1)))
    code = 0x7F if magnitude > INFINITY else min(((unit - 1) << 3) + kept, 0x7E)
    return np.int32(code | ((word >> 24) & 0x80))


def _f8_lane(code: int) -> int:
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return NAN
    value = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    pattern = int(np.float32(value).view(np.uint32))
    return pattern | (code & 0x80) << 24


F8_LANES = np.array([_f8_lane(code) for code in range(256)], np.uint32).view(np.int32)


# Table functions ---------------------------------------------------------------------------------


# Each function is two: which row of its table and where in the segment (`..._index`, row * 2^32 +
# position), and the result from the quadratic's value y. Between them comes a look-up that no host
# does fast for many lanes at once, so it is a loop of its own (`evaluate`).


@jit
def evaluate(table, work, count, width):
    """Replace the `count` int64 at `work`, which index functions made, by the quadratic's y."""
    for i in range(count):
        where = load_i64(work, i)
        row, position = where >> 32, where & 0xFFFFFFFF
        inner = table[row, 1] + ((table[row, 2] * position) >> width)
        store_i64(work, i, table[row, 0] + ((inner * position) >> width))


@jit
def _pack(sign, magnitude, exponent):
    """(-1)^sign * magnitude * 2^exponent, rounded to nearest even, as a pattern."""
    length = 64 - leading_zeros(magnitude)
    last = max(length + exponent - 24, -149)
    drop = last - exponent
    left = min(max(-drop, 0), 63)
    right = min(max(drop, 0), 63)
    kept = (magnitude << left) >> right
    rest = magnitude - (kept << min(right, 62))
    half = np.int64(1) << max(min(right, 63) - 1, 0)
    up = (right > 0) & ((rest > half) | ((rest == half) & ((kept & 1) == 1)))
    pattern = min(((last + 149) << 23) + kept + np.int64(up), INFINITY)
    return (pattern if magnitude != 0 else 0) | (sign << 31)


@jit
def _significand(pattern):
    return (pattern & 0x7FFFFF) | (np.int64((pattern >> 23) & 0xFF != 0) << 23)


@jit
def _exponent(pattern):
    return max((pattern >> 23) & 0xFF, 1) - 150


@jit
def _normal_shift(significand):
    return leading_zeros(significand) - 40


@jit
def _exp2_fixed(pattern):
    """floor(x * 2^30), and 0 for what does not get that far."""
    magnitude = pattern & 0x7FFFFFFF
    usable = 0 if magnitude >= 0x43160000 else pattern  # beyond 150 nothing is computed
    significand = _significand(usable)
    shift = _exponent(usable) + 30
    signed = -significand if usable >= SIGN else significand
    return (signed << min(max(shift, 0), 62)) >> min(max(-shift, 0), 63)


@jit
def exp2_index(pattern):
    fixed = _exp2_fixed(pattern)
    return (((fixed >> 23) & 127) << 32) | (fixed & 0x7FFFFF)


@jit
def exp2_result(pattern, y):
    magnitude = pattern & 0x7FFFFFFF
    negative = pattern >= SIGN
    result = _pack(0, y, (_exp2_fixed(pattern) >> 30) - 30)
    result = 0 if negative & (magnitude >= 0x43160000) else result
    result = INFINITY if (not negative) & (magnitude >= 0x43000000) else result
    return NAN if magnitude > INFINITY else result


@jit
def _positive(pattern):
    """The pattern where it is a positive number, else that of 1."""
    return pattern if (pattern > 0) & (pattern < INFINITY) else ONE


@jit
def _log2_offset(m):
    """T: the distance of the significand from 1 or 2, scaled by 2^24."""
    return m - (1 << 24) if m >= 3 << 22 else 2 * (m - (1 << 23))


@jit
def log2_index(pattern):
    significand = _significand(_positive(pattern))
    z = _log2_offset(significand << _normal_shift(significand)) + (1 << 22)
    return ((z >> 16) << 32) | (z & 0xFFFF)


@jit
def log2_result(pattern, y):
    usable = _positive(pattern)
    significand = _significand(usable)
    shift = _normal_shift(significand)
    m = significand << shift
    exponent = _exponent(usable) - shift + 23 + np.int64(m >= 3 << 22)
    total = (exponent << 54) + _log2_offset(m) * y
    result = _pack(np.int64(total < 0), abs(total), -54)
    result = INFINITY if pattern == INFINITY else result
    result = (INFINITY | SIGN) if pattern & 0x7FFFFFFF == 0 else result
    return NAN if ((pattern & 0x7FFFFFFF) > INFINITY) | (pattern > SIGN) else result


@jit
def reciprocal_index(pattern):
    significand = _significand(_positive(pattern & 0x7FFFFFFF))
    u = (significand << _normal_shift(significand)) - (1 << 23)
    return ((u >> 15) << 32) | (u & 0x7FFF)


@jit
def reciprocal_result(pattern, y):
    magnitude = pattern & 0x7FFFFFFF
    usable = _positive(magnitude)
    exponent = _exponent(usable) - _normal_shift(_significand(usable))
    sign = pattern >> 31
    result = _pack(sign, y, -53 - exponent)
    result = sign << 31 if magnitude == INFINITY else result
    result = (INFINITY | (sign << 31)) if magnitude == 0 else result
    return NAN if magnitude > INFINITY else result


@jit
def _rsqrt_power(usable):
    return _exponent(usable) - _normal_shift(_significand(usable)) + 23


@jit
def rsqrt_index(pattern):
    usable = _positive(pattern)
    significand = _significand(usable)
    u = (significand << _normal_shift(significand)) - (1 << 23)
    return ((128 * (_rsqrt_power(usable) & 1) + (u >> 16)) << 32) | (u & 0xFFFF)


@jit
def rsqrt_result(pattern, y):
    result = _pack(0, y, -30 - (_rsqrt_power(_positive(pattern)) >> 1))
    result = 0 if pattern == INFINITY else result
    result = (pattern | INFINITY) if pattern & 0x7FFFFFFF == 0 else result
    return NAN if ((pattern & 0x7FFFFFFF) > INFINITY) | (pattern > SIGN) else result


@jit
def _below_whole(pattern):
    """|x| where it has a fraction, else 0."""
    magnitude = pattern & 0x7FFFFFFF
    return 0 if magnitude >= 0x4B000000 else magnitude


@jit
def _sin2pi_flips(m, e):
    """Whether the fraction of a turn, m * 2^e modulo 1, is above one half."""
    turn = np.int64(1) << min(max(-e, 0), 26)
    return (e >= -25) & (2 * (m & (turn - 1)) > turn)


@jit
def _sin2pi_folded(m, e):
    """F: the fraction folded into the first quarter of the turn, scaled by 2^-e."""
    turn = np.int64(1) << min(max(-e, 0), 26)
    f = m & (turn - 1)
    f = turn - f if 2 * f > turn else f
    f = (turn >> 1) - f if 4 * f > turn else f
    return m if e < -25 else f  # |x| < 1/4: nothing to fold


@jit
def _sin2pi_fixed(pattern):
    usable = _below_whole(pattern)
    e = _exponent(usable)
    f = _sin2pi_folded(_significand(usable), e)
    z = (f << min(max(e + 30, 0), 62)) >> min(max(-(e + 30), 0), 63)
    return min(z, (1 << 28) - 1)


@jit
def sin2pi_index(pattern):
    z = _sin2pi_fixed(pattern)
    return ((z >> 21) << 32) | (z & 0x1FFFFF)


@jit
def sin2pi_result(pattern, y):
    magnitude = pattern & 0x7FFFFFFF
    usable = _below_whole(pattern)
    m = _significand(usable)
    e = _exponent(usable)
    sign = pattern >> 31
    result = _pack(sign ^ np.int64(_sin2pi_flips(m, e)), _sin2pi_folded(m, e) * y, e - 30)
    result = sign << 31 if magnitude >= 0x4B000000 else result
    return NAN if magnitude >= INFINITY else result


@jit
def argmax_prefers(value, index, other, other_index):
    """Whether (other, other_index) beats (value, index): NaN first, then size, then index."""
    nan = np.isnan(value)
    other_nan = np.isnan(other)
    better = (other_nan & (not nan)) if nan | other_nan else other > value
    tie = (nan & other_nan) | (value == other)
    return better | (tie & (other_index < index))
