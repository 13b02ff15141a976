"""Resizing of images: with antialiasing, by one matrix of weights for each direction, and the
gradient of resizing to the nearest element; and volumes sampled on a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' kernel with a = -1/2."""
    a, x = -0.5, x.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


def _weights(
    n: int, count: int, align: bool, scale: float | None, radius: int, kernel: Callable, like
) -> torch.Tensor:
    """[count, n]: the part of each of n inputs in each of `count` outputs, as in ATen's
    UpSampleKernel (`_compute_indices_weights_aa`)."""
    if align:
        step = (n - 1) / (count - 1) if count > 1 else 0.0
    else:
        step = 1 / scale if scale else n / count
    support = radius * max(step, 1.0)
    centre = step * (torch.arange(count, device=like.device) + 0.5)[:, None]
    place = torch.arange(n, device=like.device)
    first = torch.clamp(torch.trunc(centre - support + 0.5), min=0)
    end = torch.clamp(torch.trunc(centre + support + 0.5), max=n)
    weight = kernel((place - centre + 0.5) / max(step, 1.0))
    weight = torch.where((place >= first) & (place < end), weight, 0)
    return (weight / weight.sum(1, keepdim=True)).to(like.dtype)


def _resized(x, output_size, align, scales, radius: int, kernel: Callable) -> torch.Tensor:
    down, across = (
        _weights(n, count, align, scale, radius, kernel, x)
        for n, count, scale in zip(x.shape[-2:], output_size, scales, strict=True)
    )
    return down @ x @ across.t()


def bilinear(
    x: torch.Tensor,
    output_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> torch.Tensor:
    return _resized(x, output_size, align_corners, (scales_h, scales_w), 1, _triangle)


def bicubic(
    x: torch.Tensor,
    output_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> torch.Tensor:
    return _resized(x, output_size, align_corners, (scales_h, scales_w), 2, _cubic)


def _nearest(count: int, n: int, scale: float | None, centre: float, like) -> torch.Tensor:
    """The input that each of `count` outputs takes, as in ATen's `nearest_idx`."""
    step = 1 / scale if scale else n / count
    place = torch.arange(count, device=like.device, dtype=torch.float32)
    return torch.floor((place + centre) * step).to(torch.int64).clamp(max=n - 1)


def nearest_backward(centre: float) -> Callable:
    """Gradient of `upsample_nearest` (centre 0) or `_upsample_nearest_exact` (centre 1/2) over one,
    two or three dimensions."""

    def backward(grad: torch.Tensor, output_size, input_size, *scales: float | None) -> Any:
        dims = len(output_size)
        scales = scales or (None,) * dims
        for d, scale in enumerate(scales):
            dim, n, count = 2 + d, input_size[2 + d], output_size[d]
            if count % n == 0 and scale in (None, count / n):
                grad = grad.unflatten(dim, (n, count // n)).sum(dim + 1)
                continue
            row = grad.movedim(dim, -1)
            zeros = torch.zeros((*row.shape[:-1], n), dtype=grad.dtype, device=grad.device)
            taken = _nearest(count, n, scale, centre, grad)
            grad = zeros.index_add(-1, taken, row).movedim(-1, dim)
        return grad

    return backward


_LINEAR, _NEAREST = 0, 1
_BORDER, _REFLECTION = 1, 2


def _coordinate(grid: torch.Tensor, n: int, padding: int, align: bool) -> torch.Tensor:
    """Places in an axis of `n` elements from -1 .. 1, as in ATen's GridSampler."""
    place = (grid + 1) / 2 * (n - 1) if align else ((grid + 1) * n - 1) / 2
    if padding == _REFLECTION:
        low, span = (0.0, n - 1.0) if align else (-0.5, float(n))
        if span == 0:
            return torch.zeros_like(place)
        far = (place - low).abs()
        flips, rest = torch.floor(far / span), torch.fmod(far, span)
        place = torch.where(torch.fmod(flips, 2) == 0, rest, span - rest) + low
    return place.clamp(0, n - 1) if padding in (_BORDER, _REFLECTION) else place


def grid_sampler_3d(
    x: torch.Tensor, grid: torch.Tensor, mode: int, padding: int, align: bool
) -> torch.Tensor:
    """x [n, c, d, h, w] at grid [n, od, oh, ow, 3] (across, down, deep) -> [n, c, od, oh, ow]."""
    sizes = x.shape[-3:]
    places = [_coordinate(grid[..., 2 - k], sizes[k], padding, align) for k in range(3)]
    image = torch.arange(x.shape[0], device=x.device).reshape(-1, 1, 1, 1)

    def at(corner: list[torch.Tensor]) -> torch.Tensor:  # [n, od, oh, ow, c]
        inside = torch.ones_like(corner[0], dtype=torch.bool)
        indices = []
        for place, n in zip(corner, sizes, strict=True):
            inside = inside & (place >= 0) & (place <= n - 1)
            indices.append(place.clamp(0, n - 1).to(torch.int64))
        taken = x.movedim(1, -1)[(image, *indices)]
        return torch.where(inside[..., None], taken, 0)

    if mode == _NEAREST:
        return at([torch.round(place) for place in places]).movedim(-1, 1)
    if mode != _LINEAR:
        raise NotImplementedError(
            "operation aten.grid_sampler_3d.default cannot run on device pagoda: volumes are "
            'sampled with mode "bilinear" or "nearest" only. Use one of them.'
        )
    floors = [torch.floor(place) for place in places]
    total: Any = 0
    for number in range(8):
        ups = [number >> k & 1 for k in range(3)]
        weight: Any = 1
        for place, floor, up in zip(places, floors, ups, strict=True):
            weight = weight * (place - floor if up else floor + 1 - place)
        corner = [floor + up for floor, up in zip(floors, ups, strict=True)]
        total = total + at(corner) * weight[..., None]
    return total.movedim(-1, 1)
