"""A persistent cache of compiled code: files named by the hash of what they were made from.

An entry is written to a temporary file and renamed into place, so readers see a whole entry or
none, whatever other processes do; equal keys have equal contents, so it does not matter who wins.
Every entry carries its own checksum: a damaged one counts as absent. A directory that cannot be
written (full disk, no permission) costs one warning and the time to compile again, nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import platformdirs

_CHECKSUM_BYTES = 32
VARIABLE = "PAGODA_CACHE_DIR"


def default_directory() -> Path:
    """Where compiled code is kept: $PAGODA_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("pagoda"))


@functools.cache
def source_hash(*storeys: str) -> str:
    """SHA-256 of the Python files of some storeys: part of the key of what their code produces."""
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(path for storey in storeys for path in (package / storey).rglob("*.py")):
        total.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


class Cache:
    """Bytes by key in one directory; `directory` None keeps nothing."""

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._warned = False

    @staticmethod
    def key(*parts: str | bytes) -> str:
        """SHA-256 of the parts, each with its length, as hexadecimal text."""
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def get(self, key: str) -> bytes | None:
        """The entry, or None if there is none or it is damaged."""
        if self.directory is None:
            return None
        try:
            stored = self._path(key).read_bytes()
        except OSError:
            return None
        checksum, data = stored[:_CHECKSUM_BYTES], stored[_CHECKSUM_BYTES:]
        return data if hashlib.sha256(data).digest() == checksum else None

    def put(self, key: str, data: bytes) -> None:
        """Store an entry; a failure is a warning, once."""
        if self.directory is None:
            return
        temporary = None
        try:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(temporary, path)
        except OSError as problem:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            self._warn(problem)

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / key[:2] / key[2:]

    def _warn(self, problem: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"compile cache {self.directory}: an entry could not be written "
                f"({problem.strerror}); results stay right but are compiled again next time; "
                "free some space or choose another cache directory",
                RuntimeWarning,
                stacklevel=3,
            )
