"""Optimizers: the updates of `fused=True`, from operations on lists of tensors, and what
torch.compile must know of them.

Each operation on lists is one region for all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pagoda.pytorch.device import NAME

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]


def _require_unscaled(name: str, *scaling: torch.Tensor | None) -> None:
    if any(tensor is not None for tensor in scaling):
        raise NotImplementedError(
            f"{name} cannot unscale gradients on device pagoda: float16 is not computed with "
            "there, and bfloat16 needs no GradScaler. Leave the GradScaler out."
        )


def _gradients(grads: Tensors, params: Tensors, weight_decay: float, maximize: bool) -> Tensors:
    grads = torch._foreach_neg(grads) if maximize else grads
    return torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay else grads


def _adam(decoupled: bool) -> Callable:
    """Adam (Kingma and Ba, 2015); decoupled: with weight decay apart from the gradients (AdamW,
    Loshchilov and Hutter, 2019). `steps` count this step already."""

    def update(
        params: Tensors,
        grads: Tensors,
        means: Tensors,
        squares: Tensors,
        largest: Tensors,
        steps: Tensors,
        *,
        lr: float | torch.Tensor,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        _require_unscaled("AdamW" if decoupled else "Adam", grad_scale, found_inf)
        if decoupled and weight_decay:
            torch._foreach_mul_(params, 1 - float(lr) * weight_decay)
        grads = _gradients(grads, params, 0.0 if decoupled else weight_decay, maximize)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        if amsgrad:
            torch._foreach_maximum_(largest, squares)
        first, second = (
            torch._foreach_add(torch._foreach_neg(torch._foreach_pow(beta, steps)), 1)
            for beta in (beta1, beta2)
        )
        roots = torch._foreach_sqrt(largest if amsgrad else squares)
        torch._foreach_div_(roots, torch._foreach_sqrt(second))
        torch._foreach_add_(roots, eps)
        torch._foreach_mul_(roots, first)
        torch._foreach_addcdiv_(params, means, roots, -float(lr))

    return update


def _sgd(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    *,
    weight_decay: float,
    momentum: float,
    lr: float | torch.Tensor,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    _require_unscaled("SGD", grad_scale, found_inf)
    grads = _gradients(grads, params, weight_decay, maximize)
    if momentum:
        if is_first_step:
            torch._foreach_copy_(momenta, grads)
        else:
            torch._foreach_mul_(momenta, momentum)
            torch._foreach_add_(momenta, grads, alpha=1 - dampening)
        grads = torch._foreach_add(grads, momenta, alpha=momentum) if nesterov else momenta
    torch._foreach_add_(params, grads, alpha=-float(lr))


def _adagrad(
    params: Tensors,
    grads: Tensors,
    sums: Tensors,
    steps: Tensors,
    *,
    lr: float | torch.Tensor,
    lr_decay: float,
    weight_decay: float,
    eps: float,
    maximize: bool,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    _require_unscaled("Adagrad", grad_scale, found_inf)
    grads = _gradients(grads, params, weight_decay, maximize)
    torch._foreach_addcmul_(sums, grads, grads, 1.0)
    roots = torch._foreach_add(torch._foreach_sqrt(sums), eps)
    if lr_decay:
        slower = torch._foreach_mul(torch._foreach_sub(steps, 1), lr_decay)
        torch._foreach_mul_(roots, torch._foreach_add(slower, 1))
    torch._foreach_addcdiv_(params, grads, roots, -float(lr))


FUSED: dict[Any, Callable] = {
    aten._fused_adam_.default: _adam(decoupled=False),
    aten._fused_adam_.tensor_lr: _adam(decoupled=False),
    aten._fused_adamw_.default: _adam(decoupled=True),
    aten._fused_adamw_.tensor_lr: _adam(decoupled=True),
    aten._fused_sgd_.default: _sgd,
    aten._fused_sgd_.tensor_lr: _sgd,
    aten._fused_adagrad_.default: _adagrad,
    aten._fused_adagrad_.tensor_lr: _adagrad,
}


def register() -> None:
    """torch.compile of `optimizer.step` keeps step counts on the device, as on CUDA: Dynamo asks
    for CUDA by name."""
    from torch._dynamo.variables.optimizer import OptimizerVariable

    set_capturable = OptimizerVariable._set_capturable

    def _set_capturable(self: Any, tx: Any) -> None:
        for group in self.value.param_groups:
            new = all(
                p.device.type == NAME and p not in self.value.state for p in group["params"]
            )
            if new and "capturable" in group:
                group["capturable"] = True
        set_capturable(self, tx)

    OptimizerVariable._set_capturable = _set_capturable
