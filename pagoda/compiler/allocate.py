"""Places every tile of a kernel in SRAM or ACC: addresses, buffers, banks.

Sharing memory never changes a result (the window keeps program order per byte range), only the
time, so placement is a search for little waiting:

- A tile lives from its declaration to its last use in program order; a use in an inner loop
  stretches it to that loop's end. Tiles whose lives overlap get disjoint bytes.
- Tiles on which one engine alone works may share bytes when their lives do not overlap (that
  engine takes its commands in order anyway). Other tiles share only when nothing else fits.
- Two tiles that different engines, or one command, touch through the same kind of bank port
  should lie in different banks; each pair has a weight, and placement takes the cheapest place.
- Tiles in loops rotate over several buffers (`schedule.wanted_buffers`); when that does not fit,
  the largest number is lowered first. Before the last two become one, they move together, and
  then all tiles do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from pagoda.compiler.errors import CompileError, Location
from pagoda.compiler.schedule import Reserve, Vector, engine_of, wanted_buffers
from pagoda.compiler.tile_ir import (
    Body,
    Declare,
    Dot,
    Elementwise,
    Finish,
    For,
    Gather,
    Iota,
    Kernel,
    Load,
    Reduce,
    Statement,
    Tile,
    Transpose,
    View,
)
from pagoda.isa.chip import Chip

ALIGNMENT = 64  # bytes: one DRAM atom, and a whole number of elements of every dtype

# Weights of sharing a bank, by what it costs: A and B of one matmul (the array waits for both in
# turn), a vector command's sources (one more cycle per group), writers of different engines (each
# waits for the other's whole command), readers of different engines; and a reader that has to wait
# for a matmul, the longest of commands.
MATRIX_PAIR, VECTOR_PAIR, WRITERS, READERS, MATRIX_READER = 1000, 50, 20, 5, 200

# Manners of placing: buffers of one tile in banks of their own, side by side, or everything without
# a gap.
SPREAD, CLOSE, PACKED = "spread", "close", "packed"


@dataclass(frozen=True)
class Placement:
    """Where a tile is: `buffers` copies, `stride` bytes apart, from byte `address` of its memory
    on (without the bit that marks ACC)."""

    address: int
    buffers: int
    stride: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.address + (self.buffers - 1) * self.stride + self.nbytes


@dataclass
class _Life:
    """A tile's uses: first and last position in program order, and who touches it how."""

    start: int
    end: int
    place: Location | None
    readers: set[str]
    writers: set[str]

    def overlaps(self, other: _Life) -> bool:
        return self.start <= other.end and other.start <= self.end

    def private(self) -> str | None:
        """The one engine that works on the tile, if it is one."""
        engines = self.readers | self.writers
        return next(iter(engines)) if len(engines) == 1 else None


def written_view(statement: Statement) -> View | None:
    """The tile view a statement writes, if any."""
    match statement:
        case Load() | Gather() | Elementwise() | Vector() | Finish() | Transpose() | Iota():
            return statement.destination
        case Dot():
            return statement.acc
        case Reduce():
            return statement.state
    return None


def _lives(kernel: Kernel) -> dict[Tile, _Life]:
    lives: dict[Tile, _Life] = {}
    declared: dict[Tile, int] = {}  # how many loops were open at the declaration
    position = 0

    def visit(body: Body, loops: tuple[list[Tile], ...]) -> None:
        nonlocal position
        for statement in body:
            position += 1
            if isinstance(statement, (Declare, Reserve)):
                lives[statement.tile] = _Life(
                    position, position, statement.location, set(), set()
                )
                declared[statement.tile] = len(loops)
            engine = engine_of(statement)
            target = written_view(statement)
            for view in statement.views():
                tile = view.tile.storage
                if tile not in lives:
                    raise CompileError(
                        f"tile {tile.name}", "a tile must be declared before it is used",
                        "no declaration precedes this statement in its body",
                        "declare the tile before the loop or branch", statement.location,
                    )  # fmt: skip
                life = lives[tile]
                life.end = position
                if engine is not None:
                    if view is target:
                        life.writers.add(engine)
                    if view is not target or isinstance(statement, (Dot, Reduce)):
                        life.readers.add(engine)  # those two also read what they write
                if len(loops) > declared[tile]:  # stretch to the end of the inner loop
                    loops[declared[tile]].append(tile)
            for inner in statement.bodies():
                if isinstance(statement, For):
                    used: list[Tile] = []
                    visit(inner, (*loops, used))
                    for tile in used:
                        lives[tile].end = position
                else:
                    visit(inner, loops)

    visit(kernel.body, ())
    return lives


def _affinities(kernel: Kernel, lives: dict[Tile, _Life]) -> Counter[frozenset[Tile]]:
    """Weight of each pair of tiles that had better lie in different banks; a tile paired with
    itself (a set of one) wants its own buffers in different banks."""
    weights: Counter[frozenset[Tile]] = Counter()
    for statement in kernel.walk():
        if isinstance(statement, Dot):
            pair = statement.a.tile.storage, statement.b.tile.storage
            weights[frozenset(pair)] += MATRIX_PAIR
        elif isinstance(statement, Vector):
            sources = {o.view.tile.storage for o in statement.operands if o.view is not None}
            for pair in combinations(sources, 2):
                weights[frozenset(pair)] += VECTOR_PAIR
    for left, right in combinations(lives, 2):
        for mine, theirs, cost in (
            (lives[left].writers, lives[right].writers, WRITERS),
            (lives[left].readers, lives[right].readers, READERS),
        ):
            if mine and theirs and len(mine | theirs) > 1:
                if cost == READERS and "matrix" in mine | theirs:
                    cost = MATRIX_READER
                weights[frozenset((left, right))] += cost
    for tile, life in lives.items():
        if len(life.readers) > 1 or len(life.writers) > 1:
            weights[frozenset((tile,))] += READERS
    return weights


def allocate(
    kernel: Kernel,
    chip: Chip,
    sram: tuple[int, int] | None = None,
    acc: tuple[int, int] | None = None,
) -> dict[Tile, Placement]:
    """A placement for every declared tile.

    sram, acc: the byte intervals [low, high) that may be used; default: all of them.
    Raises CompileError when one buffer each of all tiles alive at some point does not fit.
    """
    intervals = {
        "sram": sram or (0, chip.sram_bytes),
        "acc": acc or (0, chip.acc_bytes),
    }
    lives = _lives(kernel)
    wanted = wanted_buffers(kernel)
    weights = _affinities(kernel, lives)
    placed: dict[Tile, Placement] = {}
    for memory, interval in intervals.items():
        tiles = {t: life for t, life in lives.items() if t.memory == memory}
        bank = chip.bank_bytes(memory)
        placed |= _place_memory(kernel, memory, tiles, wanted, weights, interval, bank)
    return placed


def _place_memory(
    kernel: Kernel,
    memory: str,
    lives: dict[Tile, _Life],
    wanted: dict[Tile, int],
    weights: Counter[frozenset[Tile]],
    interval: tuple[int, int],
    bank: int,
) -> dict[Tile, Placement]:
    buffers = {tile: wanted[tile] for tile in lives}
    least = {tile: 1 for tile in lives}
    for statement in kernel.walk():
        if isinstance(statement, Reserve) and statement.tile in lives:
            least[statement.tile] = statement.minimum
    while True:
        for share, manner in ((False, SPREAD), (False, CLOSE), (False, PACKED), (True, SPREAD)):
            if share and buffers != least:
                continue
            if manner != SPREAD and buffers != least and max(buffers.values()) > 2:
                continue  # a bank for each buffer is worth more than a third one
            found = _place(lives, buffers, weights, interval, bank, share, manner)
            if found is not None:
                return found
        spare = [tile for tile in lives if buffers[tile] > least[tile]]
        if not spare:
            raise _does_not_fit(kernel, memory, lives, interval)
        most = max(spare, key=lambda tile: (buffers[tile], tile.nbytes))
        buffers[most] -= 1


def _place(
    lives: dict[Tile, _Life],
    buffers: dict[Tile, int],
    weights: Counter[frozenset[Tile]],
    interval: tuple[int, int],
    bank: int,
    share: bool,
    manner: str,
) -> dict[Tile, Placement] | None:
    """share: tiles of different engines may share bytes."""
    low, high = interval
    placed: dict[Tile, Placement] = {}
    order = sorted(lives, key=lambda t: (-buffers[t] * t.nbytes, lives[t].start))
    for tile in order:
        size = _round_up(max(tile.nbytes, 1), ALIGNMENT)
        stride = size
        wide = buffers[tile] * _round_up(size, bank)
        if manner == SPREAD and weights[frozenset((tile,))] and wide <= high - low:
            stride = _round_up(size, bank)
        total = (buffers[tile] - 1) * stride + size
        taken = sorted(
            (placed[other].address, _round_up(placed[other].end, ALIGNMENT))
            for other in placed
            if lives[tile].overlaps(lives[other]) or not _may_share(lives, tile, other, share)
        )
        ends = [end for _, end in taken]
        banks = range(_round_up(low, bank), high, bank)
        best: tuple[int, int] | None = None
        for address in sorted({_round_up(low, ALIGNMENT), *ends, *banks}):
            end = address + total
            if end > high or any(address < e and s < end for s, e in taken):
                continue
            cost = 0
            if manner != PACKED:
                cost = _bank_cost(tile, address, end, placed, weights, bank)
            if best is None or cost < best[0]:
                best = cost, address
        if best is None:
            return None
        placed[tile] = Placement(best[1], buffers[tile], stride, tile.nbytes)
    return placed


def _may_share(lives: dict[Tile, _Life], left: Tile, right: Tile, share: bool) -> bool:
    engine = lives[left].private()
    return share or (engine is not None and engine == lives[right].private())


def _bank_cost(
    tile: Tile,
    address: int,
    end: int,
    placed: dict[Tile, Placement],
    weights: Counter[frozenset[Tile]],
    bank: int,
) -> int:
    mine = range(address // bank, (end - 1) // bank + 1)
    cost = 0
    for other, where in placed.items():
        weight = weights[frozenset((tile, other))] if other.memory == tile.memory else 0
        first, last = where.address // bank, (max(where.end, where.address + 1) - 1) // bank
        if weight and mine.start <= last and first < mine.stop:
            cost += weight
    return cost


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _does_not_fit(
    kernel: Kernel, memory: str, lives: dict[Tile, _Life], interval: tuple[int, int]
) -> CompileError:
    def size(tile: Tile) -> int:
        return _round_up(max(tile.nbytes, 1), ALIGNMENT)

    def alive_with(tile: Tile) -> list[Tile]:
        return [t for t in lives if lives[t].start <= lives[tile].start <= lives[t].end]

    worst = max(lives, key=lambda tile: sum(map(size, alive_with(tile))))
    alive = sorted(alive_with(worst), key=size, reverse=True)
    listed = ", ".join(f"{t.name} {t.rows}x{t.cols} {t.dtype.name} = {size(t)}" for t in alive[:4])
    more = f" and {len(alive) - 4} more" if len(alive) > 4 else ""
    return CompileError(
        f"kernel {kernel.name}",
        f"the tiles alive at one time must fit the {interval[1] - interval[0]} bytes of "
        f"{memory.upper()} it may use",
        f"they need {sum(map(size, alive))} bytes ({listed}{more})",
        "choose smaller blocks, or a chip with more " + memory.upper(),
        lives[alive[0]].place or kernel.location,
    )
