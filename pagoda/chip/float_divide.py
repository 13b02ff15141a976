"""Division and square root: fdiv, frdiv, fsqrt, idiv, imod, by one array for up to eight lanes.

The array takes one lane a cycle and makes two bits of the result in each stage, without restoring:
a remainder R below 0 has the divisor added in the next row instead of subtracted, and bit i of the
result is 1 if R is not below 0. Row i of 26 (i = 0 has weight 1 in a float's result):

    quotient      R = 2 R + next bit -+ D
    square root   R = 2 R - (2 Q + 2^-i), or 2 R + (2 Q + 3 * 2^-i),    Q: the bits so far

The square root keeps 2 Q in D, where bit 26 - i of D is bit i of Q, so that a row adds two bits.
Integers have 32 bits: the first 6, of small remainders all, are worked out before the rows.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import (
    ROOM_BITS,
    Flow,
    leading_zeros,
    operation_of,
    register,
    round_even,
    shift_right,
    special_lane,
    unpack,
)

COST = 8
LATENCY = 28
UNIT_LATENCY = LATENCY - COST - 1
"""Cycles from a lane's operands to the one at whose end its result comes: four to begin, 13 stages
of two rows, three to end. It waits until the eighth lane has had its turn."""
_ROWS, _HEAD, _TABLE_BITS = 26, 6, 3
_R_BITS = 33


class Operation(data.StructLayout):
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
    return operation_of(m, code, Operation(), FUNCTIONS, name)


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
    """One lane a cycle; `result` comes UNIT_LATENCY cycles after `x` and `y`, at the end of its
    cycle."""

    def __init__(self):
        super().__init__({
            "operation": In(Operation()), "x": In(32), "y": In(32), "result": Out(32),
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
        """Cycles 0 to 2: in order; unpack; magnitudes, normalised if floats, specials, and 4 bits
        of an integer quotient."""
        flow = Flow(m)
        op = self.operation
        flow.add(
            op=op, x=Mux(op.reverse, self.y, self.x), y=Mux(op.reverse, self.x, self.y)
        )  # fmt: skip
        flow.step()

        x, y = flow.x, flow.y
        ux, uy = unpack(m, x, "x_parts"), unpack(m, y, "y_parts")
        flow.add(
            ux=ux, uy=uy, x_zeros=leading_zeros(m, ux.significand, "x_zeros"),
            y_zeros=leading_zeros(m, uy.significand, "y_zeros"),
            x_magnitude=(x ^ x[31].replicate(32)) + x[31],
            y_magnitude=(y ^ y[31].replicate(32)) + y[31],
        )  # fmt: skip
        flow.step()

        op, x, y, ux, uy = flow.op, flow.x, flow.y, flow.ux, flow.uy
        x_top, y_top = Signal(24), Signal(24)
        x_field, y_field = Signal(signed(10)), Signal(signed(10))
        m.d.comb += [
            x_top.eq(ux.significand << flow.x_zeros), x_field.eq(ux.field - flow.x_zeros),
            y_top.eq(uy.significand << flow.y_zeros), y_field.eq(uy.field - flow.y_zeros),
        ]  # fmt: skip
        state = Signal(_State(), name="start")
        m.d.comb += [
            state.root.eq(op.root), state.integer.eq(op.integer), state.modulo.eq(op.modulo),
            state.y_sign.eq(y[31]), state.y_zero.eq(y == 0),
            state.sign.eq(x[31] ^ (y[31] & ~op.root)),
        ]  # fmt: skip
        with m.If(op.integer):
            dividend, divisor = flow.x_magnitude[:32], flow.y_magnitude[:32]
            quotient, remainder = self._first_bits(m, dividend, divisor)
            bits = Cat(quotient, dividend[:-_TABLE_BITS])
            one_row = range(_TABLE_BITS, _TABLE_BITS + 1)
            remainder, bits = self._restoring(m, remainder, bits, divisor, one_row)
            m.d.comb += [
                state.bits.eq(bits), state.divisor.eq(divisor), state.remainder.eq(remainder),
            ]  # fmt: skip
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
        return register(m, state, "state_start")

    @staticmethod
    def _restoring(
        m: Module, remainder: Value, bits: Value, divisor: Value, rows: range
    ) -> tuple[Value, Value]:
        """(remainder, bits) after some of an integer's first rows, with restoring."""
        large, low = Signal(name=f"large_{rows.start}"), divisor[:_HEAD]
        m.d.comb += large.eq(divisor[_HEAD:].any())
        for row in rows:
            partial = Signal(row + 1, name=f"head_partial_{row}")
            fits = Signal(name=f"head_fits_{row}")
            rest = Signal(row + 1, name=f"head_rest_{row}")
            m.d.comb += [
                partial.eq(Cat(bits[31], remainder)),
                fits.eq(~large & (partial >= low)),
                rest.eq(Mux(fits, partial - low, partial)),
            ]
            remainder, bits = rest, Cat(fits, bits[:31])
        return remainder, bits

    def _head(self, m: Module, state: data.View) -> data.View:
        """Cycle 3: the last of the first 6 bits of an integer quotient; depth of a subnormal."""
        after = Signal(_State(), name="head")
        first = _TABLE_BITS + 1
        remainder, bits = self._restoring(
            m, state.remainder[:first], state.bits, state.divisor, range(first, _HEAD)
        )
        depth = Signal(ROOM_BITS + 1)
        m.d.comb += [after.eq(state), depth.eq(1 - state.room)]
        with m.If(state.room < 1):
            m.d.comb += after.right.eq(depth[:5] | depth[5:].any().replicate(5))
        with m.If(state.integer):
            m.d.comb += [
                after.remainder.eq(remainder),
                after.bits.eq(bits),
            ]
        return register(m, after, "state_head")

    @staticmethod
    def _first_bits(m: Module, x: Value, y: Value) -> tuple[Value, Value]:
        """(quotient, remainder) of the first 3 bits of x by y, as a table."""
        top, low = x[-_TABLE_BITS:], y[:_TABLE_BITS]
        quotient, remainder = Signal(_TABLE_BITS), Signal(_TABLE_BITS)
        m.d.comb += remainder.eq(top)
        with m.If(~y[_TABLE_BITS:].any()), m.Switch(Cat(low, top)):
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
        # The true remainder; the quotient at its place, but for subnormal results.
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
        quotient = Mux(up, state.bits[: _ROWS - 1] << 1, state.bits[:_ROWS])[:_ROWS]
        flow = Flow(m)
        flow.add(state=state, remainder=remainder, field=field, quotient=quotient)
        flow.step()

        # Subnormal results go right; what is added to round an integer down.
        state, inexact, negate = flow.state, Signal(), Signal()
        moved, lost = shift_right(m, flow.quotient, state.right, "denormal")
        m.d.comb += [
            inexact.eq(flow.remainder.any()),
            negate.eq(state.sign ^ state.y_sign),
        ]
        down = state.sign & inexact
        special = state.nan | state.inf | state.zero
        flow.add(
            moved=moved, sticky=lost | inexact, special=special,
            constant=special_lane(state.nan, state.inf, state.sign) & special.replicate(32),
            whole=state.bits ^ state.sign.replicate(32), whole_carry=state.sign & ~inexact,
            rest=flow.remainder[:32] ^ negate.replicate(32), rest_carry=down | negate,
            addend=(state.divisor ^ (~negate).replicate(32)) & down.replicate(32),
        )  # fmt: skip
        flow.step("remainder", "quotient")

        # Round; or give an integer its sign.
        state, moved, integer = flow.state, flow.moved, Signal(32)
        m.d.comb += integer.eq(self._integer(flow))
        pattern = round_even(
            m, moved[2:25], flow.field, moved[1], moved[0] | flow.sticky, state.sign,
            ~(flow.special | state.integer), flow.constant & (~state.integer).replicate(32),
            "pattern",
        )  # fmt: skip
        m.d.comb += self.result.eq(pattern | (integer & state.integer.replicate(32)))

    @staticmethod
    def _integer(flow: Flow) -> Value:
        """floor(x / y): -q - (r != 0) if the signs differ; x - y * floor(x / y) has y's sign.

        By 0 the rows give r = |x|, and so the right x mod 0.
        """
        quotient = (flow.whole + flow.whole_carry)[:32] | flow.state.y_zero.replicate(32)
        modulo = (flow.rest + flow.addend + flow.rest_carry)[:32]
        return Mux(flow.state.modulo, modulo, quotient)
