"""Ideal streaming DMA engines, one command hard on another, against the contract's durations.

The load engine asks for one atom a slot and writes, in order, one port-wide chunk of a local row
per cycle as soon as the atoms with its bytes are there; zero rows go first. The store engine reads
one chunk per cycle and sends an atom in the first slot in which its bytes have been read. An
accumulating one sends an atom back in the first slot after it has arrived and reads on in others.
Engines and port serve commands in order: what is late delays the next command. Pipeline registers
and a load's latency are left out: hardware of `o` registers is later by o, or o + latency.

Every command starts when the contract frees the one before. `late` is the engine's end less
`free` + ceil(X); the contract's tails grant 8 registers to a load and 12 to a store beside that.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass, field, replace
from fractions import Fraction

from pagoda.isa import timing
from pagoda.isa.access import merge, starts
from pagoda.isa.chip import PRESETS, Chip

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


def chunk_ends(rows: int, row_bytes: int, port: int, left: int = 0, right: int = 0) -> list[int]:
    """Local bytes that hold data (cumulated) after each chunk; left, right: padding of a row."""
    ends, data = [], row_bytes - left - right
    for row in range(rows):
        for end in range(port, row_bytes + port, port):
            ends.append(row * data + min(max(min(end, row_bytes) - left, 0), data))
    return ends


class Port:
    def __init__(self, x: Fraction):
        self.x = x

    def cycle(self, slot: int) -> int:
        return math.ceil(slot * self.x)

    def first(self, cycle: int) -> int:
        """The first slot in `cycle` or later."""
        slot = max(math.floor((cycle - 1) / self.x) + 1, 0)
        assert self.cycle(slot) >= cycle and (slot == 0 or self.cycle(slot - 1) < cycle)
        return slot


@dataclass
class Transfer:
    """One command, merged: ends of its atoms and chunks, cycles of rows that are only zeros.

    ratio: memory bytes per local byte; a cycle of `right` zeros follows every row's data.
    """

    kind: str
    rows: int
    atoms: list[int]
    chunks: list[int]
    ratio: Fraction
    zeros: int = 0
    right: int = 0

    def duration(self, chip: Chip) -> timing.Duration:
        shape = chip, self.rows, len(self.atoms), len(self.chunks)
        if self.kind == "load":
            return timing.load(*shape, self.zeros, self.right)
        lead = math.ceil(ATOM / self.ratio / chip.port_bytes)
        return timing.store(*shape, lead, self.kind == "accumulate")


@dataclass
class Engines:
    """`slot`, `written`, `read`: the first slot and cycles that earlier commands left free."""

    chip: Chip
    port: Port = field(init=False)
    slot: int = 0
    written: int = 0
    read: int = 0

    def __post_init__(self) -> None:
        self.port = Port(ATOM / self.chip.dram_share)

    def end(self, transfer: Transfer, start: int) -> int:
        """The cycle after the last chunk's (load), or that of the slot after the last atom's."""
        return getattr(self, f"_{transfer.kind}")(transfer, start)

    def _load(self, t: Transfer, start: int) -> int:
        first, atom = max(self.slot, self.port.first(start)), 0
        now = max(self.written, start) + t.zeros
        for end in t.chunks:
            while t.atoms[atom] < end * t.ratio:
                atom += 1
            now = max(now, self.port.cycle(first + atom) if end else 0) + 1
        self.slot, self.written = first + len(t.atoms), now
        return now

    def _ready(self, t: Transfer, start: int) -> list[int]:
        """For every atom the cycle from which its bytes have been read from SRAM."""
        begin, chunk, ready = max(self.read, start), 0, []
        for end in t.atoms:
            while t.chunks[chunk] * t.ratio < end:
                chunk += 1
            ready.append(begin + chunk + 1)
        self.read = begin + len(t.chunks)
        return ready

    def _store(self, t: Transfer, start: int) -> int:
        for cycle in self._ready(t, start):
            self.slot = max(self.slot, self.port.first(cycle)) + 1
        return self.port.cycle(self.slot)

    def _accumulate(self, t: Transfer, start: int) -> int:
        ready, back = self._ready(t, start), self.chip.dram_latency + 8
        outstanding = math.ceil(back / self.port.x) + 2
        arrived: list[int] = []
        sent, slot = 0, max(self.slot, self.port.first(start))
        while sent < len(ready):
            now = self.port.cycle(slot)
            if sent < len(arrived) and max(arrived[sent], ready[sent]) <= now:
                sent += 1
            elif len(arrived) < len(ready) and len(arrived) - sent < outstanding:
                arrived.append(now + back)
            slot += 1
        self.slot = slot
        return self.port.cycle(slot)


CONVERSIONS = {"1:1": Fraction(1), "2x wider": Fraction(1, 2), "4x wider": Fraction(1, 4),
               "8x wider": Fraction(1, 8), "8x narrower in SRAM": Fraction(8)}
CHIPS = {
    **{name: PRESETS[name] for name in ("tiny", "edge", "car", "cloud")},
    "tiny, 1 B/cycle": replace(PRESETS["tiny"], dram_bytes_per_cycle=Fraction(1)),
    "edge, latency 1": replace(PRESETS["edge"], dram_latency=1),
}
MIXES = (("load",), ("store",), ("padded",), ("accumulate",), ("load", "store"),
         ("load", "padded", "store", "accumulate"))


def random_transfer(rng: random.Random, chip: Chip, kind: str, ratio: Fraction) -> Transfer:
    mem_row = int(8 * ratio) * rng.randint(1, 40) or 1
    rows, planes = rng.choice((1, 2, rng.randint(1, 60))), rng.choice((1, 1, 2, 5))
    stride = mem_row + rng.choice((0, rng.randint(0, 6), rng.randint(0, 300), -mem_row % 64))
    plane = stride * rows + rng.choice((0, rng.randint(0, 100)))
    mem_rows, mem_bytes = rows_of(((planes, plane), (rows, stride)), mem_row)
    atoms = atom_ends(rng.choice((0, rng.randint(0, 63))), mem_rows, mem_bytes)
    local_row = int(mem_row / ratio)
    if kind == "padded":
        left, right = 8 * rng.choice((0, 1, 4, 40)), 8 * rng.choice((0, 1, 4, 60))
        row = left + local_row + right
        chunks = chunk_ends(rows * planes, row, chip.port_bytes, left, right)
        zeros = planes * rng.choice((0, 1, 7)) * -(-row // chip.port_bytes)
        behind = -(-right // chip.port_bytes)
        return Transfer("load", len(mem_rows), atoms, chunks, ratio, zeros, behind)
    local_stride = local_row + rng.choice((0, 16))
    local_rows, local_bytes = rows_of(
        ((planes, local_stride * rows), (rows, local_stride)), local_row)
    chunks = chunk_ends(len(local_rows), local_bytes, chip.port_bytes)
    return Transfer(kind, len(mem_rows), atoms, chunks, ratio)


def latest(chip: Chip, mix: tuple[str, ...], commands: int, rng: random.Random) -> dict[str, int]:
    """Kind -> the most that one of its commands is late; one sequence."""
    engines, start, found = Engines(chip), rng.randint(0, 100), {}
    for _ in range(commands):
        ratio = rng.choice(list(CONVERSIONS.values()))
        transfer = random_transfer(rng, chip, rng.choice(mix), ratio)
        free = start + transfer.duration(chip).occupancy_from(chip, start)
        late = engines.end(transfer, start) - free - math.ceil(engines.port.x)
        found[transfer.kind] = max(late, found.get(transfer.kind, late))
        start = free
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=150, help="of each sequence")
    parser.add_argument("--sequences", type=int, default=6)
    options = parser.parse_args()
    print("most cycles after free + ceil(X), by kind of command, for sequences of these commands")
    for name, chip in CHIPS.items():
        for mix in MIXES:
            found: dict[str, int] = {}
            for seed in range(options.sequences):
                for kind, late in latest(chip, mix, options.commands, random.Random(seed)).items():
                    found[kind] = max(late, found.get(kind, late))
            shown = ", ".join(f"{kind} {late}" for kind, late in sorted(found.items()))
            print(f"{name:16} {' + '.join(mix):38} {shown}")


if __name__ == "__main__":
    main()
