"""What the convolution kernels share: tensors, windows with their padding, finished tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pagoda.compiler.builder import KernelBuilder, TensorHandle
from pagoda.compiler.errors import CompileError
from pagoda.compiler.nest_epilogue import Epilogue
from pagoda.compiler.scalar import ZERO, Int, Scalar, maximum, minimum, scalar
from pagoda.compiler.tile_ir import Access, Read, Row, Tile, apply
from pagoda.compiler.values import Range
from pagoda.isa.numbers import DType
from pagoda.kernels.convolution_shape import (
    MAX_COLS,
    MAX_PAD,
    ConvolutionPlan,
    ConvolutionShape,
)


class ConvolutionBuilder:
    """A builder with the tensors y, x, w and perhaps bias declared."""

    def __init__(
        self,
        shape: ConvolutionShape,
        plan: ConvolutionPlan,
        operand: DType,
        output: DType,
        bias: DType | None,
        epilogue: Epilogue | None,
    ):
        self.shape, self.plan = shape, plan
        self.size = operand.bits // 8
        self.operand, self.output, self.epilogue = operand, output, epilogue
        self.sums = DType.I32 if operand == DType.I8 else DType.F32
        name = "convolution_depthwise" if shape.depthwise else "convolution"
        self.b = b = KernelBuilder(name)
        for name in ("images", "rows", "cols", "bn", "run", "bk"):
            b.block(name, getattr(plan, name))
        s, (kh, kw) = shape, shape.kernel
        if epilogue is None:
            size = output.bits // 8
            steps = tuple(step * size for step in s.steps)
            b.tensor("y", output, 4, sizes=(None, s.oh, s.ow, s.co), strides=(*steps, size))
        self.x = self._tensor("x", operand, (None, s.h, s.w, s.ci))
        if s.weights == "ohwi":
            self._tensor("w", operand, (s.co, kh, kw, s.group_ci))
        elif s.weights == "hwio":
            self._tensor("w", operand, (kh, kw, s.group_ci, s.co))
        else:
            b.tensor("w", operand, 0)
        self.bias = None if bias is None else self._tensor("bias", bias, (s.co,))
        self.window_rows, self.window_cols = s.window(plan.rows, plan.cols)
        self.pitch = s.pitch(plan.cols)
        self._check()

    def _tensor(self, name: str, dtype: DType, sizes: tuple[int | None, ...]) -> TensorHandle:
        step, strides = dtype.bits // 8, []
        for size in reversed(sizes):
            strides.append(step)
            step *= size or 1
        return self.b.tensor(name, dtype, len(sizes), sizes=sizes, strides=strides[::-1])

    def _check(self) -> None:
        (_, _), (left, right) = self.shape.padding
        widest = self.window_cols * self.shape.ci
        padding = max(left, right) * self.shape.ci
        rows = max(self.shape.padding[0])
        if widest > MAX_COLS or max(padding, rows) > MAX_PAD:
            raise CompileError(
                "convolution",
                f"a window row has at most {MAX_COLS} elements, {MAX_PAD} of padding a side",
                f"it has {widest} with up to {padding} (and {rows} rows) of padding",
                "split the channels",
            )  # fmt: skip

    def padded(
        self, dim: int, first: Scalar, count: Scalar, size: int
    ) -> tuple[Scalar, Scalar, Scalar, Scalar]:
        return padded(self.b, self.shape, dim, first, count, size)

    def input_offset(self, image: Scalar, y: Scalar, x: Scalar) -> Scalar:
        s = self.shape
        return ((image * s.h + y) * s.w + x) * (s.ci * self.size)

    def finish(
        self, acc: Tile, channel: Scalar, n: Scalar, image: Scalar, oy: Scalar, ox: Scalar,
        images: Scalar, rows: Scalar, cols: Scalar,
    ) -> None:  # fmt: skip
        b, s, plan = self.b, self.shape, self.plan
        source, tree = acc, Read(acc.view())
        pixels = b.let("pixels", images * rows * cols)
        if self.bias is not None:
            row = b.tile(self.bias.tensor.dtype, 1, plan.bn, name="bias")
            b.load(row, self.bias.at(channel), 1, n)
            tree = apply("fadd" if self.sums.is_float else "iadd", tree, Row(row.view()))
        exact = self.bias is None and self.output == self.sums
        if self.bias is not None or self.epilogue is not None and not exact:
            source = b.tile(self.output, plan.pixels, plan.bn, name="product")
            b.elementwise(source, tree, pixels, n)
        if self.epilogue is not None:
            start = (image * s.oh + oy) * s.ow + ox
            i, j = Range(start, pixels, plan.pixels), Range(channel, n, plan.bn)
            self.epilogue.emit(b, source, i, j)
            return
        size = self.output.bits // 8
        per_image, per_row, per_pixel = (step * size for step in s.steps)
        start = image * per_image + oy * per_row + ox * per_pixel + channel * size
        if plan.cols == s.ow and per_row == s.ow * per_pixel:  # rows of outputs follow one another
            access = Access("y", start, Int(per_pixel), Int(per_image))
            b.store(access, source, rows * cols, n, images)
            return
        with loop(b, "of", 0, plan.images) if plan.images == 1 else b.loop("of", 0, images) as of:
            access = Access("y", start + of * per_image, Int(per_pixel), Int(per_row))
            b.store(access, source.view(of * (rows * cols)), cols, n, rows)


def declare_tensors(
    b: KernelBuilder, shape: ConvolutionShape, operand: DType, output: DType
) -> TensorHandle:
    """The tensors dw, x (which it returns) and g of a kernel's gradient."""
    s, lies = shape, shape.layout
    steps = tuple(
        step * output.bits // 8 for step in (lies.output, lies.row, lies.column, lies.channel)
    )
    if s.depthwise:
        steps = (lies.group * output.bits // 8, *steps[1:])
    b.tensor("dw", output, 4, sizes=(s.co, *s.kernel, s.group_ci), strides=steps)
    handles = []
    for name, sizes in (("x", (None, s.h, s.w, s.ci)), ("g", (None, s.oh, s.ow, s.co))):
        size = operand.bits // 8
        strides = (sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1)
        strides = tuple(step * size for step in strides)
        handles.append(b.tensor(name, operand, 4, sizes=sizes, strides=strides))
    return handles[0]


@contextmanager
def loop(
    b: KernelBuilder, name: str, start: Scalar | int, stop: Scalar | int, step: int = 1
) -> Iterator[Scalar]:
    """A loop, or its only iteration without one."""
    start, stop = scalar(start), scalar(stop)
    once = stop - start
    if isinstance(once, Int) and 0 < once.value <= step:
        yield start
    else:
        with b.loop(name, start, stop, step) as variable:
            yield variable


def padded(
    b: KernelBuilder, s: ConvolutionShape, dim: int, first: Scalar, count: Scalar, size: int
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Along one dimension: extent of the window, zeros before and after, first input."""
    name = "yx"[dim]
    before, after = s.padding[dim]
    span = (s.kernel[dim] - 1) * s.dilation[dim] + 1
    extent = b.let(f"extent_{name}", (count - 1) * s.stride[dim] + span)
    start = b.let(f"start_{name}", first * s.stride[dim] - before)
    head: Scalar = ZERO
    tail: Scalar = ZERO
    if before > 0:
        head = b.let(f"before_{name}", minimum(maximum(-start, 0), extent))
    if after > 0:
        tail = minimum(maximum(start + extent - size, 0), extent - head)
        tail = b.let(f"after_{name}", tail)
    # A window of nothing but padding reads nothing: its start only has to lie in the tensor.
    if max(before, after) > 0:
        start = b.let(f"first_{name}", minimum(maximum(start, 0), size - 1))
    return extent, head, tail, start
