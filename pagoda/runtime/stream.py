"""Queued work: streams that a device runs in order while the host goes on, and events.

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
from threading import Condition, Thread
from typing import Any, Literal

from pagoda.runtime.errors import DeviceFault, DeviceLost

QUEUE_LIMIT = 32  # unfinished works of one stream; who queues one more has to wait
_IDLE_SECONDS = 5.0  # after which an engine's thread ends; the next work starts another

Engine = Literal["launch", "copy"]


@dataclass(frozen=True)
class Uses:
    """Blocks of memory that work reads and writes, each named by the address of its first byte."""

    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Failure:
    work: Work
    error: BaseException


class Work:
    """One work in a stream; without `run` it only marks a place there. clock: see `Stream`."""

    def __init__(
        self,
        stream: Stream | None,
        run: Callable[[], int] | None = None,
        engine: Engine = "launch",
        uses: Uses = Uses(),
        keep: Any = None,
        where: Callable[[], str] = str,
    ) -> None:
        self.stream, self.run, self.engine, self.uses = stream, run, engine, uses
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


class Stream:
    """Work that is done in the order in which it was queued. Threads may share a stream.

    clock: cycles of the work done so far, from where the synchronous work's clock stood when the
    stream was made; a stream that waits for an event goes on at the event's clock, if that is
    later. So clocks depend on nothing but what the program queues, in which order.
    """

    def __init__(self, queue: Queue, priority: int = 0) -> None:
        """priority: a lower number is more urgent."""
        self.queue, self.priority = queue, priority
        with queue.changed:
            queue.streams += 1
            self.number = queue.streams
        self.clock = queue.clock
        self.pending = 0  # unfinished works
        self.last: Work | None = None
        self.failure: _Failure | None = None  # the first that nobody was told of yet
        self.dropped = 0  # works that did not run because of it
        self.spoilt: list[Work] = []  # these and the one that failed

    def submit(
        self,
        run: Callable[[], int],
        engine: Engine = "launch",
        uses: Uses = Uses(),
        keep: Any = None,
        where: Callable[[], str] = str,
    ) -> None:
        """Queue `run`, which returns the cycles it took; blocks while the queue is full.

        keep: what must live until it is done. where: says which line queued it, for messages.
        """
        self.queue.add(Work(self, run, engine, uses, keep, where))

    def mark(self, after: Work | None = None) -> Work:
        """A mark behind what is queued now, which `after`, of another stream, is done before."""
        mark = Work(self)
        mark.joins = after
        self.queue.add(mark)
        return mark

    def query(self) -> bool:
        """Whether everything queued is finished."""
        return not self.pending

    def synchronize(self) -> None:
        """Wait until everything queued is finished. Raises what failed."""
        self.queue.wait(filter(None, [self.last]))
        self.queue.join(self.clock)

    def __str__(self) -> str:
        return f"stream {self.number}"


class Event:
    """A place in a stream. Where a stream is asked for, None is the synchronous work."""

    def __init__(self, queue: Queue, enable_timing: bool = False) -> None:
        self.queue, self.enable_timing = queue, enable_timing
        self._mark: Work | None = None

    def record(self, stream: Stream | None) -> None:
        """Mark what is queued on the stream now; an earlier mark is forgotten."""
        if stream is not None:
            self._mark = stream.mark()
            return
        mark = Work(None)
        mark.finished, mark.clock = True, self.queue.clock
        self._mark = mark

    def wait(self, stream: Stream | None) -> None:
        """What is queued on the stream from now on waits for the event; None: so does the host.
        An event that was never recorded is no reason to wait."""
        if self._mark is None:
            return
        if stream is None:
            self.synchronize()
        elif self._mark.stream is not stream:
            stream.mark(self._mark)

    def query(self) -> bool:
        """Whether all work before it is finished."""
        return self._mark is None or self._mark.finished

    def synchronize(self) -> None:
        """Wait until all work before it is finished. Raises what failed of its stream."""
        if self._mark is not None:
            self.queue.wait([self._mark])
            self.queue.join(self._mark.clock)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds of the chip's clock from this event to `end`. Raises RuntimeError."""
        for name, event in (("the event", self), ("the end event", end)):
            if not event.enable_timing:
                raise RuntimeError(
                    f"elapsed_time: {name} keeps no time; make both with enable_timing=True"
                )
            if event._mark is None:
                raise RuntimeError(f"elapsed_time: {name} was not recorded; record both first")
            if not event._mark.finished:
                raise RuntimeError(
                    f"elapsed_time: work before {name} is not finished; call synchronize() first"
                )
        assert self._mark is not None and end._mark is not None
        return (end._mark.clock - self._mark.clock) / self.queue.clock_hz * 1e3


class Queue:
    """All queued work of a device. clock: cycles of the synchronous work, see `Stream`."""

    def __init__(self, clock_hz: int) -> None:
        self.clock_hz = clock_hz
        self.clock = 0
        self.streams = 0  # made so far
        self.changed = Condition()  # over everything here and in streams and works
        self._pending = 0
        self._number = 0
        self._latest = 0  # the clock of the stream that is furthest
        self._copies: list[tuple[int, int, Work]] = []  # those that are ready
        self._launches: dict[int, deque[Work]] = {}  # by priority, ready or not, as queued
        self._threads: dict[Engine, Thread] = {}
        self._process = os.getpid()
        self._running = 0
        self._closed = False
        self._failed: list[Stream] = []
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
            with self.changed:
                before = self._conflicts(uses)
            self.wait(before)

    def wait(self, works: Iterable[Work]) -> None:
        """Wait until these are finished. Raises what failed of their streams."""
        self._require_same_process()
        works = list(works)
        with self.changed:
            for work in works:
                while not work.finished:
                    self.changed.wait()
            for work in works:
                if work.failure is not None:
                    assert work.stream is not None
                    self._raise(work.stream)

    def wait_for_launches(self) -> None:
        """Wait until the launches that are queued now are finished, whatever failed."""
        self._require_same_process()
        with self.changed:
            for work in [work for launches in self._launches.values() for work in launches]:
                while not work.finished:
                    self.changed.wait()

    def finish(self) -> None:
        """Wait until nothing is queued any more, whatever failed."""
        if self._pending:
            self._require_same_process()
            with self.changed:
                while self._pending:
                    self.changed.wait()

    def synchronize(self) -> None:
        """Wait until nothing is queued any more. Raises what failed first and nobody was told."""
        self.finish()
        with self.changed:
            self.join(self._latest)
            if self._failed:
                self._raise(min(self._failed, key=lambda stream: stream.spoilt[0].number))

    def join(self, clock: int) -> None:
        """The synchronous work goes on no earlier than at this clock."""
        with self.changed:
            self.clock = max(self.clock, clock)

    def advance(self, cycles: int) -> None:
        """Count synchronous work."""
        with self.changed:
            self.clock += cycles

    def _raise(self, stream: Stream) -> None:
        """Tell what failed of a stream, which goes on unharmed."""
        while stream.pending:
            self.changed.wait()
        failure, dropped = stream.failure, stream.dropped
        if failure is None:  # another thread was told meanwhile
            return
        error = self._told(stream, failure, dropped)
        for work in stream.spoilt:
            work.failure = work.keep = None
            for block in work.uses.writes:
                if self._writer.get(block) is work:
                    del self._writer[block]
        stream.failure, stream.dropped, stream.spoilt = None, 0, []
        self._failed.remove(stream)
        raise error

    def _told(self, stream: Stream, failure: _Failure, dropped: int) -> BaseException:
        error, line = failure.error, failure.work.where()
        text = f"{error}\nIt was queued on {failure.work.stream}" + (f" by {line}" if line else "")
        if failure.work.stream is stream:
            if dropped:
                text += f"\n{_operations(dropped)} queued behind it {_were(dropped)} not run"
            error.args = (text,)
            return error
        dependent = RuntimeError(
            f"{_operations(dropped)} queued on {stream} {_were(dropped)} not run, because work "
            f"before them failed: {text}"
        )
        dependent.__cause__ = error
        return dependent

    def _require_same_process(self) -> None:
        if self._process != os.getpid() and self.streams:
            raise DeviceLost(
                "this process was forked from one that uses streams of the device, and cannot wait "
                "for their work; open the device after the fork (multiprocessing: start method "
                "'spawn')"
            )

    # Queueing.

    def add(self, work: Work) -> None:
        """Queue work on its stream; blocks while the stream has QUEUE_LIMIT unfinished works."""
        self._require_same_process()
        stream = work.stream
        assert stream is not None
        with self.changed:
            while stream.pending >= QUEUE_LIMIT:
                self.changed.wait()
            self._number += 1
            work.number = self._number
            before = [stream.last, work.joins, *self._conflicts(work.uses)]
            for other in dict.fromkeys(before):
                if other is None:
                    continue
                if not other.finished:
                    other.followers.append(work)
                    work.waits += 1
                elif other.failure is not None:
                    self._spoil(work, other.failure)
            stream.pending += 1
            self._pending += 1
            stream.last = work
            for block in work.uses.writes:
                self._writer[block] = work
            for block in work.uses.reads:
                self._readers.setdefault(block, []).append(work)
            if work.run is not None and work.engine == "launch":
                self._launches.setdefault(stream.priority, deque()).append(work)
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
            if work.engine == "copy":
                heappush(self._copies, (work.stream.priority, work.number, work))
            if work.engine not in self._threads:
                self._start(work.engine)
        self.changed.notify_all()

    def _end(self, work: Work, cycles: int) -> list[Work]:
        """Finish a work; returns the works that need not wait any more."""
        stream, work.run = work.stream, None
        assert stream is not None
        if work.joins is not None:
            stream.clock = max(stream.clock, work.joins.clock)
            work.joins = None
        stream.clock += cycles
        work.clock = stream.clock
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
            if stream.failure is None:
                stream.failure = work.failure
                self._failed.append(stream)
            stream.dropped += work.counts and work.failure.work is not work
            stream.spoilt.append(work)
        if work.counts and work.engine == "launch":
            launches = self._launches[stream.priority]
            launches.remove(work)
            if not launches:
                del self._launches[stream.priority]
        work.finished = True
        stream.pending -= 1
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
            with self.changed:
                self._running -= 1
                self._release(self._end(work, cycles))
            del work

    def _next(self, engine: Engine) -> Work | None:
        """The next work; None: the thread shall end."""
        take = self._next_launch if engine == "launch" else self._next_copy
        with self.changed:
            told = True
            while not self._closed:
                work = take()
                if work is not None:
                    self._running += 1
                    return work
                if not told:
                    del self._threads[engine]
                    if not self._threads:
                        atexit.unregister(self._abandon)
                    return None
                told = self.changed.wait(_IDLE_SECONDS)
            return None

    def _next_copy(self) -> Work | None:
        return heappop(self._copies)[-1] if self._copies else None

    def _next_launch(self) -> Work | None:
        for priority in sorted(self._launches):
            first = self._launches[priority][0]
            if first.ready:
                return first
        return None

    def _abandon(self) -> None:
        """The process ends: what runs comes to its end, what is queued is dropped."""
        if self._process != os.getpid():
            return
        with self.changed:
            self._closed = True
            self.changed.notify_all()
            for stream in self._failed:
                assert stream.failure is not None
                # Others are of this end: the interpreter has closed its thread pools already.
                if isinstance(stream.failure.error, (DeviceFault, DeviceLost, MemoryError)):
                    text = self._told(stream, stream.failure, stream.dropped)
                    print(f"pagoda: queued work failed, and nobody waited: {text}", file=sys.stderr)
            while self._running:
                self.changed.wait()


def _operations(count: int) -> str:
    return f"{count} operation{'s' * (count != 1)}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
