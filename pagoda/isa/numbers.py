"""The arithmetic of the chip, as its living definition.

Every value on the vector engine is a 32-bit pattern, read as binary32 or as two's complement
int32. The functions here take and return `np.float32` or `np.int32` arrays (any shape; operands
broadcast) and say exactly which 32 bits come out. Rules that hold everywhere:

- binary32 is IEEE 754, round to nearest even, gradual underflow (nothing is flushed);
- arithmetic that yields a NaN yields `CANONICAL_NAN`; copies (`select`, `fabs`, `fneg`) keep bits;
- int32 wraps.

The table functions (exp2, log2, reciprocal, rsqrt, sin2pi) are in `pagoda.isa.tables`, reductions
and matrix products in `pagoda.isa.accumulation`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]

CANONICAL_NAN = 0x7FC00000
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
LANES = 64
"""Lanes of a row reduction's state, on every chip whatever its vector width."""

_NAN = np.uint32(CANONICAL_NAN).view(np.float32)
_SIGN = np.uint32(0x80000000)
_QUIET = {"all": "ignore"}  # IEEE flags are not part of the contract


def _f32(x: ArrayLike) -> F32:
    return np.asarray(x, np.float32)


def _i32(x: ArrayLike) -> I32:
    return np.asarray(x, np.int32)


def lane_bits(x: ArrayLike) -> U32:
    """The 32-bit patterns of an array whose dtype is float32, int32 or uint32, as a view.

    Raises TypeError for elements of another size.
    """
    x = np.asarray(x)
    if x.dtype.itemsize != 4:
        raise TypeError(
            f"lanes: a lane is a 32-bit pattern, but the array has dtype {x.dtype}; "
            "convert it to float32, int32 or uint32 first"
        )
    return x.view(np.uint32)


def canonical(x: ArrayLike) -> F32:
    """`x` with every NaN replaced by `CANONICAL_NAN`."""
    x = _f32(x)
    return np.where(np.isnan(x), _NAN, x)


# --- Storage formats: memory bytes <-> 32-bit lanes ------------------------------------------


class DType(IntEnum):
    """Element format of a tensor in memory; the value is the code in a command's dtype field.

    Float formats become binary32 lanes, the others int32 lanes.
    """

    F32 = 0
    BF16 = 1
    I32 = 2
    I8 = 3
    F8E4M3 = 4
    I4 = 5
    I64 = 6
    BOOL = 7
    U8 = 8

    @property
    def bits(self) -> int:
        """Bits of one element in memory."""
        return (32, 16, 32, 8, 8, 4, 64, 8, 8)[self]

    @property
    def is_float(self) -> bool:
        """True when the lane holds a binary32, False when it holds an int32."""
        return self in (DType.F32, DType.BF16, DType.F8E4M3)


def decode(raw: U8, dtype: DType) -> tuple[U32, bool]:
    """Memory to lanes: bytes (..., nbytes), little-endian, to patterns (..., elements).

    - F32, I32: the bits. BF16: the bits in the upper half of the lane.
    - F8E4M3: exact; both NaN codes (0x7F, 0xFF) become `CANONICAL_NAN`.
    - I8, I4: sign-extended; I4 holds two elements a byte, the low nibble first. U8: zero-extended.
    - BOOL: 0 stays 0, any other byte is 1.
    - I64: saturated to int32; the second result says that some value did not fit. It is False for
      every other dtype.

    Raises ValueError when the bytes do not hold a whole number of elements.
    """
    dtype = DType(dtype)
    raw = np.ascontiguousarray(raw, np.uint8)
    if raw.shape[-1] * 8 % dtype.bits:
        raise ValueError(
            f"decode: {dtype.name} elements take {dtype.bits // 8} bytes each, but a row has "
            f"{raw.shape[-1]} bytes; pass whole elements"
        )
    match dtype:
        case DType.F32 | DType.I32:
            return raw.view("<u4").astype(np.uint32), False
        case DType.BF16:
            return raw.view("<u2").astype(np.uint32) << np.uint32(16), False
        case DType.F8E4M3:
            return _F8_LANES[raw], False
        case DType.I8:
            return lane_bits(raw.view(np.int8).astype(np.int32)), False
        case DType.U8:
            return raw.astype(np.uint32), False
        case DType.BOOL:
            return (raw != 0).astype(np.uint32), False
        case DType.I4:
            nibbles = np.stack([raw & 15, raw >> 4], axis=-1).astype(np.int32)
            nibbles = nibbles.reshape(*raw.shape[:-1], 2 * raw.shape[-1])
            return lane_bits((nibbles ^ 8) - 8), False
        case DType.I64:
            wide = raw.view("<i8")
            lanes = np.clip(wide, INT32_MIN, INT32_MAX)
            return lane_bits(lanes.astype(np.int32)), bool(np.any(lanes != wide))


def encode(lanes: ArrayLike, dtype: DType) -> U8:
    """Lanes to memory: 32-bit patterns (..., elements) to little-endian bytes (..., nbytes).

    - F32, I32: the bits.
    - BF16: round to nearest even; a NaN becomes 0x7FC0.
    - F8E4M3: round to nearest even with gradual underflow; as torch.float8_e4m3fn does since
      torch 2.13, what would round beyond 448 and infinities saturate to 448 (0x7E, 0xFE); a NaN
      becomes the NaN code with the lane's sign (0x7F, 0xFF).
    - I8, I4, U8: saturated to -128..127, -8..7, 0..255. An odd I4 row ends with a zero nibble.
    - I64: sign-extended. BOOL: 0 stays 0, any other pattern is 1.
    """
    dtype = DType(dtype)
    word = np.ascontiguousarray(lane_bits(lanes))
    signed = word.view(np.int32)
    match dtype:
        case DType.F32 | DType.I32:
            return word.astype("<u4").view(np.uint8)
        case DType.BF16:
            return _to_bf16(word).astype("<u2").view(np.uint8)
        case DType.F8E4M3:
            return _to_f8(word)
        case DType.I8:
            return np.clip(signed, -128, 127).astype(np.int8).view(np.uint8)
        case DType.U8:
            return np.clip(signed, 0, 255).astype(np.uint8)
        case DType.BOOL:
            return (word != 0).astype(np.uint8)
        case DType.I4:
            nibbles = (np.clip(signed, -8, 7) & 15).astype(np.uint8)
            if nibbles.shape[-1] % 2:
                nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
            return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        case DType.I64:
            return signed.astype("<i8").view(np.uint8)


def _to_bf16(word: U32) -> NDArray[np.uint16]:
    """Add just under half of the dropped part, one more when the kept part is odd; drop it."""
    rounded = (word + (np.uint32(0x7FFF) + ((word >> 16) & 1))) >> 16
    return np.where((word & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).astype(np.uint16)


def _to_f8(word: U32) -> U8:
    """1 sign, 4 exponent (bias 7), 3 fraction bits; no infinity, magnitude code 0x7F is NaN."""
    magnitude = (word & 0x7FFFFFFF).astype(np.int64)
    exponent = np.maximum(magnitude >> 23, 1)  # biased by 127
    significand = (magnitude & 0x7FFFFF) | ((magnitude >> 23 != 0).astype(np.int64) << 23)
    # The last kept bit weighs 2^-9 in the subnormal range and 3 bits below the leading one above.
    unit = np.maximum(exponent - 120, 1)
    drop = np.minimum(20 + (unit - (exponent - 120)), 62)
    kept = significand >> drop
    rest = significand & ((np.int64(1) << drop) - 1)
    half = np.int64(1) << (drop - 1)
    kept += (rest > half) | ((rest == half) & (kept & 1 == 1))
    code = np.where(magnitude > 0x7F800000, 0x7F, np.minimum(((unit - 1) << 3) + kept, 0x7E))
    return (code | ((word >> 24) & 0x80)).astype(np.uint8)


def _f8_lanes() -> U32:
    """The lane of each of the 256 F8E4M3 codes."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    significand = np.where(exponent == 0, fraction, fraction + 8).astype(np.float32)
    value = np.ldexp(significand, np.maximum(exponent, 1) - 10)
    lanes = lane_bits(np.where(code & 0x80, -value, value).astype(np.float32)).copy()
    lanes[(code & 0x7F) == 0x7F] = CANONICAL_NAN
    return lanes


_F8_LANES = _f8_lanes()


# --- binary32 --------------------------------------------------------------------------------


def fadd(a: ArrayLike, b: ArrayLike) -> F32:
    """a + b, correctly rounded."""
    with np.errstate(**_QUIET):
        return canonical(_f32(a) + _f32(b))


def fsub(a: ArrayLike, b: ArrayLike) -> F32:
    """a - b, correctly rounded."""
    with np.errstate(**_QUIET):
        return canonical(_f32(a) - _f32(b))


def fmul(a: ArrayLike, b: ArrayLike) -> F32:
    """a * b, correctly rounded."""
    with np.errstate(**_QUIET):
        return canonical(_f32(a) * _f32(b))


def fdiv(a: ArrayLike, b: ArrayLike) -> F32:
    """a / b, correctly rounded; x/0 is an infinity, 0/0 is NaN."""
    with np.errstate(**_QUIET):
        return canonical(_f32(a) / _f32(b))


def fsqrt(a: ArrayLike) -> F32:
    """Square root, correctly rounded; of -0 it is -0, of anything below it is NaN."""
    with np.errstate(**_QUIET):
        return canonical(np.sqrt(_f32(a)))


def ffma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> F32:
    """a * b + c with exactly one rounding.

    The product of two binary32 is exact in binary64. The sum is rounded to *odd* there, which
    makes the second rounding to 24 bits the only one that counts (Boldo and Melquiond, 2008).
    """
    with np.errstate(**_QUIET):
        product = _f32(a).astype(np.float64) * _f32(b)
        addend = _f32(c).astype(np.float64)
        total = np.asarray(product + addend)
        # Knuth's two-sum: `error` is exactly what the binary64 addition lost.
        virtual = total - product
        error = np.asarray((product - (total - virtual)) + (addend - virtual))
        pattern = total.view(np.int64)
        even = (pattern & 1) == 0
        inexact = np.isfinite(total) & (error != 0)
        step = np.where(np.signbit(error) == np.signbit(total), 1, -1)
        odd = np.asarray(pattern + np.where(inexact & even, step, 0)).view(np.float64)
        return canonical(odd.astype(np.float32))


def _order(x: F32) -> NDArray[np.int64]:
    """An integer that orders binary32 values numerically, with -0 below +0."""
    word = lane_bits(x).astype(np.int64)
    return np.where(word & 0x80000000, 0x7FFFFFFF - word, word)


def fmax(a: ArrayLike, b: ArrayLike) -> F32:
    """The greater; +0 is greater than -0; NaN if either is NaN."""
    a, b = _f32(a), _f32(b)
    greater = np.where(_order(a) >= _order(b), a, b)
    return np.where(np.isnan(a) | np.isnan(b), _NAN, greater)


def fmin(a: ArrayLike, b: ArrayLike) -> F32:
    """The smaller; -0 is smaller than +0; NaN if either is NaN."""
    a, b = _f32(a), _f32(b)
    smaller = np.where(_order(a) <= _order(b), a, b)
    return np.where(np.isnan(a) | np.isnan(b), _NAN, smaller)


def fabs(a: ArrayLike) -> F32:
    """The sign bit cleared; NaN payloads are kept."""
    return (lane_bits(_f32(a)) & ~_SIGN).view(np.float32)


def fneg(a: ArrayLike) -> F32:
    """The sign bit flipped; NaN payloads are kept."""
    return (lane_bits(_f32(a)) ^ _SIGN).view(np.float32)


def floor(a: ArrayLike) -> F32:
    """The greatest integral value not above a; a zero result has a's sign."""
    with np.errstate(**_QUIET):
        return canonical(np.floor(_f32(a)))


def ceil(a: ArrayLike) -> F32:
    """The smallest integral value not below a; a zero result has a's sign."""
    with np.errstate(**_QUIET):
        return canonical(np.ceil(_f32(a)))


def trunc(a: ArrayLike) -> F32:
    """a rounded toward zero to an integral value; a zero result has a's sign."""
    with np.errstate(**_QUIET):
        return canonical(np.trunc(_f32(a)))


def round_even(a: ArrayLike) -> F32:
    """a rounded to the nearest integral value, ties to even; a zero result has a's sign."""
    with np.errstate(**_QUIET):
        return canonical(np.rint(_f32(a)))


def f2i(a: ArrayLike) -> I32:
    """binary32 to int32: toward zero, saturating; NaN is 0."""
    with np.errstate(**_QUIET):
        wide = np.trunc(_f32(a).astype(np.float64))
        return np.where(np.isnan(wide), 0, np.clip(wide, INT32_MIN, INT32_MAX)).astype(np.int32)


def i2f(a: ArrayLike) -> F32:
    """int32 to binary32, round to nearest even."""
    return _i32(a).astype(np.float32)


def i2fmul(a: ArrayLike, b: ArrayLike) -> F32:
    """int32 a to binary32, times binary32 b: two roundings."""
    return fmul(i2f(a), b)


def faddq(a: ArrayLike, b: ArrayLike) -> I32:
    """a + b, correctly rounded, then to the nearest integral value, ties to even, saturated to
    -128..127; NaN is 0. The sum of a value and its int8 grid's offset, quantised."""
    return np.clip(f2i(round_even(fadd(a, b))), -128, 127)


# --- Comparisons and selection ---------------------------------------------------------------


def _compare(relation: np.ufunc, a: ArrayLike, b: ArrayLike) -> I32:
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.dtype not in (np.float32, np.int32):
        raise TypeError(
            f"{relation.__name__}: both operands must be float32 or both int32, "
            f"but they are {a.dtype} and {b.dtype}; convert one of them first"
        )
    with np.errstate(**_QUIET):
        return relation(a, b).astype(np.int32)


def lt(a: F32 | I32, b: F32 | I32) -> I32:
    """1 where a < b, else 0 (0 if either is NaN)."""
    return _compare(np.less, a, b)


def le(a: F32 | I32, b: F32 | I32) -> I32:
    """1 where a <= b, else 0 (0 if either is NaN)."""
    return _compare(np.less_equal, a, b)


def eq(a: F32 | I32, b: F32 | I32) -> I32:
    """1 where a == b, else 0 (0 if either is NaN; -0 equals +0)."""
    return _compare(np.equal, a, b)


def ne(a: F32 | I32, b: F32 | I32) -> I32:
    """1 where a != b, else 0 (1 if either is NaN)."""
    return _compare(np.not_equal, a, b)


def gt(a: F32 | I32, b: F32 | I32) -> I32:
    """1 where a > b, else 0 (0 if either is NaN)."""
    return _compare(np.greater, a, b)


def ge(a: F32 | I32, b: F32 | I32) -> I32:
    """1 where a >= b, else 0 (0 if either is NaN)."""
    return _compare(np.greater_equal, a, b)


def select(condition: ArrayLike, a: ArrayLike, b: ArrayLike) -> U32:
    """The patterns of a where condition is nonzero (as a pattern: -0.0 counts), else those of b.

    Returns uint32: the two may be of either kind, and no bit changes.
    """
    return np.where(lane_bits(condition) != 0, lane_bits(a), lane_bits(b))


# --- int32 -----------------------------------------------------------------------------------


def _wide(x: ArrayLike) -> NDArray[np.int64]:
    return _i32(x).astype(np.int64)


def iadd(a: ArrayLike, b: ArrayLike) -> I32:
    """a + b modulo 2^32."""
    return (_wide(a) + _wide(b)).astype(np.int32)


def isub(a: ArrayLike, b: ArrayLike) -> I32:
    """a - b modulo 2^32."""
    return (_wide(a) - _wide(b)).astype(np.int32)


def imul(a: ArrayLike, b: ArrayLike) -> I32:
    """The low 32 bits of a * b."""
    return (_wide(a) * _wide(b)).astype(np.int32)


def imax(a: ArrayLike, b: ArrayLike) -> I32:
    """The greater, signed."""
    return np.maximum(_i32(a), _i32(b))


def imin(a: ArrayLike, b: ArrayLike) -> I32:
    """The smaller, signed."""
    return np.minimum(_i32(a), _i32(b))


def iand(a: ArrayLike, b: ArrayLike) -> I32:
    """Bitwise and."""
    return _i32(a) & _i32(b)


def ior(a: ArrayLike, b: ArrayLike) -> I32:
    """Bitwise or."""
    return _i32(a) | _i32(b)


def ixor(a: ArrayLike, b: ArrayLike) -> I32:
    """Bitwise exclusive or."""
    return _i32(a) ^ _i32(b)


def inot(a: ArrayLike) -> I32:
    """Every bit flipped."""
    return ~_i32(a)


def shl(a: ArrayLike, b: ArrayLike) -> I32:
    """a shifted left by the low 5 bits of b."""
    return (_wide(a) << (_wide(b) & 31)).astype(np.int32)


def shr(a: ArrayLike, b: ArrayLike) -> I32:
    """a shifted right by the low 5 bits of b, zeros coming in."""
    return ((_wide(a) & 0xFFFFFFFF) >> (_wide(b) & 31)).astype(np.int32)


def sra(a: ArrayLike, b: ArrayLike) -> I32:
    """a shifted right by the low 5 bits of b, sign bits coming in."""
    return _i32(a) >> (_i32(b) & 31)


def idiv(a: ArrayLike, b: ArrayLike) -> I32:
    """floor(a / b); x / 0 is -1, and -2^31 / -1 wraps to -2^31."""
    a, b = _wide(a), _wide(b)
    return np.where(b == 0, -1, a // np.where(b == 0, 1, b)).astype(np.int32)


def imod(a: ArrayLike, b: ArrayLike) -> I32:
    """a - b * floor(a / b), so it has the sign of b; x mod 0 is x."""
    a, b = _wide(a), _wide(b)
    return np.where(b == 0, a, a % np.where(b == 0, 1, b)).astype(np.int32)
