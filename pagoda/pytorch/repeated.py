"""`pagoda.compile`: torch.compile for device "pagoda", with repeated layers lowered once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from pagoda.pytorch.device import NAME

# In how many shapes and settings a class of layers may occur; torch's limit of 8 is an error, and a
# ResNet-50 of convolution, norm and activation as one class has 17.
_MOST_KINDS = 1024

_marked: set[type[nn.Module]] = set()


def compile(model: nn.Module, **options: Any) -> Any:
    """`torch.compile(model, backend="pagoda", **options)`; options are those of torch.compile.

    The classes of layers that the model repeats (modules made of others, several of one class in an
    `nn.ModuleList` or `nn.Sequential`) are marked with `torch.compiler.nested_compile_region`: so
    a model of thirty equal layers is traced and lowered about as fast as one of two. Where such
    layers are made of such layers, only one of the two classes is marked; layers with batch norms
    are not, for in training they change their statistics. The mark
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
            layer.forward = torch.compiler.nested_compile_region(
                layer.forward, max_reuse_entries=_MOST_KINDS
            )
    return torch.compile(model, backend=NAME, **options)


def _repeated(model: nn.Module) -> list[type[nn.Module]]:
    """The classes to mark. None of them contains another one, for torch decomposes no operations
    in a nested region of a nested region: of such classes that which saves most is taken."""
    found: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            counts = Counter(type(child) for child in module if list(child.children()))
            for child in module:
                kind = type(child)
                own = not kind.__module__.startswith("torch.nn.")
                if counts[kind] > 1 and own and not _keeps_statistics(child):
                    found.setdefault(kind, []).append(child)
    inside = {kind: {type(part) for layer in layers for part in layer.modules()}
              for kind, layers in found.items()}  # fmt: skip
    chosen: list[type[nn.Module]] = []
    for kind in sorted(found, key=lambda kind: -_saved(found[kind])):
        if not any(kind in inside[other] or other in inside[kind] for other in chosen):
            chosen.append(kind)
    return chosen


def _keeps_statistics(layer: nn.Module) -> bool:
    """Whether training changes buffers of the layer, which torch refuses in nested regions."""
    return any(
        isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats
        for part in layer.modules()
    )


def _saved(layers: list[nn.Module]) -> int:
    """How many modules need no lowering if equal ones of these layers share theirs."""
    kinds = {
        (repr(layer), tuple((name, t.shape, t.dtype) for name, t in layer.state_dict().items())):
        len(list(layer.modules()))
        for layer in layers
    }  # fmt: skip
    return sum(len(list(layer.modules())) for layer in layers) - sum(kinds.values())
