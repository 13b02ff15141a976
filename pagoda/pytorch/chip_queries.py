"""What `torch.pagoda` tells of the chip in use: its name and size, memory, and elapsed time.

The names are those of `torch.cuda`. Memory is counted in DRAM bytes, rounded up to the chip's
memory atom for each tensor. Nothing is kept back for later use, so reserved means allocated; only
on a device that is shared, a program reserves more than it has allocated.
"""

from __future__ import annotations

import types
from typing import Any

from pagoda.runtime import Device


class ChipQueries:
    """Mixed into `torch.pagoda`; `_opened` gives the runtime device that tensors lie on."""

    def _opened(self) -> Device:
        raise NotImplementedError

    def get_device_name(self, device: Any = None) -> str:
        """The chip's name, such as "edge"."""
        return self._opened().chip.name

    def get_device_properties(self, device: Any = None) -> types.SimpleNamespace:
        """name, total_memory (bytes), multi_processor_count (cores), clock_rate (kHz), chip."""
        chip = self._opened().chip
        return types.SimpleNamespace(
            name=chip.name,
            total_memory=chip.dram_bytes,
            multi_processor_count=chip.cores,
            clock_rate=chip.clock_hz // 1000,
            chip=chip,
        )

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes of device memory that tensors, and code and constants of kernels, take now."""
        return self._opened().memory.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        """The most bytes taken since the start or `reset_peak_memory_stats`."""
        return self._opened().memory.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory = self._opened().memory
        memory.peak = memory.allocated

    def memory_reserved(self, device: Any = None) -> int:
        return self._opened().memory.reserved

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """(bytes that can still be had, bytes that this program may have at most)."""
        memory = self._opened().memory
        return memory.available(), memory.size

    def memory_stats(self, device: Any = None) -> dict[str, int | float]:
        """The figures above under torch's names; in how many pieces free memory is, bytes of the
        largest, and the share outside of it."""
        memory = self._opened().memory
        return {
            "allocated_bytes.all.current": memory.allocated,
            "allocated_bytes.all.peak": memory.peak,
            "reserved_bytes.all.current": memory.reserved,
            "reserved_bytes.all.peak": memory.peak,
            "free_pieces": memory.free_ranges,
            "largest_free_bytes": memory.largest_free,
            "fragmentation": memory.fragmentation,
        }

    def empty_cache(self) -> None:
        """Give back what is reserved and not allocated: on a shared device, for others."""
        self._opened().memory.give_back()

    def cycles(self) -> int:
        """Cycles that all launches on the chip took so far: its own clock."""
        return self._opened().cycles
