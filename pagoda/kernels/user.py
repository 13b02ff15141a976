"""Kernels of the user's, by name: a region's step says which, this process knows its source."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.language import KernelFunction, TensorType
from pagoda.compiler.loop_nest import ITEMSIZE
from pagoda.compiler.region import KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.numbers import DType

TYPES = {"float32": DType.F32, "bfloat16": DType.BF16, "int32": DType.I32, "int8": DType.I8}


@dataclass(frozen=True)
class UserKernel:
    """function: parameters are tensors, the result first; values: its compile-time parameters."""

    function: KernelFunction
    values: Mapping[str, Any]

    def source(self) -> str:
        """A hash of all that decides what the kernel computes, constants of its module included."""
        constants = {
            name: value
            for name, value in self.function.namespace.items()
            if isinstance(value, (int, float, str, tuple))
        }
        parts = ast.dump(self.function.tree), sorted(constants.items()), sorted(self.values.items())
        return hashlib.sha256(repr(parts).encode()).hexdigest()


_known: dict[str, UserKernel] = {}


def register_kernel(name: str, kernel: UserKernel) -> None:
    """Makes a kernel known, in the place of an older one of that name."""
    _known[name] = kernel


def known_kernel(name: str) -> UserKernel | None:
    return _known.get(name)


def sources() -> str:
    """Of all kernels that are known: part of the keys of what was compiled with them."""
    return " ".join(f"{name}={_known[name].source()}" for name in sorted(_known))


def user_kernel_for(call: KernelCall) -> tuple[Kernel, dict[str, View]]:
    """The kernel of a step and a view per tensor. Raises CompileError if this process knows no
    such kernel, or another one, and for types that kernels do not take."""
    assert isinstance(call.kernel, LibraryCall), call.kernel
    name = str(call.kernel.attribute("kernel"))
    found = _known.get(name)
    if found is None or found.source() != call.kernel.attribute("source"):
        state = "it knows none" if found is None else "its source has changed since"
        raise CompileError(
            f"kernel {name}", "this process must know the kernel that was compiled", state,
            "import the module that calls pagoda.kernel_op, or call torch.compiler.reset()",
        )  # fmt: skip
    names = [n for n in found.function.annotations if found.function.is_tensor(n)]
    views = {n: view for n, view in zip(names, call.args, strict=True) if view is not None}
    types = {n: _type(name, n, view) for n, view in views.items()}
    return found.function.build(**types, **found.values), views


def _type(kernel: str, tensor: str, view: View) -> TensorType:
    if view.dtype not in TYPES:
        raise CompileError(
            f"kernel {kernel}, tensor {tensor}", f"a kernel's tensors are {', '.join(TYPES)}",
            f"this one is {view.dtype}", "convert it first",
        )  # fmt: skip
    size = ITEMSIZE[view.dtype]
    return TensorType(
        TYPES[view.dtype],
        tuple(_known_value(extent) for extent in view.sizes),
        tuple(_known_value(stride * size) for stride in view.strides),
    )


def _known_value(value: Expr) -> int | None:
    return value.value if isinstance(value, Const) else None
