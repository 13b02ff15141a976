"""The approximated gelu and its gradient: made of sigmoids, and as exact as before."""

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


def names(nest: LoopNest) -> list[str]:
    return [op.name for op in nest.body if isinstance(op, Pointwise)]


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    t = np.tanh(SCALE * (x + C * x**3))
    slope = 0.5 * x * (1 - t * t) * SCALE * (1 + 3 * C * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + slope


@pytest.mark.parametrize("with_gradient", [False, True])
def test_gelu_is_made_of_a_sigmoid(with_gradient):
    nest = gelu(with_gradient)
    used = names(simplify(nest))
    assert "tanh" not in used and used.count("sigmoid") == 1
    x = np.linspace(-9, 9, 4096, dtype=np.float32)
    arrays = [x, np.ones_like(x), np.zeros_like(x)] if with_gradient else [x, np.zeros_like(x)]
    result = execute(lower(nest, Blocks(4, 512)), arrays, ())[-1]
    wanted = exact(x)[with_gradient]
    error = np.abs(result - wanted)
    assert error.max() <= (2.5e-6 if with_gradient else 1e-6)  # as documented
    assert error[x < -6].max() <= 1e-12  # where 1 + tanh(y) would have lost everything


def test_a_tanh_that_is_used_otherwise_stays():
    used = names(simplify(gelu(False, more=True)))
    assert used.count("tanh") == 1 and "sigmoid" not in used
