"""What a matrix product costs on a chip: a timeline of its loads, matmuls and stores.

`matmul_cycles` replays the command stream of `kernels.matmul` step by step with the contract's
duration formulas (`isa.timing`): one DRAM port, one matrix engine, rotating buffers, the window's
size and what the control core needs per command. Long products are replayed for their first steps
and continued at the rate of the last of them. `choose_matmul` tries all legal block sizes and takes
the cheapest: there are no tables of sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from pagoda.compiler.allocate import ALIGNMENT
from pagoda.compiler.errors import CompileError
from pagoda.compiler.link import kernel_sram
from pagoda.isa import timing
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip

ISSUE_CYCLES = 45  # of the control core for one command in an inner loop: about 9 stores
TILE_CYCLES = 350  # for the divisions and fields of a new output tile
REPLAYED_STEPS = 256
COMPARED_PLANS = 300
RESIDENT_BUFFERS = (7, 5, 4, 3, 2)
STREAM_BUFFERS = (4, 3, 2)
# A product seldom comes alone: its activations come from a chain of small kernels, which takes some
# DRAM latencies. Plans are compared by the mean of two cases: everything is there at once; or only
# b, the weights, and `a` after so many latencies.
CHAIN_LATENCIES = 12
DEPENDENT_CYCLES = 10  # between vector commands that need one another's results
WINDOW_FOR_NEXT_TILE = 4  # entries: its loads and matmuls
# The DRAM of the contract asks for no more than an atom in a row, but pages of a real one, and of a
# host's, for more. So tiles that do not hold whole rows of b must save PARTIAL_ROWS of the cycles
# to be taken, and those with rows shorter than RUN_BYTES up to SHORT_ROWS more.
RUN_BYTES = 6 * DRAM_ATOM_BYTES
PARTIAL_ROWS = 0.002
SHORT_ROWS = 0.015
# Of two plans that take the same cycles the one that moves less is better: each cycle that the DRAM
# port is busy counts so much more.
TRAFFIC = 0.01
NEAR = 1.003  # prices that differ by less are as good as equal
SMALL_TILES = 4096  # bytes of SRAM left for bias rows and converted outputs, at least


@dataclass(frozen=True)
class EpilogueCost:
    """What a loop nest at the end of a product (`nest_epilogue`) does for each output tile:
    vector commands, their cycles per group of lanes, and per element bytes of tiles, of loads and
    of each store.
    """

    commands: int
    cycles: int
    tile_bytes: int
    loaded_bytes: int
    stored_bytes: tuple[int, ...]


@dataclass(frozen=True)
class MatmulShape:
    """c[batch, m, n] = a[batch, m, k] b[batch, k, n]; bytes of one element of each.

    transposed: stored with the other dimension contiguous (nn.Linear's weight is a transposed b).
    """

    batch: int
    m: int
    n: int
    k: int
    operand_bytes: int = 2
    output_bytes: int = 2
    transposed_a: bool = False
    transposed_b: bool = True
    bias: bool = False
    fixed_k: bool = True
    epilogue: EpilogueCost | None = None


@dataclass(frozen=True)
class MatmulPlan:
    """Block sizes; resident: whole rows of a stay in SRAM, and buffers - 1 tiles of b are loaded
    ahead. cycles: the estimate."""

    resident: bool
    bm: int
    bn: int
    bk: int
    buffers: int
    cycles: int


def dram_atoms(rows: int, cols: int, pitch: int, size: int) -> int:
    """DRAM atoms of rows x cols elements in rows `pitch` elements apart."""
    if cols == pitch or rows == 1:
        return -(-rows * cols * size // DRAM_ATOM_BYTES)
    aligned = cols * size % DRAM_ATOM_BYTES == 0 and pitch * size % DRAM_ATOM_BYTES == 0
    return rows * (-(-cols * size // DRAM_ATOM_BYTES) + (0 if aligned else 1))


class _Timeline:
    """One core's engines. Times are in cycles from the first command."""

    def __init__(self, chip: Chip, plan: MatmulPlan, commands_per_step: int):
        self.chip = chip
        late = timing.dram_slot_cycle(chip, 1)
        self.load_tail, self.store_tail = chip.dram_latency + 8 + late, 12 + late
        self.control = 0.0
        self.port = 0.0
        self.matrix = 0.0
        self.vector = 0.0
        self.end = 0.0
        self.released = deque([0.0] * plan.buffers, plan.buffers)  # finish of the readers
        ahead = max(chip.window // commands_per_step, 1)
        self.window = deque([0.0] * ahead, ahead)
        self.accumulators = deque([0.0, 0.0], 2)
        self.stores: deque[tuple[float, float]] = deque()  # (ready, port cycles)
        self.stores_free_acc = True

    def load(self, cycles: int, not_before: float) -> float:
        """When the data is there, after `cycles` of the DRAM port."""
        self.control += ISSUE_CYCLES
        ready = max(self.control, not_before)
        while self.stores and self.stores[0][0] <= max(self.port, ready):
            self.store_now()
        start = max(self.port, ready)
        self.port = start + cycles
        return self.port + self.load_tail

    def store_now(self) -> None:
        ready, cycles = self.stores.popleft()
        self.port = max(self.port, ready) + cycles
        if self.stores_free_acc:
            self.accumulators.append(self.port + self.store_tail)
        self.end = max(self.end, self.port + self.store_tail)

    def epilogue(self, shape: MatmulShape, m: int, n: int, accumulated: float) -> float:
        """When an output tile is through its epilogue; `accumulated`: when its sums are there."""
        cost, chip = shape.epilogue, self.chip
        assert cost is not None
        there = accumulated
        if cost.loaded_bytes:
            size = cost.loaded_bytes
            there = max(there, self.load(port_cycles(chip, m, n, shape.n, size), 0.0))
        if cost.commands == 0:  # the sums are stored as they are, converted on their way
            return there
        self.control += cost.commands * ISSUE_CYCLES
        begin = max(self.vector, there, self.control - cost.commands * ISSUE_CYCLES)
        group = timing.vector(chip, m, n, 0, 0).occupancy
        each = group * cost.cycles / cost.commands + DEPENDENT_CYCLES
        self.vector = max(begin + cost.commands * each, self.control)
        # The control core goes on when all but a window's worth of the commands have entered.
        waiting = max(chip.window - WINDOW_FOR_NEXT_TILE, 1)
        entered = max(cost.commands - waiting, 0)
        if entered:
            self.control = max(self.control, begin + entered * each)
        self.accumulators.append(begin + group)
        self.stores_free_acc = False
        return self.vector

    def finish(self) -> float:
        while self.stores:
            self.store_now()
        return self.end


def matmul_cycles(
    chip: Chip, shape: MatmulShape, plan: MatmulPlan, chain_latencies: int = 0
) -> int:
    """Estimated cycles of the core with the most work, launch excluded, when `a` is ready so many
    DRAM latencies after the start."""
    chain = chain_latencies * (chip.dram_latency + 8)
    tiles, steps_per_tile = _share_of_core(chip, shape, plan)
    commands = 2 if plan.resident else 3
    if shape.epilogue is not None:
        commands += -(-shape.epilogue.commands // steps_per_tile)
    timeline = _Timeline(chip, plan, commands)
    ahead = plan.buffers - 1 if plan.resident else 0
    # Loads run ahead of the last replayed step too, or the rate there would be too good.
    steps = list(islice(_steps(chip, shape, plan), REPLAYED_STEPS + ahead))
    replayed = steps[:REPLAYED_STEPS]
    loaded: deque[float] = deque()  # arrivals of b's tiles
    middle = 0.0
    accumulated = resident = 0.0
    for number, step in enumerate(replayed):
        if plan.resident and step.new_rows:
            while len(loaded) < ahead and number + len(loaded) < len(steps):
                loaded.append(_load_b(timeline, shape, steps[number + len(loaded)]))
            whole = port_cycles(chip, *_tile_a(shape, step.m, shape.k))
            resident = timeline.load(whole, max(timeline.matrix, chain))
        if number + len(loaded) < len(steps):
            loaded.append(_load_b(timeline, shape, steps[number + len(loaded)]))
        there = loaded.popleft()
        if plan.resident:
            there = max(there, resident)
        else:
            room = max(timeline.released[0], timeline.window[0])
            a = port_cycles(chip, *_tile_a(shape, step.m, step.k))
            there = max(there, timeline.load(a, max(room, chain)))
        timeline.control += ISSUE_CYCLES + (TILE_CYCLES if step.first else 0)
        transposes = shape.transposed_a, shape.transposed_b
        duration = timing.matmul(chip, step.m, step.n, 1, step.k, *transposes)
        free_acc = timeline.accumulators[0] if step.first else accumulated
        start = max(timeline.matrix, there, free_acc)
        timeline.matrix = start + duration.occupancy
        accumulated = timeline.matrix + duration.tail
        timeline.released.append(accumulated)
        leaves_window = accumulated
        if step.last:
            timeline.control += ISSUE_CYCLES
            bias = timing.vector(chip, step.m, step.n, 1, 0).occupancy + 30 if shape.bias else 0
            cycles = _store_cycles(chip, shape, step.m, step.n)
            done = accumulated + bias
            if shape.epilogue is not None:
                done = timeline.epilogue(shape, step.m, step.n, done)
                leaves_window = done
            timeline.stores.append((done, cycles))
        timeline.window.append(leaves_window)
        if number + 1 == len(replayed) // 2:
            middle = max(timeline.matrix, timeline.port)
    left = tiles * steps_per_tile - len(replayed)
    if left <= 0:
        return int(timeline.finish())
    now = max(timeline.matrix, timeline.port)
    rate = (now - middle) / (len(replayed) / 2)
    if timeline.port > timeline.matrix:
        left -= len(loaded)  # which the port has behind it
    return int(now + left * rate + timeline.load_tail + timeline.store_tail)


def _load_b(timeline: _Timeline, shape: MatmulShape, step: _Step) -> float:
    room = max(timeline.released[0], timeline.window[0])
    return timeline.load(port_cycles(timeline.chip, *_tile_b(shape, step.n, step.k)), room)


@dataclass(frozen=True)
class _Step:
    """One matmul: its extents, and where it stands in its output tile."""

    m: int
    n: int
    k: int
    first: bool
    last: bool
    new_rows: bool


def _steps(chip: Chip, shape: MatmulShape, plan: MatmulPlan) -> Iterator[_Step]:
    rows: tuple[int, int] | None = None
    for g, i, j in _tiles(chip, shape, plan):
        m, n = min(plan.bm, shape.m - i), min(plan.bn, shape.n - j)
        for k in range(0, max(shape.k, 1), plan.bk):
            width, last = min(plan.bk, shape.k - k), k + plan.bk >= shape.k
            yield _Step(m, n, width, k == 0, last, rows != (g, i))
            rows = (g, i)


def _share_of_core(chip: Chip, shape: MatmulShape, plan: MatmulPlan) -> tuple[int, int]:
    """Output tiles of the busiest core, and k steps of each."""
    down, across = -(-shape.m // plan.bm), -(-shape.n // plan.bn)
    if plan.resident:
        tiles = shape.batch * down * -(-across // chip.cores)
    else:
        tiles = -(-shape.batch * down * across // chip.cores)
    return tiles, max(-(-shape.k // plan.bk), 1)


def _tiles(
    chip: Chip, shape: MatmulShape, plan: MatmulPlan
) -> Iterator[tuple[int, int, int]]:
    """(batch, row, column) of the output tiles of core 0, in the kernels' order."""
    down, across = -(-shape.m // plan.bm), -(-shape.n // plan.bn)
    if plan.resident:
        for g in range(shape.batch):
            for i in range(down):
                for j in range(0, across, chip.cores):
                    yield g, i * plan.bm, j * plan.bn
    else:
        for t in range(0, shape.batch * down * across, chip.cores):
            yield t // (down * across), t // across % down * plan.bm, t % across * plan.bn


def _tile_a(shape: MatmulShape, m: int, k: int) -> tuple[int, int, int, int]:
    if shape.transposed_a:
        return k, m, shape.m, shape.operand_bytes
    return m, k, shape.k, shape.operand_bytes


def _tile_b(shape: MatmulShape, n: int, k: int) -> tuple[int, int, int, int]:
    if shape.transposed_b:
        return n, k, shape.k, shape.operand_bytes
    return k, n, shape.n, shape.operand_bytes


def port_cycles(
    chip: Chip, rows: int, cols: int, pitch: int, size: int, local_size: int | None = None
) -> int:
    """Cycles for which a load or store of a tile holds the DRAM port, once its first slot opens.

    rows x cols elements of `size` bytes in rows `pitch` elements apart; local_size: bytes of one
    in SRAM or ACC, if it is converted.
    """
    atoms = dram_atoms(rows, cols, pitch, size)
    if atoms == 0:
        return 0
    local = timing.local_cycles(chip, rows, cols * (local_size or size))
    return timing.dma_cycles(chip, 1 if cols == pitch else rows, atoms, local)


def _store_cycles(chip: Chip, shape: MatmulShape, m: int, n: int) -> int:
    """A tile of sums, converted on its way unless a bias is added first; or an epilogue's."""
    if shape.epilogue is not None:
        return sum(
            timing.store_lead(chip, 8 * size, 8 * size)
            + port_cycles(chip, m, n, shape.n, size, size)
            for size in shape.epilogue.stored_bytes
        )
    local_size = shape.output_bytes if shape.bias else 4
    lead = timing.store_lead(chip, 8 * shape.output_bytes, 8 * local_size)
    return lead + port_cycles(chip, m, n, shape.n, shape.output_bytes, local_size)


# Choice ------------------------------------------------------------------------------------------


def block_sizes(extent: int, unit: int, limit: int) -> list[int]:
    """Block sizes worth trying: the whole extent, even splits of it and powers of two, in units."""
    extent = max(extent, 1)
    found = {extent} if extent <= limit else set()
    found |= {unit << s for s in range(12) if unit << s < min(extent + unit, limit + 1)}
    for parts in range(2, 17):
        size = _ceil_div(_ceil_div(extent, parts), unit) * unit
        if unit <= size <= limit:
            found.add(size)
    return sorted(found)


def legal_plans(chip: Chip, shape: MatmulShape) -> Iterator[MatmulPlan]:
    """Every plan whose tiles fit; `cycles` is not estimated yet."""
    low, high = kernel_sram(chip)
    size = shape.operand_bytes
    bank, acc_half = chip.bank_bytes("sram"), chip.acc_bytes // 2
    k_unit = max(chip.rows, DRAM_ATOM_BYTES // size)
    for bm in block_sizes(shape.m, chip.rows, 1024):
        for bn in block_sizes(shape.n, chip.cols, 2048):
            if _aligned(bm * bn * 4) > acc_half:
                continue
            output = 2 * _aligned(bm * bn * shape.output_bytes) if shape.bias else 0
            if shape.epilogue is not None:
                output = bm * bn * (shape.epilogue.tile_bytes + 4 * shape.bias)
            room = high - low - SMALL_TILES - output
            for bk in block_sizes(shape.k, k_unit, 1 << 16):
                for resident in (False, True) if shape.fixed_k else (False,):
                    for buffers in RESIDENT_BUFFERS if resident else STREAM_BUFFERS:
                        b = buffers * _aligned(bk * bn * size)
                        a = _aligned(bm * (shape.k if resident else bk) * size)
                        a *= 1 if resident else buffers
                        if _banks(a, bank) + _banks(b, bank) <= room:
                            yield MatmulPlan(resident, bm, bn, bk, buffers, 0)
                            if not resident:
                                break  # more are never worse; ahead of time they may be


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _banks(nbytes: int, bank: int) -> int:
    """Bytes up to the end of the last bank: A and B must not share one."""
    return -(-nbytes // bank) * bank


def _traffic(chip: Chip, shape: MatmulShape, plan: MatmulPlan) -> tuple[float, float]:
    """Cycles in which the DRAM port loads rows of a that stay, and for each step; at least."""
    m, n, k = min(plan.bm, shape.m), min(plan.bn, shape.n), min(plan.bk, max(shape.k, 1))
    stay, step = 0, dram_atoms(*_tile_b(shape, n, k))
    if plan.resident:
        stay = shape.batch * -(-shape.m // plan.bm) * dram_atoms(*_tile_a(shape, m, shape.k))
    else:
        step += dram_atoms(*_tile_a(shape, m, k))
    rate = DRAM_ATOM_BYTES / float(chip.dram_share)
    return stay * rate, step * rate


def _bound(chip: Chip, shape: MatmulShape, plan: MatmulPlan) -> float:
    """A quick lower bound of what `_price` gives, to skip hopeless plans."""
    tiles, steps = _share_of_core(chip, shape, plan)
    m, n, k = min(plan.bm, shape.m), min(plan.bn, shape.n), min(plan.bk, max(shape.k, 1))
    matmul = timing.matmul(chip, m, n, 1, k, shape.transposed_a, shape.transposed_b)
    # There is one buffer for rows that stay: nothing is multiplied while the next are loaded.
    stay, dram = _traffic(chip, shape, plan)
    control = TILE_CYCLES / steps + (2 if plan.resident else 3) * ISSUE_CYCLES
    edge = 0.5 if tiles * steps > 1 else 1.0  # tails may be much smaller than the rest
    cycles = max((tiles * steps - edge) * max(matmul.occupancy, dram, control), 0.0)
    moved = stay + (tiles * steps - edge) * dram
    return (stay + cycles) * _weight(shape, plan) + TRAFFIC * max(moved, 0.0)


def _price(chip: Chip, shape: MatmulShape, plan: MatmulPlan, cycles: int) -> float:
    """What plans are compared by. cycles: of the plan alone."""
    chained = matmul_cycles(chip, shape, plan, CHAIN_LATENCIES)
    tiles, steps = _share_of_core(chip, shape, plan)
    stay, dram = _traffic(chip, shape, plan)
    moved = stay + tiles * steps * dram
    return (cycles + chained) / 2 * _weight(shape, plan) + TRAFFIC * moved


def _weight(shape: MatmulShape, plan: MatmulPlan) -> float:
    """By what a plan's cycles are multiplied when it is compared with others."""
    block, extent = (plan.bk, shape.k) if shape.transposed_b else (plan.bn, shape.n)
    if block >= extent:
        return 1.0
    short = max(1 - block * shape.operand_bytes / RUN_BYTES, 0.0)
    return 1 + PARTIAL_ROWS + SHORT_ROWS * short


@lru_cache(maxsize=4096)
def choose_matmul(chip: Chip, shape: MatmulShape) -> MatmulPlan:
    """The legal plan with the largest output tiles among those that cost next to nothing more than
    the cheapest: sizes vary from call to call, and few large tiles lose least when rows are fewer
    than `shape` says. Raises CompileError when none fits."""
    plans = sorted(
        (_bound(chip, shape, plan), n, plan)
        for n, plan in enumerate(legal_plans(chip, shape))
    )
    priced: list[tuple[float, MatmulPlan]] = []
    lowest = float("inf")
    for bound, _, plan in plans[:COMPARED_PLANS]:
        if bound > lowest:
            break
        cycles = matmul_cycles(chip, shape, plan)
        price = _price(chip, shape, plan, cycles)
        priced.append((price, replace(plan, cycles=cycles)))
        lowest = min(lowest, price)
    if not priced:
        raise CompileError(
            f"matmul {shape.m} x {shape.k} by {shape.k} x {shape.n}",
            f"two buffers of the smallest tiles fit the SRAM of chip {chip.name}",
            f"it has {chip.sram_bytes} bytes in {chip.sram_banks} banks",
            "use a chip with more SRAM",
        )
    near = [each for each in priced if each[0] <= lowest * NEAR]
    return min(near, key=lambda each: (-_tile_elements(shape, each[1]), each[0]))[1]


def _tile_elements(shape: MatmulShape, plan: MatmulPlan) -> int:
    return min(plan.bm, shape.m) * min(plan.bn, shape.n)
