"""Vector code as LLVM IR inside numba intrinsics: an IRBuilder with the idioms that kernels share.

Every function compiles for the vector length of the processor that numba compiles for
(`VECTOR_LENGTH` 32-bit lanes), so masking features with NUMBA_CPU_NAME or NUMBA_CPU_FEATURES
changes the code; the bits it computes stay the same.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import config
from numba.core import codegen, types

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()
CANONICAL_NAN = 0x7FC00000


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


class Emitter:
    """IRBuilder with the few vector idioms the kernels share."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder
        self.vector = ir.VectorType(F32, VECTOR_LENGTH)
        self.words = ir.VectorType(I32, VECTOR_LENGTH)

    def at(self, base: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
        """Pointer `offset` bytes after the pointer `base`."""
        if isinstance(offset, int):
            offset = I64(offset)
        return self.builder.gep(base, [offset], source_etype=I8)

    def load(self, kind: ir.Type, pointer: ir.Value, align: int) -> ir.Value:
        return self.builder.load(pointer, typ=kind, align=align)

    def shuffle(self, first: ir.Value, second: ir.Value, lanes: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        return self.builder.shuffle_vector(first, second, mask)

    def splat(self, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, VECTOR_LENGTH), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, I32(0))
        return self.shuffle(first, undefined, [0] * VECTOR_LENGTH)

    def splat_word(self, value: int) -> ir.Value:
        return ir.Constant(self.words, [value] * VECTOR_LENGTH)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        function = declare(self.builder.module, kind, f"llvm.fma.v{VECTOR_LENGTH}f32")
        return self.builder.call(function, [a, b, c])

    def floor(self, value: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.vector, [self.vector])
        function = declare(self.builder.module, kind, f"llvm.floor.v{VECTOR_LENGTH}f32")
        return self.builder.call(function, [value])

    def canonical(self, value: ir.Value) -> ir.Value:
        """`value` with every NaN lane replaced by the one canonical NaN."""
        nan = self.builder.bitcast(self.splat_word(CANONICAL_NAN), self.vector)
        return self.builder.select(self.builder.fcmp_unordered("uno", value, value), nan, value)

    def loop(self, count: ir.Value, start: list[ir.Value], body: Callable) -> list[ir.Value]:
        """`count` >= 1 turns of `body(index, state) -> state`; returns the last state."""
        builder = self.builder
        before = builder.block
        block = builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        builder.branch(block)
        builder.position_at_end(block)
        index = builder.phi(I64)
        index.add_incoming(I64(0), before)
        state = [builder.phi(value.type) for value in start]
        for phi, value in zip(state, start, strict=True):
            phi.add_incoming(value, before)
        result = body(index, state)
        following = builder.add(index, I64(1))
        index.add_incoming(following, builder.block)
        for phi, value in zip(state, result, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), block, after)
        builder.position_at_end(after)
        return result

    def transposed_words(self, source: ir.Value, stride: ir.Value) -> list[ir.Value]:
        """The VECTOR_LENGTH x VECTOR_LENGTH words at `source`, rows `stride` bytes apart,
        transposed: vector w holds word w of every row."""
        rows = spaced(self, source, stride, VECTOR_LENGTH)
        return [
            column
            for group in range(VECTOR_LENGTH // 4)
            for column in self.transposed_group(rows, group)
        ]

    def transposed_group(self, rows: list[ir.Value], group: int) -> list[ir.Value]:
        """Words 4*group .. 4*group + 3 of VECTOR_LENGTH `rows`, as one vector per word: two rounds
        of unpacking `joined_rows`."""
        first, second, third, fourth = self.joined_rows(rows, group)
        low, high = [0, 4, 1, 5], [2, 6, 3, 7]
        left = [self.unpack(first, second, pattern) for pattern in (low, high)]
        right = [self.unpack(third, fourth, pattern) for pattern in (low, high)]
        return [
            self.unpack(x, y, pattern)
            for x, y in zip(left, right, strict=True)
            for pattern in ([0, 1, 4, 5], [2, 3, 6, 7])
        ]

    def joined_rows(self, rows: list[ir.Value], group: int) -> list[ir.Value]:
        """Words 4*group .. 4*group + 3 of VECTOR_LENGTH `rows` as four vectors: 128-bit lane l of
        vector v is of row 4*l + v. An insert from memory needs no shuffle unit."""
        quad = ir.VectorType(I32, 4)
        joined = []
        for first in range(4):
            pieces = [self.load(quad, self.at(row, 16 * group), 1) for row in rows[first::4]]
            while len(pieces) > 1:
                width = 2 * pieces[0].type.count
                pieces = [
                    self.shuffle(low, high, list(range(width)))
                    for low, high in zip(pieces[::2], pieces[1::2], strict=True)
                ]
            joined.append(pieces[0])
        return joined

    def unpack(self, x: ir.Value, y: ir.Value, pattern: list[int]) -> ir.Value:
        """In every 128-bit lane the four words that `pattern` names: 0-3 of x, 4-7 of y."""
        lanes = []
        for lane in range(0, VECTOR_LENGTH, 4):
            lanes += [lane + (p if p < 4 else p - 4 + VECTOR_LENGTH) for p in pattern]
        return self.shuffle(x, y, lanes)


def declare(module: ir.Module, kind: ir.FunctionType, name: str) -> ir.Function:
    existing = module.globals.get(name)
    return existing if existing is not None else ir.Function(module, kind, name)


def by_address(count: int, emit: Callable) -> Callable:
    """An intrinsic of `count` intp arguments whose body is `emit(emitter, arguments)`."""

    def generate(context, builder, signature, arguments):
        emit(Emitter(builder), arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * count), generate


def spaced(emitter: Emitter, base: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
    """`count` pointers, `stride` bytes apart."""
    pointers = [base]
    for _ in range(count - 1):
        pointers.append(emitter.at(pointers[-1], stride))
    return pointers
