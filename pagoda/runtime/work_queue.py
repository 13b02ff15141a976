"""The queue of a device: work that it does while the host goes on.

As a GPU has, a device has two engines, here a thread each: one launches, one copies. Work is ready
when the work before it in its stream is done, and what that stream waits for, and, as between
commands in the chip's own window, all queued work that writes what it uses or uses what it writes.
So no two streams race: results are those of the same calls made one after another.

An engine takes the ready work with the lowest `priority`, among equals what was queued first.
Launches of equal priority do not overtake each other, ready or not: a launch's cycles depend on
whether its code is still there from the one before, so these are the same in every run, too.

Work that fails is told to whoever next waits for its stream, or for memory that it should have
written, once; what depends on it is not run.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from threading import Lock, RLock, Thread
from typing import Any, Literal

from pagoda.runtime.errors import DeviceFault, DeviceLost
from pagoda.runtime.interrupts import held_interrupts

QUEUE_LIMIT = 32  # unfinished works of one chain; who queues one more has to wait
_IDLE_SECONDS = 5.0  # after which an engine's thread ends; the next work starts another

Engine = Literal["launch", "copy"]


@dataclass(frozen=True)
class Uses:
    """Blocks of memory that work reads and writes, each named by the address of its first byte."""

    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


NOTHING = Uses()


@dataclass(frozen=True)
class _Failure:
    work: Work
    error: BaseException


class Work:
    """One work in a chain; without `run` it only marks a place there. clock: see `Stream`."""

    def __init__(
        self,
        chain: Chain | None,
        run: Callable[[], int] | None = None,
        engine: Engine = "launch",
        uses: Uses = NOTHING,
        keep: Any = None,
        where: Callable[[], str] = str,
    ) -> None:
        self.chain, self.run, self.engine, self.uses = chain, run, engine, uses
        self.keep, self.where = keep, where
        self.counts = run is not None
        self.number = 0
        self.finished = False
        self.failure: _Failure | None = None  # why it did not run, or failed; None once told
        self.clock = 0
        self.joins: Work | None = None
        self.waits = 0  # unfinished works that it has to wait for
        self.ready = False
        self.followers: list[Work] = []


class Chain:
    """Works that are done one after another: what a queue has to know of a `Stream`."""

    def __init__(self, queue: Queue, priority: int = 0) -> None:
        self.queue, self.priority = queue, priority
        with queue.lock:
            queue.chains += 1
            self.number = queue.chains
        self.clock = queue.clock
        self.pending = 0  # unfinished works
        self.last: Work | None = None
        self.failure: _Failure | None = None  # the first that nobody was told of yet
        self.dropped = 0  # works that did not run because of it
        self.spoilt: list[Work] = []  # these and the one that failed

    def __str__(self) -> str:
        return f"stream {self.number}"


class Queue:
    """All queued work of a device. clock: cycles of the synchronous work, see `Stream`.

    Ctrl-C may end any wait, and nothing else: what changes the queue holds it back.
    """

    def __init__(self, clock_hz: int) -> None:
        self.clock_hz = clock_hz
        self.clock = 0
        self.chains = 0  # made so far
        self.lock = RLock()  # over everything here, in chains and in works
        self._bells: list[Any] = []  # locks on which threads sleep until some work has ended
        self._pending = 0
        self._number = 0
        self._latest = 0  # the clock of the chain that is furthest
        self._copies: list[tuple[int, int, Work]] = []  # those that are ready
        self._launches: dict[int, deque[Work]] = {}  # by priority, ready or not, as queued
        self._threads: dict[Engine, Thread] = {}
        self._process = os.getpid()
        self._running = 0
        self._closed = False
        self._failed: list[Chain] = []
        # Who writes and reads a block. Finished work leaves, but what failed or was dropped stays
        # as the writer until someone was told.
        self._writer: dict[int, Work] = {}
        self._readers: dict[int, list[Work]] = {}

    # Waiting.

    @property
    def uses_memory(self) -> bool:
        """Whether any block of memory is in use by queued work."""
        return bool(self._writer or self._readers)

    def wait_for(self, uses: Uses) -> None:
        """Wait until the host may do this. Raises what failed of work that it depends on."""
        if self.uses_memory:
            self._require_same_process()
            with self.lock:
                before = self._conflicts(uses)
            self.wait(before)

    def wait(self, works: Iterable[Work]) -> None:
        """Wait until these are finished. Raises what failed of their chains."""
        works = list(works)
        self._sleep_until(lambda: all(work.finished for work in works))
        for work in works:
            if work.failure is not None:
                assert work.chain is not None
                self._tell(work.chain)

    def wait_for_launches(self) -> None:
        """Wait until the launches that are queued now are finished, whatever failed."""
        with self.lock:
            queued = [work for launches in self._launches.values() for work in launches]
        self._sleep_until(lambda: all(work.finished for work in queued))

    def finish(self) -> None:
        """Wait until nothing is queued any more, whatever failed."""
        self._sleep_until(lambda: not self._pending)

    def synchronize(self) -> None:
        """Wait until nothing is queued any more. Raises what failed first and nobody was told."""
        self.finish()
        self.join(self._latest)
        with self.lock:
            first = min(self._failed, key=lambda chain: chain.spoilt[0].number, default=None)
        if first is not None:
            self._tell(first)

    def join(self, clock: int) -> None:
        """The synchronous work goes on no earlier than at this clock."""
        with self.lock:
            self.clock = max(self.clock, clock)

    def advance(self, cycles: int) -> None:
        """Count synchronous work."""
        with self.lock:
            self.clock += cycles

    def _sleep_until(self, over: Callable[[], Any], seconds: float = -1) -> None:
        """Sleep until it is over, as may be whenever work has ended or was queued, or until that
        has not happened for so many seconds."""
        self._require_same_process()
        while True:
            with self.lock:
                if over():
                    return
                bell = Lock()
                bell.acquire()
                self._bells.append(bell)
            if not bell.acquire(timeout=seconds):
                return

    def _ring(self) -> None:
        bells, self._bells = self._bells, []
        for bell in bells:
            bell.release()

    def _tell(self, chain: Chain) -> None:
        """Raise what failed of a chain, which goes on unharmed."""
        self._sleep_until(lambda: not chain.pending)
        with held_interrupts(), self.lock:
            failure, dropped = chain.failure, chain.dropped
            if failure is None:  # another thread was told meanwhile
                return
            for work in chain.spoilt:
                work.failure = work.keep = None
                for block in work.uses.writes:
                    if self._writer.get(block) is work:
                        del self._writer[block]
            chain.failure, chain.dropped, chain.spoilt = None, 0, []
            self._failed.remove(chain)
        raise self._told(chain, failure, dropped)

    def _told(self, chain: Chain, failure: _Failure, dropped: int) -> BaseException:
        error, line = failure.error, failure.work.where()
        text = f"{error}\nIt was queued on {failure.work.chain}" + (f" by {line}" if line else "")
        if failure.work.chain is chain:
            if dropped:
                text += f"\n{_operations(dropped)} queued behind it {_were(dropped)} not run"
            error.args = (text,)
            return error
        dependent = RuntimeError(
            f"{_operations(dropped)} queued on {chain} {_were(dropped)} not run, because work "
            f"before them failed: {text}"
        )
        dependent.__cause__ = error
        return dependent

    def _require_same_process(self) -> None:
        if self._process != os.getpid() and self.chains:
            raise DeviceLost(
                "this process was forked from one that uses streams of the device, and cannot wait "
                "for their work; open the device after the fork (multiprocessing: start method "
                "'spawn')"
            )

    # Queueing.

    def add(self, work: Work) -> None:
        """Queue work on its chain; blocks while the chain has QUEUE_LIMIT unfinished works."""
        chain = work.chain
        assert chain is not None
        while True:
            self._sleep_until(lambda: chain.pending < QUEUE_LIMIT)
            with held_interrupts(), self.lock:
                if chain.pending < QUEUE_LIMIT:  # no other thread was faster
                    self._link(work, chain)
                    return

    def _link(self, work: Work, chain: Chain) -> None:
        self._number += 1
        work.number = self._number
        for other in dict.fromkeys([chain.last, work.joins, *self._conflicts(work.uses)]):
            if other is None:
                continue
            if not other.finished:
                other.followers.append(work)
                work.waits += 1
            elif other.failure is not None:
                self._spoil(work, other.failure)
        chain.pending += 1
        self._pending += 1
        chain.last = work
        for block in work.uses.writes:
            self._writer[block] = work
        for block in work.uses.reads:
            self._readers.setdefault(block, []).append(work)
        if work.counts and work.engine == "launch":
            self._launches.setdefault(chain.priority, deque()).append(work)
        if not work.waits:
            self._release([work])

    def _conflicts(self, uses: Uses) -> list[Work]:
        """Works that come before one with these uses, in the order in which they were queued."""
        found: dict[Work, None] = {}
        for block in (*uses.reads, *uses.writes):
            if block in self._writer:
                found[self._writer[block]] = None
        for block in uses.writes:
            found.update(dict.fromkeys(self._readers.get(block, ())))
        return sorted(found, key=lambda work: work.number)

    @staticmethod
    def _spoil(work: Work, failure: _Failure) -> None:
        """Of several failures the one queued first is told, whichever came first."""
        if work.failure is None or failure.work.number < work.failure.work.number:
            work.failure = failure

    def _release(self, works: list[Work]) -> None:
        """Works that need not wait any more: they go to their engines, or are finished at once."""
        while works:
            work = works.pop(0)
            if work.run is None or work.failure is not None:
                works += self._end(work, 0)
                continue
            work.ready = True
            assert work.chain is not None
            if work.engine == "copy":
                heappush(self._copies, (work.chain.priority, work.number, work))
            if work.engine not in self._threads:
                self._start(work.engine)
        self._ring()

    def _end(self, work: Work, cycles: int) -> list[Work]:
        """Finish a work; returns the works that need not wait any more."""
        chain, work.run = work.chain, None
        assert chain is not None
        if work.joins is not None:
            chain.clock = max(chain.clock, work.joins.clock)
            work.joins = None
        chain.clock += cycles
        work.clock = chain.clock
        self._latest = max(self._latest, work.clock)
        for block in work.uses.reads:
            self._readers[block].remove(work)
            if not self._readers[block]:
                del self._readers[block]
        if work.failure is None:
            work.keep = None
            for block in work.uses.writes:
                if self._writer.get(block) is work:
                    del self._writer[block]
        else:
            if chain.failure is None:
                chain.failure = work.failure
                self._failed.append(chain)
            chain.dropped += work.counts and work.failure.work is not work
            chain.spoilt.append(work)
        if work.counts and work.engine == "launch":
            launches = self._launches[chain.priority]
            launches.remove(work)
            if not launches:
                del self._launches[chain.priority]
        work.finished = True
        chain.pending -= 1
        self._pending -= 1
        freed = []
        for follower in work.followers:
            follower.waits -= 1
            if work.failure is not None:
                self._spoil(follower, work.failure)
            if not follower.waits:
                freed.append(follower)
        work.followers = []
        return freed

    # Engines.

    def _start(self, engine: Engine) -> None:
        if not self._threads:
            atexit.register(self._abandon)
        thread = Thread(target=self._serve, args=(engine,), name=f"pagoda {engine}", daemon=True)
        self._threads[engine] = thread
        thread.start()

    def _serve(self, engine: Engine) -> None:
        while (work := self._next(engine)) is not None:
            cycles = 0
            assert work.run is not None
            try:
                cycles = work.run()
            except BaseException as error:  # noqa: BLE001 - told to whoever waits
                work.failure = _Failure(work, error)
            else:
                work.run = work.keep = None  # its memory is free before anyone hears that it ended
            with self.lock:
                self._running -= 1
                self._release(self._end(work, cycles))
            del work

    def _next(self, engine: Engine) -> Work | None:
        """The next work; None: the thread shall end."""
        self._sleep_until(lambda: self._closed or self._first(engine), _IDLE_SECONDS)
        with self.lock:
            work = None if self._closed else self._first(engine)
            if work is not None:
                if engine == "copy":
                    heappop(self._copies)
                self._running += 1
                return work
            del self._threads[engine]
            if not self._threads and not self._closed:
                atexit.unregister(self._abandon)
            return None

    def _first(self, engine: Engine) -> Work | None:
        """What the engine should take now."""
        if engine == "copy":
            return self._copies[0][-1] if self._copies else None
        for priority in sorted(self._launches):
            work = self._launches[priority][0]
            if work.ready:
                return work
        return None

    def _abandon(self) -> None:
        """The process ends: what runs comes to its end, what is queued is dropped."""
        if self._process != os.getpid():
            return
        with self.lock:
            self._closed = True
            self._ring()
            for chain in self._failed:
                assert chain.failure is not None
                # Others are of this end: the interpreter has closed its thread pools already.
                if isinstance(chain.failure.error, (DeviceFault, DeviceLost, MemoryError)):
                    text = self._told(chain, chain.failure, chain.dropped)
                    print(f"pagoda: queued work failed, and nobody waited: {text}", file=sys.stderr)
        self._sleep_until(lambda: not self._running)


def _operations(count: int) -> str:
    return f"{count} operation{'s' * (count != 1)}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
