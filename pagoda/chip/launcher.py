"""The launcher: what the host loads and asks for, the launch's clock, its barriers and its end.

host        PREPARE     DELAY           RUN  <-> BARRIER      DRAIN        OUTCOME
writes  ->  add up  ->  arguments   ->  cores execute     ->  windows  ->  core after core:
START       the delay   copied          until all pause       empty        end and fault
"""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import enum, memory, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from pagoda.chip.host_map import HOST_REGIONS, HOST_REGISTERS, REGION_SHIFT, Control
from pagoda.chip.launch_outcome import LaunchOutcome
from pagoda.chip.launch_signals import (
    CYCLE_BITS,
    ControlStatus,
    HostPort,
    LaunchBus,
    LoadTarget,
    Overflow,
    Pause,
)
from pagoda.isa.chip import Chip
from pagoda.isa.timing import BARRIER_CYCLES, CODE_BYTES_PER_CYCLE


class _State(enum.Enum, shape=4):
    IDLE = 0
    PREPARE = 1
    SUM = 2
    BEGIN = 3  # the cycle before cycle 0
    DELAY = 4
    RUN = 5
    BARRIER = 6
    DRAIN = 7
    OUTCOME = 8


class Launcher(wiring.Component):
    """`busy`: a launch runs. `idle`, a bit of each core: its window is empty and nothing is on the
    way to it.

    While the cores' clock is stopped the launcher must stand still, too, host accesses included.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "host": In(HostPort()), "busy": Out(1), "launch": Out(LaunchBus()),
            "idle": In(chip.cores),
            "status": In(ControlStatus()).array(chip.cores),
            "overflow": In(Overflow()).array(chip.cores),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        self.state = Signal(_State)
        self.arguments, self.code_bytes = Signal(32), Signal(32)
        self.resident = Signal()
        m.submodules.outcome = self.outcome = LaunchOutcome(self.chip)
        for number in range(self.chip.cores):
            connect(m, self.outcome.status[number], flipped(self.status[number]))
            m.d.comb += self.outcome.overflow[number].eq(self.overflow[number])
        self._host(m)
        self._load(m)
        self._clock(m)
        self._sequence(m)
        return m

    # Host. ----------------------------------------------------------------------------------------

    def _host(self, m: Module) -> None:
        host, launch = self.host, self.launch
        region, offset = host.address[REGION_SHIFT:], host.address[:REGION_SHIFT]
        # The host's word of a memory; arguments stay here until the launch.
        self.host_writes = Signal()
        m.d.comb += self.host_writes.eq(host.valid & host.write & (self.state == _State.IDLE))
        written = {
            "entry": Cat(launch.entry), "stack_limit": Cat(launch.stack_limit),
            "code_bytes": Cat(self.code_bytes), "arguments": Cat(self.arguments),
            "slots": Cat(launch.slots), "watchdog": Cat(launch.watchdog),
        }  # fmt: skip
        self.starts = Signal()
        with m.If(self.host_writes & (region == 0)), m.Switch(offset):
            with m.Case(HOST_REGISTERS["control"].address):
                m.d.comb += self.starts.eq(host.write_data[0])
                m.d.sync += self.resident.eq((host.write_data & Control.RESIDENT) != 0)
            for name, target in written.items():
                register = HOST_REGISTERS[name]
                for word in range(register.words):
                    with m.Case(register.address + 4 * word):
                        m.d.sync += target[32 * word : 32 * word + 32].eq(host.write_data)
        m.d.comb += self.busy.eq(self.state != _State.IDLE)
        outcome, fault = self.outcome, self.outcome.fault
        read = {
            "status": Cat(self.busy, fault.kind.any()), "end_cycle": outcome.end_cycle,
            "fault_kind": fault.kind, "fault_core": outcome.core, "fault_cycle": fault.cycle,
            "fault_pc": fault.pc, "fault_flags": Cat(fault.is_command, fault.place),
            "fault_command": fault.command, "fault_slot": fault.slot,
            "fault_offset": fault.offset,
        }  # fmt: skip
        with m.If(host.valid & ~host.write):
            with m.If(region == 0), m.Switch(offset):
                for name, value in read.items():
                    register = HOST_REGISTERS[name]
                    for word in range(register.words):
                        with m.Case(register.address + 4 * word):
                            m.d.sync += host.read_data.eq(value[32 * word : 32 * word + 32])
            with m.Else():
                number = offset[4:][: ceil_log2(self.chip.cores)]
                instructions = Array(s.instructions for s in self.status)[number]
                commands = Array(s.commands for s in self.status)[number]
                m.d.sync += host.read_data.eq(
                    Array([instructions[:32], instructions[32:], commands, 0])[offset[2:4]]
                )
        m.d.comb += launch.code_words.eq(self.code_bytes[2:])

    def _load(self, m: Module) -> None:
        """The load bus: the host's words, and during a launch's delay its arguments."""
        host, launch = self.host, self.launch
        region = host.address[REGION_SHIFT:]
        base = {name: part.base >> REGION_SHIFT for name, part in HOST_REGIONS.items()}
        depth = self.chip.dmem_bytes // 4
        m.submodules.argument_words = words = memory.Memory(shape=32, depth=depth, init=[])
        write, read = words.write_port(), words.read_port()
        self.copied = Signal(range(depth + 1))  # argument words read so far
        self.copying = Signal()  # the memory shows the one before `copied`
        m.d.comb += [
            write.addr.eq(host.address[2:]), write.data.eq(host.write_data),
            write.en.eq(self.host_writes & (region == base["arguments"])),
            read.addr.eq(self.copied),
            launch.load_address.eq(host.address[2:]), launch.load_data.eq(host.write_data),
        ]  # fmt: skip
        for name, target in (("imem", LoadTarget.IMEM), ("slots", LoadTarget.SLOTS)):
            with m.If(self.host_writes & (region == base[name])):
                m.d.comb += launch.load_target.eq(target)
        more = (self.state == _State.DELAY) & (self.copied != self.arguments)
        m.d.sync += [self.copying.eq(more), self.copied.eq(self.copied + more)]
        with m.If(self.copying):
            m.d.comb += [
                launch.load_target.eq(LoadTarget.DMEM), launch.load_data.eq(read.data),
                launch.load_address.eq(self.copied - 1),
            ]  # fmt: skip
        with m.If(launch.begin):
            m.d.sync += self.copied.eq(0)

    # The launch. ----------------------------------------------------------------------------------

    def _clock(self, m: Module) -> None:
        launch = self.launch
        left = Signal(CYCLE_BITS + 1)  # watchdog - 1 - cycle, two's complement
        m.d.comb += [launch.begin.eq(self.state == _State.BEGIN), launch.due.eq(left[-1])]
        with m.If(launch.begin):
            m.d.sync += [
                launch.cycle.eq(0), left.eq(launch.watchdog - 1), launch.over.eq(0),
            ]  # fmt: skip
        with m.Else():
            m.d.sync += [
                launch.cycle.eq(launch.cycle + 1), left.eq(left - 1), launch.over.eq(left[-1]),
            ]  # fmt: skip

    def _sequence(self, m: Module) -> None:
        launch, state = self.launch, self.state
        pauses = [status.pause for status in self.status]
        all_paused = Cat(pause != Pause.RUNNING for pause in pauses).all()
        all_at_barrier = Cat(pause == Pause.BARRIER for pause in pauses).all()
        wait = Signal(32)  # cycles until the release
        copy_cycles = (self.code_bytes + (CODE_BYTES_PER_CYCLE - 1)) // CODE_BYTES_PER_CYCLE
        with m.Switch(state):
            with m.Case(_State.IDLE), m.If(self.starts):
                m.d.sync += state.eq(_State.PREPARE)
            with m.Case(_State.PREPARE):
                copied = Mux(self.resident, 0, copy_cycles)
                m.d.sync += [wait.eq(copied + self.chip.launch_cycles - 1), state.eq(_State.SUM)]
            with m.Case(_State.SUM):
                m.d.sync += [wait.eq(wait + self.arguments), state.eq(_State.BEGIN)]
            with m.Case(_State.BEGIN):
                m.d.sync += state.eq(_State.DELAY)
            with m.Case(_State.DELAY, _State.BARRIER):
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.d.comb += launch.release.eq(1)
                    m.d.sync += state.eq(_State.RUN)
            with m.Case(_State.RUN):
                # The last core arrives in this cycle; the release is one before the start.
                m.d.sync += wait.eq(BARRIER_CYCLES - 2)
                with m.If(all_at_barrier):
                    m.d.sync += state.eq(_State.BARRIER)
                with m.Elif(all_paused):
                    m.d.sync += state.eq(_State.DRAIN)
            with m.Case(_State.DRAIN), m.If(self.idle.all()):
                m.d.comb += self.outcome.start.eq(1)
                m.d.sync += state.eq(_State.OUTCOME)
            with m.Case(_State.OUTCOME), m.If(self.outcome.done):
                m.d.sync += state.eq(_State.IDLE)
