"""Values of the kernel language: ranges, tiles, and tile expressions that are not computed yet.

An expression stays an `Expression` until something needs its elements; then it becomes one
`Elementwise` statement. Shapes: maximum extents are Python ints and must agree (or be 1, which is
broadcast); the extents of the moment are scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.compiler.builder import TensorHandle
from pagoda.compiler.scalar import ONE, ZERO, Int, Scalar
from pagoda.compiler.tile_ir import Column, Read, Row, Splat, Tile, Tree, View, apply
from pagoda.isa.numbers import DType


@dataclass(frozen=True)
class Range:
    """A run of indices: `size` of them from `start` on, never more than `block`. first: a scalar
    that is true in the first iteration of the loop that made it."""

    start: Scalar
    size: Scalar
    block: int
    first: Scalar = ONE


@dataclass(frozen=True)
class Shape:
    """Maximum extents (ints) and the extents of the moment."""

    max_rows: int
    max_cols: int
    rows: Scalar
    cols: Scalar

    def __str__(self) -> str:
        return f"{self.max_rows} x {self.max_cols}"


@dataclass(frozen=True)
class TileValue:
    """Elements in a tile. transposed: the storage holds [cols, rows]."""

    view: View
    shape: Shape
    transposed: bool = False

    @property
    def tile(self) -> Tile:
        return self.view.tile

    @property
    def kind(self) -> str:
        return "float" if self.tile.dtype.is_float else "int"


@dataclass(frozen=True)
class Constant:
    """A number in tile arithmetic: a Python number, or a run-time scalar of the given kind."""

    value: Splat

    @property
    def kind(self) -> str:
        return self.value.kind


@dataclass(frozen=True)
class Expression:
    """A function of tiles, to be computed when needed. dtype: what `to` asked for."""

    function: str
    arguments: tuple[Operand, ...]
    shape: Shape
    kind: str
    dtype: DType | None = None


@dataclass(frozen=True)
class Product:
    """dot(a, b), to be added to an accumulator."""

    a: TileValue
    b: TileValue
    shape: Shape


@dataclass(frozen=True)
class ReductionState:
    """A row reduction carried over the chunks of a row."""

    op: str
    tile: Tile
    shape: Shape


@dataclass(frozen=True)
class Window:
    """`tensor[index, ...]`: one Range, scalar or index tile per dimension."""

    tensor: TensorHandle
    index: tuple[Range | Scalar | TileValue, ...]

    def ranges(self) -> list[int]:
        """The dimensions indexed by ranges."""
        return [dim for dim, index in enumerate(self.index) if isinstance(index, Range)]


Operand = TileValue | Constant | Expression


class ShapeError(Exception):
    """Shapes that do not broadcast; the language adds the place."""


def broadcast(shapes: list[Shape]) -> Shape:
    """The common shape of operands."""

    def join(extents: list[tuple[int, Scalar]], name: str) -> tuple[int, Scalar]:
        large = [e for e in extents if e[0] != 1]
        if len({block for block, _ in large}) > 1:
            raise ShapeError(f"{name} are {' and '.join(str(block) for block, _ in large)}")
        return large[0] if large else extents[0]

    max_rows, rows = join([(s.max_rows, s.rows) for s in shapes], "rows")
    max_cols, cols = join([(s.max_cols, s.cols) for s in shapes], "columns")
    return Shape(max_rows, max_cols, rows, cols)


def tree_of(value: Operand, shape: Shape) -> Tree:
    """The tile IR tree that computes `value` at `shape`, broadcasting its leaves."""
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, TileValue):
        return _leaf(value, shape)
    return apply(value.function, *(tree_of(argument, shape) for argument in value.arguments))


def _leaf(value: TileValue, shape: Shape) -> Tree:
    assert not value.transposed
    more_rows = value.shape.max_rows == 1 and shape.max_rows != 1
    more_cols = value.shape.max_cols == 1 and shape.max_cols != 1
    if more_rows and more_cols:
        raise ShapeError("a 1 x 1 tile cannot be repeated in both directions")
    if more_rows:
        return Row(value.view)
    return Column(value.view) if more_cols else Read(value.view)


def tiles_read(value: Operand) -> list[TileValue]:
    """The tiles an operand reads."""
    if isinstance(value, TileValue):
        return [value]
    if isinstance(value, Constant):
        return []
    return [tile for argument in value.arguments for tile in tiles_read(argument)]


def fixed_range(extent: int) -> Range:
    """All of a dimension whose extent is known."""
    return Range(ZERO, Int(extent), extent)
