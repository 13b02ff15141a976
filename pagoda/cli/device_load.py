"""What a device did between two looks at its service's figures: load, shares of time, rates.

Enters: the plain data of the service's status. Leaves: plain data that the terminal view and
`--json` show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class CoreLoad:
    """One core. load: the part of the time in which a launch occupied it. pid: of the process
    whose launch runs on it now; None: idle."""

    core: int
    load: float
    pid: int | None


@dataclass(frozen=True)
class ProcessLoad:
    """One context of a process. share: its part of the time of all cores."""

    pid: int
    user: str
    name: str
    state: str
    priority: int
    weight: float
    cores: int
    memory_bytes: int
    memory_limit_bytes: int
    share: float
    cycles: int
    cycles_per_second: float
    launches: int
    faults: int
    waited_seconds: float


@dataclass(frozen=True)
class DeviceLoad:
    """One device. seconds: of the time that load, shares and rates are about; the rest counts
    from the service's start. queue: processes that wait, first in line first."""

    device: str
    chip: str
    clock_hz: int
    pid: int
    user: str
    uptime_seconds: float
    seconds: float
    load: float
    cores: tuple[CoreLoad, ...]
    memory_bytes: int
    memory_total_bytes: int
    queue: tuple[int, ...]
    cycles: int
    cycles_per_second: float
    launches: int
    faults: int
    resets: int
    problems: tuple[str, ...]
    processes: tuple[ProcessLoad, ...]  # those with the largest share first


def load_between(before: Figures | None, now: Figures) -> DeviceLoad:
    """The load between two looks. Without a first one, or if the service was started anew in
    between, since that start."""
    if before is not None and before["pid"] != now["pid"]:
        before = None
    queue = now["queue"]  # the scheduler's snapshot
    past = before["queue"] if before is not None else None
    seconds = queue["seconds"] - (past["seconds"] if past else 0.0)
    pids = {each["tenant"]: each["pid"] for each in now["contexts"]}
    occupants = {
        core: pids.get(turn["tenant"]) for turn in queue["running"] for core in turn["cores"]
    }
    busy = [
        core["busy_seconds"] - (past["cores"][number]["busy_seconds"] if past else 0.0)
        for number, core in enumerate(queue["cores"])
    ]
    processes = [_process(context, before, now, seconds) for context in now["contexts"]]
    return DeviceLoad(
        device=now["device"],
        chip=now["chip"]["name"],
        clock_hz=now["chip"]["clock_hz"],
        pid=now["pid"],
        user=now["user"],
        uptime_seconds=now["uptime_seconds"],
        seconds=seconds,
        load=_part(sum(busy), seconds * len(busy)),
        cores=tuple(
            CoreLoad(number, _part(time, seconds), occupants.get(number))
            for number, time in enumerate(busy)
        ),
        memory_bytes=now["memory_bytes"],
        memory_total_bytes=now["memory_total_bytes"],
        queue=tuple(
            pids[turn["tenant"]] for turn in queue["waiting"] if turn["tenant"] in pids
        ),
        cycles=now["cycles"],
        cycles_per_second=_rate(now["cycles"], before["cycles"] if before else 0, seconds),
        launches=now["launches"],
        faults=now["faults"],
        resets=now["resets"],
        problems=tuple(now["problems"]),
        processes=tuple(sorted(processes, key=lambda process: (-process.share, process.pid))),
    )


def _process(
    context: Mapping[str, Any], before: Figures | None, now: Figures, seconds: float
) -> ProcessLoad:
    contexts = before["contexts"] if before is not None else ()
    past = next((c for c in contexts if c["context"] == context["context"]), None)
    tenant = tenant_of(now, context) or _NO_TENANT
    past_tenant = tenant_of(before, past) if before is not None and past is not None else None
    if past_tenant is None or past_tenant["tenant"] != tenant["tenant"]:
        past_tenant = _NO_TENANT
    return ProcessLoad(
        pid=context["pid"],
        user=context["user"],
        name=context["name"],
        state=context["state"],
        priority=context["priority"],
        weight=context["weight"],
        cores=context["cores"],
        memory_bytes=context["memory_bytes"],
        memory_limit_bytes=context["memory_limit_bytes"],
        share=_part(
            tenant["core_seconds"] - past_tenant["core_seconds"],
            seconds * len(now["queue"]["cores"]),
        ),
        cycles=context["cycles"],
        cycles_per_second=_rate(context["cycles"], past["cycles"] if past else 0, seconds),
        launches=context["launches"],
        faults=context["faults"],
        waited_seconds=tenant["waited_seconds"],
    )


_NO_TENANT = {"tenant": None, "core_seconds": 0.0, "waited_seconds": 0.0}


def tenant_of(figures: Figures, context: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The scheduler's account of a context; None if it was lost."""
    tenants = figures["queue"]["tenants"]
    return next((t for t in tenants if t["tenant"] == context["tenant"]), None)


def _part(of: float, whole: float) -> float:
    """A fraction; the two looks at a core are not at exactly the same moment as those at the
    clock, so it is kept within 0 and 1."""
    return min(max(of / whole, 0.0), 1.0) if whole > 0 else 0.0


def _rate(now: int, before: int, seconds: float) -> float:
    return max(now - before, 0) / seconds if seconds > 0 else 0.0
