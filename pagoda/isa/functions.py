"""The functions of the vector engine as one table: code, operands, cost, latency, what they do.

`numbers` and `tables` define their arithmetic; `meaning` joins the two. A command applies two of
them: dst = f2(f1(a, b), c).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VectorFunction:
    """One function of the vector engine. cost: cycles a group of lanes takes; latency: added to
    the command's tail; operands: how many it reads (for f1: of a, b; for f2: of f1's result, c)."""

    code: int
    name: str
    operands: int
    cost: int
    latency: int
    text: str


def _functions(table: str) -> dict[int, VectorFunction]:
    rows = [line.split(maxsplit=5) for line in table.strip().splitlines()]
    made = [VectorFunction(int(c), n, int(o), int(g), int(y), t) for c, n, o, g, y, t in rows]
    if len({f.code for f in made}) != len(made) or len({f.name for f in made}) != len(made):
        raise ValueError("vector functions: a code or a name is given twice")
    return {f.code: f for f in made}


VECTOR_FUNCTIONS = _functions("""
    0  mov     1 1 2  x, bit for bit
    1  fadd    2 1 7  x + y
    2  fsub    2 1 7  x - y
    3  fmul    2 1 7  x * y
    4  fdiv    2 8 28 x / y
    5  fmax    2 1 2  the greater; NaN if either is; +0 above -0
    6  fmin    2 1 2  the smaller; NaN if either is; -0 below +0
    7  frsub   2 1 7  y - x
    8  frdiv   2 8 28 y / x
    9  flt     2 1 2  1 if x < y, else 0 (I32)
    10 fle     2 1 2  1 if x <= y, else 0 (I32)
    11 feq     2 1 2  1 if x == y, else 0 (I32)
    12 fne     2 1 2  1 if x != y, else 0 (I32)
    13 fgt     2 1 2  1 if x > y, else 0 (I32)
    14 fge     2 1 2  1 if x >= y, else 0 (I32)
    16 fneg    1 1 2  x with its sign bit flipped
    17 fabs    1 1 2  x with its sign bit cleared
    18 fsqrt   1 8 28 square root
    19 ffloor  1 1 7  rounded down to an integral value
    20 fceil   1 1 7  rounded up to an integral value
    21 ftrunc  1 1 7  rounded toward zero to an integral value
    22 fround  1 1 7  rounded to the nearest integral value, ties to even
    23 exp2    1 2 16 2^x, by table
    24 log2    1 2 16 log2 x, by table
    25 recip   1 2 16 1 / x, by table
    26 rsqrt   1 2 16 1 / square root of x, by table
    27 sin2pi  1 2 16 sine of 2 pi x, by table
    28 f2i     1 1 7  F32 to I32, toward zero, saturating, NaN to 0
    29 i2f     1 1 7  I32 to F32
    30 i2b     1 1 2  1 if the pattern is not 0, else 0
    32 iadd    2 1 2  x + y modulo 2^32
    33 isub    2 1 2  x - y modulo 2^32
    34 imul    2 1 7  x * y modulo 2^32
    35 imax    2 1 2  the greater, signed
    36 imin    2 1 2  the smaller, signed
    37 and     2 1 2  bitwise and
    38 or      2 1 2  bitwise or
    39 xor     2 1 2  bitwise exclusive or
    40 shl     2 1 2  x shifted left by the low 5 bits of y
    41 shr     2 1 2  x shifted right by the low 5 bits of y, zeros coming in
    42 sra     2 1 2  x shifted right by the low 5 bits of y, sign bits coming in
    43 ilt     2 1 2  1 if x < y, else 0, signed
    44 ile     2 1 2  1 if x <= y, else 0, signed
    45 ieq     2 1 2  1 if x == y, else 0
    46 ine     2 1 2  1 if x != y, else 0
    47 irsub   2 1 2  y - x modulo 2^32
    48 idiv    2 8 28 floor(x / y); by 0: -1
    49 imod    2 8 28 x - y floor(x / y); by 0: x
    56 fma     2 1 7  only as f2 of fmul: a * b + c with one rounding
    57 select  2 1 2  only as f1 and f2 together: a != 0 (as a pattern) ? b : c
    58 i2fmul  2 1 7  only as f1: x (I32) to F32, times y; rounded twice, as i2f and fmul
    59 faddq   2 1 7  only as f2: x + y, then the nearest integer in -128..127, ties to even; NaN: 0
""")
FUNCTION_CODES = {function.name: function.code for function in VECTOR_FUNCTIONS.values()}
FMUL, FMA, SELECT = (FUNCTION_CODES[name] for name in ("fmul", "fma", "select"))
I2FMUL, FADDQ = (FUNCTION_CODES[name] for name in ("i2fmul", "faddq"))
ONLY_FIRST, ONLY_SECOND = (I2FMUL,), (FMA, FADDQ)
"""Codes that are no f2, and no f1. select must be both or neither."""


def vector_operands(f1: int, f2: int) -> tuple[str, ...]:
    """The operands, of "a", "b", "c", that a pair of legal functions reads."""
    used = ["a"]
    if VECTOR_FUNCTIONS[f1].operands == 2:
        used.append("b")
    if VECTOR_FUNCTIONS[f2].operands == 2:
        used.append("c")
    return tuple(used)
