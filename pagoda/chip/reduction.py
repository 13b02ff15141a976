"""The steps of `reduce`: read the state, combine the source into it, write it back.

Rows: the state of a row is 64 / L' groups of L' lanes (argmax: as many again for the indices), the
source comes in chunks of 64 columns. Columns: the state is read in blocks of up to 7 groups of L
lanes, and all rows of the source go into a block before the next one; a block has at least 4
groups, unless it is the only one. Either way a group comes again after 4 cycles at the earliest,
when its last sum is ready.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from pagoda.chip.elementwise import COUNT_BITS
from pagoda.chip.vector_stages import (
    MEMORY,
    ROW_INDICES,
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
from pagoda.isa.accumulation import ReduceOp, identity
from pagoda.isa.chip import Chip
from pagoda.isa.functions import FUNCTION_CODES
from pagoda.isa.numbers import INT32_MAX

SUM_CYCLES = 4  # from the operands of a sum to its use; at least of any other operator
BLOCK = SUM_CYCLES  # groups of a column state at a time; the last block has up to 2 * BLOCK - 1
_IN, _SOURCE, _OUT = range(3)


def identity_of(m: Module, op: Value) -> Signal:
    """The pattern a lane of the state starts from."""
    pattern = Signal(32, name="identity")
    with m.Switch(op):
        for operator in ReduceOp:
            with m.Case(operator.value):
                m.d.comb += pattern.eq(int(identity(operator)))
    return pattern


class ReductionSequencer(wiring.Component):
    """See the module. State words are moved by steps of the `vector` kind, as 0 + word, then * 1:
    these take SUM_CYCLES too, so results leave in the order of their steps."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({"control": In(Sequencer(chip))})

    def elaborate(self, platform):
        m = Module()
        lanes, row_lanes = self.chip.lanes, state_lanes(self.chip)
        groups = state_groups(self.chip)
        period = max(groups, SUM_CYCLES)
        control, step = self.control, self.control.step
        words, first_words = control.held.words, control.job.words
        op, first, columns = words[0][:3], words[0][4], words[0][5]
        code, argmax = words[0][8:10], words[0][:3] == ReduceOp.ARGMAX
        size = element_shift(code)

        active, phase = Signal(), Signal(2)
        number = Signal(range(max(2 * groups, period, 2 * BLOCK)))  # of the group in this phase
        left = Signal(COUNT_BITS)  # elements of the row, or of the block
        cols_left, rows_left = Signal(COUNT_BITS), Signal(COUNT_BITS)
        column = Signal(31)
        source_base, source_row, source = (
            Signal(32, name=f"source{name}") for name in ("_base", "_row", "")
        )
        state_base, state = Signal(32), Signal(32)

        # The group of this step: how many lanes, and whether it is the last.
        width = Mux(columns, lanes, row_lanes)
        ends, count = Signal(), Signal(range(lanes + 1))
        whole = ~columns & (phase != _SOURCE)
        m.d.comb += [
            ends.eq(left <= width),
            count.eq(Mux(ends & ~whole, left, width)),
        ]
        indices = argmax & ~columns & (number >= groups)
        group = Mux(columns, number, number & (groups - 1))
        state_end, pass_end, source_end = Signal(), Signal(), Signal()
        takes = columns | (number < groups)  # else the step waits for the sums before it
        m.d.comb += [
            state_end.eq(Mux(columns, ends, number == Mux(argmax, 2 * groups - 1, groups - 1))),
            pass_end.eq(Mux(columns, ends & (number >= SUM_CYCLES - 1), number == period - 1)),
            source_end.eq(
                Mux(columns, rows_left == 1, ends if period == groups else left == 0) & pass_end
            ),
        ]
        block = self._block(cols_left)
        last_block = cols_left == block
        control_last = active & (phase == _OUT) & state_end
        m.d.comb += control.last.eq(control_last & Mux(columns, last_block, rows_left == 1))

        with m.If(active):
            m.d.sync += number.eq(number + 1)
            with m.Switch(phase):
                with m.Case(_IN):
                    m.d.comb += self._state_in(m, step, state, op, first, indices, count, group)
                    m.d.sync += [state.eq(state + (width << 2)), left.eq(left - count)]
                    with m.If(state_end):
                        m.d.sync += [
                            number.eq(0), state.eq(state_base),
                            left.eq(Mux(columns, block, cols_left)),
                            phase.eq(Mux(~columns & (cols_left == 0), _OUT, _SOURCE)),
                        ]  # fmt: skip
                with m.Case(_SOURCE):
                    with m.If(takes & (left != 0)):
                        m.d.comb += self._combine(step, source, code, size, op, count, group)
                    m.d.comb += step.column.eq(column)
                    with m.If(takes):
                        m.d.sync += [
                            left.eq(left - count), source.eq(source + (width << size)),
                            column.eq(column + row_lanes),
                        ]  # fmt: skip
                    with m.If(pass_end):
                        m.d.sync += number.eq(0)
                        with m.If(columns):
                            m.d.sync += [
                                left.eq(block), rows_left.eq(rows_left - 1),
                                source_row.eq(source_row + words[2]),
                                source.eq(source_row + words[2]),
                            ]  # fmt: skip
                    with m.If(source_end):
                        m.d.sync += phase.eq(_OUT)
                with m.Case(_OUT):
                    m.d.comb += self._state_out(step, state, words, indices, count, group)
                    m.d.sync += [state.eq(state + (width << 2)), left.eq(left - count)]
                    with m.If(state_end):
                        m.d.sync += [number.eq(0), phase.eq(_IN)]
                        self._next_state(
                            m, columns, words, size, cols_left, rows_left, left, column,
                            (source_base, source_row, source), (state_base, state),
                        )  # fmt: skip
        with m.If(control.last):
            m.d.sync += active.eq(0)
        with m.If(control.start):
            m.d.sync += [
                active.eq(1), phase.eq(_IN), number.eq(0),
                cols_left.eq(first_words[4]), rows_left.eq(first_words[3]),
                left.eq(self._block(first_words[4])), column.eq(first_words[7]),
                *(s.eq(first_words[1]) for s in (source_base, source_row, source)),
                *(s.eq(first_words[5]) for s in (state_base, state)),
            ]  # fmt: skip
        return m

    def _block(self, cols_left: Value) -> Value:
        """Columns of the next block."""
        lanes = self.chip.lanes
        return Mux(cols_left > (2 * BLOCK - 1) * lanes, BLOCK * lanes, cols_left[:COUNT_BITS])

    def _next_state(
        self, m, columns, words, size, cols_left, rows_left, left, column, source, state
    ) -> None:
        """Begin the next row, or block of columns."""
        lanes = self.chip.lanes
        source_base, source_row, source = source
        state_base, state = state
        with m.If(columns):
            after = Signal(COUNT_BITS)
            start, target = Signal(32), Signal(32)
            m.d.comb += [
                after.eq(cols_left - BLOCK * lanes),
                start.eq(source_base + (BLOCK * lanes << size)),
                target.eq(state_base + 4 * BLOCK * lanes),
            ]
            m.d.sync += [
                cols_left.eq(after), left.eq(self._block(after)), rows_left.eq(words[3]),
                *(s.eq(start) for s in (source_base, source_row, source)),
                *(s.eq(target) for s in (state_base, state)),
            ]  # fmt: skip
        with m.Else():
            m.d.sync += [
                rows_left.eq(rows_left - 1), column.eq(words[7]),
                source_row.eq(source_row + words[2]), source.eq(source_row + words[2]),
                state_base.eq(state_base + words[6]), state.eq(state_base + words[6]),
            ]  # fmt: skip

    @staticmethod
    def _state_in(m, step, state, op, first, indices, count, group) -> list:
        load = step.loads[A]
        return [
            *request(step.reads[A], ~first, state, count << 2),
            load.load.eq(1), load.source.eq(Mux(first, SCALAR, MEMORY)), load.code.eq(WORD),
            load.scalar.eq(Mux(indices, INT32_MAX, identity_of(m, op))),
            step.execute.keep.eq(1), step.execute.indices.eq(indices),
            step.execute.group.eq(group),
        ]  # fmt: skip

    @staticmethod
    def _combine(step, source, code, size, op, count, group) -> list:
        old, new = step.loads[B], step.loads[A]
        is_sum = op == ReduceOp.FSUM
        return [
            *request(step.reads[A], 1, source, count << size),
            new.load.eq(1), new.source.eq(MEMORY), new.code.eq(code),
            old.load.eq(1), old.source.eq(STATE), step.group.eq(group),
            step.index_load.eq(ROW_INDICES),
            step.execute.sum.eq(is_sum), step.execute.combine.eq(~is_sum),
            step.execute.op.eq(op), step.execute.group.eq(group), step.execute.count.eq(count),
        ]  # fmt: skip

    @staticmethod
    def _state_out(step, state, words, indices, count, group) -> list:
        zero, word = step.loads[A], step.loads[B]
        address = Cat(state[:31], words[5][31])
        return [
            zero.load.eq(1), zero.source.eq(SCALAR), zero.scalar.eq(0),
            word.load.eq(1), word.source.eq(STATE), step.group.eq(group),
            step.indices.eq(indices),
            step.execute.compute.eq(1), step.execute.f1.eq(FUNCTION_CODES["iadd"]),
            step.execute.f2.eq(FUNCTION_CODES["mov"]),
            *destination(step, address, count << 2, WORD),
        ]  # fmt: skip
