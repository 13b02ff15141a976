"""Decompositions beside Inductor's own: operations that become loop nests here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table

from pagoda.pytorch.convolution_3d import convolution, convolution_backward
from pagoda.pytorch.pooling import (
    avg_pool2d,
    max_pool2d_with_indices,
    max_pool2d_with_indices_backward,
)

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


def table() -> dict[Any, Callable]:
    """Inductor's decompositions, with ours."""
    return {
        **select_decomp_table(),
        aten.cumsum.default: _cumsum,
        aten.avg_pool2d.default: avg_pool2d,
        aten.max_pool2d_with_indices.default: max_pool2d_with_indices,
        aten.max_pool2d_with_indices_backward.default: max_pool2d_with_indices_backward,
        aten.convolution.default: convolution,
        aten.convolution_backward.default: convolution_backward,
    }
