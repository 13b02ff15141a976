"""Integers at both ends of the float lanes: rounded ahead of a product, taken out of a sum.

i2fmul rounds an integer to 24 bits before it is multiplied. Where that happens depends on the
highest one of |x|: at bit p, if that is bit 23 + p. The complement z of a negative x is |x| - 1;
rounding z + 1 to a multiple of 2^p needs no sum ahead of the one that rounds.

faddq rounds a sum to 24 bits and that to an integral value. Both at once: the integer is cut out of
the 24 bits, and one more is added if what lies below it, with the first rounding's one, is more
than a half, or a half and the integer is odd.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data

HALF_FIELD = 126
"""The exponent field of 0.5: above it every step is a bit of the integer."""
_INTEGER_BITS = 7  # of a magnitude that int8 holds


def rounded_magnitude(m: Module, x: Value) -> Value:
    """|x| of an int32, rounded to 24 significant bits, ties to even. 32 bits."""
    sign = x[31]
    z = Signal(31, name="complement")
    m.d.comb += z.eq(x[:31] ^ sign.replicate(31))
    high = z[24:]
    ups = [sign & ~high.any()]
    for p in range(1, len(high) + 1):
        guard, rest, odd = z[p - 1], z[: p - 1], z[p]
        up = Mux(sign, guard | (rest.all() & odd), guard & (rest.any() | odd))
        ups.append(high[p - 1] & ~high[p:].any() & up)
    kept = [z[i] & ~high[i:].any() for i in range(len(high))]
    magnitude = Signal(32, name="rounded_magnitude")
    m.d.comb += magnitude.eq(Cat(kept, z[len(kept) :]) + Cat(ups))
    return magnitude


class Window(data.StructLayout):
    """Where the integer ends in a normalised frame."""

    def __init__(self):
        super().__init__({
            "places": 3,  # bits of the integer, unless it is large or small
            "fraction": _INTEGER_BITS,  # bits 16 to 22 of the significand that lie below a half
            "large": 1, "small": 1,  # at least 128; less than a half
        })  # fmt: skip


def window_of(m: Module, room: Value, places: Value) -> data.View:
    """The window of a frame that goes up by `places`. room: the frame's, less HALF_FIELD - 1."""
    count = room - places
    integer_bits, window = Signal(count.shape(), name="integer_bits"), Signal(Window())
    low = integer_bits[:3]
    m.d.comb += [
        integer_bits.eq(count),
        window.places.eq(low),
        window.fraction.eq(Cat(low < _INTEGER_BITS - i for i in range(_INTEGER_BITS))),
        window.small.eq(integer_bits < 0),
        window.large.eq(integer_bits > _INTEGER_BITS),
    ]
    return window


def quantised(m: Module, normal: data.View, sign: Value, window: data.View) -> Value:
    """int8, as a lane, of a normalised frame rounded to 24 bits and then to an integral value."""
    significand, guard = normal.top[1:], normal.top[0]
    up_24 = guard & (normal.below | significand[0])
    moved = Signal(1 + _INTEGER_BITS, name="moved")
    m.d.comb += moved.eq((significand[16:] << window.places)[7:])
    half, integer = moved[0], moved[1:]
    always, sometimes = significand[:16], significand[16:23]
    above = always.any() | (sometimes & window.fraction).any()
    full = always.all() & (sometimes | ~window.fraction).all()
    up = Signal(name="up")
    m.d.comb += up.eq(
        Mux(half, above | up_24 | integer[0], full & up_24 & integer[0]) & ~window.small
    )
    shown = integer & (~window.small).replicate(_INTEGER_BITS)
    total = Signal(9, name="quantised_total")
    m.d.comb += total.eq((Cat(shown, Const(0, 2)) ^ sign.replicate(9)) + (up ^ sign))
    saturates = (window.large & normal.top[24]) | (integer.all() & up & ~sign)
    return Cat(
        Mux(saturates, (~sign).replicate(7), total[:7]),
        Mux(saturates, sign, total[8]).replicate(25),
    )
