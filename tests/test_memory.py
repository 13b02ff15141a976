"""The device allocator: alignment, coalescing, exhaustion, and a model check over random calls."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.runtime.memory import Allocator, OutOfDeviceMemory


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
def test_live_allocations_never_overlap_and_nothing_leaks(requests, random):
    allocator = Allocator(8192, first=64)
    live: dict[int, int] = {}
    for request in requests:
        if request is None and live:
            address = random.choice(sorted(live))
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
