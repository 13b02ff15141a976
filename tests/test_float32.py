"""Splitting float32 into bf16 terms."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from compiler_support import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import PRESETS
from pagoda.isa.numbers import DType
from pagoda.kernels.float32 import products, split_terms
from pagoda.sim.machine import Simulator

TINY = PRESETS["tiny"]
COLS = 64


def splitting_kernel(terms: int) -> Kernel:
    """y[i] = term i of x[1, COLS]."""
    b = KernelBuilder(f"split_{terms}")
    x = b.tensor("x", DType.F32, 2)
    y = b.tensor("y", DType.BF16, 2)
    whole = b.tile(DType.F32, 1, COLS)
    b.load(whole, x.at(0, 0))
    tiles = [b.tile(DType.BF16, 1, COLS) for _ in range(terms)]
    split_terms(b, whole, tiles, 1, COLS)
    for row, tile in enumerate(tiles):
        b.store(y.at(row, 0), tile)
    return b.build()


KERNELS = {terms: splitting_kernel(terms) for terms in (1, 2, 3)}


def split(values: list[float] | np.ndarray, terms: int) -> np.ndarray:
    """The terms, as float64 (terms, len(values))."""
    x = np.zeros((1, COLS), np.float32)
    x[0, : len(values)] = values
    y = np.zeros((terms, COLS), ml_dtypes.bfloat16)
    run_kernel(TINY, KERNELS[terms], Simulator(TINY, checking=True), x=x, y=y)
    return y[:, : len(values)].astype(np.float64)


FLT_MAX = float(np.finfo(np.float32).max)
NORMAL = st.floats(-FLT_MAX, FLT_MAX, width=32).filter(lambda x: x == 0 or abs(x) >= 2**-110)


@settings(max_examples=12)
@given(st.lists(NORMAL, min_size=20, max_size=COLS))
def test_three_terms_are_exact(values):
    assert np.array_equal(split(values, 3).sum(0), np.array(values, np.float64))


def test_two_terms_keep_sixteen_bits():
    values = np.random.default_rng(0).standard_normal(COLS).astype(np.float32)
    error = np.abs(split(values, 2).sum(0) - values)
    assert np.all(error <= 2.0**-16 * np.abs(values))


def test_one_term_is_rounded_to_nearest():
    values = np.random.default_rng(0).standard_normal(COLS).astype(np.float32)
    assert np.array_equal(split(values, 1)[0], values.astype(ml_dtypes.bfloat16))


def test_the_first_term_never_overflows():
    assert np.isfinite(split([FLT_MAX, -FLT_MAX], 2)).all()


@pytest.mark.parametrize("terms", [2, 3])
def test_terms_after_a_non_finite_one_are_zero(terms):
    found = split([np.inf, -np.inf, np.nan, 1.5], terms)
    assert np.array_equal(found[0], [np.inf, -np.inf, np.nan, 1.5], equal_nan=True)
    assert not found[1:].any() and not np.signbit(found[1:]).any()


def test_products_come_smallest_first():
    assert products(1) == ((0, 0),)
    assert products(2) == ((0, 1), (1, 0), (0, 0))
    assert products(3) == ((0, 2), (1, 1), (2, 0), (0, 1), (1, 0), (0, 0))
