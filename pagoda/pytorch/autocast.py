"""`torch.autocast("pagoda")`: products in bfloat16, what needs range or precision in float32.

The lists are those of torch's autocast for CUDA (`ATen/autocast_mode.h`). Weights are cast where
they are used: inside of torch.compile once per graph, in eager code once per operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pagoda"
_KEY = "AutocastPrivateUse1"
_BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

# In the type of the region (bfloat16).
LOWER = [
    "_convolution", "conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding",
    "conv3d.padding", "conv_tbc", "conv_transpose1d", "conv_transpose2d.input",
    "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul",
    "linalg_multi_dot", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell",
    "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "scaled_dot_product_attention",
]  # fmt: skip

# In float32.
FLOAT32 = [
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
    "reciprocal", "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm",
    "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d",
    "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss",
    "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss",
    "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm",
    "logsumexp", "norm.Scalar", "norm.ScalarOpt_dim",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
]  # fmt: skip

# In float32, unless the call names a type.
FLOAT32_UNLESS_GIVEN = [
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "sum", "sum.dim_IntList",
]  # fmt: skip

# In the widest type among the arguments.
WIDEST = [
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler",
    "index_put", "tensordot", "scatter_add",
]  # fmt: skip

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of the device among the arguments, in `dtype`; float64 and integers as they are."""

    def one(item: Any) -> Any:
        here = isinstance(item, torch.Tensor) and item.device.type == NAME
        return item.to(dtype) if here and item.dtype in _FLOATS else item

    return tree_map(one, value)


def _in(op: Any, dtype: torch.dtype | None, unless_given: bool = False) -> Any:
    """The operation in `dtype`; without one in that of the region."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_BELOW):
            given = any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values()))
            if unless_given and given:
                return op(*args, **kwargs)
            wanted = torch.get_autocast_dtype(NAME) if dtype is None else dtype
            return op(*_cast(args, wanted), **_cast(kwargs, wanted))

    return run


def _in_widest(op: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_BELOW):
            tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
            wide = any(t.dtype == torch.float32 for t in tensors)
            wanted = torch.float32 if wide else torch.get_autocast_dtype(NAME)
            return op(*_cast(args, wanted), **_cast(kwargs, wanted))

    return run


def register() -> list[torch.library.Library]:
    """Fills torch's table for the device in; the libraries returned keep it alive."""
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, _KEY)
    library = torch.library.Library("aten", "IMPL")

    def each(names: list[str], make: Any) -> None:
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, make(op), _KEY)

    each(LOWER, lambda op: _in(op, None))
    each(FLOAT32, lambda op: _in(op, torch.float32))
    each(FLOAT32_UNLESS_GIVEN, lambda op: _in(op, torch.float32, unless_given=True))
    each(WIDEST, _in_widest)
    # Operations that take functions (a layer that is lowered once) leave autocast to what is
    # inside them, as they do on CUDA.
    key = torch._C.DispatchKey.AutocastPrivateUse1
    torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS.append(key)
    for op in torch._ops._higher_order_ops.values():
        op.fallthrough(key)
    torch.set_autocast_dtype(NAME, torch.bfloat16)
    return [rest, library]
