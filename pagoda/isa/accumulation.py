"""Reductions and matrix products: arithmetic whose *order* is part of the contract.

The order never depends on the chip. A row reduction has a state of 64 lanes: column j of the row
(counted over the whole row, not the tile) is combined into lane j mod 64, in order, and a fixed
tree folds the lanes at the end, so the tile size never shows. A column reduction is sequential over
rows. A matrix product adds k = 0, 1, 2, ... in order to the accumulator's old value.

States and values are arrays of 32-bit patterns (float32, int32 or uint32); results are uint32.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pagoda.isa.numbers import (
    F32,
    I32,
    INT32_MAX,
    INT32_MIN,
    LANES,
    U32,
    canonical,
    fadd,
    fmax,
    fmin,
    iadd,
    imax,
    lane_bits,
)


class ReduceOp(IntEnum):
    """What a reduction computes; the value is the code in a command's op field."""

    FSUM = 0
    FMAX = 1
    FMIN = 2
    ISUM = 3
    IMAX = 4
    ARGMAX = 5

    @property
    def state_words(self) -> int:
        """Words of a row state: 64 lanes; argmax has 64 values, then their 64 int32 indices."""
        return 2 * LANES if self is ReduceOp.ARGMAX else LANES


_NEGATIVE_ZERO, _INF, _NEGATIVE_INF = 0x80000000, 0x7F800000, 0xFF800000
_IDENTITY = {
    ReduceOp.FSUM: _NEGATIVE_ZERO,
    ReduceOp.FMAX: _NEGATIVE_INF,
    ReduceOp.FMIN: _INF,
    ReduceOp.ISUM: 0,
    ReduceOp.IMAX: INT32_MIN & 0xFFFFFFFF,
    ReduceOp.ARGMAX: _NEGATIVE_INF,
}
_COMBINE = {
    ReduceOp.FSUM: fadd,
    ReduceOp.FMAX: fmax,
    ReduceOp.FMIN: fmin,
    ReduceOp.ISUM: iadd,
    ReduceOp.IMAX: imax,
}


def identity(op: ReduceOp) -> np.uint32:
    """The pattern a lane starts from: combined with any other it changes nothing but NaN bits.

    -0.0 for fsum (+0.0 would turn a -0.0 into +0.0), -inf for fmax and argmax, +inf for fmin, 0 for
    isum, -2^31 for imax.
    """
    return np.uint32(_IDENTITY[op])


def initial_state(op: ReduceOp) -> U32:
    """The row state (`op.state_words`,) before any element; argmax indices start at 2^31 - 1."""
    state = np.full(op.state_words, identity(op))
    state[LANES:] = INT32_MAX
    return state


def combine(op: ReduceOp, a: ArrayLike, b: ArrayLike) -> U32:
    """One step of a reduction other than argmax, element by element: the older operand is `a`."""
    kind = np.int32 if op in (ReduceOp.ISUM, ReduceOp.IMAX) else np.float32
    return _COMBINE[op](lane_bits(a).view(kind), lane_bits(b).view(kind)).view(np.uint32)


def _combine_argmax(value: U32, index: I32, other: U32, other_index: I32) -> tuple[U32, I32]:
    """The better of two (value, index) pairs.

    NaN beats every number, the greater number beats the smaller; on a tie (two NaN, or equal
    numbers, where -0 equals +0) the lower index wins. So any order gives the same pair.
    """
    a, b = value.view(np.float32), other.view(np.float32)
    a_nan, b_nan = np.isnan(a), np.isnan(b)
    with np.errstate(invalid="ignore"):
        better = np.where(a_nan | b_nan, b_nan & ~a_nan, b > a)
        tie = (a_nan & b_nan) | (a == b)
    take = better | (tie & (other_index < index))
    best = canonical(np.where(take, other, value).view(np.float32))
    return best.view(np.uint32), np.where(take, other_index, index)


def reduce_row(op: ReduceOp, state: ArrayLike, row_values: ArrayLike, start: int) -> U32:
    """The state (..., state_words) after the elements `row_values` (..., n).

    Element j of the chunk is column start + j of the row and goes to lane (start + j) mod 64;
    for argmax its index is start + j. The leading axes are independent rows.
    """
    state = lane_bits(state).copy()
    values = lane_bits(row_values)
    done = 0
    while done < values.shape[-1]:
        first = (start + done) % LANES
        count = min(LANES - first, values.shape[-1] - done)
        lanes = slice(first, first + count)
        chunk = values[..., done : done + count]
        if op is ReduceOp.ARGMAX:
            indices = slice(LANES + first, LANES + first + count)
            columns = np.arange(start + done, start + done + count, dtype=np.int32)
            best, index = _combine_argmax(
                state[..., lanes], state[..., indices].view(np.int32), chunk, columns
            )
            state[..., lanes], state[..., indices] = best, index.view(np.uint32)
        else:
            state[..., lanes] = combine(op, state[..., lanes], chunk)
        done += count
    return state


def finish(op: ReduceOp, state: ArrayLike) -> U32:
    """The result pattern (...,) of a row state (..., state_words); for argmax the index.

    The fixed tree: lane i is combined with lane i + 32 (i < 32), then with lane i + 16 (i < 16),
    then + 8, + 4, + 2, + 1; the result is in lane 0. For fsum +0.0 is added last, so that an empty
    sum (all lanes -0.0) is +0.0; a sum of nothing but -0.0 is +0.0 too. Other empty reductions
    give the identity, an empty argmax gives the index 2^31 - 1.
    """
    state = lane_bits(state)
    value = state[..., :LANES]
    half = LANES // 2
    if op is ReduceOp.ARGMAX:
        index = state[..., LANES:].view(np.int32)
        while half:
            value, index = _combine_argmax(
                value[..., :half],
                index[..., :half],
                value[..., half : 2 * half],
                index[..., half : 2 * half],
            )
            half //= 2
        return index[..., 0].view(np.uint32)
    while half:
        value = combine(op, value[..., :half], value[..., half : 2 * half])
        half //= 2
    if op is ReduceOp.FSUM:
        value = combine(op, value, np.uint32(0))
    return value[..., 0]


def reduce_column(op: ReduceOp, state: ArrayLike, rows: ArrayLike) -> U32:
    """The state (cols,) after the rows (n, cols), combined one after another; not for argmax.

    It starts from `identity(op)` in every column and is its own result: an fsum of nothing but
    -0.0 stays -0.0 here, since no `finish` follows.
    """
    state = lane_bits(state).copy()
    for row in lane_bits(rows):
        state = combine(op, state, row)
    return state


def matmul(a: ArrayLike, b: ArrayLike, acc: ArrayLike) -> F32:
    """acc (m, n) + a (m, k) x b (k, n): for k = 0, 1, ...: acc = fma(a[:, k], b[k], acc).

    a and b hold bf16 values as float32, acc is float32; NaN results are canonical. Raises
    ValueError for an operand that is not a bf16 value. k = 0 returns acc bit for bit.

    One binary64 addition, then one rounding to binary32, equals a fused multiply-add here: a
    product has at most 16 significant bits, so where the binary64 sum is inexact the smaller
    addend is below 2^-28 of the larger one, which is itself a binary32 or overflows: the sum is
    nowhere near the middle between two binary32 values.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    for name, operand in (("a", a), ("b", b)):
        if np.any(lane_bits(operand) & 0xFFFF):
            raise ValueError(
                f"matmul: the matrix engine multiplies bf16 values, but operand {name} has float32 "
                "values that bf16 cannot hold; round it first"
            )
    acc = np.array(acc, np.float32)
    left, right = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        for k in range(a.shape[1]):
            total = left[:, k, None] * right[k] + acc
            acc = canonical(total.astype(np.float32))
    return acc


def matmul_i8(a: NDArray[np.int8], b: NDArray[np.int8], acc: ArrayLike) -> I32:
    """acc (m, n) + a (m, k) x b (k, n) modulo 2^32; a and b are int8, acc is int32."""
    product = np.asarray(a, np.int8).astype(np.int64) @ np.asarray(b, np.int8).astype(np.int64)
    return iadd(acc, product.astype(np.int32))
