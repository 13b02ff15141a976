"""From a region's `sdpa_backward` step to its kernel and what it is called with."""

from __future__ import annotations

from dataclasses import replace

from pagoda.compiler.index_expr import Const, Expr, maximum
from pagoda.compiler.region import KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.kernels.attention_backward import attention_backward_kernel
from pagoda.kernels.attention_backward_blocks import choose_backward_blocks
from pagoda.kernels.attention_call import (
    causal_offset,
    dropout_scalars,
    extent,
    float_bits,
    is_causal,
    named_arguments,
    operand_types,
    score_scale,
    spread_mask,
)


def attention_backward_for(call: KernelCall, chip: Chip) -> Kernel:
    """The kernel for an `sdpa_backward` step on a chip. Raises CompileError for tensors it does
    not take."""
    dtype, kind, terms = operand_types(call, ("q", "k", "v", "dout", "dk", "dv"))
    views = named_arguments(call)
    head_dim, value_dim = extent(views["q"], "q"), extent(views["v"], "v")
    dropout = "row_seeds" in views
    blocks = choose_backward_blocks(
        chip, head_dim, value_dim, mask=kind, terms=terms, dropout=dropout
    )
    return attention_backward_kernel(
        dtype, head_dim, value_dim, is_causal(call), kind, terms, blocks, dropout=dropout
    )


def attention_backward_arguments(call: KernelCall) -> tuple[dict[str, View], dict[str, Expr]]:
    """What an `sdpa_backward` step passes to its kernel, as `attention_call.attention_arguments`
    does for the forward pass."""
    views = named_arguments(call)
    spread_mask(views)
    # The last stride is fixed in the kernel; of one element it does not matter.
    for name in views.keys() - {"mask", "delta", "row_seeds", "column_seeds"}:
        view = views[name]
        views[name] = replace(view, strides=(*view.strides[:3], Const(1)))
    assert isinstance(call.kernel, LibraryCall)
    scalars = {
        "score_scale": Const(float_bits(score_scale(call))),
        "scale": Const(float_bits(float(call.kernel.attribute("scale")))),
        "heads_per_group": views["q"].sizes[1] // maximum(views["k"].sizes[1], 1),
    }
    if is_causal(call):
        scalars["offset"] = causal_offset(call)
    return views, scalars | dropout_scalars(call)
