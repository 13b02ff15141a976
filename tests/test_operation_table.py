"""Every operation that the table says passes, judged again with the smallest sample; and the
table's document. `python tests/operation_table.py --run` judges all of them at length."""

from __future__ import annotations

import json
from typing import Any

import operation_table
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operation_cases import (
    OPERATIONS,
    check,
    dtypes_of,
    fits,
    is_decomposition,
    judge,
    layouts,
    leaves,
    samples,
    too_wide,
)

import pagoda
from pagoda.runtime import DeviceFault

RESULTS = json.loads(operation_table.RESULTS.read_text())


def _passing(kind: str) -> list[str]:
    return [
        name
        for name, verdicts in RESULTS.items()
        if verdicts.get(kind, {}).get("outcome") == "passes"
    ]


@pytest.fixture(autouse=True, scope="module")
def edge():
    pagoda.use_chip("edge")


def test_the_document_is_what_the_results_say():
    written = operation_table.DOCUMENT.read_text()
    assert written == operation_table.document(RESULTS), "run python tests/operation_table.py"


def test_every_operation_has_results():
    assert set(RESULTS) == set(OPERATIONS)


def test_nothing_is_wrong_or_unreadable():
    bad = {
        (name, kind): verdict["remark"]
        for name, verdicts in RESULTS.items()
        for kind, verdict in verdicts.items()
        if verdict["outcome"] in ("wrong", "crashes")
    }
    assert not bad


def _some(names: list[str]) -> list[Any]:
    """All that networks call by name, and a third of the rest; others are slow."""
    return [
        name
        if name.startswith("nn.functional.") or number % 3 == 0
        else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", _some(_passing("float32")))
def test_float32(name):
    op = OPERATIONS[name]
    (sample,) = samples(op, torch.float32, 1)
    check(op, sample)


@st.composite
def cases(draw):
    """(operation, one of torch's samples of it, layout of its tensors)."""
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.int64, torch.bool)))
    op = OPERATIONS[draw(st.sampled_from(_passing(str(dtype).removeprefix("torch."))))]
    every = samples(op, dtype, 200)
    assume(every)
    sample, layout = draw(st.sampled_from(every)), draw(st.sampled_from(layouts(op)))
    assume(fits(op, sample, layout))
    return op, sample, layout


@settings(max_examples=15, derandomize=True)
@given(cases())
def test_any_sample_in_any_layout(case):
    op, sample, layout = case
    check(op, sample, layout=layout)


@pytest.mark.slow
@settings(max_examples=1000)
@given(cases())
def test_many_samples_in_any_layout(case):
    op, sample, layout = case
    # Like torch's own tests: gradients cancel, and bfloat16 has no digits left then.
    gradients = not any(
        isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in leaves(sample)
    )
    try:
        check(op, sample, layout=layout, gradients=gradients)
    except (DeviceFault, NotImplementedError) as error:
        if not (too_wide(error) or is_decomposition(error)):
            raise


@pytest.mark.slow
@pytest.mark.parametrize("name", _passing("float32"))
def test_compiled(name):
    """The smallest sample through torch.compile; what draws or depends on data is left out."""
    op = OPERATIONS[name]
    (sample,) = samples(op, torch.float32, 1)
    torch._dynamo.reset()
    check(op, sample, torch.compile(op.op, backend="pagoda"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RESULTS))
def test_the_results_still_hold(name):
    op = OPERATIONS[name]
    for dtype in dtypes_of(op):
        kept = RESULTS[name][str(dtype).removeprefix("torch.")]
        found = judge(op, dtype, 2 if dtype is torch.float32 else 1)
        assert (found.outcome, list(found.host)) == (kept["outcome"], kept["host"]), found.remark
