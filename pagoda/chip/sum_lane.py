"""One addition of an accumulating store: an element in DRAM plus an element of the tile.

binary32 as in the manual, "Numbers": round to nearest even, gradual underflow, a NaN result is
`CANONICAL_NAN`. int32 wraps. The depth is a parameter because rows that add to the same element
one after another leave only as many cycles as their DRAM slots do.
"""

from types import SimpleNamespace

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.isa.numbers import CANONICAL_NAN

STEPS = 5  # swap, align, add, normalise, round
_GUARD = 3  # bits below the last place: guard, round, sticky
_WIDTH = 24 + _GUARD


class SumLane(wiring.Component):
    """`total` is old + added of `stages - 1` cycles before; `integer` chooses int32."""

    old: In(32)
    added: In(32)
    integer: In(1)
    total: Out(32)

    def __init__(self, stages: int):
        if not 1 <= stages <= STEPS:
            raise ValueError(f"SumLane: {stages} stages: must be 1 to {STEPS}")
        self.stages = stages
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        old, added = self.old, self.added

        # Swap: the greater magnitude first. Subnormals have the exponent of the least normals.
        swap = Signal()
        m.d.comb += swap.eq(old[:31] < added[:31])
        large, small = Mux(swap, added, old), Mux(swap, old, added)
        opposite = old[31] ^ added[31]
        two_infinities = large[23:31].all() & small[23:31].all()
        # Steps hand on what does not depend on the sum: an int32 total or the pattern of a NaN or
        # infinity that is the result (`settled`), and the sign a zero would have.
        nan = _is_nan(old) | _is_nan(added) | (two_infinities & opposite)
        constant = Mux(nan, C(CANONICAL_NAN, 32), Cat(C(0x7F800000, 31), large[31]))
        now = self._step(
            m, 0,
            settled=self.integer | large[23:31].all(),
            pattern=Mux(self.integer, (old + added)[:32], constant),
            sign=large[31], zero_sign=old[31] & added[31], subtract=opposite,
            exponent=_exponent(large), distance=(_exponent(large) - _exponent(small))[:8],
            large=_significand(large), small=_significand(small),
        )  # fmt: skip
        kept = dict(settled=now.settled, pattern=now.pattern, sign=now.sign)

        # Align: what falls off the small one's end only makes the last bit sticky.
        shifted = Signal(32 + _WIDTH)
        m.d.comb += shifted.eq(Cat(C(0, 32 + _GUARD), now.small) >> now.distance[:5])
        aligned = Cat(shifted[:33].any(), shifted[33:])
        gone = Cat(now.small.any(), C(0, _WIDTH - 1))
        now = self._step(
            m, 1, **kept, zero_sign=now.zero_sign, subtract=now.subtract, exponent=now.exponent,
            large=Cat(C(0, _GUARD), now.large), small=Mux(now.distance[5:].any(), gone, aligned),
        )  # fmt: skip
        kept = dict(settled=now.settled, pattern=now.pattern, sign=now.sign)

        # Add: the sum is never negative, since the large one is first.
        total = Signal(_WIDTH + 1)
        m.d.comb += total.eq(now.large + Mux(now.subtract, ~now.small, now.small) + now.subtract)
        with m.If(now.subtract):  # the carry of the two's complement
            m.d.comb += total[-1].eq(0)
        now = self._step(m, 2, **kept, zero_sign=now.zero_sign, exponent=now.exponent, total=total)

        # Normalise: to the left only as far as the least exponent permits.
        leading, places = Signal(5), Signal(5)
        for bit in range(_WIDTH):
            with m.If(now.total[bit]):
                m.d.comb += leading.eq(_WIDTH - 1 - bit)
        down = now.exponent - 1
        m.d.comb += places.eq(Mux(down < leading, down[:5], leading))
        left = (now.total[:_WIDTH] << places)[:_WIDTH]
        right = Cat(now.total[0] | now.total[1], now.total[2:])
        zero = ~now.total.any()
        now = self._step(
            m, 3, settled=now.settled, pattern=now.pattern,
            sign=Mux(zero, now.zero_sign, now.sign),
            exponent=Mux(now.total[-1], now.exponent + 1, now.exponent - places)[:8],
            total=Mux(now.total[-1], right, left),
        )  # fmt: skip

        # Round: a carry out of the fraction rightly enters the exponent, up to infinity.
        significand = now.total[_GUARD:]
        up = now.total[2] & (now.total[:2].any() | significand[0])
        exponent = Mux(significand[23], now.exponent, 0)
        fraction = Mux(now.exponent.all(), 0, significand[:23])
        rounded = Cat(fraction, exponent) + (up & ~now.exponent.all())
        m.d.comb += self.total.eq(Mux(now.settled, now.pattern, Cat(rounded[:31], now.sign)))
        return m

    def _step(self, m: Module, step: int, **values: Value) -> SimpleNamespace:
        """The values behind a step, through registers where the depth asks for them."""
        registered = (step + 1) * self.stages // STEPS > step * self.stages // STEPS
        domain = m.d.sync if registered else m.d.comb
        behind = {}
        for name, value in values.items():
            behind[name] = Signal(len(Value.cast(value)), name=f"{name}_{step}")
            domain += behind[name].eq(value)
        return SimpleNamespace(**behind)


def _exponent(word: Value) -> Value:
    return Cat(word[23] | ~word[23:31].any(), word[24:31])


def _significand(word: Value) -> Value:
    return Cat(word[:23], word[23:31].any())


def _is_nan(word: Value) -> Value:
    return word[23:31].all() & word[:23].any()
