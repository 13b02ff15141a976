"""exp2, log2, recip, rsqrt, sin2pi: one pipeline that takes a lane a cycle.

Every function reduces its argument to a table row and a position D in the row's segment (scaled to
23 bits, whatever the function's w), forms the quadratic y, and rounds factor * y (+ E * 2^54) once;
`pagoda.isa.tables` defines them, and its coefficients are the ROM. The steps, with the latency from
which on they are cut in two at `|`:

    unpack; shift: fixed point with 30 fraction bits (exp2, sin2pi), or normalise
    negate what is negative or in an odd quarter turn; row, D, factor
    ROM data | C2 * D                            8
    (C1 + ...) * D
    y = C0 + ... | factor * y                  10
    add E * 2^54 (log2); count zeros | shift   9
    round
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import (
    INFINITY,
    NAN,
    ROOM_BITS,
    Flow,
    leading_zeros,
    limit_lines,
    normalise,
    register,
    rounded,
    shift_right,
    unpack,
)
from pagoda.isa import tables
from pagoda.isa.functions import FUNCTION_CODES

COST = 2
LATENCIES = (7, 8, 9, 10)
"""What a unit can have; the function's own latency is one more."""
SUM_BITS = 62
"""Width of the frame: log2's |S| < 2^62. Its room is that of an exponent e plus 187."""

FUNCTIONS = {  # function: (first row in the ROM, table)
    "recip": (0, tables.RECIPROCAL_TABLE),
    "rsqrt": (256, tables.RSQRT_TABLE),
    "log2": (512, tables.LOG2_TABLE),
    "exp2": (768, tables.EXP2_TABLE),
    "sin2pi": (896, tables.SIN2PI_TABLE),
}
_C2_BITS, _C1_BITS, _C0_BITS, _D_BITS = 19, 26, 33, 23
_ROM_ROWS = 1024


class TableOperation(data.StructLayout):
    """One bit is 1, of the function to apply."""

    def __init__(self):
        super().__init__(dict.fromkeys(FUNCTIONS, 1))


def decode(m: Module, code: Value, name: str) -> data.View:
    operation = Signal(TableOperation(), name=name)
    m.d.comb += [operation[f].eq(code == FUNCTION_CODES[f]) for f in FUNCTIONS]
    return operation


def _rom() -> list[int]:
    words = [0] * _ROM_ROWS
    for first, table in FUNCTIONS.values():
        for row, (c0, c1, c2) in enumerate(table.tolist()):
            if c0 >> _C0_BITS or not (
                -(1 << _C1_BITS - 1) <= c1 < 1 << _C1_BITS - 1
                and -(1 << _C2_BITS - 1) <= c2 < 1 << _C2_BITS - 1
            ):
                raise ValueError(f"coefficients {c0}, {c1}, {c2} do not fit the ROM's columns")
            word = c2 % (1 << _C2_BITS)
            word = word << _C1_BITS | c1 % (1 << _C1_BITS)
            words[first + row] = word << _C0_BITS | c0
    return words


class _Ending(data.StructLayout):
    """What becomes of factor * y, or the result that needs no table."""

    def __init__(self):
        super().__init__({
            "room": ROOM_BITS, "whole": 8, "subtract": 1,  # |S| = whole * 2^54 +- factor * y
            "sign": 1, "nan": 1, "inf": 1, "zero": 1,
        })  # fmt: skip


class TableUnit(wiring.Component):
    """One lane a cycle; `result` is valid `latency` cycles after `x`."""

    def __init__(self, latency: int):
        if latency not in LATENCIES:
            raise ValueError(f"table unit: latency {latency} is none of {LATENCIES}; choose one")
        self.latency = latency
        super().__init__({"operation": In(TableOperation()), "x": In(32), "result": Out(32)})

    def elaborate(self, platform):
        m = Module()
        self._reduce(m)
        flow = Flow(m)
        row, d, factor, ending = self._locate(m)
        flow.add(d=d, factor=factor, ending=ending)
        flow.step()

        c0, c1, c2 = self._coefficients(m, row)
        flow.add(c0=c0, c1=c1, c2=c2)
        flow.step(cycles=int(self.latency >= 8))
        bend, signed_factor = Signal(signed(_C2_BITS)), Signal(signed(25))
        m.d.comb += [
            bend.eq((flow.c2 * flow.d) >> _D_BITS),
            signed_factor.eq(Mux(flow.ending.subtract, -flow.factor, flow.factor)),
        ]
        flow.add(bend=bend, signed_factor=signed_factor)
        flow.step("c2", "factor")

        rise = Signal(signed(_C1_BITS + 2))
        m.d.comb += rise.eq(((flow.c1 + flow.bend) * flow.d) >> _D_BITS)
        flow.add(rise=rise)
        flow.step("c1", "bend", "d")

        y = Signal(_C0_BITS)
        m.d.comb += y.eq(flow.c0 + flow.rise)
        flow.add(y=y)
        flow.step("c0", "rise", cycles=int(self.latency >= 10))
        product = Signal(signed(SUM_BITS))
        m.d.comb += product.eq(flow.signed_factor * flow.y)
        flow.add(product=product, lines=limit_lines(flow.ending.room, SUM_BITS))
        flow.step("signed_factor", "y")

        # The low 54 bits of E * 2^54 are 0.
        frame = Cat(flow.product[:54], flow.product[54:] + flow.ending.whole)[:SUM_BITS]
        cuts = int(self.latency >= 9)
        value = normalise(m, frame, flow.ending.room, flow.lines, "normal", cuts)
        flow.step("product", "lines", cycles=cuts)
        flow.add(value=value)
        flow.step()

        ending = flow.ending
        pattern, result = rounded(m, flow.value, ending.sign, 1, "pattern"), Signal(32)
        with m.If(ending.nan):
            m.d.comb += result.eq(NAN)
        with m.Elif(ending.inf):
            m.d.comb += result.eq(Cat(Const(INFINITY, 31), ending.sign))
        with m.Elif(ending.zero):
            m.d.comb += result.eq(Cat(Const(0, 31), ending.sign))
        with m.Else():
            m.d.comb += result.eq(pattern)
        m.d.comb += self.result.eq(register(m, result, "result_last"))
        return m

    def _reduce(self, m: Module) -> None:
        """Unpack and shift; the first cycle."""
        op = self.operation
        part = unpack(m, self.x, "parts")
        zeros = leading_zeros(m, part.significand, "zeros")
        right, exponent = Signal(8), Signal(signed(9))
        m.d.comb += [
            # significand << 30 >> right: x * 2^30 as the significand's last bit weighs
            # 2^(field - 150), or the significand moved until bit 23 is set.
            right.eq(Mux(op.exp2 | op.sin2pi, 150 - part.field, 30 - zeros)),
            exponent.eq(part.field - 127 - zeros),
        ]
        amount = right[:6] | right[6:].any().replicate(6)
        shifted, lost = shift_right(m, Cat(Const(0, 30), part.significand), amount, "reduce")

        special, negative = Signal(_Ending(), name="special"), part.sign & ~part.zero
        m.d.comb += [
            special.nan.eq(
                part.nan | ((op.log2 | op.rsqrt) & negative) | (op.sin2pi & part.inf)
            ),
            special.sign.eq(Mux(op.log2, part.zero, part.sign & ~op.exp2)),
        ]
        with m.If(op.exp2):
            m.d.comb += [
                special.inf.eq(~part.sign & (part.field >= 134)),  # 128
                special.zero.eq(part.sign & (self.x[:31] >= 0x43160000)),  # 150
            ]
        with m.If(op.log2):
            m.d.comb += special.inf.eq(part.zero | part.inf)
        with m.If(op.recip | op.rsqrt):
            m.d.comb += [special.inf.eq(part.zero), special.zero.eq(part.inf)]
        with m.If(op.sin2pi):
            m.d.comb += special.zero.eq(part.field >= 150)
        self._operation = register(m, op, "operation_1")
        self._special = register(m, special, "special_1")
        self._sign = register(m, part.sign, "sign_1")
        self._shifted = register(m, shifted[:38], "shifted_1")
        self._lost = register(m, lost, "lost_1")
        self._significand = register(m, part.significand, "significand_1")
        self._field = register(m, part.field, "field_1")
        self._exponent = register(m, exponent, "exponent_1")

    def _locate(self, m: Module) -> tuple[Value, Value, Value, data.View]:
        """(row, D, factor, ending), the second cycle."""
        op, shifted, sign = self._operation, self._shifted, self._sign
        significand, exponent = shifted[:24], self._exponent
        upper, quarter = Signal(), shifted[28:30]
        # log2: a significand of 1.5 or more counts as 0.75 or more, with the next exponent.
        m.d.comb += upper.eq(op.log2 & significand[22])
        number = self._negated(m, upper, op.sin2pi & quarter[0])

        row, d, factor = Signal(10), Signal(_D_BITS), Signal(24)
        room = Signal(ROOM_BITS)
        ending, flip = Signal(_Ending(), name="ending"), Signal()
        whole = Signal(signed(9))
        m.d.comb += [factor.eq(1), flip.eq(0)]
        with m.If(op.recip):
            m.d.comb += [
                row.eq(FUNCTIONS["recip"][0] + significand[15:23]), d.eq(significand[:15] << 8),
                room.eq(157 - exponent), flip.eq(sign),
            ]  # fmt: skip
        with m.If(op.rsqrt):
            m.d.comb += [
                row.eq(FUNCTIONS["rsqrt"][0] + Cat(significand[16:23], exponent[0])),
                d.eq(significand[:16] << 7), room.eq(157 - (exponent >> 1)),
            ]  # fmt: skip
        with m.If(op.exp2):
            m.d.comb += [
                row.eq(FUNCTIONS["exp2"][0] + number[23:30]), d.eq(number[:23]),
                room.eq(157 + number[30:].as_signed()),
            ]  # fmt: skip
        with m.If(op.log2):
            # z = T + 2^22; T = significand - 2^24, or 2 * (significand - 2^23).
            lower = Cat(Const(0, 1), significand[:22])
            z = Mux(upper, significand[:22], lower + (1 << 22))
            m.d.comb += [
                row.eq(FUNCTIONS["log2"][0] + z[16:24]), d.eq(z[:16] << 7), room.eq(133),
                factor.eq(Mux(upper, number[:23], lower)),
                whole.eq(exponent + upper),
                flip.eq((whole < 0) | ((whole == 0) & upper)),
            ]  # fmt: skip
        with m.If(op.sin2pi):
            # number: the fraction folded to 0..1/4, in 2^-30; 1/4 itself takes the last position.
            z, large = number[:28] | number[28].replicate(28), self._field >= 125
            m.d.comb += [
                row.eq(FUNCTIONS["sin2pi"][0] + z[21:]), d.eq(z[:21] << 2),
                factor.eq(Mux(large, number[5:29], self._significand)),
                room.eq(Mux(large, 132, self._field + 7)),
                flip.eq(sign ^ (quarter[1] & (quarter[0] | shifted[:28].any()))),
            ]  # fmt: skip
        special = self._special
        m.d.comb += [
            ending.eq(special), ending.room.eq(room),
            ending.whole.eq(Mux(whole < 0, -whole, whole)),
            ending.subtract.eq((flip & op.log2) ^ upper),
            ending.sign.eq(Mux(special.inf | special.zero, special.sign, flip)),
        ]  # fmt: skip
        return row, d, factor, ending

    def _negated(self, m: Module, upper: Value, odd: Value) -> Value:
        """One negator for three: floor(-|x|) of exp2, 1/4 - f of sin2pi in odd quarter turns,
        2^24 - significand of log2; else what was shifted. Scaled by 2^30, 2^30, 1."""
        op, shifted = self._operation, self._shifted
        below = op.exp2 & self._sign
        number = Signal(39)
        given = Cat(
            shifted[:22], shifted[22:28] & (~op.log2).replicate(6),
            shifted[28:] & op.exp2.replicate(10), Const(0, 1),
        )  # fmt: skip
        inverted = Cat(
            (below | odd | upper).replicate(22), (below | odd).replicate(6), below.replicate(11)
        )
        m.d.comb += number.eq((given ^ inverted) + ((below & ~self._lost) | odd | upper))
        return number

    def _coefficients(self, m: Module, row: Value) -> tuple[Value, Value, Value]:
        """C0, C1, C2 of the row that was given a cycle ago."""
        m.submodules.rom = rom = Memory(
            shape=_C0_BITS + _C1_BITS + _C2_BITS, depth=_ROM_ROWS, init=_rom()
        )
        port = rom.read_port()
        m.d.comb += port.addr.eq(row)
        c1 = port.data[_C0_BITS : _C0_BITS + _C1_BITS]
        return port.data[:_C0_BITS], c1.as_signed(), port.data[_C0_BITS + _C1_BITS :].as_signed()
