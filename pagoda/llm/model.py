"""From a configuration and a state dict to a transformers model, without initialising it twice."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .gguf import ModelFile


def build_model(config: LlamaConfig, state: Mapping[str, torch.Tensor]) -> LlamaForCausalLM:
    """A model in evaluation mode whose parameters are the tensors of `state`, not copies.

    state: every parameter in Hugging Face names; what is missing or too many raises torch's error.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # The rotary frequencies are no parameters: they were left on the meta device.
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.config.dtype = state["model.embed_tokens.weight"].dtype
    return model.requires_grad_(False).eval()


def load_model(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """The model in a GGUF file, on the CPU, weights rounded to `dtype`. Errors: `ModelFile`'s."""
    file = ModelFile(path)
    return build_model(file.config(), file.state_dict(dtype))
