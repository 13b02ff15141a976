"""Vector code of the simulator (`sim/lanes.py`) against the functions of one lane, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import other_processors
import pytest
from numpy.typing import NDArray

from pagoda.isa.tables import EXP2_TABLE, RECIPROCAL_TABLE
from pagoda.sim.convert import BF16, encode
from pagoda.sim.functions import EXP2, FMAX, FMIN, RECIP, apply_binary, apply_unary
from pagoda.sim.jit import (
    bits_float,
    float_bits,
    load_i32,
    load_i64,
    load_u16,
    load_u32,
    store_i32,
    store_i64,
)
from pagoda.sim.layout import CHUNK
from pagoda.sim.numbers import (
    bf16_code,
    evaluate,
    exp2_index,
    exp2_result,
    float_max,
    float_min,
    reciprocal_index,
    reciprocal_result,
)

BF16_CODE = -1  # beside function codes: encoding as bf16
Patterns = NDArray[np.int32]

# Every exponent with the ends of its fractions, of both signs.
_ENDS = np.array([0, 1, 0x3FFFFF, 0x400000, 0x7FFFFE, 0x7FFFFF], np.uint32)
CORNERS = (np.arange(512, dtype=np.uint32)[:, None] << 23 | _ENDS).ravel().view(np.int32)
# Around every bound of exp2's and recip's short ways.
BOUNDS = np.array([-150, -149, -127, -126, -1, 126, 127, 128, 2.0**-126, 2.0**126, -(2.0**126)])
BOUNDS = BOUNDS.astype(np.float32).view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)


@numba.njit(nogil=True)
def _by_vector(code, result, x, count, work):
    if code == BF16_CODE:
        encode(x, BF16, work, count)
        for i in range(count):
            store_i32(result, i, load_u16(work, i))
    else:
        apply_unary(code, result, x, count, work)


@numba.njit(nogil=True)
def _by_lane(code, result, x, count, work):
    if code == BF16_CODE:
        for i in range(count):
            store_i32(result, i, bf16_code(load_i32(x, i)) & 0xFFFF)
    elif code == EXP2:
        for i in range(count):
            store_i64(work, i, exp2_index(np.int64(load_u32(x, i))))
        evaluate(EXP2_TABLE, work, count, 23)
        for i in range(count):
            value = exp2_result(np.int64(load_u32(x, i)), load_i64(work, i))
            store_i32(result, i, np.int32(value))
    else:
        for i in range(count):
            store_i64(work, i, reciprocal_index(np.int64(load_u32(x, i))))
        evaluate(RECIPROCAL_TABLE, work, count, 15)
        for i in range(count):
            value = reciprocal_result(np.int64(load_u32(x, i)), load_i64(work, i))
            store_i32(result, i, np.int32(value))


@numba.njit(nogil=True)
def _differences(code, x, first, chunks, buffers):
    """(how many lanes differ, the last such pattern) of `chunks` chunks: of x, or where it is empty
    of the patterns that count up from `first`."""
    patterns, vector, lane, work = buffers
    different, example = 0, 0
    for chunk in range(chunks):
        for i in range(CHUNK):
            patterns[i] = x[chunk * CHUNK + i] if len(x) else np.int32(first + chunk * CHUNK + i)
        _by_vector(code, vector.ctypes.data, patterns.ctypes.data, CHUNK, work.ctypes.data)
        _by_lane(code, lane.ctypes.data, patterns.ctypes.data, CHUNK, work.ctypes.data)
        for i in range(CHUNK):
            if vector[i] != lane[i]:
                different += 1
                example = patterns[i]
    return different, example


@numba.njit(nogil=True)
def _extreme_differences(code, x, y, vector):
    """(how many lanes differ, the last such) of the maximum or minimum."""
    different, example = 0, 0
    apply_binary(code, vector.ctypes.data, x.ctypes.data, y.ctypes.data, len(x))
    for i in range(len(x)):
        a, b = bits_float(x[i]), bits_float(y[i])
        if vector[i] != float_bits(float_max(a, b) if code == FMAX else float_min(a, b)):
            different += 1
            example = i
    return different, example


def differences(code: int, x: Patterns, first: int = 0, chunks: int = 0) -> tuple[int, str]:
    """`_differences`, the pattern as text."""
    if len(x):
        x = np.resize(x, -(-len(x) // CHUNK) * CHUNK)
        chunks = len(x) // CHUNK
    lanes = [np.zeros(CHUNK, np.int32) for _ in range(3)]
    count, example = _differences(code, x, first, chunks, (*lanes, np.zeros(2 * CHUNK, np.int64)))
    return count, f"{example & 0xFFFFFFFF:#010x}" if count else ""


def sample(random: np.random.Generator, count: int) -> Patterns:
    """Patterns, some of them corners, and some of ordinary numbers."""
    choices = [
        random.integers(-(2**31), 2**31, count).astype(np.int32),
        random.choice(CORNERS, count),
        (random.standard_normal(count) * 60).astype(np.float32).view(np.int32),
    ]
    return np.select(
        [random.random(count) < 0.3, random.random(count) < 0.3], choices[:2], choices[2]
    )


UNARY = pytest.mark.parametrize("code", [EXP2, RECIP, BF16_CODE], ids=["exp2", "recip", "bf16"])


@UNARY
@pytest.mark.parametrize(
    "patterns",
    [lambda: CORNERS, lambda: BOUNDS.ravel(), lambda: sample(np.random.default_rng(1), 1 << 18)],
    ids=["corners", "bounds", "sample"],
)
def test_unary(code: int, patterns: Callable[[], Patterns]):
    assert differences(code, patterns()) == (0, "")


@UNARY
def test_the_vectors_of_a_run_do_not_mix(code: int):
    """Usual and unusual vectors beside each other, runs of every length up to five vectors."""
    x = np.where(np.arange(80) // 16 % 2, sample(np.random.default_rng(2), 80), 0x3F9D70A4)
    x = x.astype(np.int32)
    work = np.zeros(2 * CHUNK, np.int64)
    for count in range(81):
        vector, lane = np.full((2, 81), 7, np.int32)
        for run, result in ((_by_vector, vector), (_by_lane, lane)):
            run(code, result.ctypes.data, x.ctypes.data, count, work.ctypes.data)
        np.testing.assert_array_equal(vector, lane)


@pytest.mark.parametrize("code", [FMAX, FMIN], ids=["max", "min"])
def test_extremes(code: int):
    random = np.random.default_rng(3)
    x, y = sample(random, 1 << 18), sample(random, 1 << 18)
    y[::5] = x[::5]
    y[1::5] = x[1::5] ^ -(2**31)
    assert _extreme_differences(code, x, y, np.zeros_like(x)) == (0, 0)


@pytest.mark.slow
@UNARY
def test_every_pattern(code: int):
    step = 1 << 28
    for first in range(0, 1 << 32, step):
        assert differences(code, np.zeros(0, np.int32), first, step // CHUNK) == (0, ""), first


@pytest.mark.slow
@other_processors.each
def test_other_vector_lengths(features: str):
    other_processors.run_tests(__file__, features)
