"""Products of float32 tensors as sums of products of bfloat16 ones.

As many terms as `torch.get_float32_matmul_precision()` asks for (`kernels.float32.TERMS`):

    x0 = x with the low 16 bits cut off, x1 = x - x0 likewise      (the last term: rounded to bf16)
    p_ij = product of x_i and w_j for i + j < terms, each a float32 sum of its own
    y = (rest where p_00 is finite, else 0) + p_00 + bias,  rest = the other p_ij, smallest first

Three terms ("highest") are x itself for |x| >= 2^-110 and leave out less than 2^-21 of |x w|; two
("high") leave out 2^-14; one ("medium") is bfloat16 operands with a float32 result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pagoda.kernels.float32 import TERMS, products
from pagoda.pytorch.matmul_precision import matmul_precision

_UPPER_HALF = -0x10000


def in_terms(
    multiply: Callable, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """multiply(a, b, bias, dtype) of float32 operands by bfloat16 ones, dtype being that of its
    result; bias: one element for each channel of a result [.., channels, height, width]."""
    count = TERMS[matmul_precision()]
    if count == 1:
        return multiply(_terms(a, 1)[0], _terms(b, 1)[0], bias, torch.float32)
    a_terms, b_terms = _terms(a, count), _terms(b, count)
    sums = [multiply(a_terms[i], b_terms[j], None, torch.float32) for i, j in products(count)]
    *small, total = sums
    rest = small[0]
    for term in small[1:]:
        rest = rest + term
    out = torch.where(total * 0 == 0, rest, 0) + total
    return out if bias is None else out + bias.view(-1, 1, 1)


def _terms(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    found = []
    for _ in range(count - 1):
        upper = (x.view(torch.int32) & _UPPER_HALF).view(torch.float32)
        found.append(upper.to(torch.bfloat16))
        x = x - upper
    return [*found, x.to(torch.bfloat16)]
