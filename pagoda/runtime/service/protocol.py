"""What the device service and its clients say to one another: messages over a Unix stream socket.

A message is a header and a body. Header, 16 bytes, little endian: magic `PGDA`, protocol version,
message type, bytes of the body, number of the request (a reply repeats it). Bodies are msgpack maps
with exactly the fields their type has in `FIELDS`, but for launches and their results, which are
packed more tightly (`launches`). The header never changes, so that any two versions can tell one
another that they differ.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

from pagoda.runtime.policy import PRIORITIES, WEIGHTS

VERSION = 1
MAGIC = b"PGDA"
HEADER = struct.Struct("<4sHHII")
MAX_BODY_BYTES = 2 << 20  # the largest program and the longest status stay far below
_MAX_FDS = 4
_CREDENTIALS = struct.Struct("3i")
_FIRST_BUFFER = 1 << 16
# An idle processor takes longer to wake than a short launch takes to run. So who awaits a message
# looks again and again for so long before it sleeps, if the message before was not long in coming.
_LOOK_SECONDS = 150e-6


class Type(IntEnum):
    """Requests, then replies."""

    HELLO = 1  # who speaks, and which versions
    OPEN = 2  # make this connection a context: memory and a share of the chip
    GRANT = 3  # more memory
    RELEASE = 4  # memory given back
    PROGRAM = 5  # code, to be launched by its number
    LAUNCH = 6
    RESUME = 7  # an interrupt has done its work; forget it
    STATUS = 8
    RESET = 9
    STOP = 10
    WELCOME = 32  # to HELLO
    OPENED = 33  # to OPEN; carries the memory and the interrupt as file descriptors
    GRANTED = 34
    DONE = 35  # to RELEASE, RESUME, RESET, STOP
    PROGRAM_KNOWN = 36
    RESULT = 37  # to LAUNCH
    FIGURES = 38  # to STATUS
    REFUSED = 48  # to any request: a code and a sentence for the user


_TYPES = {int(kind): kind for kind in Type}


class ProtocolError(ValueError):
    """A message that breaks the rules above; the connection cannot go on."""


class OtherVersion(ProtocolError):
    """The other side speaks another version of the protocol."""

    def __init__(self, found: int) -> None:
        super().__init__(f"protocol version {found}; this side speaks version {VERSION}")
        self.found = found


def other_version_remedy(pid: int) -> str:
    """What to do if service and program differ. pid: the service's."""
    return (
        f"run both from the same installation: end the service (kill {pid}) and start it again, or "
        "set PAGODA_DEVICE=embedded to do without"
    )


class Message(NamedTuple):
    """One message. body: as it came; fds: file descriptors, which the receiver must close."""

    type: Type
    number: int
    body: bytes
    fds: tuple[int, ...] = ()

    def fields(self) -> dict[str, Any]:
        """The body of a msgpack message, checked. Raises ProtocolError."""
        return unpack(self.type, self.body)


# A check takes a value and says whether it is one that the field may have.
Check = Callable[[Any], bool]


def _int(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _text(longest: int = 200) -> Check:
    return lambda value: type(value) is str and len(value) <= longest


def _bytes(longest: int) -> Check:
    return lambda value: type(value) is bytes and len(value) <= longest


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _weight(value: Any) -> bool:
    return type(value) in (int, float) and WEIGHTS[0] <= value <= WEIGHTS[1]


def _map(value: Any) -> bool:
    return type(value) is dict


def _ranges(value: Any) -> bool:
    """[[start, bytes], ...]"""
    return type(value) is list and all(
        type(pair) is list and len(pair) == 2 and all(map(_address, pair)) for pair in value
    )


_address = _int(0, 1 << 50)
_uint32 = _int(0, (1 << 32) - 1)

# The answer to each request that is not REFUSED.
ANSWER = {
    Type.HELLO: Type.WELCOME,
    Type.OPEN: Type.OPENED,
    Type.GRANT: Type.GRANTED,
    Type.RELEASE: Type.DONE,
    Type.PROGRAM: Type.PROGRAM_KNOWN,
    Type.LAUNCH: Type.RESULT,
    Type.RESUME: Type.DONE,
    Type.STATUS: Type.FIGURES,
    Type.RESET: Type.DONE,
    Type.STOP: Type.DONE,
}
FIELDS: dict[Type, dict[str, Check]] = {
    Type.HELLO: {"contract": _uint32, "pagoda": _text(), "name": _text()},
    Type.OPEN: {
        "cores": _optional(_int(1, 1 << 16)),
        "priority": _int(PRIORITIES[0], PRIORITIES[-1]),
        "time_share": _optional(_weight),
        "memory_limit": _optional(_address),
    },
    Type.GRANT: {"bytes": _address, "release": _ranges},
    Type.RELEASE: {"release": _ranges},
    Type.PROGRAM: {
        "name": _text(10_000),
        "code": _bytes(1 << 20),
        "entry": _uint32,
        "stack_limit": _uint32,
    },
    Type.RESUME: {},
    Type.STATUS: {},
    Type.RESET: {},
    Type.STOP: {},
    Type.WELCOME: {
        "contract": _uint32,
        "pagoda": _text(),
        "pid": _int(0, 1 << 31),
        "chip": _map,
    },
    Type.OPENED: {"chip": _map, "memory_limit": _address},
    Type.GRANTED: {"start": _address, "bytes": _address},
    Type.DONE: {},
    Type.PROGRAM_KNOWN: {"program": _uint32},
    Type.FIGURES: {"figures": _map},
    Type.REFUSED: {"code": _text(), "text": _text(10_000)},
}


def pack(kind: Type, **fields: Any) -> bytes:
    """The body of a msgpack message."""
    assert fields.keys() == FIELDS[kind].keys(), (kind, fields.keys())
    return msgpack.packb(fields)


def unpack(kind: Type, body: bytes) -> dict[str, Any]:
    """The fields of a body. Raises ProtocolError: no msgpack map, a field too many or too few, a
    value of another type or out of range."""
    if kind not in FIELDS:
        raise ProtocolError(f"{kind.name}: it has no fields")
    try:
        found = msgpack.unpackb(body, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ProtocolError(f"{kind.name}: the body is no msgpack ({problem})") from None
    checks = FIELDS[kind]
    if type(found) is not dict or found.keys() != checks.keys():
        names = ", ".join(checks) or "none"
        raise ProtocolError(f"{kind.name}: its fields must be exactly these: {names}")
    for name, check in checks.items():
        if not check(found[name]):
            raise ProtocolError(f"{kind.name}: field {name!r} is out of range or of another type")
    return found


def credentials(connected: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel tells them. Raises OSError."""
    data = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


class Channel:
    """Messages over a connected socket; one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._buffer = bytearray(_FIRST_BUFFER)
        self._begin = self._end = 0  # what has come and was not yet taken
        self._fds: list[int] = []
        self._descriptors = False
        self._looks = True  # before it sleeps

    def send(
        self, kind: Type, number: int, body: bytes | bytearray = b"", fds: Sequence[int] = ()
    ) -> None:
        """Send one message. Raises OSError."""
        data = HEADER.pack(MAGIC, VERSION, kind, len(body), number) + body
        if fds:
            sent = socket.send_fds(self.socket, [data[: _FIRST_BUFFER // 2]], list(fds))
            data = data[sent:]
        if data:
            self.socket.sendall(data)

    def receive(self, descriptors: bool = False) -> Message | None:
        """The next message; None at the end of the connection. Raises OSError, and ProtocolError
        for a header that is none, a body too long, or an end within a message.

        descriptors: take file descriptors that come with it. A service never does, so that nobody
        can fill its table of open files; Linux closes what is not taken.
        """
        self._descriptors = descriptors
        if not self._wait_for(HEADER.size):
            return None
        magic, version, kind, length, number = HEADER.unpack_from(self._buffer, self._begin)
        if magic != MAGIC:
            raise ProtocolError(f"a message begins with {magic!r}; it must begin with {MAGIC!r}")
        if version != VERSION:
            raise OtherVersion(version)
        if length > MAX_BODY_BYTES:
            raise ProtocolError(f"a body of {length} bytes; at most {MAX_BODY_BYTES} are allowed")
        if kind not in _TYPES:
            raise ProtocolError(f"there is no message of type {kind}")
        if not self._wait_for(HEADER.size + length):
            raise ProtocolError("the connection ended within a message")
        start = self._begin + HEADER.size
        body = bytes(self._buffer[start : start + length])
        self._begin = start + length
        if self._begin == self._end:
            self._begin = self._end = 0
        fds, self._fds = tuple(self._fds), []
        return Message(_TYPES[kind], number, body, fds)

    def _wait_for(self, count: int) -> bool:
        """Have `count` bytes in the buffer. False if the connection ended between messages."""
        while self._end - self._begin < count:
            if self._begin + count > len(self._buffer):
                kept = bytes(self._buffer[self._begin : self._end])
                if count > len(self._buffer):
                    self._buffer = bytearray(count + _FIRST_BUFFER)
                self._buffer[: len(kept)] = kept
                self._begin, self._end = 0, len(kept)
            received = self._receive_some()
            if received == 0:
                if self._end == self._begin:
                    return False
                raise ProtocolError("the connection ended within a message")
            self._end += received
        return True

    def _receive_some(self) -> int:
        space = memoryview(self._buffer)[self._end :]
        if not self._descriptors:
            return self._receive_soon(space)
        received, ancillary, _, _ = self.socket.recvmsg_into(
            [space], socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
        return received

    def _receive_soon(self, space: memoryview) -> int:
        begun = time.perf_counter()
        if self._looks and self.socket.gettimeout() is None:
            while time.perf_counter() < begun + _LOOK_SECONDS:
                with contextlib.suppress(BlockingIOError):
                    return self.socket.recv_into(space, 0, socket.MSG_DONTWAIT)
                os.sched_yield()  # the other side may wait for this processor
        received = self.socket.recv_into(space)
        self._looks = time.perf_counter() < begun + 2 * _LOOK_SECONDS
        return received

    def skip_to(self, last: bytes) -> None:
        """Drop all that comes until it ends with `last`. Raises OSError, ProtocolError."""
        seen = bytes(self._buffer[self._begin : self._end])
        while not seen.endswith(last):
            self._begin = self._end = 0
            received = self._receive_some()
            if not received:
                raise ProtocolError("the connection ended")
            seen = (seen + self._buffer[:received])[-len(last) :]
        self._begin = self._end = 0
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self.socket.close()
