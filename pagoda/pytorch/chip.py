"""Joins the torch device to a chip: regions become executables, tensors live in its DRAM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from threading import Lock

from pagoda.compiler.cache import Cache, default_directory, source_hash
from pagoda.compiler.errors import CompileError
from pagoda.compiler.executable import Executable
from pagoda.compiler.region import Region, TensorArg
from pagoda.isa.chip import Chip, load_chip
from pagoda.kernels.build import build
from pagoda.pytorch import device as torch_device
from pagoda.pytorch.errors import Unsupported
from pagoda.runtime import Device, OutOfDeviceMemory, open_device
from pagoda.runtime.executor import LoadedExecutable
from pagoda.runtime.profile import Profile
from pagoda.runtime.profile import profile as profile_device


class ChipExecutor:
    """The `Executor` and `Allocator` of a runtime device.

    Regions are compiled when they are first run, for the sizes of that run; they serve all others.
    """

    def __init__(self, device: Device, cache: Cache | None = None) -> None:
        self.device, self.queue = device, device.queue
        self.cache = cache if cache is not None else Cache(None)
        self._loaded: dict[str, LoadedExecutable] = {}
        self._loading = Lock()

    def run(
        self,
        region: Region,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> None:
        """See `region.Executor`. Raises Unsupported, DeviceFault, OutOfDeviceMemory."""
        self.queue.advance(self.load(region, inputs, symbols).run(inputs, outputs, symbols))

    def load(
        self, region: Region, inputs: Sequence[TensorArg | int], symbols: Mapping[str, int]
    ) -> LoadedExecutable:
        """What runs a region, compiled if it is new. Raises Unsupported, OutOfDeviceMemory, and
        RuntimeError for inputs in other memory."""
        for number, arg in enumerate(inputs):
            if isinstance(arg, TensorArg) and 0 not in arg.sizes:
                self._require_own(number, arg)
        loaded = self._loaded.get(region.key)
        if loaded is not None:
            return loaded
        with self._loading:
            if region.key not in self._loaded:
                executable = self._compile(region, symbols)
                self._loaded[region.key] = LoadedExecutable(self.device, executable)
            return self._loaded[region.key]

    def _compile(self, region: Region, symbols: Mapping[str, int]) -> Executable:
        chip = self.device.chip
        try:
            return executable_of(region, chip, symbols, self.cache)
        except CompileError as error:
            where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
            raise Unsupported(f'cannot compile for chip "{chip.name}"{where}: {error}') from error

    def _require_own(self, number: int, arg: TensorArg) -> None:
        if not self.device.holds(arg.pointer):
            raise RuntimeError(
                f"argument {number} of the operation, a {arg.dtype} tensor of shape {arg.sizes}, "
                f'is not in the memory of chip "{self.device.chip.name}", which device pagoda uses '
                "now: it was made before the last use_chip. Move it with .cpu() and then "
                '.to("pagoda"), or call use_chip before anything is moved to the device.'
            )

    def allocate(self, nbytes: int) -> int:
        """Host pointer to `nbytes` of the chip's DRAM. Where none is free, waits for queued work,
        which keeps memory. Raises OutOfDeviceMemory, and what failed of that work."""
        memory = self.device.memory
        try:
            address = memory.allocate(nbytes)
        except OutOfDeviceMemory:
            if not self.queue.uses_memory:
                raise
            self.queue.synchronize()
            address = memory.allocate(nbytes)
        return self.device.pointer(address)

    def free(self, pointer: int) -> None:
        self.device.memory.free(self.device.address(pointer))


def executable_of(
    region: Region, chip: Chip, symbols: Mapping[str, int], cache: Cache
) -> Executable:
    """The executable of a region: from the cache, else compiled and kept there. See `build`."""
    key = Cache.key(
        "executable", region.key, repr(chip), repr(sorted(symbols.items())),
        source_hash("isa", "compiler", "kernels"), version("llvmlite"),
    )  # fmt: skip
    data = cache.get(key)
    if data is not None:
        return Executable.from_bytes(data)
    executable = build(region, chip, symbols, cache)
    cache.put(key, executable.to_bytes())
    return executable


def use_chip(chip: Chip | Device | str | None = None, cache: Cache | None = None) -> Device:
    """Put the torch device "pagoda" on a new simulated chip; tensors made before stay where they
    were, and can only be copied to the CPU.

    chip: a `Chip`, the name of a preset, the path of a chip file, or a device that is open already;
    None is the chip of the device service, if one runs, else "edge". cache: of compiled code; the
    user's (`pagoda.compiler.cache.default_directory`) unless given, `Cache(None)` for none.
    Returns the runtime device, for its counters, memory and watchdog. Raises ChipError,
    ServiceError.
    """
    opened = chip if isinstance(chip, Device) else open_device(_chip(chip))
    use_device(opened, cache)
    return opened


def _chip(chip: Chip | str | None) -> Chip | None:
    return load_chip(chip) if isinstance(chip, str) else chip


def use_device(opened: Device, cache: Cache | None = None) -> None:
    """Put the torch device "pagoda" on a runtime device, for example one on another `Machine`."""
    executor = ChipExecutor(opened, cache if cache is not None else Cache(default_directory()))
    torch_device.use(executor, executor)


@contextmanager
def profile() -> Iterator[Profile]:
    """`with profile() as p:` counts cycles, utilisation and stalls of every kernel that runs on
    the chip in use; see `pagoda.runtime.profile`. Opens the default chip if none is open."""
    executor = torch_device.executor()
    if not isinstance(executor, ChipExecutor):
        raise RuntimeError(  # noqa: TRY004 - the state is wrong, not an argument
            f"profile: device pagoda runs on {type(executor).__name__}, not on a chip, so there "
            "are no cycles to count. Call pagoda.use_chip first."
        )
    with profile_device(executor.device) as found:
        yield found
