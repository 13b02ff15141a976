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

from pagoda.sim.emitter import VECTOR_LENGTH
from pagoda.sim.microkernel import (
    BF16,
    FUSED_ROWS,
    FUSED_VECTORS,
    INT8,
    PACKED_A_ROW,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_VECTORS,
    fma_tall_tile,
    fma_tile,
    fma_tile_bf16,
    fma_tile_transposed,
    tall_rows,
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
N_BLOCK = 256 // TILE_COLUMNS * TILE_COLUMNS
# Up to FUSED_M rows of A it is faster to widen B while multiplying than to pack it first; only A
# is packed, so its blocks may be longer.
FUSED_M = 8
K_LONG = 512
# Vectors may be written past the end of a packed row.
assert PACKED_A_ROW >= 4 * (max(K_BLOCK, M_BLOCK) + VECTOR_LENGTH)
_TALL_ROWS = (0, *(tall_rows(vectors) for vectors in range(1, TILE_VECTORS + 1)))
_PANEL_BYTES = 4 * K_BLOCK * TILE_COLUMNS
_PANELS_AT = 0
# Packed blocks of A, so many, are kept for what next multiplies the same A: `run_matmul_range`.
_KEPT_BLOCKS = 6
_A_BLOCK_BYTES = PACKED_A_ROW * max(K_BLOCK, M_BLOCK)
_A_AT = _PANELS_AT + _PANEL_BYTES * (N_BLOCK // TILE_COLUMNS)
_TILE_AT = _A_AT + _A_BLOCK_BYTES * _KEPT_BLOCKS
_TILE_ROW = 4 * TILE_COLUMNS
_STAGING_AT = _TILE_AT + _TILE_ROW * max(_TALL_ROWS)
_STAGING_ROW = 4 * VECTOR_LENGTH
_LONG_A_AT = _STAGING_AT + _STAGING_ROW * VECTOR_LENGTH
_LONG_A_ROW = 4 * (K_LONG + 2 * VECTOR_LENGTH)
# What is kept: GO's bits that matter, the fields of A and k, rows, and the state of A.
_KEY_AT = _LONG_A_AT + _LONG_A_ROW * FUSED_M
_KEY_STATE, _KEY_WORDS = 13, 14
SCRATCH_BYTES = _KEY_AT + 8 * _KEY_WORDS + 64
"""Bytes that `run_matmul` needs in `scratch`, all zero at first."""


# Called from compiled code only: wrappers for Python would double the time to compile.
_internal = njit(nogil=True, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_internal
def _widen(target, target_stride, sram, offset, stride, rows, count, size, staging):
    """`rows` rows of `count` elements of `size` bytes at sram[offset], `stride` apart -> fp32
    rows at the address `target`; writes whole vectors."""
    vectors = (count + VECTOR_LENGTH - 1) // VECTOR_LENGTH
    whole = rows
    while whole > 0 and (
        offset + (whole - 1) * stride + vectors * VECTOR_LENGTH * size > sram.size
    ):
        # the last vector of this row would be read past the end of the memory
        whole -= 1
    if whole > 0:
        source = sram.ctypes.data + offset
        if size == 2:
            widen_bf16(target, target_stride, source, stride, whole, vectors)
        else:
            widen_int8(target, target_stride, source, stride, whole, vectors)
    staged = staging.ctypes.data
    for row in range(whole, rows):
        for first in range(0, count, VECTOR_LENGTH):
            at = offset + row * stride + first * size
            for i in range(min(VECTOR_LENGTH, count - first) * size):
                staging[i] = sram[at + i]
            vector = target + row * target_stride + 4 * first
            if size == 2:
                widen_bf16(vector, 0, staged, 0, 1, 1)
            else:
                widen_int8(vector, 0, staged, 0, 1, 1)


@_internal
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


@_internal
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
    for j in range(0, n_count, TILE_COLUMNS):
        target = panels + (j // TILE_COLUMNS) * _PANEL_BYTES
        offset = base + k * stride + (n + j) * size
        columns = min(TILE_COLUMNS, n_count - j)
        _widen(target, np.int64(_TILE_ROW), sram, offset, stride, k_count, columns, size, staging)


@_internal
def _pack_a(rows, rows_stride, sram, fields, size, m, m_count, k, k_count, staging):
    """A[m : m + m_count, k : k + k_count] -> fp32 rows `rows_stride` bytes apart, one per m, or
    one per k if A is stored transposed."""
    base, row_stride = fields[A], fields[M0_STRIDE]
    if fields[GO] & TRANSPOSE_A:
        offset = base + k * row_stride + m * size
        _widen(rows, rows_stride, sram, offset, row_stride, k_count, m_count, size, staging)
        return
    inner = fields[K_INNER]
    i = 0
    while i < m_count:
        i12, i0 = divmod(m + i, fields[M0])
        i2, i1 = divmod(i12, fields[M1])
        run = min(fields[M0] - i0, m_count - i)
        row = base + i2 * fields[M2_STRIDE] + i1 * fields[M1_STRIDE] + i0 * row_stride
        outer, start = divmod(k, inner)
        done = 0
        while done < k_count:
            length = min(inner - start, k_count - done)
            offset = row + outer * fields[K_OUTER_STRIDE] + start * size
            target = rows + i * rows_stride + 4 * done
            _widen(target, rows_stride, sram, offset, row_stride, run, length, size, staging)
            done += length
            outer += 1
            start = 0
        i += run


@_internal
def _add_tile(acc32, tile, target, stride, rows, columns, from_zero):
    """int8: adds an exact fp32 tile to int32 accumulators, which wrap."""
    for i in range(rows):
        sums = tile[i * TILE_COLUMNS : i * TILE_COLUMNS + columns]
        outputs = acc32[target + i * stride : target + i * stride + columns]
        for j in range(columns):
            old = np.int32(0) if from_zero else outputs[j]
            outputs[j] = np.int32(old + np.int32(sums[j]))


@_internal
def _tiles(acc, fields, a, panels, m, m_count, n, n_count, k_count, zero, tile):
    """One block of outputs += packed A block * packed B block."""
    acc32 = acc.view(np.int32)
    floats = (fields[GO] & TYPE_MASK) == BF16
    by_columns = (fields[GO] & TRANSPOSE_A) != 0
    a_row, a_k = np.int64(PACKED_A_ROW), np.int64(4)
    if by_columns:
        a_row, a_k = a_k, a_row
    stride = fields[ACC_STRIDE]
    for j in range(0, n_count, TILE_COLUMNS):
        columns = min(TILE_COLUMNS, n_count - j)
        vectors = (columns + VECTOR_LENGTH - 1) // VECTOR_LENGTH
        direct = floats and columns == vectors * VECTOR_LENGTH
        panel = panels + (j // TILE_COLUMNS) * _PANEL_BYTES
        tall = _TALL_ROWS[vectors]
        i = 0
        while i < m_count:
            left = m_count - i
            rows = tall
            if left < tall:  # the rest is spread evenly
                tiles = (left + TILE_ROWS - 1) // TILE_ROWS
                rows = (left + tiles - 1) // tiles
            target = fields[ACC] + (m + i) * stride + 4 * (n + j)
            clear = zero
            if direct:
                c, c_row = np.int64(acc.ctypes.data + target), stride
            else:
                c, c_row = np.int64(tile.ctypes.data), np.int64(_TILE_ROW)
                if not floats:
                    clear = 1
                elif not zero:
                    _copy(tile, 0, TILE_COLUMNS, acc32, target >> 2, stride >> 2, rows, columns)
            first = a + i * a_row
            if rows == tall:
                fma_tall_tile(vectors, first, by_columns, panel, c, c_row, k_count, clear)
            else:
                fma_tile(rows, vectors, first, a_row, a_k, panel, c, c_row, k_count, clear)
            if not direct:
                if floats:
                    _copy(acc32, target >> 2, stride >> 2, tile, 0, TILE_COLUMNS, rows, columns)
                else:
                    sums = tile.view(np.float32)
                    _add_tile(acc32, sums, target >> 2, stride >> 2, rows, columns, zero)
            i += rows


@_internal
def _copy(target, at, at_stride, source, start, start_stride, rows, columns):
    """`rows` x `columns` words from `source` to `target`; offsets and strides in words."""
    for i in range(rows):
        words = source[start + i * start_stride : start + i * start_stride + columns]
        outputs = target[at + i * at_stride : at + i * at_stride + columns]
        for j in range(columns):
            outputs[j] = words[j]


@_internal
def _run_blocks(
    sram, acc, fields, scratch, m_begin, m_end, n_begin, n_end, k_begin, keeps, packed
):
    """Outputs m_begin..m_end x n_begin..n_end from k_begin on, by packed blocks.

    keeps: every block of A gets a place of its own; packed: they are all there already.
    """
    size = 1 if (fields[GO] & TYPE_MASK) == INT8 else 2
    panels = np.int64(scratch.ctypes.data)
    tile = scratch[_TILE_AT:_STAGING_AT].view(np.int32)
    staging = scratch[_STAGING_AT:_LONG_A_AT]
    a_row = np.int64(PACKED_A_ROW)
    # With one block of A per k block, each B panel is used as soon as it is packed.
    n_step = TILE_COLUMNS if m_end - m_begin <= M_BLOCK else N_BLOCK
    k_end = fields[K_INNER] * fields[K_OUTER]
    block = place = 0
    for k in range(k_begin, k_end, K_BLOCK):
        k_count = min(K_BLOCK, k_end - k)
        zero = 1 if k == 0 and not fields[GO] & ACCUMULATE else 0
        for n in range(n_begin, n_end, n_step):
            n_count = min(n_step, n_end - n)
            _pack_b(panels, sram, fields, size, k, k_count, n, n_count, staging)
            place = block
            for m in range(m_begin, m_end, M_BLOCK):
                m_count = min(M_BLOCK, m_end - m)
                a = panels + _A_AT + place * _A_BLOCK_BYTES
                if not packed and (n == n_begin or (n_step == N_BLOCK and not keeps)):
                    _pack_a(a, a_row, sram, fields, size, m, m_count, k, k_count, staging)
                _tiles(acc, fields, a, panels, m, m_count, n, n_count, k_count, zero, tile)
                place += keeps
        block = place if keeps else 0


@_internal
def _key_word(fields, m_begin, m_end, state, word):
    if word == 0:
        return fields[GO] & (TYPE_MASK | TRANSPOSE_A)
    if word <= K_OUTER_STRIDE:
        return fields[word]
    if word == K_OUTER_STRIDE + 1:
        return m_begin
    return m_end if word < _KEY_STATE else state


@_internal
def _run_kept(sram, acc, fields, scratch, m_begin, m_end, n_begin, n_end, state):
    """`_run_blocks`, with the packed A of the last call if it is the same one."""
    key = scratch[_KEY_AT : _KEY_AT + 8 * _KEY_WORDS].view(np.int64)
    k_end = fields[K_INNER] * fields[K_OUTER]
    blocks = ((m_end - m_begin + M_BLOCK - 1) // M_BLOCK) * ((k_end + K_BLOCK - 1) // K_BLOCK)
    keeps = state != 0 and blocks <= _KEPT_BLOCKS
    packed = keeps
    for word in range(_KEY_WORDS):
        packed &= key[word] == _key_word(fields, m_begin, m_end, state, word)
    key[_KEY_STATE] = 0
    first = np.int64(0)
    _run_blocks(
        sram, acc, fields, scratch, m_begin, m_end, n_begin, n_end, first, keeps, packed
    )
    if keeps:
        for word in range(_KEY_WORDS):
            key[word] = _key_word(fields, m_begin, m_end, state, word)


@_internal
def _run_fused(sram, acc, fields, scratch, m_begin, m_end, n_begin, n_end, k_end):
    """bf16 for few rows of a plain A, and k < `k_end`: B is widened while it is multiplied.

    Reads whole vectors of columns, so some past `n_end`; if B is stored transposed, `k_end` is
    a multiple of 2*VECTOR_LENGTH.
    """
    transposed = (fields[GO] & TRANSPOSE_B) != 0
    stride, acc_stride = fields[B_STRIDE], fields[ACC_STRIDE]
    acc32 = acc.view(np.int32)
    tile = scratch[_TILE_AT:_STAGING_AT].view(np.int32)
    staging = scratch[_STAGING_AT:_LONG_A_AT]
    a_row = np.int64(_LONG_A_ROW)
    a = np.int64(scratch.ctypes.data + _LONG_A_AT)
    size = np.int64(2)
    step = FUSED_VECTORS * VECTOR_LENGTH if transposed else TILE_COLUMNS
    for k in range(0, k_end, K_LONG):
        k_count = min(K_LONG, k_end - k)
        zero = 1 if k == 0 and not fields[GO] & ACCUMULATE else 0
        _pack_a(a, a_row, sram, fields, size, m_begin, m_end - m_begin, k, k_count, staging)
        for n in range(n_begin, n_end, step):
            columns = min(step, n_end - n)
            vectors = (columns + VECTOR_LENGTH - 1) // VECTOR_LENGTH
            direct = columns == vectors * VECTOR_LENGTH
            b = np.int64(sram.ctypes.data + fields[B])
            b += n * stride + 2 * k if transposed else k * stride + 2 * n
            for m in range(m_begin, m_end, FUSED_ROWS):
                rows = min(FUSED_ROWS, m_end - m)
                a_tile = a + (m - m_begin) * a_row
                target = fields[ACC] + m * acc_stride + 4 * n
                at = target >> 2
                if direct:
                    c, c_row = np.int64(acc.ctypes.data + target), acc_stride
                else:
                    c, c_row = np.int64(tile.ctypes.data), np.int64(_TILE_ROW)
                    _copy(tile, 0, TILE_COLUMNS, acc32, at, acc_stride >> 2, rows, columns)
                if transposed:
                    blocks = k_count // (2 * VECTOR_LENGTH)
                    fma_tile_transposed(
                        rows, vectors, a_tile, a_row, b, stride, c, c_row, blocks, zero
                    )
                else:
                    fma_tile_bf16(rows, vectors, a_tile, a_row, b, stride, c, c_row, k_count, zero)
                if not direct:
                    _copy(acc32, at, acc_stride >> 2, tile, 0, TILE_COLUMNS, rows, columns)


@_internal
def _columns_to_fuse(sram, fields, n_begin, n_end, k_end):
    """`n_end`, or less if whole vectors of the last columns would be read past SRAM's end."""
    tail = (n_end - n_begin) % VECTOR_LENGTH
    if tail == 0:
        return n_end
    whole = n_end - tail
    if fields[GO] & TRANSPOSE_B:
        last = (whole + VECTOR_LENGTH - 1) * fields[B_STRIDE] + 2 * k_end
    else:
        last = (k_end - 1) * fields[B_STRIDE] + 2 * (whole + VECTOR_LENGTH)
    return n_end if fields[B] + last <= sram.size else whole


@njit(nogil=True, _nrt=False)
def run_matmul_range(sram, acc, fields, scratch, m_begin, m_end, n_begin, n_end, state):
    """`run_matmul` for output rows m_begin..m_end and columns n_begin..n_end only.

    Disjoint ranges may run on different threads, each with a scratch of its own. state: a number
    that changes whenever bytes of A may have changed, so that a packed A can be used again; 0 if
    nothing is known.
    """
    if m_begin >= m_end or n_begin >= n_end:
        return
    go = fields[GO]
    k_end = fields[K_INNER] * fields[K_OUTER]
    if k_end == 0:
        if not go & ACCUMULATE:
            acc32 = acc.view(np.int32)
            for m in range(m_begin, m_end):
                row = (fields[ACC] + m * fields[ACC_STRIDE]) >> 2
                acc32[row + n_begin : row + n_end] = 0
        return
    aligned = -scratch.ctypes.data % 64
    scratch = scratch[aligned : aligned + SCRATCH_BYTES - 64]
    n_fused, k_fused = n_begin, np.int64(0)
    few = m_end - m_begin <= FUSED_M
    if few and (go & TYPE_MASK) == BF16 and not go & TRANSPOSE_A:
        k_fused = k_end - k_end % (2 * VECTOR_LENGTH) if go & TRANSPOSE_B else k_end
        n_fused = _columns_to_fuse(sram, fields, n_begin, n_end, k_fused)
        _run_fused(sram, acc, fields, scratch, m_begin, m_end, n_begin, n_fused, k_fused)
        # what is left: the last k of the fused columns, and below all k of the others
        scratch[_KEY_AT:] = 0
        _run_blocks(
            sram, acc, fields, scratch, m_begin, m_end, n_begin, n_fused, k_fused, False, False
        )
    if n_fused < n_end:
        _run_kept(sram, acc, fields, scratch, m_begin, m_end, n_fused, n_end, state)


@njit(nogil=True, _nrt=False)
def run_matmul(sram, acc, fields, scratch):
    """One matmul command: ACC[m, n] (+)= sum over k of A[m, k] * B[k, n].

    sram, acc: uint8[:], the core's memories, contiguous; acc 4-byte aligned. fields: int64[16],
    the words of bank 5 as the contract lists them, already checked for legality and range.
    scratch: uint8[SCRATCH_BYTES] or more, one per thread, all zero at first.
    """
    rows = fields[M0] * fields[M1] * fields[M2]
    first = np.int64(0)
    run_matmul_range(sram, acc, fields, scratch, first, rows, first, fields[N], first)
