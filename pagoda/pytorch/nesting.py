"""A region inside a region: what `torch.compiler.nested_compile_region` makes of repeated layers.

Torch lowers the layer once and calls it many times; each call becomes the layer's steps in the
caller's region, on the caller's buffers. Its kernels are equal, so they too are compiled once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pagoda.compiler.index_expr import Expr, Symbol
from pagoda.compiler.region import Buffer, KernelCall, Region, TensorInput, View


class Inlining:
    """One call of `region` with `operands`: views of the caller's `buffers`, or integers.

    New buffers are appended to `buffers`: temporaries and results with names that begin with
    `prefix`, and one input for each of the region's seeds. Afterwards `steps`, `outputs` and
    `seeds` are in the caller's terms.
    """

    def __init__(
        self,
        region: Region,
        operands: Sequence[View | Expr],
        buffers: list[Buffer],
        prefix: str,
    ) -> None:
        self._bases: dict[int, View | None] = {}
        self._numbers: dict[int, int] = {}
        self._symbols = _symbol_values(region, operands)
        for argument, operand in zip(region.inputs, operands, strict=False):
            if isinstance(argument, TensorInput):
                assert isinstance(operand, View)
                self._bases[argument.view.buffer] = operand
        for number, buffer in enumerate(region.buffers):
            if number not in self._bases:
                kind = "temporary" if buffer.kind == "output" else buffer.kind
                self._numbers[number] = len(buffers)
                size = buffer.size.substitute(self._symbols)
                buffers.append(
                    replace(buffer, name=f"{prefix}_{buffer.name}", size=size, kind=kind)
                )
        self.steps = [self._step(step) for step in region.steps]
        self.outputs = [self._output(out) for out in region.outputs]
        self.seeds = [
            TensorInput(self._view(seed.view))
            for seed in region.inputs[len(region.inputs) - len(region.seeds) :]
            if isinstance(seed, TensorInput)
        ]

    def _step(self, step: KernelCall) -> KernelCall:
        args = tuple(None if arg is None else self._view(arg) for arg in step.args)
        symbols = tuple(value.substitute(self._symbols) for value in step.symbols)
        return replace(step, args=args, symbols=symbols)

    def _output(self, out: View | Expr | None) -> View | Expr | None:
        if isinstance(out, View):
            return self._view(out)
        return None if out is None else out.substitute(self._symbols)

    def _view(self, view: View) -> View:
        offset = view.offset.substitute(self._symbols)
        base = self._bases.get(view.buffer)
        if base is not None:
            offset = base.offset + offset
        return View(
            self._numbers[view.buffer] if base is None else base.buffer,
            offset,
            tuple(size.substitute(self._symbols) for size in view.sizes),
            tuple(stride.substitute(self._symbols) for stride in view.strides),
            view.dtype,
        )


def in_layer(steps: Sequence[KernelCall], called: Sequence[str]) -> list[KernelCall]:
    """Steps of a layer that was lowered for another call, with this one's layer in their places."""
    named = {layer for step in steps for layer in step.place.layers}
    own = min(named, key=len, default="")
    if len(called) != 1 or not all(f"{layer}.".startswith(f"{own}.") for layer in named):
        return list(steps)
    (layer,) = called
    return [
        replace(step, place=replace(step.place, layers=tuple(
            layer + name[len(own) :] for name in step.place.layers
        )))
        for step in steps
    ]  # fmt: skip


def _symbol_values(region: Region, operands: Sequence[View | Expr]) -> Mapping[Expr, Expr]:
    """What the region's symbols are for this call, in the caller's terms."""
    values: dict[Expr, Expr] = {}
    for source in region.symbols:
        operand = operands[source.input]
        if isinstance(operand, View):
            read = (operand.sizes if source.what == "size" else operand.strides)[source.dim]
        else:
            read = operand
        values[Symbol(source.name)] = source.value.substitute({**values, Symbol("x"): read})
    return values

