"""A pass over the graph between torch's decompositions and Inductor's lowering."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from pagoda.kernels.user import sources
from pagoda.pytorch.compiled_mixing import bring_over
from pagoda.pytorch.matmul_precision import matmul_precision

aten = torch.ops.aten


class GraphPass(CustomGraphPass):
    """Rewrites graphs for this device. Its `uuid` is part of Inductor's cache keys: it covers all
    that shapes a region beside the graph, the code, the float32 matmul precision and the user's own
    kernels, so that a cached region is never older than these. places: digest of the places that it
    names."""

    def __init__(self, places: str = "") -> None:
        self.places = places

    def __call__(self, graph: torch.fx.Graph) -> None:
        share_heads(graph)
        bring_over(graph)

    def uuid(self) -> str:
        return f"{source_hash()} {matmul_precision()} {sources()} {self.places}"


class BiasPass(GraphPass):
    """After Inductor's own rewriting, which makes `addmm` of any product and sum: the kernel adds
    one row to all rows, as it is; everything else is added in an operation of its own."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, a, b = node.args
            alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
            if (alpha, beta) == (1, 1) and _is_row(bias, b):
                continue
            with graph.inserting_before(node):
                result = _call(graph, aten.mm.default, a, b)
                if alpha != 1:
                    result = _call(graph, aten.mul.Tensor, result, alpha)
                if beta not in (0, 1):
                    bias = _call(graph, aten.mul.Tensor, bias, beta)
                if beta != 0:
                    result = _call(graph, aten.add.Tensor, result, bias)
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def _is_row(node: torch.fx.Node, b: torch.fx.Node) -> bool:
    """Whether the bias has one element for each column of the product, and no more."""
    bias, columns = node.meta["val"], b.meta["val"].shape[1]
    if bias.dim() == 0 or bias.shape[-1] != columns:
        return False
    return bias.dim() == 1 or bias.stride()[0] == 0 or bias.shape[0] == 1


def _call(graph: torch.fx.Graph, target: Any, *args: Any) -> torch.fx.Node:
    """A new node with its meta value."""
    node = graph.call_function(target, args)
    values = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in args]
    node.meta["val"] = target(*values)
    return node


@functools.cache
def source_hash() -> str:
    """SHA-256 of the sources of this folder and of the plain data it produces."""
    here = Path(__file__).parent
    files = [*here.glob("*.py"), *(here.parent / "compiler").glob("loop_nest*.py")]
    files += [here.parent / "compiler" / name for name in ("index_expr.py", "region.py")]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.read_bytes())
    return total.hexdigest()


def share_heads(graph: torch.fx.Graph) -> None:
    """Attention on repeated key/value heads becomes attention on the heads themselves.

    Models repeat each head for its group of query heads (unsqueeze, expand, reshape); the attention
    kernel takes groups as they are, so the copies would only cost memory traffic.
    """
    for operation in (torch.ops.pagoda.sdpa.default, torch.ops.pagoda.sdpa_training.default):
        for node in graph.find_nodes(op="call_function", target=operation):
            query, key, value, *rest = node.args
            sources = [_repeated(key), _repeated(value)]
            if None not in sources:
                node.args = (query, *sources, *rest)
    graph.eliminate_dead_code()


def _repeated(node: torch.fx.Node) -> torch.fx.Node | None:
    """x, if the node is x [b, g, s, d] with each head repeated: [b, g * n, s, d]."""
    result = node.meta["val"]
    while node.target in (aten.view.default, aten.reshape.default, aten.clone.default,
                          aten._unsafe_view.default):  # fmt: skip
        node = node.args[0]
    if node.target is not aten.expand.default:
        return None
    expanded, node = node, node.args[0]
    while node.target in (aten.slice.Tensor, aten.clone.default):
        if (
            node.target is aten.slice.Tensor
            and node.meta["val"].shape != node.args[0].meta["val"].shape
        ):
            return None
        node = node.args[0]
    if node.target is not aten.unsqueeze.default or node.args[1] not in (2, -3):
        return None
    source = node.args[0]
    wide, whole = expanded.meta["val"].shape, source.meta["val"].shape
    if len(wide) != 5 or len(whole) != 4 or len(result.shape) != 4:
        return None
    same = (wide[0], wide[1], wide[3], wide[4]) == tuple(whole)
    return source if same and result.shape[2:] == whole[2:] else None
