"""The vector engine: vector, reduce, finish, transpose, iota.

                 sequencer          what is read, stored and done in every cycle (a step)
    cycle i      reads of a, b, c   requests to the local memories
    i + 1        operands           data become lanes, in the operand registers
    i + 2        pipeline, state    f1 and f2; sums and other operators of reductions
    i + 2 + l    encode             results become elements
    i + 3 + l    write              l: latencies of the functions

A step that stores leaves its destination in a queue. Results leave in the order of the steps: the
window starts no command so early that its first result would overtake the last one before it.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from pagoda.chip.elementwise import ElementwiseSequencer
from pagoda.chip.finish import FinishSequencer
from pagoda.chip.interfaces import EngineControl, Job, LocalRead, LocalWrite
from pagoda.chip.reduction import ReductionSequencer
from pagoda.chip.row_state import RowState
from pagoda.chip.tile_transpose import TransposeArray, TransposeSequencer
from pagoda.chip.vector_pipeline import VectorPipeline
from pagoda.chip.vector_stages import (
    MEMORY,
    SCALAR,
    SPECIAL,
    STATE,
    A,
    B,
    C,
    Destination,
    Execute,
    Step,
    decoded,
    encoded,
    lanes_of,
    raw_elements,
    state_lanes,
)
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS

# The most results under way: those of `finish` follow one another in 2 cycles and take 32; behind
# them there may be a few of the command before.
RESULTS = 32


class VectorEngine(wiring.Component):
    """Answers `control`; asks SRAM and ACC through `a`, `b`, `c` and `write`."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "control": In(EngineControl()),
            "a": Out(LocalRead(chip)), "b": Out(LocalRead(chip)), "c": Out(LocalRead(chip)),
            "write": Out(LocalWrite(chip)),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        step, offsets = self._sequence(m)

        # Cycle i: ask.
        for operand, port in ((A, self.a), (B, self.b), (C, self.c)):
            asked = step.reads[operand]
            m.d.comb += [
                port.enable.eq(asked.enable), port.acc.eq(asked.acc),
                port.address.eq(asked.address), port.size.eq(asked.size),
            ]  # fmt: skip
        arriving = Signal(Step(self.chip))
        m.d.sync += arriving.eq(step)

        # Cycle i + 1: take operands.
        m.submodules.state = state = RowState(self.chip)
        registers = self._take(m, arriving, state, offsets)
        execute = Signal(Execute(self.chip))
        m.d.sync += execute.eq(arriving.execute)
        with m.If(execute.accumulate):
            width = 32 * state_lanes(self.chip)
            m.d.sync += registers[B][:width].eq(state.accumulated)

        # Cycle i + 2: execute.
        m.submodules.pipeline = pipeline = VectorPipeline(self.chip)
        m.d.comb += [
            pipeline.valid.eq(execute.compute),
            pipeline.f1.eq(execute.f1), pipeline.f2.eq(execute.f2),
            pipeline.a.eq(registers[A]), pipeline.b.eq(state.fresh_b),
            pipeline.c.eq(registers[C]),
            state.execute.eq(execute), state.a.eq(registers[A]), state.b.eq(registers[B]),
        ]  # fmt: skip
        self._store(m, step, state, pipeline)
        return m

    def _sequence(self, m: Module) -> tuple[data.View, Value]:
        """The step of this cycle; and the accounting."""
        control = self.control
        held = Signal(Job())
        with m.If(control.start):
            m.d.sync += held.eq(control.job)
        elementwise = ElementwiseSequencer(self.chip)
        sequencers = {
            elementwise: ("vector", "iota"),
            ReductionSequencer(self.chip): ("reduce",),
            FinishSequencer(self.chip): ("finish",),
            TransposeSequencer(self.chip): ("transpose",),
        }
        step, last, busy = Signal(Step(self.chip)), Signal(), Signal()
        for sequencer, commands in sequencers.items():
            m.submodules[f"{commands[0]}_sequencer"] = sequencer
            banks = [COMMANDS[name].bank for name in commands]
            mine = Cat(control.job.bank == bank for bank in banks).any()
            m.d.comb += [
                sequencer.control.start.eq(control.start & ~control.job.empty & mine),
                sequencer.control.job.eq(control.job), sequencer.control.held.eq(held),
            ]  # fmt: skip
            with m.If(Cat(held.bank == bank for bank in banks).any()):
                m.d.comb += [step.eq(sequencer.control.step), last.eq(sequencer.control.last)]
        m.d.comb += control.free.eq(~busy | last)
        with m.If(last):
            m.d.sync += busy.eq(0)
        with m.If(control.start):
            m.d.sync += busy.eq(~control.job.empty)
        return step, elementwise.offsets

    def _take(
        self, m: Module, arriving: data.View, state: RowState, offsets: Value
    ) -> list[Signal]:
        """The operand registers."""
        m.submodules.transposer = transposer = TransposeArray(self.chip)
        lanes = self.chip.lanes
        registers = [Signal(32 * lanes, name=f"operand_{name}") for name in "abc"]
        for operand, port in ((A, self.a), (B, self.b), (C, self.c)):
            load, register = arriving.loads[operand], registers[operand]
            name = "abc"[operand]
            raw = raw_elements(m, port.data, load.code, name)
            values = decoded(m, raw, load.code, name)
            spread = Cat(Mux(load.column, values[0], value) for value in values)
            sources = {MEMORY: spread, SCALAR: load.scalar.replicate(lanes)}
            if operand == A:
                sources |= {STATE: state.recalled, SPECIAL: transposer.leave}
                m.d.comb += [
                    transposer.shift.eq(arriving.shift), transposer.left.eq(arriving.by_columns),
                    transposer.code.eq(load.code), transposer.enter.eq(Cat(raw)),
                    state.index_data.eq(port.data),
                ]  # fmt: skip
            if operand == B:
                recalled = Cat(state.recalled_indices, state.recalled[len(state.recalled_indices):])
                group = Mux(arriving.indices, recalled, state.recalled)
                sources |= {STATE: group, SPECIAL: offsets}
                m.d.comb += state.recall_b.eq(
                    load.load & (load.source == STATE) & ~arriving.indices
                )
            with m.If(load.load), m.Switch(load.source):
                for source, value in sources.items():
                    with m.Case(source):
                        m.d.sync += register.eq(value)
        m.d.comb += [
            state.group.eq(arriving.group), state.index_load.eq(arriving.index_load),
            state.column.eq(arriving.column),
        ]  # fmt: skip
        return registers

    def _store(
        self, m: Module, step: data.View, state: RowState, pipeline: VectorPipeline
    ) -> None:
        """Results to elements, to memory."""
        layout = Destination(self.chip)
        m.submodules.destinations = queue = SyncFIFO(width=layout.size, depth=RESULTS)
        ready = Signal()
        target = data.View(layout, queue.r_data)
        m.d.comb += [
            queue.w_en.eq(step.store), queue.w_data.eq(step.destination.as_value()),
            ready.eq(pipeline.out_valid | state.valid), queue.r_en.eq(ready),
        ]  # fmt: skip
        lanes = lanes_of(pipeline.out)
        lanes[0] = Mux(state.valid, state.result, lanes[0])
        m.d.sync += [
            self.write.enable.eq(ready), self.write.acc.eq(target.acc),
            self.write.address.eq(target.address), self.write.size.eq(target.size),
            self.write.data.eq(encoded(m, lanes, target.code, "result")),
        ]  # fmt: skip
