"""Operations that are library kernels, not loop nests: matrix products and attention.

`scaled_dot_product_attention` would be decomposed by torch into many operations; it is kept as one,
`pagoda::sdpa`, which tracing and Inductor carry through unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pagoda.pytorch.convolution import convolution_call
from pagoda.pytorch.errors import Unsupported, source

aten = torch.ops.aten


@torch.library.custom_op(
    "pagoda::sdpa", mutates_args=(), device_types="cpu", tags=(torch.Tag.flexible_layout,)
)
def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    lower_right: bool = False,
) -> torch.Tensor:
    """q [b, h, m, d], k [b, g, n, d], v [b, g, n, e], mask broadcast to [b, h, m, n]; gives
    [b, h, m, e]. Query head h uses key/value head h // (h_count // g_count). lower_right: causal,
    and the last query sees all keys (torch's `is_causal` lets the first query see the first)."""
    groups = q.shape[1] // k.shape[1]
    if lower_right:
        shape = (q.shape[2], k.shape[2])
        mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
        causal = False
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k.repeat_interleave(groups, 1),
        v.repeat_interleave(groups, 1),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )


@sdpa.register_fake
def _(q, k, v, mask, causal, scale, lower_right=False):
    # Laid out as [b, m, h, e]: what follows attention joins the heads, and needs no copy then.
    batch, heads, count, _ = q.shape
    torch._check(k.shape[2] == v.shape[2])
    return q.new_empty((batch, count, heads, v.shape[-1])).transpose(1, 2)


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
    if dropout_p:
        raise NotImplementedError(
            f"scaled_dot_product_attention on device pagoda has no dropout, got dropout_p="
            f"{dropout_p}. Call model.eval(), or set the model's attention dropout to 0."
        )
    if query.dim() != 4:
        lead = query.shape[:-3] if query.dim() > 4 else ()
        flat = [_four(t, lead) for t in (query, key, value)]
        mask = None
        if attn_mask is not None:
            mask = _four(attn_mask.expand(*query.shape[:-1], key.shape[-2]), lead)
        out = _attention(*flat, mask, 0.0, is_causal, scale=scale)
        return out.reshape(*query.shape[:-1], value.shape[-1])
    if attn_mask is not None:
        while attn_mask.dim() < 4:
            attn_mask = attn_mask.unsqueeze(0)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return torch.ops.pagoda.sdpa(query, key, value, attn_mask, is_causal, scale)


def _four(t: torch.Tensor, lead: tuple[int, ...]) -> torch.Tensor:
    if lead:
        return t.flatten(0, len(lead) - 1)
    return t[(None,) * (4 - t.dim())]


_library = torch.library.Library("aten", "IMPL")
for _key in ("AutogradPrivateUse1", "PrivateUse1"):
    _library.impl("scaled_dot_product_attention", torch._disable_dynamo(_attention), _key)


def library_call(node: Any) -> tuple[str, tuple[tuple[str, Any], ...], list[Any]]:
    """An Inductor extern kernel as (library name, attributes, input nodes in argument order).

    Raises `Unsupported`, naming the operation, if the library has no such kernel.
    """
    op = getattr(node, "op_overload", None)
    name = _name(op, node)
    if name in ("mm", "bmm"):
        return name, (), list(node.inputs)
    if name == "addmm":
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        return name, (("alpha", alpha), ("beta", beta)), list(node.inputs)
    if name == "pagoda::sdpa":
        args, kwargs = node.unflatten_args(node.inputs, node.constant_args)
        names = ("q", "k", "v", "mask", "causal", "scale", "lower_right")
        bound = dict(zip(names, args, strict=False)) | kwargs
        causal = "lower right" if bound.get("lower_right") else bool(bound["causal"])
        attributes = (("causal", causal), ("scale", float(bound["scale"])))
        tensors = [bound["q"], bound["k"], bound["v"], bound.get("mask")]
        return "sdpa", attributes, tensors
    if name.startswith("pagoda::convolution"):
        return convolution_call(node)
    raise Unsupported(
        f"operation {name} is not supported on device pagoda: it is neither a loop nest nor one "
        "of the library kernels (mm, bmm, addmm, scaled_dot_product_attention). Rewrite the model "
        "without it, or compute it on the CPU with .cpu()." + source(node.get_origins())
    )


def _name(op: Any, node: Any) -> str:
    if isinstance(op, torch._ops.OpOverload):
        text = op.name()  # "aten::mm.out"
        return text.removeprefix("aten::").split(".")[0]
    return str(node.get_kernel_name()).split(".")[-1]
