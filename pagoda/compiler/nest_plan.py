"""How a loop nest is laid over tiles: which dimension is rows, which columns, which are loops.

A tile covers `rows` steps of the row dimension and `cols` steps of the column dimension; every
other dimension is a loop of the control core. The loops from the outside in:

    loops          outer dimensions that are neither rows nor columns
    row blocks     (before the loops if more loads depend on rows alone than on loops alone)
    inner loops    reduced dimensions but the last
    column blocks

In a nest with reductions the column dimension is the last reduced one: element `i` of it goes to
lane `i mod 64` of a row's state, whatever the other reduced dimensions are; they run outside, in
row-major order. That and everything else that can change a bit follows from the nest alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.loop_nest import Load, LoopNest, Reduce, Store

DEFAULT_SIZE = 256  # what a symbolic size counts as where no hint is given

# A value's shape in tiles: rows x cols, rows x 1, 1 x cols.
FULL, COLUMN, ROW = "rows x cols", "rows x 1", "1 x cols"


@dataclass(frozen=True)
class Plan:
    """row, col: dimensions, None where there is none. serial: one core does everything, in
    row-major order of the iteration space. parallel: the dimension whose blocks are dealt out to
    the cores (None: the first core works alone). row_first: row blocks outside the loops."""

    nest: LoopNest
    row: int | None
    col: int | None
    loops: tuple[int, ...]
    inner: tuple[int, ...]
    serial: bool
    parallel: int | None
    row_first: bool = False

    def order(self) -> tuple[int, ...]:
        """The loops and the row blocks, from the outside in."""
        rows = () if self.row is None else (self.row,)
        return (*rows, *self.loops) if self.row_first else (*self.loops, *rows)

    def shape(self, dims: frozenset[int]) -> str:
        """The shape of a value that depends on `dims`. A value that depends on neither rows nor
        columns fills all rows."""
        if self.col in dims:
            return FULL if self.row in dims else ROW
        return COLUMN


def size_of(size: Expr, hints: Mapping[str, int]) -> int:
    """The value of a size, with hints for symbols."""
    return int(size.evaluate({s: hints.get(s, DEFAULT_SIZE) for s in size.symbols()}))


def plan(nest: LoopNest, hints: Mapping[str, int] | None = None) -> Plan:
    """The layout of a simplified nest. hints: likely values of symbols; they never change bits."""
    hints = hints or {}
    outer = list(range(len(nest.outer)))
    reduced = list(range(len(outer), len(nest.dims)))
    serial = _needs_order(nest)
    if reduced:
        col: int | None = reduced[-1]
    elif not outer:
        col = None
    else:
        col = outer[-1] if serial else _column(nest, outer, hints)
    rest = [d for d in outer if d != col]
    row = None
    if rest:
        row = rest[-1] if serial else _row(nest, rest, col, hints)
    loops = tuple(d for d in rest if d != row)
    inner = tuple(reduced[:-1])
    parallel = None
    if not serial:
        # Rows first: splitting them costs nothing. Their blocks follow the number of cores.
        candidates = [d for d in (row, *loops) if d is not None]
        if not reduced and col is not None:
            candidates.append(col)
        parallel = max(candidates, key=lambda d: size_of(nest.dims[d], hints), default=None)
        if row is not None and size_of(nest.dims[row], hints) >= 16:
            parallel = row
    row_first = not serial and row is not None and _rows_outside(nest, row, loops)
    return Plan(nest, row, col, loops, inner, serial, parallel, row_first)


def _rows_outside(nest: LoopNest, row: int, loops: tuple[int, ...]) -> bool:
    """Whether more loads stay the same from one iteration of the loops to the next than from one
    row block to the next."""
    dims = [d for op, d in zip(nest.body, nest.dims_of(), strict=True) if isinstance(op, Load)]
    same_in_loops = sum(row in d and not d & set(loops) for d in dims)
    same_in_rows = sum(row not in d and bool(d & set(loops)) for d in dims)
    return same_in_loops > same_in_rows


def _needs_order(nest: LoopNest) -> bool:
    """Whether two points may store to the same element: then their order counts."""
    for op in nest.body:
        if isinstance(op, Store):
            affine = op.index.affine()
            if affine is None or affine.refs:
                return True
            if op.mode == "add" and not _injective(nest, op):
                return True
    return False


def _injective(nest: LoopNest, store: Store) -> bool:
    """Whether the index is certainly another one for every point of the store's dimensions."""
    affine = store.index.affine()
    assert affine is not None
    dims = nest.dims_of()[nest.body.index(store)]
    span: Expr = Const(1)
    for d in sorted(dims, reverse=True):
        if affine.coefficients.get(d) != span:
            return False
        span = span * nest.dims[d]
    return True


def _accesses(nest: LoopNest) -> list[tuple[Expr, int]]:
    """Indices of loads and stores with a weight."""
    found = []
    for op in nest.body:
        if isinstance(op, Load):
            found.append((op.index, 4))
        elif isinstance(op, Store):
            found.append((op.index, 5))
    return found


def _unit_weight(nest: LoopNest, d: int) -> int:
    """Weight of the accesses that run contiguously along dimension d."""
    total = 0
    for index, weight in _accesses(nest):
        affine = index.affine()
        if affine is not None and affine.coefficients.get(d) == Const(1):
            total += weight
    return total


def _column(nest: LoopNest, outer: list[int], hints: Mapping[str, int]) -> int:
    """The dimension along which most accesses are contiguous, weighed by what a row of it holds:
    short rows waste lanes and commands."""

    def merit(d: int) -> tuple[int, int]:
        return _unit_weight(nest, d) * min(size_of(nest.dims[d], hints), 64), d

    return max(outer, key=merit)


def _row(nest: LoopNest, rest: list[int], col: int | None, hints: Mapping[str, int]) -> int:
    """A dimension that makes transposed accesses possible, else the longest, else the last."""
    strided = 0
    for index, weight in _accesses(nest):
        affine = index.affine()
        if affine is not None and affine.coefficients.get(col, Const(0)) not in (
            Const(0),
            Const(1),
        ):
            strided += weight

    def merit(d: int) -> tuple[int, int, int]:
        size = size_of(nest.dims[d], hints)
        transposes = _unit_weight(nest, d) if strided else 0
        return transposes * min(size, 64), size, d

    return max(rest, key=merit)


def stages(nest: LoopNest) -> tuple[int, ...]:
    """For each operation the pass over the columns in which it can be done first: a value that
    uses a reduction comes one pass after it."""
    found: list[int] = []
    for op in nest.body:
        after = [found[a] + isinstance(nest.body[a], Reduce) for a in op.args()]
        found.append(max(after, default=0))
    return tuple(found)
