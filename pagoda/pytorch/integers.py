"""Operations on integers that are neither one loop nest nor a library kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pagoda.pytorch.scans import cumsum


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent by squaring, in 32 bits. A negative exponent gives 0 but for 1 and -1."""
    tensor = base if isinstance(base, torch.Tensor) else exponent
    if tensor.is_floating_point() or isinstance(base, float) or isinstance(exponent, float):
        return NotImplemented
    kind = torch.result_type(base, exponent)
    if kind.is_floating_point:
        return NotImplemented
    base = torch.as_tensor(base, device=tensor.device).to(kind)
    exponent = torch.as_tensor(exponent, device=tensor.device).to(kind)
    odd = (exponent & 1) == 1
    result, factor = torch.ones_like(base), base
    for bit in range(5):
        result = torch.where(((exponent >> bit) & 1) == 1, result * factor, result)
        factor = factor * factor
    unit = torch.where(odd, base, 1)  # of 1 and -1
    small = torch.where(base == 0, (exponent == 0).to(kind), unit)
    result = torch.where(exponent < 0, 0, result)
    return torch.where(base.abs() <= 1, small, result).to(kind)


def gcd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclid's algorithm; 46 steps are enough for 32 bits (the worst are Fibonacci numbers)."""
    a, b = torch.broadcast_tensors(a.abs(), b.abs())
    for _ in range(46):
        ended = b == 0
        a, b = torch.where(ended, a, b), torch.where(ended, 0, a % torch.where(ended, 1, b))
    return a


def product(otherwise: Callable) -> Callable:
    """`mm` and `bmm`: of integers as sums of products; of floats what it was."""

    def multiply(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> Any:
        if a.is_floating_point() or kwargs:
            return otherwise(a, b, **kwargs)
        return (a[..., :, None] * b[..., None, :, :]).sum(-2, dtype=a.dtype)

    return multiply


def _triangle(counts: list[int], firsts: list[int], dtype: Any, device: Any) -> torch.Tensor:
    """[2, sum of counts]: row and column of each element, row r having `counts[r]` from column
    `firsts[r]` on."""
    total = sum(counts)
    sizes = torch.tensor(counts, dtype=torch.int64, device=device)
    ends = cumsum(sizes, 0)
    place = torch.arange(total, device=device)
    row = (ends <= place[:, None]).sum(-1)
    begins = torch.tensor(firsts, dtype=torch.int64, device=device) - (ends - sizes)
    return torch.stack([row, place + begins[row]]).to(dtype or torch.int64)


def tril_indices(row: int, col: int, offset: int = 0, *, dtype=None, layout=None, device=None,
                 pin_memory=None) -> torch.Tensor:  # fmt: skip
    counts = [min(max(r + offset + 1, 0), col) for r in range(row)]
    return _triangle(counts, [0] * row, dtype, device)


def triu_indices(row: int, col: int, offset: int = 0, *, dtype=None, layout=None, device=None,
                 pin_memory=None) -> torch.Tensor:  # fmt: skip
    firsts = [min(max(r + offset, 0), col) for r in range(row)]
    return _triangle([col - first for first in firsts], firsts, dtype, device)
