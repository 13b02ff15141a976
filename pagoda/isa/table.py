"""The machinery of an instruction table: one row per instruction, every reader derived from it.

A row is a layout (written as the RISC-V manual draws it, most significant bit first), an assembly
form, a cycle class and a meaning. From the rows come the encoder, the decoder, the disassembler,
the definition interpreter, the manual and the patterns of the RTL decoder.

A layout is a list of words:

    0110011        fixed bits
    rd             a field of 5 bits: a register number
    imm[11:0]      a field, or a part of one: these bits of its value stand here
    offset[4:1|11] several parts side by side, most significant first
    -----          bits that the hardware ignores and the encoder leaves 0

Rejected when the table is built, that is at import: a layout that is not exactly 32 bits; a field
with a bit missing or given twice; fields that the layout, the assembly form and the meaning do not
share; and two rows that some word would match both.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

WORD_BITS = 32
OPCODE_MASK = 0x7F  # bits 6..0: every row fixes them, so they index the decoder
REGISTER_BITS = 5

_FIELD_NAME = re.compile(r"[a-z]\w*")


class FieldKind(Enum):
    """What a field's value is, and so how it is read and printed."""

    REGISTER = "a register number"
    SIGNED = "a two's complement number"
    UNSIGNED = "an unsigned number"
    PC_OFFSET = "a signed distance in bytes from the instruction's address"
    ORDERING = "a set of the accesses i, o, r, w that a fence orders"


@dataclass(frozen=True)
class Piece:
    """`width` bits of a field's value: from `value_bit` up in the value, `word_bit` in the word."""

    value_bit: int
    word_bit: int
    width: int


@dataclass(frozen=True)
class Field:
    """A field of a row. Bits of the value below the lowest piece are always 0 (branch offsets)."""

    name: str
    kind: FieldKind
    pieces: tuple[Piece, ...]

    @cached_property
    def signed(self) -> bool:
        return self.kind in (FieldKind.SIGNED, FieldKind.PC_OFFSET)

    @cached_property
    def values(self) -> range:
        """Every value that the field can hold."""
        step = 1 << min(piece.value_bit for piece in self.pieces)
        end = 1 << max(piece.value_bit + piece.width for piece in self.pieces)
        return range(-end // 2, end // 2, step) if self.signed else range(0, end, step)

    def extract(self, word: int) -> int:
        value = 0
        for piece in self.pieces:
            value |= (word >> piece.word_bit & (1 << piece.width) - 1) << piece.value_bit
        return value if value < self.values.stop else value - 2 * self.values.stop

    def insert(self, value: int) -> int:
        """The word's bits for a value of `values`; all other bits are 0."""
        word = 0
        for piece in self.pieces:
            word |= (value >> piece.value_bit & (1 << piece.width) - 1) << piece.word_bit
        return word

    def text(self, value: int, pc: int | None) -> str:
        """The value as assembly text; with a pc, an offset becomes the address it leads to."""
        if self.kind is FieldKind.REGISTER:
            return f"x{value}"
        if self.kind is FieldKind.ORDERING:
            accesses = zip("iorw", (8, 4, 2, 1), strict=True)
            return "".join(letter for letter, bit in accesses if value & bit) or "0"
        if self.kind is FieldKind.PC_OFFSET and pc is not None:
            return f"{pc + value & 0xFFFFFFFF:#x}"
        return str(value)


@dataclass(frozen=True)
class Row:
    """One instruction. pattern: 32 characters 0, 1 and - (field or ignored), bit 31 first."""

    name: str
    layout: str
    pattern: str
    fields: tuple[Field, ...]  # in the order of the assembly form
    assembly: str
    cycle_class: str
    meaning: Callable

    @cached_property
    def mask(self) -> int:
        """The bits that the row fixes."""
        return int(self.pattern.translate(str.maketrans("01-", "110")), 2)

    @cached_property
    def match(self) -> int:
        """Their values: a word is this instruction if `word & mask == match`."""
        return int(self.pattern.replace("-", "0"), 2)

    @cached_property
    def summary(self) -> str:
        """What the instruction does, in words: the meaning's docstring."""
        return inspect.getdoc(self.meaning) or ""

    def extract(self, word: int) -> dict[str, int]:
        """Field name -> value, for a word that matches this row."""
        return {field.name: field.extract(word) for field in self.fields}

    def text(self, values: Mapping[str, int], pc: int | None = None) -> str:
        """Assembly text for these field values."""
        by_name = {field.name: field for field in self.fields}

        def operand(found: re.Match) -> str:
            field = by_name[found[0]]
            return field.text(values[field.name], pc)

        name, space, operands = self.assembly.partition(" ")
        return name + space + _FIELD_NAME.sub(operand, operands)


class InstructionTable:
    """Rows by name, in the order of their declaration."""

    def __init__(self, name: str, field_kinds: Mapping[str, FieldKind]):
        self.name = name
        self.field_kinds = dict(field_kinds)
        self.rows: dict[str, Row] = {}
        self._by_opcode: dict[int, list[Row]] = {}

    def row(self, layout: str, assembly: str, cycle_class: str) -> Callable[[Callable], Callable]:
        """Declare an instruction; the decorated function is its meaning, called by field name.

        The function is named like the instruction (with a `_` after a Python keyword), its
        docstring is the manual's text. Raises ValueError as the module says.
        """

        def declare(meaning: Callable) -> Callable:
            self._add(_make_row(layout, assembly, cycle_class, meaning, self.field_kinds))
            return meaning

        return declare

    def _add(self, new: Row) -> None:
        if new.name in self.rows:
            raise ValueError(f"{new.name}: {self.name} already has a row of this name")
        opcode = new.match & OPCODE_MASK
        for old in self._by_opcode.get(opcode, ()):
            common = old.mask & new.mask
            if old.match & common == new.match & common:
                word = old.match | new.match
                raise ValueError(f"{new.name}: overlaps {old.name}: {word:#010x} would mean both")
        self.rows[new.name] = new
        self._by_opcode.setdefault(opcode, []).append(new)

    def find(self, word: int) -> Row | None:
        """The row that a 32-bit word matches, or None if it is no instruction."""
        for row in self._by_opcode.get(word & OPCODE_MASK, ()):
            if word & row.mask == row.match:
                return row
        return None

    def decode(self, word: int) -> tuple[Row, dict[str, int]]:
        """The row of a 32-bit word and its field values. Raises ValueError if there is none."""
        row = self.find(word)
        if row is None:
            raise ValueError(f"{word:#010x} is no instruction of {self.name}")
        return row, row.extract(word)

    def encode(self, name: str, **fields: int) -> int:
        """The 32-bit word of an instruction, e.g. `encode("lw", rd=5, imm=12, rs1=6)`.

        Registers are numbers 0..31, offsets are in bytes, an upper immediate (`uimm`) is the 20
        bits that assembly shows. Raises ValueError.
        """
        row = self.rows.get(name)
        if row is None:
            near = difflib.get_close_matches(name, self.rows, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see the table's rows."
            raise ValueError(f"{self.name} has no instruction {name!r}; {hint}")
        names = [field.name for field in row.fields]
        if set(fields) != set(names):
            expected = f"takes the fields {', '.join(names)}" if names else "takes no fields"
            raise ValueError(
                f"{name} {expected}, but was given {', '.join(fields) or 'none'}; "
                f"its form is `{row.assembly}`."
            )
        word = row.match
        for field in row.fields:
            word |= field.insert(_checked(name, field, fields[field.name]))
        return word

    def disassemble(self, word: int, pc: int | None = None) -> str:
        """A word as LLVM prints it without aliases, e.g. `lw x5, 12(x6)`.

        A branch or jal shows its offset in bytes or, given the pc, the address it leads to. What
        is no instruction becomes `.word 0x...`.
        """
        row = self.find(word)
        return f".word {word:#010x}" if row is None else row.text(row.extract(word), pc)


def _checked(name: str, field: Field, value: int) -> int:
    if hasattr(value, "__index__") and (number := operator.index(value)) in field.values:
        return number
    step = f" in steps of {field.values.step}" if field.values.step > 1 else ""
    raise ValueError(
        f"{name}: {field.name} = {value!r} is not possible: the field is {field.kind.value}, "
        f"an integer from {field.values[0]} to {field.values[-1]}{step}."
    )


def _make_row(
    layout: str,
    assembly: str,
    cycle_class: str,
    meaning: Callable,
    kinds: Mapping[str, FieldKind],
) -> Row:
    name, _, operands = assembly.partition(" ")
    if meaning.__name__.rstrip("_") != name:
        raise ValueError(f"{name}: its meaning is the function {meaning.__name__}; rename one")
    pattern, pieces = _parse_layout(name, layout)
    if "-" in pattern[-OPCODE_MASK.bit_length() :]:
        raise ValueError(f"{name}: bits 6..0 are the opcode and must be fixed")
    for field, parts in pieces.items():
        if field not in kinds:
            raise ValueError(f"{name}: field {field} has no kind; the table knows {list(kinds)}")
        _check_field_bits(name, field, kinds[field], parts)
    printed = _FIELD_NAME.findall(operands)
    if sorted(printed) != sorted(pieces):
        raise ValueError(f"{name}: the layout has fields {list(pieces)}, `{assembly}` {printed}")
    parameters = list(inspect.signature(meaning).parameters)[1:]
    if sorted(parameters) != sorted(pieces):
        raise ValueError(f"{name}: the layout has fields {list(pieces)}, its meaning {parameters}")
    fields = tuple(Field(field, kinds[field], tuple(pieces[field])) for field in printed)
    return Row(name, layout, pattern, fields, assembly, cycle_class, meaning)


def _parse_layout(name: str, layout: str) -> tuple[str, dict[str, list[Piece]]]:
    """The pattern of a layout, and each field's pieces."""
    pattern = ""
    pieces: dict[str, list[Piece]] = {}
    for item in layout.split():
        if re.fullmatch(r"[01]+|-+", item):
            pattern += item
            continue
        found = re.fullmatch(r"([a-z]\w*)(?:\[([\d:|]+)\])?", item)
        if found is None:
            raise ValueError(f"{name}: {item!r} in the layout is neither bits nor a field")
        for part in (found[2] or f"{REGISTER_BITS - 1}:0").split("|"):
            high, _, low = part.partition(":")
            low = low or high
            width = int(high) - int(low) + 1
            if width < 1:
                raise ValueError(f"{name}: {item}: {part} runs upwards; write the high bit first")
            pattern += "-" * width
            word_bit = WORD_BITS - len(pattern)
            pieces.setdefault(found[1], []).append(Piece(int(low), word_bit, width))
    if len(pattern) != WORD_BITS:
        raise ValueError(f"{name}: the layout accounts for {len(pattern)} bits, not {WORD_BITS}")
    return pattern, pieces


def _check_field_bits(name: str, field: str, kind: FieldKind, pieces: list[Piece]) -> None:
    bits = sorted(p.value_bit + k for p in pieces for k in range(p.width))
    twice = sorted({bit for bit in bits if bits.count(bit) > 1})
    if twice:
        raise ValueError(f"{name}: {field} has bits {twice} more than once")
    lowest = 1 if kind is FieldKind.PC_OFFSET else 0  # offsets are even, their bit 0 is implied
    missing = sorted(set(range(lowest, bits[-1])) - set(bits))
    if missing:
        raise ValueError(f"{name}: {field} lacks bits {missing}")
