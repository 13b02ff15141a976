"""Tensors of the CPU in compiled code: numbers and constants are taken over, others refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import lowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError

from pagoda.pytorch import mixing

aten = torch.ops.aten


def require_one_device(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Raises RuntimeError if the model or one of its inputs is on the CPU."""
    places = [_source(node) for node in gm.graph.nodes if node.op == "placeholder"]
    named = dict(zip(places, example_inputs, strict=False))
    named |= {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    tensors = {n: t for n, t in named.items() if isinstance(t, torch.Tensor) and t.dim()}
    on_cpu = [name for name, tensor in tensors.items() if tensor.device.type == "cpu"]
    if not on_cpu:
        return
    if len(on_cpu) == len(tensors):
        what = (
            'the model or its inputs are on the CPU. Call model.to("pagoda") first, and move the '
            'inputs with .to("pagoda").'
        )
    else:
        shown = [f"{name} of shape {tuple(tensors[name].shape)}" for name in on_cpu[:3]]
        more = f" (and {len(on_cpu) - 3} more)" if len(on_cpu) > 3 else ""
        what = (
            f'these tensors are on the CPU: {", ".join(shown)}{more}. Move them with .to("pagoda").'
        )
    raise RuntimeError(
        f'torch.compile(..., backend="pagoda") compiles for device "pagoda", but {what}'
    )


def _source(node: torch.fx.Node) -> str:
    """What an argument of a graph is called where it comes from, as `self.norm.weight`."""
    given = node.meta.get("grapharg")
    name = node.name if given is None else given.source.name
    name = re.sub(r"^[LG]\['(\w+)'\]", r"\1", name)
    return re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", name)


def bring_over(graph: torch.fx.Graph) -> None:
    """Constants of the CPU become constants of this device, and a number that is moved here is read
    where it is: a region takes numbers from the CPU.

    What the graph returns on the CPU stays there, and is refused later.
    """
    (output,) = graph.find_nodes(op="output")
    if any(_on_cpu(node) for node in output.all_input_nodes):
        return
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(graph.owning_module, node.target)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim():
            setattr(graph.owning_module, node.target, value.to(mixing.NAME))
    for node in graph.find_nodes(op="call_function", target=torch.ops.prims.device_put.default):
        source = node.args[0]
        if _on_cpu(source) and not source.meta["val"].dim():
            made = {"dtype": torch.bool, "device": node.meta["val"].device}
            with graph.inserting_before(node):
                here = graph.call_function(aten.full.default, ([], True), made)
                read = graph.call_function(aten.where.self, (here, source, source))
            read.meta["val"] = node.meta["val"]
            here.meta["val"] = read.meta["val"].new_empty([], dtype=torch.bool)
            node.replace_all_uses_with(read)
            graph.erase_node(node)


def _on_cpu(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _common_device(op: Any, flat_args: Sequence[Any]) -> Any:
    try:
        return _TORCHS(op, flat_args)
    except FakeTensorDeviceMismatchError as error:
        tensors = [a for a in flat_args if isinstance(a, torch.Tensor)]
        elsewhere = [k for k, t in enumerate(tensors) if mixing.is_elsewhere(t)]
        if elsewhere and any(t.device.type == mixing.NAME for t in tensors):
            position = elsewhere[0]
            error.args = (mixing.message(op, _name(op, tensors, position), tensors[position]),)
        raise


def _name(op: Any, tensors: list[torch.Tensor], position: int) -> str:
    """Of one of all tensors among an operation's arguments, as far as they tell."""
    names, several = mixing.tensor_arguments(op), mixing.lists(op)
    if not names and len(several) == 1:
        return f"{several[0]}[{position}]"
    return names[position] if len(names) == len(tensors) and not several else ""


def _decides(kind: str) -> bool:
    """Whether a device of this kind computes what numbers on the CPU are used in."""
    return kind == mixing.NAME or _is_gpu(kind)


_TORCHS, _is_gpu = FakeTensor._find_common_device, lowering.is_gpu


def mend() -> None:
    """Makes torch say more of tensors on several devices while it compiles, and Inductor compute
    here what begins with a number on the CPU."""
    FakeTensor._find_common_device = staticmethod(_common_device)
    lowering.is_gpu = _decides
