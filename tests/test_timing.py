"""Duration formulas against numbers worked out by hand, and the DRAM port's exact arithmetic."""

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.isa import PRESETS, timing
from pagoda.isa.access import access
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.timing import Duration
from pagoda.isa.timing_examples import EXAMPLES

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e.function}-{e.working}")
def test_worked_examples(example):
    function = getattr(timing, example.function)
    chip = () if example.function == "drained" else (PRESETS[example.chip],)
    result = function(*chip, **example.arguments)
    if isinstance(result, Duration):
        result = (result.occupancy, result.tail)
    assert result == example.result


def test_every_formula_has_an_example():
    formulas = {
        name
        for name, function in vars(timing).items()
        if callable(function) and function.__module__ == timing.__name__ and name.islower()
    }
    composed = {"duration", "ceil_div", "_load", "_store", "_share_bank"}
    assert formulas - composed == {example.function for example in EXAMPLES}


bandwidths = st.fractions(Fraction(1, 7), 4096)


@given(bandwidths, st.integers(0, 10**9))
def test_the_dram_port_opens_by_the_phase_rule(bandwidth, start):
    chip = replace(TINY, dram_bytes_per_cycle=bandwidth, cores=3)
    period = 64 / (chip.dram_bytes_per_cycle / 3)
    slot = timing.first_dram_slot(chip, start)
    assert ceil(slot * period) >= start
    assert slot == 0 or ceil((slot - 1) * period) < start
    assert timing.dram_slot_cycle(chip, slot) == ceil(slot * period)


@given(
    bandwidths, st.integers(1, 1000), st.integers(0, 5), st.integers(0, 10**4),
    st.integers(1, 10**5), st.integers(1, 2), st.integers(0, 10**6),
)  # fmt: skip
def test_every_row_takes_the_longer_of_its_sides(bandwidth, rows, few, more, local, ways, start):
    chip = replace(TINY, dram_bytes_per_cycle=bandwidth)
    period, atoms = ways * 64 / chip.dram_share, few * rows + more % rows + (few == 0) * rows
    low, more = divmod(atoms, rows)
    sides = [low] * (rows - more) + [low + 1] * more
    exact = sum(max(count * period, Fraction(local, rows)) for count in sides)
    cycles = timing.dma_cycles(chip, rows, atoms, local, ways)
    assert cycles == ceil(exact) >= local
    # It holds the atoms: the slot after the last of them opens by then.
    first = timing.first_dram_slot(chip, start)
    after = timing.dram_slot_cycle(chip, first + ways * atoms)
    assert timing.dram_slot_cycle(chip, first) + cycles >= after


def test_a_transfer_waits_for_its_first_slot():
    bound = timing.load(TINY, rows=1, atoms=8, local=30)  # slots open in 0, 4, 8, ...
    assert bound == Duration(32, 32, 0)
    assert [bound.occupancy_from(TINY, start) for start in (3, 4, 5)] == [33, 32, 35]
    store = timing.store(TINY, rows=1, atoms=1, local=4, lead=4)
    assert store == Duration(4, 16, 4)
    assert [store.occupancy_from(TINY, start) for start in (3, 4, 5)] == [9, 8, 11]
    padding = timing.load(TINY, rows=0, atoms=0, local=0, padding=5)
    assert padding.occupancy_from(TINY, 3) == 5


def duration(name, **fields):
    """The duration on `tiny` of 4 rows of 8 bf16, 16 bytes, that lie 32 bytes apart in DRAM."""
    f = dict(
        mem=1, local=1, slot=0, offset=0, address=0, cols=8, rows=4, planes=1,
        mem_row_stride=32, mem_plane_stride=128, row_stride=16, plane_stride=64,
    ) | fields  # fmt: skip
    return timing.duration(TINY, access(name, f))


NO_PADS = dict(pad_above=0, pad_below=0, pad_left=0, pad_right=0)


def test_rows_merge_on_either_side():
    assert duration("load", **NO_PADS) == Duration(16, 32, 0)
    assert duration("load", **NO_PADS, offset=56) == Duration(24, 32, 0)  # 2, 1, 2, 1 atoms
    assert duration("load", **NO_PADS, mem_row_stride=16) == Duration(4, 32, 0)  # one atom
    assert duration("load", **NO_PADS, local=0, row_stride=32) == Duration(16, 32, 0)
    assert duration("load", **NO_PADS, cols=7, mem_row_stride=14) == Duration(4, 32, 0)
    assert duration("store", accumulate=0, local=0, row_stride=32) == Duration(16, 16, 8)
    assert duration("store", accumulate=1, mem_row_stride=16) == Duration(8 + 32, 16, 4)


def test_padding():
    pads = dict(NO_PADS, pad_above=1, pad_below=1)
    assert duration("load", **pads) == Duration(8, 32, 0)
    assert duration("load", **pads, local=0, row_stride=32) == Duration(8, 32, 0)
    merged = dict(pads, mem_row_stride=16)  # one atom for 2 rows
    assert duration("load", **merged) == Duration(4, 32, 0)
    assert duration("load", **merged, local=0, row_stride=32) == Duration(8, 32, 0)
    assert duration("load", **dict(NO_PADS, pad_right=4)) == Duration(16 + 1, 32, 0)
    assert duration("load", **dict(NO_PADS, pad_above=4)) == Duration(4, 32)


def test_costs_and_latencies_of_vector_functions():
    by_latency = {}
    for function in VECTOR_FUNCTIONS.values():
        by_latency.setdefault((function.cost, function.latency), set()).add(function.name)
    assert by_latency[8, 28] == {"fdiv", "frdiv", "fsqrt", "idiv", "imod"}
    assert by_latency[2, 16] == {"exp2", "log2", "recip", "rsqrt", "sin2pi"}
    assert by_latency[1, 7] == {
        "fadd", "fsub", "fmul", "frsub", "ffloor", "fceil", "ftrunc", "fround",
        "f2i", "i2f", "imul", "fma", "i2fmul", "faddq",
    }  # fmt: skip
    assert set(by_latency) == {(8, 28), (2, 16), (1, 7), (1, 2)}
