"""The steps of `transpose`, and the register array that turns L x L elements over.

A block of L rows of L elements enters the array by rows, one a cycle, while the block before it
leaves by columns: blocks alternate between moving down and moving left.

    down   a row enters at the top; the bottom row, which is a column of the block before, leaves
    left   a row enters at the right end, its first element lowest; the left end leaves

Blocks with missing rows or columns take as long; only what exists is read and written.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.elementwise import COUNT_BITS
from pagoda.chip.vector_stages import (
    SPECIAL,
    WORD,
    A,
    Sequencer,
    destination,
    element_shift,
    lanes_of,
    packed,
    request,
)
from pagoda.isa.chip import Chip
from pagoda.isa.functions import FUNCTION_CODES


class TransposeArray(wiring.Component):
    """enter: a row, one element in the low bits of each lane; leave: the elements that leave, side
    by side as bytes. Both move at the end of a cycle with `shift`."""

    def __init__(self, chip: Chip):
        self.lanes = chip.lanes
        super().__init__({
            "shift": In(1), "left": In(1), "code": In(2),
            "enter": In(32 * chip.lanes), "leave": Out(32 * chip.lanes),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        end = self.lanes - 1
        rows = [
            Signal(32 * self.lanes, name=f"row_{row}", reset_less=True)
            for row in range(self.lanes)
        ]
        enter = lanes_of(self.enter)
        with m.If(self.shift):
            for row in range(self.lanes):
                down = rows[row - 1] if row else self.enter
                left = Cat(rows[row][32:], enter[end - row])
                m.d.sync += rows[row].eq(Mux(self.left, left, down))
        leaving = [
            Mux(self.left, rows[end - i][:32], lane) for i, lane in enumerate(lanes_of(rows[end]))
        ]
        m.d.comb += self.leave.eq(packed(leaving, self.code))
        return m


class TransposeSequencer(wiring.Component):
    """Blocks in the order of the source's columns of blocks, each from the top down."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({"control": In(Sequencer(chip))})

    def elaborate(self, platform):
        m = Module()
        lanes, control, step = self.chip.lanes, self.control, self.control.step
        words, first_words = control.held.words, control.job.words
        code = words[0][:2]
        size = element_shift(code)
        shift = lanes.bit_length() - 1
        block_bytes = lanes << size

        active, flush, left_now = Signal(), Signal(), Signal()
        line = Signal(range(lanes))  # of the block
        rows_left, cols_left = Signal(COUNT_BITS), Signal(COUNT_BITS)
        strip, source = Signal(32), Signal(32)  # of this column of blocks, of this row
        height = Signal(range(lanes + 1))  # rows of this block
        block_end, strip_end = Signal(), Signal()
        exists = rows_left != 0
        width = self._limited(cols_left)
        m.d.comb += [
            block_end.eq(active & (line == lanes - 1)),
            strip_end.eq(block_end & (rows_left <= 1)),
            control.last.eq(block_end & flush),
            step.shift.eq(active), step.by_columns.eq(left_now), step.loads[A].code.eq(code),
        ]  # fmt: skip
        with m.If(active):
            m.d.sync += line.eq(line + 1)
            with m.If(line == 0):
                m.d.sync += height.eq(self._limited(rows_left))
        with m.If(active & ~flush):
            m.d.comb += request(step.reads[A], exists, source, width << size)
            with m.If(exists):
                m.d.sync += [rows_left.eq(rows_left - 1), source.eq(source + words[2])]
        with m.If(block_end):
            m.d.sync += left_now.eq(~left_now)
        with m.If(strip_end & ~flush):
            m.d.sync += [
                rows_left.eq(words[3]), cols_left.eq(cols_left - lanes),
                strip.eq(strip + block_bytes), source.eq(strip + block_bytes),
                flush.eq(cols_left <= lanes),
            ]  # fmt: skip
        with m.If(control.last):
            m.d.sync += active.eq(0)

        self._leave(m, active, block_end, strip_end, width, height, block_bytes, size, shift)
        with m.If(control.start):
            m.d.sync += [
                active.eq(1), flush.eq(0), line.eq(0),
                rows_left.eq(first_words[3]), cols_left.eq(first_words[4]),
                strip.eq(first_words[1]), source.eq(first_words[1]),
            ]  # fmt: skip
        return m

    def _limited(self, count: Value) -> Value:
        return Mux(count <= self.chip.lanes, count, self.chip.lanes)

    def _leave(
        self, m, active, block_end, strip_end, width, height, block_bytes, size, shift
    ) -> None:
        """Store the columns of the block before."""
        step, words = self.control.step, self.control.held.words
        strip, block, here = (
            Signal(32, name=f"target_{name}") for name in ("strip", "block", "row")
        )
        columns, length = Signal(range(self.chip.lanes + 1)), Signal(range(self.chip.lanes + 1))
        with m.If(active & (columns != 0)):
            m.d.comb += [
                step.loads[A].load.eq(1), step.loads[A].source.eq(SPECIAL),
                step.execute.compute.eq(1), step.execute.f1.eq(FUNCTION_CODES["mov"]),
                step.execute.f2.eq(FUNCTION_CODES["mov"]),
                *destination(step, Cat(here[:31], words[5][31]), length << size, WORD),
            ]  # fmt: skip
            m.d.sync += [columns.eq(columns - 1), here.eq(here + words[6])]
        with m.If(block_end):
            m.d.sync += [
                columns.eq(width), length.eq(height), here.eq(block),
                block.eq(block + block_bytes),
            ]  # fmt: skip
        with m.If(strip_end):
            below = Signal(32)
            m.d.comb += below.eq(strip + (words[6] << shift))
            m.d.sync += [strip.eq(below), block.eq(below)]
        with m.If(self.control.start):
            first = self.control.job.words[5]
            m.d.sync += [strip.eq(first), block.eq(first), columns.eq(0)]
