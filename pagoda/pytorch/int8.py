"""Quantised matrix products and convolutions: int8 operands, int32 sums, one formula behind them.

    acc[o] = sum of x w[o] in int32 (it wraps), x padded with `pad_value` where the convolution pads
    v[o]   = float32(acc[o]) * scale[o]              one rounding each
    result = v + offset[o]                           dtype float32 or bfloat16
    result = clamp(round(v + offset), low, high)     dtype int8; to nearest, ties to even

`scale` and `offset` are float32 with an element per output channel, in units of the result. What
is the same for every output of a channel belongs into the offset (`offset_for`): the bias, the zero
point of the result and, as an x with zero point z stands for (x - z) times its scale, z times all
of w[o]; the padding is z then.

The compiler makes one kernel of an operation and of pointwise ones that follow: the sums never
travel to DRAM, and any result takes the vector engine one pass; bounds closer than int8's own take
a second. The bits are those of the formula, on any chip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagoda.pytorch.convolution import in_cells, pays_in_cells, result_size

INT8_MIN, INT8_MAX = -128, 127


def _finish(
    acc: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> torch.Tensor:
    """The formula behind the sums acc [..., o]."""
    v = acc.to(torch.float32) * scale
    v = v if offset is None else v + offset
    if dtype != torch.int8:
        return v.to(dtype)
    return torch.clamp(torch.round(v), low, high).to(torch.int8)


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int = 0,
    dtype: torch.dtype = torch.int8,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> torch.Tensor:
    top, left = (int(p) for p in padding)
    if pad_value and (top or left):
        x = torch.nn.functional.pad(x, (left, left, top, top), value=pad_value)
        top = left = 0
    size = result_size(x, weight, stride, (top, left), dilation)
    steps = [*map(int, stride)], [top, left], [*map(int, dilation)], int(groups)
    if pays_in_cells(x, weight, *steps):
        acc = in_cells(x, weight, None, size, [top, left], torch.int32)
    else:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        acc = torch.ops.pagoda.convolution(x, weight, None, size, *steps, torch.int32)
    pixels = acc.permute(0, 2, 3, 1)
    return _finish(pixels, scale, offset, dtype, low, high).permute(0, 3, 1, 2)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype = torch.int8,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    acc = torch.ops.pagoda.convolution(  # of images of one pixel
        rows[:, :, None, None], weight[:, :, None, None], None, [1, 1], [1, 1], [0, 0], [1, 1], 1,
        torch.int32,
    )  # fmt: skip
    out = _finish(acc.reshape(-1, weight.shape[0]), scale, offset, dtype, low, high)
    return out.reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("pagoda::convolution_int8", mutates_args=(), device_types="cpu")
def convolution_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pad_value: int = 0,
    dtype: torch.dtype = torch.int8,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> torch.Tensor:
    """x int8 [n, c, h, w], weight int8 [o, c / groups, kh, kw], scale and offset float32
    [o] to [n, o, oh, ow] of type `dtype`, channels last; see the module. Raises ValueError."""
    _check("convolution_int8", x, weight, scale, offset, dtype, low, high)
    steps = stride, padding, dilation, groups
    return _convolution(
        x, weight, scale, offset, *steps, pad_value, dtype, low, high
    ).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("pagoda::linear_int8", mutates_args=(), device_types="cpu")
def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype = torch.int8,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> torch.Tensor:
    """x int8 [..., k], weight int8 [o, k], scale and offset float32 [o] to [..., o] of type
    `dtype`; see the module. Raises ValueError."""
    _check("linear_int8", x, weight, scale, offset, dtype, low, high)
    return _linear(x, weight, scale, offset, dtype, low, high).contiguous()


@convolution_int8.register_fake
def _(x, weight, scale, offset, stride, padding, dilation, groups, pad_value=0, dtype=torch.int8,
      low=INT8_MIN, high=INT8_MAX):  # fmt: skip
    _check("convolution_int8", x, weight, scale, offset, dtype, low, high)
    sizes = (x.shape[0], *result_size(x, weight, stride, padding, dilation), weight.shape[0])
    return x.new_empty(sizes, dtype=dtype).permute(0, 3, 1, 2)


@linear_int8.register_fake
def _(x, weight, scale, offset, dtype=torch.int8, low=INT8_MIN, high=INT8_MAX):
    _check("linear_int8", x, weight, scale, offset, dtype, low, high)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _check(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> None:
    wanted = [("x", x, torch.int8), ("weight", weight, torch.int8), ("scale", scale, torch.float32)]
    wanted += [] if offset is None else [("offset", offset, torch.float32)]
    for what, tensor, kind in wanted:
        if tensor.dtype != kind:
            raise ValueError(
                f"{name}: {what} must be {kind}, got {tensor.dtype}; quantise it first "
                "(pagoda.quantize does that for a whole model)"
            )
    channels = (weight.shape[0],)
    for what, tensor, _ in wanted[2:]:
        if tuple(tensor.shape) != channels:
            raise ValueError(
                f"{name}: {what} must have one element per output channel, shape {channels}, got "
                f"{tuple(tensor.shape)}; expand it with .expand({channels[0]})"
            )
    if dtype not in (torch.int8, torch.float32, torch.bfloat16):
        raise ValueError(
            f"{name}: dtype must be torch.int8, torch.float32 or torch.bfloat16, got {dtype}; "
            "convert the result afterwards"
        )
    if not INT8_MIN <= low <= high <= INT8_MAX:
        raise ValueError(
            f"{name}: the bounds must be -128 <= low <= high <= 127, got {low} and {high}; leave "
            "them out for no activation"
        )


def offset_for(
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: int = 0,
    result_zero_point: int = 0,
) -> torch.Tensor | None:
    """The offset of an operation with this int8 weight [o, ...], exactly: float64 [o].

    scale: of the operation, [o]. bias: float [o] in units of the result, or None. zero_point: of x.
    None if it would be zero for any weight.
    """
    if bias is None and not zero_point and not result_zero_point:
        return None
    sums = weight.flatten(1).sum(1, dtype=torch.int64).double()
    offset = result_zero_point - zero_point * sums * scale.double()
    return offset if bias is None else offset + bias.double()


DECOMPOSITIONS = {
    torch.ops.pagoda.convolution_int8.default: _convolution,
    torch.ops.pagoda.linear_int8.default: _linear,
}
