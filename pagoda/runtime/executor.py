"""Runs executables on a device: places tensors, fills the call lists in, launches.

What depends on the call (addresses, sizes) is a set of words in a prepared array, patched with
numpy; nothing is interpreted per kernel on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pagoda.compiler.executable import Executable, OffsetWord, PlannedLaunch, SlotWord
from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.link import argument_positions, launch_arguments, pack_records
from pagoda.compiler.region import TensorArg
from pagoda.isa import Slot
from pagoda.isa.program import MAX_SLOT_BYTES
from pagoda.runtime.anomaly import AnomalyCheck, WatchedCall
from pagoda.runtime.device import Device, KernelCall
from pagoda.runtime.memory import OutOfDeviceMemory
from pagoda.runtime.plan import plan_arena

_CALL_LIST_SLOT = 0
_WORD = 0xFFFFFFFF


def _round_up(count: int) -> int:
    """To three significant bits, so that a growing sequence seldom needs a new memory plan."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step


class _CallList:
    """The call list of one planned launch, and where its words depend on the call."""

    def __init__(self, device: Device, launch: PlannedLaunch) -> None:
        self.program = launch.program
        self.calls = tuple(
            KernelCall(call.kernel, call.origin, call.place) for call in launch.calls
        )
        blank = [(call.entry, [0] * len(call.words)) for call in launch.calls]
        self._words = pack_records(blank)
        self.arguments = launch_arguments(_CALL_LIST_SLOT, 0, blank)
        slots: list[tuple[int, int]] = []
        offsets: list[tuple[int, int]] = []
        symbolic: dict[Expr, list[int]] = {}
        starts = argument_positions([len(call.words) for call in launch.calls])
        for call, start in zip(launch.calls, starts, strict=True):
            for position, word in enumerate(call.words, start):
                if isinstance(word, SlotWord):
                    slots.append((position, word.buffer))
                    continue
                if isinstance(word, OffsetWord):
                    offsets.append((position, word.buffer))
                    word = word.offset
                if isinstance(word, Const):
                    word = word.value
                if isinstance(word, Expr):
                    symbolic.setdefault(word, []).append(position)
                else:
                    self._words[position] = word & _WORD
        self._slot_words = _columns(slots)
        self._offset_words = _columns(offsets)
        self._symbolic = [(e, np.array(at, np.int64)) for e, at in symbolic.items()]
        self.used = sorted({buffer for _, buffer in (*slots, *offsets)})
        self.address = device.memory.allocate(self._words.nbytes)
        self.slot = Slot(self.address, self._words.nbytes, writable=False)

    def fill(
        self, slot_of: np.ndarray, relative: np.ndarray, symbols: Mapping[str, int]
    ) -> np.ndarray:
        """The words of one call. relative: address of each buffer within its slot."""
        words = self._words.copy()
        positions, buffers = self._slot_words
        words[positions] = slot_of[buffers]
        positions, buffers = self._offset_words
        words[positions] += relative[buffers]
        for expression, at in self._symbolic:
            words[at] += np.uint32(int(expression.evaluate(symbols)) & _WORD)
        return words


@dataclass(frozen=True)
class _Placement:
    """Where the buffers of a call are. Each by buffer: its bytes, its DRAM address, the slot that
    covers it, and its address within that slot; slots: after that of the call list."""

    sizes: list[int]
    addresses: np.ndarray
    slots: list[Slot]
    slot_of: np.ndarray
    relative: np.ndarray


class LoadedExecutable:
    """An executable on a device: constants placed, call lists allocated, ready to run.

    Raises OutOfDeviceMemory if they do not fit.
    """

    def __init__(self, device: Device, executable: Executable) -> None:
        assert executable.chip == device.chip, (executable.chip.name, device.chip.name)
        self.device = device
        self.executable = executable
        self._buffers = executable.region.buffers
        self._constants = {
            number: device.place(np.frombuffer(buffer.data, np.uint8))
            for number, buffer in enumerate(self._buffers)
            if buffer.kind == "constant" and buffer.data is not None
        }
        self._lists = [_CallList(device, launch) for launch in executable.launches]
        self._used = sorted({buffer for each in self._lists for buffer in each.used})
        self._lifetimes = executable.lifetimes()
        self._fixed_sizes = [
            buffer.size.value * buffer.itemsize if isinstance(buffer.size, Const) else -1
            for buffer in self._buffers
        ]
        self._arena = (0, 0)  # address, bytes
        self._placed_for: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._placement: _Placement | None = None
        self._plans: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def run(
        self,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> int:
        """Run the launches; returns their cycles. Raises DeviceFault, OutOfDeviceMemory, and
        AnomalyError if the device looks for such."""
        with self.device.exclusive:  # call lists and temporaries belong to one run at a time
            placement = self._place(inputs, outputs, symbols)
            if self.device.anomaly is not None:
                return self._run_watched(self.device.anomaly, placement, symbols)
            return sum(self._launch(each, placement, symbols) for each in self._lists)

    def _launch(self, each: _CallList, placement: _Placement, symbols: Mapping[str, int]) -> int:
        words = each.fill(placement.slot_of, placement.relative, symbols)
        self.device.array(each.address, words.shape, np.uint32)[...] = words
        result = self.device.launch(
            each.program,
            each.arguments,
            (each.slot, *placement.slots),
            lambda slot, offset: self._name(slot, offset, placement),
            each.calls,
        )
        return result.cycles

    def _run_watched(
        self, check: AnomalyCheck, placement: _Placement, symbols: Mapping[str, int]
    ) -> int:
        """Call by call; see `anomaly`."""

        def array(buffer: int, kind: type) -> np.ndarray:
            count = placement.sizes[buffer] // np.dtype(kind).itemsize
            return self.device.array(int(placement.addresses[buffer]), (count,), kind)

        planned = [(launch.program, call) for launch in self.executable.launches
                   for call in launch.calls]  # fmt: skip
        cycles = 0
        for program, call in planned:
            watched = WatchedCall(check, call, self._buffers, symbols, array)
            watched.before()
            alone = _CallList(self.device, PlannedLaunch(program, (call,)))
            try:
                cycles += self._launch(alone, placement, symbols)
            finally:
                self.device.memory.free(alone.address)
            watched.after()
        return cycles

    def _place(
        self,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> _Placement:
        """Where everything is in this call; the last answer if it is in the same places again, as
        in one decode step after another."""
        sizes = [
            self._nbytes(number, symbols) if size < 0 else size
            for number, size in enumerate(self._fixed_sizes)
        ]
        pointers = [each.pointer for each in (*inputs, *outputs) if isinstance(each, TensorArg)]
        wanted = tuple(sizes), tuple(pointers)
        if self._placed_for != wanted or self._placement is None:
            addresses = self._addresses(inputs, outputs, sizes)
            slots, slot_of, base_of = self._slots(addresses, sizes)
            relative = (addresses - base_of).astype(np.uint32)
            self._placement = _Placement(sizes, addresses, slots, slot_of, relative)
            self._placed_for = wanted
        return self._placement

    def _addresses(
        self, inputs: Sequence[TensorArg | int], outputs: Sequence[TensorArg], sizes: list[int]
    ) -> np.ndarray:
        """DRAM address per buffer; 0 for empty ones, which nothing accesses."""
        region = self.executable.region
        addresses = np.zeros(len(self._buffers), np.int64)
        for given, wanted in zip(inputs, region.inputs, strict=True):
            if isinstance(given, TensorArg) and sizes[wanted.view.buffer]:
                addresses[wanted.view.buffer] = self.device.address(given.pointer)
        for given, number in zip(outputs, region.output_buffers(), strict=True):
            if sizes[number]:
                addresses[number] = self.device.address(given.pointer)
        for number, address in self._constants.items():
            addresses[number] = address
        rounded = tuple(_round_up(sizes[buffer]) for buffer, _, _ in self._lifetimes)
        if rounded not in self._plans:
            self._plans[rounded] = plan_arena(
                [(n, *life) for n, (_, *life) in zip(rounded, self._lifetimes, strict=True)]
            )
        offsets, total = self._plans[rounded]
        if total > self._arena[1]:
            self._release_arena()
            try:
                self._arena = (self.device.memory.allocate(total), total)
            except OutOfDeviceMemory as error:
                buffers = [(n, self._buffers[b].name) for b, n in enumerate(sizes)
                           if self._buffers[b].kind == "temporary"]  # fmt: skip
                largest, name = max(buffers)
                raise OutOfDeviceMemory(
                    f"intermediate results of a compiled graph, {len(buffers)} tensors that share "
                    f"{total:,} bytes, the largest {name!r} of {largest:,}: {error}"
                ) from None
        for (buffer, _, _), offset in zip(self._lifetimes, offsets, strict=True):
            addresses[buffer] = self._arena[0] + offset
        return addresses

    def _slots(
        self, addresses: np.ndarray, sizes: list[int]
    ) -> tuple[list[Slot], np.ndarray, np.ndarray]:
        """Slots that cover the used buffers: read-only ones apart, neighbours together."""
        slots: list[Slot] = []
        slot_of = np.zeros(len(addresses), np.uint32)
        base_of = np.zeros(len(addresses), np.int64)
        for writable in (False, True):
            members = [n for n in self._used if sizes[n] and self._writable(n) == writable]
            members.sort(key=lambda number: addresses[number])
            groups: list[list[int]] = []
            for number in members:
                end = int(addresses[number]) + sizes[number]
                if not groups or end - _aligned(addresses[groups[-1][0]]) > MAX_SLOT_BYTES:
                    groups.append([])
                groups[-1].append(number)
            for group in groups:
                base = _aligned(addresses[group[0]])
                size = max(int(addresses[n]) + sizes[n] for n in group) - base
                slot_of[group] = _CALL_LIST_SLOT + 1 + len(slots)
                base_of[group] = base
                slots.append(Slot(base, size, writable=writable))
        return slots, slot_of, base_of

    def _writable(self, number: int) -> bool:
        buffer = self._buffers[number]
        return buffer.kind in ("output", "temporary") or buffer.mutated

    def _nbytes(self, number: int, symbols: Mapping[str, int]) -> int:
        buffer = self._buffers[number]
        return int(buffer.size.evaluate(symbols)) * buffer.itemsize

    def _name(self, slot: int, offset: int, placement: _Placement) -> str | None:
        """The tensor nearest below (slot, offset), for a fault's message."""
        if not 1 <= slot <= len(placement.slots):
            return None
        address = placement.slots[slot - 1].base + offset
        below = [n for n in self._used if placement.addresses[n] <= address]
        if not below:
            return None
        number = max(below, key=lambda n: placement.addresses[n])
        inside = address - int(placement.addresses[number])
        name, size = self._buffers[number].name, placement.sizes[number]
        return f"{name!r} ({size} bytes), byte {inside}"

    def _release_arena(self) -> None:
        if self._arena[1]:
            self.device.memory.free(self._arena[0])
        self._arena = (0, 0)
        self._placed_for = None

    def unload(self) -> None:
        """Give the device memory back; the object must not be used any more."""
        for address in (*self._constants.values(), *(each.address for each in self._lists)):
            self.device.memory.free(address)
        self._release_arena()


def _columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _aligned(address: int) -> int:
    return int(address) // 64 * 64
