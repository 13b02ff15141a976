"""Loop nests brought into the form that lowering wants; the results stay the same bits.

`simplify` returns an equal nest in which

- a load that reads back what the nest stored at the same index is the stored value,
- what is a sigmoid in other words is a sigmoid (`nest_sigmoid`),
- int8 of a value between two bounds is `saturate`, with the bounds that are no int8's own before,
- argmax and argmin are ones the chip has, or a maximum and the lowest position that equals it,
- index expressions use `//` and `%` only where splitting a dimension cannot remove them,
- dimensions of size 1 are gone (but one reduced dimension stays in a nest with reductions),
- adjacent dimensions that every index runs through contiguously are one.

All of it depends on the nest alone.
"""

from __future__ import annotations

from dataclasses import fields, replace

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import (
    Add,
    Const,
    Expr,
    FloorDiv,
    Mod,
    Mul,
    Symbol,
    Var,
    product,
)
from pagoda.compiler.loop_nest import (
    Cast,
    Constant,
    IndexValue,
    Load,
    LoopNest,
    Pointwise,
    Reduce,
    Store,
)
from pagoda.compiler.nest_body import Body, with_body
from pagoda.compiler.nest_sigmoid import recognise_sigmoids

INT32_MAX = 2**31 - 1
INT8_LIMITS = {"maximum": -128, "minimum": 127}


def simplify(nest: LoopNest) -> LoopNest:
    """See the module's docstring."""
    nest = _forward_stores(nest)
    nest = recognise_sigmoids(nest)
    nest = _recognise_saturation(nest)
    nest = _split_dimensions(nest)
    nest = _drop_single(nest)
    nest = _merge_dimensions(nest)
    return _rewrite_arg_reductions(nest)


def as_rows(nest: LoopNest, cols: int) -> LoopNest | None:
    """A simplified nest without reductions over two dimensions, the last of `cols` steps; None if
    its dimensions do not allow that."""
    if len(nest.dims) == 2 and nest.dims[1] == Const(cols):
        return nest
    if len(nest.dims) != 1 or cols < 1 or (nest.dims[0] // cols) * cols != nest.dims[0]:
        return None
    atoms: dict[Expr, Expr | int] = {Var(0): Var(0) * cols + Var(1)}
    return _renumbered(nest, [nest.dims[0] // cols, Const(cols)], 0, atoms)


# Rewriting bodies --------------------------------------------------------------------------------


def _forward_stores(nest: LoopNest) -> LoopNest:
    """A load after a store to the same parameter must be of the same index: it is that value."""
    stored: dict[int, tuple[Expr, int]] = {}
    body = Body()
    for number, op in enumerate(nest.body):
        if isinstance(op, Load) and op.param in stored:
            index, value = stored[op.param]
            if index != op.index or op.mask is not None:
                raise CompileError(
                    f"loop nest: load p{op.param}[{op.index}]",
                    "a nest reads back only the very element it stored",
                    f"it stored p{op.param}[{index}] before",
                    "run the two parts as separate nests",
                )
            dtype = nest.params[op.param].dtype
            body.values[number] = body.add(Cast(body.values[value], dtype))
            continue
        if isinstance(op, Store) and op.mode == "set":
            stored[op.param] = op.index, op.value
        body.copy(number, op)
    return with_body(nest, body)


def _recognise_saturation(nest: LoopNest) -> LoopNest:
    """int8(minimum(maximum(x, low), high)): the cast need not wrap what is in range, and bounds of
    -128 and 127 are what saturation does anyway."""
    body = Body()
    for number, op in enumerate(nest.body):
        found = _bounded(nest, op.value) if isinstance(op, Cast) and op.dtype == "int8" else None
        if found is None:
            body.copy(number, op)
            continue
        x, bounds = found
        value, dtype = body.values[x], nest.value_dtype(x)
        for name, limit in bounds:
            if nest.body[limit].value != INT8_LIMITS[name]:
                value = body.add(Pointwise(name, (value, body.values[limit]), dtype))
        body.values[number] = body.add(Pointwise("saturate", (value,), "int8"))
    return with_body(nest, body)


def _bounded(nest: LoopNest, number: int) -> tuple[int, list[tuple[str, int]]] | None:
    """x and [(maximum or minimum, number of the constant)], first the inner one, if the value is x
    between two constants that int8 holds; else None."""
    bounds: list[tuple[str, int]] = []
    while len(bounds) < 2:
        op = nest.body[number]
        if not isinstance(op, Pointwise) or op.name not in INT8_LIMITS:
            return None
        x, limit = op.operands
        if isinstance(nest.body[x], Constant):
            x, limit = limit, x
        bound = nest.body[limit]
        if not isinstance(bound, Constant) or not -128 <= bound.value <= 127:
            return None
        bounds.insert(0, (op.name, limit))
        number = x
    return (number, bounds) if bounds[0][0] != bounds[1][0] else None


def _rewrite_arg_reductions(nest: LoopNest) -> LoopNest:
    """The chip has argmax of float32 rows that lie in one piece. Otherwise: the maximum m, then the
    smallest position whose value equals m (or is NaN: then m is NaN and equals nothing)."""
    if not any(isinstance(op, Reduce) and op.kind in ("argmax", "argmin") for op in nest.body):
        return nest
    one_piece = nest.reduced == 1
    position: Expr = Const(0)
    for d in range(len(nest.outer), len(nest.dims)):
        position = position * nest.dims[d] + Var(d)
    body = Body()
    for number, op in enumerate(nest.body):
        body.copy(number, op)
        new = body.ops[-1]
        if not isinstance(new, Reduce) or new.kind not in ("argmax", "argmin"):
            continue
        x, dtype = new.value, nest.value_dtype(op.value)
        if one_piece and dtype.startswith("float"):
            continue
        body.ops.pop()
        best = body.add(Reduce(new.kind.removeprefix("arg"), x, dtype))
        hit = body.add(Pointwise("eq", (x, best), "bool"))
        if dtype.startswith("float"):
            nan = body.add(Pointwise("isnan", (x,), "bool"))
            hit = body.add(Pointwise("bitwise_or", (hit, nan), "bool"))
        where = body.add(IndexValue(position, "int64"))
        none = body.add(Constant(INT32_MAX, "int64"))
        found = body.add(Pointwise("where", (hit, where, none), "int64"))
        body.values[number] = body.add(Reduce("min", found, "int64"))
    return replace(nest, body=tuple(body.ops))


# Index expressions -------------------------------------------------------------------------------


def _terms(value: Expr) -> tuple[Expr, ...]:
    return value.terms if isinstance(value, Add) else (value,)


def _quotient(term: Expr, divisor: Expr) -> Expr | None:
    """term / divisor where it is a polynomial, else None."""
    if term == Const(0) or term == divisor:
        return term // divisor
    if isinstance(divisor, Const):
        return term // divisor if term % divisor == Const(0) else None
    if isinstance(divisor, Symbol) and isinstance(term, Mul) and divisor in term.factors:
        rest = list(term.factors)
        rest.remove(divisor)
        return product(rest)
    if isinstance(divisor, Mul):
        found: Expr | None = term
        for factor in divisor.factors:
            found = None if found is None else _quotient(found, factor)
        return found
    return None


def _below(value: Expr, limit: Expr, sizes: tuple[Expr, ...]) -> bool:
    """Whether 0 <= value < limit is certain for all values of the iteration variables."""
    if isinstance(value, Var) and sizes[value.dim] == limit:
        return True
    affine = value.affine()
    if affine is None or affine.refs or not isinstance(limit, Const):
        return False
    if not isinstance(affine.offset, Const) or affine.offset.value < 0:
        return False
    top = affine.offset.value
    for dim, factor in affine.coefficients.items():
        size = sizes[dim]
        if not isinstance(factor, Const) or not isinstance(size, Const) or factor.value < 0:
            return False
        top += factor.value * max(size.value - 1, 0)
    return top < limit.value


def simplify_index(index: Expr, sizes: tuple[Expr, ...]) -> Expr:
    """The same integer for all iteration variables below `sizes`: multiples of a divisor leave its
    `//` and `%`, and what is certainly less than the divisor needs neither."""
    if isinstance(index, (FloorDiv, Mod)):
        left = simplify_index(index.left, sizes)
        right = simplify_index(index.right, sizes)
        whole: Expr = Const(0)
        rest: Expr = Const(0)
        for term in _terms(left):
            quotient = _quotient(term, right)
            if quotient is None:
                rest = rest + term
            else:
                whole = whole + quotient
        if _below(rest, right, sizes) or rest == Const(0):
            return whole if isinstance(index, FloorDiv) else rest
        return whole + rest // right if isinstance(index, FloorDiv) else rest % right
    children = index.children()
    if not children:
        return index
    return index._rebuild(tuple(simplify_index(child, sizes) for child in children))


def _simplify_indices(nest: LoopNest) -> LoopNest:
    body = []
    for op in nest.body:
        changed = {
            f.name: simplify_index(getattr(op, f.name), nest.dims)
            for f in fields(op)
            if isinstance(getattr(op, f.name), Expr)
        }
        body.append(replace(op, **changed) if changed else op)
    return replace(nest, body=tuple(body))


def _renumbered(nest: LoopNest, dims: list[Expr], reduced: int, atoms: dict) -> LoopNest:
    body = Body()
    for number, op in enumerate(nest.body):
        body.copy(number, op, atoms)
    changed = replace(nest, dims=tuple(dims), reduced=reduced, body=tuple(body.ops))
    return _simplify_indices(changed)


# Dimensions --------------------------------------------------------------------------------------


def _split_dimensions(nest: LoopNest) -> LoopNest:
    """Dimension d of size k * m becomes (m, k) where `i_d // k` or `i_d % k` occurs."""
    nest = _simplify_indices(nest)
    for _ in range(16):
        found = _split_candidate(nest)
        if found is None:
            break
        d, inner, outer = found
        dims = [*nest.dims[:d], outer, inner, *nest.dims[d + 1 :]]
        atoms: dict[Expr, Expr | int] = {Var(d): Var(d) * inner + Var(d + 1)}
        atoms |= {Var(e): Var(e + 1) for e in range(d + 1, len(nest.dims))}
        nest = _renumbered(nest, dims, nest.reduced + (d >= len(nest.outer)), atoms)
    return nest


def _split_candidate(nest: LoopNest) -> tuple[int, Expr, Expr] | None:
    for op in nest.body:
        for index in op.indices():
            for node in index.walk():
                if not isinstance(node, (FloorDiv, Mod)) or not isinstance(node.left, Var):
                    continue
                size, k = nest.dims[node.left.dim], node.right
                if k.vars() or k.refs() or size == k:
                    continue
                parts = [_quotient(term, k) for term in _terms(size)]
                if all(part is not None for part in parts):
                    outer: Expr = Const(0)
                    for part in parts:
                        outer = outer + part
                    return node.left.dim, k, outer
    return None


def _drop_single(nest: LoopNest) -> LoopNest:
    keep = [d for d, size in enumerate(nest.dims) if size != Const(1)]
    first_reduced = len(nest.outer)
    if nest.reduced and not any(d >= first_reduced for d in keep):
        keep.append(len(nest.dims) - 1)
    atoms: dict[Expr, Expr | int] = {
        Var(d): Var(keep.index(d)) if d in keep else Const(0) for d in range(len(nest.dims))
    }
    reduced = sum(d >= first_reduced for d in keep)
    return _renumbered(nest, [nest.dims[d] for d in keep], reduced, atoms)


def _merge_dimensions(nest: LoopNest) -> LoopNest:
    d = len(nest.dims) - 2
    while d >= 0:
        if d + 1 != len(nest.outer) and all(
            _runs_through(index, d, nest.dims[d + 1]) for index in _indices(nest)
        ) and _same_dependence(nest, d):
            dims = [*nest.dims[:d], nest.dims[d] * nest.dims[d + 1], *nest.dims[d + 2 :]]
            atoms: dict[Expr, Expr | int] = {Var(d): Const(0), Var(d + 1): Var(d)}
            atoms |= {Var(e): Var(e - 1) for e in range(d + 2, len(nest.dims))}
            reduced = nest.reduced - (d >= len(nest.outer))
            nest = _renumbered(nest, dims, reduced, atoms)
        d -= 1
    return nest


def _indices(nest: LoopNest) -> list[Expr]:
    return [index for op in nest.body for index in op.indices()]


def _runs_through(index: Expr, d: int, inner: Expr) -> bool:
    """Whether dimension d continues where dimension d + 1 (of size `inner`) ends."""
    if d not in index.vars() and d + 1 not in index.vars():
        return True
    affine = index.affine()
    if affine is None:
        return False
    zero = Const(0)
    across = affine.coefficients.get(d, zero)
    return across == affine.coefficients.get(d + 1, zero) * inner


def _same_dependence(nest: LoopNest, d: int) -> bool:
    """Whether every value that depends on dimension d + 1 depends on d and vice versa, so that no
    operation is evaluated more often in the merged space."""
    return all((d in dims) == (d + 1 in dims) for dims in nest.dims_of())
