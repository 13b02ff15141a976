"""Chip descriptions: presets, rules, chip files; every refusal says field, value, rule, remedy."""

import re
from dataclasses import replace
from fractions import Fraction

import pytest

from pagoda.isa.chip import PRESETS, ChipError, load_chip

EDGE = PRESETS["edge"]


def test_presets_have_the_designed_peaks():
    peaks = {name: (c.macs_per_cycle, c.dram_bytes_per_cycle) for name, c in PRESETS.items()}
    assert peaks == {
        "tiny": (16, 16),
        "tiny8": (64, 16),
        "edge": (256, Fraction(128, 5)),
        "car": (4 * 64 * 64, 200),
        "cloud": (32 * 128 * 128, 3200),
    }


def test_derived_figures_of_edge():
    assert EDGE.port_bytes == 64
    assert EDGE.psum_latency == 16 * 3 + 16 + 4
    assert EDGE.bank_bytes("sram") == 64 * 1024
    assert EDGE.bank_bytes("acc") == 32 * 1024
    assert PRESETS["car"].dram_share == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 12}, "rows = 12: must be a power of two, 2 to 512; try 8"),
        (
            {"lanes": 8},
            "lanes = 8: must be at least the array's columns (16); use 16 or more lanes",
        ),
        (
            {"rows": 64},
            ("lanes = 16: a port of 4 * lanes bytes must hold one row of A (128 bytes); "
            "use 32 or more lanes"),
        ),
        (
            {"dram_latency": 0},
            "dram_latency = 0: must be 1 to 100000; choose a value in that range",
        ),
        ({"window": 17}, "window = 17: must be 2 to 16; choose a value in that range"),
        ({"cores": 0}, "cores = 0: must be 1 to 256; choose a value in that range"),
        ({"cores": 1.5}, "cores = 1.5: must be a whole number; write digits only"),
        (
            {"dram_bytes_per_cycle": 0},
            "dram_bytes_per_cycle = 0: must be above 0, at most 65536; try 16",
        ),
        (
            {"dram_bytes_per_cycle": "fast"},
            "dram_bytes_per_cycle = 'fast': must be a number; for example 25.6",
        ),
        (
            {"matrix_types": ("fp64",)},
            "matrix_types = ('fp64',): must name one or more of bf16, int8; fix it",
        ),
        (
            {"acc_bytes": 1024, "lanes": 256},
            ("acc_banks = 4: a bank must hold at least 1024 bytes; "
            "use fewer banks or a larger acc_bytes"),
        ),
    ],
)
def test_impossible_parameters_are_refused(change, message):
    with pytest.raises(ChipError, match=re.escape(f"chip 'edge': {message}") + "$"):
        replace(EDGE, **change)


def test_toml_file_on_a_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "edge"\nrows = 32\ncols = 32\nlanes = 32\n')
    assert load_chip(str(path)) == replace(EDGE, name="mine", rows=32, cols=32, lanes=32)


def test_python_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom pagoda.isa.chip import PRESETS\n"
        "chip = replace(PRESETS['tiny'], name='mine', clock_hz=50_000_000)\n"
    )
    assert load_chip(str(path)).clock_hz == 50_000_000


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.toml", "rows = ", "not valid TOML"),
        ("a.toml", 'base = "edge"\nrowz = 3\n', "unknown field 'rowz'; the fields are acc_banks"),
        ("a.toml", 'base = "egde"\n', "base = 'egde': unknown; presets are tiny, tiny8, edge"),
        ("a.toml", "rows = 16\n", "missing field 'acc_bytes'; give it, or start from a preset"),
        ("a.toml", 'base = "edge"\nmatrix_types = 5\n', None),
        ("a.py", "1 / 0\n", (
            "it stopped in line 1 with ZeroDivisionError: division by zero; fix that line"
        )),
        ("a.py", "x = 1\nraise SystemExit(3)\n", (
            "it stopped in line 2 with SystemExit: 3; fix that line"
        )),
        ("a.py", "\ndef (\n", (
            "it stopped in line 2 with SyntaxError: invalid syntax (a.py, line 2); fix that line"
        )),
        ("a.py", "chip = 3\n", "defines no `chip`; end it with `chip = pagoda.isa.Chip(...)`"),
    ],
)
def test_bad_chip_files(tmp_path, file, text, message):
    path = tmp_path / file
    path.write_text(text)
    message = (
        "chip 'a': matrix_types = 5: must be a list; for example [\"bf16\", \"int8\"]"
        if message is None
        else f"chip file {path}: {message}"
    )
    with pytest.raises(ChipError, match=re.escape(message)):
        load_chip(str(path))


@pytest.mark.parametrize("name", ["a.toml", "a.py"])
def test_a_directory_is_no_chip_file(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    message = f"chip file {path}: cannot be read (Is a directory); check the path"
    with pytest.raises(ChipError, match=re.escape(message) + "$"):
        load_chip(str(path))


def test_text_for_a_number_is_quoted():
    message = "chip 'edge': rows = 'many': must be a whole number; write digits only"
    with pytest.raises(ChipError, match=re.escape(message) + "$"):
        replace(EDGE, rows="many")


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ChipError, match="not valid TOML .*; fix that line"):
        load_chip(str(path))


def test_unknown_name_and_missing_file():
    message = (
        "chip 'egde': unknown; presets are tiny, tiny8, edge, car, cloud; "
        "or give the path of a .toml or .py chip file"
    )
    with pytest.raises(ChipError, match=re.escape(message) + "$"):
        load_chip("egde")
    with pytest.raises(ChipError, match="cannot be read .No such file or directory.; check"):
        load_chip("nowhere.toml")
