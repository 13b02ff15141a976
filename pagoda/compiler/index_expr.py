"""Integer index expressions: what a loop nest indexes memory with and a region sizes buffers with.

An expression is a tree of frozen nodes over iteration variables, size symbols and indirect values.
It is kept in one normal form (sums of products, multiplied out, terms sorted), so that equal
polynomials are equal Python objects. All arithmetic is exact; `//` and `%` round to minus infinity
as in Python. Build expressions with the operators, never with `Add(...)` or `Mul(...)` directly.

>>> i0, i1, n = Var(0), Var(1), Symbol("n")
>>> (i0 * n + i1) * 2 + 3
Expr(2*i0*n + 2*i1 + 3)
>>> ((i0 * n + i1) * 2 + 3).affine().coefficients
{0: Expr(2*n), 1: Expr(2)}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache, reduce
from typing import Any


class Expr:
    """Base of all index expressions; immutable, hashable, picklable."""

    __slots__ = ()

    def __add__(self, other: Expr | int) -> Expr:
        return _add((self, expr(other)))

    def __radd__(self, other: int) -> Expr:
        return _add((expr(other), self))

    def __sub__(self, other: Expr | int) -> Expr:
        return _add((self, _mul(Const(-1), expr(other))))

    def __rsub__(self, other: int) -> Expr:
        return _add((expr(other), _mul(Const(-1), self)))

    def __neg__(self) -> Expr:
        return _mul(Const(-1), self)

    def __mul__(self, other: Expr | int) -> Expr:
        return _mul(self, expr(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Expr | int) -> Expr:
        return _floordiv(self, expr(other))

    def __rfloordiv__(self, other: int) -> Expr:
        return _floordiv(expr(other), self)

    def __mod__(self, other: Expr | int) -> Expr:
        return _mod(self, expr(other))

    def __rmod__(self, other: int) -> Expr:
        return _mod(expr(other), self)

    def children(self) -> tuple[Expr, ...]:
        return ()

    def walk(self) -> Iterator[Expr]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children():
            yield from child.walk()

    def vars(self) -> set[int]:
        """Iteration dimensions that occur."""
        return {node.dim for node in self.walk() if isinstance(node, Var)}

    def symbols(self) -> list[str]:
        """Names of the size symbols that occur, in order of first occurrence."""
        return list(dict.fromkeys(n.name for n in self.walk() if isinstance(n, Symbol)))

    def refs(self) -> list[int]:
        """Body values used as indices (indirect access), in order of first occurrence."""
        return list(dict.fromkeys(n.value for n in self.walk() if isinstance(n, Ref)))

    def is_nonnegative(self) -> bool:
        """Provably >= 0 (atoms are); False means unknown."""
        if isinstance(self, Const):
            return self.value >= 0
        if isinstance(self, (Var, Symbol, Ref)):
            return True
        if isinstance(self, Max):
            return any(child.is_nonnegative() for child in self.children())
        if isinstance(self, Mod):
            return self.right.is_nonnegative()
        return all(child.is_nonnegative() for child in self.children())

    def is_const(self) -> bool:
        return isinstance(self, Const)

    def substitute(self, mapping: Mapping[Expr, Expr | int]) -> Expr:
        """Replace atoms (`Var`, `Symbol`, `Ref`) by other expressions, all at once."""
        if self in mapping:
            return expr(mapping[self])
        kids = tuple(child.substitute(mapping) for child in self.children())
        return self._rebuild(kids) if kids else self

    def evaluate(
        self,
        symbols: Mapping[str, Any] | None = None,
        vars: Mapping[int, Any] | None = None,
        refs: Mapping[int, Any] | None = None,
    ) -> Any:
        """Value for given atoms: Python ints, or numpy integer arrays that broadcast together.

        Raises KeyError for an atom that was given no value.
        """
        if isinstance(self, Const):
            return self.value
        if isinstance(self, Symbol):
            return (symbols or {})[self.name]
        if isinstance(self, Var):
            return (vars or {})[self.dim]
        if isinstance(self, Ref):
            return (refs or {})[self.value]
        kids = [child.evaluate(symbols, vars, refs) for child in self.children()]
        return self._fold(kids)

    def affine(self) -> Affine | None:
        """Coefficients of the iteration variables and indirect values, or None if not affine."""
        coefficients: dict[int, Expr] = {}
        refs: dict[int, Expr] = {}
        offset: Expr = Const(0)
        for term in self.terms if isinstance(self, Add) else (self,):
            factors = term.factors if isinstance(term, Mul) else (term,)
            atoms = [f for f in factors if isinstance(f, (Var, Ref))]
            rest = product(f for f in factors if not isinstance(f, (Var, Ref)))
            if len(atoms) > 1 or rest.vars() or rest.refs():
                return None
            if not atoms:
                offset = offset + rest
            elif isinstance(atoms[0], Var):
                coefficients[atoms[0].dim] = coefficients.get(atoms[0].dim, Const(0)) + rest
            else:
                refs[atoms[0].value] = refs.get(atoms[0].value, Const(0)) + rest
        return Affine(coefficients, refs, offset)

    def _fold(self, kids: list[Any]) -> Any:
        raise NotImplementedError(type(self).__name__)

    def _rebuild(self, kids: tuple[Expr, ...]) -> Expr:
        return self._fold(list(kids))

    def __repr__(self) -> str:
        return f"Expr({self})"


@dataclass(frozen=True)
class Affine:
    """`sum(coefficients[d] * i_d) + sum(refs[v] * %v) + offset`; the coefficients and the offset
    hold no iteration variable and no indirect value, only constants and size symbols."""

    coefficients: dict[int, Expr]
    refs: dict[int, Expr]
    offset: Expr


def _node(cls: type) -> type:
    return dataclass(frozen=True, repr=False)(cls)


@_node
class Const(Expr):
    value: int

    def __str__(self) -> str:
        return str(self.value)


@_node
class Var(Expr):
    """Iteration variable of loop dimension `dim`, running from 0 to dims[dim] - 1."""

    dim: int

    def __str__(self) -> str:
        return f"i{self.dim}"


@_node
class Symbol(Expr):
    """A size known only at run time; never negative."""

    name: str

    def __str__(self) -> str:
        return self.name


@_node
class Ref(Expr):
    """The integer computed by body operation number `value`: an indirect index."""

    value: int

    def __str__(self) -> str:
        return f"%{self.value}"


@_node
class Add(Expr):
    terms: tuple[Expr, ...]

    def children(self) -> tuple[Expr, ...]:
        return self.terms

    def _fold(self, kids: list[Any]) -> Any:
        return reduce(lambda a, b: a + b, kids)

    def __str__(self) -> str:
        text = str(self.terms[0])
        for term in self.terms[1:]:
            shown = str(term)
            text += f" - {shown[1:]}" if shown.startswith("-") else f" + {shown}"
        return text


@_node
class Mul(Expr):
    factors: tuple[Expr, ...]

    def children(self) -> tuple[Expr, ...]:
        return self.factors

    def _fold(self, kids: list[Any]) -> Any:
        return reduce(lambda a, b: a * b, kids)

    def __str__(self) -> str:
        shown = "*".join(_bracket(f) for f in self.factors)
        return shown.replace("-1*", "-", 1) if shown.startswith("-1*") else shown


@_node
class FloorDiv(Expr):
    left: Expr
    right: Expr

    def children(self) -> tuple[Expr, ...]:
        return (self.left, self.right)

    def _fold(self, kids: list[Any]) -> Any:
        return kids[0] // kids[1]

    def __str__(self) -> str:
        return f"{_bracket(self.left)} // {_bracket(self.right)}"


@_node
class Mod(Expr):
    left: Expr
    right: Expr

    def children(self) -> tuple[Expr, ...]:
        return (self.left, self.right)

    def _fold(self, kids: list[Any]) -> Any:
        return kids[0] % kids[1]

    def __str__(self) -> str:
        return f"{_bracket(self.left)} % {_bracket(self.right)}"


@_node
class Min(Expr):
    left: Expr
    right: Expr

    def children(self) -> tuple[Expr, ...]:
        return (self.left, self.right)

    def _fold(self, kids: list[Any]) -> Any:
        return _choose(kids[0], kids[1], smaller=True)

    def __str__(self) -> str:
        return f"min({self.left}, {self.right})"


@_node
class Max(Expr):
    left: Expr
    right: Expr

    def children(self) -> tuple[Expr, ...]:
        return (self.left, self.right)

    def _fold(self, kids: list[Any]) -> Any:
        return _choose(kids[0], kids[1], smaller=False)

    def __str__(self) -> str:
        return f"max({self.left}, {self.right})"


def expr(value: Expr | int) -> Expr:
    """An expression from an expression or a Python integer."""
    return value if isinstance(value, Expr) else Const(int(value))


def product(values: Any) -> Expr:
    return reduce(lambda a, b: a * b, values, Const(1))


def minimum(left: Expr | int, right: Expr | int) -> Expr:
    return _choose(expr(left), expr(right), smaller=True)


def maximum(left: Expr | int, right: Expr | int) -> Expr:
    return _choose(expr(left), expr(right), smaller=False)


def ceildiv(left: Expr | int, right: Expr | int) -> Expr:
    return -((-expr(left)) // expr(right))


def contiguous_strides(sizes: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Row-major strides, in elements."""
    return tuple(product(sizes[d + 1 :]) for d in range(len(sizes)))


def _choose(left: Any, right: Any, smaller: bool) -> Any:
    if not isinstance(left, Expr) and not isinstance(right, Expr):
        if isinstance(left, int) and isinstance(right, int):
            return min(left, right) if smaller else max(left, right)
        import numpy

        return numpy.minimum(left, right) if smaller else numpy.maximum(left, right)
    left, right = expr(left), expr(right)
    if isinstance(left, Const) and isinstance(right, Const):
        pick: Callable[..., int] = min if smaller else max
        return Const(pick(left.value, right.value))
    if left == right:
        return left
    left, right = sorted((left, right), key=_key)
    return (Min if smaller else Max)(left, right)


_RANK = {Const: 9, Var: 0, Ref: 1, Symbol: 2, Mul: 3, FloorDiv: 4, Mod: 5, Min: 6, Max: 7, Add: 8}


@lru_cache(maxsize=65536)
def _key(node: Expr) -> tuple:
    """A total order of expressions: variables first, constants last."""
    parts = []
    for field in fields(node):
        value = getattr(node, field.name)
        if isinstance(value, tuple):
            parts.append(tuple(_key(v) for v in value))
        else:
            parts.append(_key(value) if isinstance(value, Expr) else value)
    return (_RANK[type(node)], *parts)


def _split(term: Expr) -> tuple[int, tuple[Expr, ...]]:
    """A term as (integer coefficient, other factors)."""
    if isinstance(term, Const):
        return term.value, ()
    if isinstance(term, Mul):
        if isinstance(term.factors[0], Const):
            return term.factors[0].value, term.factors[1:]
        return 1, term.factors
    return 1, (term,)


def _join(coefficient: int, factors: tuple[Expr, ...]) -> Expr:
    if coefficient == 0 or not factors:
        return Const(coefficient)
    if coefficient != 1:
        factors = (Const(coefficient), *factors)
    return factors[0] if len(factors) == 1 else Mul(factors)


def _add(values: tuple[Expr, ...]) -> Expr:
    collected: dict[tuple[Expr, ...], int] = {}
    for value in values:
        for term in value.terms if isinstance(value, Add) else (value,):
            coefficient, factors = _split(term)
            collected[factors] = collected.get(factors, 0) + coefficient
    constant = collected.pop((), 0)
    kept = sorted(
        ((f, c) for f, c in collected.items() if c), key=lambda fc: tuple(map(_key, fc[0]))
    )
    terms = [_join(c, f) for f, c in kept]
    if constant or not terms:
        terms.append(Const(constant))
    return terms[0] if len(terms) == 1 else Add(tuple(terms))


def _mul(left: Expr, right: Expr) -> Expr:
    if isinstance(left, Add):
        return _add(tuple(_mul(term, right) for term in left.terms))
    if isinstance(right, Add):
        return _add(tuple(_mul(left, term) for term in right.terms))
    (c, a), (d, b) = _split(left), _split(right)
    return _join(c * d, tuple(sorted(a + b, key=_key)))


def _divides(divisor: int, value: Expr) -> bool:
    return all(
        _split(t)[0] % divisor == 0 for t in (value.terms if isinstance(value, Add) else (value,))
    )


def _floordiv(left: Expr, right: Expr) -> Expr:
    if isinstance(right, Const) and right.value == 0:
        raise ZeroDivisionError(f"index expression {left} // 0")
    if isinstance(left, Const) and isinstance(right, Const):
        return Const(left.value // right.value)
    if right == Const(1) or left == Const(0):
        return left
    if left == right:
        return Const(1)
    if isinstance(right, Const) and _divides(right.value, left):
        terms = left.terms if isinstance(left, Add) else (left,)
        return _add(tuple(_join(_split(t)[0] // right.value, _split(t)[1]) for t in terms))
    if isinstance(right, Const) and isinstance(left, Add) and right.value > 0:
        whole, rest = _split_multiples(left, right.value)  # (8*a + r) // 8 = a + r // 8
        if whole != Const(0):
            return whole // right + rest // right
    return FloorDiv(left, right)


def _split_multiples(value: Add, divisor: int) -> tuple[Expr, Expr]:
    """A sum as (terms divisible by the divisor, the rest with its constant reduced)."""
    whole: list[Expr] = []
    rest: list[Expr] = []
    for term in value.terms:
        coefficient, factors = _split(term)
        if coefficient % divisor == 0:
            whole.append(term)
        elif not factors:
            whole.append(Const(coefficient - coefficient % divisor))
            rest.append(Const(coefficient % divisor))
        else:
            rest.append(term)
    return _add((Const(0), *whole)), _add((Const(0), *rest))


def _mod(left: Expr, right: Expr) -> Expr:
    if isinstance(right, Const) and right.value == 0:
        raise ZeroDivisionError(f"index expression {left} % 0")
    if isinstance(left, Const) and isinstance(right, Const):
        return Const(left.value % right.value)
    if right == Const(1) or left == Const(0) or left == right:
        return Const(0)
    if isinstance(right, Const) and _divides(right.value, left):
        return Const(0)
    if isinstance(right, Const) and isinstance(left, Add) and right.value > 0:
        whole, rest = _split_multiples(left, right.value)
        if whole != Const(0):
            return rest % right
    return Mod(left, right)


def _bracket(node: Expr) -> str:
    simple = isinstance(node, (Const, Var, Symbol, Ref, Min, Max))
    return str(node) if simple else f"({node})"
