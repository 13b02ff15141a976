"""Who runs next, on which cores: the scheduling policy alone. No threads, no clock, no device.

A launch is never interrupted, so decisions fall where one starts or ends. It occupies its tenant's
number of cores and costs cycles x cores, known when it has ended. Hence start-time fair queueing
(Goyal, Vin, Cheng, SIGCOMM 1996), which needs no lengths in advance, and like stride scheduling
(Waldspurger 1995) only one number for each tenant:

- A tenant's *tag* is where it stands in virtual time; each launch adds cost / weight. The smallest
  tag goes first, ties in the order of joining.
- A level's *virtual time* is the smallest tag when a launch of it last started; when a level falls
  idle, the largest tag in it. A tenant that was idle starts at the virtual time if its own tag is
  behind: no credit for the past. A name that leaves and joins again keeps its tag. One that is
  never idle and still falls behind has too few cores for its share, or asks late; what it may
  catch up is limited to the largest launch on each core.
- Priorities are levels, shared out in the same way one storey up (hierarchical fair queueing:
  Goyal, Guo, Vin, OSDI 1996). A level weighs LEVEL_RATIO times the next lower one that has
  tenants: it is served first until it has had 16 times as much, then the lower one has its
  guaranteed turn (1/17 of the time). A level has several launches on the chip at once, so each is
  charged at its start what its tenant's last one cost, and corrected at its end.
- Nobody overtakes: if the first in line needs more cores than are free, the free ones wait with it.
  The price is idle cores for as long as the longest launch that runs; the gain is that wide
  tenants cannot starve.
- A tenant whose launch has just ended, and that will ask again at once, can be *awaited*: its cores
  are kept for it while it would be first in line. Otherwise one that sends a launch at a time
  would get every second turn at most (deceptive idleness: Iyer, Druschel, SOSP 2001).

Bounded waiting. L is the largest cost of a launch, c that of the tenant's own last one, w weights.
From a request to its start, on n cores, every other tenant of the level is served at most
w_other / w x c + (n + 2) L, and every other level at most LEVEL_RATIO^d x (this level's service +
2 n L) + 4 n L, where it is d levels above this one (negative: below). Some core is always busy
meanwhile, or kept for one that is awaited, so the sum also bounds the wait in cycles of launches.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

PRIORITIES = range(-1000, 1001)
LEVEL_RATIO = 16  # of two levels that both want the chip, the higher gets 16/17
WEIGHTS = (1e-6, 1e6)
_UNIT = 1 << 32  # of a tenant's tag: a core-cycle at weight 1


class TenantError(ValueError):
    """A priority, weight or number of cores that no tenant can have."""


@dataclass(eq=False)
class Tenant:
    """One that launches, one launch at a time. cores: how many each launch occupies."""

    name: str
    priority: int = 0
    weight: float = 1.0
    cores: int = 1
    order: int = 0  # of joining
    tag: int = 0  # virtual time at which its next launch starts, or the present one did
    requests: int = 0  # launches that wait
    running: tuple[int, ...] = ()  # the cores it occupies
    awaited: bool = False
    member: bool = True
    expected: int = 0  # core-cycles of its last launch
    last_cores: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_share(self.name, self.priority, self.weight)


def check_share(name: str, priority: int, weight: float) -> None:
    """Raises TenantError for what no tenant can have."""
    if priority not in PRIORITIES:
        raise TenantError(
            f"priority of {name!r}: must be an integer from {PRIORITIES[0]} to {PRIORITIES[-1]} "
            f"(higher goes first), got {priority!r}; 0 is the usual one"
        )
    low, high = WEIGHTS
    if not (math.isfinite(weight) and low <= weight <= high):
        raise TenantError(
            f"weight of {name!r}: must be from {low:g} to {high:g}, got {weight!r}; 1 is the usual "
            "one, and 2 gets twice its share"
        )


class Start(NamedTuple):
    """The decision that a tenant's first waiting launch starts now, on these cores."""

    tenant: Tenant
    cores: tuple[int, ...]


class Await(NamedTuple):
    """The decision that cores stay idle for tenants that are about to ask for them."""

    tenants: tuple[Tenant, ...]


@dataclass(eq=False)
class _Level:
    priority: int
    charge: int = 1  # of tag for a core-cycle: LEVEL_RATIO ^ levels above with members
    tag: int = 0
    virtual: int = 0
    members: list[Tenant] = field(default_factory=list)
    departed: dict[str, int] = field(default_factory=dict)  # tags ahead of virtual time, by name

    @property
    def active(self) -> bool:
        return any(t.requests or t.running or t.awaited for t in self.members)


class Policy:
    """The queue of one chip. Callers report events; `decide` says what to do, until None."""

    def __init__(self, cores: int) -> None:
        self.cores = cores
        self.free = list(range(cores))  # sorted
        self._virtual = 0
        self._levels: dict[int, _Level] = {}
        self._candidates: dict[Tenant, None] = {}  # not running, and waiting or awaited
        self._joined = 0

    def join(self, tenant: Tenant) -> None:
        """Add a tenant. Raises TenantError if it wants cores that the chip lacks."""
        if not 1 <= tenant.cores <= self.cores:
            raise TenantError(
                f"cores of {tenant.name!r}: must be from 1 to {self.cores}, what this chip has, "
                f"got {tenant.cores!r}; leave it out to use them all"
            )
        tenant.order, self._joined = self._joined, self._joined + 1
        level = self._levels.setdefault(tenant.priority, _Level(tenant.priority))
        tenant.tag = level.departed.pop(tenant.name, level.virtual)
        level.members.append(tenant)
        if len(level.members) == 1:
            self._weigh()

    def leave(self, tenant: Tenant) -> None:
        """Remove a tenant and all it waits for. A launch that runs keeps its cores to its end."""
        tenant.member = False
        tenant.requests, tenant.awaited = 0, False
        self._candidates.pop(tenant, None)
        if not tenant.running:
            self._remove(tenant)

    def request(self, tenant: Tenant, late: bool = False) -> None:
        """One more launch of this tenant waits. late: it was given up, but a moment ago only, so
        it keeps what credit it has."""
        level = self._levels[tenant.priority]
        if not (tenant.requests or tenant.running or tenant.awaited):
            if late:
                self._limit_credit(tenant, level)
            else:
                self._begin(tenant, level)
        tenant.requests += 1
        tenant.awaited = False
        if not tenant.running:
            self._candidates[tenant] = None

    def withdraw(self, tenant: Tenant) -> None:
        """One launch of this tenant waits no longer."""
        tenant.requests -= 1
        if not tenant.requests:
            self._candidates.pop(tenant, None)

    def decide(self) -> Start | Await | None:
        """What to do now. After a `Start`, which is carried out here, there may be more.

        None: nothing can start before the next event. `Await`: nor does it, but something could
        if the tenants that are awaited were given up (`give_up`).
        """
        if not self.free or not any(tenant.requests for tenant in self._candidates):
            return None
        free, awaited = self.free, []
        line = self.waiting()
        for tenant in line:
            if tenant.cores > len(free):
                break
            cores = _choose(tenant, free)
            if tenant.requests:
                self._start(tenant, cores, line)
                return Start(tenant, cores)
            awaited.append(tenant)
            free = [core for core in free if core not in cores]
        return Await(tuple(awaited)) if awaited else None

    def waiting(self) -> list[Tenant]:
        """Who waits or is awaited, first in line first."""
        if len(self._candidates) < 2:
            return list(self._candidates)
        return sorted(
            self._candidates,
            key=lambda t: (self._levels[t.priority].tag, -t.priority, t.tag, t.order),
        )

    def finish(self, tenant: Tenant, cycles: int, returns: bool = False) -> None:
        """A tenant's launch has ended. returns: it will ask again at once, so it is awaited."""
        cost = max(cycles, 1) * tenant.cores  # at least 1: no number of launches is free
        level = self._levels[tenant.priority]
        tenant.tag += int(cost * _UNIT / tenant.weight)
        level.tag += (cost - tenant.expected) * level.charge
        tenant.expected = cost
        self._limit_credit(tenant, level)
        self.free = sorted([*self.free, *tenant.running])
        tenant.running = ()
        if not tenant.member:
            self._remove(tenant)
            return
        tenant.awaited = returns and not tenant.requests
        if tenant.requests or tenant.awaited:
            self._candidates[tenant] = None

    def give_up(self, tenant: Tenant) -> None:
        """Await a tenant no longer: it is idle."""
        if tenant.awaited:
            tenant.awaited = False
            self._candidates.pop(tenant, None)

    def reset(self) -> None:
        """Whatever runs is abandoned, and charged what its tenant's launch before it cost."""
        for level in self._levels.values():
            for tenant in list(level.members):
                if tenant.running:
                    self.finish(tenant, tenant.expected // tenant.cores)

    def _begin(self, tenant: Tenant, level: _Level) -> None:
        """A tenant that was idle asks: nothing it did not use before counts."""
        if not level.active:
            levels = self._levels.values()
            if not any(other.active for other in levels):
                self._virtual = max(self._virtual, *(other.tag for other in levels))
            level.virtual = max(level.virtual, *(t.tag for t in level.members))
            level.departed.clear()
            level.tag = max(level.tag, self._virtual)
        tenant.tag = max(tenant.tag, level.virtual)

    def _limit_credit(self, tenant: Tenant, level: _Level) -> None:
        if tenant.tag < level.virtual or level.tag < self._virtual:
            credit = self.cores * max(t.expected for t in level.members)
            tenant.tag = max(tenant.tag, level.virtual - int(credit * _UNIT / tenant.weight))
            level.tag = max(level.tag, self._virtual - credit * level.charge)

    def _weigh(self) -> None:
        """Levels have come or gone: new charges. How many core-cycles a level is ahead stays."""
        charge = 1
        for priority in sorted(self._levels, reverse=True):
            level = self._levels[priority]
            if level.members:
                ahead = (level.tag - self._virtual) * charge // level.charge
                level.tag, level.charge = self._virtual + ahead, charge
                charge *= LEVEL_RATIO

    def _start(self, tenant: Tenant, cores: tuple[int, ...], line: list[Tenant]) -> None:
        level = self._levels[tenant.priority]
        # The smallest tags, not the starter's: an awaited one may stand before it.
        self._virtual = max(self._virtual, self._levels[line[0].priority].tag)
        first = next(t for t in line if t.priority == tenant.priority)
        level.virtual = max(level.virtual, first.tag)
        level.tag += tenant.expected * level.charge
        del self._candidates[tenant]
        tenant.requests -= 1
        tenant.running = tenant.last_cores = cores
        self.free = [core for core in self.free if core not in cores]

    def _remove(self, tenant: Tenant) -> None:
        level = self._levels[tenant.priority]
        level.members.remove(tenant)
        level.departed = {n: tag for n, tag in level.departed.items() if tag > level.virtual}
        if tenant.tag > max(level.virtual, level.departed.get(tenant.name, 0)):
            level.departed[tenant.name] = tenant.tag
        if not level.members:
            self._weigh()


def _choose(tenant: Tenant, free: list[int]) -> tuple[int, ...]:
    """The cores of its last launch if they are free (SRAM keeps its contents), else the lowest."""
    if tenant.last_cores and set(tenant.last_cores).issubset(free):
        return tenant.last_cores
    return tuple(free[: tenant.cores])
