"""An RTL window, all that may happen to it, and its rule, for a model checker.

The inputs of `WatchedWindow` are the choices that the interfaces leave open: which command enters,
and when; when an engine becomes free. So a model checker that finds no inputs for which a bit of
`broken` ever rises has proved the property.

Only a few bits of the addresses and tails are free; the others are 0. They are spread over the
width of an address. Two ranges are compared by the order of their four ends, so that two bits show
every case of one comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from window_rule import PROPERTIES, Command, Rule

from pagoda.chip.interfaces import ENGINES, LOAD, MATRIX, STORE, VECTOR
from pagoda.chip.window import QUERIES, Window
from pagoda.isa.access import ACC, DRAM, SRAM
from pagoda.isa.chip import Chip

# What the window is told wrongly -> properties that fail then.
FAULTS = {
    "first source hidden": ["hazard"],
    "destination hidden": ["hazard"],
    "DRAM hidden": ["hazard"],
    "short tails": ["hazard", "level"],
    "matrix engine always free": ["engine"],
    "store engine always free": ["dram port"],
    "read ports hidden": ["bank port"],
    "write ports hidden": ["bank port"],
    "vector tails alike": ["results"],
    "load engine never free": ["stuck", "late", "turn"],
    "ACC taken for SRAM": ["late"],
    "engine by tail": ["identity", "order"],
    "queries of one byte": ["query"],
}


class Wish(data.StructLayout):
    """Free choices for a command. operands: three sources and the destination. `dram`: the ends of
    the hull in DRAM, if it has one; dram_source: the source that this is."""

    def __init__(self, chip: Chip, address_bits: int, tail_bits: int):
        banks = chip.sram_banks + chip.acc_banks
        ends = data.ArrayLayout(address_bits, 2)
        operand = data.StructLayout({"valid": 1, "acc": 1, "ends": ends})
        super().__init__({
            "engine": 2, "operands": data.ArrayLayout(operand, 4), "dram": ends,
            "dram_source": range(3), "read_ports": banks, "write_ports": banks, "tail": tail_bits,
        })  # fmt: skip


class WatchedWindow(wiring.Component):
    """enter, wish: a command that enters if the window was not full in the cycle before.
    release: engines that become free if they are busy. asked: the ends of the bytes of a query.
    broken: a bit for each property in `watched`. `fault`: a key of `FAULTS`, or none."""

    def __init__(
        self, chip: Chip, address_bits: int, tail_bits: int,
        watched: Sequence[str] = tuple(PROPERTIES), fault: str = "",
    ):  # fmt: skip
        self.chip, self.watched, self.fault = chip, tuple(watched), fault
        command = Command(chip, address_bits, tail_bits)
        super().__init__({
            "enter": In(1), "wish": In(Wish(chip, address_bits, tail_bits)),
            "release": In(ENGINES),
            "asked": In(data.ArrayLayout(address_bits, 2)).array(QUERIES),
            "broken": Out(len(self.watched)),
        })  # fmt: skip
        # What happens, for a reader of a counterexample.
        self.enters, self.arriving = Signal(), Signal(command)
        self.free, self.start = Signal(ENGINES), Signal(ENGINES)
        self.window = Window(chip)
        self.rule = Rule(command, chip.window)

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.window, m.submodules.rule = window, rule = self.window, self.rule
        was_full = Signal()
        m.d.sync += was_full.eq(window.full)
        m.d.comb += self.enters.eq(self.enter & ~was_full)
        self._command(m)
        self._engines(m)
        m.d.comb += [
            rule.enter.eq(self.enters), rule.arriving.eq(self.arriving), rule.free.eq(self.free),
            rule.start.eq(self.start), rule.full.eq(window.full), rule.empty.eq(window.empty),
            self.broken.eq(Cat(rule.broken[name] for name in self.watched)),
        ]  # fmt: skip
        for k, engine in enumerate(window.engine):
            m.d.comb += [self.start[k].eq(engine.start), rule.started[k].eq(engine.job.index)]
        for k, query in enumerate(window.query):
            m.d.comb += [
                rule.asked[k].valid.eq(1), rule.asked[k].space.eq(SRAM),
                *_ends(rule.asked[k], self.asked[k]), rule.busy[k].eq(query.busy),
            ]  # fmt: skip
        self._tell(m)
        return m

    def _command(self, m: Module) -> None:
        """A command as the command port makes them: a load reads DRAM, a store writes it, and
        reads it too if it accumulates; an empty one, of tail 0, touches nothing."""
        wish, command = self.wish, self.arriving
        is_load, is_store = wish.engine == LOAD, wish.engine == STORE
        moves = wish.tail != 0
        m.d.comb += [
            command.engine.eq(wish.engine),
            command.tail.eq(wish.tail),
            command.read_ports.eq(Mux(moves, wish.read_ports, 0)),
            command.write_ports.eq(Mux(moves, wish.write_ports, 0)),
        ]
        hulls = *command.reads, command.write
        for number, (hull, operand) in enumerate(zip(hulls, wish.operands, strict=True)):
            is_source = (is_load | is_store) & (wish.dram_source == number)
            in_dram = is_store if number == 3 else is_source
            m.d.comb += [
                hull.valid.eq(operand.valid & moves),
                hull.space.eq(Mux(in_dram, DRAM, Mux(operand.acc, ACC, SRAM))),
            ]
            with m.If(in_dram):
                m.d.comb += _ends(hull, wish.dram)
            with m.Else():
                m.d.comb += _ends(hull, operand.ends)

    def _engines(self, m: Module) -> None:
        busy, brief = Signal(ENGINES), Signal(ENGINES)
        m.d.comb += self.free.eq(~busy | self.release | brief)
        m.d.sync += busy.eq(self.start | (busy & ~self.free))
        for k, engine in enumerate(self.window.engine):
            m.d.sync += brief[k].eq(engine.start & engine.job.empty)

    def _tell(self, m: Module) -> None:
        """Say it all to the window, but for the fault."""
        window, told, command = self.window, self.window.description, self.arriving
        m.d.comb += [
            window.enter.eq(self.enters), window.job.index.eq(self.rule.slot),
            window.job.empty.eq(command.tail == 0),
            told.engine.eq(command.engine), told.tail.eq(command.tail),
            told.read_ports.eq(command.read_ports), told.write_ports.eq(command.write_ports),
        ]  # fmt: skip
        for there, hull in _pairs(told, command):
            m.d.comb += [
                there.valid.eq(hull.valid),
                there.space.eq(hull.space),
                there.first.eq(self._address(hull.first, hull.space == DRAM)),
                there.last.eq(self._address(hull.last, hull.space == DRAM)),
            ]
        for query, asked in zip(window.query, self.rule.asked, strict=True):
            m.d.comb += [
                query.first.eq(self._address(asked.first, 0)),
                query.last.eq(self._address(asked.last, 0)),
            ]
        for k, engine in enumerate(window.engine):
            m.d.comb += engine.free.eq(self.free[k])
        m.d.comb += self._wrongly(self.fault)

    def _address(self, small: Value, is_dram: Value) -> Value:
        chip = self.chip
        local = min(chip.sram_bytes, chip.acc_bytes)
        return Mux(is_dram, _spread(small, chip.dram_bytes), _spread(small, local))

    def _wrongly(self, fault: str) -> list[Value]:
        """Statements that tell something else."""
        window, told = self.window, self.window.description
        engine, command = window.engine, self.arriving
        return {
            "": [],
            "first source hidden": [told.reads[0].valid.eq(0)],
            "DRAM hidden": [
                there.valid.eq(hull.valid & (hull.space != DRAM))
                for there, hull in _pairs(told, command)
            ],
            "destination hidden": [told.write.valid.eq(0)],
            "short tails": [told.tail.eq(command.tail != 0)],
            "matrix engine always free": [engine[MATRIX].free.eq(1)],
            "store engine always free": [engine[STORE].free.eq(1)],
            "read ports hidden": [told.read_ports.eq(0)],
            "write ports hidden": [told.write_ports.eq(0)],
            "vector tails alike": [
                told.tail.eq(Mux(command.engine == VECTOR, command.tail != 0, command.tail))
            ],
            "load engine never free": [engine[LOAD].free.eq(0)],
            "ACC taken for SRAM": [
                there.space.eq(Mux(hull.space == ACC, SRAM, hull.space))
                for there, hull in _pairs(told, command)
            ],
            "engine by tail": [told.engine.eq(command.engine ^ command.tail[0])],
            "queries of one byte": [query.last.eq(query.first) for query in window.query],
        }[fault]


def _pairs(told: data.View, command: data.View) -> list[tuple[data.View, data.View]]:
    """The hulls of a description and of the command that it describes."""
    return [*zip(told.reads, command.reads, strict=True), (told.write, command.write)]


def _ends(hull: data.View, ends: data.View) -> list[Value]:
    """Statements: the hull reaches from the lower to the higher of two addresses."""
    one, other = ends
    swap = one > other
    return [hull.first.eq(Mux(swap, other, one)), hull.last.eq(Mux(swap, one, other))]


def _spread(small: Value, size: int) -> Value:
    """An address below `size`, whose free bits are spread over its width, lowest and highest
    included; the order of addresses stays."""
    width, bits = (size - 1).bit_length(), len(small)
    places = [number * (width - 1) // (bits - 1) for number in range(bits)]
    return Cat(small[places.index(k)] if k in places else C(0, 1) for k in range(width))
