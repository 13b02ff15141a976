"""Checking mode: which bytes a command reads and writes exactly, and whether they were written.

One byte per byte of SRAM and ACC says whether this launch wrote it; a log says which rows of DRAM
each command touched, for the search for races when the epoch ends (`machine`).
"""

from __future__ import annotations

import numpy as np

from pagoda.isa.fault import FaultKind
from pagoda.sim import details
from pagoda.sim.convert import F32, row_bytes
from pagoda.sim.entry_checks import fail
from pagoda.sim.functions import OPERANDS
from pagoda.sim.jit import jit, load_i32, load_u8, store_8, store_i64
from pagoda.sim.layout import (
    ACC_WRITTEN_AT,
    COMMANDS,
    CORE_COUNT,
    FIELDS,
    LOG_AT,
    LOG_USED,
    PC,
    SLOT_WORDS,
    SLOTS,
    SRAM_WRITTEN_AT,
)
from pagoda.sim.reduce import ARGMAX, STATE_LANES
from pagoda.sim.transfer import local_at, signed
from pagoda.sim.vector import COLUMN, SCALAR

UNINITIALISED = int(FaultKind.UNINITIALISED)
NOTHING = -1
# A row of the log: cycle of entry, command, pc, then where the rows of DRAM are.
(
    LOG_CYCLE, LOG_COMMAND, LOG_PC, LOG_READS, LOG_WRITES, LOG_FIRST, LOG_BYTES, LOG_ROWS_COUNT,
    LOG_ROW_STRIDE, LOG_PLANES, LOG_PLANE_STRIDE,
) = range(11)  # fmt: skip
LOG_WORDS = 11


@jit
def _visit(st, mark, address, row, rows, row_stride, planes, plane_stride):
    """Mark the bytes of a tile as written or, without mark, find one that was never written."""
    written = st[ACC_WRITTEN_AT] if address >> 31 else st[SRAM_WRITTEN_AT]
    first = address & 0x7FFFFFFF
    for p in range(planes):
        for r in range(rows):
            start = first + p * plane_stride + r * row_stride
            for i in range(start, start + row):
                if mark:
                    store_8(written, i, np.int32(1))
                elif load_u8(written, i) == 0:
                    return np.int64(i)
    return np.int64(NOTHING)


@jit
def _read_tile(st, address, row, rows, row_stride, planes, plane_stride):
    """READY or the fault of a tile that is read."""
    found = _visit(st, False, address, row, rows, row_stride, planes, plane_stride)
    if found == NOTHING:
        return 0
    return fail(st, UNINITIALISED, details.NEVER_WRITTEN, found | (address & 0x80000000), 0)


@jit
def check_word(st, offset):
    """READY or the fault of a word load from SRAM."""
    return _read_tile(st, offset, 4, 1, 0, 1, 0)


@jit
def check_indices(st, bank):
    """READY or the fault of reading the index tile of gather or scatter."""
    f = FIELDS + 16 * bank
    return _read_tile(st, st[f + 6], 4 * st[f + 5], 1, 0, 1, 0)


@jit
def _check_matmul(st):
    f = FIELDS + 16 * 5
    go = st[f]
    size = 1 if go & 3 else 2
    m0, m1, m2, inner, outer, n = (
        st[f + 2], st[f + 4], st[f + 6], st[f + 8], st[f + 9], st[f + 13]
    )  # fmt: skip
    k = inner * outer
    fault = 0
    if k > 0:
        if (go >> 5) & 1:
            fault = _read_tile(st, st[f + 1], m0 * size, k, st[f + 3], 1, 0)
        else:
            for i2 in range(m2):
                for i1 in range(m1):
                    if fault == 0:
                        here = st[f + 1] + i2 * st[f + 7] + i1 * st[f + 5]
                        fault = _read_tile(
                            st, here, inner * size, outer, st[f + 10], m0, st[f + 3]
                        )
        if fault == 0:
            if (go >> 6) & 1:
                fault = _read_tile(st, st[f + 11], k * size, n, st[f + 12], 1, 0)
            else:
                fault = _read_tile(st, st[f + 11], n * size, k, st[f + 12], 1, 0)
    if fault == 0 and (go >> 4) & 1:
        acc = (st[f + 14] & 0x7FFFFFFF) | 0x80000000
        fault = _read_tile(st, acc, 4 * n, m0 * m1 * m2, st[f + 15], 1, 0)
    return fault


@jit
def _check_vector(st):
    f = FIELDS + 16 * 6
    types, rows, cols = st[f + 1], st[f + 10], st[f + 11]
    fault = 0
    for k in range(3):
        code = st[f] >> 8 if k == 2 else st[f] & 0xFF
        kind = (types >> (16 + 2 * k)) & 3
        if fault or kind == SCALAR or (k > 0 and OPERANDS[code] == 1):
            continue
        row = row_bytes((types >> (4 * k)) & 15, 1 if kind == COLUMN else cols)
        fault = _read_tile(st, st[f + 2 + 2 * k], row, rows, st[f + 3 + 2 * k], 1, 0)
    return fault


@jit
def _state_bytes(op):
    return 8 * STATE_LANES if op == ARGMAX else 4 * STATE_LANES


@jit
def check_reads(st, bank):
    """READY or UNINITIALISED for the local operands of a bank's command (not the indices)."""
    f = FIELDS + 16 * bank
    if bank == 2:
        row = row_bytes((st[f] >> 4) & 15, st[f + 4])
        return _read_tile(st, st[f + 3], row, st[f + 5], st[f + 9], st[f + 6], st[f + 10])
    if bank == 4:
        row = row_bytes((st[f] >> 4) & 15, st[f + 4])
        return _read_tile(st, st[f + 3], row, st[f + 5], st[f + 9], 1, 0)
    if bank == 5:
        return _check_matmul(st)
    if bank == 6:
        return _check_vector(st)
    if bank == 7:
        row = row_bytes((st[f] >> 8) & 15, st[f + 4])
        fault = _read_tile(st, st[f + 1], row, st[f + 3], st[f + 2], 1, 0)
        if fault or (st[f] >> 4) & 1:
            return fault
        if (st[f] >> 5) & 1:
            return _read_tile(st, st[f + 5], 4 * st[f + 4], 1, 0, 1, 0)
        return _read_tile(st, st[f + 5], _state_bytes(st[f] & 15), st[f + 3], st[f + 6], 1, 0)
    if bank == 8:
        return _read_tile(st, st[f + 1], _state_bytes(st[f] & 15), st[f + 3], st[f + 2], 1, 0)
    if bank == 9:
        row = row_bytes(st[f] & 15, st[f + 4])
        return _read_tile(st, st[f + 1], row, st[f + 3], st[f + 2], 1, 0)
    return 0


@jit
def mark_writes(st, bank):
    """Record that a bank's command writes its destination."""
    f = FIELDS + 16 * bank
    planes, plane_stride = np.int64(1), np.int64(0)
    if bank == 1 or bank == 3:
        address, row = st[f + 3], row_bytes((st[f] >> 4) & 15, st[f + 4])
        rows, row_stride = st[f + 5], st[f + 9]
        if bank == 1:
            planes, plane_stride = st[f + 6], st[f + 10]
    elif bank == 5:
        address, row = (st[f + 14] & 0x7FFFFFFF) | 0x80000000, 4 * st[f + 13]
        rows, row_stride = st[f + 2] * st[f + 4] * st[f + 6], st[f + 15]
    elif bank == 6:
        address, row = st[f + 8], row_bytes((st[f + 1] >> 12) & 15, st[f + 11])
        rows, row_stride = st[f + 10], st[f + 9]
    elif bank == 7 and (st[f] >> 5) & 1:
        address, row, rows, row_stride = st[f + 5], 4 * st[f + 4], np.int64(1), np.int64(0)
    elif bank == 7:
        address, row = st[f + 5], np.int64(_state_bytes(st[f] & 15))
        rows, row_stride = st[f + 3], st[f + 6]
    elif bank == 8:
        address, row = st[f + 4], row_bytes((st[f] >> 4) & 15, np.int64(1))
        rows, row_stride = st[f + 3], st[f + 5]
    elif bank == 9:
        address, row = st[f + 5], row_bytes(st[f] & 15, st[f + 3])
        rows, row_stride = st[f + 4], st[f + 6]
    elif bank == 10:
        address, row = st[f + 1], row_bytes(F32, st[f + 4])
        rows, row_stride = st[f + 3], st[f + 2]
    else:
        return
    _visit(st, True, address, row, rows, row_stride, planes, plane_stride)


@jit
def _log(st, cycle, reads, writes, first, nbytes, rows, row_stride, planes, plane_stride):
    at = st[LOG_AT] + 8 * LOG_WORDS * st[LOG_USED]
    store_i64(at, LOG_CYCLE, cycle)
    store_i64(at, LOG_COMMAND, st[COMMANDS])
    store_i64(at, LOG_PC, st[PC])
    store_i64(at, LOG_READS, reads)
    store_i64(at, LOG_WRITES, writes)
    store_i64(at, LOG_FIRST, first)
    store_i64(at, LOG_BYTES, nbytes)
    store_i64(at, LOG_ROWS_COUNT, rows)
    store_i64(at, LOG_ROW_STRIDE, row_stride)
    store_i64(at, LOG_PLANES, planes)
    store_i64(at, LOG_PLANE_STRIDE, plane_stride)
    st[LOG_USED] += 1


@jit
def log_space(st):
    """Rows of the log that the next command may need."""
    gathered, scattered = st[FIELDS + 16 * 3 + 5], st[FIELDS + 16 * 4 + 5]
    return 1 + min(max(gathered, scattered), 1 << 20)


@jit
def log_dram(st, bank, cycle):
    """Record which bytes of DRAM a bank's command reads and writes."""
    if bank > 4 or st[CORE_COUNT] == 1:
        return
    f = FIELDS + 16 * bank
    accumulates = (st[f] >> 8) & 1
    writes = np.int64(bank == 2 or bank == 4)
    reads = np.int64(writes == 0 or accumulates)
    first = st[SLOTS + SLOT_WORDS * st[f + 1]] + st[f + 2]
    cols, rows, planes = st[f + 4], st[f + 5], np.int64(1)
    row_stride, plane_stride = signed(st[f + 7]), np.int64(0)
    if bank > 2:
        indices = local_at(st, st[f + 6])
        nbytes = row_bytes(st[f] & 15, cols)
        for r in range(rows):
            here = first + load_i32(indices, r) * row_stride
            _log(st, cycle, reads, writes, here, nbytes, 1, 0, 1, 0)
        return
    planes, plane_stride = st[f + 6], signed(st[f + 8])
    if bank == 1:
        rows -= (st[f + 11] & 0xFFFF) + (st[f + 11] >> 16)
        cols -= (st[f + 12] & 0xFFFF) + (st[f + 12] >> 16)
    if rows > 0 and cols > 0:
        nbytes = row_bytes(st[f] & 15, cols)
        _log(st, cycle, reads, writes, first, nbytes, rows, row_stride, planes, plane_stride)
