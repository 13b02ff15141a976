"""How a launch ended: its last cycle and its fault, worked out core after core."""

from amaranth.hdl import Array, Module, Mux, Signal, Value
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import Fault
from pagoda.chip.launch_signals import CYCLE_BITS, ControlStatus, Overflow, Pause
from pagoda.isa.chip import Chip
from pagoda.isa.fault import FaultKind


class _Pass(enum.Enum, shape=2):
    """What the cores are looked at for; one pass after the other."""

    IDLE = 0
    TIMES = 1  # the first arrival at a barrier, the last exit
    FAULTS = 2  # of cores, and exits before a barrier
    OVERFLOWS = 3  # only if there are none of those


class LaunchOutcome(wiring.Component):
    """After `start`, when all cores have paused, `done` is a pulse; then `end_cycle`, `fault`
    (kind 0: none) and `core` stay until the next `start`.

    The fault of the least (cycle, core) counts. INT64_OVERFLOW counts if nothing else does, as a
    fault in the core's last cycle, and does not shorten the launch.
    """

    def __init__(self, chip: Chip):
        self.cores = chip.cores
        super().__init__({
            "start": In(1), "status": In(ControlStatus()).array(chip.cores),
            "overflow": In(Overflow()).array(chip.cores), "done": Out(1),
            "end_cycle": Out(CYCLE_BITS), "fault": Out(Fault()),
            "core": Out(range(max(chip.cores, 2))),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        kind = Signal(_Pass)
        number = Signal(range(max(self.cores, 2)))
        # Four cycles for each core: its record; the candidate; the comparisons; their use.
        step = Signal(2)
        use = Signal()
        m.d.sync += step.eq(Mux(kind == _Pass.IDLE, 0, step + 1))
        m.d.comb += use.eq(step == 3)
        pause, outcome, overflow = Signal(Pause), Signal(Fault()), Signal(Overflow())
        m.d.sync += [
            pause.eq(self._of(number, [Value.cast(s.pause) for s in self.status])),
            outcome.eq(self._of(number, [Value.cast(s.outcome) for s in self.status])),
            overflow.eq(self._of(number, [Value.cast(o) for o in self.overflow])),
        ]
        first_arrival, has_arrival = Signal(CYCLE_BITS), Signal()
        early, late = Signal(), Signal()  # than the first arrival, than the last exit so far
        m.d.sync += [
            early.eq(outcome.cycle < first_arrival), late.eq(outcome.cycle > self.end_cycle),
        ]  # fmt: skip
        with m.If(use & (kind == _Pass.TIMES)):
            with m.If((pause == Pause.BARRIER) & (early | ~has_arrival)):
                m.d.sync += [first_arrival.eq(outcome.cycle), has_arrival.eq(1)]
            with m.If((pause == Pause.EXIT) & late):
                m.d.sync += self.end_cycle.eq(outcome.cycle)
        candidate, is_candidate = Signal(Fault()), Signal()
        m.d.sync += [candidate.eq(outcome), is_candidate.eq(0)]
        stopped, found, better = Signal(), Signal(), Signal()
        with m.If(kind == _Pass.FAULTS):
            m.d.sync += is_candidate.eq(pause == Pause.FAULT)
            with m.If((pause == Pause.EXIT) & has_arrival):
                m.d.sync += [
                    is_candidate.eq(1), candidate.kind.eq(FaultKind.BARRIER_MISMATCH),
                ]  # fmt: skip
                with m.If(outcome.cycle < first_arrival):
                    m.d.sync += candidate.cycle.eq(first_arrival)
        with m.If(kind == _Pass.OVERFLOWS):
            m.d.sync += [
                is_candidate.eq(overflow.valid & ~stopped),
                candidate.kind.eq(FaultKind.INT64_OVERFLOW), candidate.pc.eq(overflow.pc),
                candidate.is_command.eq(1), candidate.command.eq(overflow.command),
            ]  # fmt: skip
        m.d.sync += better.eq(is_candidate & (~found | (candidate.cycle < self.fault.cycle)))
        with m.If(use & better):
            m.d.sync += [self.fault.eq(candidate), self.core.eq(number), found.eq(1)]
            with m.If(kind == _Pass.FAULTS):
                m.d.sync += [self.end_cycle.eq(candidate.cycle), stopped.eq(1)]
        with m.If(use):
            is_last = number == self.cores - 1
            m.d.sync += number.eq(Mux(is_last, 0, number + 1))
            with m.If(is_last):
                m.d.comb += self.done.eq(kind == _Pass.OVERFLOWS)
                m.d.sync += kind.eq(kind.as_value() + 1)
        with m.If(self.start):
            m.d.sync += [
                kind.eq(_Pass.TIMES), self.end_cycle.eq(0), self.fault.eq(0), self.core.eq(0),
                has_arrival.eq(0), found.eq(0), stopped.eq(0),
            ]  # fmt: skip
        return m

    @staticmethod
    def _of(number: Signal, values: list[Value]) -> Value:
        return Array(values)[number]
