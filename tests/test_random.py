"""Random numbers on the device: Philox, from seeds that torch's generator gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing._internal.common_utils import freeze_rng_state

import pagoda
from pagoda.pytorch.philox import MULTIPLIER, ROUNDS, WEYL

MASK = (1 << 32) - 1


def philox(position: int, second: int, key: int) -> tuple[int, int]:
    """Philox2x32-10 as the paper has it."""
    left, right = position, second
    for number in range(ROUNDS):
        if number:
            key = key + WEYL & MASK
        product = left * MULTIPLIER
        left, right = (product >> 32) ^ key ^ right, product & MASK
    return left, right


@pytest.fixture(autouse=True)
def tiny():
    pagoda.use_chip("tiny")


@pytest.mark.parametrize(
    ("position", "second", "key", "words"),
    [
        (0, 0, 0, (0xFF1DAE59, 0x6CD10DF2)),
        (MASK, MASK, MASK, (0x2C3F628B, 0xAB4FD7AD)),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_known_answers(position, second, key, words):
    """Of Random123's kat_vectors."""
    assert philox(position, second, key) == words


def drawn(function, seed):
    """What compiled code draws with the one seed that the generator gives next."""
    torch.manual_seed(seed)
    key = int(torch.randint(1 << 31, (1,)))
    torch.manual_seed(seed)
    return torch.compile(function, backend="pagoda")(), key


def test_uniform_draws_are_philox():
    got, key = drawn(lambda: torch.rand(7, 11, device="pagoda"), 5)
    want = [(philox(n, 0, key)[0] >> 8) * 2.0**-24 for n in range(77)]
    assert got.flatten().tolist() == want


def test_normal_draws_are_philox():
    got, key = drawn(lambda: torch.randn(50, device="pagoda"), 6)
    words = [philox(n, 0, key) for n in range(50)]
    want = [
        math.sqrt(-2 * math.log(((a >> 8) + 1) * 2.0**-24))
        * math.cos(2 * math.pi * (b >> 8) * 2.0**-24)
        for a, b in words
    ]
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=2e-5, atol=2e-6)


def test_normal_draws_of_many_means():
    mean, std = torch.tensor([[5.0], [9.0]]), torch.tensor([0.0, 2])
    there, wide = mean.to("pagoda"), std.to("pagoda")
    got, key = drawn(lambda: torch.normal(there, wide), 6)
    unit, same = drawn(lambda: torch.randn(2, 2, device="pagoda"), 6)
    assert key == same
    assert torch.equal(got.cpu(), unit.cpu() * std + mean)


def test_integer_draws_are_philox():
    got, key = drawn(lambda: torch.randint(-3, 9, (40,), device="pagoda"), 7)
    want = [-3 + (philox(n, 0, key)[0] & 0x7FFFFFFF) % 12 for n in range(40)]
    assert got.tolist() == want


def test_dropout_keeps_its_share_and_its_gradient():
    torch.manual_seed(1)
    x = torch.ones(64, 64, device="pagoda", requires_grad=True)
    y = torch.nn.functional.dropout(x, 0.25)
    y.sum().backward()
    kept = (y != 0).float().mean().item()
    assert abs(kept - 0.75) < 0.03
    assert set(y.detach().cpu().flatten().tolist()) == {0.0, np.float32(1 / 0.75).item()}
    assert torch.equal(x.grad, y.detach())


def test_seeds_repeat_draws_on_every_chip():
    def draw():
        return torch.nn.functional.dropout(torch.ones(300, device="pagoda"), 0.5)

    seen = []
    for chip in ("tiny", "edge"):
        pagoda.use_chip(chip)
        for seed_with in (torch.manual_seed, torch.pagoda.manual_seed):
            seed_with(3)
            seen.append((draw().tolist(), draw().tolist()))
    assert all(each == seen[0] for each in seen)
    assert seen[0][0] != seen[0][1]


def test_state_of_the_generator_is_saved_and_restored():
    state = torch.pagoda.get_rng_state()
    first = torch.nn.functional.dropout(torch.ones(100, device="pagoda"), 0.5)
    torch.pagoda.set_rng_state(state)
    again = torch.nn.functional.dropout(torch.ones(100, device="pagoda"), 0.5)
    assert torch.equal(first, again)
    torch.pagoda.reset_fallbacks()
    torch.nn.functional.dropout(again, 0.5)
    assert torch.pagoda.fallbacks() == {}


def test_compiled_code_leaves_the_generator_as_it_was():
    x = torch.ones(100, device="pagoda")

    def apart(x):
        with freeze_rng_state():  # which sets the state where nothing can be compiled
            torch.manual_seed(3)
            return torch.nn.functional.dropout(x)

    state = torch.get_rng_state()
    got = torch.compile(apart, backend="pagoda")(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(got, apart(x))


def test_attention_with_dropout():
    """Without value rows to mix, what is left is which weights were kept."""
    torch.manual_seed(4)
    q = torch.zeros(1, 2, 8, 4, device="pagoda")
    v = torch.eye(8, device="pagoda").expand(1, 2, 8, 8)
    weights = torch.nn.functional.scaled_dot_product_attention(q, q, v, dropout_p=0.5).cpu()
    assert set(weights.flatten().tolist()) == {0.0, 0.25}
    assert 0.3 < (weights != 0).float().mean() < 0.7
