"""GPT-2 in plain PyTorch: the model that `pagoda train` trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GPTConfig:
    """Of GPT-2 with 124 M parameters unless given. width must be a multiple of heads."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    vocabulary: int = 50257


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm_1(x)).split(width, dim=2)
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Token ids [batch, length <= context] to logits [batch, length, vocabulary]; with targets of
    the same shape as the ids, to their mean cross entropy in nats. Weights are drawn from torch's
    default generator, as GPT-2's are: normal with deviation 0.02, smaller before each sum."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                sums = name.endswith(("out.weight", "down.weight"))
                scale = (2 * config.layers) ** -0.5 if sums else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_macs(config: GPTConfig, batch: int, length: int) -> int:
    """Multiply-adds of one training step: the products of the layers and of the head, and causal
    attention's two products over what each token sees; all of it once forward and twice backward.
    Embeddings, norms and the optimiser count as nothing."""
    width, tokens = config.width, batch * length
    linear = tokens * (12 * width**2 * config.layers + width * config.vocabulary)
    seen = batch * length * (length + 1) // 2
    return 3 * (linear + 2 * width * seen * config.layers)
