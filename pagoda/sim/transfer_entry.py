"""Load, store, gather and scatter before they enter the window; see `pagoda.sim.entry`."""

from __future__ import annotations

import numpy as np

from pagoda.isa.fault import FaultKind
from pagoda.sim import details
from pagoda.sim.convert import BF16, F32, I4, I8, I32, U8, element_bytes, is_float, row_bytes
from pagoda.sim.dma import ATOM_SHIFT, atoms_of, ceil_div, load_time, merged, store_time
from pagoda.sim.entry_checks import (
    BAD_FIELD,
    COUNT_LIMIT,
    EMPTY,
    LOCAL_OUT_OF_RANGE,
    MISALIGNED,
    READY,
    bad_go,
    fail,
    outside,
    overlap,
    reads,
    reads_local,
    reserved,
    writes,
    writes_local,
)
from pagoda.sim.jit import jit, load_i32
from pagoda.sim.layout import (
    DRAM_BIT,
    DRAM_SPACE,
    FIELDS,
    INDEX_BIT,
    PORT_BYTES,
    READABLE,
    SLOT_COUNT,
    SLOT_WORDS,
    SLOTS,
    WRITABLE,
)
from pagoda.sim.transfer import local_at, signed

BAD_SLOT = int(FaultKind.BAD_SLOT)
NO_PERMISSION = int(FaultKind.NO_PERMISSION)
OUT_OF_SLOT = int(FaultKind.OUT_OF_SLOT)
GATHER_INDEX = int(FaultKind.GATHER_INDEX)


@jit
def _transfer_codes(st, bank, accumulates):
    """Step 1 for load, store, gather, scatter."""
    f = FIELDS + 16 * bank
    if reserved(st, bank, 0x1FF if accumulates else 0xFF):
        return bad_go(st, bank)
    mem, local = st[f] & 15, (st[f] >> 4) & 15
    if mem > U8 or local > I8 or is_float(mem) != is_float(local):
        return fail(st, BAD_FIELD, details.FORMATS, mem, local)
    if (st[f] >> 8) & 1 and mem != F32 and mem != BF16 and mem != I32:
        return fail(st, BAD_FIELD, details.ACCUMULATE_FORMAT, mem, 0)
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
def prepare_3d(st, e, bank):
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
    if outside(st, st[f + 3], extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, st[f + 3], extent)
    if st[f + 3] >> 31 and local_unit != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, st[f + 3], 0)
    if load:
        writes_local(st, e, st[f + 3], extent)
    else:
        reads_local(st, e, st[f + 3], extent)
    atoms, mem_rows = np.int64(0), np.int64(0)
    if transfers:
        physical = DRAM_SPACE + st[slot] + first
        if load or accumulate:
            reads(st, e, physical, last - first + 1, DRAM_BIT)
        if not load:
            writes(st, e, physical, last - first + 1, DRAM_BIT)
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
def prepare_indexed(st, e, bank):
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
    if outside(st, st[f + 3], extent):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, st[f + 3], extent)
    if outside(st, st[f + 6], 4 * rows):
        return fail(st, LOCAL_OUT_OF_RANGE, details.LOCAL_BOUNDS, st[f + 6], 4 * rows)
    if st[f + 3] >> 31 and local_unit != 4:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, st[f + 3], 0)
    if st[f + 6] >> 31:
        return fail(st, BAD_FIELD, details.ACC_FORMAT, st[f + 6], 0)
    if gather:
        if overlap(st[f + 3], extent, st[f + 6], 4 * rows):
            return fail(st, BAD_FIELD, details.OVERLAP, st[f + 6], 0)
        writes_local(st, e, st[f + 3], extent)
    else:
        reads_local(st, e, st[f + 3], extent)
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
    reads(st, e, st[f + 6], 4 * rows, INDEX_BIT)
    physical = DRAM_SPACE + st[slot] + first
    if bank == 3 or accumulate:
        reads(st, e, physical, last - first + 1, DRAM_BIT)
    if bank == 4:
        writes(st, e, physical, last - first + 1, DRAM_BIT)
    cycles = rows * ceil_div(row_bytes(local, cols), st[PORT_BYTES])
    if bank == 3:
        load_time(st, e, rows, atoms, cycles, np.int64(0), np.int64(0))
    else:
        store_time(st, e, rows, atoms, cycles, mem, local, accumulate)
    return READY
