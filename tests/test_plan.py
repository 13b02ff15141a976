"""The temporary arena: tensors alive together never overlap; disjoint lives share memory."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from pagoda.runtime.plan import plan_arena


def test_disjoint_lives_share():
    offsets, size = plan_arena([(100, 0, 1), (100, 2, 3), (64, 1, 2)])
    assert offsets[0] == offsets[1] == 0
    assert offsets[2] == 128
    assert size == 192


def test_nothing_to_place():
    assert plan_arena([]) == ([], 0)


_TENSOR = st.tuples(st.integers(0, 1000), st.integers(0, 20), st.integers(0, 10)).map(
    lambda t: (t[0], t[1], t[1] + t[2])
)


@given(st.lists(_TENSOR, max_size=20))
def test_live_tensors_do_not_overlap(tensors):
    offsets, size = plan_arena(tensors)
    assert all(o % 64 == 0 and o + t[0] <= size for o, t in zip(offsets, tensors, strict=True))
    for (a, x), (b, y) in combinations(zip(offsets, tensors, strict=True), 2):
        if x[1] <= y[2] and y[1] <= x[2] and x[0] and y[0]:
            assert a + x[0] <= b or b + y[0] <= a
