"""Which steps of a region become one kernel: a product and the pointwise nest behind it.

The nest takes the product tile by tile (`nest_epilogue`) and must be the first to read it. If it is
the only one, the product's tensor is never written; else it is, beside what the nest writes. Steps
between the two may come before both, unless they overwrite what the product reads; nor may the nest
overwrite that. So in training each gradient of a weight is added up and converted where it is made,
and what a gradient needs of the forward pass is stored along with what the next layer reads. The
choice depends on the region alone, and changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from pagoda.compiler.index_expr import Const, Expr, Symbol
from pagoda.compiler.loop_nest import LoopNest
from pagoda.compiler.nest_epilogue import Epilogue, epilogue_of
from pagoda.compiler.region import KernelCall, LibraryCall, Place, Region, View

PRODUCTS = ("mm", "addmm", "convolution")


@dataclass(frozen=True)
class FusedCall:
    """A product whose result goes through an epilogue, made from the nest that `follower` calls."""

    product: KernelCall
    follower: KernelCall
    epilogue: Epilogue

    @property
    def origin(self) -> str:
        return ", ".join(dict.fromkeys(filter(None, (self.product.origin, self.follower.origin))))

    @property
    def place(self) -> Place:
        return self.product.place + self.follower.place

    def written(self) -> tuple[View, ...]:
        return self.follower.written()

    def read(self) -> tuple[View, ...]:
        made = self.product.writes()
        views = (*self.product.read(), *self.follower.read())
        return tuple(view for view in views if view.buffer not in made)

    def views(self) -> dict[str, View]:
        """The follower's views by the epilogue's tensor names."""
        named = zip(self.epilogue.names(), self.follower.args, strict=True)
        return {name: view for name, view in named if name is not None and view is not None}

    def scalars(self) -> dict[str, Expr]:
        return dict(zip(self.epilogue.nest.symbols, self.follower.symbols, strict=True))


def fuse(region: Region) -> list[KernelCall | FusedCall]:
    """The region's steps, those of a product and its nest in the nest's place as one."""
    users = _users(region)
    found: list[KernelCall | FusedCall | None] = list(region.steps)
    for at, step in enumerate(region.steps):
        product = found[at]
        if not isinstance(product, KernelCall) or not _is_product(product):
            continue
        readers = users[product.writes()[0]]
        later = next((number for number in sorted(readers) if number > at), None)
        if later is None or not isinstance(region.steps[later].kernel, LoopNest):
            continue
        if not isinstance(found[later], KernelCall) or not _may_sink(region, at, later):
            continue
        fused = _fused(region, len(readers) > 2, step, region.steps[later])
        if fused is not None:
            found[at], found[later] = None, fused
    return [step for step in found if step is not None]


def _is_product(step: KernelCall) -> bool:
    kernel = step.kernel
    return isinstance(kernel, LibraryCall) and kernel.name in PRODUCTS


def _users(region: Region) -> dict[int, set[int]]:
    """Which steps touch each buffer."""
    users: dict[int, set[int]] = {}
    for number, step in enumerate(region.steps):
        for arg in step.args:
            if arg is not None:
                users.setdefault(arg.buffer, set()).add(number)
    return users


def _may_sink(region: Region, product: int, later: int) -> bool:
    """Whether the product can wait for a later step: nothing between writes what it reads."""
    reads = set(region.steps[product].reads())
    between = region.steps[product + 1 : later]
    return not any(reads & set(step.writes()) for step in between)


def _fused(
    region: Region, needed: bool, product: KernelCall, step: KernelCall
) -> FusedCall | None:
    """The two as one. needed: other steps read the product's tensor too."""
    kernel = product.kernel
    assert isinstance(kernel, LibraryCall) and isinstance(step.kernel, LoopNest)
    out, a = product.args[0], product.args[1 if kernel.name == "convolution" else -2]
    assert out is not None and a is not None
    keep = needed or region.buffers[out.buffer].kind != "temporary"
    params = [n for n, view in enumerate(step.args) if view is not None and _same(view, out)]
    if kernel.name == "convolution":  # with channels last, or there is no kernel for it
        rows, cols, row_major = prod((out.sizes[0], *out.sizes[2:])), out.sizes[1], True
    else:
        rows, cols = out.sizes
        row_major = out.strides[1] == Const(1) and (out.strides[0] == cols or rows == Const(1))
    if (
        a.dtype not in ("bfloat16", "int8")
        or len(params) != 1
        or (keep and kernel.name == "convolution")
        or not row_major
        or not isinstance(cols, Const)
        or set(step.writes()) & {arg.buffer for arg in product.args if arg is not None}
        or sum(arg is not None and arg.buffer == out.buffer for arg in step.args) != 1
    ):
        return None
    names = zip(step.kernel.symbols, step.symbols, strict=True)
    back = {value: Symbol(name) for name, value in names}
    epilogue = epilogue_of(step.kernel, params[0], rows.substitute(back), cols.value, keep)
    return None if epilogue is None else FusedCall(product, step, epilogue)


def _same(view: View, out: View) -> bool:
    return (view.buffer, view.offset, view.dtype) == (out.buffer, out.offset, out.dtype)
