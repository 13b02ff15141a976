"""Operations that eager code gets as several others, because none of them is one kernel.

`REWRITTEN`: in place of the operation, below autograd. The others are registered above autograd:
their gradients follow from what they are made of, where torch's own formula would call an operation
that only other devices have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions

aten = torch.ops.aten


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (a.numel() == 0 or bool((a == b).all().item()))


def _masked_select(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    return x[mask]


def _masked_scatter_(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    where = mask.expand(x.shape).nonzero()
    return x.index_put_(where.unbind(1), source.reshape(-1)[: where.shape[0]])


REWRITTEN: dict[Any, Callable] = {
    aten.equal.default: _equal,
    aten.masked_select.default: _masked_select,
    aten.masked_scatter_.default: _masked_scatter_,
}


def positions(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks among the indices become positions: how many there are depends on data, so they are
    found on the host (`nonzero`, which is counted)."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        masked = index is not None and index.dtype in (torch.bool, torch.uint8)
        found += index.nonzero().unbind(1) if masked else [index]
    return found


def _lstm_cell(
    igates: torch.Tensor,
    hgates: torch.Tensor,
    cx: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gates = igates + hgates
    for bias in (input_bias, hidden_bias):
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, 1)
    cy = f.sigmoid() * cx + i.sigmoid() * g.tanh()
    return o.sigmoid() * cy.tanh(), cy, gates


def _gru_cell(
    igates: torch.Tensor,
    hgates: torch.Tensor,
    hx: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    igates = igates if input_bias is None else igates + input_bias
    hgates = hgates if hidden_bias is None else hgates + hidden_bias
    (ir, iz, inew), (hr, hz, hnew) = igates.chunk(3, 1), hgates.chunk(3, 1)
    z, new = (iz + hz).sigmoid(), (inew + (ir + hr).sigmoid() * hnew).tanh()
    return new + z * (hx - new), z


# torch's own decompositions, whose gradients follow.
_ABOVE_AUTOGRAD = (
    "upsample_bilinear2d", "upsample_bicubic2d", "_adaptive_avg_pool2d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "grid_sampler_2d",
)  # fmt: skip

_library = torch.library.Library("aten", "IMPL")  # must stay alive


def _register() -> None:
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        _library.impl("_thnn_fused_lstm_cell", torch._disable_dynamo(_lstm_cell), key)
        _library.impl("_thnn_fused_gru_cell", torch._disable_dynamo(_gru_cell), key)
    for name in _ABOVE_AUTOGRAD:
        op = getattr(aten, name).default
        composed = get_decompositions([op])[op]
        _library.impl(name, torch._disable_dynamo(composed), "AutogradPrivateUse1")


_register()
