"""Resizing of images with antialiasing: one matrix of weights for each direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
