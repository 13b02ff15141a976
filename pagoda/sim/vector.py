"""Values of the vector engine's commands: vector, transpose, iota. Operands have been checked."""

from __future__ import annotations

import numpy as np

from pagoda.sim.convert import F32, I32, decode, element_bytes, encode, row_bytes
from pagoda.sim.functions import (
    FMA,
    MOV,
    OPERANDS,
    SELECT,
    apply_binary,
    apply_fma,
    apply_select,
    apply_unary,
)
from pagoda.sim.jit import (
    jit,
    load_i32,
    load_u8,
    load_u16,
    store_8,
    store_16,
    store_i32,
)
from pagoda.sim.layout import CHUNK, FIELDS, LANE_BUFFER_BYTES, LANES_AT
from pagoda.sim.transfer import local_at, signed

TILE, COLUMN, SCALAR = 0, 1, 2
_BANK = FIELDS + 16 * 6


@jit
def _splat(lanes, value, count):
    for i in range(count):
        store_i32(lanes, i, np.int32(value))


@jit
def operand_dtype(st, k):
    return (st[_BANK + 1] >> (4 * k)) & 15


@jit
def operand_kind(st, k):
    return (st[_BANK + 1] >> (16 + 2 * k)) & 3


@jit
def _lanes_of(st, k, row, done, part, buffer):
    """Host address of operand k's lanes done .. done + part of a row; scalars are in place."""
    kind = operand_kind(st, k)
    if kind == SCALAR:
        return buffer
    dtype = operand_dtype(st, k)
    here = local_at(st, st[_BANK + 2 + 2 * k]) + row * st[_BANK + 3 + 2 * k]
    if kind == COLUMN:
        if done == 0:
            decode(here, dtype, buffer, 1)
            _splat(buffer, load_i32(buffer, 0), part)
        return buffer
    here += row_bytes(dtype, done)
    if dtype == F32 or dtype == I32:
        return here
    same_row = row > 0 and st[_BANK + 3 + 2 * k] == 0 and st[_BANK + 11] <= CHUNK
    if not same_row:
        decode(here, dtype, buffer, part)
    return buffer


@jit
def _one_row(st, rows, cols):
    """Whether every tile, the result too, is contiguous: then the tile is one long row."""
    if rows == 1:
        return True
    f1, f2 = st[_BANK] & 0xFF, st[_BANK] >> 8
    for k in range(3):
        if (k == 1 and OPERANDS[f1] != 2) or (k == 2 and OPERANDS[f2] != 2):
            continue
        kind = operand_kind(st, k)
        tight = st[_BANK + 3 + 2 * k] == row_bytes(operand_dtype(st, k), cols)
        if kind == COLUMN or (kind == TILE and not tight):
            return False
    return st[_BANK + 9] == row_bytes(operand_dtype(st, 3), cols)


@jit
def run_vector(st):
    """dst := encode(f2(f1(a, b), c))."""
    f1, f2 = st[_BANK] & 0xFF, st[_BANK] >> 8
    rows, cols = st[_BANK + 10], st[_BANK + 11]
    if _one_row(st, rows, cols):
        cols *= rows
        rows = 1
    binary1, binary2 = OPERANDS[f1] == 2, OPERANDS[f2] == 2
    dtype = operand_dtype(st, 3)
    a_lanes = st[LANES_AT]
    b_lanes = a_lanes + LANE_BUFFER_BYTES
    c_lanes = b_lanes + LANE_BUFFER_BYTES
    middle = c_lanes + LANE_BUFFER_BYTES
    result = middle + LANE_BUFFER_BYTES
    work = result + LANE_BUFFER_BYTES  # two buffers long
    for k in range(3):
        if operand_kind(st, k) == SCALAR:
            _splat(a_lanes + k * LANE_BUFFER_BYTES, st[_BANK + 2 + 2 * k], min(cols, CHUNK))
    target = local_at(st, st[_BANK + 8])
    raw = dtype == F32 or dtype == I32
    # A result may replace an operand in place; only then it needs a buffer of its own.
    in_place = False
    for k in range(3):
        in_place |= st[_BANK + 2 + 2 * k] == st[_BANK + 8]
    for row in range(rows):
        done = 0
        while done < cols:
            part = min(cols - done, CHUNK)
            place = target + row * st[_BANK + 9] + row_bytes(dtype, done)
            out = place if raw and not in_place else result
            x = _lanes_of(st, 0, row, done, part, a_lanes)
            y = _lanes_of(st, 1, row, done, part, b_lanes) if binary1 else x
            z = _lanes_of(st, 2, row, done, part, c_lanes) if binary2 else x
            if f2 == FMA:
                apply_fma(out, x, y, z, part)
            elif f2 == SELECT:
                apply_select(out, x, y, z, part)
            elif f2 == MOV and f1 == MOV:
                out = x
            else:
                if f1 != MOV:
                    first = out if f2 == MOV else middle
                    if binary1:
                        apply_binary(f1, first, x, y, part)
                    else:
                        apply_unary(f1, first, x, part, work)
                    x = first
                if f2 != MOV:
                    if binary2:
                        apply_binary(f2, out, x, z, part)
                    else:
                        apply_unary(f2, out, x, part, work)
            if out != place:
                encode(out, dtype, place, part)
            done += part


@jit
def run_transpose(st):
    """dst[c, r] := src[r, c]."""
    f = FIELDS + 16 * 9
    size = element_bytes(st[f] & 15)
    source, source_row = local_at(st, st[f + 1]), st[f + 2]
    rows, cols = st[f + 3], st[f + 4]
    target, target_row = local_at(st, st[f + 5]), st[f + 6]
    for c0 in range(0, cols, 16):  # blocks: neither side touches a cache line in vain
        for r in range(rows):
            here = source + r * source_row
            place = target + r * size
            for c in range(c0, min(c0 + 16, cols)):
                if size == 4:
                    store_i32(place + c * target_row, 0, load_i32(here, c))
                elif size == 2:
                    store_16(place + c * target_row, 0, load_u16(here, c))
                else:
                    store_8(place + c * target_row, 0, load_u8(here, c))


@jit
def run_iota(st):
    """dst[r, c] := start + r * row_step + c * col_step modulo 2^32."""
    f = FIELDS + 16 * 10
    target, target_row = local_at(st, st[f + 1]), st[f + 2]
    rows, cols = st[f + 3], st[f + 4]
    start, row_step, col_step = signed(st[f + 5]), signed(st[f + 6]), signed(st[f + 7])
    for r in range(rows):
        for c in range(cols):
            value = start + r * row_step + c * col_step
            store_i32(target + r * target_row, c, np.int32(value))
