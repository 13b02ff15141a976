"""Graphs with quantize and dequantize: products of int8 values on the int8 array."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operations
import torch.nn.functional as F
from torch import nn

import pagoda
from pagoda.isa.commands import COMMANDS
from pagoda.pytorch import call, device

qd = torch.ops.quantized_decomposed
RANGES = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


@pytest.fixture(autouse=True, scope="module")
def chip():
    before = (device.state.executor, device.state.allocator)
    yield pagoda.use_chip("edge")
    device.state.executor, device.state.allocator = before


def requantised(x, scale, zero_point, dtype):
    given = scale, zero_point, *RANGES[dtype], dtype
    return qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *given), *given)


class Network(nn.Module):
    """What torchao makes of a small network: activations of one type and zero point, weights with
    a scale per channel."""

    def __init__(self, dtype, zero_point, weight_zero_point=0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dtype, self.zero_point = dtype, zero_point
        for name, shape in (("conv", (8, 4, 3, 3)), ("line", (5, 8))):
            w = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
            count = shape[0]
            self.register_buffer(f"{name}_w", w)
            self.register_buffer(f"{name}_s", torch.rand(count, generator=generator) * 1e-2)
            zeros = torch.full((count,), weight_zero_point, dtype=torch.int64)
            self.register_buffer(f"{name}_z", zeros)
            self.register_buffer(f"{name}_b", torch.randn(count, generator=generator))

    def weight(self, name):
        w, s, z = (getattr(self, f"{name}_{part}") for part in "wsz")
        return qd.dequantize_per_channel(w, s, z, 0, -128, 127, torch.int8)

    def forward(self, x):
        x = requantised(x, 0.05, self.zero_point, self.dtype)
        x = F.relu(F.conv2d(x, self.weight("conv"), self.conv_b, padding=1))
        x = requantised(x, 0.1, self.zero_point, self.dtype)
        x = requantised(x.mean((2, 3)), 0.02, self.zero_point, self.dtype)
        return F.linear(x, self.weight("line"), self.line_b)


def kernels(region):
    return [step.kernel.name for step in region.steps if hasattr(step.kernel, "name")]


@pytest.mark.parametrize(
    ("dtype", "zero_point"), [(torch.int8, 0), (torch.int8, -7), (torch.uint8, 128)]
)
def test_network(dtype, zero_point):
    network = Network(dtype, zero_point)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    wanted = network(x)
    torch._dynamo.reset()
    call.compiled.clear()
    found = torch.compile(network.to("pagoda"), backend="pagoda")(x.to("pagoda")).cpu()
    # Sums are exact here and rounded there: a value in the middle may go to the next step.
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert (found - wanted).abs().median() < 1e-5 * wanted.abs().max()
    (region,) = call.compiled
    assert kernels(region) == ["convolution", "convolution"]
    steps = [step for step in region.steps if hasattr(step.kernel, "name")]
    assert all(view.dtype == "int8" for step in steps for view in step.args[1:3])


def test_leaves_others_alone():
    network = Network(torch.int8, 0, weight_zero_point=3)
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    wanted = network(x)
    torch._dynamo.reset()
    found = torch.compile(network.to("pagoda"), backend="pagoda")(x.to("pagoda")).cpu()
    assert torch.allclose(found, wanted, atol=1e-3)


class Layer(nn.Module):
    """A layer between int8 values, of which the results' zero point may be another."""

    def __init__(self, kind, activation, zero_point):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        shape = (40, 16) if kind == "linear" else (40, 16, 3, 3)
        w = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        self.register_buffer("w", w.contiguous(memory_format=torch.channels_last)
                             if kind == "conv" else w)  # fmt: skip
        self.register_buffer("s", torch.rand(40, generator=generator) * 1e-2 + 1e-3)
        self.register_buffer("z", torch.zeros(40, dtype=torch.int64))
        self.register_buffer("b", torch.randn(40, generator=generator))
        self.function = F.linear if kind == "linear" else F.conv2d
        self.activation, self.zero_point = activation, zero_point

    def forward(self, x):
        x = qd.dequantize_per_tensor(x, 0.02, -3, -128, 127, torch.int8)
        w = qd.dequantize_per_channel(self.w, self.s, self.z, 0, -128, 127, torch.int8)
        y = self.activation(self.function(x, w, self.b))
        return qd.quantize_per_tensor(y, 0.1, self.zero_point, -128, 127, torch.int8)


def vector_cycles(call):
    """How long the vector engine works on vector commands of what a call launches."""
    there, found = device.state.executor.device, []
    with there.tracing(), there.listening(found.append):
        call()
    traces = [record.result.trace for record in found]
    mine = [trace[trace["bank"] == COMMANDS["vector"].bank] for trace in traces]
    return sum(int((trace["free"] - trace["start"]).sum()) for trace in mine)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    ("activation", "zero_point", "each"), [(nn.Identity(), 5, 1), (F.relu, -128, 1), (F.relu, 0, 2)]
)
def test_layer_with_its_quantize(kind, activation, zero_point, each):
    """One pass over the sums; two where a ReLU is a bound of its own. The rest is scales and
    offsets, a row each. The bits are torch's but for values in the middle of two steps."""
    layer = Layer(kind, activation, zero_point)
    shape = (3000, 16) if kind == "linear" else (8, 16, 18, 18)
    x = torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator())
    x = x if kind == "linear" else x.contiguous(memory_format=torch.channels_last)
    wanted = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer.to("pagoda"), backend="pagoda", dynamic=False)
    there = x.to("pagoda")
    found = compiled(there).cpu()
    difference = (found.int() - wanted.int()).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < 1e-3
    assert wanted.unique().numel() > 50
    chip = device.state.executor.device.chip
    once = wanted.numel() // 40 * -(-40 // chip.lanes)
    assert each <= vector_cycles(lambda: compiled(there)) / once < each + 0.1


class Layers(nn.Module):
    """Two linear layers with values of one type before, between and behind them."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        w = torch.randint(-128, 128, (2, 32, 32), dtype=torch.int8, generator=generator)
        self.register_buffer("w", w)
        self.dtype, self.zero_point = dtype, 100 if dtype == torch.uint8 else -28

    def forward(self, x):
        for w in self.w:
            x = requantised(x, 0.05, self.zero_point, self.dtype)
            x = F.linear(x, qd.dequantize_per_tensor(w, 3e-3, 0, -128, 127, torch.int8))
        return requantised(x, 0.05, self.zero_point, self.dtype)


def test_uint8_costs_what_int8_costs():
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(4))
    found, wanted, cycles = [], [], []
    for dtype in RANGES:
        layers = Layers(dtype)
        wanted.append(layers(x))
        torch._dynamo.reset()
        compiled = torch.compile(layers.to("pagoda"), backend="pagoda", dynamic=False)
        there = x.to("pagoda")
        found.append(compiled(there).cpu())
        cycles.append(vector_cycles(lambda c=compiled, x=there: c(x)))
    assert torch.equal(*wanted) and torch.equal(*found) and wanted[0].unique().numel() > 50
    assert (found[0] - wanted[0]).abs().max() < 0.06
    assert cycles[0] == cycles[1]


def test_uint8_that_something_else_reads_stays():
    def function(x, w):
        q = qd.quantize_per_tensor(x, 0.05, 100, 0, 255, torch.uint8)
        y = F.linear(qd.dequantize_per_tensor(q, 0.05, 100, 0, 255, torch.uint8), w)
        return y, q

    x, w = (torch.randn(8, 16, generator=torch.Generator().manual_seed(s)) for s in (5, 6))
    torch._dynamo.reset()
    y, q = torch.compile(function, backend="pagoda")(x.to("pagoda"), w.to("pagoda"))
    wanted_y, wanted_q = function(x, w)
    assert torch.equal(q.cpu(), wanted_q)
    torch.testing.assert_close(y.cpu(), wanted_y, atol=0.1, rtol=0.02)


def test_layers_of_other_floats_keep_their_type():
    def function(x, w):
        x = qd.dequantize_per_tensor(x, 0.05, 3, -128, 127, torch.int8, out_dtype=torch.bfloat16)
        w = qd.dequantize_per_tensor(w, 0.05, 0, -128, 127, torch.int8, out_dtype=torch.bfloat16)
        return F.linear(x, w)

    generator = torch.Generator().manual_seed(7)
    x, w = torch.randint(-128, 128, (2, 8, 16), dtype=torch.int8, generator=generator)
    torch._dynamo.reset()
    found = torch.compile(function, backend="pagoda")(x.to("pagoda"), w.to("pagoda"))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu(), function(x, w), atol=0.5, rtol=0.02)
