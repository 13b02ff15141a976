"""Attention for transformers models on the chip: causal with a cache, without a mask tensor."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

import pagoda.pytorch  # noqa: F401  registers the device
from pagoda.pytorch.attention import attend as attend_heads

NAME = "pagoda"
"""For `model.set_attn_implementation`: transformers then makes no masks, `attend` needs none."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [b, h, n, d], key and value [b, g, s, d] of all
    positions so far; gives [b, n, h, d]. The last query sees every key."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = attention_mask is None and query.shape[2] > 1 and module.is_causal
    out = attend_heads(query, key, value, attention_mask, causal, scale, causal)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
