"""Steps that every binary32 datapath shares: unpack, count zeros, shift, normalise, round.

A *frame* is an unsigned integer that holds a magnitude exactly, but for what lies below its lowest
bit: that is or-ed into bit 0 (sticky). Its *room* says where it stands: the value is

    frame * 2^(room - width - 125)

so `room` is how far the frame may be shifted left before its top 24 bits reach the weight of the
lowest subnormal, 2^-149: there normalisation stops, which is gradual underflow. Units choose frames
wide enough that room is never negative.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data

from pagoda.isa.numbers import CANONICAL_NAN

INFINITY = 0x7F800000
NAN = CANONICAL_NAN
ROOM_BITS = 10
"""Enough for the room of every frame of this folder."""


class Unpacked(data.StructLayout):
    """|x| = significand * 2^(field - 150) if finite; field is at least 1 (subnormals, zero)."""

    def __init__(self):
        super().__init__({
            "sign": 1, "field": 8, "significand": 24, "normal": 1, "zero": 1, "inf": 1, "nan": 1,
        })  # fmt: skip


class Shifted(data.StructLayout):
    """A frame shifted up to its last `amount` places: its top 28 bits, whether a one lies below
    them, and the exponent field if its top bit will be one."""

    def __init__(self):
        super().__init__({"top": 28, "below": 1, "amount": 2, "field": ROOM_BITS})


def register(m: Module, value: Value | data.View, name: str) -> Signal | data.View:
    """`value` one cycle later; without reset, since validity travels elsewhere."""
    result = Signal(value.shape(), name=name, reset_less=True)
    m.d.sync += result.eq(value)
    return result


def delay(m: Module, value: Value, cycles: int, name: str) -> Value:
    """`value` some cycles later."""
    for cycle in range(cycles):
        value = register(m, value, f"{name}_{cycle}")
    return value


class Flow:
    """Values that go through a pipeline side by side, as attributes."""

    def __init__(self, m: Module):
        self._m, self._cycle, self._names = m, 0, []

    def add(self, **values: Value | data.View) -> None:
        for name, value in values.items():
            setattr(self, name, value)
            self._names.append(name)

    def step(self, *ended: str, cycles: int = 1) -> None:
        """Go on by `cycles` cycles, without the values named."""
        for name in ended:
            self._names.remove(name)
            delattr(self, name)
        for _ in range(cycles):
            self._cycle += 1
            for name in self._names:
                late = register(self._m, getattr(self, name), f"{name}_{self._cycle}")
                setattr(self, name, late)


def unpack(m: Module, bits: Value, name: str) -> data.View:
    """The parts of a binary32 pattern."""
    part = Signal(Unpacked(), name=name)
    fraction, field = bits[:23], bits[23:31]
    empty, full = Signal(name=f"{name}_empty"), Signal(name=f"{name}_full")
    m.d.comb += [
        empty.eq(fraction == 0),
        full.eq(field.all()),
        part.sign.eq(bits[31]),
        part.normal.eq(field.any()),
        part.field.eq(Cat(field[0] | ~part.normal, field[1:])),
        part.significand.eq(Cat(fraction, part.normal)),
        part.zero.eq(~part.normal & empty),
        part.inf.eq(full & empty),
        part.nan.eq(full & ~empty),
    ]
    return part


def leading_zeros(m: Module, value: Value, name: str) -> Value:
    """Zeros above the highest one; anything if there is none."""
    width = 4
    while width < len(value):
        width *= 2
    padded = Cat(Const(0, width - len(value)), value)
    nodes = []
    for i in reversed(range(0, width, 4)):
        b0, b1, b2, b3 = padded[i : i + 4]
        none, count = Signal(name=f"{name}_none_{i}"), Signal(2, name=f"{name}_count_{i}")
        m.d.comb += [
            none.eq(~(b0 | b1 | b2 | b3)),
            count.eq(Cat(~b3 & (b2 | ~b1), ~(b3 | b2))),
        ]
        nodes.append((none, count))
    while len(nodes) > 1:  # from the top down: nodes[0] holds the highest bits
        pairs = zip(nodes[::2], nodes[1::2], strict=True)
        merged = []
        for i, ((high_none, high), (low_none, low)) in enumerate(pairs):
            prefix = f"{name}_{len(nodes)}_{i}"
            none = Signal(name=f"{prefix}_none")
            count = Signal(len(high) + 1, name=f"{prefix}_count")
            m.d.comb += [
                none.eq(high_none & low_none),
                count.eq(Cat(Mux(high_none, low, high), high_none)),
            ]
            merged.append((none, count))
        nodes = merged
    return nodes[0][1]


def shift_right(m: Module, value: Value, amount: Value, name: str) -> tuple[Value, Value]:
    """(value >> amount, whether a one was lost), small steps first."""
    lost: Value = Const(0, 1)
    for step in range(len(amount)):
        by = 1 << step
        moved = Signal(len(value), name=f"{name}_{by}")
        fell = Signal(name=f"{name}_lost_{by}")
        m.d.comb += [
            moved.eq(Mux(amount[step], value[by:], value)),
            fell.eq(lost | (amount[step] & value[:by].any())),
        ]
        value, lost = moved, fell
    return value, lost


def shift_left(m: Module, value: Value, amount: Value, keep: int, name: str) -> tuple[Value, Value]:
    """(the top `keep` bits of value << amount, whether a one lies below them).

    Large steps first: bits that no later step can bring up go into the second result at once.
    """
    below: Value = Const(0, 1)
    for step in reversed(range(len(amount))):
        by = 1 << step
        moved = Signal(len(value), name=f"{name}_{by}")
        m.d.comb += moved.eq(Mux(amount[step], value << by, value))
        drop = max(len(value) - (keep + by - 1), 0)
        rest = Signal(name=f"{name}_below_{by}")
        m.d.comb += rest.eq(below | moved[:drop].any())
        value, below = moved[drop:], rest
    return value, below


def limit_lines(room: Value, width: int) -> Value:
    """Where the room of a frame ends, half decoded: what `normalise` takes, worked out before."""
    high = room[3:]
    return Cat(*(room[:3] == i for i in range(8)), *(high == i for i in range((width + 7) // 8)))


def normalise(
    m: Module, frame: Value, room: Value, lines: Value, name: str, cuts: int = 0
) -> data.View:
    """The frame shifted up as far as its room allows, but for the last two places.

    lines: limit_lines(room, len(frame)). With a cut the result comes one cycle later.
    """
    width = len(frame)
    # A one where the room ends stops the count there.
    ends = Cat(*(lines[i & 7] & lines[8 + (i >> 3)] for i in reversed(range(width))))
    marked = Signal(width, name=f"{name}_marked")
    m.d.comb += marked.eq(frame | ends)
    amount = delay(m, leading_zeros(m, marked, f"{name}_zeros"), cuts, f"{name}_amount")
    frame, room = delay(m, frame, cuts, f"{name}_frame"), delay(m, room, cuts, f"{name}_room")
    result = Signal(Shifted(), name=name)
    coarse = Cat(Const(0, 2), amount[2:])
    top, below = shift_left(m, frame, coarse, 28, f"{name}_shift")
    m.d.comb += [
        result.top.eq(top),
        result.below.eq(below),
        result.amount.eq(amount[:2]),
        result.field.eq(room - amount + 1),
    ]
    return result


def rounded(m: Module, value: data.View, sign: Value, keep_sign: Value, name: str) -> Value:
    """The pattern of a normalised value; that of a frame of 0 has the sign only if it is kept."""
    top, below = shift_left(m, value.top, value.amount, 25, f"{name}_last")
    field = value.field & top[24].replicate(ROOM_BITS)
    zero = Signal(name=f"{name}_zero")
    m.d.comb += zero.eq(~(value.top.any() | value.below))
    return round_even(
        m, top[1:24], field, top[0], below | value.below, sign & (keep_sign | ~zero), name
    )


def round_even(
    m: Module, fraction: Value, field: Value, guard: Value, sticky: Value, sign: Value, name: str
) -> Value:
    """The pattern of a fraction and an exponent field after rounding by guard and sticky bit to
    nearest even; overflow gives an infinity."""
    magnitude, pattern = Signal(23 + ROOM_BITS + 1, name=f"{name}_magnitude"), Signal(32, name=name)
    m.d.comb += [
        magnitude.eq(Cat(fraction, field) + (guard & (sticky | fraction[0]))),
        pattern.eq(Cat(Mux(magnitude[23:] >= 255, INFINITY, magnitude)[:31], sign)),
    ]
    return pattern
