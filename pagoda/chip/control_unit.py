"""A core's control unit: control core, IMEM, DMEM, slot table, and the bus that joins them.

An access that the core asks for in cycle t + 3 is checked in that cycle, from registers; a DMEM
write or a store to the command port happens in t + 4 from registers again. Whatever ends a
stretch of instructions (a fault, a barrier, the exit) leaves its cycle and pc in `outcome`.
"""

from amaranth.hdl import Array, Module, Mux, Signal, Value, signed
from amaranth.lib import data, enum, memory, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from pagoda.chip.control_core import FAULT_KIND_BITS, ControlCore
from pagoda.chip.interfaces import Fault, PortStore, SideRead, SlotTable, WriterQuery
from pagoda.chip.launch_signals import ControlStatus, LaunchBus, LoadTarget, Pause
from pagoda.chip.slot_table import SlotMemory
from pagoda.isa import memory_map
from pagoda.isa.chip import Chip
from pagoda.isa.commands import BY_BANK, CONTROL, CONTROL_BANK, WORDS_PER_BANK
from pagoda.isa.fault import FaultKind

WORD_SIZE = 2  # log2 of bytes
LISTEN = 4  # cycles after a drop in which a fault of the last cycles may still be reported


class _Bus(enum.Enum, shape=3):
    """What the bus does."""

    IDLE = 0  # also the cycle of a request
    SHORT = 1  # DMEM and core registers: the access's last cycle
    WRITER = 2  # waiting for a writer of a word of SRAM
    SRAM = 3  # reading it
    TRAP = 4
    PORT = 5  # a store is at the command port
    DROPPED = 6  # the watchdog has ended it


def _region(region: memory_map.Region) -> int:
    return region.base // memory_map.REGION_BYTES


class ControlUnit(wiring.Component):
    """`port` stores to the command port, `writers` and `side` serve loads from SRAM, `slots`
    answers the command port; `launch` and `status` belong to the launcher. number: the core's."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "number": In(8), "launch": In(LaunchBus()), "status": Out(ControlStatus()),
            "port": Out(PortStore()),
            "writers": Out(WriterQuery()), "side": Out(SideRead(chip)), "slots": In(SlotTable()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.core = self.core = core = ControlCore(self.chip)
        m.submodules.slots = slots = SlotMemory(self.chip)
        connect(m, slots.launch, flipped(self.launch))
        connect(m, slots.table, flipped(self.slots))
        m.d.comb += [
            core.clear.eq(self.launch.begin), core.entry.eq(self.launch.entry),
            core.start.eq(self.launch.release), core.over.eq(self.launch.over),
            core.code_words.eq(self.launch.code_words),
        ]  # fmt: skip
        self.bus = Signal(_Bus)
        self.listening = Signal(range(LISTEN + 1))
        self.offset = core.bus.address[:28]
        self.bank, self.word = core.bus.address[6:10], core.bus.address[2:6]
        # What ends the instructions in this cycle, `ended_age` cycles after the cycle to report.
        self.ended, self.ended_by = Signal(), Signal(Pause)
        self.ended_kind = Signal(FAULT_KIND_BITS)
        self.ended_age = Signal(signed(3))
        with m.If(core.fault):
            self._end(m, Pause.FAULT, core.fault_kind, core.fault_age)
        self._instructions(m)
        self._data(m)
        self._check(m)
        self._access(m)
        self._outcome(m)
        return m

    def _end(self, m: Module, by: Pause, kind: FaultKind | Value | int, age: Value | int) -> None:
        m.d.comb += [
            self.ended.eq(1), self.ended_by.eq(by), self.ended_kind.eq(kind),
            self.ended_age.eq(age),
        ]  # fmt: skip

    def _fail(self, m: Module, kind: FaultKind | Value, age: int) -> None:
        """The access faults; the core does not see it end."""
        self._end(m, Pause.FAULT, kind, age)
        m.d.comb += self.core.stop.eq(1)
        m.d.sync += self.bus.eq(_Bus.IDLE)

    # Memories. ------------------------------------------------------------------------------------

    def _instructions(self, m: Module) -> None:
        depth = self.chip.imem_bytes // 4
        m.submodules.imem = imem = memory.Memory(shape=32, depth=depth, init=[])
        read, write = imem.read_port(), imem.write_port()
        m.d.comb += [
            read.addr.eq(self.core.fetch[2:]), self.core.instruction.eq(read.data),
            write.addr.eq(self.launch.load_address), write.data.eq(self.launch.load_data),
            write.en.eq(self.launch.load_target == LoadTarget.IMEM),
        ]  # fmt: skip

    def _data(self, m: Module) -> None:
        """DMEM and the core registers; `loaded` shows a word two cycles after its request."""
        chip, bus, launch = self.chip, self.core.bus, self.launch
        shape = data.ArrayLayout(8, 4)
        m.submodules.dmem = dmem = memory.Memory(shape=shape, depth=chip.dmem_bytes // 4, init=[])
        read, write = dmem.read_port(), dmem.write_port(granularity=1)
        lanes = Array([
            0b0001 << self.offset[:2], Mux(self.offset[1], 0b1100, 0b0011), 0b1111, 0b1111,
        ])[bus.size]  # fmt: skip
        copies = Array([
            bus.data[:8].replicate(4), bus.data[:16].replicate(2), bus.data, bus.data,
        ])[bus.size]  # fmt: skip
        self.writes_data = Signal()  # in the last cycle of a store to DMEM
        m.d.comb += [
            read.addr.eq(self.offset[2:]),
            write.addr.eq(self.offset[2:]),
            write.data.eq(copies),
            write.en.eq(lanes & self.writes_data.replicate(4)),
        ]
        with m.If(launch.load_target == LoadTarget.DMEM):
            m.d.comb += [
                write.addr.eq(launch.load_address), write.data.eq(launch.load_data),
                write.en.eq(0b1111),
            ]  # fmt: skip
        core_register = Mux(self.offset[2], chip.cores, self.number)
        is_register = bus.address[28:] == _region(memory_map.CORE_REGISTERS)
        short = Signal(32)
        m.d.sync += short.eq(Mux(is_register, core_register, read.data.as_value()))
        is_sram = bus.address[28:] == _region(memory_map.SRAM)
        m.d.comb += bus.loaded.eq(Mux(is_sram, self.side.data[:32], short))

    # Accesses. ------------------------------------------------------------------------------------

    def _check(self, m: Module) -> None:
        """`self.access_fault`: kind of the requested access's fault, 0 if it has none."""
        bus, offset = self.core.bus, self.offset
        self.access_fault = fault = Signal(FAULT_KIND_BITS)
        is_word = bus.size == WORD_SIZE
        exists = Signal()
        masks = [0] * 16
        masks[CONTROL_BANK] = sum(1 << word for word in CONTROL.values())
        for bank, command in BY_BANK.items():
            masks[bank] = sum(1 << word for word in command.words)
        mask = Signal(WORDS_PER_BANK)
        m.d.comb += [
            mask.eq(Array(masks)[self.bank]),
            exists.eq(mask.bit_select(self.word, 1) & ~offset[10:].any()),
        ]
        misaligned = Mux(is_word, offset[:2].any(), (bus.size == 1) & offset[0])
        outside_dmem = offset[ceil_log2(self.chip.dmem_bytes) :].any()
        outside_sram = offset[ceil_log2(self.chip.sram_bytes) :].any()
        sram_allows = is_word & ~bus.store & ~outside_sram
        port_allows = is_word & bus.store & exists
        register_allows = is_word & ~bus.store & ~offset[3:].any()
        below_stack = bus.store & bus.from_stack & (offset < self.launch.stack_limit)
        m.d.comb += fault.eq(FaultKind.BAD_ADDRESS)
        with m.If(misaligned):
            m.d.comb += fault.eq(FaultKind.MISALIGNED)
        with m.Else(), m.Switch(bus.address[28:]):
            with m.Case(_region(memory_map.DMEM)):
                with m.If(outside_dmem):
                    m.d.comb += fault.eq(FaultKind.DMEM_OUT_OF_RANGE)
                with m.Else():
                    m.d.comb += fault.eq(Mux(below_stack, FaultKind.STACK_OVERFLOW, 0))
            with m.Case(_region(memory_map.SRAM)), m.If(sram_allows):
                m.d.comb += fault.eq(0)
            with m.Case(_region(memory_map.COMMAND_PORT)), m.If(port_allows):
                m.d.comb += fault.eq(0)
            with m.Case(_region(memory_map.CORE_REGISTERS)), m.If(register_allows):
                m.d.comb += fault.eq(0)

    def _access(self, m: Module) -> None:
        bus = self.core.bus
        m.d.comb += [
            self.writers.first.eq(self.offset), self.writers.last.eq(self.offset | 3),
            self.side.address.eq(self.offset),
        ]  # fmt: skip
        with m.Switch(self.bus):
            with m.Case(_Bus.IDLE), m.If(bus.request):
                self._request(m)
            with m.Case(_Bus.SHORT):
                is_register = bus.address[28:] == _region(memory_map.CORE_REGISTERS)
                m.d.comb += [bus.done.eq(1), self.writes_data.eq(bus.store & ~is_register)]
                m.d.sync += self.bus.eq(_Bus.IDLE)
            with m.Case(_Bus.WRITER):
                self._await_writer(m)
            with m.Case(_Bus.SRAM):
                m.d.comb += [self.side.enable.eq(1), bus.done.eq(1)]
                m.d.sync += self.bus.eq(_Bus.IDLE)
            with m.Case(_Bus.TRAP):
                self._fail(m, Mux(self.launch.over, FaultKind.WATCHDOG, FaultKind.TRAP), 0)
            with m.Case(_Bus.PORT):
                self._port(m)
            with m.Case(_Bus.DROPPED):
                self._dropped(m)

    def _request(self, m: Module) -> None:
        bus = self.core.bus
        is_trap = (self.bank == CONTROL_BANK) & (self.word == CONTROL["trap"])
        with m.If(self.access_fault.any()):
            self._fail(m, self.access_fault, 3)
        with m.Else(), m.Switch(bus.address[28:]):
            with m.Case(_region(memory_map.SRAM)):
                self._await_writer(m)
            with m.Case(_region(memory_map.COMMAND_PORT)):
                m.d.sync += self.bus.eq(Mux(is_trap, _Bus.TRAP, _Bus.PORT))
            with m.Default():
                m.d.sync += self.bus.eq(_Bus.SHORT)

    def _await_writer(self, m: Module) -> None:
        """The word is taken in the first cycle from t + 3 on in which nothing will write it."""
        with m.If(self.launch.over):
            self._fail(m, FaultKind.WATCHDOG, 0)
        with m.Else():
            m.d.sync += self.bus.eq(Mux(self.writers.busy, _Bus.WRITER, _Bus.SRAM))

    def _port(self, m: Module) -> None:
        """A field is set whenever its store started in time; a command enters, and fence, barrier
        and exit are through, only within the watchdog."""
        launch, bus, port = self.launch, self.core.bus, self.port
        is_control = self.bank == CONTROL_BANK
        expired = Mux(is_control, launch.due, launch.over & (self.word == 0))
        m.d.comb += [port.valid.eq(~expired), port.drop.eq(expired)]
        with m.If(expired):
            m.d.sync += [self.bus.eq(_Bus.DROPPED), self.listening.eq(LISTEN)]
        with m.Elif(port.ready):
            m.d.comb += bus.done.eq(1)
            m.d.sync += self.bus.eq(_Bus.IDLE)
            for name, by in (("barrier", Pause.BARRIER), ("exit", Pause.EXIT)):
                with m.If(is_control & (self.word == CONTROL[name])):
                    self._end(m, by, 0, -1)
                    m.d.comb += bus.pause.eq(1)

    def _dropped(self, m: Module) -> None:
        m.d.sync += self.listening.eq(self.listening - 1)
        with m.If(self.listening == 0):
            self._fail(m, FaultKind.WATCHDOG, 0)

    # Outcome. -------------------------------------------------------------------------------------

    def _outcome(self, m: Module) -> None:
        core, launch, port, status = self.core, self.launch, self.port, self.status
        outcome = Signal(Fault())
        m.d.comb += [
            port.bank.eq(self.bank), port.word.eq(self.word), port.value.eq(core.bus.data),
            port.pc.eq(core.pc), status.outcome.eq(outcome),
        ]  # fmt: skip
        # The record is made one cycle later, from registers; pc and age stay or are known.
        record, kind, age = Signal(), Signal(FAULT_KIND_BITS), Signal(range(5))
        m.d.sync += [
            record.eq(self.ended & ~port.fault), kind.eq(self.ended_kind),
            age.eq(self.ended_age + 1),
        ]  # fmt: skip
        with m.If(self.ended):
            m.d.sync += status.pause.eq(self.ended_by)
        with m.If(record):
            m.d.sync += [
                outcome.eq(0), outcome.kind.eq(kind), outcome.pc.eq(core.pc),
                outcome.cycle.eq(
                    Mux(kind == FaultKind.WATCHDOG, launch.watchdog, launch.cycle - age)
                ),
            ]  # fmt: skip
        # A fault of the command port beats what came of its store, unless the store was dropped
        # and the fault is of a later cycle.
        with m.If(port.fault):
            m.d.comb += core.stop.eq(1)
            m.d.sync += [
                self.bus.eq(_Bus.IDLE), status.pause.eq(Pause.FAULT), outcome.eq(port.fault_info),
            ]  # fmt: skip
            with m.If(port.fault_info.cycle > launch.watchdog):
                m.d.sync += [
                    outcome.eq(0), outcome.kind.eq(FaultKind.WATCHDOG),
                    outcome.cycle.eq(launch.watchdog), outcome.pc.eq(core.pc),
                ]  # fmt: skip
        self._count(m)
        with m.If(launch.release):
            m.d.sync += status.pause.eq(Pause.RUNNING)
        with m.If(launch.begin):
            m.d.sync += [status.instructions.eq(0), status.commands.eq(0)]

    def _count(self, m: Module) -> None:
        """Instructions, and commands among them, once nothing can make them fault any more."""
        core, port, status = self.core, self.port, self.status
        entered = Signal()
        with m.If(core.retired):
            m.d.sync += [
                status.instructions.eq(status.instructions + 1),
                status.commands.eq(status.commands + entered), entered.eq(0),
            ]  # fmt: skip
        with m.If(port.valid & port.ready & (self.bank != CONTROL_BANK) & (self.word == 0)):
            m.d.sync += entered.eq(1)
        with m.If(port.fault | self.launch.begin):
            m.d.sync += entered.eq(0)
