"""Who runs on the chip's cores: one tenant after another, first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any


class TenantGone(RuntimeError):
    """The tenant has left while it waited for its turn."""


class Tenant:
    """Somebody who has turns. order: of joining."""

    def __init__(self, name: str, priority: int, weight: float, cores: int, order: int) -> None:
        self.order, self.name, self.cores = order, name, cores
        self.priority, self.weight = priority, weight
        self.gone = False
        self.cycles = 0


class Turn:
    """A turn that runs. cores: which of the chip's it has."""

    def __init__(self, tenant: Tenant, cores: range) -> None:
        self.tenant, self.cores = tenant, cores

    def charge(self, cycles: int) -> None:
        self.tenant.cycles += cycles


class Scheduler:
    """Hands out turns; each has all cores."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self._change = Condition()
        self._waiting: deque[Tenant] = deque()
        self._running: Tenant | None = None
        self._tenants: list[Tenant] = []
        self._joined = self._generation = 0

    def join(self, name: str, *, priority: int = 0, weight: float = 1.0, cores: int = 0) -> Tenant:
        with self._change:
            self._joined += 1
            tenant = Tenant(name, priority, weight, cores or self.cores, self._joined)
            self._tenants.append(tenant)
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """Ends the tenant's wait, if it waits, with TenantGone."""
        with self._change:
            tenant.gone = True
            if tenant in self._tenants:
                self._tenants.remove(tenant)
            self._change.notify_all()

    @contextmanager
    def turn(self, tenant: Tenant) -> Iterator[Turn]:
        """The tenant's turn, when it comes. Raises TenantGone."""
        with self._change:
            self._waiting.append(tenant)
            try:
                while not tenant.gone and (self._running or self._waiting[0] is not tenant):
                    self._change.wait()
            finally:
                self._waiting.remove(tenant)
            if tenant.gone:
                self._change.notify_all()
                raise TenantGone(tenant.name)
            self._running, generation = tenant, self._generation
        try:
            yield Turn(tenant, range(tenant.cores))
        finally:
            with self._change:
                if generation == self._generation:
                    self._running = None
                    self._change.notify_all()

    def reset(self) -> None:
        """Abandon whatever runs: the cores are free at once."""
        with self._change:
            self._generation += 1
            self._running = None
            self._change.notify_all()

    def snapshot(self) -> dict[str, Any]:
        """Plain data: who runs, who waits, what each has had."""
        with self._change:
            return {
                "running": self._running.name if self._running else None,
                "waiting": [tenant.name for tenant in self._waiting],
                "cycles": {tenant.name: tenant.cycles for tenant in self._tenants},
            }
