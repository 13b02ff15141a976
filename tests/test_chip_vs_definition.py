"""The RTL against the definition: bits, cycles, faults, counters and traces are equal.

Every run tries some hundred random command programs; the slow test tries PAGODA_RTL_PROGRAMS of
them, ten thousand unless told otherwise, with seeds from PAGODA_FUZZ_SEED on.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
from command_programs import programs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

pytest.importorskip("amaranth")
from pagoda.chip.machine import RtlMachine
from pagoda.isa.chip import PRESETS
from pagoda.isa.definition import Definition

DRAM_BYTES = 1 << 20
CHIPS = {
    "tiny": replace(PRESETS["tiny"], dram_bytes=DRAM_BYTES),
    "tiny8": replace(PRESETS["tiny8"], dram_bytes=DRAM_BYTES),
    "two": replace(PRESETS["tiny"], name="two", cores=2, dram_bytes=DRAM_BYTES),
}
EXACT = ("core", "index", "pc", "bank", "entry", "start", "free", "finish", "cause", "macs",
         "dram_bytes")  # fmt: skip
PARTS = 20
PROGRAMS = int(os.environ.get("PAGODA_RTL_PROGRAMS", "10000"))
FIRST_SEED = int(os.environ.get("PAGODA_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def machines():
    """One RTL machine a chip: building takes a while, and what it keeps between launches counts."""
    made = {}

    def machine(name):
        if name not in made:
            made[name] = RtlMachine(CHIPS[name], trace=True), Definition(CHIPS[name], trace=True)
        return made[name]

    return machine


def compare(rtl, definition, launches):
    """Run launches on both machines, which have run the same ones before."""
    for number, launch in enumerate(launches):
        for machine in (definition, rtl):
            machine.write(0, launch.dram)
            machine.start(launch.launch)
        expected, result = definition.wait(), rtl.wait()
        if expected.fault is not None:
            expected_fault = replace(expected.fault, detail="")
            assert result.fault == expected_fault, f"launch {number}: {expected.fault}"
        else:
            assert result.fault is None, f"launch {number}"
        assert result.cycles == expected.cycles
        for name in EXACT:
            assert result.trace[name].tolist() == expected.trace[name].tolist(), name
        assert result.counters == expected.counters
        same = rtl.dram == definition.dram
        assert same.all(), f"DRAM differs from byte {np.argmin(same):#x} on"


def fuzz(machines, chip, launches, first_seed, examples):
    rtl, definition = machines(chip)

    @seed(first_seed)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def run(data):
        drawn = [data.draw(programs(CHIPS[chip], 2)) for _ in range(launches)]
        compare(rtl, definition, drawn)

    run()


@pytest.mark.parametrize(("chip", "launches", "examples"), [("tiny", 1, 200), ("tiny", 2, 50)])
def test_command_programs(machines, chip, launches, examples):
    fuzz(machines, chip, launches, 0, examples)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("part", range(PARTS))
def test_many_command_programs(machines, chip, part):
    examples = -(-PROGRAMS // (PARTS * len(CHIPS)))
    fuzz(machines, chip, 1 + part % 2, FIRST_SEED + part, examples)
