"""Pointwise operations of loop nests as compositions of the chip's element-wise functions.

`compose` turns one operation of `loop_nest.POINTWISE` into a tile IR tree, `convert` a cast. The
composition is part of a kernel's meaning: it depends on nothing but the operation and its types,
so results are the same bits on every chip and for every tile size.

Integers of every width live in int32 lanes (int64 too), bool is 0 or 1; int8 and uint8 results
wrap to their width. The elementary functions, with their error bounds, are in `elementary`.
A quotient x / (1 + exp(-y)) is computed as x * sigmoid(y): within 5 ulp; within 16 where -y > 87
makes the sigmoid subnormal; 0 where exp(-y) overflows (`nest_simplify`). Other quotients are
correctly rounded.
`remainder`, `fmod` and `floordiv` of floats are exact while the quotient is below 2^22 in
magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pagoda.compiler.elementary import ELEMENTARY, Keep, choose, f32, i32, with_sign_of
from pagoda.compiler.errors import CompileError
from pagoda.compiler.tile_ir import Apply, Tree, apply, splat

INT8_MIN, INT8_MAX = -128, 127
WRAPPED = {"int8": (24, "sra"), "uint8": (24, "shr"), "int16": (16, "sra")}


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def check_dtype(dtype: str, what: str) -> None:
    """Raises CompileError for a type the chip cannot hold in its lanes."""
    if dtype in ("float64", "float16", "int16"):
        near = {"float64": "float32", "float16": "bfloat16", "int16": "int32"}[dtype]
        raise CompileError(
            what, "the chip computes in float32 and int32 and stores bfloat16, int8 and int64 "
            "besides", f"the type is {dtype}", f"convert it to {near} first",
        )  # fmt: skip


def compose(name: str, dtype: str, operand_dtype: str, args: tuple[Tree, ...], keep: Keep) -> Tree:
    """The tree of operation `name`. operand_dtype: type of the operands (of `where`: the type of
    the values); dtype: of the result. Raises CompileError for types the chip lacks."""
    check_dtype(operand_dtype, f"operation {name}")
    if name == "where":
        return apply("select", *args)
    if name == "saturate":
        return saturated(apply("f2i", args[0]) if is_float(operand_dtype) else args[0])
    if is_float(operand_dtype):
        return _FLOAT[name](keep, *args)
    if name not in _INT:
        raise CompileError(
            f"operation {name}", "it is defined for floating-point operands",
            f"they are {operand_dtype}", "convert them to float32 first",
        )  # fmt: skip
    if operand_dtype == "bool" and name in _BOOL:
        return apply(_BOOL[name], *args)
    if operand_dtype == "bool" and name == "bitwise_not":
        return apply("xor", args[0], splat(1))
    return wrapped(_INT[name](keep, *args), dtype)


def convert(value: Tree, source: str, target: str) -> Tree:
    """A conversion between types held in lanes. Rounding to bfloat16 takes a tile (see `lanes`
    of the caller), so here bfloat16 counts as float32."""
    check_dtype(target, f"a conversion from {source}")
    if source == target:
        return value
    if is_float(target):
        return value if is_float(source) else apply("i2f", value)
    if target == "bool":
        if source == "bool":
            return value
        return apply("fne", value, splat(0.0)) if is_float(source) else apply("i2b", value)
    lanes = apply("f2i", value) if is_float(source) else value
    return lanes if source == "bool" else wrapped(lanes, target)


def bitcast(value: Tree, source: str, target: str) -> Tree:
    """The same bits as another type. Raises CompileError unless both are 32 bits or 8 bits wide."""
    pairs = {("float32", "int32"): "as_int", ("int32", "float32"): "as_float"}
    if (source, target) in pairs:
        return apply(pairs[source, target], value)
    if {source, target} <= {"int8", "uint8"}:
        return wrapped(value, target)
    raise CompileError(
        "a bit cast", "both types must be held in 32 bits, or be int8 and uint8",
        f"they are {source} and {target}", "convert with .to(dtype), or do it on the CPU",
    )  # fmt: skip


def wrapped(value: Tree, dtype: str) -> Tree:
    """int32 lanes reduced to the width of `dtype`."""
    if dtype not in WRAPPED:
        return value
    shift, right = WRAPPED[dtype]
    return apply(right, apply("shl", value, splat(shift)), splat(shift))


def saturated(value: Tree) -> Tree:
    """int32 lanes cut off to what int8 holds."""
    return apply("imin", apply("imax", value, splat(INT8_MIN)), splat(INT8_MAX))


def unsaturated(value: Tree) -> Tree:
    """x, if the tree is saturated(x): a store of int8 cuts off by itself."""
    for function, limit in (("imin", INT8_MAX), ("imax", INT8_MIN)):
        if not isinstance(value, Apply) or value.function != function:
            return value
        if value.arguments[1] != splat(limit):
            return value
        value = value.arguments[0]
    return value


# Division and rounding ---------------------------------------------------------------------------


def _floordiv(keep: Keep, a: Tree, b: Tree) -> Tree:
    """floor(a / b), one less where the quotient was rounded up across an integer."""
    a, b = keep(a), keep(b)
    q = keep(f32("ffloor", f32("fdiv", a, b)))
    rest = f32("fma", f32("fneg", q), b, a)
    return choose(f32("flt", f32("fmul", rest, b), 0.0), f32("fadd", q, -1.0), q)


def _remainder(keep: Keep, a: Tree, b: Tree) -> Tree:
    """a - floor(a / b) b, which has the sign of b; of an infinite b no multiple counts."""
    a, b = keep(a), keep(b)
    q = f32("ffloor", f32("fdiv", a, b))
    alone = f32("fadd", f32("fsub", a, a), a)  # a, but NaN if it is infinite
    infinite = f32("feq", f32("fabs", b), math.inf)
    rest = keep(choose(infinite, alone, f32("fma", f32("fneg", q), b, a)))
    return choose(f32("flt", f32("fmul", rest, b), 0.0), f32("fadd", rest, b), rest)


def _fmod(keep: Keep, a: Tree, b: Tree) -> Tree:
    """|a| - floor(|a| / |b|) |b|, with the sign of a."""
    a = keep(a)
    rest = _remainder(keep, f32("fabs", a), f32("fabs", b))
    return with_sign_of(keep(rest), a)


def _truncdiv_int(keep: Keep, a: Tree, b: Tree) -> Tree:
    a, b = keep(a), keep(b)
    q = keep(i32("idiv", _abs_int(keep, a), _abs_int(keep, b)))
    return i32("select", i32("ilt", i32("xor", a, b), 0), i32("isub", splat(0), q), q)


def _fmod_int(keep: Keep, a: Tree, b: Tree) -> Tree:
    a, b = keep(a), keep(b)
    return i32("isub", a, i32("imul", _truncdiv_int(keep, a, b), b))


def _abs_int(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return i32("imax", x, i32("isub", splat(0), x))


def _sign(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return apply("i2f", i32("isub", f32("fgt", x, 0.0), f32("flt", x, 0.0)))


def _sign_int(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return i32("isub", i32("ilt", splat(0), x), i32("ilt", x, 0))


# The tables --------------------------------------------------------------------------------------


def _one(function: str) -> Callable[..., Tree]:
    return lambda keep, *args: apply(function, *args)


def _swapped(function: str) -> Callable[..., Tree]:
    return lambda keep, a, b: apply(function, b, a)


def _isnan(keep: Keep, x: Tree) -> Tree:
    x = keep(x)
    return apply("fne", x, x)


_FLOAT: dict[str, Callable[..., Tree]] = {
    **{n: _one(f"f{n}") for n in ("add", "sub", "mul", "div", "neg", "abs", "sqrt", "floor")},
    **{n: _one(f"f{n}") for n in ("ceil", "trunc", "round", "lt", "le", "gt", "ge", "eq", "ne")},
    "minimum": _one("fmin"), "maximum": _one("fmax"), "fma": _one("fma"), "sign": _sign,
    "reciprocal": _one("recip"), "rsqrt": _one("rsqrt"), "exp2": _one("exp2"),
    "log2": _one("log2"), "floordiv": _floordiv, **ELEMENTARY,
    "remainder": _remainder, "fmod": _fmod, "isnan": _isnan,
    "truncdiv": lambda keep, a, b: f32("ftrunc", f32("fdiv", a, b)),
    "isinf": lambda keep, x: f32("feq", f32("fabs", x), math.inf),
    "signbit": lambda keep, x: i32("shr", apply("as_int", x), 31),
    "logical_not": lambda keep, x: f32("feq", x, 0.0),
}  # fmt: skip

_INT: dict[str, Callable[..., Tree]] = {
    "add": _one("iadd"), "sub": _one("isub"), "mul": _one("imul"), "minimum": _one("imin"),
    "maximum": _one("imax"), "floordiv": _one("idiv"), "remainder": _one("imod"),
    "truncdiv": _truncdiv_int, "fmod": _fmod_int, "bitwise_and": _one("and"),
    "bitwise_or": _one("or"), "bitwise_xor": _one("xor"), "shift_left": _one("shl"),
    "shift_right": _one("sra"), "lt": _one("ilt"), "le": _one("ile"), "eq": _one("ieq"),
    "ne": _one("ine"), "gt": _swapped("ilt"), "ge": _swapped("ile"), "abs": _abs_int,
    "sign": _sign_int, "neg": lambda keep, x: i32("isub", splat(0), x),
    "bitwise_not": lambda keep, x: i32("xor", x, -1),
    "logical_not": lambda keep, x: i32("ieq", x, 0),
    "floor": lambda keep, x: x, "ceil": lambda keep, x: x, "trunc": lambda keep, x: x,
    "round": lambda keep, x: x, "isnan": lambda keep, x: splat(0),
    "isinf": lambda keep, x: splat(0), "signbit": lambda keep, x: i32("ilt", x, 0),
}  # fmt: skip

_BOOL = {"add": "or", "mul": "and", "maximum": "or", "minimum": "and"}
