"""`pagoda synth`: area by unit, critical path and clock of a chip; the layout of an element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from pagoda.chip.tools import require_package
from pagoda.cli.options import chip_option, json_option
from pagoda.isa.chip import Chip

if TYPE_CHECKING:
    from pagoda.chip.synth_result import Layout, Synthesis

UNITS = (
    "pe", "array", "matrix", "vector", "load", "store", "window", "command-port", "control",
    "memory", "core", "chip",
)  # fmt: skip
TARGETS = {
    "asic": "180 nm cells with delays (yosys, OpenSTA)",
    "sky130": "areas of 130 nm cells (yosys)",
    "ecp5": "an FPGA, placed and routed (yosys, nextpnr)",
}
SECONDS = 3600
STEPS_SHOWN = 12  # of the critical path, the slowest
NAME_SHOWN = 64  # characters of a cell's name; a mapper's names tell their cell's history


@click.command()
@chip_option
@click.option(
    "--target", type=click.Choice(list(TARGETS)), default="asic", show_default=True,
    help="; ".join(f"{name}: {text}" for name, text in TARGETS.items()) + ".",
)  # fmt: skip
@click.option(
    "--unit", type=click.Choice(UNITS), default="chip", show_default=True,
    help="What to synthesise. pe: an element of the array; matrix ... memory: a core's units; "
    "core: without its memory.",
)  # fmt: skip
@click.option(
    "--speed-grade", type=click.Choice(["6", "7", "8"]), default="6", show_default=True,
    help="Of the FPGA; 8 is the fastest.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["pe"]),
    help="Place and route an element in 180 nm instead, and draw it.",
)  # fmt: skip
@click.option(
    "-o", "--output", "folder", default="synth-out", show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where a folder of netlists, reports and the picture goes.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.IntRange(min=1), default=SECONDS, show_default=True,
    help="The tools are stopped after so long.",
)  # fmt: skip
@json_option
def synth(
    chip: Chip, target: str, unit: str, speed_grade: str, layout: str | None, folder: Path,
    seconds: int, as_json: bool,
) -> None:  # fmt: skip
    """Synthesise a chip or a unit of it: area by unit, critical path, clock, and a picture.

    A PE takes seconds, the array of a small chip a minute, a whole chip many. Needs the tools that
    `make setup-chip` installs.

    \b
    Examples:
      pagoda synth --chip tiny --unit pe
      pagoda synth --chip tiny8 --target ecp5
      pagoda synth --chip tiny --layout pe -o out/
    """
    require_package("amaranth", "klayout" if layout else "matplotlib")
    from pagoda.chip.synth_design import spoken
    from pagoda.chip.synth_result import publish

    name = f"{chip.name}-pe-layout" if layout else f"{chip.name}-{unit}-{target}"
    place = folder / name
    what = "placing and routing" if layout else "synthesising"
    with Console(stderr=True).status(f"{what}: {name}"):
        try:
            found = publish(
                place,
                lambda work: _make(chip, unit, target, int(speed_grade), layout, work, seconds),
            )
        except OSError as error:
            raise click.ClickException(
                f"{place}: cannot be written ({error.strerror}); choose another -o"
            ) from error
    if layout:
        _report_layout(found, place)
    else:
        _report(found, place)
    if as_json:
        click.echo(json.dumps({**found.as_dict(), "folder": str(place)}))
    if not layout and (excess := found.excess()):
        raise click.ClickException(
            f"chip {chip.name!r}: {spoken(unit)} takes {', '.join(excess)}: more than the device "
            "has, so it was not placed; choose a smaller chip or --unit"
        )


def _make(
    chip: Chip, unit: str, target: str, speed_grade: int, layout: str | None, work: Path,
    seconds: int,
) -> Synthesis | Layout:
    if layout:
        from pagoda.chip.layout import lay_out

        found = lay_out(chip, work, seconds)
    else:
        from pagoda.chip.area_chart import draw_areas

        if target == "ecp5":
            from pagoda.chip.ecp5 import synthesise_ecp5

            found = synthesise_ecp5(chip, unit, work, seconds, speed_grade)
        else:
            from pagoda.chip.synthesis import synthesise

            found = synthesise(chip, unit, target, work, seconds)
        draw_areas(found, work / "areas.png")
    (work / "result.json").write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    return found


def _report(found: Synthesis, place: Path) -> None:
    from pagoda.chip.area_chart import row_name

    click.echo(f"{found.chip}: {found.unit} on {found.target}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("unit")
    for heading in (*found.totals, "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    whole = found.totals[found.main] or 1
    for unit in found.units:
        share = f"{unit.amounts[found.main] / whole:.1%}"
        values = [f"{value:,.0f}" for value in unit.amounts.values()]
        table.add_row(row_name(unit.name, unit.instances), *values, share)
    table.add_row("total", *(f"{value:,.0f}" for value in found.totals.values()), "100.0%")
    if found.limits:
        used = [f"{found.totals[key] / limit:.0%}" for key, limit in found.limits.items()]
        table.add_row("of the device", *used, "")
    Console(width=max(Console().width, 80)).print(table)
    if found.memories:
        bits = sum(memory.bits for memory in found.memories)
        click.echo(f"  memories  {len(found.memories)} macros, {bits:,} bits, not in the area")
    if found.critical_path is not None:
        _report_path(found)
    _report_origin(found, place, "areas.png")


def _report_path(found: Synthesis) -> None:
    path = found.critical_path
    click.echo(f"  clock     {found.clock_mhz:g} MHz: the critical path takes {path.ns:g} ns")
    ends = f"{_short(path.start)} -> {_short(path.end)}"
    click.echo(f"  path      {ends}, {len(path.steps)} steps; the slowest:")
    slowest = sorted(path.steps, key=lambda step: -step.ns)[:STEPS_SHOWN]
    for step in path.steps:
        if step in slowest:
            click.echo(f"            {step.ns:6.3f} ns  {step.kind:10} {_short(step.cell)}")


def _short(name: str) -> str:
    return name if len(name) <= NAME_SHOWN else f"{name[: NAME_SHOWN - 3]}..."


def _report_layout(found: Layout, place: Path) -> None:
    click.echo(f"{found.chip}: an element, placed and routed")
    size = f"{found.width_um:g} x {found.height_um:g} um = {found.area_um2:,.0f} um2"
    click.echo(f"  size      {size}, {found.cells:,} cells")
    routes = f"{found.failed_routes} nets not routed" if found.failed_routes else "all nets routed"
    click.echo(f"  routes    {routes}")
    if found.clock_mhz is not None:
        click.echo(f"  clock     {found.clock_mhz:g} MHz")
    _report_origin(found, place, "layout.png")


def _report_origin(found: Synthesis | Layout, place: Path, picture: str) -> None:
    for note in found.notes:
        click.echo(f"  note      {note}")
    click.echo(f"  from      {found.origin.text()}")
    click.echo(f"  picture   {place / picture}")
    click.echo(f"  files     {place} ({found.seconds:g} s)")
