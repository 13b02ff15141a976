"""A picture of a design's area: one bar for each unit."""

from __future__ import annotations

from pathlib import Path

from pagoda.chip.synth_result import Synthesis
from pagoda.chip.tools import require_package

LABELS = {"area_um2": "um2", "lut4": "LUT4"}
BAR_INCHES, WIDTH_INCHES = 0.28, 10
COLOUR, DOTS_PER_INCH = "#3a6ea5", 120


def draw_areas(found: Synthesis, picture: Path) -> None:
    """Write a PNG. Raises ToolError: matplotlib is missing; OSError."""
    require_package("matplotlib")
    from matplotlib.figure import Figure

    units = [unit for unit in found.units if unit.amounts[found.main] > 0]
    whole = found.totals[found.main] or 1
    figure = Figure(figsize=(WIDTH_INCHES, 1.6 + BAR_INCHES * len(units)), layout="constrained")
    axes = figure.add_subplot()
    names = [row_name(unit.name, unit.instances) for unit in units]
    bars = axes.barh(names, [unit.amounts[found.main] for unit in units], color=COLOUR)
    shares = [f"{unit.amounts[found.main] / whole:.1%}" for unit in units]
    axes.bar_label(bars, shares, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    label = LABELS[found.main]
    axes.set_xlabel(label)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    clock = f", {found.clock_mhz:g} MHz" if found.clock_mhz else ""
    axes.set_title(
        f"{found.chip}: {found.unit} on {found.target}, {whole:,.0f} {label}{clock}", loc="left"
    )
    figure.supxlabel(found.origin.text(), fontsize=7, x=0.01, ha="left", color="#555555")
    figure.savefig(picture, dpi=DOTS_PER_INCH)


def row_name(name: str, instances: int) -> str:
    """A unit's name with how many of it there are."""
    return name if instances == 1 else f"{name} x{instances}"
