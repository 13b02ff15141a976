"""Where a device's cycles go: per kernel calls, cycles, utilisation, and what engines waited for.

Kernels of one launch overlap: the next one's loads run beside this one's last products. Each cycle
is counted once, for the kernel that was holding things up: a call takes the cycles by which its
last command finishes later than everything before it. So the rows add up to all cycles, and a call
whose work hid entirely behind its neighbours took none. A row's utilisation relates its work to
those cycles, and exceeds 1 where most of it hid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from pagoda.compiler.region import Place
from pagoda.isa.chip import Chip
from pagoda.isa.machine import ENGINES
from pagoda.isa.program import Program
from pagoda.runtime.device import Device, KernelCall, LaunchRecord
from pagoda.runtime.stalls import WAITS, gaps

LAUNCH = "(launch)"  # what no call takes: loading code and the first record, the way out

_DISPATCHER = "dispatcher"


@dataclass(frozen=True)
class Row:
    """One kernel with one origin (the torch operations it came from), over all launches.

    macs, dram_bytes: as the commands name them. busy and stalls: cycles per engine, summed over the
    cores; a stall is the time from the engine being free to the row's next command starting, by
    what that command waited for last (`stalls`).
    """

    kernel: str
    origin: str
    calls: int
    cycles: int
    macs: int
    dram_bytes: int
    matrix_utilisation: float  # of the chip's peak, in these cycles
    dram_utilisation: float  # of the chip's bandwidth, in these cycles
    busy: dict[str, int]
    stalls: dict[str, dict[str, int]]

    def bottleneck(self) -> str:
        """The engine that was busy longest."""
        return max(self.busy, key=self.busy.__getitem__)


@dataclass
class _Sums:
    calls: int = 0
    cycles: int = 0
    macs: int = 0
    dram_bytes: int = 0
    busy: np.ndarray = field(default_factory=lambda: np.zeros(len(ENGINES), np.int64))
    stalls: np.ndarray = field(
        default_factory=lambda: np.zeros((len(ENGINES), len(WAITS)), np.int64)
    )


    def include(self, other: _Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Layer:
    """What the kernels of one layer took. name: its path in the model; empty for code outside of
    all layers. fused: other layers that these kernels compute. dicts stand for ordered sets."""

    name: str
    fused: dict[str, None] = field(default_factory=dict)
    kernels: dict[str, None] = field(default_factory=dict)
    origins: dict[str, None] = field(default_factory=dict)
    calls: int = 0
    cycles: int = 0
    dram_bytes: int = 0


class Profile:
    """Sums over launches; `print` it for a table, or read `rows` or `layers`."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.launches = 0
        self.cycles = 0
        self.layer = ""  # whose launches come now, where kernel calls do not know
        self._sums: dict[KernelCall, _Sums] = {}

    def add(self, record: LaunchRecord) -> None:
        """Count one launch; its result must hold a trace."""
        trace, total = record.result.trace, record.result.cycles
        assert trace is not None, record.program.name
        self.launches += 1
        self.cycles += total
        if record.calls:
            calls, number = record.calls, _call_numbers(trace, record.program)
        else:  # no call list known: the whole program is one call
            calls, number = [KernelCall(record.program.name)], np.zeros(len(trace), np.int64)
        number = np.minimum(number, len(calls) - 1) + 1  # 0: before the first call
        finish = np.zeros(len(calls) + 1, np.int64)
        np.maximum.at(finish, number, trace["finish"])
        cycles = np.diff(np.minimum(np.maximum.accumulate(finish), total))
        counts = [
            np.bincount(number, trace[name], len(calls) + 1).astype(np.int64)
            for name in ("macs", "dram_bytes")
        ]
        busy, stalls = gaps(trace).sums(number, len(calls) + 1)
        outside = self._sums.setdefault(KernelCall(LAUNCH), _Sums())
        outside.calls += 1
        outside.cycles += total - int(cycles.sum())
        _add(outside, 0, counts, busy, stalls)
        for position, call in enumerate(calls):
            call = KernelCall(*call)
            if self.layer and not call.place.layers:
                call = call._replace(place=Place((self.layer,), call.place.lines))
            sums = self._sums.setdefault(call, _Sums())
            sums.calls += 1
            sums.cycles += int(cycles[position])
            _add(sums, position + 1, counts, busy, stalls)

    @property
    def rows(self) -> list[Row]:
        """Kernels, the one with the most cycles first; wherever in the model they are called."""
        merged: dict[tuple[str, str], _Sums] = {}
        for call, sums in self._sums.items():
            merged.setdefault((call.kernel, call.origin), _Sums()).include(sums)
        rows = [self._row(*key, sums) for key, sums in merged.items()]
        return sorted(rows, key=lambda row: (-row.cycles, row.kernel, row.origin))

    @property
    def layers(self) -> list[Layer]:
        """What each layer took, in the order in which they first ran.

        A kernel that several layers share counts for the first of its layers; that of a product
        is the product's.
        """
        found: dict[str, Layer] = {}
        for call, sums in self._sums.items():
            name, *others = call.place.layers or ("",)
            name = call.kernel if call.kernel == LAUNCH else name
            layer = found.setdefault(name, Layer(name))
            layer.fused.update(dict.fromkeys(others))
            layer.kernels.update(dict.fromkeys([call.kernel]))
            layer.origins.update(dict.fromkeys(filter(None, call.origin.split(", "))))
            layer.calls += sums.calls
            layer.cycles += sums.cycles
            layer.dram_bytes += sums.dram_bytes
        return list(found.values())

    def _row(self, kernel: str, origin: str, sums: _Sums) -> Row:
        possible = max(sums.cycles, 1)
        stalls = {
            engine: dict(zip(WAITS, map(int, sums.stalls[n]), strict=True))
            for n, engine in enumerate(ENGINES)
        }
        return Row(
            kernel,
            origin,
            sums.calls,
            sums.cycles,
            sums.macs,
            sums.dram_bytes,
            sums.macs / (possible * self.chip.macs_per_cycle),
            sums.dram_bytes / (possible * float(self.chip.dram_bytes_per_cycle)),
            dict(zip(ENGINES, map(int, sums.busy), strict=True)),
            stalls,
        )

    def __str__(self) -> str:
        microseconds = self.cycles / self.chip.clock_hz * 1e6
        total = (
            f"{self.cycles:,} cycles ({microseconds:,.0f} us) in {self.launches:,} launches on "
            f"{self.chip.name}"
        )
        heading = (
            f"{'cycles':>12} {'share':>6} {'calls':>6} {'matrix':>7} {'DRAM':>6}  "
            f"{'waits of the busiest engine':34} kernel (origin)"
        )
        lines = [total, heading]
        for row in self.rows:
            name = f"{row.kernel} ({_short(row.origin)})" if row.origin else row.kernel
            lines.append(
                f"{row.cycles:12,} {row.cycles / max(self.cycles, 1):6.1%} {row.calls:6,} "
                f"{row.matrix_utilisation:7.1%} {row.dram_utilisation:6.1%}  "
                f"{_waits(row):34} {name}"
            )
        return "\n".join(lines)


@contextmanager
def profile(device: Device) -> Iterator[Profile]:
    """Profile the launches of a device in the `with` block."""
    found = Profile(device.chip)
    with device.tracing(), device.listening(found.add):
        yield found


def _call_numbers(trace: np.ndarray, program: Program) -> np.ndarray:
    """For each command the position in the call list of the call it belongs to, -1 before.

    The dispatcher fetches the first record, then, before each call, the record after it.
    """
    starts = [line.pc for line in program.lines]
    dispatching = np.array([line.kernel == _DISPATCHER for line in program.lines])
    fetch = dispatching[np.searchsorted(starts, trace["pc"], side="right") - 1]
    number = np.zeros(len(trace), np.int64)
    for core in np.unique(trace["core"]):
        own = trace["core"] == core
        number[own] = np.cumsum(fetch[own]) - 2
    return number


def _add(
    sums: _Sums, at: int, counts: list[np.ndarray], busy: np.ndarray, stalls: np.ndarray
) -> None:
    sums.macs += int(counts[0][at])
    sums.dram_bytes += int(counts[1][at])
    sums.busy += busy[at]
    sums.stalls += stalls[at]


def _waits(row: Row) -> str:
    """The two largest stalls of the busiest engine, as shares of its time."""
    engine = row.bottleneck()
    stalls = row.stalls[engine]
    whole = row.busy[engine] + sum(stalls.values())
    largest = sorted(stalls, key=lambda wait: -stalls[wait])[:2]
    shown = [f"{wait} {stalls[wait] / whole:.0%}" for wait in largest if stalls[wait]]
    return f"{engine}: {', '.join(shown) or 'none'}" if whole else ""


def _short(origin: str) -> str:
    return origin if len(origin) <= 40 else origin[:37] + "..."
