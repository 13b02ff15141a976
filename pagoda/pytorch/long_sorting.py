"""Sorting of long rows: blocks are sorted by rank, and then two sorted runs become one.

Where an element goes in the merged run is its own place and the number of elements of the other run
that come before it. That is found in two steps: among every `step`-th element of that run, then in
the one block of `step` elements where the boundary lies. With L elements in a run and a step near
their square root a row of n elements takes 2 n sqrt(L) comparisons per merge.

Equal elements keep their order. All keys are int32, ascending.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

from pagoda.pytorch.in_memory import in_memory

BLOCK = 512  # elements sorted by rank
_LAST = (1 << 31) - 1  # key of padding: nothing comes after it


def order(keys: torch.Tensor, ranks: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Places [n rows, n] of the sorted elements. keys [rows, n]; `ranks`: for each element of the
    last dimension its place in the order."""
    count = int(keys.shape[1])
    blocks = _padded(keys, 1, BLOCK).unflatten(1, (-1, BLOCK))
    places = _arange(blocks.shape[1] * BLOCK, keys).view(1, -1, BLOCK).expand(blocks.shape)
    keys, places = _moved(ranks(blocks), blocks, places)
    while keys.shape[1] > 1:
        keys, places = (_padded(t, 1, 2).unflatten(1, (-1, 2)) for t in (keys, places))
        goes = _merged(keys).flatten(2)
        keys, places = _moved(goes, keys.flatten(2), places.flatten(2))
    return places[:, 0, :count]


def best(
    keys: torch.Tensor, count: int, pick: Callable[[torch.Tensor, int], torch.Tensor], most: int
) -> torch.Tensor:
    """Places [rows, count] of the first `count` elements in order. keys [rows, n]; `pick(keys, n)`:
    the places of the first n of the last dimension, which is no longer than `most`."""
    places = _arange(int(keys.shape[1]), keys).expand(keys.shape)
    size = max(BLOCK, 4 * count)
    while keys.shape[1] > most:
        keys = in_memory(_padded(keys, 1, size).unflatten(1, (-1, size)))
        places = in_memory(_padded(places, 1, size).unflatten(1, (-1, size)))
        first = pick(keys, count)
        keys, places = (t.gather(2, first).flatten(1) for t in (keys, places))
    return places.gather(1, pick(keys, count))


def _arange(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, device=like.device, dtype=torch.int32)


def _padded(x: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """With elements that come last, so that the size of `dim` is a multiple."""
    missing = -int(x.shape[dim]) % multiple
    margins = [0, 0] * (x.dim() - 1 - dim) + [0, missing]
    return pad(x, margins, value=_LAST) if missing else x


def _moved(goes: torch.Tensor, *several: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each of these with its elements where `goes` says, in the last dimension."""
    goes = in_memory(goes)
    return tuple(in_memory(torch.zeros_like(x).scatter(-1, goes, x)) for x in several)


def _merged(keys: torch.Tensor) -> torch.Tensor:
    """Where each element goes: keys [rows, groups, 2, L], both runs sorted, to places in what they
    become."""
    rows, groups, _, length = keys.shape
    step = 1 << (length.bit_length() // 2)
    parts = length // step
    # Of equal elements those of the first run come first: for its elements what is less is
    # counted, for the others' what is greater, by complements, and taken from all.
    sign = -torch.arange(2, device=keys.device, dtype=torch.int32)[:, None]
    mine, other = in_memory(keys ^ sign), in_memory(keys.flip(2) ^ sign)

    def before(values: torch.Tensor) -> torch.Tensor:
        less = (values < mine[..., None]).sum(-1, dtype=torch.int32)
        return torch.where(sign < 0, values.shape[-1] - less, less)

    tops = in_memory(other[..., ::step])
    part = in_memory((before(tops[:, :, :, None]) - 1).clamp(min=0))
    run = torch.arange(rows * groups * 2, device=keys.device).view(rows, groups, 2, 1)
    inside = other.view(-1, step)[run * parts + part]
    return torch.arange(length, device=keys.device) + part * step + before(inside)
