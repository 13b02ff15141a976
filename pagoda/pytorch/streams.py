"""Streams and events of `torch.pagoda`, in the terms of `torch.cuda`.

Outside of streams every operation is finished when its call returns, and comes after the operations
of all streams that were queued before. Inside `with torch.pagoda.stream(s):` it is queued to `s`
(`pagoda.runtime.work_queue`) and Python goes on; reading a result waits for it. The gradients of
`backward` are computed in a thread of torch's own, in no stream.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self

import torch

from pagoda.compiler.region import Executor, Region, TensorArg, TensorInput
from pagoda.pytorch.places import user_place
from pagoda.runtime import stream as runtime
from pagoda.runtime.work_queue import Queue, Uses


class _Current(threading.local):
    """Each thread's current stream, None for the default one, and those around its block."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.outer: list[Stream | None] = []


_current = _Current()


def _outside_graphs(cls: type) -> type:
    """Makes Dynamo leave to Python what a function does with streams. Subclasses of torch.Stream
    and torch.Event it would take into its graphs, which are one program and wait for nothing."""
    for name, member in list(vars(cls).items()):
        if isinstance(member, (types.FunctionType, staticmethod)):
            function = getattr(cls, name)
            wrapped = torch._disable_dynamo(function)
            static = isinstance(member, staticmethod)
            setattr(cls, name, staticmethod(wrapped) if static else wrapped)
    return cls


@_outside_graphs
class Stream:
    """`torch.pagoda.Stream(priority=0)`: a queue of operations, of which at most 32 are unfinished;
    one more waits. A lower priority is more urgent. `with stream:` makes it the current one."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self._queue = _open_queue()
        # None: the default stream
        self._queued: runtime.Stream | None = runtime.Stream(self._queue, priority)

    @classmethod
    def _default(cls, queue: Queue) -> Self:
        made = cls.__new__(cls)
        made._queue, made._queued = queue, None
        return made

    @property
    def device(self) -> torch.device:
        return torch.device("pagoda", 0)

    @property
    def stream_id(self) -> int:
        """Its number in the order in which streams were made; 0 is the default stream."""
        return 0 if self._queued is None else self._queued.number

    @property
    def priority(self) -> int:
        return 0 if self._queued is None else self._queued.priority

    def synchronize(self) -> None:
        """Wait until all its work is finished. Raises what failed, as at the operation itself, with
        the line that queued it."""
        if self._queued is not None:
            self._queued.synchronize()

    def query(self) -> bool:
        """Whether all its work is finished."""
        return self._queued is None or self._queued.query()

    def record_event(self, event: Event | None = None) -> Event:
        """Mark what is queued now; returns the event, a new one unless given."""
        event = event if event is not None else Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """What is queued from now on waits for the event; the default stream does so at once."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """What is queued from now on waits for what is queued on the other stream now."""
        self.wait_event(_own(stream).record_event())

    def __enter__(self) -> Self:
        _current.outer.append(_current.stream)
        _current.stream = self
        return self

    def __exit__(self, *exc: object) -> None:
        _current.stream = _current.outer.pop()

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Stream) and self._queue is other._queue
        return same and self.stream_id == other.stream_id  # type: ignore[union-attr]

    def __hash__(self) -> int:
        return hash((id(self._queue), self.stream_id))

    def __repr__(self) -> str:
        return f"<torch.pagoda.Stream {self.stream_id} priority={self.priority}>"


@_outside_graphs
class Event:
    """`torch.pagoda.Event(enable_timing=False)`: a place in a stream, the current one by default.

    blocking changes nothing: waiting never takes processor time. Raises NotImplementedError for
    interprocess.
    """

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        if interprocess:
            raise NotImplementedError(
                "torch.pagoda.Event: interprocess=True is not possible, for each process has "
                "streams of its own; synchronize, then tell the other process"
            )
        self._event = runtime.Event(_open_queue(), enable_timing)

    def record(self, stream: Stream | None = None) -> None:
        self._event.record(_own(stream)._queued)

    def wait(self, stream: Stream | None = None) -> None:
        """What is queued on the stream from now on waits; the default stream does so at once."""
        self._event.wait(_own(stream)._queued)

    def query(self) -> bool:
        """Whether all work before it is finished, or it was never recorded."""
        return self._event.query()

    def synchronize(self) -> None:
        """Wait until all work before it is finished. Raises what failed of its stream."""
        self._event.synchronize()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds of the chip's clock between two events: the cycles of the work between them
        in their stream, so the same in every run. Raises RuntimeError."""
        return self._event.elapsed_time(end_event._event)

    def __repr__(self) -> str:
        return "<torch.pagoda.Event>"


def _own(stream: Any) -> Stream:
    """None is the current stream, torch's generic one for this device the default one."""
    if stream is None:
        return current_stream()
    if isinstance(stream, Stream):
        return stream
    if isinstance(stream, torch.Stream) and stream.device.type == "pagoda":
        return default_stream()
    raise TypeError(
        f"{stream!r} is no stream of device pagoda; make one with torch.pagoda.Stream()"
    )


def current_stream(device: Any = None) -> Stream:
    """This thread's current stream: the default one outside of `stream(s)`."""
    return _current.stream or default_stream()


def default_stream(device: Any = None) -> Stream:
    """The stream without a queue: its operations are finished when their calls return."""
    return Stream._default(_open_queue())


def set_stream(stream: Stream) -> None:
    """Make it this thread's current stream; `with stream(s)` is to be preferred."""
    _current.stream = _own(stream)


def stream(stream: Stream | None) -> AbstractContextManager[Any]:
    """Queue what this thread does in the `with` block to a stream; None changes nothing."""
    return nullcontext() if stream is None else _own(stream)


def synchronize(device: Any = None) -> None:
    """Wait until the work of all streams is finished. Raises what failed and nobody was told."""
    queue = _queue()
    if queue is not None:
        queue.synchronize()


@_outside_graphs
class Streams:
    """Mixed into `torch.pagoda`."""

    Stream, Event = Stream, Event
    current_stream, default_stream = staticmethod(current_stream), staticmethod(default_stream)
    set_stream, stream = staticmethod(set_stream), staticmethod(stream)
    synchronize = staticmethod(synchronize)


# What the rest of this storey does to memory.


def run(
    executor: Executor,
    region: Region,
    inputs: Sequence[TensorArg | int],
    outputs: Sequence[TensorArg],
    symbols: Mapping[str, int],
    tensors: Sequence[Any],
    made: Iterable[torch.Tensor],
) -> None:
    """Run a region, of `tensors` and numbers, with the results `made`: queued to the current
    stream, else when what it depends on is finished. See `Executor.run`."""
    queue: Queue | None = getattr(executor, "queue", None)  # others than a chip's have none
    current = _current.stream
    queued = None if current is None else current._queued
    if queue is None or (queued is None and not queue.uses_memory):
        executor.run(region, inputs, outputs, symbols)
        return
    reads, writes = [], list(made)
    for entry, tensor in zip(region.inputs, tensors, strict=True):
        if isinstance(entry, TensorInput):
            (writes if region.buffers[entry.view.buffer].mutated else reads).append(tensor)
    uses = Uses(_blocks(reads), _blocks(writes))
    if current is not None:
        _require(current, queue)
    if queued is None or executor.device.anomaly is not None:  # which stops at the line itself
        if queued is not None:
            queued.synchronize()
        queue.wait_for(uses)
        queue.wait_for_launches()
        executor.run(region, inputs, outputs, symbols)
        return
    loaded = executor.load(region, inputs, symbols)
    keep = [tensor.untyped_storage() for tensor in (*reads, *writes)]
    work = partial(loaded.run, inputs, outputs, symbols)
    queued.submit(work, "launch", uses, keep, user_place())


def queue_copy(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Queue the copy of bytes to the current stream; False: there is none, so it was not done."""
    from pagoda.pytorch.storage import raw_alias

    current = _current.stream
    if current is None or current._queued is None:
        return False
    _require(current, _open_queue())
    to, of = raw_alias(target), raw_alias(source).detach()

    def copy() -> int:
        with torch.no_grad():
            to.copy_(of)
        return 0

    keep = [target.untyped_storage(), source.untyped_storage()]
    uses = Uses(_blocks([source]), _blocks([target]))
    current._queued.submit(copy, "copy", uses, keep, user_place())
    return True


def wait_for(tensor: torch.Tensor, writes: bool) -> None:
    """Wait until the host may read, or write, the tensor's memory. Raises what failed of queued
    work that should have written it."""
    queue = _queue()
    if queue is not None and queue.uses_memory:
        blocks = _blocks([tensor])
        queue.wait_for(Uses((), blocks) if writes else Uses(blocks))


def _blocks(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return tuple({s.data_ptr(): None for s in storages if s.nbytes()})


def _queue() -> Queue | None:
    """The queue of the chip in use, if one is open."""
    from pagoda.pytorch import device

    return getattr(device.state.executor, "queue", None)


def _open_queue() -> Queue:
    from pagoda.pytorch import device

    return device.opened().queue


def _require(stream: Stream, queue: Queue) -> None:
    if stream._queue is not queue:
        raise RuntimeError(
            f"{stream!r} belongs to the chip that was in use before the last use_chip; make a new "
            "one with torch.pagoda.Stream()"
        )
