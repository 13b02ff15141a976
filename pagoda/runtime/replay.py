"""Runs of executables, recorded once and replayed: a `Job` is all that one needs, as plain data.

It also has the bytes and cycles that an embedded device gave. So a replaying process imports no
torch, starts in a second, and knows whether what it got is right. `pagoda.pytorch.recording` makes
jobs of models.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagoda.compiler.executable import Executable
from pagoda.compiler.region import ITEMSIZE, TensorArg
from pagoda.runtime.device import Device
from pagoda.runtime.executor import LoadedExecutable


@dataclass(frozen=True)
class Tensor:
    """What a run reads, or the shape of what it writes (then without data)."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last."""
        if 0 in self.sizes:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        return (last + 1) * ITEMSIZE[self.dtype]

    def at(self, pointer: int) -> TensorArg:
        return TensorArg(pointer, self.sizes, self.strides, self.dtype)


@dataclass(frozen=True)
class Job:
    """One run of an executable. expected: the bytes of each output; cycles: of all launches, when
    the code of another program was on the chip and, again, when its own was."""

    name: str
    executable: Executable
    inputs: tuple[Tensor | int, ...]
    outputs: tuple[Tensor, ...]
    symbols: dict[str, int]
    expected: tuple[bytes, ...]
    cycles: tuple[int, int]


class LoadedJob:
    """A job on a device: inputs placed, room for outputs."""

    def __init__(self, device: Device, job: Job) -> None:
        self.job, self._device = job, device
        self._loaded = LoadedExecutable(device, job.executable)
        self._inputs = [
            given if isinstance(given, int) else given.at(self._place(given.data or b""))
            for given in job.inputs
        ]
        self._places = [device.memory.allocate(out.nbytes) for out in job.outputs]
        self._outputs = [
            out.at(device.pointer(place))
            for place, out in zip(self._places, job.outputs, strict=True)
        ]

    def _place(self, data: bytes) -> int:
        return self._device.pointer(self._device.place(np.frombuffer(data, np.uint8)))

    def launch(self) -> int:
        """Returns the cycles."""
        return self._loaded.run(self._inputs, self._outputs, self.job.symbols)

    def run(self, again: bool) -> bool:
        """Whether bits and cycles are those expected. again: nothing ran on the device since."""
        for memory in self._memory():
            memory[:] = 0xA5
        cycles = self.launch()
        found = tuple(memory.tobytes() for memory in self._memory())
        return found == self.job.expected and cycles == self.job.cycles[again]

    def _memory(self) -> list[np.ndarray]:
        return [
            self._device.array(place, (out.nbytes,), np.uint8)
            for place, out in zip(self._places, self.job.outputs, strict=True)
        ]


def load_jobs(path: Path) -> list[Job]:
    """What `save_jobs` wrote."""
    return pickle.loads(path.read_bytes())


def save_jobs(path: Path, jobs: Sequence[Job]) -> None:
    path.write_bytes(pickle.dumps(list(jobs), protocol=5))
