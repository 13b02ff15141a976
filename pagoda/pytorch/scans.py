"""Running sums, products and extrema along a dimension.

An element's result is a masked reduction over its block of `BLOCK` elements, joined with that of
the blocks before it, which are scanned the same way: n * BLOCK operations for a row of n elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

BLOCK = 32


def _scan(
    row: torch.Tensor,
    reduce: Callable,
    join: Callable,
    neutral: float,
    quadratic: bool = False,
) -> torch.Tensor:
    """Scans the last dimension. `reduce(x)` over the last dimension, `join(a, b)` of two results,
    `neutral`: what changes neither. `quadratic`: without blocks (of a symbolic number of blocks, it
    is not known how often they would have to be joined)."""
    count = row.shape[-1]
    if quadratic or (isinstance(count, int) and count <= 2 * BLOCK):
        places = torch.arange(count, device=row.device)
        seen = places[None, :] <= places[:, None]
        return reduce(torch.where(seen, row[..., None, :], neutral))
    blocks = (count + BLOCK - 1) // BLOCK
    padded = torch.nn.functional.pad(row, (0, blocks * BLOCK - count), value=neutral)
    inner = _scan(padded.reshape(*row.shape[:-1], blocks, BLOCK), reduce, join, neutral)
    ends = _scan(inner[..., -1], reduce, join, neutral, not isinstance(count, int))
    before = torch.nn.functional.pad(ends[..., :-1], (1, 0), value=neutral)
    return join(before[..., None], inner).flatten(-2)[..., :count]


def _summed_type(x: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (x.dtype if x.is_floating_point() else torch.int64)


def cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = _summed_type(x, dtype)
    if x.dim() == 0:
        return x.to(dtype)
    row = x.movedim(dim, -1).to(dtype)
    return _scan(row, lambda r: r.sum(-1, dtype=dtype), torch.add, 0).movedim(-1, dim)


def cumprod(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = _summed_type(x, dtype)
    if x.dim() == 0:
        return x.to(dtype)
    row = x.movedim(dim, -1).to(dtype)
    return _scan(row, lambda r: r.prod(-1, dtype=dtype), torch.mul, 1).movedim(-1, dim)


def logcumsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    if x.dim() == 0:
        return x.clone()
    row = x.movedim(dim, -1)
    summed = _scan(row, lambda r: r.logsumexp(-1), torch.logaddexp, -math.inf)
    return summed.movedim(-1, dim)


def lowest(dtype: torch.dtype) -> Any:
    """What a maximum starts from. int64 is computed in 32 bits."""
    if dtype.is_floating_point:
        return -math.inf
    return False if dtype == torch.bool else max(torch.iinfo(dtype).min, -(1 << 31))


def highest(dtype: torch.dtype) -> Any:
    """What a minimum starts from."""
    if dtype.is_floating_point:
        return math.inf
    return True if dtype == torch.bool else min(torch.iinfo(dtype).max, (1 << 31) - 1)


def _extremum(x: torch.Tensor, dim: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Running extrema and the place of the last element that equals them; NaN wins."""
    if x.dim() == 0:
        return x.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
    row = x.movedim(dim, -1)
    if largest:
        values = _scan(row, lambda r: r.amax(-1), torch.maximum, lowest(x.dtype))
    else:
        values = _scan(row, lambda r: r.amin(-1), torch.minimum, highest(x.dtype))
    same = row == values
    if x.is_floating_point():
        same = same | torch.isnan(row)
    places = torch.where(same, torch.arange(row.shape[-1], device=x.device), 0)
    indices = _scan(places, lambda r: r.amax(-1), torch.maximum, 0)
    return values.movedim(-1, dim), indices.movedim(-1, dim)


def cummax(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _extremum(x, dim, True)


def cummin(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _extremum(x, dim, False)
