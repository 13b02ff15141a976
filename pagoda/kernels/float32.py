"""float32 products on the bf16 matrix engine: split into terms, multiply the terms, add up.

`terms` follows torch's float32 matmul precision: `medium` 1, `high` 2, `highest` 3. An operand x
becomes bf16 terms x0 + x1 (+ x2):

    x0 = x with the low 16 bits cut off        (so nothing finite becomes infinite)
    x1 = bf16(x - x0),  x2 = bf16(x - x0 - x1)        (both differences are exact)

With three terms the sum is x itself when |x| >= 2^-110: below, x2 may underflow. With one term
x0 = bf16(x), rounded to nearest. Of a product of two split operands the terms x_i y_j with
i + j < terms are computed, the smallest first (`products`), each a whole matmul, all into one
float32 accumulator. What is left out is below 2^-23 of |x y| with three terms, 2^-15 with two.

Odd inputs: the terms after a non-finite x0 are +0. An infinity times a finite number is therefore
an infinity or, when a later term of the other operand is 0, NaN. A NaN whose payload lies in the
low 16 bits alone counts as an infinity; arithmetic never makes one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.compiler.builder import KernelBuilder, Number
from pagoda.compiler.tile_ir import Read, Tile, apply, splat
from pagoda.isa.numbers import CANONICAL_NAN, DType

TERMS = {"medium": 1, "high": 2, "highest": 3}

_UPPER_HALF = -0x10000


def products(terms: int) -> tuple[tuple[int, int], ...]:
    """The (i, j) of the term products x_i y_j to add up, in order: the smallest first.

    >>> products(2)
    ((0, 1), (1, 0), (0, 0))
    """
    return tuple((i, total - i) for total in reversed(range(terms)) for i in range(total + 1))


def split_terms(
    b: KernelBuilder, source: Tile, terms: Sequence[Tile], rows: Number, cols: Number
) -> None:
    """Emit the split of `source` (F32) into `terms` (1 to 3 BF16 tiles of the same extents).

    `source` is overwritten when there is more than one term.
    """
    if len(terms) == 1:
        b.elementwise(terms[0], Read(source.view()), rows, cols)
        return
    bits = b.tile(DType.I32, source.rows, source.cols, name="bits")
    upper = apply("and", apply("as_int", Read(source.view())), splat(_UPPER_HALF))
    b.elementwise(bits, upper, rows, cols)
    pattern = Read(bits.view())
    b.elementwise(terms[0], apply("as_float", pattern), rows, cols)
    rest = apply("fsub", Read(source.view()), Read(terms[0].view()))
    b.elementwise(source, rest, rows, cols)
    # A non-finite x leaves inf - inf = NaN: multiply its pattern by 0, every other one by 1.
    rest_bits = apply("as_int", Read(source.view()))
    number = apply("ine", rest_bits, splat(CANONICAL_NAN))
    b.elementwise(bits, apply("imul", number, rest_bits), rows, cols)
    b.elementwise(terms[1], apply("as_float", pattern), rows, cols)
    if len(terms) == 3:
        last = apply("fsub", apply("as_float", pattern), Read(terms[1].view()))
        b.elementwise(terms[2], last, rows, cols)
