"""`pagoda.coverage`: what a model's operations are and how they run, before running it."""

from __future__ import annotations

import model_families
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pagoda
from pagoda.pytorch import device


class Supported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, image):
        features = F.gelu(self.stem(image)).mean((2, 3))
        return self.head(features).softmax(-1)


class Unsupported(nn.Module):
    def forward(self, x):
        y = torch.linalg.inv(x @ x) + x[x > 0].sum()
        return y.double()


def line(model: nn.Module, number: int) -> str:
    """The `number`th line of a model's forward."""
    return f"test_coverage.py:{model.forward.__code__.co_firstlineno + number}"


def test_a_supported_model():
    model = Supported()
    weights = [p.clone() for p in model.parameters()]
    found = pagoda.coverage(model, torch.randn(2, 3, 8, 8))
    one, two = line(model, 1), line(model, 2)
    assert str(found) == (
        "6 operations, all supported\n"
        "operation         times  runs as         where\n"
        f"aten.convolution      1  library kernel  {one}\n"
        f"aten.addmm            1  library kernel  {two}\n"
        f"aten.gelu             1  loop nest       {one}\n"
        f"aten.mean             1  loop nest       {one}\n"
        f"aten._softmax         1  loop nest       {two}\n"
        f"aten.t                1  no arithmetic   {two}"
    )
    assert found.unsupported == () and found.supported == found.operations and not found.stopped
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert not any(hasattr(p, "fake_mode") for p in model.parameters())


def test_an_unsupported_model():
    model = Unsupported()
    found = pagoda.coverage(model, [torch.randn(4, 4)])
    one, two = line(model, 1), line(model, 2)
    assert str(found) == (
        "8 operations, 3 unsupported\n"
        "operation                  times  runs as         where\n"
        f"aten.linalg_inv_ex             1  unsupported     {one}\n"
        "    aten.linalg_inv_ex.default is neither a loop nest nor a library kernel. Rewrite "
        "the model\n"
        "    without it, or compute it on the CPU with .cpu().\n"
        f"aten._linalg_check_errors      1  unsupported     {one}\n"
        "    aten._linalg_check_errors.default is neither a loop nest nor a library kernel. "
        "Rewrite the model\n"
        "    without it, or compute it on the CPU with .cpu().\n"
        f"aten._to_copy                  1  unsupported     {two}\n"
        "    the chip stores torch.float64 but cannot compute with it. Use float32: convert "
        "tensors with\n"
        "    .to(dtype) before they are moved to the device.\n"
        f"aten.index                     1  host            {one}\n"
        f"aten.mm                        1  library kernel  {one}\n"
        f"aten.gt                        1  loop nest       {one}\n"
        f"aten.sum                       1  loop nest       {one}\n"
        f"aten.add                       1  loop nest       {one}"
    )
    assert [use.name for use in found.unsupported] == [
        "aten.linalg_inv_ex", "aten._linalg_check_errors", "aten._to_copy",
    ]  # fmt: skip


def test_nothing_is_computed_and_no_chip_is_opened():
    before = (device.state.executor, device.state.allocator)
    device.state.executor = device.state.allocator = None
    try:
        assert pagoda.coverage(Supported(), {"image": torch.randn(1, 3, 4, 4)}).operations
        assert device.state.executor is None and device.state.allocator is None
    finally:
        device.state.executor, device.state.allocator = before


class Branching(nn.Module):
    def forward(self, x):
        x = x.exp()
        if x.sum() > 0:
            x = x.log()
        return x


def test_a_model_that_depends_on_data_is_followed_to_there():
    model = Branching()
    found = pagoda.coverage(model, torch.randn(3))
    assert [use.name for use in found.operations][:3] == ["aten.exp", "aten.sum", "aten.gt"]
    assert found.stopped == (
        f"Followed to {line(model, 2)} only: what comes next depends on data. Eager code goes on "
        "there; compiled code is interrupted."
    )


@pytest.mark.parametrize("name", model_families.FAMILIES)
def test_families_are_supported_with_their_gradients(name):
    model, inputs = model_families.make(name)
    forward = pagoda.coverage(model, inputs)
    both = pagoda.coverage(model, inputs, backward=True)
    assert not forward.unsupported and not both.unsupported
    assert not forward.stopped and not both.stopped
    assert sum(use.count for use in both.operations) > sum(u.count for u in forward.operations)
    assert {use.runs_as for use in both.operations} <= {
        "loop nest", "library kernel", "no arithmetic"
    }  # fmt: skip
