"""Profiles: whose cycles they are, and what engines waited for, from traces made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.isa import CAUSES, COMMANDS, TRACE_DTYPE, LineEntry, Program, Result, load_chip
from pagoda.runtime.device import Device, LaunchRecord
from pagoda.runtime.profile import LAUNCH, Profile, profile
from pagoda.runtime.stalls import IDLE, stalls

LOAD, MATMUL, VECTOR = (COMMANDS[name].bank for name in ("load", "matmul", "vector"))
LINES = (
    LineEntry(0, "dispatcher", 0, "dispatcher"),
    LineEntry(100, "a.py", 1, "a"),
    LineEntry(200, "b.py", 1, "b"),
)
PROGRAM = Program("two", bytes(400), lines=LINES)
CALLS = (("a", "mm"), ("b", "relu"))
# pc, command, entry, start, free, finish, cause, macs, bytes
COMMANDS_RUN = [
    (8, LOAD, 110, 112, 120, 140, "entry", 0, 64),  # the first record
    (16, LOAD, 150, 152, 160, 180, "entry", 0, 64),  # the second, before the call of a
    (104, LOAD, 160, 165, 200, 220, "hazard", 0, 640),
    (108, MATMUL, 170, 221, 300, 310, "hazard", 1000, 0),
    (16, LOAD, 230, 232, 240, 260, "entry", 0, 64),  # the end record, before the call of b
    (204, VECTOR, 250, 311, 330, 335, "dram port", 0, 0),
]


def record(calls=CALLS, cores: int = 1) -> LaunchRecord:
    rows = [
        (core, index, pc, bank, *times, CAUSES.index(cause), macs, nbytes)
        for core in range(cores)
        for index, (pc, bank, *times, cause, macs, nbytes) in enumerate(COMMANDS_RUN)
    ]
    return LaunchRecord(PROGRAM, Result(350, trace=np.array(rows, TRACE_DTYPE)), calls)


def test_calls_share_the_cycles_of_a_launch() -> None:
    found = Profile(load_chip("tiny"))
    found.add(record())
    found.add(record())
    rows = {row.kernel: row for row in found.rows}
    assert {name: row.cycles for name, row in rows.items()} == {"a": 340, "b": 50, LAUNCH: 310}
    assert found.cycles == 700 and found.launches == 2
    assert [(row.kernel, row.calls) for row in found.rows] == [("a", 2), (LAUNCH, 2), ("b", 2)]
    assert rows["a"].macs == 2000 and rows["a"].dram_bytes == 2 * 704
    assert rows["a"].matrix_utilisation == pytest.approx(2000 / (340 * 16))
    assert rows["a"].dram_utilisation == pytest.approx(1408 / (340 * 16))


def test_stalls() -> None:
    found = Profile(load_chip("tiny"))
    found.add(record())
    a, b = (next(row for row in found.rows if row.kernel == name) for name in "ab")
    assert a.busy == {"load": 43, "store": 0, "matrix": 79, "vector": 0}
    nothing = dict.fromkeys(a.stalls["store"], 0)
    assert a.stalls["load"] == {**nothing, "issue": 34, "hazard": 3}
    assert a.stalls["matrix"] == {**nothing, "issue": 62, "hazard": 49}
    assert a.stalls["store"] == nothing and a.bottleneck() == "matrix"
    assert b.stalls["vector"] == {**nothing, "issue": 142, "dram port": 59}


def test_stalls_of_a_whole_launch() -> None:
    found = stalls(record(cores=2).result.trace, 350, 2, 100)
    assert all(row["busy"] + sum(row[c] for c in IDLE) == 2 * 350 for row in found.values())
    nothing = dict.fromkeys(("commands", "busy", *IDLE), 0) | {"launch": 200}
    assert found == {
        "load": nothing | {"commands": 8, "busy": 118, "issue": 156, "hazard": 6, "end": 220},
        "store": nothing | {"end": 500},
        "matrix": nothing | {"commands": 2, "busy": 158, "issue": 144, "hazard": 98, "end": 100},
        "vector": nothing | {"commands": 2, "busy": 38, "issue": 304, "dram port": 118, "end": 40},
    }


def test_cores_add_up() -> None:
    found = Profile(load_chip("car"))
    found.add(record(cores=4))
    a = next(row for row in found.rows if row.kernel == "a")
    assert a.cycles == 170 and a.macs == 4000 and a.busy["matrix"] == 4 * 79


def test_a_program_without_a_call_list_is_one_call() -> None:
    found = Profile(load_chip("tiny"))
    found.add(record(calls=()))
    assert [(row.kernel, row.cycles) for row in found.rows] == [("two", 335), (LAUNCH, 15)]


def test_text() -> None:
    found = Profile(load_chip("tiny"))
    found.add(record())
    title, heading, *lines = str(found).splitlines()
    assert title == "350 cycles (4 us) in 1 launches on tiny"
    assert heading.split("  ")[-1] == "kernel (origin)" and len(heading) < 100
    assert lines == [
        "         170  48.6%      1   36.8%  25.9%  matrix: issue 33%, hazard 26%      a (mm)",
        "         155  44.3%      1    0.0%   2.6%  load: issue 20%                    (launch)",
        "          25   7.1%      1    0.0%  16.0%  vector: issue 65%, dram port 27%   b (relu)",
    ]


def test_tracing_ends_with_the_profile() -> None:
    device = Device(load_chip("tiny"))
    with profile(device):
        assert device.machine.tracing
    assert not device.machine.tracing
