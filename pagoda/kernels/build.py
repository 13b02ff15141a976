"""A region to an executable: every step to a kernel and its argument words, then one program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pagoda.compiler.cache import Cache
from pagoda.compiler.codegen import Blob
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.errors import CompileError
from pagoda.compiler.executable import (
    Call,
    Executable,
    OffsetWord,
    PlannedLaunch,
    SlotWord,
    Word,
)
from pagoda.compiler.index_expr import Const, Expr, Symbol, Var
from pagoda.compiler.link import dispatcher_bytes, link
from pagoda.compiler.loop_nest import ITEMSIZE, Builder, LoopNest
from pagoda.compiler.nest_blocks import choose_blocks
from pagoda.compiler.nest_lowering import lower
from pagoda.compiler.region import KernelCall, LibraryCall, Region, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.kernels.attention_backward_call import (
    attention_backward_arguments,
    attention_backward_for,
)
from pagoda.kernels.attention_call import attention_arguments, attention_for, causal_offset
from pagoda.kernels.convolution_call import convolution_for, convolution_weight_for
from pagoda.kernels.convolution_transposed import expand_transposed
from pagoda.kernels.fusion import FusedCall, fuse
from pagoda.kernels.grouped import grouped_for
from pagoda.kernels.matmul_call import matmul_for
from pagoda.kernels.user import user_kernel_for


@dataclass(frozen=True)
class _Step:
    """A region's step as a kernel, not yet placed."""

    kernel: Kernel
    words: tuple[Word, ...]
    step: KernelCall | FusedCall


def build(
    region: Region, chip: Chip, symbols: Mapping[str, int], cache: Cache | None = None
) -> Executable:
    """The executable of a region for a chip.

    symbols: sizes to choose tiles for; it runs, with the same bits, for any others. Raises
    CompileError, naming the step, for what no kernel does.
    """
    region = replace(region, steps=tuple(one for step in region.steps for one in _expand(step)))
    steps = [_prepare(step, chip, symbols) for step in fuse(region)]
    blobs: dict[Kernel, Blob] = {}
    for step in steps:
        if step.kernel not in blobs:
            blobs[step.kernel] = compile_kernel(step.kernel, chip).blob(cache)
    room = chip.imem_bytes - dispatcher_bytes(chip)
    groups: list[list[_Step]] = []
    resident: dict[Kernel, int] = {}
    for step in steps:
        size = len(blobs[step.kernel].code)
        if not groups or sum(resident.values()) + size * (step.kernel not in resident) > room:
            groups.append([])
            resident = {}
        resident[step.kernel] = size
        groups[-1].append(step)
    launches = tuple(_plan(region.name, group, blobs, chip) for group in groups)
    return Executable(replace(region, steps=()), chip, launches)


def _plan(
    name: str, steps: list[_Step], blobs: Mapping[Kernel, Blob], chip: Chip
) -> PlannedLaunch:
    kernels = list(dict.fromkeys(step.kernel for step in steps))
    linked = link(name, [(kernel.name, blobs[kernel]) for kernel in kernels], chip)
    entries = dict(zip(kernels, linked.entries, strict=True))
    calls = tuple(
        Call(
            made.kernel.name, entries[made.kernel], made.words, made.step.origin, made.step.place,
            made.step.written(), made.step.read(),
        )
        for made in steps
    )  # fmt: skip
    return PlannedLaunch(linked.program, calls)


def _expand(step: KernelCall) -> Iterable[KernelCall]:
    if not isinstance(step.kernel, LibraryCall) or step.kernel.name != "convolution_transposed":
        return (step,)
    with _named(step):
        return tuple(expand_transposed(step))


def _prepare(step: KernelCall | FusedCall, chip: Chip, symbols: Mapping[str, int]) -> _Step:
    with _named(step):
        if isinstance(step, FusedCall):
            return _fused(step, chip, symbols)
        if isinstance(step.kernel, LoopNest):
            return _nest(step, chip, symbols)
        if step.kernel.name == "copy":
            return _nest(_copy(step), chip, symbols)
        if step.kernel.name in ("sdpa", "sdpa_training"):
            kernel, blocks = attention_for(step, chip)
            offset = causal_offset(step)
            views, scalars = attention_arguments(step, blocks, offset, chip.cores)
            return _Step(kernel, _words(kernel, views, scalars), step)
        if step.kernel.name == "sdpa_backward":
            kernel = attention_backward_for(step, chip)
            views, scalars = attention_backward_arguments(step)
            return _Step(kernel, _words(kernel, views, scalars), step)
        if step.kernel.name in ("mm", "bmm", "addmm"):
            kernel, views = matmul_for(step, chip, symbols)
            return _Step(kernel, _words(kernel, views, {}), step)
        if step.kernel.name == "grouped_mm":
            kernel, views = grouped_for(step, chip, symbols)
            return _Step(kernel, _words(kernel, views, {}), step)
        if step.kernel.name == "convolution_weight":
            kernel, views = convolution_weight_for(step, chip, symbols)
            return _Step(kernel, _words(kernel, views, {}), step)
        if step.kernel.name == "convolution":
            kernel, views = convolution_for(step, chip, symbols)
            return _Step(kernel, _words(kernel, views, {}), step)
        if step.kernel.name == "user_kernel":
            kernel, views = user_kernel_for(step)
            return _Step(kernel, _words(kernel, views, {}), step)
    raise CompileError(
        f"step {step.origin!r}", "a step is a loop nest or a kernel of the library",
        f"it is {step.kernel}", "write it with operations that the library has",
    )  # fmt: skip


@contextmanager
def _named(step: KernelCall | FusedCall) -> Iterator[None]:
    """Errors say which step it was."""
    try:
        yield
    except CompileError as error:
        error.add_note(f"in the step {step.origin or step.kernel}")
        raise


def _copy(step: KernelCall) -> KernelCall:
    """A copy between any strides, as the loop nest it is."""
    out, source = step.args
    builder = Builder(list(out.sizes))
    value = builder.load("a", source.dtype, _element(source))
    builder.store("out", out.dtype, _element(out), builder.cast(value, out.dtype))
    nest, names, symbols = builder.build()
    views = {"out": out, "a": source}
    return KernelCall(
        nest, tuple(views[n] for n in names), tuple(Symbol(s) for s in symbols), step.origin,
        step.place,
    )  # fmt: skip


def _element(view: View) -> Expr:
    """Index of the element at the iteration's position, from the view's first element."""
    terms = (Var(d) * stride for d, stride in enumerate(view.strides))
    return sum(terms, start=Const(0))


def _fused(step: FusedCall, chip: Chip, symbols: Mapping[str, int]) -> _Step:
    made = convolution_for if step.product.kernel.name == "convolution" else matmul_for
    kernel, views = made(step.product, chip, symbols, epilogue=step.epilogue)
    words = _words(kernel, views | step.views(), step.scalars())
    return _Step(kernel, words, step)


def _nest(step: KernelCall, chip: Chip, symbols: Mapping[str, int]) -> _Step:
    nest = step.kernel
    given = dict(zip(nest.symbols, step.symbols, strict=True))
    hints = {name: value.evaluate(symbols) for name, value in given.items()}
    lowered = lower(nest, choose_blocks(nest, hints, chip), hints)
    words: list[Word] = []
    for word in lowered.words:
        if word.what == "symbol":
            words.append(given[nest.symbols[word.index]])
            continue
        view = step.args[word.index]
        words.append(_place(view, word.what))
    return _Step(lowered.kernel, tuple(words), step)


def _words(
    kernel: Kernel, views: Mapping[str, View], scalars: Mapping[str, Expr]
) -> tuple[Word, ...]:
    words: list[Word] = []
    for name, what, dim in kernel.words():
        if what == "scalar":
            words.append(scalars[name])
        elif what == "size":
            words.append(views[name].sizes[dim])
        elif what == "stride":
            words.append(views[name].strides[dim] * ITEMSIZE[views[name].dtype])
        else:
            words.append(_place(views[name], what))
    return tuple(words)


def _place(view: View, what: str) -> Word:
    if what == "slot":
        return SlotWord(view.buffer)
    return OffsetWord(view.buffer, view.offset * ITEMSIZE[view.dtype])
