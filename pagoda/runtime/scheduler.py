"""Threads that launch take turns on the chip: the mechanism around `pagoda.runtime.policy`.

One lock, and for each waiting thread a lock of its own to sleep on: whoever changes something asks
the policy and wakes exactly those threads whose turn it is. No thread belongs to the scheduler.
"""

import math
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from pagoda.runtime import policy
from pagoda.runtime.policy import Await, Policy, Start

# A tenant whose launch has ended is awaited so long, and in sum no longer than its launches took:
# at worst half of the time is lost to waiting. One that was late more often than not is not awaited
# before that has changed.
PATIENCE_SECONDS = 0.005
_RECENT, _MOSTLY_LATE = 8, 0.5  # launches over which that is judged, and from which part on
# One that comes back later than that, but within this time, was not idle: it keeps its credit.
GRACE_SECONDS = 0.02


class TenantGone(RuntimeError):
    """The tenant has left the scheduler."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"tenant {name!r} has left the device: only a tenant that has joined can launch; "
            "open the device again"
        )


class Tenant(policy.Tenant):
    """A tenant with its waiting turns and its account. cycles and seconds are of ended turns."""

    def __init__(self, name: str, priority: int, weight: float, cores: int) -> None:
        super().__init__(name, priority, weight, cores)
        self.turns: deque[Turn] = deque()  # that wait, oldest first
        self.launches = 0
        self.cycles = 0
        self.core_cycles = 0
        self.core_seconds = 0.0
        self.waits = 0  # turns that had to wait
        self.waited_seconds = 0.0
        self.lateness = 0.0  # part of its recent launches after which it was late
        self.patience = 0.0  # seconds that it has earned to be awaited
        self.ended = -math.inf  # its last launch
        self.awaited_until = -math.inf  # after that, whether it was awaited or not


class Turn:
    """A context manager: waits for the tenant's turn, holds `cores` inside the `with` block."""

    def __init__(self, scheduler: "Scheduler", tenant: Tenant) -> None:
        self._scheduler = scheduler
        self.tenant = tenant
        self.cores: tuple[int, ...] = ()  # empty: not started yet
        self.cycles = 0
        self.generation = 0
        self.asked = 0.0
        self.started = 0.0
        self.bell: threading.Lock | None = None  # released to wake the thread that waits
        self.watch: float | None = None  # when to look again unless woken

    def charge(self, cycles: int) -> None:
        """Add chip cycles that this launch took; they count when the turn ends."""
        self.cycles += cycles

    def __enter__(self) -> Self:
        self._scheduler._begin(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._scheduler._end(self)


class Scheduler:
    """Turns on the cores of one chip. Safe to call from any thread.

    A tenant has one launch on the chip at a time; further turns of it wait in the order in which
    they were asked for. A thread that holds a turn must not wait for another of the same tenant.
    """

    def __init__(self, cores: int) -> None:
        self._lock = threading.Lock()
        self._policy = Policy(cores)
        self._tenants: list[Tenant] = []
        self._running: list[Turn] = []
        self._awaited: dict[Tenant, float] = {}  # until when
        self._generation = 0
        self._core_cycles = 0
        self._busy = [0.0] * cores  # seconds, of ended turns
        self._opened = time.monotonic()

    def join(
        self, name: str, *, priority: int = 0, weight: float = 1.0, cores: int | None = None
    ) -> Tenant:
        """A new tenant. cores: that each launch occupies, default all. Raises TenantError."""
        with self._lock:
            wanted = self._policy.cores if cores is None else cores
            tenant = Tenant(name, priority, weight, wanted)
            self._policy.join(tenant)
            self._tenants.append(tenant)
            return tenant

    def leave(self, tenant: Tenant) -> None:
        """Remove a tenant. Turns that wait raise TenantGone; one that runs ends as it would."""
        with self._lock:
            if not tenant.member:
                return
            self._policy.leave(tenant)
            self._tenants.remove(tenant)
            self._awaited.pop(tenant, None)
            for turn in tenant.turns:
                _ring(turn)
            tenant.turns.clear()
            self._dispatch()

    def turn(self, tenant: Tenant) -> Turn:
        """`with scheduler.turn(tenant) as turn:` blocks until it is this tenant's turn.

        Raises TenantGone there if the tenant has left, or leaves while it waits.
        """
        return Turn(self, tenant)

    def reset(self) -> None:
        """Abandon whatever runs: its cores are free at once, and what it does later is ignored."""
        with self._lock:
            self._generation += 1
            now = time.monotonic()
            for turn in self._running:
                self._count_busy(turn, now)
            self._running.clear()
            self._policy.reset()
            self._dispatch()

    def snapshot(self) -> dict[str, Any]:
        """The state as plain data. Seconds and cycles count from the start; compare two snapshots
        for a rate. Seconds include what runs now, cycles do not. share: of all core-cycles so far,
        those of tenants that left included."""
        with self._lock:
            now = time.monotonic()
            busy = list(self._busy)
            of_tenant = {tenant: tenant.core_seconds for tenant in self._tenants}
            for turn in self._running:
                for core in turn.cores:
                    busy[core] += now - turn.started
                if turn.tenant.member:
                    of_tenant[turn.tenant] += (now - turn.started) * len(turn.cores)
            return {
                "seconds": now - self._opened,
                "core_cycles": self._core_cycles,
                "cores": [{"busy_seconds": seconds} for seconds in busy],
                "running": [
                    {
                        "tenant": turn.tenant.order,
                        "name": turn.tenant.name,
                        "cores": list(turn.cores),
                        "seconds": now - turn.started,
                    }
                    for turn in self._running
                ],
                "waiting": [
                    {"tenant": t.order, "name": t.name, "turns": t.requests}
                    for t in self._policy.waiting()
                    if t.requests
                ],
                "tenants": [
                    {
                        "tenant": t.order,
                        "name": t.name,
                        "priority": t.priority,
                        "weight": t.weight,
                        "cores": t.cores,
                        "launches": t.launches,
                        "cycles": t.cycles,
                        "core_cycles": t.core_cycles,
                        "core_seconds": of_tenant[t],
                        "share": t.core_cycles / self._core_cycles if self._core_cycles else 0.0,
                        "waits": t.waits,
                        "waited_seconds": t.waited_seconds,
                    }
                    for t in self._tenants
                ],
            }

    def _begin(self, turn: Turn) -> None:
        tenant = turn.tenant
        with self._lock:
            if not tenant.member:
                raise TenantGone(tenant.name)
            turn.asked = time.monotonic()
            if tenant.launches and not (tenant.requests or tenant.running):
                late = turn.asked > tenant.awaited_until
                tenant.lateness += (late - tenant.lateness) / _RECENT
            self._await_no_longer(tenant, turn.asked)
            self._policy.request(tenant, late=turn.asked <= tenant.ended + GRACE_SECONDS)
            tenant.turns.append(turn)
            turn.bell = threading.Lock()
            turn.bell.acquire()
            self._dispatch()
            if turn.cores:
                return
            tenant.waits += 1
        try:
            self._wait(turn)
        except BaseException:  # Ctrl-C, or the tenant has left
            with self._lock:
                if turn.cores:
                    self._release(turn)
                elif tenant.member:
                    tenant.turns.remove(turn)
                    self._policy.withdraw(tenant)
                    self._dispatch()
            raise

    def _await_no_longer(self, tenant: Tenant, now: float) -> None:
        if (until := self._awaited.pop(tenant, None)) is not None:
            tenant.patience -= min(now, until) - tenant.ended

    def _wait(self, turn: Turn) -> None:
        while not turn.cores:
            seconds = -1.0 if turn.watch is None else max(turn.watch - time.monotonic(), 0.0)
            turn.bell.acquire(timeout=seconds)
            with self._lock:
                if turn.cores:
                    return
                if not turn.tenant.member:
                    raise TenantGone(turn.tenant.name)
                if turn.watch is not None and time.monotonic() >= turn.watch:
                    turn.watch = None
                    self._dispatch()

    def _end(self, turn: Turn) -> None:
        with self._lock:
            self._release(turn)

    def _release(self, turn: Turn) -> None:
        if turn.generation != self._generation:
            return
        tenant, now = turn.tenant, time.monotonic()
        self._running.remove(turn)
        self._count_busy(turn, now)
        tenant.launches += 1
        tenant.cycles += turn.cycles
        tenant.core_cycles += turn.cycles * len(turn.cores)
        self._core_cycles += turn.cycles * len(turn.cores)
        tenant.ended = now
        tenant.patience += now - turn.started
        tenant.awaited_until = now + min(PATIENCE_SECONDS, tenant.patience)
        self._policy.finish(tenant, turn.cycles, returns=tenant.lateness < _MOSTLY_LATE)
        if tenant.awaited:
            self._awaited[tenant] = tenant.awaited_until
        self._dispatch()

    def _dispatch(self) -> None:
        """Start whatever can start. If cores are kept for a tenant that is awaited, the first that
        waits looks again when patience ends."""
        now = time.monotonic()
        if self._awaited:
            for tenant in [t for t, until in self._awaited.items() if until <= now]:
                self._await_no_longer(tenant, now)
                self._policy.give_up(tenant)
        while isinstance(decision := self._policy.decide(), Start):
            turn = decision.tenant.turns.popleft()
            turn.generation, turn.started = self._generation, now
            turn.cores = decision.cores
            turn.tenant.waited_seconds += now - turn.asked
            self._running.append(turn)
            _ring(turn)
        if isinstance(decision, Await):
            first = next(t for t in self._policy.waiting() if t.requests)
            first.turns[0].watch = min(self._awaited[t] for t in decision.tenants)
            _ring(first.turns[0])

    def _count_busy(self, turn: Turn, now: float) -> None:
        for core in turn.cores:
            self._busy[core] += now - turn.started
        turn.tenant.core_seconds += (now - turn.started) * len(turn.cores)


def _ring(turn: Turn) -> None:
    if turn.bell.locked():
        turn.bell.release()
