"""Awkward sizes of every kind of kernel on the smallest chip, in checking mode: nothing, one,
primes, and operands of which one alone is larger than the SRAM."""

import numpy as np
import pytest
from compiler_support import bfloat16, run_kernel
from nest_support import assert_close, random_array, reference
from test_attention import bits, check, tensors
from test_matmul_kernel import expected_product, matrix, type_of
from test_nest_lowering import rms_norm, softmax

from pagoda.compiler.index_expr import Symbol
from pagoda.compiler.nest_blocks import choose_blocks
from pagoda.compiler.nest_lowering import lower
from pagoda.isa.chip import PRESETS
from pagoda.kernels.matmul import build_matmul
from pagoda.sim import Simulator

TINY = PRESETS["tiny"]


def machine():
    return Simulator(TINY, checking=True)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("batch", "m", "n", "k"),
    [
        (0, 3, 5, 7), (1, 0, 5, 7), (1, 3, 0, 7), (2, 3, 5, 0), (1, 1, 1, 1), (3, 1, 1, 97),
        (2, 7, 13, 31), (1, 1, 409, 97),
        (1, 3, 11, 12007),  # a row of a is 24 KB: no whole rows of a and b at once
        (1, 2, 1009, 41), (1, 1009, 2, 41),  # a, b or c is larger than SRAM
    ],
)  # fmt: skip
def test_matmul(batch, m, n, k, with_bias):
    a, b = matrix(batch, m, k, 0, 0), matrix(batch, k, n, 1, 1)
    bias = np.random.default_rng(2).standard_normal(n).astype(np.float32) if with_bias else None
    c = np.ones((batch, m, n), bfloat16)
    types = {"c": type_of(c), "a": type_of(a), "b": type_of(b)}
    arguments = {"c": c, "a": a, "b": b}
    if bias is not None:
        types["bias"], arguments["bias"] = type_of(bias), bias
    kernel = build_matmul(TINY, **types, expected=(batch, m, n, k))
    run_kernel(TINY, kernel, machine(), **arguments)
    if c.size:
        expected = expected_product(a, b, bfloat16, bias)
        assert np.array_equal(c.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        dict(q=1, s=1, d=1), dict(b=2, h=3, g=1, q=5, s=7, d=3), dict(q=11, s=67, d=13, e=1),
        dict(h=2, q=1, s=1009, d=64),  # keys alone are 129 KB
    ],
)  # fmt: skip
def test_attention(shape, causal):
    check(*tensors(**shape), causal=causal)


def test_attention_of_one_key_is_its_value():
    q, k, v = tensors(b=1, h=1, q=1, s=1, d=1)
    found, _ = check(q, k, v)
    assert bits(found) == bits(v)


def run_nest(nest, arrays, symbols):
    """Runs the nest's kernel, with blocks for its very sizes, and compares with the oracle."""
    hints = {f"n{number}": value for number, value in enumerate(symbols)}
    kernel = lower(nest, choose_blocks(nest, hints, TINY), hints).kernel
    memory = [array.copy() for array in arrays]
    places = {f"p{number}": np.ndarray((), a.dtype, a) for number, a in enumerate(memory)}
    run_kernel(TINY, kernel, machine(), **places, **hints)
    assert_close(nest, memory, reference(nest, arrays, symbols))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 97), (7, 13), (2, 40_009)])
def test_rms_norm(rows, width):
    x = random_array("bfloat16", rows * width)
    arrays = [x, random_array("bfloat16", width, 1), np.zeros_like(x)]
    run_nest(rms_norm(width, "bfloat16"), arrays, [rows])


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 3), (13, 67), (2, 20_011)])
def test_softmax(rows, width):
    x = random_array("float32", rows * width)
    run_nest(softmax(Symbol("n")), [x, np.zeros_like(x)], [rows, width])


@pytest.mark.parametrize(("rows", "width"), [(0, 3), (3, 0), (0, 0)])
def test_nests_of_nothing_write_nothing(rows, width):
    x = random_array("float32", 8)
    nest, symbols = softmax(Symbol("n")), {"n0": rows, "n1": width}
    kernel = lower(nest, choose_blocks(nest, symbols, TINY), symbols).kernel
    out = np.full(8, 7, np.float32)
    run_kernel(
        TINY, kernel, machine(), p0=np.ndarray((), x.dtype, x), p1=np.ndarray((), out.dtype, out),
        **symbols,
    )  # fmt: skip
    assert np.all(out == 7)
