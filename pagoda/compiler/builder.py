"""`KernelBuilder`: build a tile IR kernel by calling methods, one per statement.

Tiles and scalars are passed as they are; views default to the whole tile, extents to the tile's
maximum. Locations: set `b.location` (or pass `at=`) and following statements carry it.

    b = KernelBuilder("row_sum")
    x = b.tensor("x", DType.BF16, 2)                 # sizes and strides at run time
    y = b.tensor("y", DType.F32, 1, strides=(4,))    # stride fixed: no argument word
    rows, cols = x.size(0), x.size(1)
    with b.loop("i", CoreId() * 16, rows, CoreCount() * 16) as i:
        r = b.let("r", minimum(16, rows - i))
        state = b.tile(DType.F32, 16, 64)
        with b.loop("j", 0, cols, 256) as j:
            c = b.let("c", minimum(256, cols - j))
            chunk = b.tile(DType.BF16, 16, 256)      # in a loop: rotates over buffers
            b.load(chunk, x.at(i, j), r, c)
            b.reduce("fsum", state, chunk, r, c, first=j.eq(0), start=j)
        total = b.tile(DType.F32, 16, 1)
        b.finish("fsum", total, state, r)
        b.store(y.at(i, rows=0), total, r, 1)        # dim 0 of y is the row dimension
    kernel = b.build()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from pagoda.compiler.errors import Location
from pagoda.compiler.scalar import Argument, Int, Scalar, Size, Stride, Variable, scalar
from pagoda.compiler.tile_ir import (
    Access,
    Barrier,
    Body,
    Declare,
    Dot,
    Elementwise,
    Finish,
    For,
    Gather,
    If,
    Iota,
    Kernel,
    Let,
    Load,
    ReadWord,
    Reduce,
    Scatter,
    Statement,
    Store,
    Tensor,
    Tile,
    Transpose,
    Trap,
    Tree,
    View,
)
from pagoda.isa.numbers import DType

Number = Scalar | int
Place = Tile | View


class TensorHandle:
    """A tensor parameter while building: its sizes, strides and windows."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def size(self, dim: int) -> Scalar:
        """Extent in elements."""
        fixed = self.tensor.sizes[dim]
        return Size(self.tensor.name, dim % self.tensor.rank) if fixed is None else Int(fixed)

    def stride(self, dim: int) -> Scalar:
        """Stride in bytes."""
        fixed = self.tensor.strides[dim]
        return Stride(self.tensor.name, dim % self.tensor.rank) if fixed is None else Int(fixed)

    def at(self, *index: Number, rows: int | None = None, planes: int | None = None) -> Access:
        """The window that starts at element `index` (missing indices are 0).

        rows, planes: the dimensions whose strides separate rows and planes; by default the last but
        one and the last but two. The last dimension is the columns: its stride must be one element.
        """
        rank = self.tensor.rank
        offset: Scalar = Int(0)
        for dim, position in enumerate(index):
            offset = offset + scalar(position) * self.stride(dim)
        rows = rank - 2 if rows is None else rows
        planes = rank - 3 if planes is None else planes
        row_stride = self.stride(rows) if rows >= 0 else Int(0)
        return Access(
            self.tensor.name, offset, row_stride, self.stride(planes) if planes >= 0 else Int(0)
        )


def _view(place: Place) -> View:
    return place.view() if isinstance(place, Tile) else place


class KernelBuilder:
    """Collects statements; `loop` and `when` are context managers that open a body."""

    def __init__(self, name: str, location: Location | None = None):
        self.name = name
        self.location = location
        self._start = location
        self._tensors: list[Tensor] = []
        self._scalars: list[str] = []
        self._blocks: list[tuple[str, int]] = []
        self._bodies: list[list[Statement]] = [[]]
        self._names: set[str] = set()

    # Parameters ----------------------------------------------------------------------------------

    def tensor(
        self,
        name: str,
        dtype: DType,
        rank: int,
        *,
        sizes: Sequence[int | None] | None = None,
        strides: Sequence[int | None] | None = None,
    ) -> TensorHandle:
        """A tensor parameter; sizes (elements) and strides (bytes) fixed where not None."""
        self._names.add(name)
        fixed = tuple(sizes or (None,) * rank), tuple(strides or (None,) * rank)
        self._tensors.append(Tensor(name, DType(dtype), *fixed))
        return TensorHandle(self._tensors[-1])

    def scalar(self, name: str) -> Scalar:
        """A 32-bit scalar parameter (for a float its bits: use it in `splat(..., "float")`)."""
        self._names.add(name)
        self._scalars.append(name)
        return Argument(name)

    def block(self, name: str, value: int) -> int:
        """Record a compile-time parameter; returns its value."""
        self._blocks.append((name, value))
        return value

    # Control -------------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """`name`, or `name_2`, ... if taken."""
        found, number = name, 1
        while found in self._names:
            number += 1
            found = f"{name}_{number}"
        self._names.add(found)
        return found

    def emit(self, statement: Statement) -> None:
        if statement.location is None and self.location is not None:
            statement = replace(statement, location=self.location)
        self._bodies[-1].append(statement)

    def open_body(self) -> list[Statement]:
        """The list that `emit` appends to now."""
        return self._bodies[-1]

    @contextmanager
    def body(self) -> Iterator[list[Statement]]:
        """Statements emitted inside go to the list it yields."""
        collected: list[Statement] = []
        self._bodies.append(collected)
        yield collected
        self._bodies.pop()

    @contextmanager
    def loop(
        self, name: str, start: Number, stop: Number, step: Number = 1, *, ahead: int = 0
    ) -> Iterator[Variable]:
        """`for name in range(start, stop, step)`; yields the loop variable. ahead: see `For`."""
        variable = Variable(self.fresh(name))
        location = self.location
        with self.body() as inside:
            yield variable
        bounds = scalar(start), scalar(stop), scalar(step)
        self.emit(For(variable.name, *bounds, tuple(inside), ahead, location=location))

    @contextmanager
    def when(self, condition: Scalar, otherwise: Body = ()) -> Iterator[None]:
        """`if condition:`; `otherwise`: statements of the else branch, collected with `body`."""
        location = self.location
        with self.body() as inside:
            yield
        self.emit(If(condition, tuple(inside), tuple(otherwise), location=location))

    def let(self, name: str, value: Number) -> Scalar:
        """Evaluate once, here; constants and plain names are returned as they are."""
        value = scalar(value)
        if not value.children():
            return value
        name = self.fresh(name)
        self.emit(Let(name, value))
        return Variable(name)

    def read_word(self, name: str, source: Place) -> Variable:
        """The int32 at the start of an SRAM tile or view; waits for the commands that write it."""
        name = self.fresh(name)
        self.emit(ReadWord(name, _view(source)))
        return Variable(name)

    def barrier(self) -> None:
        self.emit(Barrier())

    def trap(self, code: Number) -> None:
        self.emit(Trap(scalar(code)))

    # Tiles ---------------------------------------------------------------------------------------

    def tile(
        self,
        dtype: DType,
        rows: int,
        cols: int,
        *,
        name: str = "t",
        memory: Literal["sram", "acc"] = "sram",
        buffers: int | None = None,
    ) -> Tile:
        """Declare a tile here."""
        tile = Tile(self.fresh(name), DType(dtype), rows, cols, memory, buffers)
        self.emit(Declare(tile))
        return tile

    def load(
        self,
        destination: Place,
        source: Access,
        rows: Number | None = None,
        cols: Number | None = None,
        planes: Number = 1,
        *,
        pad_rows: tuple[Number, Number] = (0, 0),
        pad_cols: tuple[Number, Number] = (0, 0),
        row_stride: Number | None = None,
        plane_stride: Number | None = None,
    ) -> None:
        view = _view(destination)
        self.emit(
            Load(
                view, source, *_extents(view, rows, cols), scalar(planes),
                (scalar(pad_rows[0]), scalar(pad_rows[1])),
                (scalar(pad_cols[0]), scalar(pad_cols[1])),
                _optional(row_stride), _optional(plane_stride),
            )
        )  # fmt: skip

    def store(
        self,
        destination: Access,
        source: Place,
        rows: Number | None = None,
        cols: Number | None = None,
        planes: Number = 1,
        *,
        accumulate: bool = False,
        row_stride: Number | None = None,
        plane_stride: Number | None = None,
    ) -> None:
        view = _view(source)
        self.emit(
            Store(
                destination, view, *_extents(view, rows, cols), scalar(planes), accumulate,
                _optional(row_stride), _optional(plane_stride),
            )
        )  # fmt: skip

    def gather(
        self,
        destination: Place,
        source: Access,
        index: Place,
        rows: Number | None = None,
        cols: Number | None = None,
    ) -> None:
        view = _view(destination)
        self.emit(Gather(view, source, _view(index), *_extents(view, rows, cols)))

    def scatter(
        self,
        destination: Access,
        source: Place,
        index: Place,
        rows: Number | None = None,
        cols: Number | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        view = _view(source)
        extents = _extents(view, rows, cols)
        self.emit(Scatter(destination, view, _view(index), *extents, accumulate))

    def dot(
        self,
        acc: Place,
        a: Place,
        b: Place,
        m: Number,
        n: Number,
        k: Number,
        *,
        accumulate: Number = 0,
        transpose_a: bool = False,
        transpose_b: bool = False,
        a_outer: Sequence[tuple[Number, Number]] = (),
        k_outer: tuple[Number, Number] = (1, 0),
    ) -> None:
        self.emit(
            Dot(
                _view(acc), _view(a), _view(b), scalar(m), scalar(n), scalar(k),
                scalar(accumulate), transpose_a, transpose_b,
                tuple((scalar(c), scalar(s)) for c, s in a_outer),
                (scalar(k_outer[0]), scalar(k_outer[1])),
            )
        )  # fmt: skip

    def elementwise(
        self,
        destination: Place,
        tree: Tree,
        rows: Number | None = None,
        cols: Number | None = None,
    ) -> None:
        view = _view(destination)
        self.emit(Elementwise(view, tree, *_extents(view, rows, cols)))

    def reduce(
        self,
        op: str,
        state: Place,
        source: Place,
        rows: Number | None = None,
        cols: Number | None = None,
        *,
        axis: Literal["row", "col"] = "row",
        first: Number = 1,
        start: Number = 0,
    ) -> None:
        view = _view(source)
        extents = _extents(view, rows, cols)
        self.emit(Reduce(op, _view(state), view, *extents, axis, scalar(first), scalar(start)))

    def finish(
        self, op: str, destination: Place, state: Place, rows: Number | None = None
    ) -> None:
        view = _view(destination)
        self.emit(Finish(op, view, _view(state), _extents(view, rows, None)[0]))

    def transpose(
        self,
        destination: Place,
        source: Place,
        rows: Number | None = None,
        cols: Number | None = None,
    ) -> None:
        """rows, cols: of the source."""
        view = _view(source)
        self.emit(Transpose(_view(destination), view, *_extents(view, rows, cols)))

    def iota(
        self,
        destination: Place,
        rows: Number | None = None,
        cols: Number | None = None,
        *,
        start: Number = 0,
        row_step: Number = 0,
        col_step: Number = 1,
    ) -> None:
        view = _view(destination)
        steps = scalar(start), scalar(row_step), scalar(col_step)
        self.emit(Iota(view, *_extents(view, rows, cols), *steps))

    def build(self) -> Kernel:
        """The finished kernel."""
        assert len(self._bodies) == 1, "build() inside an open loop or branch"
        return Kernel(
            self.name,
            tuple(self._tensors),
            tuple(self._scalars),
            tuple(self._bodies[0]),
            tuple(self._blocks),
            self._start,
        )


def _extents(view: View, rows: Number | None, cols: Number | None) -> tuple[Scalar, Scalar]:
    tile = view.tile
    return scalar(tile.rows if rows is None else rows), scalar(tile.cols if cols is None else cols)


def _optional(value: Number | None) -> Scalar | None:
    return None if value is None else scalar(value)
