"""What a device service says of itself, as tests of the views on it need it."""

from typing import Any


def context(number: int, tenant: int, pid: int, name: str, **more: Any) -> dict[str, Any]:
    """One entry of `contexts`; `more` overrides."""
    usual = dict(
        context=number, tenant=tenant, pid=pid, name=name, user="ann", chip="car", cores=4,
        priority=0, weight=1.0, memory_bytes=256 << 20, memory_limit_bytes=16 << 30, launches=120,
        cycles=48_000_000, faults=0, state="idle", seconds=61.5, share=0.25,
    )  # fmt: skip
    return usual | more


def tenant(number: int, name: str, core_seconds: float, **more: Any) -> dict[str, Any]:
    """One entry of the queue's `tenants`; `more` overrides."""
    usual = dict(
        tenant=number, name=name, priority=0, weight=1.0, cores=4, launches=120,
        cycles=48_000_000, core_cycles=192_000_000, core_seconds=core_seconds, share=0.25, waits=7,
        waited_seconds=1.25,
    )  # fmt: skip
    return usual | more


def figures(later: float = 0.0) -> dict[str, Any]:
    """A service of chip `car` with four programs, after 100 seconds and `later` ones more, in
    which core 0 was busy all the time, cores 1 to 3 half of it."""
    return {
        "device": "/run/user/1000/pagoda/default.sock",
        "pid": 4711,
        "user": "ann",
        "pagoda": "0.5",
        "chip": {"name": "car", "cores": 4, "clock_hz": 1_000_000_000},
        "uptime_seconds": 93_784.0 + later,
        "resets": 1,
        "memory_bytes": 3 << 30,
        "memory_total_bytes": 16 << 30,
        "launches": 41_230 + int(100 * later),
        "cycles": 9_876_543_210 + int(12_500_000 * later),
        "faults": 2,
        "queue": {
            "seconds": 100.0 + later,
            "core_cycles": 1_000_000_000,
            "cores": [
                {"busy_seconds": 50.0 + (later if core == 0 else later / 2)} for core in range(4)
            ],
            "running": [
                {"tenant": 0, "name": "one", "cores": [0], "seconds": 0.25},
                {"tenant": 5, "name": "three", "cores": [1, 2, 3], "seconds": 0.5},
            ],
            "waiting": [
                {"tenant": 6, "name": "train.py", "turns": 1},
                {"tenant": 2, "name": "chat", "turns": 2},
            ],
            "tenants": [
                tenant(0, "one", 20.0 + later),
                tenant(2, "chat", 7.0),
                tenant(5, "three", 30.0 + later * 1.5, weight=3.0),
                tenant(6, "train.py", 0.5),
            ],
        },
        "contexts": [
            context(1, 0, 812, "one", cores=1, state="running", cycles=int(1e6 * later)),
            context(2, 2, 1024, "chat", state="waiting", priority=10),
            context(
                3, 5, 20_001, "three", cores=3, weight=3.0, state="running", user="bob",
                cycles=9_000_000_000 + int(3e6 * later), memory_bytes=2 << 30, launches=40_000,
            ),
            context(
                4, 6, 20_417, "a-rather-long-name-of-a-training-script.py", state="waiting",
                faults=2, memory_bytes=64 << 10, memory_limit_bytes=512 << 20,
            ),
            context(5, 1, 555, "wedged", state="lost", memory_bytes=0),
        ],
        "problems": ["log file /var/log/pagoda.log: [Errno 28] No space left: 3 lines lost"],
    }  # fmt: skip
