"""Watches clients while their threads are busy: who has ended, who interrupts a launch."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pagoda.runtime.service.context import Context, Peer, Refused
from pagoda.runtime.service.protocol import Channel

_TICK_SECONDS = 1.0

log = logging.getLogger("pagoda.device")


@dataclass(eq=False)
class Client:
    """A connection. pidfd: becomes readable when the process ends; -1 if there is none."""

    channel: Channel
    peer: Peer
    name: str = ""
    context: Context | None = None
    pidfd: int = -1
    greeted: bool = False


class Watch:
    """Sees clients end while their thread is busy with a launch, and takes their interrupts."""

    def __init__(self, tick: Callable[[], None]) -> None:
        """tick: to be called once in a while."""
        self._tick = tick
        self._poll = select.epoll()
        self._events: dict[int, tuple[Client, str]] = {}
        self._lock = threading.Lock()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="pagoda watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over = True

    def add(self, client: Client) -> None:
        with contextlib.suppress(OSError):  # a process of another name space has no number here
            client.pidfd = os.pidfd_open(client.peer.pid)
        for fd, what, events in (
            (client.channel.socket.fileno(), "socket", select.EPOLLRDHUP),
            (client.context.interrupts, "interrupt", select.EPOLLIN),
            (client.pidfd, "process", select.EPOLLIN),
        ):
            if fd >= 0:
                with self._lock:
                    self._events[fd] = client, what
                    self._poll.register(fd, events | select.EPOLLONESHOT)

    def forget(self, client: Client) -> None:
        """To be called before the client's descriptors are closed."""
        with self._lock:
            for fd in [fd for fd, (who, _) in self._events.items() if who is client]:
                del self._events[fd]
                self._poll.unregister(fd)
        if client.pidfd >= 0:
            os.close(client.pidfd)
            client.pidfd = -1

    def _run(self) -> None:
        ticked = time.monotonic()
        while not self._over:
            for fd, _ in self._poll.poll(_TICK_SECONDS):
                try:
                    self._happened(fd)
                except Exception:
                    log.exception("internal error while watching clients")
            if time.monotonic() - ticked >= _TICK_SECONDS:
                ticked = time.monotonic()
                try:
                    self._tick()
                except Exception:
                    log.exception("internal error while watching memory")

    def _happened(self, fd: int) -> None:
        with self._lock:  # held, so that nobody closes the descriptors meanwhile
            client, what = self._events.get(fd, (None, ""))
            if self._over or client is None or client.context is None:
                return
            if what == "interrupt":
                client.context.interrupt()
                self._poll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)
                return
            if not _ended(fd, what):  # one that had this number before has ended
                return
        client.context.lose(Refused("lost", "its process ended"))
        with contextlib.suppress(OSError):  # a child may hold the connection of a dead process
            client.channel.socket.shutdown(socket.SHUT_RDWR)


def _ended(fd: int, what: str) -> bool:
    """Whether the other end of a socket has closed, or the process of a pidfd has ended."""
    now = select.poll()
    now.register(fd, select.POLLRDHUP if what == "socket" else select.POLLIN)
    return bool(now.poll(0))
