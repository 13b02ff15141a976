"""`pagoda top`: what shared devices and their programs do, as it happens."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pagoda.cli.device_load import DeviceLoad, Figures, load_between
from pagoda.cli.options import json_option
from pagoda.cli.top_screen import screen
from pagoda.runtime import DeviceLost, ServiceError
from pagoda.runtime.service.discovery import VARIABLE
from pagoda.runtime.service.paths import DEFAULT_NAME, EMBEDDED, runtime_folder, socket_path
from pagoda.runtime.service.remote import Connection, NotRunning

_METRICS_HOST = "127.0.0.1"


class _Services:
    """The services that are looked at: those named, or all of this user's that answer."""

    def __init__(self, names: Sequence[str]) -> None:
        self._named = [socket_path(name) for name in names]
        self._connections: dict[Path, Connection] = {}
        self.problems: dict[Path, str] = {}  # of those that were named, or answered once

    def look(self) -> dict[Path, Figures]:
        """The figures of every service that answers."""
        found = {}
        known = [*self._named, *self._connections, *self.problems]
        for path in dict.fromkeys([*known, *([] if self._named else _sockets())]):
            try:
                if path not in self._connections:
                    self._connections[path] = Connection(path, "pagoda top")
                found[path] = self._connections[path].figures()
                self.problems.pop(path, None)
            except (DeviceLost, ServiceError) as error:
                connection = self._connections.pop(path, None)
                if connection is not None:
                    connection.close()
                stale = isinstance(error, NotRunning) and path not in known
                if not stale:
                    self.problems[path] = str(error)
        return found


def _sockets() -> list[Path]:
    """Where services of this user listen, or have listened."""
    sockets = sorted(runtime_folder().glob("*.sock"))
    named = os.environ.get(VARIABLE, "")
    return sockets if named in ("", EMBEDDED) else [socket_path(named), *sockets]


def _loads(before: Mapping[Path, Figures], now: Mapping[Path, Figures]) -> list[DeviceLoad]:
    return [load_between(before.get(path), figures) for path, figures in now.items()]


@click.command()
@click.option(
    "--name", "--socket", "names", metavar="NAME|PATH", multiple=True,
    help="Only this service; may be repeated. Without: all of yours that run.",
)  # fmt: skip
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True,
    help="Seconds between two looks.",
)  # fmt: skip
@click.option(
    "--prometheus", "address", metavar="[HOST:]PORT",
    help=f"Serve metrics over HTTP instead; the host is {_METRICS_HOST} unless given.",
)  # fmt: skip
@json_option
def top(names: tuple[str, ...], interval: float, address: str | None, as_json: bool) -> None:
    """Watch shared devices: load, memory, queues, and the programs on them.

    In a terminal it goes on until Ctrl-C. Elsewhere, and with --json, it shows one interval.
    """
    services = _Services(names)
    if address is not None:
        _serve_metrics(services, address)
        return
    looks = services.look()
    if not looks:
        problem = next(iter(services.problems.values()), None)
        if problem is not None:
            raise ServiceError(problem)
        raise NotRunning(socket_path(DEFAULT_NAME))
    console = Console()
    if console.is_terminal and not as_json:
        _watch(services, looks, interval, console)
        return
    time.sleep(interval)
    loads = _loads(looks, services.look())
    if as_json:
        click.echo(json.dumps({"devices": [asdict(load) for load in loads]}))
    else:
        console.print(screen(loads, list(services.problems.values())))


def _watch(
    services: _Services, looks: Mapping[Path, Figures], interval: float, console: Console
) -> None:
    """Show loads in the whole terminal until Ctrl-C."""
    before: Mapping[Path, Figures] = {}
    note = Text(f"every {interval:g} s; Ctrl-C ends", "dim")
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                view = screen(_loads(before, looks), list(services.problems.values()))
                live.update(Group(view, "", note), refresh=True)
                time.sleep(interval)
                before, looks = looks, services.look()
        except KeyboardInterrupt:
            return


def _serve_metrics(services: _Services, address: str) -> None:
    """Answer Prometheus until Ctrl-C."""
    from prometheus_client import start_http_server  # late: only exporters wait for it

    from pagoda.cli.device_metrics import DeviceCollector

    host, _, port = address.rpartition(":")
    host = host or _METRICS_HOST
    if not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise click.BadParameter(
            f"{address!r}: must be a port from 0 to 65535 (0: any that is free), or HOST:PORT",
            param_hint="--prometheus",
        )
    lock = threading.Lock()  # every request has a thread

    def look() -> dict[str, Figures | None]:
        with lock:
            found = services.look()
            return {str(path): found.get(path) for path in [*found, *services.problems]}

    try:
        server, thread = start_http_server(
            int(port), host, registry=DeviceCollector(look).registry()
        )
    except OSError as error:
        raise click.ClickException(
            f"metrics on {host}:{port}: the port cannot be opened ({error.strerror}); choose "
            "another with --prometheus"
        ) from None
    click.echo(f"metrics on http://{host}:{server.server_port}/metrics; Ctrl-C ends")
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()
