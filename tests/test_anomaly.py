"""`pagoda.detect_anomaly` names the first kernel that writes NaN, with line, layer and element."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pagoda
from pagoda.compiler.executable import Call
from pagoda.compiler.index_expr import Const
from pagoda.compiler.region import Buffer, Place, View
from pagoda.pytorch.anomaly import AnomalyError
from pagoda.runtime.anomaly import AnomalyCheck, WatchedCall

P = "pagoda"
LOOK = (
    "no operand held any; look there for a division by zero, a logarithm or root of a negative "
    "number, or an overflow"
)


class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.log, self.last = nn.Linear(4, 4), Log(), nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))
            self.first.bias.zero_()

    def forward(self, x):
        return self.last(self.log(self.first(x)))


INPUT = torch.tensor([[1.0, 2, 3, 4], [1, -2, 3, -4]])


def caught(function, **options) -> str:
    with pytest.raises(AnomalyError) as raised, pagoda.detect_anomaly(**options):
        function()
    return re.sub(r"nest_[0-9a-f]+", "NEST", str(raised.value))


def line_of(code: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.strip() == code)
    return number


def test_compiled():
    model = torch.compile(Net().to(P), backend=P)
    line = line_of("return torch.log(x)")
    with torch.no_grad():
        message = caught(lambda: model(INPUT.to(P)))
    assert re.sub(r"buf\d", "BUF", message) == (
        "kernel 'NEST' (log) in layer log wrote NaN: 2 of 8 elements of intermediate result 'BUF' "
        "(float32[2, 4]), the first at index [1, 1]; it computes what stands in "
        f'file "{__file__}", line {line}, in forward: return torch.log(x); {LOOK}'
    )
    with torch.no_grad(), pagoda.detect_anomaly():  # the device is usable, and right
        good = model(INPUT.abs().to(P)).cpu()
    assert good.isfinite().all() and good.shape == (2, 2)


def test_eager():
    model = Net().to(P)
    line = line_of("return torch.log(x)")
    with torch.no_grad():
        message = caught(lambda: model(INPUT.to(P)))
    assert message == (
        "kernel 'NEST' (copy_, log) wrote NaN: 2 of 8 elements of argument 'arg1' "
        "(float32[2, 4]), the first at index [1, 1]; it computes what stands in "
        f'file "{__file__}", line {line}, in forward: return torch.log(x); {LOOK}'
    )


def test_backward():
    """The result is finite, its gradient is not."""
    weight = torch.zeros(3, device=P, requires_grad=True)
    loss = torch.compile(lambda w: (w.sqrt() * 0).sum(), backend=P)
    message = caught(lambda: loss(weight).backward())
    assert "sqrt) wrote NaN: 3 of 3 elements of result" in message
    assert f'file "{__file__}", line ' in message


def test_an_operand_that_held_it_already():
    x = torch.tensor([1.0, float("nan")]).to(P)
    message = caught(lambda: x + 1)
    assert "wrote NaN: 1 of 2 elements" in message
    assert message.endswith(
        "NaN was in its operand argument 'arg0' (float32[2]) already; follow it back to where it "
        "comes from"
    )


def test_infinities_only_if_asked_for():
    x = torch.tensor([1.0, 0.0]).to(P)
    with pagoda.detect_anomaly():
        assert torch.reciprocal(x).cpu().tolist() == [1, float("inf")]
    message = caught(lambda: torch.reciprocal(x), infinities=True)
    assert "wrote NaN or infinity: 1 of 2 elements" in message


def watched(check: AnomalyCheck, memory: np.ndarray, also_read: bool = False) -> WatchedCall:
    """A call that writes a matrix of bfloat16, stored by columns."""
    view = View(0, Const(0), (Const(2), Const(2)), (Const(1), Const(2)), "bfloat16")
    buffers = [Buffer("out", "bfloat16", Const(4), "output")]
    reads = (view,) if also_read else ()
    call = Call("k", 0, (), "add", Place(), (view,), reads)
    return WatchedCall(check, call, buffers, {}, lambda buffer, kind: memory.view(kind))


NAN, ONE, INFINITY = 0x7FC0, 0x3F80, 0x7F80


def test_what_was_there_before_does_not_count():
    memory = np.array([NAN, ONE, INFINITY, 0xFFC1], np.uint16)
    for also_read in (False, True):
        call = watched(AnomalyCheck(), memory, also_read)
        call.before()
        assert (memory[0] == NAN) == also_read
        call.after()
        assert memory.tolist() == [NAN, ONE, INFINITY, 0xFFC1]


def test_writing_over_it_counts():
    memory = np.array([ONE, ONE, NAN, NAN], np.uint16)
    call = watched(AnomalyCheck(), memory)
    call.before()
    memory[2] = NAN
    with pytest.raises(AnomalyError) as raised:
        call.after()
    assert memory.tolist() == [ONE, ONE, NAN, NAN]
    assert str(raised.value) == (
        "kernel 'k' (add) wrote NaN: 1 of 4 elements of result 'out' (bfloat16[2, 2]), the first "
        f"at index [0, 1]; {LOOK}"
    )


@pytest.mark.parametrize("infinities", [False, True])
def test_which_values_count(infinities):
    check = AnomalyCheck(infinities=infinities)
    words = np.array([INFINITY, 0xFF80, 0x7F7F, NAN, 0xFFFF], np.uint16)
    assert check.bad(words, "bfloat16").tolist() == [infinities, infinities, False, True, True]
    floats = np.array([np.inf, -np.inf, 3e38, np.nan, -np.nan], np.float32).view(np.uint32)
    assert check.bad(floats, "float32").tolist() == [infinities, infinities, False, True, True]


def test_results_are_the_same_bits():
    model = torch.compile(Net().to(P), backend=P)
    x = torch.rand(5, 4).to(P) + 0.1
    with torch.no_grad():
        wanted = model(x).cpu()
        with pagoda.detect_anomaly():
            assert torch.equal(model(x).cpu(), wanted)
