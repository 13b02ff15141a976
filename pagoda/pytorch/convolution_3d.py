"""Convolutions in three dimensions as sums of convolutions in two, one for each kernel plane.

    y[n, o, z] = sum over kz of the convolution of x[n, :, z sz + kz dz - front] and w[:, :, kz]

All planes z of all images are the images of one call. The sum is made in float32, kz = 0 first;
parts of the gradient for x are rounded to its type before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from pagoda.pytorch import convolution as flat

Ints = Sequence[int]


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> torch.Tensor:
    """aten.convolution in up to three dimensions."""
    if weight.dim() != 5 or transposed:
        steps = stride, padding, dilation, transposed, output_padding
        return flat.convolution(x, weight, bias, *steps, groups)
    planes = _Planes(x, weight, stride, padding, dilation)
    total = None
    for number in range(weight.shape[2]):
        steps = *planes.steps, False, [0, 0], groups
        part, kernel = planes.met_by(number), weight[:, :, number]
        one = flat.convolution(part, kernel, None, *steps, dtype=torch.float32)
        total = one if total is None else total + one
    assert total is not None
    if bias is not None:
        total = total + bias.float().view(-1, 1, 1)
    return planes.unfolded(total.to(x.dtype)).contiguous()


def convolution_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Ints | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """aten.convolution_backward in up to three dimensions."""
    if weight.dim() != 5 or transposed:
        steps = stride, padding, dilation, transposed, output_padding, groups
        return flat.convolution_backward(grad, x, weight, bias_sizes, *steps, output_mask)
    planes = _Planes(x, weight, stride, padding, dilation)
    grad_2d, wanted = grad.transpose(1, 2).flatten(0, 1), [*output_mask[:2], False]
    for_x = torch.zeros_like(planes.padded, dtype=torch.float32)
    for_weight = []
    for number in range(weight.shape[2]):
        part_x, part_w, _ = flat.convolution_backward(
            grad_2d, planes.met_by(number), weight[:, :, number], None, *planes.steps, False,
            [0, 0], groups, wanted,
        )  # fmt: skip
        for_weight.append(part_w)
        if part_x is not None:
            start, stop, step = planes.where(number)
            summed = for_x[:, :, start:stop:step] + planes.unfolded(part_x).float()
            for_x = for_x.slice_scatter(summed, 2, start, stop, step)
    first = planes.front
    cut = for_x[:, :, first : first + x.shape[2]].to(x.dtype).contiguous()
    return (
        cut if output_mask[0] else None,
        torch.stack(for_weight, 2) if output_mask[1] else None,
        grad.sum([0, 2, 3, 4]) if output_mask[2] else None,
    )


class _Planes:
    """Which planes of x each plane of the kernel meets."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, stride: Ints, padding: Ints, dilation: Ints
    ) -> None:
        strides, paddings, dilations = (
            [int(v) for v in values] * (3 if len(values) == 1 else 1)
            for values in (stride, padding, dilation)
        )
        self.stride, self.front, self.dilation = strides[0], paddings[0], dilations[0]
        self.steps = strides[1:], paddings[1:], dilations[1:]
        self.padded = pad(x, (0, 0, 0, 0, self.front, self.front))
        reach = self.dilation * (int(weight.shape[2]) - 1) + 1
        self.count = (int(x.shape[2]) + 2 * self.front - reach) // self.stride + 1

    def where(self, number: int) -> tuple[int, int, int]:
        """start, stop and step in the padded planes."""
        start = number * self.dilation
        return start, start + (self.count - 1) * self.stride + 1, self.stride

    def met_by(self, number: int) -> torch.Tensor:
        """[n * planes, c, h, w]"""
        start, stop, step = self.where(number)
        return self.padded[:, :, start:stop:step].transpose(1, 2).flatten(0, 1)

    def unfolded(self, result: torch.Tensor) -> Any:
        """[n * planes, ...] as [n, c, planes, h, w]."""
        return result.unflatten(0, (-1, self.count)).transpose(1, 2)
