"""`pagoda rtl` and `pagoda run --machine rtl`: what they write, and what they say to bad input."""

import importlib.util
import re
from dataclasses import replace

import pytest

pytest.importorskip("amaranth")
from pagoda.chip.pagoda_chip import check_buildable
from pagoda.isa.chip import PRESETS, ChipError


def joined(text):
    """Wrapped lines as one."""
    return " ".join(text.split())


def test_rtl_writes_verilog_with_every_unit_once_and_a_map(pagoda, tmp_path):
    chip = tmp_path / "mini.toml"
    chip.write_text('base = "tiny8"\nrows = 2\ncols = 2\nlanes = 2\nwindow = 2\ncores = 2\n')
    code, out, _ = pagoda("rtl", "--chip", str(chip), "-o", str(tmp_path / "out"))
    assert code == 0
    assert "chip mini in " in out
    files = (tmp_path / "out/filelist.f").read_text().split()
    texts = {name: (tmp_path / "out" / name).read_text() for name in files}
    assert {"pagoda_chip.v", "pagoda_core.v", "pagoda_pe.v", "pagoda_float_lane.v"} < set(texts)
    for name, text in texts.items():
        module = name.removesuffix(".v")
        assert text.count(f"module {module}(") == 1
        assert not any(f"module {module}(" in other for n, other in texts.items() if n != name)
    assert len(re.findall(r"^  pagoda_core ", texts["pagoda_chip.v"], re.MULTILINE)) == 2
    assert len(re.findall(r"^  pagoda_pe ", texts["pagoda_core.v"], re.MULTILINE)) == 4
    listed = (tmp_path / "out/map.md").read_text()
    assert "| `memory__0__araddr` | out | 48 |" in listed
    watchdog = "| `0x18` | `watchdog` | 2 | write | limit of the launch in cycles, at least 1 |"
    assert watchdog in listed


def test_a_chip_that_the_rtl_cannot_be(pagoda, tmp_path):
    code, _, err = pagoda("rtl", "--chip", "cloud", "-o", str(tmp_path / "out"))
    assert code == 1
    assert joined(err) == (
        "error: chip 'cloud': dram_bytes_per_cycle = 3200 for 32 cores: the RTL moves at most one "
        "64-byte atom a cycle and core; choose at most 2048"
    )
    assert not (tmp_path / "out").exists()


def test_a_bf16_element_needs_three_stages():
    with pytest.raises(ChipError) as raised:
        check_buildable(replace(PRESETS["tiny"], pe_stages=2))
    assert str(raised.value) == (
        "chip 'tiny': pe_stages = 2: a bf16 element needs at least 3 in RTL; choose that"
    )


@pytest.mark.parametrize(
    "words", [("rtl",), ("bench", "rtl"), ("run", "softmax", "--machine", "rtl")]
)
def test_a_missing_package_is_named(pagoda, monkeypatch, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = pagoda(*words)
    assert code == 1
    assert joined(err) == (
        "error: amaranth: not installed; run `make setup-chip`, or pip install "
        '"pagoda-stack[chip]"'
    )


def test_a_folder_that_cannot_be_written(pagoda, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = pagoda("rtl", "--chip", "tiny8", "-o", str(tmp_path / "file" / "out"))
    assert code == 1
    assert joined(err).startswith(f"Error: {tmp_path / 'file' / 'out'}: cannot be written (")
    assert joined(err).endswith("; choose another -o")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vcd", "w.vcd"), "Error: --vcd FILE: only the RTL has waves; add --machine rtl"),
        (
            ("--machine", "rtl", "--cycles", "9:3"),
            "Error: Invalid value for '--cycles': '9:3': must be two cycles, A < B, as in 100:900",
        ),
    ],
)
def test_wave_options(pagoda, words, message):
    code, _, err = pagoda("run", "softmax", "--chip", "tiny", *words)
    assert code == 2
    assert joined(err).endswith(message)
