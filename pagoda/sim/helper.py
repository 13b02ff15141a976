"""The host thread that executes a core's commands while the core's own works out cycles."""

from __future__ import annotations

import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from pagoda.sim import layout as at
from pagoda.sim.core import run
from pagoda.sim.matmul import SCRATCH_BYTES
from pagoda.sim.values import COMPLETED, STOP


class Helper:
    """A thread that sleeps until `start` and then executes what the core posts, until `stop`.

    state: the core's; jobs: what both share (`values`); sram, acc: the core's memories. The thread
    ends when this object is collected.
    """

    def __init__(self, state: NDArray, jobs: NDArray, sram: NDArray, acc: NDArray):
        self._state, self._jobs = state, jobs
        self._own = np.zeros_like(state)
        self._own[at.SERVING] = 1
        self._lanes = np.zeros(at.LANE_BUFFERS * at.LANE_BUFFER_BYTES, np.uint8)
        self._wake = threading.Event()
        closed = threading.Event()
        arguments = (self._wake, closed, self._own, jobs, sram, acc)
        threading.Thread(
            target=_sleep_and_serve, args=arguments, name="pagoda helper", daemon=True
        ).start()
        weakref.finalize(self, _close, closed, jobs, self._wake)

    def start(self) -> None:
        """From here on the core posts its commands; its launch and slots are known."""
        for known in (slice(0, at.PC), slice(at.SLOTS, at.ENTRIES)):
            self._own[known] = self._state[known]
        self._own[at.LANES_AT] = self._lanes.ctypes.data
        self._own[at.OVERFLOW_PC] = -1
        self._jobs[STOP] = 0
        self._state[at.POSTED] = self._state[at.POSTED_BEFORE] = self._jobs[COMPLETED]
        self._state[at.HELPED] = 1
        self._wake.set()

    def stop(self) -> None:
        """Let the thread sleep again; the core has waited for all that it posted."""
        self._state[at.HELPED] = 0
        self._jobs[STOP] = 1

    def merge(self) -> None:
        """Tell the core what the thread found; the core has waited as above."""
        if not self._state[at.HELPED] or self._own[at.OVERFLOW_PC] < 0:
            return
        # A short load of the core's own may be younger than what the thread was still to do.
        command = self._own[at.OVERFLOW_COMMAND]
        if self._state[at.OVERFLOW_PC] < 0 or command < self._state[at.OVERFLOW_COMMAND]:
            for word in (at.OVERFLOW_PC, at.OVERFLOW_COMMAND):
                self._state[word] = self._own[word]


def _sleep_and_serve(
    wake: threading.Event,
    closed: threading.Event,
    own: NDArray,
    jobs: NDArray,
    sram: NDArray,
    acc: NDArray,
) -> None:
    scratch = np.zeros(SCRATCH_BYTES, np.uint8)
    while True:
        wake.wait()
        wake.clear()
        if closed.is_set():
            return
        run(own, sram, acc, scratch, jobs)


def _close(closed: threading.Event, jobs: NDArray, wake: threading.Event) -> None:
    closed.set()
    jobs[STOP] = 1
    wake.set()
