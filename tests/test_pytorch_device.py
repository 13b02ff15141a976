"""The torch device "pagoda": storage, views, copies, modules, eager operations, errors."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from region_executor import HostExecutor

import pagoda.pytorch
from pagoda.pytorch import device, eager, storage

P = "pagoda"


@pytest.fixture(autouse=True)
def executor():
    """Runs regions on the host; puts back whatever the process used before."""
    before = (device.state.executor, device.state.allocator)
    host = HostExecutor()
    pagoda.pytorch.use(executor=host)
    torch.pagoda.reset_fallbacks()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield host
    device.state.executor, device.state.allocator = before


def test_tensors_are_plain_tensors() -> None:
    a = torch.randn(4, 6)
    d = a.to(P)
    assert type(d) is torch.Tensor and d.device == torch.device(P, 0) and d.is_pagoda
    assert d.data_ptr() % 64 == 0
    assert torch.equal(d.cpu(), a)
    assert torch.empty(0, 3, device=P).shape == (0, 3)


def test_views_share_storage() -> None:
    a = torch.randn(4, 6)
    d = a.to(P)
    assert torch.equal(d.t().cpu(), a.t())
    assert torch.equal(d[1:, ::2].cpu(), a[1:, ::2])
    assert torch.equal(d.view(2, 12).cpu(), a.view(2, 12))
    assert torch.equal(d.unfold(1, 2, 2).cpu(), a.unfold(1, 2, 2))
    assert d.t().untyped_storage().data_ptr() == d.untyped_storage().data_ptr()
    d[0, 1:3] = 5
    assert (d.cpu()[0, 1:3] == 5).all()
    assert d.view(-1)[1].item() == 5


def test_memory_is_given_back() -> None:
    class Counting(storage.HostAllocator):
        live = 0

        def allocate(self, nbytes: int) -> int:
            self.live += 1
            return super().allocate(nbytes)

        def free(self, pointer: int) -> None:
            self.live -= 1
            super().free(pointer)

    allocator = Counting()
    pagoda.pytorch.use(allocator=allocator)
    tensors = [torch.zeros(8).to(P) for _ in range(3)]
    view = tensors[0][2:]
    assert allocator.live == 3
    del tensors
    gc.collect()
    assert allocator.live == 1
    del view
    gc.collect()
    assert allocator.live == 0


def test_state_dict_round_trip() -> None:
    module = torch.nn.Linear(3, 3).to(P)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["weight"].device.type == P
    file.seek(0)
    on_cpu = torch.load(file, map_location="cpu")["weight"]
    assert torch.equal(on_cpu, module.weight.cpu())
    other = torch.nn.Linear(3, 3).to(P)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight.cpu(), module.weight.cpu())


def test_copying_and_pickling() -> None:
    t = torch.randn(3).to(P)
    for twin in (copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.clone()):
        assert twin.device.type == P and torch.equal(twin.cpu(), t.cpu())
        assert twin.data_ptr() != t.data_ptr()


def test_tied_weights_stay_tied() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    module.b.weight = module.a.weight
    module.to(P)
    assert module.a.weight is module.b.weight and module.a.weight.device.type == P
    module.to("cpu")
    assert module.a.weight is module.b.weight and module.a.weight.device.type == "cpu"


def test_module_on_meta_to_empty() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(3, 3)
    assert module.to_empty(device=P).weight.device.type == P


def test_printing(executor: HostExecutor) -> None:
    shown = repr(torch.tensor([1.0, 2.5]).to(P))
    assert shown == "tensor([1.0000, 2.5000], device='pagoda:0')"
    assert not executor.calls


def test_factories_run_on_the_device(executor: HostExecutor) -> None:
    assert torch.ones(2, 3, device=P).cpu().tolist() == [[1, 1, 1]] * 2
    assert torch.arange(5, device=P).cpu().tolist() == [0, 1, 2, 3, 4]
    assert torch.full((2,), 3.5, device=P).cpu().tolist() == [3.5, 3.5]
    assert torch.zeros_like(torch.ones(2, device=P)).cpu().tolist() == [0, 0]
    assert executor.calls["nest"] >= 4


def test_eager_operations_match_the_cpu() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    da, db = a.to(P), b.to(P)
    pairs = [
        (da @ db, a @ b),
        (torch.softmax(da, -1), torch.softmax(a, -1)),
        (torch.cat([da, da], 1), torch.cat([a, a], 1)),
        (da.sum(0), a.sum(0)),
        (da.argmax(-1), a.argmax(-1)),
        (da.to(torch.bfloat16), a.to(torch.bfloat16)),
        (torch.nn.functional.layer_norm(da, (4,)), torch.nn.functional.layer_norm(a, (4,))),
        ((da > 0).long().cumsum(-1), (a > 0).long().cumsum(-1)),
        (da.t().contiguous(), a.t().contiguous()),
        (da + torch.tensor(2.0), a + 2),
    ]
    for got, expected in pairs:
        assert got.device.type == P and got.dtype == expected.dtype
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(da, da.clone()) and not torch.equal(da, da + 1)
    assert torch.pagoda.fallbacks() == {}


def test_in_place_operations_change_the_tensor() -> None:
    d = torch.arange(6.0).to(P)
    alias = d.view(2, 3)
    assert d.add_(1) is d and d.mul_(2) is d
    alias[:, 1].zero_()
    assert alias.cpu().tolist() == [[2, 0, 6], [8, 0, 12]]


def test_in_place_operations_of_growing_sizes() -> None:
    for n in (6, 5, 7):
        d = torch.arange(float(n)).to(P)
        assert d.mul_(2).cpu().tolist() == [2.0 * i for i in range(n)]
        assert d.add_(d).cpu().tolist() == [4.0 * i for i in range(n)]


def test_in_place_operations_that_read_their_own_memory() -> None:
    for n in (2, 3, 4):
        x = torch.arange(2.0 * n).view(2, n)
        d = x.to(P)
        d[0] += d[1]
        d[:, 0].mul_(d[:, 1])
        d[:, 1:] = d[:, :-1]
        x[0] += x[1]
        x[:, 0].mul_(x[:, 1])
        x[:, 1:] = x[:, :-1].clone()
        assert torch.equal(d.cpu(), x)


def test_growing_sizes_compile_a_few_times_only() -> None:
    eager._operations.clear()
    for n in range(2, 12):
        x = torch.arange(float(n))
        assert torch.cat([x.to(P), x.to(P)]).cpu().tolist() == [*x.tolist(), *x.tolist()]
    (operation,) = eager._operations.values()
    assert len(operation.versions) == 2


def test_random_numbers_are_counted() -> None:
    torch.manual_seed(3)
    drawn = torch.randn(4, device=P)
    torch.manual_seed(3)
    assert torch.equal(drawn.cpu(), torch.randn(4))
    assert torch.pagoda.fallbacks() == {"aten.normal_.default": 1}


def test_unsupported_operation_is_named() -> None:
    with pytest.raises(NotImplementedError) as error:
        torch.linalg.inv(torch.eye(3).to(P))
    assert str(error.value) == (
        "operation aten.linalg_inv_ex.inverse cannot run on device pagoda: operation "
        "linalg_inv_ex is not supported on device pagoda: it is neither a loop nest nor one of "
        "the library kernels (mm, bmm, addmm, scaled_dot_product_attention, convolution). "
        "Rewrite the model without it, or compute it on the CPU with .cpu(). It is never computed "
        "on the CPU in silence; if that is what you want, move its inputs with .cpu() and the "
        "result back."
    )


def test_mixed_devices_are_refused() -> None:
    with pytest.raises(RuntimeError) as error:
        eager.run(torch.ops.aten.add.Tensor, (torch.ones(2).to(P), torch.ones(2)), {})
    assert str(error.value) == (
        "operation aten.add.Tensor got tensors on device pagoda and, as argument 'other', one of "
        "shape (2,) on device cpu. All must be on one device; only numbers, tensors without "
        'dimensions, may stay on the CPU. Move it with .to("pagoda").'
    )


def test_memory_survives_an_exception_in_flight() -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match="as argument 'other', one of shape"):
            torch.ones(2).to(P) + torch.ones(2)


def test_missing_executor_is_named() -> None:
    device.state.executor = None
    with pytest.raises(RuntimeError) as error:
        torch.ones(2).to(P) * 7
    assert str(error.value) == (
        'device "pagoda" cannot compute: it needs an executor, and none was set. '
        "Call pagoda.pytorch.use(executor=...) first."
    )


def test_a_device_that_is_not_there() -> None:
    message = (
        "device 'pagoda:7': its number must be below torch.pagoda.device_count(), which is 1; "
        'use "pagoda"'
    )
    for make in (
        lambda: torch.empty(3, device="pagoda:7"),
        lambda: torch.ones(3).to("pagoda:7"),
        lambda: torch.empty(3, 2, device="pagoda:7", memory_format=torch.contiguous_format),
    ):
        with pytest.raises(RuntimeError) as error:
            make()
        assert str(error.value) == message
    assert torch.ones(3).to("pagoda:0").device == torch.empty(0, device="pagoda").device
