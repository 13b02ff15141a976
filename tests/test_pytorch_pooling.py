"""Pooling through PyTorch on the simulated chip, with torch on the CPU as the judge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import pagoda
import pagoda.pytorch.inductor
from pagoda.pytorch import device

P = "pagoda"


@pytest.fixture(autouse=True, scope="module")
def chip():
    before = (device.state.executor, device.state.allocator)
    torch._dynamo.reset()
    torch.pagoda.reset_fallbacks()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield pagoda.use_chip("edge")
    device.state.executor, device.state.allocator = before


@st.composite
def windows(draw):
    """A tensor and the arguments of a pooling operation."""

    def pair(least, most):
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    sizes, kernel, stride = pair(2, 9), pair(1, 3), pair(1, 3)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    assume(all(n + 2 * p >= k for n, p, k in zip(sizes, padding, kernel, strict=True)))
    x = torch.randn((2, 3, *sizes), generator=torch.Generator().manual_seed(0))
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    x = x.to(draw(st.sampled_from((torch.bfloat16, torch.float32))))
    return x, (kernel, stride, padding)


def check(function, x: torch.Tensor) -> None:
    exact, given_ = (t.detach().requires_grad_() for t in (x.float(), x.to(P)))
    wanted, found = function(exact), function(given_)
    torch.testing.assert_close(found.cpu().float(), wanted, rtol=2**-8, atol=1e-6)
    grad = torch.randn(wanted.shape).to(x.dtype)
    wanted.backward(grad.float())
    found.backward(grad.to(P))
    tolerance = 2.0**-6 if x.dtype == torch.bfloat16 else 1e-5
    bounds = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(given_.grad.cpu().float(), exact.grad, **bounds)
    assert torch.pagoda.fallbacks() == {}


@settings(max_examples=6)
@given(windows(), st.integers(1, 2), st.booleans())
def test_max(case, apart, up):
    x, (kernel, stride, padding) = case
    sides = zip(x.shape[2:], kernel, padding, strict=True)
    assume(all(n + 2 * p >= apart * (k - 1) + 1 for n, k, p in sides))
    check(lambda t: F.max_pool2d(t, kernel, stride, padding, apart, ceil_mode=up), x)


@pytest.mark.slow
@settings(max_examples=60)
@given(windows(), st.integers(1, 2), st.booleans())
def test_max_of_many(case, apart, up):
    test_max.hypothesis.inner_test(case, apart, up)


@settings(max_examples=4)
@given(windows(), st.booleans())
def test_average(case, counted):
    x, (kernel, stride, padding) = case
    check(lambda t: F.avg_pool2d(t, kernel, stride, padding, count_include_pad=counted), x)


def test_indices_and_special_values():
    x = -torch.ones(1, 2, 5, 6)
    x[0, 0, 0, 0] = torch.nan
    x[0, 1, 3:] = -torch.inf
    wanted = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    found = F.max_pool2d(x.to(P), 3, 2, 1, return_indices=True)
    assert torch.equal(found[0].cpu().nan_to_num(7), wanted[0].nan_to_num(7))
    assert torch.equal(found[1].cpu(), wanted[1])


def test_padded_pooling_is_as_fast_as_its_memory_traffic():
    x = torch.randn(1, 16, 56, 56).to(torch.bfloat16).to(memory_format=torch.channels_last)
    for pool in (F.max_pool2d, F.avg_pool2d):
        function = torch.compile(lambda t, pool=pool: pool(t, 3, 2, 1), backend=P)
        function(x.to(P))
        with pagoda.profile() as profile:
            function(x.to(P))
        assert profile.cycles < 40_000
