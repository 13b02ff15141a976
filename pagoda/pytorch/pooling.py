"""Pooling with padding as pooling of a padded copy.

A window that may lie outside its input is a masked load for each of its elements; in a padded copy
all windows lie inside, and each of their elements is a strided row that one command loads. The copy
is worth it: 3 x 3 windows take a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import register_lowering
from torch.nn.functional import pad

aten = torch.ops.aten


@torch.library.custom_op("pagoda::in_memory", mutates_args=(), device_types="cpu")
def in_memory(x: torch.Tensor) -> torch.Tensor:
    """x, which a compiled graph then holds in memory instead of computing it where it is used."""
    return x.clone()


@in_memory.register_fake
def _(x):
    return torch.empty_like(x)


@register_lowering(torch.ops.pagoda.in_memory.default, type_promotion_kind=None)
def _(x):
    x.realize()
    return x


def max_pool2d_with_indices(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    """aten.max_pool2d_with_indices. Where a whole window is -inf its index may be another one."""
    top, left = _pair(padding)
    below = _other(aten.max_pool2d_with_indices.default)
    if (top, left) == (0, 0) or ceil_mode or not x.is_floating_point():
        return below(x, kernel_size, stride, padding, dilation, ceil_mode)
    padded = in_memory(pad(x, (left, left, top, top), value=-torch.inf))
    values, places = below(padded, kernel_size, stride, (0, 0), dilation, False)
    high, wide = x.shape[-2:]
    row = places // (wide + 2 * left) - top
    column = places % (wide + 2 * left) - left
    return values, row.clamp(0, high - 1) * wide + column.clamp(0, wide - 1)


def avg_pool2d(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """aten.avg_pool2d; zeros of the padding count, or the windows are left as they are."""
    top, left = _pair(padding)
    if (top, left) == (0, 0) or ceil_mode or not count_include_pad:
        return NotImplemented
    padded = in_memory(pad(x, (left, left, top, top)))
    return aten.avg_pool2d(padded, kernel_size, stride, 0, False, True, divisor_override)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1]) if len(value) else (0, 0)


def _other(op: Any) -> Callable:
    """Inductor's own decomposition."""
    return select_decomp_table()[op]
