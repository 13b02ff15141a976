"""Random legal loads, stores, gathers and scatters, as jobs of the engines in RTL."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from pagoda.chip.interfaces import Job
from pagoda.isa import timing
from pagoda.isa.access import ACC, Access
from pagoda.isa.checks import check, check_indices
from pagoda.isa.chip import Chip
from pagoda.isa.commands import ACC_BIT, COMMANDS, WORDS_PER_BANK, encode
from pagoda.isa.fault import FaultRaised
from pagoda.isa.numbers import DType
from pagoda.isa.program import Slot

FLOATS = (DType.F32, DType.BF16), (DType.F32, DType.BF16, DType.F8E4M3)
INTS = (DType.I32, DType.I8), (DType.I32, DType.I8, DType.I4, DType.I64, DType.BOOL, DType.U8)
ACCUMULATED = (DType.F32, DType.BF16, DType.I32)
LOCAL_BYTES = 8192  # at each end of SRAM and ACC
DRAM_BYTES = 1 << 16
INDICES_AT, INDICES = LOCAL_BYTES, 320  # in SRAM, where no command writes


@dataclass
class Transfer:
    """A command as the engines get it; `touched` is None if it is empty."""

    name: str
    fields: dict[str, int]
    words: list[int]
    base: int
    touched: Access | None
    index: int = 0

    @property
    def pc(self) -> int:
        return 4 * self.index + 0x100

    def job(self) -> int:
        return Job().const({
            "bank": COMMANDS[self.name].bank, "empty": self.touched is None, "words": self.words,
            "base": self.base, "shared_ab": 0, "shared_ac": 0, "shared_bc": 0, "per_bank": 1,
            "pc": self.pc, "index": self.index,
        }).as_value().value  # fmt: skip

    def duration(self, chip: Chip) -> timing.Duration:
        return timing.duration(chip, self.touched)


class Transfers:
    """Makes commands whose bytes lie at both ends of SRAM and ACC, `LOCAL_BYTES` each, and in the
    last `DRAM_BYTES` of DRAM, so that all bits of an address count.

    sram: the memory of SRAM, in which the indices of gathers and scatters are found.
    """

    def __init__(self, chip: Chip, rng: Random, sram: np.ndarray):
        self.chip, self.rng, self.sram = chip, rng, sram
        self.dram_first = chip.dram_bytes - DRAM_BYTES
        self.slots = tuple(
            Slot(self.dram_first + first, size)
            for first, size in ((0, 1 << 15), (1 << 15, 1 << 14), (3 << 14, 1 << 14))
        )
        self.count = 0
        first = INDICES_AT
        self.sram[first : first + 4 * INDICES] = index_words(rng, INDICES)

    def make(self, name: str, largest: int = 60) -> Transfer:
        """One command with at most about `largest` elements a row and rows."""
        while True:
            fields = self._fields(name, largest)
            try:
                made = self._checked(name, fields)
            except (FaultRaised, ValueError):
                continue
            self.count += 1
            return made

    def of(self, name: str, **fields: int) -> Transfer:
        """The command with these fields. Raises FaultRaised."""
        made = self._checked(name, fields)
        self.count += 1
        return made

    def _checked(self, name: str, fields: dict[str, int]) -> Transfer:
        words = [0] * WORDS_PER_BANK
        for word, value in encode(name, **fields):
            words[word] = value & 0xFFFFFFFF
        touched = check(self.chip, COMMANDS[name], words, self.slots)
        if touched is not None and touched.indices is not None:
            first = fields["indices"]
            indices = self.sram[first : first + 4 * fields["rows"]].view("<i4")
            touched = check_indices(touched, [int(i) for i in indices], self.slots)
        if touched is not None:
            tile = touched.tiles[0].hull
            size = self.chip.acc_bytes if tile.space == ACC else self.chip.sram_bytes
            if tile.first < size - LOCAL_BYTES and tile.last >= LOCAL_BYTES:
                raise ValueError("too large")
        return Transfer(name, fields, words, self.slots[fields["slot"]].base, touched, self.count)

    def _fields(self, name: str, largest: int) -> dict[str, int]:
        rng = self.rng
        local_types, mem_types = rng.choice((FLOATS, INTS))
        local, mem = rng.choice(local_types), rng.choice(mem_types)
        if rng.random() < 0.3:
            mem = local
        accumulate = name in ("store", "scatter") and mem in ACCUMULATED and rng.random() < 0.4
        m, n = mem.bits, local.bits // 8

        def extent() -> int:
            return rng.choice((0, 1, 1, 2, 3, rng.randint(1, 8), rng.randint(1, largest)))

        cols, rows = max(extent(), rng.random() > 0.02), max(extent(), rng.random() > 0.02)
        planes = rng.choice((1, 1, 1, 2, 3, rng.randint(1, 9)))
        if rng.random() < 0.2:
            cols = 64 * 8 // m * rng.randint(1, 3)
        if mem is DType.I4:
            cols += cols % 2
        f = dict(mem=int(mem), local=int(local), slot=rng.randrange(3), cols=cols, rows=rows)
        pads = dict(pad_above=0, pad_below=0, pad_left=0, pad_right=0)
        if name == "load" and rng.random() < 0.4:
            for pad in rng.sample(list(pads), rng.randint(1, 4)):
                extent_name = "cols" if pad in ("pad_left", "pad_right") else "rows"
                pads[pad] = rng.choice((1, 2, 3, rng.randint(0, 20)))
                f[extent_name] += pads[pad]
            if rng.random() < 0.15:
                f["rows"] -= rows
        row = cols * m // 8
        gap = rng.choice((0, 0, 0, rng.randint(0, 40) * max(m // 8, 1), -row % 64, 64))
        stride = row + gap
        if name == "load" and rng.random() < 0.15:
            stride = rng.choice((0, max(m // 8, 1)))
        plane = stride * rows + rng.choice((0, 0, 64, rng.randint(0, 9) * max(m // 8, 1)))
        sign, plane_sign = (rng.choice((1, 1, 1, -1)) for _ in range(2))
        f["mem_row_stride"] = sign * stride
        f["offset"] = max(m // 8, 1) * rng.randint(0, 200)
        if rng.random() < 0.3:
            f["offset"] = rng.randint(0, 20) * 64
        if name in ("load", "store"):
            f |= dict(mem_plane_stride=plane_sign * plane, planes=planes)
            f["offset"] += (sign < 0) * stride * (rows - 1)
            f["offset"] += (plane_sign < 0) * plane * (planes - 1)
        else:
            f["indices"] = rng.randrange(LOCAL_BYTES // 4) * 4
            if rng.random() < 0.8:
                f["indices"] = INDICES_AT + rng.randrange(64) * 4
            if sign < 0:
                f["offset"] += stride * 15
        local_row = f["cols"] * n
        f["row_stride"] = local_row + n * rng.choice((0, 0, 0, 1, 5))
        in_acc = local.bits == 32 and rng.random() < 0.4
        f["address"] = n * rng.randint(0, LOCAL_BYTES // n)
        if rng.random() < 0.5:
            f["address"] = n * rng.randint(0, 300)
        if rng.random() < 0.3:
            size = self.chip.acc_bytes if in_acc else self.chip.sram_bytes
            f["address"] += size - LOCAL_BYTES
        f["address"] |= in_acc * ACC_BIT
        if name in ("load", "store"):
            f["plane_stride"] = f["row_stride"] * f["rows"] + n * rng.choice((0, 0, 3))
            if rng.random() < 0.1:  # rows of the planes one after another
                f["plane_stride"], f["row_stride"] = f["row_stride"], f["row_stride"] * planes
        if name == "store" and rng.random() < 0.1:
            f["row_stride"] = 0
        if name == "load":
            f |= pads
        elif name != "gather":
            f["accumulate"] = accumulate
        return f


def index_words(rng: Random, count: int, most: int = 16) -> np.ndarray:
    """Indices from 0 to most - 1, as bytes."""
    return np.array([rng.randrange(most) for _ in range(count)], "<i4").view(np.uint8)
