"""Matrix products of groups of rows, as in mixtures of experts: which rows are in which group is
read from memory by the kernel itself, so only those rows are multiplied.

k is added in order with one rounding per step, as in `matmul`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pagoda.compiler.cost import MatmulShape, choose_matmul
from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const
from pagoda.compiler.language import (
    Tensor,
    TensorType,
    block,
    cdiv,
    core_count,
    core_id,
    core_tiles,
    dot,
    full,
    iota,
    kernel,
    load,
    store,
    tiles,
    to_float,
    word,
    zeros,
)
from pagoda.compiler.loop_nest import ITEMSIZE
from pagoda.compiler.region import KernelCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.matmul import check_operands

_TYPES = {"bfloat16": DType.BF16, "float32": DType.F32, "int32": DType.I32}


@kernel
def grouped_rows(c: Tensor, a: Tensor, w: Tensor, ends: Tensor, *, BM, BN, BK, BUFFERS):
    """c[s, n] = a[s, k] w[g, k, n] for the rows s of group g, from ends[g - 1] (0 for the first
    group) to ends[g]; the rows after the last group are 0."""
    across = cdiv(c.size(1), BN)
    begin = 0
    for g in range(w.size(0)):
        end = word(load(ends[g, full(1)]))
        down = cdiv(end - begin, BM)
        for t in range(core_id(), down * across, core_count()):
            i = block(t // across, end, BM, start=begin)
            j = block(t % across, c.size(1), BN)
            acc = zeros(i, j)
            for k in tiles(a.size(1), BK):
                x = load(a[i, k], buffers=BUFFERS)
                acc += dot(x, load(w[g, k, j], buffers=BUFFERS))
            store(c[i, j], acc)
        begin = end
    for i in tiles(c.size(0), BM, start=begin):
        for j in core_tiles(c.size(1), BN):
            store(c[i, j], to_float(iota(i, j, 0, 0, 0)))


@kernel
def grouped_depth(c: Tensor, a: Tensor, b: Tensor, ends: Tensor, *, BM, BN, BK, BUFFERS):
    """c[g, m, n] = a[m, s] b[s, n] over the s of group g: the gradient of the w above."""
    down, across = cdiv(c.size(1), BM), cdiv(c.size(2), BN)
    begin = 0
    for g in range(c.size(0)):
        end = word(load(ends[g, full(1)]))
        for t in range(core_id(), down * across, core_count()):
            i = block(t // across, c.size(1), BM)
            j = block(t % across, c.size(2), BN)
            acc = zeros(i, j)
            for s in tiles(end, BK, start=begin):
                x = load(a[i, s], buffers=BUFFERS)
                acc += dot(x, load(b[s, j], buffers=BUFFERS))
            store(c[g, i, j], acc)
        begin = end


def grouped_for(
    call: KernelCall, chip: Chip, symbols: Mapping[str, int]
) -> tuple[Kernel, dict[str, View]]:
    """The kernel of a `grouped_mm` step and a view per tensor of it.

    Operands are bfloat16, the result bfloat16 or float32; ends: int32, one for each group. symbols:
    sizes to choose the blocks for. Raises CompileError for other types.
    """
    out, a, b, ends = call.args
    rows = len(b.sizes) == 3
    views = {"c": out, "a": a, "w" if rows else "b": b, "ends": _column(ends)}
    types = {name: _type(name, view) for name, view in views.items()}
    check_operands(chip, DType.BF16)
    groups = (b if rows else out).sizes[0].evaluate(symbols)
    split = a.sizes[0 if rows else 1].evaluate(symbols)
    share = max(-(-split // max(groups, 1)), 1)
    m = share if rows else out.sizes[1].evaluate(symbols)
    depth = a.sizes[1].evaluate(symbols) if rows else share
    shape = MatmulShape(
        1, m, out.sizes[-1].evaluate(symbols), depth, 2, ITEMSIZE[out.dtype],
        transposed_a=_is_turned(types["a"]), transposed_b=_is_turned(types["w" if rows else "b"]),
        fixed_k=False,
    )  # fmt: skip
    plan = choose_matmul(chip, shape)
    made = grouped_rows if rows else grouped_depth
    blocks = {"BM": plan.bm, "BN": plan.bn, "BK": plan.bk, "BUFFERS": plan.buffers}
    return made.build(**types, **blocks), views


def _column(ends: View) -> View:
    return replace(ends, sizes=(*ends.sizes, Const(1)), strides=(*ends.strides, Const(1)))


def _is_turned(given: TensorType) -> bool:
    element = given.dtype.bits // 8
    return given.strides[-1] != element and given.strides[-2] == element


def _type(name: str, view: View) -> TensorType:
    wanted = {"c": ("bfloat16", "float32"), "ends": ("int32",)}.get(name, ("bfloat16",))
    if view.dtype not in wanted:
        raise CompileError(
            "grouped_mm", f"{name} is {' or '.join(wanted)}", f"it is {view.dtype}",
            "convert it first",
        )  # fmt: skip
    item = ITEMSIZE[view.dtype]
    strides = (stride * item for stride in view.strides)
    return TensorType(_TYPES[view.dtype], *(
        tuple(value.value if isinstance(value, Const) else None for value in values)
        for values in (view.sizes, strides)
    ))  # fmt: skip
