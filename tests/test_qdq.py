"""Graphs with quantize and dequantize: products of int8 values on the int8 array."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operations
import torch.nn.functional as F
from torch import nn

import pagoda
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
