"""Pooling: what Inductor has no loops for.

Gradients of maxima go where the indices say. Adaptive averages are taken one dimension after the
other: they are means of means over the same windows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten


def _to_indices(grad: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, dims: int) -> Any:
    """Adds each element of `grad` to the element of `x` that its index names, an index being a
    position among the last `dims` dimensions of `x`."""
    zeros = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(-dims)
    return zeros.scatter_add(-1, indices.flatten(-dims), grad.flatten(-dims)).reshape(x.shape)


def max_pool_backward_2d(grad, x, kernel_size, stride, padding, dilation, ceil_mode, indices):
    return _to_indices(grad, x, indices, 2)


def max_pool_backward_3d(grad, x, kernel_size, stride, padding, dilation, ceil_mode, indices):
    return _to_indices(grad, x, indices, 3)


def adaptive_max_pool_backward_2d(grad, x, indices):
    return _to_indices(grad, x, indices, 2)


def adaptive_max_pool_backward_3d(grad, x, indices):
    return _to_indices(grad, x, indices, 3)


def fractional_max_pool_backward_2d(grad, x, kernel_size, output_size, indices):
    return _to_indices(grad, x, indices, 2)


def fractional_max_pool_backward_3d(grad, x, kernel_size, output_size, indices):
    return _to_indices(grad, x, indices, 3)


def _one_per_dimension(op: Any, dims: int, *args: Any) -> Any:
    """The same operation with windows spelled out; Inductor's loops know no shorter form."""
    grad, x, *windows, ceil_mode, count_include_pad, divisor = args
    if all(len(window) in (0, dims) for window in windows):
        return NotImplemented
    full = [list(w) * dims if len(w) == 1 else list(w) for w in windows]
    return op(grad, x, *full, ceil_mode, count_include_pad, divisor)


avg_pool_backward_2d = functools.partial(_one_per_dimension, aten.avg_pool2d_backward.default, 2)
avg_pool_backward_3d = functools.partial(_one_per_dimension, aten.avg_pool3d_backward.default, 3)


def _adaptive_average(x: torch.Tensor, dim: int, count: Any) -> torch.Tensor:
    """`count` means along `dim`: window k goes from floor(k n / count) to ceil((k + 1) n / count),
    as in ATen's AdaptivePooling."""
    n = x.shape[dim]
    if n % count == 0:
        return x.unflatten(dim, (count, n // count)).mean(dim + 1)
    k = torch.arange(count, device=x.device)
    begin, end = k * n // count, ((k + 1) * n + count - 1) // count
    longest = (n + count - 1) // count + 1
    place = begin[:, None] + torch.arange(longest, device=x.device)
    inside = place < end[:, None]
    row = x.movedim(dim, -1)
    taken = torch.where(inside, row[..., place.clamp(max=n - 1)], 0)
    return (taken.sum(-1) / (end - begin)).movedim(-1, dim).to(x.dtype)


def adaptive_average_3d(x: torch.Tensor, output_size: Sequence[Any]) -> torch.Tensor:
    for dim, count in enumerate(output_size):
        x = _adaptive_average(x, x.dim() - 3 + dim, count)
    return x
