"""The convolution kernels: bits against products summed in the contract's order (kernel row, kernel
column, channel), torch as the outside judge of the shapes, and cycles."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from compiler_support import bfloat16, run_kernel
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pagoda.compiler.errors import CompileError
from pagoda.compiler.tile_ir import Dot, Load
from pagoda.isa.accumulation import matmul as reference_product
from pagoda.isa.accumulation import matmul_i8
from pagoda.isa.chip import PRESETS
from pagoda.isa.numbers import DType
from pagoda.kernels.convolution import build_convolution
from pagoda.kernels.convolution_shape import (
    ConvolutionPlan,
    ConvolutionShape,
    choose_convolution,
    legal_plans,
)
from pagoda.sim import Simulator

TINY, TINY8, EDGE, CAR = (PRESETS[name] for name in ("tiny", "tiny8", "edge", "car"))
DTYPES = {bfloat16: DType.BF16, np.dtype(np.float32): DType.F32, np.dtype(np.int8): DType.I8,
          np.dtype(np.int32): DType.I32}  # fmt: skip
SAME = ((1, 1), (1, 1))


def operands(shape, seed=0):
    """x, w in the kernel's layout, and bias."""
    rng = np.random.default_rng(seed)
    kh, kw = shape.kernel

    def draw(*sizes):
        if shape.operand_bytes == 1:
            return rng.integers(-128, 128, sizes).astype(np.int8)
        return rng.standard_normal(sizes).astype(bfloat16)

    x = draw(shape.n, shape.h, shape.w, shape.ci)
    w = draw(shape.co, kh, kw, shape.group_ci)
    if shape.weights == "hwio":
        w = np.ascontiguousarray(w.transpose(1, 2, 3, 0))
    bias = None
    if shape.bias and shape.operand_bytes == 1:
        bias = rng.integers(-9999, 9999, shape.co).astype(np.int32)
    elif shape.bias:
        bias = rng.standard_normal(shape.co).astype(np.float32)
    return x, w, bias


def as_ohwi(shape, w):
    return w if shape.weights == "ohwi" else w.transpose(3, 0, 1, 2)


def run(chip, shape, x, w, bias=None, plan=None, machine=None):
    integer = shape.operand_bytes == 1
    kind = np.int32 if integer else np.float32 if shape.output_bytes == 4 else bfloat16
    y = np.zeros((shape.n, shape.oh, shape.ow, shape.co), kind)
    biased = None if bias is None else DTYPES[bias.dtype]
    kernel = build_convolution(chip, shape, DTYPES[x.dtype], DTYPES[y.dtype], biased, plan)
    arguments = {"y": y, "x": x, "w": w} | ({} if bias is None else {"bias": bias})
    return y, run_kernel(chip, kernel, machine, **arguments)


def windows(shape, x):
    """[n, oh, ow, taps, ci]"""
    (kh, kw), (sy, sx), (dy, dx) = shape.kernel, shape.stride, shape.dilation
    padded = np.pad(x, ((0, 0), *shape.padding, (0, 0)))
    found = [
        padded[:, y : y + (shape.oh - 1) * sy + 1 : sy, x : x + (shape.ow - 1) * sx + 1 : sx]
        for y in range(0, kh * dy, dy)
        for x in range(0, kw * dx, dx)
    ]
    return np.stack(found, 3)


def expected(shape, x, w, bias=None):
    """Exact bits: every output is a chain of fused multiply-adds in k order."""
    integer = x.dtype == np.int8
    kind = np.int32 if integer else np.float32
    product = matmul_i8 if integer else reference_product
    taken = windows(shape, x if integer else x.astype(np.float32))
    weights = as_ohwi(shape, w if integer else w.astype(np.float32))
    sums = np.empty((shape.n, shape.oh, shape.ow, shape.co), kind)
    ci, co, count = shape.group_ci, shape.group_co, shape.n * shape.oh * shape.ow
    for g in range(shape.groups):
        left = taken[..., g * ci : (g + 1) * ci].reshape(count, -1)
        right = weights[g * co : (g + 1) * co].reshape(co, -1).T
        found = product(left, right, np.zeros((count, co), kind))
        sums[..., g * co : (g + 1) * co] = found.reshape(*sums.shape[:-1], co)
    return sums if bias is None else sums + bias


def by_torch(shape, x, w, bias=None):
    (top, bottom), (left, right) = shape.padding
    pixels = torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2)
    pixels = torch.nn.functional.pad(pixels, (left, right, top, bottom))
    weights = torch.from_numpy(as_ohwi(shape, w).astype(np.float64)).permute(0, 3, 1, 2)
    extra = None if bias is None else torch.from_numpy(bias.astype(np.float64))
    found = torch.nn.functional.conv2d(
        pixels, weights, extra, shape.stride, 0, shape.dilation, shape.groups
    )
    return found.permute(0, 2, 3, 1).numpy()


def check(chip, shape, plan=None, seed=0):
    x, w, bias = operands(shape, seed)
    y, result = run(chip, shape, x, w, bias, plan)
    exact = expected(shape, x, w, bias).astype(y.dtype)
    assert y.tobytes() == exact.tobytes()
    judge = by_torch(shape, x, w, bias)
    if y.dtype.kind == "i":
        assert np.array_equal(y, judge)
    else:
        bound = 2.0**-8 if y.dtype == bfloat16 else 1e-5
        scale = by_torch(replace(shape, bias=False), np.abs(x), np.abs(w)) + 1
        assert np.all(np.abs(y.astype(np.float64) - judge) <= bound * (np.abs(judge) + scale))
    return result


SHAPES = {
    "3x3": ConvolutionShape(1, 7, 6, 4, 5, (3, 3), padding=SAME),
    "stride": ConvolutionShape(2, 9, 8, 4, 5, (3, 3), (2, 2), padding=SAME),
    "dilation": ConvolutionShape(1, 9, 9, 4, 5, (3, 2), (1, 1), (2, 3), ((2, 2), (1, 2))),
    "stem": ConvolutionShape(1, 14, 13, 3, 8, (7, 7), (2, 2), padding=((3, 3), (3, 3))),
    "groups": ConvolutionShape(1, 6, 7, 6, 9, (3, 3), padding=SAME, groups=3, bias=True),
    "pointwise": ConvolutionShape(2, 5, 6, 20, 9, (1, 1), bias=True),
    "downsample": ConvolutionShape(2, 7, 6, 20, 9, (1, 1), (2, 2)),
    "1d": ConvolutionShape(2, 1, 40, 5, 6, (1, 5), (1, 3), padding=((0, 0), (2, 2)), bias=True),
    "depthwise": ConvolutionShape(2, 7, 8, 10, 10, (3, 3), padding=SAME, groups=10, bias=True),
    "depthwise stride": ConvolutionShape(1, 9, 9, 6, 6, (5, 3), (2, 2), padding=SAME, groups=6),
}  # fmt: skip


@pytest.mark.parametrize("weights", ["ohwi", "hwio"])
@pytest.mark.parametrize("name", SHAPES)
def test_layers(name, weights):
    check(TINY, replace(SHAPES[name], weights=weights))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", [EDGE, CAR], ids=lambda chip: chip.name)
def test_other_chips(chip, name):
    check(chip, SHAPES[name])


@pytest.mark.parametrize("name", ["3x3", "stem", "groups", "downsample", "depthwise"])
def test_int8(name):
    check(TINY8, replace(SHAPES[name], operand_bytes=1, output_bytes=4))


@st.composite
def shapes(draw):
    def pair(most, least=0):
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    groups = draw(st.sampled_from((1, 1, 2, 3)))
    ci, co = (groups * draw(st.integers(1, 7)) for _ in range(2))
    if draw(st.integers(0, 4)) == 0:
        groups = co = ci
    kernel, dilation = pair(4, 1), pair(3, 1)
    padding = pair(4), pair(4)
    h, w = pair(12, 1)
    for size, k, d, p in zip((h, w), kernel, dilation, padding, strict=True):
        assume(size + sum(p) >= (k - 1) * d + 1)
    return ConvolutionShape(
        draw(st.integers(1, 3)), h, w, ci, co, kernel, pair(3, 1), dilation, padding, groups,
        draw(st.booleans()), draw(st.sampled_from(("ohwi", "hwio"))),
        output_bytes=draw(st.sampled_from((2, 4))),
    )  # fmt: skip


@settings(max_examples=40)
@given(shapes())
def test_random_shapes(shape):
    check(TINY, shape)


@pytest.mark.parametrize("name", ["3x3", "groups", "stem", "dilation", "downsample"])
def test_any_plan_gives_the_same_bits(name):
    shape = SHAPES[name]
    plans = list(legal_plans(TINY, shape))
    for plan in random.Random(0).sample(plans, 6):
        check(TINY, shape, plan)


def test_depthwise_tiles_with_tails():
    shape = SHAPES["depthwise"]  # 7 x 8 outputs of 10 channels
    for rows, cols, bn in ((3, 3, 4), (7, 5, 10), (1, 8, 8)):
        check(TINY, shape, ConvolutionPlan(1, rows, cols, bn, 1, 1, 2, 2))


def test_the_number_of_images_is_the_calls():
    """A kernel built for two images does five."""
    shape = replace(SHAPES["stride"], n=2)
    more = replace(shape, n=5)
    x, w, _ = operands(more)
    y = np.zeros((5, shape.oh, shape.ow, shape.co), bfloat16)
    kernel = build_convolution(TINY, shape, DType.BF16, DType.BF16)
    run_kernel(TINY, kernel, y=y, x=x, w=w)
    assert np.array_equal(y, expected(more, x, w).astype(bfloat16))


def test_the_stem_merges_taps_and_channels():
    """3 channels times 7 columns are one run of 21 along k, in one load of the window's rows."""
    kernel = build_convolution(EDGE, SHAPES["stem"], DType.BF16, DType.BF16)
    dots = [s for s in kernel.walk() if isinstance(s, Dot)]
    loads = [s for s in kernel.walk() if isinstance(s, Load) and s.source.tensor == "x"]
    assert [str(dot.k) for dot in dots] == ["21"]
    assert len(loads) == 1


def test_errors():
    with pytest.raises(CompileError, match="groups divides the channels in and out, but 3 groups"):
        ConvolutionShape(1, 4, 4, 4, 6, (1, 1), groups=3)
    with pytest.raises(CompileError, match="the output would be 0 x 2"):
        ConvolutionShape(1, 2, 4, 4, 6, (3, 3))
    with pytest.raises(CompileError, match="fit the SRAM of chip tiny"):
        shape = ConvolutionShape(1, 9, 9, 4096, 4, (3, 3))
        build_convolution(TINY, shape, DType.BF16, DType.BF16)


# Cycles ------------------------------------------------------------------------------------------

RESNET = {
    "3x3 256, 14x14, batch 4": (0.98, ConvolutionShape(4, 14, 14, 256, 256, (3, 3), padding=SAME)),
    "3x3 64, 56x56": (0.97, ConvolutionShape(1, 56, 56, 64, 64, (3, 3), padding=SAME)),
    "3x3 512, 7x7": (0.96, ConvolutionShape(1, 7, 7, 512, 512, (3, 3), padding=SAME)),
    "1x1 256 to 512, stride 2": (0.96, ConvolutionShape(1, 56, 56, 256, 512, (1, 1), (2, 2))),
    "stem": (0.61, ConvolutionShape(1, 224, 224, 3, 64, (7, 7), (2, 2), padding=((3, 3), (3, 3)))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RESNET)
def test_utilisation_of_resnet_layers(name):
    wanted, shape = RESNET[name]
    x, w, _ = operands(shape)
    _, result = run(EDGE, shape, x, w, machine=Simulator(EDGE))
    assert shape.macs / EDGE.macs_per_cycle / result.cycles >= wanted
    estimate = choose_convolution(EDGE, shape).cycles
    assert abs(estimate - result.cycles) < 0.03 * result.cycles
