"""The client's side of the device service: a connection, and a `Machine` behind it."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import struct
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from pagoda import __version__
from pagoda.isa import CONTRACT_VERSION, Launch, Program, Result
from pagoda.isa.machine import MachineBase
from pagoda.runtime.errors import DeviceLost, ServiceError
from pagoda.runtime.interrupts import held_interrupts
from pagoda.runtime.memory import OutOfDeviceMemory
from pagoda.runtime.service.launches import Outcome, pack_launch, unpack_chip, unpack_result
from pagoda.runtime.service.paths import DEFAULT_NAME, name_of
from pagoda.runtime.service.protocol import (
    ANSWER,
    HEADER,
    MAGIC,
    VERSION,
    Channel,
    Message,
    OtherVersion,
    ProtocolError,
    Type,
    credentials,
    other_version_remedy,
    pack,
)
from pagoda.runtime.service.shared_memory import map_shared

_MAX_PROGRAMS = 1024  # known by number; each is kept alive
_SENT_AT_ONCE = 1 << 14  # bytes that a socket takes whole, or not at all
_TIMEVAL = struct.Struct("ll")
_ANSWER_SECONDS = 10.0  # until a living service has greeted


class NotRunning(ServiceError):
    """Nobody listens on the socket."""

    def __init__(self, path: Path) -> None:
        name = name_of(path)
        which = f"--name {shlex.quote(name)}" if name else f"--socket {shlex.quote(str(path))}"
        where = "" if name == DEFAULT_NAME else f" {which}"
        remedy = f"start one with `pagoda device start{where}`"
        if os.path.isdir(path) or os.path.isfile(path):
            what = "a folder" if os.path.isdir(path) else "a file"
            remedy = f"that is {what}, and must be a socket; correct the path"
        super().__init__(
            f"no device service runs on {path}; {remedy}, or set PAGODA_DEVICE=embedded to do "
            "without"
        )


class Connection:
    """A greeted connection to the service on a socket. Threads may share it.

    Raises NotRunning, and ServiceError if the service may not be used or is of another version.
    """

    def __init__(
        self, path: Path, name: str | None = None, owners: Collection[int] | None = None
    ) -> None:
        """name: what the service's figures call this process; by default its program's name.
        owners: users whose service it may be; one of somebody else counts as none. None: anybody.
        """
        self.path = path
        connected = _connect(path)
        pid, owner = credentials(connected)
        if owners is not None and owner not in owners:
            connected.close()
            raise NotRunning(path)
        self._channel = Channel(connected)
        self._lock = threading.Lock()
        self._number = 0
        self._process = os.getpid()
        self._broken = ""  # why nothing more can be asked
        # Of the last request: an exception came before its answer had, or before it was sent.
        self._torn = self._cut = False
        hello = dict(
            contract=CONTRACT_VERSION, pagoda=__version__, name=(name or _program_name())[:200]
        )
        self._channel.socket.settimeout(_ANSWER_SECONDS)
        try:
            welcome = self.ask(Type.HELLO, **hello).fields()
            if (welcome["pagoda"], welcome["contract"]) != (__version__, CONTRACT_VERSION):
                raise ServiceError(
                    f"the device service on {path} is Pagoda {welcome['pagoda']} (contract "
                    f"version {welcome['contract']}), this program is Pagoda {__version__} "
                    f"(contract version {CONTRACT_VERSION}); {other_version_remedy(pid)}"
                )
            self.pid: int = welcome["pid"]
            self.chip = unpack_chip(welcome["chip"])
        except TimeoutError:
            self.close()
            raise ServiceError(
                f"device service on {path}: process {pid} has not answered for "
                f"{_ANSWER_SECONDS:.0f} s; end it and start the service again, check the path, or "
                "set PAGODA_DEVICE=embedded to do without"
            ) from None
        except (DeviceLost, ProtocolError) as error:
            self.close()
            why = error.__context__ or "the connection ended"
            raise ServiceError(
                f"device service on {path}: what answers there is none ({why}); check the path"
            ) from None
        except BaseException:
            self.close()
            raise
        self._channel.socket.settimeout(None)

    def ask(self, kind: Type, **fields: Any) -> Message:
        """Send a request; returns the answer. Raises DeviceLost, and what `refusal` says."""
        # Ctrl-C must not tear a request, or lose what it was granted. The second one does not wait,
        # nor does any before the greeting is over: whoever listens may not be a service at all.
        held = contextlib.nullcontext() if kind is Type.HELLO else held_interrupts(self._hang_up)
        with self._lock, held:
            return self._exchange(kind, pack(kind, **fields), "a request", kind is Type.OPEN)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.socket.shutdown(socket.SHUT_RDWR)

    def launch(self, body: bytes, what: str, traced: bool, interrupt: int) -> Message:
        """As `ask`, for a packed launch. what: names it in messages; traced: it asks for a trace.

        An exception that a signal raises meanwhile, such as KeyboardInterrupt, ends the launch:
        `interrupt` is the eventfd that asks for that.
        """
        with self._lock:
            try:
                return self._exchange(Type.LAUNCH, body, what, traced)
            except BaseException:
                if self._torn and not self._broken:
                    os.eventfd_write(interrupt, 1)
                    self._catch_up()
                raise

    def _catch_up(self) -> None:
        """Skip what is on its way, of which an unknown part has been read and dropped: ask
        something and read to the end of its answer, the last thing that will come. A second Ctrl-C
        ends the wait for it; the next request then catches up."""
        self._number = (self._number + 1) & 0xFFFFFFFF
        body = pack(Type.DONE)
        last = HEADER.pack(MAGIC, VERSION, Type.DONE, len(body), self._number) + body
        try:
            if self._cut:
                raise ProtocolError("it was cut off while it was sent")
            self._channel.send(Type.RESUME, self._number, pack(Type.RESUME))
            self._channel.skip_to(last)
        except (OSError, ProtocolError) as error:
            self._give_up("an interrupted request", f" ({error})")
        self._torn = False

    def try_ask(self, kind: Type, **fields: Any) -> bool:
        """As `ask`, unless the connection is in use or broken: then False. For finalizers, which
        may run in the middle of anything."""
        if self._broken or not self._lock.acquire(blocking=False):
            return False
        try:
            self._exchange(kind, pack(kind, **fields), "a request", False)
        except DeviceLost:
            return False
        finally:
            self._lock.release()
        return True

    def _exchange(self, kind: Type, body: bytes, what: str, descriptors: bool) -> Message:
        if self._process != os.getpid():
            raise DeviceLost(
                "this process was forked from one that uses the device service, and cannot use its "
                "device; open the device after the fork (multiprocessing: start method 'spawn')"
            )
        if self._broken:
            raise DeviceLost(self._broken)
        if self._torn:
            self._catch_up()
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        self._torn, self._cut = True, len(body) > _SENT_AT_ONCE
        try:
            with contextlib.suppress(BrokenPipeError):  # it may have told why before it went
                self._channel.send(kind, number, body)
            self._cut = False
            answer = self._channel.receive(descriptors)
            self._torn = False
        except OtherVersion as other:
            self._break(
                f"the device service on {self.path} speaks protocol version {other.found}, this "
                f"program (Pagoda {__version__}) speaks version {VERSION}; "
                f"{other_version_remedy(credentials(self._channel.socket)[0])}"
            )
            raise ServiceError(self._broken) from None
        except (OSError, ProtocolError) as error:
            if isinstance(error, OSError) and error.errno is None:
                raise  # not the socket's: time is over, or a signal's handler has raised it
            self._give_up(what, f" ({error})")
        if answer is None:
            self._give_up(what)
        if answer.type is Type.REFUSED:
            self._refused(answer)
        if answer.number != number or answer.type is not ANSWER[kind]:
            self._give_up(what, " (it answered another question)")
        return answer

    def _give_up(self, what: str, why: str = "") -> NoReturn:
        text = f"the device service on {self.path} went away during {what}{why}; {_AFTERWARDS}"
        self._break(text)
        raise DeviceLost(text)

    def _break(self, text: str) -> None:
        self._broken = text
        if self._process == os.getpid():  # forked children hold the socket open, too
            with contextlib.suppress(OSError):
                self._channel.socket.shutdown(socket.SHUT_RDWR)
        self._channel.close()

    def _refused(self, answer: Message) -> NoReturn:
        refusal = answer.fields()
        code, text = refusal["code"], refusal["text"]
        if code == "memory":
            raise OutOfDeviceMemory(text)
        if code == "lost":
            raise DeviceLost(f"{text}; {_KEPT}; open it again with pagoda.use_chip")
        if code in ("slot", "launch"):
            raise ValueError(text)
        raise ServiceError(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the service frees what belongs to it."""
        self._break("the device was closed; open it again")

    def figures(self) -> dict[str, Any]:
        """What goes on in the service."""
        return self.ask(Type.STATUS).fields()["figures"]


_KEPT = "what its tensors hold can still be copied to the host"
_AFTERWARDS = f"{_KEPT}; start the service again with `pagoda device start`, and the program"


def answers(path: Path) -> bool:
    """Whether a service runs on the socket. Raises ServiceError if it may not be used."""
    try:
        Connection(path).close()
    except NotRunning:
        return False
    return True


class RemoteMachine(MachineBase):
    """A context on the service's chip, or on some of its cores, as a `Machine`.

    Its `dram` is memory that the service maps, too; only what `grant` has given may be used. The
    arguments are wishes, which the service may refuse: ServiceError.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        cores: int | None = None,
        priority: int = 0,
        time_share: float | None = None,
        memory_limit: int | None = None,
    ) -> None:
        """cores: a partition of so many; None: all. time_share: weight against others' 1."""
        self._connection = connection
        opened = connection.ask(
            Type.OPEN, cores=cores, priority=priority, time_share=time_share,
            memory_limit=memory_limit,
        )  # fmt: skip
        fields = opened.fields()
        memory, self._interrupt = opened.fds
        chip = unpack_chip(fields["chip"])
        self.memory_limit: int = fields["memory_limit"]
        self._numbers: dict[int, tuple[Program, int]] = {}  # by id: what the service calls it
        try:
            dram = np.frombuffer(map_shared(memory, chip.dram_bytes), np.uint8)
        except OSError as error:
            raise ServiceError(
                f"device service on {connection.path}: its shared memory of "
                f"{chip.dram_bytes:,} bytes cannot be mapped here ({os.strerror(error.errno or 0)})"
                "; raise this process's limit on memory (ulimit -v), or choose a chip with less "
                "DRAM"
            ) from None
        finally:
            os.close(memory)
        super().__init__(chip, dram, tracing=False)

    def grant(self, nbytes: int, released: list[tuple[int, int]]) -> tuple[int, int]:
        """More memory, all zeros; see `memory.Owner`."""
        answer = self._connection.ask(Type.GRANT, bytes=nbytes, release=released).fields()
        return answer["start"], answer["bytes"]

    def left(self) -> int:
        """See `memory.Owner`."""
        figures = self._connection.figures()
        return figures["memory_total_bytes"] - figures["memory_bytes"]

    def release(self, released: list[tuple[int, int]]) -> bool:
        """See `memory.Owner`."""
        return self._connection.try_ask(Type.RELEASE, release=released)

    def start(self, launch: Launch) -> None:
        """See `MachineBase.start`. A program is checked when it is first sent; what else a launch
        says is checked by the service."""
        self._launch = None  # one that was accepted and, by a Ctrl-C, never begun
        if id(launch.program) in self._numbers:
            self._launch = launch
        else:
            super().start(launch)

    def wait(self) -> Result:
        """Run the accepted launch when its turn has come. Ctrl-C ends it and leaves the machine
        usable. Raises DeviceLost."""
        launch = self._accepted()
        tracing, what = self.tracing, f"launch of {launch.program.name!r}"
        while True:
            number = self._number(launch)
            body = pack_launch(number, tracing, launch)
            answer = self._connection.launch(body, what, tracing, self._interrupt)
            try:
                outcome, result = unpack_result(answer.body, answer.fds, tracing)
            finally:
                for fd in answer.fds:
                    os.close(fd)
            if outcome is Outcome.FINISHED:
                return result
            if outcome is Outcome.INTERRUPTED:
                raise KeyboardInterrupt
            del self._numbers[id(launch.program)]

    def _number(self, launch: Launch) -> int:
        """What the service calls the launch's program."""
        program = launch.program
        known = self._numbers.get(id(program))
        if known is not None:
            return known[1]
        answer = self._connection.ask(
            Type.PROGRAM, name=program.name, code=program.code, entry=program.entry,
            stack_limit=program.stack_limit,
        )  # fmt: skip
        number = answer.fields()["program"]
        if len(self._numbers) >= _MAX_PROGRAMS:
            self._numbers.clear()
        self._numbers[id(program)] = program, number
        return number

    def close(self) -> None:
        """Give everything back; tensors keep what they hold as long as they live."""
        self._connection.close()
        if self._interrupt >= 0:
            os.close(self._interrupt)
            self._interrupt = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()


def _connect(path: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The time until a service that accepts nobody has room in its queue.
        connected.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(_ANSWER_SECONDS), 0)
        )
        connected.connect(str(path))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connected.close()
        raise NotRunning(path) from None
    except PermissionError:
        connected.close()
        raise ServiceError(
            f"the device service on {path} may not be used by this user: the socket's permissions "
            "do not allow it; have it started with --mode 0660 and join its group, or start one of "
            "your own"
        ) from None
    except BlockingIOError:
        connected.close()
        raise ServiceError(
            f"device service on {path}: it has accepted nobody for {_ANSWER_SECONDS:.0f} s; end it "
            "and start the service again, check the path, or set PAGODA_DEVICE=embedded to do "
            "without"
        ) from None
    except OSError as error:
        connected.close()
        raise ServiceError(
            f"device service on {path}: no connection ({error.strerror}); check the path"
        ) from None
    return connected


def _program_name() -> str:
    return os.path.basename(sys.argv[0] if sys.argv else "") or "python"
