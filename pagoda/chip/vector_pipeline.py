"""All vector functions on L lanes, two in series: out = f2(f1(a, b), c).

There are four kinds of functions, each with one latency: logic (lane_logic), float
(float_multiply), table (table_functions), divide (float_divide). A stage has a bank of every kind:

            +-> logic ---------------------+                +-> logic ----+
    a, b ---+-> float units ---------------+-- crossbar ----+-> float ... +--> out
            +-> tables, L/2 units ---------+  c, as late    +-> tables    |
            +-> dividers, L/8 units -------+                +-> dividers -+
                      first stage                              second stage

Outputs never meet, since groups leave in the order in which they came. Between the stages they may:
a fadd that started 4 cycles after an exp2 has its f1 result in the same cycle. But groups enter the
same bank of the second stage as far apart as they leave it. So each bank of the second stage
chooses among the banks of the first, and nothing of a stage is shared by two kinds.
"""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip import float_divide, float_multiply, lane_logic, table_functions
from pagoda.chip.float_format import delay
from pagoda.isa.chip import Chip
from pagoda.isa.functions import VECTOR_FUNCTIONS

KINDS = (lane_logic, float_multiply, table_functions, float_divide)
_DIVIDED_LANES = float_divide.COST
"""Lanes that share a divider: one a cycle."""


def kind_latencies() -> tuple[int, ...]:
    """The latency of each of KINDS in the table of functions; ValueError if it has several."""
    found = []
    for kind in KINDS:
        latencies = {f.latency for f in VECTOR_FUNCTIONS.values() if f.name in kind.FUNCTIONS}
        if len(latencies) != 1:
            raise ValueError(
                f"{kind.__name__}: its functions must have one latency, but they have "
                f"{sorted(latencies)}; change the table in pagoda.isa.functions"
            )
        found.append(latencies.pop())
    return tuple(found)


class _Bank(wiring.Component):
    """A kind of functions on all lanes: `result` follows `code`, `x`, `y` by `latency` cycles."""

    def __init__(self, lanes: int, latency: int, members: dict | None = None):
        self.lanes, self.latency = lanes, latency
        super().__init__({
            "start": In(1), "code": In(8), "x": In(32 * lanes), "y": In(32 * lanes),
            "result": Out(32 * lanes), **(members or {}),
        })  # fmt: skip


class LogicBank(_Bank):
    """A first stage `selects`; `other` is then what select gives where x is 0.

    latency: 0, 1 (results are registered), 2 (operands, too).
    """

    def __init__(self, lanes: int, latency: int, selects: bool):
        self.selects = selects
        super().__init__(lanes, latency, {"other": In(32 * lanes)} if selects else {})

    def elaborate(self, platform):
        m = Module()
        before, after = max(self.latency - 1, 0), min(self.latency, 1)
        code, x, y = (
            delay(m, value, before, name)
            for name, value in (("code", self.code), ("x", self.x), ("y", self.y))
        )
        operation = lane_logic.decode(m, code, "operation", self.selects)
        results = []
        for lane in range(self.lanes):
            m.submodules[f"lane_{lane}"] = unit = lane_logic.LaneLogic(self.selects)
            m.d.comb += [
                unit.operation.eq(operation),
                unit.x.eq(x.word_select(lane, 32)), unit.y.eq(y.word_select(lane, 32)),
            ]  # fmt: skip
            if self.selects:
                other = delay(m, self.other.word_select(lane, 32), before, f"other_{lane}")
                m.d.comb += unit.other.eq(other)
            results.append(delay(m, unit.result, after, f"result_{lane}"))
        m.d.comb += self.result.eq(Cat(*results))
        return m


class FloatBank(_Bank):
    """A group every cycle. `products` of the first stage go to the second's `factors`, for fma."""

    def __init__(self, lanes: int, latency: int, fused: bool):
        self.fused = fused
        products = data.ArrayLayout(float_multiply.Product(), lanes)
        members = {"factors": In(products)} if fused else {"products": Out(products)}
        super().__init__(lanes, latency, members)

    def elaborate(self, platform):
        m = Module()
        operation = float_multiply.decode(m, self.code, "operation")
        for lane in range(self.lanes):
            unit = float_multiply.FloatUnit(self.fused, self.latency)
            m.submodules[f"lane_{lane}"] = unit
            m.d.comb += [
                unit.operation.eq(operation),
                unit.x.eq(self.x.word_select(lane, 32)),
                unit.y.eq(self.y.word_select(lane, 32)),
                self.result.word_select(lane, 32).eq(unit.result),
            ]
            if self.fused:
                m.d.comb += unit.factor.eq(self.factors[lane])
            else:
                m.d.comb += self.products[lane].eq(unit.product)
        return m


class TableBank(_Bank):
    """A group every 2 cycles. Unit i takes lane i, then lane i + L/2."""

    def elaborate(self, platform):
        m = Module()
        half = self.lanes // 2
        code, second = Signal(8, reset_less=True), Signal()
        waiting = Signal(32 * half, reset_less=True)
        m.d.sync += [second.eq(self.start), code.eq(self.code), waiting.eq(self.x[32 * half :])]
        operation = table_functions.decode(m, Mux(second, code, self.code), "operation")
        x = Mux(second, waiting, self.x[: 32 * half])
        first, last = [], []
        for i in range(half):
            m.submodules[f"unit_{i}"] = unit = table_functions.TableUnit(self.latency - 1)
            m.d.comb += [unit.operation.eq(operation), unit.x.eq(x.word_select(i, 32))]
            first.append(delay(m, unit.result, 1, f"first_{i}"))
            last.append(unit.result)
        m.d.comb += self.result.eq(Cat(*first, *last))
        return m


class DivideBank(_Bank):
    """A group every 8 cycles. A divider takes its up to 8 lanes one after another."""

    def elaborate(self, platform):
        m = Module()
        lanes = min(self.lanes, _DIVIDED_LANES)
        turn, code = Signal(range(lanes)), Signal(8, reset_less=True)
        with m.If(self.start):
            m.d.sync += [turn.eq(1), code.eq(self.code)]
        with m.Elif(turn != 0):
            m.d.sync += turn.eq(Mux(turn == lanes - 1, 0, turn + 1))
        operation = float_divide.decode(m, Mux(self.start, self.code, code), "operation")
        results = []
        for first in range(0, self.lanes, lanes):
            m.submodules[f"unit_{first // lanes}"] = unit = float_divide.Divider()
            m.d.comb += unit.operation.eq(operation)
            for name, given in (("x", self.x), ("y", self.y)):
                waiting = Signal(32 * (lanes - 1), name=f"{name}_{first}", reset_less=True)
                port = getattr(unit, name)
                with m.If(self.start):
                    m.d.sync += waiting.eq(given[32 * (first + 1) : 32 * (first + lanes)])
                    m.d.comb += port.eq(given.word_select(first, 32))
                with m.Else():
                    m.d.comb += port.eq(waiting[:32])
                    m.d.sync += waiting.eq(waiting[32:])
            # Lane i comes i cycles late and waits for the others.
            taps = [unit.result]
            for i in range(self.latency - float_divide.UNIT_LATENCY):
                taps.append(delay(m, taps[-1], 1, f"result_{first}_{i}"))
            taps.reverse()
            results += taps[:lanes]
        m.d.comb += self.result.eq(Cat(*results))
        return m


def _kind_of(m: Module, code: Value, name: str) -> Value:
    """Number of a function code's kind in KINDS."""
    number = Signal(range(len(KINDS)), name=name)
    with m.Switch(code):
        for function in VECTOR_FUNCTIONS.values():
            with m.Case(function.code):
                kinds = [i for i, kind in enumerate(KINDS) if function.name in kind.FUNCTIONS]
                m.d.comb += number.eq(kinds[0])
    return number


class VectorPipeline(wiring.Component):
    """L lanes. `out` is valid exactly latency(f1) + latency(f2) cycles after `valid`, in that very
    cycle if both are 0; `out_valid` is high then.

    The caller keeps two rules: a group comes at least max(cost(f1), cost(f2)) cycles of the group
    before after it, and leaves at least as many cycles after it. The codes are those of a legal
    command: fma only as (fmul, fma), select only as (select, select).

    latencies: of the KINDS, in place of those of the table of functions: 0 to 2; 4 to 6; 8 to 11;
    24 or more.
    """

    def __init__(self, chip: Chip, latencies: tuple[int, ...] | None = None):
        self.lanes = lanes = chip.lanes
        self.latencies = kind_latencies() if latencies is None else latencies
        super().__init__({
            "valid": In(1), "f1": In(8), "f2": In(8),
            "a": In(32 * lanes), "b": In(32 * lanes), "c": In(32 * lanes),
            "out_valid": Out(1), "out": Out(32 * lanes),
        })  # fmt: skip

    def _banks(self, stage: int) -> tuple[_Bank, ...]:
        """The banks of stage 0 or 1, in the order of KINDS."""
        lanes, (logic, floats, table, divide) = self.lanes, self.latencies
        return (
            LogicBank(lanes, logic, selects=stage == 0),
            FloatBank(lanes, floats, fused=stage == 1),
            TableBank(lanes, table),
            DivideBank(lanes, divide),
        )

    def elaborate(self, platform):
        m = Module()
        first, second = self._banks(0), self._banks(1)
        for stage, banks in (("first", first), ("second", second)):
            for kind, bank in zip(KINDS, banks, strict=True):
                m.submodules[f"{stage}_{kind.__name__.split('.')[-1]}"] = bank
        m.d.comb += second[1].factors.eq(first[1].products)

        f1_kind = _kind_of(m, self.f1, "f1_kind")
        m.d.comb += first[0].other.eq(self.c)
        for number, bank in enumerate(first):
            m.d.comb += [
                bank.start.eq(self.valid & (f1_kind == number)),
                bank.code.eq(self.f1), bank.x.eq(self.a), bank.y.eq(self.b),
            ]  # fmt: skip

        self._cross(m, first, second)
        leaving = [
            self._late(m, bank.start, bank.latency, f"leaving_{number}")
            for number, bank in enumerate(second)
        ]
        m.d.comb += [
            self.out_valid.eq(Cat(*leaving).any()),
            self.out.eq(_choose(leaving, [bank.result for bank in second])),
        ]
        return m

    @staticmethod
    def _late(m: Module, pulse: Value, cycles: int, name: str) -> Value:
        """A pulse some cycles later; none after reset."""
        for cycle in range(cycles):
            late = Signal(name=f"{name}_{cycle}")
            m.d.sync += late.eq(pulse)
            pulse = late
        return pulse

    def _cross(self, m: Module, first: tuple[_Bank, ...], second: tuple[_Bank, ...]) -> None:
        """Lead each result of the first stage, with its c, to its bank of the second."""
        arriving, codes, kinds = [], [], []
        for number, bank in enumerate(first):
            arriving.append(self._late(m, bank.start, bank.latency, f"arriving_{number}"))
            codes.append(delay(m, self.f2, bank.latency, f"f2_{number}"))
            kinds.append(_kind_of(m, codes[-1], f"f2_kind_{number}"))
        thirds = self._thirds(m, first[3].start, arriving[3])
        for number, bank in enumerate(second):
            takes = [Signal(name=f"take_{source}_{number}") for source in range(len(first))]
            m.d.comb += [
                take.eq(valid & (kind == number))
                for take, valid, kind in zip(takes, arriving, kinds, strict=True)
            ]
            m.d.comb += [
                bank.start.eq(Cat(*takes).any()),
                bank.code.eq(_choose(takes, codes)),
                bank.x.eq(_choose(takes, [source.result for source in first])),
                bank.y.eq(_choose(takes, thirds)),
            ]

    def _thirds(self, m: Module, entering: Value, leaving: Value) -> list[Value]:
        """c of the groups whose f1 ends now, per kind. Divisions are at least 8 cycles apart, so
        that four places are enough for them; the others take a line of registers."""
        line = [self.c]
        for cycle in range(self.latencies[2]):
            line.append(delay(m, line[-1], 1, f"c_{cycle}"))
        width = 32 * self.lanes
        places = Array(Signal(width, name=f"place_{i}", reset_less=True) for i in range(4))
        write, read = Signal(2), Signal(2)
        with m.If(entering):
            m.d.sync += [places[write].eq(self.c), write.eq(write + 1)]
        with m.If(leaving):
            m.d.sync += read.eq(read + 1)
        return [*(line[latency] for latency in self.latencies[:3]), places[read]]


def _choose(takes: list[Value], values: list[Value]) -> Value:
    """The value whose `take` is 1, of at most one; 0 if none."""
    result: Value = Const(0, len(values[0]))
    for take, value in zip(takes, values, strict=True):
        result = result | (value & take.replicate(len(value)))
    return result
