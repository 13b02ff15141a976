"""Which Inductor nodes become one kernel, and the loop nest of each group.

A group shares one iteration space: outer dimensions, then the dimensions of a row that its
reductions run over. Nodes may describe the space with fewer, merged dimensions (Inductor merges
what it can per node); they are matched by splitting to the coarsest common refinement. So a
reduction over rows fuses with what makes the row, with what uses the row's result, and with what
goes over the same rows again: softmax or RMSNorm with its neighbours is one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor.codegen.common import BackendFeature
from torch._inductor.codegen.wrapper import WrapperLine
from torch._inductor.scheduler import BaseScheduling, FusedSchedulerNode
from torch._inductor.sizevars import SimplifyIndexing
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet
from torch.utils._sympy.functions import FloorDiv

from pagoda.compiler.index_expr import Var
from pagoda.compiler.loop_nest import Builder, LoopNest
from pagoda.compiler.loop_nest_split import split
from pagoda.compiler.region import Place
from pagoda.pytorch.errors import Unsupported, source
from pagoda.pytorch.loops import NestHandler
from pagoda.pytorch.places import operations, place
from pagoda.pytorch.symbolic import to_expr

# A fused kernel keeps a row of each of its tensors in on-chip memory at once.
MAX_NODES = 32
MAX_TENSORS = 16

Sizes = Sequence[sympy.Expr]


def _equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    return V.graph.sizevars.statically_known_equals(a, b)


def _multiple(a: sympy.Expr, b: sympy.Expr) -> bool:
    return V.graph.sizevars.statically_known_multiple_of(a, b)


def refine(a: Sizes, b: Sizes) -> tuple[list[list], list[list]] | None:
    """Splits the dimensions of two row-major spaces of the same total size until they agree.

    Returns, for each dimension of `a` and of `b`, the sizes it splits into: (6, 4) and (24,) give
    [[6], [4]] and [[6, 4]]. None if no splitting makes them agree ((6, 4) and (4, 6)).
    """
    parts_a: list[list] = [[] for _ in a]
    parts_b: list[list] = [[] for _ in b]
    i, j = len(a) - 1, len(b) - 1
    left_a = a[i] if a else sympy.S.One
    left_b = b[j] if b else sympy.S.One
    while i >= 0 or j >= 0:
        if i >= 0 and _equal(left_a, sympy.S.One):
            i -= 1
            left_a = a[i] if i >= 0 else sympy.S.One
            continue
        if j >= 0 and _equal(left_b, sympy.S.One):
            j -= 1
            left_b = b[j] if j >= 0 else sympy.S.One
            continue
        if i < 0 or j < 0:
            return None
        if _equal(left_a, left_b):
            size = left_a
        elif _multiple(left_a, left_b):
            size = left_b
        elif _multiple(left_b, left_a):
            size = left_a
        else:
            return None
        parts_a[i].insert(0, size)
        parts_b[j].insert(0, size)
        left_a = sympy.S.One if _equal(left_a, size) else FloorDiv(left_a, size)
        left_b = sympy.S.One if _equal(left_b, size) else FloorDiv(left_b, size)
    return parts_a, parts_b


@dataclass(frozen=True)
class Space:
    """The iteration space of a group: sizes of outer and of reduced dimensions."""

    outer: tuple[sympy.Expr, ...]
    row: tuple[sympy.Expr, ...]

    @property
    def dims(self) -> tuple[sympy.Expr, ...]:
        return self.outer + self.row


def _flat(parts: list[list]) -> tuple:
    return tuple(size for part in parts for size in part)


def _join(space: Space, node: Any) -> Space | None:
    """The space refined so that `node` fits too, or None."""
    _, (sizes, reduced) = node.group
    if node.is_reduction():
        outer, row = refine(space.outer, sizes), refine(space.row, reduced)
        return Space(_flat(outer[0]), _flat(row[0])) if outer and row else None
    whole = refine(space.dims, sizes)
    if whole is not None:
        cut = len(space.outer)
        return Space(_flat(whole[0][:cut]), _flat(whole[0][cut:]))
    outer = refine(space.outer, sizes)
    return Space(_flat(outer[0]), space.row) if outer else None


def common_space(nodes: Sequence[Any]) -> Space | None:
    """The coarsest space that all nodes of a group can be written in, or None."""
    first = next((n for n in nodes if n.is_reduction()), None)
    if first is None:
        first = nodes[0]
    _, (sizes, reduced) = first.group
    space: Space | None = Space(tuple(sizes), tuple(reduced))
    for _ in range(2):  # a later node may split what an earlier one was matched with
        for node in nodes:
            if space is not None:
                space = _join(space, node)
    return space


def node_indices(space: Space, node: Any, symbols: Sequence[sympy.Symbol]) -> list[list]:
    """Index expressions over `symbols`, one per dimension of the space, for the node's loops."""
    _, (sizes, reduced) = node.group
    cut = len(space.outer)
    if node.is_reduction():
        return [
            _merge(refine(space.outer, sizes), symbols[:cut]),
            _merge(refine(space.row, reduced), symbols[cut:]),
        ]
    whole = refine(space.dims, sizes)
    if whole is not None:
        return [_merge(whole, symbols), []]
    return [_merge(refine(space.outer, sizes), symbols[:cut]), []]


def _merge(split: tuple[list[list], list[list]] | None, symbols: Sequence[sympy.Symbol]) -> list:
    assert split is not None and all(len(part) <= 1 for part in split[0])
    used = iter(s for s, part in zip(symbols, split[0], strict=True) if part)
    indices = []
    for part in split[1]:
        index = sympy.S.Zero
        for size in part:
            index = index * size + next(used)
        indices.append(index)
    return indices


@dataclass
class LoopNestLine(WrapperLine):
    """A wrapper line: call `nest` on the named tensors."""

    nest: LoopNest
    tensors: list[str]
    symbols: list[str]
    origin: str
    place: Place


class PagodaScheduling(BaseScheduling):
    """Inductor's scheduler asks it what to fuse and gives it each group to generate."""

    def get_backend_features(self, device: torch.device) -> OrderedSet[BackendFeature]:
        return OrderedSet([BackendFeature.REDUCE_TO_SINGLE_ELEMENT])

    def group_fn(self, sizes: Sequence[Sizes]) -> tuple[tuple[sympy.Expr, ...], ...]:
        return tuple(tuple(map(V.graph.sizevars.simplify, s)) for s in sizes)

    def can_fuse_vertical(self, node1: Any, node2: Any) -> bool:
        return self._can_fuse(node1, node2)

    def can_fuse_horizontal(self, node1: Any, node2: Any) -> bool:
        return self._can_fuse(node1, node2)

    def _can_fuse(self, node1: Any, node2: Any) -> bool:
        if node1.is_template() or node2.is_template():
            return False
        nodes = [*node1.get_nodes(), *node2.get_nodes()]
        if len(nodes) > MAX_NODES:
            return False
        tensors = {d.name for n in nodes for d in (*n.read_writes.reads, *n.read_writes.writes)}
        return len(tensors) <= MAX_TENSORS and common_space(nodes) is not None

    def fuse(self, node1: Any, node2: Any) -> FusedSchedulerNode:
        return FusedSchedulerNode.fuse(node1, node2)

    def codegen_node(self, node: Any) -> None:
        nodes = node.get_nodes()
        names = OrderedSet(n.get_name() for n in nodes)
        graph_nodes = operations(*(n.node for n in nodes if n.node is not None))
        origins = _origins(graph_nodes)
        try:
            nest, tensors, symbols = self._nest(nodes, names)
        except (Unsupported, NotImplementedError) as error:
            raise Unsupported(
                f"cannot compile {', '.join(origins)} for device pagoda: {error} "
                "Rewrite this part of the model, or keep it on the CPU with .cpu()."
                + source(graph_nodes)
            ) from error
        for piece, params, used in split(nest):
            V.graph.wrapper_code.writeline(
                LoopNestLine(
                    piece,
                    [tensors[p] for p in params],
                    [symbols[s] for s in used],
                    ", ".join(origins),
                    place(graph_nodes),
                )
            )
        self.free_buffers_in_scheduler()

    def _nest(
        self, nodes: Sequence[Any], names: OrderedSet[str]
    ) -> tuple[LoopNest, list[str], list[str]]:
        scheduler = self.scheduler
        space = common_space(nodes)
        assert space is not None
        iterators = [
            sympy.Symbol(f"i{d}", integer=True, nonnegative=True) for d in range(len(space.dims))
        ]

        made = {name for node in nodes for name in node.get_buffer_names()}

        def removed(name: str) -> bool:
            if name in made and scheduler.can_buffer_be_removed_through_fusion(name, names):
                V.graph.removed_buffers.add(name)
                return True
            return False

        handler = NestHandler(
            Builder([to_expr(d) for d in space.dims], len(space.row)),
            {symbol: Var(d) for d, symbol in enumerate(iterators)},
            removed,
            lambda name: scheduler.mutation_real_name.get(name, name),
        )
        ranges = dict(zip(iterators, space.dims, strict=True))
        for node in nodes:
            node.mark_run()
            with V.set_ops_handler(SimplifyIndexing(handler, ranges)):
                node._body(*node_indices(space, node, iterators))
        return handler.builder.build()

    def codegen_template(self, *args: Any, **kwargs: Any) -> str | None:
        raise NotImplementedError("templates are not used on device pagoda")

    def codegen_sync(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def ready_to_flush(self) -> bool:
        return False


def _origins(nodes: Sequence[torch.fx.Node]) -> list[str]:
    """Names of the torch operations a group came from."""
    targets = (str(node.meta.get("original_aten") or node.target) for node in nodes)
    return sorted({name.removeprefix("aten.").removesuffix(".default") for name in targets})
