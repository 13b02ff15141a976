"""The functions of the kernel language: integers, loops, loads and stores, matrix products."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pagoda.compiler.builder import TensorHandle
from pagoda.compiler.scalar import (
    ONE,
    ZERO,
    CoreCount,
    CoreId,
    Int,
    Scalar,
    ceildiv,
    maximum,
    minimum,
    scalar,
)
from pagoda.compiler.tile_ir import (
    LOCAL_DTYPES,
    Access,
    Declare,
    Elementwise,
    Let,
    Tile,
    splat,
)
from pagoda.compiler.values import (
    Constant,
    Expression,
    Operand,
    Product,
    Range,
    Shape,
    TileValue,
    Window,
    broadcast,
    fixed_range,
    tiles_read,
    tree_of,
)
from pagoda.isa.numbers import DType

if TYPE_CHECKING:
    from pagoda.compiler.interpret import Interpreter
    from pagoda.compiler.nest_epilogue import Epilogue

LOOPS = ("range", "tiles", "core_tiles")


@dataclass
class Iteration:
    """Bounds of a loop; block: None for plain integers."""

    start: Scalar
    stop: Scalar
    step: Scalar
    block: int | None = None
    ahead: int = 0
    shifted: bool = False  # blocks do not begin at multiples of their size

    def room(self, variable: Scalar) -> Scalar:
        """Indices of the iteration that starts at `variable`."""
        stop, block = self.stop, self.block or 1
        if isinstance(stop, Int) and stop.value and stop.value % block == 0 and not self.shifted:
            return Int(block)
        return minimum(block, stop - variable)

    def at_least_one(self) -> Scalar:
        """A stop that makes the body run once even for an empty extent."""
        return self.stop if isinstance(self.stop, Int) and self.stop.value > 0 else maximum(
            self.stop, self.start + 1
        )


class TileBuiltins:
    """The functions, over one interpreter's builder."""

    def __init__(self, interpreter: Interpreter):
        self.interpreter = interpreter
        self.builder = interpreter.builder
        self.unfilled: dict[str, _Unfilled] = {}  # accumulators not yet written, by tile name
        self.products_in: list[Range] = []

    def fail(self, what: str, rule: str, value: str, remedy: str) -> Any:
        self.interpreter.fail(what, rule, value, remedy)

    # Integers and loops --------------------------------------------------------------------------

    def let_again(self, name: str, value: Scalar) -> Let:
        return Let(name, value, location=self.builder.location)

    def float_argument(self, value: Scalar) -> Constant:
        return Constant(splat(value, "float"))

    def iteration(self, node: ast.expr) -> Iteration:
        name = ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
        if name not in LOOPS:
            self.fail(
                f"loop over `{ast.unparse(node)}`",
                "a loop runs over range(...), tiles(...) or core_tiles(...)",
                "this is something else", "use one of them",
            )  # fmt: skip
        values = [self.interpreter.expression(argument) for argument in node.args]
        if name == "range":
            bounds = [scalar(v) for v in values]
            start, stop = (ZERO, bounds[0]) if len(bounds) == 1 else bounds[:2]
            return Iteration(start, stop, bounds[2] if len(bounds) > 2 else ONE)
        if len(values) != 2 or not isinstance(values[1], int) or values[1] < 1:
            self.fail(
                f"`{ast.unparse(node)}`", f"{name}(extent, BLOCK) takes a compile-time BLOCK >= 1",
                f"the arguments are {', '.join(map(str, values))}", "pass BLOCK after *",
            )  # fmt: skip
        extent, block = scalar(values[0]), values[1]
        options = {k.arg: self.interpreter.expression(k.value) for k in node.keywords}
        ahead = options.pop("ahead", 0)
        first = scalar(options.pop("start", ZERO)) if name == "tiles" else ZERO
        if options or not isinstance(ahead, int):
            known = "ahead=, a compile-time integer" + ", and start=" * (name == "tiles")
            self.fail(
                f"`{ast.unparse(node)}`", f"options are {known}",
                f"it is given {', '.join(map(str, options)) or ahead}", "remove the others",
            )  # fmt: skip
        if name == "tiles":
            shifted = first is not ZERO
            return Iteration(first, extent, Int(block), block, ahead, shifted)
        start = self.builder.let("first", CoreId() * block)
        step = self.builder.let("stride", CoreCount() * block)
        return Iteration(start, extent, step, block, ahead)

    def do_core_id(self) -> Scalar:
        return CoreId()

    def do_core_count(self) -> Scalar:
        return CoreCount()

    def do_cdiv(self, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            return -(-left // right)
        return ceildiv(left, right)

    def do_block(self, number: Any, extent: Any, size: int, start: Any = ZERO) -> Range:
        shifted = start is not ZERO
        start = self.builder.let("start", scalar(start) + scalar(number) * size)
        room = Int(size)
        if shifted or not (isinstance(extent, int) and extent % size == 0):
            room = self.builder.let("room", minimum(size, scalar(extent) - start))
        return Range(start, room, size)

    def do_full(self, extent: Any) -> Range:
        extent = extent.value if isinstance(extent, Int) else extent
        if not isinstance(extent, int):
            self.fail(
                "full(extent)", "the extent is known at compile time", "it is a run-time integer",
                "fix the size in the TensorType, or loop with tiles(extent, BLOCK)",
            )  # fmt: skip
        return fixed_range(extent)

    def method_size(self, tensor: TensorHandle, dim: int) -> Any:
        value = tensor.size(dim)
        return value.value if isinstance(value, Int) else value

    def method_stride(self, tensor: TensorHandle, dim: int) -> Any:
        value = tensor.stride(dim)
        return value.value if isinstance(value, Int) else value

    def do_word(self, value: Any) -> Scalar:
        tile = self.materialise(value, "word")
        return self.builder.read_word("word", tile.view)

    def do_barrier(self) -> None:
        self.builder.barrier()

    def do_trap(self, code: Any) -> None:
        self.builder.trap(code)

    # Tiles ---------------------------------------------------------------------------------------

    def _declare(
        self,
        name: str,
        dtype: DType,
        shape: Shape,
        memory: Literal["sram", "acc"] = "sram",
        buffers: int | None = None,
    ) -> TileValue:
        tile = self.builder.tile(
            dtype, shape.max_rows, shape.max_cols, name=name, memory=memory, buffers=buffers
        )
        return TileValue(tile.view(), shape)

    def operand(self, value: Any) -> Operand:
        """A tile, expression or number as an operand of tile arithmetic."""
        if isinstance(value, TileValue):
            self.fill(value.tile)
            return self._upright(value)
        if isinstance(value, (Constant, Expression)):
            return value
        if isinstance(value, (bool, int, float, Scalar)):
            return Constant(splat(int(value) if isinstance(value, bool) else value))
        return self.fail(
            "tile arithmetic", "its operands are tiles and numbers", f"one is {value!r}",
            "load(...) a window first",
        )  # fmt: skip

    def _upright(self, value: TileValue) -> TileValue:
        """The value in storage of its own orientation."""
        if not value.transposed:
            return value
        turned = self._declare(f"{value.tile.name}_t", value.tile.dtype, value.shape)
        self.builder.transpose(turned.view, value.view, value.shape.cols, value.shape.rows)
        return turned

    def _turned(self, value: TileValue) -> TileValue:
        """The value in storage of the other orientation."""
        shape = Shape(
            value.shape.max_cols, value.shape.max_rows, value.shape.cols, value.shape.rows
        )
        if value.transposed:
            return TileValue(value.view, shape)
        return self._upright(TileValue(value.view, shape, transposed=True))

    def expression(self, function: str, kind: str, *operands: Operand) -> Expression:
        shapes = [o.shape for o in operands if not isinstance(o, Constant)]
        if not shapes:
            self.fail(
                f"{function}", "at least one operand is a tile", "all are numbers",
                "compute it outside the kernel",
            )  # fmt: skip
        return Expression(function, operands, broadcast(shapes), kind)

    def materialise(self, value: Any, name: str = "t", dtype: DType | None = None) -> TileValue:
        """The value in a tile; expressions become F32 or I32 unless `to` or dtype says else."""
        if isinstance(value, TileValue):
            return value
        if isinstance(value, Product):
            acc = self.zeros_of(value, name)
            self.accumulate(acc, value)
            return acc
        value = self.operand(value)
        if isinstance(value, Constant):
            self.fail(
                f"`{name}`", "a number is no tile", "a tile is wanted", "add it to a tile",
            )  # fmt: skip
        lanes = DType.F32 if value.kind == "float" else DType.I32
        target = self._declare(name, dtype or value.dtype or lanes, value.shape)
        self._compute(target, value)
        return target

    def compute_into(self, target: TileValue, value: Any) -> None:
        """Change a tile in place."""
        self.fill(target.tile)
        value = self.operand(value)
        rows, cols = value.shape.max_rows, value.shape.max_cols
        if value.kind != target.kind or (rows, cols) != (
            target.shape.max_rows, target.shape.max_cols,
        ):  # fmt: skip
            self.fail(
                "assignment in a loop", "a tile from outside the loop keeps its shape and class",
                f"it is {target.kind} {target.shape}, the new value {value.kind} {value.shape}",
                "use another name, or to_int / to_float",
            )  # fmt: skip
        own = [t for t in tiles_read(value) if t.tile == target.tile]
        if any(t.shape != target.shape and t.view != target.view for t in own):
            value = self.materialise(value)
        self._compute(target, value)

    def _compute(self, target: TileValue, value: Operand) -> None:
        shape = replace(value.shape, max_rows=target.shape.max_rows)
        tree = tree_of(value, shape)
        self.builder.elementwise(target.view, tree, shape.rows, shape.cols)

    def part(self, value: TileValue, rows: Any, cols: Any) -> TileValue:
        """x[i, k]: ranges, or ints that pick one row or column."""
        self.fill(value.tile)
        ranges = [
            index if isinstance(index, Range) else Range(scalar(index), ONE, 1)
            for index in (rows, cols)
        ]
        shape = Shape(ranges[0].block, ranges[1].block, ranges[0].size, ranges[1].size)
        row, col = (ranges[1], ranges[0]) if value.transposed else ranges
        view = replace(
            value.view, row=value.view.row + row.start, col=value.view.col + col.start
        )
        return replace(value, view=view, shape=shape)

    # Memory --------------------------------------------------------------------------------------

    def _window(self, window: Any, what: str) -> Window:
        if not isinstance(window, Window):
            self.fail(
                what, "it takes a window of a tensor", f"this is {window!r}",
                "index a tensor: x[i, j]",
            )  # fmt: skip
        if len(window.ranges()) not in (1, 2) and not self._indexed(window):
            self.fail(
                what, "a window has one or two ranges",
                f"{window.tensor.tensor.name} is indexed with {len(window.ranges())}",
                "fix the other dimensions with integers",
            )  # fmt: skip
        return window

    def _indexed(self, window: Window) -> bool:
        return any(isinstance(index, TileValue) for index in window.index)

    def _offset(self, window: Window) -> Scalar:
        offset: Scalar = ZERO
        for dim, index in enumerate(window.index):
            if not isinstance(index, TileValue):
                start = index.start if isinstance(index, Range) else index
                offset = offset + start * window.tensor.stride(dim)
        return offset

    def _plan(self, window: Window) -> tuple[Range, Range, int | None, int]:
        """Row range, column range, and their dimensions (no row dimension: one row)."""
        dims = window.ranges()
        ranges = [window.index[dim] for dim in dims]
        if len(dims) == 1:
            return Range(ZERO, ONE, 1), ranges[0], None, dims[0]
        return ranges[0], ranges[1], dims[0], dims[1]

    def _contiguous(self, window: Window, dim: int | None) -> bool:
        if dim is None:
            return False
        tensor = window.tensor.tensor
        return tensor.strides[dim] == max(tensor.dtype.bits // 8, 1) or tensor.sizes[dim] == 1

    def do_load(
        self, window: Any, dtype: DType | None = None, buffers: int | None = None
    ) -> TileValue:
        window = self._window(window, "load")
        tensor = window.tensor.tensor
        local = dtype or _local_dtype(tensor.dtype)
        if self._indexed(window):
            return self._gather(window, local)
        rows, cols, row_dim, col_dim = self._plan(window)
        offset = self._offset(window)
        row_stride = ZERO if row_dim is None else window.tensor.stride(row_dim)
        shape = Shape(rows.block, cols.block, rows.size, cols.size)
        if self._contiguous(window, col_dim):
            value = self._declare(tensor.name, local, shape, buffers=buffers)
            access = Access(tensor.name, offset, row_stride)
            self.builder.load(value.view, access, rows.size, cols.size)
            return value
        col_stride = window.tensor.stride(col_dim)
        if self._contiguous(window, row_dim):
            turned = Shape(cols.block, rows.block, cols.size, rows.size)
            stored = self._declare(tensor.name, local, turned, buffers=buffers)
            access = Access(tensor.name, offset, col_stride)
            self.builder.load(stored.view, access, cols.size, rows.size)
            return TileValue(stored.view, shape, transposed=True)
        # Element by element, each an atom of its own: slow, but any strides work.
        value = self._declare(tensor.name, local, shape, buffers=buffers)
        access = Access(tensor.name, offset, col_stride, row_stride)
        self.builder.load(
            value.view, access, cols.size, 1, rows.size,
            row_stride=value.tile.element_bytes, plane_stride=value.tile.row_bytes,
        )  # fmt: skip
        return value

    def _gather(self, window: Window, local: DType) -> TileValue:
        """table[rows_tile, j]: the index tile is a column or a row of int32."""
        dim, index = next((d, i) for d, i in enumerate(window.index) if isinstance(i, TileValue))
        ranges = window.ranges()
        tensor = window.tensor.tensor
        if len(ranges) != 1 or ranges[0] < dim or not self._contiguous(window, ranges[0]):
            self.fail(
                f"load of {tensor.name} by an index tile",
                "the index tile is followed by one range over the contiguous dimension",
                f"there are {len(ranges)} ranges", "index it as table[rows, j]",
            )  # fmt: skip
        cols = window.index[ranges[0]]
        count = index.shape.rows if index.shape.max_cols == 1 else index.shape.cols
        block = max(index.shape.max_rows, index.shape.max_cols)
        value = self._declare(tensor.name, local, Shape(block, cols.block, count, cols.size))
        access = Access(tensor.name, self._offset(window), window.tensor.stride(dim))
        self.builder.gather(value.view, access, index.view, count, cols.size)
        return value

    def do_store(self, window: Any, value: Any) -> None:
        self._store(window, value, "store", accumulate=False)

    def do_add_to(self, window: Any, value: Any) -> None:
        self._store(window, value, "add_to", accumulate=True)

    def _store(self, window: Any, value: Any, what: str, accumulate: bool) -> None:
        window = self._window(window, what)
        tensor = window.tensor.tensor
        if isinstance(value, Expression):
            same = tensor.dtype.is_float == (value.kind == "float")
            narrow = tensor.dtype in LOCAL_DTYPES and same and not accumulate
            value = self.materialise(value, tensor.name, tensor.dtype if narrow else None)
        else:
            value = self.materialise(value, tensor.name)
            self.fill(value.tile)
        rows, cols, row_dim, col_dim = self._plan(window)
        for name, found, wanted in (
            ("rows", value.shape.max_rows, rows.block),
            ("columns", value.shape.max_cols, cols.block),
        ):  # fmt: skip
            if found != wanted:
                self.fail(
                    f"{what} to {tensor.name}", f"the tile has the window's {wanted} {name}",
                    f"it has {found}", "index the window with the tile's own ranges",
                )  # fmt: skip
        offset = self._offset(window)
        row_stride = ZERO if row_dim is None else window.tensor.stride(row_dim)
        if self._contiguous(window, col_dim):
            value = self._upright(value)
            access = Access(tensor.name, offset, row_stride)
            self.builder.store(access, value.view, rows.size, cols.size, accumulate=accumulate)
            return
        col_stride = window.tensor.stride(col_dim)
        if self._contiguous(window, row_dim):
            stored = self._turned(value)
            access = Access(tensor.name, offset, col_stride)
            self.builder.store(access, stored.view, cols.size, rows.size, accumulate=accumulate)
            return
        value = self._upright(value)
        with self.builder.loop("row", 0, rows.size) as row:  # element by element, each an atom
            access = Access(tensor.name, offset + row * row_stride, col_stride)
            view = replace(value.view, row=value.view.row + row)
            self.builder.store(
                access, view, cols.size, 1, accumulate=accumulate,
                row_stride=value.tile.element_bytes,
            )  # fmt: skip

    def do_finish_with(self, epilogue: Epilogue, window: Any, x: Any) -> None:
        """A window of a product in row-major order, rounded to the tensor's dtype, goes through
        the epilogue."""
        window = self._window(window, "finish_with")
        i, j, row_dim, _ = self._plan(window)
        tensor = window.tensor.tensor
        if isinstance(x, TileValue):
            self.fill(x.tile)
            if x.tile.dtype == tensor.dtype and not epilogue.keep:
                epilogue.emit(self.builder, x.tile, i, j)
                return
        product = self.builder.tile(tensor.dtype, i.block, j.block, name="product")
        tree = tree_of(self.operand(x), x.shape)
        self.builder.elementwise(product, tree, i.size, j.size)
        if epilogue.keep:
            row_stride = ZERO if row_dim is None else window.tensor.stride(row_dim)
            access = Access(tensor.name, self._offset(window), row_stride)
            self.builder.store(access, product.view(), i.size, j.size)
        epilogue.emit(self.builder, product, i, j)

    # Matrix products -----------------------------------------------------------------------------

    def do_zeros(self, rows: Any, cols: Any, dtype: DType = DType.F32) -> TileValue:
        ranges = [fixed_range(r) if isinstance(r, int) else r for r in (rows, cols)]
        shape = Shape(ranges[0].block, ranges[1].block, ranges[0].size, ranges[1].size)
        return self._zeros("acc", shape, dtype)

    def zeros_of(self, product: Product, name: str) -> TileValue:
        integer = product.a.tile.dtype == DType.I8
        return self._zeros(name, product.shape, DType.I32 if integer else DType.F32)

    def _zeros(self, name: str, shape: Shape, dtype: DType) -> TileValue:
        value = self._declare(name, dtype, shape, "acc")
        body = self.builder.open_body()
        depth = len(self.interpreter.loops)
        self.unfilled[value.tile.name] = _Unfilled(body, len(body), value, depth)
        return value

    def fill(self, tile: Tile) -> None:
        """Write the zeros of an accumulator that is used otherwise than by `+= dot`."""
        waiting = self.unfilled.pop(tile.name, None)
        if waiting is not None:
            zero = splat(0.0 if tile.dtype.is_float else 0)
            view, shape = waiting.value.view, waiting.value.shape
            statement = Elementwise(view, zero, shape.rows, shape.cols)
            declared = waiting.body[waiting.position - 1]
            assert isinstance(declared, Declare)
            place = declared.location
            waiting.body.insert(waiting.position, replace(statement, location=place))

    def do_dot(self, a: Any, b: Any) -> Product:
        a, b = self.materialise(a, "a"), self.materialise(b, "b")
        if a.shape.max_cols != b.shape.max_rows:
            self.fail(
                "dot", "the columns of the first tile are the rows of the second",
                f"they are {a.shape} and {b.shape}", "index both with the same range",
            )  # fmt: skip
        shape = Shape(a.shape.max_rows, b.shape.max_cols, a.shape.rows, b.shape.cols)
        return Product(a, b, shape)

    def accumulate(self, acc: TileValue, product: Product) -> None:
        """acc += a b; the first product of fresh zeros overwrites them instead."""
        a, b = product.a, product.b
        keep: Scalar = ONE
        waiting = self.unfilled.get(acc.tile.name)
        if waiting is not None:
            loops = self.interpreter.loops[waiting.depth :]
            if all(loop is not None and _from_zero(loop) for loop in loops):
                later = [loop.first.eq(ZERO) for loop in loops]
                keep = later[0] if later else ZERO
                for another in later[1:]:
                    keep = maximum(keep, another)
                self.products_in += loops
                del self.unfilled[acc.tile.name]
            else:
                self.fill(acc.tile)
        self.builder.dot(
            acc.view, a.view, b.view, product.shape.rows, product.shape.cols, a.shape.cols,
            accumulate=keep, transpose_a=a.transposed, transpose_b=b.transposed,
        )  # fmt: skip

    def left_loop(self, index: Any) -> bool:
        """Must the loop that just ended run at least once, for a product to overwrite zeros?"""
        found = index in self.products_in
        self.products_in = [other for other in self.products_in if other != index]
        return found


@dataclass
class _Unfilled:
    """An accumulator of zeros nobody wrote yet: where its Declare stands, for a late fill."""

    body: list[Any]
    position: int
    value: TileValue
    depth: int


def _from_zero(loop: Range) -> bool:
    """Is it a loop over tiles(...)? That can run once more for an empty extent."""
    return loop.block > 0 and loop.first == loop.start.eq(ZERO)


def _local_dtype(dtype: DType) -> DType:
    """What a tensor's elements become in SRAM: themselves, or the nearest that holds them."""
    if dtype in LOCAL_DTYPES:
        return dtype
    return DType.F32 if dtype.is_float else DType.I32
