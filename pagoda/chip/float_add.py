"""Binary32 addition, 4 cycles, one a cycle; and the comparisons that reductions take."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import (
    INFINITY,
    NAN,
    ROOM_BITS,
    Flow,
    Normal,
    limit_lines,
    places_up,
    register,
    rounded,
    shift_left,
    shift_right,
    special_lane,
    unpack,
)

ADD_LATENCY = 4


class FloatAdder(wiring.Component):
    """sum = a + b, correctly rounded, 4 cycles later; takes a pair every cycle."""

    a: In(32)
    b: In(32)
    sum: Out(32)

    def elaborate(self, platform):
        m = Module()

        # Cycle 0: the greater magnitude first; how far the other lies below it.
        swap, big, small = Signal(), Signal(32), Signal(32)
        m.d.comb += [
            swap.eq(self.a[:31] < self.b[:31]),
            big.eq(Mux(swap, self.b, self.a)),
            small.eq(Mux(swap, self.a, self.b)),
        ]
        high, low = unpack(m, big, "high"), unpack(m, small, "low")
        subtract = high.sign ^ low.sign
        distance, far = Signal(8), Signal()
        m.d.comb += [distance.eq(high.field - low.field), far.eq(distance[5:].any())]
        flow = Flow(m)
        flow.add(
            shift=distance[:5] | far.replicate(5), high=high.significand, low=low.significand,
            room=high.field, subtract=subtract, sign=high.sign, inf=high.inf,
            nan=high.nan | low.nan | (high.inf & low.inf & subtract),
        )  # fmt: skip
        flow.step()

        # Cycle 1: align with three more bits, the last one sticky; add.
        aligned, lost = shift_right(m, Cat(Const(0, 3), flow.low), flow.shift, "align")
        addend = Cat(aligned[0] | lost, aligned[1:], Const(0, 1))
        total = Signal(28)
        m.d.comb += total.eq(
            Cat(Const(0, 3), flow.high) + (addend ^ flow.subtract.replicate(28)) + flow.subtract
        )
        flow.add(frame=total, lines=limit_lines(flow.room, 28))
        flow.step("shift", "high", "low")

        # Cycle 2: normalise, but for the last two places.
        places = places_up(m, flow.frame, flow.lines, "normal")
        top, below = shift_left(m, flow.frame, Cat(Const(0, 2), places[2:]), 28, "coarse")
        field = (flow.room - places + 1)[:ROOM_BITS]
        flow.add(top=top, below=below, places=places[:2], field=field)
        flow.step("frame", "room", "lines")

        # Cycle 3: round. x - x is +0.
        normal = Signal(Normal(), name="normal")
        top, below = shift_left(m, flow.top, flow.places, 25, "fine")
        m.d.comb += [
            normal.top.eq(top), normal.below.eq(flow.below | below), normal.field.eq(flow.field),
        ]  # fmt: skip
        special = flow.nan | flow.inf
        constant = special_lane(flow.nan, flow.inf, flow.sign) & special.replicate(32)
        result = rounded(m, normal, flow.sign, ~flow.subtract, ~special, constant, "pattern")
        m.d.comb += self.sum.eq(register(m, result, "result"))
        return m


class Extremum(wiring.Component):
    """The greater or the smaller of two lanes, combinationally.

    Floats: NaN (the canonical one) if either is NaN; -0 is below +0. Integers are signed.
    """

    a: In(32)
    b: In(32)
    minimum: In(1)
    integer: In(1)
    out: Out(32)

    def elaborate(self, platform):
        m = Module()
        a_nan, b_nan, less = Signal(), Signal(), Signal()
        m.d.comb += [
            a_nan.eq(self.a[:31] > INFINITY),
            b_nan.eq(self.b[:31] > INFINITY),
            less.eq(order(self.a, ~self.integer) < order(self.b, ~self.integer)),
        ]
        with m.If(~self.integer & (a_nan | b_nan)):
            m.d.comb += self.out.eq(NAN)
        with m.Elif(less ^ self.minimum):
            m.d.comb += self.out.eq(self.b)
        with m.Else():
            m.d.comb += self.out.eq(self.a)
        return m


def order(bits, is_float):
    """The signed integer that orders a lane: a negative float's magnitude is flipped."""
    flip = bits[31] & is_float
    return (bits ^ Cat(flip.replicate(31), Const(0, 1))).as_signed()
