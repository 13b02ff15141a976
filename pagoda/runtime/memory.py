"""Device memory: an allocator over the chip's DRAM address range. Addresses only, no bytes."""

from bisect import bisect_left, insort

from pagoda.isa.chip import DRAM_ATOM_BYTES


class OutOfDeviceMemory(MemoryError):
    """No free range of DRAM is large enough."""


class Allocator:
    """Best fit over coalesced free ranges; every address is a multiple of the DRAM atom.

    The lowest address among equally good ranges is taken, so the same sequence of calls gives the
    same addresses.
    """

    def __init__(self, size: int, first: int = 0) -> None:
        """Manages the addresses from `first` (inclusive) to `size` (exclusive)."""
        self.size = size - first
        self.allocated = 0  # bytes handed out, rounded up to atoms
        self.peak = 0
        self._used: dict[int, int] = {}
        self._free: dict[int, int] = {first: size - first}  # start -> bytes
        self._ends: dict[int, int] = {size: first}  # end -> start
        self._by_size: list[tuple[int, int]] = [(size - first, first)]

    def allocate(self, nbytes: int) -> int:
        """Address of `nbytes` bytes (at least one atom). Raises OutOfDeviceMemory."""
        need = max(-(-nbytes // DRAM_ATOM_BYTES), 1) * DRAM_ATOM_BYTES
        place = bisect_left(self._by_size, (need, -1))
        if place == len(self._by_size):
            free = self.size - self.allocated
            largest = self._by_size[-1][0] if self._by_size else 0
            raise OutOfDeviceMemory(
                f"device memory is full: {nbytes:,} bytes asked for, {free:,} of {self.size:,} free"
                f" (largest piece {largest:,}); free tensors, use a smaller batch or sequence, or"
                " choose a chip with more DRAM"
            )
        size, start = self._by_size[place]
        self._remove_free(start)
        if size > need:
            self._add_free(start + need, size - need)
        self._used[start] = need
        self.allocated += need
        self.peak = max(self.peak, self.allocated)
        return start

    def free(self, address: int) -> None:
        """Give back what `allocate` returned. Raises ValueError for any other address."""
        size = self._used.pop(address, None)
        if size is None:
            raise ValueError(
                f"free of address {address:#x}: not the start of a live allocation; "
                "free each allocation exactly once"
            )
        self.allocated -= size
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

    def size_of(self, address: int) -> int:
        """Bytes of the live allocation that starts at `address`."""
        return self._used[address]

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
