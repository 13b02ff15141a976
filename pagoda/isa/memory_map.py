"""The control core's memory map: the one table that says which address is what.

    0x0000_0000  +----------------+
                 | IMEM           |  instructions: fetch only, loads and stores fault
    0x1000_0000  +----------------+
                 | DMEM           |  arguments at 0, stack from the top: bytes, halves, words
    0x2000_0000  +----------------+
                 | SRAM           |  window on the scratchpad: word loads only
    0x3000_0000  +----------------+
                 | (nothing)      |
    0x4000_0000  +----------------+
                 | command port   |  command fields and issue: word stores only
    0x5000_0000  +----------------+
                 | core registers |  +0 core_id, +4 core_count: word loads only
    0x5000_0008  +----------------+
                 | (nothing)      |
    0xffff_ffff  +----------------+

Bits 31..28 of an address choose the region, so the hardware compares four bits. Each region
reaches to the next boundary of 256 MiB; how many of its bytes exist is the chip's to say, except
where `Region.size` fixes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto

from pagoda.isa.fault import FaultKind, FaultRaised


class Access(Flag):
    """What the control core may do with a region."""

    FETCH = auto()
    READ = auto()
    WRITE = auto()


@dataclass(frozen=True)
class Region:
    """One region. size: its bytes, or None where it is a chip parameter."""

    name: str
    base: int
    permissions: Access
    description: str
    words_only: bool = False
    size: int | None = None


REGION_BYTES = 1 << 28  # the stretch of addresses set aside for each region

IMEM = Region("IMEM", 0x0000_0000, Access.FETCH, "instructions of the program")
DMEM = Region(
    "DMEM",
    0x1000_0000,
    Access.READ | Access.WRITE,
    "data of the control core: launch arguments at offset 0, stack from the top down",
)
SRAM = Region(
    "SRAM",
    0x2000_0000,
    Access.READ,
    "window on the scratchpad; a load waits for older writers of its word",
    words_only=True,
)
COMMAND_PORT = Region(
    "command port",
    0x4000_0000,
    Access.WRITE,
    "command fields, which persist, and the words that issue a command",
    words_only=True,
)
CORE_REGISTERS = Region(
    "core registers",
    0x5000_0000,
    Access.READ,
    "what tells the cores of a launch apart: core_id, core_count",
    words_only=True,
    size=8,
)

REGIONS = (IMEM, DMEM, SRAM, COMMAND_PORT, CORE_REGISTERS)

CORE_ID = CORE_REGISTERS.base + 0  # this core's number within the launch, from 0
CORE_COUNT = CORE_REGISTERS.base + 4  # cores of the launch

_BY_TOP_BITS = {region.base // REGION_BYTES: region for region in REGIONS}
_VERBS = {Access.FETCH: "fetch", Access.READ: "load", Access.WRITE: "store"}


def lookup(address: int) -> Region | None:
    """The region of a 32-bit address, or None where the map is empty."""
    region = _BY_TOP_BITS.get(address // REGION_BYTES)
    if region is None or (region.size is not None and address - region.base >= region.size):
        return None
    return region


def check_access(address: int, size: int, access: Access) -> Region:
    """The region of an aligned access of `size` bytes (1, 2 or 4), if the map permits it.

    Raises FaultRaised: FETCH_OUT_OF_RANGE for a fetch, BAD_ADDRESS for a load or store. Whether
    the chip has that many bytes of the region is for the caller to check.
    """
    region = lookup(address)
    verb = _VERBS[access]
    if region is None:
        problem = f"{verb} of {size} bytes at {address:#010x}: no region of the memory map"
    elif access not in region.permissions:
        allowed = " and ".join(_VERBS[a] for a in region.permissions)
        problem = f"{verb} of {size} bytes at {address:#010x}: {region.name} permits only {allowed}"
    elif region.words_only and size != 4:
        problem = f"{verb} of {size} bytes at {address:#010x}: {region.name} permits only words"
    else:
        return region
    fetch = access is Access.FETCH
    raise FaultRaised(FaultKind.FETCH_OUT_OF_RANGE if fetch else FaultKind.BAD_ADDRESS, problem)
