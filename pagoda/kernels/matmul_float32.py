"""Matrix product of float32 operands: c[g] = a[g] b[g] (+ bias), any strides, f32 or bf16 out.

Meaning. `terms` follows torch's float32 matmul precision (`float32.TERMS`). Each operand x becomes
bf16 terms x0 + x1 (+ x2):

    x0 = bf16(x * (1 - 2^-9))     one float32 product; so no finite x0 overflows. One term: bf16(x)
    x1 = bf16(x - x0),  x2 = bf16(x - x0 - x1)        (both differences are exact)

Of a product of split operands the terms x_i y_j with i + j < terms count, and every one of these
1, 3 or 6 products has a float32 sum of its own, p_ij = sum over k of a_i b_j, k = 0, 1, ... in
order, from +0. In the end, every addition rounded to float32:

    two terms     rest = p_01 + p_10
    three terms   rest = (p_01 + p_10) + ((p_02 + p_11) + p_20)
    c = (rest where p_00 is finite, else 0) + p_00 + bias         rounded to the type of c

No sum sees another before the end, so no bit depends on block sizes. It is also why three terms are
as accurate as float32 arithmetic: each of its roundings is one of p_00, and what the products left
out (below 2^-23 of |x y|) and the roundings of the small sums add is less than those. All nine
products measure the same. Two terms leave out 2^-15 of |x y|.

With three terms x0 + x1 + x2 is x itself when |x| >= 2^-110: below, x2 may underflow. Infinite and
NaN operands act as in float32: their x1 is NaN, but then c is p_00 (+ bias), unless the other
factor is so small that its first term is 0 (below 2^-134).

Schedule. The terms of a tile of a stand on top of each other, so that one matmul multiplies them
all with one term of b and the weights (b) pass through the array `terms` times, not once for every
product; the sums of that matmul are stacked likewise. Where `plan.resident`, the terms of whole
rows of a stay in SRAM while b streams by.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pagoda.compiler.builder import KernelBuilder, TensorHandle
from pagoda.compiler.cost import MatmulShape
from pagoda.compiler.language import TensorType
from pagoda.compiler.scalar import (
    ZERO,
    CoreCount,
    CoreId,
    Scalar,
    ceildiv,
    maximum,
    minimum,
)
from pagoda.compiler.tile_ir import (
    Access,
    Kernel,
    Read,
    Row,
    Tile,
    Tree,
    View,
    apply,
    splat,
)
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.matmul_float32_blocks import (
    FLOAT_BYTES,
    LOADED,
    PASSED,
    Float32Plan,
    choose_float32_plan,
    sums,
)

FIRST_TERM_SCALE = 1 - 2.0**-9


def build_matmul_float32(
    chip: Chip,
    c: TensorType,
    a: TensorType,
    b: TensorType,
    bias: TensorType | None = None,
    *,
    terms: int = 3,
    expected: tuple[int, int, int, int] | None = None,
    plan: Float32Plan | None = None,
) -> Kernel:
    """The kernel for these operands, all of rank 3 (bias: 1), with the cheapest block sizes.

    a, b: F32; c, bias: F32 or BF16. Sizes and strides are None where the call gives them; known
    contiguous dimensions make it fast. terms: 1 to 3. expected: (batch, m, n, k) to choose block
    sizes for; default: the fixed sizes, and 64 for each unknown one. plan: block sizes chosen
    elsewhere. Any plan gives the same bits. Raises CompileError.
    """
    assert a.dtype == b.dtype == DType.F32 and 1 <= terms <= 3, (a.dtype, b.dtype, terms)
    fixed = (c.sizes[0], c.sizes[1] or a.sizes[1], c.sizes[2] or b.sizes[2], a.sizes[2])
    batch, m, n, k = expected or tuple(64 if s is None else s for s in fixed)
    shape = MatmulShape(
        batch, m, n, k, FLOAT_BYTES, c.dtype.bits // 8,
        transposed_a=_layout(a) == "turned", transposed_b=_layout(b) == "turned",
        bias=bias is not None, fixed_k=a.sizes[2] is not None,
    )  # fmt: skip
    plan = plan or choose_float32_plan(chip, shape, terms)
    return _Product(c, a, b, bias, terms, plan).build()


def _layout(tensor: TensorType) -> str:
    """How a tile of the last two dimensions is stored: "upright" rows, "turned" (its columns are
    contiguous), or "scattered"."""
    element = tensor.dtype.bits // 8
    for dim, name in ((-1, "upright"), (-2, "turned")):
        if tensor.strides[dim] == element or tensor.sizes[dim] == 1:
            return name
    return "scattered"


@dataclass(frozen=True)
class _Span:
    """Part of a dimension: from index `start` on `count` indices, at most `block`."""

    start: Scalar
    count: Scalar
    block: int


class _Product:
    """Builds the kernel; each method emits the statements of one step."""

    def __init__(
        self,
        c: TensorType,
        a: TensorType,
        b: TensorType,
        bias: TensorType | None,
        terms: int,
        plan: Float32Plan,
    ):
        self.terms, self.plan = terms, plan
        self.b = KernelBuilder(f"matmul_float32_{terms}" + "_resident" * plan.resident)
        self.layouts = {"c": _layout(c), "a": _layout(a), "b": _layout(b)}
        self.c, self.a, self.w = (
            self._tensor(name, given) for name, given in (("c", c), ("a", a), ("b", b))
        )
        self.bias = None if bias is None else self._tensor("bias", bias)
        for name, size in (("BM", plan.bm), ("BN", plan.bn), ("BK", plan.bk)):
            self.b.block(name, size)

    def _tensor(self, name: str, given: TensorType) -> TensorHandle:
        rank = len(given.sizes)
        return self.b.tensor(name, given.dtype, rank, sizes=given.sizes, strides=given.strides)

    def build(self) -> Kernel:
        batch, self.m, self.n = (self.c.size(dim) for dim in range(3))
        self.depth = self.a.size(2)
        down = ceildiv(self.m, self.plan.bm)
        if self.plan.resident:
            self._resident_units(batch, down)
        else:
            self._tiles(batch, down)
        return self.b.build()

    # Work and its order --------------------------------------------------------------------------

    def _tiles(self, batch: Scalar, down: Scalar) -> None:
        """Output tiles dealt out to the cores."""
        b, plan = self.b, self.plan
        across = b.let("across", ceildiv(self.n, plan.bn))
        tiles = b.let("tiles", across * down)
        with b.loop("t", CoreId(), batch * tiles, CoreCount()) as t:
            row_block = b.let("row_block", t // across)
            g = b.let("g", t // tiles)
            rows = self._span("row", (row_block - g * down) * plan.bm, self.m, plan.bm)
            columns = self._span("col", (t - row_block * across) * plan.bn, self.n, plan.bn)
            acc = self._accumulators()
            with self._depths() as depth:
                b_terms = self._split_b(g, depth, columns)  # before a, which may come late
                stack = self._a_terms(plan.bk, PASSED)
                self._split_a(stack, g, rows, depth, ZERO)
                self._dots(acc, stack, ZERO, b_terms, rows, columns, depth)
            self._finish(acc, g, rows, columns)

    def _resident_units(self, batch: Scalar, down: Scalar) -> None:
        """A unit: a block of rows by every `parts`-th block of columns."""
        b, plan = self.b, self.plan
        units = b.let("units", batch * down * plan.parts)
        with b.loop("unit", CoreId(), units, CoreCount()) as unit:
            block = b.let("row_block", unit // plan.parts)
            part = b.let("part", unit - block * plan.parts)
            g = b.let("g", block // down)
            rows = self._span("row", (block - g * down) * plan.bm, self.m, plan.bm)
            fixed = self.a.tensor.sizes[2]
            assert fixed is not None, "resident rows have a compile-time length"
            stack = self._a_terms(max(fixed, 1), 1)
            with self._depths() as depth:
                self._split_a(stack, g, rows, depth, depth.start)
            first, step = b.let("first", part * plan.bn), plan.parts * plan.bn
            with b.loop("j", first, self.n, step, ahead=LOADED - 1) as j:
                columns = self._span("col", j, self.n, plan.bn)
                acc = self._accumulators()
                with self._depths() as depth:
                    b_terms = self._split_b(g, depth, columns)
                    self._dots(acc, stack, depth.start, b_terms, rows, columns, depth)
                self._finish(acc, g, rows, columns)

    def _span(self, name: str, start: Scalar, extent: Scalar, block: int) -> _Span:
        start = self.b.let(name, start)
        return _Span(start, self.b.let(f"{name}s", minimum(block, extent - start)), block)

    @contextmanager
    def _depths(self) -> Iterator[_Span]:
        """The loop over k; an empty k is one empty step, which makes the sums zero."""
        b, block = self.b, self.plan.bk
        with b.loop("k", ZERO, maximum(self.depth, 1), block) as k:
            yield _Span(k, b.let("ks", minimum(block, self.depth - k)), block)

    # Operands ------------------------------------------------------------------------------------

    def _a_terms(self, cols: int, buffers: int) -> Tile:
        rows = self.terms * self.plan.bm
        return self.b.tile(DType.BF16, rows, cols, name="a_terms", buffers=buffers)

    def _split_a(self, stack: Tile, g: Scalar, rows: _Span, depth: _Span, col: Scalar) -> None:
        """Term i of a tile of a to the rows from i * rows.count on, from column `col` on."""
        b, shape = self.b, (rows.count, depth.count)
        places = [stack.view(rows.count * term, col) for term in range(self.terms)]
        if self.terms == 1 and self.layouts["a"] != "turned":
            self._load(places[0], self.a, g, rows, depth)
            return
        loaded = self._loaded("a", self.a, g, rows, depth)
        if self.layouts["a"] == "turned":
            if self.terms == 1:
                b.transpose(places[0], loaded, depth.count, rows.count)
                return
            turned, loaded = loaded, b.tile(loaded.dtype, rows.block, depth.block, name="a_rows")
            b.transpose(loaded, turned, depth.count, rows.count)
        self._split(loaded, places, *shape)

    def _split_b(self, g: Scalar, depth: _Span, columns: _Span) -> list[Tile]:
        loaded = self._loaded("b", self.w, g, depth, columns)
        if self.terms == 1:
            return [loaded]
        tiles = [
            self.b.tile(DType.BF16, loaded.rows, loaded.cols, name=f"b{term}", buffers=PASSED)
            for term in range(self.terms)
        ]
        turned = self.layouts["b"] == "turned"
        shape = (columns.count, depth.count) if turned else (depth.count, columns.count)
        self._split(loaded, [tile.view() for tile in tiles], *shape)
        return tiles

    def _split(self, source: Tile, places: Sequence[View], rows: Scalar, cols: Scalar) -> None:
        x, b = Read(source.view()), self.b
        b.elementwise(places[0], apply("fmul", x, splat(FIRST_TERM_SCALE)), rows, cols)
        rest: Tree = x
        for previous, place in itertools.pairwise(places):
            rest = apply("fsub", rest, Read(previous))
            b.elementwise(place, rest, rows, cols)

    def _loaded(
        self, name: str, tensor: TensorHandle, g: Scalar, rows: _Span, cols: _Span
    ) -> Tile:
        """A tile of a tensor as it is stored; for one term already rounded to it."""
        if self.layouts[name] == "turned":
            extents = cols.block, rows.block
        else:
            extents = rows.block, cols.block
        dtype = DType.BF16 if self.terms == 1 else DType.F32
        tile = self.b.tile(dtype, *extents, name=f"{name}_tile", buffers=LOADED)
        self._load(tile.view(), tensor, g, rows, cols)
        return tile

    def _load(
        self, place: View, tensor: TensorHandle, g: Scalar, rows: _Span, cols: _Span
    ) -> None:
        b, tile, name = self.b, place.tile, tensor.tensor.name
        offset = g * tensor.stride(0) + rows.start * tensor.stride(1)
        offset = offset + cols.start * tensor.stride(2)
        if self.layouts[name] == "upright":
            b.load(place, Access(name, offset, tensor.stride(1)), rows.count, cols.count)
        elif self.layouts[name] == "turned":
            b.load(place, Access(name, offset, tensor.stride(2)), cols.count, rows.count)
        else:  # element by element, each an atom of its own
            b.load(
                place, Access(name, offset, tensor.stride(2), tensor.stride(1)),
                cols.count, 1, rows.count,
                row_stride=tile.element_bytes, plane_stride=tile.row_bytes,
            )  # fmt: skip

    # Sums ----------------------------------------------------------------------------------------

    def _accumulators(self) -> Tile:
        """For each term of b the sums with the terms of a, stacked like those; all stacked."""
        rows = sums(self.terms) * self.plan.bm
        return self.b.tile(DType.F32, rows, self.plan.bn, name="sums", memory="acc")

    def _sum(self, acc: Tile, i: int, j: int, rows: _Span) -> View:
        """Where p_ij is; the sums with b_j follow those with b_0, ..., b_j-1."""
        before = sums(self.terms) - sums(self.terms - j)
        return acc.view(rows.count * (before + i))

    def _dots(
        self, acc: Tile, stack: Tile, col: Scalar, b_terms: list[Tile],
        rows: _Span, columns: _Span, depth: _Span,
    ) -> None:  # fmt: skip
        for term, b_term in enumerate(b_terms):
            self.b.dot(
                self._sum(acc, 0, term, rows), stack.view(0, col), b_term,
                rows.count * (self.terms - term), columns.count, depth.count,
                accumulate=depth.start.ne(0), transpose_b=self.layouts["b"] == "turned",
            )  # fmt: skip

    def _finish(self, acc: Tile, g: Scalar, rows: _Span, columns: _Span) -> None:
        """Adds the sums of an output tile up and stores it."""
        b, shape = self.b, (rows.count, columns.count)
        extents = self.plan.bm, self.plan.bn

        def p(i: int, j: int) -> Read:
            return Read(self._sum(acc, i, j, rows))

        total: Tree = p(0, 0)
        if self.terms > 1:
            rest = b.tile(DType.F32, *extents, name="rest")
            first = apply("fadd", p(0, 1), p(1, 0))
            if self.terms == 2:
                b.elementwise(rest, first, *shape)
            else:
                last = apply("fadd", apply("fadd", p(0, 2), p(1, 1)), p(2, 0))
                b.elementwise(rest, last, *shape)
                b.elementwise(rest, apply("fadd", first, Read(rest.view())), *shape)
            finite = b.tile(DType.I32, *extents, name="finite")
            number = apply("feq", apply("fmul", total, splat(0.0)), splat(0.0))
            b.elementwise(finite, number, *shape)
            kept = apply("select", Read(finite.view()), Read(rest.view()), splat(0.0))
            b.elementwise(rest, kept, *shape)
            total = apply("fadd", Read(rest.view()), total)
        if self.bias is not None:
            total = apply("fadd", total, Row(self._load_bias(columns).view()))
        out = b.tile(self.c.tensor.dtype, *extents, name="out", buffers=PASSED)
        b.elementwise(out, total, *shape)
        self._store(out, g, rows, columns)

    def _load_bias(self, columns: _Span) -> Tile:
        b, bias = self.b, self.bias
        assert bias is not None
        tile = b.tile(bias.tensor.dtype, 1, columns.block, name="bias_row", buffers=PASSED)
        offset, element = columns.start * bias.stride(0), tile.element_bytes
        if bias.tensor.strides[0] == element:
            b.load(tile, Access("bias", offset), 1, columns.count)
        else:
            access = Access("bias", offset, bias.stride(0))
            b.load(tile, access, columns.count, 1, row_stride=element)
        return tile

    def _store(self, out: Tile, g: Scalar, rows: _Span, columns: _Span) -> None:
        b, c = self.b, self.c
        offset = g * c.stride(0) + rows.start * c.stride(1) + columns.start * c.stride(2)
        if self.layouts["c"] == "upright":
            b.store(Access("c", offset, c.stride(1)), out, rows.count, columns.count)
        elif self.layouts["c"] == "turned":
            turned = b.tile(out.dtype, out.cols, out.rows, name="out_turned", buffers=PASSED)
            b.transpose(turned, out, rows.count, columns.count)
            b.store(Access("c", offset, c.stride(2)), turned, columns.count, rows.count)
        else:  # element by element
            with b.loop("row_out", ZERO, rows.count) as row:
                access = Access("c", offset + row * c.stride(1), c.stride(2))
                view = out.view(row)
                b.store(access, view, columns.count, 1, row_stride=out.element_bytes)
