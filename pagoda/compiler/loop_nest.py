"""Loop nests: one fused group of pointwise operations and row reductions, as plain data.

A `LoopNest` says what a kernel computes, for every point of an N-dimensional iteration space, as a
straight list of operations in single assignment form. It is a *meaning*: no tiles, no memories,
no chip. It holds no torch object, can be hashed, pickled and printed, and does not know the names
of the tensors it is applied to: equal kernels are equal objects.

    loop_nest(p0: read bfloat16, p1: read bfloat16, p2: write bfloat16; n0)
    for i0 in n0, reduce i1 in 576:
      %0 = load p0[576*i0 + i1] : float32
      %1 = mul %0 %0 : float32
      %2 = sum %1 : float32
      %3 = const 576.0 : float32
      %4 = div %2 %3 : float32
      %5 = rsqrt %4 : float32
      %6 = mul %0 %5 : float32
      %7 = load p1[i1] : float32
      %8 = mul %6 %7 : float32
      store p2[576*i0 + i1] = %8

Meaning, line by line:

- Dimension `d` runs from 0 to `dims[d] - 1`. The last `reduced` dimensions are the row that
  reductions run over. An operation is evaluated once for every combination of the dimensions it
  depends on (`dims_of`); a `Reduce` runs over *all* reduced dimensions, in row-major order, of a
  value that is first spread over all of them, and its result no longer depends on them. Later
  operations may use both it and unreduced values: softmax and RMSNorm are one nest each.
- Operations take effect in order, each over the whole iteration space before the next.
- Indices are in elements of the parameter's own type, from the start of its view.
- Low-precision floats are storage only: a `Load` from bfloat16 or float16 gives a float32 value,
  a `Store` rounds to nearest even. Values are float32, float64, bool or integers. So there is no
  rounding between fused operations (Inductor's own rule).
- `Load` with a mask yields `other` where the mask is false, and does not touch memory there.
- `Indirect` makes a loaded integer usable as an index (`Ref`): adds `size` if it is negative. The
  result must lie in [0, size) wherever an access uses it; under a false mask it is not looked at.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

from pagoda.compiler.index_expr import Const, Expr, Ref, Symbol, product

ITEMSIZE = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
_PROMOTION = list(ITEMSIZE)  # a later type wins
LOW_PRECISION = ("bfloat16", "float16")

# Pointwise vocabulary: name -> (number of arguments, result). The result is a type name, or "same":
# the widest type among the arguments (for `where`: among the last two). Integer `floordiv` and
# `remainder` round to minus infinity, `truncdiv` and `fmod` to zero. `fma` rounds once.
# `saturate`: the int8 nearest to the value, after its fraction was cut off; NaN gives 0.
POINTWISE: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "minimum", "maximum"), (2, "same")),
    **dict.fromkeys(("floordiv", "truncdiv", "remainder", "fmod", "atan2"), (2, "same")),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor"), (2, "same")),
    **dict.fromkeys(("shift_left", "shift_right"), (2, "same")),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), (2, "bool")),
    **dict.fromkeys(("neg", "abs", "sign", "reciprocal", "sqrt", "rsqrt"), (1, "same")),
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log2", "log10", "log1p"), (1, "same")),
    **dict.fromkeys(("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh"), (1, "same")),
    **dict.fromkeys(("tanh", "sigmoid", "erf", "erfc", "recip1p_exp2"), (1, "same")),
    **dict.fromkeys(("floor", "ceil", "trunc", "round", "bitwise_not"), (1, "same")),
    **dict.fromkeys(("isnan", "isinf", "signbit", "logical_not"), (1, "bool")),
    "fma": (3, "same"),
    "where": (3, "same"),
    "saturate": (1, "int8"),
}
REDUCTIONS = ("sum", "prod", "max", "min", "any", "argmax", "argmin")

Access = Literal["read", "write", "readwrite", "accumulate"]
Scalar = bool | int | float


@dataclass(frozen=True)
class Param:
    """A tensor the nest is applied to. `accumulate`: every store to it adds. Other than that, a
    parameter that is both loaded and stored is `readwrite`; all its loads come before its stores
    or read back the very element stored."""

    dtype: str
    access: Access


@dataclass(frozen=True)
class Op:
    """One body operation; its value is named by its position in the body, `%k`."""

    def args(self) -> tuple[int, ...]:
        """Values used, indices included."""
        return ()

    def indices(self) -> tuple[Expr, ...]:
        """Index expressions used."""
        return ()


@dataclass(frozen=True)
class Load(Op):
    """`dtype` is the type of the value: the parameter's, or float32 for low-precision floats."""

    param: int
    index: Expr
    dtype: str
    mask: int | None = None
    other: Scalar = 0

    def args(self) -> tuple[int, ...]:
        return (*self.index.refs(), *(() if self.mask is None else (self.mask,)))

    def indices(self) -> tuple[Expr, ...]:
        return (self.index,)


@dataclass(frozen=True)
class Store(Op):
    """Converts to the parameter's type (floats round to nearest even). `add` adds to memory; equal
    indices inside one nest accumulate in row-major order of the iteration space."""

    param: int
    index: Expr
    value: int
    mode: Literal["set", "add"] = "set"

    def args(self) -> tuple[int, ...]:
        return (*self.index.refs(), self.value)

    def indices(self) -> tuple[Expr, ...]:
        return (self.index,)


@dataclass(frozen=True)
class Constant(Op):
    value: Scalar
    dtype: str

    def __eq__(self, other: object) -> bool:  # nan equals nan, -0.0 differs from 0.0
        return isinstance(other, Constant) and self._bits() == other._bits()

    def __hash__(self) -> int:
        return hash(self._bits())

    def _bits(self) -> tuple:
        value = struct.pack("d", self.value) if isinstance(self.value, float) else self.value
        return (type(self.value), value, self.dtype)


@dataclass(frozen=True)
class IndexValue(Op):
    """An index expression as a value (`arange`, positions, masks)."""

    index: Expr
    dtype: str

    def args(self) -> tuple[int, ...]:
        return tuple(self.index.refs())

    def indices(self) -> tuple[Expr, ...]:
        return (self.index,)


@dataclass(frozen=True)
class Pointwise(Op):
    name: str
    operands: tuple[int, ...]
    dtype: str

    def args(self) -> tuple[int, ...]:
        return self.operands


@dataclass(frozen=True)
class Cast(Op):
    """Conversion of the value. To a low-precision float it rounds, and the value stays float32
    from there on (`dtype` names the rounding). Float to integer truncates towards zero."""

    value: int
    dtype: str

    def args(self) -> tuple[int, ...]:
        return (self.value,)


@dataclass(frozen=True)
class Bitcast(Op):
    """The same bits as another type of the same size."""

    value: int
    dtype: str

    def args(self) -> tuple[int, ...]:
        return (self.value,)


@dataclass(frozen=True)
class Indirect(Op):
    """A checked index: `value`, plus `size` where negative; in [0, size) wherever it is used."""

    value: int
    size: Expr
    dtype: str = "int64"

    def args(self) -> tuple[int, ...]:
        return (self.value,)

    def indices(self) -> tuple[Expr, ...]:
        return (self.size,)


@dataclass(frozen=True)
class Reduce(Op):
    """Over all reduced dimensions. `argmax`, `argmin` give the row-major position as int64: the
    lowest one on ties, the first NaN if there is one. An empty `sum` is +0."""

    kind: str
    value: int
    dtype: str

    def args(self) -> tuple[int, ...]:
        return (self.value,)


@dataclass(frozen=True)
class LoopNest:
    """See the module's docstring. `symbols` are the sizes given at run time, in argument order."""

    dims: tuple[Expr, ...]
    reduced: int
    params: tuple[Param, ...]
    symbols: tuple[str, ...]
    body: tuple[Op, ...]

    def __post_init__(self) -> None:
        assert 0 <= self.reduced <= len(self.dims)
        for number, op in enumerate(self.body):
            assert all(0 <= a < number for a in op.args()), f"%{number} uses a later value"
            for index in op.indices():
                assert all(d < len(self.dims) for d in index.vars())
                assert all(s in self.symbols for s in index.symbols())

    @property
    def outer(self) -> tuple[Expr, ...]:
        """Sizes of the dimensions that are not reduced."""
        return self.dims[: len(self.dims) - self.reduced]

    @property
    def row(self) -> tuple[Expr, ...]:
        """Sizes of the reduced dimensions."""
        return self.dims[len(self.dims) - self.reduced :]

    def dims_of(self) -> tuple[frozenset[int], ...]:
        """For each body operation the dimensions its value (or its store) depends on."""
        found: list[frozenset[int]] = []
        outer = frozenset(range(len(self.outer)))
        for op in self.body:
            here = {d for index in op.indices() for d in index.vars()}
            here = here.union(*(found[a] for a in op.args()))
            found.append(frozenset(here) & outer if isinstance(op, Reduce) else frozenset(here))
        return tuple(found)

    def value_dtype(self, number: int) -> str:
        """The type value `%number` has in registers: float32 for low-precision casts."""
        dtype = self.body[number].dtype  # type: ignore[attr-defined]
        return "float32" if dtype in LOW_PRECISION else dtype

    def vocabulary(self) -> list[str]:
        """Names of the operations used, sorted: `add`, `reduce.sum`, `cast.int64`, `load`, ..."""
        names = set()
        for op in self.body:
            if isinstance(op, Pointwise):
                names.add(op.name)
            elif isinstance(op, Reduce):
                names.add(f"reduce.{op.kind}")
            elif isinstance(op, (Cast, Bitcast)):
                names.add(f"{type(op).__name__.lower()}.{op.dtype}")
            elif isinstance(op, Load):
                names.add("load.masked" if op.mask is not None else "load")
            elif isinstance(op, Store):
                names.add("store.add" if op.mode == "add" else "store")
            else:
                names.add(type(op).__name__.lower())
        return sorted(names)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the text: equal keys mean equal kernels, in any process."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def __str__(self) -> str:
        params = ", ".join(f"p{k}: {p.access} {p.dtype}" for k, p in enumerate(self.params))
        lines = [f"loop_nest({params}; {', '.join(self.symbols)})"]
        loops = []
        for d, size in enumerate(self.dims):
            loops.append(f"{'' if d < len(self.outer) else 'reduce '}i{d} in {size}")
        lines.append(f"for {', '.join(loops)}:" if loops else "once:")
        lines.extend("  " + _show(number, op) for number, op in enumerate(self.body))
        return "\n".join(lines)


def _show(number: int, op: Op) -> str:
    match op:
        case Store(param, index, value, mode):
            return f"store p{param}[{index}] {'+=' if mode == 'add' else '='} %{value}"
        case Load(param, index, dtype, mask, other):
            masked = "" if mask is None else f" if %{mask} else {_scalar(other)}"
            right = f"load p{param}[{index}]{masked}"
        case Constant(value, dtype):
            right = f"const {_scalar(value)}"
        case IndexValue(index, dtype):
            right = f"index {index}"
        case Pointwise(name, operands, dtype):
            right = " ".join((name, *(f"%{o}" for o in operands)))
        case Indirect(value, size, dtype):
            right = f"indirect %{value} in {size}"
        case Reduce(kind, value, dtype):
            right = f"{kind} %{value}"
        case Cast(value, dtype) | Bitcast(value, dtype):
            right = f"{type(op).__name__.lower()} %{value}"
        case _:
            raise TypeError(f"no such operation: {op!r}")
    return f"%{number} = {right} : {dtype}"


def _scalar(value: Scalar) -> str:
    return repr(value)


def promote(*dtypes: str) -> str:
    """The widest of the types, low-precision floats counting as the float32 they are held in."""
    held = ["float32" if d in LOW_PRECISION else d for d in dtypes]
    return max(held, key=_PROMOTION.index)


class Builder:
    """Builds a `LoopNest` from operations on *named* tensors and symbols, sharing equal values.

    Values are the integers its methods return. `build` drops what is not used, numbers parameters
    and symbols by first use, and returns the nest with the names bound to them.

    >>> b = Builder(dims=[Symbol("s"), Const(8)], reduced=1)
    >>> x = b.load("x", "bfloat16", Var(0) * 8 + Var(1))
    >>> b.store("y", "float32", Var(0), b.reduce("sum", x))
    >>> nest, names, symbols = b.build()
    >>> names, symbols
    (['x', 'y'], ['s'])
    """

    def __init__(self, dims: list[Expr], reduced: int = 0) -> None:
        self.dims = list(dims)
        self.reduced = reduced
        self._body: list[Op] = []
        self._known: dict[Op, int] = {}
        self._names: list[str] = []
        self._dtypes: dict[str, str] = {}

    def _param(self, name: str, dtype: str) -> int:
        if name not in self._dtypes:
            self._dtypes[name] = dtype
            self._names.append(name)
        assert self._dtypes[name] == dtype, (name, dtype, self._dtypes[name])
        return self._names.index(name)

    def _emit(self, op: Op) -> int:
        if isinstance(op, (Load, Store)):  # memory may change between two equal loads
            self._body.append(op)
            return len(self._body) - 1
        if op not in self._known:
            self._body.append(op)
            self._known[op] = len(self._body) - 1
        return self._known[op]

    def dtype(self, value: int) -> str:
        """Type of a value in registers."""
        dtype = self._body[value].dtype  # type: ignore[attr-defined]
        return "float32" if dtype in LOW_PRECISION else dtype

    def load(
        self, name: str, dtype: str, index: Expr, mask: int | None = None, other: Scalar = 0
    ) -> int:
        param = self._param(name, dtype)
        held = "float32" if dtype in LOW_PRECISION else dtype
        op = Load(param, index, held, mask, other)
        for number in range(len(self._body) - 1, -1, -1):
            if self._body[number] == op:
                return number
            if isinstance(self._body[number], Store) and self._body[number].param == param:
                break
        return self._emit(op)

    def known(self, value: int) -> bool | None:
        """The truth of a value that is a boolean constant, else None."""
        op = self._body[value]
        return op.value if isinstance(op, Constant) and op.dtype == "bool" else None

    def is_one(self, value: int) -> bool:
        """Whether a value is the float constant 1."""
        op = self._body[value]
        return isinstance(op, Constant) and type(op.value) is float and op.value == 1.0

    def is_masked_load(self, value: int, mask: int, other: Scalar) -> bool:
        """Whether a value is a load under exactly this mask that yields `other` elsewhere."""
        op = self._body[value]
        return isinstance(op, Load) and op.mask == mask and op.other == other

    def store(
        self,
        name: str,
        dtype: str,
        index: Expr,
        value: int,
        mode: Literal["set", "add"] = "set",
    ) -> None:
        self._emit(Store(self._param(name, dtype), index, value, mode))

    def constant(self, value: Scalar, dtype: str) -> int:
        held = "float32" if dtype in LOW_PRECISION else dtype
        if held.startswith("float"):
            return self._emit(Constant(float(value), held))
        return self._emit(Constant(bool(value) if held == "bool" else int(value), held))

    def index(self, index: Expr, dtype: str) -> int:
        if isinstance(index, Const):
            return self.constant(index.value, dtype)
        number = self._emit(IndexValue(index, "int64"))
        return self.cast(number, dtype)

    def indirect(self, value: int, size: Expr) -> Ref:
        """Marks a value as an index; returns the atom to use inside index expressions."""
        return Ref(self._emit(Indirect(value, size)))

    def pointwise(self, name: str, *operands: int) -> int:
        """One operation of the table `POINTWISE`; operands are converted to their common type."""
        arity, result = POINTWISE[name]
        assert len(operands) == arity, (name, operands)
        first = 1 if name == "where" else 0
        common = promote(*(self.dtype(o) for o in operands[first:]))
        values = tuple(self.cast(o, common) if k >= first else o for k, o in enumerate(operands))
        return self._emit(Pointwise(name, values, common if result == "same" else result))

    def cast(self, value: int, dtype: str, rounds: bool = False) -> int:
        """Conversion. To a low-precision float it gives float32, rounded only if `rounds`."""
        if dtype in LOW_PRECISION and not rounds:
            dtype = "float32"
        if self.dtype(value) == dtype:
            return value
        op = self._body[value]
        if isinstance(op, Constant) and dtype not in LOW_PRECISION:
            return self.constant(op.value, dtype)
        return self._emit(Cast(value, dtype))

    def bitcast(self, value: int, dtype: str) -> int:
        return value if self.dtype(value) == dtype else self._emit(Bitcast(value, dtype))

    def reduce(self, kind: str, value: int) -> int:
        """One of `REDUCTIONS`. `any` gives bool, `argmax` and `argmin` int64, others the type of
        the value; sums and products of bool are int64."""
        assert kind in REDUCTIONS, kind
        dtype = self.dtype(value)
        if kind in ("argmax", "argmin"):
            return self._emit(Reduce(kind, value, "int64"))
        if kind == "any":
            if dtype != "bool":
                value = self.pointwise("ne", value, self.constant(0, dtype))
            return self._emit(Reduce(kind, value, "bool"))
        if dtype == "bool" and kind in ("sum", "prod"):
            value, dtype = self.cast(value, "int64"), "int64"
        return self._emit(Reduce(kind, value, dtype))

    def welford(self, value: int) -> tuple[int, int, int]:
        """Mean, sum of squared deviations and count of the row, in two passes (exact order, no
        running division): mean = sum(x) / n, m2 = sum((x - mean)^2)."""
        count = self.index(product(self.dims[len(self.dims) - self.reduced :]), "float32")
        mean = self.pointwise("div", self.reduce("sum", value), count)
        deviation = self.pointwise("sub", value, mean)
        m2 = self.reduce("sum", self.pointwise("mul", deviation, deviation))
        return mean, m2, count

    def build(self) -> tuple[LoopNest, list[str], list[str]]:
        """The nest, the tensor name of each parameter, and the name of each symbol."""
        alive = [isinstance(op, Store) for op in self._body]
        for number in range(len(self._body) - 1, -1, -1):
            if alive[number]:
                for a in self._body[number].args():
                    alive[a] = True
        kept = [n for n, live in enumerate(alive) if live]
        params = list(dict.fromkeys(p for n in kept for p in _params(self._body[n])))
        seen = [*self.dims, *(i for n in kept for i in self._body[n].indices())]
        symbols = list(dict.fromkeys(s for e in seen for s in e.symbols()))
        atoms: dict[Expr, Expr | int] = {Symbol(s): Symbol(f"n{k}") for k, s in enumerate(symbols)}
        value = {old: new for new, old in enumerate(kept)}
        atoms |= {Ref(old): Ref(new) for old, new in value.items()}
        body = [_renumber(self._body[n], value, params, atoms) for n in kept]
        nest = LoopNest(
            dims=tuple(d.substitute(atoms) for d in self.dims),
            reduced=self.reduced,
            params=tuple(
                Param(self._dtypes[self._names[p]], _access(body, k)) for k, p in enumerate(params)
            ),
            symbols=tuple(f"n{k}" for k in range(len(symbols))),
            body=tuple(body),
        )
        return nest, [self._names[p] for p in params], symbols


def _params(op: Op) -> Iterator[int]:
    if isinstance(op, (Load, Store)):
        yield op.param


def _renumber(op: Op, value: dict[int, int], params: list[int], atoms: dict) -> Op:
    changed: dict[str, object] = {}
    for field in fields(op):
        old = getattr(op, field.name)
        if field.name == "param":
            changed["param"] = params.index(old)
        elif isinstance(old, Expr):
            changed[field.name] = old.substitute(atoms)
        elif field.name == "operands":
            changed["operands"] = tuple(value[o] for o in old)
        elif field.name in ("value", "mask") and old is not None and not isinstance(op, Constant):
            changed[field.name] = value[old]
    return replace(op, **changed) if changed else op


def _access(body: list[Op], param: int) -> Access:
    loads = any(isinstance(op, Load) and op.param == param for op in body)
    modes = {op.mode for op in body if isinstance(op, Store) and op.param == param}
    if not modes:
        return "read"
    if loads or len(modes) > 1:
        return "readwrite"
    return "accumulate" if modes == {"add"} else "write"
