"""Element converters between memory formats and 32-bit lanes, as combinational logic.

The rules are those of the manual, "Numbers": float formats become binary32 lanes, the others int32
lanes. An engine that moves elements of equal source and target format copies their bits instead.

    raw      an element in the low bits of a value of up to 64 bits; bits above it are ignored
    code     element format, the code of `pagoda.isa.numbers.DType`
    formats  the formats that can occur; fewer of them need fewer gates, others give undefined bits
"""

from __future__ import annotations

from collections.abc import Collection

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value

from pagoda.isa.numbers import CANONICAL_NAN, DType

ALL = tuple(DType)
LOCAL = (DType.F32, DType.BF16, DType.I32, DType.I8)

_F8_NAN, _F8_LARGEST = 0x7F, 0x7E
_F8_TO_F32_BIAS = 127 - 7
BF16_NAN = 0x7FC0


def decode_element(
    m: Module, raw: Value, code: Value, name: str, formats: Collection[DType] = ALL
) -> tuple[Signal, Signal]:
    """Memory to lane: (lane: 32 bits, overflow: an I64 that did not fit and was saturated)."""
    lane, overflow = Signal(32, name=f"{name}_lane"), Signal(name=f"{name}_overflow")
    # Formats narrower than 64 bits read only their own bits, so a narrower `raw` is fine for them.
    raw = Value.cast(raw)
    with m.Switch(code):
        for formats_alike in _alike(formats):
            with m.Case(*(int(dtype) for dtype in formats_alike)):
                dtype = formats_alike[0]
                if dtype is DType.I64:
                    fits = raw[31:64] == raw[63].replicate(33)
                    limit = Cat((~raw[63]).replicate(31), raw[63])
                    m.d.comb += [lane.eq(Mux(fits, raw[:32], limit)), overflow.eq(~fits)]
                else:
                    m.d.comb += lane.eq(_decoded(m, raw, dtype, name))
    return lane, overflow


def encode_element(
    m: Module, lane: Value, code: Value, name: str, formats: Collection[DType] = ALL
) -> Signal:
    """Lane to memory: the element in the low bits of 64; bits above it are zero."""
    raw = Signal(64, name=f"{name}_raw")
    lane = Value.cast(lane)
    with m.Switch(code):
        for formats_alike in _alike(formats):
            with m.Case(*(int(dtype) for dtype in formats_alike)):
                m.d.comb += raw.eq(_encoded(m, lane, formats_alike[0], name))
    return raw


def _alike(formats: Collection[DType]) -> list[tuple[DType, ...]]:
    """The formats in groups of one rule: F32 and I32 both copy the bits."""
    words = tuple(dtype for dtype in (DType.F32, DType.I32) if dtype in formats)
    others = [(dtype,) for dtype in formats if dtype not in words]
    return [words, *others] if words else others


def _decoded(m: Module, raw: Value, dtype: DType, name: str) -> Value:
    match dtype:
        case DType.F32 | DType.I32:
            return raw[:32]
        case DType.BF16:
            return Cat(C(0, 16), raw[:16])
        case DType.F8E4M3:
            return _from_f8(m, raw[:8], name)
        case DType.I8:
            return raw[:8].as_signed()
        case DType.I4:
            return raw[:4].as_signed()
        case DType.U8:
            return raw[:8]
        case _:
            return raw[:8].any()


def _encoded(m: Module, lane: Value, dtype: DType, name: str) -> Value:
    match dtype:
        case DType.F32 | DType.I32:
            return lane
        case DType.BF16:
            return _to_bf16(m, lane, name)
        case DType.F8E4M3:
            return _to_f8(m, lane, name)
        case DType.I8:
            return _saturated(lane, 8)
        case DType.I4:
            return _saturated(lane, 4)
        case DType.U8:
            large = lane[8:31].any()
            return Mux(lane[31], C(0, 8), Mux(large, C(0xFF, 8), lane[:8]))
        case DType.I64:
            return lane.as_signed()
        case _:
            return lane.any()


def _saturated(lane: Value, bits: int) -> Value:
    """An int32 as two's complement of `bits` bits, clamped."""
    sign = lane[31]
    fits = lane[bits - 1 : 31] == sign.replicate(32 - bits)
    return Mux(fits, lane[:bits], Cat((~sign).replicate(bits - 1), sign))


def _from_f8(m: Module, code: Value, name: str) -> Value:
    fraction, exponent, sign = code[:3], code[3:7], code[7]
    # A subnormal is fraction * 2^-9: 1 is 2^-9 (binary32 exponent 118), 2 and 3 start at 2^-8, ...
    magnitude = Signal(31, name=f"{name}_from_f8")
    with m.If(code[:7] == _F8_NAN):
        m.d.comb += magnitude.eq(CANONICAL_NAN)
    with m.Elif(exponent != 0):
        m.d.comb += magnitude.eq(Cat(C(0, 20), fraction, exponent + C(_F8_TO_F32_BIAS, 8)))
    with m.Elif(fraction[2]):
        m.d.comb += magnitude.eq(Cat(C(0, 21), fraction[:2], C(_F8_TO_F32_BIAS, 8)))
    with m.Elif(fraction[1]):
        m.d.comb += magnitude.eq(Cat(C(0, 22), fraction[0], C(_F8_TO_F32_BIAS - 1, 8)))
    with m.Elif(fraction[0]):
        m.d.comb += magnitude.eq(Cat(C(0, 23), C(_F8_TO_F32_BIAS - 2, 8)))
    return Cat(magnitude, sign & (code[:7] != _F8_NAN))


def _is_nan(lane: Value) -> Value:
    return lane[23:31].all() & lane[:23].any()


def _to_bf16(m: Module, lane: Value, name: str) -> Value:
    """Up when the dropped half is above the middle, or in the middle and the kept part is odd."""
    up = Signal(name=f"{name}_bf16_up")
    m.d.comb += up.eq(lane[15] & (lane[:15].any() | lane[16]))
    # Rounding never carries out: an infinity drops nothing and a NaN is replaced.
    return Mux(_is_nan(lane), C(BF16_NAN, 16), (lane[16:] + up)[:16])


def _to_f8(m: Module, lane: Value, name: str) -> Value:
    exponent, fraction, sign = lane[23:31], lane[:23], lane[31]

    def rounded(dropped: int, kept: Value) -> Value:
        """`kept` after `dropped` bits of the fraction."""
        return kept + (fraction[dropped - 1] & (fraction[: dropped - 1].any() | kept[0]))

    # Normal: from one bias to the other; a carry out of the fraction enters the exponent.
    normal, code = Signal(name=f"{name}_f8_normal"), Signal(12, name=f"{name}_f8_code")
    up = fraction[19] & (fraction[:19].any() | fraction[20])
    # Below, in units of 2^-9: the exponents of 4, 2 and 1, and of a half.
    least = Signal(4, name=f"{name}_f8_least")
    m.d.comb += [
        normal.eq(exponent[7] | (exponent[3:7].all() & exponent[:3].any())),
        code.eq(Cat(fraction[20:], exponent) + Cat(up, C(-8 * _F8_TO_F32_BIAS >> 1, 11))),
    ]
    with m.Switch(exponent):
        with m.Case(_F8_TO_F32_BIAS):
            m.d.comb += least.eq(rounded(21, Cat(fraction[21:], 1)))
        with m.Case(_F8_TO_F32_BIAS - 1):
            m.d.comb += least.eq(rounded(22, Cat(fraction[22], 1)))
        with m.Case(_F8_TO_F32_BIAS - 2):
            m.d.comb += least.eq(1 + fraction[22])
        with m.Case(_F8_TO_F32_BIAS - 3):
            m.d.comb += least.eq(fraction.any())
    limited = Mux(code > _F8_LARGEST, C(_F8_LARGEST, 7), code[:7])
    magnitude = Mux(normal, limited, Cat(least, C(0, 3)))
    return Cat(Mux(_is_nan(lane), C(_F8_NAN, 7), magnitude), sign)
