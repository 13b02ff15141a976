"""The simulator against the definition: bits, cycles, faults, counters and traces are equal."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from command_programs import CORE_STEP, Assembler, CommandProgram, programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagoda.isa.chip import PRESETS
from pagoda.isa.definition import Definition
from pagoda.isa.fault import FaultKind
from pagoda.isa.program import Launch, Slot
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
    """Run launches on both machines and compare everything; the kind of the last fault."""
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
    return None if expected.fault is None else expected.fault.kind


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


def racing_program(random):
    """Two cores that load, store, gather and scatter bytes near each other's.

    What core 0 sees at an offset of slot 1, core 1 may see CORE_STEP further in slot 0.
    """
    assembler = Assembler()
    assembler.prepare_core_offset()
    assembler.command(
        "iota", dst=0, dst_stride=64, rows=16, cols=16, start=0, row_step=0, col_step=1
    )
    for _ in range(random.randrange(2, 9)):
        name = random.choice(["load", "store", "gather", "scatter"])
        per_core = random.random() < 0.7
        slot = random.choice([0, 1]) if per_core else 2
        fields = {"slot": slot, "mem": 3, "local": 3, "cols": random.randrange(1, 6)}
        fields |= {"offset": random.randrange(256), "rows": random.randrange(1, 5)}
        fields |= {"row_stride": 16, "mem_row_stride": random.choice([5, 8, 19])}
        fields |= {"address": 2048 if name in ("load", "gather") else 0}
        if name in ("load", "store"):
            fields |= {"planes": random.choice([1, 1, 2]), "plane_stride": 64}
            fields |= {"mem_plane_stride": random.choice([80, 96])}
        else:
            fields |= {"indices": 0}
        assembler.command(name, per_core, **fields)
        if random.random() < 0.15:
            assembler.control("barrier")
    assembler.control("exit")
    slots = (Slot(0, 4 * CORE_STEP), Slot(CORE_STEP, 4 * CORE_STEP), Slot(0, CORE_STEP))
    return CommandProgram(Launch(assembler.program(), slots=slots), bytes(64), ())


def test_races():
    kinds = {compare(TWO, [racing_program(Random(s))], checking=True) for s in range(60)}
    assert kinds == {None, FaultKind.RACE}
