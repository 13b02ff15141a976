"""Transposed convolution as ordinary ones, without zeros between the inputs.

    out[n, o, y, x] = sum over all iy sy + ky dy - top = y, ix sx + kx dx - left = x and c of
                      in[n, c, iy, ix] w[c, o, ky, kx]     + bias[o]

Outputs whose y has the same remainder by the stride (a phase) meet the same rows of the kernel, and
neighbours of a phase meet neighbouring inputs. So each of the sy sx phases is a convolution of
stride 1 with its own taps, turned by half a turn, and its outputs are stored sy rows and sx columns
apart. The gradient for the input of a convolution is this, of the gradient for its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Symbol, Var
from pagoda.compiler.loop_nest import Builder
from pagoda.compiler.region import KernelCall, LibraryCall, View


@dataclass(frozen=True)
class _Phase:
    """Along one dimension: outputs first, first + stride, ... (`count`); taps of the kernel tap,
    tap + tap_step, ... (`taps`), `dilation` inputs apart; inputs `before` the first are zeros."""

    first: int
    count: int
    tap: int
    taps: int
    tap_step: int
    dilation: int
    before: int


def phases(outputs: int, kernel: int, stride: int, dilation: int, padding: int) -> list[_Phase]:
    """The phases of one dimension; some may have no taps.

    >>> [(p.count, p.taps, p.before) for p in phases(7, 3, 2, 1, 1)]
    [(4, 1, 0), (3, 2, 0)]
    """
    found = []
    for first in range(min(stride, outputs)):
        meet = [k for k in range(kernel) if (first + padding - k * dilation) % stride == 0]
        count, tap, taps = -(-(outputs - first) // stride), meet[0] if meet else 0, len(meet)
        tap_step = meet[1] - meet[0] if taps > 1 else 1
        apart = tap_step * dilation // stride if taps > 1 else 1
        newest = (first + padding - tap * dilation) // stride  # input of the first output and tap
        before = (taps - 1) * apart - newest
        found.append(_Phase(first, count, tap, taps, tap_step, apart, before))
    return found


def expand_transposed(step: KernelCall) -> Iterator[KernelCall]:
    """The steps for a step `convolution_transposed`. Raises CompileError."""
    call = step.kernel
    assert isinstance(call, LibraryCall), call
    out, _, w, _ = step.args
    assert out is not None and w is not None
    sizes = (*out.sizes[2:], *w.sizes[2:])
    if not all(isinstance(size, Const) for size in sizes):
        raise CompileError(
            "transposed convolution", "only the number of images changes from call to call",
            f"the sizes are {', '.join(map(str, sizes))}",
            "mark no other dimension of the input as dynamic",
        )  # fmt: skip
    oh, ow, kh, kw = (size.value for size in sizes)

    def along(dim: str, pad: str, outputs: int, kernel: int) -> list[_Phase]:
        stride, dilation = int(call.attribute(f"stride_{dim}")), call.attribute(f"dilation_{dim}")
        return phases(outputs, kernel, stride, int(dilation), int(call.attribute(pad)))

    for y in along("h", "pad_top", oh, kh):
        for x_ in along("w", "pad_left", ow, kw):
            yield _phase(step, call, y, x_)


def _phase(step: KernelCall, call: LibraryCall, y: _Phase, x: _Phase) -> KernelCall:
    out, source, w, bias = step.args
    assert out is not None and w is not None
    strides = int(call.attribute("stride_h")), int(call.attribute("stride_w"))
    place = _part(out, (y.first, x.first), strides, (y.count, x.count))
    if not y.taps or not x.taps:
        return _without_taps(step, place, bias)
    taps = _part(w, (y.tap, x.tap), (y.tap_step, x.tap_step), (y.taps, x.taps))
    attributes = (
        ("stride_h", 1), ("stride_w", 1), ("pad_top", y.before), ("pad_left", x.before),
        ("dilation_h", y.dilation), ("dilation_w", x.dilation),
        ("groups", call.attribute("groups")), ("transposed", True), ("cells", 1),
    )  # fmt: skip
    kernel = LibraryCall("convolution", attributes, call.precision)
    return replace(step, kernel=kernel, args=(place, source, taps, bias))


Pair = tuple[int, int]


def _part(view: View, first: Pair, step: Pair, count: Pair) -> View:
    """Every `step`-th row and column from `first` on."""
    *lead, row, column = view.strides
    return replace(
        view, offset=view.offset + row * first[0] + column * first[1],
        sizes=(*view.sizes[:2], *map(Const, count)),
        strides=(*lead, row * step[0], column * step[1]),
    )  # fmt: skip


def _without_taps(step: KernelCall, out: View, bias: View | None) -> KernelCall:
    """No input meets these outputs."""
    if bias is not None:
        zero = Const(0)
        strides = (zero, bias.strides[0], zero, zero)
        row = replace(bias, sizes=out.sizes, strides=strides)
        return replace(step, kernel=LibraryCall("copy"), args=(out, row))
    builder = Builder(list(out.sizes))
    index = sum((Var(d) * stride for d, stride in enumerate(out.strides)), start=Const(0))
    builder.store("out", out.dtype, index, builder.constant(0.0, "float32"))
    nest, _, symbols = builder.build()
    return KernelCall(nest, (out,), tuple(Symbol(s) for s in symbols), step.origin, step.place)
