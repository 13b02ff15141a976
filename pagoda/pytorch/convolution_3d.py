"""Convolutions in three dimensions as sums of convolutions in two, one for each kernel plane.

    y[n, o, z] = sum over kz of the convolution of x[n, :, z sz + kz dz - front] and w[:, :, kz]

All planes z of all images are the images of one call. The sum is made in float32, kz = 0 first;
parts of the gradient for x are rounded to its type before. A transposed convolution goes the other
way:

    y[n, o, z sz + kz dz - front] += transposed convolution of x[n, :, z] and w[:, :, kz]
"""

from __future__ import annotations

from collections.abc import Sequence

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
    steps = stride, padding, dilation
    if weight.dim() != 5:
        return flat.convolution(x, weight, bias, *steps, transposed, output_padding, groups)
    if transposed:
        return _transposed(x, weight, bias, *steps, output_padding, groups)
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
    return _as_planes(total.to(x.dtype), planes.count).contiguous()


def _transposed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    output_padding: Ints,
    groups: int,
) -> torch.Tensor:
    strides, paddings, dilations, extra = map(_each, (stride, padding, dilation, output_padding))
    planes, kernel = int(x.shape[2]), int(weight.shape[2])
    reach = (planes - 1) * strides[0] + 1
    count = reach + (kernel - 1) * dilations[0] - 2 * paddings[0] + extra[0]
    steps = strides[1:], paddings[1:], dilations[1:], True, extra[1:], groups
    images = _as_images(x)
    total = None
    for number in range(kernel):
        part = flat.convolution(images, weight[:, :, number], None, *steps, dtype=torch.float32)
        part = _as_planes(part, planes)
        if total is None:
            total = part.new_zeros((*part.shape[:2], count + 2 * paddings[0], *part.shape[3:]))
        where = number * dilations[0], number * dilations[0] + reach, strides[0]
        summed = total[:, :, slice(*where)] + part
        total = total.slice_scatter(summed, 2, *where)
    assert total is not None
    total = total[:, :, paddings[0] : paddings[0] + count]
    if bias is not None:
        total = total + bias.float().view(-1, 1, 1, 1)
    return total.to(x.dtype).contiguous()


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
    steps = stride, padding, dilation
    if weight.dim() != 5:
        rest = transposed, output_padding, groups, output_mask
        return flat.convolution_backward(grad, x, weight, bias_sizes, *steps, *rest)
    if transposed:
        return _transposed_backward(grad, x, weight, *steps, groups, output_mask)
    planes = _Planes(x, weight, stride, padding, dilation, int(grad.shape[2]))
    grad_2d, wanted = _as_images(grad), [*output_mask[:2], False]
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
            summed = for_x[:, :, start:stop:step] + _as_planes(part_x, planes.count).float()
            for_x = for_x.slice_scatter(summed, 2, start, stop, step)
    first = planes.front
    cut = for_x[:, :, first : first + x.shape[2]].to(x.dtype).contiguous()
    return (
        cut if output_mask[0] else None,
        torch.stack(for_weight, 2) if output_mask[1] else None,
        grad.sum([0, 2, 3, 4]) if output_mask[2] else None,
    )


def _transposed_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Of the convolution that leads from grad to x."""
    rest = stride, padding, dilation, False, [0, 0, 0], groups
    for_x = for_weight = None
    if output_mask[0]:
        for_x = convolution(grad, weight, None, *rest)
        for dim in (2, 3, 4):  # output_padding may have made room for more
            for_x = for_x.narrow(dim, 0, x.shape[dim])
        for_x = for_x.contiguous()
    if output_mask[1]:
        _, for_weight, _ = convolution_backward(x, grad, weight, None, *rest, [False, True, False])
    return for_x, for_weight, grad.sum([0, 2, 3, 4]) if output_mask[2] else None


def _each(values: Ints) -> list[int]:
    return [int(v) for v in values] * (3 if len(values) == 1 else 1)


def _as_images(x: torch.Tensor) -> torch.Tensor:
    """[n, c, planes, h, w] as [n * planes, c, h, w]."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_planes(images: torch.Tensor, count: int) -> torch.Tensor:
    """[n * count, c, h, w] as [n, c, count, h, w]."""
    return images.unflatten(0, (-1, count)).transpose(1, 2)


class _Planes:
    """Which planes of x each plane of the kernel meets. count: planes of the result, if not as many
    as there can be."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        count: int | None = None,
    ) -> None:
        strides, paddings, dilations = map(_each, (stride, padding, dilation))
        self.stride, self.front, self.dilation = strides[0], paddings[0], dilations[0]
        self.steps = strides[1:], paddings[1:], dilations[1:]
        self.padded = pad(x, (0, 0, 0, 0, self.front, self.front))
        reach = self.dilation * (int(weight.shape[2]) - 1) + 1
        most = (int(x.shape[2]) + 2 * self.front - reach) // self.stride + 1
        self.count = most if count is None else count

    def where(self, number: int) -> tuple[int, int, int]:
        """start, stop and step in the padded planes."""
        start = number * self.dilation
        return start, start + (self.count - 1) * self.stride + 1, self.stride

    def met_by(self, number: int) -> torch.Tensor:
        """[n * planes, c, h, w]"""
        return _as_images(self.padded[:, :, slice(*self.where(number))])
