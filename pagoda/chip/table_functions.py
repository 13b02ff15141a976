"""exp2, log2, recip, rsqrt, sin2pi: one pipeline that takes a lane a cycle.

Every function reduces its argument to a table row and a position D in the row's segment (scaled to
23 bits, whatever the function's w), forms the quadratic y, and rounds factor * y (+ E * 2^54) once;
`pagoda.isa.tables` defines them, and its coefficients are the ROM. A cycle each:

    unpack, count zeros; shift: fixed point with 30 fraction bits (exp2, sin2pi), or normalise
    negate what is negative or in an odd quarter turn: row, D, factor; read the ROM
    partial products C2 * D; |slope| = |C1 + C2 * D|
    partial products |slope| * D; their sum; y = C0 +- sum
    partial products factor * y; two sums of them and E * 2^54 (log2); the sum of these
    count zeros; shift; round

Signs of the coefficients depend on the function alone, so the products are of magnitudes. An 18-bit
multiplier takes the upper 18 bits of D or the lower ones of factor; gates do the other 5 or 6, so
that a unit has 5 multipliers.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import (
    ROOM_BITS,
    Flow,
    leading_zeros,
    limit_lines,
    normalised,
    places_up,
    register,
    rounded,
    shift_down,
    special_lane,
    unpack,
)
from pagoda.isa import tables
from pagoda.isa.functions import FUNCTION_CODES

COST = 2
LATENCY = 16
UNIT_LATENCY = LATENCY - 2
"""Cycles from a lane's operands to the one at whose end its result comes; a lane waits."""
SUM_BITS = 62
"""Width of the frame: log2's |S| < 2^62. Its room is that of an exponent e plus 187."""

FUNCTIONS = {  # function: (first row in the ROM, table)
    "recip": (0, tables.RECIPROCAL_TABLE),
    "rsqrt": (256, tables.RSQRT_TABLE),
    "log2": (512, tables.LOG2_TABLE),
    "exp2": (768, tables.EXP2_TABLE),
    "sin2pi": (896, tables.SIN2PI_TABLE),
}
_C2_BITS, _C1_BITS, _C0_BITS, _D_BITS = 18, 25, 33, 23  # of magnitudes
_PORT = 18  # bits of a multiplier
_LOW = _D_BITS - _PORT
_ROM_ROWS = 1024


class Operation(data.StructLayout):
    """One bit is 1, of the function to apply."""

    def __init__(self):
        super().__init__(dict.fromkeys(FUNCTIONS, 1))


def decode(m: Module, code: Value, name: str) -> data.View:
    """The operation of a function code; no bit is 1 for other functions."""
    operation = Signal(Operation(), name=name)
    m.d.comb += [operation[f].eq(code == FUNCTION_CODES[f]) for f in FUNCTIONS]
    return operation


def _rom() -> list[int]:
    """Magnitudes: C2 is below 0 only in sin2pi, C1 in all but exp2. Where only C1 is, |slope| is
    |C1| less the floor of a product: one more is kept here, `_slope` subtracts the rest."""
    words = [0] * _ROM_ROWS
    for function, (first, table) in FUNCTIONS.items():
        signs = {"exp2": (1, 1), "sin2pi": (-1, -1)}.get(function, (-1, 1))
        more = int(signs == (-1, 1))
        for row, (c0, c1, c2) in enumerate(table.tolist()):
            word = 0
            for value, bits in (
                (signs[1] * c2, _C2_BITS), (signs[0] * c1 + more, _C1_BITS), (c0, _C0_BITS)
            ):  # fmt: skip
                if not 0 <= value < 1 << bits:
                    raise ValueError(f"{function}, row {row}: {c0}, {c1}, {c2} do not fit the ROM")
                word = word << bits | value
            words[first + row] = word
    return words


class _Ending(data.StructLayout):
    """What becomes of factor * y, or the result that needs no table."""

    def __init__(self):
        super().__init__({
            "room": ROOM_BITS, "whole": 8, "subtract": 1,  # |S| = whole * 2^54 +- factor * y
            "sign": 1, "nan": 1, "inf": 1, "zero": 1,
        })  # fmt: skip


class TableUnit(wiring.Component):
    """One lane a cycle; `result` comes UNIT_LATENCY cycles after `x`, at the end of its cycle."""

    operation: In(Operation())
    x: In(32)
    result: Out(32)

    def elaborate(self, platform):
        m = Module()
        self._reduce(m)
        flow = Flow(m)
        row, d, factor, ending = self._locate(m)
        op = self._operation
        falls = Signal()  # C1 is below 0, C2 is not
        m.d.comb += falls.eq(op.recip | op.rsqrt | op.log2)
        flow.add(d=d, factor=factor, ending=ending, falls=falls, rises=op.exp2, bends=op.sin2pi)
        flow.step()

        c0, c1, c2 = self._coefficients(m, row)
        flow.add(c0=c0, c1=c1, c2=c2)
        flow.step()

        low, last = self._gate_products(m, flow.c2, flow.d, "bend")
        flow.add(high=flow.c2 * flow.d[_LOW:], low=low, last=last)
        flow.step("c2")
        flow.add(slope=self._slope(m, flow))
        flow.step("c1", "high", "low", "last", "falls", "bends")

        low, last = self._gate_products(m, flow.slope, flow.d, "rise")
        flow.add(
            high=flow.slope[:_PORT] * flow.d[_LOW:], top=flow.slope[_PORT:] * flow.d[_LOW:],
            low=low, last=last,
        )  # fmt: skip
        flow.step("slope", "d")
        rise = Signal(_C1_BITS + _D_BITS)
        m.d.comb += rise.eq(
            (flow.high + (flow.top << _PORT) << _LOW) + (flow.low + (flow.last << _LOW - 1))
        )
        flow.add(rise=rise)
        flow.step("high", "top", "low", "last")
        # The floor of -rise is the complement of its ceiling, so one less unless rise is whole.
        y, falls, whole = Signal(_C0_BITS), ~flow.rises, flow.rise[_D_BITS:]
        m.d.comb += y.eq(
            flow.c0 + (whole ^ falls.replicate(_C0_BITS)) + (falls & ~flow.rise[:_D_BITS].any())
        )
        flow.add(y=y)
        flow.step("c0", "rise", "rises")

        self._multiply(m, flow)
        flow.add(lines=limit_lines(flow.ending.room, SUM_BITS))
        flow.step("low", "high")

        flow.add(places=places_up(m, flow.frame, flow.lines, "normal"))
        flow.step("lines")
        flow.add(normal=normalised(m, flow.frame, flow.places, flow.ending.room, "normal"))
        flow.step("frame", "places")

        ending = flow.ending
        special = ending.nan | ending.inf | ending.zero
        other = special_lane(ending.nan, ending.inf, ending.sign) & special.replicate(32)
        m.d.comb += self.result.eq(
            rounded(m, flow.normal, ending.sign, Const(1), ~special, other, "pattern")
        )
        return m

    @staticmethod
    def _gate_products(m: Module, value: Value, d: Value, name: str) -> tuple[Value, Value]:
        """`value` times the low bits of D: (by the first four, by the last)."""
        rows = [
            (value & d[i].replicate(len(value))) << i if i else value & d[i].replicate(len(value))
            for i in range(_LOW)
        ]
        pairs = [Signal(len(value) + 2, name=f"{name}_pair_{i}") for i in (0, 1)]
        m.d.comb += [
            pairs[0].eq(rows[0] + rows[1]),
            pairs[1].eq((rows[2] + rows[3]) >> 2),
        ]
        low = Signal(len(value) + 4, name=f"{name}_low")
        m.d.comb += low.eq(pairs[0] + (pairs[1] << 2))
        return low, value & d[_LOW - 1].replicate(len(value))

    @staticmethod
    def _slope(m: Module, flow: Flow) -> Value:
        """|C1 + floor(C2 * D / 2^23)|: both summands above 0, both below, or |C1| the greater."""
        width = _C1_BITS + _D_BITS
        total, low, high = Signal(width), Signal(width), Signal(width)
        minus = flow.falls.replicate(width)
        # Below 0, the floor is one of a magnitude that is rounded up: 2^23 - 1 more. A complement
        # lacks 1: of the three ones that |C1| less two of them needs, the ROM has 2^23.
        ones = Cat(flow.falls | flow.bends, flow.bends.replicate(_D_BITS - 1))
        m.d.comb += [
            low.eq(flow.low + (flow.last << _LOW - 1)),
            high.eq(flow.high << _LOW),
            total.eq((Cat(ones, flow.c1) + (high ^ minus)) + (low ^ minus)),
        ]
        return total[_D_BITS:]

    @staticmethod
    def _multiply(m: Module, flow: Flow) -> None:
        """Add `frame`, whole * 2^54 +- factor * y, three cycles later."""
        factor, y = flow.factor, flow.y
        pairs = []
        for i in range(_PORT, 24, 2):
            pair = Signal(_C0_BITS + 2, name=f"pair_{i}")
            m.d.comb += pair.eq(
                (y & factor[i].replicate(_C0_BITS))
                + ((y & factor[i + 1].replicate(_C0_BITS)) << 1)
            )
            pairs.append(pair)
        flow.add(
            lower=factor[:_PORT] * y[:_PORT], upper=factor[:_PORT] * y[_PORT:], pairs=Cat(pairs)
        )
        flow.step("factor", "y")
        pairs = [flow.pairs.word_select(i, _C0_BITS + 2) for i in range(3)]
        high, low = Signal(SUM_BITS - _PORT), Signal(SUM_BITS)
        ending = flow.ending
        m.d.comb += [
            high.eq((pairs[0] + (pairs[1] << 2)) + ((pairs[2] << 4) + flow.upper)),
            # Two complements lack a one each, one of them where `high` begins.
            low.eq(
                Cat(
                    ending.subtract, Const(0, _PORT - 1), ending.subtract,
                    Const(0, 53 - _PORT), ending.whole,
                )
                + (flow.lower ^ ending.subtract.replicate(SUM_BITS))
            ),
        ]  # fmt: skip
        flow.add(high=high, low=low)
        flow.step("lower", "upper", "pairs")
        frame, minus = Signal(SUM_BITS), flow.ending.subtract.replicate(SUM_BITS - _PORT)
        m.d.comb += frame.eq(Cat(flow.low[:_PORT], flow.low[_PORT:] + (flow.high ^ minus)))
        flow.add(frame=frame)

    def _reduce(self, m: Module) -> None:
        """Unpack, and shift: the first two cycles."""
        op = self.operation
        part, special = unpack(m, self.x, "parts"), Signal(_Ending(), name="special")
        zeros, right = leading_zeros(m, part.significand, "zeros"), Signal(8)
        # significand << 31 >> right: x * 2^30 as the significand's last bit weighs
        # 2^(field - 150), or the significand moved until bit 23 is set.
        m.d.comb += right.eq(Mux(op.exp2 | op.sin2pi, 151 - part.field, ~zeros))
        negative = part.sign & ~part.zero
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
        flow = Flow(m)
        flow.add(
            first_op=op, first_special=special, sign=part.sign, field=part.field, zeros=zeros,
            significand=part.significand, right=right,
        )  # fmt: skip
        flow.step()

        op = flow.first_op
        amount = flow.right[:6] | flow.right[6:].any().replicate(6)
        shifted, lost = shift_down(m, flow.significand, amount, 24 + 31, "reduce")
        exponent, upper, odd = Signal(signed(9)), Signal(), Signal()
        m.d.comb += [
            exponent.eq(flow.field - 127 - flow.zeros),
            # log2: a significand of 1.5 or more counts as 0.75 or more, with the next exponent.
            upper.eq(op.log2 & shifted[22]),
            odd.eq(op.sin2pi & shifted[28]),
        ]
        self._operation = register(m, op, "operation_2")
        self._special = register(m, flow.first_special, "special_2")
        self._sign = register(m, flow.sign, "sign_2")
        self._shifted = register(m, shifted[:38], "shifted_2")
        self._lost = register(m, lost, "lost_2")
        self._significand = register(m, flow.significand, "significand_2")
        self._field = register(m, flow.field, "field_2")
        self._exponent = register(m, exponent, "exponent_2")
        self._upper = register(m, upper, "upper_2")
        self._odd = register(m, odd, "odd_2")

    def _locate(self, m: Module) -> tuple[Value, Value, Value, data.View]:
        """(row, D, factor, ending), the third cycle."""
        op, shifted, sign = self._operation, self._shifted, self._sign
        significand, exponent = shifted[:24], self._exponent
        upper, quarter = self._upper, shifted[28:30]
        number = self._negated(m, upper, self._odd)

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
        return port.data[:_C0_BITS], c1, port.data[_C0_BITS + _C1_BITS :]
