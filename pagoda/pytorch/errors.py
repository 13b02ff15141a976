"""Errors of the PyTorch storey."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagoda.compiler.errors import Unsupported

__all__ = ["Unsupported", "source"]


def source(nodes: Iterable[Any]) -> str:
    """Where in the user's code FX nodes come from, as a sentence; empty if they do not know."""
    for node in nodes:
        lines = (node.meta.get("stack_trace") or "").rstrip().splitlines()
        places = [number for number, line in enumerate(lines) if line.lstrip().startswith("File ")]
        if places:
            place, *code = (line.strip() for line in lines[places[-1] : places[-1] + 2])
            return f" It comes from {place.replace('File ', 'file ', 1)}: {' '.join(code)}"
    return ""
