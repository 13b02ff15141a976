"""The launcher's registers as the host sees them: the one table of addresses.

A 48-bit number takes two words, the low one first. Nothing may be written while a launch runs;
results stay until the next one begins.
"""

from dataclasses import dataclass
from enum import IntFlag


class Control(IntFlag):
    """Bits of `control`."""

    START = 1
    RESIDENT = 2  # the code is in IMEM already: copying it takes no cycles


class Status(IntFlag):
    """Bits of `status`."""

    BUSY = 1
    FAULT = 2  # the last launch ended with one


class FaultFlags(IntFlag):
    """Bits of `fault_flags`: which fields of the fault mean something."""

    COMMAND = 1
    PLACE = 2


@dataclass(frozen=True)
class HostRegister:
    """`words` consecutive words from byte address `address` on."""

    name: str
    address: int
    written: bool  # by the host; else read
    text: str
    words: int = 1


@dataclass(frozen=True)
class HostRegion:
    """A memory: `item_bytes` a piece, from byte address `base` on."""

    name: str
    base: int
    written: bool
    item_bytes: int
    text: str


REGION_SHIFT = 20  # address bits 23..20 choose the region; registers are region 0

HOST_REGISTERS = {
    register.name: register
    for register in (
        HostRegister("control", 0x00, True, "bit 0 START, bit 1 RESIDENT (with START)"),
        HostRegister("entry", 0x04, True, "address of the first instruction"),
        HostRegister("stack_limit", 0x08, True, "least DMEM offset of a store through x2"),
        HostRegister("code_bytes", 0x0C, True, "bytes of code, a multiple of 4"),
        HostRegister("arguments", 0x10, True, "number of argument words"),
        HostRegister("slots", 0x14, True, "number of slots"),
        HostRegister("watchdog", 0x18, True, "limit of the launch in cycles, at least 1", 2),
        HostRegister("status", 0x20, False, "bit 0 BUSY, bit 1 FAULT"),
        HostRegister("end_cycle", 0x28, False, "cycles of the launch", 2),
        HostRegister("fault_kind", 0x30, False, "kind of the fault; 0 is none"),
        HostRegister("fault_core", 0x34, False, "core that faulted"),
        HostRegister("fault_cycle", 0x38, False, "cycle of the fault", 2),
        HostRegister("fault_pc", 0x40, False, "address of the instruction"),
        HostRegister("fault_flags", 0x44, False, "bit 0: command, bit 1: slot and offset hold"),
        HostRegister("fault_command", 0x48, False, "index of the command on its core"),
        HostRegister("fault_slot", 0x4C, False, "slot"),
        HostRegister("fault_offset", 0x50, False, "byte offset in the slot"),
    )
}
HOST_REGIONS = {
    region.name: region
    for region in (
        HostRegion("imem", 0x10_0000, True, 4, "instructions, for all cores"),
        HostRegion("arguments", 0x20_0000, True, 4, "words that a launch copies to DMEM"),
        HostRegion(
            "slots", 0x30_0000, True, 16,
            "a slot: base (two words), bytes, bit 0 readable and bit 1 writable",
        ),
        HostRegion(
            "cores", 0x40_0000, False, 16,
            "a core's launch: instructions (two words), commands",
        ),
    )
}  # fmt: skip
