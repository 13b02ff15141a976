"""Errors of the PyTorch storey."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagoda.compiler.errors import Unsupported
from pagoda.pytorch.places import line

__all__ = ["Unsupported", "source"]


def source(nodes: Iterable[Any]) -> str:
    """Where in the user's code FX nodes come from, as a sentence; empty if they do not know."""
    found = next(filter(None, map(line, nodes)), "")
    return f" It comes from {found}" if found else ""
