"""Device services in processes of their own, clients of them, and small programs to launch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from pagoda.cli.library import Matmul, seeded
from pagoda.cli.run import _launch
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.link import link
from pagoda.isa import Chip, Program, load_chip
from pagoda.isa.machine import Result
from pagoda.runtime import Device, open_device
from pagoda.runtime.service.remote import Connection, answers

ROOT = Path(__file__).parents[1]
TINY = load_chip("tiny")
ENDLESS = Program("endless", (0x0000006F).to_bytes(4, "little") * 4)  # jal x0, 0
ILLEGAL = Program("illegal", bytes(16))


def eventually(what, seconds: float = 60.0):
    """The first true value of `what()`; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")


def run_python(code: str, **environment: str) -> subprocess.Popen:
    """A Python process that runs `code`; what it prints can be read from its stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


SERVE = """
import signal
from fractions import Fraction
from pathlib import Path
from pagoda.isa import Chip, load_chip
from pagoda.runtime.service.limits import Limits, UserLimits
from pagoda.runtime.service.server import Service
{before}
service = Service({chip!r}, Path({path!r}), {options})
signal.signal(signal.SIGTERM, lambda *_: service.stop())
service.run()
"""


@contextlib.contextmanager
def serving(
    path: Path, chip: Chip = TINY, options: str = "", before: str = ""
) -> Iterator[subprocess.Popen]:
    """A service on a socket, as a process. options: more arguments of `Service`, as code."""
    process = run_python(SERVE.format(chip=chip, path=str(path), options=options, before=before))
    try:
        eventually(lambda: process.poll() is not None or answers(path))
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def figures(path: Path) -> dict:
    """The service's own figures."""
    with Connection(path) as connection:
        return connection.figures()


def shared(path: Path, chip: Chip | None = None, **wishes) -> Device:
    """A device on the service."""
    return open_device(chip, environment={"PAGODA_DEVICE": str(path)}, **wishes)


def close(device: Device) -> None:
    device.machine.close()


@cache
def _product(chip: Chip, rows: int):
    what = Matmul(m=rows, n=12, k=36)
    kernel, scalars = what.build(chip)
    return what, kernel, scalars, link("matmul", [("m", compile_kernel(kernel, chip).blob())], chip)


def multiply(device: Device, seed: int = 0, rows: int = 20) -> tuple[bytes, Result]:
    """A matrix product on the device: its bits, and the result of its launch."""
    what, kernel, scalars, linked = _product(device.chip, rows)
    rng = np.random.default_rng(seed)
    layouts = what.tensors()
    arrays = {name: seeded(t, rng) for name, t in layouts.items() if name != "c"}
    found, result = _launch(device, linked, kernel, layouts, arrays, scalars)
    return found.tobytes(), result


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
