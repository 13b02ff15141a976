"""How long an ideal, streaming DMA engine needs, against the contract's closed form.

The ideal load engine asks for one atom per slot and writes, in order, one port-wide chunk of a
local row per cycle as soon as the atoms with its bytes are there. The ideal store engine reads one
chunk per cycle and sends an atom in the first slot in which its bytes have been read. Pipeline
registers and the DRAM's latency are left out: an engine of `o` registers is later by o + latency.
`excess` = end - max(data_end, start + local_cycles); the contract's tail grants latency + 8 for
registers and excess together.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from fractions import Fraction

from pagoda.isa.access import merge

ATOM = 64


def atom_ends(offset: int, stride: int, rows: int, row_bytes: int) -> list[int]:
    """Payload bytes (cumulated) once each atom has passed; rows merged as the contract says."""
    if stride == row_bytes or rows == 1:
        rows, row_bytes = 1, row_bytes * rows
    ends, done = [], 0
    for r in range(rows):
        position, last = offset + r * stride, offset + r * stride + row_bytes
        while position < last:
            step = min(last, (position // ATOM + 1) * ATOM) - position
            position, done = position + step, done + step
            ends.append(done)
    return ends


def chunk_ends(stride: int, rows: int, row_bytes: int, port: int) -> list[int]:
    """Local bytes (cumulated) after each chunk."""
    loops, row_bytes = merge(((rows, stride),), row_bytes)
    rows = loops[0][0] if loops else 1
    ends, done = [], 0
    for _ in range(rows):
        for first in range(0, row_bytes, port):
            done += min(port, row_bytes - first)
            ends.append(done)
    return ends


class Port:
    def __init__(self, x: Fraction):
        self.x = x

    def cycle(self, slot: int) -> int:
        return math.ceil(slot * self.x)

    def first(self, cycle: int) -> int:
        slot = math.floor(cycle / self.x)
        while self.cycle(slot) < cycle:
            slot += 1
        while slot and self.cycle(slot - 1) >= cycle:
            slot -= 1
        return slot


def load_end(port: Port, start: int, atoms: list[int], chunks: list[int], ratio: Fraction) -> int:
    """Cycle after the last chunk's. ratio: memory bytes per local byte."""
    slot, now, a = port.first(start), start, 0
    for end in chunks:
        while atoms[a] < end * ratio:
            a += 1
        now = max(now, port.cycle(slot + a)) + 1
    return now


def store_end(port: Port, start: int, atoms: list[int], chunks: list[int], ratio: Fraction) -> int:
    """Cycle in which the slot after the last atom's opens."""
    slot, c = port.first(start), 0
    for end in atoms:
        while chunks[c] * ratio < end:
            c += 1
        slot = max(slot, port.first(start + c + 1)) + 1
    return port.cycle(slot)


def uniform(offset: int, stride: int, rows: int, row_bytes: int) -> int:
    """Atoms, when every row is charged with as many as the worst alignment of its rows costs."""
    if stride == row_bytes or rows == 1:
        rows, row_bytes = 1, row_bytes * rows
    unit = math.gcd(stride, ATOM) if rows > 1 else ATOM
    worst = offset % unit + ATOM - unit
    return rows * -(-(worst + row_bytes) // ATOM)


def paced(rows: int, atoms: int, local: int, x: Fraction, merged: bool) -> int:
    """Cycles if every row takes the longer of its atoms' slots and its share of local cycles."""
    rows = 1 if merged else rows
    few = atoms // rows
    many = atoms - few * rows  # rows with one atom more
    share = Fraction(local, rows)
    return math.ceil((rows - many) * max(few * x, share) + many * max((few + 1) * x, share))


CONVERSIONS = {"1:1": Fraction(1), "2x wider": Fraction(1, 2), "4x wider": Fraction(1, 4),
               "8x wider": Fraction(1, 8), "2x narrower in SRAM": Fraction(2)}
CHIPS = {"tiny": (Fraction(4), 16), "tiny, 1 B/cycle": (Fraction(64), 16),
         "edge": (Fraction(5, 2), 64), "car": (Fraction(32, 25), 256),
         "cloud": (Fraction(16, 25), 512)}


def trial(rng: random.Random, x: Fraction, width: int, ratio: Fraction) -> dict[str, object]:
    unit = 8
    cols = unit * rng.randint(1, 40)
    rows = rng.choice((1, 2, rng.randint(1, 200)))
    local_row, mem_row = cols, int(cols * ratio)  # bytes
    if mem_row == 0 or mem_row != cols * ratio:
        mem_row = max(1, math.ceil(cols * ratio))
        local_row = int(mem_row / ratio)
    stride = rng.choice((mem_row, mem_row + rng.randint(0, 6), mem_row + rng.randint(0, 300), 1024))
    stride = max(stride, mem_row)
    offset = rng.choice((0, rng.randint(0, 63)))
    local_stride = local_row + rng.choice((0, 16))
    start = rng.randint(0, 500)
    port = Port(x)
    atoms = atom_ends(offset, stride, rows, mem_row)
    chunks = chunk_ends(local_stride, rows, local_row, width)
    j0 = port.first(start)
    data, local = port.cycle(j0 + len(atoms)), len(chunks)
    contract = max(data, start + local)
    n = uniform(offset, stride, rows, mem_row)
    load = load_end(port, start, atoms, chunks, ratio)
    store = store_end(port, start, atoms, chunks, ratio)
    lead = math.ceil(Fraction(ATOM) / ratio / width)  # chunks of one atom
    load_form = max(port.cycle(j0 + n), port.cycle(j0 + 1) + local)
    late = port.first(start + min(local, lead))
    store_form = max(port.cycle(late + n), port.cycle(port.first(start + local) + 1))
    total = paced(rows, len(atoms), local, x, stride == mem_row)
    paced_load = max(data, port.cycle(j0) + total)
    late_data = port.cycle(late + len(atoms))
    paced_store = max(late_data, port.cycle(port.first(start + total) + 1))
    return dict(load=load - contract, store=store - contract, load_paced=load - paced_load,
                store_paced=store - paced_store, load_fixed=load - load_form,
                store_fixed=store - store_form, waste=n / len(atoms),
                case=(rows, mem_row, local_row, stride, offset, local_stride, start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=400)
    trials = parser.parse_args().trials
    rng = random.Random(5)
    for chip, (x, width) in CHIPS.items():
        for name, ratio in CONVERSIONS.items():
            found = [trial(rng, x, width, ratio) for _ in range(trials)]
            line = f"{chip:16} {name:20}"
            for key in ("load", "load_fixed", "load_paced", "store", "store_fixed", "store_paced"):
                worst = max(found, key=lambda f: f[key])
                line += f" {key} {worst[key]:3}"
            waste = sum(f["waste"] for f in found) / trials
            bad = Counter(f["load"] > 2 for f in found)[True] / trials
            print(f"{line}  loads over 2: {bad:4.0%}  uniform atoms x{waste:.2f}")
    drift = (64, 24, 96, 65, 41, 112, 0)
    port = Port(Fraction(4))
    atoms, chunks = atom_ends(41, 65, 64, 24), chunk_ends(112, 64, 96, 16)
    print(f"drift example {drift}: load ends {load_end(port, 0, atoms, chunks, Fraction(1, 4))}, "
          f"data_end {port.cycle(len(atoms))}, local {len(chunks)}")


if __name__ == "__main__":
    main()
