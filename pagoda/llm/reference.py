"""What torch on the host says of the same model: MACs by its own counter, tokens per second."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pagoda.runtime import host_threads

from .gguf import ModelFile
from .model import load_model
from .session import TorchSession


def counted_macs(config: LlamaConfig, count: int, position: int) -> int:
    """MACs of a step of `count` tokens after `position` others, by torch's FlopCounterMode, which
    counts two operations per MAC; on shapes alone."""
    with torch.device("meta"), torch.no_grad():
        model = LlamaForCausalLM(config).eval()
        cache = DynamicCache(config=config)
        if position:
            model(torch.zeros(1, position, dtype=torch.int64), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, count, dtype=torch.int64), past_key_values=cache, logits_to_keep=1)
    return counter.get_total_flops() // 2


@contextmanager
def all_threads() -> Iterator[None]:
    """Torch on every processor that this process may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(host_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchReference:
    """The model of a file in float32 on the host, run by transformers with its DynamicCache."""

    def __init__(self, file: ModelFile):
        self._session = TorchSession(load_model(file.path, torch.float32))

    def step(self, ids: Sequence[int]) -> float:
        """Append tokens; returns the seconds it took."""
        with all_threads():
            begun = time.perf_counter()
            self._session.step(ids)
            return time.perf_counter() - begun
