"""A key/value cache in preallocated memory, for unchanged Hugging Face models.

transformers' DynamicCache joins old and new keys into new tensors at every step; here each layer
owns one buffer of fixed capacity, a step writes its new positions in place and attention reads a
strided view of the positions filled so far. Nothing that is already in the cache moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin


class KVLayer(CacheLayerMixin):
    """One layer's keys and values, each [batch, kv_heads, capacity, head_dim]."""

    is_croppable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int = 0):
        """length: positions that hold something already, from 0 on."""
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the buffers exist from the beginning."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, kv_heads, n, head_dim]; returns views of all positions so far."""
        start = self.length
        end = start + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that attention sees, and the position of the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.keys.shape[-2]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; `tokens_to_remove` is their number as a negative integer."""
        self.length -= abs(tokens_to_remove)

    def reset(self) -> None:
        self.length = 0


class KVCache(Cache):
    """The cache of one conversation, batch 1.

    config: of the model; capacity: the most positions it can hold; length: positions that the
    buffers hold already. Buffers are zero at first: attention may read, with weight zero, a block's
    positions past the last one.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        shape = (1, config.num_key_value_heads, capacity, config.head_dim)
        pairs = [
            tuple(torch.zeros(shape, dtype=dtype).to(device) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(layers=[KVLayer(keys, values) for keys, values in pairs])

    @classmethod
    def of(cls, layers: Sequence[KVLayer]) -> KVCache:
        """A cache of layers that exist."""
        made = cls.__new__(cls)
        Cache.__init__(made, layers=list(layers))
        return made
