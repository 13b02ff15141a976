"""Convolutions and their gradients, as calls of library kernels over channels-last data.

Input and kernel are put into channels last (no copy where they already are), the result is given
back as torch lays it out: channels last if the input or the kernel was, else contiguous. Between
the layers of a compiled graph the two conversions cancel.

float32 operands. Depthwise convolutions are float32 throughout; one tap at every pixel is a matrix
product and follows `kernels.matmul_float32`. Any other is a sum of convolutions of bfloat16 terms
(`float32_terms`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pagoda.pytorch.float32_terms import in_terms
from pagoda.pytorch.in_memory import in_memory

Ints = Sequence[int]

FEW_CHANNELS = 8  # with fewer, a product per tap would leave most of the array idle


# The kernels as operations that tracing and Inductor carry through unchanged ----------------------


def _op(name: str) -> Callable:
    return torch.library.custom_op(
        f"pagoda::{name}", mutates_args=(), device_types="cpu",
        tags=(torch.Tag.needs_exact_strides,),
    )  # fmt: skip


@_op("convolution")
def _convolution(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [n, c, h, w], w [o, c / groups, kh, kw], both channels last; size: rows and columns of the
    result, of type `dtype`, channels last as well."""
    exact = torch.float32 if x.is_floating_point() else torch.float64
    bias = None if bias is None else bias.to(exact)
    out = torch.nn.functional.conv2d(
        x.to(exact), w.to(exact), bias, stride, padding, dilation, groups
    )
    out = out.to(dtype) if x.is_floating_point() else out.to(torch.int64).to(dtype)
    return out.contiguous(memory_format=torch.channels_last)


@_op("convolution_cells")
def _convolution_cells(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    size: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The convolution of `cells(x)` and w [o, 4 c, kh, kw] with stride 1; x [n, c, h, w]. All of
    them channels last; size: rows and columns of the result, of type `dtype`."""
    return _convolution(cells(x), w, bias, size, [1, 1], [0, 0], [1, 1], 1, dtype)


def cells(x: torch.Tensor) -> torch.Tensor:
    """Squares of 2 x 2 pixels as channels: [n, 4 c, h / 2, w / 2], row after row of a square."""
    n, c, h, w = x.shape
    square = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return square.reshape(n, 4 * c, h // 2, w // 2)


@_op("convolution_transposed")
def _convolution_transposed(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [n, c, h, w], w [c, o / groups, kh, kw], both channels last; size: rows and columns of the
    result, of type `dtype`, channels last as well."""
    bias = None if bias is None else bias.float()
    extra = [
        have - ((count - 1) * s - 2 * p + d * (k - 1) + 1)
        for have, count, s, p, d, k in zip(
            size, x.shape[2:], stride, padding, dilation, w.shape[2:], strict=True
        )
    ]
    out = torch.nn.functional.conv_transpose2d(
        x.float(), w.float(), bias, stride, padding, extra, groups, dilation
    )
    return out.to(dtype).contiguous(memory_format=torch.channels_last)


@_op("convolution_weight")
def _convolution_weight(
    x: torch.Tensor,
    g: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient [o, c / groups, *kernel] for the kernel of a convolution of x [n, c, h, w], of
    type `dtype`; g [n, o, oh, ow]: that for its result. All of them channels last."""
    sizes = (g.shape[1], x.shape[1] // groups, *kernel)
    out = torch.nn.grad.conv2d_weight(
        x.float(), sizes, g.float(), stride, padding, dilation, groups
    )
    return out.to(dtype).contiguous(memory_format=torch.channels_last)


@_convolution_weight.register_fake
def _(x, g, kernel, stride, padding, dilation, groups, dtype):
    sizes = (g.shape[1], *kernel, x.shape[1] // groups)
    return x.new_empty(sizes, dtype=dtype).permute(0, 3, 1, 2)


@_convolution.register_fake
def _(x, w, bias, size, stride, padding, dilation, groups, dtype):
    return x.new_empty((x.shape[0], *size, w.shape[0]), dtype=dtype).permute(0, 3, 1, 2)


@_convolution_cells.register_fake
def _(x, w, bias, size, dtype):
    return x.new_empty((x.shape[0], *size, w.shape[0]), dtype=dtype).permute(0, 3, 1, 2)


@_convolution_transposed.register_fake
def _(x, w, bias, size, stride, padding, dilation, groups, dtype):
    return x.new_empty((x.shape[0], *size, w.shape[1] * groups), dtype=dtype).permute(0, 3, 1, 2)


def convolution_call(node: Any) -> tuple[str, tuple[tuple[str, Any], ...], list[Any]]:
    """One of these operations in Inductor as (library name, attributes, input nodes)."""
    args, _ = node.unflatten_args(node.inputs, node.constant_args)
    name = node.op_overload.name().removeprefix("pagoda::")
    if name == "convolution_cells":
        x, w, bias, *_ = args
        name, tensors = "convolution", [x, w, bias]
        stride, padding, dilation, groups = [1, 1], [0, 0], [1, 1], 1
        extra = (("transposed", False), ("cells", 2))
    elif name == "convolution_weight":
        x, g, _, stride, padding, dilation, groups, *_ = args
        tensors, extra = [x, g], ()
    else:
        x, w, bias, _, stride, padding, dilation, groups, *_ = args
        tensors = [x, w, bias]
        extra = (("transposed", False), ("cells", 1)) if name == "convolution" else ()
    values = [*stride, *padding, *dilation, groups]
    names = ("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups")
    return name, (*zip(names, map(int, values), strict=True), *extra), tensors


# torch's operations as these ----------------------------------------------------------------------


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """aten.convolution in one or two dimensions: x [n, c, *space], weight [o, c / groups, *kernel]
    (transposed: [c, o / groups, *kernel]). dtype: of the result, float32 or that of x."""
    _fixed((*x.shape[1:], *weight.shape))
    if weight.dim() == 3:
        steps = [[1, *stride], [0, *padding], [1, *dilation], transposed, [0, *output_padding]]
        out = convolution(x.unsqueeze(2), weight.unsqueeze(2), bias, *steps, groups, dtype)
        return out.squeeze(2)
    stride, padding, dilation = (_each(v) for v in (stride, padding, dilation))
    if transposed:
        dims = zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, _each(output_padding),
            strict=True,
        )
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, d, extra in dims]
    else:
        size = result_size(x, weight, stride, padding, dilation)
    op = _convolution_transposed if transposed else _convolution
    steps = stride, padding, dilation
    out = _convolved(op, x, weight, bias, _fixed(size), *steps, groups, dtype)
    return _laid_out(out, x, weight)


def result_size(
    x: torch.Tensor, weight: torch.Tensor, stride: Ints, padding: Ints, dilation: Ints
) -> list[int]:
    """Rows and columns of a convolution's result."""
    dims = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(int(n) + 2 * p - d * (int(k) - 1) - 1) // s + 1 for n, k, s, p, d in dims]


def convolution_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Ints | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients for x, weight and bias, where `output_mask` asks for them."""
    if weight.dim() == 3:
        steps = [[1, *stride], [0, *padding], [1, *dilation], transposed, [0, *output_padding]]
        tensors = (t.unsqueeze(2) for t in (grad, x, weight))
        for_x, for_w, for_bias = convolution_backward(
            *tensors, bias_sizes, *steps, groups, output_mask
        )
        for_x, for_w = (None if t is None else t.squeeze(2) for t in (for_x, for_w))
        return for_x, for_w, for_bias
    _fixed((*grad.shape[1:], *x.shape[1:], *weight.shape))
    stride, padding, dilation = (_each(v) for v in (stride, padding, dilation))
    for_x = for_weight = for_bias = None
    if output_mask[0]:
        op = _convolution if transposed else _convolution_transposed
        size = [int(count) for count in x.shape[2:]]
        for_x = _convolved(op, grad, weight, None, size, stride, padding, dilation, groups)
        for_x = _laid_out(for_x, x, weight)
    if output_mask[1]:
        source, result = (grad, x) if transposed else (x, grad)
        for_weight = _weight_gradient(
            source, result, weight.shape, stride, padding, dilation, groups
        )
        if not _is_channels_last(weight):
            for_weight = for_weight.contiguous()
    if output_mask[2]:
        for_bias = grad.sum([0, 2, 3])
    return for_x, for_weight, for_bias


def _convolved(
    op: Callable,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    def call(a: torch.Tensor, b: torch.Tensor, bias: Any, dtype: torch.dtype) -> torch.Tensor:
        steps = stride, padding, dilation, groups
        if op is _convolution and pays_in_cells(a, b, *steps):
            return in_cells(a, b, bias, size, padding, dtype)
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
        return op(a, b, bias, size, *steps, dtype)

    depthwise = groups == x.shape[1] and w.shape[0] == groups and w.shape[1] == 1 and groups > 1
    product = [*w.shape[2:], *stride, *padding, groups] == [1, 1, 1, 1, 0, 0, 1]
    product = product and size == list(x.shape[2:])
    if x.dtype != torch.float32 or depthwise or product:
        return call(x, w, bias, dtype or x.dtype)
    return in_terms(call, x, w, bias)


def pays_in_cells(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> bool:
    """A row of the kernel is one run of k, kw x channels long. With few channels it leaves much of
    the array idle; squares of pixels as channels make runs four times as long, half as many."""
    few = groups == 1 and x.shape[1] < FEW_CHANNELS // 2 and min(w.shape[2:]) > 2
    return few and list(stride) == [2, 2] and list(dilation) == [1, 1]


def in_cells(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    size: Ints,
    padding: Ints,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A convolution of stride 2 as one of stride 1 over squares of a padded copy of x; where a
    square juts out of the kernel its weights are 0."""
    margins: list[int] = []
    for dim, before in zip((3, 2), reversed(padding), strict=True):
        wanted = 2 * (size[dim - 2] - 1) + w.shape[dim] + w.shape[dim] % 2
        margins += [before, wanted - int(x.shape[dim]) - before]
    x = in_memory(torch.nn.functional.pad(x, margins))
    w = cells(torch.nn.functional.pad(w, (0, w.shape[3] % 2, 0, w.shape[2] % 2)))
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    return torch.ops.pagoda.convolution_cells(x, w, bias, [*size], dtype)


def _weight_gradient(
    x: torch.Tensor,
    g: torch.Tensor,
    sizes: Ints,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    kernel, channels = _fixed(sizes[2:]), int(sizes[1])
    if groups == 1 and channels < FEW_CHANNELS and kernel[1] > 1:
        patches = _columns_as_channels(
            x, kernel[1], stride[1], padding[1], dilation[1], int(g.shape[3])
        )
        steps = (stride[0], 1), (padding[0], 0), (dilation[0], 1)
        size = g.shape[1], kernel[1] * channels, kernel[0], 1
        found = _weight_gradient(patches, g, size, *(list(pair) for pair in steps), 1)
        return found.permute(0, 2, 3, 1).reshape(-1, *kernel, channels).permute(0, 3, 1, 2)

    def call(a: torch.Tensor, b: torch.Tensor, bias: Any, dtype: torch.dtype) -> torch.Tensor:
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
        return _convolution_weight(a, b, kernel, stride, padding, dilation, groups, dtype)

    depthwise = groups == x.shape[1] == g.shape[1] and groups > 1
    if x.dtype != torch.float32 or depthwise:
        return call(x, g, None, x.dtype)
    return in_terms(call, x, g, None)


def _columns_as_channels(
    x: torch.Tensor, taps: int, stride: int, padding: int, dilation: int, count: int
) -> torch.Tensor:
    """[n, taps * c, h, count]: at each of `count` columns the pixels that a row of taps meets."""
    batch, channels, high, wide = x.shape
    reach = dilation * (taps - 1) + 1
    after = (count - 1) * stride + reach - padding - wide
    pixels = torch.nn.functional.pad(x, (padding, after)).permute(0, 2, 3, 1)
    pixels = pixels.unfold(2, reach, stride)[..., ::dilation]  # [n, h, count, c, taps]
    rows = pixels.transpose(3, 4).reshape(batch, high, count, taps * channels)
    return rows.permute(0, 3, 1, 2)


def _laid_out(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In channels last if x or weight is, else contiguous."""
    if any(_is_channels_last(t) for t in (x, weight)):
        return out
    return out.contiguous()


def _is_channels_last(t: torch.Tensor) -> bool:
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _fixed(sizes: Sequence[Any]) -> list[int]:
    """As numbers, which makes them compile-time constants: all are but the number of images."""
    return [int(size) for size in sizes]


def _each(value: Sequence[Any]) -> list[int]:
    return _fixed(value) * (2 if len(value) == 1 else 1)
