"""`pagoda chips`: the presets with their peak figures, or every field of one chip."""

from dataclasses import fields

import click
from rich.console import Console
from rich.table import Table

from pagoda.isa.chip import PRESETS, Chip, load_chip


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count} B"


def _overview(console: Console) -> None:
    table = Table(title="Preset chips", box=None, header_style="bold")
    for heading in (
        "name", "cores", "MHz", "array", "peak GMAC/s", "SRAM", "ACC", "DRAM", "GB/s",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    for chip in PRESETS.values():
        table.add_row(
            chip.name,
            str(chip.cores),
            f"{chip.clock_hz / 1e6:g}",
            f"{chip.rows}x{chip.cols}",
            f"{chip.peak_macs_per_second / 1e9:,.1f}",
            _bytes(chip.sram_bytes),
            _bytes(chip.acc_bytes),
            _bytes(chip.dram_bytes),
            f"{float(chip.peak_dram_bytes_per_second) / 1e9:,.1f}",
        )
    console.print(table)
    note = "SRAM and ACC are per core; GMAC/s and GB/s are peaks of the whole chip."
    console.print(note, style="dim")


def _details(console: Console, chip: Chip) -> None:
    table = Table(title=f"Chip {chip.name}", box=None, show_header=False)
    for field in fields(chip):
        value = getattr(chip, field.name)
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
        if field.name == "dram_bytes_per_cycle":
            shown = f"{float(value):g}"
        elif field.name.endswith("_bytes"):
            shown = f"{value} ({_bytes(value)})"
        table.add_row(field.name, shown)
    console.print(table)


@click.command()
@click.argument("name", required=False, metavar="[NAME|FILE]")
def chips(name: str | None) -> None:
    """List the preset chips, or describe one preset or chip file."""
    console = Console()
    if name is None:
        _overview(console)
    else:
        _details(console, load_chip(name))
