"""The device service: one process that owns the chip, a thread for each client.

The thread of a connection runs that client's launches itself, when their turn has come: a request
is answered by the thread that received it, without another hop. One more thread watches for clients
that end, and for interrupts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from pagoda import __version__
from pagoda.isa import CONTRACT_VERSION, Chip, ChipError
from pagoda.isa.machine import Machine
from pagoda.runtime.device import host_threads
from pagoda.runtime.errors import ServiceError
from pagoda.runtime.memory import OutOfDeviceMemory
from pagoda.runtime.scheduler import Scheduler
from pagoda.runtime.service.context import Context, MachineFactory, Peer, Refused, Share
from pagoda.runtime.service.grants import Account, available_host_bytes
from pagoda.runtime.service.launches import pack_chip
from pagoda.runtime.service.limits import Limits
from pagoda.runtime.service.paths import Lock, prepare
from pagoda.runtime.service.protocol import (
    ANSWER,
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
from pagoda.runtime.service.shared_memory import SharedMemory
from pagoda.runtime.service.watch import Client, Watch
from pagoda.sim import Simulator

MAX_CONTEXTS = 512
_MAX_CONNECTIONS = 2 * MAX_CONTEXTS  # each is a thread
_MOST_FOR_OWNER = _MAX_CONNECTIONS + 16  # who must be able to stop it, whoever else is there
_GREETING_SECONDS = 10.0
_PART_OF_HOST = 8  # one part in so many, for the trace of one launch
_SLACK_BYTES = 1 << 20  # of memory touched outside of grants: nobody is ended for a page

log = logging.getLogger("pagoda.device")


class Service:
    """The service of one chip on one socket. `run` serves until `stop`.

    mode: of the socket's file; it decides who may connect. machine: makes the machines that
    contexts run on; by default simulators, on so many host threads as there are processors.
    Raises ServiceError, and AlreadyRunning if another service has the socket.
    """

    def __init__(
        self,
        chip: Chip,
        path: Path,
        *,
        limits: Limits | None = None,
        mode: int = 0o600,
        machine: MachineFactory | None = None,
        problems: list[str] | None = None,
    ) -> None:
        self.chip, self.path = chip, path
        self._limits, self._mode = limits or Limits(), mode
        self._machine = machine or _simulator
        self.problems = problems if problems is not None else []  # such as a full disk
        self._account = Account(chip.dram_bytes, available_host_bytes)
        self._account.untouched = self._untouched
        self._scheduler = Scheduler(chip.cores)
        self._clients: set[Client] = set()
        self._lock = threading.Lock()  # over the clients
        self._numbers = iter(range(1, 1 << 62))
        self._stopping = threading.Event()
        self._resets = 0
        self._past = dict(launches=0, cycles=0, faults=0, contexts=0)
        self._began = time.monotonic()
        SharedMemory(chip.dram_bytes).close()  # or nobody could open a context
        prepare(path)
        self._file_lock = Lock(path)
        self._listener = self._listen()
        self._watch = Watch(self._tick)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):  # of a service that was killed
                self.path.unlink()
            listener.bind(str(self.path))
            self.path.chmod(self._mode)
            listener.listen(128)
        except OSError as error:
            listener.close()
            self._file_lock.release()
            raise ServiceError(
                f"device service: socket {self.path} cannot be made ({error.strerror}); choose "
                "another place with --socket"
            ) from None
        return listener

    def run(self) -> None:
        """Serve until `stop`; then end all contexts and remove the socket."""
        self._watch.start()
        log.info("chip %s on %s, process %d", self.chip.name, self.path, os.getpid())
        try:
            while not self._stopping.is_set():
                try:
                    connected, _ = self._listener.accept()
                except OSError as error:
                    if self._stopping.is_set():
                        break
                    log.error("accept: %s", error)
                    time.sleep(0.1)  # out of descriptors: some client will end
                    continue
                if self._refuse_crowd(connected):
                    continue
                serve = threading.Thread(
                    target=self._serve, args=(connected,), name="pagoda client", daemon=True
                )
                try:
                    serve.start()
                except RuntimeError as error:  # too many threads
                    log.error("%s", error)
                    connected.close()
        finally:
            self._close()

    def _refuse_crowd(self, connected: socket.socket) -> bool:
        """Whether there is no room for a connection; then it is closed."""
        count = len(self._snapshot())
        if count < _MAX_CONNECTIONS:
            return False
        channel = Channel(connected)
        with contextlib.suppress(OSError):  # it went away, or does not read
            if credentials(connected)[1] in (os.geteuid(), 0) and count < _MOST_FOR_OWNER:
                return False
            connected.setblocking(False)
            text = (
                f"the device service on {self.path} has {count:,} connections, and takes no more; "
                "try again when other programs have ended"
            )
            channel.send(Type.REFUSED, 0, pack(Type.REFUSED, code="crowded", text=text))
        channel.close()
        return True

    def stop(self) -> None:
        """Have `run` return."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._listener.close()
        text = f"the device service on {self.path} was stopped"
        for client in self._snapshot():
            if client.context is not None:
                client.context.lose(Refused("lost", text))
        self._watch.stop()  # or it would take what follows for clients that went away
        deadline = time.monotonic() + 1.0
        while self._snapshot() and time.monotonic() < deadline:
            for client in self._snapshot():
                with contextlib.suppress(OSError):
                    client.channel.socket.shutdown(socket.SHUT_RD)
            time.sleep(0.01)
        self._file_lock.release()
        log.info("stopped")

    def reset(self, by: str) -> None:
        """End every launch and every context; the chip is free at once, also if a launch hangs."""
        with self._lock:
            self._resets += 1
            contexts = [client.context for client in self._clients if client.context]
        text = f"the device was reset by {by}"
        for context in contexts:
            context.lose(Refused("lost", text))
        self._scheduler.reset()  # a launch that hangs keeps its thread, but not the cores
        log.warning("reset by %s: %d contexts ended", by, len(contexts))

    # One connection.

    def _serve(self, connected: socket.socket) -> None:
        channel = Channel(connected)
        try:
            pid, uid = credentials(connected)
            client = Client(channel, Peer(pid, uid, _user_name(uid)))
        except OSError:
            channel.close()
            return
        with self._lock:
            self._clients.add(client)
        try:
            self._converse(client)
        except OSError as error:  # it went away, or does not read
            log.info("%s: connection ended: %s", client.peer, error)
        except Exception:
            log.exception("%s: internal error", client.peer)
            self._refuse(
                client, 0, Refused("internal", "internal error of the device service; see its log")
            )
        finally:
            self._end(client)

    def _end(self, client: Client) -> None:
        self._watch.forget(client)
        with self._lock:
            self._clients.discard(client)
            if client.context is not None:
                self._past["contexts"] += 1
                for name in ("launches", "cycles", "faults"):
                    self._past[name] += getattr(client.context, name)
        if client.context is not None:
            client.context.close()
            log.info("context %d of %s ended", client.context.number, client.context)
        client.channel.close()

    def _converse(self, client: Client) -> None:
        channel = client.channel
        channel.socket.settimeout(_GREETING_SECONDS)
        while True:
            number = 0
            try:
                message = channel.receive()
                if message is None:
                    return
                number = message.number
                kind, body, fd = self._answer(client, message)
            except OtherVersion as other:
                self._refuse(client, number, Refused("version", self._other_protocol(other)))
                return
            except ProtocolError as error:
                log.warning("%s: %s", client.peer, error)
                self._refuse(client, number, Refused("protocol", f"broken message: {error}"))
                return
            except Refused as refused:
                self._refuse(client, number, refused)
                if not client.greeted:
                    return
                continue
            except OutOfDeviceMemory as error:
                self._refuse(client, number, Refused("memory", str(error)))
                continue
            except ServiceError as error:
                self._refuse(client, number, Refused("service", str(error)))
                continue
            fds = () if fd is None else (fd,)
            if kind is Type.OPENED:
                fds = client.context.memory.fd, client.context.interrupts
            try:
                channel.send(kind, number, body, fds)
            finally:
                if fd is not None:
                    os.close(fd)
            if message.type is Type.STOP:
                self.stop()

    def _refuse(self, client: Client, number: int, refused: Refused) -> None:
        with contextlib.suppress(OSError):
            body = pack(Type.REFUSED, code=refused.code, text=str(refused)[:10_000])
            client.channel.send(Type.REFUSED, number, body)

    def _answer(self, client: Client, message: Message) -> tuple[Type, bytes, int | None]:
        """The reply to a request: type, body, a descriptor to send along and close."""
        kind, context = message.type, client.context
        if kind is Type.LAUNCH and context is not None:
            return Type.RESULT, *context.launch(message.body)
        if kind not in _ANSWERS or (kind is Type.HELLO) == client.greeted:
            raise ProtocolError(f"{kind.name} is no request for this moment")
        if kind in _OF_CONTEXTS and context is None:
            raise ProtocolError(f"{kind.name} comes before OPEN")
        fields = _ANSWERS[kind](self, client, message.fields())
        return ANSWER[kind], pack(ANSWER[kind], **fields), None

    def _hello(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        mine, theirs = (__version__, CONTRACT_VERSION), (fields["pagoda"], fields["contract"])
        if mine != theirs:
            raise Refused(
                "version",
                f"the device service on {self.path} is Pagoda {mine[0]} (contract version "
                f"{mine[1]}), this program is Pagoda {theirs[0]} (contract version {theirs[1]}); "
                f"{other_version_remedy(os.getpid())}",
            )
        if client.peer.uid not in (os.geteuid(), 0) and not self._mode & 0o066:
            raise Refused(
                "user",
                f"the device service on {self.path} belongs to user {_user_name(os.geteuid())}, "
                f"and {client.peer.user} may not use it; have it started with --mode 0660",
            )
        client.channel.socket.settimeout(None)
        client.name = "".join(c if c.isprintable() else "?" for c in fields["name"])
        client.greeted = True
        welcome = dict(contract=mine[1], pagoda=mine[0], pid=os.getpid(), chip=pack_chip(self.chip))
        return welcome

    def _open(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        if client.context is not None:
            raise ProtocolError("OPEN: the connection has a context already")
        if sum(other.context is not None for other in self._snapshot()) >= MAX_CONTEXTS:
            raise Refused(
                "crowded",
                f"the device service on {self.path} has {MAX_CONTEXTS} programs, and takes no "
                "more; try again when others have ended",
            )
        allowed = self._limits.of(client.peer.uid)
        priority = fields["priority"] or min(0, allowed.priority)
        weight = fields["time_share"] or min(1.0, allowed.weight)
        for name, value, most in (
            ("priority", priority, allowed.priority),
            ("time_share", weight, allowed.weight),
        ):
            if value > most:
                raise Refused(
                    "limit",
                    f"{name} = {value}: user {client.peer.user} may have at most {most}; ask for "
                    "less, or have the limit raised in the service's configuration",
                )
        try:
            chip = self.chip.partition(fields["cores"] or self.chip.cores)
        except ChipError as error:
            raise Refused("chip", str(error)) from None
        most = min(allowed.memory, self.chip.dram_bytes)
        limit = min(fields["memory_limit"] or most, most)

        share = Share(f"{client.peer.user}/{client.name}", priority, weight)
        context = Context(
            next(self._numbers), client.peer, client.name, chip, self._account,
            allowed, limit, self._scheduler, share, self._machine,
        )  # fmt: skip
        with self._lock:
            client.context = context
        self._watch.add(client)
        log.info("context %d: %s, chip %s", context.number, context, chip.name)
        return dict(chip=pack_chip(chip), memory_limit=limit)

    def _grant(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        client.context.release(fields["release"])
        start, nbytes = client.context.grant(fields["bytes"])
        return dict(start=start, bytes=nbytes)

    def _release(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        client.context.release(fields["release"])
        return {}

    def _program(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        return dict(program=client.context.add_program(**fields))

    def _resume(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        client.context.resume()
        return {}

    def _status(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        return dict(figures=self.figures())

    def _reset(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        self._require_owner(client, "reset")
        self.reset(f"{client.peer.user} (process {client.peer.pid})")
        return {}

    def _stop(self, client: Client, fields: dict[str, Any]) -> dict[str, Any]:
        self._require_owner(client, "stop")
        return {}

    def _require_owner(self, client: Client, what: str) -> None:
        if client.peer.uid not in (os.geteuid(), 0):
            raise Refused(
                "user",
                f"{what}: only user {_user_name(os.geteuid())}, who started the device service on "
                f"{self.path}, and root may do that; ask them",
            )

    def _other_protocol(self, other: OtherVersion) -> str:
        return (
            f"the device service on {self.path} is Pagoda {__version__} and speaks protocol "
            f"version {VERSION}, this program speaks version {other.found}; "
            f"{other_version_remedy(os.getpid())}"
        )

    # What is going on.

    def figures(self) -> dict[str, Any]:
        """Plain data for `status`, `top` and metrics."""
        contexts = [client.context.figures() for client in self._snapshot() if client.context]
        total = sum(each["cycles"] for each in contexts)
        for each in contexts:
            each["share"] = round(each["cycles"] / total, 4) if total else 0.0
        sums = {
            name: self._past[name] + sum(each[name] for each in contexts)
            for name in ("launches", "cycles", "faults")
        }
        return {
            "device": str(self.path),
            "pid": os.getpid(),
            "user": _user_name(os.geteuid()),
            "pagoda": __version__,
            "chip": pack_chip(self.chip),
            "uptime_seconds": round(time.monotonic() - self._began, 3),
            "resets": self._resets,
            "memory_bytes": self._account.granted,
            "memory_total_bytes": self._account.total,
            **sums,
            "queue": self._scheduler.snapshot(),
            "contexts": sorted(contexts, key=lambda each: each["context"]),
            "problems": list(self.problems),
        }

    def _snapshot(self) -> list[Client]:
        with self._lock:
            return list(self._clients)

    def _untouched(self) -> int:
        contexts = [client.context for client in self._snapshot() if client.context]
        return sum(max(each.held - each.memory.taken(), 0) for each in contexts)

    def _tick(self) -> None:
        """Once in a while: end whoever uses memory that was not granted."""
        for client in self._snapshot():
            context = client.context
            if context and not context.lost and context.overdrawn() > _SLACK_BYTES:
                text = (
                    f"{context} wrote to {context.overdrawn():,} bytes of the device's memory that "
                    "were not granted to it, and was ended"
                )
                log.warning("%s", text)
                context.lose(Refused("lost", text))


_ANSWERS = {
    Type.HELLO: Service._hello,
    Type.OPEN: Service._open,
    Type.GRANT: Service._grant,
    Type.RELEASE: Service._release,
    Type.PROGRAM: Service._program,
    Type.RESUME: Service._resume,
    Type.STATUS: Service._status,
    Type.RESET: Service._reset,
    Type.STOP: Service._stop,
}
_OF_CONTEXTS = {Type.GRANT, Type.RELEASE, Type.PROGRAM, Type.LAUNCH, Type.RESUME}


def _simulator(chip: Chip, dram: np.ndarray) -> Machine:
    return Simulator(chip, threads=host_threads(), dram=dram, trace_room=_has_room)


def _has_room(nbytes: int) -> bool:
    """Whether a trace may become so long: no client may use up the host's memory."""
    return nbytes < available_host_bytes() // _PART_OF_HOST


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
