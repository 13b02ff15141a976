"""Attention as operations that tracing and Inductor carry through to the library's kernels.

`scaled_dot_product_attention` would be decomposed by torch into many operations; it is kept as one:
`pagoda::sdpa`, or for training `pagoda::sdpa_training`, whose gradients are one operation as well,
`pagoda::sdpa_backward`. Neither stores anything of the size of the scores, dropout or not. Only
attention with a float mask that wants a gradient does: that gradient is as large itself, and all of
them are composed of matrix products and pointwise operations then.

On the CPU the operations compute what the kernels mean, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from pagoda.kernels.attention_dropout import FIRST, SECOND, SHIFT, dropout_threshold
from pagoda.pytorch.device import NAME

SCHEMAS = {
    "pagoda::sdpa": ("q", "k", "v", "mask"),
    "pagoda::sdpa_training": ("q", "k", "v", "mask", "row_seeds", "column_seeds"),
    "pagoda::sdpa_backward": (
        "dout", "q", "k", "v", "statistics", "delta", "mask", "row_seeds", "column_seeds",
    ),
}  # fmt: skip
"""The tensors that each operation takes; then follow causal, scale, lower_right and dropout."""

_LOG2_E = math.log2(math.e)
_TAGS = (torch.Tag.flexible_layout,)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    lower_right: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """q [b, h, m, d], k [b, g, n, d], v [b, g, n, e], mask broadcast to [b, h, m, n]; gives
    [b, h, m, e]. Query head h uses key/value head h // (h_count // g_count). lower_right: causal,
    and the last query sees all keys (torch's `is_causal` lets the first query see the first).
    dropout: the probability with which a weight is dropped, below 1; then the mask has no
    gradient."""
    meaning = causal, scale, lower_right
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if not dropout and (not wanted or (mask is not None and mask.requires_grad)):
        return torch.ops.pagoda.sdpa(q, k, v, mask, *meaning)
    seeds = None, None
    if dropout:
        shapes = q.shape[:3], (k.shape[0], k.shape[2])
        seeds = (_drawn(shape, q) for shape in shapes)
    return torch.ops.pagoda.sdpa_training(q, k, v, mask, *seeds, *meaning, dropout)[0]


def _drawn(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Seeds, int32 [shape]; drawn on the device, where a factory of torch draws on the host."""
    if like.device.type != NAME or torch.compiler.is_compiling() or is_fake(like):
        return torch.randint(2**31 - 1, shape, dtype=torch.int32, device=like.device)
    from pagoda.pytorch import eager

    options = dict(dtype=torch.int32, device=like.device)
    return eager.run(torch.ops.aten.randint.default, (2**31 - 1, list(shape)), options)


# Operations --------------------------------------------------------------------------------------


@torch.library.custom_op("pagoda::sdpa", mutates_args=(), device_types="cpu", tags=_TAGS)
def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    lower_right: bool = False,
) -> torch.Tensor:
    """See `attend`. Its gradients are composed, and store weights: `sdpa_training` is better."""
    return sdpa_training(q, k, v, mask, None, None, causal, scale, lower_right)[0]


@torch.library.custom_op("pagoda::sdpa_training", mutates_args=(), device_types="cpu", tags=_TAGS)
def sdpa_training(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    row_seeds: torch.Tensor | None,
    column_seeds: torch.Tensor | None,
    causal: bool,
    scale: float,
    lower_right: bool = False,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sdpa`, and statistics float32 [b, h, m, 2]: a row's largest score and the base-2 logarithm
    of the sum of its weights (`kernels.attention`). row_seeds int32 [b, h, m] and column_seeds
    int32 [b, n] say which weights are dropped (`kernels.attention_dropout`)."""
    scores = _scores(q, k, mask, causal, scale, lower_right)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True).clamp(min=1)
    out = _empty_result(q, v)
    shares = _kept(weights / total, row_seeds, column_seeds, dropout)
    out.copy_(_spread(_grouped(shares, k) @ v.float(), q))
    return out, torch.cat((largest * _unit(mask), total.log2()), -1)


@torch.library.custom_op("pagoda::sdpa_backward", mutates_args=(), device_types="cpu")
def sdpa_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    statistics: torch.Tensor,
    delta: torch.Tensor,
    mask: torch.Tensor | None,
    row_seeds: torch.Tensor | None,
    column_seeds: torch.Tensor | None,
    causal: bool,
    scale: float,
    lower_right: bool = False,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv for the gradient dout of the result; delta float32 [b, h, m] is the sum of
    dout * out over a row. dq is float32 and lacks the factor `scale`."""
    scores = _scores(q, k, mask, causal, scale, lower_right)
    largest, logarithm = statistics.split(1, -1)
    weights = torch.exp2((scores - largest / _unit(mask)) * _LOG2_E - logarithm)
    inner = _spread(_grouped(dout.float(), k) @ v.float().mT, q)
    inner = _kept(inner, row_seeds, column_seeds, dropout)
    ds = _grouped((inner - delta[..., None]) * weights, k)
    dq, dk, dv = _empty_gradients(q, k, v)
    dq.copy_(_spread(ds @ k.float(), q))
    dk.copy_(ds.mT @ _grouped(q.float(), k) * scale)
    weights = _kept(weights, row_seeds, column_seeds, dropout)
    dv.copy_(_grouped(weights, k).mT @ _grouped(dout.float(), k))
    return dq, dk, dv


def _empty_result(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Laid out as [b, m, h, e]: what follows attention joins the heads, and needs no copy then."""
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[-1])).transpose(1, 2)


def _empty_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Laid out likewise: attention's operands come out of one matrix product for all heads."""
    dtypes = torch.float32, k.dtype, v.dtype
    shapes = [(t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in (q, k, v)]
    return [
        q.new_empty(shape, dtype=dtype).transpose(1, 2)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


@sdpa.register_fake
def _(q, k, v, mask, causal, scale, lower_right=False):
    torch._check(k.shape[2] == v.shape[2])
    return _empty_result(q, v)


@sdpa_training.register_fake
def _(q, k, v, mask, row_seeds, column_seeds, causal, scale, lower_right=False, dropout=0.0):
    torch._check(k.shape[2] == v.shape[2])
    return _empty_result(q, v), q.new_empty((*q.shape[:3], 2), dtype=torch.float32)


@sdpa_backward.register_fake
def _(dout, q, k, v, statistics, delta, mask, row_seeds, column_seeds, causal, scale,
      lower_right=False, dropout=0.0):  # fmt: skip
    return tuple(_empty_gradients(q, k, v))


def _unit(mask: torch.Tensor | None) -> float:
    """What a score is multiplied by in the statistics: weights are powers of two, or of e if there
    is a float mask."""
    return _LOG2_E if mask is None or mask.dtype == torch.bool else 1.0


def _kept(
    x: torch.Tensor,
    row_seeds: torch.Tensor | None,
    column_seeds: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """x [b, h, m, n] after dropout."""
    if row_seeds is None or column_seeds is None:
        return x
    z = (row_seeds.long()[..., None] + column_seeds.long()[:, None, None]) * FIRST & 0xFFFFFFFF
    z = ((z ^ z >> SHIFT) * SECOND).to(torch.int32)
    return torch.where(z < dropout_threshold(dropout), 0.0, x) / (1 - dropout)


def _grouped(t: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[b, h, m, x] as [b, g, h / g * m, x]: the rows of the heads that share a key/value head."""
    return t.reshape(t.shape[0], k.shape[1], -1, t.shape[-1])


def _spread(t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """And back, to q's heads and rows."""
    return t.reshape(*q.shape[:3], t.shape[-1])


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    lower_right: bool,
) -> torch.Tensor:
    """float32 [b, h, m, n], -inf where hidden."""
    scores = _spread(_grouped(q, k) @ k.mT, q).float() * scale
    rows, columns = scores.shape[-2:]
    sees = None
    if causal:
        query = torch.arange(rows, device=q.device)[:, None]
        last = query + (columns - rows) if lower_right else query
        sees = torch.arange(columns, device=q.device)[None] <= last
    if mask is not None and mask.dtype == torch.bool:
        sees = mask if sees is None else mask & sees
    elif mask is not None:
        scores = scores + mask
    return scores if sees is None else torch.where(sees, scores, -torch.inf)


# Gradients ---------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, mask, row_seeds, column_seeds, *ctx.meaning = inputs
    ctx.save_for_backward(q, k, v, mask, row_seeds, column_seeds, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: torch.Tensor, _: None) -> tuple:
    q, k, v, mask, row_seeds, column_seeds, out, statistics = ctx.saved_tensors
    if 0 in (q.shape[2], k.shape[2]):
        return *_zeros(q, k, v), *(None,) * 7
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = (dout.float() * out.float()).sum(-1)
    dq, dk, dv = torch.ops.pagoda.sdpa_backward(
        dout, q, k, v, statistics, delta, mask, row_seeds, column_seeds, *ctx.meaning
    )
    return (dq * ctx.meaning[1]).to(q.dtype), dk, dv, *(None,) * 7


def _keep_inputs(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    q, k, v, mask, *ctx.meaning = inputs
    ctx.save_for_backward(q, k, v, mask)


def _composed_gradients(ctx: Any, dout: torch.Tensor) -> tuple:
    """Gradients from the inputs alone, the mask's among them: the weights are computed again, in
    float32."""
    q, k, v, mask = ctx.saved_tensors
    if 0 in (q.shape[2], k.shape[2]):
        return *_zeros(q, k, v, mask), None, None, None
    scale = ctx.meaning[1]
    scores = _scores(q, k, mask, *ctx.meaning)
    # A row that sees nothing has weights 0, as in the forward pass.
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    inner = _spread(_grouped(dout, k) @ v.mT, q).float()
    inner = weights * (inner - (inner * weights).sum(-1, keepdim=True))
    back = _grouped((inner * scale).to(q.dtype), k)
    dq, dk = (back @ k).reshape(q.shape), back.mT @ _grouped(q, k)
    dv = _grouped(weights.to(v.dtype), k).mT @ _grouped(dout, k)
    dmask = None
    if mask is not None and mask.is_floating_point() and ctx.needs_input_grad[3]:
        dmask = inner.sum_to_size(mask.shape).to(mask.dtype)
    return dq, dk, dv, dmask, None, None, None


def _zeros(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The gradients of a call without queries or without keys."""
    return [None if t is None else torch.zeros_like(t) for t in tensors]


sdpa.register_autograd(_composed_gradients, setup_context=_keep_inputs)
sdpa_training.register_autograd(_gradients, setup_context=_keep)


# torch's operation -------------------------------------------------------------------------------


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if dropout_p == 1 or (dropout_p and attn_mask is not None and attn_mask.requires_grad):
        return _composed_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    if query.dim() != 4:
        lead = query.shape[:-3] if query.dim() > 4 else ()
        flat = [_four(t, lead) for t in (query, key, value)]
        mask = None
        if attn_mask is not None:
            mask = _four(attn_mask.expand(*query.shape[:-1], key.shape[-2]), lead)
        out = _attention(*flat, mask, dropout_p, is_causal, scale=scale)
        return out.reshape(*query.shape[:-1], value.shape[-1])
    if attn_mask is not None:
        while attn_mask.dim() < 4:
            attn_mask = attn_mask.unsqueeze(0)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attend(query, key, value, attn_mask, is_causal, scale, dropout=dropout_p)


def _composed_attention(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
) -> torch.Tensor:
    """Attention with dropout one operation after another."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-2, -1)).float() * scale
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        sees = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        scores = torch.where(sees, scores, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout_p)
    return weights.to(value.dtype) @ value


def _four(t: torch.Tensor, lead: tuple[int, ...]) -> torch.Tensor:
    if lead:
        return t.flatten(0, len(lead) - 1)
    return t[(None,) * (4 - t.dim())]


_library = torch.library.Library("aten", "IMPL")
for _key in ("AutogradPrivateUse1", "PrivateUse1"):
    _library.impl("scaled_dot_product_attention", torch._disable_dynamo(_attention), _key)

_operation = torch.ops.aten.scaled_dot_product_attention.default


@_operation.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)
def _taken_apart(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Where torch takes the operation apart without asking autograd: inside of nested regions."""
    if query.device.type == NAME:
        return _attention(query, *args, **kwargs)
    return _operation._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, query, *args, **kwargs)
