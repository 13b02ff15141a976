"""From pieces of a tile, as a bank gives them, to the stream of bytes that a store sends.

Elements that become narrower in memory are converted here, so that the stream never carries more
bytes than the bank's port; elements that become wider travel as they are and are widened when
their atom is built (`atom_builder`). Of an accumulating store all elements travel as they are.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import C, Cat, Module, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.formats import encode_element
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType

DELAY = 3  # cycles from asking for a piece to its bytes at the output
NARROWER = {  # local format -> those in memory that have fewer bits
    DType.F32: (DType.BF16, DType.F8E4M3),
    DType.BF16: (DType.F8E4M3,),
    DType.I32: (DType.I8, DType.BOOL, DType.U8, DType.I4),
    DType.I8: (DType.BOOL, DType.U8, DType.I4),
}


class Mode(data.StructLayout):
    """What a store does with its elements: the fields of its go word."""

    def __init__(self):
        super().__init__({"mem": 4, "local": 4, "accumulate": 1})


def width_code(m: Module, dtype: Value, name: str) -> Signal:
    """log2 of the bits of an element, 2 (I4) to 6 (I64)."""
    code = Signal(3, name=name)
    with m.Switch(dtype):
        for bits in sorted({dtype.bits for dtype in DType}):
            with m.Case(*(int(dtype) for dtype in DType if dtype.bits == bits)):
                m.d.comb += code.eq(bits.bit_length() - 1)
    return code


def narrowing(m: Module, mode: data.View, name: str) -> Signal:
    """log2 of how much shorter the stream is than the tile: 0 to 3."""
    local, mem = (width_code(m, mode[side], f"{name}_{side}") for side in ("local", "mem"))
    shift = Signal(2, name=f"{name}_narrowing")
    with m.If((local > mem) & ~mode.accumulate):
        m.d.comb += shift.eq(local - mem)
    return shift


class TileStream(wiring.Component):
    """`asked_size` bytes of a command of `asked_mode` are asked for in this cycle (0: none) and
    show in `read_data` in the next one; `DELAY` cycles after it their `size` bytes of the stream
    show in `data`, lowest first."""

    def __init__(self, chip: Chip):
        self.port_bytes = chip.port_bytes
        sizes = range(chip.port_bytes + 1)
        super().__init__({
            "asked_size": In(sizes), "asked_mode": In(Mode()),
            "read_data": In(8 * chip.port_bytes),
            "size": Out(sizes), "data": Out(8 * chip.port_bytes),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        asked_size, size = Signal.like(self.asked_size), Signal.like(self.asked_size)
        asked_mode, shift = Signal(Mode()), Signal(2)
        raw = Signal(8 * self.port_bytes)
        conversions = self._conversions(m, raw)
        m.d.sync += [
            asked_size.eq(self.asked_size), asked_mode.eq(self.asked_mode),
            size.eq(asked_size), shift.eq(narrowing(m, asked_mode, "piece")),
            raw.eq(self.read_data), self.size.eq(size >> shift),
            self.data.eq(self._chosen(m, asked_mode, conversions, raw)),
        ]  # fmt: skip
        return m

    def _conversions(self, m: Module, raw: Value) -> dict[tuple[DType, DType], Value]:
        """The bytes of a piece as they travel, for every pair (local, memory) that narrows."""
        found = {}
        for local, formats in NARROWER.items():
            count = 8 * self.port_bytes // local.bits
            lanes = [_lane(raw.word_select(i, local.bits), local) for i in range(count)]
            for mem in formats:
                name = f"{local.name}_{mem.name}".lower()
                found[local, mem] = Cat(
                    encode_element(m, lane, C(mem, 4), f"{name}_{i}", (mem,))[: mem.bits]
                    for i, lane in enumerate(lanes)
                )
        return found

    def _chosen(
        self, m: Module, mode: data.View, conversions: dict[tuple[DType, DType], Value], raw: Value
    ) -> Value:
        """What `mode`, of a cycle before, says of a piece."""
        names = Cat(mode.mem, mode.local, mode.accumulate)
        choices = [(names == (mem | local << 4), value)
                   for (local, mem), value in conversions.items()]  # fmt: skip
        copied = ~Cat(on for on, _ in choices).any()
        out = []
        for number, (on, value) in enumerate([*choices, (copied, raw)]):
            taken = Signal(name=f"taken_{number}")
            m.d.sync += taken.eq(on)
            out.append(value & taken.replicate(len(value)))
        return reduce(or_, out)


def _lane(element: Value, dtype: DType) -> Value:
    """An element of a local format as 32 bits."""
    if dtype is DType.BF16:
        return Cat(C(0, 16), element)
    return Cat(element, element[-1].replicate(32 - len(element)))
