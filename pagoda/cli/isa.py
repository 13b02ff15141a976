"""`pagoda isa`: the manual, one command's or instruction's row of it, or words disassembled."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table

from pagoda.isa.commands import COMMANDS, Command
from pagoda.isa.manual import manual
from pagoda.isa.meaning import MEANINGS
from pagoda.isa.rv32 import CYCLES, RV32
from pagoda.isa.table import Row


def _decode(words: Sequence[str]) -> None:
    if not words:
        raise click.UsageError("--decode takes words, but none is given; write some in hex.")
    for position, text in enumerate(words):
        try:
            word = int(text, 16)
        except ValueError:
            word = -1
        if not 0 <= word < 1 << 32:
            raise click.UsageError(
                f"word {text!r}: it is a 32-bit number in hex; write for example 00c32283."
            )
        click.echo(f"{4 * position:04x}  {word:08x}  {RV32.disassemble(word)}")


def _command(command: Command) -> None:
    click.echo(f"{command.name}: bank {command.bank}, engine {command.engine}\n")
    click.echo(f"{inspect.getdoc(MEANINGS[command.name])}\n")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("word", "bits", "field", "kind", "text"):
        table.add_column(heading, no_wrap=heading != "text")
    for field in command.fields:
        high = field.low + field.width - 1
        bits = f"{high}:{field.low}" if field.width > 1 else f"{high}"
        table.add_row(str(field.word), bits, field.name, field.kind, field.text)
    Console().print(table, markup=False)


def _instruction(row: Row) -> None:
    if row.cycle_class == "branch":
        cycles = f"{CYCLES['branch taken']} taken, {CYCLES['branch not taken']} not taken"
    else:
        cycles = str(CYCLES.get(row.cycle_class, "none: it faults"))
    for label, text in (
        ("assembly", row.assembly),
        ("encoding", f"{row.layout} (bit 31 first)"),
        ("meaning", row.summary),
        ("cycles", cycles),
    ):
        click.echo(f"{label:9} {text}")


def _show(name: str) -> None:
    """A tensor command has precedence: of equal names (none today) it is the rarer sight."""
    if name in COMMANDS:
        _command(COMMANDS[name])
    elif name in RV32.rows:
        _instruction(RV32.rows[name])
    else:
        near = difflib.get_close_matches(name, [*COMMANDS, *RV32.rows], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "pagoda isa prints them all."
        raise click.UsageError(
            f"{name!r} is no instruction; the tensor commands are {', '.join(COMMANDS)}; {hint}"
        )


@click.command()
@click.argument("names", nargs=-1, metavar="[COMMAND|WORD]...")
@click.option("--decode", is_flag=True, help="Disassemble the WORDs (hex) as RV32IM code.")
def isa(names: tuple[str, ...], decode: bool) -> None:
    """Print the instruction set manual, explain single commands, or disassemble words.

    A COMMAND is a tensor command or an RV32IM instruction.

    \b
    Examples:
      pagoda isa
      pagoda isa matmul
      pagoda isa --decode 00c32283 fe0296e3
    """
    if decode:
        _decode(names)
    elif names:
        for name in names:
            _show(name)
    else:
        click.echo_via_pager(manual().rstrip("\n"))
