"""One client on the shared chip: its memory, its programs, its launches, and what they took.

A context is private by construction: it has a memory of its own and a machine of its own, whose
local memories and command fields nobody else's launches touch. What contexts share is the chip's
time, launch by launch, and the number of bytes of its DRAM.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from pagoda.isa import Chip, Interrupted, Launch, Program, Result
from pagoda.isa.machine import Machine
from pagoda.runtime.errors import ServiceError
from pagoda.runtime.scheduler import Scheduler, Tenant, TenantGone
from pagoda.runtime.service.grants import Account, Grants
from pagoda.runtime.service.launches import (
    Outcome,
    PackedLaunch,
    pack_result,
    unpack_launch,
)
from pagoda.runtime.service.limits import UserLimits
from pagoda.runtime.service.protocol import ProtocolError
from pagoda.runtime.service.shared_memory import SharedMemory
from pagoda.sim.machine import TraceTooLong

_MAX_PROGRAM_BYTES = 32 << 20  # of one context's programs; those used longest ago are forgotten
_PROGRAM_OVERHEAD = 16 << 10  # their names and tables
_MAX_KNOWN_LAUNCHES, _LONGEST_KNOWN = 256, 8 << 10  # and bytes of one

# Makes the machine that runs a context's launches, on its memory.
MachineFactory = Callable[[Chip, np.ndarray], Machine]


class Refused(Exception):
    """The service does not do what a client asks for. code: for programs; text: for the user."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a connection, as the kernel tells it."""

    pid: int
    uid: int
    user: str


@dataclass(frozen=True)
class Share:
    """What a context asks of the scheduler. name: whose past counts if it opens again."""

    name: str
    priority: int
    weight: float


class Context:
    """See above. One thread, the connection's, calls everything but `lose`, `interrupt` and
    `figures`."""

    def __init__(
        self,
        number: int,
        peer: Peer,
        name: str,
        chip: Chip,
        account: Account,
        allowed: UserLimits,
        limit: int,
        scheduler: Scheduler,
        share: Share,
        machine: MachineFactory,
    ) -> None:
        """limit: bytes of this context; `allowed.memory`: of all of its user's.

        Raises ServiceError if the host has no memory or descriptors for it.
        """
        self.number, self.peer, self.name, self.chip = number, peer, name, chip
        self.memory = SharedMemory(chip.dram_bytes)
        try:
            self.interrupts = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            self.memory.close()
            raise ServiceError(
                f"the device service has no room for another program ({error.strerror}); try "
                "again when others have ended"
            ) from None
        self.lost: Refused | None = None  # why nothing more can be launched
        self.launches = self.cycles = self.faults = 0
        self._account, self._allowed, self.limit = account, allowed, limit
        self._grants = Grants(chip.dram_bytes)
        self._scheduler, self._share = scheduler, share
        self._tenant = self._join()
        self._machine: Machine | None = machine(chip, self.memory.array)
        self._lock = Lock()  # over the next three, and `lost`
        self._running: Machine | None = None
        self._cancelled = False
        self.state = "idle"  # then "waiting", "running"
        self._programs: OrderedDict[int, Program] = OrderedDict()
        self._program_bytes = 0
        self._next_program = 0
        self._known: OrderedDict[bytes, tuple[Launch, bool]] = OrderedDict()
        self._opened = time.monotonic()

    def _join(self) -> Tenant:
        """A place in the queue."""
        share = self._share
        return self._scheduler.join(
            share.name, priority=share.priority, weight=share.weight, cores=self.chip.cores
        )

    # Memory.

    def grant(self, nbytes: int) -> tuple[int, int]:
        """More memory, all zeros: (start, bytes). Raises OutOfDeviceMemory, Refused."""
        with self._lock:
            self._require_alive()
            return self._account.take(
                self._grants, nbytes, self.limit, self.peer.uid, self._allowed.memory, str(self)
            )

    def release(self, ranges: list[list[int]]) -> None:
        """Take memory back. Raises ProtocolError for ranges that were not granted."""
        self._known.clear()
        for start, nbytes in ranges:
            with self._lock:
                if self.lost:
                    return
                if not self._grants.remove(start, nbytes):
                    raise ProtocolError(f"{nbytes} bytes at {start:#x} are released, not granted")
                self.memory.erase(start, nbytes)
                self._account.give_back(nbytes, self.peer.uid)

    @property
    def held(self) -> int:
        """Bytes of DRAM granted."""
        return self._grants.held

    # Launches.

    def add_program(self, name: str, code: bytes, entry: int, stack_limit: int) -> int:
        """Keep a program; returns its number. Raises ProtocolError."""
        try:
            program = Program(name, code, entry, stack_limit)
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        number = self._next_program
        self._next_program += 1
        self._programs[number] = program
        self._program_bytes += len(code) + _PROGRAM_OVERHEAD
        while self._program_bytes > _MAX_PROGRAM_BYTES:
            _, oldest = self._programs.popitem(last=False)
            self._program_bytes -= len(oldest.code) + _PROGRAM_OVERHEAD
            self._known.clear()
        return number

    def launch(self, body: bytes) -> tuple[bytes, int | None]:
        """Run a packed launch when its turn has come; see `launches.pack_result`.

        Raises ProtocolError, and Refused if the launch may not run or the context is lost.
        """
        known = self._known.get(body)
        if known is None:
            packed = unpack_launch(body)
            program = self._programs.get(packed.program)
            if program is None:
                return pack_result(Outcome.UNKNOWN_PROGRAM)
            self._programs.move_to_end(packed.program)
            known = self._checked(program, packed), packed.tracing
            if len(body) <= _LONGEST_KNOWN:
                self._known[body] = known
            if len(self._known) > _MAX_KNOWN_LAUNCHES:
                self._known.popitem(last=False)
        try:
            result = self._run(*known)
        except (TenantGone, Interrupted):
            return self._ended_early()
        finally:
            self.state = "idle"
        self.launches += 1
        self.faults += result.fault is not None
        return pack_result(Outcome.FINISHED, result)

    def _checked(self, program: Program, packed: PackedLaunch) -> Launch:
        for number, slot in enumerate(packed.slots):
            if not self._grants.hold(slot.base, slot.size):
                raise Refused(
                    "slot",
                    f"launch of {program.name!r}: slot {number}, {slot.size:,} bytes at "
                    f"{slot.base:#x}: not in memory that the device service has granted to this "
                    "process; allocate it from the device first",
                )
        watchdog = min(packed.watchdog, self._allowed.watchdog)
        return Launch(program, packed.args, packed.slots, watchdog)

    def _run(self, launch: Launch, tracing: bool) -> Result:
        self.state = "waiting"
        with self._scheduler.turn(self._tenant) as turn:
            with self._lock:
                machine = self._machine
                if self.lost or self._cancelled or machine is None:
                    raise Interrupted(0)
                machine.tracing = tracing
                try:
                    machine.start(launch)
                except ValueError as error:
                    raise Refused("launch", str(error)) from None
                self._running = machine
            self.state = "running"
            cycles = 0
            try:
                result = machine.wait()
                cycles = result.cycles
                return result
            except TraceTooLong as error:
                raise Refused("launch", str(error)) from None
            except Interrupted as interrupted:
                cycles = interrupted.cycles
                raise
            finally:
                self._running = None
                self.cycles += cycles
                turn.charge(cycles)

    def _ended_early(self) -> tuple[bytes, None]:
        with self._lock:
            self._require_alive()
            if self._cancelled:  # it has left the queue to stop waiting
                self._scheduler.leave(self._tenant)
                self._tenant = self._join()
                self._cancelled = False
        return pack_result(Outcome.INTERRUPTED)[0], None

    def resume(self) -> None:
        """The client has seen its interrupt's effect: forget interrupts that came later."""
        with self._lock:
            self._drain()

    def _drain(self) -> bool:
        try:
            os.eventfd_read(self.interrupts)
        except BlockingIOError:
            return False
        return True

    def _require_alive(self) -> None:
        if self.lost:
            raise self.lost

    # From other threads.

    def interrupt(self) -> None:
        """End the launch that runs or waits, if the client has asked for that."""
        with self._lock:
            if self._drain() and not self.lost:
                self._end_launch()

    def _end_launch(self) -> None:
        if self._running is not None:
            self._running.interrupt()
        elif self.state == "waiting":
            self._cancelled = True
            self._scheduler.leave(self._tenant)

    def lose(self, reason: Refused) -> None:
        """Nothing more is launched here, and what runs ends; its DRAM is free for others."""
        with self._lock:
            if self.lost:
                return
            self.lost = reason
            self._end_launch()
            self._scheduler.leave(self._tenant)
            self._machine = None
            self._account.give_back(self._grants.held, self.peer.uid)
            self._grants = Grants(self.chip.dram_bytes)

    def close(self) -> None:
        """The connection is over: everything is free again."""
        self.lose(Refused("closed", "the device was closed"))
        self.memory.close()
        os.close(self.interrupts)

    def overdrawn(self) -> int:
        """Bytes of host memory that the client has taken outside of what it was granted."""
        with self._lock:
            return 0 if self.lost else max(self.memory.taken() - self.held, 0)

    def figures(self) -> dict[str, Any]:
        """What is to be known about this context, as plain data."""
        return {
            "context": self.number,
            "tenant": self._tenant.order,  # in the scheduler's figures
            "pid": self.peer.pid,
            "name": self.name,
            "user": self.peer.user,
            "chip": self.chip.name,
            "cores": self.chip.cores,
            "priority": self._share.priority,
            "weight": self._share.weight,
            "memory_bytes": self.held,
            "memory_limit_bytes": self.limit,
            "launches": self.launches,
            "cycles": self.cycles,
            "faults": self.faults,
            "state": "lost" if self.lost else self.state,
            "seconds": round(time.monotonic() - self._opened, 3),
        }

    def __str__(self) -> str:
        return f"{self.name} (process {self.peer.pid}, user {self.peer.user})"
