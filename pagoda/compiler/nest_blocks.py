"""Block sizes of a loop nest for one chip: how many rows and columns a kernel does at a time.

The choice never changes a bit of the result, so it may look at the chip and at likely sizes. A
block should be large enough that a vector command outlasts the few dozen instructions that issue
it, and small enough that every tile has room for two buffers. A nest with reductions keeps a whole
row if it can: it then loads everything once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

from pagoda.compiler.allocate import allocate
from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const
from pagoda.compiler.link import kernel_sram
from pagoda.compiler.loop_nest import Load, LoopNest, Store
from pagoda.compiler.nest_lowering import Blocks, LoweredNest, lower
from pagoda.compiler.nest_plan import Plan, plan, size_of
from pagoda.compiler.nest_simplify import simplify
from pagoda.compiler.schedule import pack_elementwise, wanted_buffers
from pagoda.isa.chip import Chip

TURNED_ROWS = 64  # of a tile that is transferred by columns: shorter columns waste DRAM atoms
COMMAND_CYCLES = 512  # a vector command of this length hides its own issue and its neighbours'


def choose_blocks(nest: LoopNest, hints: Mapping[str, int], chip: Chip) -> Blocks:
    """Blocks for `lower`. hints: likely values of the nest's symbols, by name.

    Raises CompileError when not even the smallest blocks fit the chip's SRAM.
    """
    return _choose(nest, tuple(sorted(hints.items())), chip)


@lru_cache(maxsize=1024)
def _choose(nest: LoopNest, hints: tuple[tuple[str, int], ...], chip: Chip) -> Blocks:
    sizes = dict(hints)
    small = simplify(nest)
    layout = plan(small, sizes)
    wanted = COMMAND_CYCLES * chip.lanes
    rows = cols = 1
    if layout.row is not None:
        rows = max(size_of(small.dims[layout.row], sizes), 1)
        if layout.parallel == layout.row:
            rows = -(-rows // chip.cores)
    if layout.col is not None:
        cols = max(size_of(small.dims[layout.col], sizes), 1)
        if layout.parallel == layout.col:
            cols = -(-cols // chip.cores)
        elif isinstance(small.dims[layout.col], Const):
            cols = small.dims[layout.col].value
    least = min(rows, TURNED_ROWS) if _turns(small, layout) else 1
    best: Blocks | None = None
    for width in _widths(cols, wanted, bool(small.reduced)):
        blocks = _tallest(nest, sizes, chip, width, rows, max(wanted // width, least))
        if blocks is None:
            continue
        if best is None or _better(blocks, best, least):
            best = blocks
        enough = best.rows * best.cols >= min(wanted, rows * min(cols, width)) // 4
        if enough and best.rows >= least:
            break
    if best is None:
        allocate(
            pack_elementwise(lower(nest, Blocks(1, 64), sizes).kernel),
            chip,
            sram=kernel_sram(chip),
        )
        best = Blocks(1, 64)
    return best


def _turns(nest: LoopNest, layout: Plan) -> bool:
    """Does an access run along the rows of the tile, so that columns of it are transferred?"""
    for op in nest.body:
        affine = op.index.affine() if isinstance(op, (Load, Store)) else None
        if affine is None or layout.row is None or layout.col is None:
            continue
        down, across = (affine.coefficients.get(d, Const(0)) for d in (layout.row, layout.col))
        if down == Const(1) and across not in (Const(0), Const(1)):
            return True
    return False


def _better(blocks: Blocks, best: Blocks, least: int) -> bool:
    if (blocks.rows >= least) != (best.rows >= least):
        return blocks.rows >= least
    return blocks.rows * blocks.cols > 2 * best.rows * best.cols


def _widths(cols: int, wanted: int, reduces: bool) -> Iterator[int]:
    """Column blocks to try, best first: a whole row, then powers of two."""
    whole = -(-cols // 64) * 64
    width = 64
    while width < min(whole, 2 * wanted):
        width *= 2
    if reduces or whole <= width:
        yield whole
    while width >= 64:
        if width != whole:
            yield width
        width //= 2


def _tallest(
    nest: LoopNest, hints: Mapping[str, int], chip: Chip, width: int, rows: int, wanted: int
) -> Blocks | None:
    """The most rows, up to `rows` and to those wanted, that fit."""
    height = 1
    while height < min(rows, wanted):
        height *= 2
    while height:
        blocks = Blocks(height, width)
        if _fits(lower(nest, blocks, hints), chip):
            return blocks
        height //= 2
    return None


def _fits(lowered: LoweredNest, chip: Chip) -> bool:
    """Whether SRAM holds all tiles, those that want several buffers twice."""
    packed = pack_elementwise(lowered.kernel)
    try:
        placed = allocate(packed, chip, sram=kernel_sram(chip))
    except CompileError:
        return False
    wanted = wanted_buffers(packed)
    return all(where.buffers >= min(wanted[tile], 2) for tile, where in placed.items())
