"""Division and square root: fdiv, frdiv, fsqrt, idiv, imod, by one array for up to eight lanes.

The array takes one lane a cycle and makes two bits of the result in each stage, without restoring:
a remainder R below 0 has the divisor added in the next row instead of subtracted, and bit i of the
result is 1 if R is not below 0. Row i of 26 (i = 0 has weight 1 in a float's result):

    quotient      R = 2 R + next bit -+ D
    square root   R = 2 R - (2 Q + 2^-i), or 2 R + (2 Q + 3 * 2^-i),    Q: the bits so far

The square root keeps 2 Q in D, where bit 26 - i of D is bit i of Q, so that a row adds two bits.
Integers have 32 bits: their first 6, small remainders all, are worked out in the stage before.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import (
    INFINITY,
    NAN,
    ROOM_BITS,
    Flow,
    leading_zeros,
    register,
    round_even,
    shift_right,
    unpack,
)
from pagoda.isa.functions import FUNCTION_CODES

COST = 8
UNIT_LATENCY = 17
"""Cycles of one lane: operands, 6 bits of an integer, 13 stages of two rows, two to end."""
_ROWS, _HEAD, _TABLE_BITS = 26, 6, 3
_R_BITS = 33


class DivideOperation(data.StructLayout):
    """What to do with x and y; without a bit: x / y as floats."""

    def __init__(self):
        super().__init__({"reverse": 1, "root": 1, "integer": 1, "modulo": 1})


FUNCTIONS: dict[str, tuple[str, ...]] = {
    "fdiv": (),
    "frdiv": ("reverse",),
    "fsqrt": ("root",),
    "idiv": ("integer",),
    "imod": ("integer", "modulo"),
}
"""Of an operation, by function: the bits that are 1."""


def decode(m: Module, code: Value, name: str) -> data.View:
    operation = Signal(DivideOperation(), name=name)
    with m.Switch(code):
        for function, fields in FUNCTIONS.items():
            with m.Case(FUNCTION_CODES[function]):
                m.d.comb += [operation[field].eq(1) for field in fields]
    return operation


class _State(data.StructLayout):
    """What one lane takes along through the array."""

    def __init__(self):
        super().__init__({
            "remainder": _R_BITS,  # two's complement
            "divisor": 32,
            "bits": 32,  # dividend bits to come above, result bits below
            "root": 1, "integer": 1, "modulo": 1,
            "sign": 1,  # of the result; integers: the signs of x and y differ
            "y_sign": 1, "y_zero": 1,
            "room": signed(ROOM_BITS + 1),  # field of a result 1.xxx; below 1: it is subnormal
            "right": 5,  # by how many bits it goes right then
            "nan": 1, "inf": 1, "zero": 1,
        })  # fmt: skip


class Divider(wiring.Component):
    """One lane a cycle; `result` is valid UNIT_LATENCY cycles after `x` and `y`."""

    def __init__(self):
        super().__init__({
            "operation": In(DivideOperation()), "x": In(32), "y": In(32), "result": Out(32),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        state = self._start(m)
        state = self._head(m, state)
        for row in range(0, _ROWS, 2):
            state = self._stage(m, state, row)
        self._finish(m, state)
        return m

    def _start(self, m: Module) -> data.View:
        """Cycle 0: magnitudes, normalised if floats; specials."""
        op = self.operation
        x, y = Signal(32), Signal(32)
        m.d.comb += [
            x.eq(Mux(op.reverse, self.y, self.x)), y.eq(Mux(op.reverse, self.x, self.y)),
        ]  # fmt: skip
        ux, uy = unpack(m, x, "x_parts"), unpack(m, y, "y_parts")
        x_top, x_field = self._normalised(m, ux, "x")
        y_top, y_field = self._normalised(m, uy, "y")
        integers = []
        for name, value in (("x", x), ("y", y)):
            magnitude = Signal(32, name=f"{name}_magnitude")
            m.d.comb += magnitude.eq((value ^ value[31].replicate(32)) + value[31])
            integers.append(magnitude)
        state = Signal(_State(), name="start")
        m.d.comb += [
            state.root.eq(op.root), state.integer.eq(op.integer), state.modulo.eq(op.modulo),
            state.y_sign.eq(y[31]), state.y_zero.eq(y == 0),
            state.sign.eq(x[31] ^ (y[31] & ~op.root)),
        ]  # fmt: skip
        with m.If(op.integer):
            m.d.comb += [state.bits.eq(integers[0]), state.divisor.eq(integers[1])]
        with m.Elif(op.root):
            # x = x_top * 2^-23 * 2^(x_field - 127), in units of 2^-25, halved for row 0's doubling.
            odd = ~x_field[0]
            m.d.comb += [
                state.remainder.eq(Mux(odd, x_top << 2, x_top << 1)),
                state.room.eq((x_field + 127 - odd) >> 1),
                state.nan.eq(ux.nan | (ux.sign & ~ux.zero)),
                state.inf.eq(ux.inf), state.zero.eq(ux.zero),
            ]  # fmt: skip
        with m.Else():
            m.d.comb += [
                state.remainder.eq(x_top), state.divisor.eq(y_top << 1),
                state.room.eq(x_field - y_field + 127),
                state.nan.eq(ux.nan | uy.nan | (ux.inf & uy.inf) | (ux.zero & uy.zero)),
                state.inf.eq(ux.inf | uy.zero), state.zero.eq(ux.zero | uy.inf),
            ]  # fmt: skip
        return register(m, state, "state_1")

    @staticmethod
    def _normalised(m: Module, part: data.View, name: str) -> tuple[Value, Value]:
        """(significand with bit 23 set, field lowered as much as it was shifted)."""
        zeros = leading_zeros(m, part.significand, f"{name}_zeros")
        top, field = Signal(24, name=f"{name}_top"), Signal(signed(10), name=f"{name}_field")
        m.d.comb += [top.eq(part.significand << zeros), field.eq(part.field - zeros)]
        return top, field

    def _head(self, m: Module, state: data.View) -> data.View:
        """Cycle 1: the first 6 bits of an integer quotient, with restoring."""
        after, large = Signal(_State(), name="head"), Signal()
        m.d.comb += large.eq(state.divisor[_HEAD:].any())
        quotient, remainder = self._first_bits(m, state, large)
        low = state.divisor[:_HEAD]
        for row in range(_TABLE_BITS, _HEAD):
            partial = Signal(row + 1, name=f"head_partial_{row}")
            fits = Signal(name=f"head_fits_{row}")
            rest = Signal(row + 1, name=f"head_rest_{row}")
            m.d.comb += [
                partial.eq(Cat(state.bits[31 - row], remainder)),
                fits.eq(~large & (partial >= low)),
                rest.eq(Mux(fits, partial - low, partial)),
            ]
            remainder, quotient = rest, Cat(fits, quotient)
        depth = Signal(ROOM_BITS + 1)
        m.d.comb += [after.eq(state), depth.eq(1 - state.room)]
        with m.If(state.room < 1):
            m.d.comb += after.right.eq(depth[:5] | depth[5:].any().replicate(5))
        with m.If(state.integer):
            m.d.comb += [
                after.remainder.eq(remainder),
                after.bits.eq(Cat(quotient, state.bits[: 32 - _HEAD])),
            ]
        return register(m, after, "state_2")

    @staticmethod
    def _first_bits(m: Module, state: data.View, large: Value) -> tuple[Value, Value]:
        """(quotient, remainder) of the first 3 bits of the dividend, as a table."""
        top, low = state.bits[32 - _TABLE_BITS :], state.divisor[:_TABLE_BITS]
        quotient, remainder = Signal(_TABLE_BITS), Signal(_TABLE_BITS)
        small = ~(large | state.divisor[_TABLE_BITS:_HEAD].any())
        m.d.comb += remainder.eq(top)
        with m.If(small), m.Switch(Cat(low, top)):
            for dividend in range(1 << _TABLE_BITS):
                for divisor in range(1 << _TABLE_BITS):
                    with m.Case(dividend << _TABLE_BITS | divisor):
                        # By 0 every bit is 1, and nothing is subtracted.
                        by = divisor or 1
                        m.d.comb += [
                            quotient.eq(dividend // by if divisor else -1),
                            remainder.eq(dividend % by if divisor else dividend),
                        ]
        return quotient, remainder

    def _stage(self, m: Module, state: data.View, row: int) -> data.View:
        after = Signal(_State(), name=f"rows_{row}")
        remainder, divisor, bits = state.remainder, state.divisor, state.bits
        for i in (row, row + 1):
            below, total = Signal(name=f"below_{i}"), Signal(_R_BITS, name=f"total_{i}")
            term, positive = Signal(_R_BITS, name=f"term_{i}"), ~total[_R_BITS - 1]
            m.d.comb += [
                below.eq(remainder[_R_BITS - 1]),
                term.eq(self._with_root(divisor, i, state.root, state.root & below)),
                total.eq(
                    Cat(bits[31], remainder) + (term ^ (~below).replicate(_R_BITS)) + ~below
                ),
            ]
            divisor = self._with_root(divisor, i, 0, state.root & positive)
            remainder, bits = total, Cat(positive, bits[:31])
        m.d.comb += [
            after.eq(state), after.remainder.eq(remainder), after.divisor.eq(divisor),
            after.bits.eq(bits),
        ]  # fmt: skip
        return register(m, after, f"state_{row}")

    @staticmethod
    def _with_root(divisor: Value, i: int, low: Value | int, high: Value) -> Value:
        """`divisor` with 2^-i (low) and 2 * 2^-i (high) or-ed in; 1 is bit 25."""
        added = Cat(Const(0, 25 - i), Const(low, 1) if isinstance(low, int) else low, high)
        return divisor | added

    def _finish(self, m: Module, state: data.View) -> None:
        # Next to last cycle: the true remainder; the quotient at its place for rounding.
        below = state.remainder[_R_BITS - 1]
        remainder = Signal(_R_BITS)
        m.d.comb += remainder.eq(
            state.remainder + ((state.divisor | state.root) & below.replicate(_R_BITS))
        )
        tiny, field, one = Signal(), Signal(ROOM_BITS), state.bits[_ROWS - 1]
        m.d.comb += [
            tiny.eq(state.right.any()),
            field.eq(Mux(tiny | ((state.room == 1) & ~one), 0, state.room - ~one)),
        ]
        # A result below 1 moves up by one place, unless it becomes subnormal thereby.
        up = ~one & ~tiny & (state.room != 1)
        quotient = Mux(up, state.bits[: _ROWS - 1] << 1, state.bits[:_ROWS])
        moved, lost = shift_right(m, quotient[:_ROWS], state.right, "denormal")
        flow = Flow(m)
        flow.add(state=state, remainder=remainder, field=field, moved=moved, lost=lost)
        flow.step()

        # Last cycle: round; or give an integer its sign and round it down.
        exact, moved, state = Signal(), flow.moved, flow.state
        m.d.comb += exact.eq(flow.remainder == 0)
        pattern = round_even(
            m, moved[2:25], flow.field, moved[1], moved[0] | flow.lost | ~exact, state.sign,
            "pattern",
        )  # fmt: skip
        result, whole = Signal(32), self._integer(m, state, flow.remainder, exact)
        with m.If(state.integer):
            m.d.comb += result.eq(whole)
        with m.Elif(state.nan):
            m.d.comb += result.eq(NAN)
        with m.Elif(state.inf):
            m.d.comb += result.eq(Cat(Const(INFINITY, 31), state.sign))
        with m.Elif(state.zero):
            m.d.comb += result.eq(Cat(Const(0, 31), state.sign))
        with m.Else():
            m.d.comb += result.eq(pattern)
        m.d.comb += self.result.eq(register(m, result, "result_last"))

    @staticmethod
    def _integer(m: Module, state: data.View, remainder: Value, exact: Value) -> Value:
        """floor(x / y): -q - (r != 0) if the signs differ; x - y * floor(x / y) has y's sign.

        By 0 the rows give r = |x|, and so the right x mod 0.
        """
        differ = state.sign
        quotient, modulo = Signal(32), Signal(32)
        negate = Signal()
        m.d.comb += [
            quotient.eq((state.bits ^ differ.replicate(32)) + (differ & exact)),
            negate.eq(differ ^ state.y_sign),
            modulo.eq(
                (remainder[:32] ^ negate.replicate(32))
                + ((state.divisor ^ (~negate).replicate(32)) & (differ & ~exact).replicate(32))
                + Mux(differ & ~exact, 1, negate)
            ),
        ]
        return Mux(state.modulo, modulo, quotient | state.y_zero.replicate(32))
