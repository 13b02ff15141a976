"""The gradient of a convolution's kernel: products over pixels, a tap at a time.

    dw[o, ky, kx, c] = sum over n, y, x of g[n, y, x, o] X[n, y sy + ky dy - top,
                                                            x sx + kx dx - left, c]

with zeros around X. For one tap this is a matrix product g^T X over all pixels: g, as it lies in
memory, enters the array transposed; the tap's pixels of X are picked while loading, row by row. So
k runs over pixels without a gap, and all of them meet in one accumulator. Meaning: each element is
one chain of fused multiply-adds from +0.0 in the order n, y, x, rounded once at the end; a pixel of
padding contributes fma(g, 0). No block size shows in the bits. (Depthwise kernels:
`convolution_weight_depthwise`.)
"""

from __future__ import annotations

from dataclasses import replace

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.scalar import CoreCount, CoreId, Int, Scalar, maximum, minimum, select
from pagoda.compiler.tile_ir import Access, Kernel, Tile
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.convolution_shape import ConvolutionShape, ceildiv
from pagoda.kernels.convolution_tiles import declare_tensors
from pagoda.kernels.convolution_weight_depthwise import DepthwiseWeight
from pagoda.kernels.convolution_weight_shape import (
    WeightPlan,
    choose_depthwise_weight,
    choose_weight,
)


def build_convolution_weight(
    chip: Chip,
    shape: ConvolutionShape,
    operand: DType,
    output: DType,
    plan: WeightPlan | None = None,
) -> Kernel:
    """The kernel with tensors dw, x and g, for the convolution `shape` of which dw has the layout.

    operand: BF16, for a depthwise kernel also F32; output: BF16 or F32. The number of images is the
    call's. Any plan gives the same bits. Raises CompileError.
    """
    shape = replace(shape, operand_bytes=operand.bits // 8)
    if shape.depthwise:
        plan = plan or choose_depthwise_weight(chip, shape)
        return DepthwiseWeight(shape, plan, operand, output).build()
    return _Weight(shape, plan or choose_weight(chip, shape), operand, output).build()


class _Weight:
    def __init__(self, shape: ConvolutionShape, plan: WeightPlan, operand: DType, output: DType):
        self.shape, self.plan, self.operand, self.output = shape, plan, operand, output
        self.size = operand.bits // 8
        self.b = b = KernelBuilder("convolution_weight")
        for name in ("bo", "bc", "lines", "cols"):
            b.block(name, getattr(plan, name))
        self.x = declare_tensors(b, shape, operand, output)

    def build(self) -> Kernel:
        b, s, plan = self.b, self.shape, self.plan
        down, across = ceildiv(s.group_co, plan.bo), ceildiv(s.group_ci, plan.bc)
        kw = s.kernel[1]
        total = b.let("total", self.x.size(0) * s.oh)
        jobs = s.groups * s.kernel[0] * kw * down * across
        with b.loop("job", CoreId(), jobs, CoreCount()) as job:
            tap = b.let("tap", job // across // down)
            group = b.let("group", tap // (s.kernel[0] * kw))
            ky, kx = b.let("ky", tap // kw % s.kernel[0]), b.let("kx", tap % kw)
            o = b.let("o", job // across % down * plan.bo)
            c = b.let("c", job % across * plan.bc)
            n_o = b.let("n_o", minimum(plan.bo, s.group_co - o))
            n_c = b.let("n_c", minimum(plan.bc, s.group_ci - c))
            o_all, c_all = group * s.group_co + o, group * s.group_ci + c
            acc = b.tile(DType.F32, plan.bo, plan.bc, name="acc", memory="acc")
            with (
                b.loop("line", 0, total, plan.lines) as line,
                b.loop("col", 0, s.ow, plan.cols) as col,
            ):
                lines = b.let("lines", minimum(plan.lines, total - line))
                cols = b.let("cols", minimum(plan.cols, s.ow - col))
                pixels = b.let("pixels", lines * cols)
                g = self._gradients(line, col, pixels, o_all, n_o)
                x = self._inputs(line, lines, col, cols, ky, kx, c_all, n_c)
                b.dot(acc, g, x, n_o, n_c, pixels, accumulate=maximum(line, col), transpose_a=True)
            lies, size = s.layout, self.output.bits // 8
            place = group * lies.group + o * lies.output + ky * lies.row + kx * lies.column + c
            b.store(Access("dw", place * size, Int(lies.output * size)), acc, n_o, n_c)
        return b.build()

    def _gradients(
        self, line: Scalar, col: Scalar, pixels: Scalar, o: Scalar, n_o: Scalar
    ) -> Tile:
        """[pixels, n_o]; rows of outputs follow one another."""
        b, s, plan = self.b, self.shape, self.plan
        tile = b.tile(self.operand, plan.lines * plan.cols, plan.bo, name="g_tile")
        offset = ((line * s.ow + col) * s.co + o) * self.size
        b.load(tile, Access("g", offset, Int(s.co * self.size)), pixels, n_o)
        return tile

    def _inputs(
        self, line: Scalar, lines: Scalar, col: Scalar, cols: Scalar, ky: Scalar, kx: Scalar,
        c: Scalar, n_c: Scalar,
    ) -> Tile:  # fmt: skip
        """[pixels, n_c]: what the tap meets at each of them."""
        b, s, plan = self.b, self.shape, self.plan
        tile = b.tile(self.operand, plan.lines * plan.cols, plan.bc, name="x_tile")
        if s.pointwise and s.stride == (1, 1):  # all pixels, as they lie
            offset = ((line * s.w + col) * s.ci + c) * self.size
            b.load(tile, Access("x", offset, Int(s.ci * self.size)), lines * cols, n_c)
            return tile
        sx = s.stride[1]
        first = b.let("first", col * sx + kx * s.dilation[1] - s.padding[1][0])
        left = b.let("left", minimum(maximum(sx - 1 - first, 0) // sx, cols))
        stop = maximum(minimum(maximum(s.w - 1 + sx - first, 0) // sx, cols), left)
        right = b.let("right", cols - stop)
        column = b.let("column", minimum(maximum(first + left * sx, 0), s.w - 1))
        with b.loop("l", 0, lines) as number:
            image = b.let("image", (line + number) // s.oh)
            y = line + number - image * s.oh
            row = b.let("row", y * s.stride[0] + ky * s.dilation[0] - s.padding[0][0])
            inside = b.let("inside", row.ge(0) * row.lt(s.h))
            offset = (image * s.h + select(inside, row, 0)) * s.w + column
            access = Access("x", (offset * s.ci + c) * self.size, Int(sx * s.ci * self.size))
            pads = select(inside, left, cols), select(inside, right, 0)
            b.load(
                tile.view(number * cols), access, cols, n_c, pad_rows=pads,
                row_stride=tile.row_bytes,
            )  # fmt: skip
        return tile
