"""int8 products and convolutions: the bits of their formula, on every chip, eager and compiled."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pagoda
from pagoda.isa.commands import COMMANDS
from pagoda.pytorch import device
from pagoda.pytorch.int8 import offset_for

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


def finished(acc, scale, offset, dtype, low, high):
    """The formula of the module, channels last."""
    v = acc.to(torch.int32).to(torch.float32) * scale
    v = v if offset is None else v + offset
    if dtype != INT8:
        return v.to(dtype)
    return torch.clamp(torch.round(v), low, high).to(INT8)


def on_device(*tensors):
    return [None if t is None else t.to("pagoda") for t in tensors]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(chip, case):
    n, ci, co, groups, size, kernel, stride, padding, pad_value = case
    x, w = random(n, ci, size, size), random(co, ci // groups, kernel, kernel, seed=1)
    scale = torch.rand(co) * 1e-3
    offset = torch.randint(-40, 40, (co,)) / 2
    wide = F.pad(x.double(), (padding,) * 4, value=pad_value)
    acc = F.conv2d(wide, w.double(), stride=stride, groups=groups).long().permute(0, 2, 3, 1)
    steps = [stride] * 2, [padding] * 2, [1, 1], groups, pad_value
    for end in ((INT8, 0, 127), (INT8, -128, 127), (torch.bfloat16, -128, 127)):
        wanted = finished(acc, scale, offset, *end).permute(0, 3, 1, 2)
        assert torch.equal(ops.convolution_int8(x, w, scale, offset, *steps, *end), wanted)
        given = on_device(x, w, scale, offset)
        assert torch.equal(ops.convolution_int8(*given, *steps, *end).cpu(), wanted)


@given(
    rows=st.integers(1, 40), k=st.integers(1, 70), columns=st.integers(1, 40),
    has_offset=st.booleans(), low=st.sampled_from((-128, -100, 0)), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_linear(rows, k, columns, has_offset, low, seed):
    pagoda.use_chip("tiny")
    x, w = random(2, rows, k, seed=seed), random(columns, k, seed=seed + 1)
    scale = torch.rand(columns) * 2e-3
    offset = torch.randint(-80, 80, (columns,)) / 2 if has_offset else None
    acc = (x.double() @ w.double().T).long()
    end = INT8, low, 127
    wanted = finished(acc, scale, offset, *end)
    assert torch.equal(ops.linear_int8(x, w, scale, offset, *end), wanted)
    assert torch.equal(ops.linear_int8(*on_device(x, w, scale, offset), *end).cpu(), wanted)


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
    """(x - z) w = x w + the offset for z; also at the edges, where the padding is z."""
    x, w = random(1, 4, 6, 6), random(5, 4, 3, 3, seed=1)
    real = F.conv2d(x.double() + 7, w.double(), padding=1).float()
    offset = offset_for(w, torch.ones(5), None, -7)
    steps = [1, 1], [1, 1], [1, 1], 1, -7
    found = ops.convolution_int8(x, w, torch.ones(5), offset.float(), *steps, torch.float32)
    assert torch.equal(found, real)
    assert offset_for(w, torch.ones(5), None) is None
    offset = offset_for(w, torch.full((5,), 0.5), torch.arange(5.0), 0, -128)
    assert offset.tolist() == [-128, -127, -126, -125, -124] and offset.dtype == torch.float64


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
    assert message(lambda: ops.linear_int8(x, w, scale, None, INT8, 5, 4)) == (
        "linear_int8: the bounds must be -128 <= low <= high <= 127, got 5 and 4; leave them out "
        "for no activation"
    )


def executed(call):
    """The vector commands and the stores of what a call launches."""
    there, found = device.state.executor.device, []
    with there.tracing(), there.listening(found.append):
        call()
    banks = [bank for record in found for bank in record.result.trace["bank"].tolist()]
    return tuple(banks.count(COMMANDS[name].bank) for name in ("vector", "store"))


@pytest.mark.parametrize("dtype", [INT8, torch.float32, torch.bfloat16])
def test_one_vector_command_per_output_tile(chip, dtype):
    """Scale, offset, rounding and conversion of a tile of sums; each tile is stored once."""
    x, w = random(300, 40), random(70, 40, seed=1)
    offset = torch.linspace(-9, 9, 70)
    given = on_device(x, w, torch.full((70,), 1e-2), offset)
    vectors, stores = executed(lambda: ops.linear_int8(*given, dtype))
    assert vectors == stores > 1
    x, w = random(2, 16, 20, 20), random(70, 16, 3, 3, seed=1)
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    given = on_device(x, w, torch.full((70,), 1e-2), offset)
    steps = [1, 1], [1, 1], [1, 1], 1, 0
    vectors, stores = executed(lambda: ops.convolution_int8(*given, *steps, dtype))
    assert vectors == stores > 1
    vectors, stores = executed(lambda: ops.convolution_int8(*given, *steps, INT8, 0, 127))
    assert vectors == 2 * stores
