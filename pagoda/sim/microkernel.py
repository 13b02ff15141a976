"""Vector building blocks of the fast matmul, written as LLVM IR inside numba intrinsics.

What enters: byte addresses and byte strides (`intp`) into arrays the caller keeps alive. What
leaves: changed memory. Nothing here checks a bound.

The order of additions is the contract's: one output is one lane, and k runs in order inside it.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from pagoda.sim.emitter import (
    F32,
    I8,
    I16,
    I64,
    POINTER,
    VECTOR_LENGTH,
    Emitter,
    by_address,
    spaced,
)

# Called from compiled code only: wrappers for Python would double the time to compile.
_internal = njit(nogil=True, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)

BF16, INT8 = 0, 1
"""Element types of a matmul, as coded in its go word."""

# The accumulators, one row of B and a broadcast element of A share 32 (16 on AVX2) registers.
TILE_ROWS, TILE_VECTORS = (4, 3) if VECTOR_LENGTH == 8 else (6, 4)
TILE_COLUMNS = TILE_VECTORS * VECTOR_LENGTH
# Bytes from one row of packed A to the next. Not a power of two: such rows share cache sets.
PACKED_A_ROW = 4 * (128 + 2 * VECTOR_LENGTH)
# A tile that widens B while it multiplies. The chains of two vectors hide the latency of fma;
# four would do so better but need more registers and code.
FUSED_ROWS = 4
FUSED_VECTORS = 2


def tall_rows(vectors: int) -> int:
    """Rows of a tile of so many vectors, all accumulators in use."""
    return min(TILE_ROWS * TILE_VECTORS // vectors, 2 * TILE_ROWS)


def _part(emitter: Emitter, words: ir.Value, part: int, element: int) -> ir.Value:
    """Element `part` of every 32-bit word, as float: exact for bf16 and for int8."""
    builder = emitter.builder
    if element == BF16:
        if part == 0:
            shifted = builder.shl(words, emitter.splat_word(16))
        else:
            shifted = builder.and_(words, emitter.splat_word(0xFFFF0000))
        return builder.bitcast(shifted, emitter.vector)
    if part < 3:
        words = builder.shl(words, emitter.splat_word(24 - 8 * part))
    return builder.sitofp(builder.ashr(words, emitter.splat_word(24)), emitter.vector)


def _emit_choice(
    emitter: Emitter, rows: int, vectors: int, shape: list[ir.Value], emit_shape: Callable
) -> None:
    """`emit_shape(row_count, vector_count)` for the `shape` asked for at run time."""
    builder = emitter.builder
    end = builder.append_basic_block("end")
    choice = builder.add(builder.mul(shape[0], I64(vectors + 1)), shape[1])
    switch = builder.switch(choice, end)
    for row_count in range(1, rows + 1):
        for vector_count in range(1, vectors + 1):
            block = builder.append_basic_block(f"tile_{row_count}x{vector_count}")
            switch.add_case(I64(row_count * (vectors + 1) + vector_count), block)
            builder.position_at_end(block)
            emit_shape(row_count, vector_count)
            builder.branch(end)
    builder.position_at_end(end)


class _Outputs:
    """The accumulators of one tile of C: loaded, passed through loops, stored canonical."""

    def __init__(self, emitter: Emitter, c: ir.Value, stride: ir.Value, rows: int, vectors: int):
        self.emitter = emitter
        self.pointers = [
            emitter.at(row, j * 4 * VECTOR_LENGTH)
            for row in spaced(emitter, c, stride, rows)
            for j in range(vectors)
        ]

    def load(self, from_zero: ir.Value) -> list[ir.Value]:
        emitter = self.emitter
        clear = emitter.builder.icmp_signed("!=", from_zero, I64(0))
        zero = ir.Constant(emitter.vector, [0.0] * VECTOR_LENGTH)
        return [
            emitter.builder.select(clear, zero, emitter.load(emitter.vector, pointer, 4))
            for pointer in self.pointers
        ]

    def store(self, sums: list[ir.Value]) -> None:
        for value, pointer in zip(sums, self.pointers, strict=True):
            self.emitter.builder.store(self.emitter.canonical(value), pointer, align=4)


def _emit_products(
    emitter: Emitter,
    arguments: list[ir.Value],
    rows: int,
    vectors: int,
    a_strides: tuple[ir.Value, ir.Value],
    b_element: int | None = None,
) -> None:
    """A tile of `rows` x `vectors` outputs. arguments: as `fma_tile` from `a` on, but for A's
    strides, (row, k)."""
    a, b, b_row, c, c_row, count, from_zero = arguments
    builder = emitter.builder
    a, b, c = (builder.inttoptr(address, POINTER) for address in (a, b, c))
    a_row, a_k = a_strides
    a_rows = spaced(emitter, a, a_row, rows)
    outputs = _Outputs(emitter, c, c_row, rows, vectors)

    def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        b_k = emitter.at(b, builder.mul(k, b_row))
        a_offset = builder.mul(k, a_k)
        b_vectors = [_b_vector(emitter, b_k, j, b_element) for j in range(vectors)]
        result = []
        for i in range(rows):
            element = emitter.load(F32, emitter.at(a_rows[i], a_offset), 4)
            element = emitter.splat(element)
            for j in range(vectors):
                result.append(emitter.fma(element, b_vectors[j], sums[i * vectors + j]))
        return result

    outputs.store(emitter.loop(count, outputs.load(from_zero), step))


def _emit_tile(b_element: int | None) -> Callable:
    """A tile whose B rows are fp32, or are widened from `b_element` as they are loaded."""

    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        a, a_row, a_k, *others = arguments[2:]

        def emit_shape(rows: int, vectors: int) -> None:
            _emit_products(emitter, [a, *others], rows, vectors, (a_row, a_k), b_element)

        rows = TILE_ROWS if b_element is None else FUSED_ROWS
        _emit_choice(emitter, rows, TILE_VECTORS, arguments[:2], emit_shape)

    return emit


def _emit_tall_tile(a_row: int, a_k: int) -> Callable:
    """The tile of `tall_rows`, with A's strides as constants: so many rows as variables would not
    fit the registers."""

    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        builder = emitter.builder
        end = builder.append_basic_block("end")
        switch = builder.switch(arguments[0], end)
        for vectors in range(1, TILE_VECTORS + 1):
            block = builder.append_basic_block(f"tall_{vectors}")
            switch.add_case(I64(vectors), block)
            builder.position_at_end(block)
            strides = I64(a_row), I64(a_k)
            _emit_products(emitter, arguments[1:], tall_rows(vectors), vectors, strides)
            builder.branch(end)
        builder.position_at_end(end)

    return emit


def _b_vector(emitter: Emitter, row: ir.Value, index: int, element: int | None) -> ir.Value:
    if element is None:
        return emitter.load(emitter.vector, emitter.at(row, index * 4 * VECTOR_LENGTH), 4)
    raw_type = ir.VectorType(I16, VECTOR_LENGTH)
    raw = emitter.load(raw_type, emitter.at(row, index * 2 * VECTOR_LENGTH), 2)
    return _widened(emitter, raw, element)


@intrinsic
def _fma_tile(context, rows, vectors, a, a_row, a_k, b, b_row, c, c_row, count, from_zero):
    return by_address(11, _emit_tile(None))


@intrinsic
def _fma_tile_bf16(context, rows, vectors, a, a_row, a_k, b, b_row, c, c_row, count, from_zero):
    return by_address(11, _emit_tile(BF16))


@_internal
def fma_tile(rows, vectors, a, a_row, a_k, b, c, c_row, count, from_zero):
    """c[rows, vectors*VECTOR_LENGTH] := fma chain over k = 0..count-1 of a[rows, k] * b[k, :].

    All fp32. Chains start from c, or from +0.0 if `from_zero`; NaN results are canonical.
    rows 1..TILE_ROWS, vectors 1..TILE_VECTORS, count >= 1. a: element (i, k) at
    a + i*a_row + k*a_k; b: rows of TILE_COLUMNS floats; c: rows `c_row` bytes apart.
    """
    _fma_tile(rows, vectors, a, a_row, a_k, b, 4 * TILE_COLUMNS, c, c_row, count, from_zero)


@intrinsic
def _tall_tile(context, vectors, a, b, b_row, c, c_row, count, from_zero):
    return by_address(8, _emit_tall_tile(PACKED_A_ROW, 4))


@intrinsic
def _tall_tile_by_columns(context, vectors, a, b, b_row, c, c_row, count, from_zero):
    return by_address(8, _emit_tall_tile(4, PACKED_A_ROW))


@_internal
def fma_tall_tile(vectors, a, by_columns, b, c, c_row, count, from_zero):
    """`fma_tile` of `tall_rows(vectors)` rows. a: rows PACKED_A_ROW bytes apart, one per output
    row, or if `by_columns` one per k."""
    if by_columns:
        _tall_tile_by_columns(vectors, a, b, 4 * TILE_COLUMNS, c, c_row, count, from_zero)
    else:
        _tall_tile(vectors, a, b, 4 * TILE_COLUMNS, c, c_row, count, from_zero)


@_internal
def fma_tile_bf16(rows, vectors, a, a_row, b, b_row, c, c_row, count, from_zero):
    """`fma_tile` with B taken as stored: bf16 rows `b_row` bytes apart. rows 1..FUSED_ROWS."""
    _fma_tile_bf16(rows, vectors, a, a_row, 4, b, b_row, c, c_row, count, from_zero)


def _emit_tile_transposed(emitter: Emitter, arguments: list[ir.Value]) -> None:
    a_row, b_row, c_row, blocks, from_zero = (arguments[i] for i in (3, 5, 7, 8, 9))
    builder = emitter.builder
    a, b, c = (builder.inttoptr(arguments[i], POINTER) for i in (2, 4, 6))
    groups = VECTOR_LENGTH // 4

    def emit_shape(rows: int, vectors: int) -> None:
        a_rows = spaced(emitter, a, a_row, rows)
        b_rows = spaced(emitter, b, b_row, vectors * VECTOR_LENGTH)
        outputs = _Outputs(emitter, c, c_row, rows, vectors)

        def step(index: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            sums = list(sums)
            a_offset = builder.mul(index, I64(8 * VECTOR_LENGTH))
            b_offset = builder.mul(index, I64(4 * VECTOR_LENGTH))
            a_now = [emitter.at(row, a_offset) for row in a_rows]
            b_now = [emitter.at(row, b_offset) for row in b_rows]
            for group in range(groups):
                # vectors inside groups: their chains are independent, so they hide each
                # other's latency
                for j in range(vectors):
                    block = b_now[j * VECTOR_LENGTH : (j + 1) * VECTOR_LENGTH]
                    for word, column in enumerate(emitter.transposed_group(block, group)):
                        for part in range(2):
                            k = 8 * group + 2 * word + part
                            element = _part(emitter, column, part, BF16)
                            for i in range(rows):
                                at = emitter.load(F32, emitter.at(a_now[i], 4 * k), 4)
                                at = emitter.splat(at)
                                sums[i * vectors + j] = emitter.fma(
                                    at, element, sums[i * vectors + j]
                                )
            return sums

        outputs.store(emitter.loop(blocks, outputs.load(from_zero), step))

    _emit_choice(emitter, FUSED_ROWS, FUSED_VECTORS, arguments[:2], emit_shape)


@intrinsic
def _fma_tile_transposed(context, rows, vectors, a, a_row, b, b_row, c, c_row, blocks, from_zero):
    return by_address(10, _emit_tile_transposed)


@_internal
def fma_tile_transposed(rows, vectors, a, a_row, b, b_row, c, c_row, blocks, from_zero):
    """`fma_tile_bf16` with B stored [n, k], `b_row` bytes from n to n + 1; k runs over
    `blocks` * 2*VECTOR_LENGTH elements."""
    _fma_tile_transposed(rows, vectors, a, a_row, b, b_row, c, c_row, blocks, from_zero)


def _emit_widen(element: int) -> Callable:
    source_type = ir.VectorType(I16 if element == BF16 else I8, VECTOR_LENGTH)
    source_bytes = (2 if element == BF16 else 1) * VECTOR_LENGTH
    target_bytes = 4 * VECTOR_LENGTH

    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        builder = emitter.builder
        target, source = (builder.inttoptr(arguments[i], POINTER) for i in (0, 2))
        target_stride, source_stride, rows, vectors = (arguments[i] for i in (1, 3, 4, 5))

        def strips(first: ir.Value, count: ir.Value, width: int) -> None:
            """`count` strips of `width` vectors, the first one `first` vectors in."""

            def strip(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
                at = builder.add(first, builder.mul(index, I64(width)))
                to_strip = emitter.at(target, builder.mul(at, I64(target_bytes)))
                from_strip = emitter.at(source, builder.mul(at, I64(source_bytes)))

                def row(i: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
                    to_row = emitter.at(to_strip, builder.mul(i, target_stride))
                    from_row = emitter.at(from_strip, builder.mul(i, source_stride))
                    for j in range(width):
                        pointer = emitter.at(from_row, j * source_bytes)
                        raw = emitter.load(source_type, pointer, 1)
                        wide = _widened(emitter, raw, element)
                        builder.store(wide, emitter.at(to_row, j * target_bytes), align=4)
                    return []

                emitter.loop(rows, [], row)
                return []

            with builder.if_then(builder.icmp_signed(">", count, I64(0))):
                emitter.loop(count, [], strip)

        wide_strips = builder.sdiv(vectors, I64(TILE_VECTORS))
        done = builder.mul(wide_strips, I64(TILE_VECTORS))
        strips(I64(0), wide_strips, TILE_VECTORS)
        strips(done, builder.sub(vectors, done), 1)

    return emit


def _widened(emitter: Emitter, raw: ir.Value, element: int) -> ir.Value:
    builder = emitter.builder
    if element == INT8:
        return builder.sitofp(raw, emitter.vector)
    words = builder.shl(builder.zext(raw, emitter.words), emitter.splat_word(16))
    return builder.bitcast(words, emitter.vector)


@intrinsic
def widen_bf16(context, target, target_stride, source, source_stride, rows, vectors):
    """rows >= 1 of `vectors` * VECTOR_LENGTH bf16 at `source` -> fp32 rows at `target`."""
    return by_address(6, _emit_widen(BF16))


@intrinsic
def widen_int8(context, target, target_stride, source, source_stride, rows, vectors):
    """As `widen_bf16` for int8."""
    return by_address(6, _emit_widen(INT8))


def _emit_transpose(element: int) -> Callable:
    parts = 2 if element == BF16 else 4

    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        builder = emitter.builder
        target, source = (builder.inttoptr(address, POINTER) for address in arguments[:2])
        stride, blocks = arguments[2:]

        def turn(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
            from_pointer = emitter.at(source, builder.mul(index, I64(4 * VECTOR_LENGTH)))
            rows = parts * VECTOR_LENGTH
            to_pointer = emitter.at(target, builder.mul(index, I64(rows * 4 * TILE_COLUMNS)))
            columns = emitter.transposed_words(from_pointer, stride)
            for word, column in enumerate(columns):
                for part in range(parts):
                    row = word * parts + part
                    builder.store(
                        _part(emitter, column, part, element),
                        emitter.at(to_pointer, row * 4 * TILE_COLUMNS),
                        align=4,
                    )
            return []

        emitter.loop(blocks, [], turn)

    return emit


@intrinsic
def transpose_bf16(context, target, source, stride, blocks):
    """VECTOR_LENGTH rows of `blocks` * 2*VECTOR_LENGTH bf16, `stride` bytes apart, as columns of
    a B panel: source element (n, k) -> fp32 at target + 4 * (k*TILE_COLUMNS + n)."""
    return by_address(4, _emit_transpose(BF16))


@intrinsic
def transpose_int8(context, target, source, stride, blocks):
    """As `transpose_bf16` for rows of `blocks` * 4*VECTOR_LENGTH int8."""
    return by_address(4, _emit_transpose(INT8))
