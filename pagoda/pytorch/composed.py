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

from pagoda.pytorch import losses, optimizers, pooling, resampling

aten = torch.ops.aten


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (a.numel() == 0 or bool((a == b).all().item()))


def _masked_select(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x, mask = torch.broadcast_tensors(x, mask)
    return x[mask] if x.dim() else x[None][mask[None]]


def _masked_scatter_(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if not x.dim():
        _masked_scatter_(x[None], mask[None], source)
        return x
    where = mask.expand(x.shape).nonzero()
    return x.index_put_(where.unbind(1), source.reshape(-1)[: where.shape[0]])


def _repeated_positions(repeats: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
    """Position k as often as `repeats[k]` says. Without `output_size` their sum is read back."""
    ends = repeats.cumsum(0)
    count = output_size if output_size is not None else int(ends[-1].item()) if len(ends) else 0
    place = torch.arange(count, device=repeats.device)
    return torch.searchsorted(ends, place, right=True).to(repeats.dtype)


def _bincount(
    x: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0
) -> torch.Tensor:
    """How many bins there are is read back from the device. Sums of weights other than float32 are
    float64 in torch."""
    if weights is not None and weights.dtype != torch.float32:
        raise NotImplementedError(
            f"operation aten.bincount cannot run on device pagoda: its sums of {weights.dtype} "
            "weights are torch.float64, which the chip stores but cannot compute with. Use "
            "float32: convert the weights with .float()."
        )
    bins = max(int(x.max().item()) + 1, minlength) if x.numel() else minlength
    what = torch.ones_like(x, dtype=torch.int64) if weights is None else weights
    found = torch.zeros(bins, dtype=what.dtype, device=x.device)
    return found.index_add_(0, x.to(torch.int64), what)


def _renorm(x: torch.Tensor, p: float, dim: int, maxnorm: float) -> torch.Tensor:
    others = [d for d in range(x.dim()) if d != dim % x.dim()]
    norms = torch.linalg.vector_norm(x, p, others, keepdim=True)
    return x * torch.where(norms > maxnorm, maxnorm / (norms + 1e-7), 1.0).to(x.dtype)


REWRITTEN: dict[Any, Callable] = {
    aten.bincount.default: _bincount,
    aten.repeat_interleave.Tensor: _repeated_positions,
    aten.equal.default: _equal,
    aten.masked_select.default: _masked_select,
    aten.masked_scatter_.default: _masked_scatter_,
    **optimizers.FUSED,
}


def positions(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks among the indices become positions: how many there are depends on data, so they are
    found on the host (`nonzero`, which is counted)."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        masked = index is not None and index.dtype in (torch.bool, torch.uint8)
        found += index.nonzero().unbind(1) if masked else [index]
    return found


def fills_mask(args: tuple) -> bool:
    """Whether these arguments of `index_put_` are x[mask] = number."""
    _, indices, value, *accumulate = args
    masks = [index for index in indices if index is not None]
    return (
        len(masks) == len(indices) == 1
        and masks[0].dtype == torch.bool
        and value.numel() == 1
        and not any(accumulate)
    )


def fill_mask_(x: torch.Tensor, indices: Sequence[torch.Tensor], value: torch.Tensor) -> Any:
    (mask,) = indices
    mask = mask.view(*mask.shape, *[1] * (x.dim() - mask.dim()))
    return x.masked_fill_(mask, value.reshape(()))


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


def _rrelu(
    x: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if not training:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    drawn = torch.empty_like(x).uniform_(lower, upper, generator=generator)
    slope = torch.where(x <= 0, drawn, 1)
    noise.copy_(slope)
    return x * slope


# torch's own decompositions, whose gradients follow.
_TORCHS = (
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_adaptive_avg_pool2d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "grid_sampler_2d", "multi_margin_loss", "multilabel_margin_loss_forward",
)  # fmt: skip

_OURS: dict[str, Callable] = {
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_gru_cell": _gru_cell,
    "_adaptive_avg_pool3d": pooling.adaptive_average_3d,
    "_upsample_bilinear2d_aa": resampling.bilinear,
    "_upsample_bicubic2d_aa": resampling.bicubic,
    "grid_sampler_3d": resampling.grid_sampler_3d,
    "_embedding_bag": losses.embedding_bag,
    "_embedding_bag_forward_only": losses.embedding_bag,
    "_cdist_forward": losses.pairwise_distances,
    "_pdist_forward": losses.own_distances,
    "renorm": _renorm,
    "rrelu_with_noise": _rrelu,
    "_ctc_loss": losses.ctc_loss,
    "_ctc_loss.Tensor": losses.ctc_loss,
}

def _one_operation(op: Any) -> Callable:
    """Operations that torch would take apart on this device, into ones that write arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        from pagoda.pytorch import eager

        return eager.run(op, args, kwargs)

    return run


_library = torch.library.Library("aten", "IMPL")  # must stay alive


def _register() -> None:
    for name, composed in _OURS.items():
        for key in ("AutogradPrivateUse1", "PrivateUse1"):
            _library.impl(name, torch._disable_dynamo(composed), key)
    for op in (aten.cummax.default, aten.cummin.default):
        _library.impl(op.name(), torch._disable_dynamo(_one_operation(op)), "PrivateUse1")
    for name in _TORCHS:
        op = getattr(aten, name).default
        composed = get_decompositions([op])[op]
        _library.impl(name, torch._disable_dynamo(composed), "AutogradPrivateUse1")


_register()
