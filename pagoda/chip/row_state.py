"""The state of reductions: the groups being worked on, the operators, the tree over the lanes.

Operators other than fsum take one cycle and a register (`Combiner`); a sum takes SUM_CYCLES in a
`FloatAdder` of its own lane. Results are kept as groups of the state; a group can be recalled in
the cycle in which its result arrives, and a sum can be used as operand b one cycle before that.

Tree: the elements of a level that has n pairs are in lanes n to 2n - 1, so all levels fit beside
one another into one pass over the lanes, each for another row:

    lane n + q takes elements q and q + n of the level before, those of lanes 2n + q and 3n + q

The first level takes the row's last group. Lane 0 adds +0.0 to the sum. Levels of a row are
SUM_CYCLES apart, or TREE_CYCLES for the other operators: a whole number of slots of `finish`, so
that the tree works in cycles in which slots do not.
"""

from __future__ import annotations

from itertools import pairwise

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_add import ADD_LATENCY, FloatAdder, order
from pagoda.chip.float_format import INFINITY, NAN
from pagoda.chip.modules import once
from pagoda.chip.reduction import SUM_CYCLES
from pagoda.chip.vector_stages import (
    FIRST_INDICES,
    NEXT_INDICES,
    ROW_INDICES,
    Execute,
    lanes_of,
    state_depth,
    state_groups,
    state_lanes,
)
from pagoda.isa.accumulation import ReduceOp
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import INT32_MAX

TREE_CYCLES = 2


class Combiner(wiring.Component):
    """One lane of every operator but fsum, combinationally; `a` is the older operand."""

    def __init__(self, with_indices: bool):
        self.with_indices = with_indices
        ports = {"op": In(3), "a": In(32), "b": In(32), "value": Out(32)}
        if with_indices:
            ports |= {"a_index": In(32), "b_index": In(32), "index": Out(32)}
        super().__init__(ports)

    def elaborate(self, platform):
        m = Module()
        a, b, op = self.a, self.b, self.op
        integer, any_nan, greater, take = Signal(), Signal(), Signal(), Signal()
        a_nan, b_nan = a[:31] > INFINITY, b[:31] > INFINITY
        m.d.comb += [
            integer.eq((op == ReduceOp.ISUM) | (op == ReduceOp.IMAX)),
            any_nan.eq(~integer & (a_nan | b_nan)),
            greater.eq(order(a, ~integer) < order(b, ~integer)),
            take.eq(greater ^ (op == ReduceOp.FMIN)),
        ]
        with m.If(op == ReduceOp.ISUM):
            m.d.comb += self.value.eq(a + b)
        with m.Elif(any_nan):
            m.d.comb += self.value.eq(NAN)
        with m.Else():
            m.d.comb += self.value.eq(Mux(take, b, a))
        if self.with_indices:
            tie, lower, other = Signal(), Signal(), Signal()
            zeros = ~(a[:31].any() | b[:31].any())
            m.d.comb += [
                tie.eq((a_nan & b_nan) | (a == b) | zeros),
                lower.eq(self.b_index.as_signed() < self.a_index.as_signed()),
                other.eq(Mux(tie, lower, Mux(any_nan, b_nan, greater))),
                self.index.eq(Mux(other, self.b_index, self.a_index)),
            ]
            with m.If((op == ReduceOp.ARGMAX) & ~any_nan):
                m.d.comb += self.value.eq(Mux(other, b, a))
        return m


class _Kept(data.StructLayout):
    """A result on its way to the state."""

    def __init__(self, chip: Chip):
        super().__init__({
            "valid": 1, "indices": 1, "group": range(state_depth(chip)),
            "count": range(chip.lanes + 1),
        })  # fmt: skip


class RowState(wiring.Component):
    """recall_b: operand b is taken from the state in this cycle; `group` comes out at once.

    execute, a, b: the step that executes, and its operands. fresh_b: b, or the sum that it should
    hold, but that is ready only now. accumulated: what b becomes. valid, result: a row is folded.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        width, row_width = 32 * chip.lanes, 32 * state_lanes(chip)
        super().__init__({
            "group": In(range(state_depth(chip))), "recall_b": In(1),
            "recalled": Out(width), "recalled_indices": Out(row_width),
            "index_load": In(2), "column": In(31), "index_data": In(row_width),
            "execute": In(Execute(chip)), "a": In(width), "b": In(width),
            "fresh_b": Out(width), "accumulated": Out(row_width),
            "valid": Out(1), "result": Out(32),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        lanes, row_lanes = self.chip.lanes, state_lanes(self.chip)
        self._levels = row_lanes.bit_length() - 1
        execute = self.execute
        older = Signal(32 * row_lanes)  # indices of b
        newer = Signal(32 * row_lanes)  # indices of a

        values, indices, last_op = self._combine(m, older, newer)
        combined = Signal(_Kept(self.chip))
        m.d.sync += [
            combined.valid.eq(execute.combine), combined.group.eq(execute.group),
            combined.indices.eq(execute.op == ReduceOp.ARGMAX), combined.count.eq(execute.count),
        ]  # fmt: skip
        sums, added, sum_done = self._sum(m, platform)

        m.d.comb += [self.valid.eq(sum_done | self._combined_done)]
        with m.If(sum_done):
            m.d.comb += self.result.eq(sums[0])
        with m.Elif(last_op == ReduceOp.ARGMAX):
            m.d.comb += self.result.eq(indices[1])
        with m.Else():
            m.d.comb += self.result.eq(values[1])

        # What the state keeps. No two of these happen in one cycle.
        kept, keep_values, keep_indices = Signal(_Kept(self.chip)), Signal(), Signal()
        new_values, new_indices = Signal(32 * lanes), Signal(32 * row_lanes)
        m.d.comb += [kept.eq(added), new_values.eq(Cat(sums)), keep_values.eq(added.valid)]
        with m.If(combined.valid):
            m.d.comb += [
                kept.eq(combined), new_values.eq(Cat(values)), new_indices.eq(Cat(indices)),
                keep_values.eq(1), keep_indices.eq(combined.indices),
            ]  # fmt: skip
        with m.If(execute.keep):
            m.d.comb += [
                kept.group.eq(execute.group), kept.count.eq(lanes),
                new_values.eq(self.a), new_indices.eq(self.a[: 32 * row_lanes]),
                keep_values.eq(~execute.indices), keep_indices.eq(execute.indices),
            ]  # fmt: skip
        m.d.comb += [
            self.recalled.eq(self._store(m, "values", kept, keep_values, new_values)),
            self.recalled_indices.eq(self._store(m, "indices", kept, keep_indices, new_indices)),
        ]

        columns = Cat(
            Cat(C(lane, self._levels), self.column[self._levels :], C(0, 1))
            for lane in range(row_lanes)
        )
        with m.Switch(self.index_load):
            with m.Case(ROW_INDICES):
                m.d.sync += [newer.eq(columns), older.eq(self.recalled_indices)]
            with m.Case(NEXT_INDICES):
                m.d.sync += newer.eq(self.index_data)
            with m.Case(FIRST_INDICES):
                start = C(INT32_MAX, 32).replicate(row_lanes)
                m.d.sync += [newer.eq(self.index_data), older.eq(start)]
        with m.If(execute.accumulate):
            m.d.sync += older.eq(Cat(self._index_now))
        return m

    def _store(self, m: Module, name: str, kept, enable: Value, new: Value) -> Value:
        """Groups of the state; returns the recalled one, as this cycle's write leaves it."""
        count = len(new) // 32
        m.submodules[name] = memory = Memory(
            shape=unsigned(len(new)), depth=state_depth(self.chip), init=[]
        )
        write, read = memory.write_port(granularity=32), memory.read_port(domain="comb")
        mask = Cat(enable & (lane < kept.count) for lane in range(count))
        same = self.group == kept.group
        m.d.comb += [
            write.addr.eq(kept.group), write.data.eq(new), write.en.eq(mask),
            read.addr.eq(self.group),
        ]  # fmt: skip
        pairs = zip(lanes_of(new), lanes_of(read.data), strict=True)
        return Cat(Mux(same & mask[lane], new, old) for lane, (new, old) in enumerate(pairs))

    def _tree(self, m: Module, top: list[Value], below: list[Value], lane: int) -> list[Value]:
        """The two elements that lane 1 and up takes; top: what the first level takes."""
        n = 1 << lane.bit_length() - 1
        q = lane - n
        if 2 * n == state_lanes(self.chip):
            return [top[q], top[q + n]]
        return [below[2 * n + q], below[3 * n + q]]

    def _combine(self, m: Module, older: Value, newer: Value):
        """Combiners: (values, indices) one cycle later, and the operator of `finish`."""
        lanes, row_lanes = self.chip.lanes, state_lanes(self.chip)
        execute, levels = self.execute, self._levels
        token = Signal(TREE_CYCLES * (levels - 1) + 2)  # bit k: k + 1 cycles after the last group
        m.d.sync += token.eq(Cat(execute.fold & execute.accumulate, token))
        self._combined_done = token[-1]
        in_tree = Signal()
        m.d.comb += in_tree.eq(Cat(token[TREE_CYCLES * k] for k in range(levels)).any())
        op = Signal(3)
        with m.If(execute.accumulate):
            m.d.sync += op.eq(execute.op)

        values = [Signal(32, name=f"value_{lane}") for lane in range(lanes)]
        indices = [Signal(32, name=f"index_{lane}") for lane in range(row_lanes)]
        now, self._index_now = [], []
        a, b = lanes_of(self.a), lanes_of(self.b)
        a_index, b_index = lanes_of(newer), lanes_of(older)
        for lane in range(lanes):
            unit = Combiner(lane < row_lanes)
            m.submodules[f"combiner_{lane}"] = unit
            m.d.comb += [
                unit.op.eq(Mux(in_tree, op, execute.op)), unit.a.eq(b[lane]), unit.b.eq(a[lane])
            ]  # fmt: skip
            if lane < row_lanes:
                m.d.comb += [unit.a_index.eq(b_index[lane]), unit.b_index.eq(a_index[lane])]
                self._index_now.append(unit.index)
                now.append(unit.value)
            if 0 < lane < row_lanes:
                first, second = self._tree(m, b, values, lane)
                first_index, second_index = self._tree(m, b_index, indices, lane)
                with m.If(in_tree):
                    m.d.comb += [
                        unit.a.eq(first), unit.b.eq(second),
                        unit.a_index.eq(first_index), unit.b_index.eq(second_index),
                    ]  # fmt: skip
            with m.If(execute.combine | in_tree):
                m.d.sync += values[lane].eq(unit.value)
                if lane < row_lanes:
                    m.d.sync += indices[lane].eq(unit.index)
        m.d.comb += self.accumulated.eq(Cat(now))
        return values, indices, op

    def _sum(self, m: Module, platform: object):
        """Adders: sums, which of them the state keeps in this cycle, and whether one is a row's."""
        assert SUM_CYCLES == ADD_LATENCY
        lanes, row_lanes = self.chip.lanes, state_lanes(self.chip)
        execute, levels = self.execute, self._levels
        one_group = state_groups(self.chip) == 1
        # A row's last sum waits one cycle for the tree's turn; a row of one group needs no sum.
        wait = 0 if one_group else SUM_CYCLES + 1
        end = wait + SUM_CYCLES * (levels + 1)
        late = Signal(end)
        token = Cat(execute.fold & ~execute.accumulate, late)
        m.d.sync += late.eq(token)
        in_tree = Signal()
        m.d.comb += in_tree.eq(Cat(token[wait + SUM_CYCLES * k] for k in range(levels + 1)).any())

        way = [Signal(_Kept(self.chip), name=f"sum_{i}") for i in range(1, SUM_CYCLES + 1)]
        m.d.sync += [
            way[0].valid.eq(execute.sum), way[0].group.eq(execute.group),
            way[0].count.eq(execute.count),
            *(after.eq(before) for before, after in pairwise(way)),
        ]  # fmt: skip
        added, bypass = way[-1], Signal()
        m.d.sync += bypass.eq(self.recall_b & way[-2].valid & (self.group == way[-2].group))

        adders = [FloatAdder() for _ in range(lanes)]
        sums = [adder.sum for adder in adders]
        a, b = lanes_of(self.a), lanes_of(self.b)
        top = a[:row_lanes]
        if not one_group:
            top = [Signal(32, name=f"last_sum_{lane}") for lane in range(row_lanes)]
            m.d.sync += [held.eq(sums[lane]) for lane, held in enumerate(top)]
        for lane, adder in enumerate(adders):
            m.submodules[f"adder_{lane}"] = once(platform, "pagoda_float_adder", adder)
            fresh = self.fresh_b.word_select(lane, 32)
            m.d.comb += [
                fresh.eq(Mux(bypass & (lane < added.count), sums[lane], b[lane])),
                adder.a.eq(a[lane]), adder.b.eq(fresh),
            ]  # fmt: skip
            if lane < row_lanes:
                first, second = (
                    self._tree(m, top, sums, lane) if lane else [sums[1], C(0, 32)]
                )
                with m.If(in_tree):
                    m.d.comb += [adder.a.eq(first), adder.b.eq(second)]
        return sums, added, late[-1]
