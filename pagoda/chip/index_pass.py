"""The indices of a gather or scatter, read before it enters: smallest and largest.

    r        `start`: the first side read; one a cycle, `lanes` indices each
    z        the last data are here (z = r + ceil(rows / lanes)) and are latched
    z+1      comparisons within groups of lanes
    z+2      comparisons of the groups, and with what came before
    z+3      the smallest goes through the multiplier (operands were latched at the end of z+2)
    z+4      `done`; the largest goes through the multiplier
    z+5      both products are known
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import SideRead
from pagoda.chip.product_schedule import COUNT_BITS
from pagoda.isa.chip import Chip


class IndexPass(wiring.Component):
    """start: read `rows` indices from `address` on, in this cycle for a first time. done: high
    from z + 4 until `abort`. `index_enable`: the multiplier latches `index`."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "start": In(1), "abort": In(1), "address": In(31), "rows": In(COUNT_BITS),
            "done": Out(1), "side": Out(SideRead(chip)),
            "index_enable": Out(1), "index": Out(signed(32)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        lanes = self.chip.lanes
        reading, more, last = Signal(), Signal(), Signal()
        left, address = Signal(COUNT_BITS), Signal(31)  # of the read before this one
        fewer, further = Signal.like(left), Signal.like(address)
        m.d.comb += [
            reading.eq(self.start | more), self.side.enable.eq(reading),
            fewer.eq(left - lanes), further.eq(address + self.chip.port_bytes),
            self.side.address.eq(Mux(self.start, self.address, further)),
            last.eq(Mux(self.start, self.rows <= lanes, left <= 2 * lanes)),
        ]  # fmt: skip
        with m.If(reading):
            m.d.sync += [
                more.eq(~last), address.eq(self.side.address),
                left.eq(Mux(self.start, self.rows, fewer)),
            ]

        # One bit a stage: this group of lanes is the command's first, its last.
        stages = 4
        first, final = Signal(stages), Signal(stages)
        m.d.sync += [first.eq(first << 1 | self.start), final.eq(final << 1 | (reading & last))]
        with m.If(final[3]):
            m.d.sync += self.done.eq(1)
        with m.If(self.abort):
            m.d.sync += [more.eq(0), first.eq(0), final.eq(0), self.done.eq(0)]

        words = [self.side.data.word_select(lane, 32).as_signed() for lane in range(lanes)]
        latched = [Signal(signed(32), name=f"lane{lane}") for lane in range(lanes)]
        m.d.sync += [
            latched[lane].eq(Mux(lane < left, words[lane], words[0])) for lane in range(lanes)
        ]
        # Of groups of lanes, and of all that came before.
        group = 1 << lanes.bit_length() // 2
        extremes = []
        for largest, first_of_all in ((False, (1 << 31) - 1), (True, -(1 << 31))):
            side = ("low", "high")[largest]
            kept, new = Signal(signed(32), name=side), Signal(signed(32), name=f"new_{side}")
            found = []
            for at in range(0, lanes, group):
                found.append(Signal(signed(32), name=f"{side}{at}"))
                m.d.sync += found[-1].eq(_extreme(latched[at : at + group], largest))
            m.d.comb += new.eq(_extreme([kept, *found], largest))
            m.d.sync += kept.eq(Mux(first[1], first_of_all, new))
            extremes.append((kept, new))
        (_, new_low), (high, _) = extremes
        m.d.comb += [
            self.index_enable.eq(final[2] | final[3]),
            self.index.eq(Mux(final[2], new_low, high)),
        ]
        return m


def _extreme(values: list[Value], largest: bool) -> Value:
    """The smallest or largest value: all pairs are compared at once."""
    chosen: Value = C(0, 32)
    for number, value in enumerate(values):
        wins = [  # of equal values the first is no larger than the others
            (values[min(number, other)] <= values[max(number, other)]) ^ (number > other) ^ largest
            for other in range(len(values))
            if other != number
        ]
        chosen = chosen | Mux(Cat(wins).all(), value, 0)
    return chosen.as_signed()
