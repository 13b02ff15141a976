"""Operators that are layers: products, norms, reductions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from pagoda.pytorch.onnx_import.operators import operator, require


@operator("MatMul")
def matmul(a, b):
    return torch.matmul(a, b)


def linear(x, w):
    """MatMul with a weight that was turned, [o, k], when the graph was made."""
    return F.linear(x, w)


@operator("Gemm")
def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    if transB and not transA and alpha == 1 and beta == 1 and (c is None or c.dim() == 1):
        return F.linear(a, b, c if c is None or c.shape[0] == b.shape[0] else c.expand(b.shape[0]))
    a, b = (a.t() if transA else a), (b.t() if transB else b)
    if c is not None and alpha == 1 and beta == 1 and c.dim() == 1 and c.shape[0] == b.shape[1]:
        return torch.addmm(c, a, b)
    y = torch.mm(a, b)
    y = y if alpha == 1 else (y * alpha).to(a.dtype)
    if c is None:
        return y
    return y + (c if beta == 1 else (c * beta).to(c.dtype))


@operator("Einsum")
def einsum(*tensors, equation):
    return torch.einsum(equation.replace(" ", ""), *tensors)


@operator("BatchNormalization", statistics=(3, 4))
def batch_norm(
    x, scale, b, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0, spatial=1, outputs=1
):
    require(not training_mode, "training_mode=1", "export the model for inference: model.eval()")
    return F.batch_norm(x, mean, var, scale, b, False, 0.0, epsilon)


@operator("InstanceNormalization")
def instance_norm(x, scale, b, *, epsilon=1e-5):
    return F.instance_norm(x, weight=scale, bias=b, eps=epsilon)


@operator("GroupNormalization")
def group_norm(x, scale, b, *, epsilon=1e-5, num_groups, stash_type=1, opset=21):
    if opset < 21:  # there a scale and a bias belong to a group
        each = x.shape[1] // num_groups
        scale, b = scale.repeat_interleave(each), b.repeat_interleave(each)
    return F.group_norm(x, num_groups, scale, b, epsilon)


@operator("LayerNormalization")
def layer_norm(x, scale, b=None, *, axis=-1, epsilon=1e-5, stash_type=1, outputs=1):
    axis = axis % x.dim()
    y = F.layer_norm(x, x.shape[axis:], scale.expand(x.shape[axis:]),
                     None if b is None else b.expand(x.shape[axis:]), epsilon)  # fmt: skip
    if outputs == 1:
        return y
    dims = list(range(axis, x.dim()))
    variance = x.float().var(dims, correction=0, keepdim=True)
    return y, x.float().mean(dims, keepdim=True), torch.rsqrt(variance + epsilon)


@operator("RMSNormalization")
def rms_norm(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    return F.rms_norm(x, x.shape[axis % x.dim() :], eps=epsilon) * scale


@operator("LpNormalization")
def lp_norm(x, *, axis=-1, p=2):
    size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(size == 0, 0, x / size)


@operator("MeanVarianceNormalization")
def mean_variance_norm(x, *, axes=(0, 2, 3)):
    axes = [axis for axis in axes if axis < x.dim()]
    mean = x.mean(axes, keepdim=True)
    deviation = torch.sqrt(torch.square(x).mean(axes, keepdim=True) - torch.square(mean))
    return (x - mean) / (deviation + 1e-9)


@operator("LRN")
def local_response_norm(x, *, alpha=1e-4, beta=0.75, bias=1.0, size):
    square = torch.square(x)
    before = (size - 1) // 2
    rest = [0, 0] * (x.dim() - 2)
    wide = F.pad(square, [*rest, before, size - 1 - before])
    total = sum(wide.narrow(1, k, x.shape[1]) for k in range(size))
    return x / (bias + alpha / size * total) ** beta


# Reductions --------------------------------------------------------------------------------------


def _log_sum_exp(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.logsumexp(x, axes, keep)


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Any] = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: _mean(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: _extremum(torch.amax, x, axes, keep),
    "ReduceMin": lambda x, axes, keep: _extremum(torch.amin, x, axes, keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(
        torch.square(x).sum(axes, keepdim=keep, dtype=x.dtype)
    ).to(x.dtype),
    "ReduceLogSum": lambda x, axes, keep: torch.log(x.sum(axes, keepdim=keep, dtype=x.dtype)),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceSumSquare": lambda x, axes, keep: torch.square(x).sum(axes, keepdim=keep, dtype=x.dtype),
}


def _mean(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if x.dtype.is_floating_point:
        return x.mean(axes, keepdim=keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(x.sum(axes, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)


def _extremum(function: Any, x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    """Of nothing: the least or largest value there is."""
    if all(x.shape[axis] for axis in axes):
        return function(x, axes, keepdim=keep)
    if x.dtype == torch.bool:
        extreme: float = function is torch.amin
    elif x.dtype.is_floating_point:
        extreme = -math.inf if function is torch.amax else math.inf
    else:
        limits = torch.iinfo(x.dtype)
        extreme = limits.min if function is torch.amax else limits.max
    shape = [1 if d in axes else n for d, n in enumerate(x.shape) if keep or d not in axes]
    return torch.full(shape, extreme, dtype=x.dtype, device=x.device)


class _Reduction:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        x: torch.Tensor,
        *,
        axes: Any = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> torch.Tensor:
        if not axes and noop_with_empty_axes:
            axes = []
            if self.name in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"):
                return x
            one = _REDUCTIONS[self.name](x.unsqueeze(0), [0], False)
            return one
        chosen = list(range(x.dim())) if not axes else [axis % x.dim() for axis in axes]
        return _REDUCTIONS[self.name](x, chosen, bool(keepdims)) if chosen or x.dim() else x


for _name in _REDUCTIONS:
    operator(_name, constants={1: "axes"})(_Reduction(_name))


def _position(function: Any, x: torch.Tensor, axis: int, keep: int, last: int) -> torch.Tensor:
    if not last:
        return function(x, axis, keepdim=bool(keep))
    return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=bool(keep))


@operator("ArgMax")
def argmax(x, *, axis=0, keepdims=1, select_last_index=0):
    return _position(torch.argmax, x, axis, keepdims, select_last_index)


@operator("ArgMin")
def argmin(x, *, axis=0, keepdims=1, select_last_index=0):
    return _position(torch.argmin, x, axis, keepdims, select_last_index)


@operator("CumSum", constants={1: "axis"})
def cumsum(x, *, axis, exclusive=0, reverse=0):
    axis = axis if isinstance(axis, int) else axis[0]
    x = x.flip(axis) if reverse else x
    y = x.cumsum(axis, dtype=x.dtype)
    y = y - x if exclusive else y
    return y.flip(axis) if reverse else y
