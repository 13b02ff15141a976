"""Scaled dot-product attention with grouped key/value heads, as one kernel.

    out[b,h,i,:] = softmax_s(scale * q[b,h,i,:] . k[b,g,s,:] + mask[b,h,i,s]) v[b,g,s,:]

with g = h // (H / G); `region.LIBRARY["sdpa"]` says what the arguments mean. Causal: query i sees
the keys s <= i + offset, where `offset` counts the keys that precede query 0 (a decoding step of Q
queries on a cache of S keys has offset S - Q). A row that sees nothing is 0.

Meaning. Keys are worked off in softmax blocks of SOFTMAX_BLOCK = 512 (online softmax):

    t = scale' * (q . k)        float32, one rounding; the dot adds d = 0, 1, ... in order
    t = -inf where hidden       by a bool mask or causality
    m = max(m, max t)           over the blocks so far, from -FLT_MAX on
    p = bf16(exp2(t - m))       0 where t is -inf
    l = l * exp2(m_old - m) + sum p      in 64 lanes: lane s mod 64 adds its keys in order
    o = o * exp2(m_old - m) + p v        adds s = 0, 1, ... in order
    out = o * (1 / max(l, 1)) + 0        rounded to the type of out; 1 / l by table if that is bf16

where scale' = scale * log2(e). With a float mask t = fma(scale, q . k, mask) and exp2(x) becomes
exp2(x * log2(e)), so that masks of -FLT_MAX keep their meaning. l >= 1 unless a row sees nothing.

float32 tensors: `terms` = 1 rounds q, k, v to bf16; 2 or 3 split q, k, v and p into that many bf16
terms (see `float32`); l then sums the float32 p, and in p v the products of all terms of one run
of `float32_keys` keys are added before those of the next run.

Keys that no row of a row block sees are skipped, others weigh 0. So the bits are the same for all
blocks, provided that hidden rows of v are finite.

Schedule. A unit of work is a (batch, group block, head block, query block); unit u belongs to core
u mod cores. Its rows are the queries of the heads that share a KV head, so that K and V are read
once for all of them, and when that is few (decoding), of several KV heads: each has matrix products
of its own, but the softmax is one. The first loop over a softmax block loads K, makes scores and
their maximum span by span; the second makes weights, loads V and adds to the result.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from pagoda.compiler.builder import KernelBuilder, TensorHandle
from pagoda.compiler.scalar import (
    ONE,
    ZERO,
    CoreCount,
    CoreId,
    Scalar,
    Variable,
    maximum,
    minimum,
)
from pagoda.compiler.tile_ir import (
    Access,
    Column,
    Kernel,
    Let,
    Read,
    Row,
    Tile,
    Tree,
    View,
    apply,
    splat,
)
from pagoda.isa.numbers import DType
from pagoda.kernels.attention_blocks import (
    SOFTMAX_BLOCK,
    SPAN_UNIT,
    AttentionBlocks,
    float32_keys,
)
from pagoda.kernels.float32 import products, split_terms

LOG2_E = math.log2(math.e)
FLT_MAX = struct.unpack("<f", struct.pack("<I", 0x7F7FFFFF))[0]


def attention_kernel(
    dtype: DType,
    head_dim: int,
    causal: bool,
    mask: DType | None,
    terms: int,
    blocks: AttentionBlocks,
    *,
    value_dim: int | None = None,
) -> Kernel:
    """The kernel for tensors of `dtype` (BF16 or F32), out included.

    mask: None, BOOL, F32 or BF16. terms: 1; for F32 also 2 or 3. Tensors, in order: out[b,h,i,e],
    q[b,h,i,d], k[b,g,s,d], v[b,g,s,e] with run-time strides except along the head dimension, which
    is contiguous; mask[b,h,i,s] with any strides (0 where it is broadcast). Scalars: `SCALARS`, and
    `offset` if causal; `attention_call.attention_arguments` gives them.
    """
    assert dtype in (DType.BF16, DType.F32) and mask in (None, DType.BOOL, DType.F32, DType.BF16)
    assert 1 <= terms <= (3 if dtype is DType.F32 else 1)
    assert SOFTMAX_BLOCK % blocks.span == blocks.span % blocks.keys == blocks.span % SPAN_UNIT == 0
    width = value_dim or head_dim
    assert terms == 1 or blocks.keys == float32_keys(max(head_dim, width)), blocks
    return _Attention(dtype, head_dim, width, causal, mask, terms, blocks).build()


SCALARS = (
    "scale", "heads_per_group", "group_block", "head_block", "query_block",
    "group_blocks", "head_blocks", "query_blocks",
)  # fmt: skip
"""scale: float32 bits of scale' (see the module). heads_per_group: H / G. group_block, head_block,
query_block: KV heads, query heads of each, and queries of a unit, whose product is at most `rows`;
if group_block > 1, head_block is H / G. group_blocks, head_blocks, query_blocks: how many of them
cover G, H / G and Q."""


class _Attention:
    """Builds the kernel; each method emits the statements of one step."""

    def __init__(
        self,
        dtype: DType,
        head_dim: int,
        value_dim: int,
        causal: bool,
        mask: DType | None,
        terms: int,
        blocks: AttentionBlocks,
    ):
        self.dtype, self.head_dim, self.value_dim = dtype, head_dim, value_dim
        self.causal, self.mask_dtype, self.terms, self.blocks = causal, mask, terms, blocks
        kinds = ("_causal" * causal, f"_{mask.name.lower()}_mask" if mask is not None else "")
        b = KernelBuilder(f"attention_{dtype.name.lower()}_{head_dim}{''.join(kinds)}")
        for name in ("rows", "span", "keys"):
            b.block(name, getattr(blocks, name))
        b.block("terms", terms)
        self.b = b
        self.out = self._tensor("out", value_dim)
        self.q = self._tensor("q", head_dim)
        self.k = self._tensor("k", head_dim)
        self.v = self._tensor("v", value_dim)
        self.mask = b.tensor("mask", mask, 4) if mask is not None else None
        self.scalars = {name: b.scalar(name) for name in SCALARS}
        self.offset: Scalar = b.scalar("offset") if causal else ZERO

    def _tensor(self, name: str, width: int) -> TensorHandle:
        fixed = {"sizes": (None,) * 3 + (width,), "strides": (None,) * 3 + (self.dtype.bits // 8,)}
        return self.b.tensor(name, self.dtype, 4, **fixed)

    def build(self) -> Kernel:
        b, given = self.b, self.scalars
        shared, group_block = given["heads_per_group"], given["group_block"]
        counts = [given[name] for name in ("group_blocks", "head_blocks", "query_blocks")]
        units = b.let("units", self.q.size(0) * counts[0] * counts[1] * counts[2])
        with b.loop("unit", CoreId(), units, CoreCount()) as unit:
            rest, query_index = self._divide("query", unit, counts[2])
            rest, head_index = self._divide("head", rest, counts[1])
            self.batch, group_index = self._divide("group", rest, counts[0])
            self.group = b.let("group", group_index * group_block)
            self.groups = b.let("groups", minimum(group_block, self.k.size(1) - self.group))
            first = b.let("first_head", head_index * given["head_block"])
            heads = b.let("group_heads", minimum(given["head_block"], shared - first))
            self.head = b.let("head", self.group * shared + first)
            self.heads = b.let("heads", heads * self.groups)
            self.query = b.let("query", query_index * given["query_block"])
            rest = self.q.size(2) - self.query
            self.queries = b.let("queries", minimum(given["query_block"], rest))
            self.group_rows = b.let("group_rows", heads * self.queries)
            self.rows = b.let("rows", self.heads * self.queries)
            self._unit()
        return b.build()

    def _divide(self, name: str, value: Scalar, count: Scalar) -> tuple[Scalar, Scalar]:
        """value // count and value % count; a count of 1 costs no division."""
        b = self.b
        quotient, remainder = b.fresh(f"{name}_quotient"), b.fresh(f"{name}_index")
        b.emit(Let(quotient, value))
        b.emit(Let(remainder, ZERO))
        with b.when(count.gt(1)):
            b.emit(Let(quotient, value // count))
            b.emit(Let(remainder, value - Variable(quotient) * count))
        return Variable(quotient), Variable(remainder)

    # One unit ------------------------------------------------------------------------------------

    def _unit(self) -> None:
        b, most = self.b, self.blocks.rows
        q_terms = self._load_queries()
        result = b.tile(DType.F32, most, self.value_dim, name="result", memory="acc")
        max_state = b.tile(DType.F32, most, SPAN_UNIT, name="max_state")
        sum_state = b.tile(DType.F32, most, SPAN_UNIT, name="sum_state")
        maxima = b.tile(DType.F32, most, 2, name="maxima")  # of this block and the one before
        scores = b.tile(DType.F32, most, SOFTMAX_BLOCK, name="scores")
        b.elementwise(max_state, splat(-FLT_MAX), self.rows)
        seen = self.k.size(2)
        limits = None
        if self.causal:
            # The unit's first query sees the keys before first_limit, each later one a key more.
            self.first_limit = b.let("first_limit", self.query + self.offset + 1)
            last_limit = self.first_limit + (self.queries - 1)
            seen = b.let("seen", maximum(minimum(seen, last_limit), 0))
            limits = self._limits(seen)
        parity = b.fresh("parity")
        b.emit(Let(parity, ZERO))
        with b.loop("block", 0, maximum(seen, 1), SOFTMAX_BLOCK) as block:
            keys = b.let("keys", minimum(SOFTMAX_BLOCK, seen - block))
            with b.loop("span", 0, keys, self.blocks.span) as span:
                count = b.let("count", minimum(self.blocks.span, keys - span))
                first = b.let("first", block + span)
                dots = self._dot_keys(q_terms, first, count)
                view = scores.view(0, span)
                self._mask_scores(view, dots, first, count, limits)
                b.reduce("fmax", max_state, view, self.rows, count, first=0, start=span)
            maximum_now = maxima.view(0, Variable(parity))
            b.finish("fmax", maximum_now, max_state, self.rows)
            with b.when(block.ne(0)):
                before = maxima.view(0, ONE - Variable(parity))
                self._rescale(before, maximum_now, sum_state, result)
            with b.loop("span", 0, maximum(keys, 1), self.blocks.span) as span:
                count = b.let("count", minimum(self.blocks.span, keys - span))
                first = b.let("first", block + span)
                weights = self._weights(scores.view(0, span), maximum_now, count, sum_state, first)
                self._dot_values(result, weights, first, count)
            b.emit(Let(parity, ONE - Variable(parity)))
        self._write(result, sum_state)

    def _load_queries(self) -> list[Tile]:
        b, most = self.b, self.blocks.rows
        window = self.q.at(self.batch, self.head, self.query)
        if self.terms == 1:
            tile = b.tile(DType.BF16, most, self.head_dim, name="q_tile", buffers=2)
            self._load_rows(tile, window, self.head_dim)
            return [tile]
        whole = b.tile(DType.F32, most, self.head_dim, name="q_float", buffers=1)
        self._load_rows(whole, window, self.head_dim)
        terms = self._term_tiles("q", most, self.head_dim)
        split_terms(b, whole, terms, self.rows, self.head_dim)
        return terms

    def _load_rows(self, tile: Tile, window: Access, cols: Scalar | int) -> None:
        """A window of the unit's heads (planes) and queries (rows), stacked without gaps."""
        extents = self.queries, cols, self.heads
        self.b.load(tile, window, *extents, plane_stride=self.queries * tile.row_bytes)

    def _term_tiles(self, name: str, rows: int, cols: int) -> list[Tile]:
        return [
            self.b.tile(DType.BF16, rows, cols, name=f"{name}{term}") for term in range(self.terms)
        ]

    def _limits(self, seen: Scalar) -> Tile:
        """The number of keys each row sees; made only if some row of the unit sees fewer."""
        b = self.b
        limits = b.tile(DType.I32, self.blocks.rows, 1, name="limits")
        with b.when(seen.gt(self.first_limit)), b.loop("plane", 0, self.heads) as plane:
            place = limits.view(plane * self.queries, 0)
            b.iota(place, self.queries, 1, start=self.first_limit, row_step=1)
        return limits

    # Scores --------------------------------------------------------------------------------------

    def _dot_keys(self, q_terms: list[Tile], first: Scalar, count: Scalar) -> Tile:
        """q k^T for `count` keys from `first` on, in ACC."""
        b = self.b
        acc = b.tile(DType.F32, self.blocks.rows, self.blocks.span, name="dots", memory="acc")
        with self._runs(count) as (run, keys), b.loop("member", 0, self.groups) as member:
            window = self.k.at(self.batch, self.group + member, first + run)
            k_terms = self._load_terms("k", window, keys, self.head_dim)
            row = b.let("row", member * self.group_rows)
            for number, (i, j) in enumerate(products(self.terms)):
                b.dot(
                    acc.view(row, run), q_terms[i].view(row), k_terms[j],
                    self.group_rows, keys, self.head_dim,
                    accumulate=int(number > 0), transpose_b=True,
                )  # fmt: skip
        return acc

    @contextmanager
    def _runs(self, count: Scalar, once: bool = False) -> Iterator[tuple[Scalar, Scalar]]:
        """Cuts a span of `count` keys into runs of one matmul: yields (first key, keys). `once`:
        an empty span is one empty run."""
        b, most = self.b, self.blocks.keys
        if most == self.blocks.span:
            yield ZERO, count
            return
        with b.loop("run", 0, maximum(count, 1) if once else count, most) as run:
            yield run, b.let("run_keys", minimum(most, count - run))

    def _load_terms(self, name: str, window: Access, keys: Scalar, width: int) -> list[Tile]:
        """Rows of K or V as bf16 terms."""
        b, most = self.b, self.blocks.keys
        if self.terms == 1:
            tile = b.tile(DType.BF16, most, width, name=f"{name}_tile")
            b.load(tile, window, keys, width)
            return [tile]
        whole = b.tile(DType.F32, most, width, name=f"{name}_float", buffers=1)
        b.load(whole, window, keys, width)
        terms = self._term_tiles(name, most, width)
        split_terms(b, whole, terms, keys, width)
        return terms

    def _mask_scores(
        self, view: View, dots: Tile, first: Scalar, count: Scalar, limits: Tile | None
    ) -> None:
        """Scaled and masked scores of `count` keys from `first` on."""
        b, shape = self.b, (self.rows, count)
        scale = splat(self.scalars["scale"], "float")
        scaled = apply("fmul", Read(dots.view()), scale)
        visible: Tree | None = None
        if self.mask_dtype is not None:
            mask = self._load_mask(first, count)
            if self.mask_dtype is DType.BOOL:
                visible = Read(mask.view())
            else:
                scaled = apply("fma", Read(dots.view()), scale, Read(mask.view()))
        if limits is None:
            b.elementwise(view, _hide(scaled, visible), *shape)
            return
        with b.body() as plain:
            b.elementwise(view, _hide(scaled, visible), *shape)
        # `limits` exist where a row of the unit sees fewer keys than another.
        with b.when((first + count).gt(self.first_limit), plain):
            position = b.tile(DType.I32, 1, self.blocks.span, name="position")
            b.iota(position, 1, count, start=first)
            before = apply("ilt", Row(position.view()), Column(limits.view()))
            both = before if visible is None else apply("and", before, visible)
            shown = b.tile(DType.I8, self.blocks.rows, self.blocks.span, name="visible")
            b.elementwise(shown, both, *shape)
            b.elementwise(view, _hide(scaled, Read(shown.view())), *shape)

    def _load_mask(self, first: Scalar, count: Scalar) -> Tile:
        """The mask of the unit's rows; keys need not be contiguous in memory."""
        b, mask = self.b, self.mask
        assert mask is not None
        local = DType.I8 if self.mask_dtype is DType.BOOL else self.mask_dtype
        tile = b.tile(local, self.blocks.rows, self.blocks.span, name="mask_tile", buffers=2)
        window = mask.at(self.batch, self.head, self.query, first, rows=2, planes=1)
        with b.body() as scattered, b.loop("plane", 0, self.heads) as plane:
            offset = window.offset + plane * mask.stride(1)
            b.load(
                tile.view(plane * self.queries, 0),
                Access("mask", offset, mask.stride(3), mask.stride(2)),
                count, 1, self.queries,
                row_stride=tile.element_bytes, plane_stride=tile.row_bytes,
            )  # fmt: skip
        with b.when(mask.stride(3).eq(mask.tensor.dtype.bits // 8), scattered):
            self._load_rows(tile, window, count)
        return tile

    # Weights and result --------------------------------------------------------------------------

    def _rescale(self, before: View, now: View, sum_state: Tile, result: Tile) -> None:
        """What was summed up relative to the maximum `before`, relative to `now`."""
        b = self.b
        factor = b.tile(DType.F32, self.blocks.rows, 1, name="factor")
        b.elementwise(factor, self._power(Read(before), Read(now)), self.rows, 1)
        for tile in (sum_state, result):
            b.elementwise(tile, apply("fmul", Read(tile.view()), Column(factor.view())), self.rows)

    def _power(self, score: Tree, maximum_now: Tree) -> Tree:
        difference = apply("fsub", score, maximum_now)
        if self.mask_dtype in (DType.F32, DType.BF16):
            difference = apply("fmul", difference, splat(LOG2_E))
        return apply("exp2", difference)

    def _weights(
        self, scores: View, maximum_now: View, count: Scalar, sum_state: Tile, first: Scalar
    ) -> list[Tile]:
        """The weights of one span of keys as bf16 terms, added to the sum."""
        b, shape = self.b, (self.blocks.rows, self.blocks.span)
        summed = b.tile(DType.BF16 if self.terms == 1 else DType.F32, *shape, name="weights")
        power = self._power(Read(scores), Column(maximum_now))
        b.elementwise(summed, power, self.rows, count)
        b.reduce("fsum", sum_state, summed, self.rows, count, first=first.eq(0), start=scores.col)
        if self.terms == 1:
            return [summed]
        terms = self._term_tiles("weights", *shape)
        split_terms(b, summed, terms, self.rows, count)
        return terms

    def _dot_values(self, result: Tile, weights: list[Tile], first: Scalar, count: Scalar) -> None:
        """result += weights v for `count` keys from `first` on; from key 0 on it starts anew."""
        b = self.b
        runs = self._runs(count, once=True)
        with runs as (run, keys), b.loop("member", 0, self.groups) as member:
            window = self.v.at(self.batch, self.group + member, first + run)
            v_terms = self._load_terms("v", window, keys, self.value_dim)
            row = b.let("row", member * self.group_rows)
            for number, (i, j) in enumerate(products(self.terms)):
                b.dot(
                    result.view(row), weights[i].view(row, run), v_terms[j],
                    self.group_rows, self.value_dim, keys,
                    accumulate=1 if number else (first + run).ne(0),
                )  # fmt: skip

    def _write(self, result: Tile, sum_state: Tile) -> None:
        b, most = self.b, self.blocks.rows
        total = b.tile(DType.F32, most, 1, name="total")
        b.finish("fsum", total, sum_state, self.rows)
        positive = apply("fmax", Read(total.view()), splat(1.0))
        # The table's 2 ulp are far below bf16, and it takes a quarter of a division's time.
        exact = self.dtype is DType.F32
        inverse = apply("fdiv", splat(1.0), positive) if exact else apply("recip", positive)
        b.elementwise(total, inverse, self.rows)
        rounded = b.tile(self.dtype, most, self.value_dim, name="rounded")
        quotient = apply("fmul", Read(result.view()), Column(total.view()))
        b.elementwise(rounded, apply("fadd", quotient, splat(0.0)), self.rows)
        b.store(
            self.out.at(self.batch, self.head, self.query), rounded,
            self.queries, self.value_dim, self.heads,
            plane_stride=self.queries * rounded.row_bytes,
        )  # fmt: skip


def _hide(scores: Tree, visible: Tree | None) -> Tree:
    """-inf where not visible; a select, so that a hidden NaN does not show."""
    if visible is None:
        return scores
    return apply("select", visible, scores, splat(-math.inf))
