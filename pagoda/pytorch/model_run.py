"""One run of a model file on the chip, with a row of figures for each layer."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pagoda.compiler.errors import ModelFileError, Unsupported
from pagoda.isa.chip import Chip
from pagoda.pytorch import device
from pagoda.pytorch.chip import profile, use_chip
from pagoda.pytorch.layer_work import LayerWork, layer_work
from pagoda.pytorch.model_file import ModelFile
from pagoda.runtime import DeviceFault, OutOfDeviceMemory
from pagoda.runtime.profile import LAUNCH, Layer, Profile

# The largest error that passes, as a share of the largest value: a chain of roundings in bf16, and
# float32 sums in another order.
TOLERANCE = {torch.bfloat16: 0.04, torch.float32: 1e-3}


@dataclass(frozen=True)
class LayerRow:
    """utilisation: the layer's own multiply-adds over what the array can do in these cycles."""

    layer: str
    operation: str
    shape: tuple[int, ...] | None
    cycles: int
    share: float
    macs: int
    utilisation: float
    dram_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Of a result with another one. error: the largest, as a share of the largest value there."""

    other: str
    elements: int
    error: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class ModelRun:
    """outputs: by name, on the CPU."""

    rows: list[LayerRow]
    cycles: int
    launches: int
    macs: int
    dram_bytes: int
    fallbacks: dict[str, int]
    outputs: dict[str, np.ndarray]
    comparisons: list[Comparison]


def run_model(model: ModelFile, chip: Chip, check: bool = False, eager: bool = False) -> ModelRun:
    """Move the model to the chip, run it once, compiled as a whole or operation by operation.

    check: compare with torch on the CPU. Raises Unsupported, DeviceFault, OutOfDeviceMemory, and
    ModelFileError if the model cannot even be called.
    """
    with torch.no_grad():
        try:
            work = layer_work(model.module, model.args, model.kwargs)
            wanted = model.module(*model.args, **model.kwargs) if check else None
        except Exception as error:
            shown = ", ".join(map(_show, [*model.args, *model.kwargs.values()]))
            raise ModelFileError(
                f"{model.path}: the model cannot be called with its inputs ({shown or 'none'}), "
                f"on the CPU either: {type(error).__name__}: {_first_line(error)}; check the "
                "inputs' number, shapes and types"
            ) from error
        use_chip(chip)
        module = model.module.to(device.NAME)
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(device.NAME), (model.args, model.kwargs)
        )
        device.state.fallbacks.clear()
        with profile() as found, _told(model):
            if eager:
                with _layers_named(module, found):
                    result = module(*args, **kwargs)
            else:
                with torch._dynamo.config.patch(allow_rnn=True):
                    result = torch.compile(module, backend=device.NAME)(*args, **kwargs)
        result = pytree.tree_map_only(torch.Tensor, lambda t: t.cpu(), result)
    comparisons = []
    if check:
        comparisons.append(compare("torch on the CPU", result, wanted))
    if model.expected is not None and _same_structure(result, model.expected):
        comparisons.append(compare("the file's expected result", result, model.expected))
    return ModelRun(
        _rows(found, work, chip), found.cycles, found.launches, sum(work.macs.values()),
        sum(layer.dram_bytes for layer in found.layers), dict(device.state.fallbacks),
        _named_outputs(result, model.outputs), comparisons,
    )  # fmt: skip


def compare(other: str, result: Any, wanted: Any) -> Comparison:
    """Compare tensors, also nested ones, element by element."""
    error, elements, tolerance = 0.0, 0, 0.0
    for a, b in zip(_tensors(result), _tensors(wanted), strict=True):
        tolerance = max(tolerance, TOLERANCE.get(a.dtype, 0.0))
        elements += b.numel()
        if not b.numel():
            continue
        a, b = a.double(), b.double()
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        largest = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
        found = float(difference.max()) / (largest or 1.0)
        error = max(error, math.inf if math.isnan(found) else found)
    return Comparison(other, elements, error, tolerance)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _same_structure(result: Any, expected: Any) -> bool:
    shapes = [[tuple(t.shape) for t in _tensors(value)] for value in (result, expected)]
    return shapes[0] == shapes[1] and bool(shapes[0])


def _named_outputs(result: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    tensors = _tensors(result)
    if len(names) != len(tensors):
        names = tuple(f"output{n}" for n in range(len(tensors)))
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).numpy()
        for name, t in zip(names, tensors, strict=True)
    }


@contextmanager
def _layers_named(module: torch.nn.Module, found: Profile) -> Iterator[None]:
    """Tells the profile which module is running."""
    stack: list[str] = []

    def enter(path: str) -> Any:
        def hook(inner: torch.nn.Module, args: Any) -> None:
            stack.append(path)
            found.layer = path

        return hook

    def leave(inner: torch.nn.Module, args: Any, result: Any) -> None:
        stack.pop()
        found.layer = stack[-1] if stack else ""

    handles = []
    for path, inner in module.named_modules():
        handles.append(inner.register_forward_pre_hook(enter(path)))
        handles.append(inner.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(found: Profile, work: LayerWork, chip: Chip) -> list[LayerRow]:
    """In the order of the model. A layer without kernels of its own, as a product whose sum a later
    layer adds, is part of the row that computes it."""
    layers = [layer for layer in found.layers if layer.name != LAUNCH]
    macs = {layer.name: work.macs.get(layer.name, 0) for layer in layers}
    inner: dict[str, list[str]] = {layer.name: [] for layer in layers}
    order = list(work.shapes)  # as they finish
    for path in [path for path, count in work.macs.items() if count and path not in macs]:
        later = order[order.index(path) :] if path in order else []
        owner = next((layer.name for layer in layers if path in layer.fused), None)
        owner = owner or next((name for name in later if name in inner), None)
        if owner is not None:
            macs[owner] += work.macs[path]
            inner[owner].append(path)
    rest = [layer for layer in found.layers if layer.name == LAUNCH]
    return [
        LayerRow(
            layer.name or "(model)",
            _operation(layer, inner.get(layer.name, []), work),
            work.shapes.get(layer.name),
            layer.cycles,
            layer.cycles / max(found.cycles, 1),
            macs.get(layer.name, 0),
            macs.get(layer.name, 0) / (max(layer.cycles, 1) * chip.macs_per_cycle),
            layer.dram_bytes,
        )
        for layer in (*layers, *rest)
    ]


def _operation(layer: Layer, inner: list[str], work: LayerWork) -> str:
    if layer.name == LAUNCH:
        return "code, call lists"
    names = [*inner, *([layer.name] if layer.name else []), *layer.fused]
    named = dict.fromkeys(work.kinds[name] for name in names if name in work.kinds)
    return " + ".join(named) or ", ".join(layer.origins) or "code outside of layers"


_OWN_MESSAGE = (Unsupported, DeviceFault, OutOfDeviceMemory)


@contextmanager
def _told(model: ModelFile) -> Iterator[None]:
    """What the model raises on the device alone as one message, with the line of its file."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _OWN_MESSAGE):
            cause = getattr(cause, "inner_exception", None) or cause.__cause__
        if cause is not None:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).resolve() == model.path.resolve()]
        where = f"{model.path}, line {own[-1].lineno}" if own else str(model.path)
        code = f" at `{own[-1].line}`" if own and own[-1].line else ""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = " ".join(line.strip() for line in lines[:2])
        raise ModelFileError(
            f"{where}: the model runs on the CPU, but fails on the device{code}: {said}"
        ) from error


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
