"""Which commands in flight an arriving one has to wait for: their ranges, compared."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data

from pagoda.isa.access import ACC, DRAM
from pagoda.isa.chip import Chip


class Ranges(data.StructLayout):
    """The ranges of a command in as few bits as the chip's memories need.

    The checks keep every range inside its memory. In SRAM and ACC the space is the top bit of an
    address, so that comparing addresses compares spaces too. In DRAM a command has one range at
    most, for an accumulating store reads what it writes: `dram`, written if `dram_write`.
    """

    def __init__(self, chip: Chip):
        self.local_bits = (max(chip.sram_bytes, chip.acc_bytes) - 1).bit_length()
        self.dram_bits = (chip.dram_bytes - 1).bit_length()
        self.local = span(self.local_bits + 1)
        super().__init__({
            "reads": data.ArrayLayout(self.local, 3), "write": self.local,
            "dram": span(self.dram_bits), "dram_write": 1,
        })  # fmt: skip

    def narrowed(self, m: Module, description: data.View) -> data.View:
        """The ranges of a description, in this layout."""
        narrow = Signal(self)
        pairs = list(zip(description.reads, narrow.reads, strict=True))
        pairs.append((description.write, narrow.write))
        in_dram = []
        for wide, local in pairs:
            m.d.comb += [
                local.valid.eq(wide.valid & (wide.space != DRAM)),
                local.first.eq(Cat(wide.first[: self.local_bits], wide.space == ACC)),
                local.last.eq(Cat(wide.last[: self.local_bits], wide.space == ACC)),
            ]
            in_dram.append(wide.valid & (wide.space == DRAM))
        ranges = [wide for wide, _ in pairs]
        m.d.comb += [
            narrow.dram.valid.eq(Cat(in_dram).any()), narrow.dram_write.eq(in_dram[-1]),
            narrow.dram.first.eq(select(in_dram, [wide.first for wide in ranges])),
            narrow.dram.last.eq(select(in_dram, [wide.last for wide in ranges])),
        ]  # fmt: skip
        return narrow


def span(bits: int) -> data.StructLayout:
    return data.StructLayout({"valid": 1, "first": bits, "last": bits})


def overlap(a: data.View, b: data.View) -> Value:
    return a.valid & b.valid & (a.first <= b.last) & (b.first <= a.last)


def conflict(older: data.View, younger: data.View) -> Value:
    """One of two commands (`Ranges`) writes bytes that the other reads or writes."""
    local = [overlap(older.write, younger.write)]
    local += [overlap(older.write, read) for read in younger.reads]
    local += [overlap(read, younger.write) for read in older.reads]
    dram = overlap(older.dram, younger.dram) & (older.dram_write | younger.dram_write)
    return Cat(local).any() | dram


def select(chosen: Iterable[Value], values: Iterable[Value]) -> Value:
    """OR of the chosen values."""
    return reduce(or_, (Mux(yes, value, 0) for yes, value in zip(chosen, values, strict=True)))
