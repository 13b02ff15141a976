"""Matrix product: c[g] = a[g] b[g] (+ bias), any strides, bf16 or int8 in, f32, bf16 or i32 out.

k is added in order with one rounding per step, so block sizes never change a bit.
"""

from __future__ import annotations

from pagoda.compiler.cost import MatmulPlan, MatmulShape, choose_matmul
from pagoda.compiler.errors import CompileError
from pagoda.compiler.language import (
    Tensor,
    TensorType,
    block,
    cdiv,
    core_count,
    core_id,
    core_tiles,
    dot,
    finish_with,
    kernel,
    load,
    store,
    tiles,
    zeros,
)
from pagoda.compiler.nest_epilogue import Epilogue, epilogue_cost
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType


@kernel
def matmul(
    c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, *, BM, BN, BK, BUFFERS, ACC, EPILOGUE
):
    """c[g, m, n] = a[g, m, k] b[g, k, n] + bias[n]: output tiles dealt out to the cores. EPILOGUE:
    a loop nest that goes on from there, or None."""
    down, across = cdiv(c.size(1), BM), cdiv(c.size(2), BN)
    for t in range(core_id(), c.size(0) * down * across, core_count()):
        g = t // (down * across)
        i = block(t // across % down, c.size(1), BM)
        j = block(t % across, c.size(2), BN)
        acc = zeros(i, j, ACC)
        for k in tiles(a.size(2), BK):
            w = load(b[g, k, j], buffers=BUFFERS)  # before a, which may wait for its maker
            acc += dot(load(a[g, i, k], buffers=BUFFERS), w)
        if EPILOGUE is not None and bias is not None:
            finish_with(EPILOGUE, c[g, i, j], acc + load(bias[j]))
        elif EPILOGUE is not None:
            finish_with(EPILOGUE, c[g, i, j], acc)
        elif bias is not None:
            store(c[g, i, j], acc + load(bias[j]))
        else:
            store(c[g, i, j], acc)


@kernel
def matmul_resident(
    c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, *, BM, BN, BK, AHEAD, ACC, EPILOGUE
):
    """The same for a fixed k: BM whole rows of a stay in SRAM while b streams by. For few rows
    (a decode step is one) nothing but b is loaded again and again, and AHEAD tiles of it are on
    their way before the rows of a are asked for."""
    for g in range(c.size(0)):
        for i in tiles(c.size(1), BM):
            x = load(a[g, i, :], buffers=1)
            for j in core_tiles(c.size(2), BN, ahead=AHEAD):
                acc = zeros(i, j, ACC)
                for k in tiles(a.size(2), BK):
                    acc += dot(x[:, k], load(b[g, k, j], buffers=AHEAD + 1))
                if EPILOGUE is not None and bias is not None:
                    finish_with(EPILOGUE, c[g, i, j], acc + load(bias[j]))
                elif EPILOGUE is not None:
                    finish_with(EPILOGUE, c[g, i, j], acc)
                elif bias is not None:
                    store(c[g, i, j], acc + load(bias[j]))
                else:
                    store(c[g, i, j], acc)


def build_matmul(
    chip: Chip,
    c: TensorType,
    a: TensorType,
    b: TensorType,
    bias: TensorType | None = None,
    *,
    expected: tuple[int, int, int, int] | None = None,
    plan: MatmulPlan | None = None,
    epilogue: Epilogue | None = None,
) -> Kernel:
    """The kernel for these operands, all of rank 3 (bias: 1), with the cheapest block sizes.

    a, b: both BF16 or both I8; strides None but for one contiguous dimension, sizes None where the
    call gives them. expected: (batch, m, n, k) to choose block sizes for; default: the fixed sizes,
    and 64 for each unknown one. plan: block sizes chosen elsewhere. Any plan gives the same bits.
    epilogue: takes c's place, which is written then only if the epilogue says so; for a batch of
    one. Raises CompileError.
    """
    check_operands(chip, a.dtype)
    size = a.dtype.bits // 8
    fixed = (c.sizes[0], c.sizes[1] or a.sizes[1], c.sizes[2] or b.sizes[2], a.sizes[2])
    batch, m, n, k = expected or tuple(64 if s is None else s for s in fixed)
    shape = MatmulShape(
        batch, m, n, k, size, c.dtype.bits // 8,
        transposed_a=a.strides[2] != size and a.strides[1] == size,
        transposed_b=b.strides[2] != size and b.strides[1] == size,
        bias=bias is not None, fixed_k=a.sizes[2] is not None,
        epilogue=None if epilogue is None else epilogue_cost(epilogue, c.dtype, bias is not None),
    )  # fmt: skip
    plan = plan or choose_matmul(chip, shape)
    given = dict(c=c, a=a, b=b, bias=bias, BM=plan.bm, BN=plan.bn, BK=plan.bk)
    given["EPILOGUE"] = epilogue
    given["ACC"] = DType.I32 if a.dtype == DType.I8 else DType.F32
    if plan.resident:
        return matmul_resident.build(**given, AHEAD=plan.buffers - 1)
    return matmul.build(**given, BUFFERS=plan.buffers)


def check_operands(chip: Chip, dtype: DType) -> None:
    """Before block sizes are chosen, which would be in vain."""
    wanted = "int8" if dtype == DType.I8 else "bf16"
    if wanted not in chip.matrix_types:
        raise CompileError(
            f"{wanted} matmul", f"it needs a matrix engine that multiplies {wanted}",
            f"chip {chip.name} has {', '.join(chip.matrix_types)}",
            f"convert the operands to {' or '.join(chip.matrix_types)}, or use another chip",
        )  # fmt: skip
