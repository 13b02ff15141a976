"""Random matmuls on the engine alone: bits, occupancy, and where reads and writes really fall."""

from __future__ import annotations

import ctypes
import random
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
from amaranth.back import verilog
from matrix_top import MatrixTop
from verilate import BUILD, HERE, build

from pagoda.isa import timing
from pagoda.isa.access import access
from pagoda.isa.accumulation import matmul
from pagoda.isa.chip import PRESETS
from pagoda.isa.commands import COMMANDS, encode


class Job(ctypes.Structure):
    _fields_ = [("word", ctypes.c_uint32 * 16), ("shared", ctypes.c_int32),
                ("gap", ctypes.c_int32)]


EVENTS = ("start", "free", "conflicts", "first_a", "last_a", "first_b", "last_b", "first_psum",
          "last_psum", "first_write", "last_write")


class Times(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in EVENTS]


def library(chip) -> ctypes.CDLL:
    source = BUILD / f"matrix_top_{chip.rows}x{chip.cols}.v"
    BUILD.mkdir(exist_ok=True)
    source.write_text(verilog.convert(MatrixTop(chip), name="matrix_top", emit_src=False))
    return build("matrix_top", [source], HERE / "matrix_bench.cpp")


def random_matmul(rng: random.Random, chip) -> dict[str, int] | None:
    """Fields of a legal matmul whose A and B lie in SRAM; None when it does not fit."""
    transpose_a, transpose_b = rng.random() < 0.3, rng.random() < 0.5
    small = lambda top: rng.choice((1, rng.randint(1, top), rng.randint(1, top)))  # noqa: E731
    m0, m1, m2 = small(9), small(3), small(2)
    k_inner, k_outer = rng.randint(0, 11), small(3)
    if transpose_a:
        m0, m1, m2, k_outer = small(19), 1, 1, 1
    n = small(11)
    f = dict(type=0, accumulate=rng.getrandbits(1), transpose_a=transpose_a,
             transpose_b=transpose_b, m0=m0, m1=m1, m2=m2, k_inner=k_inner, k_outer=k_outer, n=n)
    f["m0_stride"] = 2 * rng.randint(0, 25)
    f["m1_stride"], f["m2_stride"] = 2 * rng.randint(0, 200), 2 * rng.randint(0, 300)
    f["k_outer_stride"] = 2 * rng.randint(0, 30)
    f["b_stride"] = 2 * rng.randint(0, 40)
    f["acc_stride"] = 4 * (n + rng.randint(0, 6))
    bank = chip.bank_bytes("sram")
    f["a"] = 2 * rng.randint(0, bank // 2)
    # the same bank, or another one
    f["b"] = 2 * rng.randint(0, bank // 2) + (0 if rng.random() < 0.4 else 3 * bank)
    f["acc"] = 4 * rng.randint(0, 2000)
    touched = access("matmul", f)
    for tile in touched.tiles:
        if tile.hull.last >= (chip.sram_bytes if tile.space == 0 else chip.acc_bytes):
            return None
    return f


def words(f: dict[str, int]) -> list[int]:
    out = [0] * 16
    for word, value in encode("matmul", **f):
        out[word] = value & 0xFFFFFFFF
    return out


def operand_bits(rng: np.random.Generator, count: int, mode: str) -> np.ndarray:
    if mode == "bits":
        return rng.integers(0, 65536, count).astype(np.uint16)
    if mode == "tiny":  # products and sums in the subnormal range
        exponent = rng.choice([0, 1, 2, 40, 60, 63, 64, 65, 66], count)
        return (rng.integers(0, 2, count) << 15 | exponent << 7
                | rng.integers(0, 128, count)).astype(np.uint16)
    value = rng.integers(-4, 5, count) * 2.0 ** rng.integers(-9, 9, count)
    if mode == "normal":
        value = rng.standard_normal(count)
    return (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def expected(f, sram: np.ndarray, acc: np.ndarray) -> None:
    """Apply the command to the images, by the definition's arithmetic."""
    touched = access("matmul", f)
    m, k = f["m0"] * f["m1"] * f["m2"], f["k_outer"] * f["k_inner"]
    to_float = lambda raw: (raw.astype(np.uint32) << 16).view(np.float32)  # noqa: E731
    a, b = np.zeros((m, 0), np.float32), np.zeros((0, f["n"]), np.float32)
    if k:
        a_tile, b_tile = touched.tile("a"), touched.tile("b")
        a = to_float(sram[a_tile.byte_index()].view(np.uint16).copy())
        a = a.T if f["transpose_a"] else a.reshape(m, k)
        b = to_float(sram[b_tile.byte_index()].view(np.uint16).copy())
        b = b.T if f["transpose_b"] else b
    where = touched.tile("acc").byte_index()
    old = acc[where].view(np.float32) if f["accumulate"] else np.zeros((m, f["n"]), np.float32)
    acc[where] = matmul(a, b, old).view(np.uint8)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rng, bits = random.Random(3), np.random.default_rng(3)
    rows, cols = (int(x) for x in (sys.argv[2:4] or (4, 4)))
    chip = replace(PRESETS["tiny"], rows=rows, cols=cols, lanes=max(cols, rows // 2, 4))
    lib = library(chip)
    lib.reset()
    D = chip.psum_latency
    wrong = Counter()
    seen: dict[str, Counter] = {name: Counter() for name in (
        "occupancy - formula", "last read - free", "first read - start",
        "last write presented - free", "write - read of psum", "conflicts")}
    total = 0
    for round_ in range(count):
        mode = ("normal", "cancel", "tiny", "bits")[round_ % 4]
        sram = operand_bits(bits, chip.sram_bytes // 2, mode).view(np.uint8)
        acc = (operand_bits(bits, chip.acc_bytes // 2, mode)).view(np.uint8)
        alone = round_ % 2 == 0
        jobs = []
        while len(jobs) < (1 if alone else 6):
            f = random_matmul(rng, chip)
            if f is not None:
                jobs.append(f)
        lib.fill(0, sram.ctypes.data_as(ctypes.c_char_p), len(sram))
        lib.fill(1, acc.ctypes.data_as(ctypes.c_char_p), len(acc))
        batch, times = (Job * len(jobs))(), (Times * len(jobs))()
        want = acc.copy()
        last_acc = []
        for job, f in zip(batch, jobs, strict=True):
            job.word[:] = words(f)
            touched = access("matmul", f)
            job.shared = timing._share_bank(chip, touched)
            hull = touched.tile("acc").hull
            # what the window would do: wait for an older writer of the same sums
            late = any(hull.overlaps(h) for h in last_acc)
            job.gap = D + 4 if late else rng.choice((0, 0, 3))
            last_acc.append(hull)
            expected(f, sram, want)
        lib.run(batch, times, len(jobs), 2 * D + 20)
        got = np.zeros_like(acc)
        lib.read_acc(got.ctypes.data_as(ctypes.c_char_p), len(got))
        total += len(jobs)
        if not np.array_equal(got, want):
            wrong[mode] += 1
            if sum(wrong.values()) <= 3:
                bad = np.flatnonzero((got != want).reshape(-1, 4).any(1))
                print("bits differ", mode, alone, jobs, [job.gap for job in batch], len(bad),
                      [(int(i) * 4, hex(got.view(np.uint32)[i]), hex(want.view(np.uint32)[i]))
                       for i in bad[:4]])
        for f, t in zip(jobs, times, strict=True):
            touched = access("matmul", f)
            duration = timing.duration(chip, touched)
            seen["occupancy - formula"][t.free - t.start - duration.occupancy] += 1
            if t.free - t.start != duration.occupancy and sum(
                    seen["occupancy - formula"].values()) < 5:
                print(f, t.free - t.start, duration)
            seen["conflicts"][min(t.conflicts, 1)] += 1
            if alone:
                reads = [x for x in (t.last_a, t.last_b, t.last_psum) if x >= 0]
                first = [x for x in (t.first_a, t.first_b, t.first_psum) if x >= 0]
                if reads:
                    seen["last read - free"][max(reads) - t.free] += 1
                    seen["first read - start"][min(first) - t.start] += 1
                seen["last write presented - free"][t.last_write - t.free] += 1
                if t.first_psum >= 0 and f["accumulate"]:
                    seen["write - read of psum"][t.first_write - t.first_psum] += 1
    print(f"{total} matmuls in {count} rounds on {chip.rows}x{chip.cols}; D = {D}, "
          f"tail = {D + 4}; rounds with wrong bits: {dict(wrong)}")
    for name, counter in seen.items():
        print(f"{name}: {dict(sorted(counter.items()))}")
    assert COMMANDS


if __name__ == "__main__":
    main()
