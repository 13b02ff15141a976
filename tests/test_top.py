"""`pagoda top` on real services: once, as JSON, live in a terminal, and as metrics."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service_support import close, eventually, multiply, serving, shared

COMMAND = [sys.executable, "-c", "from pagoda.cli import main; main()", "top"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the services of this user are, for the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("PAGODA_DEVICE", raising=False)
    (tmp_path / "pagoda").mkdir(mode=0o700)
    return tmp_path / "pagoda"


def test_it_shows_every_service_that_runs_and_what_its_programs_do(folder, pagoda):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(folder / "a-stale.sock"))
    with serving(folder / "default.sock"), serving(folder / "other.sock"):
        device = shared(folder / "default.sock")
        multiply(device)
        code, text, errors = pagoda("top", "--interval", "0.1")
        assert (code, errors) == (0, "")
        assert text.count("tiny  ") == 2 and "a-stale" not in text
        assert re.search(rf"^ *{os.getpid()} .* idle ", text, re.MULTILINE)
        code, text, _ = pagoda("top", "--name", "default", "--interval", "0.1", "--json")
        (load,) = json.loads(text.splitlines()[-1])["devices"]
        (process,) = load["processes"]
        assert process["pid"] == os.getpid() and process["launches"] == 1
        assert process["cycles"] == load["cycles"] == device.cycles
        assert load["seconds"] == pytest.approx(0.1, abs=0.09) and load["load"] == 0.0
        close(device)


def test_no_service(folder, pagoda):
    def wanted(name: str, start: str) -> str:
        return (
            f"error: no device service runs on {folder / name}.sock; start one with `{start}`, or "
            "set PAGODA_DEVICE=embedded to do without\n"
        )

    nobody = wanted("default", "pagoda device start")
    assert pagoda("top") == (1, "", nobody)
    assert pagoda("top", "--json") == (1, "", nobody)
    lost = wanted("lost", "pagoda device start --name lost")
    assert pagoda("top", "--name", "lost") == (1, "", lost)


def test_a_service_that_is_gone_is_told_beside_the_others(folder, pagoda):
    with serving(folder / "default.sock"):
        arguments = ("--name", "default", "--name", "lost", "--interval", "0.1")
        code, text, _ = pagoda("top", *arguments)
    assert code == 0 and "core 0" in text
    assert "no device service runs on" in text and "lost.sock" in text.replace("\n", "")


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[tuple[int, int]]:
    """`pagoda top` in a terminal of its own: process and the terminal's other end."""
    process, end = pty.fork()
    if process == 0:
        os.environ.update(COLUMNS="100", LINES="30", TERM="xterm")
        os.execv(sys.executable, [*COMMAND, *arguments])
    try:
        yield process, end
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.close(end)


def test_in_a_terminal_it_goes_on_until_ctrl_c(folder):
    shown = bytearray()
    running, watching = serving(folder / "default.sock"), terminal("--interval", "0.1")
    with running as service, watching as (process, end):

        def read(what: bytes) -> bool:
            if select.select([end], [], [], 1.0)[0]:
                with contextlib.suppress(OSError):  # at its end
                    shown.extend(os.read(end, 65536))
            return what in shown

        assert eventually(lambda: read(b"core 0"))
        shown.clear()
        assert eventually(lambda: read(b"core 0"))  # again
        service.terminate()
        assert eventually(lambda: read(b"no device service runs"))
        os.write(end, b"\x03")
        assert eventually(lambda: read(b"\x1b[?1049l"))  # the terminal is as before
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_metrics_over_http(folder):
    with serving(folder / "default.sock") as service:
        device = shared(folder / "default.sock")
        multiply(device)
        exporter = subprocess.Popen(
            [*COMMAND, "--prometheus", "0"], stdout=subprocess.PIPE, text=True
        )
        try:
            said = exporter.stdout.readline()
            told = re.fullmatch(r"metrics on (http://127\.0\.0\.1:\d+/\w+); Ctrl-C ends\n", said)
            url = told[1]
            first = samples(url)
            assert first["pagoda_launches_total"] == 1
            assert first["pagoda_process_cycles_total"] == device.cycles
            multiply(device)
            assert samples(url)["pagoda_launches_total"] == 2
            close(device)
            service.terminate()
            service.wait()
            assert samples(url) == {"pagoda_up": 0}
            exporter.send_signal(signal.SIGINT)
            assert exporter.wait(20) == 0
        finally:
            exporter.kill()
            exporter.wait()
            exporter.stdout.close()


def samples(url: str) -> dict[str, float]:
    """Metrics by name, of one device with one program."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_ports_that_cannot_be(folder, pagoda):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = pagoda("top", "--prometheus", str(port))
    assert code == 1
    assert errors == (
        f"Error: metrics on 127.0.0.1:{port}: the port cannot be opened (Address already in "
        "use); choose another with --prometheus\n"
    )
    code, _, errors = pagoda("top", "--prometheus", "here:http")
    assert code == 2
    assert errors.endswith(
        "Error: Invalid value for --prometheus: 'here:http': must be a port from 0 to 65535 (0: "
        "any that is free), or HOST:PORT\n"
    )
