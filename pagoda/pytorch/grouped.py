"""Products of groups of rows, as in mixtures of experts: torch's grouped_mm as a library kernel."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from pagoda.pytorch.float32_terms import in_terms


@torch.library.custom_op(
    "pagoda::grouped_mm", mutates_args=(), device_types="cpu", tags=(torch.Tag.flexible_layout,)
)
def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """a [s, k], b [g, k, n]: row i of the result [s, n] is row i of a times the b of its group.
    a [m, s], b [s, n]: the result [g, m, n] has the product over the s of each group. Group g goes
    from ends[g - 1] (0 for the first) to ends[g]; what comes after the last counts as 0."""
    limits = [0, *ends.tolist()]
    spans = [slice(*pair) for pair in itertools.pairwise(limits)]
    a, b = a.float(), b.float()
    if b.dim() == 2:
        return torch.stack([a[:, span] @ b[span] for span in spans]).to(dtype)
    out = a.new_zeros(a.shape[0], b.shape[2])
    for span, w in zip(spans, b, strict=True):
        out[span] = a[span] @ w
    return out.to(dtype)


@_grouped_mm.register_fake
def _(a, b, ends, dtype):
    if b.dim() == 2:
        return a.new_empty((ends.shape[0], a.shape[0], b.shape[1]), dtype=dtype)
    return a.new_empty((a.shape[0], b.shape[2]), dtype=dtype)


def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """aten._grouped_mm of bfloat16 or float32 matrices: the group ends of the dimension that is
    split are `offs`; rows or columns of the result that are in no group are 0."""
    if bias is not None or not a.is_floating_point():
        return NotImplemented
    dtype = out_dtype or a.dtype
    if offs is None:
        return torch.bmm(a, b).to(dtype)
    if a.dim() == 3:  # [g, m, k] x [k, s]: the columns are split
        return _product(b.t(), a.transpose(1, 2), offs, dtype).t()
    return _product(a, b, offs, dtype)


def _product(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    ends = offs.to(torch.int32)
    if a.dtype != torch.float32:
        return _grouped_mm(a, b, ends, dtype)

    def multiply(a: torch.Tensor, b: torch.Tensor, _: None, dtype: torch.dtype) -> torch.Tensor:
        return _grouped_mm(a, b, ends, dtype)

    return in_terms(multiply, a, b, None).to(dtype)


def grouped_mm_backward(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, grad: torch.Tensor
) -> tuple[Any, Any]:
    """For a [s, k] and b [g, k, n], whose rows are split."""
    return grouped_mm(grad, b.transpose(1, 2), offs), grouped_mm(a.t(), grad, offs)
