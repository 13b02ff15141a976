"""Sorting by rank: where an element goes is the number of elements before it.

That is quadratic in the length of a row, but plain loop nests, and right for experts, beams and
positions. Rows as long as a vocabulary are sorted in blocks, which `long_sorting` merges.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pagoda.pytorch import long_sorting
from pagoda.pytorch.in_memory import in_memory
from pagoda.pytorch.scans import highest

LIMIT = 2048  # longer rows are sorted in blocks
_FEW = 64  # up to so many are looked for one by one


def _keys(row: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the floats, far from the ends of their range; NaN is the largest."""
    bits = (row.float() + 0.0).view(torch.int32)  # -0 becomes +0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return torch.where(torch.isnan(row), 0x7F800001, ordered)


def _ranks(row: torch.Tensor, descending: bool) -> torch.Tensor:
    """For each element of the last dimension its place in the stable order."""
    places = torch.arange(row.shape[-1], device=row.device)
    earlier = places[None, :] < places[:, None]
    if row.is_floating_point():
        keys = _keys(row)
        mine, other = keys[..., :, None], keys[..., None, :]
        first = other + earlier > mine if descending else other < mine + earlier
        return first.sum(-1)
    mine, other = row[..., :, None], row[..., None, :]
    first = other > mine if descending else other < mine
    return (first | ((other == mine) & earlier)).sum(-1)


def _first(row: torch.Tensor, count: Any, descending: bool) -> torch.Tensor:
    """The places of the first `count` elements of the last dimension, in order."""
    ranks = _ranks(row, descending)
    places = torch.arange(row.shape[-1], device=row.device)
    if isinstance(count, int) and count <= _FEW:
        wanted = torch.arange(count, device=row.device)[:, None]
        return torch.where(ranks[..., None, :] == wanted, places, 0).sum(-1)
    return torch.zeros_like(ranks).scatter(-1, ranks, places.expand(row.shape))[..., :count]


def _first_of_long(row: torch.Tensor, count: int, descending: bool) -> torch.Tensor:
    """As `_first`, compiled for one size."""
    *several, length = map(int, row.shape)
    keys = _keys(row) if row.is_floating_point() else row.int()
    keys = in_memory((~keys if descending else keys).reshape(math.prod(several), length))
    if count <= _FEW:
        first = long_sorting.best(keys, count, lambda k, n: _first(k, n, False), LIMIT)
    else:
        first = long_sorting.order(keys, lambda k: _ranks(k, False))[:, :count]
    return first.long().view(*several, count)


def _picked(x: torch.Tensor, count: Any, dim: int, descending: bool) -> Any:
    if x.dim() == 0:
        return x.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
    row = x.movedim(dim, -1)
    indices = (
        _first(row, count, descending)
        if row.shape[-1] <= LIMIT
        else _first_of_long(row, int(count), descending)
    )
    values = row.gather(-1, indices)
    return values.movedim(-1, dim).contiguous(), indices.movedim(-1, dim).contiguous()


def topk(x: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return _picked(x, k, dim, largest)


def sort(x: torch.Tensor, dim: int = -1, descending: bool = False) -> Any:
    return _picked(x, x.shape[dim] if x.dim() else 1, dim, descending)


def sort_stable(
    x: torch.Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    return sort(x, dim, descending)


def _at(x: torch.Tensor, dim: int, keepdim: bool, place: Any) -> Any:
    """The elements at `place(sorted row)` of the ascending order along `dim`, and their indices."""
    if x.dim() == 0:
        return x.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
    ordered = _picked(x, x.shape[dim], dim, False)
    where = place(ordered[0].movedim(dim, -1)).unsqueeze(-1).movedim(-1, dim)
    found = [t.gather(dim, where) for t in ordered]
    return tuple(found) if keepdim else tuple(t.squeeze(dim) for t in found)


def _fixed(row: torch.Tensor, number: Any) -> torch.Tensor:
    return torch.zeros(row.shape[:-1], dtype=torch.int64, device=row.device) + number


def kthvalue(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return _at(x, dim, keepdim, lambda row: _fixed(row, k - 1))


def median_along(x: torch.Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """The lower one of two; NaN, the largest, if there is one."""

    def place(row: torch.Tensor) -> torch.Tensor:
        middle = _fixed(row, (row.shape[-1] - 1) // 2)
        if not x.is_floating_point():
            return middle
        numbers = (~torch.isnan(row)).sum(-1)
        return torch.where(numbers < row.shape[-1], numbers, middle)

    return _at(x, dim, keepdim, place)


def nanmedian_along(x: torch.Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    def place(row: torch.Tensor) -> torch.Tensor:
        numbers = (~torch.isnan(row)).sum(-1) if x.is_floating_point() else row.shape[-1]
        return ((_fixed(row, numbers) - 1) // 2).clamp(min=0)

    return _at(x, dim, keepdim, place)


def median(x: torch.Tensor) -> torch.Tensor:
    return median_along(x.reshape(-1), 0)[0]


def nanmedian(x: torch.Tensor) -> torch.Tensor:
    return nanmedian_along(x.reshape(-1), 0)[0]


def mode(x: torch.Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """The smallest of the most frequent values, and its last place (torch: any)."""
    if x.dim() == 0:
        return x.clone(), torch.zeros((), dtype=torch.int64, device=x.device)
    row = x.movedim(dim, -1)
    places = torch.arange(row.shape[-1], device=x.device)
    if row.shape[-1] > LIMIT:
        ordered = row.sort(-1).values
        first = torch.ones_like(ordered[..., :1], dtype=torch.bool)
        begins = torch.cat([first, ordered.diff(dim=-1) != 0], -1)
        counts = places - torch.where(begins, places, 0).cummax(-1).values
    else:
        ordered = row
        counts = (row[..., :, None] == row[..., None, :]).sum(-1)
    often = counts == counts.amax(-1, keepdim=True)
    value = torch.where(often, ordered, highest(x.dtype)).amin(-1, keepdim=True)
    index = torch.where(row == value, places, 0).amax(-1, keepdim=True)
    found = [row.gather(-1, index).movedim(-1, dim), index.movedim(-1, dim)]
    return tuple(found) if keepdim else tuple(t.squeeze(dim) for t in found)


def histc(x: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    """Counts of equal bins; the last one includes its upper end. Bounds that are equal stand for
    those of the values, of which none must be NaN then: torch refuses it, here no bin counts."""
    flat = x.reshape(-1).float()
    low, high = min, max
    if low == high and x.numel():
        low, high = flat.amin(), flat.amax()
        wider = torch.where(low == high, 1.0, 0.0)
        low, high = low - wider, high + wider
    elif low == high:
        low, high = low - 1, high + 1
    inside = (flat >= low) & (flat <= high)
    bin_ = ((flat - low) * bins / (high - low)).floor().clamp(max=bins - 1)
    wanted = torch.arange(bins, device=x.device)[:, None]
    return ((bin_ == wanted) & inside).sum(-1).to(x.dtype)
