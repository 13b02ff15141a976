"""Quantised matrix products and convolutions: int8 operands, int32 sums, one formula behind them.

    acc[o] = sum of x w[o] in int32 (it wraps), x padded with `pad_value` where the convolution pads
    v[o]   = float32(acc[o] + bias[o]) * scale[o]            one rounding each
    result = v                                               dtype float32 or bfloat16
    result = clamp(round(v) + zero_point, low, high)         dtype int8; to nearest, ties to even

`bias` is int32, in units of the sums; `scale` float32. Both have an element per output channel. An
x with zero point z stands for (x - z) times its scale; as z w[o] summed over all of w[o] is the
same for every output, that belongs into the bias (`bias_for`), and the padding is z.

The compiler makes one kernel of an operation and of pointwise ones that follow: the sums never
travel to DRAM, and an int8 result takes the vector engine three passes, two without bias. The bits
are those of the formula, on any chip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagoda.pytorch.convolution import in_cells, pays_in_cells, result_size

INT8_MIN, INT8_MAX = -128, 127


def _finish(
    acc: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    zero_point: int,
    low: int,
    high: int,
) -> torch.Tensor:
    """The formula behind the sums acc [..., o]."""
    total = acc if bias is None else acc + bias
    v = total.to(torch.float32) * scale
    if dtype != torch.int8:
        return v.to(dtype)
    q = torch.round(v)
    if zero_point:
        q = q + zero_point
    return torch.clamp(q, low, high).to(torch.int8)


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int = 0,
    dtype: torch.dtype = torch.int8,
    zero_point: int = 0,
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
    return _finish(pixels, scale, bias, dtype, zero_point, low, high).permute(0, 3, 1, 2)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype = torch.int8,
    zero_point: int = 0,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    acc = torch.ops.pagoda.convolution(  # of images of one pixel
        rows[:, :, None, None], weight[:, :, None, None], None, [1, 1], [1, 1], [0, 0], [1, 1], 1,
        torch.int32,
    )  # fmt: skip
    out = _finish(acc.reshape(-1, weight.shape[0]), scale, bias, dtype, zero_point, low, high)
    return out.reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("pagoda::convolution_int8", mutates_args=(), device_types="cpu")
def convolution_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pad_value: int = 0,
    dtype: torch.dtype = torch.int8,
    zero_point: int = 0,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> torch.Tensor:
    """x int8 [n, c, h, w], weight int8 [o, c / groups, kh, kw], scale float32 [o], bias int32 [o]
    to [n, o, oh, ow] of type `dtype`, channels last; see the module. Raises ValueError."""
    _check("convolution_int8", x, weight, scale, bias, dtype, low, high)
    steps = stride, padding, dilation, groups
    return _convolution(
        x, weight, scale, bias, *steps, pad_value, dtype, zero_point, low, high
    ).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("pagoda::linear_int8", mutates_args=(), device_types="cpu")
def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype = torch.int8,
    zero_point: int = 0,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> torch.Tensor:
    """x int8 [..., k], weight int8 [o, k], scale float32 [o], bias int32 [o] to [..., o] of type
    `dtype`; see the module. Raises ValueError."""
    _check("linear_int8", x, weight, scale, bias, dtype, low, high)
    return _linear(x, weight, scale, bias, dtype, zero_point, low, high).contiguous()


@convolution_int8.register_fake
def _(x, weight, scale, bias, stride, padding, dilation, groups, pad_value=0, dtype=torch.int8,
      zero_point=0, low=INT8_MIN, high=INT8_MAX):  # fmt: skip
    _check("convolution_int8", x, weight, scale, bias, dtype, low, high)
    sizes = (x.shape[0], *result_size(x, weight, stride, padding, dilation), weight.shape[0])
    return x.new_empty(sizes, dtype=dtype).permute(0, 3, 1, 2)


@linear_int8.register_fake
def _(x, weight, scale, bias, dtype=torch.int8, zero_point=0, low=INT8_MIN, high=INT8_MAX):
    _check("linear_int8", x, weight, scale, bias, dtype, low, high)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _check(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    low: int,
    high: int,
) -> None:
    wanted = [("x", x, torch.int8), ("weight", weight, torch.int8), ("scale", scale, torch.float32)]
    wanted += [] if bias is None else [("bias", bias, torch.int32)]
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


def bias_for(
    weight: torch.Tensor, bias: torch.Tensor | None, sums: torch.Tensor, zero_point: int = 0
) -> torch.Tensor | None:
    """The int32 bias of an operation with this int8 weight [o, ...].

    bias: float [o] or None. sums: float [o], what one unit of the sums stands for: the scale of x
    times that of w[o]. zero_point: of x. None if it would be all zeros for any weight.
    """
    found = None
    if bias is not None:
        found = torch.round(bias.double() / sums.double())
    if zero_point:
        total = weight.flatten(1).sum(1, dtype=torch.int64).double() * zero_point
        found = -total if found is None else found - total
    return None if found is None else found.clamp(-(2**31), 2**31 - 1).to(torch.int32)


DECOMPOSITIONS = {
    torch.ops.pagoda.convolution_int8.default: _convolution,
    torch.ops.pagoda.linear_int8.default: _linear,
}
