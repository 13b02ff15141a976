"""Memory layouts of the buffers that Inductor leaves open, decided in the order of the graph.

A buffer takes the order of dimensions of what it reads. But Inductor decides the operands of a
reduction when it meets the reduction, at which time what those read may still be open and then
counts as contiguous: in the gradients of networks with channels last, batch norms turned their
operands around. For device pagoda what a buffer reads is decided before it.
"""

from __future__ import annotations

from torch._inductor import ir
from torch._inductor.virtualized import V

_decide = ir.ComputedBuffer.decide_layout


def _in_order(buffer: ir.ComputedBuffer) -> None:
    device = buffer.get_device()
    if device is None or device.type != "pagoda":
        _decide(buffer)
        return
    waiting = [buffer]
    while waiting:
        reads = [V.graph.name_to_buffer.get(name) for name in waiting[-1].get_read_names()]
        first = [r for r in reads if isinstance(r, ir.ComputedBuffer) and _is_open(r)]
        if first:
            waiting += first
        else:
            _decide(waiting.pop())


def _is_open(buffer: ir.ComputedBuffer) -> bool:
    return isinstance(buffer.layout, ir.FlexibleLayout)


def register() -> None:
    """Also for the backward graphs, which are compiled when they are first needed."""
    ir.ComputedBuffer.decide_layout = _in_order
