"""A generation session on the chip: compiled programs, weights and cache in its DRAM; no torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pagoda.compiler.region import TensorArg
from pagoda.runtime import Device
from pagoda.runtime.executor import LoadedExecutable

from .program import SHIFT, Argument, CompiledModel, StepProgram


@dataclass(frozen=True)
class Step:
    """What one step did. count: tokens appended; position: of the first of them; cycles and MACs as
    the chip counted them; seconds: on the host."""

    count: int
    position: int
    cycles: int
    launches: int
    macs: int
    seconds: float


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Binary32 to the bits of bfloat16, uint16, rounded to nearest even; NaN is not expected."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype(np.uint16)


class _LoadedStep:
    """A step program on the device. pointers: of weights and cache, by argument."""

    def __init__(self, device: Device, program: StepProgram, pointers: dict[Argument, int]):
        self._loaded = LoadedExecutable(device, program.executable)
        self._region = program.executable.region
        self._arguments = program.arguments
        self._inputs: list[TensorArg | int] = []
        for argument, entry in zip(program.arguments, self._region.inputs, strict=True):
            if argument not in pointers:  # an integer, or the token ids
                self._inputs.append(argument.value)
                continue
            view = entry.view
            sizes = tuple(size.evaluate({}) for size in view.sizes)
            strides = tuple(stride.evaluate({}) for stride in view.strides)
            self._inputs.append(TensorArg(pointers[argument], sizes, strides, view.dtype))

    def run(self, count: int, position: int, ids: int, logits: int, vocabulary: int) -> int:
        """Run for `count` tokens whose ids lie at the pointer `ids`; returns the cycles."""
        changing = {
            "count": count,
            "shifted": position + SHIFT,
            "ids": TensorArg(ids, (1, count), (count, 1), "int64"),
        }
        inputs = [
            changing.get(argument.kind, fixed)
            for argument, fixed in zip(self._arguments, self._inputs, strict=True)
        ]
        outputs = [TensorArg(logits, (vocabulary,), (1,), "float32")]
        return self._loaded.run(inputs, outputs, self._region.read_symbols(inputs))


class ChipSession:
    """One conversation with a compiled model (`generate.Session`).

    weights: (Hugging Face name, binary32 values) of every parameter; they are rounded to bfloat16.
    `steps` lists what every step so far has cost. Raises OutOfDeviceMemory if model and cache do
    not fit the chip's DRAM.
    """

    def __init__(
        self, model: CompiledModel, device: Device, weights: Iterable[tuple[str, np.ndarray]]
    ):
        self.model, self.device = model, device
        self.context = model.capacity
        self.tokens: list[int] = []
        self.steps: list[Step] = []
        pointers = self._place(weights)
        self._prefill = _LoadedStep(device, model.prefill, pointers)
        self._decode = _LoadedStep(device, model.decode, pointers)
        self._vocabulary: int = model.config["vocab_size"]
        self._ids = device.memory.allocate(8 * self.context)
        self._logits = device.memory.allocate(4 * self._vocabulary)

    def _place(self, weights: Iterable[tuple[str, np.ndarray]]) -> dict[Argument, int]:
        """Weights, buffers and an empty cache in DRAM; host pointers by argument."""
        device, model = self.device, self.model
        addresses = {
            Argument("weight", name): device.place(values) for name, values in model.buffers.items()
        }
        used = model.prefill.weights.keys() | model.decode.weights.keys()
        for name, values in weights:
            if name not in used:
                continue
            addresses[Argument("weight", name)] = device.place(to_bfloat16(values))
        config = model.config
        shape = (config["num_key_value_heads"], model.capacity, config["head_dim"])
        for layer in range(config["num_hidden_layers"]):
            for kind in ("keys", "values"):
                empty = np.zeros(shape, np.uint16)
                addresses[Argument(kind, layer=layer)] = device.place(empty)
        return {argument: device.pointer(address) for argument, address in addresses.items()}

    def step(self, ids: Sequence[int]) -> np.ndarray:
        """Append `ids` and return the logits [vocabulary], binary32, of the last position."""
        count, position = len(ids), len(self.tokens)
        assert 0 < count <= self.context - position, (count, position, self.context)
        device, begun = self.device, time.perf_counter()
        launches, macs = device.launches, device.counters.macs
        device.array(self._ids, (count,), np.int64)[...] = ids
        cycles = (self._decode if count == 1 else self._prefill).run(
            count,
            position,
            device.pointer(self._ids),
            device.pointer(self._logits),
            self._vocabulary,
        )
        logits = device.array(self._logits, (self._vocabulary,), np.float32).copy()
        self.tokens.extend(ids)
        self.steps.append(
            Step(
                count,
                position,
                cycles,
                device.launches - launches,
                device.counters.macs - macs,
                time.perf_counter() - begun,
            )
        )
        return logits

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]
