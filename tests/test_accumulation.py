"""Reductions and matrix products: their order, their identities, and chunking that never shows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.isa import numbers as nb
from pagoda.isa.accumulation import (
    ReduceOp,
    combine,
    finish,
    identity,
    initial_state,
    matmul,
    matmul_i8,
    reduce_column,
    reduce_row,
)
from pagoda.isa.numbers import CANONICAL_NAN, DType, decode, encode

INTEGER_OPS = (ReduceOp.ISUM, ReduceOp.IMAX)
SPECIALS = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0], np.float32)


def bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


def row_of(op: ReduceOp, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if op in INTEGER_OPS:
        return rng.integers(-(2**31), 2**31, n).astype(np.int32)
    row = (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)).astype(np.float32)
    if seed % 3 == 0 and n:
        row[rng.integers(0, n, 1 + n // 8)] = rng.choice(SPECIALS, 1 + n // 8)
    if seed % 5 == 0 and n:
        row[rng.integers(0, n)] = np.nan
    return row


def whole(op: ReduceOp, row: np.ndarray) -> np.ndarray:
    return finish(op, reduce_row(op, initial_state(op), row, 0))


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(ReduceOp),
    st.integers(0, 300),
    st.lists(st.integers(0, 300), max_size=4),
    st.integers(0, 999),
)
def test_chunks_never_show(op, n, cuts, seed):
    row = row_of(op, n, seed)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    state = initial_state(op)
    for first, last in pairwise(edges):
        state = reduce_row(op, state, row[first:last], first)
    np.testing.assert_array_equal(state, reduce_row(op, initial_state(op), row, 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 999))
def test_sum_follows_the_written_order(n, seed):
    row = row_of(ReduceOp.FSUM, n, seed)
    lanes = [np.float32(-0.0)] * 64
    for j, value in enumerate(row):
        lanes[j % 64] = nb.fadd(lanes[j % 64], value)
    distance = 32
    while distance:
        for i in range(distance):
            lanes[i] = nb.fadd(lanes[i], lanes[i + distance])
        distance //= 2
    assert int(whole(ReduceOp.FSUM, row)) == int(bits(nb.fadd(lanes[0], np.float32(0))))


@pytest.mark.parametrize("seed", range(15))
def test_other_operations_agree_with_torch(seed):
    for n in (1, 2, 63, 64, 65, 200):
        row = row_of(ReduceOp.FMAX, n, seed)
        tensor = torch.from_numpy(row.copy())
        for op, expected in [
            (ReduceOp.FMAX, tensor.amax()),
            (ReduceOp.FMIN, tensor.amin()),
        ]:
            np.testing.assert_array_equal(whole(op, row).view(np.float32), expected.numpy())
        assert int(whole(ReduceOp.ARGMAX, row)) == int(tensor.argmax())
        integers = row_of(ReduceOp.ISUM, n, seed)
        total = torch.from_numpy(integers.copy()).sum(dtype=torch.int64).to(torch.int32)
        assert int(whole(ReduceOp.ISUM, integers).view(np.int32)) == int(total)
        assert int(whole(ReduceOp.IMAX, integers).view(np.int32)) == integers.max()


def test_argmax_ties_and_nan():
    def argmax(*values: float) -> int:
        return int(whole(ReduceOp.ARGMAX, np.array(values, np.float32)))

    assert argmax(1, 3, 3, 2) == 1
    assert argmax(-0.0, 0.0) == 0
    assert argmax(-np.inf, -np.inf) == 0
    assert argmax(np.inf, np.nan, np.nan) == 1
    # The tie is between lanes 5 and 2, and the lower column is in the higher lane.
    row = np.zeros(130, np.float32)
    row[[69, 5, 66]] = 7
    assert argmax(*row) == 5
    row[[5, 66]] = 0, np.nan
    row[100] = np.nan
    assert argmax(*row) == 66
    state = reduce_row(ReduceOp.ARGMAX, initial_state(ReduceOp.ARGMAX), row[64:], 64)
    assert int(state[2]) == CANONICAL_NAN and int(state[64 + 2]) == 66


def test_empty_reductions():
    empty = np.zeros(0, np.float32)
    assert {op.name: int(whole(op, empty.view(np.uint32))) for op in ReduceOp} == {
        "FSUM": 0,
        "FMAX": 0xFF800000,
        "FMIN": 0x7F800000,
        "ISUM": 0,
        "IMAX": 0x80000000,
        "ARGMAX": 0x7FFFFFFF,
    }
    assert [initial_state(op).shape for op in ReduceOp] == [(op.state_words,) for op in ReduceOp]
    assert [(op.name, op.value) for op in ReduceOp] == [
        ("FSUM", 0), ("FMAX", 1), ("FMIN", 2), ("ISUM", 3), ("IMAX", 4), ("ARGMAX", 5),
    ]  # fmt: skip
    # torch and numpy agree that a sum of -0.0 is +0.0.
    assert int(whole(ReduceOp.FSUM, np.array([-0.0], np.float32))) == 0


def test_identity_changes_nothing():
    for op in ReduceOp:
        if op is ReduceOp.ARGMAX:
            continue
        row = row_of(op, 50, 3) if op in INTEGER_OPS else SPECIALS
        start = np.full(row.shape, identity(op))
        np.testing.assert_array_equal(combine(op, start, row), bits(row))


def test_rows_are_independent():
    for op in ReduceOp:
        rows = np.stack([row_of(op, 100, seed) for seed in range(4)])
        states = np.tile(initial_state(op), (4, 1))
        together = finish(op, reduce_row(op, states, rows, 0))
        np.testing.assert_array_equal(together, [whole(op, row) for row in rows])


def test_column_reduction_is_sequential():
    rows = np.stack([row_of(ReduceOp.FSUM, 20, seed) for seed in range(7)])
    start = np.full(20, identity(ReduceOp.FSUM))
    expected = rows[0]
    for row in rows[1:]:
        expected = nb.fadd(expected, row)
    result = reduce_column(ReduceOp.FSUM, start, rows)
    np.testing.assert_array_equal(result, bits(expected))
    again = reduce_column(ReduceOp.FSUM, reduce_column(ReduceOp.FSUM, start, rows[:3]), rows[3:])
    np.testing.assert_array_equal(again, result)


bf16_codes = st.one_of(
    st.sampled_from([0, 0x8000, 1, 0x8001, 0x80, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0x3F80, 0x3F81]),
    st.integers(0, 2**16 - 1),
    st.integers(0x1F00, 0x2100),  # products around the smallest subnormals
    st.integers(0x5E00, 0x6000),  # products around the largest value
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(bf16_codes, bf16_codes, st.integers(0, 2**32 - 1)), min_size=1))
def test_matrix_step_is_a_fused_multiply_add(cases):
    a, b, acc = (np.array(column) for column in zip(*cases, strict=True))
    a, b = (np.asarray(x << 16, np.uint32).view(np.float32) for x in (a, b))
    acc = acc.astype(np.uint32).view(np.float32)
    for x, y, z in zip(a, b, acc, strict=True):
        step = matmul(x.reshape(1, 1), y.reshape(1, 1), z.reshape(1, 1))
        assert int(bits(step)[0, 0]) == int(bits(nb.ffma(x, y, z)))


def test_matmul_adds_in_order_from_the_old_value():
    rng = np.random.default_rng(5)
    raw = [encode(rng.standard_normal(s).astype(np.float32), DType.BF16) for s in ((5, 9), (9, 6))]
    a, b = (decode(r, DType.BF16)[0].view(np.float32) for r in raw)
    acc = rng.standard_normal((5, 6)).astype(np.float32)
    expected = acc
    for k in range(9):
        expected = nb.ffma(a[:, k, None], b[k], expected)
    result = matmul(a, b, acc)
    np.testing.assert_array_equal(bits(result), bits(expected))
    split = matmul(a[:, 4:], b[4:], matmul(a[:, :4], b[:4], acc))
    np.testing.assert_array_equal(bits(split), bits(result))
    payload = np.full((5, 6), 0xFFC01234, np.uint32).view(np.float32)
    np.testing.assert_array_equal(bits(matmul(a[:, :0], b[:0], payload)), bits(payload))
    assert np.all(bits(matmul(a, b, payload)) == CANONICAL_NAN)


def test_matmul_refuses_more_than_bf16():
    with pytest.raises(ValueError) as error:
        matmul(np.ones((1, 1), np.float32), np.full((1, 1), 0.1, np.float32), np.zeros((1, 1)))
    assert str(error.value) == (
        "matmul: the matrix engine multiplies bf16 values, but operand b has float32 "
        "values that bf16 cannot hold; round it first"
    )


def test_int8_matmul_wraps():
    rng = np.random.default_rng(6)
    a = rng.integers(-128, 128, (3, 40)).astype(np.int8)
    b = rng.integers(-128, 128, (40, 4)).astype(np.int8)
    acc = rng.integers(-(2**31), 2**31, (3, 4)).astype(np.int32)
    exact = acc.astype(object) + a.astype(object) @ b.astype(object)
    wrapped = [[(v + 2**31) % 2**32 - 2**31 for v in row] for row in exact.tolist()]
    assert matmul_i8(a, b, acc).tolist() == wrapped
    top = np.full((1, 1), 2**31 - 1, np.int32)
    one = np.ones((1, 1), np.int8)
    assert matmul_i8(one, one, top).tolist() == [[-(2**31)]]
