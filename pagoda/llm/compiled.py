"""A model's programs for a chip: from the cache, or traced and compiled once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pagoda.compiler.cache import Cache
from pagoda.isa.chip import Chip

from .errors import ModelError
from .gguf import tensor_layout
from .program import (
    CAPACITY,
    DECODE_POSITION,
    PREFILL_TOKENS,
    SHIFT,
    CompiledModel,
    StepProgram,
    cache_bytes,
    load,
    save,
)

DTYPE = "bfloat16"


def compile_model(
    config: dict[str, Any],
    chip: Chip,
    store: Cache,
    capacity: int = CAPACITY,
    progress: Callable[[str], None] = lambda stage: None,
) -> CompiledModel:
    """The programs of a Llama-class model for a chip.

    config: LlamaConfig's arguments (`ModelFile.hyperparameters`); store: where they are kept;
    capacity: positions of its cache, at most the model's context; progress: called with the name of
    each stage when it begins. Torch is loaded only when they are not in the store. Raises
    ModelError for a chip that cannot hold the model, CompileError.
    """
    capacity = min(capacity, config["max_position_embeddings"])
    _check_chip(config, capacity, chip)
    found = load(store, config, capacity, chip)
    if found is not None:
        return found
    progress("loading PyTorch")
    import torch
    from transformers import LlamaConfig

    from pagoda.pytorch.chip import build

    from .trace import trace

    traced = trace(LlamaConfig(**config), capacity, getattr(torch, DTYPE), progress)
    programs = []
    for stage, region, arguments, count, position in (
        ("prefill", traced.prefill, traced.prefill_arguments, PREFILL_TOKENS, 0),
        ("decode", traced.decode, traced.decode_arguments, 1, DECODE_POSITION),
    ):
        progress(f"compiling {stage}")
        sizes = {"count": min(count, capacity), "shifted": min(position, capacity - 1) + SHIFT}
        symbols = {
            symbol.name: sizes[arguments[symbol.input].kind]
            for symbol in region.symbols
            if symbol.what == "int"
        }
        assert len(symbols) == len(region.symbols), region.symbols
        programs.append(StepProgram(build(region, chip, symbols, store), arguments))
    model = CompiledModel(config, capacity, DTYPE, *programs, traced.buffers, traced.fallbacks)
    save(store, model)
    return model


def _check_chip(config: dict[str, Any], capacity: int, chip: Chip) -> None:
    """Before any work: does the chip multiply bfloat16, and hold weights and cache?"""
    if "bf16" not in chip.matrix_types:
        raise ModelError(
            f"chip {chip.name}",
            "a language model needs a matrix engine that multiplies bf16",
            f"this one multiplies {', '.join(chip.matrix_types)}",
            "Choose another chip: pagoda chips lists them.",
        )
    weights = 2 * sum(math.prod(shape) for _, shape, _ in tensor_layout(config).values())
    need = weights + cache_bytes(config, capacity)
    if need > chip.dram_bytes:
        raise ModelError(
            f"chip {chip.name}",
            f"its memory must hold weights and cache, {need / 1e6:,.0f} MB in bfloat16",
            f"it has {chip.dram_bytes / 1e6:,.0f} MB",
            "Choose a chip with more DRAM (pagoda chips lists them), or a smaller model.",
        )
