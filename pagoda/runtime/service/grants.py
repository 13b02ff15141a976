"""The chip's DRAM, shared out: which bytes each context may use, and how many there are in all.

Contexts have address spaces of their own, each as large as the chip's DRAM. What is shared is the
number of bytes: the grants of all contexts together never exceed the DRAM.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock

from pagoda.runtime.memory import OutOfDeviceMemory

UNIT_BYTES = 2 << 20
_MOST_UNITS = 1 << 20  # of one address space: it is a byte each
_UNKNOWN = 1 << 62
_NO_RANGE = "its address space has no free range so long"


def unit_bytes(dram_bytes: int) -> int:
    """Grants are multiples of this."""
    return max(min(UNIT_BYTES, dram_bytes), dram_bytes // _MOST_UNITS)


class Grants:
    """What one context may use of its address space."""

    def __init__(self, dram_bytes: int) -> None:
        self.unit = unit_bytes(dram_bytes)
        self._size = dram_bytes
        self._owned = bytearray(dram_bytes // self.unit)
        self.held = 0  # bytes

    def add(self, nbytes: int) -> int | None:
        """Start of a new range at the lowest address that fits; None if no range does."""
        count = nbytes // self.unit
        first = self._owned.find(bytes(count))
        if first < 0:
            return None
        self._owned[first : first + count] = b"\1" * count
        self.held += nbytes
        return first * self.unit

    def remove(self, start: int, nbytes: int) -> bool:
        """Whether the range is whole units, at least one, that were granted; they no longer are."""
        if not nbytes or start % self.unit or nbytes % self.unit or not self.hold(start, nbytes):
            return False
        first, count = start // self.unit, nbytes // self.unit
        self._owned[first : first + count] = bytes(count)
        self.held -= nbytes
        return True

    def hold(self, start: int, nbytes: int) -> bool:
        """Whether all bytes of a range are granted; an empty one has none that are not."""
        if start + nbytes > self._size:
            return False
        end = -(-(start + nbytes) // self.unit) if nbytes else 0
        return self._owned.find(0, start // self.unit, end) < 0


class Account:
    """How much of the chip's DRAM is granted, by user. One for all contexts; thread-safe."""

    def __init__(self, dram_bytes: int, available: Callable[[], int]) -> None:
        """available: bytes of memory that the host could still give."""
        self.total = dram_bytes
        self.granted = 0
        self.untouched: Callable[[], int] = lambda: 0  # granted, but not yet taken from the host
        self._available = available
        self._of_user: dict[int, int] = {}
        self._lock = Lock()

    def take(
        self, grants: Grants, nbytes: int, limit: int, user: int, user_limit: int, who: str
    ) -> tuple[int, int]:
        """Grant at least `nbytes` to a context: (start, bytes). Raises OutOfDeviceMemory.

        limit, user_limit: bytes that this context, and all of this user's, may hold.
        """
        size = max(-(-nbytes // grants.unit), 1) * grants.unit
        with self._lock:
            of_user = self._of_user.get(user, 0)
            problem = self._problem(grants.held + size, limit, of_user, size, user_limit)
            start = None if problem else grants.add(size)
            if start is None:
                others = self.granted - grants.held
                raise OutOfDeviceMemory(
                    f"{who} needs {size:,} bytes more of the shared device, but "
                    f"{problem or _NO_RANGE}; it holds {grants.held:,}, others hold {others:,}; "
                    "free tensors, use a smaller batch or sequence, or end other programs"
                )
            self.granted += size
            self._of_user[user] = of_user + size
        return start, size

    def _problem(
        self, wanted: int, limit: int, of_user: int, size: int, user_limit: int
    ) -> str | None:
        """Why `size` bytes more cannot be granted; None: they can."""
        if wanted > limit:
            return f"its limit is {limit:,}"
        if of_user + size > user_limit:
            return f"all programs of its user may hold {user_limit:,} and hold {of_user:,}"
        if self.granted + size > self.total:
            return f"of the chip's {self.total:,} only {self.total - self.granted:,} are free"
        left = self._available() - self.untouched()
        if size > left:
            return f"this computer has only {max(left, 0):,} left for the simulated DRAM"
        return None

    def give_back(self, nbytes: int, user: int) -> None:
        with self._lock:
            self.granted -= nbytes
            self._of_user[user] = self._of_user.get(user, 0) - nbytes


def available_host_bytes() -> int:
    """Memory that Linux could give this process without swapping."""
    free = _numbers(Path("/proc/meminfo")).get("MemAvailable:", _UNKNOWN >> 10) << 10
    for line in _lines(Path("/proc/self/cgroup")):  # a container's or system service's limit
        if line.startswith("0::"):
            group = Path("/sys/fs/cgroup", line[3:].strip().lstrip("/"))
            most = _lines(group / "memory.max")
            if most and most[0].strip().isdigit():
                used = int(_lines(group / "memory.current")[0])
                cached = _numbers(group / "memory.stat").get("inactive_file", 0)
                free = min(free, int(most[0]) - used + cached)
    return free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no such file in this kernel or container
        return []


def _numbers(path: Path) -> dict[str, int]:
    """A file of names and numbers."""
    return {words[0]: int(words[1]) for line in _lines(path) if len(words := line.split()) > 1}
