"""An ONNX graph to a torch.fx graph: a module per node, a parameter per weight.

What depends only on shapes and constants (ONNX writes reshapes that way) is computed while the
graph is made; shapes come from torch's fake tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch._subclasses.fake_tensor import FakeTensorMode

from pagoda.compiler.errors import ModelFileError
from pagoda.pytorch.onnx_import import (  # noqa: F401 - they fill the table
    elementwise,
    layers,
    quantised,
    recurrent,
    resizing,
    shapes,
    windows,
)
from pagoda.pytorch.onnx_import.operators import TABLE, Operation, Operator, Refused
from pagoda.pytorch.onnx_import.reader import Input
from pagoda.pytorch.onnx_import.types import type_of
from pagoda.pytorch.shape_mode import shapes_only

_KEPT = ("DequantizeLinear",)  # int8 weights stay int8 in the module
_LARGEST_FOLDED = 1 << 24  # elements: a constant made of constants is stored with the module
_OWN = ("", "ai.onnx")
_REMEDY = "export the model without it, or rewrite that part of it"


@dataclass
class _Value:
    """A tensor of the graph. constant: its value, where it is known. node: None for a constant that
    no other node has used yet. weight: of the file. kept: computed by a node all the same,
    `source`."""

    fake: torch.Tensor
    node: torch.fx.Node | None = None
    constant: torch.Tensor | None = None
    weight: bool = False
    kept: bool = False
    source: onnx.NodeProto | None = None
    name: str = ""


class GraphBuilder:
    """See `build`."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self.name = name
        self.opset = next(o.version for o in model.opset_import if o.domain in _OWN)
        self.graph = torch.fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[str, _Value] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.names: set[str] = set()

    def build(
        self, graph: onnx.GraphProto, inputs: Sequence[Input], sizes: Mapping[str, Sequence[int]]
    ) -> torch.fx.GraphModule:
        """The module. Raises ModelFileError, naming the node, for what torch has nothing for."""
        for one in inputs:
            node = self.graph.placeholder(self._unique(one.name))
            with self.mode:
                fake = torch.empty(tuple(sizes[one.name]), dtype=one.dtype)
            self.values[one.name] = _Value(fake, node)
        self._add(graph)
        results = [self._node_of(self._value(out.name)) for out in graph.output]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        module = torch.fx.GraphModule(self.root, self.graph, class_name="OnnxModel")
        module.graph.eliminate_dead_code()
        module.recompile()
        # A module is made with what its graph names: so the second one lacks what was dropped.
        return torch.fx.GraphModule(module, module.graph, class_name="OnnxModel").eval()

    def _add(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            value = self._tensor(tensor, f"the weight {tensor.name!r}")
            self.values[tensor.name] = _Value(value, constant=value, weight=True, name=tensor.name)
        if graph.sparse_initializer:
            raise ModelFileError(
                f"{self.name}: holds sparse weights, which are not read; export them dense"
            )
        for node in graph.node:
            self._add_node(node)

    def _value(self, name: str) -> _Value:
        if name not in self.values:
            raise ModelFileError(
                f"{self.name}: nothing computes {name!r}, which the graph uses; the file is "
                "damaged: export it again"
            )
        return self.values[name]

    def _add_node(self, node: onnx.NodeProto) -> None:
        what = f"{self.name}: node {node.name or node.output[0]!r} ({node.op_type})"
        if node.op_type == "If":
            self._branch(node, what)
            return
        operator = self._operator(node, what)
        if operator is None:
            return
        try:
            attributes = self._attributes(node, operator)
            if node.op_type == "Constant":
                (value,) = attributes.values()
                self.values[node.output[0]] = _Value(value, constant=value, name=node.output[0])
                return
            self._call(node, operator, attributes)
        except Refused as error:
            raise ModelFileError(f"{what}: {error}") from error
        except ModelFileError:
            raise
        except Exception as error:
            said = str(error).strip().splitlines()
            taken = ", ".join(_show(self.values[i].fake) for i in node.input if i in self.values)
            raise ModelFileError(
                f"{what}: cannot be computed on {taken or 'no inputs'}: "
                f"{said[0] if said else type(error).__name__}; check the model with "
                "onnx.checker, and the shapes of its inputs"
            ) from error

    def _operator(self, node: onnx.NodeProto, what: str) -> Operator | None:
        """The entry of the table; None if the node was replaced by what its definition says."""
        if node.domain in _OWN and node.op_type in TABLE:
            return TABLE[node.op_type]
        if node.domain in _OWN and node.op_type == "Constant":
            return Operator(lambda: None)
        if node.domain in _OWN and node.op_type in ("Loop", "Scan"):
            raise ModelFileError(
                f"{what}: control flow that depends on data cannot be compiled; export the model "
                "with the loop unrolled, or run its body step by step from Python"
            )
        if self._inlined(node):
            return None
        domain = node.domain or "ai.onnx"
        raise ModelFileError(
            f"{what}: no operator {node.op_type!r} of domain {domain!r}, opset {self.opset}, is "
            f"known; {_REMEDY}"
        )

    def _inlined(self, node: onnx.NodeProto) -> bool:
        """Whether ONNX defines the operator as a function of others, which are added instead."""
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        except onnx.defs.SchemaError:
            return False
        if not schema.has_function:
            return False
        inner = {given: f"{node.output[0]}/{given}" for body in [schema.function_body]
                 for part in body.node for given in (*part.input, *part.output)}  # fmt: skip
        body = schema.function_body
        inner.update(zip(body.input, node.input, strict=False))
        inner.update(zip(body.output, node.output, strict=False))
        given = {attribute.name: attribute for attribute in node.attribute}
        for part in body.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(part)
            copy.name = f"{node.name or node.output[0]}/{part.op_type}"
            copy.input[:] = [inner.get(i, "") if i else "" for i in part.input]
            copy.output[:] = [inner[o] for o in part.output]
            del copy.attribute[:]
            for attribute in part.attribute:
                if attribute.ref_attr_name:
                    if attribute.ref_attr_name in given:
                        copy.attribute.add().CopyFrom(given[attribute.ref_attr_name])
                        copy.attribute[-1].name = attribute.name
                else:
                    copy.attribute.add().CopyFrom(attribute)
            self._add_node(copy)
        return True

    def _branch(self, node: onnx.NodeProto, what: str) -> None:
        condition = self._value(node.input[0]).constant
        if condition is None:
            raise ModelFileError(
                f"{what}: a condition that depends on data cannot be compiled; export the model "
                "for one of the two cases, or choose in Python"
            )
        wanted = "then_branch" if bool(condition) else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == wanted)
        self._add(branch)
        for outer, inner in zip(node.output, branch.output, strict=True):
            self.values[outer] = self._value(inner.name)

    # Attributes and constants

    def _attributes(self, node: onnx.NodeProto, operator: Operator) -> dict[str, Any]:
        found = {a.name: self._attribute(a) for a in node.attribute}
        if node.op_type == "Constant":
            return {name: _as_tensor(value) for name, value in found.items()}
        for unknown in sorted(name for name in found if not operator.takes(name)):
            raise Refused(f"attribute {unknown!r} is not known; {_REMEDY}")
        if operator.takes("opset"):
            found["opset"] = self.opset
        if operator.takes("outputs"):
            found["outputs"] = sum(bool(name) for name in node.output)
        return found

    def _attribute(self, attribute: onnx.AttributeProto) -> Any:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        if isinstance(value, onnx.TensorProto):
            return self._tensor(value, f"the attribute {attribute.name!r}")
        if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            return list(value)
        if attribute.type == onnx.AttributeProto.STRINGS:
            return [v.decode(errors="replace") for v in value]
        return value

    def _tensor(self, tensor: onnx.TensorProto, what: str) -> torch.Tensor:
        try:
            kind = type_of(tensor.data_type)
            array = numpy_helper.to_array(tensor)
        except Refused as error:
            raise ModelFileError(f"{self.name}: {what}: {error}") from error
        except (ValueError, TypeError) as error:
            raise ModelFileError(
                f"{self.name}: {what} cannot be read ({error}); the file is damaged: export it "
                "again"
            ) from error
        if kind == torch.bfloat16:
            return torch.tensor(array.astype("float32")).to(kind)
        return torch.tensor(array)

    # Calls

    def _call(self, node: onnx.NodeProto, operator: Operator, attributes: dict[str, Any]) -> None:
        names = list(node.input)
        inputs = [self._value(name) if name else None for name in names]
        if node.op_type == "MatMul" and (turned := self._turned(inputs[1])) is not None:
            operator, inputs[1] = Operator(layers.linear), turned
        if operator.takes("types"):
            attributes["types"] = tuple(None if v is None else v.fake.dtype for v in inputs)
        for position, parameter in operator.constants.items():
            value = inputs[position] if position < len(inputs) else None
            if value is not None:
                attributes[parameter] = self._known(value, names[position], parameter)
        rest = [v for n, v in enumerate(inputs) if n not in operator.constants]
        positions = [n for n in range(len(inputs)) if n not in operator.constants]
        call = Operation(node.op_type, operator.function, attributes)
        known = node.op_type in ("Shape", "Size") or all(
            v is None or (v.constant is not None and not v.kept) for v in rest
        )
        if known and (constants := self._folded(node, call, rest)) is not None:
            for name, constant in zip(node.output, constants, strict=False):
                self.values[name] = _Value(constant, constant=constant, name=name)
            if node.op_type not in _KEPT:
                return
        passed = [
            self._argument(value, position, operator, rest)
            for position, value in zip(positions, rest, strict=True)
        ]
        fakes = [
            self._fake(value) if isinstance(one, torch.fx.Node) else one
            for one, value in zip(passed, rest, strict=True)
        ]
        with shapes_only(self.mode), torch.no_grad():
            results = call(*fakes)
        target = self._unique(_path(node))
        _add_module(self.root, target, call)
        made = self.graph.call_module(target, tuple(passed))
        several = isinstance(results, (tuple, list))
        for number, name in enumerate(node.output):
            if not name:
                continue
            one = self.graph.call_function(getitem, (made, number)) if several else made
            fake = results[number] if several else results
            before = self.values.get(name) if known else None
            constant = before.constant if before is not None else None
            source = None if constant is None else node
            self.values[name] = _Value(
                fake, one, constant, kept=constant is not None, source=source
            )

    def _turned(self, value: _Value | None) -> _Value | None:
        """A quantised matrix as `linear` takes it; None for any other operand."""
        if value is None or value.source is None or value.fake.dim() != 2:
            return None
        node = onnx.NodeProto()
        node.CopyFrom(value.source)
        matrix, result = f"{node.input[0]}_turned", f"{node.output[0]}_turned"
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if result not in self.values:
            turned = self._value(node.input[0]).constant.t().contiguous()
            self.values[matrix] = _Value(turned, constant=turned, weight=True, name=matrix)
            kept = [a for a in value.source.attribute if a.name != "axis"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("axis", 1 - axis % 2)])
            node.input[0], node.output[0] = matrix, result
            self._add_node(node)
        return self.values[result]

    def _fake(self, value: _Value | None) -> torch.Tensor | None:
        if value is None:
            return None
        if value.constant is value.fake:
            return self.mode.from_tensor(value.fake)
        return value.fake

    def _folded(
        self, node: onnx.NodeProto, call: Operation, inputs: list[_Value | None]
    ) -> list[torch.Tensor] | None:
        """The results, if they are to be kept as constants."""
        if node.op_type in ("Shape", "Size"):
            (value,) = inputs
            shape = list(value.fake.shape)
            chosen = shape[call.attributes.get("start", 0) : call.attributes.get("end")]
            whole = torch.tensor(chosen, dtype=torch.int64)
            return [whole if node.op_type == "Shape" else torch.tensor(value.fake.numel())]
        with torch.no_grad():
            results = call(*[None if v is None else v.constant for v in inputs])
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        return results if sum(r.numel() for r in results) <= _LARGEST_FOLDED else None

    def _known(self, value: _Value, name: str, parameter: str) -> Any:
        if value.constant is None:
            raise Refused(
                f"its {parameter}, {name!r}, must be known when the model is compiled, but is "
                "computed from data; export the model with fixed shapes"
            )
        return value.constant.tolist()

    def _argument(
        self, value: _Value | None, position: int, operator: Operator, inputs: list[_Value | None]
    ) -> Any:
        if value is None:
            return None
        constant = value.constant
        if constant is not None and constant.numel() == 1 and not value.kept:
            allowed = operator.numbers is not None and position in operator.numbers
            if operator.numbers is None and constant.dtype != torch.bool:
                allowed = any(
                    v is not None and v.fake.dtype == constant.dtype
                    and v.fake.dim() >= constant.dim() and v.fake.numel() != 1
                    for v in inputs
                )  # fmt: skip
            if allowed and (constant.dim() == 0 or operator.function is not shapes.gather):
                return constant.item()
        return self._node_of(value, position not in operator.statistics)

    def _node_of(self, value: _Value, trainable: bool = True) -> torch.fx.Node:
        """The node of a value; a constant becomes a parameter or a buffer of the module."""
        if value.node is None:
            assert value.constant is not None
            target = self._unique(value.name or "constant").replace(".", "_")
            if value.weight and trainable and value.constant.dtype.is_floating_point:
                self.root.register_parameter(target, torch.nn.Parameter(value.constant))
            else:
                self.root.register_buffer(target, value.constant)
            value.node = self.graph.get_attr(target)
        return value.node

    def _unique(self, name: str) -> str:
        """A Python name, dots kept, that the module does not have yet."""
        parts = [re.sub(r"\W", "_", part) or "_" for part in name.split(".")]
        clean = ".".join(f"_{part}" if part[0].isdigit() else part for part in parts)
        found, count = clean, 1
        while found.replace(".", "_") in self.names or hasattr(torch.nn.Module, found):
            count += 1
            found = f"{clean}_{count}"
        self.names.add(found.replace(".", "_"))
        return found


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    whole = isinstance(value, int) or (isinstance(value, list) and all(
        isinstance(v, int) for v in value))  # fmt: skip
    return torch.tensor(value, dtype=torch.int64 if whole else torch.float32)


def _path(node: onnx.NodeProto) -> str:
    """A module's path from a node's name: exporters write /layer1/layer1.0/conv1/Conv."""
    if not node.name:
        return f"{node.op_type}_{node.output[0]}".replace(".", "_")
    parts = [part.replace(".", "_") for part in node.name.split("/") if part]
    return ".".join(parts) or node.op_type


def _add_module(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    *folders, last = path.split(".")
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, torch.nn.Module())
        root = root._modules[folder]
    root.add_module(last, module)


def _show(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
