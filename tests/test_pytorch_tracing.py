"""What Dynamo is kept from doing while it traces, and what it still does."""

from __future__ import annotations

import gc
import inspect
import logging

import pytest
import torch
from torch._dynamo import symbolic_convert

from pagoda.pytorch import tracing


@pytest.fixture
def fresh():
    torch._dynamo.reset()  # forgets who wants to be told of compiling, too
    tracing.mend()
    yield
    torch._dynamo.reset()


def compiled(seen: list[int]) -> torch.Tensor:
    """A call through a backend that notes how many objects the collector leaves alone."""

    def note(graph, _):
        seen.append(gc.get_freeze_count())
        return graph

    return torch.compile(lambda x: x + 1, backend=note)(torch.ones(2))


def test_the_collector_leaves_alone_what_was_there(fresh):
    seen: list[int] = []
    assert compiled(seen).tolist() == [2.0, 2.0]
    assert seen[0] > 10_000
    assert gc.get_freeze_count() == 0
    assert gc.isenabled()


def test_what_a_user_has_frozen_stays_so(fresh):
    gc.freeze()
    try:
        compiled([])
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_a_failed_compilation_leaves_nothing_frozen(fresh):
    def refuse(graph, _):
        raise ValueError("no")

    with pytest.raises(Exception, match="no"):
        torch.compile(lambda x: x + 1, backend=refuse)(torch.ones(2))
    assert gc.get_freeze_count() == 0


def test_functions_are_named_in_logs(fresh):
    line = inspect.getsourcelines(compiled)[1]
    name = symbolic_convert.get_funcname
    assert name(__file__, line) is None
    log = symbolic_convert.trace_source_log
    before = log.level
    log.setLevel(logging.DEBUG)
    try:
        assert name(__file__, line + 1) == "compiled"
    finally:
        log.setLevel(before)
