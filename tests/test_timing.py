"""Duration formulas against numbers worked out by hand, and the DRAM port's exact arithmetic."""

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.isa import PRESETS, timing
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
    composed = {"duration", "ceil_div", "dma", "_share_bank"}
    assert formulas - composed == {example.function for example in EXAMPLES}


@given(
    st.fractions(Fraction(1, 7), 4096), st.integers(0, 10**9), st.integers(0, 10**6),
)  # fmt: skip
def test_the_dram_port_opens_by_the_phase_rule(bandwidth, start, atoms):
    chip = replace(TINY, dram_bytes_per_cycle=bandwidth, cores=3)
    period = 64 / (chip.dram_bytes_per_cycle / 3)
    slot = timing.first_dram_slot(chip, start)
    assert ceil(slot * period) >= start
    assert slot == 0 or ceil((slot - 1) * period) < start
    expected = ceil((slot + atoms) * period) - start if atoms else 0
    assert timing.dram_cycles(chip, start, atoms) == expected


def test_a_transfer_takes_the_longer_of_both_sides():
    both = timing.dma(TINY, atoms=2, local=30, accumulate=False)
    assert both == Duration(30, 28, 2)
    assert both.occupancy_from(TINY, 3) == 30
    assert timing.dma(TINY, atoms=8, local=30, accumulate=False).occupancy_from(TINY, 3) == 33
    assert timing.dma(TINY, atoms=0, local=0, accumulate=True) == Duration(0, 52, 0)
    assert timing.dma(TINY, atoms=0, local=0, accumulate=True).occupancy_from(TINY, 3) == 1


def test_costs_and_latencies_of_vector_functions():
    by_latency = {}
    for function in VECTOR_FUNCTIONS.values():
        by_latency.setdefault((function.cost, function.latency), set()).add(function.name)
    assert by_latency[8, 24] == {"fdiv", "frdiv", "fsqrt", "idiv", "imod"}
    assert by_latency[2, 8] == {"exp2", "log2", "recip", "rsqrt", "sin2pi"}
    assert by_latency[1, 4] == {
        "fadd", "fsub", "fmul", "fmax", "fmin", "frsub", "ffloor", "fceil", "ftrunc", "fround",
        "f2i", "i2f", "fma",
    }  # fmt: skip
    assert set(by_latency) == {(8, 24), (2, 8), (1, 4), (1, 0)}
