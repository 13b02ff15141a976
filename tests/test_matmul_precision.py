"""torch's float32 matmul precision, on eager products and in compiled models."""

from __future__ import annotations

import pytest
import torch

from pagoda.compiler.cache import Cache
from pagoda.pytorch import chip as chip_module
from pagoda.pytorch import device
from pagoda.pytorch.graph_pass import GraphPass
from pagoda.pytorch.matmul_precision import matmul_precision as asked_for

P = "pagoda"


@pytest.fixture(autouse=True)
def chip(tmp_path, monkeypatch):
    """The executor of an open chip; what the process used before comes back."""
    before = (device.state.executor, device.state.allocator)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)
    chip_module.use_chip("edge", Cache(tmp_path / "code"))
    yield device.state.executor
    device.state.executor, device.state.allocator = before


@pytest.fixture
def matmul_precision():
    """Sets torch's float32 matmul precision; puts the default back."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


def errors_by_precision(product, exact: torch.Tensor, choose) -> list[float]:
    """Largest error with each precision. The first must give its bits again in the end."""
    found = []
    for precision in ("highest", "high", "medium", "highest"):
        choose(precision)
        found.append(product().cpu())
    assert torch.equal(found[0], found[3])
    return [float((each - exact).abs().max()) for each in found[:3]]


def test_eager_products(matmul_precision) -> None:
    a, b = torch.randn(8, 50), torch.randn(50, 8)
    x, y = a.to(P), b.to(P)
    highest, high, medium = errors_by_precision(
        lambda: x @ y, a.double() @ b.double(), matmul_precision
    )
    assert highest < 4e-6 < 10 * highest < high < 1e-3 < medium


@pytest.mark.parametrize("operation", ["linear", "attention"])
def test_compiled_models(matmul_precision, operation) -> None:
    """Dynamo compiles anew by itself only for a change to or from "highest"."""
    if operation == "linear":
        given, function = [torch.randn(8, 50), torch.randn(8, 50)], torch.nn.functional.linear
    else:
        given = [torch.randn(1, 2, 6, 32) for _ in range(3)]
        function = torch.nn.functional.scaled_dot_product_attention
    compiled = torch.compile(function, backend=P)
    on_chip = [each.to(P) for each in given]

    def choose(precision: str) -> None:
        matmul_precision(precision)
        if precision == "medium":
            torch._dynamo.reset()

    highest, high, medium = errors_by_precision(
        lambda: compiled(*on_chip), function(*(each.double() for each in given)), choose
    )
    assert 10 * highest < high < 1e-3 < medium


def test_of_bfloat16_it_is_no_matter(chip, matmul_precision) -> None:
    x = torch.randn(4, 16, dtype=torch.bfloat16).to(P)
    for precision in ("highest", "medium"):
        matmul_precision(precision)
        torch._dynamo.reset()
        torch.compile(torch.mm, backend=P)(x, x.T)
    assert len(chip._loaded) == 1


def test_keys_of_the_caches_hold_it(chip, matmul_precision) -> None:
    x, uuids = torch.randn(4, 16).to(P), set()
    for precision in ("highest", "high", "medium"):
        matmul_precision(precision)
        torch.mm(x, x.T)
        uuids.add(GraphPass().uuid())  # which is in Inductor's keys
    assert len(uuids) == len(chip._loaded) == 3


def test_the_settings_of_torch_backends(monkeypatch) -> None:
    def refuse() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    found = {}
    for setting in ("none", "ieee", "tf32", "bf16"):
        # torch's own test helpers, once imported, forbid it elsewhere in the process.
        with torch.backends.__allow_nonbracketed_mutation():
            monkeypatch.setattr(torch.backends, "fp32_precision", setting)
            found[setting] = asked_for()
            monkeypatch.undo()
            monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert found == {"none": "highest", "ieee": "highest", "tf32": "high", "bf16": "medium"}
