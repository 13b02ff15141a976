"""When a version compiled with symbolic sizes serves other sizes: the conditions torch recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._dynamo.source import LocalSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def expression(
    shapes: ShapeEnv,
    placeholders: Sequence[Any],
    *,
    guards: list[Any] | None = None,
    ignore_static: bool = True,
) -> str | None:
    """As `ShapeEnv.produce_guards_expression`, which leaves out the parentheses that a condition
    with "or" needs among others: its graphs were used for sizes they are wrong for."""
    sources = [LocalSource(f"t{number}") for number in range(len(placeholders))]
    conditions = shapes.produce_guards(
        placeholders, sources, guards=guards, ignore_static=ignore_static
    )
    return " and ".join(f"({each})" for each in conditions) or None


def mend() -> None:
    """Makes torch's own caches of compiled graphs use `expression`."""
    ShapeEnv.produce_guards_expression = expression
