"""The simulator against the definition: bits, cycles, faults, counters and traces are equal."""

from dataclasses import replace

import numpy as np
import pytest
from command_programs import programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagoda.isa.chip import PRESETS
from pagoda.isa.definition import Definition
from pagoda.sim import Simulator

DRAM_BYTES = 1 << 20
TINY = replace(PRESETS["tiny"], dram_bytes=DRAM_BYTES)
# Another array, an awkward DRAM share, other banks, and several cores.
ODD = replace(
    PRESETS["tiny"], name="odd", rows=8, cols=4, lanes=8, sram_banks=4, acc_banks=2, window=5,
    dram_bytes_per_cycle=7, dram_bytes=DRAM_BYTES,
)  # fmt: skip
TWO = replace(TINY, name="two", cores=2)
CHIPS = {chip.name: chip for chip in (TINY, ODD, TWO)}


def compare(chip, launches, *, checking=False):
    """Run launches one after another on both machines and compare everything."""
    definition = Definition(chip, trace=True, checking=checking)
    simulator = Simulator(chip, trace=True, checking=checking)
    for number, launch in enumerate(launches):
        for machine in (definition, simulator):
            machine.write(0, launch.dram)
            machine.start(launch.launch)
        expected, result = definition.wait(), simulator.wait()
        if expected.fault is not None:
            expected_fault = replace(expected.fault, detail="")
            assert result.fault is not None, f"launch {number}: expected {expected.fault}"
            assert replace(result.fault, detail="") == expected_fault
        else:
            assert result.fault is None
        assert result.cycles == expected.cycles
        for name in expected.trace.dtype.names:
            assert result.trace[name].tolist() == expected.trace[name].tolist(), name
        assert result.counters == expected.counters
        assert np.array_equal(simulator.dram, definition.dram)
        for ours, theirs in zip(simulator._cores, definition._cores, strict=True):
            assert np.array_equal(ours.sram, theirs.local[0])
            assert np.array_equal(ours.acc, theirs.local[1])
            assert np.array_equal(ours.dmem, theirs.dmem)


@pytest.mark.parametrize("name", CHIPS)
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_command_programs(name, data):
    compare(CHIPS[name], [data.draw(programs(CHIPS[name]))])


@pytest.mark.parametrize("name", ["tiny", "two"])
@settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_checking_mode(name, data):
    compare(CHIPS[name], [data.draw(programs(CHIPS[name]))], checking=True)


@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_memories_keep_their_contents_between_launches(data):
    compare(TINY, [data.draw(programs(TINY, 2)) for _ in range(2)])
