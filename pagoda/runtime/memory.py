"""Device memory: an allocator over the chip's DRAM address range. Addresses only, no bytes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from threading import Lock
from typing import Protocol

from pagoda.isa.chip import DRAM_ATOM_BYTES

# In units: a grant is a quarter of what there is, but not more; what a client keeps for later use.
_LARGEST_STEP, _KEPT_UNITS = 32, 32


class OutOfDeviceMemory(MemoryError):
    """No free range of DRAM is large enough."""


class Allocator:
    """Best fit over coalesced free ranges; every address is a multiple of the DRAM atom.

    The lowest address among equally good ranges is taken, so the same sequence of calls gives the
    same addresses. Threads may share an allocator, and the garbage collector may free tensors in
    the middle of a call: what is freed while another call is at work joins the free ranges later.
    """

    def __init__(self, size: int, first: int = 0) -> None:
        """Manages the addresses from `first` (inclusive) to `size` (exclusive)."""
        self._prepare(size - first)
        self._add_free(first, size - first)

    def _prepare(self, size: int) -> None:
        self.size = size
        self.allocated = 0  # bytes handed out, rounded up to atoms
        self.peak = 0
        self._used: dict[int, int] = {}
        self._free: dict[int, int] = {}  # start -> bytes
        self._ends: dict[int, int] = {}  # end -> start
        self._by_size: list[tuple[int, int]] = []
        self._freed: deque[tuple[int, int]] = deque()  # not yet among the free ranges
        self._busy = Lock()

    def allocate(self, nbytes: int) -> int:
        """Address of `nbytes` bytes (at least one atom). Raises OutOfDeviceMemory."""
        need = max(-(-nbytes // DRAM_ATOM_BYTES), 1) * DRAM_ATOM_BYTES
        with self._busy:
            self._join_freed()
            place = bisect_left(self._by_size, (need, -1))
            if place == len(self._by_size):
                self._make_room(nbytes, need)
                place = bisect_left(self._by_size, (need, -1))
            size, start = self._by_size[place]
            self._remove_free(start)
            if size > need:
                self._add_free(start + need, size - need)
            self._used[start] = need
            self.allocated += need
            self.peak = max(self.peak, self.allocated)
        return start

    def _make_room(self, nbytes: int, need: int) -> None:
        """Called where no free range has `need` bytes: raises OutOfDeviceMemory."""
        free = self.size - self.allocated
        largest = self._by_size[-1][0] if self._by_size else 0
        raise OutOfDeviceMemory(
            f"device memory is full: {nbytes:,} bytes asked for, {free:,} of {self.size:,} free"
            f" (largest piece {largest:,}); free tensors, use a smaller batch or sequence, or"
            " choose a chip with more DRAM"
        )

    def free(self, address: int) -> None:
        """Give back what `allocate` returned. Raises ValueError for any other address."""
        size = self._used.pop(address, None)
        if size is None:
            raise ValueError(
                f"free of address {address:#x}: not the start of a live allocation; "
                "free each allocation exactly once"
            )
        self._freed.append((address, size))
        if self._busy.acquire(blocking=False):
            try:
                self._join_freed()
            finally:
                self._busy.release()

    def _join_freed(self) -> None:
        while self._freed:
            address, size = self._freed.popleft()
            self.allocated -= size
            self._put_back(address, size)

    def _put_back(self, address: int, size: int) -> tuple[int, int]:
        """Make a range free; returns the free range it is now part of: start and bytes."""
        before = self._ends.get(address)
        if before is not None:
            size += self._free[before]
            self._remove_free(before)
            address = before
        after = self._free.get(address + size)
        if after is not None:
            self._remove_free(address + size)
            size += after
        self._add_free(address, size)
        return address, size

    def size_of(self, address: int) -> int:
        """Bytes of the live allocation that starts at `address`."""
        return self._used[address]

    @property
    def reserved(self) -> int:
        """Bytes that nobody else can have: those handed out, and what is kept for later use."""
        return self.allocated

    def available(self) -> int:
        """Bytes that can still be allocated, though perhaps not in one piece."""
        return self.size - self.allocated

    def give_back(self) -> None:
        """Keep no memory for later use."""

    @property
    def free_ranges(self) -> int:
        """How many pieces free memory is in: 1 is unfragmented."""
        return len(self._free)

    @property
    def largest_free(self) -> int:
        """Bytes of the largest free piece: the most that `allocate` can give now."""
        return self._by_size[-1][0] if self._by_size else 0

    @property
    def fragmentation(self) -> float:
        """Share of free memory that lies outside of its largest piece: 0 is unfragmented."""
        free = sum(self._free.values())
        return 1.0 - self.largest_free / free if free else 0.0

    def _add_free(self, start: int, size: int) -> None:
        self._free[start] = size
        self._ends[start + size] = start
        insort(self._by_size, (size, start))

    def _remove_free(self, start: int) -> None:
        size = self._free.pop(start)
        del self._ends[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]


class Owner(Protocol):
    """Who grants memory to a `GrantedAllocator`: the device service, through a `RemoteMachine`."""

    def grant(self, nbytes: int, released: list[tuple[int, int]]) -> tuple[int, int]:
        """Takes ranges (start, bytes) back and grants a new one, of at least `nbytes`. Raises
        OutOfDeviceMemory, having taken them back all the same."""

    def left(self) -> int:
        """Bytes that are granted to nobody."""

    def release(self, released: list[tuple[int, int]]) -> bool:
        """Takes ranges back; False if it cannot be asked at this moment, and has not."""


class GrantedAllocator(Allocator):
    """An allocator whose addresses an owner grants in units, and takes back when they are free.

    limit: the bytes the owner grants at most.
    """

    def __init__(self, limit: int, unit: int, owner: Owner) -> None:
        self._prepare(limit)
        self._unit, self._owner = unit, owner
        self.granted = 0

    def _make_room(self, nbytes: int, need: int) -> None:
        unit = self._unit
        least = -(-need // unit) * unit
        larger = max(least, min(self.granted // 4, _LARGEST_STEP * unit) // unit * unit)
        released = self._take_free_units()
        try:
            start, size = self._owner.grant(larger, released)
        except OutOfDeviceMemory as error:
            if larger == least:
                raise self._full(nbytes, error) from None
            try:
                start, size = self._owner.grant(least, [])
            except OutOfDeviceMemory as error:
                raise self._full(nbytes, error) from None
        self.granted += size
        self._put_back(start, size)

    @staticmethod
    def _full(nbytes: int, error: OutOfDeviceMemory) -> OutOfDeviceMemory:
        return OutOfDeviceMemory(f"device memory is full: {nbytes:,} bytes asked for: {error}")

    def free(self, address: int) -> None:
        """See `Allocator.free`. Memory goes back to the owner once more is free than in use."""
        super().free(address)
        kept = max(self.allocated, _KEPT_UNITS * self._unit)
        if self.granted - self.allocated > kept:
            self.give_back()

    @property
    def reserved(self) -> int:
        """Bytes granted."""
        return self.granted

    def available(self) -> int:
        """See `Allocator.available`: what others leave, too."""
        return self.granted - self.allocated + min(self.size - self.granted, self._owner.left())

    def give_back(self) -> None:
        """Give all units back in which nothing is allocated, if no call is at work."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            units = self._take_free_units()
            if units and not self._owner.release(units):
                for start, size in units:
                    self.granted += size
                    self._put_back(start, size)
        finally:
            self._busy.release()

    def _take_free_units(self) -> list[tuple[int, int]]:
        """Whole units in which nothing is allocated, as ranges: they leave this allocator."""
        unit, taken = self._unit, []
        for start, size in sorted(self._free.items()):
            first = -(-start // unit) * unit
            end = (start + size) // unit * unit
            if first >= end:
                continue
            self._remove_free(start)
            if start < first:
                self._add_free(start, first - start)
            if end < start + size:
                self._add_free(end, start + size - end)
            taken.append((first, end - first))
            self.granted -= end - first
        return taken
