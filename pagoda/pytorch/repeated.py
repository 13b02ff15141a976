"""`pagoda.compile`: torch.compile for device "pagoda", with repeated layers lowered once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from pagoda.pytorch.device import NAME

_marked: set[type[nn.Module]] = set()


def compile(model: nn.Module, **options: Any) -> Any:
    """`torch.compile(model, backend="pagoda", **options)`; options are those of torch.compile.

    The classes of layers that the model repeats (modules made of others, several of one class in an
    `nn.ModuleList` or `nn.Sequential`) are marked with `torch.compiler.nested_compile_region`: so
    a model of thirty equal layers is traced and lowered about as fast as one of two. The mark
    changes nothing outside of torch.compile; torch's own classes are left alone. Raises ValueError
    for `dynamic=True`, which fails in torch 2.13 where layers are repeated.
    """
    if options.get("dynamic"):
        raise ValueError(
            "pagoda.compile: dynamic=True cannot be combined with layers that are lowered once; "
            "mark the dimensions that vary with torch._dynamo.mark_dynamic, or use "
            'torch.compile(model, backend="pagoda", dynamic=True)'
        )
    for layer in _repeated(model):
        if layer not in _marked:
            _marked.add(layer)
            layer.forward = torch.compiler.nested_compile_region(layer.forward)
    return torch.compile(model, backend=NAME, **options)


def _repeated(model: nn.Module) -> list[type[nn.Module]]:
    found: dict[type[nn.Module], None] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            counts = Counter(type(child) for child in module if list(child.children()))
            found |= {kind: None for kind, count in counts.items() if count > 1}
    return [kind for kind in found if not kind.__module__.startswith("torch.nn.")]
