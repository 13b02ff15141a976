"""One of the programs that share a device in `pagoda bench os`: replays jobs until it is ended.

    python -m pagoda.cli.os_worker SOCKET JOBS NAME WEIGHT SEED FAULTS [JOB]

Without JOB it runs all of them in random order and compares what they give; and for a share FAULTS
of the time a program that faults, or it takes and gives back memory. With JOB it launches that one
as often as it can. After every half second it prints one line of JSON: sums of `results`, `wrong`
ones, `faults` that came as they should, and `reopened` devices.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from pagoda.isa.program import Program
from pagoda.runtime import Device, DeviceFault, DeviceLost, OutOfDeviceMemory, open_device
from pagoda.runtime.replay import Job, LoadedJob, load_jobs

ILLEGAL = Program("illegal", bytes(4))  # an instruction that is none
_REPORT_SECONDS = 0.5
_MOST_BYTES = 64 << 20


class Worker:
    """counts: what is printed."""

    def __init__(self, socket: str, jobs: list[Job], weight: float, seed: int, faults: float):
        self._socket, self._jobs, self._weight, self._faults = socket, jobs, weight, faults
        self._random = random.Random(seed)
        self.counts = {"results": 0, "wrong": 0, "faults": 0, "reopened": 0}
        self._open()

    def _open(self) -> None:
        environment = {"PAGODA_DEVICE": self._socket}
        self._device = open_device(time_share=self._weight, environment=environment)
        self._loaded = [LoadedJob(self._device, job) for job in self._jobs]
        self._last: LoadedJob | None = None

    def step(self) -> None:
        """One job, fault or allocation."""
        try:
            if self._random.random() < self._faults:
                if self._random.random() < 0.5:
                    _allocate(self._device, self._random)
                    return
                _fault(self._device)
                self.counts["faults"] += 1
                self._last = None
                return
            job = self._random.choice(self._loaded)
            right = job.run(again=job is self._last)
            self._last = job
            self.counts["results"] += 1
            self.counts["wrong"] += not right
        except DeviceLost:  # somebody has reset the device
            self.counts["reopened"] += 1
            self._open()

    def launch(self) -> None:
        """The first job, its results not looked at."""
        self._loaded[0].launch()
        self.counts["results"] += 1


def _fault(device: Device) -> None:
    try:
        device.launch(ILLEGAL)
    except DeviceFault:
        return
    raise AssertionError("an illegal instruction did not fault")


def _allocate(device: Device, chance: random.Random) -> None:
    """Memory of random size: zeros, and what was written stays."""
    nbytes = chance.randrange(1, _MOST_BYTES)
    try:
        address = device.memory.allocate(nbytes)
    except OutOfDeviceMemory:
        return
    memory = device.array(address, (nbytes,), "u1")
    memory[:: 1 << 16] = 0x5A
    if not (memory[:: 1 << 16] == 0x5A).all():
        raise AssertionError("memory lost what was written to it")
    device.memory.free(address)


def main(arguments: list[str]) -> None:
    socket, path, name, weight, seed, faults, *wanted = arguments
    sys.argv[0] = name  # what the service calls this process
    jobs = [job for job in load_jobs(Path(path)) if not wanted or job.name in wanted]
    worker = Worker(socket, jobs, float(weight), int(seed), float(faults))
    step, told = worker.launch if wanted else worker.step, 0.0
    while True:
        step()
        if time.monotonic() - told > _REPORT_SECONDS:
            told = time.monotonic()
            print(json.dumps(worker.counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
