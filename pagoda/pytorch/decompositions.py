"""Decompositions beside Inductor's own: operations that become loop nests here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch._inductor.decomposition import select_decomp_table

from pagoda.pytorch import sorting

aten = torch.ops.aten


def _cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A masked sum per element: quadratic in the size of `dim`, meant for positions and masks."""
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.int64
    if x.dim() == 0:
        return x.to(dtype)
    count = x.shape[dim]
    positions = torch.arange(count, device=x.device)
    seen = positions[None, :] <= positions[:, None]
    row = x.movedim(dim, -1).to(dtype)
    summed = torch.where(seen, row[..., None, :], 0).sum(-1, dtype=dtype)
    return summed.movedim(-1, dim)


def _baddbmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    product = torch.bmm(a, b)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return product + (bias if beta == 1 else bias * beta)


def _cumprod(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.int64
    if x.dim() == 0:
        return x.to(dtype)
    positions = torch.arange(x.shape[dim], device=x.device)
    seen = positions[None, :] <= positions[:, None]
    row = x.movedim(dim, -1).to(dtype)
    return torch.where(seen, row[..., None, :], 1).prod(-1, dtype=dtype).movedim(-1, dim)


def _grouped_mm_backward(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return sorting.grouped_mm(grad, b.transpose(1, 2), offs), sorting.grouped_mm(a.t(), grad, offs)


# torch's own decompositions that Inductor leaves out because other backends have kernels for them.
_MORE = [
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.out,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.out,
    aten._adaptive_avg_pool2d_backward,
]


def table() -> dict[Any, Callable]:
    """Inductor's decompositions, with ours."""
    experts = {}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        experts[torch.ops.transformers.grouped_mm_fallback.default] = sorting.grouped_mm
        backward = torch.ops.transformers.grouped_mm_fallback_backward.default
        experts[backward] = _grouped_mm_backward
    return {
        **experts,
        aten.topk.default: sorting.topk,
        aten.sort.default: sorting.sort,
        aten.sort.stable: sorting.sort_stable,
        aten.histc.default: sorting.histc,
        aten._grouped_mm.default: sorting.grouped_mm,
        **select_decomp_table(),
        **get_decompositions(_MORE),
        aten.cumsum.default: _cumsum,
        aten.cumprod.default: _cumprod,
        aten.baddbmm.default: _baddbmm,
    }
