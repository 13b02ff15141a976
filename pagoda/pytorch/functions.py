"""Elementary and special functions, made of those the chip's compiler knows.

Errors are given where they are more than those of the functions they are made of.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

LN2 = math.log(2)
_LARGE = 1e8  # its square plus 1 is its square


def _in_float32(function: Callable) -> Callable:
    """Of integers the float32 result; bfloat16 is rounded once, at the end."""

    @functools.wraps(function)
    def computed(*args: Any) -> Any:
        kind = next(a for a in args if isinstance(a, torch.Tensor)).dtype
        result = function(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))
        return result.to(kind) if kind.is_floating_point else result

    return computed


@_in_float32
def asinh(x: torch.Tensor) -> torch.Tensor:
    """sign(x) log(|x| + sqrt(x^2 + 1)), with log1p where |x| is small."""
    a = x.abs()
    small = torch.log1p(a + a * a / (1 + torch.sqrt(a * a + 1)))
    return copysign(torch.where(a > _LARGE, torch.log(a) + LN2, small), x)


@_in_float32
def acosh(x: torch.Tensor) -> torch.Tensor:
    """log(x + sqrt(x^2 - 1)); NaN below 1."""
    above = x - 1
    near = torch.log1p(above + torch.sqrt(above * (x + 1)))
    return torch.where(x > _LARGE, torch.log(x) + LN2, near)


@_in_float32
def atanh(x: torch.Tensor) -> torch.Tensor:
    """log((1 + x) / (1 - x)) / 2; NaN beyond 1."""
    a = x.abs()
    return copysign(0.5 * torch.log1p(2 * a / (1 - a)), x)


def copysign(x: torch.Tensor, sign: Any) -> torch.Tensor:
    if not isinstance(sign, torch.Tensor):
        a = x.abs() if x.is_floating_point() else x.abs().float()
        return -a if math.copysign(1, sign) < 0 else a
    kind = torch.result_type(x, sign)
    a = (x if kind.is_floating_point else x.float()).abs()
    return torch.where(torch.signbit(sign), -a, a)


def hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """sqrt(x^2 + y^2) without overflow of the squares."""
    a, b = x.abs(), y.abs()
    long, short = torch.maximum(a, b), torch.minimum(a, b)
    ratio = torch.where(long == 0, 0, short / long)
    length = long * torch.sqrt(1 + ratio * ratio)
    return torch.where(torch.isinf(a) | torch.isinf(b), math.inf, length)


def _polynomial(x: torch.Tensor, coefficients: list[float]) -> torch.Tensor:
    """Horner's scheme, highest power first."""
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total


# Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011), single precision.
_CENTRE = [2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
           -0.00125372503, -0.00417768164, 0.246640727, 1.50140941]  # fmt: skip
_TAIL = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
         -0.0076224613, 0.00943887047, 1.00167406, 2.83297682]  # fmt: skip


@_in_float32
def erfinv(x: torch.Tensor) -> torch.Tensor:
    """Relative error below 1e-6."""
    w = -torch.log((1 - x) * (1 + x))
    centre = _polynomial(w - 2.5, _CENTRE)
    tail = _polynomial(torch.sqrt(torch.clamp(w, min=5.0)) - 3.0, _TAIL)
    inside = torch.where(w < 5, centre, tail) * x
    return torch.where(x.abs() == 1, x * math.inf, inside)


_SHIFT = 8  # Stirling's series from here on


def _shifted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An argument y of at least 1/2 for x (1 - x below 1/2), and whether it was reflected."""
    reflected = x < 0.5
    return torch.where(reflected, 1 - x, x), reflected


@_in_float32
def lgamma(x: torch.Tensor) -> torch.Tensor:
    """log |gamma(x)|: Stirling's series at y + 8 less log(y (y + 1) ... (y + 7)), reflected below
    1/2. Absolute error near the zeros 1 and 2 about 2e-6."""
    y, reflected = _shifted(x)
    low = y < _SHIFT
    z = torch.where(low, y + _SHIFT, y)
    product = y
    for step in range(1, _SHIFT):
        product = product * (y + step)
    inverse = 1 / z
    series = inverse * (1 / 12 - inverse * inverse * (1 / 360 - inverse * inverse / 1260))
    value = (z - 0.5) * torch.log(z) - z + 0.5 * math.log(2 * math.pi) + series
    value = torch.where(low, value - torch.log(torch.where(low, product, 1)), value)
    value = torch.where(torch.isinf(x), math.inf, value)
    part = x - torch.floor(x)
    mirrored = math.log(math.pi) - torch.log(torch.sin(math.pi * part).abs()) - value
    mirrored = torch.where((part == 0) | torch.isinf(x), math.inf, mirrored)
    return torch.where(reflected, mirrored, value)


@_in_float32
def digamma(x: torch.Tensor) -> torch.Tensor:
    """The derivative of log gamma: log z - 1/(2 z) - ..., z = y + 8, less 1/y + ... + 1/(y + 7)."""
    y, reflected = _shifted(x)
    z = y + _SHIFT
    inverse = 1 / (z * z)
    value = torch.log(z) - 0.5 / z - inverse * (1 / 12 - inverse * (1 / 120 - inverse / 252))
    for step in range(_SHIFT):
        value = value - 1 / (y + step)
    part = x - torch.floor(x)
    mirrored = value - math.pi / torch.tan(math.pi * part)
    mirrored = torch.where(part == 0, math.nan, mirrored)
    result = torch.where(reflected, mirrored, value)
    return torch.where(x == 0, torch.where(torch.signbit(x), math.inf, -math.inf), result)


def polygamma(n: int, x: torch.Tensor) -> Any:
    """Orders 0 and 1, the gradient of `digamma`."""
    if n == 0:
        return digamma(x)
    if n != 1:
        return NotImplemented
    return _trigamma(x)


@_in_float32
def _trigamma(x: torch.Tensor) -> torch.Tensor:
    y, reflected = _shifted(x)
    z = y + _SHIFT
    inverse = 1 / (z * z)
    value = 1 / z + inverse / 2 + inverse / z * (1 / 6 - inverse * (1 / 30 - inverse / 42))
    for step in range(_SHIFT):
        value = value + 1 / ((y + step) * (y + step))
    sine = torch.sin(math.pi * (x - torch.floor(x)))
    return torch.where(reflected, (math.pi / sine) * (math.pi / sine) - value, value)


@_in_float32
def erfcx(x: torch.Tensor) -> torch.Tensor:
    """exp(x^2) erfc(x): so while x is below 2, then its continued fraction, relative error below
    1e-6."""
    near = torch.clamp(x, max=2.0)
    direct = torch.exp(near * near) * torch.erfc(near)
    far = torch.clamp(x, min=2.0)
    fraction = far
    for step in range(24, 0, -1):
        fraction = far + step / 2 / fraction
    return torch.where(x < 2, direct, 1 / (math.sqrt(math.pi) * fraction))
