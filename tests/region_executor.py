"""Runs regions on the host, for tests of the PyTorch storey alone: loop nests by the oracle,
library calls by torch on the CPU."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pagoda.compiler.loop_nest import ITEMSIZE, LoopNest
from pagoda.compiler.loop_nest_oracle import STORAGE, evaluate
from pagoda.compiler.region import KernelCall, Region, TensorArg, View
from pagoda.pytorch.convolution import cells


class HostExecutor:
    """`calls` counts kernels run, by name; `regions` lists the regions seen, each once."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.regions: dict[str, Region] = {}

    def run(
        self,
        region: Region,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> None:
        self.regions[region.key] = region
        memory: dict[int, np.ndarray] = {}
        for entry, arg in zip(region.inputs, inputs, strict=True):
            if isinstance(arg, TensorArg):
                memory[entry.view.buffer] = _bytes(arg)
        for number, arg in zip(region.output_buffers(), outputs, strict=True):
            memory[number] = _bytes(arg)
            memory[number][:] = 0xA5
        for number, buffer in enumerate(region.buffers):
            if buffer.kind == "temporary":
                count = int(buffer.size.evaluate(symbols)) * buffer.itemsize
                memory[number] = np.full(count, 0xA5, np.uint8)
            elif buffer.kind == "constant":
                memory[number] = np.frombuffer(buffer.data, np.uint8).copy()
        for step in region.steps:
            self._step(step, memory, symbols)

    def _step(self, step: KernelCall, memory: dict, symbols: Mapping[str, int]) -> None:
        if isinstance(step.kernel, LoopNest):
            self.calls["nest"] += 1
            flat = [_flat(arg, memory, symbols) for arg in step.args]
            evaluate(step.kernel, flat, [s.evaluate(symbols) for s in step.symbols])
            return
        self.calls[step.kernel.name] += 1
        args = [None if a is None else _tensor(a, memory, symbols) for a in step.args]
        _library(step, *args)


def _library(step: KernelCall, *tensors: torch.Tensor | None) -> None:
    attributes = dict(step.kernel.attributes)
    outs, args = tensors[: step.kernel.outputs], tensors[step.kernel.outputs :]
    match step.kernel.name:
        case "copy":
            results = args
        case "mm" | "bmm":
            results = (torch.matmul(args[0].float(), args[1].float()),)
        case "addmm":
            bias, a, b = (t.float() for t in args)
            results = (torch.addmm(bias, a, b, **attributes),)
        case "sdpa" | "sdpa_training" | "sdpa_backward" as name:
            wide = [t.float() if t is not None and t.is_floating_point() else t for t in args]
            causal = attributes["causal"]
            meaning = [bool(causal), attributes["scale"], causal == "lower right"]
            meaning += [attributes["dropout"]] if name != "sdpa" else []
            results = getattr(torch.ops.pagoda, name)(*wide, *meaning)
            results = (results,) if name == "sdpa" else results
        case "grouped_mm":
            results = (torch.ops.pagoda.grouped_mm(*args, outs[0].dtype),)
        case "convolution" | "convolution_transposed" | "convolution_weight" as name:
            results = (_convolution(name, attributes, outs[0], *args),)
        case name:
            raise AssertionError(name)
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)


def _convolution(name: str, given: dict, out: torch.Tensor, *args) -> torch.Tensor:
    """Only symmetric padding, as in every region before it is built."""
    stride, dilation = ((given[f"{n}_h"], given[f"{n}_w"]) for n in ("stride", "dilation"))
    padding, groups = (given["pad_top"], given["pad_left"]), given["groups"]
    x, w, *bias = (None if t is None else t.float() for t in args)
    if name == "convolution":
        assert not given["transposed"]
        x = x if given["cells"] == 1 else cells(x)
        return torch.nn.functional.conv2d(x, w, *bias, stride, padding, dilation, groups)
    if name == "convolution_weight":
        return torch.nn.grad.conv2d_weight(x, out.shape, w, stride, padding, dilation, groups)
    extra = [
        have - ((count - 1) * s - 2 * p + d * (k - 1) + 1)
        for have, count, s, p, d, k in zip(
            out.shape[2:], x.shape[2:], stride, padding, dilation, w.shape[2:], strict=True
        )
    ]
    return torch.nn.functional.conv_transpose2d(
        x, w, *bias, stride, padding, extra, groups, dilation
    )


def _bytes(arg: TensorArg) -> np.ndarray:
    count = 0
    if all(arg.sizes):
        count = 1 + sum((n - 1) * s for n, s in zip(arg.sizes, arg.strides, strict=True))
    nbytes = count * ITEMSIZE[arg.dtype]
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(arg.pointer), np.uint8)


def _flat(view: View, memory: dict, symbols: Mapping[str, int]) -> np.ndarray:
    start = int(view.offset.evaluate(symbols)) * ITEMSIZE[view.dtype]
    return memory[view.buffer][start:].view(STORAGE[view.dtype])


def _tensor(view: View, memory: dict, symbols: Mapping[str, int]) -> torch.Tensor:
    flat = torch.from_numpy(memory[view.buffer]).view(getattr(torch, view.dtype))
    sizes = [s.evaluate(symbols) for s in view.sizes]
    strides = [s.evaluate(symbols) for s in view.strides]
    return flat.as_strided(sizes, strides, view.offset.evaluate(symbols))
