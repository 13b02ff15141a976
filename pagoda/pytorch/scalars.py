"""Python floats that vary from call to call, such as a learning rate on a schedule.

Dynamo makes a graph's input of such a float: a float64 scalar on the CPU, with what is computed
from it. Here all of that becomes float32 on the device, the call converts the number on its way
(`call.RegionCall`), and one compiled graph serves every value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx_inner
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from pagoda.pytorch.device import NAME


def _is_scalar(value: Any) -> bool:
    """Whether a node's value is a float64 scalar on the CPU."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and value.device.type == "cpu"
        and value.dtype == torch.float64
    )


def compile_inner(
    gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable:
    """Inductor's `compile_fx_inner` of the graph with its scalars on the device. A graph that gives
    such a scalar back is left as it is."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    given = [number for number, node in enumerate(inputs) if _is_scalar(node.meta.get("val"))]
    (output,) = gm.graph.find_nodes(op="output")
    returned = any(_is_scalar(node.meta.get("val")) for node in output.all_input_nodes)
    if not given or returned:
        return compile_fx_inner(gm, example_inputs, **options)
    moved = list(example_inputs)
    for number in given:
        moved[number] = moved[number].to(NAME, torch.float32)
        inputs[number].meta["val"] = moved[number]
    for node in gm.graph.nodes:
        if node.op != "call_function" or not _is_scalar(node.meta.get("val")):
            continue
        node.args = tuple(torch.float32 if a is torch.float64 else a for a in node.args)
        changes = {"dtype": torch.float32, "device": torch.device(NAME, 0)}
        node.kwargs = {name: changes.get(name, value) for name, value in node.kwargs.items()}
    FakeTensorProp(gm, moved[given[0]].fake_mode).propagate_dont_convert_inputs(*moved)
    return compile_fx_inner(gm, moved, **options)
