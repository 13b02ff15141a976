"""Files from the network, checked, and files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from pagoda.train.errors import TrainError


def fetch(what: str, url: str, sha256: str, remedy: str) -> bytes:
    """What lies at an address. Raises TrainError, in which `what` is named and `remedy` advised,
    without a network or if it is not what it should be."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
    except OSError as error:  # URLError and TimeoutError are such
        reason = getattr(error, "reason", error)
        raise TrainError(
            what, f"it is fetched once from {url}", f"that failed: {reason}", remedy
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise TrainError(
            what, f"the SHA-256 of {url} is {sha256}", f"what arrived has {found}",
            "Try again. " + remedy,
        )  # fmt: skip
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none of it, also if the process or the machine stops meanwhile."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise TrainError(
            path, "the file must be writable", f"the system says: {error.strerror}",
            "What was there before is unharmed. Make room, or choose another folder with --out.",
        ) from error  # fmt: skip
