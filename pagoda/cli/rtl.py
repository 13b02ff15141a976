"""`pagoda rtl`: a chip as Verilog."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.console import Console

from pagoda.chip.tools import require_package
from pagoda.cli.options import chip_option
from pagoda.isa.chip import Chip


@click.command()
@chip_option
@click.option(
    "-o", "--output", "folder", default="rtl-out", show_default=True,
    type=click.Path(file_okay=False, path_type=Path), help="Where the files go.",
)  # fmt: skip
def rtl(chip: Chip, folder: Path) -> None:
    """Write a chip's Verilog: the top with AXI4 and AXI4-Lite ports, every repeated unit once, a
    file list, and the map of ports and host registers.

    \b
    Example:
      pagoda rtl --chip tiny -o out/
    """
    require_package("amaranth")
    from pagoda.chip.verilog import write_verilog

    began = time.monotonic()
    with Console(stderr=True).status(f"elaborating {chip.name}"):
        try:
            written = write_verilog(chip, folder)
        except OSError as error:
            raise click.ClickException(
                f"{folder}: cannot be written ({error.strerror}); choose another -o"
            ) from error
    for path in written:
        text = path.read_text()
        modules = text.count("\nmodule ")
        counted = f", {modules} modules" if modules else ""
        click.echo(f"{path}  {len(text):,} bytes{counted}")
    click.echo(f"chip {chip.name} in {time.monotonic() - began:.1f} s")
