"""The attention kernel against torch's scaled_dot_product_attention in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from attention_support import (
    BF16,
    CAR,
    CODES,
    EDGE,
    F32,
    TINY,
    bits,
    bool_mask,
    compiled_once,
    library_call,
    tensors,
    windowed,
)
from compiler_support import run_kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Symbol
from pagoda.isa.chip import PRESETS
from pagoda.isa.definition import Definition
from pagoda.isa.machine import Machine, Result
from pagoda.kernels.attention import attention_kernel
from pagoda.kernels.attention_blocks import (
    SOFTMAX_BLOCK,
    AttentionBlocks,
    choose_blocks,
    float32_keys,
    memory_bytes,
)
from pagoda.kernels.attention_call import attention_arguments, attention_for
from pagoda.sim.machine import Simulator


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    with compiled_once():
        yield


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None, *,
    causal: bool = False, offset: int = 0, scale: float | None = None, terms: int = 1, chip=TINY,
    blocks: AttentionBlocks | None = None, out: np.ndarray | None = None,
    machine: Machine | None = None,
) -> tuple[np.ndarray, Result]:  # fmt: skip
    """Compiles and runs the kernel, on the simulator in checking mode unless told otherwise."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if out is None:
        out = np.full((*q.shape[:3], v.shape[3]), 7, q.dtype)
    call = library_call("sdpa", (out, q, k, v, mask), causal, scale, terms)
    kernel, chosen = attention_for(call, chip)
    if blocks is not None:
        kind = None if mask is None else CODES[mask.dtype]
        kernel = attention_kernel(
            CODES[q.dtype], q.shape[3], causal, kind, terms, blocks, value_dim=v.shape[3]
        )
    views, scalars = attention_arguments(call, blocks or chosen, offset, chip.cores)
    arguments = {name: int(value.evaluate({})) for name, value in scalars.items()}
    arrays = (out, q, k, v, mask)
    for name, found in views.items():
        arguments[name] = windowed(arrays[found.buffer], found)
    machine = machine or Simulator(chip, checking=True)
    return out, run_kernel(chip, kernel, machine, **arguments)


def exact(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None, *,
    causal: bool = False, offset: int = 0, scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The result in float64, and the same with |v|: what rounding errors are relative to."""
    q, k, v = (torch.from_numpy(x.astype(np.float64)) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        visible = visible.tril(offset)
    if mask is not None and mask.dtype == bool:
        visible = visible & torch.from_numpy(mask)
    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    if mask is not None and mask.dtype != bool:
        bias = bias + torch.from_numpy(mask.astype(np.float64))
    results = [
        torch.nn.functional.scaled_dot_product_attention(q, k, x, attn_mask=bias, scale=scale)
        for x in (v, v.abs())
    ]
    return results[0].nan_to_num().numpy(), results[1].nan_to_num().numpy()


# Weights are rounded to bf16 and normalised by their rounded sum (twice 2^-9), and so is the
# result; float32 with terms keeps about 8 bits a term of q, k (errors times |scores|), p and v.
TOLERANCE = {(BF16, 1): 3.1 * 2**-9, (F32, 1): 2**-5, (F32, 2): 2**-12, (F32, 3): 2**-19}


def check(q, k, v, mask=None, *, terms=1, chip=TINY, blocks=None, **meaning):
    found, result = attend(q, k, v, mask, terms=terms, chip=chip, blocks=blocks, **meaning)
    expected, size = exact(q, k, v, mask, **meaning)
    error = np.abs(found.astype(np.float64) - expected)
    assert np.all(error <= TOLERANCE[q.dtype, terms] * size + 1e-30), float(error.max())
    return found, result


# Shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        dict(s=1),
        dict(q=3, s=2, d=20),
        dict(b=2, h=3, g=1, q=7, s=13, d=16),
        dict(b=1, h=6, g=2, q=1, s=131, d=64),
        dict(b=2, h=2, g=2, q=17, s=5, d=16, e=24),
        dict(h=1, g=1, q=3, s=SOFTMAX_BLOCK + 67, d=16),
        dict(h=1, g=1, q=2, s=3, d=256),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(shape, causal):
    check(*tensors(**shape), causal=causal)


@pytest.mark.parametrize("shape", [dict(q=0, s=4), dict(b=0, s=4)])
def test_no_queries(shape):
    q, k, v = tensors(**shape)
    found, _ = attend(q, k, v)
    assert found.size == 0


@pytest.mark.parametrize("causal", [False, True])
def test_no_keys_give_zero(causal):
    q, k, v = tensors(q=3, s=0)
    found, _ = attend(q, k, v, causal=causal)
    assert bits(found) == bits(np.zeros_like(found))


def test_heads_sharing_keys_are_cut_into_blocks():
    q, k, v = tensors(h=10, g=2, q=3, s=40)
    whole, _ = check(q, k, v, causal=True, offset=20, blocks=AttentionBlocks(16, 64, 64))
    for rows in (1, 2, 4, 8):
        cut, _ = attend(q, k, v, causal=True, offset=20, blocks=AttentionBlocks(rows, 64, 64))
        assert bits(cut) == bits(whole), rows


def test_several_key_value_heads_at_once():
    q, k, v = tensors(b=2, h=10, g=5, s=40)
    found = {
        bits(check(q, k, v, blocks=AttentionBlocks(rows, 64, 64))[0]) for rows in (2, 4, 7, 10)
    }
    assert len(found) == 1


@pytest.mark.parametrize(("keys", "offset"), [(1, 0), (63, 62), (64, 63), (70, 10), (9, -1)])
def test_decode_with_offset(keys, offset):
    check(*tensors(h=3, s=keys, d=32), causal=True, offset=offset)


def test_decode_equals_prefill():
    """Each query alone on its cache gives the bits of all queries at once."""
    q, k, v = tensors(h=3, q=70, s=70)
    whole, _ = check(q, k, v, causal=True, chip=EDGE)
    for row in (0, 1, 63, 64, 69):
        one = q[:, :, row : row + 1].copy()
        found, _ = attend(one, k[:, :, : row + 1], v[:, :, : row + 1], causal=True, offset=row)
        assert bits(found) == bits(whole[:, :, row : row + 1]), row


def test_transposed_heads_layout():
    q, k, v = (x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
               for x in tensors(b=2, h=4, g=2, q=5, s=21))  # fmt: skip
    out = np.zeros((2, 5, 4, 16), BF16).transpose(0, 2, 1, 3)
    strided, _ = attend(q, k, v, causal=True, out=out)
    packed, _ = check(*(np.ascontiguousarray(x) for x in (q, k, v)), causal=True)
    assert bits(strided) == bits(packed)


def test_scales():
    q, k, v = tensors(q=4, s=9)
    for scale in (1.0, 0.0, -0.5):
        check(q, k, v, scale=scale)


def test_large_scores():
    """Far apart scores, and maxima that rise from block to block."""
    q, k, v = tensors(q=3, s=2 * SOFTMAX_BLOCK + 5)
    k = (k.astype(np.float32) * np.linspace(1, 60, k.shape[2])[:, None]).astype(BF16)
    found, _ = attend(q, k, v)
    expected, size = exact(q, k, v)
    # Scores of up to 700 have errors of 700 * 2^-24 * a few; those multiply the weights.
    assert np.all(np.abs(found.astype(np.float64) - expected) <= 2**-7 * size)


# Masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4, 5, 37), (1, 1, 5, 37), (2, 1, 1, 37), (1, 4, 5, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_bool_mask(shape, causal):
    q, k, v = tensors(b=2, h=4, g=2, q=5, s=37)
    check(q, k, v, bool_mask(shape), causal=causal)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(2, 4, 5, 37), (1, 1, 1, 37)])
def test_float_mask(shape, dtype):
    q, k, v = tensors(b=2, h=4, g=2, q=5, s=37)
    mask = np.random.default_rng(2).standard_normal(shape).astype(dtype)
    mask[..., 3] = -np.inf
    check(q, k, v, mask)
    check(q, k, v, mask, causal=True)


def test_mask_with_keys_apart_in_memory():
    q, k, v = tensors(h=2, g=1, q=5, s=70)
    mask = bool_mask((1, 2, 70, 5)).transpose(0, 1, 3, 2)
    strided, _ = check(q, k, v, mask)
    packed, _ = attend(q, k, v, np.ascontiguousarray(mask))
    assert bits(strided) == bits(packed)


def test_rows_that_see_nothing_are_zero():
    q, k, v = tensors(q=4, s=SOFTMAX_BLOCK + 3)
    mask = np.ones((1, 1, 4, k.shape[2]), bool)
    mask[:, :, 1] = False
    mask[:, :, 2, :SOFTMAX_BLOCK] = False
    found, _ = check(q, k, v, mask)
    assert bits(found[:, :, 1]) == bits(np.zeros_like(found[:, :, 1]))
    added = np.where(mask, np.float32(0), np.float32(-np.inf))
    found, _ = check(q, k, v, added)
    assert bits(found[:, :, 1]) == bits(np.zeros_like(found[:, :, 1]))


def test_most_negative_finite_mask_is_not_infinite():
    """A row whose mask is -FLT_MAX everywhere averages all values, as torch does."""
    q, k, v = tensors(q=2, s=6)
    mask = np.full((1, 1, 2, 6), np.finfo(np.float32).min)
    found, _ = attend(q, k, v, mask)
    mean = v.astype(np.float64).mean(2, keepdims=True)
    assert np.all(np.abs(found.astype(np.float64) - mean) <= 2**-8 * np.abs(v.astype(float)).max())


def test_hidden_nan_keys_do_not_show():
    q, k, v = tensors(q=3, s=8)
    expected, _ = attend(q, k, v, causal=True)
    k[:, :, 3:] = np.nan
    found, _ = attend(q, k, v, causal=True)
    assert bits(found) == bits(expected)


# Equal bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_bits_do_not_depend_on_blocks_or_chip(mask):
    q, k, v = tensors(b=1, h=4, g=2, q=9, s=SOFTMAX_BLOCK + 150)
    given = None
    if mask is not None:
        given = bool_mask((1, 1, 9, k.shape[2]))
        if mask == "float":
            given = np.where(given, np.float32(0.5), np.float32(-2))
    arguments = dict(causal=True, offset=k.shape[2] - 30)
    found = [bits(attend(q, k, v, given, chip=chip, **arguments)[0]) for chip in (TINY, EDGE, CAR)]
    for rows, (span, keys) in zip((1, 5, 16), ((64, 16), (128, 32), (256, 256)), strict=True):
        blocks = AttentionBlocks(rows, span, keys)
        found.append(bits(attend(q, k, v, given, blocks=blocks, chip=EDGE, **arguments)[0]))
    assert len(set(found)) == 1


def test_float32_bits_do_not_depend_on_rows():
    q, k, v = tensors(h=2, q=5, s=75, dtype=F32)
    keys = float32_keys(16)
    found = {
        bits(attend(q, k, v, terms=3, chip=EDGE, blocks=AttentionBlocks(rows, span, keys))[0])
        for rows, span in ((1, 64), (4, 128), (16, 64))
    }
    assert len(found) == 1


def test_the_definition_agrees():
    q, k, v = tensors(h=2, q=3, s=90)
    found, result = attend(q, k, v, causal=True, offset=80)
    definition = Definition(TINY, checking=True)
    expected, slow = attend(q, k, v, causal=True, offset=80, machine=definition)
    assert bits(found) == bits(expected) and result.cycles == slow.cycles


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random(data):
    groups, shared = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    shape = dict(
        b=data.draw(st.integers(1, 2)), h=groups * shared, g=groups,
        q=data.draw(st.integers(1, 20)), s=data.draw(st.integers(1, 140)),
        d=data.draw(st.sampled_from((16, 20))),
    )  # fmt: skip
    q, k, v = tensors(**shape, seed=data.draw(st.integers(0, 99)))
    causal = data.draw(st.booleans())
    offset = data.draw(st.integers(-3, 140)) if causal else 0
    mask = bool_mask((1, 1, shape["q"], shape["s"])) if data.draw(st.booleans()) else None
    rows, keys = data.draw(st.sampled_from(((1, 64), (5, 32), (9, 64))))
    blocks = AttentionBlocks(rows, 64, keys)
    found, _ = check(q, k, v, mask, causal=causal, offset=offset, blocks=blocks)
    other, _ = attend(q, k, v, mask, causal=causal, offset=offset)
    assert bits(found) == bits(other)


# float32 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_float32(terms, causal):
    check(*tensors(h=2, q=5, s=75, d=20, dtype=F32), terms=terms, causal=causal)


def test_float32_head_dim_64_on_the_smallest_chip():
    check(*tensors(h=3, q=2, s=40, d=64, dtype=F32), terms=3)


# Blocks, calls and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "dim", "terms"),
    list(product(("tiny", "edge", "car", "cloud"), (16, 64, 128, 256), (1, 3))),
)
def test_blocks_fit(chip, dim, terms):
    chip = PRESETS[chip]
    blocks = choose_blocks(chip, dim, terms=terms)
    assert SOFTMAX_BLOCK % blocks.span == blocks.span % blocks.keys == 0
    sram, acc = memory_bytes(blocks, dim, None, terms)
    assert sram <= chip.sram_bytes and acc <= chip.acc_bytes


def test_blocks_of_the_presets():
    assert choose_blocks(TINY, 64) == AttentionBlocks(rows=8, span=64, keys=32)
    assert choose_blocks(EDGE, 64) == AttentionBlocks(rows=64, span=128, keys=128)


def test_chip_without_bf16():
    with pytest.raises(CompileError) as error:
        choose_blocks(PRESETS["tiny8"], 64)
    assert str(error.value) == (
        "attention: it needs a matrix engine that multiplies bf16, but chip tiny8 has int8; "
        "use another chip"
    )


def test_head_dimension_must_be_contiguous():
    q, k, v = tensors(q=2, s=3)
    k = k.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2)
    with pytest.raises(CompileError) as error:
        attend(q, k, v)
    assert str(error.value) == (
        "attention: the head dimension is contiguous, but k has stride 3 there; "
        "call k.contiguous() first"
    )


def test_dtypes_must_agree():
    q, k, v = tensors(q=2, s=3)
    with pytest.raises(CompileError) as error:
        attend(q, k.astype(F32), v)
    assert str(error.value) == (
        "attention: q, k, v and out have one dtype, but q is bfloat16 and k is float32; "
        "convert them to one dtype"
    )


def test_head_dimension_must_be_a_small_number():
    q, k, v = tensors(q=2, s=3, d=257)
    with pytest.raises(CompileError) as error:
        attend(q, k, v)
    assert str(error.value) == (
        "attention: the head dimension is a fixed number from 1 to 256, but that of q is 257; "
        "use another head dimension, or compile without dynamic head dimensions"
    )


def test_arguments_of_symbolic_sizes():
    """One kernel serves every length: the scalars are expressions over the region's symbols."""
    q, k, v = tensors(h=6, g=2, q=2, s=3)
    call = library_call("sdpa", (np.empty_like(q), q, k, v, None), True, 0.25, 1)
    length = Symbol("n")
    args = list(call.args)
    for number in (0, 1):
        heads = args[number].sizes[1]
        args[number] = replace(args[number], sizes=(Const(1), heads, length, Const(16)))
    call = replace(call, args=tuple(args))
    views, scalars = attention_arguments(call, AttentionBlocks(8, 64, 64), 5)
    at = {n: {name: x.evaluate({"n": n}) for name, x in scalars.items()} for n in (1, 4, 100)}
    assert views["q"].sizes[2] == length and at[1]["offset"] == 5
    names = [f"{what}_block{s}" for s in ("", "s") for what in ("group", "head", "query")]
    assert [at[1][name] for name in names] == [2, 3, 1, 1, 1, 1]
    assert [at[4][name] for name in names] == [1, 2, 4, 2, 2, 1]
    assert [at[100][name] for name in names] == [1, 1, 8, 2, 3, 13]


# Time --------------------------------------------------------------------------------------------


def test_decode_hides_behind_its_keys_and_values():
    """On `edge` a decode takes at most 4500 cycles, launch included, beyond loading K and V."""
    q, k, v = tensors(h=9, g=3, s=512, d=64)
    _, result = check(q, k, v, causal=True, offset=511, chip=EDGE)
    dram = (k.nbytes + v.nbytes) / float(EDGE.dram_bytes_per_cycle)
    assert result.cycles <= dram + 4500


def test_cores_share_the_work():
    q, k, v = tensors(h=4, g=4, q=1, s=500, d=64)
    one = replace(CAR, cores=1, dram_bytes_per_cycle=CAR.dram_share)
    _, alone = check(q, k, v, chip=one)
    _, together = check(q, k, v, chip=CAR)
    assert together.cycles < alone.cycles / 2


@pytest.mark.parametrize(
    ("keys", "masked", "least"), [(128, False, 0.85), (128, True, 0.75), (512, True, 0.8)]
)
def test_the_matrix_engine_is_busy(keys, masked, least):
    """On `edge`, encoders: every query sees every key, or those that are no padding."""
    q, k, v = tensors(h=8 if keys == 128 else 2, g=8 if keys == 128 else 2, q=keys, s=keys, d=64)
    mask = np.arange(keys)[None, None, None] < keys - 5 if masked else None
    _, result = check(q, k, v, mask, chip=EDGE)
    work = 2 * 64 * q.shape[1] * keys * keys / (EDGE.rows * EDGE.cols)
    assert work / result.cycles >= least, work / result.cycles
