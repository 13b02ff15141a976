"""Loop nests to tile IR kernels.

    lowered = lower(nest, Blocks(rows=16, cols=512))
    lowered.kernel                   a tile IR kernel, correct for all values of nest.symbols
    lowered.words                    what each of its argument words is

What can change a bit follows from the nest alone (`nest_simplify`, `nest_plan`, `pointwise`); the
blocks, chosen by `nest_blocks.choose_blocks` or by the caller, only decide how much is done at a
time.

A nest whose row of columns fits one block computes everything from tiles loaded once. Otherwise
the columns are gone through in passes, one after each reduction: every pass loads what it needs
and computes it again, and stores of columns all happen in the last one, so that a nest may
overwrite what it reads.

Strides are part of the code, which a nest's symbols enter as scalars: a tensor parameter brings
only its slot and the byte offset of its view's first element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.index_expr import Const
from pagoda.compiler.loop_nest import (
    LoopNest,
    Reduce,
    Store,
)
from pagoda.compiler.nest_frame import Frame
from pagoda.compiler.nest_operations import Operations
from pagoda.compiler.nest_plan import Plan, plan, stages
from pagoda.compiler.nest_reduce import Reduction
from pagoda.compiler.nest_simplify import simplify
from pagoda.compiler.scalar import ZERO, CoreCount, CoreId, Int, minimum
from pagoda.compiler.tile_ir import Kernel


@dataclass(frozen=True)
class Blocks:
    """Rows and columns done at a time. cols: a multiple of 64 where the nest has reductions."""

    rows: int
    cols: int


@dataclass(frozen=True)
class Word:
    """An argument word: the slot or the byte offset of parameter `index`, or symbol `index`."""

    what: Literal["slot", "offset", "symbol"]
    index: int


@dataclass(frozen=True)
class LoweredNest:
    """kernel: its tensors are p0, p1, ... and its scalars the nest's symbols. words: one per
    argument word, in order."""

    kernel: Kernel
    words: tuple[Word, ...]


def lower(nest: LoopNest, blocks: Blocks, hints: Mapping[str, int] | None = None) -> LoweredNest:
    """The kernel of a loop nest. hints: likely values of symbols; they change no bit.

    Raises CompileError for types and operations that the chip cannot do.
    """
    small = simplify(nest)
    kernel = _Lowering(nest, plan(small, hints), blocks).kernel()
    words = [Word(what, p) for p in range(len(nest.params)) for what in ("slot", "offset")]
    return LoweredNest(kernel, (*words, *(Word("symbol", k) for k in range(len(nest.symbols)))))


class _Lowering(Operations):
    def __init__(self, nest: LoopNest, layout: Plan, blocks: Blocks):
        self.b = KernelBuilder(f"nest_{nest.key[:8]}")
        names = [f"p{k}" for k in range(len(nest.params))]
        rows = _limit(layout, layout.row, blocks.rows)
        cols = _limit(layout, layout.col, blocks.cols)
        if layout.nest.reduced:
            cols = -(-cols // 64) * 64
        self.b.block("rows", rows)
        self.b.block("cols", cols)
        self.chunked = _is_chunked(layout, cols)
        # One block of columns is no work to share out.
        single = layout.parallel == layout.col and not self.chunked
        frame = Frame(self.b, layout, None if single else layout.parallel, rows, cols)
        super().__init__(frame, names)
        for name, param in zip(names, range(len(names)), strict=True):
            self.b.tensor(name, self.access.memory(param), 0)
        for symbol in nest.symbols:
            self.b.scalar(symbol)
        self.innermost = len(layout.loops) + 1
        self.stage = stages(self.nest)
        self.levels = self._levels()
        self.states: dict[int, Reduction] = {}

    # What is computed where ----------------------------------------------------------------------

    def _levels(self) -> list[int]:
        """How many loops stand around each operation: 0 none, then `plan.order()`, then the column
        blocks (with the inner loops)."""
        plan, order, found = self.plan, self.plan.order(), []
        for number, op in enumerate(self.nest.body):
            dims = self.dims[number]
            level = max((k + 1 for k, d in enumerate(order) if d in dims), default=0)
            if self.chunked and (plan.col in dims or dims & set(plan.inner)):
                level = self.innermost + 1
            used = [found[a] for a in self._args(op)]
            if isinstance(op, Reduce):
                found.append(self.innermost)
            else:
                found.append(max([level, *used]))
        return found

    # Loops ---------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        with ExitStack() as stack:
            if self.frame.parallel is None:
                stack.enter_context(self.b.when(CoreId().eq(ZERO)))
            if self.plan.col is not None and not self.chunked:
                self.frame.bound[self.plan.col] = ZERO
                self.frame.cols = self.frame.scalar(self.nest.dims[self.plan.col])
            self.emit(self._at(0))
            for level, dim in enumerate(self.plan.order(), start=1):
                is_row = dim == self.plan.row
                stack.enter_context(self._loop(dim, self.frame.max_rows if is_row else 1))
                if is_row:
                    left = self.frame.scalar(self.nest.dims[dim]) - self.frame.bound[dim]
                    self.frame.rows = self.b.let("rows", minimum(self.frame.max_rows, left))
                if level < self.innermost:
                    self.emit(self._at(level))
            self._row_block()
        return self.b.build()

    def _at(self, level: int) -> list[int]:
        return [n for n, at in enumerate(self.levels) if at == level and self.needed[n]]

    @contextmanager
    def _loop(self, dim: int, step: int) -> Iterator[None]:
        """Over a dimension in blocks, dealt out to the cores if it is the parallel one."""
        start, stride = ZERO, Int(step)
        if dim == self.frame.parallel:
            start, stride = CoreId() * step, CoreCount() * step
        size = self.frame.scalar(self.nest.dims[dim])
        with self.b.loop(f"i{dim}", start, size, stride) as variable:
            self.frame.bound[dim] = variable
            self.frame.open.append(dim)
            yield
            self.frame.open.pop()

    def _row_block(self) -> None:
        here = self._at(self.innermost)
        if not self.chunked:
            self.emit(here)
            return
        columns = self._at(self.innermost + 1)
        reductions = [n for n in here if isinstance(self.nest.body[n], Reduce)]
        stores = [n for n in columns if isinstance(self.nest.body[n], Store)]
        last = max((self.stage[n] for n in (*reductions, *stores)), default=0)
        for number in range(last + 2):
            ready = [n for n in here if self.stage[n] == number and n not in reductions]
            self.emit(ready)
            goals = [n for n in reductions if self.stage[n] == number]
            if number == last:
                goals += stores
            if goals:
                self._pass(goals, columns)

    def _pass(self, goals: list[int], columns: list[int]) -> None:
        """One pass over the columns that feeds the reductions and does the stores of `goals`."""
        body = self.nest.body
        wanted = set(goals)
        for n in sorted(range(len(body)), reverse=True):
            if n in wanted:
                wanted.update(a for a in self._args(body[n]) if a in columns)
        reductions = [n for n in goals if isinstance(body[n], Reduce)]
        for n in reductions:
            self.states[n] = Reduction(self.frame, body[n], self.nest.value_dtype(body[n].value))
            self.states[n].begin()
        with ExitStack() as stack:
            for dim in self.plan.inner:
                stack.enter_context(self._loop(dim, 1))
            stack.enter_context(self._loop(self.plan.col, self.frame.max_cols))
            left = self.frame.scalar(self.nest.dims[self.plan.col])
            left = left - self.frame.bound[self.plan.col]
            whole, self.frame.cols = self.frame.cols, left
            self.frame.cols = self.b.let("cols", minimum(self.frame.max_cols, left))
            for n in sorted(wanted):
                if n in reductions:
                    self.states[n].add(self._value(body[n].value))
                else:
                    self.emit([n])
            self.frame.cols = whole
        for n in reductions:
            self.frame.values[n] = self.states[n].result()


def _limit(layout: Plan, dim: int | None, block: int) -> int:
    if dim is None:
        return 1
    size = layout.nest.dims[dim]
    return max(min(block, size.value), 1) if isinstance(size, Const) else block


def _is_chunked(layout: Plan, cols: int) -> bool:
    if layout.col is None:
        return False
    size = layout.nest.dims[layout.col]
    return bool(layout.inner) or not isinstance(size, Const) or size.value > cols
