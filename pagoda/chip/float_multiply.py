"""The pipelined float functions of a lane: add, multiply, fused multiply-add, round, convert.

All of them are one datapath, a frame of 77 bits in which P + C is formed exactly (but for a sticky
bit), normalised once and rounded once:

    bit  76 ... 53 | 52 51 | 50 ... 3 | 2 1 0
          C >> 0       gap      P         guard, guard, sticky

P is 48 bits wide: a product, or a significand times 2^23. C, 24 bits, is shifted right to where its
weight is. If C lies so far above P that it would have to go left, it stays at the top and P,
wherever it is below, only decides the rounding: P is less than a quarter of C's last bit. Rounding
to an integral value puts the weight of 1 at bit 2 and adds 0 to 3 below it.

A unit that takes no products as P has a shorter sum: it begins 23 bits further up, where the
significand does, with its own three bits below.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_add import order
from pagoda.chip.float_format import (
    ROOM_BITS,
    Flow,
    limit_lines,
    normalise,
    rounded,
    shift_right,
    unpack,
)
from pagoda.isa.functions import FUNCTION_CODES

LATENCIES = (4, 5, 6)
"""What a unit can have: 5 cuts between counting zeros and shifting, 6 before the sum, too."""
FRAME_BITS = 77
_P_LOW = 3  # where P begins in the frame


class Operation(data.StructLayout):
    """What a lane of `FloatUnit` is to do; the bits exclude one another where it matters."""

    def __init__(self):
        super().__init__({
            "addition": 1,  # C is y: fadd, fsub, frsub, fma
            "negate_x": 1,
            "negate_y": 1,
            "fused": 1,  # P is the product that arrives, not x
            "multiply": 1,  # P is x * y: fmul, imul
            "from_integer": 1,  # P is |x|: i2f
            "to_integer": 1,  # f2i
            "integral": 1,  # ffloor, fceil, ftrunc, fround
            "up": 1,  # to_integer, integral: away from zero if positive
            "down": 1,  # if negative
            "nearest": 1,
            "extremum": 1,  # fmax, fmin
            "minimum": 1,
            "integer": 1,  # imul
        })  # fmt: skip


FUNCTIONS: dict[str, tuple[str, ...]] = {
    "fadd": ("addition",),
    "fsub": ("addition", "negate_y"),
    "frsub": ("addition", "negate_x"),
    "fma": ("addition", "fused"),
    "fmul": ("multiply",),
    "imul": ("multiply", "integer"),
    "i2f": ("from_integer",),
    "f2i": ("to_integer",),
    "ftrunc": ("integral",),
    "ffloor": ("integral", "down"),
    "fceil": ("integral", "up"),
    "fround": ("integral", "nearest"),
    "fmax": ("extremum",),
    "fmin": ("extremum", "minimum"),
}
"""Of an operation, by function: the bits that are 1."""


def decode(m: Module, code: Value, name: str) -> data.View:
    """The operation of a function code; nothing in particular for other functions."""
    operation = Signal(Operation(), name=name)
    with m.Switch(code):
        for function, fields in FUNCTIONS.items():
            with m.Case(FUNCTION_CODES[function]):
                m.d.comb += [operation[field].eq(1) for field in fields]
    return operation


class Product(data.StructLayout):
    """An exact product: (-1)^sign * magnitude * 2^(exponent - 173), unless inf or nan."""

    def __init__(self):
        super().__init__({
            "magnitude": 48, "exponent": signed(ROOM_BITS), "sign": 1, "zero": 1, "inf": 1,
            "nan": 1,
        })  # fmt: skip


class FloatUnit(wiring.Component):
    """One lane. A unit of the first stage gives its `product`, `latency` cycles after x and y like
    `result`; one of the second stage is `fused`: it takes that as `factor` of a fma, with its y."""

    def __init__(self, fused: bool, latency: int):
        if latency not in LATENCIES:
            raise ValueError(f"float unit: latency {latency} is none of {LATENCIES}; choose one")
        self.fused, self.latency = fused, latency
        self.base = 0 if fused else 23  # bits of the frame below its sums
        super().__init__({
            "operation": In(Operation()), "x": In(32), "y": In(32), "result": Out(32),
            **({"factor": In(Product())} if fused else {"product": Out(Product())}),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        op, x, y = self.operation, self.x, self.y

        # Exponents, distances, partial products, and the results that need no frame.
        ux, uy = unpack(m, x, "x_parts"), unpack(m, y, "y_parts")
        left = self._left(m, ux)
        right_sign, subtract = Signal(), Signal()
        m.d.comb += [
            right_sign.eq(y[31] ^ op.negate_y),
            subtract.eq((op.addition & (left.sign ^ right_sign)) | (op.to_integer & x[31])),
        ]
        exponent, shift, room = self._distance(m, ux, uy, left)
        p, c, low = self._operands(m, ux, uy, left)
        raw, has_raw = self._without_frame(m, ux, uy, left, right_sign, subtract)
        flow = Flow(m)
        flow.add(
            op=op, p_sign=Mux(op.multiply, x[31] ^ y[31], left.sign), c_sign=right_sign,
            subtract=subtract, exponent=exponent, shift=shift, room=room, p=p, c=c, low=low,
            partial=self._partial_products(m, ux, uy), raw=raw, has_raw=has_raw,
            zero=ux.zero | uy.zero, inf=ux.inf | uy.inf, nan=_invalid_product(ux, uy),
        )  # fmt: skip
        flow.step()

        # C at its place.
        width = FRAME_BITS - self.base
        aligned, lost = shift_right(m, Cat(Const(0, width - 24), flow.c), flow.shift, "align")
        flow.add(aligned=Cat(aligned[0] | lost, aligned[1:]))
        flow.step("c", "shift", cycles=int(self.latency >= 6))

        # The exact product, or the exact sum of P and C.
        whole = self._whole_product(m, flow.partial)
        total, reverse, negative = self._sum(m, flow)
        frame, raw = Signal(FRAME_BITS, name="frame"), Signal(32, name="raw")
        m.d.comb += [frame.eq(Mux(negative, reverse, total) << self.base), raw.eq(flow.raw)]
        with m.If(flow.op.integral):
            m.d.comb += frame[self.base : self.base + 2].eq(0)
        with m.If(flow.op.multiply):
            m.d.comb += frame.eq(whole << _P_LOW)
        with m.If(flow.op.from_integer):
            m.d.comb += frame.eq(flow.raw << _P_LOW)
        with m.If(flow.op.integer):
            m.d.comb += raw.eq(whole)
        with m.If(flow.op.to_integer & ~flow.has_raw):
            m.d.comb += raw.eq(total[2:])
        flow.add(
            frame=frame, whole=whole, lines=limit_lines(flow.room, FRAME_BITS),
            sign=Mux(negative, flow.c_sign, flow.p_sign), lane=raw,
            has_lane=flow.has_raw | flow.op.integer | flow.op.to_integer,
        )  # fmt: skip
        flow.step("p", "low", "aligned", "partial", "op", "p_sign", "c_sign", "raw", "has_raw")

        # Normalise.
        cuts = int(self.latency >= 5)
        value = normalise(m, flow.frame, flow.room, flow.lines, "normal", cuts)
        flow.step("frame", "room", "lines", cycles=cuts)
        flow.add(value=value)
        flow.step()

        # Round. An exact difference of 0 is +0.
        pattern = rounded(m, flow.value, flow.sign, ~flow.subtract, "pattern")
        flow.add(result=Mux(flow.has_lane, flow.lane, pattern))
        flow.step("value", "subtract", "lane", "has_lane")
        m.d.comb += self.result.eq(flow.result)
        if not self.fused:
            product = self.product
            m.d.comb += [
                product.magnitude.eq(flow.whole), product.exponent.eq(flow.exponent),
                product.sign.eq(flow.sign), product.zero.eq(flow.zero), product.inf.eq(flow.inf),
                product.nan.eq(flow.nan),
            ]  # fmt: skip
        return m

    def _left(self, m: Module, ux: data.View) -> data.View:
        """x, or the factor, as the left summand; its magnitude counts 2^(exponent - 173)."""
        left = Signal(Product(), name="left")
        m.d.comb += [
            left.magnitude.eq(ux.significand << 23), left.exponent.eq(ux.field),
            left.sign.eq(ux.sign ^ self.operation.negate_x),
            left.zero.eq(ux.zero), left.inf.eq(ux.inf), left.nan.eq(ux.nan),
        ]  # fmt: skip
        if self.fused:
            with m.If(self.operation.fused):
                m.d.comb += left.eq(self.factor)
        return left

    def _distance(
        self, m: Module, ux: data.View, uy: data.View, left: data.View
    ) -> tuple[Value, Value, Value]:
        """(exponent of P, how far C goes right in the frame, the frame's room)."""
        op = self.operation
        on_x = Signal()  # C is x
        exponent, c_field = Signal(signed(ROOM_BITS)), Signal(8)
        distance, far = Signal(signed(ROOM_BITS + 2)), Signal()
        room = Signal(signed(ROOM_BITS + 2))
        m.d.comb += [
            on_x.eq(op.integral | op.to_integer),
            exponent.eq(left.exponent),
            # Without a C the frame behaves as if it were a zero, the weight of which is lowest.
            c_field.eq(Mux(on_x, ux.field, Mux(op.addition, uy.field, 1))),
            distance.eq(Mux(on_x, 201 - self.base, exponent + 27) - c_field),
            far.eq((distance < 0) | (op.addition & left.zero)),
            room.eq(Mux(on_x, 200 - self.base, Mux(far, c_field - 1, exponent + 26))),
        ]
        with m.If(op.multiply):
            m.d.comb += exponent.eq(ux.field + uy.field - 127)
        with m.If(op.from_integer):
            m.d.comb += exponent.eq(173)
        bits = (FRAME_BITS - self.base).bit_length()
        beyond = distance[bits:].any().replicate(bits)  # everything is shifted out
        shift = (distance[:bits] | beyond) & (~far).replicate(bits)
        return exponent, shift, room[:ROOM_BITS]

    def _operands(
        self, m: Module, ux: data.View, uy: data.View, left: data.View
    ) -> tuple[Value, Value, Value]:
        """(P, C, what is added at the lowest bits of the sum)."""
        op, sign = self.operation, self.x[31]
        p = left.magnitude[self.base :] & op.addition.replicate(48 - self.base)
        c = Mux(op.addition, uy.significand, ux.significand)
        low = Signal(2)
        m.d.comb += low.eq(Mux(sign, op.down, op.up).replicate(2) | op.nearest)
        with m.If(op.to_integer):  # -floor(c) is floor((4 * -c + 3) / 4)
            m.d.comb += low.eq(sign.replicate(2))
        return p, c, low

    def _partial_products(self, m: Module, ux: data.View, uy: data.View) -> Value:
        """Of halves of 16 bits: low * low, low * high, high * low, high * high."""
        integer = self.operation.integer
        factors = [
            Cat(v[:23], Mux(integer, v[23:], u.normal)) for v, u in ((self.x, ux), (self.y, uy))
        ]
        (x_low, x_high), (y_low, y_high) = ((f[:16], f[16:]) for f in factors)
        halves = ((x_low, y_low), (x_low, y_high), (x_high, y_low), (x_high, y_high))
        return Cat(*((a * b)[:32] for a, b in halves))

    @staticmethod
    def _whole_product(m: Module, partial: Value) -> Value:
        low, mid_a, mid_b, high = (partial.word_select(i, 32) for i in range(4))
        whole = Signal(48, name="whole")
        m.d.comb += whole.eq(Cat(low, high) + Cat(Const(0, 16), mid_a + mid_b))
        return whole

    def _without_frame(
        self, m: Module, ux: data.View, uy: data.View, left: data.View, right_sign: Value,
        subtract: Value,
    ) -> tuple[Value, Value]:  # fmt: skip
        """(result, whether it is one) of NaN, infinities, extrema and what is integral already;
        |x| of an integer, which goes on to the frame."""
        op, x, y = self.operation, self.x, self.y
        product = op.multiply & ~op.integer
        nan, inf, inf_sign = Signal(), Signal(), Signal()
        take_x, take_y, full, less = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            less.eq(order(x, 1) < order(y, 1)),
            nan.eq(
                (op.addition & (left.nan | uy.nan | (left.inf & uy.inf & subtract)))
                | (product & _invalid_product(ux, uy))
                | (op.extremum & (ux.nan | uy.nan)) | (op.integral & ux.nan)
            ),
            inf.eq(
                ~nan & ((op.addition & (left.inf | uy.inf)) | (product & (ux.inf | uy.inf)))
            ),
            inf_sign.eq(Mux(op.addition, Mux(left.inf, left.sign, right_sign), x[31] ^ y[31])),
            take_x.eq(~nan & (op.integral | (op.extremum & (less == op.minimum)))),
            take_y.eq(~nan & op.extremum & (less != op.minimum)),
            full.eq(op.to_integer & ~ux.nan),  # the greatest or the least integer
        ]  # fmt: skip
        magnitude = Signal(32, name="x_magnitude")
        m.d.comb += magnitude.eq((x ^ x[31].replicate(32)) + x[31])
        most = full & ~x[31]
        special = Cat(
            most.replicate(22), nan | most, (nan | inf | most).replicate(8),
            (inf & inf_sign) | (full & x[31]),
        )  # fmt: skip
        raw = (
            (x & take_x.replicate(32)) | (y & take_y.replicate(32)) | special
            | (magnitude & op.from_integer.replicate(32))
        )  # fmt: skip
        has_raw = (
            nan | inf | op.extremum | (op.integral & (ux.field >= 150))
            | (op.to_integer & (ux.field >= 158))
        )  # fmt: skip
        return raw, has_raw

    def _sum(self, m: Module, flow: Flow) -> tuple[Value, Value, Value]:
        """(P +- C, C - P, whether that is the magnitude of a difference)."""
        width, subtract, c = FRAME_BITS - self.base, flow.subtract, flow.aligned
        p, total, reverse = Signal(width), Signal(width + 1), Signal(width)
        negative = Signal()
        m.d.comb += [
            p.eq(Cat(flow.low, Const(0, 1), flow.p)),
            total.eq(
                p + Cat(c ^ subtract.replicate(width), subtract)
                + (subtract | (flow.op.nearest & c[2]))
            ),
            reverse.eq(c - p),
            negative.eq(subtract & total[width]),
        ]  # fmt: skip
        return total[:width], reverse, negative


def _invalid_product(ux: data.View, uy: data.View) -> Value:
    return ux.nan | uy.nan | (ux.inf & uy.zero) | (ux.zero & uy.inf)
