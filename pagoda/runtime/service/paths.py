"""Where services are: sockets in a folder of the user's, and the lock that says one is alive."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path

from pagoda.runtime.errors import ServiceError

DEFAULT_NAME = "default"
EMBEDDED = "embedded"  # in place of a name: no service
_LONGEST = 107  # bytes that Linux allows in the path of a socket


def runtime_folder() -> Path:
    """The user's folder for sockets: $XDG_RUNTIME_DIR/pagoda, or one of the same kind."""
    uid = os.geteuid()
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if folder and os.path.isdir(folder):
            return Path(folder) / "pagoda"
    return Path(tempfile.gettempdir()) / f"pagoda-{uid}"


def socket_path(name: str) -> Path:
    """Socket of the service of that name; a name with a slash is a path. Raises ServiceError."""
    if not name:
        raise ServiceError(
            "device service '': it needs a name, or the path of its socket; give one of them"
        )
    if name == EMBEDDED:
        raise ServiceError(
            f"device service {name!r}: no service can have this name, which stands for none in "
            "PAGODA_DEVICE; choose another"
        )
    path = Path(name) if "/" in name else runtime_folder() / f"{name}.sock"
    if len(os.fsencode(path)) > _LONGEST:
        raise ServiceError(
            f"device service {name!r}: its socket would be {path}: a socket's path has 1 to "
            f"{_LONGEST} bytes; choose a shorter name or path"
        )
    return path


def name_of(path: Path) -> str | None:
    """The name by which PAGODA_DEVICE may call the service on a socket; None if only its path."""
    known = path.parent == runtime_folder() and path.suffix == ".sock" and path.stem != EMBEDDED
    return path.stem if known else None


def prepare(path: Path) -> None:
    """Make the folder of a socket, its owner's alone if it is new. Raises ServiceError: a service
    cannot have its socket there."""
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ServiceError(
            f"device service: folder {folder} for its socket cannot be used ({error.strerror}); "
            "choose another with --socket"
        ) from None
    trusted = found.st_uid in (os.geteuid(), 0)
    open_to_all = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    if not trusted or open_to_all:
        raise ServiceError(
            f"device service: folder {folder} for its socket: it must belong to you and not be "
            "writable by everybody, or others could put their service there; choose another with "
            "--socket"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ServiceError(
            f"device service: folder {folder} for its socket: you must be able to write there; "
            "choose another with --socket"
        )
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            what = "a folder" if path.is_dir() else "a file"
            raise ServiceError(
                f"device service: {path} is {what}, and its socket would be there; remove it or "
                "choose another place with --socket"
            )


class Lock:
    """Held by the one living service of a socket; it goes with the process, however that ends.

    Raises ServiceError with `pid` if another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".lock")
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            try:  # in a folder as /tmp, Linux lets not even root create what is another user's
                self._fd = os.open(self.path, flags)
            except FileNotFoundError:
                self._fd = os.open(self.path, flags | os.O_CREAT, 0o600)
        except OSError as error:
            raise ServiceError(
                f"device service: lock file {self.path} cannot be opened ({error.strerror}); "
                "choose another place with --socket"
            ) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunning(path, pid) from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds all the same

    def release(self) -> None:
        """The file stays: whoever waits for it must not lock one that is gone."""
        os.close(self._fd)


class AlreadyRunning(ServiceError):
    """Another service has the socket."""

    def __init__(self, path: Path, pid: str) -> None:
        super().__init__(
            f"a device service runs on {path} already (process {pid}); use it, stop it with "
            "`pagoda device stop`, or start another beside it with --name"
        )
        self.pid = pid
