"""The scheduler with real threads: who waits, who wakes, who is told to go."""

import contextlib
import re
import threading
import time
from collections.abc import Callable

import pytest

from pagoda.runtime import scheduler as scheduler_module
from pagoda.runtime.policy import TenantError
from pagoda.runtime.scheduler import PATIENCE_SECONDS, Scheduler, Tenant, TenantGone, Turn

LIMIT = 20.0  # seconds in which a thread that is not stuck gets anything done


class Worker(threading.Thread):
    """Takes one turn: `started` when it has it, holds it until `go`; keeps what was raised."""

    def __init__(self, scheduler: Scheduler, tenant: Tenant, cycles: int = 1) -> None:
        super().__init__(daemon=True)
        self.scheduler, self.tenant, self.cycles = scheduler, tenant, cycles
        self.started, self.go = threading.Event(), threading.Event()
        self.cores: tuple[int, ...] = ()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.scheduler.turn(self.tenant) as turn:
                self.cores = turn.cores
                self.started.set()
                assert self.go.wait(LIMIT)
                turn.charge(self.cycles)
        except TenantGone as error:
            self.error = error

    def end(self) -> None:
        self.go.set()
        self.join(LIMIT)
        assert not self.is_alive()


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def waiting(scheduler: Scheduler) -> list[str]:
    return [entry["name"] for entry in scheduler.snapshot()["waiting"]]


def account(scheduler: Scheduler, name: str) -> dict:
    return next(t for t in scheduler.snapshot()["tenants"] if t["name"] == name)


def test_a_free_device_is_had_at_once():
    scheduler = Scheduler(4)
    tenant = scheduler.join("a")
    for _ in range(3):
        with scheduler.turn(tenant) as turn:
            assert turn.cores == (0, 1, 2, 3)
            turn.charge(5)
            turn.charge(2)
    a = account(scheduler, "a")
    assert (a["launches"], a["cycles"], a["core_cycles"], a["waits"]) == (3, 21, 84, 0)
    assert a["share"] == 1.0


def test_the_second_waits_for_the_first():
    scheduler = Scheduler(2)
    a, b = scheduler.join("a"), scheduler.join("b")
    first = Worker(scheduler, a, cycles=10)
    assert first.started.wait(LIMIT)
    second = Worker(scheduler, b, cycles=30)
    eventually(lambda: waiting(scheduler) == ["b"])
    snapshot = scheduler.snapshot()
    assert [(r["name"], r["cores"]) for r in snapshot["running"]] == [("a", [0, 1])]
    assert snapshot["tenants"][0]["core_seconds"] == pytest.approx(
        2 * snapshot["running"][0]["seconds"]
    )
    assert not second.started.is_set()
    first.end()
    assert second.started.wait(LIMIT)
    second.end()
    assert account(scheduler, "b")["waits"] == 1
    assert account(scheduler, "b")["waited_seconds"] > 0
    assert account(scheduler, "b")["share"] == 0.75
    snapshot = scheduler.snapshot()
    busy = sum(core["busy_seconds"] for core in snapshot["cores"])
    assert busy == pytest.approx(sum(t["core_seconds"] for t in snapshot["tenants"])) and busy > 0


def test_partitions_run_at_the_same_time():
    scheduler = Scheduler(4)
    one = Worker(scheduler, scheduler.join("one", cores=1))
    assert one.started.wait(LIMIT)
    three = Worker(scheduler, scheduler.join("three", cores=3))
    assert three.started.wait(LIMIT)
    assert (one.cores, three.cores) == ((0,), (1, 2, 3))
    one.end()
    three.end()


def test_turns_of_one_tenant_start_in_order_one_at_a_time():
    scheduler = Scheduler(4)
    tenant = scheduler.join("a", cores=1)
    workers = []
    for n in range(4):
        workers.append(Worker(scheduler, tenant))
        if n:
            eventually(lambda n=n: tenant.requests == n)
        else:
            assert workers[0].started.wait(LIMIT)
    for n, worker in enumerate(workers):
        assert worker.started.wait(LIMIT)
        assert not any(later.started.is_set() for later in workers[n + 1 :])
        worker.end()


def test_leaving_ends_the_wait():
    scheduler = Scheduler(1)
    a, b = scheduler.join("a"), scheduler.join("b")
    first = Worker(scheduler, a)
    assert first.started.wait(LIMIT)
    second = Worker(scheduler, b)
    eventually(lambda: waiting(scheduler) == ["b"])
    scheduler.leave(b)
    scheduler.leave(b)
    second.join(LIMIT)
    message = (
        "tenant 'b' has left the device: only a tenant that has joined can launch; "
        "open the device again"
    )
    assert str(second.error) == message
    with pytest.raises(TenantGone, match=re.escape(message) + "$"), scheduler.turn(b):
        pass
    first.end()
    assert [t["name"] for t in scheduler.snapshot()["tenants"]] == ["a"]


def test_who_leaves_while_running_keeps_the_cores_to_the_end():
    scheduler = Scheduler(1)
    a, b = scheduler.join("a"), scheduler.join("b")
    first = Worker(scheduler, a)
    assert first.started.wait(LIMIT)
    second = Worker(scheduler, b)
    eventually(lambda: waiting(scheduler) == ["b"])
    scheduler.leave(a)
    assert not second.started.wait(0.05)
    first.end()
    assert second.started.wait(LIMIT)
    second.end()


def test_reset_abandons_a_wedged_turn():
    scheduler = Scheduler(2)
    a, b = scheduler.join("a"), scheduler.join("b")
    wedged = Worker(scheduler, a, cycles=1000)
    assert wedged.started.wait(LIMIT)
    other = Worker(scheduler, b, cycles=10)
    eventually(lambda: waiting(scheduler) == ["b"])
    scheduler.reset()
    assert other.started.wait(LIMIT)
    wedged.end()  # its charge and its end are ignored: the cores belong to b now
    assert [r["name"] for r in scheduler.snapshot()["running"]] == ["b"]
    again = Worker(scheduler, a, cycles=5)
    eventually(lambda: waiting(scheduler) == ["a"])
    other.end()
    assert again.started.wait(LIMIT)
    again.end()
    assert account(scheduler, "a")["cycles"] == 5
    assert account(scheduler, "b")["cycles"] == 10


def test_an_exception_gives_the_turn_back():
    scheduler = Scheduler(1)
    tenant = scheduler.join("a")
    with pytest.raises(ZeroDivisionError), scheduler.turn(tenant):
        raise ZeroDivisionError
    with scheduler.turn(tenant):
        pass


def test_an_interrupted_wait_leaves_the_queue(monkeypatch):
    scheduler = Scheduler(1)
    a, b = scheduler.join("a"), scheduler.join("b")
    first = Worker(scheduler, a)
    assert first.started.wait(LIMIT)

    def interrupted(self: Scheduler, turn: Turn) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt), scheduler.turn(b):
        pass
    assert waiting(scheduler) == []
    first.end()
    assert scheduler.snapshot()["running"] == []


class Clock:
    """Stands for `time` in the scheduler."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    it = Clock()
    monkeypatch.setattr(scheduler_module, "time", it)
    return it


def one_after_the_other(scheduler: Scheduler, a: Tenant, b: Tenant) -> tuple[Worker, Worker]:
    """The first has its turn, the second waits."""
    workers = Worker(scheduler, a), Worker(scheduler, b)
    eventually(lambda: waiting(scheduler) == [b.name])
    return workers


def launch(scheduler: Scheduler, tenant: Tenant, clock: Clock, seconds: float, cycles: int) -> None:
    with scheduler.turn(tenant) as turn:
        clock.now += seconds
        turn.charge(cycles)


def test_who_returns_at_once_is_awaited_as_long_as_its_launches_took(clock):
    scheduler = Scheduler(1)
    a, b = scheduler.join("a"), scheduler.join("b")
    launch(scheduler, b, clock, 1.0, 100)
    again, other = one_after_the_other(scheduler, a, b)
    clock.now += PATIENCE_SECONDS  # so long a may be awaited, in sum
    again.end()  # a has had 1 cycle, b 100: the core is kept for a
    clock.now += PATIENCE_SECONDS / 2
    launch(scheduler, a, clock, PATIENCE_SECONDS / 4, 1)
    assert not other.started.is_set()
    clock.now += PATIENCE_SECONDS * 0.7
    assert not other.started.wait(0.05)
    clock.now += PATIENCE_SECONDS * 0.1  # 1/2 of it waited, 1/4 earned: 3/4 are over
    assert other.started.wait(LIMIT)
    other.end()


def test_who_mostly_comes_back_late_is_not_awaited_until_that_has_changed(clock):
    scheduler = Scheduler(1)
    a, b = scheduler.join("a"), scheduler.join("b")

    def kept_after(pause: float) -> bool:
        """Whether the core is kept for a after a launch; a comes back after this pause."""
        again, other = one_after_the_other(scheduler, a, b)
        clock.now += 1.0
        again.end()
        kept = not other.started.wait(0.05)
        clock.now += pause
        assert other.started.wait(LIMIT)
        other.cycles = 100
        other.end()
        return kept

    launch(scheduler, b, clock, 1.0, 10_000)
    late, prompt = 2 * PATIENCE_SECONDS, PATIENCE_SECONDS
    assert [kept_after(prompt) for _ in range(3)] == [True] * 3
    assert [kept_after(late) for _ in range(8)] == [True] * 6 + [False] * 2
    assert [kept_after(prompt) for _ in range(8)][-1]


def test_idle_time_of_a_tenant_alone_is_not_held_against_it(clock):
    scheduler = Scheduler(1)
    a, b = scheduler.join("a"), scheduler.join("b")
    launch(scheduler, a, clock, 1.0, 1)
    clock.now += 3600.0
    launch(scheduler, b, clock, 1.0, 100)
    again, other = one_after_the_other(scheduler, a, b)
    again.end()
    assert not other.started.wait(0.05)
    clock.now += PATIENCE_SECONDS
    assert other.started.wait(LIMIT)
    other.end()


def test_bad_tenants_do_not_join():
    scheduler = Scheduler(4)
    with pytest.raises(TenantError):
        scheduler.join("x", cores=5)
    with pytest.raises(TenantError):
        scheduler.join("x", priority=1001)
    assert scheduler.snapshot()["tenants"] == []


def test_many_threads_never_share_a_core_and_all_get_their_shares():
    cores = 4
    scheduler = Scheduler(cores)
    owner: list[str | None] = [None] * cores
    stop = threading.Event()
    clashes: list[str] = []

    def work(tenant: Tenant) -> None:
        while not stop.is_set() and tenant.member:
            with contextlib.suppress(TenantGone), scheduler.turn(tenant) as turn:
                if any(owner[core] for core in turn.cores):
                    clashes.append(tenant.name)
                for core in turn.cores:
                    owner[core] = tenant.name
                time.sleep(0.001)
                for core in turn.cores:
                    owner[core] = None
                turn.charge(100)

    tenants = [scheduler.join(f"t{n}", cores=1 + n % 4) for n in range(8)]
    threads = [threading.Thread(target=work, args=(t,), daemon=True) for t in tenants]
    for thread in threads:
        thread.start()
    eventually(lambda: min(t.launches for t in tenants) >= 20)
    scheduler.leave(tenants[0])
    stop.set()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert not clashes
    snapshot = scheduler.snapshot()
    assert snapshot["running"] == snapshot["waiting"] == []
