"""BERT on the chip: how well inference uses it, beside torch in float32 on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import BertConfig, BertModel

import pagoda
from pagoda.isa.chip import Chip

SEED, REPEATS = 0, 3


def inference_macs(config: BertConfig, batch: int, length: int) -> int:
    """Multiply-adds of one forward pass: the products of the layers, attention's two, and the
    pooler's one per sequence. Embeddings, norms and softmax count as nothing."""
    width, inner, tokens = config.hidden_size, config.intermediate_size, batch * length
    layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens * length * width
    return config.num_hidden_layers * layer + batch * width**2


def _model(config: BertConfig) -> BertModel:
    torch.manual_seed(SEED)
    return BertModel(config).eval()


def _by_turns(*calls: Callable[[], object]) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, taken in zip(calls, seconds, strict=True):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken) for taken in seconds]


def measure(
    chip: Chip, batch: int, lengths: tuple[int, ...], config: BertConfig | None = None
) -> dict[str, Any]:
    """Forward passes of BERT-base (unless another is given) in bfloat16, weights random, for each
    length in tokens, and torch's of the same weights in float32: by turns, after one of each, the
    median of REPEATS."""
    config = config or BertConfig(attn_implementation="sdpa")
    device = pagoda.use_chip(chip)
    model = _model(config).bfloat16().to("pagoda")
    call = pagoda.compile(model)
    reference = _model(config)
    rows = []
    for length in lengths:
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        with torch.no_grad():
            here = ids.to("pagoda")
            begun = time.perf_counter()
            call(here)
            first = time.perf_counter() - begun
            cycles, launches = device.cycles, device.launches
            found = call(here).last_hidden_state
            cycles, launches = device.cycles - cycles, device.launches - launches
            expected = reference(ids).last_hidden_state
            ours, theirs = _by_turns(partial(call, here), partial(reference, ids))
        macs = inference_macs(config, batch, length)
        error = (found.cpu().float() - expected).norm() / expected.norm()
        rows.append(
            {
                "length": length,
                "macs": macs,
                "cycles": cycles,
                "utilisation": round(macs / (chip.macs_per_cycle * cycles), 4),
                "launches": launches,
                "relative_error": round(float(error), 4),
                "first_s": round(first, 1),
                "host_s": round(ours, 2),
                "torch_host_s": round(theirs, 2),
                "host_ratio": round(theirs / ours, 3),
            }
        )
    return {"chip": device.chip.name, "dtype": "bfloat16", "batch": batch, "runs": rows}
