"""`pagoda device`: start, stop, reset and look at the service that lets programs share a chip."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shlex import quote
from typing import Any

import click

from pagoda.cli.options import json_option
from pagoda.isa.chip import load_chip
from pagoda.runtime.errors import ServiceError
from pagoda.runtime.interrupts import held_interrupts
from pagoda.runtime.service.discovery import DEFAULT_CHIP, VARIABLE
from pagoda.runtime.service.limits import load_limits
from pagoda.runtime.service.paths import (
    DEFAULT_NAME,
    EMBEDDED,
    AlreadyRunning,
    Lock,
    name_of,
    prepare,
    socket_path,
)
from pagoda.runtime.service.protocol import Type
from pagoda.runtime.service.remote import Connection, NotRunning, answers

_START_SECONDS = 600.0  # on a new computer the simulator is compiled first
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.02
_ENDS = (signal.SIGINT, signal.SIGTERM)


def _path(context: click.Context, parameter: click.Parameter, value: str | None) -> Path:
    if value is not None:
        return socket_path(value)
    named = os.environ.get(VARIABLE, "")
    return socket_path(named if named not in ("", EMBEDDED) else DEFAULT_NAME)


def _mode(context: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777 or mode & 0o600 != 0o600:
        raise click.BadParameter(
            f"{value!r}: must be a file mode in octal with 0600 in it, such as 0660 for a group"
        )
    return mode


service_option = click.option(
    "--name", "--socket", "path", metavar="NAME|PATH", callback=_path,
    help=f"Which service: its name, or its socket's path; without, ${VARIABLE} or "
    f"{DEFAULT_NAME!r}.",
)  # fmt: skip


@click.group()
def device() -> None:
    """Share one simulated chip among programs."""


@device.command()
@service_option
@click.option("--chip", default=DEFAULT_CHIP, show_default=True, metavar="NAME|FILE")
@click.option("--foreground", is_flag=True, help="Serve in this process, until Ctrl-C.")
@click.option("--config", type=click.Path(path_type=Path), help="Limits of users, TOML.")
@click.option("--log", type=click.Path(path_type=Path), help="File for what happens.")
@click.option(
    "--mode", default="0600", show_default=True, callback=_mode,
    help="File mode of the socket: who may connect.",
)  # fmt: skip
def start(
    path: Path, chip: str, foreground: bool, config: Path | None, log: Path | None, mode: int
) -> None:
    """Start the device service and leave it running."""
    if foreground:
        _serve(path, chip, config, log, mode)
    chip_name = load_chip(chip).name
    _refuse_second(path)
    words = ["--socket", str(path.absolute()), "--chip", chip, "--mode", f"{mode:o}"]
    words += ["--log", str(log if log is not None else path.with_suffix(".log"))]
    words += ["--config", str(config)] if config is not None else []
    prepare(path)  # the log goes there, too
    _start_apart(path, words)
    name = name_of(path)
    if name == DEFAULT_NAME:
        click.echo(f"chip {chip_name} is shared on {path}: every program uses it from now on")
        click.echo(f"export {VARIABLE}={DEFAULT_NAME}    # to insist on it")
    else:
        click.echo(f"chip {chip_name} is shared on {path}: programs use it with")
        click.echo(f"export {VARIABLE}={quote(name or str(path.absolute()))}")


def _refuse_second(path: Path) -> None:
    try:
        found = Connection(path)
    except NotRunning:
        return
    pid = str(found.pid)
    found.close()
    raise AlreadyRunning(path, pid)


def _start_apart(path: Path, words: list[str]) -> None:
    """Start the service as a process of its own; returns when it answers."""
    code = "from pagoda.cli import main; main()"
    command = [sys.executable, "-c", code, "device", "start", "--foreground", *words]
    process = None
    with tempfile.TemporaryFile() as said:
        deadline = time.monotonic() + _START_SECONDS
        try:
            with held_interrupts(numbers=_ENDS):  # a process that is not known cannot be ended
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                    start_new_session=True,
                )  # fmt: skip
            while process.poll() is None and time.monotonic() < deadline:
                if answers(path):
                    return
                time.sleep(_POLL_SECONDS)
        except (KeyboardInterrupt, SystemExit):
            if process is not None:
                process.terminate()
            raise
        if process.poll() is None:
            process.kill()
            raise ServiceError(
                f"the device service on {path} did not answer in {_START_SECONDS:.0f} s; start it "
                "with --foreground to see why"
            )
        said.seek(0)
        text = said.read().decode(errors="replace").strip().removeprefix("error: ")
    raise ServiceError(text or f"the device service ended with status {process.returncode}")


class _LogFile(logging.FileHandler):
    """A log whose file may be full: the service goes on, and its status says so."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        try:
            super().__init__(path, encoding="utf-8")
        except OSError as error:
            raise ServiceError(
                f"log file {path}: cannot be written ({error.strerror}); choose another with --log"
            ) from None
        self._problems, self._lost = problems, 0

    def handleError(self, record: logging.LogRecord) -> None:
        self._lost += 1
        problem = sys.exc_info()[1]
        self._problems[:] = [f"log file {self.baseFilename}: {problem}: {self._lost} lines lost"]


def _serve(path: Path, chip: str, config: Path | None, log: Path | None, mode: int) -> None:
    """Serve in this process until it is stopped; ends the process."""
    from pagoda.runtime import Device  # late: this loads the simulator
    from pagoda.runtime.service.server import Service
    from pagoda.runtime.start import run_nothing

    problems: list[str] = []
    handler = logging.StreamHandler() if log is None else _LogFile(log, problems)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a context takes five descriptors
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found, limits = load_chip(chip), load_limits(config)
    run_nothing(Device(found))  # compiles the simulator, if it must be; nobody waits for it yet
    service = Service(found, path, limits=limits, mode=mode, problems=problems)
    for number in _ENDS:
        signal.signal(number, lambda *_: service.stop())
    service.run()
    with contextlib.suppress(OSError):  # the disk is still full
        handler.close()
    os._exit(0)  # a launch that hangs must not keep the process from ending


@device.command()
@service_option
def stop(path: Path) -> None:
    """Stop the service; what its programs have on the chip can still be copied to the host."""
    with Connection(path) as connection:
        pid = connection.pid
        connection.ask(Type.STOP)
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        try:
            Lock(path).release()
        except AlreadyRunning:
            time.sleep(_POLL_SECONDS)
            continue
        click.echo(f"the device service on {path} (process {pid}) is stopped")
        return
    raise ServiceError(
        f"the device service on {path} still runs after {_STOP_SECONDS:.0f} s; end process {pid}"
    )


@device.command()
@service_option
def reset(path: Path) -> None:
    """End every launch and context at once, as after a power cycle; memory is free again."""
    with Connection(path) as connection:
        connection.ask(Type.RESET)
    click.echo(f"the device on {path} is reset: its programs have to open it again")


@device.command()
@service_option
@json_option
def status(path: Path, as_json: bool) -> None:
    """What the service and its programs do."""
    with Connection(path) as connection:
        figures = connection.figures()
    if as_json:
        click.echo(json.dumps(figures))
    else:
        click.echo(_report(figures))


def _report(figures: dict[str, Any]) -> str:
    service = (
        f"chip {figures['chip']['name']} on {figures['device']}: process {figures['pid']}, "
        f"user {figures['user']}, up {figures['uptime_seconds']:,.0f} s, "
        f"{figures['resets']} resets"
    )
    sums = (
        f"memory {_mib(figures['memory_bytes'])} of {_mib(figures['memory_total_bytes'])} MiB, "
        f"{figures['launches']:,} launches, {figures['cycles']:,} cycles, "
        f"{figures['faults']:,} faults"
    )
    lines = [service, sums]
    lines += [f"problem: {problem}" for problem in figures["problems"]]
    heading = ("pid", "user", "name", "cores", "state", "MiB", "launches", "cycles", "share")
    rows = [
        (
            str(each["pid"]), each["user"], each["name"], str(each["cores"]), each["state"],
            _mib(each["memory_bytes"]), f"{each['launches']:,}", f"{each['cycles']:,}",
            f"{each['share']:.0%}",
        )
        for each in figures["contexts"]
    ]  # fmt: skip
    if not rows:
        return "\n".join([*lines, "no programs"])
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines += [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (heading, *rows)
    ]
    return "\n".join(lines)


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f}"
