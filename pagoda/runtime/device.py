"""One device: a machine, its memory, launches on it, and the sums of what they did."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import NamedTuple

import numpy as np

from pagoda.compiler.region import NOWHERE, Place
from pagoda.isa import Chip, Counters, Fault, FaultKind, Launch, Machine, Program, Result, Slot
from pagoda.runtime.anomaly import AnomalyCheck
from pagoda.runtime.errors import DeviceFault
from pagoda.runtime.memory import Allocator, OutOfDeviceMemory
from pagoda.runtime.work_queue import Queue
from pagoda.sim import Simulator

WATCHDOG_CYCLES = 10**11  # a hundred seconds of a 1 GHz chip
_SLOT_FAULTS = (FaultKind.OUT_OF_SLOT, FaultKind.GATHER_INDEX, FaultKind.NO_PERMISSION)

# Names the tensor at (slot, byte offset), with what the offset means in it; None: no tensor there.
TensorNamer = Callable[[int, int], str | None]


class KernelCall(NamedTuple):
    """One entry of a launch's call list: the kernel's name, and what it came from."""

    kernel: str
    origin: str = ""
    place: Place = NOWHERE


@dataclass(frozen=True)
class LaunchRecord:
    """One finished launch, as profiles see it; calls: of its call list, in order, if known."""

    program: Program
    result: Result
    calls: Sequence[KernelCall] = ()


def host_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _simulator(chip: Chip, threads: int) -> Machine:
    """Raises OutOfDeviceMemory: this process gets no memory for the chip's DRAM."""
    try:
        return Simulator(chip, threads=threads)
    except OSError as error:
        raise OutOfDeviceMemory(
            f"chip {chip.name!r}: this process gets no memory for the simulated DRAM of "
            f"{chip.dram_bytes:,} bytes ({error.strerror}); raise its limit on memory (ulimit -v), "
            "or choose a chip with less DRAM"
        ) from None


class Device:
    """A chip with an operating system, as one process sees it.

    Addresses are DRAM byte addresses; `pointer` turns one into a host pointer to the same bytes.
    Threads may share a device: a launch waits for another one's end, and whoever makes several that
    belong together holds `exclusive`. Work that nobody waits for is queued in `queue`.
    machine: default a simulator, on so many host threads (default: one for each processor).
    memory: who hands out the machine's DRAM; by default an allocator of all of it, or of its first
    `memory_limit` bytes.
    """

    def __init__(
        self,
        chip: Chip,
        machine: Machine | None = None,
        threads: int | None = None,
        memory: Allocator | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.chip = chip
        if machine is None:
            machine = _simulator(chip, threads or host_threads())
        self.machine = machine
        if memory is None:  # no allocation has address 0
            most = chip.dram_bytes if memory_limit is None else memory_limit
            memory = Allocator(max(min(most, chip.dram_bytes), 64), first=64)
        self.memory = memory
        self.watchdog = WATCHDOG_CYCLES
        self.cycles = 0
        self.launches = 0
        self.counters = Counters()
        self.anomaly: AnomalyCheck | None = None  # what executables look for in results
        self.exclusive = RLock()
        self.queue = Queue(chip.clock_hz)
        self._listeners: list[Callable[[LaunchRecord], None]] = []

    def pointer(self, address: int) -> int:
        """Host pointer of a DRAM address."""
        return self.machine.dram.ctypes.data + address

    def holds(self, pointer: int) -> bool:
        """Whether a host pointer lies in this device's DRAM."""
        return 0 <= pointer - self.machine.dram.ctypes.data < self.chip.dram_bytes

    def address(self, pointer: int) -> int:
        """DRAM address of a host pointer. Raises ValueError if it lies outside the DRAM."""
        if not self.holds(pointer):
            raise ValueError(
                f"host pointer {pointer:#x}: not in the memory of device {self.chip.name!r}; "
                "move the tensor to the device first"
            )
        return pointer - self.machine.dram.ctypes.data

    def array(self, address: int, shape: Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
        """DRAM from `address` on as a numpy array that shares its bytes."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self.machine.dram[address : address + nbytes].view(dtype).reshape(shape)

    def place(self, values: np.ndarray) -> int:
        """Allocate room for an array, copy it there (contiguous), return its address."""
        address = self.memory.allocate(values.nbytes)
        self.array(address, values.shape, values.dtype)[...] = values
        return address

    def launch(
        self,
        program: Program,
        args: Sequence[int] = (),
        slots: Sequence[Slot] = (),
        tensor_at: TensorNamer | None = None,
        calls: Sequence[KernelCall] = (),
    ) -> Result:
        """Run a program to its end. calls: for profiles. Raises DeviceFault if it faults."""
        with self.exclusive:
            self.machine.start(Launch(program, tuple(args), tuple(slots), self.watchdog))
            result = self.machine.wait()
            self.cycles += result.cycles
            self.launches += 1
            self.counters += result.counters
            for listener in self._listeners:
                listener(LaunchRecord(program, result, calls))
        if result.fault is not None:
            message = _explain(program, result.fault, tensor_at)
            raise DeviceFault(message, result.fault, result.in_flight)
        return result

    @contextmanager
    def listening(self, listener: Callable[[LaunchRecord], None]) -> Iterator[None]:
        """Call `listener` after every launch inside the `with` block, also of what is queued
        there."""
        self.queue.finish()
        self._listeners.append(listener)
        try:
            yield
        finally:
            try:
                self.queue.finish()
            finally:
                self._listeners.remove(listener)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Have the machine keep traces (`Result.trace`) inside the `with` block."""
        self.queue.finish()
        before, self.machine.tracing = self.machine.tracing, True
        try:
            yield
        finally:
            try:
                self.queue.finish()
            finally:
                self.machine.tracing = before


def _explain(program: Program, fault: Fault, tensor_at: TensorNamer | None) -> str:
    line = program.line_at(fault.pc)
    where = f"kernel {line.kernel!r}, {line.file}:{line.line}" if line else f"pc {fault.pc:#x}"
    tensor = None
    if fault.kind in _SLOT_FAULTS and tensor_at is not None:
        tensor = tensor_at(fault.slot, fault.offset)
    return (
        f"program {program.name!r} stopped in {where}: {fault.describe()}"
        + (f"; tensor {tensor}" if tensor else "")
        + f". {fault.kind.meaning}"
    )
