"""`pagoda.quantize`: a PyTorch model's linear layers and convolutions in int8.

    quantised = pagoda.quantize(model, batches)            # static: ranges from calibration
    quantised = pagoda.quantize(model, dynamic=True)       # linear layers, ranges as they come

Weights have a scale per output channel, the largest magnitude / 127; activations one per tensor,
with zero point 0, or -128 behind a ReLU where no convolution pads. The copy runs eagerly and
compiled, on the CPU too, with the same int8 values: those of `pagoda.pytorch.int8`.

A model that torch.fx can trace is quantised as a graph. Batch norms are folded into convolutions.
A tensor that feeds a quantised layer is made int8 where it arises, once; residual additions add
int8 values, of one scale all along the residual stream. So all that follows a layer's sums (bias,
addition, activation, rounding) is the end of its kernel. Any other model is quantised layer by
layer: each makes its input int8 and gives floats.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pagoda.pytorch.int8 import INT8_MAX, INT8_MIN, offset_for

_CARRIERS = (nn.MaxPool2d, nn.Identity, nn.Dropout, nn.Flatten)
_CARRYING = (torch.flatten,)
_CARRYING_METHODS = ("flatten", "reshape", "view")
_RELUS = (torch.relu, F.relu, F.relu6)
_ADDITIONS = (operator.add, operator.iadd, torch.add)


def quantize_tensor(
    x: torch.Tensor, scale: float | torch.Tensor, zero_point: int = 0
) -> torch.Tensor:
    """int8: clamp(round(x * (1 / scale) + zero_point), -128, 127); to nearest, ties to even."""
    q = x.float() * (1 / scale)
    q = q + zero_point if zero_point else q
    return torch.clamp(torch.round(q), INT8_MIN, INT8_MAX).to(torch.int8)


def dequantize_tensor(q: torch.Tensor, scale: float, zero_point: int = 0) -> torch.Tensor:
    """float32: (q - zero_point) scale."""
    return (q.float() - zero_point if zero_point else q.float()) * scale


def add_and_quantize(y: torch.Tensor, other: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """int8: clamp(round(y + other), low, high) of float y and int8 other; ties to even."""
    return torch.clamp(torch.round(y + other.float()), low, high).to(torch.int8)


def _scale(magnitude: float, steps: int = INT8_MAX) -> float:
    return magnitude / steps if magnitude > 0 else 1.0


class _Layer(nn.Module):
    """Weight, scale and offset of a quantised layer, and what it gives (`end`): floats, or int8
    values. Made on the CPU, where there is float64."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, input_scale: float, input_zero_point: int):
        super().__init__()
        weight = layer.weight.detach().cpu().float()
        magnitudes = weight.abs().flatten(1).amax(1)
        scales = torch.where(magnitudes > 0, magnitudes / INT8_MAX, 1.0)
        each = scales.view(-1, *[1] * (weight.dim() - 1))
        q = torch.clamp(torch.round(weight / each), INT8_MIN, INT8_MAX).to(torch.int8)
        if q.dim() == 4:
            q = q.contiguous(memory_format=torch.channels_last)
        bias = None if layer.bias is None else layer.bias.detach().cpu().double()
        self.register_buffer("weight", q)
        self.input_scale, self.input_zero_point = input_scale, input_zero_point
        self._sums, self._bias = scales * input_scale, bias
        self.give(layer.weight.dtype, 1.0)

    def give(
        self, dtype: torch.dtype, scale: float, shift: int = 0, low: int = INT8_MIN,
        high: int = INT8_MAX,
    ) -> None:  # fmt: skip
        """Results in units of `scale`, with `shift` units added; low, high: of int8 ones."""
        sums, bias = self._sums / scale, None if self._bias is None else self._bias / scale
        offset = offset_for(self.weight, sums, bias, self.input_zero_point, shift)
        self.register_buffer("scale", sums)
        self.register_buffer("offset", None if offset is None else offset.float())
        self.end: tuple[Any, ...] = (dtype, low, high)

    def quantised(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.int8:
            return x
        return quantize_tensor(x, self.input_scale, self.input_zero_point)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, {self.end[0]}"


class QuantizedLinear(_Layer):
    """`nn.Linear` on int8 values: x int8, or floats that become int8 by `input_scale`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.pagoda.linear_int8(
            self.quantised(x), self.weight, self.scale, self.offset, *self.end
        )


class QuantizedConv2d(_Layer):
    """`nn.Conv2d` on int8 values: x int8, or floats that become int8 by `input_scale`."""

    def __init__(self, layer: nn.Conv2d, input_scale: float, input_zero_point: int):
        super().__init__(layer, input_scale, input_zero_point)
        self.stride, self.padding = list(layer.stride), list(layer.padding)
        self.dilation, self.groups = list(layer.dilation), layer.groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.stride, self.padding, self.dilation, self.groups
        return torch.ops.pagoda.convolution_int8(
            self.quantised(x), self.weight, self.scale, self.offset, *steps,
            self.input_zero_point, *self.end,
        )


class QuantizedMaxPool2d(nn.Module):
    """`nn.MaxPool2d` of int8 values, which torch's kernel for the CPU does not take."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x) if x.device.type != "cpu" else self.pool(x.float()).to(x.dtype)


class DynamicQuantizedLinear(_Layer):
    """`nn.Linear` on int8 values whose scale is that of each input: its largest magnitude / 127."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer, 1.0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        magnitude = x.abs().amax().float()
        scale = torch.where(magnitude > 0, magnitude / INT8_MAX, 1.0)
        q = quantize_tensor(x, scale)
        scales = self.scale * scale
        y = torch.ops.pagoda.linear_int8(q, self.weight, scales, self.offset, torch.float32)
        return y.to(x.dtype)


# The public call ----------------------------------------------------------------------------------


def quantize(
    model: nn.Module, calibration_inputs: Any = None, *, dynamic: bool = False
) -> nn.Module:
    """An int8 copy of a model for inference; see the module.

    calibration_inputs: typical inputs, from which the ranges of activations are taken: one tensor,
    or an iterable of batches, each a tensor, a tuple of arguments or a dict of keyword arguments.
    dynamic: quantise `nn.Linear` only, with ranges found anew in every call; needs no inputs.
    Raises ValueError, TypeError.
    """
    quantised = copy.deepcopy(model).eval()
    kinds = (nn.Linear,) if dynamic else (nn.Linear, nn.Conv2d)
    if not any(isinstance(m, kinds) for m in quantised.modules()):
        names = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise ValueError(
            f"pagoda.quantize: the model must contain an {names}, but {type(model).__name__} has "
            "none; only these layers are quantised"
        )
    device = next(quantised.parameters()).device
    if dynamic:
        return _replaced(quantised, lambda name, layer: (
            DynamicQuantizedLinear(layer) if isinstance(layer, nn.Linear) else None
        )).to(device)  # fmt: skip
    batches = list(_batches(calibration_inputs))
    if not batches:
        raise ValueError(
            "pagoda.quantize: static quantisation needs calibration inputs, got none; pass a few "
            "typical batches, or dynamic=True for linear layers without"
        )
    traced = _traced(quantised)
    if traced is None:
        return _by_layers(quantised, batches).to(device)
    _fold(traced)
    with torch.no_grad():
        ranges = _Ranges(traced)
        for args, kwargs in batches:
            ranges.see(*args, **kwargs)
    return _Rewriting(traced, ranges.magnitudes).run().to(device)


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of a model for inference whose batch norms are part of the convolutions before them.

    The model must be traceable by torch.fx; its errors are passed on.
    """
    traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    _fold(traced)
    return traced


def _batches(inputs: Any) -> Iterable[tuple[tuple, dict[str, Any]]]:
    if inputs is None:
        return
    for batch in (inputs,) if isinstance(inputs, torch.Tensor) else inputs:
        if isinstance(batch, torch.Tensor):
            yield (batch,), {}
        elif isinstance(batch, (tuple, list)):
            yield tuple(batch), {}
        elif isinstance(batch, Mapping):
            yield (), dict(batch)
        else:
            raise TypeError(
                "pagoda.quantize: a calibration batch must be a tensor, a tuple of arguments or a "
                f"dict of keyword arguments, got {type(batch).__name__}; convert it"
            )


def _traced(model: nn.Module) -> fx.GraphModule | None:
    try:
        return fx.symbolic_trace(model)
    except Exception:  # noqa: BLE001 - the model's own code runs on torch's stand-ins for tensors
        return None


def _quantisable(layer: nn.Module | None) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _quantised_layer(layer: nn.Module, scale: float, zero_point: int = 0) -> _Layer:
    kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
    return kind(layer, scale, zero_point)


def _replaced(model: nn.Module, make: Any) -> nn.Module:
    for name, layer in list(model.named_modules()):
        new = make(name, layer)
        if new is not None and not name:
            return new
        if new is not None:
            model.set_submodule(name, new)
    return model


def _by_layers(model: nn.Module, batches: list) -> nn.Module:
    found: dict[str, float] = {}
    hooks = []

    def watch(name: str, layer: nn.Module) -> None:
        def see(module: nn.Module, args: tuple) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

        hooks.append(layer.register_forward_pre_hook(see))

    for name, layer in model.named_modules():
        if _quantisable(layer):
            watch(name, layer)
    with torch.no_grad():
        for args, kwargs in batches:
            model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return _replaced(model, lambda name, layer: (
        _quantised_layer(layer, _scale(found[name])) if name in found else None
    ))  # fmt: skip


# As a graph ---------------------------------------------------------------------------------------


def _fold(traced: fx.GraphModule) -> None:
    """Batch norms into the convolutions whose only users they are."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before, norm = node.args[0], modules[node.target]
        layer = modules.get(before.target) if before.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d) or len(before.users) > 1 or norm.running_mean is None:
            continue
        folded = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
        traced.set_submodule(before.target, folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()


class _Ranges(fx.Interpreter):
    """Runs the graph and keeps the largest magnitude of every float tensor."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.magnitudes: dict[fx.Node, float] = {}

    def see(self, *args: Any, **kwargs: Any) -> None:
        names = [node.target for node in self.module.graph.nodes if node.op == "placeholder"]
        self.run(*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel():
            seen = float(result.abs().max())
            self.magnitudes[n] = max(self.magnitudes.get(n, 0.0), seen)
            n.meta["shape"] = result.shape
        return result


@dataclass(frozen=True)
class _Grid:
    """int8 values q stand for (q - zero_point) scale."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class _Sum:
    """An addition at the end of a layer's kernel: of its result and of int8 values."""

    layer: fx.Node
    other: fx.Node


class _Rewriting:
    """One graph made int8: which tensors, where they arise, and what ends which kernel."""

    def __init__(self, traced: fx.GraphModule, magnitudes: dict[fx.Node, float]):
        self.traced, self.graph, self.magnitudes = traced, traced.graph, magnitudes
        self.order = {node: number for number, node in enumerate(self.graph.nodes)}
        self.layers = [n for n in self.graph.nodes if _quantisable(self._module(n))]
        self.additions = [n for n in self.graph.nodes if self._is_addition(n)]
        self.wanted = {self._source(n.args[0]) for n in self.layers}
        for node in self.additions:  # a layer's result can only be added where it is the later one
            first, second = sorted(node.args, key=self.order.__getitem__)
            if first in self.layers and second in self.layers and first is not second:
                self.wanted.add(first)
        self.sums = {n: found for n in self.additions if (found := self._sum(n)) is not None}
        self.grids = self._grids()
        self.int8: dict[fx.Node, fx.Node] = {}
        self.made: dict[fx.Node, _Layer] = {}

    def run(self) -> fx.GraphModule:
        names: set[str] = set()
        for node in self.layers:
            grid = self.grids[self._source(node.args[0])]
            layer = _quantised_layer(self._module(node), grid.scale, grid.zero_point)
            name = node.target if node.target not in names else f"{node.target}_{len(names)}"
            names.add(name)
            self.made[node] = layer
            node.target = name
        for node in list(self.graph.nodes):
            if node in self.made:
                node.args = (self._as_int8(node.args[0]),)
            elif node in self.additions and node not in self.sums:
                node.args = tuple(
                    self._as_float(a) if self._source(a) in self.wanted else a for a in node.args
                )
        for node, layer in self.made.items():
            self.traced.set_submodule(node.target, layer)
        self.graph.eliminate_dead_code()
        self.traced.delete_all_unused_submodules()
        self.traced.recompile()
        return self.traced

    # Decisions

    def _module(self, node: Any) -> nn.Module | None:
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.traced.get_submodule(node.target)

    def _is(self, node: fx.Node, kinds: tuple, functions: tuple, methods: tuple) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), kinds)
        return node.target in (functions if node.op == "call_function" else methods)

    def _is_addition(self, node: fx.Node) -> bool:
        added = self._is(node, (), _ADDITIONS, ("add", "add_")) and not node.kwargs
        return added and len(node.args) == 2 and all(a in self.magnitudes for a in node.args)

    def _is_relu(self, node: fx.Node) -> bool:
        return self._is(node, (nn.ReLU, nn.ReLU6), _RELUS, ("relu", "relu_"))

    def _source(self, node: fx.Node) -> fx.Node:
        """Where the values of a node arise: behind operations that only pick or move them."""
        while self._is(node, _CARRIERS, _CARRYING, _CARRYING_METHODS):
            node = node.args[0]
        return node

    def _end(self, node: fx.Node) -> fx.Node:
        """A ReLU that alone uses the node, or the node."""
        users = list(node.users)
        return users[0] if len(users) == 1 and self._is_relu(users[0]) else node

    def _sum(self, node: fx.Node) -> _Sum | None:
        end = self._end(node)
        if end not in self.wanted or not self._float_is_unused(end):
            return None
        shape = [a.meta["shape"] for a in node.args]
        for layer, other in (node.args, node.args[::-1]):
            alone = layer in self.layers and layer not in self.wanted and len(layer.users) == 1
            if alone and self._source(other) in self.wanted and shape[0] == shape[1]:
                return _Sum(layer, other)
        return None

    def _float_is_unused(self, node: fx.Node) -> bool:
        """Whether all that reads a wanted node reads int8: quantised layers and additions."""
        for user in node.users:
            moved = self._source(user) is not user and self._float_is_unused(user)
            if not moved and user not in self.layers and user not in self.additions:
                return False
        return True

    def _grids(self) -> dict[fx.Node, _Grid]:
        """Scales and zero points. What is added shares one scale, so that int8 values are added as
        they are. Results of a ReLU use all 256 values, unless a layer pads them: with zeros."""
        together = {node: {node} for node in self.wanted}
        for node, found in self.sums.items():
            joined = together[self._source(found.other)] | together[self._end(node)]
            together |= dict.fromkeys(joined, joined)
        points = {node: self._zero_point(node) for node in self.wanted}
        needed = {
            node: _scale(self.magnitudes[node], INT8_MAX - points[node]) for node in self.wanted
        }
        return {
            node: _Grid(max(needed[n] for n in together[node]), points[node])
            for node in self.wanted
        }

    def _zero_point(self, node: fx.Node) -> int:
        pads = any(
            max(self._module(layer).padding) > 0
            for layer in self.layers
            if self._source(layer.args[0]) is node and isinstance(self._module(layer), nn.Conv2d)
        )
        return INT8_MIN if self._is_relu(node) and not pads else 0

    # Rewriting

    def _as_int8(self, node: fx.Node) -> fx.Node:
        if node not in self.int8:
            self.int8[node] = self._made_int8(node)
        return self.int8[node]

    def _as_float(self, node: fx.Node) -> fx.Node:
        q, grid = self._as_int8(node), self.grids[self._source(node)]
        return self._after(q, dequantize_tensor, q, grid.scale, grid.zero_point)

    def _after(self, place: fx.Node, function: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(place):
            return self.graph.call_function(function, args)

    def _made_int8(self, node: fx.Node) -> fx.Node:
        if self._source(node) is not node:
            return self._moved(node)
        grid = self.grids[node]
        value, low, high = node, INT8_MIN, INT8_MAX
        if self._is_relu(node) and self._end(node.args[0]) is node and self._float_is_unused(node):
            value, low = node.args[0], grid.zero_point
            if self._is(node, (nn.ReLU6,), (F.relu6,), ()):
                high = min(high, round(6 / grid.scale) + grid.zero_point)
        if value in self.made and self._float_is_unused(node):
            self.made[value].give(torch.int8, grid.scale, grid.zero_point, low, high)
            return value
        if value in self.sums:
            found = self.sums[value]
            q, other = self._as_int8(found.other), self.grids[self._source(found.other)]
            shift = grid.zero_point - other.zero_point
            self.made[found.layer].give(torch.float32, grid.scale, shift)
            return self._after(node, add_and_quantize, found.layer, q, low, high)
        return self._after(node, quantize_tensor, node, grid.scale, grid.zero_point)

    def _moved(self, node: fx.Node) -> fx.Node:
        """A copy of an operation that only picks or moves values, of int8 ones."""
        inner = self._as_int8(node.args[0])
        last = max(node, inner, key=list(self.graph.nodes).index)
        with self.graph.inserting_after(last):
            moved = self.graph.node_copy(node)
        moved.replace_input_with(node.args[0], inner)
        if isinstance(self._module(node), nn.MaxPool2d):
            moved.target = f"{node.target}_int8"
            self.traced.set_submodule(moved.target, QuantizedMaxPool2d(self._module(node)))
        return moved
