"""Element-wise trees become vector commands; tiles get their number of buffers.

A vector command computes `dst = f2(f1(a, b), c)`, so a tree is cut into pairs of functions; what
does not fit goes through temporaries, which are reused as soon as their last reader has run (the
destination serves as one when its elements are 32 bits wide and the tree does not read it). A
multiply that feeds an add is *not* made an fma: that would change a rounding; write `fma`. What
ends in int8 takes `i2fmul` and `faddq` (`quantised_trees`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagoda.compiler.quantised_trees import with_quantised_functions
from pagoda.compiler.scalar import ZERO, Scalar
from pagoda.compiler.tile_ir import (
    Apply,
    Body,
    Column,
    Declare,
    Elementwise,
    For,
    Gather,
    If,
    Kernel,
    Load,
    Read,
    Row,
    Splat,
    Statement,
    Tile,
    Tree,
    View,
    walk,
)
from pagoda.isa.commands import COLUMN, SCALAR, TILE
from pagoda.isa.numbers import DType

COMMUTATIVE = ("fadd", "faddq", "fmul", "fmax", "fmin", "feq", "fne") + (
    "iadd", "imul", "imax", "imin", "and", "or", "xor", "ieq", "ine",
)  # fmt: skip
SWAPPED = {
    **{name: name for name in COMMUTATIVE},
    "fsub": "frsub", "fdiv": "frdiv", "isub": "irsub",
    "flt": "fgt", "fgt": "flt", "fle": "fge", "fge": "fle",
}  # fmt: skip
REINTERPRET = ("as_int", "as_float")
UNPAIRABLE = ("fma", "select", "faddq", *REINTERPRET)  # take a whole command, none, or are no f1


@dataclass(frozen=True)
class Operand:
    """A source of a vector command. layout: TILE, COLUMN or SCALAR; repeat: row stride 0."""

    dtype: DType
    layout: int
    view: View | None = None
    value: Scalar = ZERO
    repeat: bool = False

    def __str__(self) -> str:
        if self.view is None:
            return str(self.value)
        name = {COLUMN: "column", TILE: "row" if self.repeat else ""}[self.layout]
        return f"{name}({self.view})" if name else str(self.view)


@dataclass(frozen=True)
class Reserve(Statement):
    """Storage for a tile with at least `minimum` buffers, and the cursors that walk over them; it
    puts every cursor before the first buffer."""

    tile: Tile
    cursors: tuple[Tile, ...]
    minimum: int


@dataclass(frozen=True)
class Rotate(Statement):
    """Move a cursor on to the next buffer."""

    tile: Tile


@dataclass(frozen=True)
class Vector(Statement):
    """One vector command; b and c are None where the functions do not read them."""

    f1: str
    f2: str
    a: Operand
    b: Operand | None
    c: Operand | None
    destination: View
    dtype: DType
    rows: Scalar
    cols: Scalar

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(x for x in (self.a, self.b, self.c) if x is not None)

    def views(self) -> Iterator[View]:
        yield from (operand.view for operand in self.operands if operand.view is not None)
        yield self.destination

    def scalars(self) -> Iterator[Scalar]:
        yield from (self.rows, self.cols)
        yield from (operand.value for operand in self.operands)
        for view in self.views():
            yield from (view.row, view.col)

    def __str__(self) -> str:
        reads = ", ".join(map(str, self.operands))
        return f"{self.destination} = vector {self.f1} {self.f2} {reads} {self.rows} x {self.cols}"


class _Packer:
    """Packs one `Elementwise` statement."""

    def __init__(self, statement: Elementwise, names: Iterator[str]):
        self.statement = statement
        self.names = names
        self.commands: list[Vector] = []
        self.temporaries: list[Tile] = []
        saturates = statement.destination.tile.dtype is DType.I8
        self.root = _intern(with_quantised_functions(_intern(statement.tree), saturates))
        self.uses = Counter({id(self.root): 1})
        self._count(self.root, set())
        self.counts: dict[int, int] = {}
        self.done: dict[int, Operand] = {}
        self.reads: Counter[View] = Counter()  # readers still to come of each temporary
        destination = statement.destination
        views = [n.view for n in self.root.walk() if isinstance(n, (Read, Row, Column))]
        reusable = destination.tile.dtype.bits == 32 and all(
            view.tile != destination.tile for view in views
        )
        self.free: list[View] = [destination] if reusable else []

    def _count(self, node: Tree, seen: set[int]) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        for child in node.children():
            self.uses[id(child)] += 1
            self._count(child, seen)

    def pack(self) -> None:
        root = self.root
        while isinstance(root, Apply) and root.function in REINTERPRET:
            root = root.arguments[0]  # a command converts patterns by the destination's type alone
        if isinstance(root, Apply):
            self._compute(root, self.statement.destination, self.statement.destination.tile.dtype)
        else:
            operand = self._operand(root)
            destination = self.statement.destination
            self._issue("mov", "mov", (operand, None, None), destination, destination.tile.dtype)

    def _compute(self, node: Apply, destination: View | None, dtype: DType) -> View:
        """Emit the command that computes `node`, into a temporary when destination is None."""
        function, arguments = node.function, node.arguments
        if function == "fma":
            f1, f2, sources = "fmul", "fma", tuple(map(self._operand, arguments))
        elif function == "select":
            f1, f2, sources = "select", "select", tuple(map(self._operand, arguments))
        elif (place := self._first(node)) == 0:
            inner = arguments[0]
            a, b = self._pair(inner)
            c = self._operand(arguments[1]) if len(arguments) == 2 else None
            f1, f2, sources = inner.function, function, (a, b, c)
        elif place == 1:
            inner = arguments[1]
            c = self._operand(arguments[0])
            f1, f2, sources = inner.function, SWAPPED[function], (*self._pair(inner), c)
        elif function == "faddq":
            x, c = map(self._operand, arguments)
            f1, f2, sources = "mov", function, (x, None, c)
        else:
            operands = (*map(self._operand, arguments), None, None)
            f1, f2, sources = function, "mov", operands[:3]
        return self._issue(f1, f2, sources, destination, dtype)

    def _pair(self, inner: Apply) -> tuple[Operand, Operand | None]:
        operands = tuple(map(self._operand, inner.arguments))
        return operands if len(operands) == 2 else (operands[0], None)

    def _first(self, node: Apply) -> int | None:
        """Which argument is the command's f1, if one is: that which leaves the fewest commands."""
        if node.function in ("fma", "select", "i2fmul", *REINTERPRET):
            return None
        places = [
            place
            for place, argument in enumerate(node.arguments)
            if self._pairable(argument) and (place == 0 or node.function in SWAPPED)
        ]
        return min(places, key=lambda place: self._left(node, place), default=None)

    def _left(self, node: Apply, place: int | None) -> int:
        """Commands ahead of the one of a node, whose f1 is its argument at `place`."""
        return sum(
            sum(map(self._commands, argument.children()))
            if here == place
            else self._commands(argument)
            for here, argument in enumerate(node.arguments)
        )

    def _commands(self, node: Tree) -> int:
        """Commands that compute a node and what only it reads."""
        if not isinstance(node, Apply) or self.uses[id(node)] > 1:
            return 0
        if id(node) not in self.counts:
            own = node.function not in REINTERPRET
            self.counts[id(node)] = own + self._left(node, self._first(node))
        return self.counts[id(node)]

    def _pairable(self, node: Tree) -> bool:
        return (
            isinstance(node, Apply)
            and node.function not in UNPAIRABLE
            and self.uses[id(node)] == 1
        )

    def _operand(self, node: Tree) -> Operand:
        if isinstance(node, Splat):
            return Operand(_lanes(node.kind), SCALAR, value=node.value)
        if isinstance(node, (Read, Row, Column)):
            layout = COLUMN if isinstance(node, Column) else TILE
            return Operand(node.view.tile.dtype, layout, node.view, repeat=isinstance(node, Row))
        if id(node) not in self.done:
            if node.function in REINTERPRET:
                inner = self._operand(node.arguments[0])
                self.done[id(node)] = inner
                if inner.view in self.reads:  # the readers of both share one temporary
                    self.reads[inner.view] += self.uses[id(node)] - 1
                return inner
            view = self._compute(node, None, _lanes(node.kind))
            self.reads[view] = self.uses[id(node)]
            self.done[id(node)] = Operand(_lanes(node.kind), TILE, view)
        return self.done[id(node)]

    def _issue(
        self,
        f1: str,
        f2: str,
        sources: tuple[Operand | None, Operand | None, Operand | None],
        destination: View | None,
        dtype: DType,
    ) -> View:
        for view in [s.view for s in sources if s is not None and s.view in self.reads]:
            self.reads[view] -= 1
            if self.reads[view] == 0:
                del self.reads[view]
                self.free.append(view)
        if destination is None:
            destination = self.free.pop() if self.free else self._temporary()
        self.commands.append(
            Vector(
                f1, f2, *sources, destination, dtype, self.statement.rows, self.statement.cols,
                location=self.statement.location,
            )
        )  # fmt: skip
        return destination

    def _temporary(self) -> View:
        shape = self.statement.destination.tile
        tile = Tile(next(self.names), DType.F32, shape.rows, shape.cols, "sram", 1)
        self.temporaries.append(tile)
        return tile.view()


def _lanes(kind: str) -> DType:
    return DType.F32 if kind == "float" else DType.I32


def _intern(tree: Tree) -> Tree:
    """The same tree with equal subtrees as one object, so that each is computed once."""
    known: dict[object, Tree] = {}
    done: dict[int, Tree] = {}

    def visit(node: Tree) -> Tree:
        if id(node) not in done:
            if isinstance(node, Apply):
                arguments = tuple(visit(child) for child in node.arguments)
                key: object = (node.function, *map(id, arguments))
                done[id(node)] = known.setdefault(key, replace(node, arguments=arguments))
            else:
                done[id(node)] = known.setdefault(node, node)
        return done[id(node)]

    return visit(tree)


def pack_elementwise(kernel: Kernel) -> Kernel:
    """The kernel with every `Elementwise` replaced by temporaries and `Vector` commands."""
    names = (f"temporary{number}" for number in range(1, 1 << 30))

    def rewrite(body: Body) -> Body:
        result: list[Statement] = []
        for statement in body:
            if isinstance(statement, Elementwise):
                packer = _Packer(statement, names)
                packer.pack()
                place = statement.location
                result += [Declare(tile, location=place) for tile in packer.temporaries]
                result += packer.commands
            else:
                inner = {n: rewrite(getattr(statement, n)) for n in statement.bodies_fields}
                result.append(replace(statement, **inner) if inner else statement)
        return tuple(result)

    return replace(kernel, body=rewrite(kernel.body))


# Buffers -----------------------------------------------------------------------------------------

LOADED_BUFFERS = 4  # one in use, the rest on their way: covers the DRAM latency
PASSED_BUFFERS = 2  # written by one engine, read by another
ENGINE = {"Load": "load", "Gather": "load", "Store": "store", "Scatter": "store", "Dot": "matrix"}


def engine_of(statement: Statement) -> str | None:
    """The engine that runs a statement, None for control."""
    if isinstance(statement, (For, If, Declare)) or not any(True for _ in statement.views()):
        return None
    name = type(statement).__name__
    return None if name == "ReadWord" else ENGINE.get(name, "vector")


def wanted_buffers(kernel: Kernel) -> dict[Tile, int]:
    """How many buffers each declared tile would like: 1 outside loops and for what one engine
    keeps to itself; the declaration's own number where it names one."""
    engines: dict[Tile, set[str]] = {}
    loaded: set[Tile] = set()
    for statement in walk(kernel.body):
        engine = engine_of(statement)
        for view in statement.views() if engine else ():
            engines.setdefault(view.tile.storage, set()).add(engine)
        if isinstance(statement, (Load, Gather)):
            loaded.add(statement.destination.tile.storage)
    wanted: dict[Tile, int] = {}

    def visit(body: Body, in_loop: bool) -> None:
        for statement in body:
            if isinstance(statement, Declare):
                tile = statement.tile
                best = LOADED_BUFFERS if tile in loaded else PASSED_BUFFERS
                shared = len(engines.get(tile, ())) > 1
                wanted[tile] = tile.buffers or (best if in_loop and shared else 1)
            elif isinstance(statement, Reserve):
                wanted[statement.tile] = max(
                    statement.tile.buffers or LOADED_BUFFERS, statement.minimum
                )
            for inner in statement.bodies():
                visit(inner, in_loop or isinstance(statement, For))

    visit(kernel.body, False)
    return wanted
