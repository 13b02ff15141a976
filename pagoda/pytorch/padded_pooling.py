"""Pooling with padding as pooling of a padded copy, the gradient of the largest as a sum, and
pooling of all of a small image.

A window that may lie outside its input is a masked load for each of its elements; in a padded copy
all windows lie inside, and each of their elements is a strided row that one command loads. The copy
is worth it: 3 x 3 windows take a tenth of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.lowering import register_lowering
from torch.nn.functional import pad

from pagoda.pytorch.in_memory import in_memory
from pagoda.pytorch.pooling import LARGE, full, outputs

aten = torch.ops.aten

MOST_PIXELS = 64  # added up by unrolled code


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
    """aten.max_pool2d_with_indices, with torch's choice among equal elements and NaN. The values
    are found along columns first, then along rows; the indices, if anything uses them, at once."""
    dims = _dims(x, kernel_size, stride, padding, dilation, ceil_mode)
    if dims is None or x.dtype == torch.bool:
        return NotImplemented
    y, x_ = dims
    real = x.is_floating_point()
    x = in_memory(x)  # what makes x may then end the kernel of a convolution
    if max(y.before, y.after, x_.before, x_.after) > 0:
        least = -torch.inf if real else torch.iinfo(x.dtype).min
        x = in_memory(pad(x, (x_.before, x_.after, y.before, y.after), value=least))
    rows = in_memory(_largest([x[..., y.window(k), :] for k in range(y.kernel)]))
    largest = _largest([rows[..., x_.window(k)] for k in range(x_.kernel)])
    best = tap = None
    for number in range(y.kernel * x_.kernel):
        ky, kx = divmod(number, x_.kernel)
        taken = x[..., y.window(ky), :][..., x_.window(kx)]
        if best is None or tap is None:
            best, tap = taken, torch.zeros_like(taken, dtype=torch.int32)
            continue
        later = taken > best
        tap = torch.where(later | taken.isnan() if real else later, number, tap)
        best = torch.maximum(best, taken)
    assert best is not None and tap is not None
    ky = sum(((tap >= k * x_.kernel).to(torch.int32) for k in range(1, y.kernel)), 0 * tap)
    row = y.first(x.device)[:, None] + ky * y.dilation
    column = x_.first(x.device) + (tap - ky * x_.kernel) * x_.dilation
    # A window of nothing but -inf has its first element, which may lie in the padding.
    places = row.clamp(min=0) * x_.size + column.clamp(min=0)
    return largest, places.to(torch.int64)


def _largest(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.maximum, parts)


def max_pool2d_with_indices_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: torch.Tensor,
) -> Any:
    """The gradient for each input gathered from the windows it lies in: where it was the largest.

    Inputs whose row and column have the same remainder by the stride lie in windows at the same
    places (`phases`); each such part is a sum of shifted gradients.
    """
    dims = _dims(x, kernel_size, stride, padding, dilation, ceil_mode)
    if dims is None or x.dim() != 4:
        return NotImplemented
    y, x_ = dims
    margins = (0, 0, *x_.margins(), *y.margins())
    grad, places = (t.permute(0, 2, 3, 1) for t in (grad, indices.to(torch.int32)))
    grad, places = in_memory(pad(grad, margins)), in_memory(pad(places, margins, value=-1))
    rows = []
    for first_y in range(y.stride):
        row = []
        for first_x in range(x_.stride):
            here = y.inputs(first_y, x.device)[:, None] * x_.size + x_.inputs(first_x, x.device)
            total = torch.zeros((), dtype=torch.float32, device=x.device)
            for from_y in y.meeting(first_y):
                for from_x in x_.meeting(first_x):
                    met = places[:, from_y][:, :, from_x] == here[:, :, None]
                    total = total + torch.where(met, grad[:, from_y][:, :, from_x], 0)
            shape = x.shape[0], len(here), here.shape[1], x.shape[1]
            row.append(total.to(x.dtype).expand(shape))
        rows.append(torch.stack(row, 3))
    found = torch.stack(rows, 2).flatten(3, 4).flatten(1, 2)[:, : y.size, : x_.size]
    found = found.permute(0, 3, 1, 2)
    last = x.is_contiguous(memory_format=torch.channels_last)
    return found.contiguous(memory_format=torch.channels_last) if last else found.contiguous()


@dataclass(frozen=True)
class _Dim:
    """Windows along one dimension. size: of the input; before, after: padding."""

    size: int
    kernel: int
    stride: int
    dilation: int
    count: int
    before: int
    after: int

    def window(self, k: int) -> slice:
        """Element k of every window, in the padded input."""
        begin = k * self.dilation
        return slice(begin, begin + (self.count - 1) * self.stride + 1, self.stride)

    def first(self, device: torch.device) -> torch.Tensor:
        """The input at which each window begins."""
        steps = torch.arange(self.count, dtype=torch.int32, device=device)
        return steps * self.stride - self.before

    def _shifts(self, first: int) -> list[int]:
        taps = range(0, self.kernel * self.dilation, self.dilation)
        return [
            (first + self.before - tap) // self.stride
            for tap in taps if (first + self.before - tap) % self.stride == 0
        ]  # fmt: skip

    def _inputs_of_a_phase(self) -> int:
        return -(-self.size // self.stride)

    def margins(self) -> tuple[int, int]:
        """Windows to add before and behind, so that every input lies in as many."""
        shifts = [s for first in range(self.stride) for s in self._shifts(first)]
        behind = self._inputs_of_a_phase() - 1 + max(shifts) - (self.count - 1)
        return max(-min(shifts), 0), max(behind, 0)

    def meeting(self, first: int) -> list[slice]:
        """For inputs first, first + stride, ...: the windows they lie in, margins included."""
        begin = [self.margins()[0] + shift for shift in self._shifts(first)]
        return [slice(b, b + self._inputs_of_a_phase()) for b in begin]

    def inputs(self, first: int, device: torch.device) -> torch.Tensor:
        steps = torch.arange(self._inputs_of_a_phase(), dtype=torch.int32, device=device)
        return steps * self.stride + first


def _dims(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[_Dim] | None:
    """None where the windows are large: then unrolled code would be, too."""
    kernel = full(kernel_size, 2)
    if kernel[0] * kernel[1] > LARGE:
        return None
    strides = full(stride, 2) if len(stride) else kernel
    steps = kernel, strides, full(padding, 2), full(dilation, 2)
    counts = [int(count) for count in outputs(x, *steps, ceil_mode)]
    found = []
    for size, count, k, s, p, d in zip(x.shape[-2:], counts, *steps, strict=True):
        n = int(size)
        after = max((count - 1) * s + d * (k - 1) + 1 - n - p, 0)
        found.append(_Dim(n, k, s, d, count, p, after))
    return found


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
    top, left = full(padding, 2)
    if (top, left) == (0, 0) or ceil_mode or not count_include_pad:
        return NotImplemented
    padded = in_memory(pad(x, (left, left, top, top)))
    return aten.avg_pool2d(padded, kernel_size, stride, 0, False, True, divisor_override)


def mean(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """The mean over all pixels of few, channels last: pixels are added up one after another, all
    channels at once; along a row of the result they lie far apart."""
    if dim is None or x.dim() != 4 or {d % 4 for d in dim} != {2, 3} or dtype is not None:
        return NotImplemented
    pixels = x.shape[2] * x.shape[3]
    last = x.stride(1) == 1 and not x.is_contiguous()
    if not last or not isinstance(pixels, int) or not 1 < pixels <= MOST_PIXELS:
        return NotImplemented
    if x.dtype not in (torch.float32, torch.bfloat16):
        return NotImplemented
    x = in_memory(x)
    rows = [sum(x[:, :, y, k].float() for k in range(x.shape[3])) for y in range(x.shape[2])]
    found = (sum(rows) / pixels).to(x.dtype)
    return found[:, :, None, None] if keepdim else found
