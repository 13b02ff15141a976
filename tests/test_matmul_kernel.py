"""The matmul kernels: bits against the contract's order of accumulation, cycles, tile choice."""

import random
from dataclasses import replace

import numpy as np
import pytest
from compiler_support import bfloat16, run_calls, run_kernel
from golden_text import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.compiler.cost import MatmulPlan, MatmulShape, choose_matmul, legal_plans
from pagoda.compiler.errors import CompileError
from pagoda.compiler.language import TensorType
from pagoda.compiler.stages import stage_text
from pagoda.isa.accumulation import matmul as reference_product
from pagoda.isa.accumulation import matmul_i8
from pagoda.isa.chip import PRESETS
from pagoda.isa.numbers import DType
from pagoda.kernels.matmul import build_matmul

TINY, TINY8, EDGE, CAR = (PRESETS[name] for name in ("tiny", "tiny8", "edge", "car"))
DTYPES = {bfloat16: DType.BF16, np.dtype(np.float32): DType.F32, np.dtype(np.int8): DType.I8,
          np.dtype(np.int32): DType.I32}  # fmt: skip


def matrix(batch, rows, cols, transposed, seed, integer=False):
    shape = (batch, cols, rows) if transposed else (batch, rows, cols)
    rng = np.random.default_rng(seed)
    if integer:
        data = rng.integers(-128, 128, shape).astype(np.int8)
    else:
        data = rng.standard_normal(shape).astype(bfloat16)
    return data.transpose(0, 2, 1) if transposed else data


def type_of(array, fixed=()):
    """Run-time sizes but for the dimensions in `fixed`; only a contiguous stride is fixed."""
    size = array.dtype.itemsize
    contiguous = min(range(array.ndim), key=lambda d: (array.strides[d] or 1 << 40, -d))
    strides = tuple(size if d == contiguous else None for d in range(array.ndim))
    sizes = tuple(s if d in fixed else None for d, s in enumerate(array.shape))
    return TensorType(DTYPES[array.dtype], sizes, strides)


def run_matmul(chip, a, b, out_dtype, bias=None, plan=None, fixed_k=True):
    batch, m, k = a.shape
    n = b.shape[2]
    c = np.zeros((batch, m, n), out_dtype)
    kernel = build_matmul(
        chip, type_of(c), type_of(a, (2,) if fixed_k else ()), type_of(b),
        None if bias is None else type_of(bias), expected=(batch, m, n, k), plan=plan,
    )  # fmt: skip
    arguments = {"c": c, "a": a, "b": b} | ({} if bias is None else {"bias": bias})
    return c, run_kernel(chip, kernel, **arguments)


def expected_product(a, b, out_dtype, bias=None):
    results = []
    for left, right in zip(a, b, strict=True):
        shape = (left.shape[0], right.shape[1])
        if a.dtype == np.int8:
            product = matmul_i8(left, right, np.zeros(shape, np.int32))
        else:
            lanes = left.astype(np.float32), right.astype(np.float32)
            product = reference_product(*lanes, np.zeros(shape, np.float32))
        results.append(product if bias is None else product + bias)
    return np.stack(results).astype(out_dtype)


@pytest.mark.parametrize("chip", [TINY, EDGE, CAR], ids=lambda chip: chip.name)
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_every_layout_on_every_chip(chip, transposed):
    a = matrix(1, 13, 37, transposed[0], 0)
    b = matrix(1, 37, 21, transposed[1], 1)
    c, _ = run_matmul(chip, a, b, np.float32)
    assert np.array_equal(c, expected_product(a, b, np.float32))


@settings(max_examples=10)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 70),
    st.sampled_from((0, 1)), st.sampled_from((0, 1)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_random_shapes(batch, m, n, k, turn_a, turn_b, with_bias, fixed_k):
    a, b = matrix(batch, m, k, turn_a, 0), matrix(batch, k, n, turn_b, 1)
    bias = np.random.default_rng(2).standard_normal(n).astype(np.float32) if with_bias else None
    c, _ = run_matmul(TINY, a, b, bfloat16, bias, fixed_k=fixed_k)
    assert np.array_equal(
        c.view(np.uint16), expected_product(a, b, bfloat16, bias).view(np.uint16)
    )


@pytest.mark.parametrize("m", [0, 1, 2])
def test_empty_and_single(m):
    a, b = matrix(1, m, 3, 0, 0), matrix(1, 3, 1, 1, 1)
    c, _ = run_matmul(EDGE, a, b, np.float32, fixed_k=False)
    assert np.array_equal(c, expected_product(a, b, np.float32))


@pytest.mark.parametrize("chip", [TINY8, EDGE], ids=lambda chip: chip.name)
def test_int8(chip):
    a, b = matrix(2, 9, 50, 0, 0, integer=True), matrix(2, 50, 23, 1, 1, integer=True)
    c, _ = run_matmul(chip, a, b, np.int32)
    assert np.array_equal(c, expected_product(a, b, np.int32))


def test_any_plan_gives_the_same_bits():
    a, b = matrix(1, 20, 96, 0, 0), matrix(1, 96, 33, 1, 1)
    expected = expected_product(a, b, bfloat16)
    plans = list(legal_plans(TINY, MatmulShape(1, 20, 33, 96)))
    for plan in random.Random(0).sample(plans, 8):
        c, _ = run_matmul(TINY, a, b, bfloat16, plan=plan)
        assert np.array_equal(c.view(np.uint16), expected.view(np.uint16)), plan


def test_products_in_a_chain():
    """The second product reads what the first stored, in one launch; its weights are loaded
    ahead."""
    a, w, v = matrix(1, 2, 64, 0, 0), matrix(1, 64, 48, 1, 1), matrix(1, 48, 32, 1, 2)
    middle, out = np.zeros((1, 2, 48), bfloat16), np.zeros((1, 2, 32), bfloat16)
    plan = MatmulPlan(True, 2, 16, 32, 4, 0)
    first, second = (
        build_matmul(EDGE, type_of(c), type_of(x, (2,)), type_of(y), plan=plan)
        for c, x, y in ((middle, a, w), (out, middle, v))
    )
    run_calls(
        EDGE,
        [(first, {"c": middle, "a": a, "b": w}), (second, {"c": out, "a": middle, "b": v})],
    )
    assert np.array_equal(middle, expected_product(a, w, bfloat16))
    assert np.array_equal(out, expected_product(middle, v, bfloat16))


@pytest.mark.parametrize("stage", ["ir", "commands"])
def test_stages_of_a_decode_product(stage):
    operands = (
        TensorType.dynamic(DType.BF16, 3),
        TensorType(DType.BF16, (None, None, 576), (None, None, 2)),
        TensorType.dynamic(DType.BF16, 3, -2),
    )
    kernel = build_matmul(EDGE, *operands, plan=MatmulPlan(True, 1, 96, 96, 7, 0))
    check_golden(f"matmul_resident.{stage}.txt", stage_text(kernel, EDGE, stage))


# Cycles ------------------------------------------------------------------------------------------


def zeros_run(chip, m, n, k, plan=None):
    a, b = np.zeros((1, m, k), bfloat16), np.zeros((1, n, k), bfloat16).transpose(0, 2, 1)
    return run_matmul(chip, a, b, bfloat16, plan=plan)[1]


def test_decode_product_reaches_the_bandwidth():
    result = zeros_run(EDGE, 1, 1536, 576)
    weights = 2 * 576 * 1536
    assert weights / float(EDGE.dram_bytes_per_cycle) / result.cycles >= 0.93


def test_large_product_reaches_the_peak():
    result = zeros_run(EDGE, 512, 512, 512)
    assert 512**3 / EDGE.macs_per_cycle / result.cycles >= 0.97


@pytest.mark.slow
def test_product_of_1024_reaches_the_peak():
    result = zeros_run(EDGE, 1024, 1024, 1024)
    assert 1024**3 / EDGE.macs_per_cycle / result.cycles >= 0.97


def launch_overhead(chip):
    return chip.launch_cycles + 2 * chip.dram_latency + 1200


@pytest.mark.parametrize(("m", "n", "k"), [(1, 576, 1536), (40, 300, 200), (128, 192, 576)])
def test_the_estimate_is_near(m, n, k):
    """The estimate counts from activations that are ready CHAIN_LATENCIES late."""
    plan = choose_matmul(EDGE, MatmulShape(1, m, n, k))
    measured = zeros_run(EDGE, m, n, k, plan).cycles - launch_overhead(EDGE)
    assert abs(measured - plan.cycles) < 0.06 * plan.cycles + 2600


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_near_the_best_of_a_search(seed):
    """Measured, against plans drawn at random from all legal ones."""
    rng = random.Random(seed)
    m, n, k = rng.choice((1, 7, 33, 100)), rng.randrange(20, 500), rng.randrange(20, 500)
    shape = MatmulShape(1, m, n, k)
    chosen = zeros_run(EDGE, m, n, k, choose_matmul(EDGE, shape)).cycles
    plans = rng.sample(list(legal_plans(EDGE, shape)), 12)
    best = min(zeros_run(EDGE, m, n, k, plan).cycles for plan in plans)
    assert chosen - 2600 <= 1.1 * best


def test_no_plan_fits():
    """A chip whose SRAM cannot hold two buffers of the smallest tiles."""
    small = replace(EDGE, name="small", sram_bytes=8192, sram_banks=8)
    message = (
        "^matmul 64 x 64 by 64 x 64: two buffers of the smallest tiles fit the SRAM of chip small, "
        "but it has 8192 bytes in 8 banks; use a chip with more SRAM$"
    )
    with pytest.raises(CompileError, match=message):
        choose_matmul(small, MatmulShape(1, 64, 64, 64))
