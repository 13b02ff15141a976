"""Queued work without a chip: order, conflicts, priorities, limits, failures, clocks, the end."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from pagoda.runtime import DeviceLost
from pagoda.runtime.stream import Event, Stream
from pagoda.runtime.work_queue import QUEUE_LIMIT, Queue, Uses

SECONDS = 60.0  # a test that waits so long has failed


class Gate:
    """Work that stands still until the gate is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> int:
        self.reached.set()
        assert self.opened.wait(SECONDS)
        return 0


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def queue() -> Queue:
    return Queue(clock_hz=1000)


class Log(list):
    """What was done, in order."""

    def note(self, what: object, cycles: int = 0):
        def run() -> int:
            self.append(what)
            return cycles

        return run


def fail(text: str = "it broke"):
    def run() -> int:
        raise ValueError(text)

    return run


def test_a_stream_is_in_order_and_the_host_goes_on(queue: Queue, gate: Gate) -> None:
    stream, log = Stream(queue), Log()
    stream.submit(gate)
    for number in range(10):
        stream.submit(log.note(number), "launch" if number % 2 else "copy")
    assert log == [] and not stream.query()
    gate.opened.set()
    stream.synchronize()
    assert log == list(range(10)) and stream.query()


def test_the_urgent_and_then_the_oldest_first(queue: Queue, gate: Gate) -> None:
    blocked, log = Stream(queue), Log()
    blocked.submit(gate)
    assert gate.reached.wait(SECONDS)
    late, first, second, urgent = (Stream(queue, priority) for priority in (1, 0, 0, -1))
    for stream, name in ((late, "late"), (first, "first"), (second, "second"), (urgent, "urgent")):
        stream.submit(log.note(name))
        stream.submit(log.note(name))
    gate.opened.set()
    queue.synchronize()
    assert log == [name for name in ("urgent", "first", "second", "late") for _ in range(2)]


def test_copies_go_on_beside_a_launch(queue: Queue, gate: Gate) -> None:
    launches, copies, log = Stream(queue), Stream(queue), Log()
    launches.submit(gate)
    copies.submit(log.note("copied"), "copy")
    copies.synchronize()
    assert log == ["copied"] and not launches.query()


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        (Uses(writes=(64,)), Uses(reads=(64,)), True),
        (Uses(reads=(64,)), Uses(writes=(64,)), True),
        (Uses(writes=(64,)), Uses(writes=(64,)), True),
        (Uses(reads=(64,)), Uses(reads=(64,)), False),
        (Uses(writes=(64,)), Uses(writes=(128,)), False),
    ],
)
def test_conflicting_streams_and_hosts_wait(
    queue: Queue, gate: Gate, first: Uses, second: Uses, waits: bool
) -> None:
    one, other, log = Stream(queue), Stream(queue), Log()
    one.submit(gate, uses=first)
    other.submit(log.note("second"), "copy", second)
    host = threading.Thread(target=lambda: (queue.wait_for(second), log.append("host")))
    host.start()
    if waits:
        host.join(0.1)
        assert host.is_alive() and log == []
        gate.opened.set()
    host.join(SECONDS)
    other.synchronize()
    assert sorted(log) == ["host", "second"]
    gate.opened.set()
    queue.synchronize()
    assert not queue.uses_memory


def test_random_programs_give_the_result_of_their_order() -> None:
    """Blocks hold numbers; a work computes one from others. Whatever runs beside what, the result
    is that of one after another."""
    for seed in range(20):
        rng, queue = random.Random(seed), Queue(1000)
        streams = [Stream(queue, rng.randrange(3)) for _ in range(3)]
        memory, expected = dict.fromkeys(range(1, 6), 1), dict.fromkeys(range(1, 6), 1)

        def step(memory: dict, target: int, sources: tuple[int, ...], add: int) -> int:
            memory[target] = (memory[target] * 7 + sum(memory[s] for s in sources) + add) % 9973
            return 1

        for number in range(60):
            target = rng.randrange(1, 6)
            sources = tuple(rng.sample(range(1, 6), rng.randrange(3)))
            step(expected, target, sources, number)
            uses = Uses(sources, (target,))
            if rng.random() < 0.2:
                queue.wait_for(uses)
                step(memory, target, sources, number)
                continue
            rng.choice(streams).submit(
                partial(step, memory, target, sources, number),
                rng.choice(("launch", "copy")),
                uses,
            )
        queue.synchronize()
        assert memory == expected, seed


def test_the_queue_is_bounded(queue: Queue, gate: Gate) -> None:
    stream, queued = Stream(queue), []

    def program() -> None:
        for number in range(QUEUE_LIMIT + 1):
            stream.submit(gate if number == 0 else lambda: 0)
            queued.append(number)

    thread = threading.Thread(target=program)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and len(queued) == QUEUE_LIMIT == 32
    Stream(queue).submit(lambda: 0, "copy")  # another stream has room
    gate.opened.set()
    thread.join(SECONDS)
    assert len(queued) == QUEUE_LIMIT + 1
    queue.synchronize()


def test_what_is_kept_lives_until_the_work_is_done(queue: Queue, gate: Gate) -> None:
    class Memory:
        freed = False

        def __del__(self) -> None:
            Memory.freed = True

    stream = Stream(queue)
    stream.submit(gate)
    stream.submit(lambda: 0, keep=Memory())
    assert not Memory.freed
    gate.opened.set()
    stream.synchronize()
    assert Memory.freed


# Events -------------------------------------------------------------------------------------------


def test_an_event_joins_two_streams(queue: Queue, gate: Gate) -> None:
    one, other, log = Stream(queue), Stream(queue), Log()
    event = Event(queue)
    assert event.query()
    event.wait(other)
    event.wait(None)  # never recorded: no reason to wait
    one.submit(gate)
    event.record(one)
    event.wait(other)
    other.submit(log.note("after"), "copy")
    assert not event.query() and not other.query() and log == []
    gate.opened.set()
    event.synchronize()
    assert event.query()
    other.synchronize()
    assert log == ["after"]


def test_clocks_count_the_cycles_of_a_streams_own_work(queue: Queue) -> None:
    log, events = Log(), [Event(queue, enable_timing=True) for _ in range(4)]
    one, other = Stream(queue), Stream(queue)
    events[0].record(one)
    one.submit(log.note("a", 250))
    other.submit(log.note("b", 4000))
    events[1].record(one)
    events[1].wait(other)
    events[2].record(other)  # its own 4000 are more
    other.submit(log.note("c", 5))
    events[3].record(other)
    events[3].wait(one)
    one.submit(log.note("d", 1))
    end = Event(queue, enable_timing=True)
    end.record(one)
    queue.synchronize()
    spans = [events[0].elapsed_time(event) for event in (*events[1:], end)]
    assert spans == [250.0, 4000.0, 4005.0, 4006.0]  # milliseconds at 1 kHz
    assert queue.clock == 4006  # what comes next, comes later
    queue.advance(10)
    last = Event(queue, enable_timing=True)
    last.record(None)
    assert end.elapsed_time(last) == 10.0


def test_times_that_are_not_there(queue: Queue, gate: Gate) -> None:
    plain, stream = Event(queue), Stream(queue)
    one, other = Event(queue, enable_timing=True), Event(queue, enable_timing=True)
    one.record(None)
    with pytest.raises(RuntimeError) as error:
        one.elapsed_time(plain)
    assert str(error.value) == (
        "elapsed_time: the end event keeps no time; make both with enable_timing=True"
    )
    with pytest.raises(RuntimeError) as error:
        one.elapsed_time(other)
    assert str(error.value) == "elapsed_time: the end event was not recorded; record both first"
    stream.submit(gate)
    other.record(stream)
    with pytest.raises(RuntimeError) as error:
        one.elapsed_time(other)
    assert str(error.value) == (
        "elapsed_time: work before the end event is not finished; call synchronize() first"
    )


# Failures -----------------------------------------------------------------------------------------


def test_a_failure_is_told_once_with_what_did_not_run(queue: Queue, gate: Gate) -> None:
    stream, other, log = Stream(queue), Stream(queue), Log()
    stream.submit(gate)
    stream.submit(fail(), where=lambda: 'file "a.py", line 3, in f: broken()')
    for _ in range(3):
        stream.submit(log.note("dropped"))
    other.submit(log.note("other"))
    gate.opened.set()
    other.synchronize()
    with pytest.raises(ValueError) as error:
        stream.synchronize()
    assert str(error.value) == (
        'it broke\nIt was queued on stream 1 by file "a.py", line 3, in f: broken()\n'
        "3 operations queued behind it were not run"
    )
    stream.synchronize()
    queue.synchronize()
    stream.submit(log.note("again"))
    stream.synchronize()
    assert log == ["other", "again"]


def test_streams_that_wait_for_a_failure_do_not_run_either(queue: Queue) -> None:
    stream, other, log = Stream(queue), Stream(queue), Log()
    stream.submit(fail(), uses=Uses(writes=(64,)))
    event = Event(queue)
    event.record(stream)
    event.wait(other)
    other.submit(log.note("dropped"))
    third = Stream(queue)
    third.submit(log.note("dropped"), uses=Uses(reads=(64,)))
    third.submit(log.note("dropped"))
    queue.finish()
    with pytest.raises(ValueError) as error:
        queue.synchronize()
    assert str(error.value) == "it broke\nIt was queued on stream 1"
    with pytest.raises(RuntimeError) as error:
        other.synchronize()
    assert str(error.value).startswith(
        "1 operation queued on stream 2 was not run, because work before them failed: it broke\n"
    )
    with pytest.raises(RuntimeError) as error:
        queue.synchronize()
    assert str(error.value).startswith("2 operations queued on stream 3 were not run, because")
    queue.synchronize()
    assert log == [] and not queue.uses_memory


def test_the_host_is_told_where_it_uses_what_was_not_written(queue: Queue) -> None:
    stream = Stream(queue)
    stream.submit(fail(), uses=Uses(writes=(64,)))
    stream.submit(lambda: 0, uses=Uses(writes=(128,)))
    queue.finish()
    queue.wait_for(Uses(reads=(192,)))
    with pytest.raises(ValueError):
        queue.wait_for(Uses(reads=(128,)))
    queue.wait_for(Uses(reads=(64, 128)))
    stream.synchronize()


# The end ------------------------------------------------------------------------------------------

PROGRAM = """
import sys, threading
from pagoda.runtime import DeviceLost
from pagoda.runtime.stream import Stream
from pagoda.runtime.work_queue import Queue
def lose():
    raise DeviceLost("the device is gone")
queue = Queue(1000)
stream, reached, log = Stream(queue), threading.Event(), []
def slow():
    reached.set()
    threading.Event().wait(0.3)
    print("ended", flush=True)
    return 0
stream.submit(slow)
stream.submit(lambda: print("not run", flush=True))
other = Stream(queue)
other.submit(lose, "copy")
while other.pending:
    pass
reached.wait()
"""


def test_at_the_end_of_the_process_queued_work_is_dropped() -> None:
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (0, "ended\n")
    assert done.stderr == (
        "pagoda: queued work failed, and nobody waited: the device is gone\n"
        "It was queued on stream 2\n"
    )


def _told_in_child(queue: Queue, answers) -> None:
    try:
        queue.wait_for(Uses(reads=(64,)))
    except DeviceLost as error:
        answers.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_work_it_has_not(queue: Queue, gate: Gate) -> None:
    Stream(queue).submit(gate, uses=Uses(writes=(64,)))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_told_in_child, args=(queue, answers))
    child.start()
    assert answers.get(timeout=SECONDS) == (
        "this process was forked from one that uses streams of the device, and cannot wait for "
        "their work; open the device after the fork (multiprocessing: start method 'spawn')"
    )
    child.join(SECONDS)
    assert child.exitcode == 0
