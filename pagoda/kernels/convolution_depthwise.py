"""Depthwise convolution: one fused multiply-add per tap and output row on the vector engine.

The array would use one of its columns per channel. A tile is rows x cols outputs of `bn` channels;
its window is loaded row by row, since only a block of channels is taken of each pixel. Taps come in
the order ky, kx from +0.0, as in a matrix product.
"""

from __future__ import annotations

from pagoda.compiler.scalar import CoreCount, CoreId, Int, Scalar, minimum, select
from pagoda.compiler.tile_ir import Access, Kernel, Read, Row, Tile, Tree, apply, splat
from pagoda.kernels.convolution_tiles import ConvolutionBuilder, loop


class Depthwise(ConvolutionBuilder):
    def build(self) -> Kernel:
        b, s, plan = self.b, self.shape, self.plan
        down, across = -(-s.oh // plan.rows), -(-s.ow // plan.cols)
        tiles = self.x.size(0) * (down * across)
        with loop(b, "channel", 0, s.co, plan.bn) as channel:
            n = b.let("n", minimum(plan.bn, s.co - channel))
            weights = self._weights(channel, n)
            with b.loop("tile", CoreId(), tiles, CoreCount()) as tile:
                image = b.let("image", tile // (down * across))
                oy = b.let("oy", tile // across % down * plan.rows)
                ox = b.let("ox", tile % across * plan.cols)
                rows = b.let("rows", minimum(plan.rows, s.oh - oy))
                cols = b.let("cols", minimum(plan.cols, s.ow - ox))
                window = self._window(image, oy, ox, channel, rows, cols, n)
                acc = b.tile(self.sums, plan.pixels, plan.bn, name="acc", memory="acc")
                for ky in range(s.kernel[0]):
                    for kx in range(s.kernel[1]):
                        self._tap(acc, window, weights, ky, kx, rows, cols, n)
                self.finish(acc, channel, n, image, oy, ox, Int(1), rows, cols)
        return b.build()

    def _weights(self, channel: Scalar, n: Scalar) -> Tile:
        """[taps, channels], the taps in the order in which they lie in memory."""
        b, s, plan, lies = self.b, self.shape, self.plan, self.shape.layout
        (kh, kw), row, column = s.kernel, abs(lies.row), abs(lies.column)
        first = lies.start + min(lies.row, 0) * (kh - 1) + min(lies.column, 0) * (kw - 1)
        runs = [(0, kh * kw)] if row == kw * column or kh == 1 else [(k, kw) for k in range(kh)]
        tile = b.tile(self.operand, kh * kw, plan.bn, name="weights")

        def access(ky: int, step: int, tap: int = 0) -> Access:
            offset = channel * lies.group + (first + ky * row + tap * column)
            return Access("w", offset * self.size, Int(step * self.size))

        if lies.group == 1:
            for ky, count in runs:
                b.load(tile.view(ky * kw), access(ky, column), count, n)
            return tile
        stored = b.tile(self.operand, plan.bn, kh * kw, name="stored")
        for ky, count in runs:
            if column == 1 or count == 1:
                b.load(stored.view(0, ky * kw), access(ky, lies.group), n, count)
                continue
            for tap in range(count):
                b.load(stored.view(0, ky * kw + tap), access(ky, lies.group, tap), n, 1)
        b.transpose(tile, stored, n, kh * kw)
        return tile

    def _window(
        self, image: Scalar, oy: Scalar, ox: Scalar, channel: Scalar,
        rows: Scalar, cols: Scalar, n: Scalar,
    ) -> Tile:  # fmt: skip
        b, s, plan = self.b, self.shape, self.plan
        step = s.local_stride[1]
        window = b.tile(
            self.operand, self.window_rows * (self.pitch // step), step * plan.bn,
            name="window", buffers=plan.windows,
        )  # fmt: skip
        high, above, below, y = self.padded(0, oy, rows, s.h)
        wide, left, right, x = self.padded(1, ox, cols, s.w)
        with b.loop("line", 0, high) as line:
            inside = b.let("inside", line.ge(above) * line.lt(high - below))
            source = y + select(inside, line - above, 0)
            access = Access(
                "x", self.input_offset(image, source, x) + channel * self.size,
                Int(s.ci * self.size),
            )  # fmt: skip
            pads = select(inside, left, wide), select(inside, right, 0)
            b.load(
                window.view(line * (self.pitch // step)), access, wide, n, pad_rows=pads,
                row_stride=plan.bn * self.size,
            )  # fmt: skip
        return window

    def _tap(
        self, acc: Tile, window: Tile, weights: Tile, ky: int, kx: int,
        rows: Scalar, cols: Scalar, n: Scalar,
    ) -> None:  # fmt: skip
        b, s, plan = self.b, self.shape, self.plan
        sy, sx = s.local_stride
        right = kx * s.dilation[1]
        lines = self.pitch // sx
        (kh, kw), lies = s.kernel, s.layout
        place = (ky if lies.row >= 0 else kh - 1 - ky) * kw
        factor = Row(weights.view(place + (kx if lies.column >= 0 else kw - 1 - kx)))
        with b.loop("row", 0, rows) as row:
            sums = acc.view(row * cols)
            down = (row * sy + ky * s.dilation[0]) * lines + right // sx
            pixels = Read(window.view(down, right % sx * plan.bn))
            first = ky == kx == 0
            if self.sums.is_float:
                old: Tree = splat(0.0) if first else Read(sums)
                tree = apply("fma", pixels, factor, old)
            else:
                tree = apply("imul", pixels, factor)
                tree = tree if first else apply("iadd", tree, Read(sums))
            b.elementwise(sums, tree, cols, n)
