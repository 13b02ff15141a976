"""Block sizes of the float32 matrix product: the chip's business alone, no bit depends on them.

`estimate_cycles` adds up what each engine, the DRAM port and the control core have to do for a
plan, with the contract's duration formulas (`isa.timing`). They work side by side, so the busiest
decides, plus what cannot overlap: the first step, the last tile, and at the end of every output
tile the sums, which are added up in the vector engine's queue before it splits for the next tile.
Where the window is too small for the commands of two steps, loads and splits take turns.
`choose_float32_plan` tries all legal plans and takes the cheapest: there are no tables of sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from pagoda.compiler.allocate import ALIGNMENT
from pagoda.compiler.cost import (
    ISSUE_CYCLES,
    TILE_CYCLES,
    MatmulShape,
    block_sizes,
    port_cycles,
)
from pagoda.compiler.errors import CompileError
from pagoda.compiler.link import kernel_sram
from pagoda.isa import timing
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip

FLOAT_BYTES, TERM_BYTES = 4, 2
LOADED = 3  # buffers of float32 tiles: one being split, two on their way
PASSED = 2  # buffers of terms and sums: one engine writes one while another reads the other
VECTOR_START = 12  # cycles a vector command waits for the one before, whose result it reads
CROWDED = 1.5  # how much longer splits and loads take that wait for bank ports and free buffers
MAX_STEP = 1 << 19  # elements of a tile: commands count to 2^20


@dataclass(frozen=True)
class Float32Plan:
    """bm, bn, bk: block sizes. resident: the terms of bm whole rows of a stay in SRAM, and `parts`
    units of work share the columns of their result. cycles: the estimate."""

    resident: bool
    bm: int
    bn: int
    bk: int
    parts: int
    cycles: int = 0


def sums(terms: int) -> int:
    """Products of terms, each with an accumulator of its own."""
    return terms * (terms + 1) // 2


@dataclass
class _Work:
    """Cycles of each engine, the DRAM port, the control core, and the buffers of b's loads."""

    matrix: float = 0
    vector: float = 0
    dram: float = 0
    control: float = 0
    buffers: float = 0

    def add(self, other: _Work, times: float = 1) -> None:
        self.matrix += other.matrix * times
        self.vector += other.vector * times
        self.dram += other.dram * times
        self.control += other.control * times
        self.buffers += other.buffers * times

    def busiest(self) -> float:
        return max(self.matrix, self.vector, self.dram, self.control, self.buffers)

    def one_after_another(self) -> float:
        return self.matrix + self.vector + self.dram


class _Cost:
    """What the pieces of one product cost on a chip."""

    def __init__(self, chip: Chip, shape: MatmulShape, terms: int):
        self.chip, self.shape, self.terms = chip, shape, terms

    def _vector(self, rows: int, cols: int, commands: int, groups: int) -> _Work:
        """`commands` vector commands, which take `groups` cycles per group of lanes together."""
        cycles = rows * -(-cols // self.chip.lanes) * groups + commands * VECTOR_START
        return _Work(vector=cycles, control=commands * ISSUE_CYCLES)

    def _loaded(self, rows: int, cols: int, pitch: int) -> _Work:
        """A tile of an operand; for one term it is rounded to it on its way."""
        local_size = TERM_BYTES if self.terms == 1 else FLOAT_BYTES
        port = port_cycles(self.chip, rows, cols, pitch, FLOAT_BYTES, local_size)
        return _Work(dram=port, control=ISSUE_CYCLES)

    def load_a(self, m: int, k: int) -> _Work:
        """A tile of a: loaded, put upright, split."""
        shape = self.shape
        extents = (k, m, shape.m) if shape.transposed_a else (m, k, shape.k)
        work = self._loaded(*extents)
        if shape.transposed_a:
            cycles = timing.transpose(self.chip, k, m).occupancy
            work.add(_Work(vector=cycles + VECTOR_START, control=ISSUE_CYCLES))
        if self.terms > 1:  # the last of three terms reads two of one bank
            work.add(self._vector(m, k, self.terms, self.terms + (self.terms == 3)))
        return work

    def load_b(self, n: int, k: int) -> _Work:
        shape = self.shape
        rows, cols, pitch = (n, k, shape.k) if shape.transposed_b else (k, n, shape.n)
        work = self._loaded(rows, cols, pitch)
        # One buffer is being read; the others take a load's whole way, port and latency.
        work.buffers = (work.dram + self.chip.dram_latency) / (LOADED - 1)
        if self.terms > 1:
            work.add(self._vector(rows, cols, self.terms, self.terms))
        return work

    def dots(self, m: int, n: int, k: int) -> _Work:
        cycles = sum(
            timing.matmul(self.chip, rows * m, n, 1, k, False, self.shape.transposed_b).occupancy
            for rows in range(1, self.terms + 1)
        )
        return _Work(matrix=cycles, control=self.terms * ISSUE_CYCLES)

    def end(self, m: int, n: int) -> _Work:
        """The sums of an output tile added up, stored."""
        commands, groups = {1: (1, 1), 2: (4, 7), 3: (5, 11)}[self.terms]
        work = self._vector(m, n, commands, groups)
        size = self.shape.output_bytes
        port = port_cycles(self.chip, m, n, self.shape.n, size)
        lead = timing.store_lead(self.chip, 8 * size, 8 * size)
        work.add(_Work(dram=lead + port, control=ISSUE_CYCLES + TILE_CYCLES))
        return work


def _pieces(extent: int, block: int) -> list[tuple[int, int]]:
    """(size, number) of the blocks an extent falls into; an empty one is one empty block."""
    found = [(block, extent // block), (extent % block, 1)]
    return [(size, count) for size, count in found if size and count] or [(0, 1)]


def estimate_cycles(chip: Chip, shape: MatmulShape, terms: int, plan: Float32Plan) -> int:
    """Estimated cycles of the busiest core, launch excluded."""
    cost, total, drained = _Cost(chip, shape, terms), _Work(), 0.0
    across = max(-(-shape.n // plan.bn), 1)
    columns, depths = _pieces(shape.n, plan.bn), _pieces(shape.k, plan.bk)
    a_loads = min(plan.parts, across) if plan.resident else across
    for m, rows in _pieces(shape.m, plan.bm):
        for k, steps in depths:
            total.add(cost.load_a(m, k), rows * steps * a_loads)
            for n, tiles in columns:
                total.add(cost.load_b(n, k), rows * steps * tiles)
                total.add(cost.dots(m, n, k), rows * steps * tiles)
        for n, tiles in columns:
            end, last = cost.end(m, n), depths[-1][0]
            total.add(end, rows * tiles)
            if terms > 1:
                split = cost.load_b(n, last)
                if not plan.resident:
                    split.add(cost.load_a(m, last))
                alone = min(cost.dots(m, n, last).matrix, split.vector) + end.vector
                drained += rows * tiles * (alone + chip.psum_latency)
    if terms > 1 and not _fits(chip, shape, terms, plan, apart=True):
        total.vector *= CROWDED
        total.dram *= CROWDED
    commands = 2 + 3 * terms if terms > 1 else 3  # loads, splits, matmuls
    if not plan.resident and 2 * commands > chip.window:
        # The loads of a step enter the window when the splits of the one before are through.
        loads = -(-shape.m // plan.bm) * across * max(-(-shape.k // plan.bk), 1)
        total.vector += total.dram + loads * (chip.dram_latency + 8)
    # A core takes whole units of work: a tile, or a row block's share of `parts`.
    down = max(-(-shape.m // plan.bm), 1)
    units = shape.batch * down * (plan.parts if plan.resident else across)
    tiles_of_unit = -(-across // plan.parts) if plan.resident else 1
    busiest = -(-units // chip.cores) * tiles_of_unit / (down * across)
    m, n, k = min(plan.bm, shape.m), min(plan.bn, shape.n), min(plan.bk, shape.k)
    first = cost.load_a(m, shape.k if plan.resident else k)
    for work in (cost.load_b(n, k), cost.dots(m, n, k), cost.end(m, n)):
        first.add(work)
    return int((total.busiest() + drained) * busiest + first.one_after_another())


def memory_bytes(
    chip: Chip, shape: MatmulShape, terms: int, plan: Float32Plan, apart: bool = False
) -> tuple[int, int]:
    """Bytes of SRAM and of ACC for all buffers of the kernel's tiles. apart: with what the vector
    engine reads in other banks than what the matrix engine reads at the same time, so that they
    never wait for each other's bank port."""

    def size(rows: int, cols: int, element: int, buffers: int = 1) -> int:
        unit = bank if apart and buffers > 1 else ALIGNMENT
        return buffers * -(-rows * cols * element // unit) * unit

    def banks(nbytes: int) -> int:
        return -(-nbytes // bank) * bank if apart else nbytes

    bank, bm, bn, bk = chip.bank_bytes("sram"), plan.bm, plan.bn, plan.bk
    loaded = TERM_BYTES if terms == 1 else FLOAT_BYTES
    a_terms = size(terms * bm, max(shape.k, 1), TERM_BYTES)
    if not plan.resident:
        a_terms = size(terms * bm, bk, TERM_BYTES, PASSED)
    read_once = LOADED * size(bn, bk, loaded)
    if terms > 1 or shape.transposed_a:
        read_once += (LOADED + shape.transposed_a) * size(bm, bk, loaded)
    read_once += (PASSED + 1) * size(bm, bn, shape.output_bytes)
    read_once += PASSED * size(1, bn, FLOAT_BYTES) * shape.bias
    sram = banks(a_terms)
    if terms > 1:
        read_once += 2 * size(bm, bn, FLOAT_BYTES)
        sram += (terms - 1) * size(bn, bk, TERM_BYTES, PASSED)
        sram += PASSED * size(bn, bk, TERM_BYTES)  # the last ones: only matmuls read them
    sram += banks(read_once)
    acc_unit = chip.bank_bytes("acc") if apart else ALIGNMENT
    acc = -(-sums(terms) * bm * bn * FLOAT_BYTES // acc_unit) * acc_unit
    return sram, PASSED * acc


def _fits(chip: Chip, shape: MatmulShape, terms: int, plan: Float32Plan, apart: bool) -> bool:
    low, high = kernel_sram(chip)
    sram, acc = memory_bytes(chip, shape, terms, plan, apart)
    return sram <= high - low and acc <= chip.acc_bytes


def legal_plans(chip: Chip, shape: MatmulShape, terms: int) -> Iterator[Float32Plan]:
    """Every plan whose tiles fit; `cycles` is not estimated yet."""
    k_unit = max(chip.rows, DRAM_ATOM_BYTES // FLOAT_BYTES)
    parts = sorted({1, chip.cores})
    for bm in block_sizes(shape.m, chip.rows, 1024):
        for bn in block_sizes(shape.n, chip.cols, 2048):
            for bk in block_sizes(shape.k, k_unit, 4096):
                if max(bm, bn) * bk > MAX_STEP:
                    break
                for resident in (False, True) if shape.fixed_k else (False,):
                    plan = Float32Plan(resident, bm, bn, bk, 1)
                    if not _fits(chip, shape, terms, plan, apart=False):
                        continue
                    if not resident:
                        yield plan
                        continue
                    yield from (replace(plan, parts=count) for count in parts)


@lru_cache(maxsize=4096)
def choose_float32_plan(chip: Chip, shape: MatmulShape, terms: int) -> Float32Plan:
    """The cheapest legal plan. Raises CompileError for a chip without bf16 products, or when no
    plan fits."""
    what = f"float32 matmul {shape.m} x {shape.k} by {shape.k} x {shape.n}"
    if "bf16" not in chip.matrix_types:
        raise CompileError(
            what, "it needs a matrix engine that multiplies bf16",
            f"chip {chip.name} has {', '.join(sorted(chip.matrix_types))}", "use another chip",
        )  # fmt: skip
    best: Float32Plan | None = None
    for plan in legal_plans(chip, shape, terms):
        cycles = estimate_cycles(chip, shape, terms, plan)
        if best is None or cycles < best.cycles:
            best = replace(plan, cycles=cycles)
    if best is None:
        raise CompileError(
            what, f"two buffers of the smallest tiles fit the SRAM of chip {chip.name}",
            f"it has {chip.sram_bytes} bytes in {chip.sram_banks} banks",
            "use a chip with more SRAM",
        )  # fmt: skip
    return best
