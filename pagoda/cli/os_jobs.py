"""Work for programs that share a device: inferences of small models, recorded once and replayed.

A job holds all that a run needs as plain data, the executable too, and the bytes and cycles that
an embedded device gave. So a replaying process imports no torch, starts in a second, and knows
whether what it got is right.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagoda.compiler.executable import Executable
from pagoda.compiler.region import ITEMSIZE, TensorArg
from pagoda.isa.chip import Chip
from pagoda.runtime import Device
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


def record_jobs(chip: Chip) -> list[Job]:
    """Jobs of a perceptron, two convolutional networks, bfloat16 and int8, and an encoder layer,
    all with random weights of a fixed seed: a hundred thousand to half a million cycles on `edge`.
    """
    import torch
    from torch import nn

    from pagoda.pytorch import device as torch_device
    from pagoda.pytorch.chip import ChipExecutor
    from pagoda.pytorch.quantisation import quantize

    class Recorder(ChipExecutor):
        """Keeps every run as a job."""

        jobs: list[Job]
        name = ""

        def run(
            self,
            region: object,
            inputs: Sequence[TensorArg | int],
            outputs: Sequence[TensorArg],
            symbols: Mapping[str, int],
        ) -> None:
            taken = tuple(given if isinstance(given, int) else self._copy(given)
                          for given in inputs)  # fmt: skip
            before = self.device.cycles
            super().run(region, inputs, outputs, symbols)
            first = self.device.cycles - before
            super().run(region, inputs, outputs, symbols)
            second = self.device.cycles - before - first
            results = [self._copy(out) for out in outputs]
            shapes = tuple(Tensor(t.sizes, t.strides, t.dtype) for t in results)
            executable = self._loaded[region.key].executable
            expected = tuple(t.data or b"" for t in results)
            cycles = first, second
            self.jobs.append(
                Job(self.name, executable, taken, shapes, dict(symbols), expected, cycles)
            )

        def _copy(self, arg: TensorArg) -> Tensor:
            shape = Tensor(tuple(arg.sizes), tuple(arg.strides), arg.dtype)
            place = self.device.address(arg.pointer) if shape.nbytes else 0
            data = self.device.array(place, (shape.nbytes,), np.uint8).tobytes()
            return Tensor(shape.sizes, shape.strides, shape.dtype, data)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    cases: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "perceptron": (
            nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)),
            torch.randn(32, 256),
        ),
        "int8 convolutions": (quantize(network, images), images),
        "convolutions": (network.bfloat16(), images.bfloat16()),
        "encoder layer": (
            nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True),
            torch.randn(2, 48, 128),
        ),
    }
    recorder = Recorder(Device(chip))
    recorder.jobs = []
    torch_device.use(recorder, recorder)
    for name, (model, given) in cases.items():
        recorder.name = name
        with torch.no_grad():
            torch.compile(model.eval().to("pagoda"), backend="pagoda")(given.to("pagoda"))
    return recorder.jobs
