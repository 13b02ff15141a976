"""Where in the user's model the nodes of a graph come from: for profiles and messages.

Dynamo notes the stack of modules and the source line with every node, torch's passes hand both on;
what they are here is plain data that goes with each kernel call (`pagoda.compiler.region.Place`).
"""

from __future__ import annotations

import hashlib
import linecache
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from pagoda.compiler.region import Place

_OWN = (Path(__file__).parents[1], Path(torch.__file__).parent)


def operations(*parts: Any) -> list[torch.fx.Node]:
    """The operations of the graph that Inductor's nodes came from, in graph order."""
    origins = {origin for part in parts for origin in part.get_origins()}
    found = {origin for origin in origins if origin.op == "call_function"}
    inner = {origin for origin in found if origin.target is not invoke_subgraph}
    return sorted(inner or found, key=attrgetter("_sort_key"))


def place(nodes: Iterable[Any]) -> Place:
    """Layers and lines of FX nodes, each once, in the order given."""
    nodes = list(nodes)
    layers = dict.fromkeys(filter(None, map(_layer, nodes)))
    lines = dict.fromkeys(filter(None, map(line, nodes)))
    return Place(tuple(layers), tuple(lines))


def line(node: Any) -> str:
    """`file "model.py", line 20, in forward: code` of the user's call; empty if not known."""
    lines = (node.meta.get("stack_trace") or "").rstrip().splitlines()
    places = [number for number, text in enumerate(lines) if text.lstrip().startswith("File ")]
    if not places:
        return ""
    where, *code = (text.strip() for text in lines[places[-1] : places[-1] + 2])
    return f"{where.replace('File ', 'file ', 1)}: {' '.join(code)}"


def user_place() -> Callable[[], str]:
    """The innermost line that runs now outside of this package and torch. The function tells it in
    the form of `line`; empty if there is none."""
    frame = sys._getframe()
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return partial(_told, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return str


@cache
def _is_users(file: str) -> bool:
    path = Path(file)
    return path.is_file() and not any(path.is_relative_to(own) for own in _OWN)


def _told(file: str, line: int, function: str) -> str:
    code = linecache.getline(file, line).strip()
    return f'file "{file}", line {line}, in {function}: {code}'


def digest(graph: torch.fx.Graph) -> str:
    """SHA-256 of all places in a graph. It belongs in the keys of caches of what is compiled from
    the graph: equal graphs may come from different lines."""
    total = hashlib.sha256()
    for node in graph.nodes:
        total.update(repr((_layer(node), line(node))).encode())
    return total.hexdigest()


def _layer(node: Any) -> str:
    """Path of the innermost module in the compiled one, as in a state dict; empty for itself."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]  # as Dynamo names it: L['self'].blocks[0].conv
    path = re.sub(r"^L\['\w+'\]", "", path)
    return re.sub(r"\._(?:modules|orig_mod)\b|\[|\]|'|\"", _separator, path).strip(".")


def _separator(found: re.Match) -> str:
    return "." if found[0] == "[" else ""
