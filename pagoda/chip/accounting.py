"""When a DMA command frees its engine: the contract's occupancy, exact in every cycle.

Say X = slot / unit cycles an atom (twice that for an accumulating store), R DRAM rows, `few` atoms
a row or one more, `local` cycles of the local side. Rows that take the longer of their two sides
need together, from the first slot on, with `many` the number of rows with one atom more,

    bound by DRAM    few * slot * R >= local * unit:    T = ceil((few * R + many) * slot / unit)
    bound locally    else:                              T = local + ceil(many * extra / (R * unit))
                     extra = max(0, (few + 1) * slot * R - local * unit)

so nothing is divided: a counter of units loses `unit` a cycle, and what rows with one atom more
need beyond `local` is collected in a second one, which then loses R * unit a cycle. One row a cycle
is looked at, and a row takes at least X >= 1 cycles. The products take a few cycles; commands that
end before have their T from a table.
"""

from __future__ import annotations

import math
from fractions import Fraction

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import Job, dram_slot_ratio
from pagoda.chip.transfer import Plan, local_shift, mem_shift, plan_lag
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.commands import COUNT_LIMIT

COUNT_BITS = COUNT_LIMIT.bit_length()
PRODUCT_CYCLES = 3  # from the plan until the counters hold what is left


class Accounting(wiring.Component):
    """`free` of a DMA engine's control port.

    start, job       as in `EngineControl`
    slot             the DRAM port's slots of now
    plan_valid, plan from `TransferPlan`
    scanned, scanned_low
                     from `IndexReader`, for jobs that are indexed
    """

    def __init__(self, chip: Chip, loads: bool):
        self.chip, self.loads, self.lag = chip, loads, plan_lag(chip)
        self.slot_cost, self.unit = dram_slot_ratio(chip)
        # Whether rows and table are looked at a cycle after the plan. Only a load of one atom whose
        # slot opens in its first cycle is over before.
        self.late = self.lag == 3
        # Whether the end is known a cycle before, so that `free` is a register. With X = 1 the
        # last row may be known in the very cycle in which the engine has to be free.
        self.ahead = int(self.slot_cost != self.unit)
        # The first cycles since the start, in which the counters hold nothing yet.
        self.table_cycles = self.lag + PRODUCT_CYCLES + self.ahead
        local_bits = max(chip.sram_bytes, chip.acc_bytes).bit_length()
        # A load's rows, atoms and words are bounded by its destination, in which they lie apart;
        # a store may read the same row again and again. `few` atoms are at most 2^33 bytes.
        self.count_bits = min(local_bits, COUNT_BITS) if loads else COUNT_BITS
        self.word_bits, self.few_bits = local_bits, local_bits if loads else 28
        self.cycle_bits = local_bits + (2 if loads else COUNT_BITS)
        super().__init__({
            "start": In(1), "job": In(Job()), "slot": In(1), "plan_valid": In(1),
            "plan": In(Plan()), "scanned": In(1), "scanned_low": In(6), "free": Out(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        lag, ahead = self.lag, self.ahead
        busy, done = Signal(), Signal()
        # Cycles since the start; a plan that comes when another command has started is too late:
        # that command of a few words of padding is over.
        loaded_age = lag + PRODUCT_CYCLES + 1
        age = Signal(range(loaded_age + 1))
        arrives, known = Signal(), Signal()
        known_none, none = Signal(), Signal()
        m.d.comb += [
            arrives.eq(self.plan_valid & (age == lag)),
            known.eq((age > lag) | (C(0) if self.late else arrives)),
            none.eq(
                (known_none & (age > lag)) | (C(0) if self.late else arrives & ~self.plan.atoms)
            ),
        ]
        with m.If(arrives):
            m.d.sync += known_none.eq(~self.plan.atoms)
        with m.If(self.start):
            m.d.sync += age.eq(1)
        with m.Elif(age != loaded_age):
            m.d.sync += age.eq(age + 1)

        on, paid_after, spent = self._first_slot(m, age, none)
        plus, many, all_scanned = self._scan(m, arrives, known)
        table_hit, table_done, table_whole, whole_done = self._table(m, arrives, plus, many, spent)
        loaded = age == loaded_age
        # Rows take longer than a cycle; the last one has been looked at well before its end.
        plus_then, many_then, scanned_then = (
            self._later(m, value) for value in (plus, many + plus, all_scanned)
        )
        paced, whole = self._count(m, arrives, age, on, plus_then, many_then, paid_after)
        paced_done = none | Mux(
            table_hit, all_scanned & table_done, self._later(m, scanned_then) & loaded & paced
        )
        all_done = Mux(table_whole, whole_done, loaded & whole) if self.loads else C(1, 1)
        short, short_done = self._short(m, age)
        m.d.comb += done.eq(
            busy & (short_done | (known & paced_done & all_done) | self._one_atom(arrives, spent))
        )
        with m.If(self.start):
            m.d.sync += busy.eq(~self.job.empty & ~short)
        with m.Elif(done):
            m.d.sync += busy.eq(0)
        m.d.comb += self.free.eq(~busy if ahead else ~busy | done)
        return m

    def _later(self, m: Module, value: Value) -> Value:
        """The value a cycle later, if there is time for that."""
        if not self.late:
            return value
        register = Signal.like(value)
        m.d.sync += register.eq(value)
        return register

    def _one_atom(self, arrives: Signal, spent: Value) -> Value:
        """With a late look: the load ends in the cycle after the plan. It is one atom, or padding
        alone."""
        if not (self.late and self.loads):
            return C(0, 1)
        cycles = self.lag + 1
        atom = C(0, 1)
        if self.slot_cost <= cycles * self.unit:
            low = self.plan.mem.base[:6] + Mux(self.plan.indexed, self._low, 0)
            inside = ~(low[:6] + self.plan.ends)[6]
            atom = self.plan.brief & inside & (spent >= cycles)
        return arrives & Mux(self.plan.atoms, atom, self.plan.small.whole == cycles)

    def _first_slot(self, m: Module, age: Signal, none: Signal) -> tuple[Value, Value, Value]:
        """Whether this cycle counts; the cycles that count, up to and with this one; those up to
        the cycle for whose successor `free` is decided. Counted no further than the table goes."""
        limit = 3 * self.table_cycles + 1
        begun, paid = Signal(), Signal(range(limit + 1))
        wait = Signal(7)
        on, paid_after = Signal(), Signal(range(limit + 1))
        m.d.comb += [
            on.eq(begun | none | (self.slot & (wait == 0))),
            paid_after.eq(Mux(none, age + 1, paid + (on & (paid != limit)))),
        ]
        with m.If(wait != 0):
            m.d.sync += wait.eq(wait - 1)
        m.d.sync += [begun.eq(on), paid.eq(paid_after)]
        with m.If(self.start):
            if self.loads:
                m.d.sync += [wait.eq(0), begun.eq(self.slot), paid.eq(self.slot)]
            else:
                m.d.sync += [wait.eq(self._lead(m) - 1), begun.eq(0), paid.eq(0)]
        return on, paid_after, paid_after if self.ahead else Mux(none, age, paid)

    def _lead(self, m: Module) -> Value:
        """Cycles in which the elements of one atom are read from their bank: a power of two."""
        go, lead = self.job.words[0], Signal(7)
        port = (self.chip.port_bytes - 1).bit_length()
        atom = (DRAM_ATOM_BYTES - 1).bit_length()
        with m.Switch(Cat(local_shift(go[4:8]), mem_shift(go[0:4]))):
            for local in range(3):
                for mem in range(5):
                    with m.Case(local | mem << 3):
                        m.d.comb += lead.eq(1 << max(atom + local + 1 - mem - port, 0))
        return lead

    def _scan(self, m: Module, arrives: Signal, known: Signal) -> tuple[Value, Value, Value]:
        """One row a cycle: whether it has one atom more than `few`; how many before it had (in the
        first cycles), and whether this was the last row."""
        mem = self.plan.mem
        names = {"low": 6, "ends": 6, "plane": 6, "row_step": 6, "plane_step": 6, "indexed": 1,
                 "rows": COUNT_BITS, "rows_left": COUNT_BITS, "left": COUNT_BITS}  # fmt: skip
        new = {
            "low": mem.base[:6], "ends": self.plan.ends, "plane": mem.base[:6],
            "row_step": mem.row_stride[:6], "plane_step": mem.plane_stride[:6],
            "indexed": self.plan.indexed, "rows": mem.rows, "rows_left": mem.rows,
            "left": Mux(self.plan.atoms, self.plan.rows, 0),
        }  # fmt: skip
        kept = {name: Signal(width, name=f"scan_{name}") for name, width in names.items()}
        now = {name: Signal(width, name=f"now_{name}") for name, width in names.items()}
        counted, before = Signal(range(2 * self.table_cycles + 1)), Signal.like(
            Value.cast(C(0, range(2 * self.table_cycles + 1))), name="before"
        )
        for name in names:
            fresh = C(0) if self.late else arrives
            m.d.comb += now[name].eq(Mux(fresh, new[name], kept[name]))
            m.d.sync += kept[name].eq(now[name])
        m.d.comb += before.eq(counted if self.late else Mux(arrives, 0, counted))

        scanned, self._low = self.scanned, self.scanned_low
        if self.lag >= 2:  # an index is known a cycle before the plan
            scanned, self._low = Signal(), Signal(6)
            m.d.sync += [scanned.eq(self.scanned), self._low.eq(self.scanned_low)]
        scanned, low = self._later(m, scanned), self._later(m, self._low)
        start, over = Signal(6), Signal(7)
        row, plus = Signal(), Signal()
        m.d.comb += [
            start.eq(now["low"] + Mux(now["indexed"], low, 0)),
            over.eq(start + now["ends"]),
            row.eq((now["left"] != 0) & (scanned | ~now["indexed"]) & known),
            plus.eq(row & over[6]),
        ]
        with m.If(row):
            m.d.sync += [
                kept["left"].eq(now["left"] - 1), kept["rows_left"].eq(now["rows_left"] - 1)
            ]  # fmt: skip
            with m.If(~now["indexed"]):
                m.d.sync += kept["low"].eq(now["low"] + now["row_step"])
                with m.If(now["rows_left"] == 1):
                    m.d.sync += [
                        kept["rows_left"].eq(now["rows"]),
                        kept["low"].eq(now["plane"] + now["plane_step"]),
                        kept["plane"].eq(now["plane"] + now["plane_step"]),
                    ]  # fmt: skip
        m.d.sync += counted.eq(before + (plus & (before != 2 * self.table_cycles)))
        if self.late:
            with m.If(self.plan_valid):
                m.d.sync += [kept[name].eq(new[name]) for name in names]
                m.d.sync += counted.eq(0)
        return plus, before, (now["left"] == 0) | (row & (now["left"] == 1))

    def _table(
        self, m: Module, arrives: Signal, plus: Value, many: Value, spent: Value
    ) -> tuple[Value, Value, Value, Value]:
        """What ends before the counters are right: whether the rows are such a case, and have
        ended; the same for the local side of a padded load."""
        plan, limit = self.plan, self.table_cycles
        x = DRAM_ATOM_BYTES / self.chip.dram_share
        small, kept = Signal.like(plan.small), Signal.like(plan.small)
        never, accumulates = Signal(), Signal()
        fresh = C(0) if self.late else arrives
        m.d.comb += [
            small.eq(Mux(fresh, plan.small, kept)),
            accumulates.eq(Mux(fresh, plan.accumulate, never)),
        ]
        with m.If(self.plan_valid):
            m.d.sync += [kept.eq(plan.small), never.eq(plan.accumulate)]
        cases = _short_transfers(x, limit)
        hits, dones = [], []
        for more in range(2):  # this row has no atom more, or has one
            cycles = Signal(range(2 * limit + 2), name=f"cycles_{more}")
            with m.Switch(Cat(small.rows, small.few, small.words, many)):
                for (rows, few, longer, words), number in cases.items():
                    if longer >= more:
                        with m.Case(rows | few << 4 | words << 8 | (longer - more) << 12):
                            m.d.comb += cycles.eq(number)
            hits.append((cycles != 0) & (small.right <= limit) & ~accumulates)
            dones.append(spent >= cycles + small.right)
        hit, done = (Mux(plus, which[1], which[0]) for which in (hits, dones))
        return hit, done, small.whole <= limit, spent >= small.whole

    def _count(
        self, m: Module, arrives: Signal, age: Signal, on: Value, plus: Value, many: Value,
        paid_after: Value,
    ) -> tuple[Value, Value]:  # fmt: skip
        """The counters: whether the rows end, and the local side of a padded load."""
        plan, bits = self.plan, self.cycle_bits
        wide = bits + self.slot_cost.bit_length() + 2
        late = -(-self.slot_cost // self.unit)

        # Cycle 1 after the plan: products. `bonus`: cycles that come on top.
        counts = self.count_bits
        rows, few, row_words = Signal(counts), Signal(self.few_bits), Signal(self.word_bits)
        local_rows, all_rows = Signal(counts), Signal(counts)
        twice, right = Signal(), Signal(len(plan.right_words))
        with m.If(arrives):
            m.d.sync += [
                rows.eq(plan.rows), few.eq(plan.few), local_rows.eq(plan.local_rows),
                all_rows.eq(plan.all_rows), row_words.eq(plan.row_words),
                twice.eq(plan.accumulate), right.eq(plan.right_words),
            ]  # fmt: skip
        fewest, local, whole = (Signal(bits, name=name) for name in ("fewest", "local", "whole"))
        bonus = Signal(wide)
        turnaround = (self.chip.dram_latency + 8 + late) * self.unit
        m.d.sync += [
            fewest.eq(rows * few), local.eq(local_rows * row_words),
            whole.eq(all_rows * row_words if self.loads else 0),
            bonus.eq(right * self.unit if self.loads else Mux(twice, turnaround, 0)),
        ]

        # Cycle 2: the longer side.
        atom_cost = Mux(twice, 2 * self.slot_cost, self.slot_cost)
        dram, port, more = Signal(wide), Signal(wide), Signal(wide)
        m.d.comb += [
            dram.eq((fewest * self.slot_cost) << twice), port.eq(local * self.unit),
            more.eq(dram + ((rows * self.slot_cost) << twice)),
        ]
        dram_bound, base = Signal(), Signal(wide)
        extra_bits = counts + self.slot_cost.bit_length() + 2
        extra, row_pay = Signal(extra_bits), Signal(counts + self.unit.bit_length())
        m.d.sync += [
            dram_bound.eq(dram >= port), base.eq(Mux(dram >= port, dram, port) + bonus),
            extra.eq(Mux(more > port, more - port, 0)), row_pay.eq(rows * self.unit),
        ]

        # Cycle 3: the counters start, less what has passed. Then they run. They hold one less than
        # what is left, so that their sign says when nothing is.
        first = Signal(range(-(1 << wide), 1 << wide), name="first")
        second_bits = counts + extra_bits
        second = Signal(range(-(1 << second_bits), 1 << second_bits), name="second")
        less_first, less_second = Signal.like(first), Signal.like(second)
        net = Signal(range(-(1 << extra_bits), 1 << extra_bits))
        m.d.sync += net.eq(extra - row_pay)
        m.d.comb += [less_first.eq(first - self.unit), less_second.eq(second - row_pay)]
        first_over = first[-1]
        whole_left = Signal(bits)
        pays_rows = on & first_over
        with m.If(age == self.lag + PRODUCT_CYCLES):
            begun = Signal(range(-(self.unit * (len(paid_after) + 1) << len(paid_after)),
                                 2 * self.slot_cost << len(many) + 1))  # fmt: skip
            m.d.comb += begun.eq(
                Mux(dram_bound, many * atom_cost, 0) - paid_after * self.unit - 1
            )
            m.d.sync += [
                first.eq(base + begun), second.eq(Mux(dram_bound, 0, many * extra) - 1),
                whole_left.eq(whole - paid_after),
            ]  # fmt: skip
        with m.Elif(dram_bound):
            m.d.sync += first.eq(
                first
                + Mux(plus, Mux(on, atom_cost - self.unit, atom_cost), Mux(on, -self.unit, 0))
            )
        with m.Else():
            with m.If(on & ~first_over):
                m.d.sync += first.eq(less_first)
            m.d.sync += second.eq(
                second + Mux(plus, Mux(pays_rows, net, extra), Mux(pays_rows, -row_pay, 0))
            )
        with m.If((age > self.lag + PRODUCT_CYCLES) & on & (whole_left != 0)):
            m.d.sync += whole_left.eq(whole_left - 1)

        if self.late:  # no row is looked at any more
            first_done = Mux(on, less_first[-1], first_over)
            by_dram = first_done
            by_port = Mux(
                first_over, Mux(on, less_second[-1], second[-1]), first_done & second[-1]
            )
            return Mux(dram_bound, by_dram, by_port), whole_left <= on
        paying = on if self.ahead else C(0, 1)
        pay, added = Mux(paying, self.unit, 0), Mux(plus, extra, 0)
        by_dram = first + Mux(plus, atom_cost, 0) < pay
        by_port = Mux(
            first_over, second + added < Mux(paying, row_pay, 0),
            (first < pay) & (second + added < 0),
        )  # fmt: skip
        return Mux(dram_bound, by_dram, by_port), whole_left <= paying

    def _short(self, m: Module, age: Signal) -> tuple[Value, Value]:
        """Loads of nothing but a few words of padding are over before there is a plan: in one
        cycle, or in this one."""
        most = self.lag - 1 + self.ahead  # cycles; longer ones are in time for the table
        if not self.loads or most == 0:
            return C(0, 1), C(0, 1)
        words, port = self.job.words, self.chip.port_bytes
        above, below, left, right = (
            words[w][low : low + 16] for w in (11, 12) for low in (0, 16)
        )
        rows, cols, planes = words[5], words[4], words[6]
        none = ((above + below == rows) | (left + right == cols)) & (self.job.bank == 1)
        row_bytes = Signal(34)
        m.d.comb += row_bytes.eq(cols << local_shift(words[0][4:8]))
        fits = {n: row_bytes <= n * port for n in range(most + 1)}
        row_words = {n: fits[n] & ~fits[n - 1] for n in range(1, most + 1)}
        cycles = Signal(range(most + 1))
        short = Signal(range(most + 1))
        for number in range(1, most + 1):  # 1, 2 and 3 have no factors but themselves and 1
            shapes = {(number, 1, 1), (1, number, 1), (1, 1, number)}
            is_shape = C(0, 1)
            for r, p, w in shapes:
                is_shape = is_shape | ((rows == r) & (planes == p) & row_words[w])
            with m.If(none & is_shape):
                m.d.comb += cycles.eq(number)
        with m.If(self.start):
            m.d.sync += short.eq(cycles)
        return cycles == 1, (short > 1) & (age + 1 >= short)


def _short_transfers(x: Fraction, limit: int) -> dict[tuple[int, int, int, int], int]:
    """(rows, few, rows with one atom more, local cycles) -> T, where T is at most `limit` cycles,
    or the rows are bound locally and `local` is at most that."""
    found = {}
    most_rows = int(limit / x)
    for rows in range(1, most_rows + 1):
        for few in range(1, most_rows // rows + 1):
            for many in range(rows + 1):
                for local in range(1, limit + 1):
                    share = Fraction(local, rows)
                    total = (rows - many) * max(few * x, share)
                    total += many * max((few + 1) * x, share)
                    if total <= limit or few * x < share:
                        found[rows, few, many, local] = math.ceil(total)
    return found
