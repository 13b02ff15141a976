"""One core of the definition: control core, command port, memories and window.

The control core is `rv32.step` over this core's state. A store to the command port executes its
command at once, for values are sequential, and asks the window for cycles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pagoda.isa import memory_map, rv32, timing
from pagoda.isa.access import SRAM, Access, DramRows, Range, Tile
from pagoda.isa.checks import check, check_indices
from pagoda.isa.chip import Chip
from pagoda.isa.commands import (
    BANK_BYTES,
    BY_BANK,
    CONTROL,
    CONTROL_BANK,
    WORDS_PER_BANK,
    Command,
)
from pagoda.isa.fault import Fault, FaultKind, FaultRaised
from pagoda.isa.meaning import MEANINGS
from pagoda.isa.memory_map import COMMAND_PORT, CORE_COUNT, CORE_ID, DMEM
from pagoda.isa.numbers import U8
from pagoda.isa.program import Launch, Slot
from pagoda.isa.window import Entry, Window

STACK_POINTER = 2
_CONTROL_NAMES = {word: name for name, word in CONTROL.items()}


@dataclass
class Issued:
    """A command that entered. `read`, `written`: the DRAM bytes it touched (checking mode)."""

    entry: Entry
    pc: int
    bank: int
    macs: int
    read_atoms: int
    write_atoms: int
    read: list[U8] = field(default_factory=list)
    written: list[U8] = field(default_factory=list)


class Core:
    """State of one core; what outlives a launch is made here, the rest by `begin`."""

    def __init__(self, chip: Chip, number: int, dram: U8, checking: bool):
        self.chip, self.number, self.dram, self.checking = chip, number, dram, checking
        self.local = (np.zeros(chip.sram_bytes, np.uint8), np.zeros(chip.acc_bytes, np.uint8))
        self.dmem = np.zeros(chip.dmem_bytes, np.uint8)
        self.banks = {bank: [0] * WORDS_PER_BANK for bank in BY_BANK}

    def begin(self, launch: Launch, code: bytes, start: int) -> None:
        """Set the launch's initial state; the first instruction starts in cycle `start`."""
        self.launch, self.code = launch, code
        args = np.array([arg & 0xFFFFFFFF for arg in launch.args], "<u4").view(np.uint8)
        self.dmem[: len(args)] = args
        self.x = [0] * 32
        self.x[STACK_POINTER] = DMEM.base + self.chip.dmem_bytes
        self.pc, self.cycle = launch.program.entry, start
        self.window = Window(self.chip)
        self.issued: list[Issued] = []
        self.instructions = 0
        self.fault: Fault | None = None
        self.overflow: Fault | None = None  # deferred INT64_OVERFLOW
        self.pause = ""  # "barrier", "exit" or "fault"
        self.written = tuple(np.zeros(len(memory), bool) for memory in self.local)

    def run(self) -> None:
        """Run to the next barrier, the exit or a fault; `cycle`: arrival, exit or fault."""
        self.pause = ""
        while not self.pause:
            self._effect = self.cycle  # the cycle of a fault; moved on by whoever waits
            self._next: int | None = None  # the next instruction's start, if it is delayed
            try:
                self._within_watchdog(self.cycle)
                cycles = rv32.step(self)
            except FaultRaised as raised:
                self.fault = raised.at(self.number, self.pc, self._effect)
                self.pause, self.cycle = "fault", self._effect
                return
            self.instructions += 1
            self.cycle = self.cycle + cycles if self._next is None else self._next

    def _within_watchdog(self, cycle: int) -> None:
        """What is about to happen in `cycle` happens only within the launch's limit."""
        self._effect = cycle
        if cycle > self.launch.watchdog:
            self._effect = self.launch.watchdog
            raise FaultRaised(
                FaultKind.WATCHDOG, f"the launch ran for {self.launch.watchdog} cycles"
            )

    # The control core's bus (rv32.State). ---------------------------------------------------------

    def fetch(self, address: int) -> int:
        memory_map.check_access(address, 4, memory_map.Access.FETCH)
        if address + 4 > self.chip.imem_bytes:
            raise FaultRaised(
                FaultKind.FETCH_OUT_OF_RANGE,
                f"fetch at {address:#010x}: IMEM has {self.chip.imem_bytes} bytes",
            )
        return int.from_bytes(self.code[address : address + 4].ljust(4, b"\0"), "little")

    def read(self, address: int, size: int, signed: bool) -> int:
        region = memory_map.check_access(address, size, memory_map.Access.READ)
        offset = address - region.base
        if region is DMEM:
            self._within_dmem(offset, size)
            data = self.dmem[offset : offset + size].tobytes()
            return int.from_bytes(data, "little", signed=signed)
        if region is memory_map.SRAM:
            return self._read_sram(address, offset)
        return {CORE_ID: self.number, CORE_COUNT: self.chip.cores}[address]

    def _read_sram(self, address: int, offset: int) -> int:
        if offset + 4 > self.chip.sram_bytes:
            raise FaultRaised(
                FaultKind.BAD_ADDRESS,
                f"load of 4 bytes at {address:#010x}: SRAM has {self.chip.sram_bytes} bytes",
            )
        word = slice(offset, offset + 4)
        if self.checking and not self.written[SRAM][word].all():
            raise FaultRaised(
                FaultKind.UNINITIALISED, f"load from SRAM byte {offset}, never written"
            )
        word_range = Range(SRAM, offset, offset + 3)
        taken = self.window.written(word_range, self.cycle + timing.LOAD_EFFECT)
        self._within_watchdog(taken)
        self._next = taken + timing.LOAD_CYCLES - timing.LOAD_EFFECT
        return int.from_bytes(self.local[SRAM][word].tobytes(), "little", signed=True)

    def write(self, address: int, size: int, value: int, base_register: int) -> None:
        region = memory_map.check_access(address, size, memory_map.Access.WRITE)
        offset = address - region.base
        if region is COMMAND_PORT:
            self._store_to_port(address, offset, value)
            return
        self._within_dmem(offset, size)
        limit = self.launch.program.stack_limit
        if base_register == STACK_POINTER and offset < limit:
            raise FaultRaised(
                FaultKind.STACK_OVERFLOW, f"store to DMEM byte {offset}; the stack ends at {limit}"
            )
        self.dmem[offset : offset + size] = np.frombuffer(value.to_bytes(size, "little"), np.uint8)

    def _within_dmem(self, offset: int, size: int) -> None:
        if offset + size > self.chip.dmem_bytes:
            raise FaultRaised(
                FaultKind.DMEM_OUT_OF_RANGE,
                f"{size} bytes at DMEM offset {offset}: DMEM has {self.chip.dmem_bytes} bytes",
            )

    # The command port. ----------------------------------------------------------------------------

    def _store_to_port(self, address: int, offset: int, value: int) -> None:
        bank, word = offset // BANK_BYTES, offset % BANK_BYTES // 4
        if bank == CONTROL_BANK and word in _CONTROL_NAMES:
            self._control(_CONTROL_NAMES[word], value)
        elif bank in BY_BANK and word in BY_BANK[bank].words:
            if word:
                self.banks[bank][word] = value
            else:
                words = [value, *self.banks[bank][1:]]
                self._go(BY_BANK[bank], words)
        else:
            raise FaultRaised(
                FaultKind.BAD_ADDRESS, f"store to {address:#010x}: no word of the command port"
            )

    def _control(self, name: str, value: int) -> None:
        if name == "trap":
            self._within_watchdog(self.cycle + timing.STORE_EFFECT)
            raise FaultRaised(FaultKind.TRAP, f"trap {value}")
        through = timing.drained(self.cycle, self.window.drain())
        self._within_watchdog(through)
        self._next = through
        if name != "fence":
            self.pause = name

    def _go(self, command: Command, words: Sequence[int]) -> None:
        entry = self.cycle + timing.STORE_EFFECT
        indexed = command.name in ("gather", "scatter")
        if not indexed:
            entry = self.window.space(entry)
        self._within_watchdog(entry)
        try:
            touched = check(self.chip, command, words, self.launch.slots)
            if touched is not None and touched.indices is not None:
                touched = self._read_indices(touched, entry)
                entry = self._effect
        except FaultRaised as raised:
            raised.command = -1 if raised.kind is FaultKind.WATCHDOG else len(self.issued)
            raise
        if indexed:
            entry = self.window.space(entry)
            self._within_watchdog(entry)
        self._issue(command, touched, entry)
        self._next = entry + 1

    def _read_indices(self, touched: Access, entry: int) -> Access:
        """The command with its indices, read when their writers have finished, and checked."""
        tile = touched.indices
        ready = self.window.written(tile.hull, entry)
        self._within_watchdog(ready + timing.index_cycles(self.chip, tile.cols))
        indices = self._read_tile(tile).reshape(-1).view("<i4")
        return check_indices(touched, [int(index) for index in indices], self.launch.slots)

    def _issue(self, command: Command, touched: Access | None, entry: int) -> None:
        index = len(self.issued)
        record = _record(self.chip, command, touched, self.launch.slots, index)
        record.pc = self.pc
        if touched is not None:
            memory = _CommandMemory(self, record)
            try:
                MEANINGS[command.name](touched, memory)
            except FaultRaised as raised:
                raised.command = index
                raise
        self.issued.append(record)
        self.window.enter(record.entry, entry)

    def _read_tile(self, tile: Tile) -> U8:
        where = tile.byte_index()
        if self.checking and not self.written[tile.space][where].all():
            never = int(where[~self.written[tile.space][where]][0])
            raise FaultRaised(
                FaultKind.UNINITIALISED, f"{tile.name} reads byte {never}, never written"
            )
        return self.local[tile.space][where]


def _record(
    chip: Chip, command: Command, touched: Access | None, slots: Sequence[Slot], index: int
) -> Issued:
    duration = timing.duration(chip, touched)
    reads, writes, ports = [], [], (0, 0)
    macs = read_atoms = write_atoms = 0
    if touched is not None:
        base = slots[touched.dram.slot].base if touched.dram is not None else 0
        reads, writes = touched.ranges(base)
        ports = touched.ports(chip)
        if touched.dram is not None:
            atoms = touched.dram.atoms()
            read_atoms, write_atoms = atoms * touched.dram.reads, atoms * touched.dram.writes
        if command.name == "matmul":
            f = touched.fields
            macs = f["m0"] * f["m1"] * f["m2"] * f["n"] * f["k_outer"] * f["k_inner"]
    entry = Entry(index, command.engine, duration, reads, writes, *ports)
    return Issued(entry, 0, command.bank, macs, read_atoms, write_atoms)


class _CommandMemory:
    """`meaning.Memory` of one command: the core's memories and the launch's slots."""

    def __init__(self, core: Core, record: Issued):
        self.core, self.record = core, record

    def read(self, tile: Tile) -> U8:
        return self.core._read_tile(tile)

    def write(self, tile: Tile, data: U8) -> None:
        where = tile.byte_index()
        self.core.local[tile.space][where] = data
        self.core.written[tile.space][where] = True

    def _addresses(self, rows: DramRows) -> np.ndarray:
        starts = self.core.launch.slots[rows.slot].base + rows.row_starts()
        return starts[:, None] + np.arange(rows.row_bytes)

    def read_dram(self, rows: DramRows) -> U8:
        where = self._addresses(rows)
        if self.core.checking:
            self.record.read.append(where.reshape(-1))
        return self.core.dram[where]

    def write_dram(self, rows: DramRows, data: U8) -> None:
        where = self._addresses(rows)
        if self.core.checking:
            self.record.written.append(where.reshape(-1))
        for address, row in zip(where, data, strict=True):
            self.core.dram[address] = row

    def int64_overflowed(self) -> None:
        core = self.core
        if core.overflow is None:
            core.overflow = Fault(
                FaultKind.INT64_OVERFLOW, core.number, core.pc, -1, self.record.entry.index,
                detail="an int64 value was saturated to int32",
            )  # fmt: skip
