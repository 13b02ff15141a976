"""Reductions into places that an index names, and searches in sorted rows.

Sums are stores that add. Everything else has no such store: every place looks at every element,
which is quadratic, and meant for classes, experts and bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pagoda.pytorch.scans import cumsum, highest, lowest

aten = torch.ops.aten


def _placed(x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor) -> Any:
    """The part of `x` that an index of this shape can name, with `dim` last, the elements of `src`
    and, for each place and element, whether the element goes there."""
    part = x
    for d in range(x.dim()):
        if d != dim:
            part = part.narrow(d, 0, index.shape[d])
    part, index = part.movedim(dim, -1), index.movedim(dim, -1)
    for d, n in enumerate(src.shape):
        if n != index.movedim(-1, dim).shape[d]:
            src = src.narrow(d, 0, index.movedim(-1, dim).shape[d])
    wanted = torch.arange(part.shape[-1], device=x.device)[:, None]
    return part, src.movedim(dim, -1), index[..., None, :] == wanted


def _reduced(part: torch.Tensor, src: torch.Tensor, goes: torch.Tensor, reduce: str, keep: bool):
    """For each place the reduction of what goes there, and of what was there if `keep`."""
    several = src[..., None, :]
    if reduce == "prod":
        found = torch.where(goes, several, 1).prod(-1, dtype=part.dtype)
        joined = part * found
    elif reduce == "amax":
        found = torch.where(goes, several, lowest(src.dtype)).amax(-1)
        joined = torch.maximum(part, found)
    else:
        found = torch.where(goes, several, highest(src.dtype)).amin(-1)
        joined = torch.minimum(part, found)
    return joined if keep else torch.where(goes.any(-1), found, part)


def scatter_reduce(
    x: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    src: torch.Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Any:
    if x.dim() == 0:
        out = scatter_reduce(
            x[None], 0, index.reshape(-1), src.reshape(-1), reduce, include_self=include_self
        )
        return out if out is NotImplemented else out[0]
    if not index.numel() or reduce == "sum":
        return x.clone() if not index.numel() else _summed(x, dim, index, src, include_self)
    dim = dim % x.dim()
    if reduce == "mean":
        return _mean(x, dim, index, src, include_self)
    part, given, goes = _placed(x, dim, index, src)
    found = _reduced(part, given, goes, reduce, include_self).movedim(-1, dim)
    for d in range(x.dim()):
        if found.shape[d] != x.shape[d]:
            whole = x
            for before in range(d):
                whole = whole.narrow(before, 0, found.shape[before])
            for after in range(d + 1, x.dim()):
                whole = whole.narrow(after, 0, found.shape[after])
            found = torch.slice_scatter(whole, found, d, 0, found.shape[d])
    return found.to(x.dtype)


def scatter(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: Any, *, reduce: str
) -> torch.Tensor:
    """`Tensor.scatter` with a reduction, "add" or "multiply". src: a number or a tensor."""
    if not isinstance(src, torch.Tensor):
        src = torch.full_like(index, src, dtype=x.dtype)
    return aten.scatter_reduce.two(x, dim, index, src, {"add": "sum", "multiply": "prod"}[reduce])


def _summed(x, dim, index, src, include_self):
    if not include_self:
        x = x.scatter(dim, index, 0)
    return x.scatter_add(dim, index, src)


def _mean(x, dim, index, src, include_self):
    ones = torch.ones_like(src)
    start = torch.ones_like(x) if include_self else torch.zeros_like(x)
    counts = start.scatter_add(dim, index, ones).clamp(min=1)
    total = _summed(x, dim, index, src, include_self)
    if x.is_floating_point():
        return total / counts
    return torch.div(total, counts, rounding_mode="floor")


def narrowed(op: Any, otherwise: Callable) -> Callable:
    """`index_put`, `scatter_add` and the like, adding integers of 64 bits and truth values in 32
    bits: Inductor has no loops for them."""

    def add(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        accumulates = op is not aten.index_put.default or (len(args) > 2 and args[2])
        if x.dtype not in (torch.int64, torch.bool) or not accumulates:
            return otherwise(x, *args, **kwargs)
        *first, source = args[:2] if op is aten.index_put.default else args
        added = op(x.int(), *first, source.int(), *args[2:] if op is aten.index_put.default else ())
        return added.to(x.dtype)

    return add


def index_reduce(
    x: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    source: torch.Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Any:
    if x.dim() == 0:
        return scatter_reduce(x, 0, index, source, reduce, include_self=include_self)
    shape = [1] * x.dim()
    shape[dim] = -1
    spread = index.reshape(shape).expand(source.shape)
    return scatter_reduce(x, dim, spread, source, reduce, include_self=include_self)


def searchsorted(
    sequence: torch.Tensor,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many elements of the sequence lie before each value."""
    if sorter is not None:
        sequence = sequence.gather(-1, sorter)
    if not isinstance(values, torch.Tensor):
        values = torch.full((), values, device=sequence.device)
    row = sequence[..., None, :] if values.dim() else sequence
    wanted = values[..., None]
    after = row > wanted if right or side == "right" else row >= wanted
    return (~after).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def bucketize(
    values: Any, boundaries: torch.Tensor, *, out_int32: bool = False, right: bool = False
) -> torch.Tensor:
    if not isinstance(values, torch.Tensor):
        values = torch.full((), values, device=boundaries.device)
    after = boundaries > values[..., None] if right else boundaries >= values[..., None]
    return (~after).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return aten.index.Tensor(x.reshape(-1), [index])


def nonzero_static(x: torch.Tensor, *, size: int, fill_value: int = -1) -> torch.Tensor:
    """The first `size` positions [size, dims] of elements that are not 0, then `fill_value`."""
    if not x.numel():
        return torch.full((size, x.dim()), fill_value, dtype=torch.int64, device=x.device)
    wanted = torch.arange(size, device=x.device)
    found = x.reshape(-1) != 0
    rank = cumsum(found, 0)  # the position of element k of them is where the rank becomes k + 1
    place = (rank <= wanted[:, None]).sum(-1)
    columns = []
    for n in reversed(x.shape):
        columns.insert(0, place % n)
        place = place // n
    if not columns:
        return torch.zeros((size, 0), dtype=torch.int64, device=x.device)
    missing = wanted >= found.sum()
    return torch.where(missing[:, None], fill_value, torch.stack(columns, -1))


def masked_scatter(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Element k of `source` where the mask is true for the k-th time, else `x`."""
    x, mask = torch.broadcast_tensors(x, mask)
    if not source.numel():
        return x.clone()
    row = mask.reshape(-1)
    taken = source.reshape(-1)[torch.where(row, cumsum(row, 0) - 1, 0)]
    return torch.where(row, taken, x.reshape(-1)).view(x.shape)


def masked_scatter_backward(
    grad: torch.Tensor, mask: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """The gradient of `source`, of these sizes: in order, those of places where the mask is
    true. The others go to places of their own behind it."""
    grad, mask = torch.broadcast_tensors(grad, mask)
    row, count = mask.reshape(-1), math.prod(sizes)
    behind = torch.arange(row.shape[0], device=row.device) + count
    place = torch.where(row, cumsum(row, 0) - 1, behind)
    given = grad.new_zeros(count + row.shape[0]).scatter(0, place, grad.reshape(-1))
    return given[:count].view(sizes)
