"""Records what models run on a chip, for programs that replay it without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from pagoda.compiler.region import Region, TensorArg
from pagoda.isa.chip import Chip
from pagoda.pytorch import device as torch_device
from pagoda.pytorch.chip import ChipExecutor
from pagoda.pytorch.quantisation import quantize
from pagoda.runtime import Device
from pagoda.runtime.replay import Job, Tensor


class _Recorder(ChipExecutor):
    """Keeps every run as a job of this `name`."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.jobs: list[Job] = []
        self.name = ""

    def run(
        self,
        region: Region,
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


def record_jobs(chip: Chip) -> list[Job]:
    """Jobs of a perceptron, two convolutional networks, bfloat16 and int8, and an encoder layer,
    all with random weights of a fixed seed: a hundred thousand to half a million cycles on `edge`.
    """
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
    recorder = _Recorder(Device(chip))
    torch_device.use(recorder, recorder)
    for name, (model, given) in cases.items():
        recorder.name = name
        with torch.no_grad():
            torch.compile(model.eval().to("pagoda"), backend="pagoda")(given.to("pagoda"))
    return recorder.jobs
