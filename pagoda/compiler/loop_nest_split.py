"""Loop nests without avoidable masks and divisions.

Concatenation, padding and rotation arrive as one loop over everything, with masked loads: below a
bound it reads one tensor, from there on another. `split` cuts such a loop at its bounds into
several nests in which every such comparison is known, so that masks and selects vanish, and
unfolds dimensions that are indexed by `i // c` and `i % c` into two. What remains is affine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pagoda.compiler.index_expr import Const, Expr, FloorDiv, Mod, Ref, Var
from pagoda.compiler.loop_nest import (
    Bitcast,
    Builder,
    Cast,
    Constant,
    IndexValue,
    Indirect,
    Load,
    LoopNest,
    Pointwise,
    Reduce,
    Store,
)

MAX_PIECES = 8

# Comparison -> (whether it holds below its bound, how far the bound lies above the right side).
_COMPARISONS = {"lt": (True, 0), "le": (True, 1), "ge": (False, 0), "gt": (False, 1)}
_SWAPPED = {"lt": "gt", "le": "ge", "ge": "le", "gt": "lt"}


def split(nest: LoopNest) -> list[tuple[LoopNest, list[int], list[int]]]:
    """Nests that together do what `nest` does, in any order: each with the number in `nest` of
    each of its parameters and symbols. `[(nest, [0, 1, ...], [0, 1, ...])]` if nothing applies."""
    whole = _Piece(nest, list(range(len(nest.params))), list(range(len(nest.symbols))))
    done: list[_Piece] = []
    waiting = [whole]
    while waiting:
        piece = waiting.pop(0)
        parts = _cut(piece)
        if parts is None or len(done) + len(waiting) + len(parts) > MAX_PIECES:
            done.append(_unfold(piece))
        else:
            waiting[:0] = parts
    done = [_squeeze(piece) for piece in done]
    return [(p.nest, p.params, p.symbols) for p in done]


class _Piece:
    """A nest, and where its parameters and symbols are in the original one."""

    def __init__(self, nest: LoopNest, params: list[int], symbols: list[int]) -> None:
        self.nest = nest
        self.params = params
        self.symbols = symbols

    def rebuilt(
        self,
        dims: list[Expr],
        reduced: int,
        atoms: dict[Expr, Expr],
        known: dict[int, bool],
    ) -> _Piece:
        """The nest over other dimensions: iteration variables replaced by `atoms`, the values in
        `known` by constants, and what follows from that folded."""
        builder = Builder(dims, reduced)
        fold = _Folder(builder, self.nest, atoms, known)
        for number in range(len(self.nest.body)):
            fold.step(number)
        nest, names, symbols = builder.build()
        return _Piece(
            _mapped(nest, _within(dims)),
            [self.params[int(name.removeprefix("p"))] for name in names],
            [self.symbols[self.nest.symbols.index(name)] for name in symbols],
        )


class _Folder:
    """Copies a body into a builder, folding constants on the way."""

    def __init__(
        self, builder: Builder, nest: LoopNest, atoms: dict[Expr, Expr], known: dict[int, bool]
    ) -> None:
        self.builder = builder
        self.nest = nest
        self.atoms = dict(atoms)
        self.known = known
        self.values: dict[int, int] = {}

    def step(self, number: int) -> None:
        b, op = self.builder, self.nest.body[number]
        if number in self.known:
            self.values[number] = b.constant(self.known[number], "bool")
            return
        match op:
            case Load():
                self.values[number] = self._load(op)
            case Store():
                index = self._index(op.index)
                dtype = self.nest.params[op.param].dtype
                b.store(f"p{op.param}", dtype, index, self.values[op.value], op.mode)
            case Constant(value, dtype):
                self.values[number] = b.constant(value, dtype)
            case IndexValue(index, dtype):
                self.values[number] = b.index(self._index(index), dtype)
            case Pointwise(name, operands, _):
                self.values[number] = self._pointwise(name, [self.values[o] for o in operands])
            case Cast(value, dtype):
                self.values[number] = b.cast(self.values[value], dtype, rounds=True)
            case Bitcast(value, dtype):
                self.values[number] = b.bitcast(self.values[value], dtype)
            case Indirect(value, size):
                self.atoms[Ref(number)] = b.indirect(self.values[value], self._index(size))
            case Reduce(kind, value):
                self.values[number] = b.reduce(kind, self.values[value])

    def _index(self, index: Expr) -> Expr:
        return index.substitute(self.atoms)

    def _load(self, op: Load) -> int:
        b, mask = self.builder, None
        if op.mask is not None:
            mask = self.values[op.mask]
            truth = b.known(mask)
            if truth is False:
                return b.constant(op.other, op.dtype)
            mask = None if truth else mask
        dtype = self.nest.params[op.param].dtype
        other = op.other if mask is not None else 0
        return b.load(f"p{op.param}", dtype, self._index(op.index), mask, other)

    def _pointwise(self, name: str, values: list[int]) -> int:
        b = self.builder
        truths = [b.known(v) for v in values]
        bools = all(b.dtype(v) == "bool" for v in values)
        if name == "where" and truths[0] is not None:
            return values[1] if truths[0] else values[2]
        if bools and name == "logical_not" and truths[0] is not None:
            return b.constant(not truths[0], "bool")
        if bools and name in ("bitwise_and", "bitwise_or"):
            absorbing = name == "bitwise_or"
            if absorbing in truths:
                return b.constant(absorbing, "bool")
            kept = [v for v, t in zip(values, truths, strict=True) if t is None]
            if not kept:
                return b.constant(not absorbing, "bool")
            if len(kept) == 1:
                return kept[0]
        if name == "mul" and b.is_one(values[1]):
            return values[0]
        return b.pointwise(name, *values)


def _cut(piece: _Piece) -> list[_Piece] | None:
    """Two pieces on both sides of the first usable bound, or one if a side is empty."""
    nest = piece.nest
    if any(p.access not in ("read", "write") for p in nest.params):
        return None
    for number in range(len(nest.body)):
        bound = _bound(nest, number)
        if bound is None:
            continue
        dim, at, below = bound
        if dim >= len(nest.outer) or not _every_store_follows(nest, dim):
            continue
        size = nest.dims[dim]
        if (-at).is_nonnegative():
            return [piece.rebuilt(*_shifted(nest, dim, Const(0), size), {number: not below})]
        if (at - size).is_nonnegative():
            return [piece.rebuilt(*_shifted(nest, dim, Const(0), size), {number: below})]
        if at.is_nonnegative() and (size - at).is_nonnegative():
            return [
                piece.rebuilt(*_shifted(nest, dim, Const(0), at), {number: below}),
                piece.rebuilt(*_shifted(nest, dim, at, size - at), {number: not below}),
            ]
    return None


def _shifted(
    nest: LoopNest, dim: int, start: Expr, size: Expr
) -> tuple[list[Expr], int, dict[Expr, Expr]]:
    dims = [size if d == dim else s for d, s in enumerate(nest.dims)]
    atoms: dict[Expr, Expr] = {Var(dim): Var(dim) + start}
    return dims, nest.reduced, atoms


def _every_store_follows(nest: LoopNest, dim: int) -> bool:
    """Whether no two iterations of `dim` store to the same place."""
    return all(dim in op.index.vars() for op in nest.body if isinstance(op, Store))


def _bound(nest: LoopNest, number: int) -> tuple[int, Expr, bool] | None:
    """(d, b, below) if the operation compares dimension d with a loop-invariant value: it is
    `below` for i_d < b, and the opposite from b on."""
    op = nest.body[number]
    if not isinstance(op, Pointwise) or op.name not in _COMPARISONS:
        return None
    left, right = (_position(nest, o) for o in op.operands)
    if left is None or right is None:
        return None
    name = op.name
    if right.vars():
        left, right, name = right, left, _SWAPPED[name]
    affine = left.affine()
    if affine is None or affine.refs or len(affine.coefficients) != 1 or right.vars():
        return None
    ((dim, coefficient),) = affine.coefficients.items()
    if coefficient != Const(1):
        return None
    below, above = _COMPARISONS[name]
    return dim, right - affine.offset + above, below


def _position(nest: LoopNest, number: int) -> Expr | None:
    """The value as an index expression, if it is one."""
    op = nest.body[number]
    if isinstance(op, Cast) and op.dtype.startswith("int"):
        return _position(nest, op.value)
    if isinstance(op, IndexValue) and not op.index.refs():
        return op.index
    if isinstance(op, Constant) and isinstance(op.value, int):
        return Const(int(op.value))
    return None


def _squeeze(piece: _Piece) -> _Piece:
    """Without outer dimensions of size 1."""
    nest = piece.nest
    kept = [
        d for d, size in enumerate(nest.dims) if size != Const(1) or d >= len(nest.outer)
    ]  # fmt: skip
    if len(kept) == len(nest.dims):
        return piece
    atoms: dict[Expr, Expr] = {Var(d): Const(0) for d in range(len(nest.dims))}
    atoms |= {Var(d): Var(k) for k, d in enumerate(kept)}
    return piece.rebuilt([nest.dims[d] for d in kept], nest.reduced, atoms, {})


def _unfold(piece: _Piece) -> _Piece:
    """Splits dimensions used as `i // c` or `i % c`, c dividing their size, in two."""
    while True:
        nest = piece.nest
        found = next(_foldings(nest), None)
        if found is None:
            return piece
        dim, inner = found
        outer = nest.dims[dim] // inner
        dims = [*nest.dims[:dim], outer, inner, *nest.dims[dim + 1 :]]
        atoms: dict[Expr, Expr] = {Var(d): Var(d + 1) for d in range(len(nest.dims)) if d > dim}
        atoms[Var(dim)] = Var(dim) * inner + Var(dim + 1)
        reduced = nest.reduced + (dim >= len(nest.outer))
        piece = piece.rebuilt(dims, reduced, atoms, {})


def _foldings(nest: LoopNest) -> Iterator[tuple[int, Const]]:
    """Dimensions to unfold, each with the size of its inner part."""
    for op in nest.body:
        for index in op.indices():
            for node in index.walk():
                if not isinstance(node, (FloorDiv, Mod)) or not isinstance(node.right, Const):
                    continue
                for dim in sorted(node.left.vars()):
                    size, c = nest.dims[dim], node.right
                    affine = node.left.affine()
                    usable = affine is not None and affine.coefficients.get(dim) == Const(1)
                    if usable and size != c and size % c == Const(0):
                        yield dim, c


def _within(dims: list[Expr]) -> Callable[[Expr], Expr]:
    """A simplifier: `e % c` is e, and `e // c` is 0, where 0 <= e < c."""

    def limit(index: Expr) -> int | None:
        affine = index.affine()
        if affine is None or affine.refs or not isinstance(affine.offset, Const):
            return None
        top = affine.offset.value
        if top < 0:
            return None
        for dim, coefficient in affine.coefficients.items():
            if not isinstance(coefficient, Const) or not isinstance(dims[dim], Const):
                return None
            if coefficient.value < 0:
                return None
            top += coefficient.value * (dims[dim].value - 1)
        return top

    def simplify(index: Expr) -> Expr:
        kids = tuple(simplify(child) for child in index.children())
        if kids:
            index = index._rebuild(kids)
        if isinstance(index, (Mod, FloorDiv)) and isinstance(index.right, Const):
            top = limit(index.left)
            if top is not None and top < index.right.value:
                return index.left if isinstance(index, Mod) else Const(0)
        return index

    return simplify


def _mapped(nest: LoopNest, simplify: Callable[[Expr], Expr]) -> LoopNest:
    """The nest with every index expression simplified."""

    def change(op):
        if isinstance(op, (Load, Store, IndexValue)):
            return replace(op, index=simplify(op.index))
        return op

    return replace(nest, body=tuple(change(op) for op in nest.body))
