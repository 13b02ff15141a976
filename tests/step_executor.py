"""Runs a region step by step on the host and on a chip, and compares what every step writes.

Each step gets the same inputs on both sides (the host's), so a difference names the kernel it
comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from region_executor import HostExecutor

from pagoda.compiler.cache import Cache
from pagoda.compiler.index_expr import Const
from pagoda.compiler.loop_nest_oracle import STORAGE, bfloat16_to_float32
from pagoda.compiler.region import KernelCall, Region, TensorArg, TensorInput, View
from pagoda.kernels.build import build
from pagoda.runtime import Device
from pagoda.runtime.executor import LoadedExecutable


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of what a step wrote, and the largest magnitude there."""

    step: int
    origin: str
    error: float
    scale: float


class StepExecutor(HostExecutor):
    """`differences`: one entry per step run, in order. The host's results are what is returned."""

    def __init__(self, device: Device, cache: Cache | None = None) -> None:
        super().__init__()
        self.device, self.cache = device, cache
        self.differences: list[Difference] = []
        self._loaded: dict[tuple[str, int], LoadedExecutable] = {}

    def run(
        self,
        region: Region,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> None:
        self._region, self._number = region, 0
        super().run(region, inputs, outputs, symbols)

    def _step(
        self, step: KernelCall, memory: dict[int, np.ndarray], symbols: Mapping[str, int]
    ) -> None:
        used = sorted({arg.buffer for arg in step.args if arg is not None})
        address = {number: self.device.place(memory[number]) for number in used}
        super()._step(step, memory, symbols)
        self._run_on_chip(step, used, address, symbols)
        for number in step.writes():
            self._compare(step, number, address[number], memory[number])
        for place in address.values():
            self.device.memory.free(place)
        self._number += 1

    def _run_on_chip(
        self,
        step: KernelCall,
        used: list[int],
        address: dict[int, int],
        symbols: Mapping[str, int],
    ) -> None:
        key = self._region.key, self._number
        if key not in self._loaded:
            alone = self._alone(step, used)
            executable = build(alone, self.device.chip, symbols, self.cache)
            self._loaded[key] = LoadedExecutable(self.device, executable)
        args = [TensorArg(self.device.pointer(address[n]), (), (), "uint8") for n in used]
        self._loaded[key].run(args, [], symbols)

    def _alone(self, step: KernelCall, used: list[int]) -> Region:
        """A region of this step only, whose inputs are the buffers it uses."""
        buffers = tuple(
            replace(buffer, kind="input", mutated=number in step.writes(), data=None)
            for number, buffer in enumerate(self._region.buffers)
        )
        views = [View(n, Const(0), (buffers[n].size,), (Const(1),), buffers[n].dtype) for n in used]
        inputs = tuple(TensorInput(view) for view in views)
        return replace(self._region, inputs=inputs, outputs=(), buffers=buffers, steps=(step,))

    def _compare(self, step: KernelCall, number: int, address: int, memory: np.ndarray) -> None:
        dtype = self._region.buffers[number].dtype
        wanted = memory.view(STORAGE[dtype])
        found = self.device.array(address, wanted.shape, STORAGE[dtype])
        a, b = (
            (bfloat16_to_float32(x) if dtype == "bfloat16" else x).astype(np.float64)
            for x in (found, wanted)
        )
        finite = np.isfinite(b)
        error = np.max(np.abs(a[finite] - b[finite]), initial=0.0)
        if not np.array_equal(np.isfinite(a), finite):
            error = float("inf")
        scale = np.max(np.abs(b[finite]), initial=0.0)
        self.differences.append(Difference(self._number, step.origin, float(error), float(scale)))
