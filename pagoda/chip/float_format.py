"""Steps that every binary32 datapath shares: unpack, count zeros, shift, normalise, round.

A *frame* is an unsigned integer that holds a magnitude exactly, but for what lies below its lowest
bit: that is or-ed into bit 0 (sticky). Its *room* says where it stands: the value is

    frame * 2^(room - width - 125)

so `room` is how far the frame may be shifted left before its top 24 bits reach the weight of the
lowest subnormal, 2^-149: there normalisation stops, which is gradual underflow. Units choose frames
wide enough that room is never negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data

from pagoda.isa.functions import FUNCTION_CODES
from pagoda.isa.numbers import CANONICAL_NAN

INFINITY = 0x7F800000
NAN = CANONICAL_NAN
ROOM_BITS = 10
"""Enough for the room of every frame of this folder."""


def operation_of(
    m: Module,
    code: Value,
    layout: data.StructLayout,
    functions: Mapping[str, Iterable[str]],
    name: str,
) -> data.View:
    """What a function code asks a lane for. functions: by function, the fields that are 1; for
    other codes all are 0."""
    operation = Signal(layout, name=name)
    with m.Switch(code):
        for function, fields in functions.items():
            with m.Case(FUNCTION_CODES[function]):
                m.d.comb += [operation[field].eq(1) for field in fields]
    return operation


class Unpacked(data.StructLayout):
    """|x| = significand * 2^(field - 150) if finite; field is at least 1 (subnormals, zero)."""

    def __init__(self):
        super().__init__({
            "sign": 1, "field": 8, "significand": 24, "normal": 1, "zero": 1, "inf": 1, "nan": 1,
        })  # fmt: skip


class Normal(data.StructLayout):
    """A frame shifted up: its top 25 bits, whether a one lies below them, and the exponent field
    if its top bit is one."""

    def __init__(self):
        super().__init__({"top": 25, "below": 1, "field": ROOM_BITS})


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


def any_of(m: Module, bits: Value, name: str) -> Value:
    """Whether a bit is one."""
    found = Signal(name=name)
    m.d.comb += found.eq(bits.any())
    return found


def shift_right(m: Module, value: Value, amount: Value, name: str) -> tuple[Value, Value]:
    """(value >> amount, whether a one was lost), large steps first: the second is no later."""
    lost = []
    for step in reversed(range(len(amount))):
        by = 1 << step
        moved = Signal(len(value), name=f"{name}_{by}")
        m.d.comb += moved.eq(Mux(amount[step], value[by:], value))
        lost.append(amount[step] & any_of(m, value[:by], f"{name}_lost_{by}"))
        value = moved
    return value, Cat(lost).any()


def shift_down(
    m: Module, value: Value, amount: Value, width: int, name: str
) -> tuple[Value, Value]:
    """(a frame with `value` `amount` places below its top, whether a one fell out of it).

    By 0 to 7 places first; then every bit is one of four, for eights are decoded.
    """
    for step in range(3):
        by = 1 << step
        moved = Signal(len(value) + by, name=f"{name}_{by}")
        m.d.comb += moved.eq(Mux(amount[step], value, value << by))
        value = moved
    count = len(value)
    eights = Signal(1 << len(amount) - 3, name=f"{name}_eights")
    m.d.comb += eights.eq(Cat(amount[3:] == i for i in range(len(eights))))
    frame, lost = [], []
    for below in reversed(range(width)):  # places below the top
        first, last = max(-(-(below - count + 1) // 8), 0), min(below // 8, len(eights) - 1)
        frame.append(
            Cat(eights[i] & value[count - 1 - below + 8 * i] for i in range(first, last + 1)).any()
        )
    for i in range(len(eights)):
        out = min(8 * i + count - width, count)
        if out > 0:
            lost.append(eights[i] & any_of(m, value[:out], f"{name}_lost_{i}"))
    return Cat(frame), Cat(lost).any()


def shift_left(m: Module, value: Value, amount: Value, keep: int, name: str) -> tuple[Value, Value]:
    """(the top `keep` bits of value << amount, whether a one lies below them).

    Large steps first: bits that no later step can bring up go into the second result at once.
    """
    below = []
    for step in reversed(range(len(amount))):
        by = 1 << step
        moved = Signal(len(value), name=f"{name}_{by}")
        m.d.comb += moved.eq(Mux(amount[step], value << by, value))
        drop = max(len(value) - (keep + by - 1), 0)
        if drop:
            below.append(any_of(m, moved[:drop], f"{name}_below_{by}"))
        value = moved[drop:]
    return value, Cat(below).any()


def limit_lines(room: Value, width: int) -> Value:
    """Where the room of a frame ends, half decoded: what `places_up` takes, worked out before."""
    high = room[3:]
    return Cat(*(room[:3] == i for i in range(8)), *(high == i for i in range((width + 7) // 8)))


def places_up(m: Module, frame: Value, lines: Value, name: str) -> Value:
    """How far a frame goes up: its leading zeros, but at most its room.

    lines: limit_lines(room, len(frame)).
    """
    width = len(frame)
    # A one where the room ends stops the count there.
    ends = Cat(*(lines[i & 7] & lines[8 + (i >> 3)] for i in reversed(range(width))))
    marked = Signal(width, name=f"{name}_marked")
    m.d.comb += marked.eq(frame | ends)
    return leading_zeros(m, marked, f"{name}_zeros")


def normalised(m: Module, frame: Value, places: Value, room: Value, name: str) -> data.View:
    """The frame shifted up by what `places_up` found."""
    normal = Signal(Normal(), name=name)
    top, below = shift_left(m, frame, places, 25, f"{name}_shift")
    m.d.comb += [normal.top.eq(top), normal.below.eq(below), normal.field.eq(room - places + 1)]
    return normal


def special_lane(nan: ValueLike, inf: ValueLike, sign: ValueLike) -> Value:
    """The pattern of a NaN, an infinity or, if it is neither, a zero."""
    nan, inf, sign = (Value.cast(bit)[0] for bit in (nan, inf, sign))
    return Cat(Const(0, 22), nan, (nan | inf).replicate(8), sign & ~nan)


def rounded(
    m: Module, normal: data.View, sign: Value, keep_sign: Value, takes: Value, other: Value,
    name: str,
) -> Value:  # fmt: skip
    """`round_even` of a normalised frame; a frame of 0 has the sign only if it is kept."""
    top = normal.top
    zero = Signal(name=f"{name}_zero")
    m.d.comb += zero.eq(~(top.any() | normal.below))
    return round_even(
        m, top[1:24], normal.field & top[24].replicate(ROOM_BITS), top[0], normal.below,
        sign & (keep_sign | ~zero), takes, other, name,
    )  # fmt: skip


def round_even(
    m: Module, fraction: Value, field: Value, guard: Value, sticky: Value, sign: Value,
    takes: Value, other: Value, name: str,
) -> Value:  # fmt: skip
    """The pattern of a fraction and an exponent field, rounded by guard and sticky bit to nearest
    even, if it is to be taken; or-ed with `other`. Overflow gives an infinity.

    Only one gate follows the sum: a field of 254 that is rounded up is an infinity by itself.
    """
    magnitude, large = Signal(31, name=f"{name}_magnitude"), Signal(name=f"{name}_large")
    early = Signal(32, name=f"{name}_early")
    m.d.comb += [
        magnitude.eq(Cat(fraction, field[:8]) + (guard & (sticky | fraction[0]))),
        large.eq(field[8:].any() | field[:8].all()),
        early.eq(other | Cat(Const(0, 23), (takes & large).replicate(8), takes & sign)),
    ]
    return Cat(magnitude & (takes & ~large).replicate(31), Const(0, 1)) | early
