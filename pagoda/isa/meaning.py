"""What each command computes, as short numpy over its operands' bytes: the living definition.

A meaning reads all its operands, then writes its result; it is called after every check, with what
the command touches and a `Memory`. Arithmetic is `numbers`, `tables` and `accumulation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pagoda.isa import accumulation, numbers, tables
from pagoda.isa.access import Access, DramRows, Tile
from pagoda.isa.accumulation import ReduceOp
from pagoda.isa.commands import SCALAR
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.numbers import U8, U32, DType


class Memory(Protocol):
    """The bytes a command reaches. Rows are in the order of the operand's loops."""

    def read(self, tile: Tile) -> U8:
        """The bytes of a local operand: (rows, row_bytes). May raise FaultRaised."""

    def write(self, tile: Tile, data: U8) -> None:
        """Replace them."""

    def read_dram(self, rows: DramRows) -> U8:
        """The bytes of rows in a slot: (rows, row_bytes)."""

    def write_dram(self, rows: DramRows, data: U8) -> None:
        """Replace them, row after row."""

    def int64_overflowed(self) -> None:
        """An int64 did not fit int32."""


def convert(raw: U8, source: DType, target: DType, memory: Memory) -> U8:
    """Bytes of one element format to another; equal formats copy bits."""
    if source is target:
        return raw
    lanes, overflowed = numbers.decode(raw, source)
    if overflowed:
        memory.int64_overflowed()
    return numbers.encode(lanes, target)


# DMA. ---------------------------------------------------------------------------------------------


def load(touched: Access, memory: Memory) -> None:
    """tile[p, r, c] = convert(slot[p, r - pad_above, c - pad_left]); padding elements are 0.

    offset names the first element really read. Floats convert to floats and integers to integers;
    equal formats copy bits. An int64 that does not fit int32 saturates, and the launch reports
    INT64_OVERFLOW when it ends.
    """
    f, tile = touched.fields, touched.tiles[0]
    element = tile.dtype.bits // 8
    data = np.zeros((f["planes"], f["rows"], tile.row_bytes), np.uint8)
    if touched.dram is not None:
        raw = memory.read_dram(touched.dram)
        values = convert(raw, touched.dram.dtype, tile.dtype, memory)
        top, left = f["pad_above"], f["pad_left"] * element
        bottom, right = f["rows"] - f["pad_below"], left + values.shape[1]
        data[:, top:bottom, left:right] = values.reshape(f["planes"], -1, values.shape[1])
    memory.write(tile, data.reshape(-1, tile.row_bytes))


def store(touched: Access, memory: Memory) -> None:
    """slot[p, r, c] = convert(tile[p, r, c]).

    With accumulate: slot[p, r, c] = convert(slot[p, r, c] + tile[p, r, c]), one addition in F32
    or I32 per element, row after row.
    """
    tile, dram = touched.tiles[0], touched.dram
    raw = memory.read(tile)
    if touched.fields["accumulate"]:
        _accumulate(raw, tile.dtype, dram, memory)
    else:
        memory.write_dram(dram, convert(raw, tile.dtype, dram.dtype, memory))


def gather(touched: Access, memory: Memory) -> None:
    """tile[r, c] = convert(slot[offset + index[r] * mem_row_stride + c]).

    The indices are read and checked before the command enters the window.
    """
    tile, dram = touched.tiles[0], touched.dram
    memory.write(tile, convert(memory.read_dram(dram), dram.dtype, tile.dtype, memory))


def scatter(touched: Access, memory: Memory) -> None:
    """slot[offset + index[r] * mem_row_stride + c] = convert(tile[r, c]), row after row.

    Of equal indices the last row stays; with accumulate they add one after another.
    """
    store(touched, memory)


def _accumulate(raw: U8, local: DType, dram: DramRows, memory: Memory) -> None:
    added, _ = numbers.decode(raw, local)
    for start, row in zip(dram.row_starts(), added, strict=True):
        one = DramRows(dram.slot, int(start), dram.dtype, (), dram.cols, True, True)
        old, _ = numbers.decode(memory.read_dram(one)[0], dram.dtype)
        total = accumulation.combine(ReduceOp.FSUM if local.is_float else ReduceOp.ISUM, old, row)
        memory.write_dram(one, numbers.encode(total, dram.dtype)[None])


# Matrix engine. -----------------------------------------------------------------------------------


def matmul(touched: Access, memory: Memory) -> None:
    """acc[m, n] (+)= sum over k of a[m, k] * b[k, n], for k = 0, 1, 2, ... in this order.

    m = (i2 * m1 + i1) * m0 + i0 is at a + i2 * m2_stride + i1 * m1_stride + i0 * m0_stride;
    k = ko * k_inner + ki is ko * k_outer_stride + ki elements further. bf16 steps are
    fma(a, b, acc) with one rounding, starting from +0.0 or the old acc; int8 steps wrap. Without k
    and without accumulate the result is 0.
    """
    f, acc = touched.fields, touched.tile("acc")
    m, k = acc.loops[0][0], f["k_outer"] * f["k_inner"]
    if f["accumulate"]:
        old = memory.read(acc).view(np.uint32)
    else:
        old = np.zeros((m, f["n"]), np.uint32)
    a, b = np.zeros((m, 0), np.uint32), np.zeros((0, f["n"]), np.uint32)
    if k:
        a, b = (_lanes(touched.tile(name), memory) for name in ("a", "b"))
        a = a.reshape(k, m).T if f["transpose_a"] else a.reshape(m, k)
        b = b.reshape(f["n"], k).T if f["transpose_b"] else b.reshape(k, f["n"])
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if acc.dtype is DType.F32:
        result = accumulation.matmul(a.view(np.float32), b.view(np.float32), old.view(np.float32))
    else:
        narrow = [x.view(np.int32).astype(np.int8) for x in (a, b)]
        result = accumulation.matmul_i8(*narrow, old.view(np.int32))
    memory.write(acc, numbers.encode(result, acc.dtype))


# Vector engine. -----------------------------------------------------------------------------------


def vector(touched: Access, memory: Memory) -> None:
    """dst[r, c] = convert(f2(f1(a[r, c], b[r, c]), c[r, c])).

    Lanes are 32-bit patterns: F32 and I32 as they are, BF16 in the upper half, I8 sign-extended.
    The result is stored as it is (F32, I32), rounded to nearest even (BF16) or saturated (I8).
    A column gives each row one value, a scalar all, a tile with stride 0 its one row to all.
    """
    f = touched.fields
    shape = (f["rows"], f["cols"])
    a, b, c = (_operand(touched, name, memory) for name in "abc")
    first, second = (VECTOR_FUNCTIONS[f[name]].name for name in ("f1", "f2"))
    if first == "select":
        lanes = numbers.select(a, b, c)
    elif second == "fma":
        lanes = numbers.ffma(a.view(np.float32), b.view(np.float32), c.view(np.float32))
    else:
        lanes = apply(second, apply(first, a, b), c)
    dst = touched.tile("dst")
    memory.write(dst, numbers.encode(np.broadcast_to(numbers.lane_bits(lanes), shape), dst.dtype))


def _operand(touched: Access, name: str, memory: Memory) -> U32:
    """Patterns of a vector operand, to be broadcast; zeros if the functions do not read it."""
    for tile in touched.tiles:
        if tile.name == name:
            return _lanes(tile, memory)
    f = touched.fields
    return np.full((1, 1), f[name] if f[f"{name}_kind"] == SCALAR else 0, np.uint32)


def _lanes(tile: Tile, memory: Memory) -> U32:
    return numbers.decode(memory.read(tile), tile.dtype)[0]


def apply(name: str, x: U32, y: U32) -> U32:
    """One vector function on patterns (any shapes that broadcast); fma and select are no such."""
    kind, function = _FUNCTIONS[name]
    operands = (x, y) if _OPERANDS[name] == 2 else (x,)
    return numbers.lane_bits(function(*(np.ascontiguousarray(v).view(kind) for v in operands)))


def _swapped(function: Callable) -> Callable:
    return lambda x, y: function(y, x)


_OPERANDS = {function.name: function.operands for function in VECTOR_FUNCTIONS.values()}
_FUNCTIONS: dict[str, tuple[type, Callable[..., NDArray]]] = {
    name: (np.float32, function)
    for name, function in {
        "fadd": numbers.fadd, "fsub": numbers.fsub, "fmul": numbers.fmul, "fdiv": numbers.fdiv,
        "fmax": numbers.fmax, "fmin": numbers.fmin, "frsub": _swapped(numbers.fsub),
        "frdiv": _swapped(numbers.fdiv), "flt": numbers.lt, "fle": numbers.le, "feq": numbers.eq,
        "fne": numbers.ne, "fgt": numbers.gt, "fge": numbers.ge, "fneg": numbers.fneg,
        "fabs": numbers.fabs, "fsqrt": numbers.fsqrt, "ffloor": numbers.floor,
        "fceil": numbers.ceil, "ftrunc": numbers.trunc, "fround": numbers.round_even,
        "exp2": tables.exp2, "log2": tables.log2, "recip": tables.reciprocal,
        "rsqrt": tables.rsqrt, "sin2pi": tables.sin2pi, "f2i": numbers.f2i,
        "faddq": numbers.faddq,
    }.items()
} | {
    name: (np.int32, function)
    for name, function in {
        "mov": lambda x: x, "i2f": numbers.i2f, "i2b": lambda x: (x != 0).astype(np.int32),
        "iadd": numbers.iadd, "isub": numbers.isub, "imul": numbers.imul, "imax": numbers.imax,
        "imin": numbers.imin, "and": numbers.iand, "or": numbers.ior, "xor": numbers.ixor,
        "shl": numbers.shl, "shr": numbers.shr, "sra": numbers.sra, "ilt": numbers.lt,
        "ile": numbers.le, "ieq": numbers.eq, "ine": numbers.ne, "irsub": _swapped(numbers.isub),
        "idiv": numbers.idiv, "imod": numbers.imod,
        "i2fmul": lambda x, y: numbers.i2fmul(x, y.view(np.float32)),
    }.items()
}  # fmt: skip


def reduce(touched: Access, memory: Memory) -> None:
    """Combine a source tile into a state, element after element.

    Rows: element j of a row is column start + j and goes to lane (start + j) mod 64 of the row's
    state. Columns: the state is one row of cols words, to which the source's rows are combined one
    after another. With first the state starts at -0.0 (fsum), -inf (fmax), +inf (fmin), 0 (isum),
    -2^31 (imax), or -inf and index 2^31 - 1 (argmax).
    """
    f, state = touched.fields, touched.tile("state")
    op = ReduceOp(f["op"])
    source = np.zeros((f["rows"], 0), np.uint32)
    if f["cols"]:
        source = _lanes(touched.tile("src"), memory)
    if f["column"]:
        start = np.full((1, f["cols"]), accumulation.identity(op))
        old = start if f["first"] else _lanes(state, memory)
        result = accumulation.reduce_column(op, old[0], source)[None]
    else:
        start = np.tile(accumulation.initial_state(op), (f["rows"], 1))
        old = start if f["first"] else _lanes(state, memory)
        result = accumulation.reduce_row(op, old, source, f["start"])
    memory.write(state, numbers.encode(result, DType.I32))


def finish(touched: Access, memory: Memory) -> None:
    """dst[r] = the 64 lanes of row r's state folded by the fixed tree: lane i with lane i + 32,
    then + 16, + 8, + 4, + 2, + 1. fsum adds +0.0 last; argmax gives the index (I32).
    """
    state, dst = touched.tile("state"), touched.tile("dst")
    result = accumulation.finish(ReduceOp(touched.fields["op"]), _lanes(state, memory))
    memory.write(dst, numbers.encode(result[:, None], dst.dtype))


def transpose(touched: Access, memory: Memory) -> None:
    """dst[c, r] = src[r, c], bit for bit."""
    source, dst = touched.tile("src"), touched.tile("dst")
    element = source.dtype.bits // 8
    data = memory.read(source).reshape(-1, source.cols, element)
    memory.write(dst, data.transpose(1, 0, 2).reshape(-1, dst.row_bytes))


def iota(touched: Access, memory: Memory) -> None:
    """dst[r, c] = start + r * row_step + c * col_step modulo 2^32, as I32."""
    f = touched.fields
    rows, cols = (np.arange(f[name], dtype=np.int64) for name in ("rows", "cols"))
    values = f["start"] + rows[:, None] * f["row_step"] + cols * f["col_step"]
    memory.write(touched.tile("dst"), numbers.encode(values.astype(np.int32), DType.I32))


MEANINGS: dict[str, Callable[[Access, Memory], None]] = {
    meaning.__name__: meaning
    for meaning in (
        load, store, gather, scatter, matmul, vector, reduce, finish, transpose, iota,
    )
}  # fmt: skip
