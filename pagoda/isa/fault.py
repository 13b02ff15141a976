"""Faults: everything that can stop a program, with the meaning the ISA manual prints.

A fault is precise: the instruction or command that faults changes nothing. The three executions
(definition, simulator, RTL) report the same `Fault` for the same program.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class FaultKind(IntEnum):
    """Why a core stopped. The number is what the hardware reports; 0 means "no fault"."""

    ILLEGAL_INSTRUCTION = 1
    FETCH_OUT_OF_RANGE = 2
    MISALIGNED = 3
    BAD_ADDRESS = 4
    DMEM_OUT_OF_RANGE = 5
    STACK_OVERFLOW = 6
    BAD_FIELD = 7
    BAD_SLOT = 8
    OUT_OF_SLOT = 9
    NO_PERMISSION = 10
    LOCAL_OUT_OF_RANGE = 11
    GATHER_INDEX = 12
    INT64_OVERFLOW = 13
    TRAP = 14
    WATCHDOG = 15
    RACE = 16
    UNINITIALISED = 17
    BARRIER_MISMATCH = 18

    @property
    def meaning(self) -> str:
        """The manual's text."""
        return _MEANINGS[self]


_MEANINGS = {
    FaultKind.ILLEGAL_INSTRUCTION: "The word fetched is no instruction of RV32IM.",
    FaultKind.FETCH_OUT_OF_RANGE: "The instruction address lies outside the core's IMEM.",
    FaultKind.MISALIGNED: (
        "The address of a load or store is no multiple of its size, a jump or taken branch leads "
        "to an address that is no multiple of 4, or an address, offset or stride of a command is "
        "no multiple of its element size."
    ),
    FaultKind.BAD_ADDRESS: (
        "The address of a load or store belongs to no region of the memory map, or the region "
        "does not permit this access or this size."
    ),
    FaultKind.DMEM_OUT_OF_RANGE: "A load or store leaves the bytes of DMEM that the chip has.",
    FaultKind.STACK_OVERFLOW: (
        "A store whose base register is the stack pointer x2 falls below the program's stack limit."
    ),
    FaultKind.BAD_FIELD: "A command field holds a value that the command's rules exclude.",
    FaultKind.BAD_SLOT: "A command names a slot that the launch's slot table does not hold.",
    FaultKind.OUT_OF_SLOT: "A command's first or last byte in DRAM lies outside its slot.",
    FaultKind.NO_PERMISSION: "A command reads or writes a slot whose permissions exclude it.",
    FaultKind.LOCAL_OUT_OF_RANGE: (
        "An operand of a command, or a load from the SRAM window, leaves the bytes of SRAM or ACC "
        "that the chip has."
    ),
    FaultKind.GATHER_INDEX: "An index of a gather or scatter names a row outside the slot.",
    FaultKind.INT64_OVERFLOW: (
        "An int64 value did not fit int32 and was saturated; reported when the launch ends, with "
        "the pc of the first command that did so."
    ),
    FaultKind.TRAP: "The program stopped itself: ecall, ebreak or the trap command.",
    FaultKind.WATCHDOG: "The launch exceeded its limit of cycles.",
    FaultKind.RACE: "Between two barriers, a core touched a byte that another core wrote.",
    FaultKind.UNINITIALISED: (
        "Checking mode: a command read local memory that this launch never wrote."
    ),
    FaultKind.BARRIER_MISMATCH: "A core exited before a barrier at which other cores wait.",
}


@dataclass(frozen=True)
class Fault:
    """A fault as every machine reports it; -1 stands for "does not apply".

    pc: address of the instruction (for a command: of the store that issued it). cycle: counted
    from launch. command: the command's index on its core, from 0. slot, offset: the slot and
    byte offset at fault. detail: one sentence with the offending values.
    """

    kind: FaultKind
    core: int
    pc: int
    cycle: int
    command: int = -1
    slot: int = -1
    offset: int = -1
    detail: str = ""

    def describe(self) -> str:
        """The fault on one line: where, what, and the offending values."""
        where = [f"core {self.core}", f"cycle {self.cycle}", f"pc {self.pc:#010x}"]
        if self.command >= 0:
            where.append(f"command {self.command}")
        if self.slot >= 0:
            where.append(f"slot {self.slot}")
        if self.offset >= 0:
            where.append(f"offset {self.offset}")
        return f"{', '.join(where)}: {self.kind.name}: {self.detail or self.kind.meaning}"


class FaultRaised(Exception):
    """Raised by a meaning or a bus, which know what went wrong but not when or on which core."""

    def __init__(
        self, kind: FaultKind, detail: str, *, command: int = -1, slot: int = -1, offset: int = -1
    ):
        super().__init__(f"{kind.name}: {detail}")
        self.kind = kind
        self.detail = detail
        self.command = command
        self.slot = slot
        self.offset = offset

    def at(self, core: int, pc: int, cycle: int) -> Fault:
        """The complete fault, once the machine has added where and when."""
        return Fault(self.kind, core, pc, cycle, self.command, self.slot, self.offset, self.detail)
