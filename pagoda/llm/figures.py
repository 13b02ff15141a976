"""How well a model's steps use a chip: against its DRAM bandwidth and its matrix engine.

Nothing here counts padding or work done twice: the numbers of bytes and MACs follow from the
model's sizes, the number of cycles from the chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .chip_session import Step
from .program import CompiledModel, cache_bytes


def macs(config: dict[str, Any], count: int, position: int) -> int:
    """MACs of a step: matrices, logits of its last token, and attention to the keys that each
    token sees (its own and those before)."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = width * (2 * queries + 2 * keys + 3 * inner)
    seen = count * position + count * (count + 1) // 2
    attention = 2 * queries * seen
    layers = config["num_hidden_layers"]
    return layers * (count * layer + attention) + width * config["vocab_size"]


def weight_bytes(model: CompiledModel, count: int) -> int:
    """Bytes of the parameters that a step of `count` tokens reads, each once: of an embedding that
    is not also the output matrix, a row per token."""
    program = model.decode if count == 1 else model.prefill
    weights = {name: n for name, n in program.weights.items() if name not in model.buffers}
    if not model.config["tie_word_embeddings"]:
        name = "model.embed_tokens.weight"
        weights[name] = weights[name] // model.config["vocab_size"] * count
    return sum(weights.values())


def step_bytes(model: CompiledModel, step: Step) -> int:
    """Weights and live keys and values of a step, each once."""
    positions = step.position + step.count
    return weight_bytes(model, step.count) + cache_bytes(model.config, positions)


def cycles(steps: Sequence[Step]) -> int:
    """All cycles of the steps, launches included."""
    return sum(step.cycles for step in steps)


def dram_utilisation(model: CompiledModel, steps: Sequence[Step]) -> float:
    """Those bytes over what DRAM could have moved in all cycles."""
    moved = sum(step_bytes(model, step) for step in steps)
    return float(moved / (cycles(steps) * model.chip.dram_bytes_per_cycle))


def matrix_utilisation(model: CompiledModel, steps: Sequence[Step]) -> float:
    """The model's MACs over what the matrix engines could have done in all cycles."""
    done = sum(macs(model.config, step.count, step.position) for step in steps)
    return done / (cycles(steps) * model.chip.macs_per_cycle)


def roofline(model: CompiledModel, step: Step) -> float:
    """Cycles that the tighter of the two bounds allows, over the step's cycles."""
    return max(matrix_utilisation(model, [step]), dram_utilisation(model, [step]))


def fallbacks(model: CompiledModel) -> int:
    """Operations of a prefill and a decode step that the host computed, as counted in the trace
    that the model was compiled from; they are no part of the programs."""
    return sum(model.fallbacks.values())


def chip_tokens_per_second(model: CompiledModel, steps: Sequence[Step]) -> float:
    """Tokens appended per second of the chip's clock."""
    return sum(step.count for step in steps) * model.chip.clock_hz / cycles(steps)


def host_tokens_per_second(steps: Sequence[Step]) -> float:
    """Tokens appended per second of this computer, which simulates the chip."""
    return sum(step.count for step in steps) / sum(step.seconds for step in steps)
