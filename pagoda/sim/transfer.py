"""Values of load, store, gather and scatter. The command has been checked; addresses are safe."""

from __future__ import annotations

import numpy as np

from pagoda.sim.convert import add_row, convert_row, row_bytes
from pagoda.sim.jit import atomic_load, copy_bytes, jit, load_i32, zero_bytes
from pagoda.sim.layout import (
    ABANDONED,
    ACC_AT,
    DRAM_AT,
    FIELDS,
    JOBS_AT,
    LANE_BUFFER_BYTES,
    LANES_AT,
    SLOT_WORDS,
    SLOTS,
    SRAM_AT,
)

_PIECE = 256


@jit
def signed(word):
    """A field word (0 .. 2^32-1) read as two's complement."""
    return np.int64(np.int32(word))


@jit
def local_at(st, address):
    """Host address of a local address."""
    if address >> 31:
        return st[ACC_AT] + (address & 0x7FFFFFFF)
    return st[SRAM_AT] + address


@jit
def slot_at(st, slot, offset):
    """Host address of a byte of a slot."""
    return st[DRAM_AT] + st[SLOTS + SLOT_WORDS * slot] + offset


@jit
def is_abandoned(st):
    """Whether the launch was interrupted. Commands that can take longer than a second look now and
    then, and leave: with strides of 0 few bytes are enough for a minute of work."""
    return atomic_load(st[JOBS_AT] + 8 * ABANDONED) != 0


@jit
def copy_long(target, source, nbytes):
    """`copy_bytes` in pieces: the C library copies 256 bytes at a time a third faster from DRAM
    than many at once, for which it prefers other instructions."""
    done = 0
    while nbytes - done > _PIECE:
        copy_bytes(target + done, source + done, _PIECE)
        done += _PIECE
    copy_bytes(target + done, source + done, nbytes - done)


@jit
def run_load(st, bank):
    """Copy into local memory, converting and padding. Returns whether an int64 did not fit."""
    f = FIELDS + 16 * bank
    mem, local = st[f] & 15, (st[f] >> 4) & 15
    cols, rows, planes = st[f + 4], st[f + 5], st[f + 6]
    above, below = st[f + 11] & 0xFFFF, st[f + 11] >> 16
    left, right = st[f + 12] & 0xFFFF, st[f + 12] >> 16
    source = slot_at(st, st[f + 1], st[f + 2])
    target = local_at(st, st[f + 3])
    source_row, source_plane = signed(st[f + 7]), signed(st[f + 8])
    target_row, target_plane = st[f + 9], st[f + 10]
    row = row_bytes(local, cols)
    inner = cols - left - right
    inner_rows = rows - above - below
    overflow = False
    lanes = st[LANES_AT]
    if left + right + above + below == 0 and (
        (source_row == row_bytes(mem, cols) and target_row == row) or rows == 1
    ):
        # A plane is one long row, and often the tile is one long plane.
        inner = cols * rows
        if planes > 1 and source_plane == row_bytes(mem, inner) and (
            target_plane == row_bytes(local, inner)
        ):
            inner *= planes
            planes = 1
        for p in range(planes):
            here, place = source + p * source_plane, target + p * target_plane
            if mem == local:
                copy_long(place, here, row_bytes(mem, inner))
            else:
                overflow |= convert_row(here, mem, place, local, inner, lanes)
        return overflow
    if mem == local and left + right + above + below == 0:
        for p in range(planes):
            here, place = source + p * source_plane, target + p * target_plane
            for r in range(rows):
                copy_bytes(place + r * target_row, here + r * source_row, row)
        return False
    pad = row_bytes(local, left)
    for p in range(planes):
        for r in range(rows):
            place = target + p * target_plane + r * target_row
            if r < above or r >= above + inner_rows or inner == 0:
                zero_bytes(place, row)
                continue
            if pad > 0:
                zero_bytes(place, pad)
            if right > 0:
                zero_bytes(place + row - row_bytes(local, right), row_bytes(local, right))
            here = source + p * source_plane + (r - above) * source_row
            overflow |= convert_row(here, mem, place + pad, local, inner, lanes)
    return overflow


@jit
def run_store(st, bank):
    """Copy to a slot, converting, or add to what is there."""
    f = FIELDS + 16 * bank
    mem, local, accumulate = st[f] & 15, (st[f] >> 4) & 15, (st[f] >> 8) & 1
    cols, rows, planes = st[f + 4], st[f + 5], st[f + 6]
    target = slot_at(st, st[f + 1], st[f + 2])
    source = local_at(st, st[f + 3])
    target_row, target_plane = signed(st[f + 7]), signed(st[f + 8])
    source_row, source_plane = st[f + 9], st[f + 10]
    if rows == 1 or (
        target_row == row_bytes(mem, cols) and source_row == row_bytes(local, cols)
    ):
        cols *= rows
        rows = 1
    lanes = st[LANES_AT]
    for p in range(planes):
        for r in range(rows):
            if is_abandoned(st):
                return
            here = source + p * source_plane + r * source_row
            place = target + p * target_plane + r * target_row
            if accumulate:
                add_row(here, local, place, mem, cols, lanes, lanes + LANE_BUFFER_BYTES)
            else:
                convert_row(here, local, place, mem, cols, lanes)


@jit
def run_gather(st, bank):
    """Copy the rows that the index tile names. Returns whether an int64 did not fit."""
    f = FIELDS + 16 * bank
    mem, local = st[f] & 15, (st[f] >> 4) & 15
    cols, rows, stride = st[f + 4], st[f + 5], signed(st[f + 7])
    source = slot_at(st, st[f + 1], st[f + 2])
    target = local_at(st, st[f + 3])
    indices = local_at(st, st[f + 6])
    overflow = False
    for r in range(rows):
        here = source + load_i32(indices, r) * stride
        overflow |= convert_row(
            here, mem, target + r * st[f + 9], local, cols, st[LANES_AT]
        )
    return overflow


@jit
def run_scatter(st, bank):
    """Copy or add rows to the places that the index tile names, in order."""
    f = FIELDS + 16 * bank
    mem, local, accumulate = st[f] & 15, (st[f] >> 4) & 15, (st[f] >> 8) & 1
    cols, rows, stride = st[f + 4], st[f + 5], signed(st[f + 7])
    target = slot_at(st, st[f + 1], st[f + 2])
    source = local_at(st, st[f + 3])
    indices = local_at(st, st[f + 6])
    lanes = st[LANES_AT]
    for r in range(rows):
        if is_abandoned(st):
            return
        place = target + load_i32(indices, r) * stride
        here = source + r * st[f + 9]
        if accumulate:
            add_row(here, local, place, mem, cols, lanes, lanes + LANE_BUFFER_BYTES)
        else:
            convert_row(here, local, place, mem, cols, lanes)
