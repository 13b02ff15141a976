"""Bodies of loop nests, rewritten operation by operation."""

from __future__ import annotations

from dataclasses import fields, replace

from pagoda.compiler.index_expr import Expr, Ref
from pagoda.compiler.loop_nest import Constant, LoopNest, Op, Store


def substitute(op: Op, values: dict[int, int], atoms: dict[Expr, Expr | int]) -> Op:
    """The operation with body values renumbered and atoms of its index expressions replaced."""
    atoms = {**atoms, **{Ref(old): Ref(new) for old, new in values.items()}}
    changed: dict[str, object] = {}
    for field in fields(op):
        old = getattr(op, field.name)
        if isinstance(old, Expr):
            changed[field.name] = old.substitute(atoms)
        elif field.name == "operands":
            changed["operands"] = tuple(values[o] for o in old)
        elif field.name in ("value", "mask") and old is not None and not isinstance(op, Constant):
            changed[field.name] = values[old]
    return replace(op, **changed) if changed else op


class Body:
    """A body being written; `values` maps numbers of the old body to those of the new one."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: dict[int, int] = {}

    def add(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def copy(self, number: int, op: Op, atoms: dict[Expr, Expr | int] | None = None) -> None:
        self.values[number] = self.add(substitute(op, self.values, atoms or {}))


def with_body(nest: LoopNest, body: Body) -> LoopNest:
    """The nest with this body, without what no store uses."""
    alive = [isinstance(op, Store) for op in body.ops]
    for number in range(len(body.ops) - 1, -1, -1):
        if alive[number]:
            for a in body.ops[number].args():
                alive[a] = True
    kept = Body()
    for number, op in enumerate(body.ops):
        if alive[number]:
            kept.copy(number, op)
    return replace(nest, body=tuple(kept.ops))
