"""What `pagoda train` trains on what: a GPT on bytes, or a language model's factors on tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pagoda.llm import Tokenizer, find_weights
from pagoda.llm.gguf import ModelFile
from pagoda.llm.model import load_model
from pagoda.train.errors import TrainError
from pagoda.train.gpt import GPT, GPTConfig
from pagoda.train.lora import LoraModel


@dataclass(frozen=True)
class Task:
    """What is trained on what: the model, the text as ids, and ids to text and back."""

    model: torch.nn.Module
    ids: torch.Tensor
    unit: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def gpt_task(
    text: bytes, seed: int, layers: int, width: int, heads: int, context: int
) -> Task:
    """A new GPT on the bytes of a text. Raises TrainError."""
    if width % heads:
        raise TrainError(
            "--heads", "the width is a multiple of the number of heads",
            f"{width} is not one of {heads}", f"Choose --width {width // heads * heads + heads}.",
        )  # fmt: skip
    torch.manual_seed(seed)
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.empty(0)
    return Task(
        GPT(GPTConfig(layers, width, heads, context, 256)), ids, "bytes",
        lambda prompt: list(prompt.encode()),
        lambda found: bytes(found).decode("utf-8", "replace"),
    )  # fmt: skip


def lora_task(text: bytes, seed: int, path: Path | None, rank: int) -> Task:
    """SmolLM2, or the model of another file, with factors to be trained. Raises ModelError."""
    path = path or find_weights()
    tokenizer = Tokenizer(ModelFile(path).tokenizer_parts())
    torch.manual_seed(seed)
    ids = torch.tensor(tokenizer.encode(text.decode("utf-8", "replace")), dtype=torch.int64)
    model = LoraModel(load_model(path), rank, 2.0 * rank)
    return Task(model, ids, "tokens", tokenizer.encode, tokenizer.decode)
