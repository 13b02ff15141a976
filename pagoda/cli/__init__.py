"""The `pagoda` command. Each subcommand is a module of this package, imported when it is called,
so that `pagoda chips` does not wait for PyTorch.

Enters: command lines. Leaves: text, JSON, exit codes (0 done, 1 an error told in one message,
2 wrong usage, 130 interrupted). May import every storey.
"""

import importlib
import sys

import click

from pagoda import __version__
from pagoda.cli.terminal import manners, write_error

# name -> one line for `pagoda --help`; the module pagoda.cli.NAME defines the command NAME.
COMMANDS = {
    "bench": "Measure: cycles, utilisation, host speed; --json for scripts.",
    "chat": "Talk to a language model that runs on the simulated chip.",
    "chips": "List the preset chips, or describe one.",
    "device": "Share one chip among programs: start, stop, status, reset.",
    "dump": "Show a kernel at every compiler stage.",
    "isa": "Print the instruction set manual, or disassemble words.",
    "rtl": "Write a chip's Verilog.",
    "run": "Run a model file (.py, .onnx), or a kernel of the library.",
    "synth": "Synthesise a chip: area by unit, clock, layout of an element.",
    "top": "Watch shared devices: load, memory, queues, programs.",
    "train": "Train a small GPT on text, or adapt SmolLM2 to it.",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"pagoda.cli.{name}"), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pagoda")
def pagoda() -> None:
    """A complete AI computing stack that needs no CUDA."""


def main() -> None:
    """Entry point: one message per error, never a traceback for a user's mistake."""
    try:
        with manners():
            pagoda.main(prog_name="pagoda", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        from pagoda.cli.errors import user_error  # late: `pagoda --help` need not wait for it

        told = user_error(error)
        if told is None and isinstance(error, OSError):
            told = write_error(error)
        if told is None:
            raise
        click.echo(f"error: {told}", err=True)
        sys.exit(1)
