"""Random sequences of load, matmul and store through the window: bits and every cycle.

Bits against the definition's arithmetic applied in program order; entry, start, free and finish of
every command against `pagoda.isa.window` and `pagoda.isa.timing`; and the cycles in which the
hardware's last reads and writes really happen against the finish.
"""

from __future__ import annotations

import argparse
import ctypes
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
from amaranth.back import verilog
from check_matrix import expected, operand_bits, random_matmul
from dma_model import Engines, Transfer, atom_ends, chunk_ends, rows_of
from engines_top import EnginesTop
from verilate import BUILD, HERE, build

from pagoda.isa import timing
from pagoda.isa.access import access, loop_count, merge
from pagoda.isa.chip import PRESETS
from pagoda.isa.commands import COMMANDS, encode
from pagoda.isa.numbers import DType, decode
from pagoda.isa.numbers import encode as encode_lanes
from pagoda.isa.window import Entry, Window

F32, BF16 = DType.F32, DType.BF16
ACC_BIT = 1 << 31
DRAM_BYTES = 1 << 18
BASES = (0, 1 << 16, 2 << 16, 3 << 16)
KINDS = ("load write", "store read", "store send", "result", "request")


class Store(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint32) for n in ("delay", "bank", "word", "value")]


class Times(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("presented", "entry", "start", "free", "finish")]


def tails(chip) -> dict[int, int]:
    """By engine: load, store, matrix."""
    load = timing.load(chip, rows=1, atoms=1, local=1).tail
    store = timing.store(chip, rows=1, atoms=1, local=1, lead=1).tail
    return {0: load, 1: store, 2: chip.psum_latency + 4}


def library(chip) -> ctypes.CDLL:
    BUILD.mkdir(exist_ok=True)
    source = BUILD / f"engines_top_{chip.rows}x{chip.cols}_{chip.dram_latency}.v"
    top = EnginesTop(chip, tails(chip))
    source.write_text(verilog.convert(top, name="engines_top", emit_src=False))
    return build("engines_top", [source], HERE / "engines_bench.cpp")


def random_transfer(rng: random.Random, chip, name: str) -> dict[str, int] | None:
    """A legal load or store of BF16 or F32, also BF16 -> F32 (load), F32 -> BF16 (store)."""
    mem, local = rng.choice(((BF16, BF16), (F32, F32), (BF16, F32)))
    to_acc = local is F32 and rng.random() < 0.4
    m, n = mem.bits // 8, local.bits // 8
    cols, rows, planes = rng.randint(1, 40), rng.randint(1, 9), rng.choice((1, 1, 1, 2, 3))
    row_gap, plane_gap = rng.choice((0, 0, 1, 3, 16)), rng.choice((0, 0, 2))
    local_gap = rng.choice((0, 0, 1, 5))
    f = dict(mem=int(mem), local=int(local), slot=rng.randint(0, 3),
             offset=m * rng.randint(0, 400), cols=cols, rows=rows, planes=planes)
    f["mem_row_stride"] = m * (cols + row_gap)
    f["mem_plane_stride"] = f["mem_row_stride"] * rows + m * plane_gap
    f["row_stride"] = n * (cols + local_gap)
    f["plane_stride"] = f["row_stride"] * rows
    size = chip.acc_bytes if to_acc else chip.sram_bytes
    f["address"] = n * rng.randint(0, size // n) if rng.random() < 0.3 else n * rng.randint(0, 600)
    hull_end = f["address"] + f["plane_stride"] * planes
    if hull_end > size:
        return None
    f["address"] |= ACC_BIT * to_acc
    if name == "store":
        f["accumulate"] = 0
    else:
        f |= dict(pad_above=0, pad_below=0, pad_left=0, pad_right=0)
    return f


def execute(name, f, sram, acc, dram) -> None:
    """The command's meaning, in program order."""
    if name == "matmul":
        return expected(f, sram, acc)
    touched = access(name, f)
    tile = touched.tiles[0]
    memory = acc if f["address"] & ACC_BIT else sram
    rows = BASES[f["slot"]] + touched.dram.row_starts()
    where = rows[:, None] + np.arange(touched.dram.row_bytes)
    mem, local = DType(f["mem"]), DType(f["local"])
    if name == "load":
        memory[tile.byte_index()] = encode_lanes(decode(dram[where], mem)[0], local)
    else:
        dram[where] = encode_lanes(decode(memory[tile.byte_index()], local)[0], mem)


def drift_jobs() -> list[tuple[str, dict[str, int]]]:
    """A load whose second plane is aligned (1 atom a row) and whose first is not (2 a row), with
    6 port words a row in SRAM: 4 < 6 < 8 cycles. Then a store of its last row."""
    load = dict(mem=1, local=0, slot=0, offset=40, cols=24, rows=64, planes=2,
                mem_row_stride=128, mem_plane_stride=64 * 128 - 40, address=0, row_stride=112,
                plane_stride=64 * 112, pad_above=0, pad_below=0, pad_left=0, pad_right=0)
    store = dict(mem=0, local=0, slot=1, offset=0, cols=24, rows=1, planes=1, mem_row_stride=96,
                 mem_plane_stride=96, address=127 * 112, row_stride=96, plane_stride=96,
                 accumulate=0)
    return [("load", load), ("store", store)]


def script(rng, chip, jobs) -> list[Store]:
    """Field writes at least 5 cycles apart, as an in-order core would send them."""
    out = []
    for name, f in jobs:
        stores = encode(name, **f)
        if name != "matmul":
            duration = timing.duration(chip, access(name, f))
            stores = [(14, duration.lead), (15, duration.occupancy), *stores]
        for word, value in stores:
            delay = 5 + rng.choice((0, 0, 0, 3, 20)) * rng.randint(0, 2)
            out.append(Store(delay, COMMANDS[name].bank, word, value & 0xFFFFFFFF))
    return out


def fast_script(rng, chip, jobs) -> list[Store]:
    """Fields one a cycle and gos hard on one another, so that the window fills up."""
    stores = script(rng, chip, jobs)
    for s in stores:
        s.delay = 1
    return stores


def predict(chip, jobs, stores) -> list[Entry]:
    window, now, entries = Window(chip), 0, []
    which = iter(jobs)
    for s in stores:
        now += s.delay
        if s.word != 0:
            continue
        name, f = next(which)
        touched = access(name, f)
        base = BASES[f["slot"]] if name != "matmul" else 0
        reads, writes = touched.ranges(base)
        ports, engine = touched.ports(chip), COMMANDS[name].engine
        duration = timing.duration(chip, touched)
        entry = Entry(len(entries), engine, duration, reads, writes, *ports)
        now = window.space(now)
        window.enter(entry, now)
        entries.append(entry)
    window.drain()
    return entries


def transfer(chip, name, f) -> Transfer:
    """The command as the ideal engines take it."""
    touched = access(name, f)
    tile, dram = touched.tiles[0], touched.dram
    ratio = Fraction(DType(f["mem"]).bits, DType(f["local"]).bits)
    loops, row_bytes = merge(tile.loops, tile.row_bytes)
    chunks = chunk_ends(loop_count(loops), row_bytes, chip.port_bytes)
    atoms = atom_ends(f["offset"], *rows_of(dram.loops, dram.row_bytes))
    return Transfer(name, dram.rows(), atoms, chunks, ratio)


def ideal_end(chip, name, moved: Transfer, start) -> int:
    """The ideal engine's last chunk (load), or its last atom's slot (store)."""
    engines = Engines(chip)
    end = engines.end(moved, start)
    return end if name == "load" else engines.port.cycle(engines.slot - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--bandwidth", default="16", help="DRAM bytes per cycle, at most 64")
    parser.add_argument("--latency", type=int, default=20)
    parser.add_argument("--drift", action="store_true",
                        help="only the load whose rows are first DRAM-bound, then port-bound")
    options = parser.parse_args()
    rng, bits = random.Random(7), np.random.default_rng(7)
    chip = replace(PRESETS["tiny"], dram_bytes_per_cycle=Fraction(options.bandwidth),
                   dram_latency=options.latency)
    lib = library(chip)
    phase = (64 / chip.dram_share).numerator
    tally: dict[str, Counter] = {}

    def note(what, value):
        tally.setdefault(what, Counter())[value] += 1

    shown = total = 0
    for _ in range(options.sequences):
        jobs = []
        wanted = rng.randint(2, 24)
        mix = rng.choice((("load", "matmul", "store"), ("load", "store"), ("load",), ("store",),
                          ("matmul", "load"), ("load", "matmul", "matmul", "store")))
        if options.drift:
            jobs = drift_jobs()
        while len(jobs) < wanted and not options.drift:
            name = rng.choice(mix)
            f = random_matmul(rng, chip) if name == "matmul" else random_transfer(rng, chip, name)
            if f is not None and all(v != 0 for k, v in f.items() if k == "n"):
                jobs.append((name, f))
        stores = (script if rng.random() < 0.5 else fast_script)(rng, chip, jobs)
        mode = rng.choice(("normal", "cancel", "tiny"))
        sram, acc, dram = (operand_bits(bits, size // 2, mode).view(np.uint8)
                           for size in (chip.sram_bytes, chip.acc_bytes, DRAM_BYTES))
        want = [sram.copy(), acc.copy(), dram.copy()]
        for name, f in jobs:
            execute(name, f, *want)
        got = [sram.copy(), acc.copy(), dram.copy()]
        times = (Times * len(jobs))()
        events = [(ctypes.c_int32 * 200000)() for _ in KINDS]
        counts = (ctypes.c_int32 * len(KINDS))()
        pointers = (ctypes.POINTER(ctypes.c_int32) * len(KINDS))(
            *(ctypes.cast(e, ctypes.POINTER(ctypes.c_int32)) for e in events))
        raw = [g.ctypes.data_as(ctypes.c_void_p) for g in got]
        conflicts = lib.run(
            raw[0], chip.sram_bytes, raw[1], chip.acc_bytes, raw[2],
            (ctypes.c_uint32 * 4)(*BASES), (Store * len(stores))(*stores), len(stores), times,
            len(jobs), chip.dram_latency, chip.port_bytes, phase, pointers, counts, 100000)
        total += len(jobs)
        note("conflicting or unfinished runs", min(conflicts, 1))
        same = [np.array_equal(g, w) for g, w in zip(got, want, strict=True)]
        note("bits right (SRAM, ACC, DRAM)", tuple(same))
        predicted = predict(chip, jobs, stores)
        right = True
        for t, p in zip(times, predicted, strict=True):
            for what in ("entry", "start", "free", "finish"):
                difference = getattr(t, what) - getattr(p, what)
                note(f"{what}: RTL - contract", difference)
                right &= difference == 0
        if (not right or not all(same)) and shown < 2:
            shown += 1
            print("sequence differs", same, conflicts)
            for (name, f), t, p in zip(jobs, times, predicted, strict=True):
                print(f"  {name:6} RTL {t.entry, t.start, t.free, t.finish} contract "
                      f"{p.entry, p.start, p.free, p.finish} {p.duration} {f}")
        # Attribute the real events: every engine works in the order of its starts.
        order = {e: [i for i, (name, _) in enumerate(jobs) if name == e] for e in
                 ("load", "store", "matmul")}
        for kind, engine in ((0, "load"), (1, "store"), (2, "store")):
            at = 0
            for i in order[engine]:
                f = jobs[i][1]
                moved = transfer(chip, engine, f)
                n = len(moved.chunks) if kind < 2 else len(moved.atoms)
                if at + n <= counts[kind]:
                    last = events[kind][at + n - 1]
                    label = "1:1" if f["mem"] == f["local"] else "converting"
                    note(f"last {KINDS[kind]} ({label}) - finish", last - times[i].finish)
                    if kind != 1:
                        model = ideal_end(chip, engine, moved, times[i].start)
                        late = last - (model + (chip.dram_latency + 4 if kind == 0 else 10))
                        note(f"{KINDS[kind]}: RTL - (ideal engine + registers)", late)
                    first = events[kind][at] - times[i].start
                    note(f"first {KINDS[kind]} - start, least", min(first, 99))
                at += n
    print(f"{total} commands in {options.sequences} sequences; X = {64 / chip.dram_share}, "
          f"latency {chip.dram_latency}")
    for what, counter in sorted(tally.items()):
        values = sorted(counter.items())
        short = values if len(values) < 12 else [*values[:2], "...", *values[-6:]]
        print(f"{what}: {short}")


if __name__ == "__main__":
    main()
