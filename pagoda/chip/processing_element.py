"""One element of the systolic array: psum + a * w, for bf16 (one rounding) and int8 (wrapping).

The array's edge turns operands into a code of the elements' own, so that subnormals are normalised
once and no element looks for zeros. A bf16 code has 17 bits:

    fraction   7   value = +-1.fraction * 2^(exponent - bias); bias 65 + 127 for A, 64 + 127 for B
    exponent   9   its two top bits are 1 for what is no such value: then bit 0 says "no leading
                   one" (zero), bit 1 infinite, both NaN, bit 2 (B) that the operands are int8
    sign       1

An int8 operand is a sign and a magnitude: seven bits of fraction, and 128 is the leading one. On a
chip that has int8 alone the code is the int8 itself.

Elements know no bypass: where k has ended, the edge sends A = +0.0 and B = -0.0, and x + (-0.0) is
x for every x but a NaN that is not canonical; so the edge makes the partial sums' NaNs canonical.
"""

from types import SimpleNamespace

from amaranth.hdl import C, Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import leading_zeros
from pagoda.isa.chip import Chip

CODE_BITS = 17
A_BIAS, B_BIAS = 65, 64
NO_ONE, INFINITE, INTEGER = 1, 2, 4  # bits of an exponent whose two top bits are 1
NOT_FINITE = 0b11 << 7
NAN = 0x7FC00000
PE_MODULE = "pagoda_pe"  # an element as a Verilog module
FLOAT_STAGES = 3  # the fewest of a float element
EARLY_SHIFTS, LATE_SHIFTS = (1, 2), (4, 8, 16)  # when a float element aligns
EARLY_PLACES, LATE_PLACES = (4,), (3, 2, 1, 0)  # when it normalises: bits of the shift


def delay(m: Module, value: Value, cycles: int, name: str = "delayed") -> Value:
    """`value` as it was `cycles` cycles ago; without reset."""
    for _ in range(cycles):
        register = Signal(len(value), name=name, reset_less=True)
        m.d.sync += register.eq(value)
        value = register
    return value


def operand_bits(chip: Chip) -> int:
    """Width of an operand between elements."""
    return CODE_BITS if "bf16" in chip.matrix_types else 8


def encode_float(m: Module, bits: Value, bias: int, name: str) -> Value:
    """The code of a bf16 pattern."""
    fraction, exponent = bits[:7], bits[7:15]
    subnormal = exponent == 0
    zeros, shifted = Signal(3, name=f"{name}_zeros"), Signal(8, name=f"{name}_shifted")
    for place in range(7):  # the last assignment, of the highest set bit, wins
        with m.If(fraction[place]):
            m.d.comb += [zeros.eq(6 - place), shifted.eq(fraction << 7 - place)]
    code = Signal(9, name=f"{name}_exponent")
    with m.If(exponent == 255):
        m.d.comb += code.eq(NOT_FINITE | INFINITE | (fraction != 0))
    with m.Elif(subnormal & (fraction == 0)):
        m.d.comb += code.eq(NOT_FINITE | NO_ONE)
    with m.Else():
        m.d.comb += code.eq(exponent + bias - Mux(subnormal, zeros, 0))
    return Cat(Mux(subnormal, shifted[:7], fraction), code, bits[15])


def encode_int(value: Value) -> Value:
    """The code of an int8 on a chip that also has bf16."""
    magnitude = Mux(value[7], -value, value)[:8]
    return Cat(magnitude[:7], ~magnitude[7], C(NOT_FINITE | INTEGER, 9)[1:], value[7])


def zero_code(chip: Chip, sign: int, integer: Value) -> Value:
    """The code of a zero with this sign; of an int8 zero where `integer`."""
    if operand_bits(chip) == 8:
        return C(0, 8)
    return Cat(C(0, 7), C(1, 2), integer, C(NOT_FINITE >> 3, 6), C(sign, 1))


def canonical(pattern: Value) -> Value:
    """A binary32 pattern, a NaN as the canonical one."""
    is_nan = pattern[23:31].all() & pattern[:23].any()
    return Mux(is_nan, NAN, pattern)


class _Element(wiring.Component):
    """What both elements share: operands in, operands on.

    a, with `swap` at the first of a block, goes on a cycle later. The weights pass `stages` - 1
    registers, one fewer than the partial sums, and enter the array row after row: so this row's
    weight is at `w` in the very cycle of its `swap`, and none needs to wait.

    The operands are multiplied from registers; the partial sum comes `lead` cycles behind a.
    """

    lead: int

    def __init__(self, width: int, stages: int):
        self.stages = stages
        super().__init__({
            "a": In(width), "swap": In(1), "w": In(width), "psum": In(32),
            "a_out": Out(width), "swap_out": Out(1), "w_out": Out(width), "psum_out": Out(32),
        })  # fmt: skip

    def _operands(self, m: Module) -> tuple[Value, Value]:
        """a and its weight, a cycle late."""
        m.d.sync += [self.a_out.eq(self.a), self.swap_out.eq(self.swap)]
        m.d.comb += self.w_out.eq(delay(m, self.w, self.stages - 1))
        weight = Signal.like(self.w, reset_less=True)
        with m.If(self.swap):
            m.d.sync += weight.eq(self.w)
        return self.a_out, weight


class IntElement(_Element):
    """psum + a * w modulo 2^32, for a chip that has int8 alone; any number of stages."""

    lead = 2

    def __init__(self, stages: int):
        super().__init__(8, stages)

    def elaborate(self, platform) -> Module:
        m = Module()
        a, w = self._operands(m)
        product = Signal(signed(16), reset_less=True)
        m.d.sync += product.eq(a.as_signed() * w.as_signed())
        m.d.comb += self.psum_out.eq(delay(m, (self.psum + product)[:32], self.stages))
        return m


class FloatElement(_Element):
    """psum + a * w with one rounding; with `integer` also int8, for weights whose code says so.

    The operand with the larger exponent stays, the other is shifted right: adder bit 0 weighs as
    much as the last bit of the one that stays, two bits follow, and what is lost beyond them is
    `sticky`. That is enough, since where bits are lost the result loses at most one leading bit.

        stage 1   multiply, compare exponents, begin to align
        stage 2   align, add, count leading zeros, begin to normalise
        stage 3   normalise, round

    A 4th stage separates normalising from rounding, a 5th aligning from adding, a 6th adding from
    counting; stages beyond that are plain registers.
    """

    lead = 1

    def __init__(self, stages: int, integer: bool):
        self.integer = integer
        super().__init__(CODE_BITS, stages)

    def elaborate(self, platform) -> Module:
        m = Module()
        a, w = self._operands(m)
        x = _cut(m, True, "aligning", self._align(m, self._multiply(m, a, w), EARLY_SHIFTS))
        x = _cut(m, self.stages >= 5, "aligned", self._align(m, x, LATE_SHIFTS))
        x = _cut(m, self.stages >= 6, "added", self._add(m, x))
        x = _cut(m, True, "counted", self._normalise(m, self._count(m, x), EARLY_PLACES))
        x = _cut(m, self.stages >= 4, "normal", self._normalise(m, x, LATE_PLACES))
        last = 1 + max(self.stages - 6, 0)
        m.d.comb += self.psum_out.eq(delay(m, self._round(m, x), last))
        return m

    def _multiply(self, m: Module, a: Value, w: Value) -> SimpleNamespace:
        """stays: bits 0 to 24; an int8 sum's others are in exponent and sign. moved: bits -2 to
        23, as they are before the shift."""
        (a_one, a_infinite, _), (w_one, w_infinite, integer) = (_flags(x[7:16]) for x in (a, w))
        if not self.integer:
            integer = C(0, 1)
        product = Signal(16)
        m.d.comb += product.eq(Cat(a[:7], a_one) * Cat(w[:7], w_one))

        exponent, fraction, psum_sign = self.psum[23:31], self.psum[:23], self.psum[31]
        least = exponent == 0
        psum_infinite = exponent.all() & ~integer
        # A subnormal has exponent 1 and no leading one. An int8 sum's bits are kept as they are.
        psum_exponent = Cat(exponent[0] | (least & ~integer), exponent[1:])
        significand = Cat(fraction, ~least & (exponent[0] | ~integer))

        # distance = the product's exponent - the sum's; both biases together add 256.
        product_exponent, distance = Signal(10), Signal(10)
        difference = (product_exponent - psum_exponent)[:10]
        m.d.comb += [
            product_exponent.eq(a[7:16] + w[7:16]),
            distance.eq(Cat(difference[:8], ~difference[8], ~(difference[9] ^ difference[8]))),
        ]
        below = distance[9]
        zero, infinite = ~a_one | ~w_one, a_infinite | w_infinite
        product_stays = Signal()
        m.d.comb += product_stays.eq((~below & ~zero & ~psum_infinite & ~integer) | infinite)
        # The product is shifted by one less, since it starts one place lower.
        far = distance[:9] ^ below.replicate(9)
        # Far enough is all that counts beyond 28. An int8 product is shifted by 8.
        too_far = far[5:].any().replicate(3)
        shift = Mux(integer, 8, Cat(far[:2], far[2:5] | too_far))

        sign = a[16] ^ w[16]
        special = infinite | psum_infinite
        differ = sign ^ psum_sign
        return SimpleNamespace(
            stays=Mux(product_stays, Cat(C(0, 9), product), significand),
            moved=Cat(C(0, 2), Mux(product_stays, significand, Cat(C(0, 8), product))),
            sticky=C(0, 1), shift=shift,
            exponent=Mux(product_stays, Cat(product_exponent[:8], ~product_exponent[8]),
                         psum_exponent),
            subtract=(sign ^ (psum_sign & ~integer)) & ~special,
            sign=Mux(product_stays, sign, psum_sign),
            special=special,
            nan=((infinite & zero) | (psum_infinite & fraction[22])
                 | (infinite & psum_infinite & differ)),
            integer=integer,
        )  # fmt: skip

    def _align(self, m: Module, x: SimpleNamespace, counts: tuple[int, ...]) -> SimpleNamespace:
        """Shift `moved` right by those of the counts that `shift` names, smallest first."""
        moved, lost = x.moved, [x.sticky]
        for on, count in zip(x.shift, counts, strict=False):
            lost.append(on & moved[:count].any())
            shifted = Signal(26, name=f"shifted_{count}")
            m.d.comb += shifted.eq(Mux(on, moved[count:], moved))
            moved = shifted
        left = x.shift[len(counts):]
        return _but(x, "", moved=moved, sticky=Cat(lost).any(), shift=left if len(left) else None)

    def _add(self, m: Module, x: SimpleNamespace) -> SimpleNamespace:
        """The sum, bits -2 to 26; its complement is the magnitude if it is `negative`.

        A difference is taken as stays + ~moved, one unit (of bit -2) too low. Negative, its
        complement is the magnitude. Positive, it is right where bits were lost; else the unit is
        `pending` until rounding adds it.
        """
        total, negative = Signal(34), Signal()
        high = Cat(x.exponent[1:8], x.sign) & x.integer.replicate(8)
        stays = Cat(C(0, 2), x.stays[:24], x.stays[24] | high[0], high[1:])
        moved = Cat(x.moved, C(0, 8)) ^ x.subtract.replicate(34)
        zero = x.subtract & total[:28].all() & ~x.sticky
        m.d.comb += [
            total.eq(stays + moved + (x.integer & x.subtract)),
            negative.eq(total[28] & ~x.integer),
        ]
        return _but(
            x, "stays moved subtract shift", total=total[:29], negative=negative,
            pending=x.subtract & ~negative & ~x.sticky & ~x.integer,
            sign=(x.sign ^ negative) & ~zero,
            # An int8 sum's upper bits take the exponent's place.
            high=total[25:34],
        )  # fmt: skip

    def _count(self, m: Module, x: SimpleNamespace) -> SimpleNamespace:
        """The magnitude, and how far to shift it left: by its leading zeros, at most 28 and
        exponent + 1, where subnormals begin. An int8 sum is shifted by 2, to where a fraction is.
        """
        near = ~x.exponent[5:].any()
        low = [x.exponent[:3] == i for i in range(8)]
        high = [(x.exponent[3:5] == i) & near for i in range(4)]
        # The first bit that differs from the one above ends the zeros or, of a negative sum, ones.
        change = x.total[:28] ^ x.total[1:]
        # A one where the shift has to end stops the count there.
        ends = Cat(low[i & 7] & high[i >> 3] for i in reversed(range(1, 27)))
        at_2, float_only = Cat(C(0, 25), x.integer), (~x.integer).replicate(2)
        marked, magnitude = Signal(28), Signal(28)
        m.d.comb += [
            marked.eq(Cat(change[:26] | ends | at_2, change[26:] & float_only)),
            magnitude.eq(x.total[:28] ^ x.negative.replicate(28)),
        ]
        zeros = leading_zeros(m, Cat(C(1, 1), marked), "zeros")
        return _but(
            x, "negative high", total=magnitude, by=zeros,
            exponent=Mux(x.integer, x.high, x.exponent),
        )  # fmt: skip

    def _normalise(self, m: Module, x: SimpleNamespace, places: tuple[int, ...]) -> SimpleNamespace:
        """Shift left by those bits of `by` that are at these places."""
        total = x.total
        for place in places:
            shifted, count = Signal(28, name=f"normal_{1 << place}"), 1 << place
            m.d.comb += shifted.eq(
                Mux(x.by[place], Cat(x.pending.replicate(count), total[:-count]), total)
            )
            total = shifted
        if places[-1] > 0:
            return _but(x, "", total=total)
        exponent = Signal(9)
        m.d.comb += exponent.eq(x.exponent + 2 - x.by)
        return _but(x, "by", total=total, exponent=exponent)

    def _round(self, m: Module, x: SimpleNamespace) -> Value:
        kept, half, rest = x.total[4:], x.total[3], x.total[:3]
        odd, top = kept[0], kept[23]
        up = Mux(x.pending, half | (rest.all() & odd), half & (rest.any() | x.sticky | odd))
        # Rounding up to an infinity gives one by itself, with a fraction of 0.
        large = (x.exponent[8] | x.exponent[:8].all()) & top & ~x.integer
        rounded, special = Signal(32), x.special | large
        m.d.comb += rounded.eq(
            Cat(kept[:23], x.exponent & (top | x.integer).replicate(9)) + up
        )
        return Cat(
            rounded[:22] & (~special).replicate(22), (rounded[22] & ~special) | x.nan,
            rounded[23:31] | special.replicate(8),
            Mux(x.integer, rounded[31], x.sign & ~x.nan),
        )  # fmt: skip


def _flags(exponent: Value) -> tuple[Value, Value, Value]:
    """Of a code: has a leading one, infinite or NaN, integer."""
    no_value = exponent[8] & exponent[7]
    return ~(no_value & exponent[0]), no_value & exponent[1], no_value & exponent[2]


def _cut(m: Module, registered: bool, name: str, values: SimpleNamespace) -> SimpleNamespace:
    """The values behind registers, or as they are."""
    behind = {}
    for key, value in vars(values).items():
        if value is None or isinstance(value, Const):
            behind[key] = value
            continue
        signal = behind[key] = Signal(len(value), name=f"{name}_{key}", reset_less=True)
        m.d["sync" if registered else "comb"] += signal.eq(value)
    return SimpleNamespace(**behind)


def _but(values: SimpleNamespace, without: str, **new: Value | None) -> SimpleNamespace:
    """The values without those named, and new ones."""
    kept = {key: value for key, value in vars(values).items() if key not in without.split()}
    return SimpleNamespace(**{**kept, **new})


def sum_lead(chip: Chip) -> int:
    """Cycles by which an element's partial sum comes behind its a."""
    return (FloatElement if "bf16" in chip.matrix_types else IntElement).lead


def processing_element(chip: Chip) -> IntElement | FloatElement:
    """The element of this chip's array. Raises ValueError for too few stages."""
    if "bf16" not in chip.matrix_types:
        return IntElement(chip.pe_stages)
    if chip.pe_stages < FLOAT_STAGES:
        raise ValueError(
            f"chip {chip.name!r}: pe_stages = {chip.pe_stages}: a bf16 element needs "
            f"{FLOAT_STAGES} or more; use pe_stages = {FLOAT_STAGES}"
        )
    return FloatElement(chip.pe_stages, "int8" in chip.matrix_types)
