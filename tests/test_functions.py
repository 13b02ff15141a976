"""Special functions against torch on the CPU in float64, over the range where they matter."""

from __future__ import annotations

import pytest
import torch

import pagoda

P = "pagoda"
FUNCTIONS = {
    "asinh": (torch.asinh, -50, 50),
    "acosh": (torch.acosh, 1, 50),
    "atanh": (torch.atanh, -1, 1),
    "erfinv": (torch.erfinv, -1, 1),
    "lgamma": (torch.lgamma, -4.7, 30),
    "digamma": (torch.digamma, -4.7, 30),
    "trigamma": (lambda x: torch.polygamma(1, x), -4.7, 30),
    "log_ndtr": (torch.special.log_ndtr, -20, 5),
}


@pytest.fixture(autouse=True, scope="module")
def edge():
    pagoda.use_chip("edge")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, low, high = FUNCTIONS[name]
    x = torch.linspace(low, high, 401)
    got, want = function(x.to(P)).cpu(), function(x.double()).float()
    torch.testing.assert_close(got, want, rtol=3e-5, atol=3e-6, equal_nan=True)


def test_large_and_special_arguments():
    x = torch.tensor([1e20, -1e20, float("inf"), float("-inf"), 0.0, -0.0])
    torch.testing.assert_close(torch.asinh(x.to(P)).cpu(), torch.asinh(x))
    torch.testing.assert_close(torch.hypot(x.to(P), x.to(P)).cpu(), torch.hypot(x, x))
    assert torch.equal(torch.copysign(x.to(P), x.to(P)).cpu(), x)
    poles = torch.tensor([0.0, -1.0, 1.0, 2.0])
    torch.testing.assert_close(torch.lgamma(poles.to(P)).cpu(), torch.lgamma(poles), atol=2e-6,
                               rtol=0)  # fmt: skip
