"""Verilog of a chip as a folder: chip, its units, file list, map of ports and registers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from amaranth.hdl._ir import PortDirection

from pagoda.chip.host_map import HOST_REGIONS, HOST_REGISTERS
from pagoda.chip.modules import ports_of, shared_verilog
from pagoda.chip.pagoda_chip import AxiChip, check_buildable
from pagoda.isa.chip import Chip
from pagoda.isa.program import CONTRACT_VERSION

TOP = "pagoda_chip"


def write_verilog(chip: Chip, folder: Path) -> list[Path]:
    """Write the files of a chip into a folder, which is made; each appears whole or not at all.

    Raises ChipError for a chip that the RTL cannot be, OSError.
    """
    check_buildable(chip)
    folder.mkdir(parents=True, exist_ok=True)  # before the minutes that a large chip takes
    top = AxiChip(chip)
    texts = {f"{name}.v": text for name, text in shared_verilog(TOP, top).items()}
    texts["filelist.f"] = "".join(f"{name}\n" for name in texts)
    texts["map.md"] = _map(chip, top)
    for name, text in texts.items():
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / name)
    return [folder / name for name in texts]


def _map(chip: Chip, top: AxiChip) -> str:
    ports = ["| `clk` | in | 1 |", "| `rst` | in | 1 |"]
    for name, (value, direction) in ports_of(top).items():
        way = "in" if direction is PortDirection.Input else "out"
        ports.append(f"| `{name}` | {way} | {len(value)} |")
    registers = [
        f"| `{r.address:#04x}` | `{r.name}` | {r.words} | {'write' if r.written else 'read'} | "
        f"{r.text} |"
        for r in HOST_REGISTERS.values()
    ]
    regions = [
        f"| `{r.base:#08x}` | `{r.name}` | {r.item_bytes} | {'write' if r.written else 'read'} | "
        f"{r.text} |"
        for r in HOST_REGIONS.values()
    ]
    return "\n".join(
        [
            f"# Chip {chip.name}: ports and registers",
            "",
            (
                f"Top module `{TOP}`, contract version {CONTRACT_VERSION}. One clock; reset is "
                "synchronous, active high. `host` is AXI4-Lite, `memory__K` is AXI4 of core K: "
                "single beats of 64 bytes, INCR, one ID."
            ),
            "",
            "| port | direction | bits |",
            "| --- | --- | --- |",
            *ports,
            "",
            "## Host registers",
            "",
            (
                "A launch: write code, arguments and slots, then the registers, then START; wait "
                "for `interrupt` or BUSY to fall; read the result."
            ),
            "",
            "| address | register | words | access | |",
            "| --- | --- | --- | --- | --- |",
            *registers,
            "",
            "| from | memory | bytes a piece | access | |",
            "| --- | --- | --- | --- | --- |",
            *regions,
            "",
        ]
    )
