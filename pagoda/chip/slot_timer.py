"""When a core's DRAM port opens: atom slots, counted from the launch."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import dram_slot_ratio
from pagoda.isa.chip import Chip


class SlotTimer(wiring.Component):
    """`slot` is high in contract cycles ceil(j * X), j = 0, 1, 2, ..., of a launch; X >= 1.

    `restart` is high in cycle 0 of the launch, which is slot 0 itself: `slot` is high with it, and
    the next enabled cycle is cycle 1. Before the first restart the timer runs from reset.
    """

    def __init__(self, chip: Chip):
        self.ratio = dram_slot_ratio(chip)
        super().__init__({"restart": In(1), "slot": Out(1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        numerator, denominator = self.ratio
        # Cycle c is a slot if c - 1 < j * numerator / denominator <= c for some j, that is if
        # c * denominator mod numerator, the phase, is below the denominator.
        phase = Signal(range(max(numerator, 2)))
        now = Mux(self.restart, 0, phase)
        following = Signal(range(numerator + denominator + 1))
        m.d.comb += [self.slot.eq(now < denominator), following.eq(now + denominator)]
        m.d.sync += phase.eq(
            Mux(following >= numerator, following - numerator, following)
        )
        return m
