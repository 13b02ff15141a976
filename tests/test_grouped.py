"""Grouped products: bits against products summed in the contract's order, group by group."""

import numpy as np
import pytest
import torch
from compiler_support import bfloat16, run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

import pagoda
from pagoda.compiler.language import TensorType
from pagoda.isa import accumulation
from pagoda.isa.chip import PRESETS
from pagoda.isa.numbers import DType
from pagoda.kernels.grouped import grouped_depth, grouped_rows

BF16 = {rank: TensorType.dynamic(DType.BF16, rank) for rank in (2, 3)}
F32 = {rank: TensorType.dynamic(DType.F32, rank) for rank in (2, 3)}
ENDS = TensorType.dynamic(DType.I32, 2)
BLOCKS = {"BM": 8, "BN": 16, "BK": 16, "BUFFERS": 2}


@st.composite
def groups(draw):
    """(chip, ends of the groups, rows, k, n): groups may be empty, rows may be in none."""
    sizes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    rest, k, n = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    chip = PRESETS[draw(st.sampled_from(("tiny", "car")))]
    return chip, np.cumsum(sizes, dtype=np.int32), max(sum(sizes) + rest, 1), k, n


def draw(*sizes):
    return np.random.default_rng(sum(sizes)).standard_normal(sizes).astype(bfloat16)


def product(a, b):
    zeros = np.zeros((a.shape[0], b.shape[1]), np.float32)
    return accumulation.matmul(a.astype(np.float32), b.astype(np.float32), zeros)


@settings(max_examples=12)
@given(groups())
def test_rows(case):
    chip, ends, rows, k, n = case
    a, w, c = draw(rows, k), draw(len(ends), k, n), np.full((rows, n), 7, np.float32)
    ir = grouped_rows.build(c=F32[2], a=BF16[2], w=BF16[3], ends=ENDS, **BLOCKS)
    run_kernel(chip, ir, c=c, a=a, w=w, ends=ends[:, None])
    wanted, begin = np.zeros_like(c), 0
    for g, end in enumerate(ends):
        wanted[begin:end] = product(a[begin:end], w[g])
        begin = end
    assert np.array_equal(c, wanted)


@settings(max_examples=12)
@given(groups())
def test_depth(case):
    chip, ends, rows, m, n = case
    a, b, c = draw(m, rows), draw(rows, n), np.full((len(ends), m, n), 7, np.float32)
    ir = grouped_depth.build(c=F32[3], a=BF16[2], b=BF16[2], ends=ENDS, **BLOCKS)
    run_kernel(chip, ir, c=c, a=a, b=b, ends=ends[:, None])
    begin = 0
    for g, end in enumerate(ends):
        span = slice(begin, end)
        assert np.array_equal(c[g], product(a[:, span], b[span]))
        begin = end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_only_rows_of_a_group_are_multiplied(dtype):
    """With gradients; what comes after the last group is 0."""
    opened = pagoda.use_chip("edge")
    torch.manual_seed(0)
    a, b = torch.randn(48, 32).to(dtype), torch.randn(4, 32, 64).to(dtype)
    ends = torch.tensor([16, 16, 40, 48], dtype=torch.int32)
    torch.set_float32_matmul_precision("highest")

    def multiplied(device):
        x, w = (t.detach().to(device).requires_grad_() for t in (a, b))
        y = torch.ops.transformers.grouped_mm_fallback(x, w, ends.to(device))
        y.float().square().sum().backward()
        return y, x.grad, w.grad

    pytest.importorskip("transformers.integrations.moe")
    wanted = multiplied("cpu")
    before = opened.counters.macs
    for found, expected in zip(multiplied("pagoda"), wanted, strict=True):
        largest = expected.abs().max()
        bound = 2**-7 if dtype == torch.bfloat16 else 1e-6
        assert (found.cpu() - expected).abs().max() <= bound * largest
    products = 1 if dtype == torch.bfloat16 else 6
    assert opened.counters.macs - before == 3 * 48 * 32 * 64 * products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torchs_own_function(dtype):
    """Eager and with gradients; torch's CUDA takes bfloat16 only."""
    pagoda.use_chip("edge")
    torch.manual_seed(0)
    a, b = torch.randn(48, 32).to(dtype), torch.randn(4, 32, 64).to(dtype)
    ends = torch.tensor([16, 16, 40, 48], dtype=torch.int32)
    torch.set_float32_matmul_precision("highest")

    x, w = (t.to("pagoda").requires_grad_() for t in (a, b))
    y = torch.nn.functional.grouped_mm(x, w, offs=ends.to("pagoda"))
    y.float().square().sum().backward()
    groups = ((0, 16), (16, 16), (16, 40), (40, 48))
    wanted = torch.cat([a[i:j].float() @ b[g].float() for g, (i, j) in enumerate(groups)])
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert (y.detach().cpu().float() - wanted).abs().max() <= bound * wanted.abs().max()
    assert x.grad.shape == a.shape and bool(torch.isfinite(w.grad).all())
