"""The scheduling policy, simulated: no threads and no clock but that of the events."""

import heapq
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.runtime.policy import LEVEL_RATIO, Await, Policy, Start, Tenant, TenantError


@dataclass(eq=False)
class Load:
    """A tenant and what it asks for: the cycles of its next launch, the pause before it."""

    tenant: Tenant
    cycles: Callable[[], int]
    pause: Callable[[], int] = lambda: 0
    begins: int = 0
    patience: int = 0  # it is awaited so long after each launch
    grace: int = -1  # if it asks within that time, it was not idle
    served: int = 0  # core-cycles
    launches: int = 0
    waits: list[int] = field(default_factory=list)
    asked: int = 0
    ended: int = 0


@dataclass(eq=False)
class Simulation:
    """Closed loops: each load asks, waits, runs, pauses and asks again."""

    cores: int
    loads: list[Load]
    now: int = 0
    log: list[tuple[int, str, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = Policy(self.cores)
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._load = {load.tenant: load for load in self.loads}
        for load in self.loads:
            self.policy.join(load.tenant)
            self.after(load.begins, lambda load=load: self._ask(load))

    def after(self, cycles: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + cycles, next(self._sequence), event))

    def run(self, until: int) -> None:
        """Up to that cycle; of launches that still run then, their part counts."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
            if not self._events or self._events[0][0] > self.now:  # all that happens now is known
                self._decide()
        self.now = until

    def _ask(self, load: Load) -> None:
        load.asked = self.now
        late = load.launches > 0 and self.now - load.ended <= load.grace
        self.policy.request(load.tenant, late=late)

    def _decide(self) -> None:
        while isinstance(decision := self.policy.decide(), Start):
            load = self._load[decision.tenant]
            assert len(decision.cores) == len(set(decision.cores)) == load.tenant.cores
            load.waits.append(self.now - load.asked)
            self.log.append((self.now, load.tenant.name, decision.cores))
            cycles = load.cycles()
            self.after(cycles, lambda load=load, cycles=cycles: self._finish(load, cycles))
        busy = sorted(core for load in self.loads for core in load.tenant.running)
        assert sorted(self.policy.free + busy) == list(range(self.cores))
        if isinstance(decision, Await):
            assert all(tenant.awaited for tenant in decision.tenants)

    def _finish(self, load: Load, cycles: int) -> None:
        load.served += cycles * load.tenant.cores
        load.launches += 1
        load.ended = self.now
        self.policy.finish(load.tenant, cycles, returns=load.patience > 0)
        pause = load.pause()
        self.after(pause, lambda: self._ask(load))
        if pause > load.patience:
            self.after(load.patience, lambda: self.policy.give_up(load.tenant))


def jain(served: list[int]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has everything."""
    return sum(served) ** 2 / (len(served) * sum(x * x for x in served))


def lengths(seed: int, low: int, high: int) -> Callable[[], int]:
    draw = random.Random(seed)
    return lambda: draw.randint(low, high)


def shares(loads: list[Load]) -> list[float]:
    total = sum(load.served for load in loads)
    return [load.served / total for load in loads]


def test_equal_tenants_get_equal_time_whatever_their_launches_take():
    loads = [
        Load(Tenant(f"t{n}", cores=4), lengths(n, 3**n, 2 * 3**n), pause=lambda: 5, patience=10)
        for n in range(8)
    ]
    Simulation(4, loads).run(1_000_000)
    assert jain([load.served for load in loads]) >= 0.99


def test_who_asks_again_at_once_without_being_awaited_gets_every_second_turn():
    """Why the policy awaits tenants at all."""
    long, short = (Load(Tenant(n), lambda c=c: c, lambda: 1) for n, c in (("l", 100), ("s", 1)))
    Simulation(1, [long, short]).run(100_000)
    assert abs(long.launches - short.launches) <= 1
    long.patience = short.patience = 2
    loads = [Load(Tenant(x.tenant.name), x.cycles, x.pause, patience=2) for x in (long, short)]
    Simulation(1, loads).run(100_000)
    assert jain([load.served for load in loads]) > 0.999


def test_shares_follow_weights():
    weights = [1, 2, 3.5, 8, 0.5]
    loads = [
        Load(Tenant(f"t{n}", weight=weight, cores=4), lengths(n, 10, 10 * 3 ** (n + 1)))
        for n, weight in enumerate(weights)
    ]
    for load in loads:
        load.pause, load.patience = (lambda: 2), 4
    Simulation(4, loads).run(1_000_000)
    for share, weight in zip(shares(loads), weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), rel=0.03)


def test_who_asks_late_now_and_then_still_gets_its_share():
    """Credit outlives a wait in vain; without that the heaviest tenant has too little."""
    weights = [1, 2, 4, 8]
    lack = {}
    for grace in (-1, 20):
        loads = [
            Load(Tenant(str(w), weight=w), lambda: 10, lengths(w, 0, 8), patience=5, grace=grace)
            for w in weights
        ]
        Simulation(1, loads).run(300_000)
        lack[grace] = max(
            abs(share * 15 / w - 1) for share, w in zip(shares(loads), weights, strict=True)
        )
    assert lack[20] < 0.03 < 3 * 0.03 < lack[-1]


def test_shares_on_cores_apart_follow_weights_too():
    """Single cores: several launches at once, on 4 cores that 9 tenants share."""
    weights = [1, 1, 1, 1, 2, 2, 2, 1, 1]
    loads = [
        Load(Tenant(f"t{n}", weight=weight), lengths(n, 10, 10 + 40 * n), lambda: 1, patience=2)
        for n, weight in enumerate(weights)
    ]
    Simulation(4, loads).run(1_000_000)
    for share, weight in zip(shares(loads), weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), rel=0.03)


def test_partitions_run_at_the_same_time_on_cores_of_their_own():
    one = Load(Tenant("one", cores=1), lengths(1, 50, 150))
    three = Load(Tenant("three", cores=3), lengths(2, 10, 30))
    simulation = Simulation(4, [one, three])
    simulation.run(100_000)
    assert one.served > 99_000 and three.served > 3 * 99_000
    assert max(one.waits + three.waits) == 0
    assert {cores for _, name, cores in simulation.log if name == "one"} == {(0,)}
    assert {cores for _, name, cores in simulation.log if name == "three"} == {(1, 2, 3)}


def test_one_that_fell_behind_on_its_partition_does_not_keep_others_waiting_for_it():
    """The 1-core tenant can never have half of the chip; a newcomer must not pay for that."""
    one = Load(Tenant("one", cores=1), lambda: 100, patience=1)
    three = Load(Tenant("three", cores=3), lambda: 20)
    newcomer = Load(Tenant("newcomer", cores=1), lambda: 30, begins=200_000)
    simulation = Simulation(4, [one, three, newcomer])
    simulation.run(200_000)
    before = [one.served, three.served, 0]
    simulation.run(300_000)
    after = [one.served, three.served, newcomer.served]
    assert jain([now - then for now, then in zip(after, before, strict=True)]) > 0.99
    assert max(newcomer.waits) <= 500


def test_wide_tenants_do_not_starve_behind_narrow_ones():
    narrow = [Load(Tenant(f"n{n}"), lengths(n, 5, 100)) for n in range(6)]
    wide = Load(Tenant("wide", cores=4), lambda: 20)
    loads = [*narrow, wide]
    Simulation(4, loads).run(500_000)
    for share in shares(loads):
        assert share == pytest.approx(1 / 7, rel=0.03)
    assert max(wide.waits) <= 7 * 100 * 3


def test_higher_priority_goes_first_and_lower_keeps_its_guaranteed_share():
    high = Load(Tenant("high", priority=1000), lengths(1, 10, 40))
    low = [Load(Tenant(f"low{n}"), lengths(2 + n, 10, 200)) for n in range(2)]
    loads = [high, *low]
    Simulation(1, loads).run(1_000_000)
    guaranteed = 1 / (LEVEL_RATIO + 1)
    expected = [1 - guaranteed, guaranteed / 2, guaranteed / 2]
    for share, wanted in zip(shares(loads), expected, strict=True):
        assert share == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("priorities", "least", "most"), [((2, -2), 15.9, 16.1), ((2,), 15.9, 16.1), ((0,), 16, 256)]
)
def test_levels_that_come_and_go(priorities, least, most):
    """A level between two others counts while it has a member; levels above and below do not."""
    policy = Policy(1)
    high, low = Tenant("high", priority=1), Tenant("low", priority=-1)
    for tenant in (high, low):
        policy.join(tenant)
        policy.request(tenant)
    served = {"high": 0, "low": 0}
    for step in range(20_000):
        visitor = Tenant("visitor", priority=priorities[step % len(priorities)])
        policy.join(visitor)
        start = policy.decide()
        policy.leave(visitor)
        cycles = 1 + step % 7
        served[start.tenant.name] += cycles
        policy.request(start.tenant)
        policy.finish(start.tenant, cycles)
    assert least <= served["high"] / served["low"] <= most


def test_sporadic_high_priority_waits_for_one_launch_at_most():
    high = Load(Tenant("high", priority=3), lambda: 5, pause=lengths(0, 200, 400))
    low = [Load(Tenant(f"low{n}", priority=-3), lambda: 100) for n in range(5)]
    Simulation(1, [high, *low]).run(300_000)
    assert high.launches > 500
    assert max(high.waits) <= 100


def test_who_returns_from_idle_has_no_credit():
    steady = Load(Tenant("steady"), lambda: 10)
    returning = Load(Tenant("returning"), lambda: 10, begins=100_000)
    Simulation(1, [steady, returning]).run(102_000)
    assert returning.served == pytest.approx(1_000, abs=20)


def test_who_returns_after_one_long_launch_owes_nothing_once_all_were_idle():
    policy = Policy(1)
    a, b = Tenant("a"), Tenant("b")
    for tenant in (a, b):
        policy.join(tenant)
    policy.request(a)
    assert policy.decide() == Start(a, (0,))
    policy.finish(a, 10**9)
    policy.request(b)
    assert policy.decide().tenant is b
    policy.request(a)
    policy.finish(b, 1)
    policy.request(b)
    assert policy.decide().tenant is a


def test_leaving_and_joining_again_sheds_no_debt():
    policy = Policy(1)
    honest, tenant = Tenant("honest"), Tenant("reconnecting")
    policy.join(honest)
    policy.join(tenant)
    policy.request(tenant)
    policy.request(honest)
    served = {"honest": 0, "reconnecting": 0}
    for _ in range(4_000):
        start = policy.decide()
        name = start.tenant.name
        cycles = 100 if name == "reconnecting" else 1
        served[name] += cycles
        policy.finish(start.tenant, cycles)
        if name == "reconnecting":
            policy.leave(start.tenant)
            tenant = Tenant(name)
            policy.join(tenant)
            policy.request(tenant)
        else:
            policy.request(honest)
    assert jain(list(served.values())) > 0.99


def test_equal_histories_are_decided_by_joining():
    loads = [Load(Tenant(name), lambda: 7) for name in "cab"]
    simulation = Simulation(1, loads)
    simulation.run(7 * 6 - 1)
    assert [name for _, name, _ in simulation.log] == list("cabcab")


def test_reset_frees_the_cores_and_charges_the_wedged_launch():
    policy = Policy(2)
    wedged, other = Tenant("wedged", cores=2), Tenant("other", cores=2)
    for tenant in (wedged, other):
        policy.join(tenant)
        policy.request(tenant)
    assert policy.decide() == Start(wedged, (0, 1))
    assert policy.decide() is None
    policy.request(wedged)
    policy.reset()
    assert policy.decide() == Start(other, (0, 1))
    policy.finish(other, 5)
    assert policy.decide() == Start(wedged, (0, 1))


def test_a_tenant_that_leaves_while_it_runs_keeps_its_cores_to_the_end():
    policy = Policy(1)
    a, b = Tenant("a"), Tenant("b")
    for tenant in (a, b):
        policy.join(tenant)
        policy.request(tenant)
    policy.decide()
    policy.leave(a)
    assert policy.decide() is None
    policy.finish(a, 3, returns=True)
    assert policy.decide() == Start(b, (0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(priority=1001),
            (
                "priority of 'x': must be an integer from -1000 to 1000 (higher goes first), got "
                "1001; 0 is the usual one"
            ),
        ),
        (
            dict(weight=0.0),
            (
                "weight of 'x': must be from 1e-06 to 1e+06, got 0.0; 1 is the usual one, and 2 "
                "gets twice its share"
            ),
        ),
        (
            dict(weight=float("nan")),
            (
                "weight of 'x': must be from 1e-06 to 1e+06, got nan; 1 is the usual one, and 2 "
                "gets twice its share"
            ),
        ),
        (
            dict(cores=5),
            (
                "cores of 'x': must be from 1 to 4, what this chip has, got 5; leave it out to use "
                "them all"
            ),
        ),
    ],
)
def test_what_no_tenant_can_have(options, message):
    with pytest.raises(TenantError, match=re.escape(message) + "$"):
        Policy(4).join(Tenant("x", **options))


CORES = 2
LONGEST = 3
CYCLES = 10_000

tenants = st.builds(
    Tenant,
    name=st.just("t"),
    priority=st.sampled_from([-900, 5]),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    cores=st.integers(1, CORES),
)


def longest_wait(own: Tenant, members: list[Tenant], longest: int, cores: int) -> float:
    """The bound that the module states, in cycles."""
    largest = max(member.cores for member in members) * longest
    within = sum(
        other.weight / own.weight * own.cores * longest + (cores + 2) * largest
        for other in members
        if other is not own and other.priority == own.priority
    )
    levels = sorted({other.priority for other in members})
    here = levels.index(own.priority)
    return within + sum(
        float(LEVEL_RATIO) ** (level - here) * (within + 2 * cores * largest) + 4 * cores * largest
        for level in range(len(levels))
        if level != here
    )


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(tenants, st.sampled_from([0, 0, 1, 20])), min_size=2, max_size=6),
    st.integers(0, 2**32),
)
def test_waiting_is_bounded(members, seed):
    """Every wait is within the stated bound, whatever the others do: also of those who wait yet."""
    draw = random.Random(seed)
    loads = [
        Load(
            tenant,
            cycles=lambda: draw.randint(1, LONGEST),
            pause=lambda longest=longest: draw.randint(0, longest),
            begins=draw.randint(0, CYCLES // 2),
            patience=draw.choice((0, 1)),
            grace=draw.choice((-1, 5)),
        )
        for tenant, longest in members
    ]
    Simulation(CORES, loads).run(CYCLES)
    all_tenants = [tenant for tenant, _ in members]
    for load in loads:
        if load.tenant.requests:
            load.waits.append(CYCLES - load.asked)
        bound = longest_wait(load.tenant, all_tenants, LONGEST, CORES)
        assert bound < CYCLES / 2
        awaiting = load.patience * max(load.waits, default=0) / 2  # cores kept idle meanwhile
        assert max(load.waits, default=0) - awaiting <= bound
