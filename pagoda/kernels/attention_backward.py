"""The gradients of scaled dot-product attention, as one kernel (after Dao 2023, FlashAttention-2).

Given dout[b,h,i,e], the gradient of the result of `attention`, and with g = h // (H / G):

    p[i,s]  = softmax weight of key s for query i
    dp[i,s] = dout[i,:] . v[s,:]          ds[i,s] = p[i,s] * (dp[i,s] - delta[i])
    dv[s,:] = sum p[i,s] dout[i,:]        over the queries i of all heads h that share KV head g
    dk[s,:] = scale * sum ds[i,s] q[i,:]  over the same
    dq[i,:] = sum ds[i,s] k[s,:]          float32, and without the factor `scale`

where delta[i] = sum_e dout[i,e] out[i,e]. The weights are made anew from the row's statistics
(m, log2 l) that the forward kernel left, so nothing of the size of the scores is ever stored.

Meaning.

    t = scale' * (q . k)              as in `attention`; -inf where hidden
    p = exp2((t - m) - log2 l)        float32, one rounding per operation
    dp                                float32; the dot adds e = 0, 1, ... in order
    ds = (dp - delta) * p             float32
    dv += bf16(p) dout                adds h, then i, in order; at the end dv = acc + 0, rounded
    dk += bf16(ds) q                  the same; at the end dk = acc * scale + 0, rounded
    dq += bf16(ds) k                  adds s = 0, 1, ... in order; dq = acc + 0

With a float mask t = fma(scale, q . k, mask) and p = exp2((t - m) * log2(e) - log2 l).

With dropout, where c = 1 / (1 - probability): ds = (dp * c - delta) * p, with 0 for a dropped dp;
in dv a dropped p is 0, and dv = acc * c + 0 (`attention_dropout`).

float32 tensors: `terms` = 1 rounds q, k, v and dout to bf16; 2 or 3 split all operands of matrix
products, p and ds included, into that many bf16 terms (see `float32`). The products of all terms of
one run of `float32_run` queries (for dq: keys) are then added before those of the next run; runs
start anew with every head.

Queries and keys that do not see each other have p = 0 = ds. So the bits are the same for all
blocks, provided that hidden rows of k, v, q and dout are finite.

Schedule. A unit of work is a (batch, KV head); unit u belongs to core u mod cores. For each block
of keys it goes over blocks of queries, head after head: a step. dk and dv stay in ACC over a block
of keys; dq lies in memory, where each step takes its rows up, adds to them, and puts them back. The
matrix engine makes the scores of a step before the gradients of the step before it, whose weights
the vector engine has made meanwhile (not if operands are split into terms).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from pagoda.compiler.builder import KernelBuilder
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
from pagoda.kernels.attention import LOG2_E, hide, row_tensor
from pagoda.kernels.attention_backward_blocks import BackwardBlocks, float32_run
from pagoda.kernels.attention_dropout import Dropout, kept
from pagoda.kernels.float32 import products, split_terms

LOADED_PARTS = 3
"""Steps whose q, dout, k and v are there at a time: one on the way, one at its scores, one at its
gradients."""


def attention_backward_kernel(
    dtype: DType,
    head_dim: int,
    value_dim: int,
    causal: bool,
    mask: DType | None,
    terms: int,
    blocks: BackwardBlocks,
    *,
    dropout: bool = False,
) -> Kernel:
    """The kernel for tensors of `dtype` (BF16 or F32).

    mask: None, BOOL, F32 or BF16. terms: 1; for F32 also 2 or 3. Tensors, in order: dq[b,h,i,d]
    (F32), dk[b,g,s,d], dv[b,g,s,e], dout[b,h,i,e], q[b,h,i,d], k[b,g,s,d], v[b,g,s,e],
    statistics[b,h,i,2] (F32) with run-time strides except along the last dimension, which is
    contiguous; delta[b,h,i] (F32) and mask[b,h,i,s] with any strides. Scalars: the float32 bits of
    `score_scale` (scale' above) and of `scale`, `heads_per_group` = H / G, and `offset` if causal;
    with `dropout` the tensors and scalars of `Dropout`. Without queries or keys nothing is written.
    """
    assert dtype in (DType.BF16, DType.F32) and mask in (None, DType.BOOL, DType.F32, DType.BF16)
    assert 1 <= terms <= (3 if dtype is DType.F32 else 1)
    run = float32_run(max(head_dim, value_dim))
    assert terms == 1 or blocks.rows % run == blocks.keys % run == 0, blocks
    return _Backward(dtype, head_dim, value_dim, causal, mask, terms, blocks, dropout).build()


@dataclass(frozen=True)
class _Step:
    """A block of queries of one head on a block of keys. begins: whether it is the first one on its
    keys. part, key_part: in which part of the tiles its rows and keys are; half: in which half its
    weights."""

    batch: Scalar
    group: Scalar
    head: Scalar
    query: Scalar
    rows: Scalar
    key: Scalar
    keys: Scalar
    begins: Scalar
    part: Scalar
    key_part: Scalar
    half: Scalar


class _Backward:
    """Builds the kernel; each method emits the statements of one part."""

    def __init__(
        self,
        dtype: DType,
        head_dim: int,
        value_dim: int,
        causal: bool,
        mask: DType | None,
        terms: int,
        blocks: BackwardBlocks,
        dropout: bool,
    ):
        self.dtype, self.head_dim, self.value_dim = dtype, head_dim, value_dim
        self.causal, self.mask_dtype, self.terms, self.blocks = causal, mask, terms, blocks
        self.run = float32_run(max(head_dim, value_dim))
        self.ahead = terms == 1
        kinds = ("_causal" * causal, f"_{mask.name.lower()}_mask" if mask is not None else "")
        kinds += ("_dropout" * dropout,)
        name = f"attention_backward_{dtype.name.lower()}_{head_dim}{''.join(kinds)}"
        self.b = b = KernelBuilder(name)
        for block in ("rows", "keys"):
            b.block(block, getattr(blocks, block))
        b.block("terms", terms)
        self.dq = row_tensor(b, "dq", DType.F32, head_dim)
        self.dk = row_tensor(b, "dk", dtype, head_dim)
        self.dv = row_tensor(b, "dv", dtype, value_dim)
        self.dout = row_tensor(b, "dout", dtype, value_dim)
        self.q = row_tensor(b, "q", dtype, head_dim)
        self.k = row_tensor(b, "k", dtype, head_dim)
        self.v = row_tensor(b, "v", dtype, value_dim)
        self.statistics = row_tensor(b, "statistics", DType.F32, 2)
        self.delta = b.tensor("delta", DType.F32, 3)
        self.mask = b.tensor("mask", mask, 4) if mask is not None else None
        self.score_scale, self.scale = b.scalar("score_scale"), b.scalar("scale")
        self.heads_per_group = b.scalar("heads_per_group")
        self.offset: Scalar = b.scalar("offset") if causal else ZERO
        self.dropout = Dropout(b) if dropout else None

    def build(self) -> Kernel:
        b, rows, keys = self.b, self.blocks.rows, self.blocks.keys
        self.dots = b.tile(DType.F32, rows, keys, name="dots", memory="acc")
        self.dp = b.tile(DType.F32, rows, keys, name="dp", memory="acc")
        self.dq_sum = b.tile(DType.F32, rows, self.head_dim, name="dq_sum", memory="acc")
        self.dk_sum = b.tile(DType.F32, keys, self.head_dim, name="dk_sum", memory="acc")
        self.dv_sum = b.tile(DType.F32, keys, self.value_dim, name="dv_sum", memory="acc")
        self.q_terms = self._operand("q", LOADED_PARTS, rows, self.head_dim)
        self.dout_terms = self._operand("dout", LOADED_PARTS, rows, self.value_dim)
        self.k_terms = self._operand("k", LOADED_PARTS, keys, self.head_dim)
        self.v_terms = self._operand("v", LOADED_PARTS, keys, self.value_dim)
        self.p_terms = self._operand("p", 2, rows, keys)
        self.ds_terms = self._operand("ds", 2, rows, keys)
        names = "part", "key_part", "half", "begins", "started"
        variables = [Variable(b.fresh(name)) for name in names]
        for variable in variables:
            b.emit(Let(variable.name, ZERO))
        self.part, self.key_part, self.half, self.begins, self.started = variables
        self.last = _Step(*(Variable(b.fresh(f"last_{field.name}")) for field in fields(_Step)))
        groups = self.k.size(1)
        # Without queries there would be no step, and so no key to write.
        units = b.let("units", self.k.size(0) * groups * self.q.size(2).gt(0))
        with b.loop("unit", CoreId(), units, CoreCount()) as unit:
            batch = b.let("batch", unit // groups)
            self._unit(batch, b.let("group", unit - batch * groups))
        if self.ahead:
            with b.when(self.started):
                self._dot_gradients(self.last)
                self._write_queries(self.last)
                self._write_keys(self.last)
        return b.build()

    def _operand(self, name: str, parts: int, rows: int, cols: int) -> list[Tile]:
        """Tiles for the bf16 terms of an operand: for that many steps, if they overlap."""
        names = [name] if self.terms == 1 else [f"{name}{term}" for term in range(self.terms)]
        height = rows * parts if self.ahead else rows
        return [self.b.tile(DType.BF16, height, cols, name=n) for n in names]

    # One unit ------------------------------------------------------------------------------------

    def _unit(self, batch: Scalar, group: Scalar) -> None:
        b = self.b
        queries, all_keys = self.q.size(2), self.k.size(2)
        with b.loop("key", 0, all_keys, self.blocks.keys) as key:
            keys = b.let("keys", minimum(self.blocks.keys, all_keys - key))
            k, v = self._key_views(self.key_part)
            self._load(k, self.k.at(batch, group, key), keys)
            self._load(v, self.v.at(batch, group, key), keys)
            b.emit(Let(self.begins.name, ONE))
            start = b.let("start", self._first_query(key, queries))
            with b.loop("member", 0, self.heads_per_group) as member:
                head = b.let("head", group * self.heads_per_group + member)
                with b.loop("query", start, queries, self.blocks.rows) as query:
                    rows = b.let("rows", minimum(self.blocks.rows, queries - query))
                    self._step(
                        _Step(batch, group, head, query, rows, key, keys,
                              self.begins, self.part, self.key_part, self.half)
                    )  # fmt: skip
            if not self.ahead:
                self._write_keys(self.last)
            else:
                self._turn(self.key_part)

    def _first_query(self, key: Scalar, queries: Scalar) -> Scalar:
        """The first query that sees a key from `key` on. The first block of keys meets all queries,
        so that their dq begins, and every block some queries, so that its dk and dv begin."""
        if not self.causal:
            return ZERO
        first = minimum(maximum(key - self.offset, 0), queries - 1) * key.gt(0)
        if self.terms == 1:
            return first
        return first // self.run * self.run  # runs of queries do not move

    def _step(self, step: _Step) -> None:
        b = self.b
        self._dot_scores(step)
        if self.ahead:
            with b.when(self.started):
                self._dot_gradients(self.last)
            self._weights(step)
            with b.when(self.started):
                self._write_queries(self.last)
                with b.when(step.begins):
                    self._write_keys(self.last)
        else:
            self._weights(step)
            self._dot_gradients(step)
            self._write_queries(step)
        for field in fields(_Step):
            variable = getattr(self.last, field.name)
            b.emit(Let(variable.name, getattr(step, field.name)))
        b.emit(Let(self.begins.name, ZERO))
        if self.ahead:
            self._turn(self.part)
            b.emit(Let(self.half.name, ONE - self.half))
            b.emit(Let(self.started.name, ONE))

    # Operands ------------------------------------------------------------------------------------

    def _turn(self, part: Variable) -> None:
        self.b.emit(Let(part.name, (part + 1) * part.lt(LOADED_PARTS - 1)))

    def _views(self, terms: list[Tile], part: Scalar, rows: int) -> list[View]:
        """One part of the tiles, of so many rows."""
        return [tile.view(part * rows) for tile in terms]

    def _row_views(self, step: _Step) -> tuple[list[View], list[View]]:
        """q and dout of a step."""
        rows = self.blocks.rows
        return tuple(self._views(x, step.part, rows) for x in (self.q_terms, self.dout_terms))

    def _key_views(self, part: Scalar) -> tuple[list[View], list[View]]:
        """k and v of a block of keys."""
        return tuple(self._views(x, part, self.blocks.keys) for x in (self.k_terms, self.v_terms))

    def _weight_views(self, step: _Step) -> tuple[list[View], list[View]]:
        """p and ds of a step."""
        rows = self.blocks.rows
        return tuple(self._views(x, step.half, rows) for x in (self.p_terms, self.ds_terms))

    def _load(self, terms: list[View], window: Access, rows: Scalar) -> None:
        """Rows of a tensor as bf16 terms."""
        b, width = self.b, terms[0].tile.cols
        if self.terms == 1:
            b.load(terms[0], window, rows, width)
            return
        tiles = [view.tile for view in terms]
        whole = b.tile(DType.F32, tiles[0].rows, width, name="whole", buffers=1)
        b.load(whole, window, rows, width)
        split_terms(b, whole, tiles, rows, width)

    def _dot(
        self,
        acc: Tile,
        left: list[View],
        right: list[View],
        extents: tuple[Scalar | int, Scalar | int, Scalar | int],
        accumulate: Scalar | int = 0,
        **transposed: bool,
    ) -> None:
        """acc (+)= left right, each the terms of an operand."""
        for number, (i, j) in enumerate(products(self.terms)):
            more = 1 if number else accumulate
            self.b.dot(acc, left[i], right[j], *extents, accumulate=more, **transposed)

    def _dot_runs(
        self,
        acc: Tile,
        left: list[View],
        right: list[View],
        extents: tuple[Scalar | int, Scalar | int, Scalar],
        accumulate: Scalar,
        transpose_a: bool = False,
    ) -> None:
        """The same over queries or keys: of split operands one run after the other."""
        b, (m, n, k) = self.b, extents
        if self.terms == 1:
            self._dot(acc, left, right, extents, accumulate, transpose_a=transpose_a)
            return
        with b.loop("run", 0, k, self.run) as run:
            count = b.let("run_count", minimum(self.run, k - run))
            place = (run, 0) if transpose_a else (0, run)
            lefts = [view.tile.view(*place) for view in left]
            rights = [view.tile.view(run) for view in right]
            more = b.let("more", accumulate + run.gt(0))
            self._dot(acc, lefts, rights, (m, n, count), more, transpose_a=transpose_a)

    # Scores and weights --------------------------------------------------------------------------

    def _dot_scores(self, step: _Step) -> None:
        """q k^T and dout v^T, which need what the step loads."""
        where = step.batch, step.head, step.query
        (q, dout), (k, v) = self._row_views(step), self._key_views(step.key_part)
        self._load(q, self.q.at(*where), step.rows)
        self._load(dout, self.dout.at(*where), step.rows)
        shape = step.rows, step.keys
        self._dot(self.dots, q, k, (*shape, self.head_dim), transpose_b=True)
        self._dot(self.dp, dout, v, (*shape, self.value_dim), transpose_b=True)

    def _weights(self, step: _Step) -> None:
        """p and ds of a step, from its scores."""
        b, most, shape = self.b, self.blocks.rows, (step.rows, step.keys)
        pair = b.tile(DType.F32, most, 2, name="pair")
        b.load(pair, self.statistics.at(step.batch, step.head, step.query), step.rows, 2)
        delta = b.tile(DType.F32, most, 1, name="delta_tile")
        window = self.delta.at(step.batch, step.head, step.query, rows=2, planes=1)
        b.load(delta, window, step.rows, 1)
        p = b.tile(DType.F32, most, self.blocks.keys, name="p_float")
        self._power(step, p, pair)
        power = apply("fsub", Read(p.view()), Column(pair.view(0, 1)))
        b.elementwise(p, apply("exp2", power), *shape)
        dp, weights = Read(self.dp.view()), Read(p.view())
        if self.dropout is not None:
            place = step.batch, step.head, step.query
            seeds = self.dropout.load_rows(most, place, step.rows)
            dropped = self.dropout.choose(
                seeds, step.batch, step.key, step.rows, step.keys, self.blocks.keys
            )
            b.elementwise(self.dp, kept(dropped, dp), *shape)
            dp = apply("fmul", dp, self.dropout.scale())
            weights = kept(dropped, weights)
        inner = apply("fsub", dp, Column(delta.view()))
        ds = apply("fmul", inner, Read(p.view()))
        if self.terms == 1:
            (p_view,), (ds_view,) = self._weight_views(step)
            b.elementwise(p_view, weights, *shape)
            b.elementwise(ds_view, ds, *shape)
            return
        whole = b.tile(DType.F32, most, self.blocks.keys, name="ds_float", buffers=1)
        b.elementwise(whole, ds, *shape)
        if self.dropout is not None:
            b.elementwise(p, weights, *shape)
        split_terms(b, p, self.p_terms, *shape)
        split_terms(b, whole, self.ds_terms, *shape)

    def _power(self, step: _Step, p: Tile, pair: Tile) -> None:
        """p := what the weights are powers of two of, but for the logarithm of the row's sum."""
        b, shape = self.b, (step.rows, step.keys)
        dots, largest = Read(self.dots.view()), Column(pair.view())
        scale = splat(self.score_scale, "float")
        shown: Tree | None = None
        if self.mask_dtype in (DType.F32, DType.BF16):
            mask = self._load_mask(step)
            b.elementwise(p, apply("fma", dots, scale, Read(mask.view())), *shape)
            power = apply("fmul", apply("fsub", Read(p.view()), largest), splat(LOG2_E))
            b.elementwise(p, power, *shape)
        else:
            b.elementwise(p, apply("fsub", apply("fmul", dots, scale), largest), *shape)
            if self.mask_dtype is DType.BOOL:
                shown = Read(self._load_mask(step).view())
                b.elementwise(p, hide(Read(p.view()), shown), *shape)
        if self.causal:
            self._hide_later_keys(step, p)

    def _hide_later_keys(self, step: _Step, p: Tile) -> None:
        """-inf for the keys behind those that a query sees: first + row of them."""
        b, shape = self.b, (step.rows, step.keys)
        limit = b.let("limit", step.query + self.offset + 1)
        with b.when((step.key + step.keys).gt(limit)):
            limits = b.tile(DType.I32, self.blocks.rows, 1, name="limits")
            b.iota(limits, step.rows, 1, start=limit, row_step=1)
            position = b.tile(DType.I32, 1, self.blocks.keys, name="position")
            b.iota(position, 1, step.keys, start=step.key)
            shown = b.tile(DType.I8, self.blocks.rows, self.blocks.keys, name="visible")
            before = apply("ilt", Row(position.view()), Column(limits.view()))
            b.elementwise(shown, before, *shape)
            b.elementwise(p, hide(Read(p.view()), Read(shown.view())), *shape)

    def _load_mask(self, step: _Step) -> Tile:
        """The mask of the step's rows and keys; keys need not be contiguous in memory."""
        b, mask = self.b, self.mask
        assert mask is not None
        local = DType.I8 if self.mask_dtype is DType.BOOL else self.mask_dtype
        tile = b.tile(local, self.blocks.rows, self.blocks.keys, name="mask_tile", buffers=2)
        window = mask.at(step.batch, step.head, step.query, step.key, rows=2, planes=1)
        scattered = Access("mask", window.offset, mask.stride(3), mask.stride(2))
        with b.body() as one_by_one:
            b.load(
                tile, scattered, step.keys, 1, step.rows,
                row_stride=tile.element_bytes, plane_stride=tile.row_bytes,
            )  # fmt: skip
        with b.when(mask.stride(3).eq(mask.tensor.dtype.bits // 8), one_by_one):
            b.load(tile, window, step.rows, step.keys)
        return tile

    # Gradients -----------------------------------------------------------------------------------

    def _dot_gradients(self, step: _Step) -> None:
        b = self.b
        (p, ds), (q, dout) = self._weight_views(step), self._row_views(step)
        k, _ = self._key_views(step.key_part)
        window = self.dq.at(step.batch, step.head, step.query)
        with b.when(step.key.gt(0)):
            before = b.tile(DType.F32, self.blocks.rows, self.head_dim, name="dq_before")
            b.load(before, window, step.rows, self.head_dim)
            b.elementwise(self.dq_sum, Read(before.view()), step.rows)
        more = b.let("more", ONE - step.begins)
        over_rows = step.keys, self.value_dim, step.rows
        self._dot_runs(self.dv_sum, p, dout, over_rows, more, transpose_a=True)
        over_rows = step.keys, self.head_dim, step.rows
        self._dot_runs(self.dk_sum, ds, q, over_rows, more, transpose_a=True)
        over_keys = step.rows, self.head_dim, step.keys
        self._dot_runs(self.dq_sum, ds, k, over_keys, step.key.gt(0))

    def _write_queries(self, step: _Step) -> None:
        """dq of a step, so far."""
        b = self.b
        after = b.tile(DType.F32, self.blocks.rows, self.head_dim, name="dq_after")
        b.elementwise(after, apply("fadd", Read(self.dq_sum.view()), splat(0.0)), step.rows)
        b.store(self.dq.at(step.batch, step.head, step.query), after, step.rows, self.head_dim)

    def _write_keys(self, step: _Step) -> None:
        """dk and dv of a step's keys."""
        b, where = self.b, (step.batch, step.group, step.key)
        for tensor, total, scale in (
            (self.dv, self.dv_sum, splat(1.0) if self.dropout is None else self.dropout.scale()),
            (self.dk, self.dk_sum, splat(self.scale, "float")),
        ):
            rounded = b.tile(self.dtype, self.blocks.keys, total.cols, name="rounded")
            scaled = apply("fmul", Read(total.view()), scale)
            b.elementwise(rounded, apply("fadd", scaled, splat(0.0)), step.keys)
            b.store(tensor.at(*where), rounded, step.keys, total.cols)
