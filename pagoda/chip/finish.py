"""The steps of `finish`: fold the 64 lanes of every row's state into one element.

A row takes 64 / L' slots of two cycles. Sums keep to the tree of the definition: slot k adds group
k and its counterpart half a state away, which is read in the slot's second cycle; the following
slots add pairs of such sums, until one group is left (`fold_schedule`). The order of every other
operator does not show, so there slot k adds group k to what came before; argmax reads values in
the first cycle of a slot, indices in the second.

What is left goes through a tree over the lanes (`pagoda.chip.row_state`), which works beside the
slots of the next rows and up to 24 cycles longer than those of the last one. Meanwhile the lanes
take no other `finish`: the part of `timing.finish` that does not depend on the rows keeps the
engine for that long.
"""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from pagoda.chip.elementwise import COUNT_BITS
from pagoda.chip.reduction import identity_of
from pagoda.chip.vector_stages import (
    FIRST_INDICES,
    MEMORY,
    NEXT_INDICES,
    SCALAR,
    STATE,
    WORD,
    A,
    B,
    Sequencer,
    destination,
    element_shift,
    request,
    state_groups,
    state_lanes,
)
from pagoda.isa import timing
from pagoda.isa.accumulation import LANES, ReduceOp
from pagoda.isa.chip import Chip


@dataclass(frozen=True)
class Slot:
    """Add two groups, read from memory or from earlier sums, and keep the sum as group `first`."""

    first: int
    second: int
    from_memory: bool


def fold_schedule(groups: int) -> list[Slot | None]:
    """What each slot of a row adds; None: nothing, its operands are not ready.

    A sum can be the first operand 3 slots later and the second 2 slots later, so only the last
    slot has to wait for one.
    """
    slots: list[Slot | None] = []
    half = groups // 2
    while half:
        if half == 1 and slots:
            slots.append(None)
        slots += [Slot(k, k + half, 2 * half == groups) for k in range(half)]
        half //= 2
    return slots + [None] * (groups - len(slots))


class FinishSequencer(wiring.Component):
    """See the module."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({"control": In(Sequencer(chip))})

    def elaborate(self, platform):
        m = Module()
        group_bytes, groups = 4 * state_lanes(self.chip), state_groups(self.chip)
        fold_cycles = timing.finish(self.chip, 0).occupancy
        control, step = self.control, self.control.step
        words, first_words = control.held.words, control.job.words
        op, code = words[0][:3], words[0][4:6]
        argmax = op == ReduceOp.ARGMAX

        active, second_cycle = Signal(), Signal()
        slot, rows_left = Signal(range(max(groups, 2))), Signal(COUNT_BITS)
        state, target = Signal(32), Signal(32)
        group_address = Signal(32)
        waiting, wait = Signal(), Signal(range(max(fold_cycles, 2)))
        row_end, rows_end = Signal(), Signal()
        m.d.comb += [
            row_end.eq(active & second_cycle & (slot == groups - 1)),
            rows_end.eq(row_end & (rows_left == 1)),
            control.last.eq((waiting & (wait == 0)) if fold_cycles else rows_end),
            group_address.eq(state + slot * group_bytes),
        ]
        with m.If(active):
            m.d.sync += second_cycle.eq(~second_cycle)
            with m.If(second_cycle):
                m.d.sync += slot.eq(slot + 1)
        with m.If(row_end):
            m.d.sync += [
                slot.eq(0), rows_left.eq(rows_left - 1),
                state.eq(state + words[2]), target.eq(target + words[5]),
            ]  # fmt: skip
        with m.If(rows_end):
            m.d.sync += active.eq(0)
            if fold_cycles:
                m.d.sync += [waiting.eq(1), wait.eq(fold_cycles - 1)]
        with m.If(waiting):
            m.d.sync += wait.eq(wait - 1)
            with m.If(wait == 0):
                m.d.sync += waiting.eq(0)
        with m.If(control.start):
            m.d.sync += [
                active.eq(1), second_cycle.eq(0), slot.eq(0), rows_left.eq(first_words[3]),
                state.eq(first_words[1]), target.eq(first_words[4]),
            ]  # fmt: skip

        folds = Signal()  # this step's group is the row's last
        with m.If(active & (op == ReduceOp.FSUM)):
            self._sum(m, step, slot, second_cycle, group_address, group_bytes, folds)
        with m.Elif(active):
            self._accumulate(m, step, op, argmax, slot, second_cycle, group_address, groups, folds)
        m.d.comb += step.execute.fold.eq(folds)
        with m.If(folds):
            size = element_shift(code)
            m.d.comb += destination(step, Cat(target[:31], words[4][31]), 1 << size, code)
        return m

    def _sum(self, m, step, slot, second_cycle, group_address, group_bytes, folds) -> None:
        """Read one operand in each cycle; add in the second one."""
        schedule = fold_schedule(state_groups(self.chip))
        if schedule == [None]:  # one group: it is what the tree takes
            with m.If(~second_cycle):
                m.d.comb += [*self._read(step, A, group_address, group_bytes), folds.eq(1)]
            return
        last = max(i for i, work in enumerate(schedule) if work is not None)
        with m.Switch(slot):
            for i, work in enumerate(schedule):
                if work is None:
                    continue
                with m.Case(i):
                    with m.If(second_cycle):
                        m.d.comb += [
                            step.execute.sum.eq(1), step.execute.group.eq(work.first),
                            step.execute.count.eq(state_lanes(self.chip)), folds.eq(i == last),
                        ]  # fmt: skip
                        if work.from_memory:
                            other = group_address + 4 * LANES // 2
                            m.d.comb += self._read(step, B, other, group_bytes)
                        else:
                            m.d.comb += self._recall(step, B, work.second)
                    with m.Else():
                        if work.from_memory:
                            m.d.comb += self._read(step, A, group_address, group_bytes)
                        else:
                            m.d.comb += self._recall(step, A, work.first)

    def _accumulate(
        self, m, step, op, argmax, slot, second_cycle, group_address, groups, folds
    ) -> None:
        """Read a group, for argmax its indices in the second cycle; combine it with operand b."""
        group_bytes = 4 * state_lanes(self.chip)
        start, works = Signal(), Signal()
        m.d.comb += [
            works.eq(second_cycle == argmax),
            start.eq(works & (slot == 0)),
            step.loads[B].load.eq(start), step.loads[B].source.eq(SCALAR),
            step.loads[B].scalar.eq(identity_of(m, op)),
            step.execute.accumulate.eq(works), step.execute.op.eq(op),
            folds.eq(works & (slot == groups - 1)),
        ]  # fmt: skip
        with m.If(~second_cycle):
            m.d.comb += self._read(step, A, group_address, group_bytes)
        with m.Elif(argmax):
            m.d.comb += [
                *request(step.reads[A], 1, group_address + 4 * LANES, group_bytes),
                step.index_load.eq(Mux(start, FIRST_INDICES, NEXT_INDICES)),
            ]

    @staticmethod
    def _read(step, operand, address, size) -> list:
        load = step.loads[operand]
        return [
            *request(step.reads[operand], 1, address, size),
            load.load.eq(1), load.source.eq(MEMORY), load.code.eq(WORD),
        ]  # fmt: skip

    @staticmethod
    def _recall(step, operand, group) -> list:
        load = step.loads[operand]
        return [load.load.eq(1), load.source.eq(STATE), step.group.eq(group)]
