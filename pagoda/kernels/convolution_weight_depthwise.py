"""The gradient of a depthwise kernel, on the vector engine: the array would use a row of itself.

    dw[c, ky, kx] = sum over n, y, x of g[n, y, x, c] X[n, y sy + ky dy - top,
                                                         x sx + kx dx - left, c]

Per tap and row of outputs one fused multiply-add of whole vectors of channels, into RUN rows of
sums: sum r has the columns x with x mod RUN = r. Meaning: each of these is one chain of fused
multiply-adds from +0.0 in the order n, x // RUN, y; at the end they are added in the order of r,
and rounded once. No block size shows in the bits.
"""

from __future__ import annotations

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.scalar import CoreCount, CoreId, Int, Scalar, minimum, select
from pagoda.compiler.tile_ir import Access, Kernel, Read, Tile, Tree, apply, splat
from pagoda.isa.numbers import DType
from pagoda.kernels.convolution_shape import ConvolutionShape, ceildiv
from pagoda.kernels.convolution_tiles import declare_tensors, padded
from pagoda.kernels.convolution_weight_shape import WeightPlan


class DepthwiseWeight:
    """Builds the kernel; see `convolution_weight.build_convolution_weight`."""

    def __init__(self, shape: ConvolutionShape, plan: WeightPlan, operand: DType, output: DType):
        self.shape, self.plan, self.operand, self.output = shape, plan, operand, output
        self.size = operand.bits // 8
        self.b = b = KernelBuilder("convolution_weight_depthwise")
        for name in ("bc", "lines", "taps"):
            b.block(name, getattr(plan, name))
        self.x = declare_tensors(b, shape, operand, output)
        self.pitch = shape.pitch(plan.cols)

    def build(self) -> Kernel:
        b, s, plan = self.b, self.shape, self.plan
        kernel = s.kernel[0] * s.kernel[1]
        runs = ceildiv(kernel, plan.taps)
        with b.loop("job", CoreId(), ceildiv(s.co, plan.bc) * runs, CoreCount()) as job:
            c = b.let("c", job // runs * plan.bc)
            n = b.let("n", minimum(plan.bc, s.co - c))
            for run in range(runs):
                taps = range(run * plan.taps, min((run + 1) * plan.taps, kernel))
                if runs == 1:
                    self._job(taps, c, n)
                else:
                    with b.when((job % runs).eq(run)):
                        self._job(taps, c, n)
        return b.build()

    def _job(self, taps: range, c: Scalar, n: Scalar) -> None:
        b, s, plan = self.b, self.shape, self.plan
        acc = b.tile(DType.F32, len(taps) * plan.cols, plan.bc, name="acc", memory="acc")
        b.elementwise(acc, splat(0.0), len(taps) * plan.cols, n)
        with (
            b.loop("image", 0, self.x.size(0)) as image,
            b.loop("col", 0, s.ow, plan.cols) as col,
            b.loop("line", 0, s.oh, plan.lines) as line,
        ):
            lines = b.let("lines", minimum(plan.lines, s.oh - line))
            cols = b.let("cols", minimum(plan.cols, s.ow - col))
            window = self._window(image, line, col, lines, cols, c, n)
            g = b.tile(self.operand, plan.lines * plan.cols, plan.bc, name="g_tile")
            step = s.co * self.size
            offset = ((image * s.oh + line) * s.ow + col) * step + c * self.size
            b.load(
                g, Access("g", offset, Int(step), Int(s.ow * step)), cols, n, lines,
                row_stride=g.row_bytes, plane_stride=cols * g.row_bytes,
            )  # fmt: skip
            with b.loop("row", 0, lines) as row:
                for number, tap in enumerate(taps):
                    self._tap(acc.view(number * plan.cols), window, g, tap, row, cols, n)
        self._finish(acc, taps, c, n)

    def _window(
        self, image: Scalar, line: Scalar, col: Scalar, lines: Scalar, cols: Scalar, c: Scalar,
        n: Scalar,
    ) -> Tile:  # fmt: skip
        b, s, plan = self.b, self.shape, self.plan
        step = s.stride[1]
        rows = s.window(plan.lines, plan.cols)[0] * (self.pitch // step)
        tile = b.tile(self.operand, rows, step * plan.bc, name="window")
        high, above, below, y = padded(b, s, 0, line, lines, s.h)
        wide, left, right, x = padded(b, s, 1, col, cols, s.w)
        with b.loop("high", 0, high) as number:
            inside = b.let("inside", number.ge(above) * number.lt(high - below))
            source = y + select(inside, number - above, 0)
            offset = ((image * s.h + source) * s.w + x) * s.ci + c
            pads = select(inside, left, wide), select(inside, right, 0)
            b.load(
                tile.view(number * (self.pitch // step)),
                Access("x", offset * self.size, Int(s.ci * self.size)), wide, n, pad_rows=pads,
                row_stride=plan.bc * self.size,
            )  # fmt: skip
        return tile

    def _tap(
        self, sums, window: Tile, g: Tile, tap: int, row: Scalar, cols: Scalar, n: Scalar
    ) -> None:
        s, (sy, sx) = self.shape, self.shape.stride
        ky, kx = divmod(tap, s.kernel[1])
        right = kx * s.dilation[1]
        down = (row * sy + ky * s.dilation[0]) * (self.pitch // sx) + right // sx
        pixels = Read(window.view(down, right % sx * self.plan.bc))
        tree: Tree = apply("fma", Read(g.view(row * cols)), pixels, Read(sums))
        self.b.elementwise(sums, tree, cols, n)

    def _finish(self, acc: Tile, taps: range, c: Scalar, n: Scalar) -> None:
        """Adds the sums of each tap up; kernels lie channel after channel."""
        b, s, plan, count = self.b, self.shape, self.plan, len(taps)
        totals = b.tile(DType.F32, count, plan.bc, name="totals")
        for number in range(count):
            rows = acc.view(number * plan.cols)
            b.reduce("fsum", totals.view(number), rows, plan.cols, n, axis="col")
        turned = b.tile(DType.F32, plan.bc, count, name="turned")
        b.transpose(turned, totals, count, n)
        lies, size = s.layout, self.output.bits // 8
        kw, begin = s.kernel[1], taps.start
        if lies.column == 1 and (lies.row == kw or s.kernel[0] == 1):
            offset = c * lies.group + begin
            b.store(Access("dw", offset * size, Int(lies.group * size)), turned, n, count)
            return
        for number, tap in enumerate(taps):
            offset = c * lies.group + tap // kw * lies.row + tap % kw * lies.column
            access = Access("dw", offset * size, Int(lies.group * size))
            b.store(access, turned.view(0, number), n, 1)
