"""What the sequencers of the vector engine ask of its lanes: layouts, and helpers all of them use.

A command is a sequence of *steps*, one a cycle from the cycle after its start until its engine is
free. A step that is issued in cycle i

    i      presents its reads to the local memories
    i + 1  takes their data, a scalar or a group of the state into the operand registers
    i + 2  executes: the vector pipeline, the state's operators, or a write of the state

and a step that stores leaves where to in a queue, from which results take it in order.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.formats import LOCAL, decode_element, encode_element
from pagoda.chip.interfaces import Job
from pagoda.isa.accumulation import LANES
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType

A, B, C = range(3)  # operands, read ports
MEMORY, SCALAR, STATE, SPECIAL = range(4)  # where an operand register loads from
# SPECIAL: a column of the transposer (a), the lanes' multiples of the column step (b).
WORD = int(DType.I32)  # element format that keeps a lane's bits
ROW_INDICES, NEXT_INDICES, FIRST_INDICES = 1, 2, 3  # see `Step.index_load`


def state_lanes(chip: Chip) -> int:
    """L': lanes that work on a row state."""
    return min(chip.lanes, LANES)


def state_groups(chip: Chip) -> int:
    """Groups of L' lanes in a row state."""
    return LANES // state_lanes(chip)


def state_depth(chip: Chip) -> int:
    """Groups the engine can hold: a row state, or up to 7 groups of a column state."""
    return max(state_groups(chip), 8)


class Request(data.StructLayout):
    """A read of a local memory."""

    def __init__(self, chip: Chip):
        super().__init__({
            "enable": 1, "acc": 1, "address": 31, "size": range(chip.port_bytes + 1),
        })  # fmt: skip


class OperandLoad(data.StructLayout):
    """Load an operand register. column: lane 0 of the data for all lanes."""

    def __init__(self):
        super().__init__({"load": 1, "source": 2, "code": 2, "column": 1, "scalar": 32})


class Destination(data.StructLayout):
    """Where a result goes, and its element format."""

    def __init__(self, chip: Chip):
        super().__init__({
            "acc": 1, "address": 31, "size": range(chip.port_bytes + 1), "code": 2,
        })  # fmt: skip


class Execute(data.StructLayout):
    """What is done with the operand registers. Only one of the first five is set."""

    def __init__(self, chip: Chip):
        super().__init__({
            "compute": 1,  # f2(f1(a, b), c), to memory
            "sum": 1,  # a + b, to a group of the state
            "combine": 1,  # the same with any other operator of reductions
            "accumulate": 1,  # the same, to operand b
            "keep": 1,  # a, to a group of the state
            "fold": 1,  # sum, accumulate: the row's last; the tree over the lanes starts
            "indices": 1,  # keep: to the indices
            "f1": 8, "f2": 8, "op": 3,
            "group": range(state_depth(chip)),
            "count": range(chip.lanes + 1),  # sum, combine: lanes that change
        })  # fmt: skip


class Step(data.StructLayout):
    """One cycle's work. `group` (and `indices`): what loads from the state read.

    index_load: indices of the newer operand from the row's columns (ROW_INDICES; then the older
    ones come from the state) or from memory (NEXT_INDICES; FIRST_INDICES: the older ones start).
    """

    def __init__(self, chip: Chip):
        super().__init__({
            "reads": data.ArrayLayout(Request(chip), 3),
            "loads": data.ArrayLayout(OperandLoad(), 3),
            "group": range(state_depth(chip)), "indices": 1,
            "index_load": 2, "column": 31,
            "shift": 1, "by_columns": 1,  # the transposer
            "execute": Execute(chip),
            "store": 1, "destination": Destination(chip),
        })  # fmt: skip


class Sequencer(wiring.Signature):
    """Engine -> sequencer of a command. `start` with the `job` to come, which then stays in `held`
    until the next start; `last` is high in the cycle of the command's last step."""

    def __init__(self, chip: Chip):
        super().__init__({
            "start": Out(1), "job": Out(Job()), "held": Out(Job()),
            "step": In(Step(chip)), "last": In(1),
        })  # fmt: skip


def element_shift(code: Value) -> Value:
    """log2 of the bytes of an element: F32, I32: 2; BF16: 1; I8: 0."""
    return Mux(code[0], ~code[1], 2)


def request(target: data.View, enable: Value, address: Value, size: Value) -> list:
    """Assignments of a read; address: 32 bits, bit 31 chooses ACC."""
    return [
        target.enable.eq(enable), target.acc.eq(address[31]), target.address.eq(address[:31]),
        target.size.eq(size),
    ]  # fmt: skip


def destination(step: data.View, address: Value, size: Value, code: Value) -> list:
    """Assignments of a step that stores."""
    target = step.destination
    return [
        step.store.eq(1), target.acc.eq(address[31]), target.address.eq(address[:31]),
        target.size.eq(size), target.code.eq(code),
    ]  # fmt: skip


def lanes_of(value: Value) -> list[Value]:
    """A value as 32-bit lanes."""
    return [value[i : i + 32] for i in range(0, len(value), 32)]


def raw_elements(m: Module, port_data: Value, code: Value, name: str) -> list[Signal]:
    """Element i of port data in the low bits of 32, one for every lane; upper bits undefined."""
    elements = []
    for i in range(len(port_data) // 32):
        byte, half, word = (port_data[width * i : width * (i + 1)] for width in (8, 16, 32))
        raw = Signal(32, name=f"{name}_raw{i}")
        low = Mux(code[0], Mux(code[1], byte, half[:8]), word[:8])
        m.d.comb += raw.eq(Cat(low, Mux(code[0], half[8:], word[8:16]), word[16:]))
        elements.append(raw)
    return elements


def decoded(m: Module, raw: list[Value], code: Value, name: str) -> list[Value]:
    """Lanes of raw elements."""
    return [decode_element(m, r, code, f"{name}{i}", LOCAL)[0] for i, r in enumerate(raw)]


def packed(raw: list[Value], code: Value) -> Value:
    """Elements in the low bits of `raw`, side by side: the bytes of a port."""
    words = [Cat(r[:width] for r in raw) for width in (32, 16, 8)]
    return Mux(code[0], Mux(code[1], words[2], words[1]), words[0])


def encoded(m: Module, lanes: list[Value], code: Value, name: str) -> Value:
    """The bytes of a port that hold the lanes in an element format."""
    raw = [encode_element(m, lane, code, f"{name}{i}", LOCAL) for i, lane in enumerate(lanes)]
    return packed(raw, code)
