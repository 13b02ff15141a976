"""Operators that resample images: Resize, Upsample, GridSample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from pagoda.pytorch.onnx_import.operators import operator, require

_NEAREST = {
    "round_prefer_floor": lambda x: math.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: math.floor(x + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}
_TORCH = {"nearest": "nearest", "linear": {1: "linear", 2: "bilinear", 3: "trilinear"}}


@operator("Resize", constants={1: "roi", 2: "scales", 3: "sizes"})
def resize(
    x, *, antialias=0, axes=None, coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75,
    exclude_outside=0, extrapolation_value=0.0, keep_aspect_ratio_policy="stretch", mode="nearest",
    nearest_mode="round_prefer_floor", roi=None, scales=None, sizes=None,
):  # fmt: skip
    how = coordinate_transformation_mode
    require(how != "tf_crop_and_resize", "tf_crop_and_resize", "crop before the model")
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    lengths = [x.shape[axis] for axis in axes]
    if sizes:
        scales = [m / n for m, n in zip(sizes, lengths, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            common = (min if keep_aspect_ratio_policy == "not_larger" else max)(scales)
            scales = [common] * len(scales)
            sizes = [math.floor(common * n + 0.5) for n in lengths]
    else:
        sizes = [math.floor(n * s) for n, s in zip(lengths, scales, strict=True)]
    resized = [
        each for each in zip(axes, lengths, sizes, scales, strict=True)
        if each[1] != each[2] or each[3] != 1
    ]  # fmt: skip
    native = _native(x, resized, mode, how, nearest_mode, bool(antialias))
    if native is not None:
        return native
    for axis, length, size, scale in resized:
        places = [_origin(o, length, size, scale, how) for o in range(size)]
        if mode == "nearest":
            index = [min(max(_NEAREST[nearest_mode](p), 0), length - 1) for p in places]
            x = x.index_select(axis, torch.tensor(index, device=x.device))
        else:
            narrow = min(scale, 1.0) if antialias else 1.0
            taps = [_taps(p, mode, cubic_coeff_a, narrow) for p in places]
            x = _weighted(x, axis, taps, bool(exclude_outside))
    return x


@operator("Upsample", constants={1: "scales"})
def upsample(x, *, scales, mode="nearest"):
    return resize(x, scales=scales, mode=mode, coordinate_transformation_mode="asymmetric",
                  nearest_mode="floor")  # fmt: skip


def _native(
    x: torch.Tensor, resized: list[Any], mode: str, how: str, nearest: str, antialias: bool
) -> torch.Tensor | None:
    """torch's own resizing, where it does the same."""
    dims = x.dim() - 2
    if dims not in (1, 2, 3) or antialias or any(axis < 2 for axis, *_ in resized):
        return None
    if any(abs(size / length - scale) > 1e-7 for _, length, size, scale in resized):
        return None
    size = list(x.shape[2:])
    for axis, _, n, _ in resized:
        size[axis - 2] = n
    if mode == "nearest" and (how, nearest) == ("asymmetric", "floor"):
        return F.interpolate(x, size, mode="nearest")
    half = how == "half_pixel" or (how == "pytorch_half_pixel" and 1 not in size)
    if mode == "linear" and (half or how == "align_corners"):
        return F.interpolate(x, size, mode=_TORCH["linear"][dims], align_corners=not half)
    return None


def _origin(o: int, length: int, size: int, scale: float, how: str) -> float:
    """Where element o of the result lies in the input."""
    if how == "asymmetric":
        return o / scale
    if how == "align_corners":
        return 0.0 if size == 1 else o * (length - 1) / (scale * length - 1)
    if how == "pytorch_half_pixel" and size == 1:
        return 0.0
    shift = 0.0
    if how == "half_pixel_symmetric":
        shift = length / 2 * (1 - size / (scale * length))
    return shift + (o + 0.5) / scale - 0.5


def _taps(place: float, mode: str, a: float, narrow: float) -> list[tuple[int, float]]:
    """Elements that an element is made of, with their weights. narrow: the factor by which the
    filter is stretched, against aliasing."""
    reach = (1 if mode == "linear" else 2) / narrow
    first = math.floor(place)
    found = []
    for k in range(math.floor(-reach) + 1, math.ceil(reach) + 1):
        t = abs(first + k - place) * narrow
        if mode == "linear":
            weight = max(1 - t, 0.0)
        elif t < 1:
            weight = ((a + 2) * t - (a + 3)) * t * t + 1
        elif t < 2:
            weight = ((t - 5) * t + 8) * a * t - 4 * a
        else:
            weight = 0.0
        found.append((first + k, weight))
    total = sum(weight for _, weight in found)
    return [(k, weight / total) for k, weight in found]


def _weighted(
    x: torch.Tensor, axis: int, taps: list[list[tuple[int, float]]], exclude: bool
) -> torch.Tensor:
    """Sums of weighted elements along an axis; outside of it lie copies of its ends, or nothing."""
    length = x.shape[axis]
    if exclude:
        kept = [[(k, w if 0 <= k < length else 0.0) for k, w in each] for each in taps]
        sums = [sum(w for _, w in each) for each in kept]
        taps = [[(k, w / s) for k, w in each] for each, s in zip(kept, sums, strict=True)]
    view = [1] * x.dim()
    view[axis] = len(taps)
    result = None
    for number in range(max(map(len, taps))):
        column = [each[number] if number < len(each) else (0, 0.0) for each in taps]
        index = torch.tensor([min(max(k, 0), length - 1) for k, _ in column], device=x.device)
        weight = torch.tensor([w for _, w in column], dtype=x.dtype, device=x.device)
        term = x.index_select(axis, index) * weight.reshape(view)
        result = term if result is None else result + term
    assert result is not None
    return result


@operator("GridSample")
def grid_sample(x, grid, *, align_corners=0, mode="linear", padding_mode="zeros"):
    named = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid, named, padding_mode, bool(align_corners))
