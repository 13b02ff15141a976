"""Loops over lanes that LLVM's vectoriser does not find, as vector code: some three times faster
than lane by lane.

Each works on whole vectors of VECTOR_LENGTH lanes at byte addresses; what remains of a run is left
to the loops in `functions` and `convert`. The bits are those of `numbers`, whose functions say what
is computed; here all of it fits in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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
    """A table's rows as sixteen bytes each, which is one load: C1, C0, C2, 0."""
    rows = np.zeros((len(table), 4), np.int32)
    rows[:, :3] = table[:, [1, 0, 2]]
    assert (rows[:, :3] == table[:, [1, 0, 2]]).all()
    return rows


EXP2_ROWS, RECIPROCAL_ROWS = _rows(EXP2_TABLE), _rows(RECIPROCAL_TABLE)


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

    def most(self, a: ir.Value | int, b: ir.Value | int) -> ir.Value:
        return self.select(self.compare(">", a, b), a, b)

    def any(self, mask: ir.Value) -> ir.Value:
        """Whether the mask holds in some lane, as one bit."""
        bits = self.builder.bitcast(mask, ir.IntType(VECTOR_LENGTH))
        return self.builder.icmp_unsigned("!=", bits, bits.type(0))

    def real(self, value: ir.Value | float) -> ir.Value:
        """A pattern, or a number in every lane, as binary32."""
        if isinstance(value, float):
            return ir.Constant(self.emitter.vector, [value] * VECTOR_LENGTH)
        return self.builder.bitcast(value, self.emitter.vector)

    def pattern(self, value: ir.Value) -> ir.Value:
        return self.builder.bitcast(value, self.emitter.words)

    def pattern_of_int(self, value: ir.Value) -> ir.Value:
        """The pattern of a signed integer as binary32, rounded to nearest even."""
        return self.pattern(self.builder.sitofp(value, self.emitter.vector))

    def quadratic(self, rows: list[ir.Value], position: ir.Value) -> ir.Value:
        """y of `pagoda.isa.tables`, with C1 read as unsigned.

        rows: as `joined_rows` makes them of EXP2_ROWS or such; position: d shifted up to bit 31, so
        that (C * d) >> w is the upper half of C times it. Even and odd lanes are apart, for the
        products have 64 bits.
        """
        builder, unpack = self.builder, self.emitter.unpack
        pairs = ir.VectorType(I64, VECTOR_LENGTH // 2)
        half, low_word = (ir.Constant(pairs, [n] * pairs.count) for n in (32, 0xFFFFFFFF))

        def product(a: ir.Value, b: ir.Value) -> ir.Value:
            """Of the lower words of pairs."""
            words = (builder.and_(builder.bitcast(value, pairs), low_word) for value in (a, b))
            return builder.mul(*words)

        odd = builder.lshr(builder.bitcast(position, pairs), half)
        values = []
        for first, second, where in ((*rows[::2], position), (*rows[1::2], odd)):
            c1_c0, c2 = unpack(first, second, [0, 1, 4, 5]), unpack(first, second, [2, 3, 6, 7])
            inner_c0 = self.add(self.pattern(builder.lshr(product(c2, where), half)), c1_c0)
            values.append(self.add(self.pattern(product(inner_c0, where)), inner_c0))
        # Now y is in the upper words.
        lanes = [lane + side for lane in range(1, VECTOR_LENGTH, 2) for side in (0, VECTOR_LENGTH)]
        return self.emitter.shuffle(*values, lanes)

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


# Table functions ----------------------------------------------------------------------------------


class _TableFunction(Protocol):
    """What the loop of `_emit_table` leaves open.

    Most vectors take the short way, for arguments in whose every lane neither x nor the result is
    subnormal, infinite or NaN. One unusual lane sends the vector over `tamed` and `unusual_value`.
    """

    def unusual(self, words: _Words, x: ir.Value) -> ir.Value:
        """Mask of the lanes that the short way does not serve."""

    def tamed(self, words: _Words, x: ir.Value) -> ir.Value:
        """Any x as a pattern that `place` takes."""

    def place(self, words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(byte offset of the row, position as `quadratic` wants it, a note for the values)."""

    def usual_value(self, words: _Words, x: ir.Value, y: ir.Value, note: ir.Value) -> ir.Value:
        """The function's value as a pattern, from what `quadratic` gave."""

    def unusual_value(self, words: _Words, x: ir.Value, y: ir.Value, note: ir.Value) -> ir.Value:
        """The same for any x."""


def _emit_table(function: _TableFunction) -> Callable:
    """Each turn of the loop finds the rows of the vector that comes next and evaluates the one
    before it: what waits for addresses, which go through memory, has something else to do."""

    def emit(emitter: Emitter, arguments: list[ir.Value]) -> None:
        builder, words = emitter.builder, _Words(emitter)
        table, source, target, work = (builder.inttoptr(a, POINTER) for a in arguments[:4])
        vectors = arguments[4]
        size = 4 * VECTOR_LENGTH

        def unless_usual(unusual: ir.Value, usual: ir.Value, other: Callable) -> ir.Value:
            before = builder.block
            with builder.if_then(unusual, likely=False):
                value, there = other(), builder.block
            chosen = builder.phi(usual.type)
            chosen.add_incoming(usual, before)
            chosen.add_incoming(value, there)
            return chosen

        def offsets_at(turn: ir.Value) -> ir.Value:
            """Where the rows' offsets for this turn are kept: there are two such places."""
            return emitter.at(work, builder.mul(builder.and_(turn, I64(1)), I64(size)))

        def find(index: ir.Value, turn: ir.Value) -> list[ir.Value]:
            x = emitter.load(emitter.words, emitter.at(source, builder.mul(index, I64(size))), 1)
            unusual = words.any(function.unusual(words, x))
            tame = unless_usual(unusual, x, lambda: function.tamed(words, x))
            offset, position, note = function.place(words, tame)
            # By halves: from a store of 64 bytes, loads of its parts are served slowly.
            step = min(VECTOR_LENGTH, 8)
            for first in range(0, VECTOR_LENGTH, step):
                part = emitter.shuffle(offset, offset, list(range(first, first + step)))
                builder.store(part, emitter.at(offsets_at(turn), 4 * first), align=1)
            return [x, unusual, position, note]

        def turn(index: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            following = builder.add(index, I64(1))
            more = builder.icmp_signed("<", following, vectors)
            found = find(builder.select(more, following, index), following)
            x, unusual, position, note = state
            rows = []
            for lane in range(VECTOR_LENGTH):
                offset = emitter.load(I32, emitter.at(offsets_at(index), 4 * lane), 1)
                rows.append(emitter.at(table, builder.zext(offset, I64)))
            y = words.quadratic(emitter.joined_rows(rows, 0), position)
            usual = function.usual_value(words, x, y, note)
            value = unless_usual(unusual, usual, lambda: function.unusual_value(words, x, y, note))
            builder.store(value, emitter.at(target, builder.mul(index, I64(size))), align=1)
            return found

        emitter.loop(vectors, find(I64(0), I64(0)), turn)

    return emit


class _Exp2:
    # Added to x, it leaves an integer near x, less the 30 bits of y's fraction, in the lower bits.
    _SHIFTER = 1.5 * 2**23 - 30
    _SHIFTER_PATTERN = 0x4B400000 - 30

    def unusual(self, words: _Words, x: ir.Value) -> ir.Value:
        return words.compare(">", words.and_(x, _MAGNITUDE), 0x42FC0000)  # 126

    def tamed(self, words: _Words, x: ir.Value) -> ir.Value:
        """Between -150 and 128, whose power is infinite; NaN is 128."""
        builder, x = words.builder, words.real(x)
        low, high = words.real(-150.0), words.real(128.0)
        x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
        return words.pattern(builder.select(builder.fcmp_ordered(">", x, low), x, low))

    def place(self, words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        builder, x = words.builder, words.real(x)
        shifted = builder.fadd(x, words.real(self._SHIFTER))
        near = builder.fsub(shifted, words.real(self._SHIFTER))
        rest = builder.fmul(builder.fsub(x, near), words.real(2.0**30))  # exact
        # floor((x - near) * 2^30): its sign belongs to the whole part, and below are row and d.
        fixed = builder.fptosi(words.emitter.floor(rest), words.emitter.words)
        power = words.add(words.pattern(shifted), words.ashr(fixed, 31))
        return words.and_(words.lshr(fixed, 19), 127 << 4), words.shl(fixed, 9), power

    def usual_value(self, words: _Words, x: ir.Value, y: ir.Value, note: ir.Value) -> ir.Value:
        return words.add(words.pattern_of_int(y), words.shl(note, 23))

    def unusual_value(self, words: _Words, x: ir.Value, y: ir.Value, note: ir.Value) -> ir.Value:
        """y has 31 bits, so 7 of them are dropped, or more if the result is subnormal."""
        whole = words.sub(note, self._SHIFTER_PATTERN)
        lost = words.most(words.sub(-119, whole), 7)
        field = words.most(words.add(whole, 126), 0)
        value = words.add(words.shl(field, 23), words.rounded(y, lost))
        value = words.select(words.above(x, 0xC315FFFF), 0, value)  # from -150 down
        nan = words.compare(">", words.and_(x, _MAGNITUDE), _INFINITY)
        return words.select(nan, CANONICAL_NAN, value)


class _Reciprocal:
    def unusual(self, words: _Words, x: ir.Value) -> ir.Value:
        """Not from 2^-126 to 2^126."""
        magnitude = words.and_(x, _MAGNITUDE)
        return words.above(words.sub(magnitude, 1 << 23), (253 << 23) - (1 << 23))

    def _argument(self, words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(field, pattern): |x| is (1 + fraction / 2^23) * 2^(field - 127), where it is a number;
        field is below 1 for subnormal ones. The fraction is the pattern's."""
        magnitude = words.and_(x, _MAGNITUDE)
        number = words.builder.and_(
            words.compare(">", magnitude, 0), words.compare("<", magnitude, _INFINITY)
        )
        usable = words.select(number, magnitude, _ONE)
        # A subnormal's significand, as float, is normalised.
        normalised = words.pattern_of_int(usable)
        subnormal = words.compare("<", usable, 1 << 23)
        field = words.select(
            subnormal, words.sub(words.lshr(normalised, 23), 149), words.lshr(usable, 23)
        )
        return field, words.select(subnormal, normalised, usable)

    def tamed(self, words: _Words, x: ir.Value) -> ir.Value:
        return self._argument(words, x)[1]

    def place(self, words: _Words, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        position = words.shl(x, 17)
        return words.and_(words.lshr(x, 11), 255 << 4), position, position

    # `quadratic` took C1 and what it adds to it, which is negative, for 2^32 more; its product with
    # the position is too large by the position.

    def usual_value(self, words: _Words, x: ir.Value, y: ir.Value, note: ir.Value) -> ir.Value:
        """The field of y plus 97 less that of x, under the sign of x."""
        value = words.pattern_of_int(words.sub(y, note))
        sign_and_complement = words.and_(words.xor(x, 255 << 23), 511 << 23)
        return words.add(words.add(value, sign_and_complement), (97 - 255) << 23)

    def unusual_value(self, words: _Words, x: ir.Value, y: ir.Value, note: ir.Value) -> ir.Value:
        """y, over 2^30, is in (1/2, 1]: it has 30 bits, or 31 for 1."""
        y = words.sub(y, note)
        field, _ = self._argument(words, x)
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
def exp2(context, table, x, to, work, vectors):
    """2^x of `vectors` >= 1 vectors of lanes. table: address of EXP2_ROWS; work: of two vectors."""
    return by_address(5, _emit_table(_Exp2()))


@intrinsic
def reciprocal(context, table, x, to, work, vectors):
    """1 / x by table; as `exp2`, with RECIPROCAL_ROWS."""
    return by_address(5, _emit_table(_Reciprocal()))


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
