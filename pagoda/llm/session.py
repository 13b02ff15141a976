"""A generation session over a transformers model, on whatever torch device the model is."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel


class TorchSession:
    """One conversation with a Hugging Face causal language model, KV cache kept (`Session`).

    model: in evaluation mode, on its device; batch 1.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.context: int = model.config.max_position_embeddings
        self._forget()

    def _forget(self) -> None:
        self.tokens: list[int] = []
        self._cache = DynamicCache(config=self.model.config)

    def step(self, ids: Sequence[int]) -> np.ndarray:
        """Append `ids` and return the logits [vocabulary], binary32, of the last position."""
        inputs = torch.tensor([ids], dtype=torch.int64).to(self.model.device)
        try:
            with torch.no_grad():
                output = self.model(
                    input_ids=inputs,
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            logits = output.logits[0, -1].to("cpu").float().numpy()
        except BaseException:
            # Some layers hold the new tokens, others do not; the next `extend` computes all again.
            self._forget()
            raise
        self.tokens.extend(ids)
        return logits

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length == 0:
            self._forget()
        elif length < len(self.tokens):
            self._cache.crop(length - len(self.tokens))
            del self.tokens[length:]
