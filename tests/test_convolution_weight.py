"""The gradient of a convolution's kernel: bits against chains in the documented order, for any
block sizes; layouts that are refused; cycles."""

import random
from dataclasses import replace

import numpy as np
import pytest
from compiler_support import bfloat16, run_kernel
from hypothesis import given, settings
from test_convolution import EDGE, SHAPES, TINY, operands, shapes, windows
from test_convolution_call import view

from pagoda.compiler.errors import CompileError
from pagoda.compiler.region import KernelCall, LibraryCall
from pagoda.isa.accumulation import matmul as reference_product
from pagoda.isa.numbers import DType
from pagoda.kernels.convolution_call import convolution_weight_for
from pagoda.kernels.convolution_shape import ConvolutionShape
from pagoda.kernels.convolution_weight import build_convolution_weight
from pagoda.kernels.convolution_weight_shape import (
    RUN,
    WeightPlan,
    legal_depthwise_weight_plans,
    legal_weight_plans,
)
from pagoda.sim import Simulator

SAME = ((1, 1), (1, 1))
ATTRIBUTES = ("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups")


def pixels(shape, kind=bfloat16):
    """x and g."""
    shape = replace(shape, bias=False, operand_bytes=2)
    rng = np.random.default_rng(1)
    x = operands(shape)[0].astype(kind)
    return x, rng.standard_normal((shape.n, shape.oh, shape.ow, shape.co)).astype(kind)


def run(chip, shape, x, g, output=DType.F32, plan=None, machine=None):
    kind = np.float32 if output is DType.F32 else bfloat16
    dw = np.zeros((shape.co, *shape.kernel, shape.group_ci), kind)
    operand = DType.F32 if x.dtype == np.float32 else DType.BF16
    kernel = build_convolution_weight(chip, replace(shape, bias=False), operand, output, plan)
    return dw, run_kernel(chip, kernel, machine, dw=dw, x=x, g=g)


def chain(g, taken):
    """g [p, m], taken [p, k]: [m, k] by one chain over p."""
    start = np.zeros((g.shape[1], taken.shape[1]), np.float32)
    return reference_product(np.ascontiguousarray(g.T), np.ascontiguousarray(taken), start)


def expected(shape, x, g):
    taken = windows(shape, x.astype(np.float32))  # [n, oh, ow, taps, ci]
    g, taps = g.astype(np.float32), taken.shape[3]
    found = np.empty((shape.co, taps, shape.group_ci), np.float32)
    if shape.depthwise:
        for c in range(shape.co):
            total = None
            for column in range(min(RUN, shape.ow)):
                sums = np.zeros((1, taps), np.float32)
                for image in range(shape.n):
                    for x_ in range(column, shape.ow, RUN):
                        rows = taken[image, :, x_, :, c]
                        sums = reference_product(
                            np.ascontiguousarray(g[image, :, x_, c][None]),
                            np.ascontiguousarray(rows), sums,
                        )  # fmt: skip
                total = sums if total is None else total + sums
            found[c, :, 0] = total
        return found.reshape(shape.co, *shape.kernel, 1)
    ci, co = shape.group_ci, shape.group_co
    for group in range(shape.groups):
        outputs = g[..., group * co : (group + 1) * co].reshape(-1, co)
        inputs = taken[..., group * ci : (group + 1) * ci].reshape(len(outputs), -1)
        part = chain(outputs, inputs).reshape(co, taps, ci)
        found[group * co : (group + 1) * co] = part
    return found.reshape(shape.co, *shape.kernel, ci)


def check(chip, shape, plan=None, output=DType.F32):
    x, g = pixels(shape)
    found, result = run(chip, shape, x, g, output, plan)
    exact = expected(shape, x, g)
    if output is DType.BF16:
        exact = exact.astype(bfloat16)
    assert found.tobytes() == exact.tobytes()
    return result


@pytest.mark.parametrize("name", SHAPES)
def test_layers(name):
    check(TINY, SHAPES[name])
    check(EDGE, SHAPES[name], output=DType.BF16)


@settings(max_examples=12)
@given(shapes())
def test_random_shapes(shape):
    check(TINY, replace(shape, weights="ohwi"))


@pytest.mark.parametrize("name", ["3x3", "groups", "stem", "pointwise", "depthwise"])
def test_any_plan_gives_the_same_bits(name):
    shape = SHAPES[name]
    legal = legal_depthwise_weight_plans if shape.depthwise else legal_weight_plans
    plans = list(legal(TINY, shape))
    for plan in random.Random(0).sample(plans, 5):
        check(TINY, shape, plan)


def test_wide_depthwise_rows_are_split():
    shape = ConvolutionShape(2, 3, 2 * RUN + 5, 6, 6, (3, 3), padding=SAME, groups=6)
    check(TINY, shape)
    check(TINY, shape, WeightPlan(1, 4, 2, RUN, taps=3))
    check(EDGE, replace(shape, stride=(1, 2)))


def test_depthwise_in_float32():
    shape = SHAPES["depthwise"]
    x, g = pixels(shape, np.float32)
    found, _ = run(TINY, shape, x, g)
    taken = windows(shape, x.astype(np.float64))
    exact = np.einsum("nyxc,nyxtc->ct", g.astype(np.float64), taken)
    assert np.allclose(found.reshape(exact.shape), exact, rtol=1e-5, atol=1e-5)


def test_float32_operands_are_split_before():
    values = (1, 1, 1, 1, 1, 1, 1)
    call = LibraryCall("convolution_weight", tuple(zip(ATTRIBUTES, values, strict=True)))
    channels_last = (0, 2, 3, 1)
    args = (
        view(0, (5, 4, 3, 3), channels_last, "float32"),
        view(1, (1, 4, 7, 6), channels_last, "float32"),
        view(2, (1, 5, 7, 6), channels_last, "float32"),
    )
    with pytest.raises(CompileError) as error:
        convolution_weight_for(KernelCall(call, args), TINY, {})
    assert str(error.value) == (
        "convolution: float32 operands are those of a depthwise or 1 x 1 convolution, but the "
        "kernel is 3 x 3 with 1 groups; split them into bfloat16 terms first"
    )


LAYERS = {
    "3x3 256, 14x14, batch 4": (0.98, ConvolutionShape(4, 14, 14, 256, 256, (3, 3), padding=SAME)),
    "3x3 64, 56x56": (0.96, ConvolutionShape(1, 56, 56, 64, 64, (3, 3), padding=SAME)),
    "depthwise 144, 56x56": (
        0.96, ConvolutionShape(1, 56, 56, 144, 144, (3, 3), padding=SAME, groups=144),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_utilisation(name):
    wanted, shape = LAYERS[name]
    x, g = pixels(shape)
    _, result = run(EDGE, shape, x, g, DType.BF16, machine=Simulator(EDGE))
    peak = EDGE.lanes if shape.depthwise else EDGE.macs_per_cycle
    assert shape.macs / peak / result.cycles >= wanted
