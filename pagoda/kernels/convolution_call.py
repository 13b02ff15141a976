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
from pagoda.kernels.convolution_shape import ConvolutionShape, WeightLayout
from pagoda.kernels.convolution_weight import build_convolution_weight
from pagoda.kernels.matmul import check_operands
from pagoda.kernels.matmul_call import matmul_for

_OPERANDS = {"bfloat16": DType.BF16, "float32": DType.F32, "int8": DType.I8}
_FLOATS = {"bfloat16": DType.BF16, "float32": DType.F32}
_INTS = {"int32": DType.I32}
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
    out, x, w = (view for view in call.args[:3] if view is not None)
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
    if not _lies(x, _PIXELS) or not _ends_in_channels(out):
        raise _not_channels_last(out, x)
    cells = int(call.kernel.attribute("cells"))
    if cells > 1 and _lies(x, _PIXELS):
        x = _in_cells(x, cells)
    layout = _weight_layout(w, bool(call.kernel.attribute("transposed")), call.kernel, x, out)
    shape = replace(_shape(call.kernel, out, x, w, symbols), weights=layout)
    shape = replace(shape, operand_bytes=operand.bits // 8, output_bytes=output.bits // 8)
    shape = replace(shape, cells=cells)
    if shape.is_matmul and shape.output_steps is None:
        return matmul_for(_as_product(call, shape, out, x, w, bias), chip, symbols, epilogue)
    if operand is DType.F32 and not shape.depthwise:
        raise _float32(shape)
    if not shape.depthwise:
        check_operands(chip, operand)
    views = {"y": _transposed(out, _PIXELS), "x": _transposed(x, _PIXELS), "w": w}
    if bias is not None:
        views["bias"] = bias
    added = None if bias is None else _dtype(bias, allowed, what)
    return build_convolution(chip, shape, operand, output, added, epilogue=epilogue), views


def convolution_weight_for(
    call: KernelCall, chip: Chip, symbols: Mapping[str, int]
) -> tuple[Kernel, dict[str, View]]:
    """The kernel for a step `convolution_weight`, and a view per tensor of it.

    Operands are bfloat16, or float32 of a depthwise convolution; the result is either. Raises
    CompileError for what the kernels do not take.
    """
    assert isinstance(call.kernel, LibraryCall), call.kernel
    out, x, g = (view for view in call.args if view is not None)
    operand, output = _dtype(x, _FLOATS, "operands"), _dtype(out, _FLOATS, "result")
    if not _lies(x, _PIXELS) or not _lies(g, _PIXELS):
        raise _not_channels_last(g, x)
    layout = _weight_layout(out, False, call.kernel, x, g)
    shape = replace(_shape(call.kernel, g, x, out, symbols), weights=layout)
    if operand is DType.F32 and not shape.depthwise:
        raise _float32(shape)
    if layout.channel != 1:
        raise CompileError(
            "convolution_weight", "the channels in are contiguous in the result",
            f"its strides are {_list(out.strides)}", "make it channels last",
        )  # fmt: skip
    kernel = build_convolution_weight(chip, shape, operand, output)
    views = {"dw": out, "x": x, "g": g}
    return kernel, {name: _transposed(view, _PIXELS) for name, view in views.items()}


def _in_cells(x: View, cells: int) -> View:
    """Channels, rows and columns of the squares; the strides say what a dense tensor of them
    would have."""
    n, c, h, w = x.sizes
    c, h, w = c * (cells * cells), h // cells, w // cells
    return replace(x, sizes=(n, c, h, w), strides=(c * h * w, Const(1), c * w, c))


def _not_channels_last(*views: View) -> CompileError:
    return CompileError(
        "convolution", "channels are the last dimension in memory",
        f"the strides are {' and '.join(_list(view.strides) for view in views)}",
        "convert module and input with .to(memory_format=torch.channels_last)",
    )  # fmt: skip


def _float32(shape: ConvolutionShape) -> CompileError:
    return CompileError(
        "convolution", "float32 operands are those of a depthwise or 1 x 1 convolution",
        f"the kernel is {shape.kernel[0]} x {shape.kernel[1]} with {shape.groups} groups",
        "split them into bfloat16 terms first",
    )  # fmt: skip


def _shape(
    call: LibraryCall, out: View, x: View, w: View, symbols: Mapping[str, int]
) -> ConvolutionShape:
    fixed = (*x.sizes[1:], *w.sizes, *w.strides, *out.sizes[1:], *out.strides)
    if not all(isinstance(size, Const) for size in fixed):
        raise _dynamic(x, w)

    def pair(name: str) -> tuple[int, int]:
        return int(call.attribute(f"{name}_h")), int(call.attribute(f"{name}_w"))

    stride, dilation, groups = pair("stride"), pair("dilation"), int(call.attribute("groups"))
    _, ci, *inputs = (size.value if isinstance(size, Const) else 0 for size in x.sizes)
    _, co, *outputs = (size.value if isinstance(size, Const) else 0 for size in out.sizes)
    kernel = w.sizes[2].value, w.sizes[3].value
    padding = []
    for dim, before in enumerate((call.attribute("pad_top"), call.attribute("pad_left"))):
        reach = (outputs[dim] - 1) * stride[dim] + (kernel[dim] - 1) * dilation[dim] + 1
        after = reach - int(before) - inputs[dim]
        padding.append((int(before), 0 if -stride[dim] < after < 0 else after))
    shape = ConvolutionShape(
        x.sizes[0].evaluate(symbols), *inputs, ci, co, kernel, stride, dilation, tuple(padding),
        groups,
    )  # fmt: skip
    image, _, row, pixel = (step.value for step in out.strides)
    return shape if _lies(out, _PIXELS) else replace(shape, output_steps=(image, row, pixel))


def _dynamic(x: View, w: View) -> CompileError:
    return CompileError(
        "convolution", "only the number of images changes from call to call",
        f"the sizes are {_list(x.sizes)} and {_list(w.sizes)}",
        "mark no other dimension of the input as dynamic",
    )  # fmt: skip


def _weight_layout(
    w: View, transposed: bool, call: LibraryCall, x: View, out: View
) -> WeightLayout:
    if not all(isinstance(size, Const) for size in (*w.sizes, *w.strides, x.sizes[1])):
        raise _dynamic(x, w)
    groups, ci, co = int(call.attribute("groups")), x.sizes[1].value, out.sizes[1].value
    first, second, row, column = (step.value for step in w.strides)
    kh, kw = w.sizes[2].value, w.sizes[3].value
    if transposed:
        start = (kh - 1) * row + (kw - 1) * column
        found = WeightLayout(start, ci // groups * first, second, first, -row, -column)
    else:
        found = WeightLayout(0, co // groups * first, first, second, row, column)
    if ci == groups:  # the stride of the one channel says nothing
        return replace(found, channel=1)
    if 1 not in (found.output, found.channel) and co != groups:
        raise CompileError(
            "convolution", "a kernel's channels in or out are contiguous",
            f"its strides are {_list(w.strides)}",
            "convert the module with .to(memory_format=torch.channels_last)",
        )  # fmt: skip
    return found


def _as_product(
    call: KernelCall, shape: ConvolutionShape, out: View, x: View, w: View, bias: View | None
) -> KernelCall:
    """A convolution of one tap at every pixel: out[n h w, o] = x[n h w, c] w[c, o]."""
    ci, co, pixels = x.sizes[1], out.sizes[1], prod((x.sizes[0], *x.sizes[2:]))
    one = Const(1)
    c = replace(out, sizes=(pixels, co), strides=(co, one))
    a = replace(x, sizes=(pixels, ci), strides=(ci, one))
    strides = Const(shape.layout.channel), Const(shape.layout.output)
    b = replace(w, sizes=(ci, co), strides=strides)
    precision = call.kernel.precision
    if bias is None:
        return replace(call, kernel=LibraryCall("mm", precision=precision), args=(c, a, b))
    added = LibraryCall("addmm", (("alpha", 1), ("beta", 1)), precision)
    return replace(call, kernel=added, args=(c, bias, a, b))


def _lies(view: View, order: tuple[int, ...]) -> bool:
    """Are the dimensions dense in memory, in this order from outer to inner?"""
    step: Expr = Const(1)
    for dim in reversed(order):
        if view.sizes[dim] != Const(1):
            if view.strides[dim] != step:
                return False
            step = step * view.sizes[dim]
    return True


def _ends_in_channels(view: View) -> bool:
    return view.strides[1] == Const(1) or view.sizes[1] == Const(1)


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
