"""Sorting of rows longer than 2,048 elements, which are sorted in blocks and merged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagoda
from pagoda.pytorch import sorting

P = "pagoda"


@pytest.fixture(autouse=True)
def edge():
    pagoda.use_chip("edge")
    torch.pagoda.reset_fallbacks()
    yield
    assert torch.pagoda.fallbacks() == {}


def rows(kind: str, count: int, length: int) -> torch.Tensor:
    """Rows with much that is equal, and with the ends of their type's range."""
    draw = torch.Generator().manual_seed(length)
    if kind == "integers":
        x = torch.randint(-(1 << 31), (1 << 31) - 1, (count, length), generator=draw)
        x[:, ::7], x[:, 1::9], x[:, -1] = 5, (1 << 31) - 1, -(1 << 31)
        return x
    x = torch.randn(count, length, generator=draw)
    if kind == "few values":
        return (2 * x).round()
    x[:, 3::50], x[:, 5::60], x[:, -1], x[:, 4] = torch.inf, -torch.inf, torch.nan, -0.0
    return x.bfloat16() if kind == "bfloat16" else x


def check(found, x, descending, count=None):
    values, places = (t.cpu() for t in found)
    right = x.sort(dim=-1, stable=True, descending=descending)
    assert torch.equal(places, right.indices[..., :count])
    torch.testing.assert_close(values, right.values[..., :count], rtol=0, atol=0, equal_nan=True)


KINDS = ("numbers", "few values", "bfloat16", "integers")


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS), st.integers(1, 3), st.integers(2049, 12000), st.booleans(),
    st.integers(1, 64),
)  # fmt: skip
def test_the_method(kind, count, length, descending, k):
    """As plain torch operations on the host."""
    x = rows(kind, count, length)
    check(sorting.sort_stable(x, stable=True, dim=-1, descending=descending), x, descending)
    check(sorting.topk(x, k, -1, descending), x, descending, k)


@pytest.mark.parametrize(
    ("chip", "shape"), [("tiny", (2, 2500)), ("edge", (2, 2500)), ("edge", (3, 2600))]
)
def test_long_rows(chip, shape):
    """The last are more and longer rows than before."""
    pagoda.use_chip(chip)
    x = rows("numbers", *shape)
    check(x.to(P).sort(stable=True), x, False)
    check(x.to(P).topk(50), x, True, 50)


def test_long_rows_compiled():
    x = rows("few values", 1, 3000).T

    @torch.compile(backend=P, fullgraph=True, dynamic=False)
    def several(x):
        return x.sort(0, descending=True), x.topk(40, 0), x.topk(5, 0, largest=False), x.median()

    ordered, most, least, middle = several(x.to(P))
    check([t.T for t in ordered], x.T, True)
    check([t.T for t in most], x.T, True, 40)
    check([t.T for t in least], x.T, False, 5)
    assert middle.cpu() == x.median()


def test_gradients_of_long_rows():
    x = rows("few values", 1, 2100)
    given = [t.requires_grad_() for t in (x.clone(), x.to(P))]
    for t in given:
        (t.sort(stable=True).values * torch.arange(2100.0).to(t.device)).sum().backward()
    assert torch.equal(given[1].grad.cpu(), given[0].grad)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_as_long_as_a_vocabulary(kind):
    x = rows(kind, 2, 49_152)
    check(x.to(P).topk(50), x, True, 50)
    x = rows(kind, 1, 65_536)
    check(x.to(P).sort(stable=True, descending=True), x, True)
