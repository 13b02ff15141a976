"""Operators that slide windows over images: convolution and pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from pagoda.pytorch.onnx_import.operators import operator, require

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

Sides = list[tuple[int, int]]  # for each axis of the image: before, after


def _dims(x: torch.Tensor) -> int:
    """Axes of the image. Raises Refused where torch has no convolution or pooling of so many."""
    dims = x.dim() - 2
    require(dims in (1, 2, 3), f"an input of {x.dim()} dimensions", "it takes 3, 4 or 5")
    return dims


def _sides(
    lengths: Any, kernel: Any, auto_pad: str, pads: Any, strides: Any, dilations: Any
) -> Sides:
    dims = len(kernel)
    if auto_pad == "NOTSET":
        pads = pads or [0] * (2 * dims)
        return list(zip(pads[:dims], pads[dims:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * dims
    sides = []
    for n, k, s, d in zip(lengths, kernel, strides, dilations, strict=True):
        missing = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        small, large = missing // 2, missing - missing // 2
        sides.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return sides


def _padded(x: torch.Tensor, sides: Sides, value: float = 0) -> torch.Tensor:
    flat = [n for side in reversed(sides) for n in side]
    return F.pad(x, flat, value=value) if any(flat) else x


@operator("Conv")
def conv(
    x, w, b=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None,
    strides=None,
):  # fmt: skip
    dims = _dims(x)
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    sides = _sides(x.shape[2:], w.shape[2:], auto_pad, pads, strides, dilations)
    padding = [before for before, after in sides]
    if any(before != after or before < 0 for before, after in sides):
        x, padding = _padded(x, sides), [0] * dims
    return _CONV[dims](x, w, b, strides, padding, dilations, group)


@operator("ConvTranspose")
def conv_transpose(
    x, w, b=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None,
    output_padding=None, output_shape=None, pads=None, strides=None,
):  # fmt: skip
    dims = _dims(x)
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    extra = output_padding or [0] * dims
    whole = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(x.shape[2:], strides, dilations, w.shape[2:], extra, strict=True)
    ]
    if output_shape or auto_pad.startswith("SAME"):
        wanted = output_shape or [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        cut = [n - m for n, m in zip(whole, wanted[-dims:], strict=True)]
        halves = [(c // 2, c - c // 2) for c in cut]
        sides = halves if auto_pad == "SAME_UPPER" else [(b, a) for a, b in halves]
    else:
        sides = _sides(x.shape[2:], w.shape[2:], auto_pad, pads, strides, dilations)
    if all(before == after >= 0 for before, after in sides):
        padding = [before for before, after in sides]
        return _TRANSPOSED[dims](x, w, b, strides, padding, extra, group, dilations)
    # torch takes no output padding as large as the stride: what lacks is zeros, then the bias
    y = _TRANSPOSED[dims](x, w, None, strides, 0, 0, group, dilations)
    y = _padded(y, [(-a, e - c) for (a, c), e in zip(sides, extra, strict=True)])
    return y if b is None else y + b.reshape(-1, *[1] * dims)


def _windows(
    lengths: Any, kernel: Any, sides: Sides, strides: Any, dilations: Any, ceil: bool
) -> Sides:
    """The sides with which windows at every stride, and no more, fill the padded image."""
    found = []
    for n, k, (a, b), s, d in zip(lengths, kernel, sides, strides, dilations, strict=True):
        span = d * (k - 1) + 1
        steps = n + a + b - span
        count = (-(-steps // s) if ceil else steps // s) + 1
        if ceil and (count - 1) * s >= n + a:  # it would begin in the padding on the right
            count -= 1
        found.append((a, (count - 1) * s + span - n - a))
    return found


@operator("MaxPool")
def max_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, dilations=None, kernel_shape, pads=None,
    storage_order=0, strides=None, outputs=1,
):  # fmt: skip
    dims = _dims(x)
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    sides = _sides(x.shape[2:], kernel_shape, auto_pad, pads, strides, dilations)
    sides = _windows(x.shape[2:], kernel_shape, sides, strides, dilations, bool(ceil_mode))
    native = all(0 <= a <= k // 2 and 0 <= b <= a for (a, b), k in
                 zip(sides, kernel_shape, strict=True))  # fmt: skip
    if outputs == 1:
        if native and all(a == b for a, b in sides):
            padding = [a for a, _ in sides]
            return _MAX_POOL[dims](x, kernel_shape, strides, padding, dilations)
        x = _padded(x, sides, lowest(x.dtype))
        return _MAX_POOL[dims](x, kernel_shape, strides, 0, dilations)
    require(storage_order == 0 or dims < 2, "indices in column-major order (storage_order=1)")
    padding = [a for a, _ in sides]
    require(native, f"indices with padding {sides}", "use padding of at most half the kernel")
    values, indices = _MAX_POOL[dims](
        x, kernel_shape, strides, padding, dilations, ceil_mode=bool(ceil_mode), return_indices=True
    )
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    offsets = (planes * math.prod(x.shape[2:])).reshape(*x.shape[:2], *[1] * dims)
    return values, indices + offsets


def lowest(dtype: torch.dtype) -> float | int:
    """What never is a maximum."""
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


@operator("AveragePool")
def average_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0, dilations=None, kernel_shape,
    pads=None, strides=None,
):  # fmt: skip
    dims = _dims(x)
    strides, dilations = strides or [1] * dims, dilations or [1] * dims
    sides = _sides(x.shape[2:], kernel_shape, auto_pad, pads, strides, dilations)
    windows = _windows(x.shape[2:], kernel_shape, sides, strides, dilations, bool(ceil_mode))
    counted = sides if count_include_pad else [(0, 0)] * dims
    total = _averages(_padded(x, windows), kernel_shape, strides, dilations)
    if all(w[0] <= c[0] and w[1] <= c[1] for w, c in zip(windows, counted, strict=True)):
        return total
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    ones = _padded(ones, counted, 1)
    rest = [(w[0] - c[0], w[1] - c[1]) for w, c in zip(windows, counted, strict=True)]
    return total / _averages(_padded(ones, rest), kernel_shape, strides, dilations)


def _averages(x: torch.Tensor, kernel: Any, strides: Any, dilations: Any) -> torch.Tensor:
    """Of every window, without padding."""
    dims = len(kernel)
    if all(d == 1 for d in dilations):
        return _AVERAGE_POOL[dims](x, kernel, strides)
    weight = torch.full([1, 1, *kernel], 1 / math.prod(kernel), dtype=x.dtype, device=x.device)
    planes = x.reshape(-1, 1, *x.shape[2:])
    y = _CONV[dims](planes, weight, None, strides, 0, dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


@operator("LpPool")
def lp_pool(
    x, *, auto_pad="NOTSET", ceil_mode=0, dilations=None, kernel_shape, p=2, pads=None,
    strides=None,
):  # fmt: skip
    mean = average_pool(
        x.abs() ** p, auto_pad=auto_pad, ceil_mode=ceil_mode, count_include_pad=1,
        dilations=dilations, kernel_shape=kernel_shape, pads=pads, strides=strides,
    )  # fmt: skip
    require(not ceil_mode, "ceil_mode=1")
    return (mean * math.prod(kernel_shape)) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(x):
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x):
    return x.amax(list(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x, *, p=2):
    return (x.abs() ** p).sum(list(range(2, x.dim())), keepdim=True) ** (1 / p)
