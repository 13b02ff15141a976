"""Losses and tables whose kernels torch writes by hand, from ordinary operations.

They are registered above autograd (`composed`), which gives their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten
_SUM, _MEAN, _MAX = range(3)


def embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of `weight` [n, d] joined in bags: bag b has the indices from offsets[b] on. Gives
    [bags, d] and, as torch does, the bag of each index, the bags' sizes, and of maxima the
    indices."""
    if sparse:
        raise NotImplementedError(
            "operation aten._embedding_bag.default cannot run on device pagoda: its gradient would "
            "be a sparse tensor. Use sparse=False."
        )
    starts = offsets[:-1] if include_last_offset else offsets
    bags = starts.shape[0]
    place = torch.arange(indices.shape[0], device=weight.device)
    bag = (starts <= place[:, None]).sum(-1) - 1
    rows = aten.embedding(weight, indices, -1, scale_grad_by_freq, False)
    counted = indices != padding_idx if padding_idx >= 0 else torch.ones_like(indices).bool()
    member = (bag == torch.arange(bags, device=weight.device)[:, None]) & counted
    sizes = member.sum(-1)
    largest = torch.zeros((bags, weight.shape[1]) if mode == _MAX else (0,), dtype=indices.dtype,
                          device=weight.device)  # fmt: skip
    if mode == _MAX:
        wide = torch.where(member[..., None], rows.detach(), -math.inf)
        first = wide.argmax(1)  # [bags, d]
        empty = (sizes == 0)[:, None]
        out = torch.where(empty, 0, rows.gather(0, first))
        largest = torch.where(empty, largest, indices[first])
        return out, bag.to(indices.dtype), sizes.to(indices.dtype), largest
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    rows = torch.where(counted[:, None], rows, 0)
    out = torch.zeros(bags, weight.shape[1], dtype=weight.dtype, device=weight.device)
    out = out.index_add(0, bag, rows)
    if mode == _MEAN:
        out = out / sizes.clamp(min=1)[:, None].to(out.dtype)
    return out, bag.to(indices.dtype), sizes.to(indices.dtype), largest


def pairwise_distances(x: torch.Tensor, y: torch.Tensor, p: float, compute_mode: Any = None) -> Any:
    """x [.., m, d], y [.., n, d] -> [.., m, n]: p-norms of all differences."""
    if not x.shape[-1]:  # the largest of no differences: zero for torch
        p = 1.0
    return torch.linalg.vector_norm(x[..., :, None, :] - y[..., None, :, :], p, -1)


def own_distances(x: torch.Tensor, p: float = 2.0) -> torch.Tensor:
    """x [n, d] -> [n (n - 1) / 2]: p-norms of the differences of row i and row j > i."""
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind()
    return torch.linalg.vector_norm(x[first] - x[second], p, -1)


def ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Sequence[int] | torch.Tensor,
    target_lengths: Sequence[int] | torch.Tensor,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Connectionist temporal classification (Graves et al., 2006): log_probs [t, n, c], targets
    [n, s] or all in a row. Gives minus the log-likelihood [n] and the forward variables
    [n, t, 2 s + 1].

    The gradient is torch's: that of logits before `log_softmax`, which has an exp(log_probs) more.
    """
    device = log_probs.device
    steps = log_probs.shape[0]
    target_sizes = _integers(target_lengths)
    inputs = torch.tensor(_integers(input_lengths), device=device)
    outputs = torch.tensor(target_sizes, device=device)
    longest = max(target_sizes, default=0)
    if targets.dim() == 1:
        begin = outputs.cumsum(0) - outputs
        place = begin[:, None] + torch.arange(longest, device=device)
        targets = targets[place.clamp(max=max(targets.shape[0] - 1, 0))]
    targets = targets[:, :longest].to(torch.int64)
    spaced = torch.stack([torch.full_like(targets, blank), targets], -1).flatten(1)
    spaced = torch.nn.functional.pad(spaced, (0, 1), value=blank)  # [n, 2 s + 1]
    place = torch.arange(spaced.shape[1], device=device)
    two_back = torch.nn.functional.pad(spaced, (2, 0), value=blank)[:, :-2]
    skips = (spaced != blank) & (spaced != two_back)
    emitted = log_probs.gather(2, spaced.expand(steps, *spaced.shape))  # [t, n, 2 s + 1]
    never = -1e30  # stands for minus infinity, whose differences are not numbers
    alpha = torch.where(place < 2, emitted[0], never)
    alphas, total = [alpha], torch.zeros_like(alpha[:, :1])
    for step in range(1, steps):
        one = torch.nn.functional.pad(alpha, (1, 0), value=never)[:, :-1]
        two = torch.nn.functional.pad(alpha, (2, 0), value=never)[:, :-2]
        two = torch.where(skips, two, never)
        come = torch.stack([alpha, one, two]).logsumexp(0) + emitted[step]
        alpha = torch.where((step < inputs)[:, None], come, alpha)
        top = alpha.detach().amax(1, keepdim=True)
        alpha, total = alpha - top, total + top  # small numbers have small rounding errors
        alphas.append(alpha + total)
    last = (2 * outputs)[:, None]
    ends = alpha.gather(1, torch.cat([last, (last - 1).clamp(min=0)], 1))
    ends = torch.where((outputs == 0)[:, None] & (torch.arange(2, device=device) == 1), never, ends)
    loss = -ends.logsumexp(1) - total[:, 0]
    inside = (torch.arange(steps, device=device)[:, None] < inputs)[..., None]
    mass = torch.where(inside, log_probs.exp(), 0).sum((0, 2))
    loss = loss + (mass - mass.detach())
    impossible = loss > -never / 2
    loss = torch.where(impossible, 0.0 if zero_infinity else math.inf, loss)
    return loss, torch.stack(alphas, 1)


def _integers(lengths: Sequence[int] | torch.Tensor) -> list[int]:
    return lengths.tolist() if isinstance(lengths, torch.Tensor) else list(lengths)
