"""Inductor's loop bodies to loop nests.

Inductor describes a pointwise or reduction node as a `LoopBody`: called with index expressions, it
calls an operations handler (`load`, `store`, `reduction`, `add`, ...). `NestHandler` is our
handler: it feeds a `pagoda.compiler.loop_nest.Builder`. This file and `symbolic` are the only ones
that know Inductor's loop vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.utils import sympy_subs
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import FloatTrueDiv, Identity, IntTrueDiv, ToFloat

from pagoda.compiler.index_expr import Expr
from pagoda.compiler.loop_nest import LOW_PRECISION, POINTWISE, Builder
from pagoda.pytorch.errors import Unsupported
from pagoda.pytorch.philox import Philox
from pagoda.pytorch.symbolic import FLOAT_FUNCTIONS, dtype_name, to_expr

# Inductor's name -> ours, where they differ.
_RENAMED = {
    "truediv": "div", "div_rn": "div", "int_truediv": "div", "and_": "bitwise_and",
    "or_": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not", "mod": "fmod",
    "lshift": "shift_left", "rshift": "shift_right", "bitwise_left_shift": "shift_left",
    "bitwise_right_shift": "shift_right", "libdevice_exp": "exp",
}  # fmt: skip
# Operations that give floats for integers too.
_FLOAT_RESULT = {
    "div", "reciprocal", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p",
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sigmoid", "erf", "erfc",
    "atan2",
}  # fmt: skip
_LOGICAL = {
    "logical_and": "bitwise_and",
    "logical_or": "bitwise_or",
    "logical_xor": "bitwise_xor",
}


@dataclass(frozen=True)
class Value:
    """A body value, told apart from a Python number."""

    number: int


class NestHandler(DefaultHandler):
    """One fused group of scheduler nodes into one builder.

    `atoms`: sympy iteration symbols to expressions. `removed(name)`: whether a buffer lives only
    inside the group. `real_name`: the name of the memory a buffer name stands for.
    """

    def __init__(
        self,
        builder: Builder,
        atoms: dict[sympy.Symbol, Expr],
        removed: Callable[[str], bool],
        real_name: Callable[[str], str],
    ) -> None:
        self.builder = builder
        self.atoms = dict(atoms)
        self._removed = removed
        self._real_name = real_name
        self._stored: dict[tuple[str, Expr], int] = {}
        self._mask: int | None = None
        self._other: bool | int | float = 0

    def expression(self, index: sympy.Expr | int) -> Expr:
        index = sympy_subs(sympy.sympify(index), V.graph.sizevars.inv_precomputed_replacements)
        return to_expr(index, self.atoms)

    def load(self, name: str, index: sympy.Expr) -> Value:
        memory, where = self._real_name(name), self.expression(index)
        if (memory, where) in self._stored:
            return Value(self._stored[memory, where])
        if self._removed(name):
            raise AssertionError(f"{name}[{where}] was never stored in this group")
        dtype = dtype_name(V.graph.get_dtype(name))
        other = self._other
        if dtype in LOW_PRECISION or dtype.startswith("float"):
            other = float(other)
        elif dtype == "bool":
            other = bool(other)
        elif math.isfinite(other):
            other = int(other)
        else:
            other = 0
        return Value(self.builder.load(memory, dtype, where, self._mask, other))

    def store(self, name: str, index: sympy.Expr, value: Any, mode: str | None = None) -> None:
        memory, where = self._real_name(name), self.expression(index)
        dtype = dtype_name(V.graph.get_dtype(name))
        number = self._number(value, dtype)
        if mode not in (None, "atomic_add"):
            raise Unsupported(f"a store of mode {mode} has no kernel on the chip.")
        if mode is None:
            self._stored[memory, where] = number
        if not self._removed(name):
            kind = "add" if mode else "set"
            self.builder.store(memory, dtype, where, number, kind)

    def store_reduction(self, name: str, index: sympy.Expr, value: Any) -> None:
        self.store(name, index, value)

    def reduction(self, dtype: torch.dtype, src_dtype: torch.dtype, kind: str, value: Any) -> Any:
        if isinstance(value, tuple):
            raise Unsupported(f'the reduction "{kind}" over several values has no kernel.')
        number = self._number(value, dtype_name(src_dtype))
        if kind == "welford_reduce":
            number = self.builder.cast(number, "float32")
            return tuple(Value(v) for v in self.builder.welford(number))
        if kind not in ("sum", "prod", "max", "min", "any", "argmax", "argmin"):
            raise Unsupported(f'the reduction "{kind}" has no kernel.')
        if kind in ("sum", "prod", "max", "min"):
            number = self.builder.cast(number, dtype_name(dtype))
        return Value(self.builder.reduce(kind, number))

    def masked(self, mask: Any, body: Callable[[], Any], other: Any) -> Value:
        outer, self._mask = (self._mask, self._other), self._number(mask, "bool")
        if outer[0] is not None:
            self._mask = self.builder.pointwise("bitwise_and", outer[0], self._mask)
        self._other, here = other, self._mask
        result = self._number(body(), "float32")
        self._mask, self._other = outer
        if self.builder.is_masked_load(result, here, other):
            return Value(result)
        fill = self.builder.constant(other, self.builder.dtype(result))
        return Value(self.builder.pointwise("where", here, result, fill))

    def indirect_indexing(
        self, index: Any, size: sympy.Expr | int, check: bool = True, wrap_neg: bool = True
    ) -> sympy.Symbol:
        number = self.builder.cast(self._number(index, "int64"), "int64")
        ref = self.builder.indirect(number, self.expression(size))
        # Not "indirect0": Inductor's bodies use such names themselves and would mix them up.
        symbol = sympy.Symbol(f"loaded_index{ref.value}", integer=True, nonnegative=True)
        self.atoms[symbol] = ref
        return symbol

    def check_bounds(self, index: Any, size: Any, lower: bool, upper: bool) -> None:
        """Every indirect access is checked anyway."""

    def device_assert_async(self, condition: Any, message: str) -> None:
        """Every indirect access is checked anyway."""

    def load_seed(self, name: str, offset: int) -> Value:
        return self.load(name, sympy.Integer(offset))

    def rand(self, seed: Value, offset: Value) -> Value:
        return Value(Philox(self.builder, seed.number, offset.number).uniform())

    def randn(self, seed: Value, offset: Value) -> Value:
        return Value(Philox(self.builder, seed.number, offset.number).normal())

    def randint64(self, seed: Value, offset: Value, low: Any, high: Any) -> Value:
        first, end = self._number(low, "int64"), self._number(high, "int64")
        span = self.builder.pointwise("sub", end, first)
        drawn = Philox(self.builder, seed.number, offset.number).below(span)
        return Value(self.builder.pointwise("add", first, drawn))

    def index_expr(self, index: sympy.Expr, dtype: torch.dtype) -> Value:
        index = sympy.sympify(index)
        name = dtype_name(dtype)
        if index.has(*FLOAT_FUNCTIONS):
            return Value(self.builder.cast(self._float_expression(index), name))
        return Value(self.builder.index(self.expression(index), name))

    def _float_expression(self, value: sympy.Expr) -> int:
        """Sizes in float32 arithmetic, such as the n / (n - 1) of a variance."""
        b = self.builder
        if isinstance(value, (sympy.Float, sympy.Rational)):
            return b.constant(float(value), "float32")
        if not value.has(*FLOAT_FUNCTIONS, sympy.Float):
            return b.index(self.expression(value), "float32")
        names = {sympy.Add: "add", sympy.Mul: "mul", IntTrueDiv: "div", FloatTrueDiv: "div"}
        first, *others = (self._float_expression(arg) for arg in value.args)
        if isinstance(value, (ToFloat, Identity)):
            return first
        if value.func not in names:
            raise Unsupported(
                f"size expression {value}: {value.func.__name__} has no counterpart in float32. "
                "Make the size static, for example with torch.compile(dynamic=False)."
            )
        for other in others:
            first = b.pointwise(names[value.func], first, other)
        return first

    def constant(self, value: Any, dtype: torch.dtype) -> Value:
        return Value(self.builder.constant(value, dtype_name(dtype)))

    def to_dtype(
        self,
        x: Any,
        dtype: torch.dtype,
        src_dtype: torch.dtype | None = None,
        use_compute_types: bool = True,
    ) -> Value:
        name = dtype_name(dtype)
        number = self._number(x, name)
        if name == "bool" and self.builder.dtype(number) != "bool":
            zero = self.builder.constant(0, self.builder.dtype(number))
            return Value(self.builder.pointwise("ne", number, zero))
        return Value(self.builder.cast(number, name, rounds=not use_compute_types))

    def to_dtype_bitcast(self, x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> Value:
        source, target = dtype_name(src_dtype), dtype_name(dtype)
        if source in LOW_PRECISION or target in LOW_PRECISION:
            raise Unsupported(f"a bit cast from {source} to {target} has no kernel.")
        return Value(self.builder.bitcast(self._number(x, source), target))

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        typed = [self.builder.dtype(a.number) for a in args if isinstance(a, Value)]
        like = typed[-1] if typed else "float32"
        numbers = [self._number(a, like) for a in args]
        b = self.builder
        if name == "identity":
            return Value(numbers[0])
        if name == "square":
            return Value(b.pointwise("mul", numbers[0], numbers[0]))
        if name == "relu":
            return Value(b.pointwise("maximum", numbers[0], b.constant(0, like)))
        if name in _LOGICAL:
            return Value(b.pointwise(_LOGICAL[name], *(self._truth(n) for n in numbers)))
        if name in ("floor_to_int", "ceil_to_int", "trunc_to_int", "round_to_int"):
            rounded = b.pointwise(name.removesuffix("_to_int"), numbers[0])
            return Value(b.cast(rounded, dtype_name(kwargs.get("dtype", args[-1]))))
        name = _RENAMED.get(name, name)
        if name not in POINTWISE or len(numbers) != POINTWISE[name][0]:
            raise Unsupported(f'the pointwise operation "{name}" has no kernel on the chip.')
        if name in _FLOAT_RESULT:
            numbers = [
                n if b.dtype(n).startswith("float") else b.cast(n, "float32") for n in numbers
            ]
        return Value(b.pointwise(name, *numbers))

    def _truth(self, number: int) -> int:
        if self.builder.dtype(number) == "bool":
            return number
        zero = self.builder.constant(0, self.builder.dtype(number))
        return self.builder.pointwise("ne", number, zero)

    def _number(self, value: Any, dtype: str) -> int:
        if isinstance(value, Value):
            return value.number
        if isinstance(value, (bool, int, float)):
            if isinstance(value, float) and not dtype.startswith(("float", "bfloat")):
                dtype = "float32"
            return self.builder.constant(value, dtype)
        raise Unsupported(f"a value of type {type(value).__name__} has no kernel on the chip.")
