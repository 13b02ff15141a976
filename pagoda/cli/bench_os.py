"""`pagoda bench os`: what sharing a device costs, how fair it is, and what it survives."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pagoda.cli.figures import show_figures
from pagoda.cli.options import chip_option, json_option
from pagoda.isa import rv32
from pagoda.isa.chip import Chip
from pagoda.isa.commands import CONTROL
from pagoda.isa.memory_map import COMMAND_PORT
from pagoda.isa.program import Program
from pagoda.runtime import Device, open_device
from pagoda.runtime.replay import Job, save_jobs
from pagoda.runtime.service.protocol import Type
from pagoda.runtime.service.remote import Connection, answers

PROCESSES = 8
WEIGHTS = (0.25, 0.5, 0.75, 1.0)
STUCK_SECONDS = 30.0
_LAUNCHES = 4000
_FAULTS = 0.02  # of what a program does
_KILL_SECONDS, _RESET_SECONDS = (1.0, 5.0), (20.0, 60.0)
_STARTS_WITHIN = 120.0


def shortest_program() -> Program:
    """A program that only ends."""
    code = (
        rv32.encode("lui", rd=1, uimm=COMMAND_PORT.base >> 12),
        rv32.encode("sw", rs2=0, rs1=1, imm=4 * CONTROL["exit"]),
    )
    return Program("exit", b"".join(word.to_bytes(4, "little") for word in code))


@contextmanager
def service(chip: Chip, folder: Path) -> Iterator[str]:
    """A service of its own; yields the path of its socket."""
    socket = folder / "device.sock"
    chip_file = folder / "chip.py"
    chip_file.write_text(
        f"from fractions import Fraction\nfrom pagoda.isa import Chip\nchip = {chip!r}\n"
    )
    command = [sys.executable, "-c", "from pagoda.cli import main; main()"]
    command += ["device", "start", "--foreground", "--socket", str(socket)]
    command += ["--chip", str(chip_file)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def started() -> bool:
        if process.poll() is not None:
            told = (folder / "log").read_text(errors="replace").strip()
            raise click.ClickException(f"bench os: the service ended: {told}")
        return answers(socket)

    try:
        _eventually(started, "the service")
        yield str(socket)
    finally:
        process.terminate()
        process.wait(20)


def _eventually(what: Callable[[], bool], name: str) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN
    while not what():
        if time.monotonic() > deadline:
            raise click.ClickException(f"bench os: {name} did not start in {_STARTS_WITHIN:.0f} s")
        time.sleep(0.05)


class _Program:
    """A worker process and the last counts that it told. counts: None until it runs."""

    def __init__(
        self, socket: str, jobs: Path, number: int, seed: int, weight: float = 1.0,
        faults: float = 0.0, job: str | None = None,
    ):  # fmt: skip
        arguments = [socket, jobs, f"program-{number}", weight, seed, faults]
        arguments += [] if job is None else [job]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pagoda.cli.os_worker", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.counts: dict[str, int] | None = None
        self.heard = time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # not one that a kill has cut
                self.counts, self.heard = json.loads(line), time.monotonic()

    def started(self) -> bool:
        """Raises ClickException if it ended instead."""
        if self.process.poll() is not None:
            raise click.ClickException(f"bench os: a program ended: {self.end().strip()}")
        return self.counts is not None

    def end(self) -> str:
        """Kill it; returns what it complained of."""
        self.process.kill()
        assert self.process.stderr is not None
        complaint = self.process.stderr.read()
        self.process.wait()
        return complaint


def launch_overhead(chip: Chip, socket: str) -> dict[str, float]:
    """Median microseconds of a launch that does nothing, both kinds of device by turns."""
    program = shortest_program()
    devices = Device(chip), open_device(environment={"PAGODA_DEVICE": socket})
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_LAUNCHES):
        for device, taken in zip(devices, seconds, strict=True):
            begun = time.perf_counter()
            device.launch(program)
            taken.append(time.perf_counter() - begun)
    devices[1].machine.close()
    embedded, shared = (1e6 * statistics.median(taken) for taken in seconds)
    return {
        "embedded_launch_us": round(embedded, 1),
        "service_launch_us": round(shared, 1),
        "launch_overhead_us": round(shared - embedded, 1),
    }


def _served(socket: str, programs: Sequence[_Program], seconds: float) -> list[int]:
    """Core-cycles that each got in so many seconds in which all of them wanted the chip."""
    _eventually(lambda: all(program.started() for program in programs), "a program")

    def cycles() -> dict[int, int]:
        with Connection(Path(socket)) as connection:
            contexts = connection.figures()["contexts"]
        return {each["pid"]: each["cycles"] * each["cores"] for each in contexts}

    before = cycles()
    time.sleep(seconds)
    after = cycles()
    return [after[p.process.pid] - before[p.process.pid] for p in programs]


def fairness(socket: str, jobs: Path, recorded: list[Job], seconds: float) -> dict[str, float]:
    """Jain's index of eight equal programs with launches of different lengths, and by how much
    the shares of four programs differ from their weights at most."""
    names = [job.name for job in recorded]
    equal = [
        _Program(socket, jobs, n, n, job=names[n % len(names)]) for n in range(PROCESSES)
    ]
    try:
        shares = _served(socket, equal, seconds)
    finally:
        for program in equal:
            program.end()
    jain = sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
    weighted = [
        _Program(socket, jobs, n, n, weight, job=names[n % len(names)])
        for n, weight in enumerate(WEIGHTS)
    ]
    try:
        shares = _served(socket, weighted, seconds)
    finally:
        for program in weighted:
            program.end()
    wanted = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    errors = [abs(s / sum(shares) / w - 1) for s, w in zip(shares, wanted, strict=True)]
    return {"fairness": round(jain, 5), "weighted_share_error": round(max(errors), 4)}


def survival(socket: str, jobs: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Eight programs with mixed models, among random kill -9, faults and resets."""
    chance, number = random.Random(seed), PROCESSES
    programs = [_Program(socket, jobs, n, n, faults=_FAULTS) for n in range(PROCESSES)]
    sums = dict(results=0, wrong=0, faults=0, reopened=0)
    found = dict(kills=0, resets=0, stuck=0, crashed=0)
    complaints: list[str] = []

    def take(program: _Program) -> None:
        gone = program.process.poll() is not None
        complaint = program.end()
        if gone:
            found["crashed"] += 1
            complaints.append(complaint.strip().splitlines()[-1] if complaint.strip() else "?")
        for name, count in (program.counts or {}).items():
            sums[name] += count

    ends = time.monotonic() + seconds
    next_kill, next_reset = (time.monotonic() + chance.uniform(*span)
                             for span in (_KILL_SECONDS, _RESET_SECONDS))  # fmt: skip
    while time.monotonic() < ends:
        time.sleep(0.1)
        now = time.monotonic()
        for place, program in enumerate(programs):
            silent = now - program.heard > STUCK_SECONDS
            victim = now > next_kill and place == number % PROCESSES
            if not (silent or victim or program.process.poll() is not None):
                continue
            found["stuck"] += silent
            found["kills"] += victim
            if victim:
                next_kill = now + chance.uniform(*_KILL_SECONDS)
            take(program)
            number += chance.randrange(1, PROCESSES)
            programs[place] = _Program(socket, jobs, place, number, faults=_FAULTS)
        if now > next_reset:
            next_reset = now + chance.uniform(*_RESET_SECONDS)
            with Connection(Path(socket)) as connection:
                connection.ask(Type.RESET)
            found["resets"] += 1
    for program in programs:
        take(program)
    time.sleep(1.0)
    with Connection(Path(socket)) as connection:
        lost = connection.figures()["memory_bytes"]
    return {
        "seconds": seconds, **found, "faults": sums["faults"], "reopened": sums["reopened"],
        "results": sums["results"], "wrong_results": sums["wrong"], "lost_bytes": lost,
        "complaints": sorted(set(complaints)),
    }  # fmt: skip


@click.command()
@chip_option
@click.option(
    "--seconds", default=600.0, show_default=True, type=click.FloatRange(1),
    help="How long programs are killed, at fault and reset.",
)  # fmt: skip
@click.option(
    "--share-seconds", default=10.0, show_default=True, type=click.FloatRange(1),
    help="How long shares are measured, twice.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of what happens when.")
@json_option
def os(
    chip: Chip, seconds: float, share_seconds: float, seed: int, as_json: bool
) -> None:
    """Launches through a device service: what they cost, how fairly the chip is shared, and eight
    programs among kill -9, faults and resets.

    Starts a service of its own. Jain's index is 1 for equal shares.
    """
    from pagoda.pytorch.recording import record_jobs

    environ["PAGODA_DEVICE"] = "embedded"  # of this process
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="pagoda-os-") as name:
        folder = Path(name)
        jobs = folder / "jobs"
        with console.status("recording models"):
            recorded = record_jobs(chip)
            save_jobs(jobs, recorded)
        with service(chip, folder) as socket:
            with console.status("launches"):
                row: dict[str, Any] = {"chip": chip.name, **launch_overhead(chip, socket)}
            with console.status("shares"):
                row |= fairness(socket, jobs, recorded, share_seconds)
            with console.status(f"{PROCESSES} programs for {seconds:.0f} s"):
                row |= survival(socket, jobs, seconds, seed)
    show_figures(row, as_json)
