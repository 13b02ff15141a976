"""A model's programs for a chip: from the cache, or traced and compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagoda.compiler.cache import Cache
from pagoda.isa.chip import Chip
from pagoda.kernels.build import build

from .program import (
    CAPACITY,
    DECODE_POSITION,
    PREFILL_TOKENS,
    SHIFT,
    CompiledModel,
    StepProgram,
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
    CompileError.
    """
    capacity = min(capacity, config["max_position_embeddings"])
    found = load(store, config, capacity, chip)
    if found is not None:
        return found
    progress("loading PyTorch")
    import torch
    from transformers import LlamaConfig

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
    model = CompiledModel(config, capacity, DTYPE, *programs, traced.buffers)
    save(store, model)
    return model
