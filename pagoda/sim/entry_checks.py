"""What the checks of all commands share: faults, hulls of local memory and what they touch."""

from __future__ import annotations

import numpy as np

from pagoda.isa.fault import FaultKind
from pagoda.sim import details
from pagoda.sim.jit import jit
from pagoda.sim.layout import (
    ACC_BANK_SHIFT,
    ACC_BYTES,
    ACC_SPACE,
    E_READ_BANKS,
    E_READ_RANGES,
    E_READS,
    E_WRITE_BANKS,
    E_WRITE_FIRST,
    E_WRITE_LAST,
    FAULT_DETAIL,
    FAULT_VALUE,
    FAULT_VALUE_2,
    FIELDS,
    SRAM_BANK_SHIFT,
    SRAM_BYTES,
)

READY, EMPTY = 0, -1
MISALIGNED = int(FaultKind.MISALIGNED)
BAD_FIELD = int(FaultKind.BAD_FIELD)
LOCAL_OUT_OF_RANGE = int(FaultKind.LOCAL_OUT_OF_RANGE)
COUNT_LIMIT = 1 << 20


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
def outside(st, address, extent):
    size = st[ACC_BYTES] if address >> 31 else st[SRAM_BYTES]
    return (address & 0x7FFFFFFF) + extent > size


@jit
def unified(address):
    """A local address in the space of all memories."""
    return address if address < 0x80000000 else (address & 0x7FFFFFFF) + ACC_SPACE


@jit
def reads(st, e, first, extent, banks):
    at = e + E_READ_RANGES + 2 * st[e + E_READS]
    st[at] = first
    st[at + 1] = first + extent - 1
    st[e + E_READS] += 1
    st[e + E_READ_BANKS] |= banks


@jit
def writes(st, e, first, extent, banks):
    st[e + E_WRITE_FIRST] = first
    st[e + E_WRITE_LAST] = first + extent - 1
    st[e + E_WRITE_BANKS] |= banks


@jit
def reads_local(st, e, address, extent):
    reads(st, e, unified(address), extent, bank_mask(st, address, extent))


@jit
def writes_local(st, e, address, extent):
    writes(st, e, unified(address), extent, bank_mask(st, address, extent))


@jit
def overlap(a, a_extent, b, b_extent):
    """Whether two local hulls share a byte."""
    a, b = unified(a), unified(b)
    return (a < b + b_extent) & (b < a + a_extent)


@jit
def reserved(st, bank, allowed):
    """Whether the go word of a bank has bits set outside `allowed`."""
    return (st[FIELDS + 16 * bank] & ~np.int64(allowed)) != 0


@jit
def bad_go(st, bank):
    return fail(st, BAD_FIELD, details.RESERVED, 0, st[FIELDS + 16 * bank])


@jit
def require_multiple(st, value, unit):
    """READY if value is a multiple of a power of two, else the fault."""
    if value & (unit - 1):
        return fail(st, MISALIGNED, details.ALIGNMENT, value, unit)
    return READY


@jit
def require_count(st, value):
    if value > COUNT_LIMIT:
        return fail(st, BAD_FIELD, details.COUNT, value, COUNT_LIMIT)
    return READY
