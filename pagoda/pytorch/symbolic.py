"""torch's symbolic sizes and types to plain data: sympy to index expressions, dtypes to names."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch.utils._sympy.functions import (
    CeilDiv,
    CleanDiv,
    FloatTrueDiv,
    FloorDiv,
    Identity,
    IntTrueDiv,
    ModularIndexing,
    PythonMod,
    ToFloat,
)
from torch.utils._sympy.functions import Max as TorchMax
from torch.utils._sympy.functions import Min as TorchMin
from torch.utils._sympy.functions import Mod as TorchMod

from pagoda.compiler.index_expr import Const, Expr, Symbol, ceildiv, maximum, minimum, product
from pagoda.compiler.loop_nest import ITEMSIZE

FLOAT_FUNCTIONS = (FloatTrueDiv, IntTrueDiv, ToFloat)  # of sizes, with float results
_NAMES = {getattr(torch, name): name for name in ITEMSIZE}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"; raises TypeError for a type the chip has no storage for."""
    if dtype not in _NAMES:
        raise TypeError(
            f"dtype {dtype} is not one of the chip's: {', '.join(ITEMSIZE)}. "
            "Convert the tensor with .to(dtype) before it goes to the device."
        )
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def to_expr(value: sympy.Expr | int, atoms: Mapping[sympy.Symbol, Expr] | None = None) -> Expr:
    """An index expression. `atoms` gives the meaning of some symbols; others are sizes, by name.

    Raises NotImplementedError for a function that index expressions lack.
    """
    if isinstance(value, int):
        return Const(value)
    if isinstance(value, sympy.Integer):
        return Const(int(value))
    if isinstance(value, sympy.Symbol):
        return atoms[value] if atoms and value in atoms else Symbol(value.name)
    args = [to_expr(a, atoms) for a in getattr(value, "args", ())]
    match value:
        case sympy.Add():
            return sum(args, Const(0))
        case sympy.Mul():
            return product(args)
        case sympy.Pow() if value.exp.is_Integer and int(value.exp) >= 0:
            return product([args[0]] * int(value.exp))
        case FloorDiv() | CleanDiv():
            return args[0] // args[1]
        case ModularIndexing():
            return args[0] // args[1] % args[2]
        case TorchMod() | PythonMod() | sympy.Mod():
            return args[0] % args[1]
        case CeilDiv():
            return ceildiv(args[0], args[1])
        case sympy.Abs():
            return maximum(args[0], Const(0) - args[0])
        case Identity():
            return args[0]
        case TorchMin() | sympy.Min():
            return _fold(minimum, args)
        case TorchMax() | sympy.Max():
            return _fold(maximum, args)
    raise NotImplementedError(
        f"size or index expression {value}: {type(value).__name__} has no counterpart in index "
        "expressions. Make the size static, for example with torch.compile(dynamic=False)."
    )


def _fold(function, args: list[Expr]) -> Expr:
    result = args[0]
    for arg in args[1:]:
        result = function(result, arg)
    return result
