"""Convolution steps of regions: strides to layouts, products in their place, epilogues."""

from dataclasses import replace

import numpy as np
import pytest
from compiler_support import bfloat16
from test_build import region, run
from test_convolution import SHAPES, as_ohwi, expected, operands

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Symbol, Var
from pagoda.compiler.loop_nest import Builder
from pagoda.compiler.region import Buffer, KernelCall, LibraryCall, View
from pagoda.isa.chip import PRESETS
from pagoda.kernels.build import build
from pagoda.kernels.fusion import FusedCall, fuse

TINY = PRESETS["tiny"]
N = Symbol("n")
NAMES = ("out", "x", "w", "bias", "y", "rest")


def view(buffer, sizes, order, dtype="bfloat16"):
    """Torch's dimensions, dense in the given order (outer first)."""
    sizes = [size if not isinstance(size, int) else Const(size) for size in sizes]
    strides, step = [Const(0)] * len(sizes), Const(1)
    for dim in reversed(order):
        strides[dim] = step
        step = step * sizes[dim]
    return View(buffer, Const(0), tuple(sizes), tuple(strides), dtype)


def made(shape, follower=False, pixels=(0, 2, 3, 1), transposed=False):
    """out = convolution(x, w) + bias, for n images; then perhaps y = max(out + rest, 0)."""
    (kh, kw), (sy, sx), (dy, dx) = shape.kernel, shape.stride, shape.dilation
    attributes = (
        ("stride_h", sy), ("stride_w", sx), ("pad_top", shape.padding[0][0]),
        ("pad_left", shape.padding[1][0]), ("dilation_h", dy), ("dilation_w", dx),
        ("groups", shape.groups), ("transposed", transposed), ("cells", 1),
    )  # fmt: skip
    layout = {"ohwi": (0, 2, 3, 1), "hwio": (2, 3, 1, 0)}[shape.weights]
    out = view(0, (N, shape.co, shape.oh, shape.ow), pixels)
    args = [
        out,
        view(1, (N, shape.ci, shape.h, shape.w), pixels),
        view(2, (shape.co, shape.group_ci, kh, kw), layout),
        view(3, (shape.co,), (0,), "float32") if shape.bias else None,
    ]
    steps = [KernelCall(LibraryCall("convolution", attributes), tuple(args), origin="conv")]
    outputs = N * (shape.oh * shape.ow * shape.co)
    buffers = {
        "out": ("bfloat16", outputs), "x": ("bfloat16", N * (shape.h * shape.w * shape.ci)),
        "w": ("bfloat16", shape.co * shape.group_ci * kh * kw), "bias": ("float32", shape.co),
        "y": ("bfloat16", outputs), "rest": ("bfloat16", outputs),
    }  # fmt: skip
    if follower:
        builder = Builder([Symbol("r") * (shape.oh * shape.ow * shape.co)])
        read = [builder.load(name, "bfloat16", Var(0)) for name in ("out", "rest")]
        zero = builder.constant(0.0, "float32")
        total = builder.pointwise("maximum", builder.pointwise("add", *read), zero)
        builder.store("y", "bfloat16", Var(0), total)
        nest, names, _ = builder.build()
        flat = {n: View(k, Const(0), (outputs,), (Const(1),), "bfloat16")
                for k, n in enumerate(NAMES)}  # fmt: skip
        steps.append(KernelCall(nest, tuple(flat[n] for n in names), (N,)))
    found = region(buffers, steps, written=("out", "y"))
    if not follower:
        return found
    temporary = Buffer("out", "bfloat16", outputs, "temporary")
    return replace(found, inputs=found.inputs[1:], buffers=(temporary, *found.buffers[1:]))


@pytest.mark.parametrize("weights", ["ohwi", "hwio"])
@pytest.mark.parametrize("name", ["3x3", "groups", "pointwise", "downsample", "depthwise"])
def test_steps(name, weights):
    shape = replace(SHAPES[name], weights=weights)
    x, w, bias = operands(shape)
    out = np.zeros((shape.n, shape.oh, shape.ow, shape.co), bfloat16)
    spare = np.zeros_like(out)
    biased = np.zeros(shape.co, np.float32) if bias is None else bias
    found, *_ = run(made(shape), [out, x, w, biased, spare, spare], {"n": shape.n})
    assert np.array_equal(found, expected(shape, x, w, bias).astype(bfloat16))


FUSED = ("3x3", "stride", "groups", "pointwise", "downsample", "depthwise")


@pytest.mark.parametrize("name", FUSED)
def test_epilogues(name):
    shape = SHAPES[name]
    x, w, bias = operands(shape)
    rest = np.random.default_rng(9).standard_normal((shape.n, shape.oh, shape.ow, shape.co))
    rest, y = rest.astype(bfloat16), np.zeros(rest.shape, bfloat16)
    biased = np.zeros(shape.co, np.float32) if bias is None else bias
    wanted = made(shape, follower=True)
    (fused,) = fuse(wanted)
    assert isinstance(fused, FusedCall)
    *_, found, _ = run(wanted, [x, w, biased, y, rest], {"n": shape.n})
    product = expected(shape, x, w, bias).astype(bfloat16).astype(np.float32)
    exact = np.maximum(product + rest.astype(np.float32), 0).astype(bfloat16)
    assert np.array_equal(found, exact)


def test_channels_must_be_last():
    with pytest.raises(CompileError, match=r"channels_last") as caught:
        build(made(SHAPES["3x3"], pixels=(0, 1, 2, 3)), TINY, {"n": 1})
    assert caught.value.__notes__ == ["in the step conv"]


def test_weights_of_one_tap_lie_either_way():
    """[o, c, 1, 1] without gaps is channels last already."""
    shape = SHAPES["pointwise"]
    assert as_ohwi(shape, operands(shape)[1]).shape == (9, 1, 1, 20)
