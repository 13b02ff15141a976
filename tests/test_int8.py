"""int8 products and convolutions: the bits of their formula, on every chip, eager and compiled."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pagoda
from pagoda.pytorch import device
from pagoda.pytorch.int8 import bias_for

INT8 = torch.int8
ops = torch.ops.pagoda
CONVOLUTIONS = [  # images, channels in and out, groups, size, kernel, stride, padding, pad value
    (2, 16, 24, 1, 9, 3, 1, 1, 0),
    (1, 8, 8, 8, 9, 3, 2, 1, 0),
    (2, 3, 16, 1, 17, 7, 2, 3, -128),
    (1, 32, 16, 1, 7, 1, 1, 0, 0),
    (1, 16, 32, 4, 7, 3, 1, 1, 3),
    (1, 32, 16, 1, 7, 1, 2, 0, 0),
]


@pytest.fixture(autouse=True, scope="module")
def same_chip_afterwards():
    before = (device.state.executor, device.state.allocator)
    yield
    device.state.executor, device.state.allocator = before


@pytest.fixture(params=["edge", "tiny8"])
def chip(request):
    return pagoda.use_chip(request.param)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=INT8, generator=generator)


def finished(acc, scale, bias, dtype, zero_point, low, high):
    """The formula of the module, channels last."""
    v = (acc + (0 if bias is None else bias)).to(torch.int32).to(torch.float32) * scale
    if dtype != INT8:
        return v.to(dtype)
    return torch.clamp(torch.round(v) + zero_point, low, high).to(INT8)


def on_device(*tensors):
    return [None if t is None else t.to("pagoda") for t in tensors]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(chip, case):
    n, ci, co, groups, size, kernel, stride, padding, pad_value = case
    x, w = random(n, ci, size, size), random(co, ci // groups, kernel, kernel, seed=1)
    scale = torch.rand(co) * 1e-3
    bias = torch.randint(-1000, 1000, (co,), dtype=torch.int32)
    wide = F.pad(x.double(), (padding,) * 4, value=pad_value)
    acc = F.conv2d(wide, w.double(), stride=stride, groups=groups).long().permute(0, 2, 3, 1)
    steps = [stride] * 2, [padding] * 2, [1, 1], groups, pad_value
    for end in ((INT8, 3, 0, 127), (INT8, 0, -128, 127), (torch.bfloat16, 0, -128, 127)):
        wanted = finished(acc, scale, bias, *end).permute(0, 3, 1, 2)
        assert torch.equal(ops.convolution_int8(x, w, scale, bias, *steps, *end), wanted)
        given = on_device(x, w, scale, bias)
        assert torch.equal(ops.convolution_int8(*given, *steps, *end).cpu(), wanted)


@given(
    rows=st.integers(1, 40), k=st.integers(1, 70), columns=st.integers(1, 40),
    has_bias=st.booleans(), zero_point=st.integers(-128, 127), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_linear(rows, k, columns, has_bias, zero_point, seed):
    pagoda.use_chip("tiny")
    x, w = random(2, rows, k, seed=seed), random(columns, k, seed=seed + 1)
    scale = torch.rand(columns) * 2e-3
    bias = torch.randint(-1000, 1000, (columns,), dtype=torch.int32) if has_bias else None
    acc = (x.double() @ w.double().T).long()
    end = INT8, zero_point, -100, 127
    wanted = finished(acc, scale, bias, *end)
    assert torch.equal(ops.linear_int8(x, w, scale, bias, *end), wanted)
    assert torch.equal(ops.linear_int8(*on_device(x, w, scale, bias), *end).cpu(), wanted)


def test_saturates(chip):
    x, w = torch.full((1, 64), 127, dtype=INT8), torch.full((2, 64), 127, dtype=INT8)
    w[1] = -128
    scale = torch.tensor([3e4, 3e4])
    assert ops.linear_int8(*on_device(x, w, scale, None)).tolist() == [[127, -128]]


def test_one_kernel_with_residual(chip):
    """Sum, scale, residual, activation and quantisation: one kernel, nothing wide in DRAM."""
    x, w, other = random(2, 16, 6, 6), random(16, 16, 3, 3, seed=1), random(2, 16, 6, 6, seed=2)
    x, w, other = (t.to(memory_format=torch.channels_last) for t in (x, w, other))
    scale = torch.rand(16) * 1e-2

    def block(x, w, scale, other):
        steps = [1, 1], [1, 1], [1, 1], 1
        y = ops.convolution_int8(x, w, scale, None, *steps, 0, torch.float32)
        y = torch.relu(y + other.float() * 0.25)
        return torch.clamp(torch.round(y), -128, 127).to(INT8)

    compiled = torch.compile(block, backend="pagoda")
    with pagoda.profile() as profile:
        found = compiled(*on_device(x, w, scale, other))
    assert torch.equal(found.cpu(), block(x, w, scale, other))
    assert sum(row.kernel != "(launch)" for row in profile.rows) == 1


def test_zero_points():
    """(x - z) w = x w + the bias for z; also at the edges, where the padding is z."""
    x, w = random(1, 4, 6, 6), random(5, 4, 3, 3, seed=1)
    real = F.conv2d(x.double() + 7, w.double(), padding=1).float()
    bias = bias_for(w, None, torch.ones(5), -7)
    steps = [1, 1], [1, 1], [1, 1], 1, -7
    found = ops.convolution_int8(x, w, torch.ones(5), bias, *steps, torch.float32)
    assert torch.equal(found, real)
    assert bias_for(w, None, torch.ones(5)) is None
    bias = bias_for(w, torch.arange(5.0), torch.full((5,), 0.5))
    assert bias.tolist() == [0, 2, 4, 6, 8] and bias.dtype == torch.int32


def message(call) -> str:
    with pytest.raises(ValueError, match="int8") as caught:
        call()
    return re.sub(r"\s+", " ", str(caught.value))


def test_refuses():
    x, w, scale = random(2, 3), random(4, 3), torch.ones(4)
    assert message(lambda: ops.linear_int8(x.float(), w, scale, None)) == (
        "linear_int8: x must be torch.int8, got torch.float32; quantise it first "
        "(pagoda.quantize does that for a whole model)"
    )
    assert message(lambda: ops.linear_int8(x, w, scale[:1], None)) == (
        "linear_int8: scale must have one element per output channel, shape (4,), got (1,); "
        "expand it with .expand(4)"
    )
    assert message(lambda: ops.linear_int8(x, w, scale, None, torch.float64)) == (
        "linear_int8: dtype must be torch.int8, torch.float32 or torch.bfloat16, got "
        "torch.float64; convert the result afterwards"
    )
    assert message(lambda: ops.linear_int8(x, w, scale, None, INT8, 0, 5, 4)) == (
        "linear_int8: the bounds must be -128 <= low <= high <= 127, got 5 and 4; leave them out "
        "for no activation"
    )
