"""Command IR: what is left of a kernel once its tiles have addresses.

    statement := For | If | Let                  as in the tile IR, with command IR bodies
               | LoadWord(name, address)         name := lw from the SRAM window
               | Issue(command, words, go)       before `fields.hoist_fields`: all words
               | SetField(bank, word, value)     a store to a field register
               | Go(bank, value)                 the store that issues a command
               | Control(word, value)            barrier, trap

Values are scalars over the kernel's arguments and variables; `Slot` and `Offset` name a tensor's
first two argument words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pagoda.compiler.scalar import Int, Scalar
from pagoda.compiler.tile_ir import Body, For, If, Let, Statement
from pagoda.isa.commands import BY_BANK, CONTROL, TILE, decode, disassemble


@dataclass(frozen=True)
class LoadWord(Statement):
    """name := the word at a local SRAM address (a byte offset into the window)."""

    name: str
    address: Scalar


@dataclass(frozen=True)
class Issue(Statement):
    """A whole command: (word, value) for every field word it reads, and the value of go."""

    bank: int
    words: tuple[tuple[int, Scalar], ...]
    go: Scalar


@dataclass(frozen=True)
class SetField(Statement):
    bank: int
    word: int
    value: Scalar


@dataclass(frozen=True)
class Go(Statement):
    bank: int
    value: Scalar


@dataclass(frozen=True)
class Control(Statement):
    word: int
    value: Scalar


def command_text(body: Body) -> str:
    """The `commands` stage of `pagoda dump`: one store a line, inside its loops."""
    return "\n".join(_lines(body, "")) + "\n"


def _lines(body: Body, indent: str) -> Iterator[str]:
    for statement in body:
        match statement:
            case For(variable, start, stop, step, inner):
                yield f"{indent}for {variable} in range({start}, {stop}, {step}):"
                yield from _lines(inner, indent + "  ")
            case If(condition, then, otherwise):
                yield f"{indent}if {condition}:"
                yield from _lines(then, indent + "  ")
                if otherwise:
                    yield f"{indent}else:"
                    yield from _lines(otherwise, indent + "  ")
            case Let(name, value):
                yield f"{indent}{name} = {value}"
            case LoadWord(name, address):
                yield f"{indent}{name} = sram[{address}]"
            case SetField(bank, word, value):
                yield f"{indent}{BY_BANK[bank].name}.{_word_name(bank, word)} = {_value(value)}"
            case Go(bank, value):
                yield f"{indent}{_go_text(bank, value)}"
            case Control(word, value):
                name = next(name for name, code in CONTROL.items() if code == word)
                yield f"{indent}{name} {value}"
            case Issue(bank, words, go):
                shown = ", ".join(f"{_word_name(bank, w)}={_value(v)}" for w, v in words)
                yield f"{indent}{_go_text(bank, go)} {shown}"


def _word_name(bank: int, word: int) -> str:
    return "/".join(f.name for f in BY_BANK[bank].fields if f.word == word)


def _value(value: Scalar) -> str:
    if isinstance(value, Int) and not -4096 < value.value < 1 << 20:
        return hex(value.value & 0xFFFFFFFF)
    return str(value)


def _go_text(bank: int, value: Scalar) -> str:
    name = BY_BANK[bank].name
    if not isinstance(value, Int):
        return f"{name} go {value}"
    command, fields = decode(bank, [value.value & 0xFFFFFFFF] + [TILE] * 15)
    shown = {f.name: fields[f.name] for f in command.fields if f.word == 0}
    return disassemble(name, shown)
