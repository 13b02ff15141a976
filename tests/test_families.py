"""Every mainstream family of networks on the device: inference and a training step.

torch on the CPU in float32 is the judge. float32 models run with matmul precision "highest"; of
bfloat16 ones it is asked that they stray no farther than about twice as far as torch's own on the
CPU. Nothing may be computed on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import model_families
import pytest
import torch
from torch import nn

import pagoda
from pagoda.pytorch import device

P = "pagoda"


@pytest.fixture(autouse=True, scope="module")
def chip():
    before = (device.state.executor, device.state.allocator)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch._dynamo.config.patch(allow_rnn=True):
        yield pagoda.use_chip("edge")
    torch.set_float32_matmul_precision(precision)
    device.state.executor, device.state.allocator = before


@pytest.fixture(autouse=True)
def all_on_the_chip():
    torch._dynamo.reset()
    torch.pagoda.reset_fallbacks()
    yield
    assert torch.pagoda.fallbacks() == {}


def families(*quick: str) -> list:
    """All of them; those not named are slow."""
    assert set(quick) <= set(model_families.FAMILIES)
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in model_families.FAMILIES
    ]


class Objective(nn.Module):
    """A model with its loss, which is what is compiled for training."""

    def __init__(self, model: nn.Module, target: torch.Tensor) -> None:
        super().__init__()
        self.model, self.target = model, target

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return model_families.loss(self.model(*inputs), self.target)


class Trained:
    """A model of a family after one backward pass, and what it said before, in inference."""

    def __init__(
        self,
        name: str,
        place: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiling: Callable[[nn.Module], Callable] | None = None,
    ) -> None:
        model, inputs = model_families.make(name)
        with torch.no_grad():
            target = model_families.target(copy.deepcopy(model)(*inputs)).to(place)
        self.inputs = [t.to(place, dtype if t.is_floating_point() else None) for t in inputs]
        self.model = model.to(place, dtype)
        objective = Objective(self.model, target)
        self.loss = (compiling or (lambda same: same))(objective)(*self.inputs)
        self.loss.backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {n: p.grad.cpu().float() for n, p in named if p.grad is not None}


def infer(name: str, *ways: Callable[[nn.Module], Callable], place=P, dtype=torch.float32) -> list:
    """What a model of a family says on the device, for each way to compile it."""
    model, inputs = model_families.make(name)
    inputs = [t.to(place, dtype if t.is_floating_point() else None) for t in inputs]
    model = model.to(place, dtype).eval()
    with torch.no_grad():
        return [way(model)(*inputs).cpu().float() for way in ways]


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error by the largest element."""
    found, expected = found.detach().cpu().float(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def gradient_errors(found: Trained, expected: Trained) -> dict[str, float]:
    """For each parameter, by its largest gradient or a thousandth of the largest of all."""
    ours, theirs = found.gradients(), expected.gradients()
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * max(g.abs().max() for g in theirs.values())
    return {
        name: float((ours[name] - g).abs().max() / torch.maximum(g.abs().max(), floor))
        for name, g in theirs.items()
    }


def gradient_distance(found: Trained, expected: Trained) -> float:
    """Of all gradients as one vector, by its length."""
    ours, theirs = (torch.cat([g.flatten() for g in each.gradients().values()])
                    for each in (found, expected))  # fmt: skip
    return float((ours - theirs).norm() / theirs.norm())


def check_update(trained: Trained, bound: float) -> None:
    """AdamW changes the parameters as it does on the CPU, given the same gradients."""
    twin = copy.deepcopy(trained.model).cpu()
    for mine, other in zip(trained.model.parameters(), twin.parameters(), strict=True):
        other.grad = None if mine.grad is None else mine.grad.cpu()
    for model in (trained.model, twin):
        torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    for mine, other in zip(trained.model.parameters(), twin.parameters(), strict=True):
        assert error(mine, other.float()) < bound


@pytest.mark.parametrize("name", families("gpt2", "bert", "vit", "whisper", "mamba", "resnet"))
def test_inference(name):
    (expected,) = infer(name, as_it_is, place="cpu")
    for found in infer(name, as_it_is, pagoda.compile):
        assert error(found, expected) < 1e-5


@pytest.mark.parametrize("name", families("llama", "mixtral", "lstm", "mobilenet", "unet"))
def test_training(name):
    check_training(name, pagoda.compile)


@pytest.mark.parametrize("name", families("mlp", "encoder", "gru"))
def test_eager_training(name):
    check_training(name, as_it_is)


def check_training(name, compiling, loss_bound=1e-5):
    expected = Trained(name)
    trained = Trained(name, P, compiling=compiling)
    assert error(trained.loss, expected.loss) < loss_bound
    errors = gradient_errors(trained, expected)
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)
    check_update(trained, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", model_families.FULL_SIZE)
def test_full_size(name):
    """Inference, and a training step."""
    (expected,) = infer(name, as_it_is, place="cpu")
    (found,) = infer(name, pagoda.compile)
    assert error(found, expected) < 1e-5
    check_training(name, pagoda.compile, 1e-4)  # its loss is a sum of millions


@pytest.mark.parametrize("name", families("t5"))
def test_bfloat16(name):
    """Gradients are compared as a whole: near a kink of an activation, single ones are arbitrary
    in bfloat16."""
    (exact,) = infer(name, as_it_is, place="cpu")
    (theirs,) = infer(name, as_it_is, place="cpu", dtype=torch.bfloat16)
    (ours,) = infer(name, pagoda.compile, dtype=torch.bfloat16)
    assert error(ours, exact) < 2 * error(theirs, exact)
    exact = Trained(name)
    theirs = Trained(name, dtype=torch.bfloat16)
    ours = Trained(name, P, torch.bfloat16, pagoda.compile)
    assert gradient_distance(ours, exact) < 1.5 * gradient_distance(theirs, exact)
    check_update(ours, 2**-6)  # half a dozen roundings to 8 bits, here and there
