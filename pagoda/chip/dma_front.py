"""What load and store engine have in common: plan, accounting and indices of every job."""

from __future__ import annotations

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from pagoda.chip.accounting import Accounting
from pagoda.chip.interfaces import EngineControl, SideRead
from pagoda.chip.transfer import GATHER, SCATTER, Plan, TransferPlan, plan_lag
from pagoda.chip.walkers import COUNT_BITS, ROW_OFFSET_BITS, IndexReader
from pagoda.isa.chip import Chip


def front_lag(chip: Chip) -> int:
    """Cycles from a start until the engine gets the plan: then the first index has been read."""
    return max(plan_lag(chip), 2)


class DmaFront(wiring.Component):
    """Answers the window and tells the engine what to move, front_lag(chip) cycles after the start.

    control   the engine's own control port; `free` is exact by the contract
    slot      the DRAM port's slots of now
    side      reads of SRAM for indices
    valid     in one cycle, that long after the start of a job that is not empty, with `plan`.
              A `PieceWalker` that takes plan.mem then shows its first piece in the next cycle.
    late_slot `slot`, front_lag(chip) + 1 cycles later: the first slot of a load that counts comes
              with its first piece at the earliest, and all slots of its occupancy are late slots
              before or in the cycle in which the next job's plan is valid.
    row_valid, row_offset, row_next
              the rows of indexed jobs, to be connected to the walker of plan.mem
    """

    def __init__(self, chip: Chip, loads: bool):
        self.chip, self.loads, self.lag = chip, loads, front_lag(chip)
        super().__init__({
            "control": In(EngineControl()), "slot": In(1), "side": Out(SideRead(chip)),
            "valid": Out(1), "plan": Out(Plan()), "late_slot": Out(1),
            "row_valid": Out(1), "row_offset": Out(signed(ROW_OFFSET_BITS)), "row_next": In(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        control, words = self.control, self.control.job.words
        plan = m.submodules.plan = TransferPlan(self.chip, self.loads)
        accounting = m.submodules.accounting = Accounting(self.chip, self.loads)
        indices = m.submodules.indices = IndexReader(self.chip, early=self.lag == 2)
        connect(m, flipped(self.side), indices.side)
        indexed = control.job.bank == (GATHER if self.loads else SCATTER)
        m.d.comb += [
            plan.start.eq(control.start), plan.job.eq(control.job),
            accounting.start.eq(control.start), accounting.job.eq(control.job),
            accounting.slot.eq(self.slot), accounting.plan_valid.eq(plan.valid),
            accounting.plan.eq(plan.plan), accounting.scanned.eq(indices.scanned),
            accounting.scanned_low.eq(indices.scanned_low), control.free.eq(accounting.free),
            indices.start.eq(control.start & indexed & ~control.job.empty),
            indices.indices.eq(words[6][:31]), indices.rows.eq(words[5][:COUNT_BITS]),
            indices.stride.eq(words[7].as_signed()),
            self.row_valid.eq(indices.row_valid), self.row_offset.eq(indices.row_offset),
            indices.row_next.eq(self.row_next),
        ]  # fmt: skip
        if plan_lag(self.chip) == self.lag:
            m.d.comb += [self.valid.eq(plan.valid), self.plan.eq(plan.plan)]
        else:
            m.d.sync += [self.valid.eq(plan.valid), self.plan.eq(plan.plan)]
        late = self.slot
        for delay in range(self.lag + 1):
            register = Signal(name=f"slot_{delay + 1}")
            m.d.sync += register.eq(late)
            late = register
        m.d.comb += self.late_slot.eq(late)
        return m
