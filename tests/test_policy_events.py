"""The scheduling policy under any sequence of events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pagoda.runtime.policy import Await, Policy, Start, Tenant


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: cores are never shared or lost, nobody is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy(4)
        self.members: list[Tenant] = []
        self.gone_but_running: list[Tenant] = []

    def choose(self, number: int, among: list[Tenant]) -> Tenant | None:
        return among[number % len(among)] if among else None

    @property
    def running(self) -> list[Tenant]:
        return [t for t in [*self.members, *self.gone_but_running] if t.running]

    @rule(
        cores=st.integers(1, 4),
        priority=st.integers(-1, 1),
        weight=st.sampled_from([0.1, 1.0, 10.0]),
        name=st.sampled_from("abc"),
    )
    def join(self, cores, priority, weight, name):
        self.members.append(Tenant(name, priority, weight, cores))
        self.policy.join(self.members[-1])

    @rule(number=st.integers(0, 99))
    def leave(self, number):
        if tenant := self.choose(number, self.members):
            self.members.remove(tenant)
            if tenant.running:
                self.gone_but_running.append(tenant)
            self.policy.leave(tenant)

    @rule(number=st.integers(0, 99), late=st.booleans())
    def request(self, number, late):
        if tenant := self.choose(number, self.members):
            self.policy.request(tenant, late)

    @rule(number=st.integers(0, 99))
    def withdraw(self, number):
        if tenant := self.choose(number, [t for t in self.members if t.requests]):
            self.policy.withdraw(tenant)

    @rule(number=st.integers(0, 99), cycles=st.integers(0, 1000), returns=st.booleans())
    def finish(self, number, cycles, returns):
        if tenant := self.choose(number, self.running):
            self.policy.finish(tenant, cycles, returns)
            if tenant in self.gone_but_running:
                self.gone_but_running.remove(tenant)

    @rule(number=st.integers(0, 99))
    def give_up(self, number):
        if tenant := self.choose(number, self.members):
            self.policy.give_up(tenant)

    @rule()
    def reset(self):
        self.policy.reset()
        assert not self.running
        self.gone_but_running.clear()

    @rule()
    def decide(self):
        while isinstance(decision := self.policy.decide(), Start):
            assert decision.cores == decision.tenant.running
        if isinstance(decision, Await):
            assert all(t.awaited and not t.requests for t in decision.tenants)
        elif line := [t for t in self.policy.waiting() if t.requests or t.awaited]:
            first = line[0]  # it waits for cores only, or nobody waits at all
            assert first.cores > len(self.policy.free) or not any(t.requests for t in line)

    @invariant()
    def every_core_is_free_or_one_launch_has_it(self):
        taken = [core for tenant in self.running for core in tenant.running]
        assert sorted([*taken, *self.policy.free]) == [0, 1, 2, 3]

    @invariant()
    def all_that_wait_are_in_line(self):
        wanted = {t for t in self.members if (t.requests or t.awaited) and not t.running}
        assert set(self.policy.waiting()) == wanted

    def teardown(self):
        for tenant in self.members:
            self.policy.give_up(tenant)
        left = sum(tenant.requests for tenant in self.members)
        for _ in range(left + 1):
            while isinstance(self.policy.decide(), Start):
                left -= 1
            for tenant in self.running:
                self.policy.finish(tenant, 5)
        assert left == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
