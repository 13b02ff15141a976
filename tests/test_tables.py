"""The table functions: their published steps, their accuracy, their exact and special values.

Accuracy is measured in units in the last place of the true value (2^-149 below 2^-126).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import inf, nan

import mpmath
import numpy as np
import pytest

from pagoda.isa import tables
from pagoda.isa.numbers import CANONICAL_NAN

# Rounding alone costs 0.5; the rest is the quadratic and the 30-bit fixed point.
LIMIT = 0.61

FUNCTIONS = {
    "exp2": (tables.exp2, np.exp2, lambda x: mpmath.power(2, x)),
    "log2": (tables.log2, np.log2, lambda x: mpmath.log(x, 2)),
    "reciprocal": (tables.reciprocal, np.reciprocal, lambda x: 1 / x),
    "rsqrt": (tables.rsqrt, lambda x: 1 / np.sqrt(x), lambda x: 1 / mpmath.sqrt(x)),
    "sin2pi": (
        tables.sin2pi,
        lambda x: np.sin(2 * np.pi * x),
        lambda x: mpmath.sinpi(2 * (x - mpmath.nint(x))),
    ),
}


def pattern(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def f32(patterns: object) -> np.ndarray:
    return np.asarray(patterns, np.uint32).view(np.float32)


def worst(name: str, first: float, last: float) -> float:
    """The largest error over every binary32 from `first` up to, not including, `last`.

    The judge is numpy in binary64, good to 2^-29 of a binary32 ulp.
    """
    ours, judge, _ = FUNCTIONS[name]
    error = 0.0
    for start in range(pattern(first), pattern(last), 1 << 17):
        x = f32(np.arange(start, min(start + (1 << 17), pattern(last))))
        true = judge(x.astype(np.float64))
        ulp = np.ldexp(1.0, np.maximum(np.frexp(true)[1] - 24, -149))
        error = max(error, float(np.max(np.abs(ours(x) - true) / ulp)))
    return error


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("exp2", 1.0, 2.0),
        ("exp2", -126.0, -149.9),  # subnormal results
        ("log2", 1.0, 2.0),  # both branches: 1.5 .. 2 is reduced to 0.75 .. 1
        ("reciprocal", 1.0, 2.0),
        ("rsqrt", 1.0, 2.0),
        ("rsqrt", 2.0, 4.0),
        ("sin2pi", 0.125, 0.25),
    ],
)
def test_error_over_a_whole_binade(name, first, last):
    assert worst(name, first, last) < LIMIT


def scattered(count: int, seed: int) -> np.ndarray:
    """Patterns of every exponent and sign, subnormals and the neighbours of powers of two."""
    rng = np.random.default_rng(seed)
    random = rng.integers(0, 2**32, count, dtype=np.uint32)
    subnormal = rng.integers(0, 2**23, count // 8, dtype=np.uint32)
    power = np.arange(0, 256, dtype=np.uint32) << 23
    near = np.concatenate([power, power + 1, np.maximum(power, 1) - 1])
    near_one = 0x3F800000 + np.arange(-40, 41)
    # exp2 and sin2pi do their work between 2^-26 and 2^24.
    middle = rng.integers(0x32000000, 0x4B800000, count, dtype=np.uint32)
    both = np.concatenate([random, subnormal, near, near_one, middle]).astype(np.uint32)
    return np.unique(np.concatenate([both, both | np.uint32(0x80000000)]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_everywhere(name):
    ours, _, exact = FUNCTIONS[name]
    x = f32(scattered(600, seed=2))
    if name in ("log2", "rsqrt"):
        x = x[x > 0]
    if name == "exp2":
        x = x[(x > -150) & (x < 128)]
    x = x[np.isfinite(x) & (x != 0)]
    for value, result in zip(x.tolist(), ours(x).tolist(), strict=True):
        with mpmath.workprec(200):
            true = exact(mpmath.mpf(value))
            if true == 0:
                assert result == 0, value
                continue
            if abs(true) >= 2.0**128 - 2.0**103:
                assert abs(result) == inf, value
                continue
            ulp = mpmath.ldexp(1, max(int(mpmath.frexp(true)[1]) - 24, -149))
            assert abs(result - true) / ulp < LIMIT, value


# --- The docstrings, step by step, in Python's unbounded integers -----------------------------


class Steps:
    """The published steps on one pattern, checking that every value fits its stated width."""

    def __init__(self) -> None:
        self.widest_product = 0

    def quadratic(self, table: np.ndarray, row: int, d: int, w: int) -> int:
        assert 0 <= row < len(table) and 0 <= d < 1 << w
        c0, c1, c2 = table[row].tolist()
        first = c2 * d
        second = (c1 + (first >> w)) * d
        self.widest_product = max(self.widest_product, abs(first), abs(second))
        return c0 + (second >> w)

    def unpack(self, pattern: int, normalised: bool) -> tuple[int, int]:
        field, m = pattern >> 23 & 0xFF, pattern & 0x7FFFFF
        m, e = (m | 1 << 23, field - 150) if field else (m, -149)
        while normalised and m < 1 << 23:
            m, e = m << 1, e - 1
        return m, e

    def pack(self, sign: int, s: int, e: int) -> int:
        assert 0 <= s < 1 << 62
        if s == 0:
            return sign << 31
        q = max(s.bit_length() + e - 24, -149)
        n = q - e
        if n <= 0:
            k = s << -n
        else:
            k, rest, half = s >> n, s & ((1 << n) - 1), 1 << (n - 1)
            k += rest > half or (rest == half and k & 1)
        return min(((q + 149) << 23) + k, 0x7F800000) | sign << 31

    def exp2(self, x: int) -> int:
        m, e = self.unpack(x, normalised=False)
        signed = -m if x >> 31 else m
        v = signed << e + 30 if e + 30 >= 0 else signed >> -(e + 30)
        assert -(1 << 38) <= v < 1 << 38
        y = self.quadratic(tables.EXP2_TABLE, v >> 23 & 127, v & 0x7FFFFF, 23)
        return self.pack(0, y, (v >> 30) - 30)

    def log2(self, x: int) -> int:
        m, e = self.unpack(x, normalised=True)
        exponent = e + 23
        if m >= 3 << 22:
            t, exponent = m - (1 << 24), exponent + 1
        else:
            t = 2 * (m - (1 << 23))
        z = t + (1 << 22)
        y = self.quadratic(tables.LOG2_TABLE, z >> 16, z & 0xFFFF, 16)
        s = (exponent << 54) + t * y
        return self.pack(int(s < 0), abs(s), -54)

    def reciprocal(self, x: int) -> int:
        m, e = self.unpack(x, normalised=True)
        u = m - (1 << 23)
        y = self.quadratic(tables.RECIPROCAL_TABLE, u >> 15, u & 0x7FFF, 15)
        return self.pack(x >> 31, y, -53 - e)

    def rsqrt(self, x: int) -> int:
        m, e = self.unpack(x, normalised=True)
        odd, k, u = (e + 23) & 1, (e + 23) >> 1, m - (1 << 23)
        y = self.quadratic(tables.RSQRT_TABLE, 128 * odd + (u >> 16), u & 0xFFFF, 16)
        return self.pack(0, y, -30 - k)

    def sin2pi(self, x: int) -> int:
        m, e = self.unpack(x, normalised=False)
        sign = x >> 31
        if e >= 0:
            return sign << 31
        f = m % (1 << -e)
        if 2 * f > 1 << -e:
            f, sign = (1 << -e) - f, sign ^ 1
        if 4 * f > 1 << -e:
            f = (1 << -e - 1) - f
        z = f << e + 30 if e + 30 >= 0 else f >> -(e + 30)
        z = min(z, (1 << 28) - 1)
        y = self.quadratic(tables.SIN2PI_TABLE, z >> 21, z & 0x1FFFFF, 21)
        assert f * y < 1 << 57
        return self.pack(sign, f * y, e - 30)


@pytest.mark.parametrize(
    ("name", "product_bits"),
    [("exp2", 48), ("log2", 40), ("reciprocal", 38), ("rsqrt", 39), ("sin2pi", 48)],
)
def test_docstring_steps_give_the_same_bits(name, product_bits):
    x = scattered(2000, seed=3)
    value = f32(x)
    x = x[np.isfinite(value) & (value != 0)]
    if name in ("log2", "rsqrt"):
        x = x[x < 0x80000000]
    if name == "exp2":
        x = x[(f32(x) > -150) & (f32(x) < 128)]
    steps = Steps()
    follow: Callable[[int], int] = getattr(steps, name)
    expected = [follow(p) for p in x.tolist()]
    np.testing.assert_array_equal(FUNCTIONS[name][0](f32(x)).view(np.uint32), expected)
    assert steps.widest_product < 1 << product_bits


def test_coefficients_are_pinned():
    shapes = {}
    digest = hashlib.sha256()
    for name in FUNCTIONS:
        table = getattr(tables, f"{name.upper()}_TABLE")
        assert table.dtype == np.int64 and not table.flags.writeable
        shapes[name] = table.shape
        digest.update(table.astype("<i8").tobytes())
    assert shapes == {
        "exp2": (128, 3),
        "log2": (192, 3),
        "reciprocal": (256, 3),
        "rsqrt": (256, 3),
        "sin2pi": (128, 3),
    }
    assert digest.hexdigest() == (
        "c5d39e618326d690540885b2be0d8a80807e81476c7fe6efa60b0467809b3588"
    )


# --- Exact and special values ----------------------------------------------------------------


def test_exact_values():
    n = np.arange(-149, 128)
    powers = np.ldexp(np.float32(1), n).astype(np.float32)
    np.testing.assert_array_equal(tables.exp2(n.astype(np.float32)), powers)
    np.testing.assert_array_equal(tables.log2(powers), n.astype(np.float32))
    with np.errstate(over="ignore"):
        expected = np.ldexp(1.0, -n).astype(np.float32)
    np.testing.assert_array_equal(tables.reciprocal(powers), expected)
    np.testing.assert_array_equal(tables.reciprocal(-powers), -expected)
    even = n % 2 == 0
    roots = np.ldexp(1.0, -(n[even] // 2)).astype(np.float32)
    np.testing.assert_array_equal(tables.rsqrt(powers[even]), roots)
    quarters = np.arange(-4001, 4002)
    sines = np.array([0, 1, 0, -1], np.float32)[quarters % 4]
    np.testing.assert_array_equal(tables.sin2pi((quarters / 4).astype(np.float32)), sines)


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        (
            "exp2",
            [(inf, inf), (-inf, 0.0), (128.0, inf), (3e38, inf), (-150.0, 0.0), (-3e38, 0.0),
             (0.0, 1.0), (-0.0, 1.0), (1e-40, 1.0), (-1e-40, 1.0), (-149.5, 2.0**-149)],
        ),
        ("log2", [(inf, inf), (-inf, nan), (0.0, -inf), (-0.0, -inf), (-1.0, nan),
                  (-1e-45, nan), (1.0, 0.0)]),
        ("reciprocal", [(inf, 0.0), (-inf, -0.0), (0.0, inf), (-0.0, -inf),
                        (2.0**-149, inf), (-(2.0**-128), -inf), (2.0**127, 2.0**-127)]),
        ("rsqrt", [(inf, 0.0), (-inf, nan), (0.0, inf), (-0.0, -inf), (-1.0, nan),
                   (-1e-45, nan)]),
        ("sin2pi", [(inf, nan), (-inf, nan), (0.0, 0.0), (-0.0, -0.0), (1.0, 0.0), (-1.0, -0.0),
                    (0.5, 0.0), (-0.5, -0.0), (3e38, 0.0), (-3e38, -0.0), (8388608.0, 0.0),
                    (4194303.25, 1.0), (-8388607.5, -0.0)]),
    ],
)  # fmt: skip
def test_special_values(name, cases):
    ours = FUNCTIONS[name][0]
    for x, expected in cases:
        want = CANONICAL_NAN if np.isnan(expected) else pattern(expected)
        assert int(ours(np.float32(x)).view(np.uint32)) == want, x
    for payload in (0x7F800001, 0x7FC00000, 0xFFFFFFFF):
        assert int(ours(f32(payload)).view(np.uint32)) == CANONICAL_NAN


def test_symmetry_and_shape():
    x = f32(scattered(500, seed=4)).reshape(-1)
    x = x[np.isfinite(x)]
    for function in (tables.sin2pi, tables.reciprocal):
        np.testing.assert_array_equal(
            function(-x).view(np.uint32), function(x).view(np.uint32) ^ 0x80000000
        )
    grid = np.ones((2, 3, 4), np.float32)
    for function, _, _ in FUNCTIONS.values():
        assert function(grid).shape == (2, 3, 4) and function(grid).dtype == np.float32
