"""Loads, shares and rates from two looks at a service."""

import copy
import dataclasses
import json

import pytest
from device_figures import figures

from pagoda.cli.device_load import CoreLoad, load_between


def test_loads_shares_and_rates_are_of_the_time_between_two_looks():
    load = load_between(figures(), figures(later=2.0))
    assert load.seconds == 2.0
    assert load.load == pytest.approx((1 + 3 * 0.5) / 4)
    assert load.cores == (
        CoreLoad(0, 1.0, 812), CoreLoad(1, 0.5, 20_001), CoreLoad(2, 0.5, 20_001),
        CoreLoad(3, 0.5, 20_001),
    )  # fmt: skip
    assert [(p.pid, p.share) for p in load.processes] == [
        (20_001, pytest.approx(1.5 / 4)), (812, pytest.approx(1 / 4)), (555, 0.0), (1024, 0.0),
        (20_417, 0.0),
    ]  # fmt: skip
    assert load.processes[0].cycles_per_second == 3e6
    assert load.cycles_per_second == 12.5e6
    assert load.queue == (20_417, 1024)
    assert load.processes[3].waited_seconds == 1.25


def test_without_a_first_look_they_are_since_the_start():
    load = load_between(None, figures())
    assert load.seconds == 100.0
    assert load.load == 0.5
    assert {p.pid: p.share for p in load.processes}[812] == pytest.approx(20 / 400)


def test_a_service_started_anew_is_not_compared_with_its_past():
    before = figures(later=50.0)
    now = figures()
    now["pid"] += 1
    assert load_between(before, now) == load_between(None, now)


def test_a_context_that_came_and_one_that_joined_the_queue_anew():
    before, now = figures(), figures(later=1.0)
    before["contexts"] = [c for c in before["contexts"] if c["pid"] != 812]
    for entry in (*now["contexts"], *now["queue"]["tenants"]):
        if entry["tenant"] == 5:
            entry["tenant"] = 9
    for entry in now["queue"]["tenants"]:
        if entry["tenant"] == 9:
            entry["core_seconds"] = 0.25
    shares = {p.pid: p.share for p in load_between(before, now).processes}
    assert shares[20_001] == pytest.approx(0.25 / 4)
    assert shares[812] == 1.0  # it was there for longer than the time between the looks


def test_two_looks_at_one_moment():
    load = load_between(figures(), figures())
    assert (load.load, load.cycles_per_second, load.seconds) == (0.0, 0.0, 0.0)


def test_it_is_plain_data():
    before = figures()
    kept = copy.deepcopy(before)
    load = load_between(before, figures(1.0))
    assert before == kept
    found = json.loads(json.dumps(dataclasses.asdict(load)))
    assert found["processes"][0]["name"] == "three"
