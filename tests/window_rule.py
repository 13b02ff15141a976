"""The window rule of `pagoda.isa.window` as a circuit that watches an RTL window.

Written from the manual's words, not from the window's logic: which bytes two commands have in
common is found byte by byte, and every condition of a start is worked out anew in each cycle.
"""

from __future__ import annotations

from amaranth.hdl import Array, C, Cat, Module, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import ENGINES, LOAD, STORE, VECTOR
from pagoda.chip.window import QUERIES
from pagoda.isa.access import SPACES
from pagoda.isa.chip import Chip

# Property -> how it fails.
PROPERTIES = {
    "hazard": "a command starts before an older one that conflicts with it has finished",
    "engine": "a command starts while its engine is busy",
    "dram port": "a transfer starts while another holds the DRAM port",
    "bank port": "a command starts while another engine holds a bank port that it needs",
    "results": "a vector command starts so early that its results overtake older ones",
    "order": "a command starts before an older one of its engine",
    "turn": "a command starts in a cycle in which an older one is ready",
    "identity": "what starts does not wait, or not for this engine, or is one of two",
    "stuck": "nothing is in flight, and the oldest command that waits does not start",
    "late": "a command is ready, no older one is, and it does not start",
    "level": "`full` or `empty` does not say how many commands are unfinished",
    "query": "a query says something else than whether a writer of its bytes is unfinished",
}


class Hull(data.StructLayout):
    """Bytes `first` to `last`, first <= last, of a space of `pagoda.isa.access`."""

    def __init__(self, address_bits: int):
        super().__init__({"valid": 1, "space": 2, "first": address_bits, "last": address_bits})


class Command(data.StructLayout):
    """A description whose addresses have `address_bits` bits and whose tail has `tail_bits`."""

    def __init__(self, chip: Chip, address_bits: int, tail_bits: int):
        banks = chip.sram_banks + chip.acc_banks
        self.hull = Hull(address_bits)
        super().__init__({
            "engine": 2, "reads": data.ArrayLayout(self.hull, 3), "write": self.hull,
            "read_ports": banks, "write_ports": banks, "tail": tail_bits,
        })  # fmt: skip


def _touched(hull: data.View) -> Value:
    """A bit for every byte of every space."""
    size = 1 << len(hull.first)
    return Cat(
        hull.valid & (hull.space == space) & (hull.first <= byte) & (hull.last >= byte)
        for space in range(len(SPACES))
        for byte in range(size)
    )


def _reads(command: data.View) -> Value:
    first, second, third = (_touched(hull) for hull in command.reads)
    return first | second | third


def _conflict(one: data.View, other: data.View) -> Value:
    """One of the two writes bytes that the other reads or writes."""
    written, also_written = _touched(one.write), _touched(other.write)
    return (
        (written & also_written) | (written & _reads(other)) | (_reads(one) & also_written)
    ).any()


def _shares_port(one: data.View, other: data.View) -> Value:
    ports = (one.read_ports & other.read_ports), (one.write_ports & other.write_ports)
    return (one.engine != other.engine) & Cat(ports).any()


class Rule(wiring.Component):
    """Commands are in numbered slots. All inputs are of the current cycle.

    enter, arriving: what the window is sent; slot: where the rule puts it. free: of the engines.
    start, started: what the window says to the engines, as the slot of the command.
    broken: property -> signal that is high in a cycle in which it fails.
    """

    def __init__(self, command: Command, slots: int):
        super().__init__({
            "enter": In(1), "arriving": In(command), "slot": Out(range(slots)),
            "free": In(ENGINES), "start": In(ENGINES), "started": In(range(slots)).array(ENGINES),
            "full": In(1), "empty": In(1),
            "asked": In(command.hull).array(QUERIES), "busy": In(QUERIES),
        })  # fmt: skip
        self.broken = {name: Signal(name="broken_" + name.replace(" ", "_")) for name in PROPERTIES}
        self._slots = range(slots)
        self._commands = [Signal(command, name=f"command_{i}") for i in self._slots]
        self._present = Signal(slots)  # entered and not finished
        self._begun = Signal(slots)
        self._arrives = Signal(slots)
        self._starts = Signal(slots)
        self._stays = Signal(slots)  # present in the next cycle too
        self._older = [Signal(slots, name=f"older_{i}") for i in self._slots]
        self._conflicts = [Signal(slots, name=f"conflicts_{i}") for i in self._slots]  # older ones
        # Cycles to the finish, from the cycle on in which the engine is free.
        self._left = [Signal(len(self.arriving.tail), name=f"left_{i}") for i in self._slots]

    def elaborate(self, platform) -> Module:
        m = Module()
        present, begun, stays = self._present, self._begun, self._stays
        for i in self._slots:
            m.d.comb += [
                self._arrives[i].eq(self.enter & ~present[i] & present[:i].all()),
                self._starts[i].eq(
                    Cat(self.start[k] & (self.started[k] == i) for k in range(ENGINES)).any()
                ),
            ]
            with m.If(self._arrives[i]):
                m.d.comb += self.slot.eq(i)
                conflicts = Cat(_conflict(old, self.arriving) for old in self._commands)
                m.d.sync += [
                    self._commands[i].eq(self.arriving), self._older[i].eq(stays),
                    self._conflicts[i].eq(conflicts & stays),
                ]  # fmt: skip
            with m.Else():
                m.d.sync += [
                    self._older[i].eq(self._older[i] & stays),
                    self._conflicts[i].eq(self._conflicts[i] & stays),
                ]
        m.d.sync += [
            present.eq(stays | self._arrives),
            begun.eq((begun | self._starts) & ~self._arrives),
        ]
        self._finish(m)
        self._judge(m)
        self._levels(m)
        return m

    def _free(self, i: int) -> Value:
        return Array(self.free)[self._commands[i].engine]

    def _finish(self, m: Module) -> None:
        for i in self._slots:
            drains, left, tail = Signal(name=f"drains_{i}"), self._left[i], self._commands[i].tail
            going = self._present[i] & self._begun[i] & (drains | self._free(i))
            # Tail 0: an empty command, whose engine is free in the cycle after its start.
            gone = (going & (left == 1)) | (self._starts[i] & (tail == 0))
            m.d.comb += self._stays[i].eq(self._present[i] & ~gone)
            with m.If(self._arrives[i]):
                m.d.sync += [left.eq(self.arriving.tail), drains.eq(0)]
            with m.Elif(going):
                m.d.sync += [left.eq(left - 1), drains.eq(1)]

    def _judge(self, m: Module) -> None:
        """Compare the start of this cycle with the rule's."""
        slots, commands, starts = self._slots, self._commands, self._starts
        flying, waits, heads, ready = (Signal(len(slots)) for _ in range(4))
        m.d.comb += [flying.eq(self._present & self._begun), waits.eq(self._present & ~self._begun)]
        broken = {name: [] for name in PROPERTIES}
        for i in slots:
            command, older = commands[i], self._older[i]
            is_transfer = (command.engine == LOAD) | (command.engine == STORE)
            holders = Cat(flying[j] & _shares_port(commands[j], command) for j in slots)
            overtaken = Cat(
                flying[j] & (commands[j].engine == VECTOR) & (self._left[j] > command.tail)
                for j in slots
            )
            holds = {
                "hazard": ~self._conflicts[i].any(),
                "engine": self._free(i),
                "dram port": ~is_transfer | (self.free[LOAD] & self.free[STORE]),
                "bank port": ~holders.any(),
                "results": (command.engine != VECTOR) | ~overtaken.any(),
            }
            same = Cat(waits[j] & (commands[j].engine == command.engine) for j in slots)
            m.d.comb += [
                heads[i].eq(waits[i] & ~(older & same).any()),
                ready[i].eq(heads[i] & Cat(holds.values()).all()),
            ]
            for name, condition in holds.items():
                broken[name].append(starts[i] & ~condition)
            first, oldest = ~(older & ready).any(), waits[i] & ~(older & waits).any()
            broken["order"].append(starts[i] & ~heads[i])
            broken["turn"].append(starts[i] & ~first)
            broken["late"].append(~starts[i] & ready[i] & first)
            broken["stuck"].append(~starts[i] & oldest & ~flying.any())
        for k in range(ENGINES):
            slot = self.started[k]
            right = Array(waits)[slot] & (Array(c.engine for c in commands)[slot] == k)
            others = self.start & ~C(1 << k, ENGINES)
            broken["identity"].append(self.start[k] & (~right | others.any()))
        m.d.comb += [self.broken[name].eq(Cat(bits).any()) for name, bits in broken.items() if bits]

    def _levels(self, m: Module) -> None:
        unfinished = self._present | self._arrives
        commands = [*zip(self._present, self._commands, strict=True), (self.enter, self.arriving)]
        wrong = []
        for asked, busy in zip(self.asked, self.busy, strict=True):
            bytes_asked = _touched(asked)
            writers = Cat(
                there & (_touched(command.write) & bytes_asked).any() for there, command in commands
            )
            wrong.append(busy != writers.any())
        m.d.comb += [
            self.broken["level"].eq(
                (self.full != unfinished.all()) | (self.empty != ~unfinished.any())
            ),
            self.broken["query"].eq(Cat(wrong).any()),
        ]
