"""A command before it enters the window: its checks, the bytes it touches, how long it takes.

Each `prepare` function fills the window entry at `e` in the state. It returns a FaultKind, or
READY, or EMPTY for a command whose extents leave nothing to do.
"""

from __future__ import annotations

import numpy as np

from pagoda.sim import details
from pagoda.sim.convert import I8, I32, element_bytes, is_float, row_bytes
from pagoda.sim.dma import ceil_div
from pagoda.sim.entry_checks import (
    BAD_FIELD,
    COUNT_LIMIT,
    EMPTY,
    LOCAL_OUT_OF_RANGE,
    MISALIGNED,
    READY,
    bad_go,
    bank_mask,
    fail,
    outside,
    overlap,
    reads,
    reads_local,
    require_count,
    require_multiple,
    reserved,
    unified,
    writes_local,
)
from pagoda.sim.functions import COST, FADDQ, FMA, FMUL, I2FMUL, LATENCY, OPERANDS, SELECT
from pagoda.sim.jit import jit
from pagoda.sim.layout import (
    COLS,
    E_DRAM_BYTES,
    E_LEAD,
    E_MACS,
    E_OCCUPANCY,
    E_READ_BANKS,
    E_READS,
    E_TAIL,
    E_WRITE_BANKS,
    E_WRITE_FIRST,
    E_WRITE_LAST,
    FIELDS,
    LANES,
    MATRIX_TYPES,
    PSUM_LATENCY,
    ROWS,
)
from pagoda.sim.reduce import ARGMAX, IMAX, ISUM, STATE_LANES
from pagoda.sim.transfer_entry import prepare_3d, prepare_indexed
from pagoda.sim.vector import COLUMN, SCALAR, TILE

START_LIMIT = 1 << 30


@jit
def _prepare_matmul(st, e):
    f = FIELDS + 16 * 5
    go = st[f]
    if reserved(st, 5, 0x73):
        return bad_go(st, 5)
    kind = go & 3
    if kind > 1 or not (st[MATRIX_TYPES] >> kind) & 1:
        return fail(st, BAD_FIELD, details.MATRIX_TYPE, kind, 0)
    transpose_a, transpose_b = (go >> 5) & 1, (go >> 6) & 1
    a, m0, m0_stride, m1, m1_stride = st[f + 1], st[f + 2], st[f + 3], st[f + 4], st[f + 5]
    m2, m2_stride, inner, outer = st[f + 6], st[f + 7], st[f + 8], st[f + 9]
    outer_stride, b, b_stride, n = st[f + 10], st[f + 11], st[f + 12], st[f + 13]
    acc, acc_stride = st[f + 14] & 0x7FFFFFFF, st[f + 15]
    if m0 == 0 or m1 == 0 or m2 == 0 or n == 0:
        return EMPTY
    size = np.int64(1) if kind else np.int64(2)
    if (a | m0_stride | m1_stride | m2_stride | outer_stride | b | b_stride) & (size - 1):
        return fail(st, MISALIGNED, details.ALIGNMENT, a, size)
    if (acc | acc_stride) & 3:
        return fail(st, MISALIGNED, details.ALIGNMENT, acc, 4)
    largest = max(max(m0, max(m1, m2)), max(n, max(inner, outer)))
    if largest > COUNT_LIMIT or m0 * m1 > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, largest, COUNT_LIMIT)
    m, k = m0 * m1 * m2, inner * outer
    if m > COUNT_LIMIT or k > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(m, k), COUNT_LIMIT)
    if transpose_a and (m1 != 1 or m2 != 1 or outer != 1):
        return fail(st, BAD_FIELD, details.TRANSPOSE_SHAPE, 0, 0)
    if m > 1 and acc_stride < 4 * n:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, acc_stride, 4 * n)
    acc_extent = (m - 1) * acc_stride + 4 * n
    shared = False
    if k > 0:
        if transpose_a:
            a_extent = (inner - 1) * m0_stride + m0 * size
        else:
            a_extent = (m0 - 1) * m0_stride + (m1 - 1) * m1_stride + (m2 - 1) * m2_stride
            a_extent += (outer - 1) * outer_stride + inner * size
        if transpose_b:
            b_extent = (n - 1) * b_stride + k * size
        else:
            b_extent = (k - 1) * b_stride + n * size
        if outside(st, a, a_extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, a, a_extent)
        if outside(st, b, b_extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, b, b_extent)
        if outside(st, acc | 0x80000000, acc_extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, acc, acc_extent)
        if (a | b) >> 31:
            return fail(st, BAD_FIELD, details.ACC_FORMAT, max(a, b), 0)
        reads_local(st, e, a, a_extent)
        reads_local(st, e, b, b_extent)
        shared = (bank_mask(st, a, a_extent) & bank_mask(st, b, b_extent)) != 0
    elif outside(st, acc | 0x80000000, acc_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, acc, acc_extent)
    reads_local(st, e, acc | 0x80000000, acc_extent)
    writes_local(st, e, acc | 0x80000000, acc_extent)
    passes = max(outer * ceil_div(inner, st[ROWS]), 1)
    rows = ceil_div(m, st[ROWS]) * st[ROWS] if transpose_a else m
    weights = max(st[ROWS], st[COLS]) if transpose_b else st[ROWS]
    unit = rows + weights if shared else max(rows, weights)
    strips = ceil_div(n, st[COLS])
    fill = weights + st[ROWS] * (transpose_a + transpose_b)
    st[e + E_OCCUPANCY] = fill + passes * max(strips * unit, st[PSUM_LATENCY])
    st[e + E_TAIL] = st[PSUM_LATENCY] + 4
    st[e + E_MACS] = m * n * k
    return READY


@jit
def _prepare_vector(st, e):
    f = FIELDS + 16 * 6
    if reserved(st, 6, 0xFFFF):
        return bad_go(st, 6)
    types = st[f + 1]
    if types >> 22:
        return fail(st, BAD_FIELD, details.RESERVED, 1, types)
    f1, f2 = st[f] & 0xFF, st[f] >> 8
    if OPERANDS[f1] == 0 or OPERANDS[f2] == 0 or f1 == FMA or (f2 == FMA and f1 != FMUL):
        return fail(st, BAD_FIELD, details.FUNCTIONS, f1, f2)
    if f1 == FADDQ or f2 == I2FMUL:
        return fail(st, BAD_FIELD, details.FUNCTIONS, f1, f2)
    if (f1 == SELECT) != (f2 == SELECT):
        return fail(st, BAD_FIELD, details.FUNCTIONS, f1, f2)
    for k in range(4):
        if (k == 1 and OPERANDS[f1] == 1) or (k == 2 and OPERANDS[f2] == 1):
            continue
        if (types >> (4 * k)) & 15 > I8:
            return fail(st, BAD_FIELD, details.OPERAND_FORMAT, (types >> (4 * k)) & 15, 0)
        if k < 3 and (types >> (16 + 2 * k)) & 3 > SCALAR:
            return fail(st, BAD_FIELD, details.OPERAND_KIND, 3, 0)
    rows, cols = st[f + 10], st[f + 11]
    if rows == 0 or cols == 0:
        return EMPTY
    for k in range(4):
        if (k == 1 and OPERANDS[f1] == 1) or (k == 2 and OPERANDS[f2] == 1):
            continue
        if k < 3 and (types >> (16 + 2 * k)) & 3 == SCALAR:
            continue
        fault = require_multiple(
            st, st[f + 2 + 2 * k] | st[f + 3 + 2 * k], element_bytes((types >> (4 * k)) & 15)
        )
        if fault:
            return fault
    if max(rows, cols) > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(rows, cols), COUNT_LIMIT)
    target, target_row, target_type = st[f + 8], st[f + 9], (types >> 12) & 15
    target_bytes = row_bytes(target_type, cols)
    if rows > 1 and target_row < target_bytes:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, target_row, target_bytes)
    target_extent = (rows - 1) * target_row + target_bytes
    acc_fault, overlap_fault = np.int64(-1), np.int64(-1)
    a_banks, b_banks, c_banks = np.int64(0), np.int64(0), np.int64(0)
    for k in range(3):
        if (k == 1 and OPERANDS[f1] == 1) or (k == 2 and OPERANDS[f2] == 1):
            continue
        kind, dtype = (types >> (16 + 2 * k)) & 3, (types >> (4 * k)) & 15
        if kind == SCALAR:
            continue
        address, stride = st[f + 2 + 2 * k], st[f + 3 + 2 * k]
        extent = (rows - 1) * stride + row_bytes(dtype, 1 if kind == COLUMN else cols)
        if outside(st, address, extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, address, extent)
        if address >> 31 and element_bytes(dtype) != 4:
            acc_fault = address
        in_place = (
            kind == TILE
            and address == target
            and stride == target_row
            and element_bytes(dtype) == element_bytes(target_type)
        )
        if not in_place and overlap(address, extent, target, target_extent):
            overlap_fault = address
        mask = bank_mask(st, address, extent)
        if k == 0:
            a_banks = mask
        elif k == 1:
            b_banks = mask
        else:
            c_banks = mask
        reads(st, e, unified(address), extent, mask)
    if outside(st, target, target_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, target_extent)
    if target >> 31 and element_bytes(target_type) != 4:
        acc_fault = target
    if acc_fault >= 0:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, acc_fault, 0)
    if overlap_fault >= 0:
        return fail(st, BAD_FIELD, details.OVERLAP, overlap_fault, 0)
    writes_local(st, e, target, target_extent)
    sharing = np.int64(1)
    if a_banks & b_banks & c_banks:
        sharing = np.int64(3)
    elif (a_banks & b_banks) | (a_banks & c_banks) | (b_banks & c_banks):
        sharing = np.int64(2)
    group = max(max(COST[f1], COST[f2]), sharing)
    st[e + E_OCCUPANCY] = rows * ceil_div(cols, st[LANES]) * group
    st[e + E_TAIL] = 4 + LATENCY[f1] + LATENCY[f2]
    return READY


@jit
def _prepare_reduce(st, e):
    f = FIELDS + 16 * 7
    if reserved(st, 7, 0xF3F):
        return bad_go(st, 7)
    op, first, column, dtype = st[f] & 15, (st[f] >> 4) & 1, (st[f] >> 5) & 1, (st[f] >> 8) & 15
    if op > ARGMAX:
        return fail(st, BAD_FIELD, details.OPERATOR, op, 0)
    if dtype > I8 or is_float(dtype) == ((op == ISUM) | (op == IMAX)):
        return fail(st, BAD_FIELD, details.OPERAND_FORMAT, dtype, 0)
    if op == ARGMAX and column:
        return fail(st, BAD_FIELD, details.ARGMAX_COLUMN, 0, 0)
    source, source_row, rows, cols = st[f + 1], st[f + 2], st[f + 3], st[f + 4]
    state, state_row, start = st[f + 5], st[f + 6], st[f + 7]
    if rows == 0 or (cols == 0 and not (first and not column)):
        return EMPTY
    fault = require_multiple(st, source | source_row, element_bytes(dtype))
    if fault:
        return fault
    fault = require_multiple(st, state | state_row, 4)
    if fault:
        return fault
    if max(rows, cols) > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(rows, cols), COUNT_LIMIT)
    if not column and (start % STATE_LANES or start > START_LIMIT):
        return fail(st, BAD_FIELD, details.START, start, 0)
    words = 2 * STATE_LANES if op == ARGMAX else STATE_LANES
    if column:
        state_extent = 4 * cols
    else:
        if rows > 1 and state_row < 4 * words:
            return fail(st, BAD_FIELD, details.ROW_STRIDE, state_row, 4 * words)
        state_extent = (rows - 1) * state_row + 4 * words
    extent = (rows - 1) * source_row + row_bytes(dtype, cols)
    if cols > 0 and outside(st, source, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, source, extent)
    if outside(st, state, state_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, state, state_extent)
    if cols > 0:
        if source >> 31 and element_bytes(dtype) != 4:
            return fail(st, BAD_FIELD, details.ACC_FORMAT, source, 0)
        if overlap(source, extent, state, state_extent):
            return fail(st, BAD_FIELD, details.OVERLAP, source, 0)
        reads_local(st, e, source, extent)
    if not first:
        reads_local(st, e, state, state_extent)
    writes_local(st, e, state, state_extent)
    if column:
        groups = ceil_div(cols, st[LANES])
        st[e + E_OCCUPANCY] = rows * max(groups, 4) + 2 * groups
    else:
        steps = ceil_div(STATE_LANES, min(st[LANES], STATE_LANES))
        ends = (4 if op == ARGMAX else 2) * steps
        chunks = ceil_div(cols, STATE_LANES)
        st[e + E_OCCUPANCY] = rows * (chunks * max(steps, 4) + ends)
    st[e + E_TAIL] = 8
    return READY


@jit
def _prepare_finish(st, e):
    f = FIELDS + 16 * 8
    if reserved(st, 8, 0xFF):
        return bad_go(st, 8)
    op, dtype = st[f] & 15, (st[f] >> 4) & 15
    if op > ARGMAX:
        return fail(st, BAD_FIELD, details.OPERATOR, op, 0)
    integer = (op == ISUM) | (op == IMAX) | (op == ARGMAX)
    if dtype > I8 or is_float(dtype) == integer or (op == ARGMAX and dtype != I32):
        return fail(st, BAD_FIELD, details.OPERAND_FORMAT, dtype, 0)
    state, state_row, rows = st[f + 1], st[f + 2], st[f + 3]
    target, target_row = st[f + 4], st[f + 5]
    if rows == 0:
        return EMPTY
    fault = require_multiple(st, state | state_row, 4)
    if fault:
        return fault
    size = element_bytes(dtype)
    fault = require_multiple(st, target | target_row, size)
    if fault:
        return fault
    fault = require_count(st, rows)
    if fault:
        return fault
    if rows > 1 and target_row < size:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, target_row, size)
    words = 2 * STATE_LANES if op == ARGMAX else STATE_LANES
    extent = (rows - 1) * state_row + 4 * words
    target_extent = (rows - 1) * target_row + size
    if outside(st, state, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, state, extent)
    if outside(st, target, target_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, target_extent)
    if target >> 31 and size != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, target, 0)
    if overlap(state, extent, target, target_extent):
        return fail(st, BAD_FIELD, details.OVERLAP, state, 0)
    reads_local(st, e, state, extent)
    writes_local(st, e, target, target_extent)
    st[e + E_OCCUPANCY] = rows * 2 * ceil_div(STATE_LANES, min(st[LANES], STATE_LANES)) + 24
    st[e + E_TAIL] = 8
    return READY


@jit
def _prepare_transpose(st, e):
    f = FIELDS + 16 * 9
    if reserved(st, 9, 0xF):
        return bad_go(st, 9)
    dtype = st[f] & 15
    if dtype > I8:
        return fail(st, BAD_FIELD, details.OPERAND_FORMAT, dtype, 0)
    source, source_row, rows, cols = st[f + 1], st[f + 2], st[f + 3], st[f + 4]
    target, target_row = st[f + 5], st[f + 6]
    if rows == 0 or cols == 0:
        return EMPTY
    size = element_bytes(dtype)
    fault = require_multiple(st, source | source_row | target | target_row, size)
    if fault:
        return fault
    if max(rows, cols) > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(rows, cols), COUNT_LIMIT)
    if cols > 1 and target_row < rows * size:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, target_row, rows * size)
    extent = (rows - 1) * source_row + cols * size
    target_extent = (cols - 1) * target_row + rows * size
    if outside(st, source, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, source, extent)
    if outside(st, target, target_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, target_extent)
    if (source | target) >> 31 and size != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, max(source, target), 0)
    if overlap(source, extent, target, target_extent):
        return fail(st, BAD_FIELD, details.OVERLAP, source, 0)
    reads_local(st, e, source, extent)
    writes_local(st, e, target, target_extent)
    side = st[LANES]
    blocks = ceil_div(rows, side) * ceil_div(cols, side)
    st[e + E_OCCUPANCY] = blocks * side + side
    st[e + E_TAIL] = 8
    return READY


@jit
def _prepare_iota(st, e):
    f = FIELDS + 16 * 10
    if reserved(st, 10, 0):
        return bad_go(st, 10)
    target, target_row, rows, cols = st[f + 1], st[f + 2], st[f + 3], st[f + 4]
    if rows == 0 or cols == 0:
        return EMPTY
    fault = require_multiple(st, target | target_row, 4)
    if fault:
        return fault
    if max(rows, cols) > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(rows, cols), COUNT_LIMIT)
    if rows > 1 and target_row < 4 * cols:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, target_row, 4 * cols)
    extent = (rows - 1) * target_row + 4 * cols
    if outside(st, target, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, extent)
    writes_local(st, e, target, extent)
    st[e + E_OCCUPANCY] = rows * ceil_div(cols, st[LANES])
    st[e + E_TAIL] = 8
    return READY


@jit
def prepare(st, e, bank):
    """Check the command of a bank and fill the entry at `e`: a FaultKind, READY or EMPTY."""
    st[e + E_READ_BANKS] = 0
    st[e + E_WRITE_BANKS] = 0
    st[e + E_READS] = 0
    st[e + E_WRITE_FIRST] = 0
    st[e + E_WRITE_LAST] = -1
    st[e + E_LEAD] = -1
    st[e + E_OCCUPANCY] = 1
    st[e + E_TAIL] = 0
    st[e + E_MACS] = 0
    st[e + E_DRAM_BYTES] = 0
    if bank <= 2:
        return prepare_3d(st, e, bank)
    if bank <= 4:
        return prepare_indexed(st, e, bank)
    if bank == 5:
        return _prepare_matmul(st, e)
    if bank == 6:
        return _prepare_vector(st, e)
    if bank == 7:
        return _prepare_reduce(st, e)
    if bank == 8:
        return _prepare_finish(st, e)
    if bank == 9:
        return _prepare_transpose(st, e)
    return _prepare_iota(st, e)
