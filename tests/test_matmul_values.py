"""The fast matmul against the contract's words: one fma at a time, in order, one rounding each."""

from dataclasses import dataclass, replace

import numpy as np
import other_processors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.sim import matmul
from pagoda.sim.matmul import SCRATCH_BYTES, B, run_matmul, run_matmul_range

SRAM_BYTES, ACC_BYTES = 1 << 16, 1 << 14
SCRATCH = np.zeros(SCRATCH_BYTES, np.uint8)


@dataclass(frozen=True)
class Case:
    """One command; strides in elements beyond their smallest value where named `gap`."""

    counts: tuple[int, int, int] = (4, 1, 1)
    row_strides: tuple[int, int, int] = (8, 0, 0)
    k_inner: int = 8
    k_outer: int = 1
    k_outer_stride: int = 0
    n: int = 8
    b_gap: int = 0
    acc_gap: int = 0
    int8: bool = False
    accumulate: bool = True
    transpose_a: bool = False
    transpose_b: bool = False
    at_end: bool = False

    @property
    def rows(self) -> int:
        return self.counts[0] * self.counts[1] * self.counts[2]

    @property
    def depth(self) -> int:
        return self.k_inner * self.k_outer

    def fields(self, sram_bytes: int = SRAM_BYTES) -> np.ndarray:
        """The 16 words of bank 5; A from 0 on, B behind it or at the very end of SRAM."""
        size = 1 if self.int8 else 2
        words = np.zeros(16, np.int64)
        words[0] = self.int8 | self.accumulate << 4
        words[0] |= self.transpose_a << 5 | self.transpose_b << 6
        words[2:8:2] = self.counts
        words[3:9:2] = np.array(self.row_strides) * size
        words[8:11] = self.k_inner, self.k_outer, self.k_outer_stride * size
        b_rows, b_columns = (self.n, self.depth) if self.transpose_b else (self.depth, self.n)
        b_stride = (b_columns + self.b_gap) * size
        b_bytes = max(0, (b_rows - 1) * b_stride + b_columns * size)
        a_bytes = int(a_offsets(words).max(initial=0)) + size
        words[11] = sram_bytes - b_bytes if self.at_end else -(-a_bytes // 64) * 64 + size
        words[12:14] = b_stride, self.n
        words[15] = 4 * (self.n + self.acc_gap)
        last = words[15] * (self.rows - 1) + 4 * self.n
        words[14] = ACC_BYTES - last if self.at_end else 8
        assert words[11] + b_bytes <= sram_bytes and words[14] + last <= ACC_BYTES
        assert a_bytes <= sram_bytes
        return words


def a_offsets(words: np.ndarray) -> np.ndarray:
    """Byte offsets of A's elements [m, k] from its address."""
    size = 1 if words[0] & 3 else 2
    i0, i1, i2 = (np.arange(words[w]) for w in (2, 4, 6))
    k_outer, k_inner = np.arange(words[9]), np.arange(words[8])
    if words[0] & 0x20:
        return k_inner[None, :] * words[3] + i0[:, None] * size
    m = (i2[:, None, None] * words[7] + i1[:, None] * words[5] + i0 * words[3]).reshape(-1)
    k = (k_outer[:, None] * words[10] + k_inner * size).reshape(-1)
    return m[:, None] + k


def expected(sram: np.ndarray, acc: np.ndarray, words: np.ndarray) -> np.ndarray:
    """ACC after the command, by the contract: float64 rounds a bf16 fma once, exactly."""
    result = acc.copy()
    size = 1 if words[0] & 3 else 2
    a_at = words[1] + a_offsets(words)
    m_count, depth = a_at.shape
    k, n = np.arange(depth), np.arange(words[13])
    strides = (size, words[12]) if words[0] & 0x40 else (words[12], size)
    b_at = words[11] + k[:, None] * strides[0] + n * strides[1]
    acc_at = (words[14] + np.arange(m_count)[:, None] * words[15] + 4 * n) // 4
    accumulate = bool(words[0] & 0x10)
    if size == 1:
        a, b = sram.view(np.int8)[a_at].astype(np.int64), sram.view(np.int8)[b_at]
        old = result.view(np.int32)[acc_at].astype(np.int64) if accumulate else 0
        total = a @ b.astype(np.int64) + old
        result.view(np.int32)[acc_at] = total.astype(np.uint64).astype(np.uint32).view(np.int32)
        return result
    output = result.view(np.float32)
    sums = output[acc_at] if accumulate else np.zeros(acc_at.shape, np.float32)
    with np.errstate(all="ignore"):
        a, b = (
            (sram.view(np.uint16)[at // 2].astype(np.uint32) << 16).view(np.float32).astype(float)
            for at in (a_at, b_at)
        )
        for step in range(depth):
            exact = a[:, step, None] * b[step] + sums.astype(float)
            sums = exact.astype(np.float32)
            sums.view(np.uint32)[np.isnan(sums)] = 0x7FC00000
    result.view(np.uint32)[acc_at] = sums.view(np.uint32)
    return result


NORMAL, SUBNORMAL, OVERFLOW, ANY = KINDS = ("normal", "subnormal", "overflow", "any")


def memories(seed: int, kind: str, int8: bool) -> tuple[np.ndarray, np.ndarray]:
    """SRAM and ACC. Floats: of ordinary size; with products around the smallest subnormal; with
    products near the largest number, and a few infinities and NaNs; of any bits."""
    rng = np.random.default_rng(seed)
    sram = rng.integers(0, 256, SRAM_BYTES, np.uint8)
    acc = rng.integers(0, 256, ACC_BYTES, np.uint8)
    if int8 or kind == ANY:
        return sram, acc
    first, last = {NORMAL: (117, 132), SUBNORMAL: (45, 65), OVERFLOW: (184, 191)}[kind]
    halves, words = sram.view(np.uint16), acc.view(np.uint32)
    halves &= 0x807F
    halves |= rng.integers(first, last, halves.size, np.uint16) << 7
    halves[rng.random(halves.size) < 0.1] &= 0x8000
    exponents = {NORMAL: (117, 135), SUBNORMAL: (0, 4), OVERFLOW: (250, 255)}[kind]
    words &= 0x807FFFFF
    words |= rng.integers(*exponents, words.size, np.uint32) << 23
    if kind == OVERFLOW:
        rare = rng.random(halves.size) < 0.002
        halves[rare] = rng.choice(np.array([0x7F80, 0xFF80, 0x7F81, 0xFFC1], np.uint16), rare.sum())
    return sram, acc


def check(case: Case, seed: int = 0, kind: str = NORMAL) -> None:
    words = case.fields()
    sram, acc = memories(seed, kind, case.int8)
    before = sram.copy()
    want = expected(sram, acc, words).view(np.uint32)
    run_matmul(sram, acc, words, SCRATCH)
    np.testing.assert_array_equal(acc.view(np.uint32), want)
    np.testing.assert_array_equal(sram, before)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    transpose_a = draw(st.booleans())
    int8 = draw(st.booleans())
    size = st.integers(1, 20) | st.integers(1, 3) | st.sampled_from([16, 32, 48, 64])
    if transpose_a:
        m0, depth = draw(size), draw(size)
        gap = draw(st.integers(0, 3))
        shape = Case((m0, 1, 1), (m0 + gap, 0, 0), depth, transpose_a=True)
    else:
        convolution = draw(st.booleans())
        if convolution:
            counts = tuple(draw(st.integers(1, 5)) for _ in range(3))
            strides = tuple(draw(st.integers(0, 70)) for _ in range(3))
            inner, outer = draw(st.integers(1, 40)), draw(st.integers(1, 5))
            shape = Case(counts, strides, inner, outer, draw(st.integers(0, 90)))
        else:
            depth = draw(size | st.sampled_from([100, 128, 129, 160, 257]))
            shape = Case((draw(size), 1, 1), (depth + draw(st.integers(0, 3)), 0, 0), depth)
    n = draw(st.integers(1, 40) | st.sampled_from([16, 32, 64, 65, 80]))
    n = min(n, ACC_BYTES // 4 // shape.rows - 4, 20000 // shape.depth)
    flags = {name: draw(st.booleans()) for name in ("accumulate", "transpose_b", "at_end")}
    gaps = {name: draw(st.integers(0, 3)) for name in ("b_gap", "acc_gap")}
    return replace(shape, n=n, int8=int8, **flags, **gaps)


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_any_command_has_the_contracts_bits(case: Case, seed: int, kind: str):
    check(case, seed, kind)


@pytest.mark.parametrize("kind", [NORMAL, SUBNORMAL, OVERFLOW])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 40])
def test_every_register_tile(rows: int, int8: bool, transpose_b: bool, kind: str):
    """n from 1 to just over a B panel: every number of vectors, whole and with a tail."""
    vector = matmul.VECTOR_LENGTH
    for n in (1, vector, 2 * vector, 3 * vector + 1, 4 * vector, 4 * vector + 3):
        case = Case((rows, 1, 1), (72, 0, 0), 72, n=n, int8=int8, transpose_b=transpose_b)
        check(case, n, kind)
        check(replace(case, at_end=True, accumulate=False), n, kind)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_blocks_continue_the_chain_of_k(rows: int, transpose_b: bool):
    depth = 2 * matmul.K_LONG + 35
    case = Case((rows, 1, 1), (depth, 0, 0), depth, n=8, transpose_b=transpose_b)
    check(case)
    check(replace(case, int8=True))


def test_many_rows_and_columns_share_blocks():
    rows, columns = matmul.M_BLOCK + 3, 30
    check(Case((rows, 1, 1), (10, 0, 0), 10, n=columns))
    check(Case((columns, 1, 1), (columns, 0, 0), 10, n=rows, transpose_a=True))
    wide = matmul.N_BLOCK + 5
    check(Case((9, 1, 1), (10, 0, 0), 10, n=wide, transpose_b=True))


def test_int8_sums_wrap():
    case = Case((1, 1, 1), (3, 0, 0), 3, n=2, int8=True)
    words = case.fields()
    sram = np.full(SRAM_BYTES, 0x80, np.uint8)
    acc = np.zeros(ACC_BYTES, np.uint8)
    acc.view(np.int32)[:] = 2**31 - 1
    run_matmul(sram, acc, words, SCRATCH)
    first = words[14] // 4
    assert acc.view(np.int32)[first] == 2**31 - 1 + 3 * 128 * 128 - 2**32
    assert acc.view(np.int32)[first + 2] == 2**31 - 1


def test_no_k_clears_or_keeps_bits():
    noise = np.random.default_rng(1).integers(0, 256, ACC_BYTES, np.uint8)
    sram = np.zeros(SRAM_BYTES, np.uint8)
    kept, cleared = noise.copy(), noise.copy()
    case = Case((3, 1, 1), (8, 0, 0), 0, n=5, acc_gap=2)
    run_matmul(sram, kept, case.fields(), SCRATCH)
    np.testing.assert_array_equal(kept, noise)
    words = replace(case, accumulate=False).fields()
    run_matmul(sram, cleared, words, SCRATCH)
    rows = cleared.view(np.uint32)[2 : 2 + 21].reshape(3, 7)
    assert not rows[:, :5].any()
    np.testing.assert_array_equal(rows[:, 5:], noise.view(np.uint32)[2:23].reshape(3, 7)[:, 5:])


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_no_rows_is_nothing(counts: tuple[int, int, int]):
    acc = np.full(ACC_BYTES, 7, np.uint8)
    words = replace(Case(accumulate=False), counts=(1, 1, 1)).fields()
    words[2:8:2] = counts
    run_matmul(np.zeros(SRAM_BYTES, np.uint8), acc, words, SCRATCH)
    assert (acc == 7).all()


@pytest.mark.parametrize("transpose_a", [False, True])
def test_ranges_of_outputs_are_independent(transpose_a: bool):
    case = Case((21, 1, 1), (50, 0, 0), 40, n=37, transpose_a=transpose_a, transpose_b=True)
    words = case.fields()
    sram, acc = memories(3, NORMAL, False)
    want = expected(sram, acc, words)
    for m_begin, m_end in ((20, 21), (0, 8), (8, 20)):
        for n_begin, n_end in ((19, 37), (0, 19)):
            run_matmul_range(sram, acc, words, SCRATCH, m_begin, m_end, n_begin, n_end, 0)
    np.testing.assert_array_equal(acc, want)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("rows", [20, matmul.M_BLOCK + 9])
def test_packed_rows_are_used_again_while_their_state_is_the_same(rows: int, transpose_a: bool):
    depth = matmul.K_BLOCK + 20
    stride = rows if transpose_a else depth
    case = Case((rows, 1, 1), (stride, 0, 0), depth, n=10, transpose_a=transpose_a)
    words, scratch = case.fields(), np.zeros(SCRATCH_BYTES, np.uint8)
    sram, acc = memories(5, NORMAL, False)

    def run(state: int, n_begin: int = 0, m_end: int = rows) -> np.ndarray:
        result = acc.copy()
        run_matmul_range(sram, result, words, scratch, 0, m_end, n_begin, 10, state)
        return result

    before = expected(sram, acc, words)
    np.testing.assert_array_equal(run(7), before)
    sram[1 : words[B] : 40] ^= 0x80  # of A only: some signs
    after = expected(sram, acc, words)
    np.testing.assert_array_equal(run(7), before)
    assert not np.array_equal(before, after)
    for state in (8, 8, 0, 8):  # another one, the same, unknown, what was kept is gone
        np.testing.assert_array_equal(run(state), after)
    run(8, n_begin=4, m_end=8)  # other rows
    np.testing.assert_array_equal(run(8), after)


@pytest.mark.slow
@other_processors.each
def test_other_vector_lengths(features: str):
    other_processors.run_tests(__file__, features)
