"""The matrix engine and its element against the definition: every bit, every cycle."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest

from pagoda.isa import timing
from pagoda.isa.access import Access, Range, access
from pagoda.isa.accumulation import matmul, matmul_i8
from pagoda.isa.chip import PRESETS, Chip
from pagoda.isa.commands import COMMANDS, encode

pytest.importorskip("amaranth")

from amaranth.hdl import Module, Mux
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip import verilate
from pagoda.chip.interfaces import Job
from pagoda.chip.matrix_engine import MatrixEngine
from pagoda.chip.modules import shared_verilog
from pagoda.chip.processing_element import (
    A_BIAS,
    B_BIAS,
    FloatElement,
    canonical,
    delay,
    encode_float,
    encode_int,
    processing_element,
)
from pagoda.chip.verilate import Model

CHIPS = {
    "tiny": PRESETS["tiny"],
    "tiny8": PRESETS["tiny8"],
    "8x4": replace(PRESETS["tiny"], name="8x4", rows=8, cols=4, lanes=4, pe_stages=4,
                   matrix_types=("bf16",)),
    "4x8": replace(PRESETS["tiny8"], name="4x8", rows=4, cols=8, lanes=8, pe_stages=2),
    "2x2": replace(PRESETS["tiny8"], name="2x2", rows=2, cols=2, lanes=2),
}  # fmt: skip
WITH_SUBMODULES = ("2x2",)  # the others instantiate the element as a Verilog module of its own


@dataclass
class Command:
    fields: dict[str, int]
    touched: Access
    start: int = -1
    free: int = -1
    last_write: int = -1


def with_shared_modules(component, name: str) -> str:
    return "".join(shared_verilog(name, component).values())


class Bench:
    """An engine between a SRAM and an ACC; starts commands as the window would."""

    def __init__(self, chip: Chip):
        self.chip = chip
        if chip.name in WITH_SUBMODULES:
            self.model = Model(MatrixEngine(chip), "matrix_engine")
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(verilate, "to_verilog", with_shared_modules)
                self.model = Model(MatrixEngine(chip), "matrix_engine")
        self.noise = random.Random(5)

    def run(self, commands: list[Command], sram: np.ndarray, acc: np.ndarray) -> None:
        """Run the commands in order, each as soon as `free` and their results' hazards allow."""
        model, waiting, done = self.model, list(commands), []
        running: Command | None = None
        answers: dict[str, int] = {}
        cycle = last = 0
        while waiting or running or cycle < last:
            if running and running.start < cycle and model["control__free"]:
                running.free = cycle
                last = max(last, cycle + timing.duration(self.chip, running.touched).tail)
                done.append(running)
                running = None
            start = bool(waiting) and not running and self._may_start(waiting[0], done, cycle)
            if start:
                running = waiting.pop(0)
                running.start = cycle
                model["control__job"] = job_bits(self.chip, running)
            model["control__start"] = start
            for port, value in answers.items():
                model[f"{port}__data"] = value
            model.settle()
            banks: list[tuple[int, int]] = []
            answers = {port: self._read(port, sram, acc, banks) for port in ("a", "b", "psum")}
            assert len(banks) == len(set(banks)), "two reads of a bank in one cycle"
            if model["write__enable"]:
                self._write(acc, [*done, running] if running else done, cycle)
            model.tick()
            cycle += 1
            assert cycle < 100_000, "the engine never gets free"

    def _may_start(self, command: Command, done: list[Command], cycle: int) -> bool:
        hull = command.touched.tile("acc").hull
        return bool(self.model["control__free"]) and not any(
            cycle < other.free + timing.duration(self.chip, other.touched).tail
            and other.touched.tile("acc").hull.overlaps(hull)
            for other in done
        )

    def _read(self, port: str, sram: np.ndarray, acc: np.ndarray, banks: list) -> int:
        """The port's data in the next cycle: noise where it asks for nothing."""
        model, value = self.model, self.noise.getrandbits(8 * self.chip.port_bytes)
        if not model[f"{port}__enable"]:
            return value
        space, first, size = (model[f"{port}__{name}"] for name in ("acc", "address", "size"))
        assert space == (port == "psum") and size > 0
        memory, bank = (acc, "acc") if space else (sram, "sram")
        assert first + size <= len(memory)
        unit = self.chip.bank_bytes(bank)
        banks += [(space, b) for b in range(first // unit, (first + size - 1) // unit + 1)]
        got = int.from_bytes(memory[first : first + size].tobytes(), "little")
        return value >> 8 * size << 8 * size | got

    def _write(self, acc: np.ndarray, commands: list[Command], cycle: int) -> None:
        model = self.model
        first, size = model["write__address"], model["write__size"]
        assert model["write__acc"] and 0 < size and first + size <= len(acc)
        data = model["write__data"].to_bytes(self.chip.port_bytes, "little")
        acc[first : first + size] = np.frombuffer(data[:size], np.uint8)
        owners = [c for c in commands if _inside(c.touched.tile("acc").hull, first, size)]
        assert owners, "a write outside of every result"
        # Results in flight do not overlap: the owner is the last one.
        owners[-1].last_write = cycle


def _inside(hull: Range, first: int, size: int) -> bool:
    return hull.first <= first and first + size - 1 <= hull.last


def job_bits(chip: Chip, command: Command) -> int:
    words = [0] * 16
    for word, value in encode("matmul", **command.fields):
        words[word] = value & 0xFFFFFFFF
    job = {
        "empty": 0, "bank": COMMANDS["matmul"].bank, "words": words,
        "shared_ab": int(timing._share_bank(chip, command.touched)),
    }  # fmt: skip
    return Job().const(job).as_bits()


def random_command(rng: random.Random, chip: Chip) -> Command:
    """A legal matmul that fits; A and B often share a bank."""
    while True:
        integer = rng.choice([t == "int8" for t in chip.matrix_types])
        unit = 1 if integer else 2
        transpose_a = rng.random() < 0.3

        def small(top: int) -> int:
            return rng.choice((1, rng.randint(1, top), rng.randint(1, top)))

        most = 3 * max(chip.rows, chip.cols)
        m0, m1, m2 = small(9), small(3), small(2)
        k_inner, k_outer = rng.randint(0, most), rng.choice((0, 1, 1, 2, 3))
        if transpose_a:
            m0, m1, m2, k_outer = small(most + 3), 1, 1, 1
        n = small(most)
        bank = chip.bank_bytes("sram")
        f = dict(
            type=int(integer), accumulate=rng.getrandbits(1), transpose_a=int(transpose_a),
            transpose_b=int(rng.random() < 0.5), m0=m0, m1=m1, m2=m2, k_inner=k_inner,
            k_outer=k_outer, n=n,
            m0_stride=unit * rng.randint(0, 60), m1_stride=unit * rng.randint(0, 200),
            m2_stride=unit * rng.randint(0, 300), k_outer_stride=unit * rng.randint(0, 30),
            b_stride=unit * rng.randint(0, 60), acc_stride=4 * (n + rng.randint(0, 6)),
            a=unit * rng.randint(0, bank // unit),
            b=unit * rng.randint(0, bank // unit) + rng.choice((0, 3, 3)) * bank,
            acc=4 * rng.randint(0, chip.acc_bytes // 4 - 1),
        )  # fmt: skip
        touched = access("matmul", f)
        size = (chip.sram_bytes, chip.acc_bytes)
        if all(tile.hull.last < size[tile.space] for tile in touched.tiles):
            return Command(f, touched)


def operands(rng: np.random.Generator, count: int, mode: str) -> np.ndarray:
    """bf16 patterns: any bits; near the subnormals; sums that cancel; ordinary ones."""
    if mode == "bits":
        return rng.integers(0, 65536, count).astype(np.uint16)
    if mode == "tiny":
        exponent = rng.choice([0, 1, 2, 40, 60, 63, 64, 65, 66], count)
        sign = rng.integers(0, 2, count) << 15
        return (sign | exponent << 7 | rng.integers(0, 128, count)).astype(np.uint16)
    value = rng.standard_normal(count)
    if mode == "cancel":
        value = rng.integers(-4, 5, count) * 2.0 ** rng.integers(-9, 9, count)
    return (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def expect(command: Command, sram: np.ndarray, acc: np.ndarray) -> None:
    """The command by the definition's arithmetic."""
    f, touched = command.fields, command.touched
    m, k = f["m0"] * f["m1"] * f["m2"], f["k_outer"] * f["k_inner"]
    kind = np.int8 if f["type"] else np.uint16
    a, b = np.zeros((m, 0), kind), np.zeros((0, f["n"]), kind)
    if k:
        a, b = (
            np.ascontiguousarray(sram[touched.tile(name).byte_index()]).view(kind) for name in "ab"
        )
        a = a.T if f["transpose_a"] else a.reshape(m, k)
        b = b.T if f["transpose_b"] else b
    where = touched.tile("acc").byte_index()
    result = np.int32 if f["type"] else np.float32
    old = acc[where].view(result) if f["accumulate"] else np.zeros((m, f["n"]), result)
    if f["type"]:
        acc[where] = matmul_i8(a, b, old).view(np.uint8)
    else:
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
        with np.errstate(invalid="ignore"):
            acc[where] = matmul(a, b, old).view(np.uint8)


BENCHES: dict[str, Bench] = {}


def bench(name: str) -> Bench:
    if name not in BENCHES:
        BENCHES[name] = Bench(CHIPS[name])
    return BENCHES[name]


def check(name: str, seed: int, rounds: int) -> None:
    """Commands hard on one another: bits, the cycle `free`, the last write."""
    chip, engine = CHIPS[name], bench(name)
    rng, bits = random.Random(seed), np.random.default_rng(seed)
    for turn in range(rounds):
        mode = ("normal", "cancel", "tiny", "bits")[turn % 4]
        sram = operands(bits, chip.sram_bytes // 2, mode).view(np.uint8)
        acc = operands(bits, chip.acc_bytes // 2, mode).view(np.uint8)
        commands = [random_command(rng, chip) for _ in range(6)]
        want = acc.copy()
        for command in commands:
            expect(command, sram, want)
        engine.run(commands, sram, acc)
        bad = np.flatnonzero((acc != want).reshape(-1, 4).any(1))
        assert len(bad) == 0, (mode, commands, [
            (int(i) * 4, hex(acc.view(np.uint32)[i]), hex(want.view(np.uint32)[i]))
            for i in bad[:4]])  # fmt: skip
        for command in commands:
            duration = timing.duration(chip, command.touched)
            assert command.free == command.start + duration.occupancy, command
            assert command.last_write < command.free + duration.tail, command


@pytest.mark.parametrize("name", CHIPS)
def test_random_matmuls(name):
    check(name, seed=3, rounds=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHIPS)
def test_many_random_matmuls(name):
    check(name, seed=4, rounds=600)


def test_an_empty_command_leaves_the_engine_free():
    model = bench("2x2").model
    model["control__job"] = Job().const({"empty": 1}).as_bits()
    model["control__start"] = 1
    model.tick()
    model["control__start"] = 0
    for _ in range(60):
        ports = ("a", "b", "psum", "write")
        assert model["control__free"] and not any(model[f"{port}__enable"] for port in ports)
        model.tick()


@pytest.mark.parametrize("rows, cols", [(4, 4), (8, 8), (8, 4), (4, 8), (16, 16)])
def test_sizes_elaborate(rows, cols):
    chip = replace(PRESETS["tiny"], rows=rows, cols=cols, lanes=max(rows, cols))
    texts = shared_verilog("matrix_engine", MatrixEngine(chip))
    assert list(texts) == ["matrix_engine", "pagoda_pe"]
    assert texts["matrix_engine"].count("pagoda_pe ") == rows * cols
    assert texts["pagoda_pe"].count("module pagoda_pe(") == 1


def test_a_float_element_needs_three_stages():
    with pytest.raises(ValueError) as refused:
        processing_element(replace(PRESETS["tiny"], pe_stages=2))
    assert str(refused.value) == (
        "chip 'tiny': pe_stages = 2: a bf16 element needs 3 or more; use pe_stages = 3"
    )


# The element alone. -------------------------------------------------------------------------------

ELEMENTS = ((3, False), (3, True), (4, True), (5, True), (6, True))  # stages, with int8
LEAD = FloatElement.lead


class Elements(wiring.Component):
    """Elements side by side, behind the coders of the array's edge."""

    def __init__(self):
        outs = {f"out{i}": Out(32) for i in range(len(ELEMENTS))}
        super().__init__({"a": In(16), "w": In(16), "psum": In(32), "integer": In(1), **outs})

    def elaborate(self, platform) -> Module:
        m = Module()
        a, w = encode_float(m, self.a, A_BIAS, "a"), encode_float(m, self.w, B_BIAS, "w")
        for i, (stages, integer) in enumerate(ELEMENTS):
            element = m.submodules[f"element{i}"] = FloatElement(stages, integer)
            as_int = self.integer & integer
            m.d.comb += [
                element.a.eq(Mux(as_int, encode_int(self.a[:8]), a)), element.swap.eq(1),
                element.w.eq(Mux(as_int, encode_int(self.w[:8]), w)),
                element.psum.eq(delay(m, Mux(as_int, self.psum, canonical(self.psum)), LEAD)),
                getattr(self, f"out{i}").eq(element.psum_out),
            ]  # fmt: skip
        return m


@pytest.fixture(scope="module")
def elements() -> Model:
    return Model(Elements(), "elements")


def stream(model: Model, operands: list[tuple[int, int, int]], integer: int) -> list[list[int]]:
    """The results of every element for one (a, w, psum) a cycle; without int8 only floats."""
    model["integer"] = integer
    results: list[list[int]] = [[] for _ in ELEMENTS]
    deepest = LEAD + max(stages for stages, _ in ELEMENTS)
    for a, w, psum in [*operands, *[(0, 0, 0)] * deepest]:
        model["a"], model["w"], model["psum"] = a, w, psum
        model.tick()
        for i, result in enumerate(results):
            result.append(model[f"out{i}"])
    return [
        result[LEAD + stages - 1 :][: len(operands)]
        for result, (stages, _) in zip(results, ELEMENTS, strict=True)
    ]


NAN, INFINITE = 0x7FC00000, 0x7F800000


def fused(a: int, w: int, psum: int) -> int:
    """psum + a * w of patterns, in whole numbers of 2^-298, with one rounding."""
    (ka, xa), (kw, xw), (kp, xp) = (_value(p) for p in (a << 16, w << 16, psum))
    sign = (a ^ w) >> 15
    if "nan" in (ka, kw, kp) or (ka == "inf" and xw == 0) or (kw == "inf" and xa == 0):
        return NAN
    if "inf" in (ka, kw):
        return NAN if kp == "inf" and psum >> 31 != sign else sign << 31 | INFINITE
    if kp == "inf":
        return psum
    total = (-1 if sign else 1) * xa * xw + (-1 if psum >> 31 else 1) * (xp << 149)
    if total == 0:
        return (sign & psum >> 31) << 31
    size = abs(total)
    place = max(size.bit_length() - 24, 149)  # of the last bit kept: 24 bits, or down to 2^-149
    kept, rest, half = size >> place, size & (1 << place) - 1, 1 << place - 1
    kept += rest > half or (rest == half and kept & 1)
    return (total < 0) << 31 | min((place - 149 << 23) + kept, INFINITE)


def _value(pattern: int) -> tuple[str, int]:
    """Kind of a binary32 pattern, and its magnitude in 2^-149."""
    exponent, fraction = pattern >> 23 & 255, pattern & 0x7FFFFF
    if exponent == 255:
        return ("nan", 1) if fraction else ("inf", 1)
    magnitude = fraction if exponent == 0 else (fraction | 1 << 23) << exponent - 1
    return "finite", magnitude


BF16 = (
    0x0000, 0x0001, 0x0002, 0x0003, 0x0040, 0x0055, 0x007F, 0x0080, 0x0081, 0x00FF, 0x0100, 0x1F80,
    0x2000, 0x207F, 0x3380, 0x3B80, 0x3F00, 0x3F7F, 0x3F80, 0x3F81, 0x3FFF, 0x4000, 0x4049, 0x4380,
    0x4B00, 0x5F80, 0x7F00, 0x7F7F, 0x7F80, 0x7FC0, 0x7F81,
)  # fmt: skip
SUMS = (
    0x00000000, 0x00000001, 0x00000002, 0x00000003, 0x00400000, 0x007FFFFF, 0x00800000, 0x00800001,
    0x00FFFF00, 0x00FFFFFF, 0x01000000, 0x33800000, 0x34000000, 0x3F000000, 0x3F7E0001, 0x3F7FFFFF,
    0x3F800000, 0x3F800001, 0x3FFFFFFF, 0x40000000, 0x43800000, 0x4B7FFFFF, 0x4B800000, 0x4B800001,
    0x4C000001, 0x7F000000, 0x7F7FFFFE, 0x7F7FFFFF, 0x7F800000, 0x7F812345,
)  # fmt: skip


def test_the_element_on_corners(elements):
    """All pairs of 62 bf16 patterns with 60 partial sums."""
    factors = [p | sign << 15 for p in BF16 for sign in (0, 1)]
    sums = [p | sign << 31 for p in SUMS for sign in (0, 1)]
    cases = list(itertools.product(factors, factors, sums))
    want = [fused(*case) for case in cases]
    for (stages, _), got in zip(ELEMENTS, stream(elements, cases, 0), strict=True):
        wrong = [(case, g, w) for case, g, w in zip(cases, got, want, strict=True) if g != w]
        assert not wrong, (stages, [tuple(map(hex, (*c, g, w))) for c, g, w in wrong[:3]])


def test_the_element_where_sums_cancel(elements):
    """Sums near the product's negative, in exponent or in every bit."""
    rng = random.Random(7)
    cases = []
    while len(cases) < 20_000:
        a, w = rng.getrandbits(16), rng.getrandbits(16)
        product = fused(a, w, 0x80000000) ^ 1 << 31
        near = product + rng.randint(-3, 3) if rng.random() < 0.5 else (
            product & 0x80000000 | rng.getrandbits(23)
            | min(max((product >> 23 & 255) + rng.randint(-30, 30), 0), 255) << 23
        )  # fmt: skip
        cases.append((a, w, near & 0xFFFFFFFF))
    want = [fused(*case) for case in cases]
    assert all(got == want for got in stream(elements, cases, 0))


def test_the_integer_model_is_the_definition():
    rng = np.random.default_rng(1)
    a, w = (rng.integers(0, 1 << 16, 5000, np.uint32) for _ in range(2))
    psum = rng.integers(0, 1 << 32, 5000, np.uint32)
    with np.errstate(invalid="ignore"):
        want = [
            int(matmul(*((x << 16).view(np.float32).reshape(1, 1) for x in (i, j)),
                       k.view(np.float32).reshape(1, 1)).view(np.uint32)[0, 0])
            for i, j, k in zip(a, w, psum, strict=True)
        ]  # fmt: skip
    assert [fused(*map(int, case)) for case in zip(a, w, psum, strict=True)] == want


def test_the_element_on_int8(elements):
    corners = (0, 1, 2, 0x55, 0x7F, 0x80, 0x81, 0xFE, 0xFF)
    sums = (0, 1, 0x7FFF, 0x8000, 0x7FFFFF, 0x800000, 0x12345678, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF)
    rng = random.Random(2)
    cases = list(itertools.product(corners, corners, sums))
    cases += [(rng.getrandbits(8), rng.getrandbits(8), rng.getrandbits(32)) for _ in range(2000)]

    def signed(x: int) -> int:
        return x - (x >> 7 << 8)

    want = [(psum + signed(a) * signed(w)) % (1 << 32) for a, w, psum in cases]
    for (_, integer), got in zip(ELEMENTS, stream(elements, cases, 1), strict=True):
        assert got == want or not integer
