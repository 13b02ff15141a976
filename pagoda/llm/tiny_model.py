"""Small random Llama-class models and GGUF files of them: for tests, instead of real weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig

from .gguf import tensor_layout
from .tokenizer import BYTES, CONTROL

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "i n", "a n", "Ġ a", "e r", "o n")
ARCHITECTURE = "llama"


def tiny_tokens() -> list[str]:
    """A byte-level vocabulary: the special tokens, the 256 bytes and the results of MERGES."""
    return [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers of width 64 with grouped KV heads; `changes` are LlamaConfig's arguments."""
    sizes = {
        "vocab_size": len(tiny_tokens()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(sizes | changes))


def random_state(
    config: LlamaConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights in Hugging Face names, the same on every machine and torch version.

    Matrices are normal with variance 1 / columns, so that activations keep their scale; norms lie
    around 1, biases around 0.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    state = {}
    for name, shape, _ in tensor_layout(config.to_dict()).values():
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            values /= np.sqrt(np.float32(shape[1]))
        else:
            values = np.float32(0.1) * values + np.float32(name.endswith("norm.weight"))
        state[name] = torch.from_numpy(values).to(dtype)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def write_gguf(
    path: str | Path,
    config: LlamaConfig,
    state: Mapping[str, torch.Tensor],
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a GGUF file as llama.cpp's converter does, with the tiny tokenizer.

    matrices: the quantisation of the matrices; vectors stay binary32. metadata: entries to replace
    or add; a value of None leaves an entry out.
    """
    entries = _metadata(config) | dict(metadata or {})
    writer = gguf.GGUFWriter(path, entries.pop("general.architecture"))
    for key, value in entries.items():
        if value is not None:
            _add(writer, key, value)
    for name, (hf_name, shape, heads) in tensor_layout(config.to_dict()).items():
        values = state[hf_name].float().numpy()
        if heads:  # two halves become neighbouring pairs
            halves = values.reshape(heads, 2, shape[0] // heads // 2, -1)
            values = halves.swapaxes(1, 2).reshape(shape)
        kind = matrices if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: LlamaConfig) -> dict[str, Any]:
    tokens = tiny_tokens()
    return {
        "general.architecture": ARCHITECTURE,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
