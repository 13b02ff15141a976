"""Ctrl-C, held back while something is done that it must not tear."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType


@contextmanager
def held_interrupts(again: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Ctrl-C is raised at the end of the block. again: called for every further one, at once."""
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or not callable(before):
        yield
        return
    struck: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        struck.append((number, frame))
        if len(struck) > 1:
            again()

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if struck:
            before(*struck[0])
