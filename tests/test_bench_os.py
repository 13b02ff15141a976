"""`pagoda bench os`: its jobs know what is right, and its figures count what happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from service_support import close, serving, shared

from pagoda.cli.bench_os import fairness, launch_overhead, shortest_program, survival
from pagoda.isa import load_chip
from pagoda.pytorch.recording import record_jobs
from pagoda.runtime import Device
from pagoda.runtime.replay import LoadedJob, load_jobs, save_jobs

EDGE = load_chip("edge")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    path = tmp_path_factory.mktemp("jobs") / "jobs"
    save_jobs(path, record_jobs(EDGE))
    return path


@pytest.fixture(scope="module")
def socket(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "device.sock"
    with serving(path, EDGE):
        yield path


def test_jobs_give_the_same_on_a_device_of_their_own_and_on_a_shared_one(jobs, socket):
    recorded = load_jobs(jobs)
    assert len({job.name for job in recorded}) == 4
    device = shared(socket)
    for each in (Device(EDGE), device):
        for job in recorded:
            loaded = LoadedJob(each, job)
            assert loaded.run(again=False) and loaded.run(again=True), job.name
    close(device)


def test_a_wrong_bit_or_cycle_shows(jobs):
    job = load_jobs(jobs)[0]
    flipped = bytes([job.expected[0][0] ^ 1]) + job.expected[0][1:]
    late = tuple(cycles + 1 for cycles in job.cycles)
    for wrong in (replace(job, expected=(flipped, *job.expected[1:])), replace(job, cycles=late)):
        assert not LoadedJob(Device(EDGE), wrong).run(again=False)


def test_the_shortest_program_only_ends():
    result = Device(EDGE).launch(shortest_program())
    assert result.fault is None
    assert (result.counters.instructions, result.counters.commands) == (2, 0)


def test_launch_overhead(socket):
    figures = launch_overhead(EDGE, str(socket))
    assert 0 < figures["embedded_launch_us"] < figures["service_launch_us"]


@pytest.mark.slow
def test_shares_and_survival(jobs, socket):
    figures = fairness(str(socket), jobs, load_jobs(jobs), seconds=5)
    assert figures["fairness"] > 0.9  # the machine may be busy: the benchmark tells the figure
    found = survival(str(socket), jobs, seconds=30, seed=1)
    assert found["results"] > 0 and found["kills"] > 0
    lost = {name: found[name] for name in ("wrong_results", "lost_bytes", "stuck", "crashed")}
    assert not any(lost.values()), found["complaints"]
