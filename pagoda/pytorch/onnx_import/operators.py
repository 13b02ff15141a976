"""The table of ONNX operators: what each computes, in operations of torch.

An operator is a function of tensors, positional as the operator's inputs are (None: not given),
with its attributes as keyword arguments, which have ONNX's defaults. Three more are filled in where
a function has them: `opset`, the model's; `outputs`, how many results are used; and `types`, those
of the inputs. The modules of
this folder fill the table; the specification is onnx.ai/onnx/operators.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Operator:
    """constants: inputs that torch needs to know when the graph is made, by position: they become
    keyword arguments (nested lists; None if not given). numbers: inputs, by position, that become
    Python numbers where they are constants of one element (None: any input, if another one of the
    same type stays a tensor). statistics: inputs that training does not change. parameters: names
    of the keyword arguments, None for any."""

    function: Callable[..., Any]
    constants: Mapping[int, str] = field(default_factory=dict)
    numbers: tuple[int, ...] | None = ()
    statistics: tuple[int, ...] = ()
    parameters: frozenset[str] | None = frozenset()

    def takes(self, name: str) -> bool:
        return self.parameters is None or name in self.parameters


TABLE: dict[str, Operator] = {}


class Refused(Exception):
    """A use of an operator that torch has nothing for; the message says which, and what to do."""


def operator(
    *names: str,
    constants: Mapping[int, str] | None = None,
    numbers: tuple[int, ...] | None = (),
    statistics: tuple[int, ...] = (),
) -> Callable[[Callable], Callable]:
    """Put a function into the table."""

    def enter(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())
        keywords = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            keywords = None
        entry = Operator(function, constants or {}, numbers, statistics, keywords)
        for name in names:
            assert name not in TABLE, name
            TABLE[name] = entry
        return function

    return enter


def require(condition: bool, what: str, remedy: str = "export the model without it") -> None:
    """Raise Refused unless the condition holds."""
    if not condition:
        raise Refused(f"{what}; {remedy}")


class Operation(torch.nn.Module):
    """One node of the model. kind: the operator's name."""

    def __init__(self, kind: str, function: Callable[..., Any], attributes: dict[str, Any]):
        super().__init__()
        self.kind = kind
        self.function = function
        self.attributes = attributes

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs, **self.attributes)

    def extra_repr(self) -> str:
        shown = [f"{name}={value}" for name, value in self.attributes.items() if value is not None]
        return ", ".join([self.kind, *shown])
