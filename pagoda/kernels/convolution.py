"""Convolution over channels-last tensors as matrix products, without an im2col copy.

    y[n, oy, ox, o] = sum over ky, kx, c of x[n, oy sy + ky dy - top, ox sx + kx dx - left, c]
                                            w[ky, kx, c, o]     + bias[o]

The input under a tile of outputs, halo and zero padding included, is loaded once. Then every tap,
or every kernel row of taps, is one matmul whose A is a strided window of that tile: outputs of a
row (m0), rows (m1), images (m2); taps of a kernel row are runs of k. Where taps are neighbours the
runs are one (kw x channels): few channels fill the array too. The order of k is ky, kx, c, one
rounding per step from +0.0: no block size shows in the bits.
"""

from __future__ import annotations

from dataclasses import replace

from pagoda.compiler.nest_epilogue import Epilogue, epilogue_cost
from pagoda.compiler.scalar import CoreCount, CoreId, Int, Scalar, ceildiv, maximum, minimum
from pagoda.compiler.tile_ir import Access, Kernel, Tile
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.convolution_depthwise import Depthwise
from pagoda.kernels.convolution_shape import (
    ConvolutionPlan,
    ConvolutionShape,
    choose_convolution,
    choose_depthwise,
    merges_run,
)
from pagoda.kernels.convolution_tiles import ConvolutionBuilder, loop


def build_convolution(
    chip: Chip,
    shape: ConvolutionShape,
    operand: DType,
    output: DType,
    bias: DType | None = None,
    plan: ConvolutionPlan | None = None,
    epilogue: Epilogue | None = None,
) -> Kernel:
    """The kernel with tensors y, x, w and, where there is one, bias.

    operand: BF16 (sums and bias are float) or I8 (I32). All sizes are fixed but the number of
    images, which the call gives. Any plan gives the same bits. epilogue: takes y's place; of the
    matrix of n oh ow rows and co columns. Raises CompileError.
    """
    cost = None if epilogue is None else epilogue_cost(epilogue, output, bias is not None)
    shape = replace(shape, bias=bias is not None, epilogue=cost)
    if shape.depthwise:
        plan = plan or choose_depthwise(chip, shape)
        return Depthwise(shape, plan, operand, output, bias, epilogue).build()
    plan = plan or choose_convolution(chip, shape)
    return _Convolution(shape, plan, operand, output, bias, epilogue).build()


class _Convolution(ConvolutionBuilder):
    def build(self) -> Kernel:
        b, s, plan = self.b, self.shape, self.plan
        down, across = -(-s.oh // plan.rows), -(-s.ow // plan.cols)
        tiles = ceildiv(self.x.size(0), plan.images) * (down * across)
        blocks = s.groups * -(-s.group_co // plan.bn)
        share = -(-blocks // plan.parts)
        with b.loop("job", CoreId(), tiles * plan.parts, CoreCount()) as job:
            tile = b.let("tile", job // plan.parts)
            image = b.let("image", tile // (down * across) * plan.images)
            oy = b.let("oy", tile // across % down * plan.rows)
            ox = b.let("ox", tile % across * plan.cols)
            images = b.let("images", minimum(plan.images, self.x.size(0) - image))
            rows = b.let("rows", minimum(plan.rows, s.oh - oy))
            cols = b.let("cols", minimum(plan.cols, s.ow - ox))
            window = self._window(image, oy, ox, images, rows, cols)
            first = b.let("first", job % plan.parts * share)
            stop = minimum(first + share, blocks)
            with loop(b, "block", first, stop) as block:
                per_group = blocks // s.groups
                group = b.let("group", block // per_group)
                start = block % per_group * plan.bn
                n = b.let("n", minimum(plan.bn, s.group_co - start))
                channel = b.let("channel", group * s.group_co + start)
                acc = b.tile(self.sums, plan.pixels, plan.bn, name="acc", memory="acc")
                self._products(acc, window, group, start, n, images, rows, cols)
                self.finish(acc, channel, n, image, oy, ox, images, rows, cols)
        return b.build()

    def _window(
        self, image: Scalar, oy: Scalar, ox: Scalar, images: Scalar, rows: Scalar, cols: Scalar
    ) -> Tile:
        """The input under a tile of outputs: `pitch` pixels a row, `window_rows` rows an image."""
        b, s, plan = self.b, self.shape, self.plan
        step = s.local_stride[1]
        window = b.tile(
            self.operand, plan.images * self.window_rows * (self.pitch // step), step * s.ci,
            name="window", buffers=plan.windows,
        )  # fmt: skip
        row_bytes = self.pitch * s.ci * self.size
        if s.pointwise:  # pixels are picked while loading
            access = Access(
                "x", self.input_offset(image, oy * s.stride[0], ox * s.stride[1]),
                Int(s.stride[1] * s.ci * self.size), Int(s.stride[0] * s.w * s.ci * self.size),
            )  # fmt: skip
            b.load(
                window, access, cols, s.ci, rows,
                row_stride=s.ci * self.size, plane_stride=row_bytes,
            )  # fmt: skip
            return window
        if s.cells > 1:
            self._load_cells(window, image, oy, ox, images, rows, cols)
            return window
        high, above, below, y = self.padded(0, oy, rows, s.h)
        wide, left, right, x = self.padded(1, ox, cols, s.w)
        access = Access(
            "x", self.input_offset(image, y, x), Int(s.w * s.ci * self.size),
            Int(s.h * s.w * s.ci * self.size),
        )  # fmt: skip
        b.load(
            window, access, high, wide * s.ci, images,
            pad_rows=(above, below), pad_cols=(left * s.ci, right * s.ci),
            row_stride=row_bytes, plane_stride=self.window_rows * row_bytes,
        )  # fmt: skip
        return window

    def _load_cells(
        self, window: Tile, image: Scalar, oy: Scalar, ox: Scalar, images: Scalar, rows: Scalar,
        cols: Scalar,
    ) -> None:  # fmt: skip
        """Row by row of the squares: in DRAM they follow one another, in SRAM those of a square."""
        b, s = self.b, self.shape
        row = s.ci // s.cells * self.size
        (high, *_, y), (wide, *_, x) = self.padded(0, oy, rows, s.h), self.padded(1, ox, cols, s.w)
        start = self.input_offset(image, y, 0) + x * row
        with loop(b, "of", 0, self.plan.images) if self.plan.images == 1 else b.loop(
            "of", 0, images
        ) as of:
            for number in range(s.cells):
                offset = start + of * (s.h * s.w * s.ci * self.size) + number * s.w * row
                b.load(
                    window.view(of * (self.window_rows * self.pitch), number * (s.ci // s.cells)),
                    Access("x", offset, Int(row), Int(s.w * s.ci * self.size)),
                    wide, s.ci // s.cells, high,
                    row_stride=s.ci * self.size, plane_stride=self.pitch * s.ci * self.size,
                )  # fmt: skip

    def _products(
        self, acc: Tile, window: Tile, group: Scalar, start: Scalar, n: Scalar,
        images: Scalar, rows: Scalar, cols: Scalar,
    ) -> None:  # fmt: skip
        b, s, plan = self.b, self.shape, self.plan
        (kh, kw), (dy, dx), (sy, sx) = s.kernel, s.dilation, s.local_stride
        row_bytes = self.pitch * s.ci * self.size
        outer = (rows, sy * row_bytes), (images, self.window_rows * row_bytes)
        with (
            loop(b, "ky", 0, kh) as ky,
            loop(b, "kx", 0, kw, plan.run) as kx,
            loop(b, "c", 0, s.group_ci, plan.bk) as c,
        ):
            bk = b.let("k", minimum(plan.bk, s.group_ci - c))
            weights = self._weights(group, start, n, ky, kx, c, bk)
            right = kx * dx
            view = window.view(
                ky * (dy * (self.pitch // sx)) + right // sx,
                right % sx * s.ci + group * s.group_ci + c,
            )
            k, runs = bk, (1, 0)
            if plan.run > 1 and merges_run(s):
                k = bk * plan.run
            elif plan.run > 1:
                runs = plan.run, dx * s.ci * self.size
            b.dot(
                acc, view, weights, cols, n, k, accumulate=maximum(maximum(ky, kx), c),
                transpose_b=s.layout.turned, a_outer=outer, k_outer=runs,
            )  # fmt: skip

    def _weights(
        self, group: Scalar, start: Scalar, n: Scalar, ky: Scalar, kx: Scalar, c: Scalar,
        bk: Scalar,
    ) -> Tile:  # fmt: skip
        """`run` taps of `bk` channels each: [n, run * bk], or [run * bk, n] if not turned."""
        b, s, plan, lies = self.b, self.shape, self.plan, self.shape.layout
        deep = plan.run * plan.bk
        extents = (plan.bn, deep) if lies.turned else (deep, plan.bn)
        tile = b.tile(self.operand, *extents, name="weights", buffers=plan.buffers)
        offset = group * lies.group + start * lies.output + c * lies.channel + lies.start
        offset = (offset + ky * lies.row + kx * lies.column) * self.size
        rows = Int((lies.output if lies.turned else lies.channel) * self.size)
        if plan.run == 1 or lies.column == s.group_ci * lies.channel:  # taps follow one another
            extent = (n, bk * plan.run) if lies.turned else (bk * plan.run, n)
            b.load(tile, Access("w", offset, rows), *extent)
            return tile
        taps = Access("w", offset, rows, Int(lies.column * self.size))
        extent = (n, bk) if lies.turned else (bk, n)
        step = bk * (self.size if lies.turned else tile.row_bytes)
        b.load(tile, taps, *extent, plan.run, row_stride=tile.row_bytes, plane_stride=step)
        return tile
