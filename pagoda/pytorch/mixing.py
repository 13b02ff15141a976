"""Operations whose tensors lie on several devices: which one is elsewhere, and what to do.

As in torch, a tensor without dimensions may stay on the CPU: it is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

aten = torch.ops.aten
# As in torch, `indices` of these may be on the CPU.
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
NAME, KEY = "pagoda", "PrivateUse1"


def require_one_device(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError, naming the argument, if one of these is a tensor on another device."""
    names = [a.name for a in op._schema.arguments]
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        if name == "indices" and op.overloadpacket in INDEXED:
            continue
        several = isinstance(value, (list, tuple))
        for number, item in enumerate(value if several else [value]):
            if is_elsewhere(item):
                raise RuntimeError(message(op, f"{name}[{number}]" if several else name, item))


def is_elsewhere(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != NAME and value.dim() > 0


def message(op: Any, name: str, tensor: torch.Tensor) -> str:
    argument = f", as argument {name!r}," if name else ""
    return (
        f"operation {op} got tensors on device pagoda and{argument} one of shape "
        f"{tuple(tensor.shape)} on device {tensor.device}. All must be on one device; only "
        'numbers, tensors without dimensions, may stay on the CPU. Move it with .to("pagoda").'
    )


# torch looks at the devices itself, and says only that there are two, in operations of which it
# works out sizes and types first and in some that it takes apart.
_STRUCTURED = torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_TAKEN_APART = ("gru.input", "lstm.input", "rnn_relu.input", "rnn_tanh.input")


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _structured() -> Iterator[Any]:
    """Operations of several tensors of which torch works out the result's size and type, unless
    this device has its own."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has(name, _STRUCTURED.name) and not has(name, KEY):
            op = _operation(name.removeprefix("aten::"))
            if len(tensor_arguments(op)) > 1 or lists(op):
                yield op


def tensors_for_numbers(op: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Numbers where the schema has tensors (`x & 3`); torch takes them back for some operations
    only."""
    if torch._C._should_allow_numbers_as_tensors(op._schema.name.split("::")[1]):
        return tuple(args)
    names = tensor_arguments(op)
    return tuple(
        torch.tensor(value) if type(value) in (bool, int, float) and a.name in names else value
        for value, a in zip(args, op._schema.arguments, strict=False)
    )


def tensor_arguments(op: Any) -> list[str]:
    kinds = ("Tensor", "Optional[Tensor]")
    return [a.name for a in op._schema.arguments if str(a.type) in kinds]


def lists(op: Any) -> list[str]:
    kinds = ("List[Tensor]", "List[Optional[Tensor]]")
    return [a.name for a in op._schema.arguments if str(a.type) in kinds]


def _checked(op: Any, key: Any) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        require_one_device(op, args, kwargs)
        return op._op_dk(key, *tensors_for_numbers(op, args), **kwargs)

    return torch._disable_dynamo(call)


def register() -> torch.library.Library:
    """Checks such operations first. The library must be kept."""
    library = torch.library.Library("aten", "IMPL")
    for op in _structured():
        library.impl(op.name(), _checked(op, _STRUCTURED), KEY)
    for op in map(_operation, _TAKEN_APART):
        for key in (KEY, f"Autograd{KEY}"):
            library.impl(op.name(), _checked(op, _COMPOSITE), key)
    return library
