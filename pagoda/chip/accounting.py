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
        # Whether the end is known a cycle before, so that `free` is a register. With X = 1 the
        # last row may be known in the very cycle in which the engine has to be free.
        self.ahead = int(self.slot_cost != self.unit)
        # The first cycles since the start, in which the counters hold nothing yet.
        self.table_cycles = self.lag + PRODUCT_CYCLES + self.ahead
        local_bits = max(chip.sram_bytes, chip.acc_bytes).bit_length()
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
        planned = Signal()
        known_none, none = Signal(), Signal()
        m.d.comb += [
            planned.eq(self.plan_valid & (age == lag)),
            none.eq(Mux(planned, ~self.plan.atoms, known_none & (age > lag))),
        ]
        with m.If(planned):
            m.d.sync += known_none.eq(~self.plan.atoms)
        with m.If(self.start):
            m.d.sync += age.eq(1)
        with m.Elif(age != loaded_age):
            m.d.sync += age.eq(age + 1)

        on, paid_after, spent = self._first_slot(m, age, none)
        plus, many, all_scanned = self._scan(m, planned, age)
        table_hit, table_done, table_whole, whole_done = self._table(m, planned, many, spent)
        loaded = age == loaded_age
        paced, whole = self._count(m, planned, age, on, plus, many, paid_after)
        paced_done = none | (
            all_scanned & Mux(table_hit, table_done, loaded & paced)
        )
        all_done = Mux(table_whole, whole_done, loaded & whole) if self.loads else C(1, 1)
        short, short_done = self._short(m, age)
        m.d.comb += done.eq(
            busy & (short_done | ((planned | (age > lag)) & paced_done & all_done))
        )
        with m.If(self.start):
            m.d.sync += busy.eq(~self.job.empty & ~short)
        with m.Elif(done):
            m.d.sync += busy.eq(0)
        m.d.comb += self.free.eq(~busy if ahead else ~busy | done)
        return m

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

    def _scan(self, m: Module, planned: Signal, age: Signal) -> tuple[Value, Value, Value]:
        """One row a cycle: whether it has one atom more than `few`; how many had (in the first
        cycles), and whether this was the last row."""
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
        m.d.comb += [now[name].eq(Mux(planned, new[name], kept[name])) for name in names]
        m.d.sync += [kept[name].eq(now[name]) for name in names]

        scanned, scanned_low = self.scanned, self.scanned_low
        if self.lag >= 2:  # an index is known a cycle before the plan
            scanned, scanned_low = Signal(), Signal(6)
            m.d.sync += [scanned.eq(self.scanned), scanned_low.eq(self.scanned_low)]
        start, over = Signal(6), Signal(7)
        row, plus = Signal(), Signal()
        m.d.comb += [
            start.eq(now["low"] + Mux(now["indexed"], scanned_low, 0)),
            over.eq(start + now["ends"]),
            row.eq((now["left"] != 0) & (scanned | ~now["indexed"])),
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
        limit = 2 * self.table_cycles
        many, counted = Signal(range(limit + 1)), Signal(range(limit + 1))
        before = Mux(planned, 0, counted)
        m.d.comb += many.eq(before + (plus & (before != limit)))
        m.d.sync += counted.eq(many)
        return plus, many, (now["left"] == 0) | (row & (now["left"] == 1))

    def _table(
        self, m: Module, planned: Signal, many: Value, spent: Value
    ) -> tuple[Value, Value, Value, Value]:
        """What ends before the counters are right: whether the rows are such a case, and have
        ended; the same for the local side of a padded load."""
        plan, limit = self.plan, self.table_cycles
        x = DRAM_ATOM_BYTES / self.chip.dram_share
        most_rows = int(limit / x)

        def kept(value: Value, most: int, name: str) -> Signal:
            """A value, or most + 1 if it is larger; it stays when the plan has gone."""
            register, now = Signal(range(most + 2), name=f"{name}_kept"), Signal(
                range(most + 2), name=name
            )
            small = Mux(value > most, most + 1, value)
            m.d.comb += now.eq(Mux(planned, small, register))
            m.d.sync += register.eq(now)
            return now

        def product(name: str, count: Value) -> Signal:
            """Port words of `count` rows, limit + 1 if more."""
            small = [Mux(v > limit, limit + 1, v) for v in (count, plan.row_words)]
            narrow = [Signal(range(limit + 2), name=f"{name}_{i}") for i in range(2)]
            m.d.comb += [n.eq(v) for n, v in zip(narrow, small, strict=True)]
            return kept(narrow[0] * narrow[1], limit, name)

        rows, few = kept(plan.rows, most_rows, "few_rows"), kept(plan.few, most_rows, "few_atoms")
        local = product("few_words", plan.local_rows)
        right = kept(plan.right_words, limit, "few_right") if self.loads else C(0, 1)
        never = kept(plan.accumulate, 1, "long")
        narrow_many = Signal(range(most_rows + 2))
        m.d.comb += narrow_many.eq(Mux(many > most_rows, most_rows + 1, many))
        cycles = Signal(range(2 * limit + 2))
        key = Cat(rows, few, narrow_many, local)
        with m.Switch(key):
            for values, number in _short_transfers(x, limit, most_rows).items():
                pattern = low = 0
                for signal, value in zip((rows, few, narrow_many, local), values, strict=True):
                    pattern |= value << low
                    low += len(signal)
                with m.Case(pattern):
                    m.d.comb += cycles.eq(number)
        hit = (cycles != 0) & (right <= limit) & ~never[0]
        whole = product("few_whole", plan.all_rows) if self.loads else C(0, 1)
        return hit, spent >= cycles + right, whole <= limit, spent >= whole

    def _count(
        self, m: Module, planned: Signal, age: Signal, on: Value, plus: Value, many: Value,
        paid_after: Value,
    ) -> tuple[Value, Value]:  # fmt: skip
        """The counters: whether the rows end, and the local side of a padded load."""
        plan, bits = self.plan, self.cycle_bits
        wide = bits + self.slot_cost.bit_length() + 2
        late = -(-self.slot_cost // self.unit)

        # Cycle 1 after the plan: products. `bonus`: cycles that come on top.
        rows, few = Signal(COUNT_BITS), Signal(min(len(plan.few), bits))
        local_rows, all_rows = Signal(COUNT_BITS), Signal(COUNT_BITS)
        row_words = Signal(min(len(plan.row_words), bits))
        twice, right = Signal(), Signal(len(plan.right_words))
        with m.If(planned):
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
        extra_bits = COUNT_BITS + self.slot_cost.bit_length() + 2
        extra, row_pay = Signal(extra_bits), Signal(COUNT_BITS + self.unit.bit_length())
        m.d.sync += [
            dram_bound.eq(dram >= port), base.eq(Mux(dram >= port, dram, port) + bonus),
            extra.eq(Mux(more > port, more - port, 0)), row_pay.eq(rows * self.unit),
        ]

        # Cycle 3: the counters start, less what has passed. Then they run.
        first = Signal(range(-(1 << wide), 1 << wide), name="first")
        second_bits = COUNT_BITS + extra_bits
        second = Signal(range(-(1 << second_bits), 1 << second_bits), name="second")
        whole_left = Signal(bits)
        added = Mux(plus, extra, 0)
        with m.If(age == self.lag + PRODUCT_CYCLES):
            m.d.sync += [
                first.eq(base - paid_after * self.unit + Mux(dram_bound, many * atom_cost, 0)),
                second.eq(Mux(dram_bound, 0, many * extra)), whole_left.eq(whole - paid_after),
            ]  # fmt: skip
        with m.Elif(dram_bound):
            m.d.sync += first.eq(first + Mux(plus, atom_cost, 0) - Mux(on, self.unit, 0))
        with m.Else():
            with m.If(on & (first > 0)):
                m.d.sync += first.eq(first - self.unit)
            m.d.sync += second.eq(second + added - Mux(on & (first <= 0), row_pay, 0))
        with m.If((age > self.lag + PRODUCT_CYCLES) & on & (whole_left != 0)):
            m.d.sync += whole_left.eq(whole_left - 1)

        paying = on if self.ahead else C(0, 1)
        pay = Mux(paying, self.unit, 0)
        by_dram = first + Mux(plus, atom_cost, 0) <= pay
        by_port = Mux(
            first <= 0, second + added <= Mux(paying, row_pay, 0),
            (first <= pay) & (second + added <= 0),
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


def _short_transfers(x, limit: int, most_rows: int) -> dict[tuple[int, int, int, int], int]:
    """(rows, few, rows with one atom more, local cycles) -> T, where T is at most `limit` cycles,
    or the rows are bound locally and `local` is at most that."""
    found = {}
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
