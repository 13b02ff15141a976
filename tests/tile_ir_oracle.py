"""What a tile IR kernel means, executed statement by statement with numpy.

Local storage holds 32-bit lanes already converted to the tile's dtype; memory is bytes. Elements
never written are poisoned, so that reading them shows in the result, and every access is checked
against its tile and its tensor. Cores run one after another; `run` raises when one core touches a
byte that another writes (kernels with barriers are not supported).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pagoda.compiler.scalar import _FOLD as OPERATIONS
from pagoda.compiler.scalar import (
    Argument,
    Binary,
    CoreCount,
    CoreId,
    Int,
    Scalar,
    Select,
    Size,
    Stride,
    Variable,
    wrap,
)
from pagoda.compiler.tile_ir import (
    Access,
    Apply,
    Column,
    Declare,
    Elementwise,
    Finish,
    For,
    Gather,
    If,
    Iota,
    Kernel,
    Let,
    Load,
    Read,
    ReadWord,
    Reduce,
    Row,
    Scatter,
    Splat,
    Statement,
    Store,
    Tile,
    Transpose,
    Trap,
    Tree,
    View,
)
from pagoda.isa import accumulation, numbers, tables
from pagoda.isa.numbers import DType, decode, encode, lane_bits

POISON = np.uint32(0x7FBADBAD)

_FLOAT_FUNCTIONS = {
    "fadd": numbers.fadd, "fsub": numbers.fsub, "fmul": numbers.fmul, "fdiv": numbers.fdiv,
    "fmax": numbers.fmax, "fmin": numbers.fmin, "flt": numbers.lt, "fle": numbers.le,
    "feq": numbers.eq, "fne": numbers.ne, "fgt": numbers.gt, "fge": numbers.ge,
    "fneg": numbers.fneg, "fabs": numbers.fabs, "fsqrt": numbers.fsqrt, "ffloor": numbers.floor,
    "fceil": numbers.ceil, "ftrunc": numbers.trunc, "fround": numbers.round_even,
    "exp2": tables.exp2, "log2": tables.log2, "recip": tables.reciprocal, "rsqrt": tables.rsqrt,
    "sin2pi": tables.sin2pi, "f2i": numbers.f2i, "faddq": numbers.faddq, "fma": numbers.ffma,
    "as_int": lambda x: x,
}  # fmt: skip
_INT_FUNCTIONS = {
    "i2f": numbers.i2f, "i2b": lambda x: (x != 0).astype(np.int32), "iadd": numbers.iadd,
    "isub": numbers.isub, "imul": numbers.imul, "imax": numbers.imax, "imin": numbers.imin,
    "and": numbers.iand, "or": numbers.ior, "xor": numbers.ixor, "shl": numbers.shl,
    "shr": numbers.shr, "sra": numbers.sra, "idiv": numbers.idiv, "imod": numbers.imod,
    "ilt": numbers.lt, "ile": numbers.le, "ieq": numbers.eq, "ine": numbers.ne,
    "as_float": lambda x: x, "i2fmul": lambda x, y: numbers.i2fmul(x, y.view(np.float32)),
}  # fmt: skip


def evaluate_tree(tree: Tree, leaf, scalar, known: dict | None = None) -> np.ndarray:
    """The uint32 lanes of a tree. `leaf(node)` gives the lanes of an operand that reads a tile,
    `scalar(expression)` the value of a splat. Common subtrees (by identity) run once."""
    known = {} if known is None else known
    if id(tree) in known:
        return known[id(tree)]
    if isinstance(tree, Splat):
        result = np.asarray(scalar(tree.value) & 0xFFFFFFFF, np.uint32)
    elif isinstance(tree, Apply):
        arguments = [evaluate_tree(a, leaf, scalar, known) for a in tree.arguments]
        if tree.function == "select":
            result = numbers.select(*arguments)
        elif tree.function in _FLOAT_FUNCTIONS:
            arguments = [a.view(np.float32) for a in arguments]
            result = lane_bits(_FLOAT_FUNCTIONS[tree.function](*arguments))
        else:
            arguments = [a.view(np.int32) for a in arguments]
            result = lane_bits(_INT_FUNCTIONS[tree.function](*arguments))
    else:
        result = leaf(tree)
    known[id(tree)] = result
    return result


class Trapped(Exception):
    """A Trap statement was reached."""


class Memory:
    """One tensor parameter: `data` bytes from its first element on, and who touched what."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.readers = np.full(data.size, -1, np.int32)
        self.writers = np.full(data.size, -1, np.int32)

    def read(self, where: np.ndarray, core: int) -> np.ndarray:
        assert not where.size or (where.min() >= 0 and where.max() < self.data.size), "OUT_OF_SLOT"
        assert np.isin(self.writers[where], (-1, core)).all(), "RACE"
        other = (self.readers[where] != -1) & (self.readers[where] != core)
        self.readers[where] = np.where(other, -2, core)
        return self.data[where]

    def write(self, where: np.ndarray, values: np.ndarray, core: int) -> None:
        assert not where.size or (where.min() >= 0 and where.max() < self.data.size), "OUT_OF_SLOT"
        assert np.isin(self.readers[where], (-1, core)).all(), "RACE"
        assert np.isin(self.writers[where], (-1, core)).all(), "RACE"
        self.writers[where] = core
        self.data[where] = values


def run(
    kernel: Kernel,
    tensors: Mapping[str, np.ndarray],
    scalars: Mapping[str, int],
    words: Mapping[tuple[str, str, int], int] | None = None,
    cores: int = 1,
) -> None:
    """Runs a kernel. tensors: a flat numpy array of bytes (uint8) for each tensor parameter,
    written in place; words: values of its run-time sizes and strides."""
    memories = {name: Memory(data) for name, data in tensors.items()}
    for core in range(cores):
        _Core(kernel, memories, scalars, words or {}, core, cores).body(kernel.body)


class _Core:
    def __init__(self, kernel, memories, scalars, words, core: int, cores: int):
        self.kernel, self.memories, self.words = kernel, memories, words
        self.names: dict[str, int] = {}
        self.scalars = dict(scalars)
        self.core, self.cores = core, cores
        self.tiles: dict[Tile, np.ndarray] = {}

    def value(self, s: Scalar) -> int:
        match s:
            case Int(value):
                return value
            case Variable(name):
                return self.names[name]
            case Argument(name):
                return self.scalars[name]
            case Size(tensor, dim):
                return self.words[tensor, "size", dim]
            case Stride(tensor, dim):
                return self.words[tensor, "stride", dim]
            case CoreId():
                return self.core
            case CoreCount():
                return self.cores
            case Binary(op, left, right):
                return wrap(OPERATIONS[op](self.value(left), self.value(right)))
            case Select(condition, yes, no):
                return self.value(yes if self.value(condition) else no)
        raise TypeError(s)

    def body(self, body) -> None:
        for statement in body:
            self.statement(statement)

    def view(self, view: View, rows: int, cols: int) -> np.ndarray:
        row, col = self.value(view.row), self.value(view.col)
        tile = self.tiles[view.tile]
        inside = 0 <= row and row + rows <= tile.shape[0] and 0 <= col
        assert not rows or not cols or (inside and col + cols <= tile.shape[1]), (
            f"{view}: {rows} x {cols} leaves the tile {view.tile}"
        )
        return tile[row : row + rows, col : col + cols]

    def put(self, view: View, lanes: np.ndarray, rows: int, cols: int) -> None:
        target = self.view(view, rows, cols)
        if rows and cols:
            target[:] = _held(np.broadcast_to(lanes, (rows, cols)), view.tile.dtype)

    def place(self, access: Access, rows: int, cols: int, planes: int) -> np.ndarray:
        """Byte offset of every element: (planes, rows, cols)."""
        size = self.kernel.tensor(access.tensor).dtype.bits // 8
        p, r, c = np.ogrid[:planes, :rows, :cols]
        plane, row = self.value(access.plane_stride), self.value(access.row_stride)
        return self.value(access.offset) + p * plane + r * row + c * size

    def bytes_of(self, tensor: str, where: np.ndarray) -> np.ndarray:
        size = self.kernel.tensor(tensor).dtype.bits // 8
        return where[..., None] + np.arange(size)

    def fetch(self, tensor: str, where: np.ndarray) -> np.ndarray:
        raw = self.memories[tensor].read(self.bytes_of(tensor, where), self.core)
        lanes, _ = decode(raw, self.kernel.tensor(tensor).dtype)
        return lanes[..., 0] if where.size else np.zeros(where.shape, np.uint32)

    def write_back(self, tensor: str, where: np.ndarray, lanes: np.ndarray, add: bool) -> None:
        dtype = self.kernel.tensor(tensor).dtype
        for k in np.ndindex(where.shape[:-1]):
            values = lanes[k]
            if add:
                old = self.fetch(tensor, where[k])
                kind = np.float32 if dtype.is_float else np.int32
                plus = numbers.fadd if dtype.is_float else numbers.iadd
                values = lane_bits(plus(old.view(kind), np.ascontiguousarray(values).view(kind)))
            raw = encode(np.ascontiguousarray(values)[:, None], dtype)
            self.memories[tensor].write(self.bytes_of(tensor, where[k]), raw, self.core)

    def statement(self, statement: Statement) -> None:
        v = self.value
        match statement:
            case For(variable, start, stop, step, body):
                for number in range(v(start), v(stop), v(step)):
                    self.names[variable] = number
                    self.body(body)
            case If(condition, then, otherwise):
                self.body(then if v(condition) else otherwise)
            case Let(name, value):
                self.names[name] = v(value)
            case ReadWord(name, source):
                self.names[name] = int(self.view(source, 1, 1).view(np.int32)[0, 0])
            case Declare(tile):
                self.tiles[tile] = np.full((tile.rows, tile.cols), POISON)
            case Trap(code):
                raise Trapped(v(code))
            case Load():
                self.load(statement)
            case Store():
                self.store(statement)
            case Gather(destination, source, index, rows, cols):
                rows, cols = v(rows), v(cols)
                where = self.indexed(source, index, rows, cols)
                if rows and cols:
                    self.put(destination, self.fetch(source.tensor, where), rows, cols)
            case Scatter(destination, source, index, rows, cols, accumulate):
                rows, cols = v(rows), v(cols)
                where = self.indexed(destination, index, rows, cols)
                lanes = self.view(source, rows, cols)
                if rows and cols:
                    self.write_back(destination.tensor, where, lanes, accumulate)
            case Elementwise(destination, tree, rows, cols):
                rows, cols = v(rows), v(cols)
                if rows and cols:
                    lanes = evaluate_tree(tree, lambda n: self.leaf(n, rows, cols), v)
                    self.put(destination, lanes, rows, cols)
            case Reduce():
                self.reduce(statement)
            case Finish(op, destination, state, rows):
                op, rows = accumulation.ReduceOp[op.upper()], v(rows)
                lanes = accumulation.finish(op, self.view(state, rows, op.state_words).copy())
                self.put(destination, lanes[:, None], rows, 1)
            case Transpose(destination, source, rows, cols):
                rows, cols = v(rows), v(cols)
                self.put(destination, self.view(source, rows, cols).T.copy(), cols, rows)
            case Iota(destination, rows, cols, start, row_step, col_step):
                r, c = np.ogrid[: v(rows), : v(cols)]
                lanes = (v(start) + r * v(row_step) + c * v(col_step)) & 0xFFFFFFFF
                self.put(destination, lanes.astype(np.uint32), v(rows), v(cols))
            case _:
                raise TypeError(f"not supported: {statement!r}")

    def leaf(self, node: Tree, rows: int, cols: int) -> np.ndarray:
        match node:
            case Read(view):
                return self.view(view, rows, cols).copy()
            case Row(view):
                return self.view(view, 1, cols).copy()
            case Column(view):
                return self.view(view, rows, 1).copy()
        raise TypeError(node)

    def flat(self, view: View, where: np.ndarray) -> np.ndarray:
        """Positions in a tile's flat elements of byte distances from a view's start."""
        start = self.value(view.row) * view.tile.cols + self.value(view.col)
        return start + where // view.tile.element_bytes

    def local(self, s: Load | Store, view: View) -> np.ndarray:
        rows, cols, planes = (self.value(x) for x in (s.rows, s.cols, s.planes))
        row = view.tile.row_bytes if s.row_stride is None else self.value(s.row_stride)
        plane = rows * row if s.plane_stride is None else self.value(s.plane_stride)
        p, r, c = np.ogrid[:planes, :rows, :cols]
        size = view.tile.element_bytes
        assert rows <= 1 or row >= cols * size, "BAD_FIELD: rows overlap"
        assert planes <= 1 or plane >= (rows - 1) * row + cols * size, "BAD_FIELD: planes overlap"
        return self.flat(view, p * plane + r * row + c * size)

    def load(self, s: Load) -> None:
        assert s.pad_rows[0] == s.pad_cols[0] == Int(0), "padding is not supported"
        where = self.place(s.source, *(self.value(x) for x in (s.rows, s.cols, s.planes)))
        if where.size:
            tile = s.destination.tile
            to = self.local(s, s.destination)
            assert to.max() < tile.rows * tile.cols and to.min() >= 0, f"outside {tile}"
            self.tiles[tile].reshape(-1)[to] = _held(self.fetch(s.source.tensor, where), tile.dtype)

    def store(self, s: Store) -> None:
        where = self.place(s.destination, *(self.value(x) for x in (s.rows, s.cols, s.planes)))
        if where.size:
            tile = s.source.tile
            from_ = self.local(s, s.source)
            assert from_.max() < tile.rows * tile.cols and from_.min() >= 0, f"outside {tile}"
            assert np.unique(where).size == where.size, "BAD_FIELD: stored rows overlap"
            lanes = self.tiles[tile].reshape(-1)[from_]
            self.write_back(s.destination.tensor, where, lanes, s.accumulate)

    def indexed(self, access: Access, index: View, rows: int, cols: int) -> np.ndarray:
        first = self.value(index.row) * index.tile.cols + self.value(index.col)
        words = self.tiles[index.tile].reshape(-1)[first : first + rows].view(np.int32)
        assert index.tile.dtype == DType.I32 and words.size == rows
        size = self.kernel.tensor(access.tensor).dtype.bits // 8
        start = self.value(access.offset) + words.astype(np.int64) * self.value(access.row_stride)
        return start[:, None] + np.arange(cols) * size

    def reduce(self, s: Reduce) -> None:
        assert s.axis == "row"
        rows, cols, start = self.value(s.rows), self.value(s.cols), self.value(s.start)
        assert start % 64 == 0
        op = accumulation.ReduceOp[s.op.upper()]
        first = self.value(s.first)
        old = (
            np.tile(accumulation.initial_state(op), (rows, 1))
            if first
            else self.view(s.state, rows, op.state_words).copy()
        )
        values = self.view(s.source, rows, cols).copy()
        self.put(s.state, accumulation.reduce_row(op, old, values, start), rows, op.state_words)


def _held(lanes: np.ndarray, dtype: DType) -> np.ndarray:
    """Lanes as a tile of this dtype gives them back."""
    lanes = np.ascontiguousarray(lanes)
    shape = lanes.shape
    return decode(encode(lanes.reshape(-1, 1), dtype), dtype)[0].reshape(shape)
