"""LoRA: a language model's weights stay as they are, small factors beside them are trained.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021: y = W x + (alpha / r) B A x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A linear layer with trained factors a [rank, in], b [out, rank]; b begins as zeros, so that
    at first nothing changes."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scale


class LoraModel(nn.Module):
    """A causal transformers model with factors beside every linear layer of its blocks. Called
    with ids, or with ids and targets for their mean cross entropy in nats."""

    def __init__(self, model: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.model = model.requires_grad_(False)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if name in ADAPTED and isinstance(child, nn.Linear):
                    setattr(module, name, LoraLinear(child, rank, alpha))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.model(ids, use_cache=False).logits
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
