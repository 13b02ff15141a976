"""Runs a region step by step on the host and on a chip, and compares what every step writes.

Each step gets the same inputs on both sides (the host's), so a difference names the kernel it
comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from region_executor import HostExecutor, _bytes

from pagoda.compiler.loop_nest_oracle import STORAGE
from pagoda.compiler.region import Region, TensorArg, TensorInput, View
from pagoda.compiler.index_expr import Const
from pagoda.kernels.build import build
from pagoda.runtime import Device
from pagoda.runtime.executor import LoadedExecutable


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of what a step wrote, and the largest magnitude there."""

    step: int
    name: str
    error: float
    scale: float


class StepExecutor(HostExecutor):
    """`differences`: one entry per step run, in order. The host's results are what is returned."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.differences: list[Difference] = []
        self._loaded: dict[tuple[str, int], LoadedExecutable] = {}

    def run(
        self,
        region: Region,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> None:
        self._region = region
        self._number = 0
        super().run(region, inputs, outputs, symbols)

    def _step(self, step, memory, symbols) -> None:
        region = self._region
        used = sorted({arg.buffer for arg in step.args if arg is not None})
        address = {number: self.device.place(memory[number]) for number in used}
        super()._step(step, memory, symbols)
        for number in step.writes():
            self._compare(step, number, self._on_chip(region, step, used, address, symbols),
                          memory, symbols)
        for place in address.values():
            self.device.memory.free(place)
        self._number += 1

    def _on_chip(self, region, step, used, address, symbols) -> dict[int, int]:
        key = region.key, self._number
        if key not in self._loaded:
            buffers = tuple(
                replace(buffer, kind="input", mutated=number in step.writes(), data=None)
                for number, buffer in enumerate(region.buffers)
            )
            views = [
                View(n, Const(0), (buffers[n].size,), (Const(1),), buffers[n].dtype) for n in used
            ]
            alone = replace(
                region, inputs=tuple(TensorInput(view) for view in views), outputs=(),
                buffers=buffers, steps=(step,),
            )
            executable = build(alone, self.device.chip, symbols)
            self._loaded[key] = LoadedExecutable(self.device, executable)
        args = [TensorArg(self.device.pointer(address[n]), (), (), "uint8") for n in used]
        self._loaded[key].run(args, [], symbols)
        return address

    def _compare(self, step, number, address, memory, symbols) -> None:
        dtype = STORAGE[self._region.buffers[number].dtype]
        wanted = memory[number].view(dtype)
        found = self.device.array(address[number], wanted.shape, dtype)
        a, b = (x.astype(np.float64) for x in (found, wanted))
        finite = np.isfinite(b)
        error = np.max(np.abs(a[finite] - b[finite]), initial=0.0)
        if not np.array_equal(np.isfinite(a), finite):
            error = float("inf")
        name = str(step.kernel).splitlines()[0] if not hasattr(step.kernel, "key") else step.origin
        scale = np.max(np.abs(b[finite]), initial=0.0)
        self.differences.append(Difference(self._number, name, float(error), float(scale)))
