"""From a region's `sdpa` or `sdpa_training` step to the attention kernel and its arguments."""

from __future__ import annotations

import struct
from dataclasses import replace

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Expr, ceildiv, expr, maximum, minimum
from pagoda.compiler.region import LIBRARY, KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.attention import LOG2_E, attention_kernel
from pagoda.kernels.attention_blocks import AttentionBlocks, choose_blocks
from pagoda.kernels.attention_dropout import dropout_threshold
from pagoda.kernels.float32 import TERMS

_DTYPES = {"bfloat16": DType.BF16, "float32": DType.F32}
_MASKS = {**_DTYPES, "bool": DType.BOOL}
MAX_HEAD_DIM = 256


def attention_for(call: KernelCall, chip: Chip) -> tuple[Kernel, AttentionBlocks]:
    """The kernel for an `sdpa` step on a chip, and its blocks.

    Float32 operands are split into as many bf16 terms as the call's precision asks for. Raises
    CompileError for tensors the kernel does not take.
    """
    views = named_arguments(call)
    dtype, kind, terms = operand_types(call, ("q", "k", "v", "out"))
    head_dim, value_dim = extent(views["q"], "q"), extent(views["v"], "v")
    blocks = choose_blocks(
        chip, head_dim, value_dim=value_dim, mask=kind, terms=terms, dropout="row_seeds" in views
    )
    kernel = attention_kernel(
        dtype, head_dim, is_causal(call), kind, terms, blocks,
        value_dim=value_dim, statistics="statistics" in views,
        dropout="row_seeds" in views,
    )  # fmt: skip
    return kernel, blocks


def attention_arguments(
    call: KernelCall, blocks: AttentionBlocks, offset: Expr | int = 0, cores: int = 1
) -> tuple[dict[str, View], dict[str, Expr]]:
    """What an `sdpa` step passes to its kernel: a view per tensor, a value per scalar parameter.

    The argument words follow from `Kernel.words()`: size = view.sizes[dim], stride =
    view.strides[dim] * itemsize, offset = view.offset * itemsize. `offset`: keys before query 0,
    for a causal call. `cores`: of the chip, so that KV heads are grouped only while every core
    has work.
    """
    views = named_arguments(call)
    q, k = views["q"], views["k"]
    spread_mask(views)
    # The last stride is fixed in the kernel; of one element it does not matter.
    for name in views.keys() - {"mask", "row_seeds", "column_seeds"}:
        view = views[name]
        views[name] = replace(view, strides=(*view.strides[:3], Const(1)))
    batches, heads, queries = q.sizes[:3]
    groups = k.sizes[1]
    heads_per_group = heads // maximum(groups, 1)
    query_block = maximum(minimum(queries, blocks.rows), 1)
    heads_at_once = expr(blocks.rows) // query_block
    head_block = maximum(minimum(heads_per_group, heads_at_once), 1)
    # More than one KV head only if all their query heads fit.
    group_block = minimum(heads_at_once // maximum(heads_per_group, 1), groups)
    group_block = maximum(minimum(group_block, ceildiv(batches * groups, cores)), 1)
    scalars = {
        "scale": Const(float_bits(score_scale(call))),
        "heads_per_group": heads_per_group,
        "group_block": group_block,
        "head_block": head_block,
        "query_block": query_block,
        "group_blocks": ceildiv(groups, group_block),
        "head_blocks": ceildiv(heads_per_group, head_block),
        "query_blocks": ceildiv(queries, query_block),
    }
    if is_causal(call):
        scalars["offset"] = expr(offset)
    return views, scalars | dropout_scalars(call)


def dropout_scalars(call: KernelCall) -> dict[str, Expr]:
    """The scalars of `Dropout`, for a call that has any."""
    if "row_seeds" not in named_arguments(call):
        return {}
    assert isinstance(call.kernel, LibraryCall)
    probability = float(call.kernel.attribute("dropout"))
    return {
        "threshold": Const(dropout_threshold(probability)),
        "kept_scale": Const(float_bits(1 / (1 - probability))),
    }


def named_arguments(call: KernelCall) -> dict[str, View]:
    """The call's views by the names in `LIBRARY`; an absent mask is left out."""
    assert isinstance(call.kernel, LibraryCall), call.kernel
    names = [name.removesuffix("?") for name in LIBRARY[call.kernel.name][0]]
    pairs = zip(names, call.args, strict=True)
    return {name: view for name, view in pairs if view is not None}


def operand_types(call: KernelCall, names: tuple[str, ...]) -> tuple[DType, DType | None, int]:
    """Dtype of q, of the mask if there is one, and how many bf16 terms an operand is split into.

    `names`: the tensors that are all of q's dtype and contiguous along the head dimension. Raises
    CompileError if they are not, or for a dtype the kernels do not take.
    """
    views = named_arguments(call)
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    q, mask = views["q"], views.get("mask")
    dtype = _dtype(q, _DTYPES, f"{listed} are all bfloat16 or all float32")
    for name in names:
        if views[name].dtype != q.dtype:
            raise CompileError(
                "attention", f"{listed} have one dtype",
                f"q is {q.dtype} and {name} is {views[name].dtype}", "convert them to one dtype",
            )  # fmt: skip
    for name in names:
        view = views[name]
        if view.strides[3] != Const(1) and view.sizes[3] != Const(1):
            raise CompileError(
                "attention", "the head dimension is contiguous",
                f"{name} has stride {view.strides[3]} there", f"call {name}.contiguous() first",
            )  # fmt: skip
    kind = None if mask is None else _dtype(mask, _MASKS, "the mask is bool, float32 or bfloat16")
    assert isinstance(call.kernel, LibraryCall)
    return dtype, kind, TERMS[call.kernel.precision] if dtype is DType.F32 else 1


def spread_mask(views: dict[str, View]) -> None:
    """The mask as a view of [b,h,i,s], strides 0 where it is broadcast."""
    if "mask" not in views:
        return
    mask, full = views["mask"], (*views["q"].sizes[:3], views["k"].sizes[2])
    broadcast = zip(mask.sizes, full, mask.strides, strict=True)
    strides = tuple(
        Const(0) if size == Const(1) and size != wanted else stride
        for size, wanted, stride in broadcast
    )
    views["mask"] = replace(mask, sizes=full, strides=strides)


def is_causal(call: KernelCall) -> bool:
    assert isinstance(call.kernel, LibraryCall)
    return bool(call.kernel.attribute("causal"))


def causal_offset(call: KernelCall) -> Expr:
    """How many keys precede query 0 (of a call that is not causal: 0)."""
    assert isinstance(call.kernel, LibraryCall)
    views = named_arguments(call)
    lower_right = call.kernel.attribute("causal") == "lower right"
    return views["k"].sizes[2] - views["q"].sizes[2] if lower_right else Const(0)


def score_scale(call: KernelCall) -> float:
    """What q . k is multiplied by: `scale`, for powers of two unless there is a float mask."""
    assert isinstance(call.kernel, LibraryCall)
    scale = float(call.kernel.attribute("scale"))
    mask = named_arguments(call).get("mask")
    return scale * LOG2_E if mask is None or mask.dtype == "bool" else scale


def float_bits(value: float) -> int:
    """The nearest float32's bits, as the int32 of an argument word."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def _dtype(view: View, allowed: dict[str, DType], rule: str) -> DType:
    if view.dtype not in allowed:
        raise CompileError(
            "attention", rule, f"it found {view.dtype}", "convert to one of these first"
        )
    return allowed[view.dtype]


def extent(view: View, name: str) -> int:
    """The head dimension: a number, because tiles have compile-time widths."""
    size = view.sizes[3]
    if not isinstance(size, Const) or not 1 <= size.value <= MAX_HEAD_DIM:
        raise CompileError(
            "attention", f"the head dimension is a fixed number from 1 to {MAX_HEAD_DIM}",
            f"that of {name} is {size}", "use another head dimension, or compile without dynamic "
            "head dimensions",
        )  # fmt: skip
    return size.value
