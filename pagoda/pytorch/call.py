"""Calling a region with torch tensors: addresses in, new tensors out."""

from __future__ import annotations

import base64
import pickle
import zlib
from collections.abc import Callable
from typing import Any

import torch

from pagoda.compiler.index_expr import Expr
from pagoda.compiler.region import Region, TensorArg, View
from pagoda.pytorch import device, streams
from pagoda.pytorch.symbolic import dtype_name, torch_dtype

compiled: list[Region] = []  # regions loaded in this process, for inspection


class RegionCall:
    """A region as a function from a list of arguments to a list of results."""

    _boxed_call = True

    def __init__(self, region: Region) -> None:
        self.region = region

    def __call__(self, args: list[Any]) -> list[Any]:
        region = self.region
        tensors = [_on_device(a) if isinstance(a, torch.Tensor) else a for a in args]
        args.clear()
        for count in region.seeds:  # from the host's generator, so that torch.manual_seed counts
            tensors.append(torch.randint(1 << 31, (count,)).to(device.NAME))
        passed = [_describe(t) if isinstance(t, torch.Tensor) else t for t in tensors]
        symbols = region.read_symbols(passed)
        made: dict[int, torch.Tensor] = {}
        for number in region.output_buffers():
            buffer = region.buffers[number]
            count = int(buffer.size.evaluate(symbols))
            made[number] = device.empty_strided((count,), (1,), dtype=torch_dtype(buffer.dtype))
        results = [_describe(t) for t in made.values()]
        streams.run(
            device.executor(), region, passed, results, symbols, tensors, made.values()
        )
        inputs = {
            entry.view.buffer: tensor
            for entry, tensor in zip(region.inputs, tensors, strict=True)
            if isinstance(tensor, torch.Tensor)
        }
        return [_result(out, made, inputs, symbols) for out in region.outputs]


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Scalars on the CPU are allowed beside device tensors; they are copied over."""
    if tensor.device.type == device.NAME:
        return tensor
    return tensor.to(device.NAME, torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)


def _describe(tensor: torch.Tensor) -> TensorArg:
    return TensorArg(
        tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype_name(tensor.dtype)
    )


def _result(
    out: View | Expr | None,
    made: dict[int, torch.Tensor],
    inputs: dict[int, torch.Tensor],
    symbols: dict[str, int],
) -> Any:
    if out is None:
        return None
    if isinstance(out, Expr):
        return out.evaluate(symbols)
    sizes = [s.evaluate(symbols) for s in out.sizes]
    strides = [s.evaluate(symbols) for s in out.strides]
    offset = out.offset.evaluate(symbols)
    if out.buffer in made:
        return made[out.buffer].as_strided(sizes, strides, offset)
    base = inputs[out.buffer]
    return base.as_strided(sizes, strides, base.storage_offset() + offset)


def load_region(payload: str) -> Callable[[list[Any]], list[Any]]:
    """The call of a region pickled, compressed and base-85 encoded; see `wrapper`."""
    region: Region = pickle.loads(zlib.decompress(base64.b85decode(payload)))
    compiled.append(region)
    return RegionCall(region)
