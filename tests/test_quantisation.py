"""`pagoda.quantize`: what becomes int8, how near it stays, and the same values everywhere."""

import re

import pytest
import torch
from torch import nn

import pagoda
from pagoda.pytorch import device
from pagoda.pytorch.quantisation import (
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedMaxPool2d,
    add_and_quantize,
    dequantize_tensor,
    fold_batch_norms,
    quantize_tensor,
)
from pagoda.pytorch.vision import MobileNet, ResNet


@pytest.fixture(autouse=True, scope="module")
def chip():
    before = (device.state.executor, device.state.allocator)
    yield pagoda.use_chip("tiny")
    device.state.executor, device.state.allocator = before


def with_statistics(model):
    """Batch norms that are no identities."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def images(count=2, size=17):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, 3, size, size, generator=generator)
    return drawn.to(memory_format=torch.channels_last)


def resnet():
    torch.manual_seed(0)
    return with_statistics(ResNet(((2, 8, 1), (1, 8, 2)), 10))


def mobilenet():
    torch.manual_seed(0)
    return with_statistics(MobileNet(((1, 8, 1, 1), (2, 8, 1, 1)), 16, 10))


def near(found, wanted, share):
    return (found - wanted).abs().max() < share * wanted.abs().max()


def functions(model):
    return [node.target for node in model.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("build", [resnet, mobilenet])
@torch.no_grad()
def test_network(build):
    """Near to floats; eager, compiled and the CPU have the same bits."""
    model, x = build(), images()
    wanted = model(x)
    quantised = pagoda.quantize(model, x)
    assert torch.equal(model(x), wanted)  # the original is untouched
    found = quantised(x)
    assert near(found, wanted, 0.05)
    there = quantised.to(memory_format=torch.channels_last).to("pagoda")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(there, backend="pagoda")(x.to("pagoda")).cpu(), found)
    if build is mobilenet:
        assert torch.equal(there(x.to("pagoda")).cpu(), found)


@torch.no_grad()
def test_residual_stream_is_int8():
    quantised = pagoda.quantize(resnet(), [images(), (images(1),), {"x": images(1)}])
    made = functions(quantised)
    # The image, and the input of the classifier; the last block ends in floats for the mean.
    assert made.count(quantize_tensor) == 2 and made.count(dequantize_tensor) == 1
    assert made.count(add_and_quantize) == 2
    kinds = {QuantizedConv2d: 12, QuantizedLinear: 1, QuantizedMaxPool2d: 1, nn.BatchNorm2d: 0}
    for kind, count in kinds.items():
        assert sum(isinstance(layer, kind) for layer in quantised.modules()) == count
    # Full range behind a ReLU where the next convolution does not pad, else zero stays zero.
    block = quantised.blocks.get_submodule("1")
    assert block.reduce.get_submodule("0").input_zero_point == -128
    assert block.spatial.get_submodule("0").input_zero_point == 0


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.line = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        if x.sum() > 1e9:  # torch.fx cannot follow this
            return x
        return self.line(torch.relu(self.conv(x)).mean((2, 3)))


@torch.no_grad()
def test_layer_by_layer():
    torch.manual_seed(0)
    model = Untraceable().eval()
    quantised = pagoda.quantize(model, images())
    assert isinstance(quantised.conv, QuantizedConv2d)
    assert near(quantised(images()), model(images()), 0.05)
    on_chip = quantised.to("pagoda")
    assert torch.equal(on_chip(images().to("pagoda")).cpu(), quantised.cpu()(images()))


@torch.no_grad()
def test_model_on_the_device():
    """Ranges are found where the model lies, and so does the copy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 5)).eval()
    x = images(size=5).contiguous()
    on_host = pagoda.quantize(model, x)
    there = pagoda.quantize(model.to("pagoda"), x.to("pagoda"))
    assert all(buffer.device.type == "pagoda" for buffer in there.buffers())
    assert near(there(x.to("pagoda")).cpu(), on_host(x), 0.01)


@torch.no_grad()
def test_dynamic():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5)).eval()
    x = torch.randn(3, 20)
    quantised = pagoda.quantize(model, dynamic=True)
    assert near(quantised(x), model(x), 0.05)
    assert near(quantised(1000 * x), model(1000 * x), 0.05)
    assert torch.isfinite(quantised(0 * x)).all()
    there = quantised.to("pagoda")
    assert near(there(x.to("pagoda")).cpu(), model(x), 0.05)


@torch.no_grad()
def test_batch_norms_are_folded():
    model = resnet()
    folded = fold_batch_norms(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert torch.allclose(folded(images()), model(images()), atol=1e-4)


def message(kind, call) -> str:
    with pytest.raises(kind, match="pagoda.quantize") as caught:
        call()
    return re.sub(r"\s+", " ", str(caught.value))


def test_refuses():
    assert message(ValueError, lambda: pagoda.quantize(nn.Linear(2, 2))) == (
        "pagoda.quantize: static quantisation needs calibration inputs, got none; pass a few "
        "typical batches, or dynamic=True for linear layers without"
    )
    assert message(ValueError, lambda: pagoda.quantize(nn.ReLU(), images())) == (
        "pagoda.quantize: the model must contain an nn.Linear or nn.Conv2d, but ReLU has none; "
        "only these layers are quantised"
    )
    assert message(TypeError, lambda: pagoda.quantize(nn.Linear(2, 2), [3])) == (
        "pagoda.quantize: a calibration batch must be a tensor, a tuple of arguments or a dict of "
        "keyword arguments, got int; convert it"
    )
