"""All vector functions on L lanes, two in series: out = f2(f1(a, b), c).

There are four kinds of functions, each with one latency: logic (lane_logic), float
(float_multiply), table (table_functions), divide (float_divide). A stage has a bank of every kind:

            +-> logic ---------------------+                +-> logic ----+
    a, b ---+-> float units ---------------+-- crossbar ----+-> float ... +--> out
            +-> tables, L/2 units ---------+  c, as late    +-> tables    |
            +-> dividers, L/8 units -------+                +-> dividers -+
                      first stage                              second stage

Outputs never meet, since groups leave in the order in which they came. Between the stages they may:
a fadd that started some cycles after an exp2 has its f1 result in the same cycle. But groups enter
the same bank of the second stage as far apart as they leave it. So each bank of the second stage
chooses among the banks of the first, and nothing of a stage is shared by two kinds.

A latency includes the register behind a bank. Those of the first stage are four for each bank, one
for each bank of the second stage, and hold 0 unless it is the one that takes the group: to choose
is to or them. Likewise the results of the second stage are 0 when there is none.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from pagoda.chip import float_divide, float_multiply, lane_logic, table_functions
from pagoda.chip.float_format import delay, register
from pagoda.chip.modules import once
from pagoda.isa.chip import Chip
from pagoda.isa.functions import FUNCTION_CODES, VECTOR_FUNCTIONS

KINDS = (lane_logic, float_multiply, table_functions, float_divide)
_DIVIDED_LANES = float_divide.COST
"""Lanes that share a divider: one a cycle."""
_WAITING = 16
"""Groups that may wait for their f1 while c is kept. While one waits, at most 12 of cost 1 can
enter that leave after it, or 13 of any costs."""


def check_latencies() -> None:
    """ValueError if the table of functions gives another latency than the hardware has."""
    for kind in KINDS:
        for function in VECTOR_FUNCTIONS.values():
            if function.name in kind.FUNCTIONS and function.latency != kind.LATENCY:
                raise ValueError(
                    f"{function.name}: latency {function.latency} in pagoda.isa.functions, but "
                    f"{kind.__name__} takes {kind.LATENCY}; change the table"
                )


class _Bank(wiring.Component):
    """A kind of functions on all lanes. `result` follows `start`, `operation`, `x`, `y` by
    LATENCY - 1 cycles and is there at the end of `leaving`.

    hides: in other cycles it is 0.
    """

    def __init__(self, kind, lanes: int, hides: bool, members: dict | None = None):
        self.kind, self.lanes, self.hides = kind, lanes, hides
        super().__init__({
            "start": In(1), "operation": In(kind.Operation()),
            "x": In(32 * lanes), "y": In(32 * lanes),
            "leaving": Out(1), "result": Out(32 * lanes), **(members or {}),
        })  # fmt: skip

    def decode(self, m: Module, code: Value, name: str) -> data.View:
        """The operation of a function code."""
        return self.kind.decode(m, code, name)

    def leave(self, m: Module) -> Value:
        """Drive `leaving`; the same a cycle before."""
        pulse = self.start
        for cycle in range(self.kind.LATENCY - 1):
            before, pulse = pulse, Signal(name=f"under_way_{cycle}")
            m.d.sync += pulse.eq(before)
        m.d.comb += self.leaving.eq(pulse)
        return before


class LogicBank(_Bank):
    """A first stage has `other`, what select gives where x is 0. Hides by itself: no operation."""

    def __init__(self, lanes: int, second: bool):
        self.selects = not second
        members = {} if second else {"other": In(32 * lanes)}
        super().__init__(lane_logic, lanes, second, members)

    def decode(self, m: Module, code: Value, name: str) -> data.View:
        return lane_logic.decode(m, code, name, self.selects)

    def elaborate(self, platform):
        m = Module()
        self.leave(m)
        for lane in range(self.lanes):
            unit = lane_logic.LaneLogic(self.selects)
            name = "pagoda_select_lane" if self.selects else "pagoda_logic_lane"
            m.submodules[f"lane_{lane}"] = once(platform, name, unit)
            m.d.comb += [
                unit.operation.eq(self.operation),
                unit.x.eq(self.x.word_select(lane, 32)), unit.y.eq(self.y.word_select(lane, 32)),
                self.result.word_select(lane, 32).eq(unit.result),
            ]  # fmt: skip
            if self.selects:
                m.d.comb += unit.other.eq(self.other.word_select(lane, 32))
        return m


class FloatBank(_Bank):
    """A group every cycle. `products` of the first stage go to the second's `factors`, for fma."""

    def __init__(self, lanes: int, second: bool):
        products = data.ArrayLayout(float_multiply.Product(), lanes)
        members = {"factors": In(products)} if second else {"products": Out(products)}
        super().__init__(float_multiply, lanes, second, members)

    def elaborate(self, platform):
        m = Module()
        self.leave(m)
        for lane in range(self.lanes):
            unit = float_multiply.FloatUnit(fused=self.hides)
            name = "pagoda_fused_float_lane" if self.hides else "pagoda_float_lane"
            m.submodules[f"lane_{lane}"] = once(platform, name, unit)
            m.d.comb += [
                unit.operation.eq(self.operation), unit.show.eq(self.leaving | (not self.hides)),
                unit.x.eq(self.x.word_select(lane, 32)),
                unit.y.eq(self.y.word_select(lane, 32)),
                self.result.word_select(lane, 32).eq(unit.result),
            ]  # fmt: skip
            if self.hides:
                m.d.comb += unit.factor.eq(self.factors[lane])
            else:
                m.d.comb += self.products[lane].eq(unit.product)
        return m


class TableBank(_Bank):
    """A group every 2 cycles. Unit i takes lane i, then lane i + L/2."""

    def __init__(self, lanes: int, second: bool):
        super().__init__(table_functions, lanes, second)

    def elaborate(self, platform):
        m = Module()
        before = self.leave(m)
        half = self.lanes // 2
        second, kept = Signal(), register(m, self.operation, "operation_kept")
        m.d.sync += second.eq(self.start)
        waiting = register(m, self.x[32 * half :], "waiting")
        x = Mux(second, waiting, self.x[: 32 * half])
        first, last = Signal(32 * half, reset_less=True), []
        for i in range(half):
            unit = table_functions.TableUnit()
            m.submodules[f"unit_{i}"] = once(platform, "pagoda_table_unit", unit)
            m.d.comb += [
                unit.operation.eq(Mux(second, kept, self.operation)),
                unit.x.eq(x.word_select(i, 32)),
            ]
            last.append(unit.result)
        m.d.sync += first.eq(0)
        with m.If(before | (not self.hides)):
            m.d.sync += first.eq(Cat(last))
        shown = (self.leaving | (not self.hides)).replicate(32 * half)
        m.d.comb += self.result.eq(Cat(first, Cat(last) & shown))
        return m


class DivideBank(_Bank):
    """A group every 8 cycles. A divider takes its up to 8 lanes one after another."""

    def __init__(self, lanes: int, second: bool):
        super().__init__(float_divide, lanes, second)

    def elaborate(self, platform):
        m = Module()
        before = self.leave(m)
        lanes = min(self.lanes, _DIVIDED_LANES)
        kept = Signal(self.operation.shape(), reset_less=True)
        with m.If(self.start):
            m.d.sync += kept.eq(self.operation)
        results = []
        for first in range(0, self.lanes, lanes):
            unit = float_divide.Divider()
            m.submodules[f"unit_{first // lanes}"] = once(platform, "pagoda_divider", unit)
            m.d.comb += unit.operation.eq(Mux(self.start, self.operation, kept))
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
            for i in range(_DIVIDED_LANES - 1):
                taps.append(delay(m, taps[-1], 1, f"result_{first}_{i}"))
            taps.reverse()
            results += taps[:lanes]
        result = Signal(32 * self.lanes, reset_less=True)
        m.d.sync += result.eq(0)
        with m.If(before | (not self.hides)):
            m.d.sync += result.eq(Cat(results))
        m.d.comb += self.result.eq(result)
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


class _Group(data.StructLayout):
    """What of a group waits for its f1: f2, the number of its kind, the place of its c."""

    def __init__(self):
        super().__init__({"code": 8, "kind": range(len(KINDS)), "place": range(_WAITING)})


class VectorPipeline(wiring.Component):
    """L lanes. `out` is valid exactly latency(f1) + latency(f2) cycles after `valid`; `out_valid`
    is high then.

    The caller keeps two rules: a group comes at least max(cost(f1), cost(f2)) cycles of the group
    before after it, and leaves at least as many cycles after it. The codes are those of a legal
    command: fma only as (fmul, fma), select only as (select, select).
    """

    def __init__(self, chip: Chip):
        self.lanes = lanes = chip.lanes
        check_latencies()
        super().__init__({
            "valid": In(1), "f1": In(8), "f2": In(8),
            "a": In(32 * lanes), "b": In(32 * lanes), "c": In(32 * lanes),
            "out_valid": Out(1), "out": Out(32 * lanes),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        kinds_of_banks = (LogicBank, FloatBank, TableBank, DivideBank)
        first, second = (
            [bank(self.lanes, second) for bank in kinds_of_banks] for second in (False, True)
        )
        for stage, banks in (("first", first), ("second", second)):
            for bank in banks:
                m.submodules[f"{stage}_{bank.kind.__name__.split('.')[-1]}"] = bank
        m.d.comb += second[1].factors.eq(first[1].products)

        f1_kind = _kind_of(m, self.f1, "f1_kind")
        m.d.comb += first[0].other.eq(self.c)
        for number, bank in enumerate(first):
            m.d.comb += [
                bank.start.eq(self.valid & (f1_kind == number)),
                bank.operation.eq(bank.decode(m, self.f1, f"f1_operation_{number}")),
                bank.x.eq(self.a), bank.y.eq(self.b),
            ]  # fmt: skip

        self._cross(m, first, second)
        m.d.sync += self.out_valid.eq(Cat(bank.leaving for bank in second).any())
        out = Signal(32 * self.lanes, reset_less=True)
        m.d.sync += out.eq(_any_of(bank.result for bank in second))
        m.d.comb += self.out.eq(out)
        return m

    def _cross(self, m: Module, first: list[_Bank], second: list[_Bank]) -> None:
        """Lead each result of the first stage, with its c, to its bank of the second."""
        entering = Signal(_Group())
        m.submodules.waiting = waiting = Memory(shape=32 * self.lanes, depth=_WAITING, init=[])
        write = waiting.write_port()
        m.d.comb += [
            entering.code.eq(self.f2), entering.kind.eq(_kind_of(m, self.f2, "f2_kind")),
            write.addr.eq(entering.place), write.data.eq(self.c), write.en.eq(self.valid),
        ]  # fmt: skip
        place = Signal(range(_WAITING))
        m.d.comb += entering.place.eq(place)
        with m.If(self.valid):
            m.d.sync += place.eq(place + 1)
        groups = [
            data.View(_Group(), delay(m, entering.as_value(), bank.kind.LATENCY - 1, f"group_{i}"))
            for i, bank in enumerate(first)
        ]
        for number, bank in enumerate(second):
            takes = [
                source.leaving & (group.kind == number)
                for source, group in zip(first, groups, strict=True)
            ]
            ways = []
            for i, (source, take) in enumerate(zip(first, takes, strict=True)):
                way = Signal(32 * self.lanes, name=f"way_{i}_{number}", reset_less=True)
                m.d.sync += way.eq(0)
                with m.If(take):
                    m.d.sync += way.eq(source.result)
                ways.append(way)
            start = Cat(takes).any()
            code = _any_of(_gated(group.code, t) for group, t in zip(groups, takes, strict=True))
            operation = bank.decode(m, code, f"f2_operation_{number}")
            m.d.sync += [
                bank.start.eq(start),
                bank.operation.eq(_gated(operation.as_value(), start)),
            ]
            m.d.comb += bank.x.eq(_any_of(ways))
            functions = (FUNCTION_CODES[name] for name in bank.kind.FUNCTIONS)
            if any(VECTOR_FUNCTIONS[code].operands == 2 for code in functions):
                read = waiting.read_port(domain="comb")
                m.d.comb += read.addr.eq(
                    _any_of(_gated(group.place, t) for group, t in zip(groups, takes, strict=True))
                )
                m.d.sync += bank.y.eq(read.data)


def _gated(value: Value, take: Value) -> Value:
    """The value, or 0."""
    return value & take.replicate(len(value))


def _any_of(values) -> Value:
    """The value that is not 0, of at most one."""
    result: Value = Const(0, 1)
    for value in values:
        result = result | value
    return result
