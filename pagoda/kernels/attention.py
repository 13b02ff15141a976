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

With statistics, a row also leaves (m, log2(max(l, 1))), log2 by table: what the backward pass makes
its weights of (`attention_backward`).

With dropout p is 0 in p v where the weight is dropped, and 1 / max(l, 1) is multiplied by
1 / (1 - probability) (`attention_dropout`).

Here scale' = scale * log2(e). With a float mask t = fma(scale, q . k, mask) and exp2(x) becomes
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
their maximum span by span; the second makes weights, loads V and adds to the result. Between the
two the matrix engine gets the first scores of the next unit to do, and the result of the last one
is written (not if operands are split into terms): so neither engine waits long for the other.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

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
    KEY_BUFFERS,
    SOFTMAX_BLOCK,
    SPAN_UNIT,
    AttentionBlocks,
    float32_keys,
)
from pagoda.kernels.attention_dropout import Dropout, kept
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
    statistics: bool = False,
    dropout: bool = False,
) -> Kernel:
    """The kernel for tensors of `dtype` (BF16 or F32), out included.

    mask: None, BOOL, F32 or BF16. terms: 1; for F32 also 2 or 3. Tensors, in order: out[b,h,i,e],
    with `statistics` also statistics[b,h,i,2] (F32), q[b,h,i,d], k[b,g,s,d], v[b,g,s,e] with
    run-time strides except along the last dimension, which is contiguous; mask[b,h,i,s] with any
    strides (0 where it is broadcast); with `dropout` those of `Dropout`. Scalars: `SCALARS`,
    `offset` if causal, and `Dropout`'s; `attention_call.attention_arguments` gives them.
    """
    assert dtype in (DType.BF16, DType.F32) and mask in (None, DType.BOOL, DType.F32, DType.BF16)
    assert 1 <= terms <= (3 if dtype is DType.F32 else 1)
    assert SOFTMAX_BLOCK % blocks.span == blocks.span % blocks.keys == blocks.span % SPAN_UNIT == 0
    width = value_dim or head_dim
    assert terms == 1 or blocks.keys == float32_keys(max(head_dim, width)), blocks
    options = statistics, dropout
    return _Attention(dtype, head_dim, width, causal, mask, terms, blocks, *options).build()


SCALARS = (
    "scale", "heads_per_group", "group_block", "head_block", "query_block",
    "group_blocks", "head_blocks", "query_blocks",
)  # fmt: skip
"""scale: float32 bits of scale' (see the module). heads_per_group: H / G. group_block, head_block,
query_block: KV heads, query heads of each, and queries of a unit, whose product is at most `rows`;
if group_block > 1, head_block is H / G. group_blocks, head_blocks, query_blocks: how many of them
cover G, H / G and Q."""


@dataclass(frozen=True)
class _Unit:
    """One unit of work. rows = heads * queries, group_rows of them per KV head; seen: keys that its
    last query sees; first_limit: those that its first one does (if causal: each later query of a
    head sees one more)."""

    batch: Scalar
    group: Scalar
    groups: Scalar
    head: Scalar
    heads: Scalar
    query: Scalar
    queries: Scalar
    group_rows: Scalar
    rows: Scalar
    first_limit: Scalar
    seen: Scalar


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
        statistics: bool,
        dropout: bool,
    ):
        self.dtype, self.head_dim, self.value_dim = dtype, head_dim, value_dim
        self.causal, self.mask_dtype, self.terms, self.blocks = causal, mask, terms, blocks
        self.added = mask in (DType.F32, DType.BF16)  # the mask, to the scores
        kinds = ("_causal" * causal, f"_{mask.name.lower()}_mask" if mask is not None else "")
        kinds += ("_statistics" * statistics, "_dropout" * dropout)
        b = KernelBuilder(f"attention_{dtype.name.lower()}_{head_dim}{''.join(kinds)}")
        for name in ("rows", "span", "keys"):
            b.block(name, getattr(blocks, name))
        b.block("terms", terms)
        self.b = b
        self.out = self._tensor("out", value_dim)
        self.statistics: TensorHandle | None = None
        if statistics:
            self.statistics = row_tensor(b, "statistics", DType.F32, 2)
        self.q = self._tensor("q", head_dim)
        self.k = self._tensor("k", head_dim)
        self.v = self._tensor("v", value_dim)
        self.mask = b.tensor("mask", mask, 4) if mask is not None else None
        self.scalars = {name: b.scalar(name) for name in SCALARS}
        self.offset: Scalar = b.scalar("offset") if causal else ZERO
        self.dropout = Dropout(b) if dropout else None

    def _tensor(self, name: str, width: int) -> TensorHandle:
        return row_tensor(self.b, name, self.dtype, width)

    def build(self) -> Kernel:
        b, given, most = self.b, self.scalars, self.blocks.rows
        self.ahead = self.terms == 1
        self.counts = [given[name] for name in ("group_blocks", "head_blocks", "query_blocks")]
        batches = self.q.size(0)
        units = b.let("units", batches * self.counts[0] * self.counts[1] * self.counts[2])
        # Two halves each: what the unit works on, and what is made for the next one.
        self.dots = b.tile(DType.F32, 2 * most, self.blocks.span, name="dots", memory="acc")
        if self.ahead:
            self.q_tile = b.tile(DType.BF16, 2 * most, self.head_dim, name="q_tile")
            rows = KEY_BUFFERS * self.blocks.keys
            self.k_tile = b.tile(DType.BF16, rows, self.head_dim, name="k_tile")
        self.half, self.q_half, self.k_turn = map(b.fresh, ("half", "q_half", "k_turn"))
        for name in (self.half, self.q_half, self.k_turn):
            b.emit(Let(name, ZERO))
        self.result = b.tile(DType.F32, 2 * most, self.value_dim, name="result", memory="acc")
        self.inverse = b.tile(DType.F32, 2 * most, 1, name="inverse")
        self.next, self.last = self._variables("next"), self._variables("last")
        if self.ahead:
            with b.when(CoreId().lt(units)):
                self._begin(CoreId())
        with b.loop("unit", CoreId(), units, CoreCount()) as unit:
            if not self.ahead:
                self._begin(unit)
            current = self._variables("this")
            self._assign(current, self.next)
            b.emit(Let(self.q_half, ONE - Variable(self.q_half)))
            self.q_now = self._q_views(self._this_half())
            following = unit + CoreCount()
            self._unit(current, unit, following, following.lt(units))
            if self.ahead:
                self._assign(self.last, current)
        if self.ahead:
            with b.when(CoreId().lt(units)):
                self._write(self.last, self._this_half())
        return b.build()

    def _this_half(self) -> Scalar:
        return ONE - Variable(self.q_half)

    def _variables(self, prefix: str) -> _Unit:
        names = [field.name for field in fields(_Unit)]
        return _Unit(**{name: Variable(self.b.fresh(f"{prefix}_{name}")) for name in names})

    def _assign(self, unit: _Unit, values: _Unit) -> None:
        for field in fields(_Unit):
            variable = getattr(unit, field.name)
            assert isinstance(variable, Variable)
            self.b.emit(Let(variable.name, getattr(values, field.name)))

    def _begin(self, number: Scalar) -> None:
        """Find out what unit `number` is, load its queries, and make its first scores."""
        b, given = self.b, self.scalars
        shared, group_block = given["heads_per_group"], given["group_block"]
        rest, query_index = self._divide("query", number, self.counts[2])
        rest, head_index = self._divide("head", rest, self.counts[1])
        batch, group_index = self._divide("group", rest, self.counts[0])
        group = b.let("group", group_index * group_block)
        groups = b.let("groups", minimum(group_block, self.k.size(1) - group))
        first = b.let("first_head", head_index * given["head_block"])
        heads = b.let("group_heads", minimum(given["head_block"], shared - first))
        query = b.let("query", query_index * given["query_block"])
        queries = b.let("queries", minimum(given["query_block"], self.q.size(2) - query))
        seen, first_limit = self.k.size(2), ZERO
        if self.causal:
            first_limit = b.let("first_limit", query + self.offset + 1)
            seen = b.let("seen", maximum(minimum(seen, first_limit + (queries - 1)), 0))
        all_heads = b.let("heads", heads * groups)
        unit = _Unit(
            batch, group, groups, group * shared + first, all_heads, query, queries,
            heads * queries, all_heads * queries, first_limit, seen,
        )  # fmt: skip
        self._assign(self.next, unit)
        self._load_queries(self.next)
        self._dot_keys(self.next, ZERO, minimum(self.blocks.span, self.next.seen))

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

    def _unit(self, unit: _Unit, number: Scalar, following: Scalar, more: Scalar) -> None:
        """The unit whose queries and first scores are there; `following` is the next, if `more`."""
        b, most = self.b, self.blocks.rows
        result = self.result.view(self._this_half() * most)
        max_state = b.tile(DType.F32, most, SPAN_UNIT, name="max_state")
        sum_state = b.tile(DType.F32, most, SPAN_UNIT, name="sum_state")
        maxima = b.tile(DType.F32, most, 2, name="maxima")  # of this block and the one before
        scores = b.tile(DType.F32, most, SOFTMAX_BLOCK, name="scores")
        limits = self._limits(unit) if self.causal else None
        if self.dropout is not None:
            place = unit.batch, unit.head, unit.query
            self.row_seeds = self.dropout.load_rows(most, place, unit.queries, unit.heads)
        parity = b.fresh("parity")
        b.emit(Let(parity, ZERO))
        with b.loop("block", 0, maximum(unit.seen, 1), SOFTMAX_BLOCK) as block:
            keys = b.let("keys", minimum(SOFTMAX_BLOCK, unit.seen - block))
            with b.loop("span", 0, maximum(keys, 1), self.blocks.span) as span:
                count = b.let("count", minimum(self.blocks.span, keys - span))
                first = b.let("first", block + span)
                with b.when(first.ne(0)):
                    self._dot_keys(unit, first, count, self.q_now)
                view = scores.view(0, span)
                self._mask_scores(unit, view, first, count, limits)
                self._fold("fmax", max_state, view, unit.rows, count, first.eq(0))
                b.emit(Let(self.half, ONE - Variable(self.half)))
            maximum_now = maxima.view(0, Variable(parity))
            b.finish("fmax", maximum_now, max_state, unit.rows)
            floor = apply("fmax", Read(maximum_now), splat(-FLT_MAX))
            b.elementwise(maximum_now, floor, unit.rows, 1)
            with b.when(block.ne(0)):
                before = maxima.view(0, ONE - Variable(parity))
                self._rescale(unit, before, maximum_now, sum_state, result)
            if self.ahead:
                last = (block + SOFTMAX_BLOCK).ge(unit.seen)
                with b.when(last * more):
                    self._begin(following)
                with b.when(block.eq(0) * number.gt(CoreId())):
                    self._write(self.last, Variable(self.q_half))
            with b.loop("span", 0, maximum(keys, 1), self.blocks.span) as span:
                count = b.let("count", minimum(self.blocks.span, keys - span))
                first = b.let("first", block + span)
                view = scores.view(0, span)
                weights = self._weights(unit, view, maximum_now, count, sum_state, first)
                self._dot_values(unit, result, weights, first, count)
            b.emit(Let(parity, ONE - Variable(parity)))
        self._invert(unit, sum_state, maxima.view(0, ONE - Variable(parity)))
        if not self.ahead:
            self._write(unit, self._this_half())

    def _q_views(self, half: Scalar | None = None) -> list[View]:
        """The terms of the queries in one half of the tile; by default the one to fill next."""
        if not self.ahead:
            return [tile.view() for tile in self.q_terms]
        half = Variable(self.q_half) if half is None else half
        return [self.q_tile.view(half * self.blocks.rows)]

    def _load_queries(self, unit: _Unit) -> None:
        b, most = self.b, self.blocks.rows
        window = self.q.at(unit.batch, unit.head, unit.query)
        if self.ahead:
            self._load_rows(unit, self._q_views()[0], window, self.head_dim)
            return
        whole = b.tile(DType.F32, most, self.head_dim, name="q_float", buffers=1)
        self._load_rows(unit, whole.view(), window, self.head_dim)
        self.q_terms = self._term_tiles("q", most, self.head_dim)
        split_terms(b, whole, self.q_terms, unit.rows, self.head_dim)

    def _load_rows(self, unit: _Unit, view: View, window: Access, cols: Scalar | int) -> None:
        """A window of the unit's heads (planes) and queries (rows), stacked without gaps."""
        extents = unit.queries, cols, unit.heads
        self.b.load(view, window, *extents, plane_stride=unit.queries * view.tile.row_bytes)

    def _term_tiles(self, name: str, rows: int, cols: int) -> list[Tile]:
        return [
            self.b.tile(DType.BF16, rows, cols, name=f"{name}{term}") for term in range(self.terms)
        ]

    def _limits(self, unit: _Unit) -> Tile:
        """The number of keys each row sees; made only if some row of the unit sees fewer."""
        b = self.b
        limits = b.tile(DType.I32, self.blocks.rows, 1, name="limits")
        hides = unit.seen.gt(unit.first_limit)
        with b.when(hides), b.loop("plane", 0, unit.heads) as plane:
            place = limits.view(plane * unit.queries, 0)
            b.iota(place, unit.queries, 1, start=unit.first_limit, row_step=1)
        return limits

    # Scores --------------------------------------------------------------------------------------

    def _dot_keys(
        self, unit: _Unit, first: Scalar, count: Scalar, q_terms: list[View] | None = None
    ) -> None:
        """q k^T for `count` keys from `first` on, into the half of `dots` that is free.

        q_terms: None for what `_load_queries` has just loaded."""
        b, q_views = self.b, q_terms or self._q_views()
        half = Variable(self.half) * self.blocks.rows
        with self._runs(count) as (run, keys), b.loop("member", 0, unit.groups) as member:
            window = self.k.at(unit.batch, unit.group + member, first + run)
            k_terms = self._load_keys(window, keys)
            row = b.let("row", member * unit.group_rows)
            for number, (i, j) in enumerate(products(self.terms)):
                b.dot(
                    self.dots.view(half + row, run),
                    replace(q_views[i], row=q_views[i].row + row), k_terms[j],
                    unit.group_rows, keys, self.head_dim,
                    accumulate=int(number > 0), transpose_b=True,
                )  # fmt: skip

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

    def _load_keys(self, window: Access, keys: Scalar) -> list[View]:
        """Rows of K as bf16 terms."""
        if self.terms > 1:
            return self._load_terms("k", window, keys, self.head_dim)
        self.b.emit(Let(self.k_turn, (Variable(self.k_turn) + 1) % KEY_BUFFERS))
        place = self.k_tile.view(Variable(self.k_turn) * self.blocks.keys)
        self.b.load(place, window, keys, self.head_dim)
        return [place]

    def _load_terms(self, name: str, window: Access, keys: Scalar, width: int) -> list[View]:
        """Rows of K or V as bf16 terms."""
        b, most = self.b, self.blocks.keys
        if self.terms == 1:
            tile = b.tile(DType.BF16, most, width, name=f"{name}_tile", buffers=3)
            b.load(tile, window, keys, width)
            return [tile.view()]
        whole = b.tile(DType.F32, most, width, name=f"{name}_float", buffers=1)
        b.load(whole, window, keys, width)
        terms = self._term_tiles(name, most, width)
        split_terms(b, whole, terms, keys, width)
        return [term.view() for term in terms]

    def _mask_scores(
        self, unit: _Unit, view: View, first: Scalar, count: Scalar, limits: Tile | None
    ) -> None:
        """Scaled and masked scores of `count` keys from `first` on."""
        b, shape = self.b, (unit.rows, count)
        dots = self.dots.view(Variable(self.half) * self.blocks.rows)
        scale = splat(self.scalars["scale"], "float")
        scaled = apply("fmul", Read(dots), scale)
        visible: Tree | None = None
        if self.mask_dtype is not None:
            mask = self._load_mask(unit, first, count)
            if self.mask_dtype is DType.BOOL:
                visible = Read(mask.view())
            else:
                scaled = apply("fma", Read(dots), scale, Read(mask.view()))
        b.elementwise(view, hide(scaled, visible), *shape)
        if limits is None:
            return
        # `limits` exist where a row of the unit sees fewer keys than another. Of a span those keys
        # from `hidden` on (whole lanes) are the ones that some row may not see.
        with b.when((first + count).gt(unit.first_limit)):
            hidden = maximum(unit.first_limit - first, 0) // SPAN_UNIT * SPAN_UNIT
            hidden = b.let("hidden", hidden)
            part = replace(view, col=view.col + hidden)
            shape = unit.rows, b.let("part", count - hidden)
            position = b.tile(DType.I32, 1, self.blocks.span, name="position")
            b.iota(position, 1, shape[1], start=first + hidden)
            before = apply("ilt", Row(position.view()), Column(limits.view()))
            shown = b.tile(DType.I8, self.blocks.rows, self.blocks.span, name="visible")
            b.elementwise(shown, before, *shape)
            b.elementwise(part, hide(Read(part), Read(shown.view())), *shape)

    def _load_mask(self, unit: _Unit, first: Scalar, count: Scalar) -> Tile:
        """The mask of the unit's rows; keys need not be contiguous in memory."""
        b, mask = self.b, self.mask
        assert mask is not None
        local = DType.I8 if self.mask_dtype is DType.BOOL else self.mask_dtype
        tile = b.tile(local, self.blocks.rows, self.blocks.span, name="mask_tile", buffers=2)
        window = mask.at(unit.batch, unit.head, unit.query, first, rows=2, planes=1)
        with b.body() as scattered, b.loop("plane", 0, unit.heads) as plane:
            offset = window.offset + plane * mask.stride(1)
            b.load(
                tile.view(plane * unit.queries, 0),
                Access("mask", offset, mask.stride(3), mask.stride(2)),
                count, 1, unit.queries,
                row_stride=tile.element_bytes, plane_stride=tile.row_bytes,
            )  # fmt: skip
        with b.when(mask.stride(3).eq(mask.tensor.dtype.bits // 8), scattered):
            self._load_rows(unit, tile.view(), window, count)
        return tile

    def _fold(
        self, op: str, state: Tile, view: View, rows: Scalar, count: Scalar, first: Scalar
    ) -> None:
        """state := state op `count` columns, column j to lane j mod 64 in order; anew if `first`.

        The state is that of a row reduction, and `finish` goes on from there; but a vector command
        takes two columns to a lane at once, and a reduction has to bring the state in and out."""
        b, lanes = self.b, SPAN_UNIT
        before = Read(state.view())
        with b.loop("pair", 0, maximum(count, 1), 2 * lanes) as place:
            left = b.let("left", count - place)
            anew = b.let("anew", first * place.eq(0))
            one, other = (Read(replace(view, col=view.col + place + c)) for c in (0, lanes))
            with b.body() as less:
                with b.when(anew):
                    b.elementwise(state, splat(-math.inf if op == "fmax" else -0.0), rows)
                b.elementwise(state, apply(op, before, one), rows, minimum(left, lanes))
                with b.when(left.gt(lanes)):
                    b.elementwise(state, apply(op, before, other), rows, left - lanes)
            with b.body() as further:
                b.elementwise(state, apply(op, apply(op, before, one), other), rows)
            with b.when(left.ge(2 * lanes), less), b.when(anew, further):
                b.elementwise(state, apply(op, one, other), rows)

    # Weights and result --------------------------------------------------------------------------

    def _rescale(
        self, unit: _Unit, before: View, now: View, sum_state: Tile, result: View
    ) -> None:
        """What was summed up relative to the maximum `before`, relative to `now`."""
        b = self.b
        factor = b.tile(DType.F32, self.blocks.rows, 1, name="factor")
        power = apply("fsub", Read(before), Read(now))
        if self.added:
            power = apply("fmul", power, splat(LOG2_E))
        b.elementwise(factor, apply("exp2", power), unit.rows, 1)
        for view in (sum_state.view(), result):
            b.elementwise(view, apply("fmul", Read(view), Column(factor.view())), unit.rows)

    def _weights(
        self,
        unit: _Unit,
        scores: View,
        maximum_now: View,
        count: Scalar,
        sum_state: Tile,
        first: Scalar,
    ) -> list[Tile]:
        """The weights of one span of keys as bf16 terms, added to the sum."""
        b, shape = self.b, (self.blocks.rows, self.blocks.span)
        summed = b.tile(DType.BF16 if self.terms == 1 else DType.F32, *shape, name="weights")
        power = apply("fsub", Read(scores), Column(maximum_now))
        if self.added:  # in place, which spares a tile
            b.elementwise(scores, apply("fmul", power, splat(LOG2_E)), unit.rows, count)
            power = Read(scores)
        b.elementwise(summed, apply("exp2", power), unit.rows, count)
        self._fold("fadd", sum_state, summed.view(), unit.rows, count, first.eq(0))
        if self.dropout is not None:
            columns = self.blocks.span
            dropped = self.dropout.choose(
                self.row_seeds, unit.batch, first, unit.rows, count, columns
            )
            b.elementwise(summed, kept(dropped, Read(summed.view())), unit.rows, count)
        if self.terms == 1:
            return [summed]
        terms = self._term_tiles("weights", *shape)
        split_terms(b, summed, terms, unit.rows, count)
        return terms

    def _dot_values(
        self, unit: _Unit, result: View, weights: list[Tile], first: Scalar, count: Scalar
    ) -> None:
        """result += weights v for `count` keys from `first` on; from key 0 on it starts anew."""
        b = self.b
        runs = self._runs(count, once=True)
        with runs as (run, keys), b.loop("member", 0, unit.groups) as member:
            window = self.v.at(unit.batch, unit.group + member, first + run)
            v_terms = self._load_terms("v", window, keys, self.value_dim)
            row = b.let("row", member * unit.group_rows)
            for number, (i, j) in enumerate(products(self.terms)):
                b.dot(
                    replace(result, row=result.row + row), weights[i].view(row, run), v_terms[j],
                    unit.group_rows, self.value_dim, keys,
                    accumulate=1 if number else (first + run).ne(0),
                )  # fmt: skip

    def _invert(self, unit: _Unit, sum_state: Tile, maximum_now: View) -> None:
        """What the unit's result has to be multiplied by; its statistics are written."""
        b = self.b
        total = self.inverse.view(self._this_half() * self.blocks.rows)
        b.finish("fsum", total, sum_state, unit.rows)
        positive = apply("fmax", Read(total), splat(1.0))
        if self.statistics is not None:
            pair = b.tile(DType.F32, self.blocks.rows, 2, name="pair")
            b.elementwise(pair.view(), Read(maximum_now), unit.rows, 1)
            b.elementwise(pair.view(0, 1), apply("log2", positive), unit.rows, 1)
            b.store(
                self.statistics.at(unit.batch, unit.head, unit.query), pair,
                unit.queries, 2, unit.heads, plane_stride=unit.queries * pair.row_bytes,
            )  # fmt: skip
        # The table's 2 ulp are far below bf16, and it takes a quarter of a division's time.
        exact = self.dtype is DType.F32
        inverse = apply("fdiv", splat(1.0), positive) if exact else apply("recip", positive)
        if self.dropout is not None:
            inverse = apply("fmul", inverse, self.dropout.scale())
        b.elementwise(total, inverse, unit.rows)

    def _write(self, unit: _Unit, half: Scalar) -> None:
        b, most = self.b, self.blocks.rows
        rounded = b.tile(self.dtype, most, self.value_dim, name="rounded")
        result, inverse = (tile.view(half * most) for tile in (self.result, self.inverse))
        quotient = apply("fmul", Read(result), Column(inverse))
        b.elementwise(rounded, apply("fadd", quotient, splat(0.0)), unit.rows)
        b.store(
            self.out.at(unit.batch, unit.head, unit.query), rounded,
            unit.queries, self.value_dim, unit.heads,
            plane_stride=unit.queries * rounded.row_bytes,
        )  # fmt: skip


def row_tensor(b: KernelBuilder, name: str, dtype: DType, width: int) -> TensorHandle:
    """A tensor parameter [.., .., .., width] that is contiguous along its last dimension."""
    fixed = {"sizes": (None,) * 3 + (width,), "strides": (None,) * 3 + (dtype.bits // 8,)}
    return b.tensor(name, dtype, 4, **fixed)


def hide(scores: Tree, visible: Tree | None) -> Tree:
    """-inf where not visible; a select, so that a hidden NaN does not show."""
    if visible is None:
        return scores
    return apply("select", visible, scores, splat(-math.inf))
