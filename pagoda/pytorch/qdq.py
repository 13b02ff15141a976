"""Quantised graphs as torch.export and torchao write them, on the int8 array.

    dequantize(x) -> convolution or linear(., dequantize(w)) becomes the int8 operation of `int8`

with the bias as its offset; and if nothing but a quantize to int8 with one scale reads the result,
perhaps through a ReLU, that too: the ReLU is a bound then, none if the zero point is -128. Anything
else that follows is fused into the kernel like any pointwise operation. x int8 or uint8 with any
zero point, one scale; w int8 with a scale for all or per output channel, symmetric. What is
quantised to uint8 and only dequantised again, as ONNX's tools write it, is int8 with a zero point
128 lower: the same values, which the array takes as they are.

The sums are exact, where the graph as it is written would multiply dequantised floats and round
each step; the zero point of a result is added before it is rounded. So values near the middle of
two steps may go to the other one. Anything else is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from pagoda.pytorch.int8 import INT8_MIN

_PER_TENSOR = "quantized_decomposed.dequantize_per_tensor"
_PER_CHANNEL = "quantized_decomposed.dequantize_per_channel"
_QUANTIZE = "quantized_decomposed.quantize_per_tensor"
_RELUS = ("relu", "aten.relu", "relu_", "aten.relu_")
_Quantised = tuple[float, int, int, int]
"""Of an int8 result: scale, zero point, bounds."""


def dequantised_convolution(
    x: torch.Tensor,
    x_scale: Any,
    x_zero_point: int,
    w: torch.Tensor,
    w_scale: Any,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    quantised: _Quantised | None = None,
) -> torch.Tensor:
    """conv2d of (x - x_zero_point) x_scale and w w_scale, + bias, in float32 or quantised to int8.
    x int8 or uint8, [n, c, h, w]; w int8; w_scale a number or one per output channel."""
    x, zero_point = _signed(x, x_zero_point)
    steps = (_pair(stride), _pair(padding), _pair(dilation), groups)
    scale = _scales(w, x_scale, w_scale)
    scale, offset, *end = _end(scale, _offset(w, scale, bias, zero_point), quantised)
    return torch.ops.pagoda.convolution_int8(x, w, scale, offset, *steps, zero_point, *end)


def dequantised_linear(
    x: torch.Tensor,
    x_scale: Any,
    x_zero_point: Any,
    w: torch.Tensor,
    w_scale: Any,
    bias: torch.Tensor | None = None,
    *,
    quantised: _Quantised | None = None,
) -> torch.Tensor:
    """linear of (x - x_zero_point) x_scale and w w_scale, + bias, in float32 or quantised to int8.
    x int8 or uint8 [..., k]; w int8 [o, k]; scale and zero point of x may be tensors, found as the
    model runs."""
    x, zero_point = _signed(x, x_zero_point)
    scale = _scales(w, x_scale, w_scale)
    scale, offset, *end = _end(scale, _offset(w, scale, bias, zero_point), quantised)
    return torch.ops.pagoda.linear_int8(x, w, scale, offset, *end)


def _signed(x: torch.Tensor, zero_point: Any) -> tuple[torch.Tensor, Any]:
    if x.dtype == torch.uint8:
        return (x.to(torch.int32) + INT8_MIN).to(torch.int8), zero_point + INT8_MIN
    return x, zero_point


def _scales(w: torch.Tensor, x_scale: Any, w_scale: Any) -> torch.Tensor:
    ones = torch.ones(w.shape[0], dtype=torch.float32, device=w.device)
    return ones * x_scale * w_scale


def _offset(
    w: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, zero_point: Any
) -> torch.Tensor | None:
    """The bias, less what a zero point of x adds to each result. In float32: the sums are exact,
    and zero points may be found as the model runs."""
    offset = None if bias is None else bias.float()
    if not isinstance(zero_point, torch.Tensor) and zero_point == 0:
        return offset
    sums = w.flatten(1).sum(1, dtype=torch.int32) * zero_point
    excess = sums.to(torch.float32) * scale
    return -excess if offset is None else offset - excess


def _end(
    scale: torch.Tensor, offset: torch.Tensor | None, quantised: _Quantised | None
) -> tuple[Any, ...]:
    """Scale, offset, type and bounds of a result."""
    if quantised is None:
        return scale, offset, torch.float32
    step, zero_point, low, high = quantised
    offset = None if offset is None else offset / step
    if zero_point:
        offset = torch.full_like(scale, zero_point) if offset is None else offset + zero_point
    return scale / step, offset, torch.int8, low, high


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value] * (2 // len(value))


_LAYERS: dict[str, Callable] = {
    "aten.conv2d": dequantised_convolution,
    "conv2d": dequantised_convolution,
    "aten.linear": dequantised_linear,
    "linear": dequantised_linear,
}


def use_int8(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Rewrites the graph in place; see the module. example_inputs: its arguments, of which zero
    points of weights are looked at."""
    places = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = dict(zip(places, example_inputs, strict=False))
    changed = _make_signed(gm.graph)
    for node in list(gm.graph.nodes):
        made = _LAYERS.get(_name(node))
        if made is None or len(node.args) < 2:
            continue
        x, w = _dequantised(node.args[0]), _dequantised(node.args[1])
        if x is None or w is None or not _symmetric(gm, values, node.args[1]):
            continue
        if made is dequantised_convolution and not isinstance(x[2], int):
            continue
        if any(isinstance(a, str) for a in (*node.args, *node.kwargs.values())):
            continue  # padding "same"
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(made, (*x, *w[:2], *node.args[2:]), dict(node.kwargs))
            new.meta.update(node.meta)  # which says what layer and line it is of
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        _quantise(gm.graph, new)
        changed = True
    if changed:
        gm.graph.eliminate_dead_code()
        gm.recompile()


def _make_signed(graph: fx.Graph) -> bool:
    """Tensors that are uint8 only between a quantize and its dequantizes made int8."""
    changed = False
    for node in graph.nodes:
        if _name(node) != _QUANTIZE or not _is_uint8_of_constants(node):
            continue
        readers = list(node.users)
        if not all(_name(r) == _PER_TENSOR and _is_uint8_of_constants(r) for r in readers):
            continue
        for pair in (node, *readers):
            x, scale, *whole, _ = pair.args
            pair.args = (x, scale, *(number + INT8_MIN for number in whole), torch.int8)
        for key in ("example_value", "val"):
            if key in node.meta:
                node.meta[key] = node.meta[key].to(torch.int8)
        changed = True
    return changed


def _is_uint8_of_constants(node: fx.Node) -> bool:
    """Whether it is uint8 with a zero point and bounds known before the model runs."""
    if len(node.args) != 6 or node.args[5] != torch.uint8:
        return False
    return all(isinstance(number, int) for number in node.args[2:5])


def _quantise(graph: fx.Graph, layer: fx.Node) -> None:
    """Make the quantize that alone reads a layer's result, or the ReLU of it, the layer's own."""
    user = _only_user(layer)
    relu = user if _name(user) in _RELUS and len(user.args) == 1 else None
    quantize = user if relu is None else _only_user(relu)
    if _name(quantize) != _QUANTIZE or quantize.kwargs or quantize.args[5] != torch.int8:
        return
    _, scale, zero_point, low, high, _ = quantize.args
    if not all(isinstance(number, (int, float)) for number in (scale, zero_point, low, high)):
        return
    if relu is not None:
        low = max(low, zero_point)
    layer.kwargs = {**layer.kwargs, "quantised": (scale, zero_point, low, high)}
    values = {key: quantize.meta[key] for key in ("example_value", "val") if key in quantize.meta}
    layer.meta.update(values)
    quantize.replace_all_uses_with(layer)
    graph.erase_node(quantize)
    if relu is not None:
        graph.erase_node(relu)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _name(node: Any) -> str:
    """The operation without its overload, as "aten.conv2d"; those of torch.nn.functional bare."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return str(node.target)
    return getattr(node.target, "__name__", "")


def _dequantised(node: Any) -> tuple[Any, Any, Any] | None:
    """(values, scale, zero point) of a tensor dequantised to float32; per channel only along the
    first."""
    name = _name(node)
    if name in (_PER_TENSOR, _PER_CHANNEL) and node.kwargs.get("out_dtype") is not None:
        return None
    if name == _PER_TENSOR and node.args[5] in (torch.int8, torch.uint8):
        return node.args[:3]
    if name == _PER_CHANNEL and node.args[3] == 0 and node.args[6] == torch.int8:
        return node.args[:3]
    return None


def _symmetric(gm: fx.GraphModule, values: dict[fx.Node, Any], node: fx.Node) -> bool:
    """Whether the weight is int8 without a zero point."""
    dtype = node.args[5 if _name(node) == _PER_TENSOR else 6]
    zero_point = node.args[2]
    if isinstance(zero_point, fx.Node) and zero_point.op == "get_attr":
        zero_point = _attribute(gm, zero_point.target)
    elif isinstance(zero_point, fx.Node):
        zero_point = values.get(zero_point)
    if isinstance(zero_point, torch.Tensor):
        fake = isinstance(zero_point, torch._subclasses.FakeTensor)
        return dtype == torch.int8 and not fake and not bool(zero_point.cpu().any())
    return dtype == torch.int8 and zero_point in (0, None)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for name in path.split("."):
        found = getattr(found, name)
    return found
