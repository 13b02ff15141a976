"""From a region's `mm`, `bmm` or `addmm` step to the matmul kernel and what it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.language import TensorType
from pagoda.compiler.loop_nest import ITEMSIZE
from pagoda.compiler.region import KernelCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.matmul import build_matmul

_OPERANDS = {"bfloat16": DType.BF16, "int8": DType.I8}
_RESULTS = {"bfloat16": DType.BF16, "float32": DType.F32, "int32": DType.I32}


def matmul_for(
    call: KernelCall, chip: Chip, symbols: Mapping[str, int]
) -> tuple[Kernel, dict[str, View]]:
    """The kernel for a step and a view per tensor of it.

    symbols: sizes to choose the blocks for. Raises CompileError for what the kernel does not take.
    """
    name = call.kernel.name
    out, *rest = call.args
    bias = None
    if name == "addmm":
        bias, *rest = rest
        if (call.kernel.attribute("alpha"), call.kernel.attribute("beta")) != (1, 1):
            raise CompileError(
                "addmm", "alpha and beta are 1", f"they are {call.kernel}",
                "scale the result or the bias in an operation of its own",
            )  # fmt: skip
        bias = _bias_row(bias)
    views = dict(zip(("c", "a", "b"), (_rank_3(v) for v in (out, *rest)), strict=True))
    c, a, b = (_type(name, views[v], _RESULTS if v == "c" else _OPERANDS) for v in "cab")
    if a.dtype != b.dtype:
        raise CompileError(
            name, "both operands have one dtype", f"they are {a.dtype.name} and {b.dtype.name}",
            "convert one of them",
        )  # fmt: skip
    sizes = (*views["c"].sizes, views["a"].sizes[2])
    kernel = build_matmul(
        chip, c, a, b,
        None if bias is None else _type(name, bias, _RESULTS),
        expected=tuple(size.evaluate(symbols) for size in sizes),
    )  # fmt: skip
    return kernel, views if bias is None else {**views, "bias": bias}


def _rank_3(view: View) -> View:
    """With a leading batch of one where there is none, and strides that say nothing for extents
    of one replaced, so that equal shapes share a kernel."""
    sizes, strides = list(view.sizes), list(view.strides)
    if len(sizes) == 2:
        sizes, strides = [Const(1), *sizes], [Const(0), *strides]
    for d, inner in ((1, 2), (2, 1), (0, 1)):
        if sizes[d] == Const(1) and strides[d] != Const(1):
            strides[d] = sizes[inner] if strides[inner] == Const(1) else Const(1)
    return replace(view, sizes=tuple(sizes), strides=tuple(strides))


def _bias_row(view: View) -> View:
    if len(view.sizes) == 2:
        if view.strides[0] != Const(0) and view.sizes[0] != Const(1):
            raise CompileError(
                "addmm", "the bias is one row", f"it is a matrix with strides {view.strides}",
                "add it in an operation of its own",
            )  # fmt: skip
        view = replace(view, sizes=view.sizes[1:], strides=view.strides[1:])
    return view


def _type(name: str, view: View, allowed: dict[str, DType]) -> TensorType:
    if view.dtype not in allowed:
        raise CompileError(
            name, f"its tensors are {' or '.join(allowed)}", f"one is {view.dtype}",
            "convert it first",
        )  # fmt: skip
    return TensorType(
        allowed[view.dtype],
        tuple(_known(size) for size in view.sizes),
        tuple(_known(stride * ITEMSIZE[view.dtype]) for stride in view.strides),
    )


def _known(value: Expr) -> int | None:
    return value.value if isinstance(value, Const) else None
