"""Arithmetic of one lane: the rules of the contract's numbers, written for the compiler.

A lane is a 32-bit pattern. Functions on binary32 take and return float32, functions on integers
int32, table functions patterns as int64. The loops that call them are written so that LLVM can
vectorise them: no branches that a select cannot replace.
"""

from __future__ import annotations

import numpy as np

from pagoda.isa.tables import (
    EXP2_TABLE,
    LOG2_TABLE,
    RECIPROCAL_TABLE,
    RSQRT_TABLE,
    SIN2PI_TABLE,
)
from pagoda.sim.jit import bits_float, float_bits, jit, leading_zeros

INFINITY = 0x7F800000
NAN = 0x7FC00000
SIGN = 0x80000000
ONE = 0x3F800000
_CANONICAL = np.float32(np.uint32(NAN).view(np.float32))


@jit
def canonical(value):
    """A result of arithmetic: every NaN is the one canonical NaN."""
    return _CANONICAL if value != value else value


@jit
def ordered(value):
    """An int32 that orders binary32 numerically, -0 below +0; NaN lie outside the infinities."""
    bits = float_bits(value)
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit
def float_max(a, b):
    greater = a if ordered(a) >= ordered(b) else b
    return _CANONICAL if (a != a) | (b != b) else greater


@jit
def float_min(a, b):
    smaller = a if ordered(a) <= ordered(b) else b
    return _CANONICAL if (a != a) | (b != b) else smaller


@jit
def float_to_int(value):
    """Toward zero, saturating; NaN is 0."""
    if value != value:
        return np.int32(0)
    bounded = min(max(np.float64(value), -2147483648.0), 2147483647.0)
    return np.int32(bounded)


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
    """A lane (int32) rounded into F8E4M3; what is too large or no number is the NaN code."""
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
    return np.int32(min(((unit - 1) << 3) + kept, 0x7F) | ((word >> 24) & 0x80))


def _f8_lane(code: int) -> int:
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return NAN
    value = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    pattern = int(np.float32(value).view(np.uint32))
    return pattern | (code & 0x80) << 24


F8_LANES = np.array([_f8_lane(code) for code in range(256)], np.uint32).view(np.int32)


# Table functions ---------------------------------------------------------------------------------


@jit
def _quadratic(table, row, position, width):
    inner = table[row, 1] + ((table[row, 2] * position) >> width)
    return table[row, 0] + ((inner * position) >> width)


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
def exp2(pattern):
    magnitude = pattern & 0x7FFFFFFF
    negative = pattern >= SIGN
    nan = magnitude > INFINITY
    over = (not negative) & (magnitude >= 0x43000000)
    under = negative & (magnitude >= 0x43160000)
    usable = 0 if nan | over | under else pattern
    significand = _significand(usable)
    shift = _exponent(usable) + 30
    signed = -significand if usable >= SIGN else significand
    fixed = (signed << min(max(shift, 0), 62)) >> min(max(-shift, 0), 63)
    y = _quadratic(EXP2_TABLE, (fixed >> 23) & 127, fixed & 0x7FFFFF, 23)
    result = _pack(0, y, (fixed >> 30) - 30)
    result = 0 if under else result
    result = INFINITY if over else result
    return NAN if nan else result


@jit
def log2(pattern):
    magnitude = pattern & 0x7FFFFFFF
    nan = (magnitude > INFINITY) | (pattern > SIGN)
    zero = magnitude == 0
    infinite = pattern == INFINITY
    usable = ONE if nan | zero | infinite else pattern
    significand = _significand(usable)
    shift = _normal_shift(significand)
    m = significand << shift
    e = _exponent(usable) - shift
    upper = m >= 3 << 22
    t = m - (1 << 24) if upper else 2 * (m - (1 << 23))
    z = t + (1 << 22)
    y = _quadratic(LOG2_TABLE, z >> 16, z & 0xFFFF, 16)
    total = ((e + 23 + np.int64(upper)) << 54) + t * y
    result = _pack(np.int64(total < 0), abs(total), -54)
    result = INFINITY if infinite else result
    result = (INFINITY | SIGN) if zero else result
    return NAN if nan else result


@jit
def reciprocal(pattern):
    magnitude = pattern & 0x7FFFFFFF
    nan = magnitude > INFINITY
    zero = magnitude == 0
    infinite = magnitude == INFINITY
    usable = ONE if nan | zero | infinite else magnitude
    significand = _significand(usable)
    shift = _normal_shift(significand)
    u = (significand << shift) - (1 << 23)
    y = _quadratic(RECIPROCAL_TABLE, u >> 15, u & 0x7FFF, 15)
    sign = pattern >> 31
    result = _pack(sign, y, -53 - (_exponent(usable) - shift))
    result = sign << 31 if infinite else result
    result = (INFINITY | (sign << 31)) if zero else result
    return NAN if nan else result


@jit
def rsqrt(pattern):
    zero = (pattern & 0x7FFFFFFF) == 0
    nan = ((pattern & 0x7FFFFFFF) > INFINITY) | (pattern > SIGN)
    infinite = pattern == INFINITY
    usable = ONE if nan | zero | infinite else pattern
    significand = _significand(usable)
    shift = _normal_shift(significand)
    power = _exponent(usable) - shift + 23
    u = (significand << shift) - (1 << 23)
    y = _quadratic(RSQRT_TABLE, 128 * (power & 1) + (u >> 16), u & 0xFFFF, 16)
    result = _pack(0, y, -30 - (power >> 1))
    result = 0 if infinite else result
    result = (pattern | INFINITY) if zero else result
    return NAN if nan else result


@jit
def sin2pi(pattern):
    magnitude = pattern & 0x7FFFFFFF
    nan = magnitude >= INFINITY
    whole = magnitude >= 0x4B000000
    usable = 0 if whole else magnitude
    m = _significand(usable)
    e = _exponent(usable)
    small = e < -25
    turn = np.int64(1) << min(max(-e, 0), 26)
    f = m if small else m & (turn - 1)
    flip = (not small) & (2 * f > turn)
    f = turn - f if flip else f
    f = (turn >> 1) - f if (not small) & (4 * f > turn) else f
    z = (f << min(max(e + 30, 0), 62)) >> min(max(-(e + 30), 0), 63)
    z = min(z, (1 << 28) - 1)
    y = _quadratic(SIN2PI_TABLE, z >> 21, z & 0x1FFFFF, 21)
    sign = pattern >> 31
    result = _pack(sign ^ np.int64(flip), f * y, e - 30)
    result = sign << 31 if whole else result
    return NAN if nan else result


@jit
def argmax_prefers(value, index, other, other_index):
    """Whether (other, other_index) beats (value, index): NaN first, then size, then index."""
    nan = value != value
    other_nan = other != other
    better = (other_nan & (not nan)) if nan | other_nan else other > value
    tie = (nan & other_nan) | (value == other)
    return better | (tie & (other_index < index))


@jit
def float_of(pattern):
    """The binary32 of a pattern given as int64."""
    return bits_float(np.int32(pattern))
