"""Operators that work element by element."""

from __future__ import annotations

import functools
import operator as python
from typing import Any

import torch
from torch.nn import functional as F

from pagoda.pytorch.onnx_import.operators import operator, require
from pagoda.pytorch.onnx_import.types import type_of

_SAME = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Log": torch.log,
    "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_TWO = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "And": torch.logical_and,
    "Or": torch.logical_or, "Xor": torch.logical_xor, "Equal": torch.eq, "Less": torch.lt,
    "Greater": torch.gt, "LessOrEqual": torch.le, "GreaterOrEqual": torch.ge,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip


class _One:
    """A function of one operand, without its other parameters."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class _Two:
    """A function of two operands, one of which may be a number."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, a: Any, b: Any) -> torch.Tensor:
        if isinstance(a, torch.Tensor):
            return self.function(a, b)
        return self.function(torch.full((), a, dtype=b.dtype, device=b.device), b)


for _name, _function in _SAME.items():
    operator(_name)(_One(_function))
for _name, _function in _TWO.items():
    operator(_name, numbers=None)(_Two(_function))


@operator("Identity")
def identity(x: torch.Tensor) -> torch.Tensor:
    return x


@operator("Dropout", constants={1: "ratio", 2: "training"})
def dropout(x, *, ratio=0.5, training=False, seed=None, outputs=1):
    require(not training, "training mode", "export the model for inference: model.eval()")
    return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


@operator("Div", numbers=None)
def div(a, b):
    number = next(v for v in (a, b) if isinstance(v, torch.Tensor))
    rounding = None if number.dtype.is_floating_point else "trunc"
    return torch.div(a, b, rounding_mode=rounding)


@operator("Pow", numbers=None)
def power(a, b):
    result = torch.pow(a, b)
    return result.to(a.dtype) if isinstance(a, torch.Tensor) else result


@operator("Mod")
def mod(a, b, *, fmod=0):
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("BitShift")
def bit_shift(a, b, *, direction):
    return a << b if direction == "LEFT" else a >> b


@operator("Max")
def maximum(*tensors):
    return functools.reduce(torch.maximum, tensors)


@operator("Min")
def minimum(*tensors):
    return functools.reduce(torch.minimum, tensors)


@operator("Sum")
def total(*tensors):
    return functools.reduce(python.add, tensors)


@operator("Mean")
def mean(*tensors):
    return functools.reduce(python.add, tensors) / len(tensors)


@operator("Where", numbers=None)
def where(condition, a, b):
    return torch.where(condition, a, b)


@operator("Clip", numbers=None)
def clip(x, low=None, high=None, *, min=None, max=None):
    low, high = (min if low is None else low), (max if high is None else high)
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Cast")
def cast(x, *, to, saturate=1, round_mode="up"):
    return x.to(type_of(to))


@operator("CastLike")
def cast_like(x, like, *, saturate=1, round_mode="up"):
    return x.to(like.dtype)


@operator("IsInf")
def is_inf(x, *, detect_negative=1, detect_positive=1):
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if not detect_negative and not detect_positive:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isneginf(x) if detect_negative else torch.isposinf(x)


@operator("LeakyRelu")
def leaky_relu(x, *, alpha=0.01):
    return F.leaky_relu(x, alpha)


@operator("Elu")
def elu(x, *, alpha=1.0):
    return F.elu(x, alpha)


@operator("Celu")
def celu(x, *, alpha=1.0):
    return F.celu(x, alpha)


@operator("Selu")
def selu(x, *, alpha=1.6732632423543772, gamma=1.0507009873554805):
    return gamma * F.elu(x, alpha)


@operator("Swish")
def swish(x, *, alpha=1.0):
    return x * torch.sigmoid(alpha * x)


@operator("ThresholdedRelu")
def thresholded_relu(x, *, alpha=1.0):
    return torch.where(x > alpha, x, 0)


@operator("Shrink")
def shrink(x, *, bias=0.0, lambd=0.5):
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0)).to(x.dtype)


@operator("HardSigmoid")
def hard_sigmoid(x, *, alpha=0.2, beta=0.5):
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("Gelu")
def gelu(x, *, approximate="none"):
    return F.gelu(x, approximate=approximate)


@operator("PRelu")
def prelu(x, slope):
    return torch.where(x < 0, x * slope, x)


@operator("Softmax")
def softmax(x, *, axis=-1):
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax(x, *, axis=-1):
    return torch.log_softmax(x, axis)


@operator("Hardmax")
def hardmax(x, *, axis=-1):
    index = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, index, 1.0)


@operator("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
          "Multinomial")  # fmt: skip
def random(*inputs, **attributes):
    require(False, "it draws random numbers, whose values ONNX does not define",
            "give them to the model as an input")  # fmt: skip
