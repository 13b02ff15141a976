"""Decompositions beside Inductor's own: operations that become loop nests here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch._inductor.decomposition import select_decomp_table
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.nn.modules import linear_cross_entropy

from pagoda.pytorch import (
    convolution_3d,
    functions,
    grouped,
    int8,
    integers,
    padded_pooling,
    pooling,
    resampling,
    scans,
    scatters,
    sorting,
)
from pagoda.pytorch.errors import Unsupported

aten = torch.ops.aten


def _baddbmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _joined(bias, torch.bmm(a, b), beta, alpha)


def _joined(bias: torch.Tensor, product: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    if not product.is_floating_point():  # as torch does
        beta, alpha = int(beta), int(alpha)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return product + (bias if beta == 1 else bias * beta)


def _addbmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return _joined(bias, torch.bmm(a, b).sum(0), beta, alpha)


def _index_add(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: float = 1
) -> Any:
    """bfloat16 is added up in float32: Inductor has no loops for it."""
    if x.dtype != torch.bfloat16:
        return _INDUCTORS_INDEX_ADD(x, dim, index, source, alpha=alpha)
    added = _INDUCTORS_INDEX_ADD(x.float(), dim, index, source.float(), alpha=alpha)
    return added.to(x.dtype)


def _linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, device: Any = None,
              **options: Any) -> Any:  # fmt: skip
    """To integers, for which torch cuts the ends, too; or from or to a tensor, where Inductor's own
    needs float64."""
    dtype = dtype or torch.get_default_dtype()
    tensors = isinstance(start, torch.Tensor) or isinstance(end, torch.Tensor)
    if dtype.is_floating_point and not tensors:
        return NotImplemented
    start, end = (_rounded(a, dtype) for a in (start, end))
    number = torch.arange(steps, device=device)
    step = (end - start) / max(steps - 1, 1)
    values = torch.where(
        number < (steps + 1) // 2, start + step * number, end - step * (steps - 1 - number)
    )
    return values.to(dtype)


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """A number or tensor as float, after it had that type."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype).float()
    return value if dtype.is_floating_point else int(value)


def _logspace(start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None,
              device: Any = None, **options: Any) -> Any:  # fmt: skip
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise Unsupported(
            f"logspace of {dtype} needs powers that are exact before they are cut to integers, and "
            "the chip computes them in float32. Use dtype=torch.float32 and .round() before "
            f".to({dtype})."
        )
    exponents = torch.linspace(start, end, steps, dtype=torch.float32, device=device)
    return torch.pow(base, exponents).to(dtype)


def _hardshrink_backward(grad: torch.Tensor, x: torch.Tensor, lambd: float) -> torch.Tensor:
    return torch.where((x >= -lambd) & (x <= lambd), 0, grad)


def _uniform(
    x: torch.Tensor, low: float = 0.0, high: float = 1.0, generator: Any = None
) -> torch.Tensor:
    return torch.rand_like(x) * (high - low) + low


def _normal(size: Any, *, mean: Any, std: Any, generator: Any = None, **made: Any) -> torch.Tensor:
    made.pop("requires_grad")
    return torch.randn(size, **made) * std + mean


def _bernoulli(x: torch.Tensor, p: float = 0.5, generator: Any = None) -> torch.Tensor:
    return (torch.rand_like(x, dtype=torch.float32) < p).to(x.dtype)


def _weight_norm_backward(
    grad: torch.Tensor, v: torch.Tensor, g: torch.Tensor, norms: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of w = v g / |v|, the norm taken over all dimensions but `dim`."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    along = (grad * v).sum(others, keepdim=True)
    norms = norms.view(g.shape)
    return g / norms * (grad - v * (along / norms.square())), along / norms


def _trilinear(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, expand1: Sequence[int],
    expand2: Sequence[int], expand3: Sequence[int], sumdim: Sequence[int], unroll_dim: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Sum over the dimensions `sumdim` of a b c, each of which lacks the dimensions it is expanded
    in: `bilinear` and its gradients. a and b are multiplied first, as on the CPU."""
    rank = a.dim() + len(expand1)

    def letters(without: Sequence[int]) -> str:
        left_out = {d % rank for d in without}
        return "".join(chr(ord("a") + d) for d in range(rank) if d not in left_out)

    factors = f"{letters(expand1)},{letters(expand2)},{letters(expand3)}"
    return aten.einsum.default(f"{factors}->{letters(sumdim)}", [a, b, c])


def _traced(op: CustomOpDef) -> Callable:
    """What an operation that torch writes in Python does, as operations of which none writes into
    another's result."""
    return dispatch_functionalize(op._init_fn)


def _zeros(size: Sequence[int], **options: Any) -> torch.Tensor:
    """What autograd takes for gradients that are 0; elsewhere it has no memory."""
    return torch.zeros(size, **options)


# torch's own decompositions that Inductor leaves out because other backends have kernels for them.
_MORE = [
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.out,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.out,
    aten.upsample_trilinear3d.default,
    aten.upsample_trilinear3d.out,
    aten._adaptive_avg_pool2d_backward,
]


def _inductors(op: Any) -> Callable:
    """Inductor's decomposition, if it has one."""
    return select_decomp_table().get(op, lambda *args, **kwargs: NotImplemented)


def _either(first: Callable, second: Any) -> Callable:
    """`first`, or where that does not apply `second`; for an operation, what Inductor does."""
    below = _inductors(second) if isinstance(second, torch._ops.OpOverload) else second

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        result = first(*args, **kwargs)
        return below(*args, **kwargs) if result is NotImplemented else result

    return decomposed


def _addmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    if a.is_floating_point():
        return NotImplemented
    return _joined(bias, torch.mm(a, b), beta, alpha)


_INDUCTORS_INDEX_ADD = _inductors(aten.index_add.default)

_OURS: dict[Any, Callable] = {
    aten.addbmm.default: _addbmm,
    aten.baddbmm.default: _baddbmm,
    aten.index_add.default: _index_add,
    **{op: scatters.narrowed(op, _inductors(op))
       for op in (aten.index_put.default, aten.scatter_add.default)},
    aten.bernoulli.p: _bernoulli,
    aten.uniform.default: _uniform,
    torch.ops.prims.normal.default: _normal,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    aten.linspace.default: _either(_linspace, aten.linspace.default),
    aten.linspace.Tensor_Tensor: _linspace,
    aten.linspace.Tensor_Scalar: _linspace,
    aten.linspace.Scalar_Tensor: _linspace,
    aten.logspace.default: _logspace,
    aten.logspace.Tensor_Tensor: _logspace,
    aten.logspace.Tensor_Scalar: _logspace,
    aten.logspace.Scalar_Tensor: _logspace,
    aten.hardshrink_backward.default: _hardshrink_backward,
    aten.softshrink_backward.default: _hardshrink_backward,
    aten.pow.Tensor_Tensor: _either(integers.power, aten.pow.Tensor_Tensor),
    aten.pow.Scalar: _either(integers.power, aten.pow.Scalar),
    aten._trilinear.default: _trilinear,
    aten._efficientzerotensor.default: _zeros,
    aten.gcd.default: integers.gcd,
    aten.take.default: scatters.take,
    aten.nonzero_static.default: scatters.nonzero_static,
    aten.fractional_max_pool2d.default: pooling.fractional_max_pool_2d,
    aten.fractional_max_pool3d.default: pooling.fractional_max_pool_3d,
    aten.mm.default: integers.product(_inductors(aten.mm.default)),
    aten.bmm.default: integers.product(_inductors(aten.bmm.default)),
    aten.addmm.default: _either(_addmm, aten.addmm.default),
    aten.tril_indices.default: integers.tril_indices,
    aten.triu_indices.default: integers.triu_indices,
    aten.cumsum.default: scans.cumsum,
    aten.cumprod.default: scans.cumprod,
    aten.cummax.default: scans.cummax,
    aten.cummin.default: scans.cummin,
    aten._logcumsumexp.default: scans.logcumsumexp,
    aten.logcumsumexp.default: scans.logcumsumexp,
    aten.median.default: sorting.median,
    aten.median.dim: sorting.median_along,
    aten.nanmedian.default: sorting.nanmedian,
    aten.nanmedian.dim: sorting.nanmedian_along,
    aten.kthvalue.default: sorting.kthvalue,
    aten.mode.default: sorting.mode,
    aten.scatter.reduce: scatters.scatter,
    aten.scatter.value_reduce: scatters.scatter,
    aten.scatter_reduce.two: scatters.scatter_reduce,
    aten.index_reduce.default: scatters.index_reduce,
    aten.masked_scatter.default: scatters.masked_scatter,
    aten.masked_scatter_backward.default: scatters.masked_scatter_backward,
    aten.searchsorted.Tensor: scatters.searchsorted,
    aten.searchsorted.Scalar: scatters.searchsorted,
    aten.bucketize.Tensor: scatters.bucketize,
    aten.bucketize.Scalar: scatters.bucketize,
    aten.avg_pool2d.default: _either(pooling.avg_pool_2d, padded_pooling.avg_pool2d),
    aten.avg_pool3d.default: pooling.avg_pool_3d,
    aten.adaptive_max_pool2d.default: _either(
        pooling.adaptive_max_2d, aten.adaptive_max_pool2d.default
    ),
    aten.adaptive_max_pool3d.default: pooling.adaptive_max,
    aten.avg_pool2d_backward.default: pooling.avg_pool_backward_2d,
    aten.avg_pool3d_backward.default: pooling.avg_pool_backward_3d,
    aten.max_pool2d_with_indices_backward.default: _either(
        padded_pooling.max_pool2d_with_indices_backward, pooling.max_pool_backward_2d
    ),
    aten.mean.dim: _either(padded_pooling.mean, aten.mean.dim),
    aten.convolution.default: convolution_3d.convolution,
    aten.convolution_backward.default: convolution_3d.convolution_backward,
    aten.max_pool3d_with_indices_backward.default: pooling.max_pool_backward_3d,
    aten.adaptive_max_pool2d_backward.default: pooling.adaptive_max_pool_backward_2d,
    aten.adaptive_max_pool3d_backward.default: pooling.adaptive_max_pool_backward_3d,
    aten.fractional_max_pool2d_backward.default: pooling.fractional_max_pool_backward_2d,
    aten.fractional_max_pool3d_backward.default: pooling.fractional_max_pool_backward_3d,
    aten.asinh.default: functions.asinh,
    aten.acosh.default: functions.acosh,
    aten.atanh.default: functions.atanh,
    aten.copysign.Tensor: functions.copysign,
    aten.copysign.Scalar: functions.copysign,
    aten.hypot.default: functions.hypot,
    aten.erfinv.default: functions.erfinv,
    aten.lgamma.default: functions.lgamma,
    aten.digamma.default: functions.digamma,
    aten.polygamma.default: functions.polygamma,
    aten.special_erfcx.default: functions.erfcx,
    **{op._opoverload: _traced(op) for op in (
        linear_cross_entropy._linear_cross_entropy_batch_chunked,
        linear_cross_entropy._linear_cross_entropy_batch_chunked_no_reduction,
    )},
}


class _Table(dict):
    """Pickled by name: Inductor makes the keys of its caches by pickling, and some of torch's own
    decompositions cannot be. `graph_pass.source_hash` tells versions apart."""

    def __reduce__(self) -> tuple:
        return table, ()


def table() -> dict[Any, Callable]:
    """Inductor's decompositions, with ours."""
    experts, inductors = {}, select_decomp_table()
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        experts[torch.ops.transformers.grouped_mm_fallback.default] = grouped.grouped_mm
        backward = torch.ops.transformers.grouped_mm_fallback_backward.default
        experts[backward] = grouped.grouped_mm_backward
    return _Table({
        **experts,
        aten.topk.default: sorting.topk,
        aten.sort.default: sorting.sort,
        aten.sort.stable: sorting.sort_stable,
        aten.histc.default: sorting.histc,
        aten._grouped_mm.default: grouped.grouped_mm,
        **inductors,
        **get_decompositions(_MORE),
        **_OURS,
        **int8.DECOMPOSITIONS,
        **_nearest_gradients(),
        _MAX_2D: pooling.max_pool(
            2, _either(padded_pooling.max_pool2d_with_indices, inductors[_MAX_2D])
        ),
        _MAX_3D: pooling.max_pool(3, inductors[_MAX_3D]),
    })


_MAX_2D, _MAX_3D = aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default


def _nearest_gradients() -> dict[Any, Callable]:
    gradients = {}
    for name, centre in (("upsample_nearest", 0.0), ("_upsample_nearest_exact", 0.5)):
        for dims in (1, 2, 3):
            op = getattr(aten, f"{name}{dims}d_backward").default
            gradients[op] = resampling.nearest_backward(centre)
    return gradients
