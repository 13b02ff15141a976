"""Tile IR with placements to command IR: every tile operation becomes the words of one command.

This is where a kernel's rules are checked, with the user's line: dtypes that a command cannot
take, tiles in the wrong memory, extents beyond a tile (where both are constants).
"""

from __future__ import annotations

from pagoda.compiler.allocate import Placement
from pagoda.compiler.command_ir import Control, Issue, LoadWord
from pagoda.compiler.errors import CompileError
from pagoda.compiler.scalar import (
    ONE,
    ZERO,
    Int,
    Offset,
    Scalar,
    Slot,
    Variable,
    binary,
    is_boolean,
    scalar,
    select,
    wrap,
)
from pagoda.compiler.schedule import Operand, Reserve, Rotate, Vector
from pagoda.compiler.tile_ir import (
    LOCAL_DTYPES,
    STATE_LANES,
    Access,
    Barrier,
    Body,
    Declare,
    Dot,
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
    Tile,
    Transpose,
    Trap,
    View,
)
from pagoda.isa.accumulation import ReduceOp
from pagoda.isa.commands import ACC_BIT, COMMANDS, CONTROL, SCALAR, TILE
from pagoda.isa.functions import FUNCTION_CODES
from pagoda.isa.numbers import DType


def lower(kernel: Kernel, placements: dict[Tile, Placement]) -> Body:
    """The kernel's command IR. `kernel` holds `Vector` commands instead of element-wise trees.

    Raises CompileError for an operation that no command can do.
    """
    lowering = _Lowering(kernel, placements)
    body = lowering.body(kernel.body)
    return (*lowering.prologue, *body)


class _Lowering:
    def __init__(self, kernel: Kernel, placements: dict[Tile, Placement]):
        self.kernel = kernel
        self.placements = placements
        # A rotating tile's address starts at its last buffer: each declaration moves on by one.
        self.prologue = [
            Let(_address_name(tile), Int(_last_buffer(tile, where)))
            for tile, where in placements.items()
            if where.buffers > 1
        ]

    def body(self, body: Body) -> Body:
        result: list[Statement] = []
        for statement in body:
            result += self.statement(statement)
        return tuple(result)

    def statement(self, statement: Statement) -> list[Statement]:
        place = statement.location
        match statement:
            case For(variable, start, stop, step, body):
                return [For(variable, start, stop, step, self.body(body), location=place)]
            case If(condition, then, otherwise):
                return [If(condition, self.body(then), self.body(otherwise), location=place)]
            case Let():
                return [statement]
            case ReadWord(name, source):
                self._expect(
                    source.tile.memory == "sram" and source.tile.dtype in (DType.I32, DType.F32),
                    statement, f"tile {source.tile.name}",
                    "a word is read from an I32 or F32 tile in SRAM", _describe(source.tile),
                    "load the value into an I32 SRAM tile first",
                )  # fmt: skip
                return [LoadWord(name, self.address(source), location=place)]
            case Declare(tile):
                return self.declare(tile, statement)
            case Reserve(tile, cursors):
                where = self.placements[tile]
                last = Int(_last_buffer(tile, where))
                return [Let(_address_name(c), last, location=place) for c in cursors]
            case Rotate(tile):
                return self.rotate(tile, statement)
            case Barrier():
                return [Control(CONTROL["barrier"], ZERO, location=place)]
            case Trap(code):
                return [Control(CONTROL["trap"], code, location=place)]
            case Load() | Store():
                name, fields = self.transfer(statement)
            case Gather() | Scatter():
                name, fields = self.indexed(statement)
            case Dot():
                name, fields = "matmul", self.dot(statement)
            case Vector():
                name, fields = "vector", self.vector(statement)
            case Reduce():
                name, fields = "reduce", self.reduce(statement)
            case Finish():
                name, fields = "finish", self.finish(statement)
            case Transpose():
                name, fields = "transpose", self.transpose(statement)
            case Iota():
                name, fields = "iota", self.iota(statement)
            case _:
                raise TypeError(f"no such statement: {statement!r}")
        return [_issue(name, fields, statement)]

    # Tiles ---------------------------------------------------------------------------------------

    def declare(self, tile: Tile, statement: Statement) -> list[Statement]:
        allowed = LOCAL_DTYPES if tile.memory == "sram" else (DType.F32, DType.I32)
        names = ", ".join(d.name for d in allowed)
        self._expect(
            tile.dtype in allowed, statement, f"tile {tile.name}",
            f"a tile in {tile.memory.upper()} holds {names}", f"its dtype is {tile.dtype.name}",
            "use one of those; loads and stores convert",
        )  # fmt: skip
        return self.rotate(tile, statement)

    def rotate(self, tile: Tile, statement: Statement) -> list[Statement]:
        where = self.placements[tile.storage]
        if where.buffers == 1:
            return []
        name = _address_name(tile)
        last = Int(_last_buffer(tile, where))
        following = Variable(name) + where.stride
        rotated = select(Variable(name).eq(last), _base(tile, where), following)
        return [Let(name, rotated, location=statement.location)]

    def address(self, view: View) -> Scalar:
        """Local address of a view's first element, with the bit that marks ACC."""
        tile, where = view.tile, self.placements[view.tile.storage]
        base = Variable(_address_name(tile)) if where.buffers > 1 else Int(_base(tile, where))
        return base + view.row * tile.row_bytes + view.col * tile.element_bytes

    def _expect(
        self, holds: bool, statement: Statement, what: str, rule: str, value: str, remedy: str
    ) -> None:
        if not holds:
            place = statement.location or self.kernel.location
            raise CompileError(what, rule, value, remedy, place)

    def _fits(self, statement: Statement, view: View, rows: Scalar, cols: Scalar) -> None:
        """Constant extents stay within the tile (run-time ones are the kernel's business)."""
        for name, start, extent, limit in (
            ("rows", view.row, rows, view.tile.rows),
            ("columns", view.col, cols, view.tile.cols),
        ):
            end = start + extent
            self._expect(
                not isinstance(end, Int) or end.value <= limit, statement,
                f"tile {view.tile.name}", f"an operation stays within its {limit} {name}",
                f"this one reaches {end}", "declare a larger tile or use smaller extents",
            )  # fmt: skip

    # Commands ------------------------------------------------------------------------------------

    def window(self, access: Access) -> dict[str, Scalar | int]:
        return {
            "slot": Slot(access.tensor),
            "offset": Offset(access.tensor) + access.offset,
            "mem_row_stride": access.row_stride,
        }

    def formats(self, statement: Statement, access: Access, tile: Tile) -> dict[str, int]:
        mem = self.kernel.tensor(access.tensor).dtype
        self._expect(
            mem.is_float == tile.dtype.is_float, statement,
            f"tensor {access.tensor} and tile {tile.name}",
            "a transfer converts float to float or integer to integer",
            f"they are {mem.name} and {tile.dtype.name}",
            "give the tile a dtype of the tensor's class and convert with i2f or f2i",
        )  # fmt: skip
        return {"mem": int(mem), "local": int(tile.dtype)}

    def transfer(self, statement: Load | Store) -> tuple[str, dict[str, Scalar | int]]:
        load = isinstance(statement, Load)
        view = statement.destination if load else statement.source
        access = statement.source if load else statement.destination
        if statement.row_stride is None and statement.planes == ONE:
            self._fits(statement, view, statement.rows, statement.cols)
        row_stride = scalar(view.tile.row_bytes)
        if statement.row_stride is not None:
            row_stride = statement.row_stride
        single = statement.planes == ONE
        plane_stride = statement.plane_stride
        if plane_stride is None:
            plane_stride = ZERO if single else statement.rows * row_stride
        fields: dict[str, Scalar | int] = {
            **self.formats(statement, access, view.tile),
            **self.window(access),
            "address": self.address(view),
            "cols": statement.cols,
            "rows": statement.rows,
            "planes": statement.planes,
            "mem_plane_stride": ZERO if single else access.plane_stride,
            "row_stride": row_stride,
            "plane_stride": plane_stride,
        }
        if not load:
            mem = self.kernel.tensor(access.tensor).dtype
            self._expect(
                not statement.accumulate or mem in (DType.F32, DType.I32, DType.BF16), statement,
                f"tensor {access.tensor}", "an accumulating store adds to F32, I32 or BF16",
                f"its dtype is {mem.name}", "accumulate in a tile and store once",
            )  # fmt: skip
            return "store", fields | {"accumulate": int(statement.accumulate)}
        (above, below), (left, right) = statement.pad_rows, statement.pad_cols
        pads = {"pad_above": above, "pad_below": below, "pad_left": left, "pad_right": right}
        return "load", fields | pads

    def indexed(self, statement: Gather | Scatter) -> tuple[str, dict[str, Scalar | int]]:
        gather = isinstance(statement, Gather)
        view = statement.destination if gather else statement.source
        access = statement.source if gather else statement.destination
        index = statement.index.tile
        self._expect(
            index.memory == "sram" and index.dtype == DType.I32, statement,
            f"index tile {index.name}", "row indices are I32 in SRAM", _describe(index),
            "load or convert the indices into an I32 SRAM tile",
        )  # fmt: skip
        self._fits(statement, view, statement.rows, statement.cols)
        fields: dict[str, Scalar | int] = {
            **self.formats(statement, access, view.tile),
            **self.window(access),
            "address": self.address(view),
            "cols": statement.cols,
            "rows": statement.rows,
            "indices": self.address(statement.index),
            "row_stride": view.tile.row_bytes,
        }
        if gather:
            return "gather", fields
        return "scatter", fields | {"accumulate": int(statement.accumulate)}

    def dot(self, dot: Dot) -> dict[str, Scalar | int]:
        a, b, acc = dot.a.tile, dot.b.tile, dot.acc.tile
        wanted = {DType.BF16: (0, DType.F32), DType.I8: (1, DType.I32)}.get(a.dtype)
        self._expect(
            wanted is not None and b.dtype == a.dtype and acc.dtype == wanted[1], dot, "dot",
            "BF16 x BF16 accumulates in F32 and I8 x I8 in I32",
            f"its tiles are {a.dtype.name} x {b.dtype.name} in {acc.dtype.name}",
            "load or convert the operands to one of these",
        )  # fmt: skip
        self._expect(
            a.memory == "sram" and b.memory == "sram" and acc.memory == "acc", dot, "dot",
            "the operands are in SRAM and the result in ACC",
            f"they are in {a.memory}, {b.memory} and {acc.memory}",
            "declare the tiles in those memories",
        )  # fmt: skip
        outer = [*dot.a_outer, *((ONE, ZERO),) * (2 - len(dot.a_outer))]
        self._expect(
            not dot.transpose_a or (not dot.a_outer and dot.k_outer[0] == ONE), dot, "dot",
            "a transposed A has one row count and one run of k", "it has more",
            "drop transpose_a or the outer counts",
        )  # fmt: skip
        if not dot.a_outer:
            rows, cols = (dot.k, dot.m) if dot.transpose_a else (dot.m, dot.k)
            if dot.k_outer[0] == ONE:
                self._fits(dot, dot.a, rows, cols)
            self._fits(dot, dot.acc, dot.m, dot.n)
        if dot.k_outer[0] == ONE:
            rows, cols = (dot.n, dot.k) if dot.transpose_b else (dot.k, dot.n)
            self._fits(dot, dot.b, rows, cols)
        return {
            "type": wanted[0] if wanted else 0,
            "accumulate": _flag(dot.accumulate),
            "transpose_a": int(dot.transpose_a),
            "transpose_b": int(dot.transpose_b),
            "a": self.address(dot.a),
            "m0": dot.m,
            "m0_stride": a.row_bytes,
            "m1": outer[0][0],
            "m1_stride": outer[0][1],
            "m2": outer[1][0],
            "m2_stride": outer[1][1],
            "k_inner": dot.k,
            "k_outer": dot.k_outer[0],
            "k_outer_stride": dot.k_outer[1],
            "b": self.address(dot.b),
            "b_stride": b.row_bytes,
            "n": dot.n,
            "acc": self.address(dot.acc),
            "acc_stride": acc.row_bytes,
        }

    def vector(self, vector: Vector) -> dict[str, Scalar | int]:
        fields: dict[str, Scalar | int] = {
            "f1": FUNCTION_CODES[vector.f1],
            "f2": FUNCTION_CODES[vector.f2],
            "dst_dtype": int(vector.dtype),
            "dst": self.address(vector.destination),
            "dst_stride": vector.destination.tile.row_bytes,
            "rows": vector.rows,
            "cols": vector.cols,
        }
        self._fits(vector, vector.destination, vector.rows, vector.cols)
        for name, operand in (("a", vector.a), ("b", vector.b), ("c", vector.c)):
            if operand is not None:
                rows = ONE if operand.repeat else vector.rows
                cols = vector.cols if operand.layout == TILE else ONE
                if operand.view is not None:
                    self._fits(vector, operand.view, rows, cols)
                fields |= self.operand(name, operand)
        return fields

    def operand(self, name: str, operand: Operand) -> dict[str, Scalar | int]:
        fields: dict[str, Scalar | int] = {
            f"{name}_dtype": int(operand.dtype),
            f"{name}_kind": operand.layout,
        }
        if operand.layout == SCALAR:
            return fields | {name: operand.value}
        assert operand.view is not None
        stride = 0 if operand.repeat else operand.view.tile.row_bytes
        return fields | {name: self.address(operand.view), f"{name}_stride": stride}

    def reduce(self, reduce: Reduce) -> dict[str, Scalar | int]:
        op, state, source = reduce.op, reduce.state.tile, reduce.source.tile
        lanes = DType.I32 if op.startswith("i") else DType.F32
        width = STATE_LANES * (2 if op == "argmax" else 1)
        self._expect(
            source.dtype.is_float == lanes.is_float and state.dtype == lanes, reduce,
            f"reduction {op}", f"its state is {lanes.name} and its source of that class",
            f"they are {state.dtype.name} and {source.dtype.name}", "convert the source first",
        )  # fmt: skip
        self._expect(
            reduce.axis == "col" or state.cols >= width, reduce, f"reduction {op}",
            f"the state has {width} columns", f"tile {state.name} has {state.cols}",
            f"declare it rows x {width}",
        )  # fmt: skip
        self._expect(
            reduce.axis == "row" or op != "argmax", reduce, "reduction argmax",
            "it runs along rows", "the axis is col", "transpose the tile first",
        )  # fmt: skip
        self._fits(reduce, reduce.source, reduce.rows, reduce.cols)
        return {
            "op": int(ReduceOp[op.upper()]),
            "first": _flag(reduce.first),
            "column": int(reduce.axis == "col"),
            "dtype": int(source.dtype),
            "src": self.address(reduce.source),
            "src_stride": source.row_bytes,
            "rows": reduce.rows,
            "cols": reduce.cols,
            "state": self.address(reduce.state),
            "state_stride": state.row_bytes,
            "start": reduce.start,
        }

    def finish(self, finish: Finish) -> dict[str, Scalar | int]:
        self._fits(finish, finish.destination, finish.rows, ONE)
        return {
            "op": int(ReduceOp[finish.op.upper()]),
            "dtype": int(finish.destination.tile.dtype),
            "state": self.address(finish.state),
            "state_stride": finish.state.tile.row_bytes,
            "rows": finish.rows,
            "dst": self.address(finish.destination),
            "dst_stride": finish.destination.tile.row_bytes,
        }

    def transpose(self, transpose: Transpose) -> dict[str, Scalar | int]:
        source, target = transpose.source.tile, transpose.destination.tile
        self._expect(
            source.dtype == target.dtype, transpose, "transpose", "both tiles have one dtype",
            f"they are {source.dtype.name} and {target.dtype.name}", "convert before or after",
        )  # fmt: skip
        self._fits(transpose, transpose.source, transpose.rows, transpose.cols)
        self._fits(transpose, transpose.destination, transpose.cols, transpose.rows)
        return {
            "dtype": int(source.dtype),
            "src": self.address(transpose.source),
            "src_stride": source.row_bytes,
            "rows": transpose.rows,
            "cols": transpose.cols,
            "dst": self.address(transpose.destination),
            "dst_stride": target.row_bytes,
        }

    def iota(self, iota: Iota) -> dict[str, Scalar | int]:
        tile = iota.destination.tile
        self._expect(
            tile.dtype == DType.I32, iota, "iota", "it writes an I32 tile", _describe(tile),
            "declare an I32 tile and convert with i2f",
        )  # fmt: skip
        self._fits(iota, iota.destination, iota.rows, iota.cols)
        return {
            "dst": self.address(iota.destination),
            "dst_stride": tile.row_bytes,
            "rows": iota.rows,
            "cols": iota.cols,
            "start": iota.start,
            "row_step": iota.row_step,
            "col_step": iota.col_step,
        }


def _issue(name: str, fields: dict[str, Scalar | int], statement: Statement) -> Issue:
    """Fields to words: those that share a word are put together, at run time where need be."""
    command = COMMANDS[name]
    words: dict[int, Scalar] = {0: ZERO}
    for field_name, value in fields.items():
        field, value = command.by_name[field_name], scalar(value)
        if isinstance(value, Int):
            part: Scalar = Int(wrap(field.insert(value.value)))
        else:
            part = value * Int(1 << field.low) if field.low else value
        words[field.word] = binary("+", words.get(field.word, ZERO), part)
    go = words.pop(0)
    ordered = tuple(sorted(words.items()))
    return Issue(command.bank, ordered, go, location=statement.location)


def _flag(value: Scalar) -> Scalar:
    """0 or 1, whatever the scalar."""
    return value if is_boolean(value) else value.ne(ZERO)


def _address_name(tile: Tile) -> str:
    return f"{tile.name}.address"


def _base(tile: Tile, where: Placement) -> int:
    return wrap(where.address | (ACC_BIT if tile.memory == "acc" else 0))


def _last_buffer(tile: Tile, where: Placement) -> int:
    return wrap(_base(tile, where) + (where.buffers - 1) * where.stride)


def _describe(tile: Tile) -> str:
    return f"tile {tile.name} is {tile.dtype.name} in {tile.memory.upper()}"
