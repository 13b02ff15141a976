"""How long load, store, gather and scatter take: the two sides of a transfer, row by row."""

from __future__ import annotations

import numpy as np

from pagoda.sim.convert import row_bytes
from pagoda.sim.jit import jit
from pagoda.sim.layout import (
    DRAM_LATENCY,
    E_DRAM_BYTES,
    E_LEAD,
    E_OCCUPANCY,
    E_TAIL,
    PERIOD_DENOMINATOR,
    PERIOD_NUMERATOR,
    PORT_BYTES,
)

ATOM_BYTES, ATOM_SHIFT = 64, 6


@jit
def ceil_div(a, b):
    return (a + b - 1) // b


@jit
def merged(row, rows, row_stride, planes, plane_stride):
    """Bytes of a row, rows and planes after merging rows, then planes."""
    if rows == 1 or row_stride == row:
        row *= rows
        rows = 1
        if planes == 1 or plane_stride == row:
            row *= planes
            planes = 1
    return row, rows, planes


@jit
def atoms_of(first, row, rows, row_stride, planes, plane_stride):
    """Aligned 64-byte atoms that merged rows touch."""
    if (row_stride & 63) == 0 and ((plane_stride & 63) == 0 or planes == 1):
        each = ((first + row - 1) >> ATOM_SHIFT) - (first >> ATOM_SHIFT) + 1
        return each * rows * planes
    total = np.int64(0)
    for p in range(planes):
        for r in range(rows):
            here = first + p * plane_stride + r * row_stride
            total += ((here + row - 1) >> ATOM_SHIFT) - (here >> ATOM_SHIFT) + 1
    return total


@jit
def dma_cycles(st, rows, atoms, local_cycles, ways):
    """Cycles from the first atom slot when every row takes the longer of its two sides.

    No product overflows: rows <= 2^20 and atoms < 2^37 + 2^20 (2^20 elements of 8 bytes in a row),
    local_cycles <= 2^39 (8 bytes a cycle), and of the slot's X = n / d n <= 2^24, d < 2^26.
    """
    n, d = ways * st[PERIOD_NUMERATOR], st[PERIOD_DENOMINATOR]
    few = atoms // rows
    many = atoms - few * rows
    if not _longer(local_cycles, rows, few * n, d):
        return ceil_div(atoms * n, d)
    if many == 0 or _longer(local_cycles, rows, (few + 1) * n, d):
        return local_cycles
    port, dram = (rows - many) * local_cycles, many * (few + 1) * n
    rest = ceil_div(port % rows * d + dram % d * rows, rows * d)
    return port // rows + dram // d + rest


@jit
def _longer(a, b, c, d):
    """Whether a / b > c / d."""
    if a // b != c // d:
        return a // b > c // d
    return a % b * d > c % d * b


@jit
def load_time(st, e, mem_rows, atoms, cycles, padding, right):
    """load and gather. Cycles of the local rows with data, of the others, of the last zeros."""
    late = ceil_div(st[PERIOD_NUMERATOR], st[PERIOD_DENOMINATOR])
    st[e + E_DRAM_BYTES] = atoms << ATOM_SHIFT
    st[e + E_OCCUPANCY] = cycles + padding
    st[e + E_TAIL] = st[DRAM_LATENCY] + 8 + late
    if atoms > 0:
        paced = dma_cycles(st, mem_rows, atoms, cycles, 1) + right
        st[e + E_OCCUPANCY] = max(paced, cycles + padding)
        st[e + E_LEAD] = 0


@jit
def store_time(st, e, mem_rows, atoms, cycles, mem, local, accumulate):
    """store and scatter."""
    late = ceil_div(st[PERIOD_NUMERATOR], st[PERIOD_DENOMINATOR])
    st[e + E_DRAM_BYTES] = atoms << accumulate << ATOM_SHIFT
    st[e + E_OCCUPANCY] = dma_cycles(st, mem_rows, atoms, cycles, 1 + accumulate)
    if accumulate:
        st[e + E_OCCUPANCY] += st[DRAM_LATENCY] + 8 + late
    st[e + E_TAIL] = 12 + late
    # The bytes in SRAM of what fills one atom; 128 elements are whole bytes in every format.
    atom_bytes = row_bytes(local, 128) * ATOM_BYTES // row_bytes(mem, 128)
    st[e + E_LEAD] = ceil_div(atom_bytes, st[PORT_BYTES])
