"""From a region's `sdpa` step to the attention kernel and what it is called with."""

from __future__ import annotations

import struct
from dataclasses import replace

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Expr, ceildiv, expr, maximum, minimum
from pagoda.compiler.region import KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.attention import LOG2_E, attention_kernel
from pagoda.kernels.attention_blocks import AttentionBlocks, choose_blocks
from pagoda.kernels.float32 import TERMS

_DTYPES = {"bfloat16": DType.BF16, "float32": DType.F32}
_MASKS = {**_DTYPES, "bool": DType.BOOL}
MAX_HEAD_DIM = 256


def attention_for(call: KernelCall, chip: Chip) -> tuple[Kernel, AttentionBlocks]:
    """The kernel for an `sdpa` step on a chip, and its blocks.

    Float32 operands are split into as many bf16 terms as the call's precision asks for. Raises
    CompileError for tensors the kernel does not take.
    """
    out, q, k, v, mask = call.args
    head_dim, value_dim = _extent(q, "q"), _extent(v, "v")
    dtype = _dtype(q, _DTYPES, "q, k, v and out are all bfloat16 or all float32")
    for name, view in (("out", out), ("k", k), ("v", v)):
        if view.dtype != q.dtype:
            raise CompileError(
                "attention", "q, k, v and out have one dtype",
                f"q is {q.dtype} and {name} is {view.dtype}", "convert them to one dtype",
            )  # fmt: skip
    for name, view in (("out", out), ("q", q), ("k", k), ("v", v)):
        if view.strides[3] != Const(1) and view.sizes[3] != Const(1):
            raise CompileError(
                "attention", "the head dimension is contiguous",
                f"{name} has stride {view.strides[3]} there", f"call {name}.contiguous() first",
            )  # fmt: skip
    kind = None if mask is None else _dtype(mask, _MASKS, "the mask is bool, float32 or bfloat16")
    terms = TERMS[_library(call).precision] if dtype is DType.F32 else 1
    blocks = choose_blocks(chip, head_dim, value_dim=value_dim, mask=kind, terms=terms)
    causal = bool(_library(call).attribute("causal"))
    kernel = attention_kernel(dtype, head_dim, causal, kind, terms, blocks, value_dim=value_dim)
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
    out, q, k, v, mask = call.args
    views = {"out": out, "q": q, "k": k, "v": v}
    if mask is not None:
        full = (*q.sizes[:3], k.sizes[2])
        broadcast = zip(mask.sizes, full, mask.strides, strict=True)
        strides = tuple(
            Const(0) if size == Const(1) and size != wanted else stride
            for size, wanted, stride in broadcast
        )
        views["mask"] = replace(mask, sizes=full, strides=strides)
    # The last stride is fixed in the kernel; of one element it does not matter.
    for name in ("out", "q", "k", "v"):
        view = views[name]
        views[name] = replace(view, strides=(*view.strides[:3], Const(1)))
    scale = float(_library(call).attribute("scale"))
    if mask is None or mask.dtype == "bool":
        scale *= LOG2_E
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
        "scale": Const(struct.unpack("<i", struct.pack("<f", scale))[0]),
        "heads_per_group": heads_per_group,
        "group_block": group_block,
        "head_block": head_block,
        "query_block": query_block,
        "group_blocks": ceildiv(groups, group_block),
        "head_blocks": ceildiv(heads_per_group, head_block),
        "query_blocks": ceildiv(queries, query_block),
    }
    if _library(call).attribute("causal"):
        scalars["offset"] = expr(offset)
    return views, scalars


def _library(call: KernelCall) -> LibraryCall:
    assert isinstance(call.kernel, LibraryCall) and call.kernel.name == "sdpa", call.kernel
    return call.kernel


def _dtype(view: View, allowed: dict[str, DType], rule: str) -> DType:
    if view.dtype not in allowed:
        raise CompileError(
            "attention", rule, f"it found {view.dtype}", "convert to one of these first"
        )
    return allowed[view.dtype]


def _extent(view: View, name: str) -> int:
    """The head dimension: a number, because tiles have compile-time widths."""
    size = view.sizes[3]
    if not isinstance(size, Const) or not 1 <= size.value <= MAX_HEAD_DIM:
        raise CompileError(
            "attention", f"the head dimension is a fixed number from 1 to {MAX_HEAD_DIM}",
            f"that of {name} is {size}", "use another head dimension, or compile without dynamic "
            "head dimensions",
        )  # fmt: skip
    return size.value
