"""Row reductions of loop nests: a state of 64 lanes a row, fed block by block.

What the chip lacks is composed: an integer minimum is the complement of the maximum of complements,
argmin is argmax of the negated values, a product multiplies in 64 lanes (element i goes to lane
i mod 64, as in a sum) and folds them by halves.
"""

from __future__ import annotations

from pagoda.compiler.loop_nest import Reduce
from pagoda.compiler.nest_frame import Frame, Value
from pagoda.compiler.nest_plan import COLUMN, FULL, ROW
from pagoda.compiler.pointwise import check_dtype, convert, is_float, wrapped
from pagoda.compiler.scalar import ONE, ZERO, Scalar, minimum
from pagoda.compiler.tile_ir import STATE_LANES, Read, Tile, Tree, View, apply, splat
from pagoda.isa.numbers import DType

_FLOAT = {"sum": "fsum", "max": "fmax", "min": "fmin", "argmax": "argmax", "argmin": "argmax"}
_INT = {"sum": "isum", "max": "imax", "min": "imax", "any": "imax"}


class Reduction:
    """One `Reduce` for one block of rows. Either `whole`, or `begin` and then `add` per block of
    columns; then `result`. dtype: of the reduced value."""

    def __init__(self, frame: Frame, op: Reduce, dtype: str):
        check_dtype(dtype, f"reduction {op.kind}")
        self.frame, self.b = frame, frame.b
        self.op, self.dtype = op, dtype
        self.float = is_float(dtype)
        self.shape = FULL if frame.plan.row is not None else ROW
        self.product = op.kind == "prod"
        self.function = "" if self.product else (_FLOAT if self.float else _INT)[op.kind]
        lanes = 2 * STATE_LANES if self.function == "argmax" else STATE_LANES
        kind = DType.F32 if self.float else DType.I32
        self.state: Tile = self.b.tile(kind, frame.max_rows, lanes, name="state")

    def begin(self) -> None:
        """The state before any element."""
        if self.product:
            self.b.elementwise(self.state, self._one(), self.frame.rows, STATE_LANES)
            return
        # No columns: the source is not read.
        self.b.reduce(self.function, self.state, self.state, self.frame.rows, 0, first=1)

    def add(self, value: Value) -> None:
        """The block's columns; they start at a multiple of 64."""
        start = self.frame.bound[self.frame.plan.col]
        self._reduce(self._source(value), ZERO, start)

    def whole(self, value: Value) -> None:
        """All columns at once."""
        source = self._source(value)
        if self.product:
            self.begin()
        self._reduce(source, ONE, ZERO)

    def _one(self) -> Tree:
        return splat(1.0) if self.float else splat(1)

    def _source(self, value: Value) -> View:
        tree = self.frame.operand(value, self.shape)
        if self.op.kind == "argmin":
            tree = apply("fneg", tree)
        elif self.op.kind == "min" and not self.float:
            tree = apply("xor", tree, splat(-1))
        return self.frame.whole(tree, self.shape)

    def _reduce(self, source: View, first: Scalar, start: Scalar) -> None:
        rows, cols = self.frame.rows, self.frame.cols
        if not self.product:
            self.b.reduce(self.function, self.state, source, rows, cols, first=first, start=start)
            return
        multiply = "fmul" if self.float else "imul"
        with self.b.loop("lane", 0, cols, STATE_LANES) as lane:
            state = self.state.view()
            chunk = Read(source.tile.view(0, lane))
            width = minimum(STATE_LANES, cols - lane)
            self.b.elementwise(state, apply(multiply, Read(state), chunk), rows, width)

    def result(self) -> Value:
        """One value per row, converted to the operation's type."""
        frame = self.frame
        if self.product:
            tree = self._folded()
        else:
            kind = DType.F32 if self.float and self.function != "argmax" else DType.I32
            tile = frame.tile(kind, COLUMN, self.op.kind)
            self.b.finish(self.function, tile, self.state, frame.rows)
            tree = Read(tile.view())
        if self.op.kind == "min" and not self.float:
            tree = apply("xor", tree, splat(-1))
        elif self.op.kind == "any":
            tree = apply("imax", tree, splat(0))
        if self.op.kind in ("sum", "prod") and not self.float:
            tree = wrapped(tree, self.op.dtype)
        if self.function != "argmax" and self.op.kind != "any":
            tree = convert(tree, self.dtype, self.op.dtype)
        return Value(frame.keep(tree, COLUMN), COLUMN)

    def _folded(self) -> Tree:
        multiply = "fmul" if self.float else "imul"
        current, width = self.state, STATE_LANES // 2
        while width:
            halves = Read(current.view()), Read(current.view(0, width))
            folded = self.b.tile(self.state.dtype, self.frame.max_rows, width, name="folded")
            self.b.elementwise(folded, apply(multiply, *halves), self.frame.rows, width)
            current, width = folded, width // 2
        return Read(current.view())
