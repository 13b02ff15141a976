"""`pagoda.kernel_op`: a kernel of the user's as a torch operation, eager and in torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pagoda.compiler.language import KernelFunction
from pagoda.kernels.user import UserKernel, known_kernel, register_kernel


def kernel_op(
    name: str,
    kernel: KernelFunction,
    result: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor] | None = None,
    **values: Any,
) -> torch.library.CustomOpDef:
    """A torch operation that runs a kernel (`pagoda.compiler.language`) on the chip.

    name: "namespace::name". kernel: its parameters are tensors, the result first, then the
    operation's operands; of float32, bfloat16, int32 or int8. result: from the operands a tensor
    of the result's shape, type and strides, as `torch.empty_like`; its contents do not matter.
    reference: the same computation in torch, for tensors on the CPU. values: the kernel's
    compile-time parameters. Cores share the work as the kernel says (`core_tiles`).

    What comes back is torch's: `op.register_autograd(backward, setup_context=...)` gives it
    gradients. Raises TypeError for a kernel that is not decorated, ValueError for parameters that
    are not tensors or without a namespace.
    """
    if not isinstance(kernel, KernelFunction):
        raise TypeError(
            f"kernel_op {name}: the kernel is a function decorated with "
            f"@pagoda.compiler.language.kernel, but this is {kernel!r}. Decorate it."
        )
    scalars = [n for n in kernel.annotations if n not in kernel.blocks and not kernel.is_tensor(n)]
    if scalars:
        raise ValueError(
            f"kernel_op {name}: the kernel's run-time parameters are tensors, but {scalars[0]} is "
            f"{kernel.annotations[scalars[0]].__name__}. Pass a tensor, or make it a compile-time "
            "parameter behind *."
        )
    if "::" not in name:
        raise ValueError(
            f'kernel_op {name}: the name is "namespace::name", but it has no namespace. Put one '
            "before it."
        )
    _, *operands = kernel.annotations
    schema = f"({', '.join(f'Tensor {operand}' for operand in operands)}) -> Tensor"

    def on_cpu(*tensors: torch.Tensor) -> torch.Tensor:
        if reference is None:
            raise RuntimeError(
                f"{name}: it runs on device pagoda, but its operands are on the CPU. Move them "
                'with .to("pagoda"), or give kernel_op a reference.'
            )
        return reference(*tensors)

    operation = torch.library.custom_op(
        name, on_cpu, mutates_args=(), device_types="cpu", schema=schema
    )
    operation.register_fake(result)
    register_kernel(name, UserKernel(kernel, values))
    return operation


def kernel_call(name: str) -> tuple[tuple[str, Any], ...] | None:
    """The attributes of a step that calls the operation's kernel, or None if it has none."""
    kernel = known_kernel(name)
    return None if kernel is None else (("kernel", name), ("source", kernel.source()))
