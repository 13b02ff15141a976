"""Running sums and extrema, in blocks and without, against torch on the CPU."""

from __future__ import annotations

import pytest
import torch

import pagoda
from pagoda.pytorch.chip import profile

P = "pagoda"
SCANS = {
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: (1 + x / 10).cumprod(-1),
    "logcumsumexp": lambda x: (20 * x).logcumsumexp(-1),
    "cummax": lambda x: x.round().cummax(-1),
    "cummin": lambda x: x.round().cummin(-1),
    "integers": lambda x: (10 * x).int().cumsum(-1),
    "truth values": lambda x: (x > 0).cumsum(-1),
    "largest integers": lambda x: (10 * x).int().cummax(-1),
}


@pytest.fixture(autouse=True, scope="module")
def edge():
    pagoda.use_chip("edge")


@pytest.mark.parametrize("name", SCANS)
def test_scans(name):
    """Short rows, then long ones, whose length is symbolic by then."""
    for count in (5, 150, 64):
        x = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
        want, got = SCANS[name](x), SCANS[name](x.to(P))
        pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
        for right, found in pairs:
            torch.testing.assert_close(found.cpu(), right, rtol=2e-5, atol=2e-5)


def test_extrema_of_a_row_with_nan():
    x = torch.tensor([1.0, float("nan"), 3.0])
    values, indices = x.to(P).cummax(0)
    torch.testing.assert_close(values.cpu(), x.cummax(0).values, equal_nan=True)
    assert indices.tolist() == x.cummax(0).indices.tolist()


def test_the_cost_grows_with_the_row_not_its_square():
    cycles = []
    for count in (512, 2048):
        x = torch.ones(2, count).to(P)
        run = torch.compile(lambda x: x.cumsum(1), backend=P, dynamic=False)
        with profile() as found:
            run(x)
        cycles.append(found.cycles)
    assert cycles[1] < 6 * cycles[0]
