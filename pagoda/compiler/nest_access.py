"""Loads and stores of loop nests: each becomes the cheapest commands that are right for its index.

With the index written as `offset + kr * row + kc * column` (strides in elements):

    kc = 1              rows of contiguous elements, kr apart
    no column           one element per row
    kr = 1              the tile is loaded column by column and transposed
    other kc            element by element, in one command
    an indirect row     gather (scatter) of rows, by an index tile
    anything else       gather (scatter) of single elements: an index computed for each

A masked load whose mask bounds rows and columns (`i1 < 32`, as in cat) fills the tile and loads a
part of it. Other masks turn the index of what is masked out into 0 and select afterwards.

An indirect index outside [0, size) becomes INT32_MIN: the gather or scatter faults on it before it
moves anything. A view that starts 2 GiB or further into its slot, of one-byte elements, could
hide that; nothing else can.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Add, Const, Expr, Var
from pagoda.compiler.loop_nest import (
    Cast,
    Constant,
    IndexValue,
    Indirect,
    Load,
    LoopNest,
    Pointwise,
    Store,
)
from pagoda.compiler.nest_frame import Frame, Value, storage
from pagoda.compiler.nest_plan import COLUMN, FULL, ROW, Plan
from pagoda.compiler.pointwise import convert, unsaturated
from pagoda.compiler.scalar import ONE, ZERO, Int, Scalar, maximum, minimum, select
from pagoda.compiler.tile_ir import Access, Read, Tile, Tree, View, apply, round_to_float32, splat
from pagoda.isa.numbers import DType

INT32_MIN = -(2**31)


# Masks that bound rows and columns ---------------------------------------------------------------


def bounds(nest: LoopNest, mask: int) -> list[Expr] | None:
    """Expressions that are all >= 0 exactly where the mask is true, or None."""
    op = nest.body[mask]
    if isinstance(op, Constant):
        return [] if op.value else [Const(-1)]
    if not isinstance(op, Pointwise):
        return None
    if op.name in ("bitwise_and", "mul", "minimum"):
        left, right = (bounds(nest, operand) for operand in op.operands)
        return None if left is None or right is None else left + right
    if op.name == "logical_not" or (op.name == "bitwise_not" and op.dtype == "bool"):
        inner = bounds(nest, op.operands[0])
        return [-inner[0] - 1] if inner is not None and len(inner) == 1 else None
    if op.name not in ("lt", "le", "gt", "ge", "eq"):
        return None
    a, b = (_integer(nest, operand) for operand in op.operands)
    if a is None or b is None:
        return None
    return {
        "lt": [b - a - 1], "le": [b - a], "gt": [a - b - 1], "ge": [a - b], "eq": [a - b, b - a],
    }[op.name]  # fmt: skip


def _integer(nest: LoopNest, number: int) -> Expr | None:
    """A body value as an index expression."""
    op = nest.body[number]
    match op:
        case IndexValue(index):
            return None if index.refs() else index
        case Constant(value, dtype) if dtype in ("int32", "int64"):
            return Const(int(value))
        case Cast(value, dtype) if dtype in ("int32", "int64"):
            return _integer(nest, value)
        case Pointwise("add" | "sub" | "mul", operands, dtype) if dtype in ("int32", "int64"):
            a, b = (_integer(nest, operand) for operand in operands)
            if a is None or b is None:
                return None
            return {"add": a + b, "sub": a - b, "mul": a * b}[op.name]
    return None


def window_of(plan: Plan, op: Load) -> list[Expr] | None:
    """The bounds of a masked load with an affine index, if each concerns rows only, columns only,
    or neither; else None."""
    affine = op.index.affine()
    if op.mask is None or affine is None or affine.refs:
        return None
    found = bounds(plan.nest, op.mask)
    for bound in found or ():
        terms = bound.affine()
        if terms is None or terms.refs:
            return None
        tiled = [d for d in terms.coefficients if d in (plan.row, plan.col)]
        if len(tiled) > 1 or any(not terms.coefficients[d].is_const() for d in tiled):
            return None
    return found


@dataclass(frozen=True)
class _Part:
    """A part of a tile: where it starts and how large it is."""

    row: Scalar
    col: Scalar
    rows: Scalar
    cols: Scalar


class Accesses:
    """Lowers the loads and stores of one nest; `names`: a tensor name per parameter."""

    def __init__(self, frame: Frame, names: list[str]):
        self.frame = frame
        self.b = frame.b
        self.plan = frame.plan
        self.nest = frame.plan.nest
        self.names = names
        self.dims = self.nest.dims_of()
        self.in_range: dict[int, Value] = {}  # condition of each indirect index

    def memory(self, param: int) -> DType:
        return storage(self.nest.params[param].dtype, f"parameter p{param}")

    # Indirect indices ----------------------------------------------------------------------------

    def indirect(self, number: int, op: Indirect) -> Value:
        """The index, with `size` added where it is negative; notes whether it is in range."""
        frame, shape = self.frame, self.plan.shape(self.dims[number])
        x = frame.keep(frame.operand(frame.values[op.value], shape), shape)
        size = splat(frame.scalar(op.size))
        moved = apply("select", apply("ilt", x, splat(0)), apply("iadd", x, size), x)
        index = frame.keep(moved, shape)
        fits = apply("and", apply("ile", splat(0), index), apply("ilt", index, size))
        self.in_range[number] = Value(frame.keep(fits, shape), shape)
        return Value(index, shape)

    def _index_tile(self, index: Expr, mask: int | None, shape: str) -> View:
        """Element indices as an int32 tile: INT32_MIN where out of range, 0 where masked out."""
        frame = self.frame
        tree = frame.index_tree(index, shape)
        for ref in index.refs():
            fits = frame.operand(self.in_range[ref], shape)
            tree = apply("select", fits, tree, splat(INT32_MIN))
        if mask is not None:
            wanted = frame.operand(frame.values[mask], shape)
            tree = apply("select", wanted, tree, splat(0))
        return frame.whole(tree, shape, DType.I32)

    def _depends_on_column(self, value: int) -> bool:
        return self.plan.col in self.dims[value]

    def _row_base(self, index: Expr, others: tuple[int, ...]) -> Expr | None:
        """`index` without its column term, if that is 1 * column and nothing else in the index or
        in the values `others` depends on the column."""
        if any(self._depends_on_column(v) for v in (*index.refs(), *others)):
            return None
        column = Var(self.plan.col) if self.plan.col is not None else None
        terms = index.terms if isinstance(index, Add) else (index,)
        rest = sum((t for t in terms if t != column), Const(0))
        if column not in terms or self.plan.col in rest.vars():
            return None
        return rest

    # Loads ---------------------------------------------------------------------------------------

    def load(self, number: int, op: Load) -> Value:
        shape = self.plan.shape(self.dims[number])
        mem = self.memory(op.param)
        dtype = DType.I8 if mem is DType.I8 else DType.I32
        if mem.is_float:
            exact = op.mask is None or _bfloat16(float(op.other)) == round_to_float32(op.other)
            dtype = DType.BF16 if mem is DType.BF16 and exact else DType.F32
        affine = op.index.affine()
        window = window_of(self.plan, op)
        if affine is None or affine.refs or (op.mask is not None and window is None):
            return self._gather(op, shape, dtype)
        tile = self.frame.tile(dtype, shape, self.names[op.param])
        rows, cols = self.frame.extents(shape)
        part = _Part(ZERO, ZERO, rows, cols)
        if window is not None:
            other = splat(float(op.other) if dtype.is_float else int(op.other))
            self.b.elementwise(tile, other, rows, cols)
            part = self._part(window, rows, cols)
        self._copy_in(op, tile, part, shape)
        return Value(Read(tile.view()), shape)

    def _part(self, window: list[Expr], rows: Scalar, cols: Scalar) -> _Part:
        """The rectangle of the block inside the bounds."""
        frame, plan = self.frame, self.plan
        low = {plan.row: ZERO, plan.col: ZERO}
        high = {plan.row: rows, plan.col: cols}
        allowed: Scalar = ONE
        for bound in window:
            affine = bound.affine()
            assert affine is not None
            dim = next((d for d in affine.coefficients if d in low), None)
            if dim is None:
                allowed = allowed * frame.scalar(bound).ge(0)
                continue
            k = affine.coefficients[dim]
            assert isinstance(k, Const)
            rest = frame.scalar(bound - k * Var(dim))
            if k.value > 0:  # k i + rest >= 0: i from ceil(-rest / k) on
                first = -(rest // k.value) - frame.bound[dim]
                low[dim] = maximum(low[dim], first)
            else:
                end = rest // -k.value + 1 - frame.bound[dim]
                high[dim] = minimum(high[dim], end)
        corner, size = {}, {}
        for dim, name, limit in ((plan.row, "row", rows), (plan.col, "col", cols)):
            start = self.b.let(f"{name}_from", minimum(low[dim], limit))
            stop = select(allowed, maximum(high[dim], start), start)
            corner[name] = start
            size[name] = self.b.let(f"{name}_count", stop - start)
        return _Part(corner["row"], corner["col"], size["row"], size["col"])

    def _steps(self, index: Expr) -> tuple[Expr, Expr]:
        affine = index.affine()
        assert affine is not None
        zero = Const(0)
        kr = zero if self.plan.row is None else affine.coefficients.get(self.plan.row, zero)
        kc = zero if self.plan.col is None else affine.coefficients.get(self.plan.col, zero)
        return kr, kc

    def _copy_in(self, op: Load, tile: Tile, part: _Part, shape: str) -> None:
        size = self.memory(op.param).bits // 8
        kr, kc = self._steps(op.index)
        row_step, col_step = self.frame.scalar(kr), self.frame.scalar(kc)
        start = self.frame.scalar(op.index) + part.row * row_step + part.col * col_step
        offset, name = start * size, self.names[op.param]
        down, across = row_step * size, col_step * size
        view = tile.view(part.row, part.col)
        if shape == COLUMN or kc == Const(1):
            cols = ONE if shape == COLUMN else part.cols
            self.b.load(view, Access(name, offset, down), part.rows, cols)
        elif shape == ROW:
            self.b.load(
                view, Access(name, offset, across), part.cols, 1, row_stride=tile.element_bytes
            )
        elif kr == Const(1):
            turned = self.b.tile(tile.dtype, tile.cols, tile.rows, name=f"{name}_columns")
            self.b.load(turned, Access(name, offset, across), part.cols, part.rows)
            self.b.transpose(view, turned, part.cols, part.rows)
        else:
            self.b.load(
                view, Access(name, offset, across, down), part.cols, 1, part.rows,
                row_stride=tile.element_bytes, plane_stride=tile.row_bytes,
            )  # fmt: skip

    def _gather(self, op: Load, shape: str, dtype: DType) -> Value:
        frame, name = self.frame, self.names[op.param]
        size = self.memory(op.param).bits // 8
        rows, cols = frame.extents(shape)
        tile = frame.tile(dtype, shape, name)
        masks = () if op.mask is None else (op.mask,)
        base = self._row_base(op.index, masks)
        if shape == COLUMN or base is not None:
            index = self._index_tile(op.index if base is None else base, op.mask, COLUMN)
            start = ZERO if base is None else frame.bound[self.plan.col] * size
            self.b.gather(tile, Access(name, start, Int(size)), index, rows, cols)
        else:
            index = self._index_tile(op.index, op.mask, shape)
            with self.b.loop("row", 0, rows) as row:
                single = self.b.tile(dtype, frame.max_cols, 1, name=f"{name}_elements")
                access = Access(name, ZERO, Int(size))
                self.b.gather(single, access, View(index.tile, row), cols, 1)
                self.b.transpose(tile.view(row), single, cols, 1)
        found: Tree = Read(tile.view())
        if op.mask is not None:
            other = splat(float(op.other) if dtype.is_float else int(op.other))
            wanted = frame.operand(frame.values[op.mask], shape)
            found = frame.keep(apply("select", wanted, found, other), shape)
        return Value(found, shape)

    # Stores --------------------------------------------------------------------------------------

    def store(self, number: int, op: Store) -> None:
        dims = self.dims[number]
        condition = self.frame.once(dims)
        if condition == ONE:
            self._store(op, dims)
        else:
            with self.b.when(condition):
                self._store(op, dims)

    def _store(self, op: Store, dims: frozenset[int]) -> None:
        frame, shape = self.frame, self.plan.shape(dims)
        mem = self.memory(op.param)
        add = op.mode == "add"
        if add and mem not in (DType.F32, DType.BF16, DType.I32):
            raise CompileError(
                f"loop nest: accumulation into p{op.param}",
                "an accumulating store adds to float32, bfloat16 or int32",
                f"the type is {self.nest.params[op.param].dtype}",
                "accumulate in int32 and convert afterwards",
            )
        tree = frame.operand(frame.values[op.value], shape)
        tree = convert(
            tree, self.nest.value_dtype(op.value), self.nest.params[op.param].dtype
        )
        if mem is DType.I8:
            tree = unsaturated(tree)
        source = self._source(tree, shape, mem, add)
        rows, cols = frame.extents(shape)
        if self.plan.row not in dims:
            rows = ONE
        affine = op.index.affine()
        if affine is None or affine.refs:
            self._scatter(op, source, shape, rows, cols)
            return
        kr, kc = self._steps(op.index)
        spread = (shape != COLUMN and kc == Const(0)) or (rows != ONE and kr == Const(0))
        if spread:  # several values for one element: the last one stays
            self._scatter(op, source, shape, rows, cols)
        elif add and self.plan.serial and rows != ONE and shape == FULL:
            # Rows may overlap: one after the other, as sums are made in row-major order.
            step = frame.scalar(kr) * (mem.bits // 8)
            with self.b.loop("row", 0, rows) as row:
                view = View(source.tile, row)
                self._copy_out(op, view, ROW, ONE, cols, kr, kc, row * step)
        else:
            self._copy_out(op, source, shape, rows, cols, kr, kc)

    def _source(self, tree: Tree, shape: str, mem: DType, add: bool) -> View:
        """A tile that holds what is stored; the vector engine rounds to bfloat16 or saturates to
        int8 by the way, a store command what was there before."""
        if isinstance(tree, Read) and tree.view.row == tree.view.col == ZERO:
            return tree.view
        dtype = mem if mem in (DType.BF16, DType.I8) and not add else None
        return self.frame.stored(tree, shape, dtype, name="out").view()

    def _copy_out(
        self, op: Store, source: View, shape: str, rows: Scalar, cols: Scalar, kr: Expr, kc: Expr,
        start: Scalar = ZERO,
    ) -> None:
        size = self.memory(op.param).bits // 8
        name, tile = self.names[op.param], source.tile
        offset = self.frame.scalar(op.index) * size + start
        down, across = self.frame.scalar(kr) * size, self.frame.scalar(kc) * size
        add = op.mode == "add"
        if shape == COLUMN or kc == Const(1):
            self.b.store(Access(name, offset, down), source, rows, cols, accumulate=add)
        elif shape == ROW:
            self.b.store(
                Access(name, offset, across), source, cols, 1, accumulate=add,
                row_stride=tile.element_bytes,
            )  # fmt: skip
        elif kr == Const(1):
            turned = self.b.tile(tile.dtype, tile.cols, tile.rows, name=f"{name}_columns")
            self.b.transpose(turned, source, rows, cols)
            self.b.store(Access(name, offset, across), turned, cols, rows, accumulate=add)
        else:
            self.b.store(
                Access(name, offset, across, down), source, cols, 1, rows, accumulate=add,
                row_stride=tile.element_bytes, plane_stride=tile.row_bytes,
            )  # fmt: skip

    def _scatter(
        self, op: Store, source: View, shape: str, rows: Scalar, cols: Scalar
    ) -> None:
        frame, name = self.frame, self.names[op.param]
        size = self.memory(op.param).bits // 8
        add = op.mode == "add"
        base = self._row_base(op.index, ()) if shape == FULL or shape == ROW else None
        if shape == COLUMN or base is not None:
            index = self._index_tile(op.index if base is None else base, None, COLUMN)
            start = ZERO if base is None else frame.bound[self.plan.col] * size
            access = Access(name, start, Int(size))
            self.b.scatter(access, source, index, rows, cols, accumulate=add)
            return
        index = self._index_tile(op.index, None, shape)
        access = Access(name, ZERO, Int(size))
        with self.b.loop("row", 0, rows) as row:
            single = self.b.tile(source.tile.dtype, frame.max_cols, 1, name=f"{name}_elements")
            self.b.transpose(single, View(source.tile, row), 1, cols)
            view = View(index.tile, row)
            self.b.scatter(access, single, view, cols, 1, accumulate=add)


def _bfloat16(value: float) -> float:
    """A float32 with the lower half of its bits dropped: equal to it where bfloat16 is exact."""
    bits = struct.unpack("<I", struct.pack("<f", round_to_float32(value)))[0]
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
