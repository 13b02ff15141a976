"""A block of operands that comes line by line and leaves row by row."""

from amaranth.hdl import Array, Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Transposer(wiring.Component):
    """Two blocks of rows x cols elements: one fills while the other leaves.

    A line fills a column of the block `put_block` (element i to row i), or, where `straight`, a row
    of it (element i to column i). `row` shows row `take_index` of the block `take_block`.
    """

    def __init__(self, rows: int, cols: int, bits: int):
        self.rows, self.cols, self.bits = rows, cols, bits
        super().__init__({
            "put": In(1), "put_block": In(1), "put_index": In(range(max(rows, cols))),
            "straight": In(1), "line": In(bits * max(rows, cols)),
            "take_block": In(1), "take_index": In(range(rows)), "row": Out(bits * cols),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        line = [self.line.word_select(i, self.bits) for i in range(max(self.rows, self.cols))]
        rows = []
        for block in (0, 1):
            chosen = self.put & (self.put_block == block)
            for r in range(self.rows):
                rows.append(Signal(self.bits * self.cols, name=f"block{block}_{r}",
                                   reset_less=True))  # fmt: skip
                with m.If(chosen & self.straight & (self.put_index == r)):
                    m.d.sync += rows[-1].eq(self.line)
                for c in range(self.cols):
                    with m.If(chosen & ~self.straight & (self.put_index == c)):
                        m.d.sync += rows[-1].word_select(c, self.bits).eq(line[r])
        m.d.comb += self.row.eq(Array(rows)[Cat(self.take_index, self.take_block)])
        return m
