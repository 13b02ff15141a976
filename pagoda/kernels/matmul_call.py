"""From a region's `mm`, `bmm` or `addmm` step to a matmul kernel and what it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.language import TensorType
from pagoda.compiler.loop_nest import ITEMSIZE
from pagoda.compiler.nest_epilogue import Epilogue
from pagoda.compiler.region import KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.float32 import TERMS
from pagoda.kernels.matmul import build_matmul
from pagoda.kernels.matmul_float32 import build_matmul_float32

_OPERANDS = {"bfloat16": DType.BF16, "float32": DType.F32, "int8": DType.I8}
_FLOATS = {"bfloat16": DType.BF16, "float32": DType.F32}
_INTS = {"int32": DType.I32}


def matmul_for(
    call: KernelCall,
    chip: Chip,
    symbols: Mapping[str, int],
    epilogue: Epilogue | None = None,
) -> tuple[Kernel, dict[str, View]]:
    """The kernel for a step and a view per tensor of it.

    Operands are bfloat16 or float32 (then results and bias are one of these) or int8 (then int32).
    Float32 operands are split into as many bf16 terms as the call's precision asks for.
    symbols: sizes to choose the blocks for. epilogue: of a product of bfloat16 operands (`fusion`).
    Raises CompileError for what the kernels do not take.
    """
    assert isinstance(call.kernel, LibraryCall), call.kernel
    name = call.kernel.name
    out, *rest = call.args
    bias = None
    if name == "addmm":
        bias, *rest = rest
        if (call.kernel.attribute("alpha"), call.kernel.attribute("beta")) != (1, 1):
            raise CompileError(
                "addmm", "alpha and beta are 1", f"the call is {call.kernel}",
                "scale the result or the bias in an operation of its own",
            )  # fmt: skip
        bias = _bias_row(bias)
    views = dict(zip(("c", "a", "b"), (_rank_3(v) for v in (out, *rest)), strict=True))
    if bias is not None:
        views["bias"] = bias
    types = {v: _type(name, views[v], _OPERANDS, "operands") for v in "ab"}
    a, b = types["a"], types["b"]
    if a.dtype != b.dtype:
        raise CompileError(
            name, "both operands have one dtype",
            f"they are {views['a'].dtype} and {views['b'].dtype}", "convert one of them",
        )  # fmt: skip
    allowed = _FLOATS if a.dtype.is_float else _INTS
    for v in [v for v in views if v not in types]:
        what = f"result and bias for {views['a'].dtype} operands"
        types[v] = _type(name, views[v], allowed, what)
    sizes = (*views["c"].sizes, views["a"].sizes[2])
    expected = tuple(size.evaluate(symbols) for size in sizes)
    if a.dtype is DType.F32:
        terms = TERMS[call.kernel.precision]
        kernel = build_matmul_float32(chip, **types, terms=terms, expected=expected)
    else:
        kernel = build_matmul(chip, **types, expected=expected, epilogue=epilogue)
    return kernel, views


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
                "addmm", "the bias is one row, repeated",
                f"it is a matrix with strides {', '.join(map(str, view.strides))}",
                "add it in an operation of its own",
            )  # fmt: skip
        view = replace(view, sizes=view.sizes[1:], strides=view.strides[1:])
    return view


def _type(name: str, view: View, allowed: dict[str, DType], what: str) -> TensorType:
    if view.dtype not in allowed:
        raise CompileError(
            name, f"its {what} are {' or '.join(allowed)}", f"one is {view.dtype}",
            "convert it first",
        )  # fmt: skip
    return TensorType(
        allowed[view.dtype],
        tuple(_known(size) for size in view.sizes),
        tuple(_known(stride * ITEMSIZE[view.dtype]) for stride in view.strides),
    )


def _known(value: Expr) -> int | None:
    return value.value if isinstance(value, Const) else None
