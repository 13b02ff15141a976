"""How well image networks use a chip: the figures of `pagoda bench resnet50`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo import reset

from pagoda.isa.chip import Chip
from pagoda.pytorch.chip import profile, use_chip
from pagoda.pytorch.device import NAME
from pagoda.pytorch.quantisation import fold_batch_norms, quantize
from pagoda.pytorch.vision import MobileNet, ResNet
from pagoda.runtime import Device, host_threads
from pagoda.runtime.profile import Profile

NETWORKS = {"resnet50": ResNet, "mobilenet_v2": MobileNet}
DEPTHWISE = "convolution_depthwise"  # the kernel's name
SEED = 0


@dataclass(frozen=True)
class Figures:
    """One inference: its cycles, and the host's seconds for them. macs: of the model as it is
    written, padding not counted; those of depthwise convolutions, which are the vector engine's
    work, apart. profile: of another run, if one was asked for."""

    chip: Chip
    macs: int
    depthwise_macs: int
    cycles: int
    seconds: float
    profile: Profile | None

    @property
    def utilisation(self) -> float:
        """Share of the matrix engines' peak in all cycles of the model."""
        return self.macs / (self.chip.macs_per_cycle * self.cycles)

    @property
    def depthwise_cycles(self) -> int:
        assert self.profile is not None
        return sum(row.cycles for row in self.profile.rows if row.kernel == DEPTHWISE)

    @property
    def depthwise_lane_utilisation(self) -> float:
        """Share of the vector lanes' peak, a MAC each a cycle, in the cycles of those layers."""
        possible = self.depthwise_cycles * self.chip.cores * self.chip.lanes
        return self.depthwise_macs / possible if possible else 0.0


def run(
    chip: Chip, network: str, dtype: str, batch: int, size: int, profiled: bool = False,
    own: bool = False,
) -> Figures:  # fmt: skip
    """A network on random images: dtype "bf16", its batch norms folded, or "int8" (`quantize`).
    profiled: run it once more, with a profile. own: on a simulator of this program's own, though
    a device service may run."""
    model, images = _model(network), _images(batch, size)
    macs, depthwise = count_macs(model, images[:1])
    with torch.no_grad():
        if dtype == "int8":
            ready, given = quantize(model, images[:1]), images
        else:
            ready, given = fold_batch_norms(model).bfloat16(), images.bfloat16()
        opened = use_chip(Device(chip) if own else chip)
        reset()
        compiled = torch.compile(ready.to(memory_format=torch.channels_last).to(NAME), backend=NAME)
        given = given.to(NAME)
        compiled(given)
        before, begun = opened.cycles, time.perf_counter()
        compiled(given)
        cycles, seconds = opened.cycles - before, time.perf_counter() - begun
        found = None
        if profiled:
            with profile() as found:
                compiled(given)
    return Figures(chip, macs * batch, depthwise * batch, cycles, seconds, found)


def host_seconds(network: str, batch: int, size: int) -> float:
    """What torch takes for the same model in float32, with as many threads as the simulator."""
    model = _model(network).to(memory_format=torch.channels_last)
    images, before = _images(batch, size), torch.get_num_threads()
    torch.set_num_threads(host_threads())
    try:
        with torch.no_grad():
            model(images)
            begun = time.perf_counter()
            model(images)
            return time.perf_counter() - begun
    finally:
        torch.set_num_threads(before)


def count_macs(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Multiply-accumulates of the linear layers and convolutions that a call goes through: those of
    the matrix engine, and those of depthwise convolutions."""
    counts = [0, 0]

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            depthwise = layer.groups == layer.in_channels > 1
            counts[depthwise] += out.numel() * layer.weight[0].numel()
        else:
            counts[0] += out.numel() * layer.in_features

    hooks = [
        layer.register_forward_hook(count)
        for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]  # fmt: skip
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return counts[0], counts[1]


def _model(network: str) -> nn.Module:
    torch.manual_seed(SEED)
    return NETWORKS[network]().eval()


def _images(batch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(memory_format=torch.channels_last)
