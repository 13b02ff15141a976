"""The kernel language: `@kernel` Python functions, read from their source, become tile IR.

    @kernel
    def scale(y: Tensor, x: Tensor, factor: float, *, ROWS, COLS):
        for i in core_tiles(x.size(0), ROWS):
            for j in tiles(x.size(1), COLS):
                store(y[i, j], load(x[i, j]) * factor)

    ir = scale.build(y=TensorType.dynamic(DType.BF16, 2), x=..., ROWS=16, COLS=64)

Parameters. `Tensor`: an operand in DRAM; `Tensor | None`: it may be absent (then `is None` is known
at compile time). `int`, `float`: run-time scalars. After `*`: compile-time values (block sizes,
flags), given to `build`.

Integers. Compile-time ints are Python ints and fold; run-time integers are 32-bit (`+ - * // %`,
comparisons, `min`, `max`, `cdiv`). `if` on a compile-time value picks a branch while compiling; on
a run-time value it branches. Variables may be assigned anywhere.

Loops. `range(...)` gives integers, `tiles(extent, BLOCK)` gives index ranges with the tail cut off,
`core_tiles(extent, BLOCK)` gives this core its share of them. `block(number, extent, BLOCK)` is the
range that `tiles` would give in its iteration `number`; `full(extent)` a whole compile-time extent.
`start=` on tiles and block says where the first block begins, 0 unless given; `ahead=n` on tiles
and core_tiles issues the loads of the innermost loop n iterations early.

Tiles are two-dimensional; `a[i, k]` with two ranges is a window of rows and columns, with one range
it is one row. `load` takes any strides: storage with contiguous rows stays transposed until needed
(for `dot` that costs nothing). Arithmetic on tiles is element by element in float32 or int32; a
tile with one row or one column is repeated. An expression is computed where it is stored, used by
`dot`, `max`, `sum`, or assigned: one assignment makes one tile. Assigning to a tile defined outside
the loop updates it in place: that is how values are carried.

    load(a[i, k])  load(table[rows_tile, k])         windows; rows picked by an int32 tile; options:
                                                     dtype= in SRAM, buffers= to rotate over
    store(c[i, j], x)  add_to(c[i, j], x)            converted to the tensor's dtype
    acc = zeros(i, j)  acc += dot(x, y)              matrix product: k in order, from zero
    finish_with(EPILOGUE, x[i, j], tile)             a loop nest (`nest_epilogue`) done on a tile
    where exp2 log2 recip rsqrt sqrt abs floor ceil trunc round sin2pi maximum minimum fma
    to(x, DType.BF16)  to_int(x)  to_float(x)        conversions
    max(x, axis)  min(x, axis)  sum(x, axis)         axis 1: along the row; one tile at once
    s = state("fsum", i)  s.add(x, k)  s.finish()    a row reduction over chunks, any split alike
    iota(i, j, row_step, col_step, start)            int32: start + row * row_step + col * col_step
    x[i, k]                                          part of a tile
    word(x)                                          first int32 of an SRAM tile, as an integer
    core_id()  core_count()  barrier()  trap(code)
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args

from pagoda.compiler.builtin import BUILTINS, LOOPS
from pagoda.compiler.errors import CompileError, Location
from pagoda.compiler.interpret import Interpreter
from pagoda.compiler.tile_ir import Kernel
from pagoda.compiler.tile_ir import Tensor as TensorParameter
from pagoda.isa.numbers import DType


class Tensor:
    """Annotation of a tensor parameter."""


@dataclass(frozen=True)
class TensorType:
    """What a kernel is built for: dtype, and per dimension size (elements) and stride (bytes),
    None where the call gives them. Strides decide how tiles are loaded: at least the contiguous
    dimension should be known."""

    dtype: DType
    sizes: tuple[int | None, ...]
    strides: tuple[int | None, ...]

    @staticmethod
    def dynamic(dtype: DType, rank: int, contiguous: int = -1) -> TensorType:
        """Sizes and strides given at run time, but for the contiguous dimension's stride."""
        strides: list[int | None] = [None] * rank
        strides[contiguous] = max(DType(dtype).bits // 8, 1)
        return TensorType(dtype, (None,) * rank, tuple(strides))

    @staticmethod
    def fixed(dtype: DType, *sizes: int) -> TensorType:
        """A row-major tensor of known sizes."""
        step, strides = max(DType(dtype).bits // 8, 1), []
        for size in reversed(sizes):
            strides.append(step)
            step *= size
        return TensorType(dtype, sizes, tuple(reversed(strides)))

    def named(self, name: str) -> TensorParameter:
        return TensorParameter(name, DType(self.dtype), tuple(self.sizes), tuple(self.strides))


@dataclass(frozen=True)
class KernelFunction:
    """A kernel's source, ready to be built for given tensors and block sizes."""

    name: str
    tree: ast.FunctionDef
    file: str
    first_line: int  # of the source text that `tree` was read from
    indentation: int  # columns taken off each line before reading
    annotations: dict[str, Any]
    blocks: tuple[str, ...]
    namespace: dict[str, Any]

    def location(self, node: ast.AST) -> Location:
        line = getattr(node, "lineno", 1) + self.first_line - 1
        return Location(self.file, line, getattr(node, "col_offset", 0) + self.indentation + 1)

    def build(self, **values: Any) -> Kernel:
        """Tile IR for tensors (`TensorType`s, or None where allowed) and compile-time values.

        Raises CompileError, with the place in the source.
        """
        expected = [*(n for n in self.annotations if not self._is_scalar(n)), *self.blocks]
        wrong = [n for n in expected if n not in values] + [n for n in values if n not in expected]
        if wrong:
            raise CompileError(
                f"kernel {self.name}", f"build takes {', '.join(expected)}",
                f"{wrong[0]} is {'missing' if wrong[0] in expected else 'none of them'}",
                "name exactly those", self.location(self.tree),
            )  # fmt: skip
        return Interpreter(self, values).run()

    def _is_scalar(self, name: str) -> bool:
        return self.annotations[name] in (int, float)

    def is_tensor(self, name: str) -> bool:
        annotation = self.annotations[name]
        return annotation is Tensor or self.is_optional(name)

    def is_optional(self, name: str) -> bool:
        annotation = self.annotations[name]
        return isinstance(annotation, UnionType) and set(get_args(annotation)) == {
            Tensor,
            type(None),
        }


def kernel(function: Callable[..., None]) -> KernelFunction:
    """Decorator: read a kernel's source. Raises CompileError for parameters without a type."""
    lines, first_line = inspect.getsourcelines(function)
    source = "".join(lines)
    text = textwrap.dedent(source)
    indentation = len(source) - len(source.lstrip())
    tree = ast.parse(text).body[0]
    assert isinstance(tree, ast.FunctionDef)
    annotations = inspect.get_annotations(function, eval_str=True)
    annotations.pop("return", None)
    found = KernelFunction(
        function.__name__, tree, inspect.getsourcefile(function) or "", first_line, indentation,
        {a.arg: annotations.get(a.arg) for a in tree.args.args},
        tuple(a.arg for a in tree.args.kwonlyargs), inspect.getclosurevars(function).globals,
    )  # fmt: skip
    for argument in tree.args.args:
        known = found.annotations[argument.arg] in (int, float) or found.is_tensor(argument.arg)
        if not known:
            raise CompileError(
                f"parameter {argument.arg}",
                "a kernel's parameters are Tensor, Tensor | None, int or float; compile-time "
                "values come after *",
                f"its annotation is {found.annotations[argument.arg]!r}",
                "annotate it or move it behind *", found.location(argument),
            )  # fmt: skip
    return found


def __getattr__(name: str) -> Callable[..., Any]:
    """The functions of the kernel language, for a kernel module to import by name."""
    if name not in BUILTINS and name not in LOOPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def only_in_kernels(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError(f"{name}(...) means something only inside an @kernel function")

    only_in_kernels.__name__ = only_in_kernels.__qualname__ = name
    return only_in_kernels
