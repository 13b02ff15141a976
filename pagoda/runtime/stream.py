"""Streams and events over the queue of a device (`work_queue`), as programs use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pagoda.runtime.work_queue import NOTHING, Chain, Engine, Queue, Uses, Work


class Stream(Chain):
    """Work that is done in the order in which it was queued. Threads may share a stream.

    clock: cycles of the work done so far, from where the synchronous work's clock stood when the
    stream was made; a stream that waits for an event goes on at the event's clock, if that is
    later. So clocks depend on nothing but what the program queues, in which order. priority: the
    lower number is more urgent.
    """

    def submit(
        self,
        run: Callable[[], int],
        engine: Engine = "launch",
        uses: Uses = NOTHING,
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
        elif self._mark.chain is not stream:
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
