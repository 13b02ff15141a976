"""Multiplier and divider of the control core: operands stay put while they work.

Both are slower than they look: the contract gives `mul` 6 and `div` 40 cycles, so every step has
registers of its own and no step is more than one 48-bit addition.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

HALF = 16
DIVISION_STEPS = 32


class Multiplier(wiring.Component):
    """`low` and `high` word of a * b, 3 cycles after the operands; each operand as it is flagged.

    Four products of half words (17 bits with sign) are added in two further steps. The pipeline
    relies on operands that do not change meanwhile.
    """

    a: In(32)
    b: In(32)
    a_signed: In(1)
    b_signed: In(1)
    low: Out(32)
    high: Out(32)

    def elaborate(self, platform) -> Module:
        m = Module()
        a_low, b_low = self.a[:HALF], self.b[:HALF]
        a_high, b_high = Signal(signed(HALF + 1)), Signal(signed(HALF + 1))
        m.d.comb += [
            a_high.eq(Cat(self.a[HALF:], self.a_signed & self.a[-1]).as_signed()),
            b_high.eq(Cat(self.b[HALF:], self.b_signed & self.b[-1]).as_signed()),
        ]
        low, high = Signal(32), Signal(signed(34))
        cross = [Signal(signed(34), name=f"cross_{k}") for k in range(2)]
        middle = Signal(signed(35))
        upper = Signal(48)  # the product without its lowest half word
        m.d.sync += [
            low.eq(a_low * b_low),
            cross[0].eq(a_high * b_low),
            cross[1].eq(a_low * b_high),
            high.eq(a_high * b_high),
            middle.eq(cross[0] + cross[1]),
            upper.eq(Cat(low[HALF:], high[:32]) + middle),
        ]
        m.d.comb += [self.low.eq(Cat(low[:HALF], upper[:HALF])), self.high.eq(upper[HALF:])]
        return m


class Divider(wiring.Component):
    """Quotient or remainder of a / b as RISC-V defines them, `DIVISION_STEPS` + 2 cycles after the
    one with `start`: restoring division of absolute values, one bit a cycle, then the sign.

    By 0 the steps themselves give quotient 2^32 - 1 and remainder |a|; only the quotient's sign
    has to stay out of it.
    """

    start: In(1)
    a: In(32)
    b: In(32)
    is_signed: In(1)
    is_remainder: In(1)
    result: Out(32)

    def elaborate(self, platform) -> Module:
        m = Module()
        quotient, remainder, divisor = Signal(32), Signal(32), Signal(32)
        steps = Signal(range(DIVISION_STEPS + 1))
        negate = Signal()
        difference = Signal(33)
        a_negative, b_negative = self.is_signed & self.a[-1], self.is_signed & self.b[-1]
        shifted = Cat(quotient[-1], remainder)
        m.d.comb += difference.eq(shifted - divisor)
        found = Mux(self.is_remainder, remainder, quotient)
        m.d.sync += self.result.eq(Mux(negate, -found, found))
        with m.If(self.start):
            m.d.sync += [
                quotient.eq(Mux(a_negative, -self.a, self.a)),
                divisor.eq(Mux(b_negative, -self.b, self.b)),
                remainder.eq(0),
                steps.eq(DIVISION_STEPS),
                negate.eq(
                    Mux(self.is_remainder, a_negative, (a_negative ^ b_negative) & self.b.any())
                ),
            ]
        with m.Elif(steps.any()):
            fits = ~difference[-1]
            m.d.sync += [
                quotient.eq(Cat(fits, quotient)),
                remainder.eq(Mux(fits, difference, shifted)),
                steps.eq(steps - 1),
            ]
        return m
