"""Repeated layers: lowered once, called many times, in one region."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pagoda
from pagoda.pytorch import repeated

P = "pagoda"


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, count: int, block: type[nn.Module], **options: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(**options) for _ in range(count)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def tiny():
    pagoda.use_chip("tiny")
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def regions(monkeypatch):
    """The regions that are compiled."""
    from pagoda.pytorch import wrapper

    made = []

    def note(region):
        made.append(region)
        return widen(region)

    widen = wrapper.widen_temporaries
    monkeypatch.setattr(wrapper, "widen_temporaries", note)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield made


def twins(count=4, block=Block, **options):
    here = Stack(count, block, **options)
    there = Stack(count, block, **options)
    there.load_state_dict(here.state_dict())
    return here, there.to(P)


def test_layers_are_lowered_once(regions):
    here, there = twins(5)
    x = torch.randn(6, 8)
    with torch.no_grad():
        got = pagoda.compile(there)(x.to(P))
        torch.testing.assert_close(got.cpu(), here(x), rtol=1e-5, atol=1e-6)
    (region,) = regions
    once = regions_of_one_layer(regions, x)
    assert len(region.steps) > 4 * len(once.steps) / 2
    assert len(region.kernels()) <= len(once.kernels()) + 2


def regions_of_one_layer(regions, x):
    torch._dynamo.reset()
    with torch.no_grad():
        pagoda.compile(twins(1)[1])(x.to(P))
    return regions[-1]


def test_gradients():
    here, there = twins()
    x = torch.randn(6, 8)
    compiled = pagoda.compile(there)
    here(x).square().sum().backward()
    compiled(x.to(P)).square().sum().backward()
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-5)


def test_sizes_stay_symbolic():
    here, there = twins()
    compiled = pagoda.compile(there)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 30):
            x = torch.randn(rows, 8)
            moved = x.to(P)
            torch._dynamo.mark_dynamic(moved, 0)
            torch.testing.assert_close(compiled(moved).cpu(), here(x), rtol=1e-5, atol=1e-6)


def test_all_sizes_dynamic_is_refused():
    with pytest.raises(ValueError) as raised:
        pagoda.compile(twins()[1], dynamic=True)
    assert str(raised.value) == (
        "pagoda.compile: dynamic=True cannot be combined with layers that are lowered once; mark "
        "the dimensions that vary with torch._dynamo.mark_dynamic, or use "
        'torch.compile(model, backend="pagoda", dynamic=True)'
    )


def test_each_call_draws_numbers_of_its_own():
    """Two layers with equal weights and dropout drop other elements."""
    stack = Stack(2, Block, dropout=0.5).to(P)
    with torch.no_grad():
        stack.blocks[1].load_state_dict(stack.blocks[0].state_dict())
        for block in stack.blocks:  # each adds ones that were kept, doubled
            block.down.weight.zero_()
            block.down.bias.fill_(1.0)
        stack.head.weight.fill_(0.0)
        stack.head.weight[:, 0] = 1.0
        stack.head.bias.zero_()
    out = pagoda.compile(stack)(torch.zeros(64, 8, device=P))
    assert {round(v) for v in out[:, 0].tolist()} == {0, 2, 4}


def test_a_copy_of_a_compiled_model_is_its_own():
    import copy

    _, there = twins()
    x = torch.randn(3, 8, device=P)
    compiled = pagoda.compile(there)
    with torch.no_grad():
        before = compiled(x)
        other = copy.deepcopy(there)
        other.head.bias += 1
        torch.testing.assert_close(pagoda.compile(other)(x).cpu(), before.cpu() + 1)
        torch.testing.assert_close(compiled(x).cpu(), before.cpu())


def test_models_without_repeated_layers_are_compiled_as_they_are():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(P)
    x = torch.randn(5, 3)
    with torch.no_grad():
        want = model.cpu()(x)
        torch.testing.assert_close(pagoda.compile(model.to(P))(x.to(P)).cpu(), want)


def test_control_flow_is_refused():
    def choose(x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(Exception) as raised:
        torch.compile(choose, backend=P)(torch.ones(3, device=P))
    assert (
        "control flow in a graph (torch.cond, while_loop, scan) cannot be compiled for device "
        "pagoda. Compile the parts on their own."
    ) in str(raised.value)


class _Convolved(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.norm(self.convolution(x)))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_Convolved(channels), _Convolved(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def test_of_nested_classes_that_which_saves_most_is_lowered_once():
    """Stages that differ are no use; three times two convolutions save more than three blocks."""
    stages = nn.ModuleList(
        nn.Sequential(*(_Bottleneck(channels) for _ in range(3))) for channels in (4, 8)
    )
    assert repeated._repeated(stages) == [_Bottleneck]
    x, model = torch.randn(2, 8, 8, 8), stages[1]
    with torch.no_grad():
        found = pagoda.compile(copy.deepcopy(model).to("pagoda"))(x.to("pagoda"))
        torch.testing.assert_close(found.cpu(), model(x), rtol=1e-4, atol=1e-4)


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [channels for channels in range(1, 11) for _ in range(2)]
        self.levels = nn.ModuleList(_Convolved(channels) for channels in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        widths = (level.norm.num_channels for level in self.levels)
        return sum(
            level(x[:, :width]).sum() for level, width in zip(self.levels, widths, strict=True)
        )


def test_layers_of_many_shapes():
    """torch allows eight, unless told otherwise."""
    model, x = _Pyramid(), torch.randn(1, 10, 4, 4)
    assert repeated._repeated(model) == [_Convolved]
    with torch.no_grad():
        found = pagoda.compile(copy.deepcopy(model).to("pagoda"))(x.to("pagoda"))
        torch.testing.assert_close(found.cpu(), model(x), rtol=1e-4, atol=1e-4)


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


def test_layers_with_running_statistics():
    """torch refuses them in a nested region as soon as they are trained."""
    here = nn.Sequential(*(_Normed() for _ in range(3)))
    there, x = copy.deepcopy(here).to("pagoda"), torch.randn(16, 8)
    for model, given in ((here, x), (pagoda.compile(there), x.to("pagoda"))):
        model(given).square().sum().backward()
    for name, found in there.state_dict().items():
        torch.testing.assert_close(found.cpu(), here.state_dict()[name], rtol=1e-4, atol=1e-5)
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-3, atol=1e-3)
