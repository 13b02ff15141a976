"""Loads ahead: a loop marked `ahead=d` issues the loads of its innermost loop d iterations early.

The window overlaps what is issued close together by itself, but it keeps each engine's queue in
order: a load that waits for an earlier kernel's store holds up all loads behind it. A matrix
product therefore first asks for its weights, which wait for nobody, and then for its activations:

    for j: for k: w = load(b[k, j]); acc += dot(x, w)

becomes, with a cursor (j', k') that runs d steps in front of (j, k),

    j', k' = start                      moved up in front of the loads that precede the loop
    d times: step
    for j: for k: step; w = next buffer; acc += dot(x, w)

    step:  if j' < stop: w' = next buffer; w' = load(b[k', j']); advance (j', k')

A load qualifies when its tile is declared beside it in the innermost loop, nothing else writes that
tile, and its operands depend only on the loop variables and on what the loop does not change.
"""

from __future__ import annotations

from dataclasses import replace

from pagoda.compiler.scalar import Scalar, Variable, scalar, substitute
from pagoda.compiler.schedule import Reserve, Rotate
from pagoda.compiler.tile_ir import (
    Body,
    Declare,
    Dot,
    For,
    If,
    Kernel,
    Let,
    Load,
    ReadWord,
    Reduce,
    Scatter,
    Statement,
    Store,
    Tile,
    walk,
)

SUFFIX = ".ahead"


def pipeline(kernel: Kernel, limit: int) -> Kernel:
    """The kernel with the loads of marked loops issued early, by at most `limit` iterations."""
    return replace(kernel, body=_body(kernel.body, limit))


def deepest(kernel: Kernel) -> int:
    """The largest `ahead` any loop asks for."""
    return max((s.ahead for s in kernel.walk() if isinstance(s, For)), default=0)


def _body(body: Body, limit: int) -> Body:
    result: list[Statement] = []
    for statement in body:
        inner = {n: _body(getattr(statement, n), limit) for n in statement.bodies_fields}
        if isinstance(statement, For) and statement.ahead:
            depth = min(statement.ahead, limit)
            found = _Pipelined(statement, depth) if depth else None
            if found is not None and found.loads:
                _insert_early(result, found)
                result.append(found.loop())
                continue
        result.append(replace(statement, **inner) if inner else statement)
    return tuple(result)


def _insert_early(result: list[Statement], found: _Pipelined) -> None:
    """Put the prologue before the loads that precede the loop, with the Lets it needs."""
    prologue = found.prologue()
    needed = {name for s in walk(prologue) for value in s.scalars() for name in value.variables()}
    moved: list[Statement] = []
    position = len(result)
    while position > 0:
        previous = result[position - 1]
        if isinstance(previous, Let) and previous.name in needed:
            needed |= previous.value.variables()
            moved.insert(0, previous)
        elif not isinstance(previous, (Let, Load, Declare)):
            break
        position -= 1
    kept = [s for s in result[position:] if not any(s is m for m in moved)]
    result[position:] = [*moved, *prologue, *kept]


class _Pipelined:
    """One marked loop: which loads qualify, and the pieces of the transformed loop."""

    def __init__(self, outer: For, depth: int):
        self.chain = [outer]
        while True:
            inner = [s for s in self.chain[-1].body if isinstance(s, For)]
            if len(inner) != 1:
                break
            self.chain.append(inner[0])
        self.outer, self.innermost, self.depth = outer, self.chain[-1], depth
        self.lets: dict[str, Scalar] = {}
        for loop in self.chain:
            self.lets |= {s.name: s.value for s in loop.body if isinstance(s, Let)}
        bound = [s.name for s in walk(outer.body) if isinstance(s, (Let, ReadWord))]
        loops = [s.variable for s in walk((outer,)) if isinstance(s, For)]
        self.steady = {n for n in self.lets if bound.count(n) == 1}
        self.changing = {*bound, *loops}
        self.variables = {loop.variable for loop in self.chain}
        self.loads = [s for s in self.innermost.body if self._qualifies(s)]
        self.fills = {s.destination.tile: _cursor(s.destination.tile) for s in self.loads}

    def _qualifies(self, statement: Statement) -> bool:
        if not isinstance(statement, Load):
            return False
        tile = statement.destination.tile
        beside = any(isinstance(s, Declare) and s.tile == tile for s in self.innermost.body)
        inside = list(walk((self.outer,)))
        stored = {s.destination.tensor for s in inside if isinstance(s, (Store, Scatter))}
        writers = [s for s in inside if _writes(s, tile)]
        scalars = [*statement.scalars(), *(v for loop in self.chain for v in _bounds(loop))]
        return (
            beside
            and statement.source.tensor not in stored
            and writers == [statement]
            and all(self._known_early(value) for value in scalars)
        )

    def _known_early(self, value: Scalar) -> bool:
        return all(
            name in self.variables
            or name not in self.changing
            or (name in self.steady and self._known_early(self.lets[name]))
            for name in value.variables()
        )

    def _ahead(self, value: Scalar) -> Scalar:
        """The value as seen by the cursor."""
        mapping: dict[Scalar, Scalar] = {}
        for name in value.variables():
            if name in self.variables or name in self.steady:
                mapping[Variable(name)] = Variable(name + SUFFIX)
        return substitute(value, mapping)

    def _needed_lets(self, values: list[Scalar]) -> list[Statement]:
        """The Lets that the cursor's values depend on, in program order."""
        needed: set[str] = set()
        queue = list(values)
        while queue:
            for name in queue.pop().variables() & self.steady:
                if name not in needed:
                    needed.add(name)
                    queue.append(self.lets[name])
        ordered = [name for name in self.lets if name in needed]
        return [Let(name + SUFFIX, self._ahead(self.lets[name])) for name in ordered]

    def step(self) -> Statement:
        """Load the cursor's tiles and move it on, unless it is through."""
        values = [v for load in self.loads for v in load.scalars()]
        values += [v for loop in self.chain for v in _bounds(loop)]
        statements: list[Statement] = self._needed_lets(values)
        for load in self.loads:
            fill = self.fills[load.destination.tile]
            statements.append(Rotate(fill, location=load.location))
            statements.append(self._moved(load, fill))
        statements += self._advance(len(self.chain) - 1)
        first = Variable(self.outer.variable + SUFFIX)
        condition = first.lt(self._ahead(self.outer.stop))
        return If(condition, tuple(statements), location=self.loads[0].location)

    def _moved(self, load: Load, fill: Tile) -> Load:
        def move(value: Scalar | None) -> Scalar | None:
            return None if value is None else self._ahead(value)

        view, access = load.destination, load.source
        return replace(
            load,
            destination=replace(view, tile=fill, row=move(view.row), col=move(view.col)),
            source=replace(
                access, offset=move(access.offset), row_stride=move(access.row_stride),
                plane_stride=move(access.plane_stride),
            ),
            rows=move(load.rows), cols=move(load.cols), planes=move(load.planes),
            pad_rows=tuple(map(move, load.pad_rows)), pad_cols=tuple(map(move, load.pad_cols)),
            row_stride=move(load.row_stride), plane_stride=move(load.plane_stride),
        )  # fmt: skip

    def _advance(self, level: int) -> list[Statement]:
        loop = self.chain[level]
        cursor = Variable(loop.variable + SUFFIX)
        moved: list[Statement] = [Let(cursor.name, cursor + self._ahead(loop.step))]
        if level > 0:
            again = Let(cursor.name, self._ahead(loop.start))
            condition = cursor.ge(self._ahead(loop.stop))
            moved.append(If(condition, (again, *self._advance(level - 1))))
        return moved

    def prologue(self) -> Body:
        """Storage, cursor, and the first `depth` steps."""
        reserves = [
            Reserve(
                tile, (tile, fill), self.depth + 1, location=self.loads[0].location
            )
            for tile, fill in self.fills.items()
        ]
        starts = [
            Let(loop.variable + SUFFIX, self._ahead(loop.start)) for loop in self.chain
        ]
        count = self.outer.variable + SUFFIX + ".count"
        bounds = scalar(0), scalar(self.depth), scalar(1)
        location = self.outer.location
        return (*reserves, *starts, For(count, *bounds, (self.step(),), location=location))

    def loop(self) -> For:
        """The loop, with the qualifying loads replaced by a step and a move to the next buffer."""
        body: list[Statement] = []
        for statement in self.innermost.body:
            if isinstance(statement, Declare) and statement.tile in self.fills:
                continue
            if any(statement is load for load in self.loads):
                if statement is self.loads[0]:
                    body.append(self.step())
                body.append(Rotate(statement.destination.tile, location=statement.location))
                continue
            body.append(statement)
        result = replace(self.innermost, body=tuple(body), ahead=0)
        for outer in reversed(self.chain[:-1]):
            inside = tuple(result if isinstance(s, For) else s for s in outer.body)
            result = replace(outer, body=inside, ahead=0)
        return result


def _bounds(loop: For) -> tuple[Scalar, Scalar, Scalar]:
    return loop.start, loop.stop, loop.step


def _cursor(tile: Tile) -> Tile:
    return replace(tile, name=tile.name + SUFFIX, cursor_of=tile)


def _writes(statement: Statement, tile: Tile) -> bool:
    """May the statement write the tile?"""
    if isinstance(statement, (Store, Scatter)):
        return False
    if isinstance(statement, Dot):
        return statement.acc.tile == tile
    if isinstance(statement, Reduce):
        return statement.state.tile == tile
    target = getattr(statement, "destination", None)
    return target is not None and target.tile == tile
