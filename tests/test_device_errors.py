"""What device "pagoda" says to tensors of other devices, to float64, and out of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pagoda.compiler.cache import Cache
from pagoda.isa import load_chip
from pagoda.pytorch import chip as chip_module
from pagoda.runtime import OutOfDeviceMemory

P = "pagoda"
REMEDY = "free tensors, use a smaller batch or sequence, or choose a chip with more DRAM"


@pytest.fixture(autouse=True)
def small_chip(tmp_path):
    chip_module.use_chip(replace(load_chip("tiny"), dram_bytes=1 << 20), Cache(tmp_path))
    yield
    chip_module.use_chip("edge")


def works() -> bool:
    """The device is still usable."""
    return (torch.ones(3).to(P) + 1).cpu().tolist() == [2, 2, 2]


def test_a_tensor_on_the_cpu():
    with pytest.raises(RuntimeError) as raised:
        nn.Linear(3, 4).to(P)(torch.ones(2, 3))
    assert str(raised.value) == (
        "an operation on device pagoda got a tensor of shape (2, 3) on device cpu; all tensors "
        'must be on device pagoda. Move it with .to("pagoda").'
    )
    assert works()


def test_float64():
    x = torch.ones(3, dtype=torch.float64).to(P)
    with pytest.raises(NotImplementedError) as raised:
        torch.exp(x)
    assert str(raised.value) == (
        "operation aten.exp.out cannot run on device pagoda: the chip stores torch.float64 but "
        "cannot compute with it. Use float32: convert tensors with .to(dtype) before they are "
        "moved to the device."
    )
    assert x.cpu().tolist() == [1, 1, 1] and works()


def test_a_float64_number_beside_float32():
    """As on the CPU, it does not change the type of the result."""
    x, number = torch.ones(2).to(P), torch.tensor(2.5, dtype=torch.float64)
    for found in (x * number, number - x, torch.pow(x, number), x.mul_(number)):
        assert found.dtype == torch.float32
    assert x.cpu().tolist() == [2.5, 2.5]


def test_no_memory_for_a_tensor():
    with pytest.raises(OutOfDeviceMemory) as raised:
        torch.empty(512, 1024, dtype=torch.bfloat16, device=P)
    assert str(raised.value) == (
        "a bfloat16 tensor of shape [512, 1024]: device memory is full: 1,048,576 bytes asked for, "
        f"1,048,512 of 1,048,512 free (largest piece 1,048,512); {REMEDY}"
    )
    assert works()


def test_no_memory_for_a_module():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(512, 1024))
    with pytest.raises(OutOfDeviceMemory) as raised:
        module.to(P)
    assert str(raised.value) == (
        "parameter '1.weight', a float32 tensor of shape [1024, 512]: device memory is full: "
        "2,097,152 bytes asked for, 1,048,384 of 1,048,512 free (largest piece 1,048,384); "
        f"{REMEDY}"
    )
    assert works()


def test_no_memory_for_intermediate_results():
    """Two products in a row: the first one's result is wider than all memory."""

    def wide(x, w):
        return (x @ w) @ w.t()

    x, w = torch.ones(512, 4).to(P), torch.ones(4, 1024).to(P)
    with pytest.raises(OutOfDeviceMemory) as raised, torch.no_grad():
        torch.compile(wide, backend=P)(x, w)
    message = str(raised.value)
    assert message.startswith("intermediate results of a compiled graph, 1 tensors that share ")
    assert "2,097,152 bytes, the largest 'buf" in message and message.endswith(REMEDY)
    assert works()
