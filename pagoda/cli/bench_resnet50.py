"""`pagoda bench resnet50`: ResNet-50 on the chip and on one of 64 x 64, int8 and bf16; depthwise
layers, those of MobileNetV2, apart."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from pagoda.cli.options import device_chip_option, json_option
from pagoda.isa.chip import Chip
from pagoda.runtime import host_threads

if TYPE_CHECKING:
    from pagoda.pytorch.vision_figures import Figures

TYPES = ("int8", "bf16")
LARGE = 64  # rows and columns of the larger array


def enlarged(chip: Chip) -> Chip | None:
    """The chip with a 64 x 64 array; lanes, SRAM and ACC grow with its edge, bandwidth with its
    area. None where the array is not smaller and square."""
    factor = LARGE // chip.rows
    if chip.rows != chip.cols or factor < 2:
        return None
    return replace(
        chip, name=f"{chip.name}-{LARGE}", rows=LARGE, cols=LARGE, lanes=factor * chip.lanes,
        sram_bytes=factor * chip.sram_bytes, acc_bytes=factor * chip.acc_bytes,
        dram_bytes_per_cycle=factor**2 * chip.dram_bytes_per_cycle,
    )  # fmt: skip


def measure(
    chip: Chip, dtype: str, batch: int, size: int, layers: bool, console: Console
) -> tuple[dict[str, object], Figures]:
    """The row of one type, and the figures it was made from, with `layers` with a profile."""
    from pagoda.pytorch.vision_figures import host_seconds, run

    with console.status(f"resnet50 {dtype} on {chip.name}"):
        found = run(chip, "resnet50", dtype, batch, size, layers)
        torch_seconds = host_seconds("resnet50", batch, size)
    row: dict[str, object] = {
        "dtype": dtype,
        "cycles": found.cycles,
        "macs": found.macs,
        "utilisation": round(found.utilisation, 4),
        "host_seconds": round(found.seconds, 2),
        "host_ratio": round(torch_seconds / found.seconds, 3),
    }
    large = enlarged(chip)
    if large is not None:
        with console.status(f"resnet50 {dtype} on {large.name}"):
            there = run(large, "resnet50", dtype, batch, size, own=True)
        row["cycles_64"] = there.cycles
        row["utilisation_64"] = round(there.utilisation, 4)
        row["scaling_64"] = round(found.cycles / there.cycles, 2)
    with console.status(f"mobilenet_v2 {dtype} on {chip.name}"):
        mobile = run(chip, "mobilenet_v2", dtype, batch, size, profiled=True)
    row["mobilenet_v2"] = {
        "cycles": mobile.cycles,
        "depthwise_cycles": mobile.depthwise_cycles,
        "depthwise_macs": mobile.depthwise_macs,
        "depthwise_lane_utilisation": round(mobile.depthwise_lane_utilisation, 4),
        "other_utilisation": round(
            mobile.macs / chip.macs_per_cycle / (mobile.cycles - mobile.depthwise_cycles), 4
        ),
    }
    return row, found


@click.command()
@device_chip_option
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1, 64))
@click.option(
    "--size", default=224, show_default=True, type=click.IntRange(32, 1024),
    help="Rows and columns of an image.",
)  # fmt: skip
@click.option("--type", "dtype", type=click.Choice(TYPES), help="Only one type; without: both.")
@click.option("--layers", is_flag=True, help="Also where the cycles go, kernel by kernel.")
@json_option
def resnet50(
    chip: Chip, batch: int, size: int, dtype: str | None, layers: bool, as_json: bool
) -> None:
    """ResNet-50 v1.5: use of the array, speed-up of a 64 x 64 one, depthwise layers.

    Random weights and images of a fixed seed; batch norms are folded. Utilisation counts the
    model's own multiply-accumulates against the peak in all cycles. The 64 x 64 chip is a
    simulator of its own, whatever PAGODA_DEVICE says.
    """
    console = Console(stderr=True)
    rows = []
    for each in TYPES if dtype is None else (dtype,):
        row, figures = measure(chip, each, batch, size, layers, console)
        rows.append(row)
        if layers:
            click.echo(f"resnet50 {each}: {figures.profile}\n")
    table = Table(box=None, header_style="bold")
    headings = ("type", "cycles", "utilisation", "64 x 64", "scaling", "depthwise lanes", "ratio")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for row in rows:
        table.add_row(
            str(row["dtype"]),
            f"{row['cycles']:,}",
            f"{row['utilisation']:.3f}",
            f"{row['utilisation_64']:.3f}" if "utilisation_64" in row else "-",
            f"{row['scaling_64']:.1f}" if "scaling_64" in row else "-",
            f"{row['mobilenet_v2']['depthwise_lane_utilisation']:.3f}",
            f"{row['host_ratio']:.2f}",
        )
    Console().print(table)
    click.echo(
        f"batch {batch}, {size} x {size} on {chip.name}; ratio: simulation over torch fp32, "
        f"{host_threads()} threads each"
    )
    if as_json:
        worst = {name: min(row[name] for row in rows) for name in ("utilisation", "scaling_64")
                 if all(name in row for row in rows)}  # fmt: skip
        head = {"chip": chip.name, "batch": batch, "size": size, **worst}
        click.echo(json.dumps({**head, **{str(row["dtype"]): row for row in rows}}))
