"""Block sizes of matrix products: what the cost model chooses against what a search finds.

The search runs programs on the simulator and counts all their cycles, launch included: RANDOM plans
drawn from all legal ones, then from the best plan so far to the neighbours of it that differ in one
block size, in the buffers or in keeping rows of a, until none is better or STEPS were taken.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from compiler_support import bfloat16, run_kernel

from pagoda.compiler.cost import (
    EpilogueCost,
    MatmulPlan,
    MatmulShape,
    choose_matmul,
    legal_plans,
)
from pagoda.compiler.language import TensorType
from pagoda.isa.chip import PRESETS, Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.matmul import build_matmul
from pagoda.sim.machine import Simulator

SHAPES = 20
SHAPES_IN_SHORT = 4
RANDOM, RANDOM_IN_SHORT = 60, 12
STEPS, STEPS_IN_SHORT = 6, 1
ALLOWED = 1.10


def random_shape(number: int) -> MatmulShape:
    """Extents from 1 (m) or 8 (n, k) to 2048, small ones as likely as large ones; a batch now and
    then; b stored as nn.Linear stores its weight, or upright as in q k^T v."""
    rng = random.Random(number)
    m, n, k = (round(2 ** rng.uniform(low, 11)) for low in (0, 3, 3))
    batch = rng.choice((1, 1, 1, 3))
    while batch * m * n * k > 1 << 30:  # so that a search takes seconds
        m = -(-m // 2)
    return MatmulShape(batch, m, n, k, transposed_b=rng.random() < 0.7)


@dataclass(frozen=True)
class Measurement:
    """Simulated cycles of one shape on one chip, by plan."""

    chip: Chip
    shape: MatmulShape

    @cache  # noqa: B019 - lives as long as its test
    def cycles(self, plan: MatmulPlan) -> int:
        s = self.shape
        operands = {"c": (s.batch, s.m, s.n), "a": (s.batch, s.m, s.k), "b": (s.batch, s.k, s.n)}
        types = {name: TensorType.fixed(DType.BF16, *sizes) for name, sizes in operands.items()}
        arrays = {name: np.zeros(sizes, bfloat16) for name, sizes in operands.items()}
        if s.transposed_b:
            strides = (2 * s.n * s.k, 2, 2 * s.k)
            types["b"] = replace(types["b"], strides=strides)
            arrays["b"] = np.zeros((s.batch, s.n, s.k), bfloat16).transpose(0, 2, 1)
        kernel = build_matmul(self.chip, **types, plan=plan)
        return run_kernel(self.chip, kernel, Simulator(self.chip), **arrays).cycles


def neighbours(plan: MatmulPlan, plans: list[MatmulPlan]) -> Iterator[MatmulPlan]:
    """The legal plans next to this one along each of its five choices."""
    for name in ("resident", "bm", "bn", "bk", "buffers"):
        here = getattr(plan, name)
        line = [p for p in plans if replace(p, **{name: here}) == plan]
        values = {getattr(p, name): p for p in line}
        below = [v for v in values if v < here]
        above = [v for v in values if v > here]
        if below:
            yield values[max(below)]
        if above:
            yield values[min(above)]


def search(measured: Measurement, tries: int, steps: int) -> MatmulPlan:
    """The best plan found. It never looks at the cost model's choice."""
    plans = list(legal_plans(measured.chip, measured.shape))
    drawn = random.Random(0).sample(plans, min(tries, len(plans)))
    best = min(drawn, key=measured.cycles)
    for _ in range(steps):
        better = min((best, *neighbours(best, plans)), key=measured.cycles)
        if better == best:
            break
        best = better
    return best


def ratio_to_the_best(chip: Chip, number: int, tries: int, steps: int) -> tuple[float, str]:
    """Cycles of the chosen plan over those of the best plan found, and what they were."""
    measured = Measurement(chip, random_shape(number))
    chosen = replace(choose_matmul(chip, measured.shape), cycles=0)
    best = search(measured, tries, steps)
    ratio = measured.cycles(chosen) / measured.cycles(best)
    report = (
        f"{chip.name} {measured.shape}: {ratio:.3f}; chosen {chosen} {measured.cycles(chosen)}, "
        f"best {best} {measured.cycles(best)}"
    )
    return ratio, report


@pytest.mark.parametrize("chip", ["edge", "car"])
@pytest.mark.parametrize("number", range(SHAPES_IN_SHORT))
def test_the_choice_is_near_the_best_of_a_short_search(chip, number):
    ratio, report = ratio_to_the_best(PRESETS[chip], number, RANDOM_IN_SHORT, STEPS_IN_SHORT)
    assert ratio <= ALLOWED, report


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["edge", "car"])
@pytest.mark.parametrize("number", range(SHAPES))
def test_the_choice_is_near_the_best_of_a_long_search(chip, number):
    ratio, report = ratio_to_the_best(PRESETS[chip], number, RANDOM, STEPS)
    assert ratio <= ALLOWED, report


def test_an_epilogue_may_be_stores_alone():
    """Sums that are stored as they are cost what a product without an epilogue does."""
    shape = MatmulShape(1, 512, 512, 512, output_bytes=4)
    stores = EpilogueCost(commands=0, cycles=0, tile_bytes=0, loaded_bytes=0, stored_bytes=(4,))
    plain = choose_matmul(PRESETS["edge"], shape).cycles
    assert choose_matmul(PRESETS["edge"], replace(shape, epilogue=stores)).cycles <= 1.05 * plain
