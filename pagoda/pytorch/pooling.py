"""Pooling: what Inductor has no loops for, which are windows of more than 25 elements, adaptive
pooling over three dimensions and most gradients. Gradients of maxima go where the indices say."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pagoda.pytorch.scans import lowest

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


class _Windows:
    """Windows along one dimension of `n` elements: output k takes the elements `place[k]` that are
    `inside`. Both are [outputs, longest window]; places outside are clamped."""

    def __init__(self, begin: torch.Tensor, end: Any, longest: int, step: int, n: Any) -> None:
        place = begin[:, None] + step * torch.arange(longest, device=begin.device)
        self.inside = (place >= 0) & (place < (n if end is None else end[:, None]))
        self.place = place.clamp(0, n - 1)


def _sliding(x: torch.Tensor, dim: int, count: Any, size: int, stride: int, padding: int, step=1):
    begin = torch.arange(count, device=x.device) * stride - padding
    return _Windows(begin, None, size, step, x.shape[dim])


def _adaptive(x: torch.Tensor, dim: int, count: Any) -> _Windows:
    """Window k goes from floor(k n / count) to ceil((k + 1) n / count), as in ATen's
    AdaptivePooling."""
    n = x.shape[dim]
    k = torch.arange(count, device=x.device)
    longest = (n + count - 1) // count + (0 if n % count == 0 else 1)
    return _Windows(k * n // count, ((k + 1) * n + count - 1) // count, longest, 1, n)


def _largest(x: torch.Tensor, windows: list[_Windows]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first largest element of every window of the last dimensions, NaN being the largest, and
    its position among these dimensions."""
    dims = len(windows)
    places, inside, position = [], None, None
    for d, window in enumerate(windows):
        shape = [1] * (2 * dims)  # all outputs, then all windows
        shape[d], shape[dims + d] = window.place.shape
        place, within = window.place.reshape(shape), window.inside.reshape(shape)
        places.append(place)
        inside = within if inside is None else inside & within
        position = place if position is None else position * x.shape[x.dim() - dims + d] + place
    taken = x[(..., *places)]
    taken = torch.where(inside, taken, lowest(x.dtype)).flatten(-dims)
    which = taken.argmax(-1, keepdim=True)
    position = position.expand(inside.shape).flatten(-dims)
    position = position.expand(taken.shape).gather(-1, which)
    return taken.gather(-1, which).squeeze(-1), position.squeeze(-1)


LARGE = 25  # Inductor has loops for windows of up to that many elements


def full(value: Any, dims: int) -> list[int]:
    """A pooling argument with a value for each dimension."""
    value = [value] if isinstance(value, int) else list(value)
    return value * dims if len(value) == 1 else value


def outputs(x: torch.Tensor, size, stride, padding, step, ceil_mode) -> list[Any]:
    """How many windows there are along each dimension: the last one begins inside of the input or
    its left padding."""
    counts, dims = [], len(size)
    for d in range(dims):
        n = x.shape[x.dim() - dims + d]
        span = n + 2 * padding[d] - step[d] * (size[d] - 1) - 1
        count = (span + (stride[d] - 1 if ceil_mode else 0)) // stride[d] + 1
        if ceil_mode and (count - 1) * stride[d] >= n + padding[d]:
            count -= 1
        counts.append(count)
    return counts


def _max_pool(dims: int, smaller: Callable, x, kernel_size, stride=(), padding=0, dilation=1,
              ceil_mode=False):  # fmt: skip
    size, padding, step = (full(v, dims) for v in (kernel_size, padding, dilation))
    stride = full(stride, dims) if stride not in ((), [], None) else size
    if math.prod(size) <= LARGE:
        return smaller(x, size, stride, padding, step, ceil_mode)
    counts = outputs(x, size, stride, padding, step, ceil_mode)
    first = x.dim() - dims
    windows = [
        _sliding(x, first + d, counts[d], size[d], stride[d], padding[d], step[d])
        for d in range(dims)
    ]
    return _largest(x, windows)


def max_pool(dims: int, smaller: Callable) -> Callable:
    """Maxima with indices over `dims` dimensions; small windows are left to `smaller`."""
    return functools.partial(_max_pool, dims, smaller)


def adaptive_max(x: torch.Tensor, output_size: Sequence[Any]) -> Any:
    first = x.dim() - len(output_size)
    return _largest(x, [_adaptive(x, first + d, count) for d, count in enumerate(output_size)])


def adaptive_max_2d(x: torch.Tensor, output_size: Sequence[Any]) -> Any:
    """Uneven large windows; the others are torch's, of which even ones are ordinary pooling."""
    pairs = list(zip(x.shape[-2:], output_size, strict=True))
    if 0 in output_size or all(n % count == 0 for n, count in pairs):
        return NotImplemented
    longest = math.prod(-(-(n + count - 1) // count) for n, count in pairs)
    return adaptive_max(x, output_size) if longest > LARGE else NotImplemented


def _fractional_max(dims: int, x, kernel_size, output_size, random_samples) -> Any:
    """Windows of one size at places drawn at random, as in ATen's FractionalMaxPool."""
    windows = []
    for d in range(dims):
        n, count, size = x.shape[x.dim() - dims + d], output_size[d], kernel_size[d]
        # 3-d draws come in the order depth, height, width; 2-d ones as width, height.
        drawn = random_samples[..., d if dims == 3 else 1 - d][..., None].float()
        step = (n - size) / (count - 1) if count > 1 else 0.0
        place = torch.arange(count, device=x.device)
        begin = torch.trunc((place + drawn) * step).int() - torch.trunc(drawn * step).int()
        begin = torch.where(place == count - 1, n - size, begin)  # [n, c, count]
        windows.append(begin[..., None] + torch.arange(size, device=x.device))
    taken = x if x.dim() == dims + 2 else x[None]
    lead = taken.shape[:2]
    places, position = [], None
    for d, place in enumerate(windows):
        shape = [1] * (2 * dims)
        shape[d], shape[dims + d] = place.shape[-2:]
        place = place.expand(*lead, *place.shape[-2:]).reshape(*lead, *shape)
        places.append(place)
        length = x.shape[x.dim() - dims + d]
        position = place if position is None else position * length + place
    first = torch.arange(lead[0], device=x.device).reshape(-1, *[1] * (2 * dims + 1))
    second = torch.arange(lead[1], device=x.device).reshape(-1, *[1] * (2 * dims))
    values = taken[(first, second, *places)].flatten(-dims)
    which = values.argmax(-1, keepdim=True)
    position = position.flatten(-dims).gather(-1, which).squeeze(-1)
    values = values.gather(-1, which).squeeze(-1)
    return (values, position) if x.dim() == dims + 2 else (values[0], position[0])


fractional_max_pool_2d = functools.partial(_fractional_max, 2)
fractional_max_pool_3d = functools.partial(_fractional_max, 3)


def _average(dims: int, x, kernel_size, stride=(), padding=0, ceil_mode=False,
             count_include_pad=True, divisor_override=None):  # fmt: skip
    """Sums over one dimension after the other, divided by what each window counts."""
    size, padding = full(kernel_size, dims), full(padding, dims)
    stride = full(stride, dims) if stride not in ((), [], None) else size
    if math.prod(size) <= LARGE or stride == size:
        return NotImplemented
    counts = outputs(x, size, stride, padding, [1] * dims, ceil_mode)
    total, first = x.float() if x.is_floating_point() else x, x.dim() - dims
    for d in range(dims):
        dim = first + d
        window = _sliding(x, dim, counts[d], size[d], stride[d], padding[d])
        taken = torch.where(window.inside, total.movedim(dim, -1)[..., window.place], 0)
        total = taken.sum(-1).movedim(-1, dim)
    divisor = _divisor(x, counts, size, stride, padding, count_include_pad, divisor_override)
    if x.is_floating_point():
        return (total / divisor).to(x.dtype)
    return torch.div(total, divisor, rounding_mode="trunc").to(x.dtype)


def _divisor(x, counts, size, stride, padding, count_include_pad, divisor_override) -> Any:
    if divisor_override is not None:
        return divisor_override
    divisor: Any = 1
    for d, count in enumerate(counts):
        n = x.shape[x.dim() - len(counts) + d]
        begin = torch.arange(count, device=x.device) * stride[d] - padding[d]
        end = (begin + size[d]).clamp(max=n + padding[d])
        if not count_include_pad:
            begin, end = begin.clamp(min=0), end.clamp(max=n)
        divisor = divisor * (end - begin).reshape(-1, *[1] * (len(counts) - 1 - d))
    return divisor


def _average_backward(dims: int, op: Any, grad, x, kernel_size, stride, padding, ceil_mode,
                      count_include_pad, divisor_override):  # fmt: skip
    given = (list(kernel_size), list(stride), list(padding))
    size, padding = full(kernel_size, dims), full(padding, dims)
    stride = full(stride, dims) if stride not in ((), [], None) else size
    counts = list(grad.shape[-dims:])
    # Inductor divides by the whole size of a window of which a part lies beyond the padding.
    clipped = ceil_mode and divisor_override is None and any(
        (count - 1) * step + length > n + 2 * pad
        for n, count, length, step, pad in zip(x.shape[-dims:], counts, size, stride, padding,
                                               strict=True)
    )  # fmt: skip
    if math.prod(size) <= LARGE and not clipped:
        if given == (size, stride, padding):  # else spell it out: Inductor knows no shorter form
            return NotImplemented
        return op(grad, x, size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    part = grad.float()
    part = part / _divisor(x, counts, size, stride, padding, count_include_pad, divisor_override)
    for d in range(dims):
        dim = x.dim() - dims + d
        window = _sliding(x, dim, counts[d], size[d], stride[d], padding[d])
        row = torch.where(window.inside, part.movedim(dim, -1)[..., None], 0).flatten(-2)
        zeros = torch.zeros((*row.shape[:-1], x.shape[dim]), device=x.device)
        part = zeros.index_add(-1, window.place.flatten(), row).movedim(-1, dim)
    return part.to(grad.dtype)


avg_pool_2d = functools.partial(_average, 2)
avg_pool_3d = functools.partial(_average, 3)
avg_pool_backward_2d = functools.partial(_average_backward, 2, aten.avg_pool2d_backward.default)
avg_pool_backward_3d = functools.partial(_average_backward, 3, aten.avg_pool3d_backward.default)


def _adaptive_average(x: torch.Tensor, dim: int, count: Any) -> torch.Tensor:
    n = x.shape[dim]
    if n % count == 0:
        return x.unflatten(dim, (count, n // count)).mean(dim + 1)
    window = _adaptive(x, dim, count)
    taken = torch.where(window.inside, x.movedim(dim, -1)[..., window.place], 0)
    return (taken.sum(-1) / window.inside.sum(-1)).movedim(-1, dim).to(x.dtype)


def adaptive_average_3d(x: torch.Tensor, output_size: Sequence[Any]) -> torch.Tensor:
    """Means of means: one dimension after the other."""
    for dim, count in enumerate(output_size):
        x = _adaptive_average(x, x.dim() - 3 + dim, count)
    return x
