"""Loops over lanes that LLVM's vectoriser does not find, as vector code: some three times faster
than lane by lane.

Each works on whole vectors of VECTOR_LENGTH lanes at byte addresses; what remains of a run is left
to the loops in `functions` and `convert`. The bits are those of `numbers`, whose functions say what
is computed; here all of it fits in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from pagoda.isa.tables import EXP2_TABLE, RECIPROCAL_TABLE
from pagoda.sim.emitter import (
    CANONICAL_NAN,
    I16,
    I32,
    I64,
    POINTER,
    VECTOR_LENGTH,
    Emitter,
    by_address,
    declare,
)

_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_FRACTION_BITS = 0x7FFFFF
_ONE = 0x3F800000


def _rows(table: np.ndarray) -> np.ndarray:
    """A table's rows of three as rows of sixteen bytes: one load each."""
    rows = np.zeros((len(table), 4), np.int32)
    rows[:, :3] = table
    assert (rows[:, :3] == table).all()
    return rows


EXP2_ROWS, RECIPROCAL_ROWS = _rows(EXP2_TABLE), _rows(RECIPROCAL_TABLE)
_EXP2_WIDTH, _RECIPROCAL_WIDTH = 23, 15


class _Words:
    """Arithmetic on vectors of 32-bit words; a Python int stands for itself in every lane."""

    def __init__(self, emitter: Emitter):
        self.emitter, self.builder = emitter, emitter.builder

    def _of(self, value: ir.Value | int) -> ir.Value:
        if isinstance(value, int):
            return self.emitter.splat_word(value & 0xFFFFFFFF)
        return value

    def __getattr__(self, name: str) -> Callable[..., ir.Value]:
        """add, sub, and_, or_, shl, lshr, ashr: as in IRBuilder."""
        method = getattr(self.builder, name)
        return lambda a, b: method(self._of(a), self._of(b))

    def compare(self, relation: str, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        """Signed."""
        return self.builder.icmp_signed(relation, self._of(a), self._of(b))

    def above(self, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        """Unsigned a > b."""
        return self.builder.icmp_unsigned(">", self._of(a), self._of(b))

    def select(self, mask: ir.Value, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        return self.builder.select(mask, self._of(a), self._of(b))

    def least(self, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        return self.select(self.compare("<", a, b), a, b)

    def most(self, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        return self.select(self.compare(">", a, b), a, b)

    def high(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """floor(a * b / 2^32), signed; even and odd lanes apart, each as a product of 64 bits."""
        builder, pairs = self.builder, ir.VectorType(I64, VECTOR_LENGTH // 2)
        half = ir.Constant(pairs, [32] * pairs.count)
        wide = [builder.bitcast(value, pairs) for value in (a, b)]
        even = [builder.ashr(builder.shl(value, half), half) for value in wide]
        odd = [builder.ashr(value, half) for value in wide]
        low = builder.lshr(builder.mul(*even), half)
        mask = ir.Constant(pairs, [0xFFFFFFFF00000000] * pairs.count)
        return builder.bitcast(
            builder.or_(low, builder.and_(builder.mul(*odd), mask)), self.emitter.words
        )

    def quadratic(self, rows: list[ir.Value], position: ir.Value) -> ir.Value:
        """y of `pagoda.isa.tables`. rows: (C0, C1, C2); position: shifted to bit 31 from its
        width w, so that (C * d) >> w is the upper half of 2 C times it."""
        c0, c1, c2 = rows
        inner = self.add(c1, self.high(self.shl(c2, 1), position))
        return self.add(c0, self.high(self.shl(inner, 1), position))

    def rounded(self, value: ir.Value, drop: ir.Value) -> ir.Value:
        """value >> drop, to nearest, ties to even; 1 <= drop <= 31, unsigned."""
        half = self.sub(self.shl(1, self.sub(drop, 1)), 1)
        odd = self.and_(self.lshr(value, drop), 1)
        return self.lshr(self.add(self.add(value, half), odd), drop)


# bfloat16 -----------------------------------------------------------------------------------------


def _emit_encode_bf16(emitter: Emitter, arguments: list[ir.Value]) -> None:
    target, source = (emitter.builder.inttoptr(address, POINTER) for address in arguments[:2])
    short = ir.VectorType(I16, VECTOR_LENGTH)

    def turn(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
        words, builder = _Words(emitter), emitter.builder
        at = emitter.at(source, builder.mul(index, I64(4 * VECTOR_LENGTH)))
        x = emitter.load(emitter.words, at, 1)
        code = words.lshr(words.add(words.add(x, 0x7FFF), words.and_(words.lshr(x, 16), 1)), 16)
        nan = words.compare(">", words.and_(x, _MAGNITUDE), _INFINITY)
        code = words.select(nan, CANONICAL_NAN >> 16, code)
        to = emitter.at(target, builder.mul(index, I64(2 * VECTOR_LENGTH)))
        builder.store(builder.trunc(code, short), to, align=1)
        return []

    emitter.loop(arguments[2], [], turn)


@intrinsic
def encode_bf16(context, target, source, vectors):
    """`bf16_code` of `vectors` >= 1 vectors of lanes at `source`, as bf16 at `target`."""
    return by_address(3, _emit_encode_bf16)


# Table functions: one loop finds rows and positions, which go through memory, for the addresses of
# rows are wanted one by one; the other loads rows, evaluates and rounds.


def _emit_where(find: Callable[[_Words, ir.Value], tuple[ir.Value, ir.Value]]) -> Callable:
    """find: x -> (row, position as `quadratic` wants it). To offset[], position[] in bytes."""

    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        pointers = [emitter.builder.inttoptr(address, POINTER) for address in arguments[:3]]

        def turn(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
            builder, words = emitter.builder, _Words(emitter)
            byte = builder.mul(index, I64(4 * VECTOR_LENGTH))
            offset, position, x = (emitter.at(pointer, byte) for pointer in pointers)
            row, where = find(words, emitter.load(emitter.words, x, 1))
            builder.store(words.shl(row, 4), offset, align=1)
            builder.store(where, position, align=1)
            return []

        emitter.loop(arguments[3], [], turn)

    return emit


def _emit_values(result: Callable[[_Words, ir.Value, ir.Value], ir.Value]) -> Callable:
    """result: x, y -> the function's value, as a pattern."""

    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        pointers = [emitter.builder.inttoptr(address, POINTER) for address in arguments[:5]]
        table = pointers[0]

        def turn(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
            builder, words = emitter.builder, _Words(emitter)
            byte = builder.mul(index, I64(4 * VECTOR_LENGTH))
            offset, position, x, to = (emitter.at(pointer, byte) for pointer in pointers[1:])
            rows = []
            for lane in range(VECTOR_LENGTH):
                place = emitter.load(I32, emitter.at(offset, 4 * lane), 1)
                rows.append(emitter.at(table, builder.zext(place, I64)))
            coefficients = emitter.transposed_group(rows, 0)[:3]
            where = emitter.load(emitter.words, position, 1)
            y = words.quadratic(coefficients, where)
            builder.store(result(words, emitter.load(emitter.words, x, 1), y), to, align=1)
            return []

        emitter.loop(arguments[5], [], turn)

    return emit


def _exp2_argument(words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(signed significand, -exponent): x is their quotient; of 0 beyond 150."""
    magnitude = words.and_(x, _MAGNITUDE)
    beyond = words.compare(">=", magnitude, 0x43160000)
    usable = words.select(beyond, 0, magnitude)
    field = words.lshr(usable, 23)
    hidden = words.select(words.compare("!=", field, 0), 1 << 23, 0)
    significand = words.or_(words.and_(usable, _FRACTION_BITS), hidden)
    signed = words.select(words.compare("<", x, 0), words.sub(0, significand), significand)
    return signed, words.sub(150, words.most(field, 1))


def _exp2_where(words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    signed, drop = _exp2_argument(words, x)
    # The fraction's 30 bits; what is shifted out above belongs to the whole part.
    up = words.most(words.sub(30, drop), 0)
    down = words.least(words.most(words.sub(drop, 30), 0), 31)
    fraction = words.and_(words.ashr(words.shl(signed, up), down), (1 << 30) - 1)
    position = words.shl(words.and_(fraction, (1 << _EXP2_WIDTH) - 1), 31 - _EXP2_WIDTH)
    return words.lshr(fraction, _EXP2_WIDTH), position


def _exp2_value(words: _Words, x: ir.Value, y: ir.Value) -> ir.Value:
    """y has 31 bits, so 7 of them are dropped, or more if the result is subnormal."""
    signed, drop = _exp2_argument(words, x)
    whole = words.ashr(signed, words.least(drop, 31))
    lost = words.most(words.sub(-119, whole), 7)
    field = words.most(words.add(whole, 126), 0)
    value = words.add(words.shl(field, 23), words.rounded(y, lost))
    magnitude = words.and_(x, _MAGNITUDE)
    negative = words.compare("<", x, 0)
    small = words.builder.and_(negative, words.compare(">=", magnitude, 0x43160000))
    large = words.builder.and_(
        words.builder.not_(negative), words.compare(">=", magnitude, 0x43000000)
    )
    value = words.select(small, 0, words.select(large, _INFINITY, value))
    return words.select(words.compare(">", magnitude, _INFINITY), CANONICAL_NAN, value)


def _reciprocal_argument(words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(field, fraction): |x| is (1 + fraction / 2^23) * 2^(field - 127), where it is a number;
    field is below 1 for subnormal ones."""
    magnitude = words.and_(x, _MAGNITUDE)
    number = words.builder.and_(
        words.compare(">", magnitude, 0), words.compare("<", magnitude, _INFINITY)
    )
    usable = words.select(number, magnitude, _ONE)
    # A subnormal's significand, as float, is normalised.
    as_float = words.builder.sitofp(usable, words.emitter.vector)
    normalised = words.builder.bitcast(as_float, words.emitter.words)
    subnormal = words.compare("<", usable, 1 << 23)
    field = words.select(
        subnormal, words.sub(words.lshr(normalised, 23), 149), words.lshr(usable, 23)
    )
    return field, words.and_(words.select(subnormal, normalised, usable), _FRACTION_BITS)


def _reciprocal_where(words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    _, fraction = _reciprocal_argument(words, x)
    position = words.and_(fraction, (1 << _RECIPROCAL_WIDTH) - 1)
    return words.lshr(fraction, _RECIPROCAL_WIDTH), words.shl(position, 31 - _RECIPROCAL_WIDTH)


def _reciprocal_value(words: _Words, x: ir.Value, y: ir.Value) -> ir.Value:
    """y, over 2^30, is in (1/2, 1]: it has 30 bits, or 31 for 1."""
    field, _ = _reciprocal_argument(words, x)
    is_one = words.lshr(y, 30)
    # The exponent of y's last kept bit, and of y.
    exponent = words.sub(97, field)
    last = words.most(words.add(words.add(exponent, 6), is_one), -149)
    pattern = words.add(
        words.shl(words.add(last, 149), 23), words.rounded(y, words.sub(last, exponent))
    )
    pattern = words.select(words.above(pattern, _INFINITY), _INFINITY, pattern)
    magnitude = words.and_(x, _MAGNITUDE)
    pattern = words.select(words.compare("==", magnitude, _INFINITY), 0, pattern)
    pattern = words.select(words.compare("==", magnitude, 0), _INFINITY, pattern)
    pattern = words.or_(pattern, words.and_(x, ~_MAGNITUDE))
    return words.select(words.compare(">", magnitude, _INFINITY), CANONICAL_NAN, pattern)


@intrinsic
def exp2_where(context, offset, position, x, vectors):
    """Of `vectors` >= 1 vectors of lanes at `x`: byte offsets into EXP2_ROWS, and positions."""
    return by_address(4, _emit_where(_exp2_where))


@intrinsic
def exp2_values(context, table, offset, position, x, to, vectors):
    """2^x to `to`, from what `exp2_where` found. table: address of EXP2_ROWS."""
    return by_address(6, _emit_values(_exp2_value))


@intrinsic
def reciprocal_where(context, offset, position, x, vectors):
    """As `exp2_where`, of RECIPROCAL_ROWS."""
    return by_address(4, _emit_where(_reciprocal_where))


@intrinsic
def reciprocal_values(context, table, offset, position, x, to, vectors):
    """1 / x by table; as `exp2_values`."""
    return by_address(6, _emit_values(_reciprocal_value))


# Maximum and minimum ------------------------------------------------------------------------------


def _emit_extreme(name: str) -> Callable:
    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        pointers = [emitter.builder.inttoptr(address, POINTER) for address in arguments[:3]]

        def turn(index: ir.Value, _state: list[ir.Value]) -> list[ir.Value]:
            builder = emitter.builder
            byte = builder.mul(index, I64(4 * VECTOR_LENGTH))
            to, x, y = (emitter.at(pointer, byte) for pointer in pointers)
            operands = [emitter.load(emitter.vector, pointer, 1) for pointer in (x, y)]
            kind = ir.FunctionType(emitter.vector, [emitter.vector] * 2)
            function = declare(builder.module, kind, f"llvm.{name}.v{VECTOR_LENGTH}f32")
            value = emitter.canonical(builder.call(function, operands))
            builder.store(value, to, align=1)
            return []

        emitter.loop(arguments[3], [], turn)

    return emit


@intrinsic
def maximum(context, to, x, y, vectors):
    """`float_max` of `vectors` >= 1 vectors of lanes."""
    return by_address(4, _emit_extreme("maximum"))


@intrinsic
def minimum(context, to, x, y, vectors):
    """`float_min` of `vectors` >= 1 vectors of lanes."""
    return by_address(4, _emit_extreme("minimum"))
