"""Joins the torch device to a chip: regions become executables, tensors live in its DRAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pagoda.compiler.cache import Cache
from pagoda.compiler.region import Region, TensorArg
from pagoda.isa.chip import Chip, load_chip
from pagoda.kernels.build import build
from pagoda.pytorch.device import use
from pagoda.runtime import Device
from pagoda.runtime.executor import LoadedExecutable


class ChipExecutor:
    """The `Executor` and `Allocator` of a runtime device.

    Regions are compiled when they are first run, for the sizes of that run; they serve all others.
    """

    def __init__(self, device: Device, cache: Cache | None = None) -> None:
        self.device = device
        self.cache = cache
        self._loaded: dict[str, LoadedExecutable] = {}

    def run(
        self,
        region: Region,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> None:
        """See `region.Executor`. Raises CompileError, DeviceFault, OutOfDeviceMemory."""
        loaded = self._loaded.get(region.key)
        if loaded is None:
            executable = build(region, self.device.chip, symbols, self.cache)
            loaded = self._loaded[region.key] = LoadedExecutable(self.device, executable)
        loaded.run(inputs, outputs, symbols)

    def allocate(self, nbytes: int) -> int:
        """Host pointer to `nbytes` of the chip's DRAM. Raises OutOfDeviceMemory."""
        return self.device.pointer(self.device.memory.allocate(nbytes))

    def free(self, pointer: int) -> None:
        self.device.memory.free(self.device.address(pointer))


def use_chip(chip: Chip | str = "edge", cache: Cache | None = None) -> Device:
    """Put the torch device "pagoda" on a simulated chip; tensors made before stay where they are.

    Returns the runtime device, for its counters and memory. Raises ChipError.
    """
    device = Device(load_chip(chip) if isinstance(chip, str) else chip)
    executor = ChipExecutor(device, cache)
    use(executor, executor)
    return device
