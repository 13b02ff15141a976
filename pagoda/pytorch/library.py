"""Which of Inductor's extern kernels are kernels of the library, and with which arguments."""

from __future__ import annotations

from typing import Any

import torch

from pagoda.pytorch.attention import SCHEMAS
from pagoda.pytorch.convolution import convolution_call
from pagoda.pytorch.errors import Unsupported, source
from pagoda.pytorch.kernel_op import kernel_call


def library_call(node: Any) -> tuple[str, tuple[tuple[str, Any], ...], list[Any]]:
    """An Inductor extern kernel as (library name, attributes, input nodes in argument order).

    Raises `Unsupported`, naming the operation, if the library has no such kernel.
    """
    attributes: tuple[tuple[str, Any], ...] | None
    op = getattr(node, "op_overload", None)
    name = _name(op, node)
    if name in ("mm", "bmm"):
        return name, (), list(node.inputs)
    if name == "addmm":
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        return name, (("alpha", alpha), ("beta", beta)), list(node.inputs)
    if name in SCHEMAS:
        args, kwargs = node.unflatten_args(node.inputs, node.constant_args)
        names = (*SCHEMAS[name], "causal", "scale", "lower_right", "dropout")
        bound = dict(zip(names, args, strict=False)) | kwargs
        causal = "lower right" if bound.get("lower_right") else bool(bound["causal"])
        attributes = (
            ("causal", causal),
            ("scale", float(bound["scale"])),
        )
        if name != "pagoda::sdpa":
            attributes += (("dropout", float(bound.get("dropout", 0.0))),)
        tensors = [bound.get(tensor) for tensor in SCHEMAS[name]]
        return name.removeprefix("pagoda::"), attributes, tensors
    if name == "pagoda::grouped_mm":
        return "grouped_mm", (), list(node.inputs)
    if name.startswith("pagoda::convolution"):
        return convolution_call(node)
    attributes = kernel_call(name)
    if attributes is not None:
        return "user_kernel", attributes, list(node.inputs)
    raise Unsupported(
        f"operation {name} is not supported on device pagoda: it is neither a loop nest nor one "
        "of the library kernels (mm, bmm, addmm, scaled_dot_product_attention, convolution). "
        "Rewrite the model without it, or compute it on the CPU with .cpu()."
        + source(node.get_origins())
    )


def _name(op: Any, node: Any) -> str:
    if isinstance(op, torch._ops.OpOverload):
        text = op.name()  # "aten::mm.out"
        return text.removeprefix("aten::").split(".")[0]
    return str(node.get_kernel_name()).split(".")[-1]
