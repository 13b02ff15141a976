"""The window rule: when each command of a core starts.

Commands enter in program order and join their engine's queue. The head of a queue is *ready* in
cycle c when all of this holds:

    entry      c is at least START_AFTER_ENTRY cycles after its entry
    engine     the engine's previous command has freed it; on the vector engine, whose commands
               differ in tail, c + tail is also no earlier than that command's finish: results
               leave the pipeline in order
    hazard     every older command whose ranges conflict with its own has finished by c (one of
               the two writes bytes that the other reads or writes; hulls, physical addresses)
    DRAM port  load, store, gather, scatter: the previous of them has freed the port
    bank port  no command of another engine that has started but not finished holds a read port
               or a write port of SRAM or ACC that it needs

In each cycle at most one command starts: the oldest ready head. So a younger command overtakes an
older one of another engine that is not ready.

`Window` works this out event by event. A later entry can delay an earlier command (by starting
first and taking its ports), so it commits starts only up to the cycle that the control core has
reached; while the control core waits, nothing else can enter and it may look ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.isa.access import Range
from pagoda.isa.chip import Chip
from pagoda.isa.machine import CAUSES, ENGINES
from pagoda.isa.timing import START_AFTER_ENTRY, Duration

DMA_ENGINES = ("load", "store")
IN_ORDER = "vector"  # the engine whose commands differ in tail
_UNKNOWN = 1 << 62  # a cycle later than any: it depends on a command that has not started


@dataclass
class Entry:
    """One command in the window; `start`, `free`, `finish` are set when it starts."""

    index: int
    engine: str
    duration: Duration
    reads: list[Range]
    writes: list[Range]
    read_ports: int
    write_ports: int
    entry: int = -1
    start: int = -1
    free: int = -1
    finish: int = _UNKNOWN
    cause: str = ""

    @property
    def started(self) -> bool:
        return self.start >= 0

    def conflicts(self, younger: Entry) -> bool:
        """True when the younger command has to wait for this one to finish."""
        return any(
            mine.overlaps(yours)
            for mines, yours_all in (
                (self.writes, younger.reads),
                (self.writes, younger.writes),
                (self.reads, younger.writes),
            )
            for mine in mines
            for yours in yours_all
        )

    def shares_port(self, other: Entry) -> bool:
        return bool(self.read_ports & other.read_ports or self.write_ports & other.write_ports)


class Window:
    """The commands in flight on one core. Cycles given to its methods never go back."""

    def __init__(self, chip: Chip):
        self.chip = chip
        self.entries: list[Entry] = []  # oldest first; the finished are dropped when it is safe
        self._next_cycle = 0  # the first cycle in which a start is still possible
        self._engine_free = dict.fromkeys(ENGINES, 0)
        self._results_free = 0  # last finish on the vector engine
        self._dram_port_free = 0
        self._last_finish = 0

    # What the control core asks. Each call says that nothing enters before it returns.

    def enter(self, entry: Entry, cycle: int) -> None:
        """The command enters in `cycle`, in which the window has space."""
        self._advance(cycle)
        entry.entry = cycle
        self.entries.append(entry)

    def space(self, cycle: int) -> int:
        """The first cycle from `cycle` on with fewer than `chip.window` unfinished entries."""
        self._advance(cycle)
        unfinished = [entry for entry in self.entries if entry.finish > cycle]
        if len(unfinished) < self.chip.window:
            return cycle
        # Nothing enters before the first finish: starts up to then may be committed.
        while True:
            first_finish = min(entry.finish for entry in unfinished)
            start, entry = self._next_start()
            if entry is None or start >= first_finish:
                return first_finish
            self._start(entry, start)

    def written(self, what: Range, cycle: int) -> int:
        """The first cycle from `cycle` on in which no command in flight will still write `what`."""
        writers = [e for e in self.entries if any(what.overlaps(r) for r in e.writes)]
        self._run(writers)
        return max([cycle, *(entry.finish for entry in writers)])

    def drain(self) -> int:
        """The cycle in which the last command so far finishes; 0 if there was none."""
        self._run(self.entries)
        return self._last_finish

    # The rule.

    def _heads(self) -> list[Entry]:
        """The oldest unstarted command of every engine, oldest first."""
        heads: dict[str, Entry] = {}
        for entry in self.entries:
            if not entry.started:
                heads.setdefault(entry.engine, entry)
        return list(heads.values())

    def _conditions(self, head: Entry) -> dict[str, int]:
        """Condition -> the first cycle in which it holds, if no other command starts before."""
        hazards = [
            older.finish
            for older in self.entries
            if older.index < head.index and older.conflicts(head)
        ]
        ports = [
            other.finish
            for other in self.entries
            if other.started and other.engine != head.engine and other.shares_port(head)
        ]
        engine = self._engine_free[head.engine]
        if head.engine == IN_ORDER:
            engine = max(engine, self._results_free - head.duration.tail)
        return {
            "entry": head.entry + START_AFTER_ENTRY,
            "engine": engine,
            "hazard": max(hazards, default=0),
            "dram port": self._dram_port_free if head.engine in DMA_ENGINES else 0,
            "bank port": max(ports, default=0),
        }

    def _next_start(self) -> tuple[int, Entry | None]:
        """The next cycle in which a command starts, and which, if nothing else enters."""
        found: tuple[int, Entry | None] = (_UNKNOWN, None)
        for head in self._heads():
            cycle = max(self._next_cycle, *self._conditions(head).values())
            if cycle < found[0]:
                found = cycle, head
        return found

    def _start(self, entry: Entry, cycle: int) -> None:
        late = [name for name, first in self._conditions(entry).items() if first == cycle]
        entry.cause = late[0] if late else CAUSES[-1]
        entry.start = cycle
        entry.free = cycle + entry.duration.occupancy_from(self.chip, cycle)
        entry.finish = entry.free + entry.duration.tail
        self._engine_free[entry.engine] = entry.free
        if entry.engine in DMA_ENGINES:
            self._dram_port_free = entry.free
        if entry.engine == IN_ORDER:
            self._results_free = entry.finish
        self._last_finish = max(self._last_finish, entry.finish)
        self._next_cycle = cycle + 1

    def _advance(self, cycle: int) -> None:
        """Commit every start in cycles up to `cycle`."""
        while True:
            start, entry = self._next_start()
            if entry is None or start > cycle:
                break
            self._start(entry, start)
        self._next_cycle = max(self._next_cycle, cycle + 1)
        self.entries = [entry for entry in self.entries if entry.finish > cycle]

    def _run(self, wanted: list[Entry]) -> None:
        """Commit starts, in however late cycles, until all of these have started."""
        while not all(entry.started for entry in wanted):
            start, entry = self._next_start()
            self._start(entry, start)
