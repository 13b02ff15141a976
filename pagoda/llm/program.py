"""A language model compiled for one chip, as plain data: no torch here.

A step appends n tokens at a position: the prefill program takes two or more, the decode program
exactly one. Each program's arguments are told by what they are, so that a session can pass them
without the model that they were traced from.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from pagoda.compiler.cache import Cache, source_hash
from pagoda.compiler.executable import Executable
from pagoda.compiler.region import Region
from pagoda.isa.chip import Chip

SHIFT = 2
"""Added to a position on its way into a graph: torch.compile takes an integer that varies to be at
least 2, and positions start at 0."""

PREFILL_TOKENS = 128  # sizes that tiles are chosen for; programs run for all others
DECODE_POSITION = 256
CAPACITY = 2048  # positions of the cache, unless the model's context is shorter

_PACKAGES = ("torch", "transformers", "llvmlite", "numpy")
_DAMAGE = (  # what an unpickler raises
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)
_STOREYS = ("isa", "compiler", "kernels", "pytorch", "llm")  # whose code shapes programs


@dataclass(frozen=True)
class Argument:
    """One argument of a step's region.

    kind: "weight" (a parameter or buffer, by its Hugging Face name), "keys" or "values" (of the
    cache, by layer), "ids" (int64 [1, n]), "count" (n), "shifted" (position of the first token +
    SHIFT), "constant" (a number that was the same in every trace).
    """

    kind: Literal["weight", "keys", "values", "ids", "count", "shifted", "constant"]
    name: str = ""
    layer: int = 0
    value: int = 0


@dataclass(frozen=True)
class Traced:
    """What `trace.trace` found: the regions with their arguments, the model's buffers (tensors
    that are no weights of the file, such as rotary frequencies) by name, and how often which
    operation of the two steps was computed on the host beside them."""

    prefill: Region
    prefill_arguments: tuple[Argument, ...]
    decode: Region
    decode_arguments: tuple[Argument, ...]
    buffers: Mapping[str, np.ndarray]
    fallbacks: Mapping[str, int]


@dataclass(frozen=True)
class StepProgram:
    """One kind of step: the code, and what its region's inputs are."""

    executable: Executable
    arguments: tuple[Argument, ...]

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each weight that the step reads, by name."""
        region = self.executable.region
        found = {}
        for argument, entry in zip(self.arguments, region.inputs, strict=True):
            if argument.kind == "weight":
                buffer = region.buffers[entry.view.buffer]
                found[argument.name] = int(buffer.size.evaluate({})) * buffer.itemsize
        return found


@dataclass(frozen=True)
class CompiledModel:
    """A model's programs for one chip. config: LlamaConfig's arguments; capacity: positions that
    the key/value cache holds; dtype: of weights, activations and cache; fallbacks: see `Traced`."""

    config: dict[str, Any]
    capacity: int
    dtype: str
    prefill: StepProgram
    decode: StepProgram
    buffers: Mapping[str, np.ndarray]
    fallbacks: Mapping[str, int]

    @property
    def chip(self) -> Chip:
        return self.decode.executable.chip

    def to_bytes(self) -> bytes:
        return pickle.dumps(self, protocol=5)

    @staticmethod
    def from_bytes(data: bytes) -> CompiledModel:
        """Raises one of `_DAMAGE` if the bytes are not from `to_bytes` of this version."""
        found = pickle.loads(data)
        if not isinstance(found, CompiledModel):
            raise TypeError(f"not a compiled model: {type(found).__name__}")
        return found


def cache_bytes(config: dict[str, Any], positions: int) -> int:
    """Bytes of keys and values, in bfloat16, of so many positions."""
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return 2 * 2 * heads * config["head_dim"] * positions


def load(store: Cache, config: dict[str, Any], capacity: int, chip: Chip) -> CompiledModel | None:
    """The compiled model in the cache, or None if it is not there or of no use."""
    data = store.get(key(config, capacity, chip))
    if data is None:
        return None
    try:
        found = CompiledModel.from_bytes(data)
    except _DAMAGE:  # the entry is made anew
        return None
    return found if (found.config, found.capacity, found.chip) == (config, capacity, chip) else None


def save(store: Cache, model: CompiledModel) -> None:
    store.put(key(model.config, model.capacity, model.chip), model.to_bytes())


def key(config: dict[str, Any], capacity: int, chip: Chip) -> str:
    """Depends on all that shapes the programs: sizes, chip, Pagoda's sources, packages."""
    versions = [f"{name} {version(name)}" for name in _PACKAGES]
    sizes = json.dumps(config, sort_keys=True)
    return Cache.key(
        "language model", sizes, str(capacity), repr(chip), source_hash(*_STOREYS), *versions
    )
