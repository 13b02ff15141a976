"""Gelu and the gradient of the approximated one: made of sigmoids, and as exact as documented."""

import math

import numpy as np
import pytest
from nest_support import execute

from pagoda.compiler.index_expr import Const, Var
from pagoda.compiler.loop_nest import Builder, LoopNest, Pointwise
from pagoda.compiler.nest_lowering import Blocks, lower
from pagoda.compiler.nest_simplify import simplify

C, SCALE = 0.044715, 0.7978845608028654


def gelu(with_gradient: bool, more: bool = False) -> LoopNest:
    """y = gelu(x), the way Inductor writes it; or dx = dy gelu'(x)."""
    b = Builder([Const(4096)])
    x = b.load("x", "float32", Var(0))

    def c(value: float) -> int:
        return b.constant(value, "float32")

    def p(name: str, *operands: int) -> int:
        return b.pointwise(name, *operands)

    square = p("mul", x, x)
    inner = p("add", x, p("mul", p("mul", square, x), c(C)))
    t = p("tanh", p("mul", inner, c(SCALE)))
    if more:
        b.store("t", "float32", Var(0), t)
    if not with_gradient:
        b.store("y", "float32", Var(0), p("mul", p("mul", x, c(0.5)), p("add", t, c(1.0))))
        return b.build()[0]
    left = p("mul", p("add", t, c(1.0)), c(0.5))
    slope = p("sub", c(1.0), p("mul", t, t))
    steep = p("mul", p("add", p("mul", square, c(3 * C)), c(1.0)), c(SCALE))
    right = p("mul", p("mul", p("mul", x, c(0.5)), slope), steep)
    grad = b.load("dy", "float32", Var(0))
    b.store("dx", "float32", Var(0), p("mul", grad, p("add", left, right)))
    return b.build()[0]


def exact_gelu() -> LoopNest:
    """y = x / 2 (1 + erf(x / sqrt(2)))."""
    b = Builder([Const(4096)])
    x = b.load("x", "float32", Var(0))
    scaled = b.pointwise("mul", x, b.constant(0.5**0.5, "float32"))
    above = b.pointwise("add", b.pointwise("erf", scaled), b.constant(1.0, "float32"))
    half = b.pointwise("mul", x, b.constant(0.5, "float32"))
    b.store("y", "float32", Var(0), b.pointwise("mul", half, above))
    return b.build()[0]


def names(nest: LoopNest) -> list[str]:
    return [op.name for op in nest.body if isinstance(op, Pointwise)]


def wanted(kind: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    t = np.tanh(SCALE * (x + C * x**3))
    slope = 0.5 * x * (1 - t * t) * SCALE * (1 + 3 * C * x * x)
    return {
        "tanh": 0.5 * x * (1 + t),
        "tanh, gradient": 0.5 * (1 + t) + slope,
        "erf": 0.5 * x * np.array([math.erfc(-v / math.sqrt(2)) for v in x]),
    }[kind]


NESTS = {"tanh": gelu(False), "tanh, gradient": gelu(True), "erf": exact_gelu()}


@pytest.mark.parametrize("kind", NESTS)
def test_gelu_is_made_of_a_sigmoid(kind):
    used = names(simplify(NESTS[kind]))
    assert not {"tanh", "erf"} & set(used) and used.count("recip1p_exp2") == 1
    x = np.linspace(-12, 12, 4096, dtype=np.float32)
    arrays = [x, np.ones_like(x), np.zeros_like(x)] if "gradient" in kind else [x, np.zeros_like(x)]
    result = execute(lower(NESTS[kind], Blocks(4, 512)), arrays, ())[-1]
    error = np.abs(result - wanted(kind, x))
    assert error.max() <= (2.5e-6 if "gradient" in kind else 1e-6)  # as documented
    assert error[x < -6].max() <= 1e-7 and error[x < -9].max() <= 1e-11


@pytest.mark.parametrize("kind", NESTS)
def test_values_that_are_not_finite(kind):
    x = np.array([np.nan, np.inf, -1e30, 1e30], np.float32).repeat(1024)
    arrays = [x, np.ones_like(x), np.zeros_like(x)] if "gradient" in kind else [x, np.zeros_like(x)]
    result = execute(lower(NESTS[kind], Blocks(4, 512)), arrays, ())[-1][::1024]
    assert np.isnan(result[0])
    if "gradient" not in kind:
        assert result[1:].tolist() == [np.inf, 0.0, np.float32(1e30)]


def test_a_tanh_that_is_used_otherwise_stays():
    used = names(simplify(gelu(False, more=True)))
    assert used.count("tanh") == 1 and "recip1p_exp2" not in used
