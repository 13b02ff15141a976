"""What a loop nest means, executed with numpy over the whole iteration space at once.

Slow and simple: the reference that compiled kernels are compared with. Sums and products follow
numpy's own order, so floating-point results agree with a kernel only within rounding; everything
else (indexing, masks, conversions, integer and boolean work) agrees exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pagoda.compiler.loop_nest import (
    LOW_PRECISION,
    Bitcast,
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

# bfloat16 memory is handled as uint16 bit patterns: numpy has no such type.
STORAGE = {
    "bool": np.bool_, "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "int32": np.int32,
    "int64": np.int64, "bfloat16": np.uint16, "float16": np.float16, "float32": np.float32,
    "float64": np.float64,
}  # fmt: skip


_OUTSIDE = -(2**40)  # makes the access that uses a bad index fail, unless it is masked out


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns to their float32 values (exact)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to uint16 bit patterns, round to nearest even; NaN becomes 0x7FC0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x).astype(np.asarray(x).dtype)


def _erfc(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erfc, otypes=[np.float64])(x).astype(np.asarray(x).dtype)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.true_divide(a, b)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    exact = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return exact.astype(np.asarray(a).dtype)


def _saturate(x: np.ndarray) -> np.ndarray:
    return np.clip(np.trunc(np.nan_to_num(x, posinf=np.inf, neginf=-np.inf)), -128, 127)


def _truncdiv(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "pow": np.power,
    "minimum": np.minimum, "maximum": np.maximum, "floordiv": np.floor_divide,
    "truncdiv": _truncdiv, "remainder": np.remainder, "fmod": np.fmod, "atan2": np.arctan2,
    "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or, "bitwise_xor": np.bitwise_xor,
    "shift_left": np.left_shift, "shift_right": np.right_shift,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal, "neg": np.negative, "abs": np.abs, "sign": np.sign,
    "reciprocal": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log2": np.log2,
    "log10": np.log10, "log1p": np.log1p, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "tanh": np.tanh, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "erf": _erf, "erfc": _erfc,
    "recip1p_exp2": lambda x: 1 / (1 + np.exp2(x)),
    "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "round": np.round,
    "saturate": _saturate,
    "bitwise_not": np.invert, "isnan": np.isnan, "isinf": np.isinf, "signbit": np.signbit,
    "logical_not": np.logical_not, "fma": _fma, "where": np.where,
}  # fmt: skip


def evaluate(
    nest: LoopNest, buffers: Sequence[np.ndarray], symbols: Sequence[int] | Mapping[str, int] = ()
) -> None:
    """Runs the nest. `buffers`: one flat array per parameter, in storage types (`STORAGE`;
    bfloat16 as uint16), starting at the view's first element; written in place. `symbols`: sizes
    in the nest's order, or by name. Raises IndexError for an index outside its buffer."""
    if not isinstance(symbols, Mapping):
        symbols = dict(zip(nest.symbols, symbols, strict=True))
    shape = tuple(int(d.evaluate(symbols)) for d in nest.dims)
    rank = len(shape)
    axes = {
        d: np.arange(size, dtype=np.int64).reshape([-1 if k == d else 1 for k in range(rank)])
        for d, size in enumerate(shape)
    }
    values: list[Any] = []

    def position(index: Any) -> np.ndarray:
        refs = {ref: values[ref] for ref in index.refs()}
        return np.asarray(index.evaluate(symbols, axes, refs), dtype=np.int64)

    with np.errstate(all="ignore"):
        for op in nest.body:
            values.append(_step(nest, op, values, buffers, shape, position, symbols))


def _step(nest, op, values, buffers, shape, position, symbols) -> Any:
    match op:
        case Load(param, index):
            return _load(nest, op, values, buffers[param], position(index), shape)
        case Store(param, index, value):
            _store(nest, op, buffers[param], position(index), values[value], shape)
            return None
        case Constant(value, dtype):
            if dtype.startswith("int"):  # Inductor writes int64 extremes into int32 slots
                info = np.iinfo(STORAGE[dtype])
                value = min(max(int(value), info.min), info.max)
            return np.asarray(value, STORAGE[dtype])
        case IndexValue(index, dtype):
            return position(index).astype(STORAGE[dtype])
        case Pointwise(name, operands, dtype):
            result = FUNCTIONS[name](*(values[o] for o in operands))
            return np.asarray(result).astype(STORAGE[dtype], copy=False)
        case Cast(value, dtype):
            return convert(values[value], dtype)
        case Bitcast(value, dtype):
            return np.asarray(values[value]).view(STORAGE[dtype])
        case Indirect(value, size, _):
            limit = size.evaluate(symbols)
            index = np.asarray(values[value], np.int64)
            index = np.where(index < 0, index + limit, index)
            return np.where((index < 0) | (index >= limit), _OUTSIDE, index)
        case Reduce(kind, value, dtype):
            return _reduce(nest, kind, values[value], dtype, shape)
    raise TypeError(f"no such operation: {op!r}")


def convert(values: Any, dtype: str) -> np.ndarray:
    """A `Cast`: low-precision floats are rounded and stay float32."""
    values = np.asarray(values)
    if dtype == "bfloat16":
        return bfloat16_to_float32(float32_to_bfloat16(values.astype(np.float32)))
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    return values.astype(STORAGE[dtype])


def _load(nest: LoopNest, op: Load, values, buffer, index, shape) -> np.ndarray:
    if op.mask is not None:
        mask = np.asarray(values[op.mask])
        index, mask = np.broadcast_arrays(index, mask)
        index = np.where(mask, index, 0)
        if not mask.any():
            return np.full(mask.shape, op.other, STORAGE[op.dtype])
    elif 0 in shape:
        return np.zeros(index.shape, STORAGE[op.dtype])
    if index.size and (index.min() < 0 or index.max() >= buffer.size):
        raise IndexError(f"load p{op.param}[{op.index}]: outside {buffer.size} elements")
    found = buffer[index]
    if nest.params[op.param].dtype == "bfloat16":
        found = bfloat16_to_float32(found)
    found = found.astype(STORAGE[op.dtype], copy=False)
    return found if op.mask is None else np.where(mask, found, np.asarray(op.other, found.dtype))


def _store(nest: LoopNest, op: Store, buffer, index, value, shape) -> None:
    dims = nest.dims_of()[nest.body.index(op)]
    full = tuple(size if d in dims else 1 for d, size in enumerate(shape))
    if 0 in shape and not (nest.reduced and set(dims) <= set(range(len(nest.outer)))):
        return
    index = np.broadcast_to(index, full).reshape(-1)
    value = np.broadcast_to(value, full).reshape(-1)
    if index.size and (index.min() < 0 or index.max() >= buffer.size):
        raise IndexError(f"store p{op.param}[{op.index}]: outside {buffer.size} elements")
    dtype = nest.params[op.param].dtype
    if op.mode == "add":
        for k, v in zip(index, value, strict=True):
            old = bfloat16_to_float32(buffer[k : k + 1])[0] if dtype == "bfloat16" else buffer[k]
            buffer[k] = _stored(np.asarray(old + v), dtype)
    else:
        buffer[index] = _stored(value, dtype)


def _stored(value: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in LOW_PRECISION and dtype == "bfloat16":
        return float32_to_bfloat16(value.astype(np.float32))
    return value.astype(STORAGE[dtype])


def _reduce(nest: LoopNest, kind: str, value: Any, dtype: str, shape) -> np.ndarray:
    outer, rank = len(nest.outer), len(shape)
    value = np.asarray(value)
    spread = tuple(s if d >= outer else value.shape[d] if value.ndim else 1
                   for d, s in enumerate(shape))  # fmt: skip
    row = np.broadcast_to(value, spread).reshape(spread[:outer] + (math.prod(shape[outer:]),))
    if kind in ("argmax", "argmin"):
        result = getattr(np, kind)(row, axis=-1)  # numpy: first NaN, then lowest index
    elif kind == "any":
        result = row.any(axis=-1)
    else:
        function = {"sum": np.sum, "prod": np.prod, "max": np.max, "min": np.min}[kind]
        result = function(row, axis=-1)
    return result.astype(STORAGE[dtype]).reshape(spread[:outer] + (1,) * (rank - outer))
