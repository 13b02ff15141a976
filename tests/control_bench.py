"""Control units and launcher beside the definition, and the programs that compare them.

A stub stands for command port and window on both sides: every store that may wait waits as long
as a script says, and a go of another value than 0 faults.
"""

import random
from dataclasses import dataclass, field, replace

import numpy as np
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from command_programs import Assembler

from pagoda.chip.control_unit import ControlUnit
from pagoda.chip.host_map import HOST_REGIONS, HOST_REGISTERS, Control, FaultFlags, Status
from pagoda.chip.interfaces import PortStore, SideRead, SlotTable, WriterQuery
from pagoda.chip.launch_signals import HostPort, Overflow
from pagoda.chip.launcher import Launcher
from pagoda.chip.verilate import Model
from pagoda.isa import PRESETS, Definition, FaultKind, Launch, Program, rv32, timing
from pagoda.isa.commands import COMMANDS, CONTROL
from pagoda.isa.fault import Fault
from pagoda.isa.memory_map import COMMAND_PORT, DMEM

CHIP = replace(
    PRESETS["tiny"], name="two cores", cores=2, imem_bytes=4096, dmem_bytes=1024, launch_cycles=2
)
SINGLE = replace(CHIP, name="one core", cores=1, launch_cycles=1)
IOTA = COMMANDS["iota"].bank
RESERVED = 1 << 31  # iota has no fields in go: every bit is reserved
MASK32 = 0xFFFFFFFF
SIDE_BYTES = CHIP.port_bytes
SRAM_IMAGE = random.Random(0).randbytes(CHIP.sram_bytes)


class Bench(wiring.Component):
    """The launcher and its control units; what the units ask of others are the bench's ports."""

    def __init__(self, chip):
        self.chip = chip
        super().__init__({
            "host": In(HostPort()), "idle": In(chip.cores),
            "overflow": In(Overflow()).array(chip.cores),
            "port": Out(PortStore()).array(chip.cores),
            "writers": Out(WriterQuery()).array(chip.cores),
            "side": Out(SideRead(chip)).array(chip.cores),
            "slots": In(SlotTable()).array(chip.cores),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        m.submodules.launcher = launcher = Launcher(self.chip)
        connect(m, launcher.host, flipped(self.host))
        m.d.comb += launcher.idle.eq(self.idle)
        for number in range(self.chip.cores):
            m.submodules[f"unit_{number}"] = unit = ControlUnit(self.chip)
            m.d.comb += unit.number.eq(number)
            for name, member in launcher.launch.signature.members.items():
                assert member.flow is Out
                m.d.comb += getattr(unit.launch, name).eq(getattr(launcher.launch, name))
            connect(m, launcher.status[number], unit.status)
            m.d.comb += launcher.overflow[number].eq(self.overflow[number])
            for name in ("port", "writers", "side", "slots"):
                connect(m, getattr(unit, name), flipped(getattr(self, name)[number]))
        return m


@dataclass
class Script:
    """What the stub does on one core.

    waits: cycles beyond the first of each go and control store, in order, used again from the
    start. late: how long after a go's effect its fault is reported, or with -1 - `late` that long
    after it and without `ready`. overflow_at: index of a command that saturates. In the last
    `busy` cycles of every `period` all of SRAM is being written.
    """

    waits: list[int] = field(default_factory=lambda: [0])
    late: int = 0
    overflow_at: int = -1
    busy: int = 0
    period: int = 16

    def wait(self, number: int) -> int:
        return self.waits[number % len(self.waits)]

    def writes(self, cycle: int) -> bool:
        return cycle % self.period >= self.period - self.busy


class StubWindow:
    """What the definition asks of a window, answered from a script."""

    def __init__(self, core, script: Script):
        self.core, self.script, self.events, self.entered = core, script, 0, 0

    def _wait(self) -> int:
        self.events += 1
        return self.script.wait(self.events - 1)

    def space(self, cycle: int) -> int:
        return cycle + self._wait()

    def drain(self) -> int:
        return self.core.cycle + timing.STORE_EFFECT + self._wait()

    def written(self, what, cycle: int) -> int:
        while self.script.writes(cycle):
            cycle += 1
        return cycle

    def enter(self, entry, cycle: int) -> None:
        if self.entered == self.script.overflow_at:
            self.core.overflow = Fault(
                FaultKind.INT64_OVERFLOW, self.core.number, self.core.pc, -1, self.entered
            )
        self.entered += 1


class StubPort:
    """The same for one core of the RTL, cycle by cycle. `fields`: every field store, in order."""

    def __init__(self, model: Model, number: int, script: Script):
        self.model, self.script = model, script
        self.names = {
            name: f"port__{number}__{name}"
            for name in ("valid", "bank", "word", "value", "pc", "drop", "ready", "fault",
                         "fault_info")
        }  # fmt: skip
        self.names |= {
            f"{port}_{name}": f"{port}__{number}__{name}"
            for port, names in (("side", ("enable", "address", "data")),
                                ("writers", ("first", "last", "busy")))
            for name in names
        }  # fmt: skip
        self.overflow = f"overflow__{number}"
        self.side_read: int | None = None  # address of the side read in the last cycle
        self.events = self.entered = 0
        self.refused = 0  # the store at the port faults
        self.left: int | None = None  # cycles until the store at the port is ready
        self.pulses: list[list[int]] = []  # [cycles until a fault, its record]
        self.fields: list[tuple[int, int, int]] = []
        model[self.overflow] = 0
        model[self.names["ready"]] = model[self.names["fault"]] = 0

    def __getitem__(self, name: str) -> int:
        return self.model[self.names[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self.model[self.names[name]] = value

    def before_edge(self, cycle: int) -> None:
        """Answer what the core shows in this cycle."""
        self["ready"] = self["fault"] = 0
        self["writers_busy"] = self.script.writes(cycle)
        if self.side_read is not None:
            data = SRAM_IMAGE[self.side_read : self.side_read + SIDE_BYTES]
            self["side_data"] = int.from_bytes(data, "little")
        self.side_read = None
        if self["side_enable"]:
            self.side_read = self["side_address"]
            assert (self["writers_first"], self["writers_last"]) == (
                self.side_read, self.side_read + 3,
            )  # fmt: skip
        self.refused &= self["valid"]
        if self["valid"] and not self.refused:
            self._store(cycle)
        elif self.left is not None:
            assert self["drop"]
            self.left = None
        for pulse in self.pulses:
            if pulse[0] == 0:
                self["fault"], self["fault_info"] = 1, pulse[1]
            pulse[0] -= 1
        self.pulses = [pulse for pulse in self.pulses if pulse[0] >= 0]

    def _store(self, cycle: int) -> None:
        bank, word, value = self["bank"], self["word"], self["value"]
        waits = bank == 0 or word == 0
        if self.left is None:
            self.left = 0
            if waits:
                self.left = self.script.wait(self.events)
                self.events += 1
        if self.left:
            self.left -= 1
            return
        self.left = None
        if bank and word == 0 and value:
            late = self.script.late
            self.pulses.append([late if late >= 0 else -1 - late, self._fault(cycle)])
            self["ready"], self.refused = late >= 0, late < 0
            return
        self["ready"] = 1
        if bank and word == 0:
            if self.entered == self.script.overflow_at:
                self.model[self.overflow] = 1 | self["pc"] << 1 | self.entered << 33
            self.entered += 1
        elif bank:
            self.fields.append((bank, word, value))

    def _fault(self, cycle: int) -> int:
        return FaultKind.BAD_FIELD | cycle << 5 | self["pc"] << 53 | 1 << 85 | self.entered << 86


@dataclass
class Outcome:
    """What both sides report of a launch."""

    cycles: int
    fault: tuple[int, ...] | None  # kind, core, pc, cycle, command, slot, offset
    instructions: list[int]
    commands: list[int]


def signature(fault: Fault | None) -> tuple[int, ...] | None:
    if fault is None:
        return None
    return (fault.kind, fault.core, fault.pc, fault.cycle, fault.command, fault.slot, fault.offset)


# Programs. ----------------------------------------------------------------------------------------

TEMPORARY = 30  # the register that idioms use


def code(*instructions: tuple[str, dict[str, int]] | int) -> list[int]:
    return [i if isinstance(i, int) else rv32.encode(i[0], **i[1]) for i in instructions]


def op(name: str, **fields: int) -> tuple[str, dict[str, int]]:
    return name, fields


def immediate(register: int, value: int) -> list[int]:
    assembler = Assembler()
    assembler.code.clear()
    assembler.load_immediate(register, value & MASK32)
    return assembler.code


def store(address: int, register: int = 0) -> list[int]:
    """Store a register to a bus address."""
    return [*immediate(TEMPORARY, address), rv32.encode("sw", rs1=TEMPORARY, rs2=register, imm=0)]


def port(bank: int, word: int = 0) -> int:
    return COMMAND_PORT.base + 64 * bank + 4 * word


EXIT = store(port(0, CONTROL["exit"]))
BARRIER = store(port(0, CONTROL["barrier"]))
FENCE = store(port(0, CONTROL["fence"]))
TRAP = store(port(0, CONTROL["trap"]))
GO = store(port(IOTA))  # an empty iota


def program(words: list[int], **parts: int) -> Program:
    return Program("test", b"".join(word.to_bytes(4, "little") for word in words), **parts)


DUMP = program([
    *immediate(5, DMEM.base), *immediate(6, DMEM.base + CHIP.dmem_bytes), *immediate(7, port(1)),
    *code(
        op("lw", rd=8, rs1=5, imm=0), op("sw", rs2=8, rs1=7, imm=4),
        op("addi", rd=5, rs1=5, imm=4), op("bne", rs1=5, rs2=6, offset=-12),
    ),
    *EXIT,
])  # fmt: skip


# Machines. ----------------------------------------------------------------------------------------


class Hardware:
    """The bench, driven like a machine."""

    def __init__(self, chip):
        self.chip = chip
        self.model = Model(Bench(chip), "control_bench")
        self.drained = 0  # the cycle from which on the windows are empty
        self.resident = ""

    def write(self, address: int, value: int) -> None:
        self._access(address, 1, value)

    def read(self, address: int) -> int:
        self._access(address, 0, 0)
        return self.model["host__read_data"]

    def _access(self, address: int, write: int, value: int) -> None:
        model = self.model
        model["host__valid"], model["host__write"] = 1, write
        model["host__address"], model["host__write_data"] = address, value & MASK32
        model.tick()
        model["host__valid"] = 0

    def set(self, name: str, value: int) -> None:
        register = HOST_REGISTERS[name]
        for word in range(register.words):
            self.write(register.address + 4 * word, value >> 32 * word)

    def get(self, name: str) -> int:
        register = HOST_REGISTERS[name]
        return sum(
            self.read(register.address + 4 * word) << 32 * word for word in range(register.words)
        )

    def start(self, launch: Launch) -> None:
        program = launch.program
        for number in range(0, len(program.code), 4):
            word = int.from_bytes(program.code[number : number + 4], "little")
            self.write(HOST_REGIONS["imem"].base + number, word)
        for number, value in enumerate(launch.args):
            self.write(HOST_REGIONS["arguments"].base + 4 * number, value)
        for number, slot in enumerate(launch.slots):
            flags = slot.readable | slot.writable << 1
            for word, value in enumerate((slot.base, slot.base >> 32, slot.size, flags)):
                self.write(HOST_REGIONS["slots"].base + 16 * number + 4 * word, value)
        for name, value in (
            ("entry", program.entry), ("stack_limit", program.stack_limit),
            ("code_bytes", len(program.code)), ("arguments", len(launch.args)),
            ("slots", len(launch.slots)), ("watchdog", launch.watchdog),
        ):  # fmt: skip
            self.set(name, value)
        resident = program.digest == self.resident
        self.resident = program.digest
        self.set("control", Control.START | (Control.RESIDENT if resident else 0))

    def run(self, launch: Launch, scripts: list[Script], limit: int = 100_000) -> Outcome:
        self.start(launch)
        model = self.model
        self.ports = [StubPort(model, n, script) for n, script in enumerate(scripts)]
        status = HOST_REGISTERS["status"].address
        model["host__valid"], model["host__write"], model["host__address"] = 1, 0, status
        # START was written in cycle -4: see `Launcher`.
        for cycle in range(-3, limit):
            model["idle"] = (1 << self.chip.cores) - (1 if cycle >= self.drained else 2)
            for port in self.ports:
                port.before_edge(cycle)
            model.tick()
            if not model["host__read_data"] & Status.BUSY:
                break
        else:
            raise AssertionError(f"still busy after {limit} cycles")
        self.last_cycle = cycle
        model["host__valid"] = 0
        return self._outcome()

    def _outcome(self) -> Outcome:
        fault = None
        if self.get("status") & Status.FAULT:
            flags = FaultFlags(self.get("fault_flags"))
            is_command, place = FaultFlags.COMMAND in flags, FaultFlags.PLACE in flags
            fault = (
                self.get("fault_kind"), self.get("fault_core"), self.get("fault_pc"),
                self.get("fault_cycle"), self.get("fault_command") if is_command else -1,
                self.get("fault_slot") if place else -1,
                self.get("fault_offset") if place else -1,
            )  # fmt: skip
        base = HOST_REGIONS["cores"].base
        cores = [
            [self.read(base + 16 * n + 4 * k) for k in range(3)] for n in range(self.chip.cores)
        ]
        return Outcome(
            self.get("end_cycle"), fault, [low | high << 32 for low, high, _ in cores],
            [commands for _, _, commands in cores],
        )  # fmt: skip

    def dmem(self) -> list[list[int]]:
        """The words of every core's DMEM, by a program that stores them to a command field."""
        self.run(Launch(DUMP), [Script()] * self.chip.cores)
        return [[value for _, _, value in port.fields] for port in self.ports]


class Oracle:
    """The definition with scripted windows."""

    def __init__(self, chip):
        self.machine = Definition(chip)
        for core in self.machine._cores:
            core.local[0][:] = np.frombuffer(SRAM_IMAGE, np.uint8)

    def run(self, launch: Launch, scripts: list[Script]) -> Outcome:
        cores = self.machine._cores
        for core, script in zip(cores, scripts, strict=True):
            core.begin = self._begin(core, script)
        self.machine.start(launch)
        result = self.machine.wait()
        return Outcome(
            result.cycles, signature(result.fault), [core.instructions for core in cores],
            [len(core.issued) for core in cores],
        )  # fmt: skip

    @staticmethod
    def _begin(core, script: Script):
        def begin(*args) -> None:
            type(core).begin(core, *args)
            core.window = StubWindow(core, script)

        return begin

    def dmem(self) -> list[list[int]]:
        return [core.dmem.view("<u4").tolist() for core in self.machine._cores]
