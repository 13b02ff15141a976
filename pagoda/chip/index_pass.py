"""The indices of a gather or scatter, read before it enters: smallest and largest.

    r        `start`: the first side read; one a cycle, `lanes` indices each
    z        the last data are here (z = r + ceil(rows / lanes)) and are latched
    z+1      half of the comparisons among the lanes
    z+2      the other half, and the comparison with what came before
    z+3      the smallest goes through the multiplier (operands were latched at the end of z+2)
    z+4      `done`; the largest goes through the multiplier
    z+5      both products are known
"""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import SideRead
from pagoda.chip.products import COUNT_BITS
from pagoda.isa.chip import Chip

Extremes = list[tuple[Value, Value]]  # (smallest, largest) of groups of lanes


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
        levels = lanes.bit_length() - 1
        half = (levels + 1) // 2
        folded = []
        for number, pair in enumerate(_fold([(lane, lane) for lane in latched], half)):
            kept = tuple(Signal(signed(32), name=f"{side}{number}") for side in ("low", "high"))
            m.d.sync += [register.eq(value) for register, value in zip(kept, pair, strict=True)]
            folded.append(kept)
        ((low, high),) = _fold(folded, levels - half)
        smallest, largest = Signal(signed(32)), Signal(signed(32))
        new_low, new_high = Signal(signed(32)), Signal(signed(32))
        m.d.comb += [
            new_low.eq(Mux(first[2] | (low < smallest), low, smallest)),
            new_high.eq(Mux(first[2] | (high > largest), high, largest)),
            self.index_enable.eq(final[2] | final[3]),
            self.index.eq(Mux(final[2], new_low, largest)),
        ]
        m.d.sync += [smallest.eq(new_low), largest.eq(new_high)]
        return m


def _fold(groups: Extremes, levels: int) -> Extremes:
    for _ in range(levels):
        groups = [
            (Mux(a[0] < b[0], a[0], b[0]), Mux(a[1] > b[1], a[1], b[1]))
            for a, b in zip(groups[::2], groups[1::2], strict=True)
        ]
    return groups
