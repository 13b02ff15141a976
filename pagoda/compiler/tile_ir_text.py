"""Tile IR as text: the `ir` stage of `pagoda dump`."""

from __future__ import annotations

from collections.abc import Iterator

from pagoda.compiler.scalar import ONE, ZERO, Scalar
from pagoda.compiler.tile_ir import (
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
    Transpose,
    Trap,
)


def kernel_text(kernel: Kernel) -> str:
    """The whole kernel, one statement a line."""
    parameters = [_tensor(t) for t in kernel.tensors] + list(kernel.scalars)
    blocks = "".join(f" {name}={value}" for name, value in kernel.blocks)
    head = f"kernel {kernel.name}({', '.join(parameters)}){blocks}"
    return "\n".join([head, *_lines(kernel.body, "  ")]) + "\n"


def _tensor(tensor: Tensor) -> str:
    def shape(values: tuple[int | None, ...]) -> str:
        return ", ".join("?" if value is None else str(value) for value in values)

    dtype = tensor.dtype.name.lower()
    return f"{tensor.name}: {dtype}[{shape(tensor.sizes)}] strides ({shape(tensor.strides)})"


def _lines(body: Body, indent: str) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, For):
            step = "" if statement.step == ONE else f", {statement.step}"
            bounds = f"{statement.start}, {statement.stop}{step}"
            ahead = _when(statement.ahead, f" ahead {statement.ahead}")
            yield f"{indent}for {statement.variable} in range({bounds}){ahead}:"
            yield from _lines(statement.body, indent + "  ")
        elif isinstance(statement, If):
            yield f"{indent}if {statement.condition}:"
            yield from _lines(statement.then, indent + "  ")
            if statement.otherwise:
                yield f"{indent}else:"
                yield from _lines(statement.otherwise, indent + "  ")
        else:
            yield indent + statement_text(statement)


def _extents(*extents: Scalar) -> str:
    return " x ".join(map(str, extents))


def _when(condition: object, text: str) -> str:
    return text if condition else ""


def statement_text(statement: Statement) -> str:
    """One statement without inner bodies."""
    match statement:
        case Let(name, value):
            return f"{name} = {value}"
        case ReadWord(name, source):
            return f"{name} = word {source}"
        case Declare(tile):
            return f"tile {tile}" + _when(tile.buffers, f" buffers {tile.buffers}")
        case Load(destination, source, rows, cols, planes):
            shape = _extents(*(() if planes == ONE else (planes,)), rows, cols)
            pads = (*statement.pad_rows, *statement.pad_cols)
            padding = _when(any(p != ZERO for p in pads), f" pad {', '.join(map(str, pads))}")
            return f"{destination} = load {source} {shape}{padding}{_strides(statement)}"
        case Store(destination, source, rows, cols, planes, accumulate):
            shape = _extents(*(() if planes == ONE else (planes,)), rows, cols)
            verb = "accumulate" if accumulate else "store"
            return f"{verb} {destination} = {source} {shape}{_strides(statement)}"
        case Gather(destination, source, index, rows, cols):
            return f"{destination} = gather {source} rows {index} {_extents(rows, cols)}"
        case Scatter(destination, source, index, rows, cols, accumulate):
            verb = "scatter-accumulate" if accumulate else "scatter"
            return f"{verb} {destination} rows {index} = {source} {_extents(rows, cols)}"
        case Dot():
            return _dot(statement)
        case Elementwise(destination, tree, rows, cols):
            return f"{destination} = {tree} {_extents(rows, cols)}"
        case Reduce(op, state, source, rows, cols, axis, first, start):
            where = f" first {first} start {start}" if axis == "row" else f" first {first}"
            return f"{state} = reduce {op} {axis} {source} {_extents(rows, cols)}{where}"
        case Finish(op, destination, state, rows):
            return f"{destination} = finish {op} {state} {_extents(rows)}"
        case Transpose(destination, source, rows, cols):
            return f"{destination} = transpose {source} {_extents(rows, cols)}"
        case Iota(destination, rows, cols, start, row_step, col_step):
            steps = f"start {start} step {row_step}, {col_step}"
            return f"{destination} = iota {_extents(rows, cols)} {steps}"
        case Barrier():
            return "barrier"
        case Trap(code):
            return f"trap {code}"
    raise TypeError(f"no such statement: {statement!r}")


def _strides(statement: Load | Store) -> str:
    named = (("row", statement.row_stride), ("plane", statement.plane_stride))
    return "".join(f" {name} stride {value}" for name, value in named if value is not None)


def _dot(dot: Dot) -> str:
    a = f"transpose {dot.a}" if dot.transpose_a else str(dot.a)
    b = f"transpose {dot.b}" if dot.transpose_b else str(dot.b)
    outer = "".join(f" rows {count} by {stride}" for count, stride in dot.a_outer)
    runs = _when(dot.k_outer[0] != ONE, f" runs {dot.k_outer[0]} by {dot.k_outer[1]}")
    keep = _when(dot.accumulate != ZERO, f" accumulate {dot.accumulate}")
    return f"{dot.acc} = dot {a}, {b} {_extents(dot.m, dot.n, dot.k)}{keep}{outer}{runs}"
