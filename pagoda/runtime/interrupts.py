"""Ctrl-C and other signals, held back while something is done that they must not tear."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType


@contextmanager
def held_interrupts(
    again: Callable[[], None] = lambda: None,
    numbers: Collection[signal.Signals] = (signal.SIGINT,),
) -> Iterator[None]:
    """The first signal of `numbers`, Ctrl-C unless told otherwise, is handled at the end of the
    block. again: called for every further one, at once."""
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    if current_thread() is not main_thread() or not before:
        yield
        return
    struck: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        struck.append((number, frame))
        if len(struck) > 1:
            again()

    for number in before:
        signal.signal(number, later)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if struck:
            before[struck[0][0]](*struck[0])
