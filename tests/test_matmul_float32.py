"""The float32 matrix product: its bits on every chip, its accuracy, its cycles."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from compiler_support import bfloat16, run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.compiler.cost import MatmulShape
from pagoda.compiler.errors import CompileError
from pagoda.compiler.language import TensorType
from pagoda.isa.accumulation import matmul as sum_of_products
from pagoda.isa.chip import PRESETS
from pagoda.isa.numbers import DType
from pagoda.kernels.matmul_float32 import build_matmul_float32
from pagoda.kernels.matmul_float32_blocks import (
    Float32Plan,
    choose_float32_plan,
    legal_plans,
    memory_bytes,
)
from pagoda.sim.machine import Simulator

TINY, EDGE = PRESETS["tiny"], PRESETS["edge"]
CAR = replace(PRESETS["car"], dram_bytes=1 << 26)
CHIPS = pytest.mark.parametrize("chip", [TINY, EDGE, CAR], ids=lambda chip: chip.name)
DTYPES = {np.dtype(np.float32): DType.F32, bfloat16: DType.BF16}


def matrix(batch, rows, cols, layout, seed):
    """layout: "upright", "turned" (stored transposed), "scattered" (every other element)."""
    rng = np.random.default_rng(seed)
    if layout == "turned":
        return rng.standard_normal((batch, cols, rows), np.float32).transpose(0, 2, 1)
    if layout == "scattered":
        return rng.standard_normal((batch, rows, 2 * cols), np.float32)[:, :, ::2]
    return rng.standard_normal((batch, rows, cols), np.float32)


def type_of(array, fixed=()):
    """Run-time sizes but for the dimensions in `fixed`; only a contiguous stride is fixed."""
    strides: list[int | None] = [None] * array.ndim
    for dim in reversed(range(max(array.ndim - 2, 0), array.ndim)):
        if array.strides[dim] == array.itemsize:
            strides[dim] = array.itemsize
            break
    sizes = tuple(s if d in fixed else None for d, s in enumerate(array.shape))
    return TensorType(DTYPES[array.dtype], sizes, tuple(strides))


def multiply(
    chip, a, b, *, terms=3, bias=None, out=np.float32, plan=None, fixed_k=True, turned=False
):
    """c and the result of the run, on the simulator in checking mode."""
    batch, m, k = a.shape
    n = b.shape[2]
    c = np.zeros((batch, n, m) if turned else (batch, m, n), out)
    c = c.transpose(0, 2, 1) if turned else c
    kernel = build_matmul_float32(
        chip, type_of(c), type_of(a, (2,) if fixed_k else ()), type_of(b),
        None if bias is None else type_of(bias),
        terms=terms, expected=(batch, m, n, k), plan=plan,
    )  # fmt: skip
    arguments = {"c": c, "a": a, "b": b} | ({} if bias is None else {"bias": bias})
    return c, run_kernel(chip, kernel, Simulator(chip, checking=True), **arguments)


def split(x, terms):
    """The bf16 terms of a float32 array, as float32."""
    if terms == 1:
        return [x.astype(bfloat16).astype(np.float32)]
    parts = [(x * np.float32(1 - 2**-9)).astype(bfloat16).astype(np.float32)]
    rest = x
    for _ in range(terms - 1):
        rest = rest - parts[-1]
        parts.append(rest.astype(bfloat16).astype(np.float32))
    return parts


@np.errstate(invalid="ignore", over="ignore")
def meaning(a, b, *, terms=3, bias=None, out=np.float32):
    """c as the module's docstring defines it."""
    results = []
    for left, right in zip(a, b, strict=True):
        zero = np.zeros((left.shape[0], right.shape[1]), np.float32)
        lefts, rights = split(left, terms), split(right, terms)
        p = {
            (i, j): sum_of_products(lefts[i], rights[j], zero).view(np.float32)
            for i in range(terms) for j in range(terms - i)
        }  # fmt: skip
        c = p[0, 0]
        if terms > 1:
            rest = p[0, 1] + p[1, 0]
            if terms == 3:
                rest = rest + ((p[0, 2] + p[1, 1]) + p[2, 0])
            c = np.where(np.isfinite(c), rest, np.float32(0)) + c
        results.append(c if bias is None else c + bias.astype(np.float32))
    return np.stack(results).astype(out)


def same_bits(left, right):
    kind = np.uint16 if left.dtype == bfloat16 else np.uint32
    return np.array_equal(
        np.ascontiguousarray(left).view(kind), np.ascontiguousarray(right).view(kind)
    )


# Bits --------------------------------------------------------------------------------------------


@CHIPS
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_every_chip_gives_the_bits_of_the_meaning(chip, terms):
    a, b = matrix(2, 13, 70, "upright", 0), matrix(2, 70, 37, "turned", 1)
    c, _ = multiply(chip, a, b, terms=terms)
    assert same_bits(c, meaning(a, b, terms=terms))


LAYOUTS = ("upright", "turned", "scattered")


@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_b", LAYOUTS)
def test_every_layout(of_a, of_b):
    a, b = matrix(1, 7, 19, of_a, 0), matrix(1, 19, 11, of_b, 1)
    terms = 1 if of_b == "scattered" else 2
    c, _ = multiply(TINY, a, b, terms=terms, turned=of_a == "turned")
    assert same_bits(c, meaning(a, b, terms=terms))


@settings(max_examples=12)
@given(
    st.integers(1, 2), st.integers(0, 30), st.integers(1, 30), st.integers(0, 50),
    st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.sampled_from((None, np.float32)),
    st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_random_shapes(batch, m, n, k, of_a, of_b, bias, terms, fixed_k, turned, narrow):
    a, b = matrix(batch, m, k, of_a, 0), matrix(batch, k, n, of_b, 1)
    bias = None if bias is None else np.random.default_rng(2).standard_normal(n).astype(bias)
    out = bfloat16 if narrow else np.float32
    given = {"terms": terms, "bias": bias, "out": out}
    c, _ = multiply(TINY, a, b, fixed_k=fixed_k, turned=turned, **given)
    assert same_bits(c, meaning(a, b, **given))


def test_a_bias_row_with_gaps_in_bfloat16():
    a, b = matrix(1, 5, 8, "upright", 0), matrix(1, 8, 9, "turned", 1)
    bias = np.random.default_rng(2).standard_normal(18).astype(bfloat16)[::2]
    c, _ = multiply(EDGE, a, b, bias=bias)
    assert same_bits(c, meaning(a, b, bias=bias))


def test_an_empty_sum_is_zero_plus_bias():
    bias = np.arange(3, dtype=np.float32)
    for fixed_k in (True, False):
        c, _ = multiply(
            TINY, np.zeros((1, 2, 0), np.float32), np.zeros((1, 0, 3), np.float32),
            bias=bias, fixed_k=fixed_k,
        )  # fmt: skip
        assert same_bits(c, np.broadcast_to(bias, (1, 2, 3)))


@pytest.mark.parametrize("chip", [TINY, CAR], ids=lambda chip: chip.name)
def test_any_plan_gives_the_same_bits(chip):
    m, n, k = (20, 33, 96) if chip is TINY else (70, 260, 96)
    a, b = matrix(1, m, k, "upright", 0), matrix(1, k, n, "turned", 1)
    expected = meaning(a, b)
    plans = list(legal_plans(chip, MatmulShape(1, m, n, k, 4, 4), 3))
    for plan in random.Random(0).sample(plans, 6):
        c, _ = multiply(chip, a, b, plan=plan)
        assert same_bits(c, expected), plan


# Values ------------------------------------------------------------------------------------------


def relative_error(c, a, b):
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return np.abs(c - exact).max() / (np.abs(a).astype(np.float64) @ np.abs(b)).max()


@pytest.mark.parametrize("k", [64, 1000])
def test_three_terms_are_as_accurate_as_float32(k):
    a, b = matrix(1, 16, k, "upright", 0), matrix(1, k, 16, "turned", 1)
    c, _ = multiply(EDGE, a, b)
    by_torch = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    assert relative_error(c, a, b) <= 1.5 * relative_error(by_torch, a, b) <= 1e-6
    assert relative_error(c, a, b) <= 2.0**-23


@pytest.mark.parametrize(("terms", "bits"), [(1, 8), (2, 15)])
def test_fewer_terms_keep_fewer_bits(terms, bits):
    a, b = matrix(1, 16, 100, "upright", 0), matrix(1, 100, 16, "turned", 1)
    c, _ = multiply(EDGE, a, b, terms=terms)
    assert 2.0 ** (-bits - 6) <= relative_error(c, a, b) <= 2.0**-bits


@pytest.mark.parametrize("terms", [2, 3])
def test_infinities_and_nans_act_as_in_float32(terms):
    a = np.array([[[np.inf, 1], [1, -np.inf], [np.nan, 1], [np.inf, np.inf], [3, 4]]], np.float32)
    b = np.array([[[1, -0.3], [2.7, 0]]], np.float32)
    with np.errstate(invalid="ignore"):
        expected = a @ b
    c, _ = multiply(TINY, a, b, terms=terms)
    assert np.array_equal(np.isnan(c), np.isnan(expected))
    infinite = np.isinf(expected)
    assert np.array_equal(c[infinite], expected[infinite])
    assert np.allclose(c[0, 4], expected[0, 4], rtol=1e-4)


@pytest.mark.parametrize(("terms", "factor"), [(2, 0.5), (3, 0.5), (3, 1)])
def test_the_largest_numbers_stay_finite(terms, factor):
    largest = np.finfo(np.float32).max
    a, b = np.array([[[largest]]], np.float32), np.array([[[factor]]], np.float32)
    c, _ = multiply(TINY, a, b, terms=terms)
    assert np.allclose(c, largest * b, rtol=2.0**-15 if terms == 2 else 0)


# Cycles and blocks -------------------------------------------------------------------------------


def zeros_run(chip, m, n, k, plan=None, terms=3):
    a = np.zeros((1, m, k), np.float32)
    b = np.zeros((1, n, k), np.float32).transpose(0, 2, 1)
    return multiply(chip, a, b, plan=plan, terms=terms)[1].cycles


def test_decode_is_near_the_rate_of_its_splits():
    """Three vector commands over the weights take 1.2 times as long as their load."""
    m, n, k = 1, 1536, 576
    bound = 3 * n * k / EDGE.lanes
    assert bound / zeros_run(EDGE, m, n, k) >= 0.8


def test_decode_with_one_term_is_near_the_bandwidth():
    """Loads of b must be large enough for its buffers to cover the DRAM's latency."""
    m, n, k = 1, 576, 1536
    bound = n * k * 4 / float(EDGE.dram_bytes_per_cycle)
    plan = choose_float32_plan(EDGE, MatmulShape(1, m, n, k, 4, 4), 1)
    measured = zeros_run(EDGE, m, n, k, plan, terms=1)
    assert bound / measured >= 0.9 and abs(measured - plan.cycles) < 0.05 * measured


@pytest.mark.parametrize("chip", [TINY, EDGE], ids=lambda chip: chip.name)
def test_large_products_are_near_the_peak(chip):
    m, n, k = (64, 48, 256) if chip is TINY else (128, 192, 576)
    cycles = zeros_run(chip, m, n, k)
    # A product this small cannot hide every latency: 0.8497 on edge.
    assert 6 * m * n * k / chip.macs_per_cycle / cycles >= 0.845


@pytest.mark.parametrize(("m", "n", "k"), [(1, 576, 1536), (40, 300, 200), (128, 192, 576)])
def test_the_estimate_is_near(m, n, k):
    plan = choose_float32_plan(EDGE, MatmulShape(1, m, n, k, 4, 4), 3)
    measured = zeros_run(EDGE, m, n, k, plan) - EDGE.launch_cycles - 2 * EDGE.dram_latency - 1200
    assert abs(measured - plan.cycles) < 0.1 * plan.cycles + 2600


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_near_the_best_of_a_search(seed):
    rng = random.Random(seed)
    m, n, k = rng.choice((1, 7, 33, 100)), rng.randrange(20, 500), rng.randrange(20, 500)
    plans = list(legal_plans(EDGE, MatmulShape(1, m, n, k, 4, 4), 3))
    chosen = zeros_run(EDGE, m, n, k)
    best = min(zeros_run(EDGE, m, n, k, plan) for plan in rng.sample(plans, 8))
    assert chosen - 2600 <= 1.15 * best


def test_plans_fit_the_smallest_chip():
    for shape in ((1, 1, 1, 1), (1, 1024, 1024, 1024), (3, 1, 50000, 4096)):
        shape = MatmulShape(*shape, 4, 4)
        for terms in (1, 2, 3):
            plan = choose_float32_plan(TINY, shape, terms)
            sram, acc = memory_bytes(TINY, shape, terms, plan)
            assert sram <= TINY.sram_bytes and acc <= TINY.acc_bytes


def test_a_chip_without_bf16():
    message = (
        "^float32 matmul 4 x 5 by 5 x 6: it needs a matrix engine that multiplies bf16, but chip "
        "tiny8 has int8; use another chip$"
    )
    with pytest.raises(CompileError, match=message):
        choose_float32_plan(PRESETS["tiny8"], MatmulShape(1, 4, 6, 5, 4, 4), 3)


def test_no_plan_fits():
    small = replace(EDGE, name="small", sram_bytes=4096, sram_banks=8)
    message = (
        "^float32 matmul 64 x 64 by 64 x 64: two buffers of the smallest tiles fit the SRAM of "
        "chip small, but it has 4096 bytes in 8 banks; use a chip with more SRAM$"
    )
    with pytest.raises(CompileError, match=message):
        choose_float32_plan(small, MatmulShape(1, 64, 64, 64, 4, 4), 3)


def test_any_explicit_plan_is_built_and_named():
    dynamic = TensorType.dynamic(DType.F32, 3)
    kernel = build_matmul_float32(
        EDGE, dynamic, dynamic, dynamic, plan=Float32Plan(False, 16, 16, 32, 1)
    )
    assert kernel.name == "matmul_float32_3"
    assert kernel.blocks == (("BM", 16), ("BN", 16), ("BK", 32))
