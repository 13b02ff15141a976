"""A command before it enters the window: its checks, the bytes it touches, how long it takes.

Each `_prepare` function fills the window entry at `e` in the state. It returns a FaultKind, or
READY, or EMPTY for a command whose extents leave nothing to do.
"""

from __future__ import annotations

import numpy as np

from pagoda.isa.fault import FaultKind
from pagoda.sim import details
from pagoda.sim.convert import BF16, F32, I4, I8, I32, U8, element_bytes, is_float, row_bytes
from pagoda.sim.dma import ATOM_SHIFT, atoms_of, ceil_div, load_time, merged, store_time
from pagoda.sim.functions import COST, FADDQ, FMA, FMUL, I2FMUL, LATENCY, OPERANDS, SELECT
from pagoda.sim.jit import jit, load_i32
from pagoda.sim.layout import (
    ACC_BANK_SHIFT,
    ACC_BYTES,
    ACC_SPACE,
    COLS,
    DRAM_BIT,
    DRAM_SPACE,
    E_DRAM_BYTES,
    E_LEAD,
    E_MACS,
    E_OCCUPANCY,
    E_READ_BANKS,
    E_READ_RANGES,
    E_READS,
    E_TAIL,
    E_WRITE_BANKS,
    E_WRITE_FIRST,
    E_WRITE_LAST,
    FAULT_DETAIL,
    FAULT_VALUE,
    FAULT_VALUE_2,
    FIELDS,
    INDEX_BIT,
    LANES,
    MATRIX_TYPES,
    PORT_BYTES,
    PSUM_LATENCY,
    READABLE,
    ROWS,
    SLOT_COUNT,
    SLOT_WORDS,
    SLOTS,
    SRAM_BANK_SHIFT,
    SRAM_BYTES,
    WRITABLE,
)
from pagoda.sim.reduce import ARGMAX, IMAX, ISUM, STATE_LANES
from pagoda.sim.transfer import local_at, signed
from pagoda.sim.vector import COLUMN, SCALAR, TILE

READY, EMPTY = 0, -1
MISALIGNED = int(FaultKind.MISALIGNED)
BAD_FIELD = int(FaultKind.BAD_FIELD)
BAD_SLOT = int(FaultKind.BAD_SLOT)
NO_PERMISSION = int(FaultKind.NO_PERMISSION)
OUT_OF_SLOT = int(FaultKind.OUT_OF_SLOT)
LOCAL_OUT_OF_RANGE = int(FaultKind.LOCAL_OUT_OF_RANGE)
GATHER_INDEX = int(FaultKind.GATHER_INDEX)
COUNT_LIMIT = 1 << 20
START_LIMIT = 1 << 30


@jit
def fail(st, kind, detail, value, value_2):
    st[FAULT_DETAIL] = detail
    st[FAULT_VALUE] = value
    st[FAULT_VALUE_2] = value_2
    return kind


@jit
def bank_mask(st, address, extent):
    """Bit k: SRAM bank k; bit 16 + k: ACC bank k."""
    first = address & 0x7FFFFFFF
    last = first + extent - 1
    if address >> 31:
        low, high = first >> st[ACC_BANK_SHIFT], last >> st[ACC_BANK_SHIFT]
        return ((1 << (high - low + 1)) - 1) << (low + 16)
    low, high = first >> st[SRAM_BANK_SHIFT], last >> st[SRAM_BANK_SHIFT]
    return ((1 << (high - low + 1)) - 1) << low


@jit
def _outside(st, address, extent):
    size = st[ACC_BYTES] if address >> 31 else st[SRAM_BYTES]
    return (address & 0x7FFFFFFF) + extent > size


@jit
def _space(address):
    """A local address in the space of all memories."""
    return address if address < 0x80000000 else (address & 0x7FFFFFFF) + ACC_SPACE


@jit
def _read(st, e, first, extent, banks):
    at = e + E_READ_RANGES + 2 * st[e + E_READS]
    st[at] = first
    st[at + 1] = first + extent - 1
    st[e + E_READS] += 1
    st[e + E_READ_BANKS] |= banks


@jit
def _write(st, e, first, extent, banks):
    st[e + E_WRITE_FIRST] = first
    st[e + E_WRITE_LAST] = first + extent - 1
    st[e + E_WRITE_BANKS] |= banks


@jit
def _read_local(st, e, address, extent):
    _read(st, e, _space(address), extent, bank_mask(st, address, extent))


@jit
def _write_local(st, e, address, extent):
    _write(st, e, _space(address), extent, bank_mask(st, address, extent))


@jit
def _overlap(a, a_extent, b, b_extent):
    """Whether two local hulls share a byte."""
    a, b = _space(a), _space(b)
    return (a < b + b_extent) & (b < a + a_extent)


@jit
def _reserved(st, bank, allowed):
    """Whether the go word of a bank has bits set outside `allowed`."""
    return (st[FIELDS + 16 * bank] & ~np.int64(allowed)) != 0


@jit
def _bad_go(st, bank):
    return fail(st, BAD_FIELD, details.RESERVED, 0, st[FIELDS + 16 * bank])


@jit
def _transfer_codes(st, bank, accumulates):
    """Step 1 for load, store, gather, scatter."""
    f = FIELDS + 16 * bank
    if _reserved(st, bank, 0x1FF if accumulates else 0xFF):
        return _bad_go(st, bank)
    mem, local = st[f] & 15, (st[f] >> 4) & 15
    if mem > U8 or local > I8 or is_float(mem) != is_float(local):
        return fail(st, BAD_FIELD, details.FORMATS, mem, local)
    if (st[f] >> 8) & 1 and mem != F32 and mem != BF16 and mem != I32:
        return fail(st, BAD_FIELD, details.ACCUMULATE_FORMAT, mem, 0)
    return READY


@jit
def _multiple(st, value, unit):
    """READY if value is a multiple of a power of two, else the fault."""
    if value & (unit - 1):
        return fail(st, MISALIGNED, details.ALIGNMENT, value, unit)
    return READY


@jit
def _count(st, value):
    if value > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, value, COUNT_LIMIT)
    return READY


@jit
def _slot(st, f, needs):
    """Steps BAD_SLOT and NO_PERMISSION."""
    slot = st[f + 1]
    if slot >= st[SLOT_COUNT]:
        return fail(st, BAD_SLOT, details.SLOT, slot, st[SLOT_COUNT])
    if (st[SLOTS + SLOT_WORDS * slot + 2] & needs) != needs:
        return fail(st, NO_PERMISSION, details.PERMISSION, slot, 0)
    return READY


@jit
def _prepare_3d(st, e, bank):
    """load (bank 1) and store (bank 2)."""
    load = bank == 1
    fault = _transfer_codes(st, bank, not load)
    if fault:
        return fault
    f = FIELDS + 16 * bank
    mem, local, accumulate = st[f] & 15, (st[f] >> 4) & 15, (st[f] >> 8) & 1
    cols, rows, planes = st[f + 4], st[f + 5], st[f + 6]
    if cols == 0 or rows == 0 or planes == 0:
        return EMPTY
    local_unit, mem_unit = element_bytes(local), element_bytes(mem)
    if (st[f + 3] | st[f + 9] | st[f + 10]) & (local_unit - 1):
        return fail(st, MISALIGNED, details.ALIGNMENT, st[f + 3], local_unit)
    if (st[f + 2] | st[f + 7] | st[f + 8]) & (mem_unit - 1):
        return fail(st, MISALIGNED, details.ALIGNMENT, st[f + 2], mem_unit)
    if max(cols, max(rows, planes)) > COUNT_LIMIT or planes * rows > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(cols, rows * planes), COUNT_LIMIT)
    pad_rows, pad_cols = np.int64(0), np.int64(0)
    if load:
        pad_rows = (st[f + 11] & 0xFFFF) + (st[f + 11] >> 16)
        pad_cols = (st[f + 12] & 0xFFFF) + (st[f + 12] >> 16)
    if pad_rows > rows:
        return fail(st, BAD_FIELD, details.PADDING, pad_rows, rows)
    if pad_cols > cols:
        return fail(st, BAD_FIELD, details.PADDING, pad_cols, cols)
    if mem == I4 and (cols | pad_cols) & 1:
        return fail(st, BAD_FIELD, details.ODD_I4, cols, pad_cols)
    mem_row, mem_plane = signed(st[f + 7]), signed(st[f + 8])
    row, plane = st[f + 9], st[f + 10]
    bytes_local, bytes_mem = row_bytes(local, cols), row_bytes(mem, cols - pad_cols)
    to_row = row if load else abs(mem_row)
    to_plane = plane if load else abs(mem_plane)
    to_bytes = bytes_local if load else bytes_mem
    inner, inner_count, outer, outer_count = to_row, rows, to_plane, planes
    if rows == 1 or (planes > 1 and to_plane < to_row):
        inner, inner_count, outer, outer_count = to_plane, planes, to_row, rows
    if inner_count > 1 and inner < to_bytes:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, inner, to_bytes)
    to_bytes += (inner_count - 1) * inner
    if outer_count > 1 and outer < to_bytes:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, outer, to_bytes)
    needs = READABLE if load else WRITABLE
    if accumulate:
        needs = READABLE | WRITABLE
    fault = _slot(st, f, needs)
    if fault:
        return fault
    read_rows = rows - pad_rows
    transfers = read_rows > 0 and pad_cols < cols
    first, last = np.int64(0), np.int64(-1)
    slot = SLOTS + SLOT_WORDS * st[f + 1]
    if transfers:
        reach, plane_reach = (read_rows - 1) * mem_row, (planes - 1) * mem_plane
        first = st[f + 2] + min(reach, 0) + min(plane_reach, 0)
        last = st[f + 2] + max(reach, 0) + max(plane_reach, 0) + bytes_mem - 1
        if first < 0 or last >= st[slot + 1]:
            return fail(st, OUT_OF_SLOT, details.SLOT_BOUNDS, first, last)
    extent = (planes - 1) * plane + (rows - 1) * row + bytes_local
    if _outside(st, st[f + 3], extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, st[f + 3], extent)
    if st[f + 3] >> 31 and local_unit != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, st[f + 3], 0)
    if load:
        _write_local(st, e, st[f + 3], extent)
    else:
        _read_local(st, e, st[f + 3], extent)
    atoms, mem_rows = np.int64(0), np.int64(0)
    if transfers:
        physical = DRAM_SPACE + st[slot] + first
        if load or accumulate:
            _read(st, e, physical, last - first + 1, DRAM_BIT)
        if not load:
            _write(st, e, physical, last - first + 1, DRAM_BIT)
        start = st[slot] + st[f + 2]
        long, each, of = merged(bytes_mem, read_rows, mem_row, planes, mem_plane)
        mem_rows = each * of
        atoms = atoms_of(start, long, each, mem_row, of, mem_plane)
    if not load:
        bytes_local, rows, planes = merged(bytes_local, rows, row, planes, plane)
        cycles = rows * planes * ceil_div(bytes_local, st[PORT_BYTES])
        store_time(st, e, mem_rows, atoms, cycles, mem, local, accumulate)
    elif pad_rows + pad_cols > 0:
        one_row = planes * ceil_div(bytes_local, st[PORT_BYTES])
        right = ceil_div(row_bytes(local, st[f + 12] >> 16), st[PORT_BYTES])
        load_time(st, e, mem_rows, atoms, read_rows * one_row, pad_rows * one_row, right)
    else:
        bytes_local, rows, planes = merged(bytes_local, rows, row, planes, plane)
        cycles = rows * planes * ceil_div(bytes_local, st[PORT_BYTES])
        load_time(st, e, mem_rows, atoms, cycles, np.int64(0), np.int64(0))
    return READY


@jit
def _prepare_indexed(st, e, bank):
    """gather (bank 3) and scatter (bank 4), all but the indices."""
    gather = bank == 3
    fault = _transfer_codes(st, bank, not gather)
    if fault:
        return fault
    f = FIELDS + 16 * bank
    mem, local, accumulate = st[f] & 15, (st[f] >> 4) & 15, (st[f] >> 8) & 1
    cols, rows = st[f + 4], st[f + 5]
    if cols == 0 or rows == 0:
        return EMPTY
    local_unit, mem_unit = element_bytes(local), element_bytes(mem)
    if (st[f + 3] | st[f + 9]) & (local_unit - 1):
        return fail(st, MISALIGNED, details.ALIGNMENT, st[f + 3], local_unit)
    if (st[f + 2] | st[f + 7]) & (mem_unit - 1):
        return fail(st, MISALIGNED, details.ALIGNMENT, st[f + 2], mem_unit)
    if st[f + 6] & 3:
        return fail(st, MISALIGNED, details.ALIGNMENT, st[f + 6], 4)
    if max(cols, rows) > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(cols, rows), COUNT_LIMIT)
    if mem == I4 and cols & 1:
        return fail(st, BAD_FIELD, details.ODD_I4, cols, 0)
    bytes_local = row_bytes(local, cols)
    if gather and rows > 1 and st[f + 9] < bytes_local:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, st[f + 9], bytes_local)
    needs = READABLE if gather else WRITABLE
    if accumulate:
        needs = READABLE | WRITABLE
    fault = _slot(st, f, needs)
    if fault:
        return fault
    extent = (rows - 1) * st[f + 9] + bytes_local
    if _outside(st, st[f + 3], extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, st[f + 3], extent)
    if _outside(st, st[f + 6], 4 * rows):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, st[f + 6], 4 * rows)
    if st[f + 3] >> 31 and local_unit != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, st[f + 3], 0)
    if st[f + 6] >> 31:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, st[f + 6], 0)
    if gather:
        if _overlap(st[f + 3], extent, st[f + 6], 4 * rows):
            return fail(st, BAD_FIELD, details.OVERLAP, st[f + 6], 0)
        _write_local(st, e, st[f + 3], extent)
    else:
        _read_local(st, e, st[f + 3], extent)
    return READY


@jit
def finish_indexed(st, e, bank):
    """The rest of gather and scatter, once the index tile can be read: READY or GATHER_INDEX."""
    f = FIELDS + 16 * bank
    mem, local, accumulate = st[f] & 15, (st[f] >> 4) & 15, (st[f] >> 8) & 1
    cols, rows, stride = st[f + 4], st[f + 5], signed(st[f + 7])
    row = row_bytes(mem, cols)
    slot = SLOTS + SLOT_WORDS * st[f + 1]
    indices = local_at(st, st[f + 6])
    atoms = np.int64(0)
    first, last = np.int64(1) << 62, np.int64(-1)
    for r in range(rows):
        start = st[f + 2] + load_i32(indices, r) * stride
        end = start + row - 1
        if start < 0 or end >= st[slot + 1]:
            return fail(st, GATHER_INDEX, details.INDEX, load_i32(indices, r), row)
        first = min(first, start)
        last = max(last, end)
        atoms += (end >> ATOM_SHIFT) - (start >> ATOM_SHIFT) + 1
    _read(st, e, st[f + 6], 4 * rows, INDEX_BIT)
    physical = DRAM_SPACE + st[slot] + first
    if bank == 3 or accumulate:
        _read(st, e, physical, last - first + 1, DRAM_BIT)
    if bank == 4:
        _write(st, e, physical, last - first + 1, DRAM_BIT)
    cycles = rows * ceil_div(row_bytes(local, cols), st[PORT_BYTES])
    if bank == 3:
        load_time(st, e, rows, atoms, cycles, np.int64(0), np.int64(0))
    else:
        store_time(st, e, rows, atoms, cycles, mem, local, accumulate)
    return READY


@jit
def _prepare_matmul(st, e):
    f = FIELDS + 16 * 5
    go = st[f]
    if _reserved(st, 5, 0x73):
        return _bad_go(st, 5)
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
        if _outside(st, a, a_extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, a, a_extent)
        if _outside(st, b, b_extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, b, b_extent)
        if _outside(st, acc | 0x80000000, acc_extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, acc, acc_extent)
        if (a | b) >> 31:
            return fail(st, BAD_FIELD, details.ACC_FORMAT, max(a, b), 0)
        _read_local(st, e, a, a_extent)
        _read_local(st, e, b, b_extent)
        shared = (bank_mask(st, a, a_extent) & bank_mask(st, b, b_extent)) != 0
    elif _outside(st, acc | 0x80000000, acc_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, acc, acc_extent)
    _read_local(st, e, acc | 0x80000000, acc_extent)
    _write_local(st, e, acc | 0x80000000, acc_extent)
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
    if _reserved(st, 6, 0xFFFF):
        return _bad_go(st, 6)
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
        fault = _multiple(
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
        if _outside(st, address, extent):
            return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, address, extent)
        if address >> 31 and element_bytes(dtype) != 4:
            acc_fault = address
        in_place = (
            kind == TILE
            and address == target
            and stride == target_row
            and element_bytes(dtype) == element_bytes(target_type)
        )
        if not in_place and _overlap(address, extent, target, target_extent):
            overlap_fault = address
        mask = bank_mask(st, address, extent)
        if k == 0:
            a_banks = mask
        elif k == 1:
            b_banks = mask
        else:
            c_banks = mask
        _read(st, e, _space(address), extent, mask)
    if _outside(st, target, target_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, target_extent)
    if target >> 31 and element_bytes(target_type) != 4:
        acc_fault = target
    if acc_fault >= 0:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, acc_fault, 0)
    if overlap_fault >= 0:
        return fail(st, BAD_FIELD, details.OVERLAP, overlap_fault, 0)
    _write_local(st, e, target, target_extent)
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
    if _reserved(st, 7, 0xF3F):
        return _bad_go(st, 7)
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
    fault = _multiple(st, source | source_row, element_bytes(dtype))
    if fault:
        return fault
    fault = _multiple(st, state | state_row, 4)
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
    if cols > 0 and _outside(st, source, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, source, extent)
    if _outside(st, state, state_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, state, state_extent)
    if cols > 0:
        if source >> 31 and element_bytes(dtype) != 4:
            return fail(st, BAD_FIELD, details.ACC_FORMAT, source, 0)
        if _overlap(source, extent, state, state_extent):
            return fail(st, BAD_FIELD, details.OVERLAP, source, 0)
        _read_local(st, e, source, extent)
    if not first:
        _read_local(st, e, state, state_extent)
    _write_local(st, e, state, state_extent)
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
    if _reserved(st, 8, 0xFF):
        return _bad_go(st, 8)
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
    fault = _multiple(st, state | state_row, 4)
    if fault:
        return fault
    size = element_bytes(dtype)
    fault = _multiple(st, target | target_row, size)
    if fault:
        return fault
    fault = _count(st, rows)
    if fault:
        return fault
    if rows > 1 and target_row < size:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, target_row, size)
    words = 2 * STATE_LANES if op == ARGMAX else STATE_LANES
    extent = (rows - 1) * state_row + 4 * words
    target_extent = (rows - 1) * target_row + size
    if _outside(st, state, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, state, extent)
    if _outside(st, target, target_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, target_extent)
    if target >> 31 and size != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, target, 0)
    if _overlap(state, extent, target, target_extent):
        return fail(st, BAD_FIELD, details.OVERLAP, state, 0)
    _read_local(st, e, state, extent)
    _write_local(st, e, target, target_extent)
    st[e + E_OCCUPANCY] = rows * 2 * ceil_div(STATE_LANES, min(st[LANES], STATE_LANES)) + 24
    st[e + E_TAIL] = 8
    return READY


@jit
def _prepare_transpose(st, e):
    f = FIELDS + 16 * 9
    if _reserved(st, 9, 0xF):
        return _bad_go(st, 9)
    dtype = st[f] & 15
    if dtype > I8:
        return fail(st, BAD_FIELD, details.OPERAND_FORMAT, dtype, 0)
    source, source_row, rows, cols = st[f + 1], st[f + 2], st[f + 3], st[f + 4]
    target, target_row = st[f + 5], st[f + 6]
    if rows == 0 or cols == 0:
        return EMPTY
    size = element_bytes(dtype)
    fault = _multiple(st, source | source_row | target | target_row, size)
    if fault:
        return fault
    if max(rows, cols) > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(rows, cols), COUNT_LIMIT)
    if cols > 1 and target_row < rows * size:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, target_row, rows * size)
    extent = (rows - 1) * source_row + cols * size
    target_extent = (cols - 1) * target_row + rows * size
    if _outside(st, source, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, source, extent)
    if _outside(st, target, target_extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, target_extent)
    if (source | target) >> 31 and size != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, max(source, target), 0)
    if _overlap(source, extent, target, target_extent):
        return fail(st, BAD_FIELD, details.OVERLAP, source, 0)
    _read_local(st, e, source, extent)
    _write_local(st, e, target, target_extent)
    side = st[LANES]
    blocks = ceil_div(rows, side) * ceil_div(cols, side)
    st[e + E_OCCUPANCY] = blocks * side + side
    st[e + E_TAIL] = 8
    return READY


@jit
def _prepare_iota(st, e):
    f = FIELDS + 16 * 10
    if _reserved(st, 10, 0):
        return _bad_go(st, 10)
    target, target_row, rows, cols = st[f + 1], st[f + 2], st[f + 3], st[f + 4]
    if rows == 0 or cols == 0:
        return EMPTY
    fault = _multiple(st, target | target_row, 4)
    if fault:
        return fault
    if max(rows, cols) > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, max(rows, cols), COUNT_LIMIT)
    if rows > 1 and target_row < 4 * cols:
        return fail(st, BAD_FIELD, details.ROW_STRIDE, target_row, 4 * cols)
    extent = (rows - 1) * target_row + 4 * cols
    if _outside(st, target, extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, target, extent)
    _write_local(st, e, target, extent)
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
        return _prepare_3d(st, e, bank)
    if bank <= 4:
        return _prepare_indexed(st, e, bank)
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
