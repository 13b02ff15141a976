"""The functions of the kernel language: arithmetic on tiles and reductions; each `do_NAME` is one.

`builtin_tiles` has the rest: integers and loops, loads and stores, matrix products.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pagoda.compiler.builtin_tiles import LOOPS, TileBuiltins
from pagoda.compiler.scalar import ONE, Int, Scalar, maximum, minimum
from pagoda.compiler.tile_ir import STATE_LANES, splat
from pagoda.compiler.values import (
    Constant,
    Expression,
    Operand,
    Range,
    ReductionState,
    Shape,
    TileValue,
    fixed_range,
)
from pagoda.isa.numbers import DType

__all__ = ["BUILTINS", "LOOPS", "METHODS", "Builtins"]

_FLOAT = {
    "add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv",
    "lt": "flt", "le": "fle", "gt": "fgt", "ge": "fge", "eq": "feq", "ne": "fne",
}  # fmt: skip
_INT = {
    "add": "iadd", "sub": "isub", "mul": "imul", "div": "idiv", "mod": "imod",
    "and": "and", "or": "or", "xor": "xor",
    "lt": "ilt", "le": "ile", "eq": "ieq", "ne": "ine",
}  # fmt: skip
_SWAP = {"gt": "lt", "ge": "le"}
_FLOAT_UNARY = {
    "exp2": "exp2", "log2": "log2", "recip": "recip", "rsqrt": "rsqrt", "sqrt": "fsqrt",
    "sin2pi": "sin2pi", "floor": "ffloor", "ceil": "fceil", "trunc": "ftrunc", "round": "fround",
    "abs": "fabs",
}  # fmt: skip
METHODS = ("size", "stride", "add", "finish")


class Builtins(TileBuiltins):
    """The functions, over one interpreter's builder."""

    # Element by element --------------------------------------------------------------------------

    def arithmetic(self, name: str, symbol: str, left: Any, right: Any) -> Expression:
        x, y = self.operand(left), self.operand(right)
        x, y = self._same_kind(x, y)
        names = _FLOAT if x.kind == "float" else _INT
        if name in _SWAP and x.kind == "int":
            name, x, y = _SWAP[name], y, x
        compares = name in ("lt", "le", "gt", "ge", "eq", "ne")
        if name not in names or (x.kind == "int") != (symbol != "/") and not compares and (
            name == "div"
        ):
            self.fail(
                f"operator {symbol}", f"it is not defined on {x.kind} tiles",
                f"both operands are {x.kind}", "use / on floats, // % & | ^ on integers",
            )  # fmt: skip
        return self.expression(names[name], "int" if compares else x.kind, x, y)

    def _same_kind(self, x: Operand, y: Operand) -> tuple[Operand, Operand]:
        """Python numbers take the other operand's class; tiles must agree."""
        if x.kind != y.kind:
            x, y = self._adapt(x, y.kind), self._adapt(y, x.kind)
        if x.kind != y.kind:
            self.fail(
                "tile arithmetic", "both operands are float or both integer",
                f"they are {x.kind} and {y.kind}", "convert with to_float(...) or to_int(...)",
            )  # fmt: skip
        return x, y

    def _adapt(self, x: Operand, kind: str) -> Operand:
        is_number = isinstance(x, Constant) and isinstance(x.value.value, Int)
        if is_number and x.kind == "int" and kind == "float":
            return Constant(splat(float(x.value.value.value)))
        return x

    def negative(self, value: Any) -> Expression:
        x = self.operand(value)
        if x.kind == "float":
            return self.expression("fneg", "float", x)
        return self.expression("isub", "int", Constant(splat(0)), x)

    def _float_unary(self, function: str, value: Any) -> Expression:
        x = self._float(value, function)
        return self.expression(_FLOAT_UNARY[function], "float", x)

    def _float(self, value: Any, function: str) -> Operand:
        x = self._adapt(self.operand(value), "float")
        if x.kind != "float":
            self.fail(
                function, "it takes float tiles", "this one is integer", "use to_float(...) first"
            )
        return x

    def do_abs(self, value: Any) -> Any:
        x = self.operand(value)
        if x.kind == "int":
            return self.expression("imax", "int", x, self.negative(x))
        return self._float_unary("abs", x)

    def do_where(self, condition: Any, yes: Any, no: Any) -> Expression:
        test = self.operand(condition)
        x, y = self._same_kind(self.operand(yes), self.operand(no))
        if test.kind != "int":
            self.fail(
                "where", "its condition is a comparison", "it is a float tile",
                "write where(x != 0, ...)",
            )  # fmt: skip
        return self.expression("select", x.kind, test, x, y)

    def do_fma(self, a: Any, b: Any, c: Any) -> Expression:
        return self.expression("fma", "float", *(self._float(x, "fma") for x in (a, b, c)))

    def _extreme(self, which: str, left: Any, right: Any) -> Any:
        if not isinstance(left, (TileValue, Expression, Constant)) and not isinstance(
            right, (TileValue, Expression, Constant)
        ):
            return (maximum if which == "max" else minimum)(left, right)
        x, y = self._same_kind(self.operand(left), self.operand(right))
        return self.expression(f"{x.kind[0]}{which}", x.kind, x, y)

    def do_maximum(self, left: Any, right: Any) -> Any:
        return self._extreme("max", left, right)

    def do_minimum(self, left: Any, right: Any) -> Any:
        return self._extreme("min", left, right)

    def do_to(self, value: Any, dtype: DType) -> Expression:
        x = self.operand(value)
        if x.kind != ("float" if dtype.is_float else "int"):
            x = self.do_to_float(x) if dtype.is_float else self.do_to_int(x)
        if isinstance(x, Expression):
            return replace(x, dtype=dtype)
        function = "fmax" if x.kind == "float" else "imax"  # of x and itself: a copy
        return replace(self.expression(function, x.kind, x, x), dtype=dtype)

    def do_to_int(self, value: Any) -> Expression:
        return self.expression("f2i", "int", self._float(value, "to_int"))

    def do_to_float(self, value: Any) -> Expression:
        return self.expression("i2f", "float", self.operand(value))

    def do_iota(
        self, rows: Any, cols: Any, row_step: Any = 0, col_step: Any = 1, start: Any = 0
    ) -> TileValue:
        ranges = [fixed_range(r) if isinstance(r, int) else r for r in (rows, cols)]
        shape = Shape(ranges[0].block, ranges[1].block, ranges[0].size, ranges[1].size)
        value = self._declare("iota", DType.I32, shape)
        self.builder.iota(
            value.view, shape.rows, shape.cols, start=start, row_step=row_step, col_step=col_step
        )
        return value

    # Reductions ----------------------------------------------------------------------------------

    def _reduce(self, which: str, value: Any, axis: int) -> TileValue:
        tile = self._upright(self.materialise(value, which))
        self.fill(tile.tile)
        op = f"{tile.kind[0]}{which}"
        lanes = DType.F32 if tile.kind == "float" else DType.I32
        shape = tile.shape
        if axis == 0:
            result = self._declare(which, lanes, Shape(1, shape.max_cols, ONE, shape.cols))
            self.builder.reduce(op, result.view, tile.view, shape.rows, shape.cols, axis="col")
            return result
        state = self.builder.tile(lanes, shape.max_rows, STATE_LANES, name="state")
        self.builder.reduce(op, state, tile.view, shape.rows, shape.cols)
        result = self._declare(which, lanes, Shape(shape.max_rows, 1, shape.rows, ONE))
        self.builder.finish(op, result.view, state, shape.rows)
        return result

    def do_max(self, value: Any, axis: Any = 1) -> Any:
        if isinstance(value, (int, Scalar)):
            return maximum(value, axis)
        return self._reduce("max", value, axis)

    def do_min(self, value: Any, axis: Any = 1) -> Any:
        if isinstance(value, (int, Scalar)):
            return minimum(value, axis)
        return self._reduce("min", value, axis)

    def do_sum(self, value: Any, axis: int = 1) -> TileValue:
        return self._reduce("sum", value, axis)

    def do_state(self, op: str, rows: Range) -> ReductionState:
        lanes = DType.I32 if op.startswith("i") else DType.F32
        width = STATE_LANES * (2 if op == "argmax" else 1)
        tile = self.builder.tile(lanes, rows.block, width, name="state")
        return ReductionState(op, tile, Shape(rows.block, 1, rows.size, ONE))

    def method_add(self, state: ReductionState, value: Any, cols: Range) -> None:
        tile = self._upright(self.materialise(value, "chunk"))
        self.fill(tile.tile)
        self.builder.reduce(
            state.op, state.tile, tile.view, tile.shape.rows, tile.shape.cols,
            first=cols.first, start=cols.start,
        )  # fmt: skip

    def method_finish(self, state: ReductionState) -> TileValue:
        dtype = DType.I32 if state.op[0] == "i" or state.op == "argmax" else DType.F32
        result = self._declare("result", dtype, state.shape)
        self.builder.finish(state.op, result.view, state.tile, state.shape.rows)
        return result


def _unary_builtin(name: str) -> Any:
    def action(self: Builtins, value: Any) -> Expression:
        return self._float_unary(name, value)

    action.__name__ = f"do_{name}"
    return action


for _name in _FLOAT_UNARY:
    if not hasattr(Builtins, f"do_{_name}"):
        setattr(Builtins, f"do_{_name}", _unary_builtin(_name))
BUILTINS = tuple(name[3:] for name in dir(Builtins) if name.startswith("do_"))
