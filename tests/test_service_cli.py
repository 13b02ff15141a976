"""`pagoda device`, and which device a program finds."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from service_support import ROOT, TINY, close, eventually, figures, multiply, run_python, serving

from pagoda.cli import device
from pagoda.isa import PRESETS
from pagoda.runtime import Device, ServiceError, open_device
from pagoda.runtime.service.discovery import chip_of_service
from pagoda.runtime.service.limits import Limits, UserLimits, load_limits, parse_bytes
from pagoda.runtime.service.paths import AlreadyRunning, Lock, prepare, socket_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder for sockets; nothing of the caller's environment counts."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("PAGODA_DEVICE")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "pagoda"


def test_a_service_from_start_to_stop(pagoda, folder):
    path = folder / "default.sock"
    started = f"chip tiny is shared on {path}: every program uses it from now on\n"
    started += "export PAGODA_DEVICE=default    # to insist on it\n"
    assert pagoda("device", "start", "--chip", "tiny") == (0, started, "")
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
        figures = json.loads(pagoda("device", "status", "--json")[1])
        pid = figures["pid"]
        assert (figures["chip"]["name"], figures["contexts"]) == ("tiny", [])
        running = f"error: a device service runs on {path} already (process {pid}); use it, stop "
        running += "it with `pagoda device stop`, or start another beside it with --name\n"
        assert pagoda("device", "start", "--chip", "car") == (1, "", running)
        opened = open_device()
        assert opened.chip == TINY
        assert multiply(opened)[0] == multiply(Device(TINY))[0]
        shown = pagoda("device", "status")[1]
        assert f"chip tiny on {path}: process {pid}" in shown
        assert re.search(rf"{os.getpid()} .* 1 +idle +2 +1 +[\d,]+ +100%", shown), shown
        close(opened)
        assert pagoda("device", "reset") == (
            0, f"the device on {path} is reset: its programs have to open it again\n", ""
        )  # fmt: skip
        assert json.loads(pagoda("device", "status", "--json")[1])["resets"] == 1
    finally:
        stopped = pagoda("device", "stop")
    assert stopped == (0, f"the device service on {path} (process {pid}) is stopped\n", "")
    assert not path.exists()
    assert "INFO stopped" in (folder / "default.log").read_text()


@pytest.mark.parametrize("moment", ["as it begins", "as it is waited for"])
@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "")])
def test_a_start_that_is_ended_leaves_no_service(
    pagoda, folder, monkeypatch, number, said, moment
):  # fmt: skip
    started = []

    class Started(subprocess.Popen):
        def __init__(self, *words, **options):
            super().__init__(*words, **options)
            started.append(self)
            if moment == "as it begins":
                signal.raise_signal(number)

    def waiting(path):
        signal.raise_signal(number)
        return False

    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(device, "answers", waiting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        code, out, err = pagoda("device", "start", "--chip", "tiny")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out, err.strip()) == (128 + number, "", said)
    started[0].wait(60)
    Lock(folder / "default.sock").release()  # nobody has it


@pytest.mark.parametrize("command", ["stop", "status", "reset"])
def test_not_running(pagoda, folder, command):
    message = (
        f"error: no device service runs on {folder / 'default.sock'}; start one with `pagoda "
        "device start`, or set PAGODA_DEVICE=embedded to do without\n"
    )
    assert pagoda("device", command) == (1, "", message)


def test_a_stale_socket_is_replaced(tmp_path):
    path = tmp_path / "s"
    with serving(path) as process:
        process.kill()
        process.wait()
        assert path.exists()
        with serving(path):
            assert chip_of_service({"PAGODA_DEVICE": str(path)}) == TINY


def test_a_service_does_not_replace_files(tmp_path, pagoda):
    path, folder = tmp_path / "s", tmp_path / "t"
    path.write_text("precious")
    folder.mkdir()
    for wrong, what in ((path, "a file"), (folder, "a folder")):
        message = (
            f"error: device service: {wrong} is {what}, and its socket would be there; remove it "
            "or choose another place with --socket\n"
        )
        command = "device", "start", "--socket", str(wrong), "--chip", "tiny"
        assert pagoda(*command) == (1, "", message)
        message = (
            f"error: no device service runs on {wrong}; that is {what}, and must be a socket; "
            "correct the path, or set PAGODA_DEVICE=embedded to do without\n"
        )
        assert pagoda("device", "status", "--socket", str(wrong)) == (1, "", message)
    assert path.read_text() == "precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["s", "t"]  # no lock, no log


def test_where_no_socket_can_be(tmp_path, pagoda):
    file = tmp_path / "file"
    file.touch()
    for folder, why in ((file, "File exists"), (file / "t", "Not a directory")):
        message = (
            f"error: device service: folder {folder} for its socket cannot be used ({why}); choose "
            "another with --socket\n"
        )
        assert pagoda("device", "start", "--socket", f"{folder}/s", "--chip", "tiny") == (
            1, "", message
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "it needs a name, or the path of its socket; give one of them"),
        (
            "embedded",
            "no service can have this name, which stands for none in PAGODA_DEVICE; choose another",
        ),
    ],
)
def test_names_that_no_service_has(pagoda, name, problem):
    message = f"error: device service {name!r}: {problem}\n"
    assert pagoda("device", "start", "--name", name) == (1, "", message)


def test_what_to_type_is_quoted(pagoda, folder):
    path = folder / "a b.sock"
    message = (
        f"error: no device service runs on {path}; start one with `pagoda device start --name "
        "'a b'`, or set PAGODA_DEVICE=embedded to do without\n"
    )
    assert pagoda("device", "status", "--name", "a b") == (1, "", message)
    started = pagoda("device", "start", "--name", "a b", "--chip", "tiny")
    pagoda("device", "stop", "--name", "a b")
    assert started == (
        0, f"chip tiny is shared on {path}: programs use it with\nexport PAGODA_DEVICE='a b'\n", ""
    )  # fmt: skip


NO_SHARED_MEMORY = (
    "no shared memory of 268,435,456 bytes for the device's DRAM: File too large; raise the limits "
    "of the service on memory and file size (ulimit -v, ulimit -f), or choose a chip with less DRAM"
)
NO_MEMORY = (
    "chip 'cloud': this process gets no memory for the simulated DRAM of 68,719,476,736 bytes "
    "(Cannot allocate memory); raise its limit on memory (ulimit -v), or choose a chip with less "
    "DRAM"
)


@pytest.mark.parametrize(
    ("limit", "nbytes", "chip", "text"),
    [("FSIZE", 1 << 20, "tiny", NO_SHARED_MEMORY), ("AS", 1 << 32, "cloud", NO_MEMORY)],
)
def test_a_service_without_memory_does_not_start(tmp_path, limit, nbytes, chip, text):
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_{limit}, ({nbytes}, {nbytes}))
from pagoda.cli import main
sys.argv = ["pagoda", "device", "start", "--chip", {chip!r}, "--socket", {str(tmp_path / "s")!r}]
sys.stderr = sys.stdout
main()
"""
    assert run_python(code).communicate()[0] == f"error: {text}\n"


def test_a_default_service_of_a_stranger_does_not_count(folder):
    """It is not even spoken to: it may never answer."""
    if os.getuid():
        pytest.skip("only root can act as somebody else")
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / "default.sock"))
        os.seteuid(65534)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        begun = time.monotonic()
        assert chip_of_service() == PRESETS["edge"]
        assert time.monotonic() - begun < 5


def test_two_starts_at_once_leave_one(tmp_path):
    path = tmp_path / "s"
    lock = Lock(path)
    with pytest.raises(AlreadyRunning, match=rf"runs on {path} already \(process {os.getpid()}\)"):
        Lock(path)
    lock.release()
    Lock(path).release()


def test_a_full_disk_for_the_log(tmp_path, pagoda):
    path = tmp_path / "s"
    command = [sys.executable, "-c", "from pagoda.cli import main; main()", "device", "start"]
    command += ["--foreground", "--chip", "tiny", "--socket", str(path), "--log", "/dev/full"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        eventually(lambda: path.exists())
        found = eventually(lambda: pagoda("device", "status", "--socket", str(path)))
        assert re.search(
            r"problem: log file /dev/full: \[Errno 28\] No space left on device: \d+ lines lost",
            found[1],
        ), found
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_log_that_cannot_be(tmp_path, pagoda):
    log = tmp_path / "no" / "log"
    message = (
        f"error: log file {log}: cannot be written (No such file or directory); choose another "
        "with --log\n"
    )
    command = "device", "start", "--socket", str(tmp_path / "s"), "--log", str(log)
    assert pagoda(*command) == (1, "", message)


def test_discovery(folder):
    path = folder / "default.sock"
    folder.mkdir()
    with serving(path):
        found = open_device()
        assert found.chip == TINY and multiply(found)[0]
        close(found)
        assert isinstance(open_device(PRESETS["edge"]).machine.chip.name, str)
        assert open_device(PRESETS["edge"]).chip == PRESETS["edge"]  # embedded
        assert chip_of_service() == TINY
        assert chip_of_service({"PAGODA_DEVICE": "embedded"}) == PRESETS["edge"]
        with pytest.raises(ServiceError, match=f"no device service runs on {folder}/car.sock"):
            open_device(environment={"PAGODA_DEVICE": "car"})
    assert chip_of_service() == PRESETS["edge"]


def test_a_kernel_runs_on_the_service(pagoda, tmp_path, monkeypatch):
    """With the cycles of a device of its own; on no other chip than was asked for."""
    path, command = tmp_path / "s", ("run", "matmul", "m=20", "n=12", "k=36", "--json")
    own = pagoda(*command, "--chip", "tiny")
    assert own[0] == 0
    monkeypatch.setenv("PAGODA_DEVICE", str(path))
    with serving(path):
        assert pagoda(*command) == own
        assert pagoda(*command, "--chip", "tiny") == own
        assert figures(path)["launches"] == 2
        message = (
            f"error: chip 'edge' was asked for, but PAGODA_DEVICE={path} names a service whose "
            "chip 'tiny' differs; leave the chip out to use that one, or set "
            "PAGODA_DEVICE=embedded for a device of this program's own\n"
        )
        code, _, said = pagoda(*command, "--chip", "edge")
        assert (code, said) == (1, message)
    message = (
        f"error: no device service runs on {path}; start one with `pagoda device start --socket "
        f"{path}`, or set PAGODA_DEVICE=embedded to do without\n"
    )
    assert pagoda(*command, "--chip", "tiny") == (1, "", message)


def test_torch_finds_the_service(tmp_path):
    code = """
import torch, pagoda
pagoda.use_chip(CHIP)
x = torch.linspace(-2, 2, 600).reshape(20, 30).to("pagoda")
y = (x @ x.T).softmax(-1).cpu()
print(torch.pagoda.get_device_name(), torch.pagoda.cycles(), y.numpy().tobytes().hex())
"""
    path = tmp_path / "s"
    with serving(path):
        processes = [
            run_python(code.replace("CHIP", ""), PAGODA_DEVICE=str(path)),
            run_python(code.replace("CHIP", "'tiny'"), PAGODA_DEVICE="embedded"),
        ]
        shared, embedded = [process.communicate()[0] for process in processes]
    assert shared.startswith("tiny ") and shared == embedded


def test_long_paths_are_refused():
    with pytest.raises(ServiceError, match="a socket's path has 1 to 107 bytes"):
        socket_path("/tmp/" + "x" * 120)


def test_a_folder_open_to_all_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ServiceError, match="must belong to you and not be writable by everybody"):
        prepare(tmp_path / "s")


def test_a_socket_of_somebody_else(tmp_path):
    if os.getuid():
        pytest.skip("only root can act as somebody else")
    path = tmp_path / "s"
    tmp_path.chmod(0o755)
    with serving(path, options="mode=0o666"), serving(tmp_path / "t"):
        code = f"""
import os
from pagoda.runtime.service.remote import Connection
from pagoda.runtime import ServiceError
from pathlib import Path
os.setuid(65534)
for name in ("s", "t"):
    try:
        connection = Connection(Path({str(tmp_path)!r}) / name)
        print("welcome")
        connection.ask(10)
    except ServiceError as error:
        print(error)
"""
        for parent in tmp_path.parents:
            if parent.stat().st_uid == 0 and parent != parent.parent:
                parent.chmod(parent.stat().st_mode | 0o011)
        said = run_python(code).communicate()[0].splitlines()
    assert said[0] == "welcome"
    assert said[1] == (
        f"stop: only user root, who started the device service on {path}, and root may do that; "
        "ask them"
    )
    assert said[2] == (
        f"the device service on {tmp_path / 't'} may not be used by this user: the socket's "
        "permissions do not allow it; have it started with --mode 0660 and join its group, or "
        "start one of your own"
    )


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("", Limits()),
        (
            "[default]\nmemory = '2 GiB'\nweight = 2\nwatchdog = 1e9",
            Limits(UserLimits(2 << 30, 2, watchdog=10**9)),
        ),
        (
            "[default]\npriority = 1\n[users.root]\nmemory = 4096\n[users.7]\npriority = 9",
            Limits(
                UserLimits(priority=1),
                ((0, UserLimits(4096, priority=1)), (7, UserLimits(priority=9))),
            ),
        ),
    ],
)
def test_limits(tmp_path, text, limits):
    file = tmp_path / "device.toml"
    file.write_text(text)
    assert load_limits(file) == limits
    assert limits.of(12345) == limits.default


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("memory = 1", "'memory': there are only the tables [default] and [users.NAME]; put"),
        (
            "[default]\nspeed = 1",
            "[default]: 'speed': there is no such limit; there are memory, weight, priority, watch",
        ),
        ("default = 1", "default = 1: must be a table; begin it with [default]"),
        ("[users]\nroot = 5", "users.root = 5: must be a table; begin it with [users.root]"),
        (
            "[users.root]\n[users.0]\npriority = 1",
            "[users.0]: the user has two tables, by name and by number; put all limits into one",
        ),
        ("[default]\nwatchdog = 'no'", "[default]: watchdog = 'no': must be a number of cycles"),
        (
            "[default]\nmemory = 'lots'",
            "[default]: memory = 'lots': must be a number of bytes, or",
        ),
        ("[default]\nmemory = -5", "[default]: memory = -5: must be a number of bytes, or a text"),
        ("[default]\nweight = 0", "[default]: weight = 0: must be a number, 0.000001 to 1000000"),
        ("[default]\nweight = nan", "[default]: weight = nan: must be a number, 0.000001 to"),
        ("[users.'\u00b2']", "[users.\u00b2]: this computer has no such user; correct the name or"),
        ("[users.root]\npriority = 1.5", "[users.root]: priority = 1.5: must be a whole number"),
        ("[users.nobody_here]", "[users.nobody_here]: this computer has no such user; correct"),
        ("[default", "not valid TOML"),
    ],
)
def test_broken_limits(tmp_path, text, problem):
    file = tmp_path / "device.toml"
    file.write_text(text)
    with pytest.raises(ServiceError, match=re.escape(f"device configuration {file}: {problem}")):
        load_limits(file)


def test_bytes():
    assert [parse_bytes(text) for text in (5, "5", "1.5 KiB", "2GiB")] == [5, 5, 1536, 2 << 30]


def test_the_kernel_tells_who_connects():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        from pagoda.runtime.service.protocol import credentials

        assert credentials(ours) == (os.getpid(), os.geteuid())
