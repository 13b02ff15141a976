"""From pieces of a tile, as a bank gives them, to the stream of bytes that a store sends.

Elements that become narrower in memory are converted here, so that the stream never carries more
bytes than the bank's port; elements that become wider travel as they are and are widened when
their atom is built (`atom_builder`). Of an accumulating store all elements travel as they are.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.formats import encode_element
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType

DELAY = 3  # cycles from asking for a piece to its bytes at the output


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
        asked_mode, mode = Signal(Mode()), Signal(Mode())
        raw = Signal(8 * self.port_bytes)
        m.d.sync += [
            asked_size.eq(self.asked_size), asked_mode.eq(self.asked_mode),
            size.eq(asked_size), mode.eq(asked_mode), raw.eq(self.read_data),
            self.size.eq(size >> narrowing(m, mode, "piece")),
            self.data.eq(self._converted(m, raw, mode)),
        ]  # fmt: skip
        return m

    def _converted(self, m: Module, raw: Signal, mode: data.View) -> Signal:
        """The bytes of a piece as they travel."""
        words = self.port_bytes // 4
        halves = [Cat(C(0, 16), raw.word_select(i, 16)) for i in range(2 * words)]
        from_half = mode.local == DType.BF16
        narrow_formats = (DType.BF16, DType.F8E4M3, DType.I8, DType.I4, DType.BOOL, DType.U8)
        # A BF16 piece has two elements where F32 has one: the second ones become F8E4M3 beside.
        first, second, small = [], [], []
        for i in range(words):
            lane = Mux(from_half, halves[2 * i], raw.word_select(i, 32))
            first.append(encode_element(m, lane, mode.mem, f"word_{i}", narrow_formats))
            second.append(
                encode_element(m, halves[2 * i + 1], mode.mem, f"odd_half_{i}", (DType.F8E4M3,))
            )
        for i in range(4 * words):
            lane = Cat(raw.word_select(i, 8), raw[8 * i + 7].replicate(24))
            small.append(
                encode_element(m, lane, mode.mem, f"byte_{i}", (DType.I4, DType.BOOL, DType.U8))
            )
        pairs = zip(first, second, strict=True)
        out = Signal(8 * self.port_bytes)
        m.d.comb += out.eq(raw)
        with m.Switch(Cat(mode.mem, mode.local, mode.accumulate)):
            for local, mem, value in (
                (DType.F32, DType.BF16, Cat(raw[:16] for raw in first)),
                (DType.F32, DType.F8E4M3, Cat(raw[:8] for raw in first)),
                (DType.BF16, DType.F8E4M3, Cat(raw[:8] for pair in pairs for raw in pair)),
                (DType.I32, DType.I8, Cat(raw[:8] for raw in first)),
                (DType.I32, DType.BOOL, Cat(raw[:8] for raw in first)),
                (DType.I32, DType.U8, Cat(raw[:8] for raw in first)),
                (DType.I32, DType.I4, Cat(raw[:4] for raw in first)),
                (DType.I8, DType.BOOL, Cat(raw[:8] for raw in small)),
                (DType.I8, DType.U8, Cat(raw[:8] for raw in small)),
                (DType.I8, DType.I4, Cat(raw[:4] for raw in small)),
            ):
                with m.Case(int(mem) | int(local) << 4):
                    m.d.comb += out.eq(value)
        return out
