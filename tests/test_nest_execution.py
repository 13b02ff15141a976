"""Lowered loop nests compiled and run as programs, in the definition's checking mode."""

import numpy as np
import pytest
from compiler_support import run_kernel
from nest_support import assert_close, execute, random_array, reference
from test_nest_lowering import (
    I0,
    I1,
    S,
    causal_mask,
    embedding,
    index_put,
    rms_norm,
    rotary_embedding,
    softmax,
    transposing_copy,
)

from pagoda.compiler.index_expr import Const, Symbol
from pagoda.compiler.loop_nest import Builder
from pagoda.compiler.nest_blocks import choose_blocks
from pagoda.compiler.nest_lowering import Blocks, lower
from pagoda.isa.chip import PRESETS


def sigmoid_and_sine():
    b = Builder([S])
    x = b.load("x", "float32", I0)
    b.store("y", "float32", I0, b.pointwise("mul", x, b.pointwise("sigmoid", x)))
    b.store("z", "bfloat16", I0, b.pointwise("sin", x))
    return b.build()[0], [random_array("float32", 300), np.zeros(300, np.float32),
                          np.zeros(300, np.uint16)], [300]  # fmt: skip


def norm():
    x = random_array("bfloat16", 7 * 96)
    return rms_norm(96, "bfloat16"), [x, random_array("bfloat16", 96, 1), np.zeros_like(x)], [7]


def wide_softmax():
    x = random_array("float32", 3 * 150)
    return softmax(Symbol("n")), [x, np.zeros_like(x)], [3, 150]


def argmax():
    b = Builder([S, Const(70)], 1)
    b.store("y", "int64", I0, b.reduce("argmax", b.load("x", "float32", I0 * 70 + I1)))
    b.store("z", "float32", I0, b.reduce("prod", b.load("x", "float32", I0 * 70 + I1)))
    x = random_array("float32", 5 * 70)
    return b.build()[0], [x, np.zeros(5, np.int64), np.zeros(5, np.float32)], [5]


CASES = {
    "pointwise": sigmoid_and_sine,
    "rms_norm": norm,
    "softmax": wide_softmax,
    "argmax": argmax,
    "rotary": rotary_embedding,
    "embedding": embedding,
    "index_put": index_put,
    "causal_mask": causal_mask,
    "transpose": transposing_copy,
}


@pytest.mark.parametrize("chip", ["tiny", "car"])
@pytest.mark.parametrize("case", CASES)
def test_programs(case, chip):
    nest, arrays, symbols = CASES[case]()
    hints = {f"n{k}": value for k, value in enumerate(symbols)}
    kernel = lower(nest, choose_blocks(nest, hints, PRESETS[chip]), hints).kernel
    memory = [a.copy() for a in arrays]
    # A parameter is a place in memory: an array of rank 0.
    places = {f"p{k}": np.ndarray((), a.dtype, a) for k, a in enumerate(memory)}
    run_kernel(PRESETS[chip], kernel, **places, **hints)
    assert_close(nest, memory, reference(nest, arrays, symbols))
    oracle = execute(lower(nest, Blocks(2, 64)), arrays, symbols)
    for found, wanted in zip(memory, oracle, strict=True):
        assert found.tobytes() == wanted.tobytes()
