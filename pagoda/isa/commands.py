"""The tensor commands as one table: banks, fields, bits; encoder, decoder and printer from it.

A command is issued by ordinary word stores to the command port: word w of bank k is at
`COMMAND_PORT.base + 64 * k + 4 * w`. Words 1..15 are field registers that keep their values; the
store to word 0 ("go") issues the command, and its value holds the fields of word 0. In each
command's table below a line is

    word  name[high:low]  kind  text

and a field without bits takes the whole word. Bits that no field names are reserved and must be 0.

`access` says which bytes a command touches, `checks` what it may not do, `timing` how long it
takes and `meaning` what it computes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from pagoda.isa.accumulation import ReduceOp
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.memory_map import COMMAND_PORT
from pagoda.isa.numbers import DType

Value = TypeVar("Value")

WORDS_PER_BANK = 16
BANK_BYTES = 4 * WORDS_PER_BANK
CONTROL_BANK = 0
ACC_BIT = 1 << 31  # of a local address: set for ACC, clear for SRAM
COUNT_LIMIT = 1 << 20  # the largest extent; with 32-bit strides every hull fits 64-bit integers

# What a field's value is, and so how it is checked and printed.
KINDS = {
    "dtype": "element format",
    "type": "operand type of the matrix engine",
    "op": "reduction operator",
    "function": "vector function",
    "kind": "how an operand is laid out: 0 tile, 1 column (one element per row), 2 scalar",
    "flag": "0 or 1",
    "slot": "slot number",
    "offset": "byte offset in the slot",
    "local": "local byte address: SRAM, or ACC with bit 31 set",
    "acc": "byte address in ACC (bit 31 is ignored)",
    "count": f"extent, at most {COUNT_LIMIT}",
    "pad": "padding elements before (low half) or after (high half)",
    "stride": "local distance in bytes, unsigned",
    "dram_stride": "distance in bytes in DRAM, signed",
    "number": "signed 32-bit number",
}
MATRIX_TYPES = ("bf16", "int8")  # by code
TILE, COLUMN, SCALAR = 0, 1, 2


@dataclass(frozen=True)
class Field:
    """A field: bits `low` .. `low + width - 1` of word `word` of its command's bank."""

    name: str
    word: int
    low: int
    width: int
    kind: str
    text: str

    @property
    def signed(self) -> bool:
        return self.kind in ("dram_stride", "number")

    def extract(self, word: int) -> int:
        value = word >> self.low & (1 << self.width) - 1
        return value - (1 << self.width) if self.signed and value >> self.width - 1 else value

    def insert(self, value: int) -> int:
        """The word's bits for a value; signed 32-bit fields also take unsigned patterns."""
        return (value & (1 << self.width) - 1) << self.low

    def accepts(self, value: int) -> bool:
        return (-(1 << self.width - 1) if self.signed else 0) <= value < 1 << self.width


@dataclass(frozen=True)
class Command:
    """One command: `fields` in the order of the table, `engine` the queue it joins."""

    name: str
    bank: int
    engine: str
    fields: tuple[Field, ...]

    @cached_property
    def by_name(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    @cached_property
    def reserved(self) -> dict[int, int]:
        """Word -> bits that must be 0, for every word of the bank that exists."""
        free = {word: 0xFFFFFFFF for word in self.words}
        for field in self.fields:
            free[field.word] &= ~field.insert(-1)
        return free

    @cached_property
    def words(self) -> tuple[int, ...]:
        """The words of the bank that exist, in ascending order; 0 is go."""
        return tuple(sorted({0} | {field.word for field in self.fields}))

    def address(self, word: int) -> int:
        """Bus address of a word."""
        return COMMAND_PORT.base + BANK_BYTES * self.bank + 4 * word


def _command(name: str, bank: int, engine: str, table: str) -> Command:
    fields = []
    for line in table.strip().splitlines():
        word, place, kind, text = line.split(maxsplit=3)
        found = re.fullmatch(r"([a-z]\w*)(?:\[(\d+)(?::(\d+))?\])?", place)
        if found is None or kind not in KINDS:
            raise ValueError(f"{name}: {line.strip()!r} is no line of a command table")
        high = int(found[2] or 31) if found[2] else 31
        low = int(found[3] or found[2]) if found[2] else 0
        fields.append(Field(found[1], int(word), low, high - low + 1, kind, text))
    command = Command(name, bank, engine, tuple(fields))
    taken: dict[int, int] = {}
    for field in fields:
        bits = field.insert(-1)
        if field.word >= WORDS_PER_BANK or taken.get(field.word, 0) & bits:
            raise ValueError(f"{name}: {field.name} lies outside the bank or overlaps a field")
        taken[field.word] = taken.get(field.word, 0) | bits
    if len(command.by_name) != len(fields):
        raise ValueError(f"{name}: two fields share a name")
    return command


# Bank 0 acts on the control core itself; every word is a command of its own.
CONTROL = {"fence": 0, "barrier": 1, "exit": 2, "trap": 3}

_TRANSFER = """
    0  mem[3:0]          dtype        element format in DRAM
    0  local[7:4]        dtype        element format in SRAM or ACC
"""
_ACCUMULATE = "    0  accumulate[8]  flag  add to the elements in DRAM instead of replacing them\n"
_TILE_3D = """
    1  slot              slot         slot of the tensor
    2  offset            offset       first element really transferred
    3  address           local        first element
    4  cols              count        elements of a row
    5  rows              count        rows of a plane
    6  planes            count        planes
    7  mem_row_stride    dram_stride  from row to row in DRAM
    8  mem_plane_stride  dram_stride  from plane to plane in DRAM
    9  row_stride        stride       from row to row
    10 plane_stride      stride       from plane to plane
"""
_TILE_INDEXED = """
    1  slot              slot         slot of the tensor
    2  offset            offset       row 0 of the indexed tensor
    3  address           local        first element
    4  cols              count        elements of a row
    5  rows              count        rows, and indices
    6  indices           local        I32 indices in SRAM, one word a row
    7  mem_row_stride    dram_stride  from row to row in DRAM
    9  row_stride        stride       from row to row
"""

COMMANDS = {
    command.name: command
    for command in (
        _command("load", 1, "load", _TRANSFER.strip() + _TILE_3D.rstrip() + """
    11 pad_above[15:0]   pad          zero rows before the rows read, in each plane
    11 pad_below[31:16]  pad          zero rows after them
    12 pad_left[15:0]    pad          zero elements before those read, in each row
    12 pad_right[31:16]  pad          zero elements after them
        """),
        _command("store", 2, "store", _TRANSFER + _ACCUMULATE + _TILE_3D.strip()),
        _command("gather", 3, "load", _TRANSFER + _TILE_INDEXED.strip()),
        _command("scatter", 4, "store", _TRANSFER + _ACCUMULATE + _TILE_INDEXED.strip()),
        _command("matmul", 5, "matrix", """
    0  type[1:0]         type         0 bf16 x bf16 -> F32, 1 int8 x int8 -> I32
    0  accumulate[4]     flag         start from the elements in ACC instead of 0
    0  transpose_a[5]    flag         A is stored as [k, m]; m1, m2 and k_outer must be 1
    0  transpose_b[6]    flag         B is stored as [n, k]
    1  a                 local        A[0, 0], in SRAM
    2  m0                count        innermost count of A's rows
    3  m0_stride         stride       of m0; with transpose_a from k to k
    4  m1                count        middle count of A's rows
    5  m1_stride         stride       of m1
    6  m2                count        outermost count of A's rows
    7  m2_stride         stride       of m2
    8  k_inner           count        contiguous elements along k
    9  k_outer           count        runs of k_inner elements
    10 k_outer_stride    stride       from run to run in A
    11 b                 local        B[0, 0], in SRAM
    12 b_stride          stride       from k to k; with transpose_b from n to n
    13 n                 count        columns of B and of the result
    14 acc               acc          result[0, 0]
    15 acc_stride        stride       from row to row of the result
        """),
        _command("vector", 6, "vector", """
    0  f1[7:0]           function     first function, of a and b
    0  f2[15:8]          function     second function, of the first's result and c
    1  a_dtype[3:0]      dtype        element format of a
    1  b_dtype[7:4]      dtype        element format of b
    1  c_dtype[11:8]     dtype        element format of c
    1  dst_dtype[15:12]  dtype        element format of the result
    1  a_kind[17:16]     kind         layout of a
    1  b_kind[19:18]     kind         layout of b
    1  c_kind[21:20]     kind         layout of c
    2  a                 local        first element of a, or a scalar's 32-bit pattern
    3  a_stride          stride       from row to row; 0 repeats a tile's row
    4  b                 local        first element of b, or a scalar's 32-bit pattern
    5  b_stride          stride       from row to row; 0 repeats a tile's row
    6  c                 local        first element of c, or a scalar's 32-bit pattern
    7  c_stride          stride       from row to row; 0 repeats a tile's row
    8  dst               local        first element of the result
    9  dst_stride        stride       from row to row
    10 rows              count        rows
    11 cols              count        elements of a row
        """),
        _command("reduce", 7, "vector", """
    0  op[3:0]           op           0 fsum, 1 fmax, 2 fmin, 3 isum, 4 imax, 5 argmax
    0  first[4]          flag         start from the initial state instead of the stored one
    0  column[5]         flag         reduce along columns instead of rows
    0  dtype[11:8]       dtype        element format of the source
    1  src               local        first element of the source
    2  src_stride        stride       from row to row
    3  rows              count        rows of the source
    4  cols              count        elements of a row
    5  state             local        state: 64 words a row (argmax 128), or one row of cols words
    6  state_stride      stride       from row to row of the state
    7  start             count        column number of the first element, a multiple of 64
        """),
        _command("finish", 8, "vector", """
    0  op[3:0]           op           the operator that made the state
    0  dtype[7:4]        dtype        element format of the result
    1  state             local        first word of the state
    2  state_stride      stride       from row to row
    3  rows              count        rows
    4  dst               local        first result
    5  dst_stride        stride       from result to result
        """),
        _command("transpose", 9, "vector", """
    0  dtype[3:0]        dtype        element format of both tiles
    1  src               local        first element of the source
    2  src_stride        stride       from row to row
    3  rows              count        rows of the source
    4  cols              count        elements of a row of the source
    5  dst               local        first element of the result
    6  dst_stride        stride       from row to row
        """),
        _command("iota", 10, "vector", """
    1  dst               local        first element
    2  dst_stride        stride       from row to row
    3  rows              count        rows
    4  cols              count        elements of a row
    5  start             number       value of the first element
    6  row_step          number       added from row to row
    7  col_step          number       added from element to element
        """),
    )
}  # fmt: skip
BY_BANK = {command.bank: command for command in COMMANDS.values()}


def encode(name: str, **fields: int) -> list[tuple[int, int]]:
    """The stores that set the named fields and issue the command: (word, value), go last.

    Only words with a named field are written (the others keep their values); a field that shares
    its word with a named one, and every unnamed field of go, becomes 0. `pagoda.isa.commands`
    lists the fields. Raises ValueError for an unknown name and a value that the bits cannot hold.
    """
    command = _known(name, COMMANDS, "command")
    values = {0: 0}
    for field_name, value in fields.items():
        field = _known(field_name, command.by_name, f"{name} field")
        if not field.accepts(value):
            low = -(1 << field.width - 1) if field.signed else 0
            raise ValueError(
                f"{name}: {field_name} = {value}: the field has {field.width} bits and takes "
                f"{low} to {(1 << field.width) - 1}; choose a value in that range"
            )
        values[field.word] = values.get(field.word, 0) | field.insert(int(value))
    return [(word, values[word]) for word in sorted(values, key=lambda word: (word == 0, word))]


def decode(bank: int, words: Sequence[int]) -> tuple[Command, dict[str, int]]:
    """The command of a bank and its field values; words: the bank's 16 registers, [0] the go.

    Raises ValueError for a bank without a command.
    """
    command = BY_BANK.get(bank)
    if command is None:
        raise ValueError(f"bank {bank}: no command; the banks are 1 to {max(BY_BANK)}")
    return command, {field.name: field.extract(words[field.word]) for field in command.fields}


def disassemble(name: str, fields: Mapping[str, int]) -> str:
    """A command as text, e.g. `finish op=fsum dtype=F32 state=0x100 ...`; addresses in hex."""
    command = _known(name, COMMANDS, "command")
    shown = [_show(field, fields[field.name]) for field in command.fields if field.name in fields]
    return " ".join([name, *shown])


def _show(field: Field, value: int) -> str:
    names: Mapping[int, str] = {}
    match field.kind:
        case "dtype":
            names = {int(d): d.name for d in DType}
        case "op":
            names = {int(op): op.name.lower() for op in ReduceOp}
        case "function":
            names = {code: f.name for code, f in VECTOR_FUNCTIONS.items()}
        case "type":
            names = dict(enumerate(MATRIX_TYPES))
        case "kind":
            names = {TILE: "tile", COLUMN: "column", SCALAR: "scalar"}
        case "local" | "acc" | "offset":
            return f"{field.name}={value:#x}"
    return f"{field.name}={names.get(value, value)}"


def _known(name: str, table: Mapping[str, Value], what: str) -> Value:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(table)}."
    raise ValueError(f"no {what} {name!r}; {hint}")
