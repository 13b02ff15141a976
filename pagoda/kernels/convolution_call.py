"""From a region's `convolution` step to a kernel and what it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.nest_epilogue import Epilogue
from pagoda.compiler.region import KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.convolution import build_convolution
from pagoda.kernels.convolution_shape import ConvolutionShape
from pagoda.kernels.matmul import check_operands
from pagoda.kernels.matmul_call import matmul_for

_OPERANDS = {"bfloat16": DType.BF16, "int8": DType.I8}
_FLOATS = {"bfloat16": DType.BF16, "float32": DType.F32}
_INTS = {"int32": DType.I32}
_LAYOUTS = {"ohwi": (0, 2, 3, 1), "hwio": (2, 3, 1, 0)}  # dimensions of [o, c, ky, kx], outer first
_PIXELS = (0, 2, 3, 1)


def convolution_for(
    call: KernelCall,
    chip: Chip,
    symbols: Mapping[str, int],
    epilogue: Epilogue | None = None,
) -> tuple[Kernel, dict[str, View]]:
    """The kernel for a step and a view per tensor of it; a matrix product's where it is one.

    Operands are bfloat16 (result and bias bfloat16 or float32) or int8 (int32). symbols: sizes to
    choose the blocks for. Raises CompileError for what the kernels do not take.
    """
    assert isinstance(call.kernel, LibraryCall), call.kernel
    out, x, w = (_rank_4(view) for view in call.args[:3] if view is not None)
    bias = call.args[3]
    operand = _dtype(x, _OPERANDS, "operands")
    if _dtype(w, _OPERANDS, "operands") != operand:
        raise CompileError(
            "convolution", "both operands have one dtype",
            f"they are {x.dtype} and {w.dtype}", "convert one of them",
        )  # fmt: skip
    allowed = _FLOATS if operand.is_float else _INTS
    what = f"result and bias for {x.dtype} operands"
    output = _dtype(out, allowed, what)
    layout = next((name for name, order in _LAYOUTS.items() if _lies(w, order)), None)
    if layout is None or not _lies(x, _PIXELS) or not _lies(out, _PIXELS):
        raise CompileError(
            "convolution", "channels are the last dimension in memory",
            "the strides are " + ", ".join(_list(view.strides) for view in (out, x, w)),
            "convert module and input with .to(memory_format=torch.channels_last)",
        )  # fmt: skip
    shape = _shape(call.kernel, x, w, layout, symbols)
    shape = replace(shape, operand_bytes=operand.bits // 8, output_bytes=output.bits // 8)
    if shape.is_matmul:
        return matmul_for(_as_product(call, out, x, w, bias, layout), chip, symbols, epilogue)
    if not shape.depthwise:
        check_operands(chip, operand)
    views = {"y": _transposed(out, _PIXELS), "x": _transposed(x, _PIXELS), "w": w}
    if bias is not None:
        views["bias"] = bias
    added = None if bias is None else _dtype(bias, allowed, what)
    return build_convolution(chip, shape, operand, output, added, epilogue=epilogue), views


def _shape(
    call: LibraryCall, x: View, w: View, layout: str, symbols: Mapping[str, int]
) -> ConvolutionShape:
    fixed = (*x.sizes[1:], *w.sizes)
    if not all(isinstance(size, Const) for size in fixed):
        raise CompileError(
            "convolution", "only the number of images changes from call to call",
            f"the sizes are {_list(x.sizes)} and {_list(w.sizes)}",
            "mark no other dimension of the input as dynamic",
        )  # fmt: skip
    ci, h, wide, co, _, kh, kw = (size.value for size in fixed)
    pad_h, pad_w = int(call.attribute("pad_h")), int(call.attribute("pad_w"))
    return ConvolutionShape(
        x.sizes[0].evaluate(symbols), h, wide, ci, co, (kh, kw),
        (int(call.attribute("stride_h")), int(call.attribute("stride_w"))),
        (int(call.attribute("dilation_h")), int(call.attribute("dilation_w"))),
        ((pad_h, pad_h), (pad_w, pad_w)), int(call.attribute("groups")), weights=layout,
    )  # fmt: skip


def _as_product(
    call: KernelCall, out: View, x: View, w: View, bias: View | None, layout: str
) -> KernelCall:
    """A convolution of one tap at every pixel: out[n h w, o] = x[n h w, c] w[c, o]."""
    ci, co, pixels = x.sizes[1], out.sizes[1], prod((x.sizes[0], *x.sizes[2:]))
    one = Const(1)
    c = replace(out, sizes=(pixels, co), strides=(co, one))
    a = replace(x, sizes=(pixels, ci), strides=(ci, one))
    b = replace(w, sizes=(ci, co), strides=(one, ci) if layout == "ohwi" else (co, one))
    if bias is None:
        return replace(call, kernel=LibraryCall("mm"), args=(c, a, b))
    added = LibraryCall("addmm", (("alpha", 1), ("beta", 1)))
    return replace(call, kernel=added, args=(c, bias, a, b))


def _rank_4(view: View) -> View:
    """With a height of one where there is none."""
    if len(view.sizes) == 4:
        return view
    sizes, strides = list(view.sizes), list(view.strides)
    sizes.insert(2, Const(1))
    strides.insert(2, Const(1))
    return replace(view, sizes=tuple(sizes), strides=tuple(strides))


def _lies(view: View, order: tuple[int, ...]) -> bool:
    """Are the dimensions dense in memory, in this order from outer to inner?"""
    step: Expr = Const(1)
    for dim in reversed(order):
        if view.sizes[dim] != Const(1):
            if view.strides[dim] != step:
                return False
            step = step * view.sizes[dim]
    return True


def _transposed(view: View, order: tuple[int, ...]) -> View:
    return replace(
        view, sizes=tuple(view.sizes[d] for d in order),
        strides=tuple(view.strides[d] for d in order),
    )  # fmt: skip


def _dtype(view: View, allowed: Mapping[str, DType], what: str) -> DType:
    if view.dtype not in allowed:
        raise CompileError(
            "convolution", f"its {what} are {' or '.join(allowed)}", f"one is {view.dtype}",
            "convert it first",
        )  # fmt: skip
    return allowed[view.dtype]


def _list(values: tuple[Expr, ...]) -> str:
    return f"[{', '.join(map(str, values))}]"
