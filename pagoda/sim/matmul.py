"""Values of the matmul command (bank 5), at the host's vector FMA speed.

`run_matmul` computes what the contract says, to the bit: each output is one chain of fused
multiply-adds in increasing k from the old accumulator, so blocking over m, n and k, vectors and
threads change nothing. Operands are widened once per block to fp32 panels in `scratch`; int8
products use the same panels, because a chain of fewer than 2**10 int8 products is exact in fp32.

Canonical NaNs are made when a tile is written back and not at every step: a NaN accumulator
makes every later step NaN, and no step sees more of a NaN than that it is one.
"""

import numpy as np
from numba import njit

from pagoda.sim.microkernel import (
    BF16,
    INT8,
    TILE_COLUMNS,
    TILE_ROWS,
    VECTOR_LENGTH,
    fma_tile,
    transpose_bf16,
    transpose_int8,
    widen_bf16,
    widen_int8,
)

# fields of the command (contract, bank 5)
GO, A, M0, M0_STRIDE, M1, M1_STRIDE, M2, M2_STRIDE = range(8)
K_INNER, K_OUTER, K_OUTER_STRIDE, B, B_STRIDE, N, ACC, ACC_STRIDE = range(8, 16)
TYPE_MASK, ACCUMULATE, TRANSPOSE_A, TRANSPOSE_B = 0x3, 0x10, 0x20, 0x40

# Block sizes: a B panel (K_BLOCK x TILE_COLUMNS) stays in a first-level cache, a block of A and
# of B together in a second-level one. K_BLOCK < 2**10 keeps int8 sums exact.
K_BLOCK = 128
M_BLOCK = 128
N_BLOCK = 256
# Rows of widened A are padded: vectors may be written past the end, and rows a power of two
# bytes apart would share cache sets.
_A_ROW = 4 * (max(K_BLOCK, M_BLOCK) + 2 * VECTOR_LENGTH)
_PANEL_BYTES = 4 * K_BLOCK * TILE_COLUMNS
_PANELS_AT = 0
_A_AT = _PANELS_AT + _PANEL_BYTES * (N_BLOCK // TILE_COLUMNS)
_TILE_AT = _A_AT + _A_ROW * max(K_BLOCK, M_BLOCK)
_TILE_ROW = 4 * TILE_COLUMNS
_STAGING_AT = _TILE_AT + _TILE_ROW * TILE_ROWS
_STAGING_ROW = 4 * VECTOR_LENGTH
SCRATCH_BYTES = _STAGING_AT + _STAGING_ROW * VECTOR_LENGTH + 64
"""Bytes `run_matmul` needs in `scratch`; its contents mean nothing between calls."""


@njit(nogil=True)
def _widen(target, sram, offset, count, size, staging):
    """`count` elements of `size` bytes at sram[offset] -> fp32 at the address `target`; writes
    whole vectors."""
    vectors = (count + VECTOR_LENGTH - 1) // VECTOR_LENGTH
    source = sram.ctypes.data + offset
    if offset + vectors * VECTOR_LENGTH * size > sram.size:
        # the last vector would be read past the end of the memory
        vectors = count // VECTOR_LENGTH
        done = vectors * VECTOR_LENGTH
        for i in range((count - done) * size):
            staging[i] = sram[offset + done * size + i]
        if size == 2:
            widen_bf16(target + 4 * done, staging.ctypes.data, 1)
        else:
            widen_int8(target + 4 * done, staging.ctypes.data, 1)
    if vectors > 0:
        if size == 2:
            widen_bf16(target, source, vectors)
        else:
            widen_int8(target, source, vectors)


@njit(nogil=True)
def _transpose(target, sram, offset, stride, rows, count, size, staging):
    """`rows` <= VECTOR_LENGTH rows of `count` elements of B, transposed into a panel; writes a
    whole vector of columns and whole blocks of k."""
    block = 4 * VECTOR_LENGTH // size
    blocks = (count + block - 1) // block
    source = sram.ctypes.data + offset
    last = offset + (VECTOR_LENGTH - 1) * stride + blocks * 4 * VECTOR_LENGTH
    if last <= sram.size:
        if size == 2:
            transpose_bf16(target, source, stride, blocks)
        else:
            transpose_int8(target, source, stride, blocks)
        return
    for first in range(0, count, block):
        length = min(block, count - first) * size
        for row in range(rows):
            row_offset = offset + row * stride + first * size
            for i in range(length):
                staging[row * _STAGING_ROW + i] = sram[row_offset + i]
        block_target = target + first * 4 * TILE_COLUMNS
        if size == 2:
            transpose_bf16(block_target, staging.ctypes.data, _STAGING_ROW, 1)
        else:
            transpose_int8(block_target, staging.ctypes.data, _STAGING_ROW, 1)


@njit(nogil=True)
def _pack_b(panels, sram, fields, size, k, k_count, n, n_count, staging):
    """B[k : k + k_count, n : n + n_count] -> panels of K_BLOCK rows of TILE_COLUMNS floats."""
    base, stride = fields[B], fields[B_STRIDE]
    if fields[GO] & TRANSPOSE_B:
        for j in range(0, n_count, VECTOR_LENGTH):
            panel = j // TILE_COLUMNS
            target = panels + panel * _PANEL_BYTES + 4 * (j - panel * TILE_COLUMNS)
            offset = base + (n + j) * stride + k * size
            rows = min(VECTOR_LENGTH, n_count - j)
            _transpose(target, sram, offset, stride, rows, k_count, size, staging)
        return
    for i in range(k_count):
        offset = base + (k + i) * stride + n * size
        for j in range(0, n_count, TILE_COLUMNS):
            target = panels + (j // TILE_COLUMNS) * _PANEL_BYTES + i * 4 * TILE_COLUMNS
            columns = min(TILE_COLUMNS, n_count - j)
            _widen(target, sram, offset + j * size, columns, size, staging)


@njit(nogil=True)
def _pack_a(rows, sram, fields, size, m, m_count, k, k_count, staging):
    """A[m : m + m_count, k : k + k_count] -> fp32 rows _A_ROW bytes apart, one per m, or one per
    k if A is stored transposed."""
    base = fields[A]
    if fields[GO] & TRANSPOSE_A:
        for i in range(k_count):
            offset = base + (k + i) * fields[M0_STRIDE] + m * size
            _widen(rows + i * _A_ROW, sram, offset, m_count, size, staging)
        return
    inner = fields[K_INNER]
    for i in range(m_count):
        i12, i0 = divmod(m + i, fields[M0])
        i2, i1 = divmod(i12, fields[M1])
        offset = (
            base + i2 * fields[M2_STRIDE] + i1 * fields[M1_STRIDE] + i0 * fields[M0_STRIDE]
        )
        outer, start = divmod(k, inner)
        done = 0
        while done < k_count:
            length = min(inner - start, k_count - done)
            piece = offset + outer * fields[K_OUTER_STRIDE] + start * size
            _widen(rows + i * _A_ROW + 4 * done, sram, piece, length, size, staging)
            done += length
            outer += 1
            start = 0


@njit(nogil=True)
def _add_tile(acc32, tile, target, stride, rows, columns, from_zero):
    """int8: adds an exact fp32 tile to int32 accumulators, which wrap."""
    for i in range(rows):
        sums = tile[i * TILE_COLUMNS : i * TILE_COLUMNS + columns]
        outputs = acc32[target + i * stride : target + i * stride + columns]
        for j in range(columns):
            old = np.int32(0) if from_zero else outputs[j]
            outputs[j] = np.int32(old + np.int32(sums[j]))


@njit(nogil=True)
def _tiles(acc, acc32, fields, a, a_row, a_k, panels, m, m_count, n, n_count, k_count, zero, tile):
    """One block of outputs += packed A block * packed B block."""
    base, stride = fields[ACC], fields[ACC_STRIDE]
    direct = (fields[GO] & TYPE_MASK) == BF16
    groups = (m_count + TILE_ROWS - 1) // TILE_ROWS
    for j in range(0, n_count, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, n_count - j)
        vectors = (columns + VECTOR_LENGTH - 1) // VECTOR_LENGTH
        whole = columns == vectors * VECTOR_LENGTH
        panel = panels + (j // TILE_COLUMNS) * _PANEL_BYTES
        i = 0
        for group in range(groups):
            # rows spread evenly over the tiles: 128 rows = 18 tiles of 6 and 4 of 5
            rows = (m_count - i + groups - group - 1) // (groups - group)
            target = base + (m + i) * stride + 4 * (n + j)
            a_tile = a + i * a_row
            if direct and whole:
                address = acc.ctypes.data + target
                fma_tile(
                    rows, vectors, a_tile, a_row, a_k, panel, address, stride, k_count, zero
                )
            else:
                if direct and not zero:
                    _copy(tile, 0, TILE_COLUMNS, acc32, target >> 2, stride >> 2, rows, columns)
                address = tile.ctypes.data
                clear = 1 if zero or not direct else 0
                fma_tile(
                    rows, vectors, a_tile, a_row, a_k, panel, address, _TILE_ROW, k_count, clear
                )
                if direct:
                    _copy(acc32, target >> 2, stride >> 2, tile, 0, TILE_COLUMNS, rows, columns)
                else:
                    sums = tile.view(np.float32)
                    _add_tile(acc32, sums, target >> 2, stride >> 2, rows, columns, zero)
            i += rows


@njit(nogil=True)
def _copy(target, at, at_stride, source, start, start_stride, rows, columns):
    """`rows` x `columns` words from `source` to `target`; offsets and strides in words."""
    for i in range(rows):
        words = source[start + i * start_stride : start + i * start_stride + columns]
        outputs = target[at + i * at_stride : at + i * at_stride + columns]
        for j in range(columns):
            outputs[j] = words[j]


@njit(nogil=True)
def run_matmul_range(sram, acc, fields, scratch, m_begin, m_end, n_begin, n_end):
    """`run_matmul` for output rows m_begin..m_end and columns n_begin..n_end only.

    Disjoint ranges may run on different threads, each with a scratch of its own.
    """
    if m_begin >= m_end or n_begin >= n_end:
        return
    acc32 = acc.view(np.int32)
    k_total = fields[K_INNER] * fields[K_OUTER]
    accumulate = (fields[GO] & ACCUMULATE) != 0
    if k_total == 0:
        if not accumulate:
            for m in range(m_begin, m_end):
                row = (fields[ACC] + m * fields[ACC_STRIDE]) >> 2
                acc32[row + n_begin : row + n_end] = 0
        return
    size = 1 if (fields[GO] & TYPE_MASK) == INT8 else 2
    aligned = -scratch.ctypes.data % 64
    panels = scratch.ctypes.data + aligned
    a = panels + _A_AT
    tile = scratch[aligned + _TILE_AT : aligned + _STAGING_AT].view(np.int32)
    staging = scratch[aligned + _STAGING_AT :]
    a_row, a_k = _A_ROW, 4
    if fields[GO] & TRANSPOSE_A:
        a_row, a_k = 4, _A_ROW
    for k in range(0, k_total, K_BLOCK):
        k_count = min(K_BLOCK, k_total - k)
        zero = 1 if k == 0 and not accumulate else 0
        for n in range(n_begin, n_end, N_BLOCK):
            n_count = min(N_BLOCK, n_end - n)
            _pack_b(panels, sram, fields, size, k, k_count, n, n_count, staging)
            for m in range(m_begin, m_end, M_BLOCK):
                m_count = min(M_BLOCK, m_end - m)
                _pack_a(a, sram, fields, size, m, m_count, k, k_count, staging)
                _tiles(
                    acc, acc32, fields, a, a_row, a_k, panels, m, m_count, n, n_count,
                    k_count, zero, tile,
                )  # fmt: skip


@njit(nogil=True)
def run_matmul(sram, acc, fields, scratch):
    """One matmul command: ACC[m, n] (+)= sum over k of A[m, k] * B[k, n].

    sram, acc: uint8[:], the core's memories, contiguous; acc 4-byte aligned. fields: int64[16],
    the words of bank 5 as the contract lists them, already checked for legality and range.
    scratch: uint8[SCRATCH_BYTES] or more, one per thread.
    """
    rows = fields[M0] * fields[M1] * fields[M2]
    run_matmul_range(sram, acc, fields, scratch, 0, rows, 0, fields[N])
