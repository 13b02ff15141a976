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
from fractions import Fraction

from pagoda.isa.access import merge, starts

ATOM = 64


def rows_of(loops: tuple[tuple[int, int], ...], row_bytes: int) -> tuple[list[int], int]:
    """Row starts and row length after the contract's merging."""
    loops, row_bytes = merge(loops, row_bytes)
    return [int(x) for x in starts(loops)], row_bytes


def atom_ends(offset: int, rows: list[int], row_bytes: int) -> list[int]:
    """Payload bytes (cumulated) once each atom has passed."""
    ends, done = [], 0
    for row in rows:
        position, last = offset + row, offset + row + row_bytes
        while position < last:
            step = min(last, (position // ATOM + 1) * ATOM) - position
            position, done = position + step, done + step
            ends.append(done)
    return ends


def chunk_ends(rows: list[int], row_bytes: int, port: int) -> list[int]:
    """Local bytes (cumulated) after each chunk."""
    ends, done = [], 0
    for _ in rows:
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


def paced(rows: int, atoms: int, local: int, x: Fraction) -> int:
    """Cycles if every row takes the longer of its atoms' slots and its share of local cycles.

    All rows are equally long, so a row has `few` atoms or one more.
    """
    few = atoms // rows
    many = atoms - few * rows
    share = Fraction(local, rows)
    return math.ceil((rows - many) * max(few * x, share) + many * max((few + 1) * x, share))


CONVERSIONS = {"1:1": Fraction(1), "2x wider": Fraction(1, 2), "4x wider": Fraction(1, 4),
               "8x wider": Fraction(1, 8), "8x narrower in SRAM": Fraction(8)}
CHIPS = {"tiny": (Fraction(4), 16), "tiny, 1 B/cycle": (Fraction(64), 16),
         "edge": (Fraction(5, 2), 64), "car": (Fraction(32, 25), 256),
         "cloud": (Fraction(16, 25), 512)}


def trial(rng: random.Random, x: Fraction, width: int, ratio: Fraction) -> dict[str, object]:
    mem_row = int(8 * ratio) * rng.randint(1, 40)
    local_row = int(mem_row / ratio)
    rows, planes = rng.choice((1, 2, rng.randint(1, 150))), rng.choice((1, 1, 2, 5))
    stride = mem_row + rng.choice((0, rng.randint(0, 6), rng.randint(0, 300), -mem_row % 64))
    plane = stride * rows + rng.choice((0, rng.randint(0, 100)))
    offset = rng.choice((0, rng.randint(0, 63)))
    local_stride = local_row + rng.choice((0, 16))
    mem_rows, mem_bytes = rows_of(((planes, plane), (rows, stride)), mem_row)
    local_rows, local_bytes = rows_of(
        ((planes, local_stride * rows), (rows, local_stride)), local_row)
    begin, port = rng.randint(0, 500), Port(x)
    atoms = atom_ends(offset, mem_rows, mem_bytes)
    chunks = chunk_ends(local_rows, local_bytes, width)
    j0 = port.first(begin)
    data, local = port.cycle(j0 + len(atoms)), len(chunks)
    contract = max(data, begin + local)
    # What an atom takes to be read from SRAM before it can leave.
    lead = math.ceil(Fraction(ATOM) / ratio / width)
    form = max(data, port.cycle(j0) + paced(len(mem_rows), len(atoms), local, x))
    load = load_end(port, begin, atoms, chunks, ratio)
    store = store_end(port, begin, atoms, chunks, ratio)
    return dict(load=load - contract, store=store - contract,
                load_paced=load - form - math.ceil(x),
                store_paced=store - form - math.ceil(x) - lead,
                longer=Fraction(form - begin, contract - begin),
                slack=form + math.ceil(x) - load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=400)
    trials = parser.parse_args().trials
    rng = random.Random(5)
    print("largest excess of the ideal engines over the contract (load, store), and over the "
          "paced form\nwith ceil(X) [+ lead] more tail (load_paced, store_paced: at most 0 is "
          "met)")
    for chip, (x, width) in CHIPS.items():
        for name, ratio in CONVERSIONS.items():
            found = [trial(rng, x, width, ratio) for _ in range(trials)]
            line = f"{chip:16} {name:20}"
            for key in ("load", "store", "load_paced", "store_paced"):
                line += f" {key} {max(f[key] for f in found):4}"
            longer = sum(f["longer"] for f in found) / trials
            most = max(f["longer"] for f in found)
            bad = sum(f["load"] > 3 for f in found) / trials
            print(f"{line}  loads over 3: {bad:4.0%}  paced / contract: mean "
                  f"{float(longer):.3f}, most {float(most):.2f}")


if __name__ == "__main__":
    main()
