"""Runs executables on a device: places tensors, fills the call list in, launches once.

What depends on the call (addresses, sizes) is a set of words in a prepared array, patched with
numpy; nothing is interpreted per kernel on the host.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pagoda.compiler.executable import Executable, OffsetWord, SlotWord
from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.link import argument_positions, launch_arguments, pack_records
from pagoda.compiler.region import TensorArg
from pagoda.isa import Result, Slot
from pagoda.isa.program import MAX_SLOT_BYTES
from pagoda.runtime.device import Device
from pagoda.runtime.plan import plan_arena

_CALL_LIST_SLOT = 0


def _round_up(count: int) -> int:
    """To three significant bits, so that a growing sequence seldom needs a new memory plan."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step


class LoadedExecutable:
    """An executable on a device: constants placed, call list allocated, ready to run.

    Raises OutOfDeviceMemory if constants or the call list do not fit.
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
        self._prepare_words()
        self._list_address = device.memory.allocate(self._words.nbytes)
        self._arena = (0, 0)  # address, bytes
        self._plans: dict[tuple[int, ...], tuple[list[int], int]] = {}
        self._size_exprs = [
            (self._buffers[buffer].size, self._buffers[buffer].itemsize)
            for buffer, _, _ in executable.lifetimes
        ]

    def _prepare_words(self) -> None:
        calls = self.executable.calls
        blank = [(call.entry, [0] * len(call.words)) for call in calls]
        self._words = pack_records(blank)
        self._arguments = launch_arguments(_CALL_LIST_SLOT, 0, blank)
        starts = argument_positions([len(call.words) for call in calls])
        slots: list[tuple[int, int]] = []
        offsets: list[tuple[int, int]] = []
        symbolic: dict[Expr, list[int]] = {}
        for call, start in zip(calls, starts, strict=True):
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
                    self._words[position] = word & 0xFFFFFFFF
        self._slot_words = _columns(slots)
        self._offset_words = _columns(offsets)
        self._symbolic = [(e, np.array(at, np.int64)) for e, at in symbolic.items()]
        self._used = sorted({buffer for _, buffer in (*slots, *offsets)})

    def run(
        self,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> Result:
        """One launch. Raises DeviceFault, OutOfDeviceMemory."""
        addresses = self._place(inputs, outputs, symbols)
        slots, slot_of, base_of = self._slots(addresses, symbols)
        words = self._words.copy()
        positions, buffers = self._slot_words
        words[positions] = slot_of[buffers]
        positions, buffers = self._offset_words
        relative = addresses[buffers] - base_of[buffers]
        words[positions] += relative.astype(np.uint32)
        for expression, at in self._symbolic:
            words[at] += np.uint32(expression.evaluate(symbols) & 0xFFFFFFFF)
        self.device.array(self._list_address, words.shape, np.uint32)[...] = words
        call_list = Slot(self._list_address, words.nbytes, writable=False)
        return self.device.launch(
            self.executable.program,
            self._arguments,
            slots=(call_list, *slots),
            tensor_at=lambda slot, offset: self._name(slot, offset, slots, addresses, symbols),
        )

    def _place(
        self,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> np.ndarray:
        """DRAM address per buffer."""
        region = self.executable.region
        addresses = np.zeros(len(self._buffers), np.int64)
        for given, wanted in zip(inputs, region.inputs, strict=True):
            if isinstance(given, TensorArg):
                addresses[wanted.view.buffer] = self.device.address(given.pointer)
        for given, number in zip(outputs, region.output_buffers(), strict=True):
            addresses[number] = self.device.address(given.pointer)
        for number, address in self._constants.items():
            addresses[number] = address
        sizes = tuple(
            _round_up(size.evaluate(symbols) * itemsize) for size, itemsize in self._size_exprs
        )
        if sizes not in self._plans:
            lifetimes = self.executable.lifetimes
            self._plans[sizes] = plan_arena(
                [(n, first, last) for n, (_, first, last) in zip(sizes, lifetimes, strict=True)]
            )
        offsets, total = self._plans[sizes]
        if total > self._arena[1]:
            if self._arena[1]:
                self.device.memory.free(self._arena[0])
            self._arena = (0, 0)
            self._arena = (self.device.memory.allocate(total), total)
        for (buffer, _, _), offset in zip(self.executable.lifetimes, offsets, strict=True):
            addresses[buffer] = self._arena[0] + offset
        return addresses

    def _slots(
        self, addresses: np.ndarray, symbols: Mapping[str, int]
    ) -> tuple[list[Slot], np.ndarray, np.ndarray]:
        """Slots that cover the used buffers: read-only ones apart, neighbours together."""
        slots: list[Slot] = []
        slot_of = np.zeros(len(addresses), np.uint32)
        base_of = np.zeros(len(addresses), np.int64)
        for writable in (False, True):
            members = [n for n in self._used if self._writable(n) == writable]
            members.sort(key=lambda number: addresses[number])
            group: list[int] = []
            for number in [*members, None]:
                if number is not None:
                    end = addresses[number] + self._nbytes(number, symbols)
                    if not group or end - _aligned(addresses[group[0]]) <= MAX_SLOT_BYTES:
                        group.append(number)
                        continue
                if group:
                    base = _aligned(addresses[group[0]])
                    size = max(addresses[m] + self._nbytes(m, symbols) for m in group) - base
                    slot_of[group] = _CALL_LIST_SLOT + 1 + len(slots)
                    base_of[group] = base
                    slots.append(Slot(int(base), int(size), writable=writable))
                group = [] if number is None else [number]
        return slots, slot_of, base_of

    def _writable(self, number: int) -> bool:
        buffer = self._buffers[number]
        return buffer.kind in ("output", "temporary") or buffer.mutated

    def _nbytes(self, number: int, symbols: Mapping[str, int]) -> int:
        buffer = self._buffers[number]
        return buffer.size.evaluate(symbols) * buffer.itemsize

    def _name(
        self,
        slot: int,
        offset: int,
        slots: Sequence[Slot],
        addresses: np.ndarray,
        symbols: Mapping[str, int],
    ) -> str | None:
        """The tensor nearest below (slot, offset), for a fault's message."""
        if not 1 <= slot <= len(slots):
            return None
        address = slots[slot - 1].base + offset
        below = [n for n in self._used if addresses[n] <= address]
        if not below:
            return None
        number = max(below, key=lambda n: addresses[n])
        inside = address - int(addresses[number])
        size = self._nbytes(number, symbols)
        return f"{self._buffers[number].name!r} ({size} bytes), byte {inside}"

    def unload(self) -> None:
        """Give the device memory back."""
        for address in (*self._constants.values(), self._list_address):
            self.device.memory.free(address)
        if self._arena[1]:
            self.device.memory.free(self._arena[0])
        self._constants, self._arena = {}, (0, 0)


def _columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _aligned(address: int) -> int:
    return int(address) // 64 * 64
