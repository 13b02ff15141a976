"""`torch.autocast("pagoda")`: which operations run in bfloat16 and which in float32.

The lists are those of CUDA (torch's `aten/src/ATen/autocast_mode.h`). Their kernels stand above
autograd, so that gradients pass through the casts, and call the operation again without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pagoda.pytorch.device import NAME

aten = torch.ops.aten

_LOWER = """_convolution conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding conv_tbc
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv
    addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    scaled_dot_product_attention"""
_FLOAT32 = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm
    cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
    multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
    binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
    _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa norm.Scalar
    norm.ScalarOpt_dim"""
# Computed in float32 unless the call asks for a type.
_FLOAT32_UNLESS_ASKED = """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum sum
    sum.dim_IntList"""
_WIDEST = """addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put tensordot
    scatter_add vdot"""

_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_library = torch.library.Library("aten", "IMPL")  # must stay alive


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Tensors of floating-point numbers on the device, wherever they are in the arguments."""

    def one(value: Any) -> Any:
        eligible = (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.device.type == NAME
            and value.dtype != torch.float64
        )
        return value.to(dtype) if eligible else value

    return pytree.tree_map(one, values)


def _to_lower(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return _cast((args, kwargs), torch.get_autocast_dtype(NAME))


def _to_float32(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return _cast((args, kwargs), torch.float32)


def _to_float32_unless_asked(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    given = [*args, *kwargs.values()]
    asked = any(isinstance(value, torch.dtype) for value in given)
    if asked or not args[0].is_floating_point():
        return args, kwargs
    return args, kwargs | {"dtype": torch.float32}


def _to_widest(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    wide = any(t.dtype == torch.float32 for t in tensors)
    return _to_float32(args, kwargs) if wide else _to_lower(args, kwargs)


def _kernel(op: Any, policy: Callable) -> Callable:
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            args, kwargs = policy(args, kwargs)
            return op(*args, **kwargs)

    return autocast


def _register() -> None:
    for names, policy in (
        (_LOWER, _to_lower),
        (_FLOAT32, _to_float32),
        (_FLOAT32_UNLESS_ASKED, _to_float32_unless_asked),
        (_WIDEST, _to_widest),
    ):
        for name in names.split():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(aten, packet), overload or "default")
            kernel = torch._disable_dynamo(_kernel(op, policy))
            _library.impl(name, kernel, "AutocastPrivateUse1")


_register()
