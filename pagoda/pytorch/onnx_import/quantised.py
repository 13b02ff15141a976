"""Quantised operators, as torch's own pairs of quantise and dequantise around float operations.

`torch.ops.quantized_decomposed` is what torch's quantiser writes, so graphs of both origins look
alike to whatever makes int8 kernels of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch.nn import functional as F

from pagoda.pytorch.onnx_import.operators import operator, require
from pagoda.pytorch.onnx_import.types import type_of
from pagoda.pytorch.onnx_import.windows import conv

_quantised = torch.ops.quantized_decomposed
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)


def _range(kind: torch.dtype) -> tuple[int, int, torch.dtype]:
    require(kind in _INTEGERS, f"values quantised to {kind}", "quantise to int8 or uint8")
    limits = torch.iinfo(kind)
    return limits.min, limits.max, kind


def _zeros(zero: Any, scale: torch.Tensor) -> torch.Tensor:
    if isinstance(zero, torch.Tensor):
        return zero.to(torch.int64)
    return torch.full_like(scale, zero or 0, dtype=torch.int64)


def _one(value: Any) -> Any:
    """A tensor of one element as a scalar: it belongs to the whole tensor, not to a channel."""
    return value.reshape(()) if isinstance(value, torch.Tensor) and value.numel() == 1 else value


@operator("QuantizeLinear", numbers=(1, 2))
def quantize(
    x, scale, zero=None, *, axis=1, block_size=0, output_dtype=0, precision=0, saturate=1, types=()
):
    require(not block_size, f"blocks of {block_size} values with a scale each (block_size)",
            "quantise per tensor or per channel")  # fmt: skip
    named = type_of(output_dtype) if output_dtype else torch.uint8
    low, high, kind = _range(types[2] if len(types) > 2 and types[2] is not None else named)
    scale, zero = _one(scale), _one(zero)
    if not isinstance(scale, torch.Tensor) and not isinstance(zero, torch.Tensor):
        return _quantised.quantize_per_tensor(x, scale, zero or 0, low, high, kind)
    if not isinstance(scale, torch.Tensor) or scale.dim() == 0:
        values = torch.round(x.float() / scale) + (
            zero.float() if isinstance(zero, torch.Tensor) else zero or 0
        )
        return torch.clamp(values, low, high).to(kind)
    zeros = _zeros(zero, scale)
    return _quantised.quantize_per_channel(x, scale, zeros, axis % x.dim(), low, high, kind)


@operator("DequantizeLinear", numbers=(1, 2))
def dequantize(x, scale, zero=None, *, axis=1, block_size=0, output_dtype=0, types=()):
    require(not block_size, f"blocks of {block_size} values with a scale each (block_size)",
            "quantise per tensor or per channel")  # fmt: skip
    low, high, kind = _range(x.dtype)
    to = type_of(output_dtype) if output_dtype else types[1]
    scale, zero = _one(scale), _one(zero)
    if not isinstance(scale, torch.Tensor) and not isinstance(zero, torch.Tensor):
        y = _quantised.dequantize_per_tensor(x, scale, zero or 0, low, high, kind)
    elif not isinstance(scale, torch.Tensor) or scale.dim() == 0:
        y = (x.float() - (zero.float() if isinstance(zero, torch.Tensor) else zero or 0)) * scale
    else:
        zeros, axis = _zeros(zero, scale), axis % x.dim()
        y = _quantised.dequantize_per_channel(x, scale, zeros, axis, low, high, kind)
    return y if y.dtype == to else y.to(to)


@operator("DynamicQuantizeLinear")
def dynamic_quantize(x):
    low, high = torch.clamp(x.amin(), max=0), torch.clamp(x.amax(), min=0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    y = torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8)
    return y, scale, zero.to(torch.uint8)


@operator("QLinearConv", numbers=(1, 2, 4, 5, 6, 7))
def quantised_conv(
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, b=None, *, types=(),
    auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None, strides=None,
):  # fmt: skip
    inputs = dequantize(x, x_scale, x_zero, types=(types[0], types[1]))
    weights = dequantize(w, w_scale, w_zero, axis=0, types=(types[3], types[4]))
    bias = None if b is None else b.float() * (x_scale * w_scale)
    y = conv(
        inputs, weights, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads,
        strides=strides,
    )  # fmt: skip
    return quantize(y, y_scale, y_zero, types=(None, None, types[7]))


@operator("QLinearMatMul", numbers=(1, 2, 4, 5, 6, 7))
def quantised_matmul(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero, *, types=()):
    y = torch.matmul(
        dequantize(a, a_scale, a_zero, axis=-2, types=(types[0], types[1])),
        dequantize(b, b_scale, b_zero, axis=-1, types=(types[3], types[4])),
    )
    return quantize(y, y_scale, y_zero, axis=-1, types=(None, None, types[7]))


def _shifted(x: torch.Tensor, zero: Any, axis: int) -> torch.Tensor:
    """x - zero in int32."""
    if isinstance(zero, torch.Tensor) and zero.dim() == 1 and zero.numel() > 1:
        view = [1] * x.dim()
        view[axis] = -1
        zero = zero.reshape(view)
    return x.int() if zero is None else x.int() - (zero.int() if hasattr(zero, "int") else zero)


@operator("MatMulInteger", numbers=(2, 3))
def matmul_integer(a, b, a_zero=None, b_zero=None):
    return torch.matmul(_shifted(a, a_zero, -2), _shifted(b, b_zero, -1))


@operator("ConvInteger", numbers=(2, 3))
def conv_integer(
    x, w, x_zero=None, w_zero=None, *, auto_pad="NOTSET", dilations=None, group=1,
    kernel_shape=None, pads=None, strides=None,
):  # fmt: skip
    require(x.dim() == 4 and group == 1 and auto_pad == "NOTSET",
            "integer convolution other than in two dimensions, without groups and auto_pad",
            "export it with QuantizeLinear and DequantizeLinear around a float one")  # fmt: skip
    top, left, bottom, right = pads or [0] * 4
    strides, dilations = strides or [1, 1], dilations or [1, 1]
    values = F.pad(_shifted(x, x_zero, 1).float(), [left, right, top, bottom])
    columns = F.unfold(values, w.shape[2:], dilations, 0, strides).int()
    y = torch.matmul(_shifted(w, w_zero, 0).flatten(1), columns)
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(values.shape[2:], w.shape[2:], strides, dilations, strict=True)
    ]
    assert math.prod(size) == y.shape[2]
    return y.reshape(*y.shape[:2], *size)
