"""Run-time integers of the tile IR: 32-bit expressions the control core evaluates.

    scalar := Int(value)                       a constant
            | Variable(name)                   a loop variable, or a name bound by Let / ReadWord
            | Argument(name)                   a scalar parameter of the kernel
            | Size(tensor, dim)                extent of a tensor parameter, in elements
            | Stride(tensor, dim)              stride of a tensor parameter, in bytes
            | CoreId() | CoreCount()
            | Binary(op, left, right)          op: + - * // % min max < <= > >= == !=
            | Select(condition, yes, no)       condition: 0 is false

Build them with Python's operators (`i * 64 + Size("x", 0)`) and the functions below; comparisons
are the methods `lt le gt ge eq ne`, because `==` compares expressions as data. Arithmetic wraps at
32 bits; `//` and `%` round to minus infinity as in Python (a zero divisor gives an unspecified
value, never a fault). Equal expressions are equal objects; constants fold when built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MASK32 = 0xFFFFFFFF


def wrap(value: int) -> int:
    """A Python integer as signed 32-bit two's complement."""
    return (value + (1 << 31) & MASK32) - (1 << 31)


class Scalar:
    """Base of the expressions; immutable and hashable."""

    __slots__ = ()

    def __add__(self, other: Scalar | int) -> Scalar:
        return binary("+", self, other)

    def __radd__(self, other: int) -> Scalar:
        return binary("+", other, self)

    def __sub__(self, other: Scalar | int) -> Scalar:
        return binary("-", self, other)

    def __rsub__(self, other: int) -> Scalar:
        return binary("-", other, self)

    def __neg__(self) -> Scalar:
        return binary("-", 0, self)

    def __mul__(self, other: Scalar | int) -> Scalar:
        return binary("*", self, other)

    def __rmul__(self, other: int) -> Scalar:
        return binary("*", other, self)

    def __floordiv__(self, other: Scalar | int) -> Scalar:
        return binary("//", self, other)

    def __rfloordiv__(self, other: int) -> Scalar:
        return binary("//", other, self)

    def __mod__(self, other: Scalar | int) -> Scalar:
        return binary("%", self, other)

    def __rmod__(self, other: int) -> Scalar:
        return binary("%", other, self)

    def lt(self, other: Scalar | int) -> Scalar:
        return binary("<", self, other)

    def le(self, other: Scalar | int) -> Scalar:
        return binary("<=", self, other)

    def gt(self, other: Scalar | int) -> Scalar:
        return binary(">", self, other)

    def ge(self, other: Scalar | int) -> Scalar:
        return binary(">=", self, other)

    def eq(self, other: Scalar | int) -> Scalar:
        return binary("==", self, other)

    def ne(self, other: Scalar | int) -> Scalar:
        return binary("!=", self, other)

    def children(self) -> tuple[Scalar, ...]:
        return ()

    def walk(self) -> Iterator[Scalar]:
        """This node and all below it."""
        yield self
        for child in self.children():
            yield from child.walk()

    def variables(self) -> frozenset[str]:
        """Names of the `Variable`s that occur."""
        return frozenset(node.name for node in self.walk() if isinstance(node, Variable))


@dataclass(frozen=True)
class Int(Scalar):
    value: int

    def __str__(self) -> str:
        return str(self.value)


ZERO, ONE = Int(0), Int(1)


@dataclass(frozen=True)
class Variable(Scalar):
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Argument(Scalar):
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Size(Scalar):
    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}.size[{self.dim}]"


@dataclass(frozen=True)
class Stride(Scalar):
    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}.stride[{self.dim}]"


@dataclass(frozen=True)
class Slot(Scalar):
    """Slot number of a tensor parameter (for the lowering; kernels name tensors)."""

    tensor: str

    def __str__(self) -> str:
        return f"{self.tensor}.slot"


@dataclass(frozen=True)
class Offset(Scalar):
    """Byte offset of a tensor parameter within its slot (for the lowering)."""

    tensor: str

    def __str__(self) -> str:
        return f"{self.tensor}.offset"


@dataclass(frozen=True)
class CoreId(Scalar):
    def __str__(self) -> str:
        return "core_id"


@dataclass(frozen=True)
class CoreCount(Scalar):
    def __str__(self) -> str:
        return "core_count"


@dataclass(frozen=True)
class Binary(Scalar):
    op: str
    left: Scalar
    right: Scalar

    def children(self) -> tuple[Scalar, ...]:
        return (self.left, self.right)

    def __str__(self) -> str:
        if self.op in ("min", "max"):
            return f"{self.op}({self.left}, {self.right})"
        return f"({self.left} {self.op} {self.right})"


@dataclass(frozen=True)
class Select(Scalar):
    condition: Scalar
    yes: Scalar
    no: Scalar

    def children(self) -> tuple[Scalar, ...]:
        return (self.condition, self.yes, self.no)

    def __str__(self) -> str:
        return f"({self.yes} if {self.condition} else {self.no})"


_FOLD = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b if b else 0,
    "%": lambda a, b: a % b if b else 0,
    "min": min,
    "max": max,
    "<": lambda a, b: int(a < b),
    "<=": lambda a, b: int(a <= b),
    ">": lambda a, b: int(a > b),
    ">=": lambda a, b: int(a >= b),
    "==": lambda a, b: int(a == b),
    "!=": lambda a, b: int(a != b),
}
OPERATORS = tuple(_FOLD)
_NEGATED = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "==": "!=", "!=": "=="}


def is_boolean(value: Scalar) -> bool:
    """Is it a comparison, which gives 0 or 1?"""
    return isinstance(value, Binary) and value.op in _NEGATED


def scalar(value: Scalar | int) -> Scalar:
    """An expression from an expression or a Python integer (wrapped to 32 bits)."""
    return value if isinstance(value, Scalar) else Int(wrap(int(value)))


def binary(op: str, left: Scalar | int, right: Scalar | int) -> Scalar:
    """`left op right`, folded where constants allow."""
    left, right = scalar(left), scalar(right)
    if isinstance(left, Int) and isinstance(right, Int):
        return Int(wrap(_FOLD[op](left.value, right.value)))
    if op in ("+", "*") and isinstance(left, Int):
        left, right = right, left
    if isinstance(right, Int):
        if right.value == 0 and op in ("+", "-"):
            return left
        if right.value == 1 and op in ("*", "//"):
            return left
        if (right.value == 0 and op == "*") or (right.value == 1 and op == "%"):
            return Int(0)
        if op == "-":
            op, right = "+", Int(wrap(-right.value))
        nested = isinstance(left, Binary) and left.op == op and isinstance(left.right, Int)
        if op in ("+", "*") and nested:
            return binary(op, left.left, Int(wrap(_FOLD[op](left.right.value, right.value))))
        if right.value == 0 and op in ("==", "!=") and is_boolean(left):
            return binary(_NEGATED[left.op], left.left, left.right) if op == "==" else left
    if left == right and op in ("min", "max", "-"):
        return Int(0) if op == "-" else left
    return Binary(op, left, right)


def minimum(left: Scalar | int, right: Scalar | int) -> Scalar:
    return binary("min", left, right)


def maximum(left: Scalar | int, right: Scalar | int) -> Scalar:
    return binary("max", left, right)


def select(condition: Scalar | int, yes: Scalar | int, no: Scalar | int) -> Scalar:
    condition = scalar(condition)
    if isinstance(condition, Int):
        return scalar(yes) if condition.value else scalar(no)
    return Select(condition, scalar(yes), scalar(no))


def ceildiv(left: Scalar | int, right: Scalar | int) -> Scalar:
    """ceil(left / right) for right > 0."""
    return binary("//", scalar(left) + right - 1, right)


def substitute(expression: Scalar, mapping: dict[Scalar, Scalar]) -> Scalar:
    """Replace leaves, all at once."""
    if expression in mapping:
        return mapping[expression]
    if isinstance(expression, Binary):
        return binary(
            expression.op,
            substitute(expression.left, mapping),
            substitute(expression.right, mapping),
        )
    if isinstance(expression, Select):
        return select(*(substitute(child, mapping) for child in expression.children()))
    return expression
