"""The simulator against the definition: bits, cycles, faults, counters and traces are equal.

Every run tries some thousand random command programs. The slow test tries PAGODA_FUZZ_PROGRAMS of
them, a hundred thousand unless told otherwise, with seeds from PAGODA_FUZZ_SEED on; `pytest -m slow
tests/test_sim_vs_definition.py` runs nothing else.
"""

import os
from dataclasses import replace
from fractions import Fraction
from random import Random

import numba
import numpy as np
import pytest
from command_programs import CORE_STEP, Assembler, CommandProgram, programs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pagoda.isa import timing
from pagoda.isa.chip import PRESETS
from pagoda.isa.commands import COLUMN
from pagoda.isa.definition import Definition
from pagoda.isa.fault import FaultKind
from pagoda.isa.functions import FADDQ, FMA, I2FMUL, SELECT, VECTOR_FUNCTIONS
from pagoda.isa.numbers import DType
from pagoda.isa.program import Launch, Slot
from pagoda.sim import Simulator
from pagoda.sim import dma as sim_dma
from pagoda.sim import machine as sim_machine

DRAM_BYTES = 1 << 20
TINY = replace(PRESETS["tiny"], dram_bytes=DRAM_BYTES)
# Another array, an awkward DRAM share, other banks, and several cores.
ODD = replace(
    PRESETS["tiny"], name="odd", rows=8, cols=4, lanes=8, sram_banks=4, acc_banks=2, window=5,
    dram_bytes_per_cycle=7, dram_bytes=DRAM_BYTES,
)  # fmt: skip
TWO = replace(TINY, name="two", cores=2)
CHIPS = {chip.name: chip for chip in (TINY, ODD, TWO)}


def compare(chip, launches, *, checking=False, threads=1):
    """Run launches on both machines and compare everything; the kind of the last fault."""
    definition = Definition(chip, trace=True, checking=checking)
    simulator = Simulator(chip, trace=True, checking=checking, threads=threads)
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


def fuzz(variant, first_seed, examples):
    """Random programs: of one launch or two, on one of CHIPS, in checking mode or not."""
    name, launches, checking, *threads = variant
    chip, bursts = CHIPS[name], 4 if launches == 1 else 2

    @seed(first_seed)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def run(data):
        drawn = [data.draw(programs(chip, bursts)) for _ in range(launches)]
        compare(chip, drawn, checking=checking, threads=threads[0] if threads else 1)

    run()


VARIANTS = {
    "tiny": ("tiny", 1, False),
    "odd": ("odd", 1, False),
    "two": ("two", 1, False),
    "tiny checking": ("tiny", 1, True),
    "two checking": ("two", 1, True),
    "memories kept between launches": ("tiny", 2, False),
    "helped": ("tiny", 2, False, 2),
}
EXAMPLES = {"tiny": 600, "odd": 400, "two": 400, "tiny checking": 300, "two checking": 300}


@pytest.fixture(autouse=True)
def help_from_the_start(monkeypatch):
    """A helper thread otherwise wakes only for launches much longer than these."""
    monkeypatch.setattr(sim_machine, "WORK_ALONE", -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_command_programs(variant):
    fuzz(VARIANTS[variant], 0, EXAMPLES.get(variant, 100))


MANY = int(os.environ.get("PAGODA_FUZZ_PROGRAMS", "100000"))
FIRST_SEED = int(os.environ.get("PAGODA_FUZZ_SEED", "1"))
PARTS = 60  # hypothesis remembers what a part has drawn: parts keep that small


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_many_command_programs(part):
    variant = list(VARIANTS.values())[part % len(VARIANTS)]
    fuzz(variant, FIRST_SEED + part, -(-MANY // PARTS))


# The simulator's functions are compiled for compiled callers only.
dma_cycles = numba.njit(sim_dma.dma_cycles.py_func)


AWKWARD = (
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x3F800000, 0xBF800000, 0x3F000000,
    0x4B000001, 0xCB000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000,
    0x7F800001, 0xFF812345, 0x4F000000, 0xCF000000,
)  # fmt: skip


@pytest.mark.parametrize(
    "code", sorted(VECTOR_FUNCTIONS.keys() - {FMA, SELECT}),
    ids=lambda code: VECTOR_FUNCTIONS[code].name
)
def test_vector_functions_on_awkward_numbers(code):
    """Infinities, NaN of both signs, subnormals, large integers: each with every other."""
    n, assembler = len(AWKWARD), Assembler()
    line = dict(rows=n, cols=n, a_stride=4, b_stride=0, c_stride=0, dst_stride=4 * n)
    assembler.command(
        "load", mem=DType.F32, local=DType.F32, slot=0, offset=0, address=0, cols=n, rows=1,
        planes=1, mem_row_stride=0, row_stride=0,
    )  # fmt: skip
    if code != FADDQ:
        assembler.command("vector", f1=code, f2=0, a_kind=COLUMN, a=0, b=0, c=0, dst=2048, **line)
    if code != I2FMUL:
        assembler.command("vector", f1=0, f2=code, a_kind=COLUMN, a=0, b=0, c=0, dst=4096, **line)
    assembler.control("exit")
    image = np.array(AWKWARD, np.uint32).tobytes()
    launch = Launch(assembler.program(), slots=(Slot(0, 4 * n),))
    assert compare(TINY, [CommandProgram(launch, image, ())]) is None


def test_the_first_saturated_int64_counts_whichever_thread_finds_it():
    """A long load is the helper's, a short one behind it is done at once by the core's thread."""
    assembler = Assembler()
    line = dict(mem=DType.I64, local=DType.I32, slot=0, offset=0, rows=1, planes=1,
                mem_row_stride=0, row_stride=0)  # fmt: skip
    for _ in range(6):  # enough to keep the helper busy
        assembler.command("load", address=0, cols=2000, **line)
    assembler.command("load", address=32768, cols=1, **line)
    assembler.control("exit")
    image = (1 << 40).to_bytes(8, "little") * 2000
    launch = Launch(assembler.program(), slots=(Slot(0, len(image)),))
    again = [CommandProgram(launch, image, ())] * 20
    assert compare(TINY, again, threads=2) is FaultKind.INT64_OVERFLOW


@settings(deadline=None)
@given(
    st.fractions(Fraction(1, 1000), 65536, max_denominator=1000), st.sampled_from([1, 32, 256]),
    st.integers(1, 1 << 20), st.integers(1, 1 << 17), st.integers(), st.integers(1, 1 << 19),
    st.integers(0, 1 << 20), st.integers(1, 2),
)  # fmt: skip
def test_dma_cycles_do_not_overflow(bandwidth, cores, rows, few, more, chunks, missing, ways):
    """Up to the largest transfers and the longest rationals that the rules allow."""
    chip = replace(TINY, dram_bytes_per_cycle=bandwidth, cores=cores)
    state = Simulator(chip)._cores[0].state
    atoms, local = rows * few + more % rows, max(rows * chunks - missing, 1)
    for cycles in (local, rows * few * ways * 64 // chip.dram_share + missing):
        cycles = min(max(int(cycles), 1), 1 << 39)
        expected = timing.dma_cycles(chip, rows, atoms, cycles, ways)
        assert dma_cycles(state, rows, atoms, cycles, ways) == expected


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
    kinds = {compare(TWO, [racing_program(Random(s))], checking=True) for s in range(300)}
    assert kinds == {None, FaultKind.RACE}
