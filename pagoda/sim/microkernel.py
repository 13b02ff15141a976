"""Vector building blocks of the fast matmul, written as LLVM IR inside numba intrinsics.

What enters: byte addresses and byte strides (`intp`) into arrays the caller keeps alive. What
leaves: changed memory. Nothing here checks a bound. Every function compiles for the vector
length of the processor numba compiles for (`VECTOR_LENGTH` 32-bit lanes), so masking features
with NUMBA_CPU_NAME or NUMBA_CPU_FEATURES changes the code; the bits it computes stay the same.

The order of additions is the contract's: one output is one lane, and k runs in order inside it.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import config, njit
from numba.core import codegen, types
from numba.extending import intrinsic

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_POINTER = ir.PointerType()
_CANONICAL_NAN = 0x7FC00000

BF16, INT8 = 0, 1
"""Element types of a matmul, as coded in its go word."""


def _enabled_features() -> frozenset[str]:
    """Features numba's code generator may use: the host's, unless the user masked them."""
    listed = config.CPU_FEATURES
    if listed is None:
        listed = codegen.get_host_cpu_features()
    return frozenset(name[1:] for name in listed.split(",") if name.startswith("+"))


def _vector_length(features: frozenset[str]) -> int:
    """32-bit lanes of the widest vector with a fused multiply-add (4: NEON, or scalar fma)."""
    if "avx512f" in features:
        return 16
    if {"avx2", "fma"} <= features:
        return 8
    return 4


VECTOR_LENGTH = _vector_length(_enabled_features())
TILE_VECTORS = 4
TILE_COLUMNS = TILE_VECTORS * VECTOR_LENGTH
# The accumulators, one row of B and a broadcast element of A share 32 (16 on AVX2) registers.
TILE_ROWS = 3 if VECTOR_LENGTH == 8 else 6


class _Emitter:
    """IRBuilder with the few vector idioms the kernels share."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder
        self.vector = ir.VectorType(_F32, VECTOR_LENGTH)
        self.words = ir.VectorType(_I32, VECTOR_LENGTH)

    def at(self, base: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """Pointer `offset` bytes after the pointer `base`."""
        if isinstance(offset, int):
            offset = _I64(offset)
        return self.builder.gep(base, [offset], source_etype=_I8)

    def load(self, kind: ir.Type, pointer: ir.Value, align: int) -> ir.Value:
        return self.builder.load(pointer, typ=kind, align=align)

    def shuffle(self, first: ir.Value, second: ir.Value, lanes: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
        return self.builder.shuffle_vector(first, second, mask)

    def splat(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, VECTOR_LENGTH), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, _I32(0))
        return self.shuffle(first, undefined, [0] * VECTOR_LENGTH)

    def splat_word(self, value: int) -> ir.Value:
        return ir.Constant(self.words, [value] * VECTOR_LENGTH)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        function = _declare(self.builder.module, kind, f"llvm.fma.v{VECTOR_LENGTH}f32")
        return self.builder.call(function, [a, b, c])

    def canonical(self, value: ir.Value) -> ir.Value:
        """`value` with every NaN lane replaced by the one canonical NaN."""
        nan = self.builder.bitcast(self.splat_word(_CANONICAL_NAN), self.vector)
        return self.builder.select(self.builder.fcmp_unordered("uno", value, value), nan, value)

    def part(self, words: ir.Value, part: int, element: int) -> ir.Value:
        """Element `part` of every 32-bit word, as float: exact for bf16 and for int8."""
        builder = self.builder
        if element == BF16:
            if part == 0:
                shifted = builder.shl(words, self.splat_word(16))
            else:
                shifted = builder.and_(words, self.splat_word(0xFFFF0000))
            return builder.bitcast(shifted, self.vector)
        if part < 3:
            words = builder.shl(words, self.splat_word(24 - 8 * part))
        return builder.sitofp(builder.ashr(words, self.splat_word(24)), self.vector)

    def loop(self, count: ir.Value, start: list[ir.Value], body: Callable) -> list[ir.Value]:
        """`count` >= 1 turns of `body(index, state) -> state`; returns the last state."""
        builder = self.builder
        before = builder.block
        block = builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        builder.branch(block)
        builder.position_at_end(block)
        index = builder.phi(_I64)
        index.add_incoming(_I64(0), before)
        state = [builder.phi(value.type) for value in start]
        for phi, value in zip(state, start, strict=True):
            phi.add_incoming(value, before)
        result = body(index, state)
        following = builder.add(index, _I64(1))
        index.add_incoming(following, builder.block)
        for phi, value in zip(state, result, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), block, after)
        builder.position_at_end(after)
        return result

    def transposed_words(self, source: ir.Value, stride: ir.Value) -> list[ir.Value]:
        """The VECTOR_LENGTH x VECTOR_LENGTH words at `source`, rows `stride` bytes apart,
        transposed: vector w holds word w of every row.

        Rows 4 apart are joined while loading, by 128-bit lanes (an insert from memory needs no
        shuffle unit); two rounds of unpacking inside the lanes do the rest.
        """
        lanes = VECTOR_LENGTH // 4
        quad = ir.VectorType(_I32, 4)
        rows = [self.at(source)]
        for _ in range(VECTOR_LENGTH - 1):
            rows.append(self.at(rows[-1], stride))
        columns = []
        for group in range(lanes):
            joined = []
            for row in range(4):
                pieces = [
                    self.load(quad, self.at(rows[row + 4 * lane], 16 * group), 1)
                    for lane in range(lanes)
                ]
                while len(pieces) > 1:
                    width = 2 * pieces[0].type.count
                    pieces = [
                        self.shuffle(low, high, list(range(width)))
                        for low, high in zip(pieces[::2], pieces[1::2], strict=True)
                    ]
                joined.append(pieces[0])
            columns += self._transpose_lanes(joined)
        return columns

    def _transpose_lanes(self, rows: list[ir.Value]) -> list[ir.Value]:
        """4 x 4 words transposed inside every 128-bit lane."""

        def unpack(x: ir.Value, y: ir.Value, pattern: list[int]) -> ir.Value:
            lanes = []
            for lane in range(0, VECTOR_LENGTH, 4):
                lanes += [lane + (p if p < 4 else p - 4 + VECTOR_LENGTH) for p in pattern]
            return self.shuffle(x, y, lanes)

        low, high = [0, 4, 1, 5], [2, 6, 3, 7]
        first, second = [0, 1, 4, 5], [2, 3, 6, 7]
        left = [unpack(rows[0], rows[1], low), unpack(rows[0], rows[1], high)]
        right = [unpack(rows[2], rows[3], low), unpack(rows[2], rows[3], high)]
        return [
            unpack(x, y, pattern)
            for x, y in zip(left, right, strict=True)
            for pattern in (first, second)
        ]


def _declare(module: ir.Module, kind: ir.FunctionType, name: str) -> ir.Function:
    existing = module.globals.get(name)
    return existing if existing is not None else ir.Function(module, kind, name)


def _by_address(count: int, emit: Callable) -> Callable:
    """An intrinsic of `count` intp arguments whose body is `emit(emitter, arguments)`."""

    def generate(context, builder, signature, arguments):
        emit(_Emitter(builder), arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * count), generate


def _emit_fma_tile(emitter: _Emitter, arguments: list[ir.Value]) -> None:
    rows, vectors, a, a_row, a_k, b, c, c_row, count, from_zero = arguments
    builder = emitter.builder
    a, b, c = (builder.inttoptr(address, _POINTER) for address in (a, b, c))
    clear = builder.icmp_signed("!=", from_zero, _I64(0))
    end = builder.append_basic_block("end")
    with builder.goto_block(end):
        pass
    choice = builder.add(builder.mul(rows, _I64(TILE_VECTORS + 1)), vectors)
    switch = builder.switch(choice, end)
    for row_count in range(1, TILE_ROWS + 1):
        for vector_count in range(1, TILE_VECTORS + 1):
            block = builder.append_basic_block(f"tile_{row_count}x{vector_count}")
            switch.add_case(_I64(row_count * (TILE_VECTORS + 1) + vector_count), block)
            builder.position_at_end(block)
            _emit_tile_shape(
                emitter, row_count, vector_count, a, a_row, a_k, b, c, c_row, count, clear
            )
            builder.branch(end)
    builder.position_at_end(end)


def _emit_tile_shape(
    emitter: _Emitter, rows: int, vectors: int, a, a_row, a_k, b, c, c_row, count, clear
) -> None:
    builder = emitter.builder
    vector_bytes = 4 * VECTOR_LENGTH
    a_rows, c_rows = [a], [c]
    for _ in range(rows - 1):
        a_rows.append(emitter.at(a_rows[-1], a_row))
        c_rows.append(emitter.at(c_rows[-1], c_row))
    zero = ir.Constant(emitter.vector, [0.0] * VECTOR_LENGTH)
    start = [
        builder.select(
            clear, zero, emitter.load(emitter.vector, emitter.at(row, j * vector_bytes), 4)
        )
        for row in c_rows
        for j in range(vectors)
    ]

    def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        b_k = emitter.at(b, builder.mul(k, _I64(4 * TILE_COLUMNS)))
        a_offset = builder.mul(k, a_k)
        b_row = [
            emitter.load(emitter.vector, emitter.at(b_k, j * vector_bytes), 4)
            for j in range(vectors)
        ]
        result = []
        for i in range(rows):
            element = emitter.splat(emitter.load(_F32, emitter.at(a_rows[i], a_offset), 4))
            for j in range(vectors):
                result.append(emitter.fma(element, b_row[j], sums[i * vectors + j]))
        return result

    sums = emitter.loop(count, start, step)
    for i in range(rows):
        for j in range(vectors):
            value = emitter.canonical(sums[i * vectors + j])
            builder.store(value, emitter.at(c_rows[i], j * vector_bytes), align=4)


@intrinsic
def _fma_tile(context, rows, vectors, a, a_row, a_k, b, c, c_row, count, from_zero):
    return _by_address(10, _emit_fma_tile)


@njit(nogil=True)
def fma_tile(rows, vectors, a, a_row, a_k, b, c, c_row, count, from_zero):
    """c[rows, vectors*VECTOR_LENGTH] := fma chain over k = 0..count-1 of a[rows, k] * b[k, :].

    All fp32. Chains start from c, or from +0.0 if `from_zero`; NaN results are canonical.
    rows 1..TILE_ROWS, vectors 1..TILE_VECTORS, count >= 1. a: element (i, k) at
    a + i*a_row + k*a_k; b: rows of TILE_COLUMNS floats; c: rows `c_row` bytes apart.
    """
    _fma_tile(rows, vectors, a, a_row, a_k, b, c, c_row, count, from_zero)


def _emit_widen(element: int) -> Callable:
    source_type = ir.VectorType(_I16 if element == BF16 else _I8, VECTOR_LENGTH)
    size = 2 if element == BF16 else 1

    def emit(emitter: _Emitter, arguments: list[ir.Value]) -> None:
        builder = emitter.builder
        target, source = (builder.inttoptr(address, _POINTER) for address in arguments[:2])

        def turn(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
            from_pointer = emitter.at(source, builder.mul(index, _I64(size * VECTOR_LENGTH)))
            to_pointer = emitter.at(target, builder.mul(index, _I64(4 * VECTOR_LENGTH)))
            raw = emitter.load(source_type, from_pointer, size)
            if element == BF16:
                wide = builder.shl(builder.zext(raw, emitter.words), emitter.splat_word(16))
                wide = builder.bitcast(wide, emitter.vector)
            else:
                wide = builder.sitofp(raw, emitter.vector)
            builder.store(wide, to_pointer, align=4)
            return []

        emitter.loop(arguments[2], [], turn)

    return emit


@intrinsic
def widen_bf16(context, target, source, vectors):
    """`vectors` >= 1 times VECTOR_LENGTH bf16 at `source` -> fp32 at `target`."""
    return _by_address(3, _emit_widen(BF16))


@intrinsic
def widen_int8(context, target, source, vectors):
    """`vectors` >= 1 times VECTOR_LENGTH int8 at `source` -> fp32 at `target`."""
    return _by_address(3, _emit_widen(INT8))


def _emit_transpose(element: int) -> Callable:
    parts = 2 if element == BF16 else 4

    def emit(emitter: _Emitter, arguments: list[ir.Value]) -> None:
        builder = emitter.builder
        target, source = (builder.inttoptr(address, _POINTER) for address in arguments[:2])
        stride, blocks = arguments[2:]

        def turn(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
            from_pointer = emitter.at(source, builder.mul(index, _I64(4 * VECTOR_LENGTH)))
            rows = parts * VECTOR_LENGTH
            to_pointer = emitter.at(target, builder.mul(index, _I64(rows * 4 * TILE_COLUMNS)))
            columns = emitter.transposed_words(from_pointer, stride)
            for word, column in enumerate(columns):
                for part in range(parts):
                    row = word * parts + part
                    builder.store(
                        emitter.part(column, part, element),
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
    return _by_address(4, _emit_transpose(BF16))


@intrinsic
def transpose_int8(context, target, source, stride, blocks):
    """As `transpose_bf16` for rows of `blocks` * 4*VECTOR_LENGTH int8."""
    return _by_address(4, _emit_transpose(INT8))
