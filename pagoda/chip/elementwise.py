"""The steps of `vector` and `iota`: groups of lanes, row after row.

A group takes as many cycles as its functions cost, or as many operands read one bank: operands
that share a bank are read in different cycles of the group. It executes after its last cycle.
iota is the sum of two operands: a value that follows the rows and columns, and multiples of the
column step, one for every lane.
"""

from __future__ import annotations

from amaranth.hdl import C as Constant
from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.vector_stages import (
    MEMORY,
    SCALAR,
    SPECIAL,
    WORD,
    A,
    B,
    C,
    Sequencer,
    destination,
    element_shift,
    request,
)
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COLUMN, COMMANDS
from pagoda.isa.commands import SCALAR as SCALAR_KIND
from pagoda.isa.functions import FUNCTION_CODES, VECTOR_FUNCTIONS

COUNT_BITS = 21  # of an extent
IOTA_BANK = COMMANDS["iota"].bank
_LONGEST_GROUP = 8  # cycles


class ElementwiseSequencer(wiring.Component):
    """offsets: lane l's l * col_step, for the step issued one cycle before."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({"control": In(Sequencer(chip)), "offsets": Out(32 * chip.lanes)})

    def elaborate(self, platform):
        m = Module()
        lanes, control = self.chip.lanes, self.control
        held, step = control.held, control.step
        words, first_words = held.words, control.job.words
        iota = held.bank == IOTA_BANK
        first_iota = control.job.bank == IOTA_BANK

        active, phase = Signal(), Signal(range(_LONGEST_GROUP))
        left, cols = Signal(COUNT_BITS), Mux(iota, words[4], words[11])
        rows_left = Signal(COUNT_BITS)
        group_end, row_end = Signal(), Signal()
        m.d.comb += [
            group_end.eq(active & (iota | (phase == self._last_phase(m, held)))),
            row_end.eq(group_end & (left <= lanes)),
            control.last.eq(row_end & (rows_left == 1)),
        ]
        with m.If(active):
            m.d.sync += phase.eq(phase + 1)
        with m.If(group_end):
            m.d.sync += [phase.eq(0), left.eq(left - lanes)]
        with m.If(row_end):
            m.d.sync += [left.eq(cols), rows_left.eq(rows_left - 1)]
        with m.If(control.last):
            m.d.sync += active.eq(0)
        with m.If(control.start):
            m.d.sync += [
                active.eq(1), phase.eq(0),
                left.eq(Mux(first_iota, first_words[4], first_words[11])),
                rows_left.eq(Mux(first_iota, first_words[3], first_words[10])),
            ]  # fmt: skip

        def walk(name: str, first: Value, advance: Value, stride: Value) -> Signal:
            """Address (or value) of the current group."""
            row, here = Signal(32, name=f"{name}_row"), Signal(32, name=f"{name}_here")
            with m.If(group_end):
                m.d.sync += here.eq(here + advance)
            with m.If(row_end):
                m.d.sync += [row.eq(row + stride), here.eq(row + stride)]
            with m.If(control.start):
                m.d.sync += [row.eq(first), here.eq(first)]
            return here

        count = Signal(range(lanes + 1))
        m.d.comb += count.eq(Mux(left <= lanes, left, lanes))
        used = self._used(m, held)
        slots = self._slots(held)
        col_step = words[7] << lanes.bit_length() - 1
        for operand, name in ((A, "a"), (B, "b"), (C, "c")):
            code, kind = words[1][4 * operand :][:2], words[1][16 + 2 * operand :][:2]
            size, column, scalar = element_shift(code), kind == COLUMN, kind == SCALAR_KIND
            first, stride = first_words[2 + 2 * operand], words[3 + 2 * operand]
            advance = Mux(column, 0, lanes << size)
            if operand == A:
                first = Mux(first_iota, first_words[5], first)
                stride = Mux(iota, words[6], stride)
                advance = Mux(iota, col_step, advance)
            here = walk(name, first, advance, stride)
            wanted = Signal(name=f"{name}_wanted")
            m.d.comb += wanted.eq(
                active & ~iota & used[operand] & (phase == Mux(scalar, 0, slots[operand]))
            )
            load = step.loads[operand]
            m.d.comb += request(
                step.reads[operand], wanted & ~scalar, Cat(here[:31], words[2 + 2 * operand][31]),
                Mux(column, 1, count) << size,
            )  # fmt: skip
            m.d.comb += [
                load.load.eq(wanted), load.source.eq(Mux(scalar, SCALAR, MEMORY)),
                load.code.eq(code), load.column.eq(column),
                load.scalar.eq(words[2 + 2 * operand]),
            ]  # fmt: skip
            if operand == A:
                value = here

        with m.If(active & iota):
            m.d.comb += [
                step.loads[A].load.eq(1), step.loads[A].source.eq(SCALAR),
                step.loads[A].scalar.eq(value),
                step.loads[B].load.eq(1), step.loads[B].source.eq(SPECIAL),
            ]  # fmt: skip
        m.d.comb += self._multiples(m, words[7])

        dst_code = Mux(iota, WORD, words[1][12:14])
        first_dst = Mux(first_iota, first_words[1], first_words[8])
        target = walk(
            "dst", first_dst, lanes << element_shift(dst_code), Mux(iota, words[2], words[9])
        )
        with m.If(group_end):
            acc = Mux(iota, words[1], words[8])[31]
            m.d.comb += [
                step.execute.compute.eq(1),
                step.execute.f1.eq(Mux(iota, FUNCTION_CODES["iadd"], words[0][:8])),
                step.execute.f2.eq(Mux(iota, FUNCTION_CODES["mov"], words[0][8:16])),
                *destination(
                    step, Cat(target[:31], acc), count << element_shift(dst_code), dst_code
                ),
            ]
        return m

    @staticmethod
    def _last_phase(m: Module, held) -> Value:
        """Cycles of a group but one."""
        cost = [Signal(range(_LONGEST_GROUP + 1), name=f"cost_{i}", init=1) for i in (1, 2)]
        for i, signal in enumerate(cost):
            with m.Switch(held.words[0][8 * i :][:8]):
                for value in {f.cost for f in VECTOR_FUNCTIONS.values()} - {1}:
                    codes = [f.code for f in VECTOR_FUNCTIONS.values() if f.cost == value]
                    with m.Case(*codes):
                        m.d.comb += signal.eq(value)
        functions = Mux(cost[0] > cost[1], cost[0], cost[1])
        last = Signal(range(_LONGEST_GROUP))
        m.d.comb += last.eq(Mux(functions > held.per_bank, functions, held.per_bank) - 1)
        return last

    @staticmethod
    def _used(m: Module, held) -> list[Value]:
        """Whether a, b and c are read at all."""
        used: list[Value] = [Constant(1, 1)]
        for i, name in enumerate("bc"):
            signal = Signal(name=f"{name}_used")
            codes = [f.code for f in VECTOR_FUNCTIONS.values() if f.operands == 2]
            with m.Switch(held.words[0][8 * i :][:8]), m.Case(*codes):
                m.d.comb += signal.eq(1)
            used.append(signal)
        return used

    @staticmethod
    def _slots(held) -> list[Value]:
        """The cycle of its group in which each operand is read.

        Hulls are intervals: three that overlap in pairs all have a bank in common (per_bank = 3).
        """
        second = held.shared_ac | (held.shared_bc & ~held.shared_ab)
        return [Constant(0, 2), held.shared_ab, Mux(held.per_bank == 3, 2, second)]

    def _multiples(self, m: Module, col_step: Value) -> list:
        """l * col_step from its 0 to 3 fold, of the base 4 digits of l."""
        once, thrice = Signal(32), Signal(32)
        m.d.sync += [once.eq(col_step), thrice.eq(col_step + (col_step << 1))]
        result = []
        for lane in range(self.chip.lanes):
            total: Value = Constant(0, 32)
            for position in range(0, lane.bit_length(), 2):
                digit = (0, once, once << 1, thrice)[lane >> position & 3]
                total = (total + (digit << position))[:32]
            result.append(total)
        return [self.offsets.eq(Cat(result))]
