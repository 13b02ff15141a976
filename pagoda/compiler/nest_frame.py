"""Where a loop nest's lowering stands: open loops, extents of the moment, values made so far.

A `Value` is a tree over tiles with a shape (see `nest_plan`). It stays a tree as long as one
operation uses it and becomes a tile where it is shared or broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.index_expr import Add, Const, Expr, FloorDiv, Max, Min, Mod, Mul, Symbol, Var
from pagoda.compiler.nest_plan import COLUMN, FULL, ROW, Plan
from pagoda.compiler.pointwise import check_dtype
from pagoda.compiler.scalar import (
    ONE,
    ZERO,
    Argument,
    CoreId,
    Int,
    Scalar,
    maximum,
    minimum,
)
from pagoda.compiler.tile_ir import Column, Read, Row, Splat, Tile, Tree, View, apply, splat
from pagoda.isa.numbers import DType

STORAGE = {
    "float32": DType.F32, "bfloat16": DType.BF16, "int32": DType.I32, "int64": DType.I64,
    "int8": DType.I8, "uint8": DType.U8, "bool": DType.BOOL,
}  # fmt: skip
MAX_TREE = 16  # nodes of a tree that stays one


@dataclass(frozen=True)
class Value:
    """shape None: a constant, which has every shape."""

    tree: Tree
    shape: str | None


def storage(dtype: str, what: str) -> DType:
    """The memory format of a parameter type. Raises CompileError where the chip has none."""
    check_dtype(dtype, what)
    return STORAGE[dtype]


class Frame:
    """max_rows, max_cols: extents of tiles; rows, cols: of the block being computed. bound: values
    of dimensions: of loop variables, and where the block's rows and columns start. parallel: the
    dimension whose blocks are dealt out to the cores."""

    def __init__(
        self,
        builder: KernelBuilder,
        plan: Plan,
        parallel: int | None,
        max_rows: int,
        max_cols: int,
    ):
        self.b = builder
        self.plan = plan
        self.parallel = parallel
        self.max_rows, self.max_cols = max_rows, max_cols
        self.rows: Scalar = Int(max_rows)
        self.cols: Scalar = Int(max_cols)
        self.bound: dict[int, Scalar] = {}
        self.open: list[int] = []  # dimensions with an open loop, outermost first
        self.values: dict[int, Value] = {}

    # Extents and tiles ---------------------------------------------------------------------------

    def extents(self, shape: str) -> tuple[Scalar, Scalar]:
        rows = ONE if shape == ROW else self.rows
        return rows, ONE if shape == COLUMN else self.cols

    def tile(self, dtype: DType, shape: str, name: str = "t") -> Tile:
        rows = 1 if shape == ROW else self.max_rows
        return self.b.tile(dtype, rows, 1 if shape == COLUMN else self.max_cols, name=name)

    def stored(self, tree: Tree, shape: str, dtype: DType | None = None, name: str = "t") -> Tile:
        """A new tile that holds the tree's elements."""
        if dtype is None:
            dtype = DType.F32 if tree.kind == "float" else DType.I32
        tile = self.tile(dtype, shape, name)
        self.b.elementwise(tile, tree, *self.extents(shape))
        return tile

    def keep(self, tree: Tree, shape: str) -> Tree:
        """The same elements as a leaf."""
        if isinstance(tree, (Splat, Read, Row, Column)):
            return tree
        return Read(self.stored(tree, shape).view())

    def operand(self, value: Value, shape: str) -> Tree:
        """A value as a tree of the given shape, which includes the value's own."""
        if value.shape in (None, shape):
            return value.tree
        assert value.shape is not None and value.shape != FULL and shape != COLUMN
        leaf = self.whole(value.tree, value.shape)
        return Column(leaf) if value.shape == COLUMN else Row(leaf)

    def whole(self, tree: Tree, shape: str, dtype: DType | None = None) -> View:
        """A tile that holds the tree's elements from its first element on."""
        if isinstance(tree, Read) and dtype in (None, tree.view.tile.dtype):
            return tree.view
        return self.stored(tree, shape, dtype).view()

    # Scalars -------------------------------------------------------------------------------------

    def scalar(self, value: Expr) -> Scalar:
        """An index expression at the start of the block, in elements."""
        match value:
            case Const(number):
                return Int(number) if abs(number) < 2**31 else Int(_clamped(number))
            case Symbol(name):
                return Argument(name)
            case Var(dim):
                return self.bound[dim]
        kids = [self.scalar(child) for child in value.children()]
        match value:
            case Add():
                return sum(kids[1:], kids[0])
            case Mul():
                total = kids[0]
                for kid in kids[1:]:
                    total = total * kid
                return total
            case FloorDiv():
                return kids[0] // kids[1]
            case Mod():
                return kids[0] % kids[1]
            case Min():
                return minimum(*kids)
            case Max():
                return maximum(*kids)
        raise TypeError(f"no such index expression: {value!r}")

    def once(self, dims: frozenset[int]) -> Scalar:
        """1 in exactly one of the iterations that see the same values of `dims`, on one core."""
        condition: Scalar = ONE
        for dim in self.open:
            if dim not in dims:
                condition = condition * self.bound[dim].eq(ZERO)
        if self.parallel is not None and self.parallel not in self.open:
            condition = condition * CoreId().eq(ZERO)
        return condition

    # Indices as values ---------------------------------------------------------------------------

    def index_tree(self, index: Expr, shape: str) -> Tree:
        """An index expression at every element of a block of the given shape, in int32."""
        tiled = {self.plan.row, self.plan.col} & index.vars()
        if not tiled and not index.refs():
            return Splat(self.scalar(index), "int")
        affine = index.affine()
        if affine is not None and not affine.refs:
            return self._ramp(index, shape)
        match index:
            case Add(terms):
                return self._sum(terms, shape)
            case Mul():
                return self._fold("imul", index, shape)
            case FloorDiv(left, Const(k)) if k > 0 and k & (k - 1) == 0:
                shift = splat(k.bit_length() - 1)
                return apply("sra", self.index_tree(left, shape), shift)
            case Mod(left, Const(k)) if k > 0 and k & (k - 1) == 0:
                return apply("and", self.index_tree(left, shape), splat(k - 1))
            case FloorDiv():
                return self._fold("idiv", index, shape)
            case Mod():
                return self._fold("imod", index, shape)
            case Min():
                return self._fold("imin", index, shape)
            case Max():
                return self._fold("imax", index, shape)
        return self.operand(self.values[index.refs()[0]], shape)

    def _fold(self, function: str, index: Expr, shape: str) -> Tree:
        parts = [self.index_tree(child, shape) for child in index.children()]
        total = parts[0]
        for part in parts[1:]:
            total = apply(function, total, part)
        return total

    def _sum(self, terms: tuple[Expr, ...], shape: str) -> Tree:
        """The affine terms as one ramp, the others added to it."""
        plain: Expr = Const(0)
        parts = []
        for term in terms:
            affine = term.affine()
            if affine is not None and not affine.refs:
                plain = plain + term
            else:
                parts.append(self.index_tree(term, shape))
        if plain != Const(0):
            parts.append(self.index_tree(plain, shape))
        total = parts[0]
        for part in parts[1:]:
            total = apply("iadd", total, part)
        return total

    def _ramp(self, index: Expr, shape: str) -> Tree:
        affine = index.affine()
        assert affine is not None
        tile = self.tile(DType.I32, shape, "ramp")
        self.b.iota(
            tile,
            *self.extents(shape),
            start=self.scalar(index),
            row_step=self.step(affine.coefficients, self.plan.row),
            col_step=self.step(affine.coefficients, self.plan.col),
        )
        return Read(tile.view())

    def step(self, coefficients: dict[int, Expr], dim: int | None) -> Scalar:
        """The coefficient of a dimension, 0 where it has none."""
        if dim is None or dim not in coefficients:
            return ZERO
        return self.scalar(coefficients[dim])


def _clamped(number: int) -> int:
    return min(max(number, -(2**31)), 2**31 - 1)


def tree_size(tree: Tree) -> int:
    """Nodes of a tree, counting stops past MAX_TREE."""
    count, pending = 0, [tree]
    while pending and count <= MAX_TREE:
        count += 1
        pending.extend(pending.pop().children())
    return count
