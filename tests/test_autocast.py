"""torch.autocast("pagoda"): which types operations compute in, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pagoda

LOW, WIDE = torch.bfloat16, torch.float32
X = torch.linspace(-1, 1, 32).reshape(4, 8)
W = torch.linspace(1, -1, 64).reshape(8, 8)


@pytest.fixture(scope="module", autouse=True)
def chip():
    pagoda.use_chip("edge")


def image():
    return torch.ones(1, 2, 4, 4, device="pagoda")


CASES = {  # on bfloat16 and float32 operands alike
    "mm": (lambda x, w: x @ w, LOW),
    "linear": (lambda x, w: F.linear(x, w), LOW),
    "convolution": (lambda x, w: F.conv2d(image(), image()), LOW),
    "attention": (lambda x, w: F.scaled_dot_product_attention(w[None, None], w[None, None],
                                                              w[None, None]), LOW),
    "layer norm": (lambda x, w: F.layer_norm(x, (8,)), WIDE),
    "exp": (lambda x, w: x.exp(), WIDE),
    "sum": (lambda x, w: x.sum(), WIDE),
    "softmax": (lambda x, w: x.softmax(-1), WIDE),
    "softmax in a type": (lambda x, w: x.softmax(-1, dtype=LOW), LOW),
    "cross entropy": (lambda x, w: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64,
                                                                  device="pagoda")), WIDE),
    "loss": (lambda x, w: F.mse_loss(x, x), WIDE),
}  # fmt: skip


@pytest.mark.parametrize("given", [LOW, WIDE])
@pytest.mark.parametrize("name", CASES)
def test_types_of_results(name, given):
    function, wanted = CASES[name]
    operands = [t.to("pagoda", given) for t in (X, W)]
    with torch.autocast("pagoda"):
        assert function(*operands).dtype == wanted
        with torch.autocast("pagoda", enabled=False):
            assert torch.relu(operands[0]).dtype == given
    assert (operands[0] @ operands[1]).dtype == given


def test_operands_of_two_types():
    """The widest counts."""
    x, w = X.to("pagoda"), X.to("pagoda", LOW)
    with torch.autocast("pagoda"):
        assert torch.addcmul(x, w, w).dtype == WIDE and torch.addcmul(w, w, w).dtype == LOW


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


def test_repeated_layers_with_gradients():
    """Compiled: weights and gradients float32, results within bfloat16 of torch's float32."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    x = torch.randn(8, 16)
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.to("pagoda")
    compiled = pagoda.compile(model)
    with torch.autocast("pagoda"):
        y = compiled(x.to("pagoda"))
    assert y.dtype == WIDE
    y.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == WIDE
        assert (p.grad.cpu() - wanted[name]).norm() <= 1e-2 * wanted[name].norm(), name
