"""The pipelined float functions of a lane: add, multiply, fused multiply-add, round, convert.

All of them are one datapath, a frame of 77 bits in which P + C is formed exactly (but for a sticky
bit), normalised once and rounded once:

    bit  76 ... 53 | 52 51 | 50 ... 3 | 2 1 0
          C >> 0       gap      P         guard, guard, sticky

P is 48 bits wide: a product, or a significand times 2^23. C, 24 bits, is shifted right to where its
weight is. If C lies so far above P that it would have to go left, it stays at the top and P,
wherever it is below, only decides the rounding: P is less than a quarter of C's last bit. Rounding
to an integral value puts the weight of 1 at bit 2 and adds 0 to 3 below it.

C comes inverted if it is subtracted: P + ~C + 1 is P - C, and the complement of P + ~C is C - P.
Products and the magnitudes of integers come out of another sum, that of partial products; the sum
of P and C is 0 then.

A unit that takes no products as P has a shorter sum: it begins 23 bits further up, where the
significand does, with its own three bits below. Such a unit multiplies integers by floats too: |x|
rounded to 24 bits is a factor of 32, which imul has anyway. The other one quantises (`quantise`).
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import (
    ROOM_BITS,
    Flow,
    Unpacked,
    limit_lines,
    normalised,
    operation_of,
    places_up,
    register,
    rounded,
    shift_down,
    special_lane,
    unpack,
)
from pagoda.chip.quantise import HALF_FIELD, quantised, rounded_magnitude, window_of

LATENCY = 7
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
            "integer": 1,  # imul
            "scale": 1,  # multiply: x is an integer: i2fmul
            "quantise": 1,  # addition: the sum as int8: faddq
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
    "i2fmul": ("multiply", "scale"),
    "faddq": ("addition", "quantise"),
}
"""Of an operation, by function: the bits that are 1."""


def decode(m: Module, code: Value, name: str) -> data.View:
    """The operation of a function code; nothing in particular for other functions."""
    return operation_of(m, code, Operation(), FUNCTIONS, name)


class Product(data.StructLayout):
    """An exact product: (-1)^sign * magnitude * 2^(exponent - 173), unless inf or nan."""

    def __init__(self):
        super().__init__({
            "magnitude": 48, "exponent": signed(ROOM_BITS), "sign": 1, "zero": 1, "inf": 1,
            "nan": 1,
        })  # fmt: skip


class FloatUnit(wiring.Component):
    """One lane. A unit of the first stage gives its `product`, LATENCY cycles after x and y; one of
    the second stage is `fused`: it takes that as `factor` of a fma, with its y.

    `result` comes LATENCY - 1 cycles after x and y, at the end of its cycle; 0 unless `show`n.
    """

    def __init__(self, fused: bool):
        self.fused = fused
        self.base = 0 if fused else 23  # bits of the frame below its sums
        self.product_bits = 48 if fused else 56  # of 24 bits by 24, or 32 by 24
        super().__init__({
            "operation": In(Operation()), "x": In(32), "y": In(32),
            "show": In(1), "result": Out(32),
            **({"factor": In(Product())} if fused else {"product": Out(Product())}),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        flow = Flow(m)

        # Unpack; begin with exponents and comparisons.
        op, uy = self.operation, unpack(m, self.y, "y_parts")
        ux, factor = self._factor(m, unpack(m, self.x, "x_parts"))
        left, right_sign = self._left(m, ux), Signal()
        on_x = op.integral | op.to_integer  # C is x
        ahead, exponents = Signal(signed(ROOM_BITS)), Signal(9)
        m.d.comb += [
            right_sign.eq(self.y[31] ^ op.negate_y),
            ahead.eq(Mux(on_x, 201 - self.base - ux.field, 27 - uy.field)),
            exponents.eq(ux.field + uy.field),
        ]
        flow.add(
            op=op, x=self.x, y=self.y, ux=ux, uy=uy, factor=factor, left=left, c_sign=right_sign,
            ahead=ahead, exponents=exponents, on_x=on_x,
        )  # fmt: skip
        flow.step()

        # Partial products, distances, and the results that need no frame.
        op, ux, uy, left = flow.op, flow.ux, flow.uy, flow.left
        subtract = Signal()
        m.d.comb += subtract.eq(
            (op.addition & (left.sign ^ flow.c_sign)) | (op.to_integer & flow.x[31])
        )
        exponent, shift, room = self._distance(m, flow)
        p, c, low = self._operands(m, flow)
        flip = op.from_integer & flow.x[31]
        raw, has_raw = self._without_frame(m, flow, subtract, flip)
        flow.add(
            p_sign=Mux(op.multiply, flow.x[31] ^ flow.y[31], left.sign), subtract=subtract,
            exponent=exponent, shift=shift, room=room, p=p, c=c, low=low,
            partial=self._partial_products(m, flow), raw=raw, has_raw=has_raw, flip=flip,
            zero=ux.zero | uy.zero, inf=ux.inf | uy.inf, nan=_invalid_product(ux, uy),
        )  # fmt: skip
        flow.step("x", "y", "ux", "uy", "factor", "left", "ahead", "exponents", "on_x")

        # C at its place, inverted if it is subtracted; the first sum of a product.
        width = FRAME_BITS - self.base
        aligned, lost = shift_down(m, flow.c, flow.shift, width, "align")
        addend = Cat(aligned[0] | lost, aligned[1:]) ^ flow.subtract.replicate(width)
        ends, middle = self._product_terms(m, flow)
        flow.add(addend=addend, ends=ends, middle=middle)
        flow.step("c", "shift", "partial")

        # The exact product, or the magnitude of the exact sum of P and C.
        whole, total, negative = self._sum(m, flow)
        frame = Signal(FRAME_BITS, name="frame")
        m.d.comb += frame.eq(Cat(Const(0, self.base), total) | (whole << _P_LOW))
        flow.add(
            frame=frame, whole=whole, lines=limit_lines(flow.room, FRAME_BITS),
            sign=Mux(negative, flow.c_sign, flow.p_sign),
        )  # fmt: skip
        flow.step("p", "low", "addend", "ends", "middle", "flip", "p_sign", "c_sign")

        # How far up it goes; the results that are no floats.
        op, frame = flow.op, flow.frame
        integers = Mux(op.integer, frame[_P_LOW:][:32], frame[self.base + 2 :][:32])
        flow.add(
            places=places_up(m, frame, flow.lines, "normal"),
            lane=Mux(flow.has_raw, flow.raw, integers),
            has_lane=flow.has_raw | op.integer | op.to_integer,
        )  # fmt: skip
        if self.fused:
            above_half = (flow.room - (HALF_FIELD - 1)).as_signed()
            flow.add(quantises=op.quantise & ~flow.has_raw, above_half=above_half)
        flow.step("lines", "raw", "has_raw", "op")

        # Normalise.
        flow.add(normal=normalised(m, flow.frame, flow.places, flow.room, "normal"))
        if self.fused:
            flow.add(window=window_of(m, flow.above_half, flow.places))
        flow.step("frame", "places", "room", *(("above_half",) if self.fused else ()))

        # Round. An exact difference of 0 is +0.
        lane = flow.lane & (flow.has_lane & self.show).replicate(32)
        takes, keep_sign = ~flow.has_lane & self.show, ~flow.subtract
        if self.fused:
            takes = takes & ~flow.quantises
            integer = quantised(m, flow.normal, flow.sign, flow.window)
            lane = lane | (integer & (flow.quantises & self.show).replicate(32))
        m.d.comb += self.result.eq(
            rounded(m, flow.normal, flow.sign, keep_sign, takes, lane, "pattern")
        )
        if not self.fused:
            product = Signal(Product(), name="product_now")
            m.d.comb += [
                product.magnitude.eq(flow.whole[:48]), product.exponent.eq(flow.exponent),
                product.sign.eq(flow.sign), product.zero.eq(flow.zero), product.inf.eq(flow.inf),
                product.nan.eq(flow.nan),
            ]  # fmt: skip
            m.d.comb += self.product.eq(register(m, product, "product_last"))
        return m

    def _factor(self, m: Module, ux: data.View) -> tuple[data.View, Value]:
        """(parts of x, its 32 bits for the multiplier). An integer counts 2^(150 - 150)."""
        x, integer = self.x, self.operation.integer
        high = Cat(Mux(integer, x[23], ux.normal), x[24:] & integer.replicate(8))
        parts, factor = Signal(Unpacked(), name="x_factor"), Signal(32, name="factor")
        m.d.comb += [parts.eq(ux), factor.eq(Cat(x[:23], high))]
        if not self.fused:
            with m.If(self.operation.scale):
                m.d.comb += [
                    parts.field.eq(150), parts.zero.eq(ux.zero & ~x[31]), parts.inf.eq(0),
                    parts.nan.eq(0), factor.eq(rounded_magnitude(m, x)),
                ]  # fmt: skip
        return parts, factor

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

    def _distance(self, m: Module, flow: Flow) -> tuple[Value, Value, Value]:
        """(exponent of P, how far C goes right in the frame, the frame's room)."""
        op, left, uy = flow.op, flow.left, flow.uy
        far = Signal()  # C lies above the frame
        exponent, distance = Signal(signed(ROOM_BITS)), Signal(signed(ROOM_BITS + 2))
        room, product_room = Signal(signed(ROOM_BITS + 2)), Signal(signed(ROOM_BITS))
        m.d.comb += [
            distance.eq(Mux(flow.on_x, 0, left.exponent) + flow.ahead),
            far.eq(op.addition & ((distance < 0) | left.zero)),
            exponent.eq(left.exponent),
            # A frame that has been left by its P stands where C is.
            room.eq(Mux(far, uy.field - 1, left.exponent + 26)),
            product_room.eq(flow.exponents - 101),
        ]
        with m.If(flow.on_x):
            m.d.comb += room.eq(200 - self.base)
        with m.If(op.multiply):
            m.d.comb += [
                exponent.eq(flow.exponents - 127),
                room.eq(Mux(product_room < 0, 0, product_room)),
            ]
        with m.If(op.from_integer):
            m.d.comb += room.eq(199)
        bits = (FRAME_BITS - self.base).bit_length()
        beyond = distance[bits:].any().replicate(bits)  # everything is shifted out
        shift = (distance[:bits] | beyond) & (~far).replicate(bits)
        return exponent, shift, room[:ROOM_BITS]

    def _operands(self, m: Module, flow: Flow) -> tuple[Value, Value, Value]:
        """(P, C, what is added at the lowest bits of the sum); 0 of products and integers."""
        op, sign = flow.op, flow.x[31]
        p = flow.left.magnitude[self.base :] & op.addition.replicate(48 - self.base)
        c = (flow.uy.significand & op.addition.replicate(24)) | (
            flow.ux.significand & flow.on_x.replicate(24)
        )
        low = Signal(2)
        m.d.comb += low.eq(Mux(sign, op.down, op.up).replicate(2) | op.nearest)
        with m.If(op.to_integer):  # -floor(c) is floor((4 * -c + 3) / 4)
            m.d.comb += low.eq(sign.replicate(2))
        return p, c, low

    def _partial_products(self, m: Module, flow: Flow) -> Value:
        """Of 18 low and 14 high bits: low * low, low * high, high * low, and of the 6 high bits
        of y's significand high * high, in gates: a multiplier less."""
        integer, y = flow.op.integer, flow.y
        x_low, x_high = flow.factor[:18], flow.factor[18:]
        y_low = y[:18]
        y_high = Cat(
            y[18:23], Mux(integer, y[23], flow.uy.normal), y[24:] & integer.replicate(8)
        )
        count = self.product_bits - 42  # high bits of x that a product of floats has
        rows = [Cat(Const(0, i), x_high[:count] & y_high[i].replicate(count)) for i in range(6)]
        pairs = [
            (low + high)[: count + 6] for low, high in zip(rows[::2], rows[1::2], strict=True)
        ]
        top = (pairs[0] + pairs[1] + pairs[2])[: count + 6]
        return Cat(x_low * y_low, (x_low * y_high)[:32], (x_high * y_low)[:32], top)

    def _product_terms(self, m: Module, flow: Flow) -> tuple[Value, Value]:
        """Summands, the second one from bit 18 on: a product, or |x| of an integer."""
        partial, op = flow.partial, flow.op
        ends = Mux(op.from_integer, flow.raw, Cat(partial[:36], partial[100:]))
        bits = self.product_bits
        middle = (partial[36:68] + partial[68:100])[: bits - 18]
        return (
            ends & (op.multiply | op.from_integer).replicate(bits),
            middle & op.multiply.replicate(len(middle)),
        )

    def _without_frame(
        self, m: Module, flow: Flow, subtract: Value, flip: Value
    ) -> tuple[Value, Value]:
        """(result, whether it is one) of NaN, infinities and what is integral already; of an
        integer the bits of |x|, or of its complement, which go on to the frame."""
        op, x, y, ux, uy, left = flow.op, flow.x, flow.y, flow.ux, flow.uy, flow.left
        product = op.multiply & ~op.integer
        nan, inf, inf_sign = Signal(), Signal(), Signal()
        take_x, full = Signal(), Signal()
        m.d.comb += [
            nan.eq(
                (op.addition & (left.nan | uy.nan | (left.inf & uy.inf & subtract)))
                | (product & _invalid_product(ux, uy)) | (op.integral & ux.nan)
            ),
            inf.eq(
                ~nan & ((op.addition & (left.inf | uy.inf)) | (product & (ux.inf | uy.inf)))
            ),
            inf_sign.eq(Mux(op.addition, Mux(left.inf, left.sign, flow.c_sign), x[31] ^ y[31])),
            take_x.eq((~nan & op.integral) | op.from_integer),
            full.eq(op.to_integer & ~ux.nan),  # the greatest or the least integer
        ]  # fmt: skip
        integer = Cat((full & ~x[31]).replicate(31), full & x[31])
        as_float, int8 = ~op.quantise, inf & op.quantise
        raw = (
            ((x ^ flip.replicate(32)) & take_x.replicate(32)) | integer
            | Cat((int8 & ~inf_sign).replicate(7), (int8 & inf_sign).replicate(25))
            | special_lane(nan & as_float, inf & as_float, inf & inf_sign & as_float)
        )  # fmt: skip
        has_raw = (
            nan | inf | (op.integral & (ux.field >= 150))
            | (op.to_integer & (ux.field >= 158))
        )  # fmt: skip
        return raw, has_raw

    def _sum(self, m: Module, flow: Flow) -> tuple[Value, Value, Value]:
        """(product, |P +- C|, whether that is C - P)."""
        width, op, addend, subtract = FRAME_BITS - self.base, flow.op, flow.addend, flow.subtract
        p, total, short = Signal(width), Signal(width + 1), Signal(width)
        whole, negative = Signal(self.product_bits, name="whole"), Signal()
        m.d.comb += [
            whole.eq(flow.ends + (flow.middle << 18) + flow.flip),
            p.eq(Cat(flow.low, Const(0, 1), flow.p)),
            total.eq(p + addend + (subtract | (op.nearest & addend[2]))),
            short.eq(p + addend),
            negative.eq(subtract & op.addition & ~total[width]),
        ]
        low = total[:2] & (~op.integral).replicate(2)
        return whole, Mux(negative, ~short, Cat(low, total[2:width])), negative


def _invalid_product(ux: data.View, uy: data.View) -> Value:
    return ux.nan | uy.nan | (ux.inf & uy.zero) | (ux.zero & uy.inf)
