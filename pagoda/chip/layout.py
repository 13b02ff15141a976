"""Layout of the array's element: Debian's qflow (yosys, graywolf, qrouter), drawn by klayout.

Cells are LEF abstracts: pins and wires are drawn, transistors are not known; there is no design
rule check and no comparison with the netlist.
"""

from __future__ import annotations

import re
import time
from importlib.metadata import version as package_version
from pathlib import Path

from pagoda.chip.deadline import Deadline
from pagoda.chip.synth_design import design_of
from pagoda.chip.synth_result import Layout, Origin
from pagoda.chip.synthesis import OSU_PACKAGE, version
from pagoda.chip.tools import REMEDY, ToolError, find, require_package
from pagoda.isa.chip import Chip

TECHNOLOGY = "osu018"
LEF = Path(f"/usr/share/qflow/tech/{TECHNOLOGY}/osu018_stdcells.lef")
STAGE = "placed and routed; LEF abstracts, no DRC, no LVS; never made"
DATABASE_UNIT_UM = 0.01
PICTURE_PIXELS = 1600
FILLER = "FILL"  # a cell without a function
SOLID, HOLLOW = 0, 1  # klayout's fill patterns
# Layer of the DEF -> colour, from the lowest on; contacts between them are not drawn.
COLOURS = {
    "OUTLINE": 0x9A9A9A, "metal1": 0x4477AA, "metal2": 0xEE6677, "metal3": 0x228833,
    "metal4": 0xCCBB44, "metal5": 0x66CCEE, "metal6": 0xAA3377,
}  # fmt: skip


def lay_out(chip: Chip, folder: Path, seconds: float) -> Layout:
    """Place and route the element of a chip's array; DEF, reports and layout.png are left in the
    folder. Raises ChipError, ToolError."""
    began = time.monotonic()
    require_package("klayout")
    qflow = find("qflow", package="qflow")
    for tool in ("yosys", "graywolf", "qrouter"):
        find(tool, package=tool)
    if not LEF.exists():
        raise ToolError(f"{LEF}: not found; {REMEDY}, or apt-get install {OSU_PACKAGE}")
    tools = {
        "qflow": version([qflow, "-v"], r"version ([\d.]+(?: revision \d+)?)"),
        "yosys": version(["yosys", "-V"], r"Yosys ([\d.+]+)"),
    }
    deadline = Deadline.after(seconds)
    design = design_of(chip, "pe", macros=False)
    for name in ("source", "synthesis", "layout", "log"):
        (folder / name).mkdir()
    for name, text in design.files.items():
        (folder / "source" / name).write_text(text)
    said = deadline.run(
        [qflow, "synthesize", "place", "sta", "route", "backanno", "-T", TECHNOLOGY, design.top],
        folder, "qflow",
    )  # fmt: skip
    (folder / "qflow.txt").write_text(said)
    tools["qrouter"] = _first(r"Running qrouter ([\d.]+\d)", said) or "of unknown version"
    tools["klayout"] = package_version("klayout")
    failed = failed_routes(said)
    definition = folder / "layout" / f"{design.top}.def"
    cells, width, height = read_def(definition.read_text() if definition.exists() else "")
    _draw(definition, folder / "layout.png")
    clocks = re.findall(r"maximum clock frequency \(zero margin\) = ([\d.]+) MHz", said)
    return Layout(
        chip=chip.name, unit="pe", target="layout",
        origin=Origin(tools, f"{TECHNOLOGY} (Debian {OSU_PACKAGE})", "180 nm", STAGE),
        cells=cells, width_um=width, height_um=height, failed_routes=failed,
        clock_mhz=round(float(clocks[-1]), 1) if len(clocks) == 2 else None,
        notes=("the clock is qflow's own estimate, with the delays of the routed wires",),
        seconds=round(time.monotonic() - began, 1),
    )  # fmt: skip


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def failed_routes(said: str) -> int:
    """Nets that qrouter could not route in the end, from what qflow printed.

    Raises ToolError: it did not finish routing.
    """
    if "Final: No failed routes!" in said:
        return 0
    count = _first(r"Final: [Ff]ailed net routes: (\d+)", said)
    if count is None:
        raise ToolError(f"qflow: did not finish routing: {said[-1500:].strip()}")
    return int(count)


def read_def(text: str) -> tuple[int, float, float]:
    """Cells but for fillers, width and height in micrometres of a DEF text. Raises ToolError."""
    units = _first(r"UNITS DISTANCE MICRONS (\d+)", text)
    area = re.search(r"DIEAREA \( (-?\d+) (-?\d+) \) \( (-?\d+) (-?\d+) \)", text)
    components = _first(r"(?s)\nCOMPONENTS \d+ ;(.*)\nEND COMPONENTS", text)
    if units is None or area is None or components is None:
        raise ToolError("qflow: wrote no layout; see its output above, or choose another chip")
    left, bottom, right, top = (int(corner) / int(units) for corner in area.groups())
    cells = [kind for kind in re.findall(r"\n- \S+ (\S+)", components) if kind != FILLER]
    return len(cells), round(right - left, 2), round(top - bottom, 2)


def _draw(definition: Path, picture: Path) -> None:
    """A PNG of a DEF file, wires by layer. Raises ToolError."""
    from klayout import db, lay

    options = db.LoadLayoutOptions()
    config = options.lefdef_config
    config.lef_files = [str(LEF)]
    config.read_lef_with_def = False
    config.macro_resolution_mode = 1  # LEF geometry, though the cells name a file of their own
    config.dbu = DATABASE_UNIT_UM
    view = lay.LayoutView()
    try:
        view.load_layout(str(definition), options, False)
    except RuntimeError as error:
        raise ToolError(f"klayout: cannot read {definition.name}: {error}") from error
    view.max_hier()
    view.set_config("background-color", "#ffffff")
    view.set_config("grid-visible", "false")
    view.set_config("text-visible", "false")
    view.set_config("cell-box-visible", "false")
    view.clear_layers()
    layout = view.active_cellview().layout()
    for name, colour in COLOURS.items():
        for info in layout.layer_infos():
            if info.name != name:
                continue
            node = lay.LayerPropertiesNode()
            node.source_layer, node.source_datatype = info.layer, info.datatype
            node.fill_color = node.frame_color = colour
            node.dither_pattern = HOLLOW if name == "OUTLINE" else SOLID
            view.insert_layer(view.end_layers(), node)
    view.zoom_fit()
    box = layout.top_cell().dbbox()
    height = max(int(PICTURE_PIXELS * box.height() / box.width()), 1)
    view.save_image(str(picture), PICTURE_PIXELS, height)
