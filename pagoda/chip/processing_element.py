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

from amaranth.hdl import C, Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.isa.chip import Chip

CODE_BITS = 17
A_BIAS, B_BIAS = 65, 64
NO_ONE, INFINITE, INTEGER = 1, 2, 4  # bits of an exponent whose two top bits are 1
NOT_FINITE = 0b11 << 7
NAN = 0x7FC00000
FLOAT_STAGES = 3  # the fewest of a float element


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


def element_signature(width: int) -> wiring.Signature:
    """Ports of an element for operands of so many bits."""
    return wiring.Signature({
        "a": In(width), "swap": In(1), "w": In(width), "psum": In(32),
        "a_out": Out(width), "swap_out": Out(1), "w_out": Out(width), "psum_out": Out(32),
    })  # fmt: skip


class _Element(wiring.Component):
    """What both elements share: operands in, operands on.

    a, with `swap` at the first of a block, goes on a cycle later. The weights pass `stages` - 1
    registers, one fewer than the partial sums, and enter the array row after row: so this row's
    weight is at `w` in the very cycle of its `swap`, and none needs to wait.
    """

    def __init__(self, width: int, stages: int):
        self.stages = stages
        super().__init__(element_signature(width))

    def _operands(self, m: Module) -> tuple[Value, Value]:
        m.d.sync += [self.a_out.eq(self.a), self.swap_out.eq(self.swap)]
        m.d.comb += self.w_out.eq(delay(m, self.w, self.stages - 1))
        kept = Signal.like(self.w, reset_less=True)
        weight = Mux(self.swap, self.w, kept)
        m.d.sync += kept.eq(weight)
        return self.a, weight


class IntElement(_Element):
    """psum + a * w modulo 2^32, for a chip that has int8 alone; any number of stages."""

    def __init__(self, stages: int):
        super().__init__(8, stages)

    def elaborate(self, platform) -> Module:
        m = Module()
        a, w = self._operands(m)
        product, psum = Signal(16), self.psum
        m.d.comb += product.eq(a.as_signed() * w.as_signed())
        if self.stages > 1:
            product, psum = delay(m, product, 1), delay(m, psum, 1)
        # In two halves, or synthesis would multiply 32 bits wide.
        low = psum[:16] + product
        high = (psum[16:] + product[15].replicate(16) + low[16])[:16]
        total = Cat(low[:16], high)
        m.d.comb += self.psum_out.eq(delay(m, total, max(self.stages - 1, 1)))
        return m


class FloatElement(_Element):
    """psum + a * w with one rounding; with `integer` also int8, for weights whose code says so.

    The operand with the larger exponent stays, the other is shifted right: adder bit 0 weighs as
    much as the last bit of the one that stays, two bits follow, and what is lost beyond them is
    `sticky`. That is enough, since where bits are lost the result loses at most one leading bit.

        stage 1   multiply, compare exponents
        stage 2   align, add
        stage 3   normalise, round

    A 4th stage separates normalising from rounding, a 5th aligning from adding, a 6th halves the
    normalisation; stages beyond that are plain registers.
    """

    def __init__(self, stages: int, integer: bool):
        self.integer = integer
        super().__init__(CODE_BITS, stages)

    def elaborate(self, platform) -> Module:
        m = Module()
        a, w = self._operands(m)
        x = _cut(m, True, "multiplied", self._multiply(m, a, w))
        x = _cut(m, self.stages >= 5, "aligned", self._align(m, x))
        x = _cut(m, True, "added", self._add(m, x))
        x = _cut(m, self.stages >= 6, "normalising", self._normalise(m, x, (16, 8)))
        x = _cut(m, self.stages >= 4, "normal", self._normalise(m, x, (4, 2, 1)))
        last = 1 + max(self.stages - 6, 0)
        m.d.comb += self.psum_out.eq(delay(m, self._round(m, x), last))
        return m

    def _multiply(self, m: Module, a: Value, w: Value) -> SimpleNamespace:
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
        leading = ~least & (exponent[0] | ~integer)

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
        # The product is shifted by one less, since it starts one place lower (`_align`).
        far = distance[:9] ^ below.replicate(9)
        shift = far[:5] | far[5:].any().replicate(5)

        sign = a[16] ^ w[16]
        special = infinite | psum_infinite
        differ = sign ^ psum_sign
        return SimpleNamespace(
            product=product, fraction=fraction, leading=leading, product_stays=product_stays,
            exponent=Mux(product_stays, Cat(product_exponent[:8], ~product_exponent[8]),
                         psum_exponent),
            shift=Mux(integer, 8, shift),
            subtract=(sign ^ (psum_sign & ~integer)) & ~special,
            sign=Mux(product_stays, sign, psum_sign),
            special=special,
            nan=((infinite & zero) | (psum_infinite & fraction[22])
                 | (infinite & psum_infinite & differ)),
            integer=integer,
        )  # fmt: skip

    def _align(self, m: Module, x: SimpleNamespace) -> SimpleNamespace:
        """stays: bits 0 to 31. moved: bits -2 to 23."""
        significand = Cat(x.fraction, x.leading)
        high = Cat(x.exponent[1:8], x.sign) & x.integer.replicate(8)
        stays = Mux(x.product_stays, Cat(C(0, 9), x.product), Cat(significand, high))
        moved = Cat(C(0, 2), Mux(x.product_stays, significand, Cat(C(0, 8), x.product)))
        lost = []
        for place in reversed(range(5)):
            count, on = 1 << place, x.shift[place]
            lost.append(on & moved[:count].any())
            shifted = Signal(26, name=f"shifted_{count}")
            m.d.comb += shifted.eq(Mux(on, moved[count:], moved))
            moved = shifted
        return _but(x, "product fraction leading product_stays shift", stays=stays, moved=moved,
                    sticky=Cat(lost).any())  # fmt: skip

    def _add(self, m: Module, x: SimpleNamespace) -> SimpleNamespace:
        """The sum's magnitude, bits -2 to 25.

        A difference is taken as stays + ~moved, one unit (of bit -2) too low. Negative, its
        complement is the magnitude. Positive, it is right where bits were lost; else the unit is
        `pending` until rounding adds it.
        """
        total, negative, magnitude = Signal(34), Signal(), Signal(28)
        moved = Cat(x.moved, C(0, 8)) ^ x.subtract.replicate(34)
        pending = x.subtract & ~negative & ~x.sticky & ~x.integer
        zero = x.subtract & negative & ~magnitude.any() & ~x.sticky
        m.d.comb += [
            total.eq(Cat(C(0, 2), x.stays) + moved + (x.integer & x.subtract)),
            negative.eq(total[28] & ~x.integer),
            magnitude.eq(total[:28] ^ negative.replicate(28)),
        ]
        # An int8 sum's upper bits take the exponent's place.
        exponent = Mux(x.integer, total[25:34], x.exponent)
        return _but(x, "stays moved subtract", total=magnitude, pending=pending,
                    sign=(x.sign ^ negative) & ~zero, exponent=exponent, limit=None,
                    zeros_less=None, limit_less=None, by=None)  # fmt: skip

    def _normalise(self, m: Module, x: SimpleNamespace, steps: tuple[int, ...]) -> SimpleNamespace:
        """Shift left by the leading zeros, at most by exponent + 1, where subnormals begin.

        From the largest step on, the bits of both counts are compared: as soon as they differ, one
        is known to be the smaller. An int8 sum is shifted by 2, to where a fraction is.
        """
        total, by = x.total, list(x.by) if x.by is not None else []
        limit, zeros_less, limit_less = x.limit, x.zeros_less, x.limit_less
        if limit is None:
            plus_one = (x.exponent[:5] + 1)[:5]
            large = x.exponent[5:].any() | x.exponent[1:5].all()
            limit = Mux(x.integer, 2, plus_one | large.replicate(5))
            zeros_less, limit_less = C(0, 1), x.integer
        for count in steps:
            empty, allowed = ~total[-count:].any(), limit[count.bit_length() - 1]
            on = (empty | limit_less) & (allowed | zeros_less)
            zeros_less, limit_less = (
                zeros_less | (~empty & allowed & ~limit_less),
                limit_less | (empty & ~allowed & ~zeros_less),
            )
            shifted = Signal(28, name=f"normal_{count}")
            m.d.comb += shifted.eq(
                Mux(on, Cat(x.pending.replicate(count), total[:-count]), total)
            )
            total, by = shifted, [on, *by]
        state = dict.fromkeys(("limit", "zeros_less", "limit_less"))
        if steps[-1] > 1:
            state = dict(limit=limit, zeros_less=zeros_less, limit_less=limit_less)
        return _but(x, "", total=total, by=Cat(by), **state)

    def _round(self, m: Module, x: SimpleNamespace) -> Value:
        kept, half, rest = x.total[4:], x.total[3], x.total[:3]
        odd, top = kept[0], kept[23]
        up = Mux(x.pending, half | (rest.all() & odd), half & (rest.any() | x.sticky | odd))
        exponent, rounded = Signal(9), Signal(32)
        m.d.comb += [
            exponent.eq(x.exponent + 2 - x.by),
            rounded.eq(Cat(kept[:23], exponent & (top | x.integer).replicate(9)) + up),
        ]
        special = x.special | ((rounded[31] | rounded[23:31].all()) & ~x.integer)
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
