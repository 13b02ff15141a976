"""Temporaries that only loop nests touch are kept in float32.

Between the operations of one fused group nothing is rounded (Inductor's own rule). Where Inductor
cuts a chain of pointwise operations in two, what goes from one nest to the next would be rounded
to the graph's bfloat16, at a place that says nothing about the model. The chain that matters is
the residual stream of a transformer: rounded twice a layer, it makes most of the difference between
a bfloat16 model and a float32 one. `bench/quality.py` has figures.

Operands of library calls stay as they are: the matrix engine wants bfloat16. A product's result is
widened if the graph itself goes on with nothing but float32 from there (`logits.float()`). What
only moves bfloat16 values, or takes the larger of two, rounds nothing: it stays as it is, too.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pagoda.compiler.loop_nest import (
    LOW_PRECISION,
    Constant,
    Load,
    LoopNest,
    Pointwise,
    Store,
)
from pagoda.compiler.region import KernelCall, LibraryCall, Region

WIDE, NARROW = "float32", "bfloat16"
_PRODUCTS = ("mm", "bmm", "addmm")


def widen_temporaries(region: Region) -> Region:
    """The region with low-precision temporaries that only nests read in float32, as above."""
    wide = {
        number
        for number, buffer in enumerate(region.buffers)
        if buffer.kind == "temporary" and buffer.dtype in LOW_PRECISION
    }
    for step in region.steps:
        for position, view in enumerate(step.args):
            if view is not None and view.buffer in wide and not _may_widen(step, position):
                wide.remove(view.buffer)
    products = {
        buffer
        for step in region.steps
        if isinstance(step.kernel, LibraryCall)
        for buffer in step.writes()
    }
    for step in region.steps:
        if not _goes_on_in_float32(step):
            wide.difference_update(products.intersection(step.reads()))
    for step in region.steps:
        wide.difference_update(_exact(step, wide))
    buffers = tuple(
        replace(buffer, dtype=WIDE) if number in wide else buffer
        for number, buffer in enumerate(region.buffers)
    )
    steps = tuple(_widen(step, wide) for step in region.steps)
    return replace(region, buffers=buffers, steps=steps)


def _exact(step: KernelCall, wide: set[int]) -> set[int]:
    """Buffers to which the step's nest moves bfloat16 values as they are: nothing is rounded."""
    nest = step.kernel
    if not isinstance(nest, LoopNest):
        return set()

    def exact(number: int) -> bool:
        match nest.body[number]:
            case Load(param, _, _, _, other):
                view = step.args[param]
                narrow = nest.params[param].dtype == NARROW and view.buffer not in wide
                return narrow and other in (0, math.inf, -math.inf)
            case Constant(value):
                return value in (0, 1, math.inf, -math.inf)
            case Pointwise("maximum" | "minimum", operands):
                return all(map(exact, operands))
            case Pointwise("where", (_, *operands)):
                return all(map(exact, operands))
        return False

    stores = [op for op in nest.body if isinstance(op, Store)]
    rounded = {op.param for op in stores if op.mode != "set" or not exact(op.value)}
    return {step.args[op.param].buffer for op in stores if op.param not in rounded}


def _may_widen(step: KernelCall, position: int) -> bool:
    """Whether the step means the same, but for rounding, if this argument is float32."""
    nest = step.kernel
    if not isinstance(nest, LoopNest):
        return position == 0 and nest.name in _PRODUCTS
    return nest.params[position].access in ("read", "write", "readwrite")


def _goes_on_in_float32(step: KernelCall) -> bool:
    nest = step.kernel
    return isinstance(nest, LoopNest) and all(
        param.dtype == WIDE for param in nest.params if param.access != "read"
    )


def _widen(step: KernelCall, wide: set[int]) -> KernelCall:
    widened = [
        position
        for position, view in enumerate(step.args)
        if view is not None and view.buffer in wide
    ]
    if not widened:
        return step
    args = list(step.args)
    for position in widened:
        args[position] = replace(args[position], dtype=WIDE)
    kernel = step.kernel
    if isinstance(kernel, LoopNest):
        params = list(kernel.params)
        for position in widened:
            params[position] = replace(params[position], dtype=WIDE)
        kernel = replace(kernel, params=tuple(params))
    return replace(step, args=tuple(args), kernel=kernel)
