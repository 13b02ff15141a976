"""Operators that move elements: shapes, slices, padding, indices, resizing."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pagoda.pytorch.onnx_import.operators import operator, require
from pagoda.pytorch.onnx_import.types import type_of


@operator("Shape")
def shape(x, *, start=0, end=None):
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64, device=x.device)


@operator("Size")
def size(x):
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


@operator("Reshape", constants={1: "shape"})
def reshape(x, *, shape, allowzero=0):
    if not allowzero:
        shape = [x.shape[d] if n == 0 else n for d, n in enumerate(shape)]
    return x.reshape(shape)


@operator("Flatten")
def flatten(x, *, axis=1):
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    rows = 1
    for n in x.shape[:axis]:
        rows *= n
    return x.reshape(rows, -1)


@operator("Transpose")
def transpose(x, *, perm=None):
    return x.permute(perm if perm is not None else list(reversed(range(x.dim()))))


@operator("Squeeze", constants={1: "axes"})
def squeeze(x, *, axes=None):
    return x.squeeze() if axes is None else x.squeeze([axis % x.dim() for axis in axes])


@operator("Unsqueeze", constants={1: "axes"})
def unsqueeze(x, *, axes):
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(*tensors, axis):
    return torch.cat(tensors, axis)


@operator("Split", constants={1: "split"})
def split(x, *, axis=0, split=None, num_outputs=None, outputs=1):
    if split is None:
        length, parts = x.shape[axis], num_outputs or outputs
        each = -(-length // parts)
        split = [each] * (parts - 1) + [length - each * (parts - 1)]
    return torch.split(x, split, axis)


@operator("Slice", constants={1: "starts", 2: "ends", 3: "axes", 4: "steps"})
def slices(x, *, starts, ends, axes=None, steps=None):
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis, length = axis % x.dim(), x.shape[axis]
        start, end = _inside(start, length, step), _inside(end, length, step)
        if step < 0:  # the same elements, counted from the other side
            x = x.flip(axis)
            start, end, step = length - 1 - start, length - 1 - end, -step
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, max(start, end), step)
        x = x[tuple(index)]
    return x


def _inside(position: int, length: int, step: int) -> int:
    """A start or end of a slice as a position in the axis, or just outside, as in Python."""
    position = position + length if position < 0 else position
    low, high = (-1, length - 1) if step < 0 else (0, length)
    return min(max(position, low), high)


@operator("Expand", constants={1: "shape"})
def expand(x, *, shape):
    return x.expand(torch.broadcast_shapes(x.shape, shape))


@operator("Tile", constants={1: "repeats"})
def tile(x, *, repeats):
    return x.repeat(repeats)


@operator("Pad", constants={1: "pads", 2: "value", 3: "axes"})
def pad(x, *, mode="constant", pads, value=None, axes=None):
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    after = dict(zip(axes, pads[len(axes) :], strict=True))
    if mode == "constant":
        sides = [(before.get(d, 0), after.get(d, 0)) for d in reversed(range(x.dim()))]
        return F.pad(x, [n for side in sides for n in side], value=value or 0)
    for axis in axes:
        length = x.shape[axis]
        wanted = range(-before[axis], length + after[axis])
        if mode == "edge":
            index = [max(0, min(n, length - 1)) for n in wanted]
        elif mode == "wrap":
            index = [n % length for n in wanted]
        else:  # reflect
            period = max(2 * (length - 1), 1)
            index = [min(n % period, period - n % period) for n in wanted]
        x = x.index_select(axis, torch.tensor(index, device=x.device))
    return x


@operator("DepthToSpace")
def depth_to_space(x, *, blocksize, mode="DCR"):
    n, c, h, w = x.shape
    b, each = blocksize, c // blocksize**2
    if mode == "DCR":
        x = x.reshape(n, b, b, each, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, each, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, each, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x, *, blocksize, mode="DCR"):
    n, c, h, w = x.shape
    b = blocksize
    x = x.reshape(n, c, h // b, b, w // b, b)
    x = x.permute((0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return x.reshape(n, c * b * b, h // b, w // b)


@operator("ConstantOfShape", constants={0: "shape"})
def constant_of_shape(*, shape, value=None):
    if value is None:
        return torch.zeros(shape)
    return value.reshape(()).expand(shape).contiguous()


@operator("Range", constants={0: "start", 1: "limit", 2: "delta"})
def arange(*, start, limit, delta, types=()):
    return torch.arange(start, limit, delta, dtype=types[0])


@operator("EyeLike")
def eye_like(x, *, dtype=None, k=0):
    rows, cols = x.shape
    kind = x.dtype if dtype is None else type_of(dtype)
    i = torch.arange(rows, device=x.device).unsqueeze(1)
    return (torch.arange(cols, device=x.device) - i == k).to(kind)


@operator("Trilu", constants={1: "k"})
def trilu(x, *, k=None, upper=1):
    return (torch.triu if upper else torch.tril)(x, k or 0)


@operator("OneHot", constants={1: "depth"})
def one_hot(indices, values, *, depth, axis=-1):
    depth = depth if isinstance(depth, (int, float)) else depth[0]
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    view = [1] * (indices.dim() + 1)
    view[axis] = int(depth)
    places = torch.arange(int(depth), device=indices.device).reshape(view)
    indices = _wrapped(indices, int(depth)).unsqueeze(axis)
    return torch.where(indices == places, values[1], values[0])


# Indices -----------------------------------------------------------------------------------------


def _wrapped(indices: torch.Tensor, length: int) -> torch.Tensor:
    """Negative indices count from the end."""
    return torch.where(indices < 0, indices + length, indices).long()


@operator("Gather", numbers=(1,))
def gather(x, indices, *, axis=0):
    axis = axis % x.dim()
    if isinstance(indices, int):
        return x.select(axis, indices)
    picked = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def gather_elements(x, indices, *, axis=0):
    return x.gather(axis, _wrapped(indices, x.shape[axis]))


@operator("GatherND")
def gather_nd(x, indices, *, batch_dims=0):
    depth = indices.shape[-1]
    batch = [
        torch.arange(x.shape[d], device=x.device).reshape(
            [-1 if k == d else 1 for k in range(indices.dim() - 1)]
        )
        for d in range(batch_dims)
    ]
    named = [_wrapped(indices[..., k], x.shape[batch_dims + k]) for k in range(depth)]
    return x[tuple(batch + named)]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(x, indices, updates, *, axis=0, reduction="none"):
    indices = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction], include_self=True)


@operator("ScatterND")
def scatter_nd(x, indices, updates, *, reduction="none"):
    depth = indices.shape[-1]
    lead, rest = x.shape[:depth], x.shape[depth:]
    flat = torch.zeros((), dtype=torch.int64, device=x.device)
    for k in range(depth):
        flat = flat * lead[k] + _wrapped(indices[..., k], lead[k])
    rows = x.reshape(-1, *rest)
    new = updates.reshape(-1, *rest)
    flat = flat.reshape(-1)
    if reduction == "none":
        return rows.index_put((flat,), new).reshape(x.shape)
    index = flat.reshape(-1, *[1] * len(rest)).expand(new.shape)
    made = rows.scatter_reduce(0, index, new, _REDUCTIONS[reduction], include_self=True)
    return made.reshape(x.shape)


@operator("ReverseSequence")
def reverse_sequence(x, lengths, *, batch_axis=1, time_axis=0):
    time = torch.arange(x.shape[time_axis], device=x.device)
    lengths = lengths.reshape(-1, 1)
    index = torch.where(time < lengths, lengths - 1 - time, time)  # [batch, time]
    index = index if batch_axis == 0 else index.t()
    return x.gather(time_axis, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape))


@operator("TopK", constants={1: "k"})
def top_k(x, *, k, axis=-1, largest=1, sorted=1):
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = k if isinstance(k, int) else k[0]
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@operator("Compress", constants={1: "condition"})
def compress(x, *, condition, axis=None):
    index = torch.tensor([n for n, keep in enumerate(condition) if keep], device=x.device)
    return (x.reshape(-1) if axis is None else x).index_select(axis or 0, index)


@operator("NonZero", "Unique", "NonMaxSuppression")
def of_unknown_size(*inputs, **attributes):
    require(False, "the size of its result depends on data, which a graph for the chip cannot have",
            "export the model without it, and do this step in Python")  # fmt: skip
