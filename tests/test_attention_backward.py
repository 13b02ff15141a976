"""Attention's gradients: the kernel against a plain model, bit for bit, and against torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    blob_of,
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
from pagoda.isa import tables
from pagoda.isa.accumulation import ReduceOp, finish, initial_state, matmul, reduce_row
from pagoda.isa.chip import PRESETS
from pagoda.isa.definition import Definition
from pagoda.isa.numbers import DType, fadd, ffma, fmul, fsub
from pagoda.kernels.attention import LOG2_E
from pagoda.kernels.attention_backward import attention_backward_kernel
from pagoda.kernels.attention_backward_blocks import (
    BackwardBlocks,
    choose_backward_blocks,
    float32_run,
)
from pagoda.kernels.attention_backward_call import (
    attention_backward_arguments,
    attention_backward_for,
)
from pagoda.kernels.attention_call import attention_arguments, attention_for, causal_offset
from pagoda.kernels.float32 import products
from pagoda.sim.machine import Simulator


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    with compiled_once():
        yield


@dataclass
class Problem:
    """Tensors and meaning of one call; `out` and what follows it is worked out by the kernels."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    mask: np.ndarray | None = None
    causal: bool | str = False
    terms: int = 1
    dropout: float = 0.0

    def __post_init__(self):
        (b, h, rows, _), keys = self.q.shape, self.k.shape[2]
        rng = np.random.default_rng(9)
        self.seeds = (None, None)
        if self.dropout:
            self.seeds = tuple(
                rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
                for shape in ((b, h, rows), (b, keys))
            )

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def forward(self, chip=TINY):
        """out and statistics, from the forward kernel."""
        out = np.full((*self.q.shape[:3], self.v.shape[3]), 7, self.q.dtype)
        statistics = np.full((*self.q.shape[:3], 2), 7, F32)
        arrays = (out, statistics, self.q, self.k, self.v, self.mask, *self.seeds)
        meaning = self.causal, self.scale, self.terms, self.dropout
        call = library_call("sdpa_training", arrays, *meaning)
        kernel, blocks = attention_for(call, chip)
        offset = causal_offset(call)
        views, scalars = attention_arguments(call, blocks, offset, chip.cores)
        self._run(kernel, chip, Simulator(chip, checking=True), arrays, views, scalars)
        return out, statistics

    def backward(self, chip=TINY, blocks=None, machine=None):
        """(dq as float32 and without its scale, dk, dv), and the machine's result."""
        out, statistics = self.forward(chip)
        self.statistics, self.delta = statistics, row_sums(self.dout, out)
        dq = np.full(self.q.shape, 7, F32)
        dk, dv = np.full_like(self.k, 7), np.full_like(self.v, 7)
        rest = (self.dout, self.q, self.k, self.v, statistics, self.delta, self.mask)
        arrays = (dq, dk, dv, *rest, *self.seeds)
        meaning = self.causal, self.scale, self.terms, self.dropout
        call = library_call("sdpa_backward", arrays, *meaning)
        kernel = attention_backward_for(call, chip)
        if blocks is not None:
            kind = None if self.mask is None else CODES[self.mask.dtype]
            kernel = attention_backward_kernel(
                CODES[self.q.dtype], self.q.shape[3], self.v.shape[3], bool(self.causal), kind,
                self.terms, BackwardBlocks(*blocks), dropout=bool(self.dropout),
            )  # fmt: skip
        machine = machine or Simulator(chip, checking=True)
        views, scalars = attention_backward_arguments(call)
        result = self._run(kernel, chip, machine, arrays, views, scalars)
        return (dq, dk, dv), result

    def _run(self, kernel, chip, machine, arrays, views, scalars):
        arguments = {name: int(value.evaluate({})) for name, value in scalars.items()}
        for name, found in views.items():
            arguments[name] = windowed(arrays[found.buffer], found)
        return run_kernel(chip, kernel, machine, **arguments)

    def dropped(self) -> np.ndarray:
        """[b, h, i, s] bool: the docstring of `attention_dropout` in numpy."""
        rows, columns = (x.astype(np.uint64) for x in self.seeds)
        z = (rows[..., None] + columns[:, None, None]) * 0x85EBCA6B % 2**32
        z = (z ^ z >> np.uint64(13)) * 0xC2B2AE35 % 2**32
        return z.astype(np.uint32).view(np.int32) < round(self.dropout * 2**32) - 2**31

    def visible(self) -> np.ndarray:
        """[b, h, i, s] bool."""
        b, h, i, _ = self.q.shape
        s = self.k.shape[2]
        seen = np.ones((b, h, i, s), bool)
        if self.causal:
            seen &= np.tri(i, s, s - i if self.causal == "lower right" else 0, dtype=bool)
        if self.mask is not None and self.mask.dtype == bool:
            seen &= self.mask
        return seen


def problem(
    b=1, h=1, g=1, q=1, s=1, d=16, e=None, dtype=BF16, seed=0, mask=None, causal=False, terms=1,
    dropout=0.0,
) -> Problem:
    arrays = tensors(b=b, h=h, g=g, q=q, s=s, d=d, e=e, dtype=dtype, seed=seed)
    dout = np.random.default_rng(seed + 1).standard_normal((b, h, q, e or d)).astype(dtype)
    return Problem(*arrays, dout, mask, causal, terms, dropout)


def row_sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(F32) * b.astype(F32)).sum(-1, dtype=F32)


def same(left, right) -> bool:
    return all(bits(a) == bits(b) for a, b in zip(left, right, strict=True))


# Bit for bit -------------------------------------------------------------------------------------


def split(x: np.ndarray, terms: int) -> list[np.ndarray]:
    """The bf16 terms of `pagoda.kernels.float32`, as float32; of finite numbers."""
    x = x.astype(F32)
    if terms == 1:
        return [x.astype(BF16).astype(F32)]
    found = [(x.view(np.uint32) & 0xFFFF0000).view(F32)]
    for _ in range(terms - 1):
        x = x - found[-1]
        found.append(x.astype(BF16).astype(F32))
    return found


def dot(a, b, acc, terms):
    for i, j in products(terms):
        acc = matmul(split(a, terms)[i], split(b, terms)[j], acc)
    return acc


def dot_runs(a, b, acc, terms, run):
    step = run if terms > 1 else a.shape[1]
    for first in range(0, a.shape[1], step):
        acc = dot(a[:, first : first + step], b[first : first + step], acc, terms)
    return acc


def model(p: Problem):
    """The module's docstring in numpy, with the kernel's own statistics and delta."""
    (batch, heads, rows, dim), (groups, keys) = p.q.shape, p.k.shape[1:3]
    dq = np.zeros(p.q.shape, F32)
    dk, dv = np.zeros(p.k.shape, F32), np.zeros(p.v.shape, F32)
    run, zero = float32_run(max(dim, p.v.shape[3])), np.float32(0)
    added = p.mask is not None and p.mask.dtype != bool
    scale = np.float32(p.scale if added else p.scale * LOG2_E)
    visible, kept_scale = p.visible(), np.float32(1 / (1 - p.dropout))
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            largest, logarithm = p.statistics[b, h, :, :1], p.statistics[b, h, :, 1:]
            start = np.zeros((rows, keys), F32)
            t = dot(p.q[b, h], p.k[b, g].T, start, p.terms)
            dp = dot(p.dout[b, h], p.v[b, g].T, start, p.terms)
            if added:
                mask = np.broadcast_to(p.mask, visible.shape)[b, h].astype(F32)
                t = fmul(fsub(ffma(t, scale, mask), largest), np.float32(LOG2_E))
            else:
                t = fsub(fmul(t, scale), largest)
            t = np.where(visible[b, h], t, np.float32(-np.inf))
            weight = tables.exp2(fsub(t, logarithm))
            if p.dropout:
                dropped = p.dropped()[b, h]
                dp = fmul(np.where(dropped, zero, dp), kept_scale)
            ds = fmul(fsub(dp, p.delta[b, h, :, None]), weight)
            if p.dropout:
                weight = np.where(dropped, zero, weight)
            dq[b, h] = fadd(dot_runs(ds, p.k[b, g], dq[b, h], p.terms, run), zero)
            dk[b, g] = dot_runs(ds.T, p.q[b, h], dk[b, g], p.terms, run)
            dv[b, g] = dot_runs(weight.T, p.dout[b, h], dv[b, g], p.terms, run)
    dk, dv = fadd(fmul(dk, np.float32(p.scale)), zero), fadd(fmul(dv, kept_scale), zero)
    return dq, dk.astype(p.k.dtype), dv.astype(p.v.dtype)


def a_mask(kind: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if kind == "none":
        return None
    shown = bool_mask(shape)
    if kind == "bool":
        return shown
    values = np.random.default_rng(5).standard_normal(shape).astype(F32)
    return np.where(shown, values, -np.inf).astype({"float32": F32, "bfloat16": BF16}[kind])


@pytest.mark.parametrize(
    ("kind", "causal"),
    [
        ("none", False),
        ("none", True),
        ("none", "lower right"),
        ("bool", True),
        ("float32", False),
        ("bfloat16", "lower right"),
    ],
)
def test_model_blocks_and_chips(kind, causal):
    p = problem(b=2, h=4, g=2, q=21, s=37, e=24, mask=a_mask(kind, (2, 1, 21, 37)), causal=causal)
    found, _ = p.backward()
    assert same(found, model(p))
    assert same(found, p.backward(EDGE)[0])
    assert same(found, p.backward(blocks=(4, 32))[0])
    assert same(found, p.backward(EDGE, blocks=(8, 4))[0])


@pytest.mark.parametrize(("terms", "causal"), [(1, True), (2, False), (3, True)])
def test_float32_model_blocks_and_chips(terms, causal):
    p = problem(h=2, q=37, s=50, d=64, e=20, dtype=F32, terms=terms, causal=causal)
    found, _ = p.backward()
    assert same(found, model(p))
    assert same(found, p.backward(EDGE)[0])
    assert same(found, p.backward(EDGE, blocks=(32, 16))[0])


@pytest.mark.parametrize(
    ("terms", "dtype", "mask", "causal"), [(1, BF16, "bool", True), (3, F32, "none", False)]
)
def test_dropout_model_blocks_and_chips(terms, dtype, mask, causal):
    p = problem(
        b=2, h=4, g=2, q=37, s=50, d=32, dtype=dtype, terms=terms, causal=causal, dropout=0.3,
        mask=a_mask(mask, (2, 1, 37, 50)),
    )  # fmt: skip
    found, _ = p.backward()
    assert same(found, model(p))
    assert same(found, p.backward(EDGE)[0])
    assert same(found, p.backward(EDGE, blocks=(32, 16))[0])
    assert same(p.forward(), p.forward(EDGE))
    check(p)


def test_dropout_drops_its_share_independently():
    p = problem(b=2, h=4, q=64, s=256, dropout=0.1)
    dropped = p.dropped().astype(float) - 0.1
    deviation = (0.1 * 0.9 / dropped.size) ** 0.5
    assert abs(dropped.mean()) < 4 * deviation
    beside, below = dropped[..., 1:] * dropped[..., :-1], dropped[..., 1:, :] * dropped[..., :-1, :]
    squares = beside[..., 1:, :] * beside[..., :-1, :]  # where seeds add up to the same sums
    for product in (beside, below, dropped[:, 1:] * dropped[:, :-1], squares):
        assert abs(product.mean()) < 4 * product.std() / product.size**0.5


def test_cores_do_not_show():
    p = problem(b=3, h=6, g=3, q=33, s=70, causal="lower right")
    assert same(p.backward(CAR)[0], p.backward(TINY)[0])


def test_the_definition_agrees():
    p = problem(h=2, q=19, s=21, causal=True)
    found, result = p.backward()
    expected, slow = p.backward(machine=Definition(TINY, checking=True))
    assert same(found, expected) and result.cycles == slow.cycles


def test_statistics():
    """The largest score of a row in powers of two, and the logarithm of the sum of its weights."""
    p = problem(h=2, q=9, s=130, mask=bool_mask((1, 1, 9, 130)), causal="lower right")
    p.mask[..., 4, :] = False
    _, statistics = p.forward()
    for h in range(2):
        t = dot(p.q[0, h], p.k[0, 0].T, np.zeros((9, 130), F32), 1)
        t = np.where(p.visible()[0, h], fmul(t, np.float32(p.scale * LOG2_E)), -np.inf)
        largest = np.maximum(t.max(1), -np.finfo(F32).max)
        weights = tables.exp2(fsub(t, largest[:, None])).astype(BF16).astype(F32)
        for row in range(9):
            total = finish(
                ReduceOp.FSUM, reduce_row(ReduceOp.FSUM, initial_state(ReduceOp.FSUM),
                                          weights[row], 0)
            ).view(F32)  # fmt: skip
            expected = largest[row], tables.log2(np.maximum(total, np.float32(1)))
            assert bits(statistics[0, h, row]) == bits(np.array(expected, F32)), (h, row)


# Against torch -----------------------------------------------------------------------------------


def exact(p: Problem) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """dq, dk and dv in float64, from the definition of attention and torch's autograd; and sums of
    the magnitudes that they are made of, which rounding errors are relative to."""
    q, k, v = (torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in (p.q, p.k, p.v))
    dout = torch.from_numpy(p.dout.astype(np.float64))
    groups = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ keys.transpose(-1, -2) * p.scale
    if p.mask is not None and p.mask.dtype != bool:
        scores = scores + torch.from_numpy(p.mask.astype(np.float64))
    scores = scores.masked_fill(~torch.from_numpy(p.visible()), -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.where(nothing, 0.0, scores.masked_fill(nothing, 0.0).softmax(-1))
    kept = weights
    if p.dropout:
        kept = weights.masked_fill(torch.from_numpy(p.dropped()), 0.0) / (1 - p.dropout)
    (kept @ values).backward(dout)
    with torch.no_grad():
        inner = dout.abs() @ values.abs().transpose(-1, -2)
        inner = inner / (1 - p.dropout)
        ds = weights * (inner + (weights * inner).sum(-1, keepdim=True)) * p.scale
        sizes = ds @ keys.abs(), ds.transpose(-1, -2) @ q.abs(), kept.mT @ dout.abs()
    shared = [x.unflatten(1, (-1, groups)).sum(2) for x in sizes[1:]]
    gradients = tuple(x.grad.numpy() for x in (q, k, v))
    return gradients, (sizes[0].numpy(), *(x.numpy() for x in shared))


# bf16 rounds out, the weights, ds and the results (2^-9 each); float32 with terms as in the
# forward pass.
TOLERANCE = {(BF16, 1): 4.1 * 2**-9, (F32, 1): 2**-5, (F32, 2): 2**-12, (F32, 3): 2**-19}


def check(p: Problem, chip=TINY) -> tuple[np.ndarray, ...]:
    dq, dk, dv = p.backward(chip)[0]
    expected, sizes = exact(p)
    for found, right, size in zip((dq * F32.type(p.scale), dk, dv), expected, sizes, strict=True):
        error = np.abs(found.astype(np.float64) - right)
        limit = TOLERANCE[p.q.dtype, p.terms] * size + 1e-30
        assert np.all(error <= limit), float((error / limit).max())
    return dq, dk, dv


@pytest.mark.parametrize(
    "shape",
    [
        dict(s=1),
        dict(q=3, s=2, d=20),
        dict(b=2, h=6, g=2, q=70, s=33, d=64),
        dict(h=2, g=2, q=33, s=150, d=128),
        dict(q=9, s=600, d=16, e=24),
        dict(q=5, s=6, d=256),
    ],
)
@pytest.mark.parametrize("causal", [False, True, "lower right"])
def test_shapes(shape, causal):
    check(problem(**shape, causal=causal), EDGE)


@pytest.mark.parametrize(("terms", "causal"), [(1, False), (2, True), (3, False)])
def test_float32(terms, causal):
    check(problem(b=2, h=2, q=45, s=75, d=20, dtype=F32, terms=terms, causal=causal))


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 4, 25, 37), (1, 1, 25, 37), (2, 1, 1, 37), (1, 4, 25, 1)])
def test_masks(kind, shape):
    check(problem(b=2, h=4, g=2, q=25, s=37, mask=a_mask(kind, shape)))


def test_mask_with_keys_apart_in_memory():
    mask = bool_mask((1, 2, 70, 5)).transpose(0, 1, 3, 2)
    p = problem(h=2, q=5, s=70, mask=mask)
    strided, _ = p.backward()
    p.mask = np.ascontiguousarray(mask)
    assert same(strided, p.backward()[0])


def test_most_negative_finite_mask_is_not_infinite():
    """Where every score is -FLT_MAX the weights are equal; a logarithm of their sum in one number
    with the score would be lost."""
    mask = np.full((1, 1, 6, 7), np.finfo(np.float32).min, F32)
    p = problem(q=6, s=7, mask=mask)
    _, _, dv = p.backward()[0]
    mean = p.dout.astype(np.float64).sum(2) / 7
    assert np.abs(dv.astype(np.float64) - mean[:, :, None]).max() <= 2**-7


def test_rows_and_keys_that_see_nothing_have_no_gradient():
    p = problem(q=9, s=20, mask=np.ones((1, 1, 9, 20), bool))
    p.mask[:, :, 3] = False
    p.mask[..., 17] = False
    dq, dk, dv = check(p)
    for none in (dq[:, :, 3], dk[:, :, 17], dv[:, :, 17]):
        assert bits(none) == bits(np.zeros_like(none))
    early, late = problem(q=9, s=4, causal="lower right"), problem(q=4, s=100, causal=True)
    assert not np.any(check(early)[0][:, :, :5])
    assert not np.any(check(late)[1][:, :, 4:]) and not np.any(check(late)[2][:, :, 4:])


def test_no_queries_or_keys_write_nothing():
    for shape in (dict(q=0, s=4), dict(b=0, q=2, s=4), dict(q=3, s=0)):
        found, _ = problem(**shape).backward()
        assert all(np.all(x == 7) for x in found)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_random(data):
    groups, shared = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    rows, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    kind = data.draw(st.sampled_from(("none", "bool", "float32")))
    p = problem(
        b=data.draw(st.integers(1, 2)), h=groups * shared, g=groups, q=rows, s=keys,
        d=data.draw(st.sampled_from((16, 20))), seed=data.draw(st.integers(0, 99)),
        mask=a_mask(kind, (1, 1, rows, keys)),
        causal=data.draw(st.sampled_from((False, True, "lower right"))),
    )  # fmt: skip
    found = check(p)
    blocks = data.draw(st.sampled_from(((4, 4), (8, 16), (16, 8))))
    assert same(found, p.backward(blocks=blocks)[0])


# Blocks, time and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("chip", ["tiny", "edge", "car", "cloud"])
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("terms", [1, 3])
def test_blocks_fit(chip, dim, terms):
    chip, dtype = PRESETS[chip], DType.BF16 if terms == 1 else DType.F32
    blocks = choose_backward_blocks(chip, dim, dim, mask=DType.F32, terms=terms)
    kernel = attention_backward_kernel(dtype, dim, dim, True, DType.F32, terms, blocks)
    assert len(blob_of(kernel, chip).code) < chip.imem_bytes / 2


def test_blocks_of_the_presets():
    assert choose_backward_blocks(TINY, 64, 64) == BackwardBlocks(rows=16, keys=16)
    assert choose_backward_blocks(EDGE, 64, 64) == BackwardBlocks(rows=128, keys=64)


def test_chip_without_bf16():
    with pytest.raises(CompileError) as error:
        choose_backward_blocks(PRESETS["tiny8"], 64, 64)
    assert str(error.value) == (
        "attention: it needs a matrix engine that multiplies bf16, but chip tiny8 has int8; "
        "use another chip"
    )


def test_chip_without_room():
    with pytest.raises(CompileError) as error:
        choose_backward_blocks(replace(TINY, acc_bytes=1024), 64, 64)
    assert str(error.value) == (
        "attention: 4 queries and keys fit the SRAM and ACC of chip tiny, but the head dimension "
        "is 64; use a smaller head dimension or a larger chip"
    )


@pytest.mark.parametrize(("rows", "causal", "least"), [(512, True, 0.82), (512, False, 0.95)])
def test_the_matrix_engine_is_busy(rows, causal, least):
    """On `edge`; the five products count, of the scores that are seen."""
    p = problem(h=2, g=2, q=rows, s=rows, d=64, causal=causal)
    _, result = p.backward(EDGE)
    work = 5 * 64 * int(p.visible().sum()) / (EDGE.rows * EDGE.cols)
    assert work / result.cycles >= least, work / result.cycles
