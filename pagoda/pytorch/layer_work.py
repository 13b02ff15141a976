"""What each layer of a module has to do: multiply-adds and result shapes, without running it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from pagoda.pytorch.shape_mode import shapes_only


@dataclass
class LayerWork:
    """By path of the module. macs: its own multiply-adds, without those of modules inside; kinds:
    what it is; shapes: of its last result."""

    macs: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def layer_work(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> LayerWork:
    """Count on shapes alone; a model whose forward looks at values is run once on the CPU."""
    try:
        return _counted(module, args, kwargs, fake=True)
    except Exception:  # noqa: BLE001 - whatever a forward that looks at values raises
        return _counted(module, args, kwargs, fake=False)


def _counted(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], fake: bool
) -> LayerWork:
    found = LayerWork()
    for path, inner in module.named_modules():
        found.kinds[path] = getattr(inner, "kind", type(inner).__name__)
    counter = FlopCounterMode(display=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _results(module, found), _plain_operations(), torch.no_grad():
        if fake:
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, mode.from_tensor, (tuple(args), dict(kwargs))
            )
        with shapes_only(mode) if fake else nullcontext(), counter:
            module(*args, **kwargs)
    totals = {
        _path(name): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items() if name != "Global"
    }  # fmt: skip
    for path, total in totals.items():
        inner = [p for p in totals if p != path and _inside(p, path)]
        direct = [p for p in inner if not any(_inside(p, q) for q in inner if q != p)]
        found.macs[path] = total - sum(totals[p] for p in direct)
    return found


@contextmanager
def _plain_operations() -> Iterator[None]:
    """Without oneDNN, whose recurrent layers the counter does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of GPUs when this is set
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _path(name: str) -> str:
    """The counter names modules from the root's class on."""
    return name.partition(".")[2]


def _inside(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


@contextmanager
def _results(module: torch.nn.Module, found: LayerWork) -> Iterator[None]:
    """Notes the shape of every module's result."""

    def noted(path: str) -> Any:
        def hook(inner: torch.nn.Module, args: Any, result: Any) -> None:
            tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            if tensors:
                found.shapes[path] = tuple(tensors[0].shape)

        return hook

    handles = [m.register_forward_hook(noted(path)) for path, m in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
