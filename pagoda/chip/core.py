"""One core: control unit, command port, window, local memories and the four engines, joined."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from pagoda.chip.command_port import CommandPort
from pagoda.chip.control_unit import ControlUnit
from pagoda.chip.interfaces import (
    LOAD,
    MATRIX,
    STORE,
    VECTOR,
    DramPort,
    Job,
    LocalRead,
    LocalWrite,
    SideRead,
)
from pagoda.chip.launch_signals import ControlStatus, LaunchBus, Overflow
from pagoda.chip.load_engine import LoadEngine
from pagoda.chip.local_memory import ACC_READERS, ACC_WRITERS, SIDE_PORTS, SRAM_READERS
from pagoda.chip.matrix_engine import MatrixEngine
from pagoda.chip.slot_timer import SlotTimer
from pagoda.chip.store_engine import StoreEngine
from pagoda.chip.vector_engine import VectorEngine
from pagoda.chip.window import Window, WindowTrace
from pagoda.isa.chip import Chip

READERS = tuple(dict.fromkeys((*SRAM_READERS, *ACC_READERS)))
WRITERS = ACC_WRITERS
# Side reads of LocalMemory: who asks.
CONTROL_SIDE, GATHER_SIDE, SCATTER_SIDE = range(SIDE_PORTS)
CONTROL_QUERY, INDEX_QUERY = range(2)


class CoreTrace(wiring.Signature):
    """What a simulation logs; unconnected it costs nothing."""

    def __init__(self, chip: Chip):
        super().__init__({"window": Out(WindowTrace(chip)), "job": Out(Job())})


class Core(wiring.Component):
    """Everything of a core that stops with the clock enable; its LocalMemory does not, so the
    ports to it lead outside. `idle`: no command is in flight or on its way; `number`: the
    core's own."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "number": In(8), "launch": In(LaunchBus()), "status": Out(ControlStatus()),
            "overflow": Out(Overflow()), "idle": Out(1), "dram": Out(DramPort()),
            **dict.fromkeys(READERS, Out(LocalRead(chip))),
            **dict.fromkeys(WRITERS, Out(LocalWrite(chip))),
            "side": Out(SideRead(chip)).array(SIDE_PORTS),
            "trace": Out(CoreTrace(chip)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        chip = self.chip
        m.submodules.control = control = ControlUnit(chip)
        m.submodules.command_port = port = CommandPort(chip)
        m.submodules.window = window = Window(chip)
        m.submodules.timer = timer = SlotTimer(chip)
        m.submodules.load = load = LoadEngine(chip)
        m.submodules.store = store = StoreEngine(chip)
        m.submodules.matrix = matrix = MatrixEngine(chip)
        m.submodules.vector = vector = VectorEngine(chip)

        m.d.comb += control.number.eq(self.number)
        connect(m, control.launch, flipped(self.launch))
        connect(m, control.status, flipped(self.status))
        connect(m, control.port, port.store)
        connect(m, control.slots, port.slots)
        connect(m, control.writers, window.query[CONTROL_QUERY])
        connect(m, port.query, window.query[INDEX_QUERY])
        m.d.comb += [
            port.cycle.eq(self.launch.cycle), port.launch.eq(self.launch.begin),
            port.full.eq(window.full), port.empty.eq(window.empty),
            window.enter.eq(port.enter), window.description.eq(port.description),
            window.job.eq(port.job), self.idle.eq(window.empty & ~port.enter),
        ]  # fmt: skip

        for number, engine in ((LOAD, load), (STORE, store), (MATRIX, matrix), (VECTOR, vector)):
            connect(m, window.engine[number], engine.control)
        begun = Signal()  # in cycle 0
        m.d.sync += begun.eq(self.launch.begin)
        m.d.comb += [
            timer.restart.eq(begun), load.slot.eq(timer.slot), store.slot.eq(timer.slot),
            load.launch.eq(self.launch.begin), self.overflow.eq(load.overflow),
        ]  # fmt: skip
        self._memory(m, control, port, load, store, matrix, vector)
        self._dram(m, load, store)
        connect(m, window.trace, flipped(self.trace.window))
        m.d.comb += self.trace.job.eq(port.job)
        return m

    def _memory(self, m: Module, control, port, load, store, matrix, vector) -> None:
        for name, unit_port in (
            ("store", store.read), ("vector_a", vector.a), ("vector_b", vector.b),
            ("vector_c", vector.c), ("matrix_a", matrix.a), ("matrix_b", matrix.b),
            ("psum", matrix.psum), ("load_write", load.write), ("vector_write", vector.write),
            ("matrix_write", matrix.write),
        ):  # fmt: skip
            connect(m, unit_port, flipped(getattr(self, name)))
        connect(m, load.side, flipped(self.side[GATHER_SIDE]))
        connect(m, store.side, flipped(self.side[SCATTER_SIDE]))
        # While the command port reads indices the control core waits for it.
        shared = self.side[CONTROL_SIDE]
        m.d.comb += [
            shared.enable.eq(control.side.enable | port.side.enable),
            shared.address.eq(control.side.address), control.side.data.eq(shared.data),
            port.side.data.eq(shared.data),
        ]  # fmt: skip
        with m.If(port.side.enable):
            m.d.comb += shared.address.eq(port.side.address)

    def _dram(self, m: Module, load: LoadEngine, store: StoreEngine) -> None:
        """Reads of the load engine and of accumulating stores share one channel: the port belongs
        to one of them at a time. Answers come in the order of the requests."""
        dram = self.dram
        # Whose answer arrives: a bit per cycle, as long as the latency.
        stores = Signal(self.chip.dram_latency)
        m.d.sync += stores.eq((stores << 1) | store.dram.read)
        m.d.comb += [
            dram.read.eq(load.dram.read | store.dram.read),
            dram.read_address.eq(load.dram.read_address),
            load.dram.valid.eq(dram.valid & ~stores[-1]), load.dram.data.eq(dram.data),
            store.dram.valid.eq(dram.valid & stores[-1]), store.dram.data.eq(dram.data),
            dram.write.eq(store.dram.write), dram.write_address.eq(store.dram.write_address),
            dram.write_data.eq(store.dram.write_data), dram.write_mask.eq(store.dram.write_mask),
        ]  # fmt: skip
        with m.If(store.dram.read):
            m.d.comb += dram.read_address.eq(store.dram.read_address)
