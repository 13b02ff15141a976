"""The device allocator: alignment, coalescing, exhaustion, and a model check over random calls."""

import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.runtime.memory import Allocator, GrantedAllocator, OutOfDeviceMemory


def test_addresses_are_aligned_and_apart():
    allocator = Allocator(4096)
    assert [allocator.allocate(n) for n in (1, 64, 65, 0)] == [0, 64, 128, 256]
    assert allocator.allocated == 64 + 64 + 128 + 64


def test_freed_neighbours_join():
    allocator = Allocator(3 * 64)
    a, b, c = (allocator.allocate(64) for _ in range(3))
    for address in (a, c, b):
        allocator.free(address)
    assert allocator.free_ranges == 1
    assert allocator.allocate(3 * 64) == 0


def test_fragmentation_is_free_memory_outside_its_largest_piece():
    allocator = Allocator(10 * 64)
    places = [allocator.allocate(64) for _ in range(10)]
    assert (allocator.largest_free, allocator.fragmentation) == (0, 0.0)
    for n in (0, 2, 3, 4):
        allocator.free(places[n])
    assert (allocator.free_ranges, allocator.largest_free) == (2, 3 * 64)
    assert allocator.fragmentation == 0.25
    allocator.free(places[1])
    assert (allocator.free_ranges, allocator.fragmentation) == (1, 0.0)


def test_best_fit_keeps_large_ranges_whole():
    allocator = Allocator(10 * 64)
    hole = allocator.allocate(64)
    allocator.allocate(64)
    allocator.free(hole)
    assert allocator.allocate(64) == hole


def test_full_memory():
    allocator = Allocator(1024)
    allocator.allocate(900)
    message = (
        "device memory is full: 200 bytes asked for, 64 of 1,024 free (largest piece 64); free "
        "tensors, use a smaller batch or sequence, or choose a chip with more DRAM"
    )
    with pytest.raises(OutOfDeviceMemory, match=re.escape(message) + "$"):
        allocator.allocate(200)
    assert allocator.allocate(64) == 960


def test_double_free():
    allocator = Allocator(1024)
    address = allocator.allocate(64)
    allocator.free(address)
    message = (
        "free of address 0x0: not the start of a live allocation; "
        "free each allocation exactly once"
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        allocator.free(address)


@given(st.lists(st.one_of(st.integers(0, 700), st.none()), max_size=80), st.randoms())
def test_live_allocations_never_overlap_and_nothing_leaks(requests, draw):
    allocator = Allocator(8192, first=64)
    live: dict[int, int] = {}
    for request in requests:
        if request is None and live:
            address = draw.choice(sorted(live))
            del live[address]
            allocator.free(address)
        elif request is not None:
            try:
                live[allocator.allocate(request)] = max(request, 1)
            except OutOfDeviceMemory:
                assert sum(-(-n // 64) * 64 for n in live.values()) + request > 0
        ordered = sorted(live.items())
        for (start, size), (following, _) in itertools.pairwise(ordered):
            assert start + size <= following
        assert all(start >= 64 and start + size <= 8192 for start, size in ordered)
    for address in live:
        allocator.free(address)
    assert allocator.allocated == 0
    assert allocator.free_ranges == 1


@pytest.mark.parametrize("operations", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_operations_against_a_map_of_all_atoms(operations):
    """Best fit, coalescing, refusals and sums after every operation, against an oracle that knows
    of each atom only whether it is in use; and nothing leaks."""
    atoms = 2048
    draw = random.Random(operations)
    allocator = Allocator(atoms * 64)
    used = np.zeros(atoms, bool)
    live: list[tuple[int, int]] = []  # first atom, atoms
    refused = 0
    for step in range(operations):
        # The load swings, so that memory is nearly full, then nearly empty.
        if live and draw.random() < (0.35 if step // 3000 % 2 else 0.6):
            place = draw.randrange(len(live))
            live[place], live[-1] = live[-1], live[place]
            first, count = live.pop()
            assert allocator.size_of(first * 64) == count * 64
            allocator.free(first * 64)
            used[first : first + count] = False
        else:
            nbytes = int(64 * draw.choice((1, 4, 40)) * draw.random() ** 2 * 5)
            count = max(-(-nbytes // 64), 1)
            starts, sizes = free_pieces(used)
            fitting = sizes >= count
            if fitting.any():
                best = starts[fitting][np.argmin(sizes[fitting])]  # the lowest among equals
                assert allocator.allocate(nbytes) == best * 64
                used[best : best + count] = True
                live.append((int(best), count))
            else:
                refused += 1
                with pytest.raises(OutOfDeviceMemory):
                    allocator.allocate(nbytes)
        _, sizes = free_pieces(used)
        largest = int(sizes.max(initial=0))
        assert allocator.free_ranges == len(sizes)
        assert allocator.largest_free == 64 * largest
        assert allocator.allocated == 64 * np.count_nonzero(used)
    assert refused > operations / 1000
    for first, _ in live:
        allocator.free(first * 64)
    assert (allocator.allocated, allocator.free_ranges) == (0, 1)
    assert allocator.largest_free == atoms * 64


def free_pieces(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of the runs that are not in use, in atoms."""
    edges = np.flatnonzero(np.diff(used, prepend=True, append=True))
    return edges[::2], edges[1::2] - edges[::2]


class _Owner:
    """Grants the lowest free units of `units`; remembers what it is asked."""

    def __init__(self, units: int) -> None:
        self.free = [True] * units
        self.busy = False

    def grant(self, nbytes: int, released: list[tuple[int, int]]) -> tuple[int, int]:
        self._take(released)
        count = -(-nbytes // UNIT)
        for first in range(len(self.free) - count + 1):
            if all(self.free[first : first + count]):
                self.free[first : first + count] = [False] * count
                return first * UNIT, count * UNIT
        raise OutOfDeviceMemory(f"{nbytes} bytes are too many")

    def release(self, released: list[tuple[int, int]]) -> bool:
        if not self.busy:
            self._take(released)
        return not self.busy

    def left(self) -> int:
        return sum(self.free) * UNIT

    def _take(self, released: list[tuple[int, int]]) -> None:
        for start, size in released:
            first, count = start // UNIT, size // UNIT
            assert not any(self.free[first : first + count])
            self.free[first : first + count] = [True] * count


UNIT = 1024


@given(st.lists(st.one_of(st.integers(0, 6 * UNIT), st.none()), max_size=60), st.randoms())
def test_granted_memory_is_used_once_and_given_back(requests, random):
    owner = _Owner(24)
    allocator = GrantedAllocator(24 * UNIT, UNIT, owner)
    live: dict[int, int] = {}
    for request in requests:
        owner.busy = random.random() < 0.3
        if request is None:
            if live:
                address = random.choice(sorted(live))
                del live[address]
                allocator.free(address)
        else:
            try:
                address = allocator.allocate(request)
            except OutOfDeviceMemory as full:
                assert f"{request:,} bytes asked for" in str(full)
                continue
            live[address] = max(-(-request // 64), 1) * 64
        for start, size in live.items():
            first, last = start // UNIT, (start + size - 1) // UNIT
            assert not any(owner.free[first : last + 1])  # granted
        ordered = sorted(live.items())
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ordered))
        assert allocator.granted == 24 * UNIT - owner.left()
        assert allocator.allocated == sum(live.values())
    owner.busy = False
    for address in list(live):
        allocator.free(address)
    allocator.give_back()
    assert owner.left() == 24 * UNIT
    assert allocator.granted == allocator.allocated == 0
