"""Which steps of a region become one kernel: a product and the pointwise nest behind it.

The nest takes the product tile by tile (`nest_epilogue`), so the product's tensor is never written.
That may be when nothing else reads it, and when the nest writes nothing that the product reads.
The choice depends on the region alone, and changes no bit.
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
    """The region's steps with fused ones in the place of two."""
    found: list[KernelCall | FusedCall] = []
    users = _users(region)
    for step in region.steps:
        fused = _fused(region, users, found[-1], step) if found else None
        if fused is None:
            found.append(step)
        else:
            found[-1] = fused
    return found


def _users(region: Region) -> dict[int, int]:
    """How many steps touch each buffer."""
    users: dict[int, int] = {}
    for step in region.steps:
        for buffer in {arg.buffer for arg in step.args if arg is not None}:
            users[buffer] = users.get(buffer, 0) + 1
    return users


def _fused(
    region: Region, users: dict[int, int], product: KernelCall | FusedCall, step: KernelCall
) -> FusedCall | None:
    if not isinstance(product, KernelCall) or not isinstance(step.kernel, LoopNest):
        return None
    kernel = product.kernel
    if not isinstance(kernel, LibraryCall) or kernel.name not in PRODUCTS:
        return None
    out, a = product.args[0], product.args[1 if kernel.name == "convolution" else -2]
    assert out is not None and a is not None
    params = [n for n, view in enumerate(step.args) if view is not None and _same(view, out)]
    if kernel.name == "convolution":  # with channels last, or there is no kernel for it
        rows, cols, row_major = prod((out.sizes[0], *out.sizes[2:])), out.sizes[1], True
    else:
        rows, cols = out.sizes
        row_major = out.strides[1] == Const(1) and (out.strides[0] == cols or rows == Const(1))
    if (
        a.dtype != "bfloat16"
        or len(params) != 1
        or users[out.buffer] != 2
        or region.buffers[out.buffer].kind != "temporary"
        or not row_major
        or not isinstance(cols, Const)
        or set(step.writes()) & {arg.buffer for arg in product.args if arg is not None}
        or sum(arg is not None and arg.buffer == out.buffer for arg in step.args) != 1
    ):
        return None
    names = zip(step.kernel.symbols, step.symbols, strict=True)
    back = {value: Symbol(name) for name, value in names}
    epilogue = epilogue_of(step.kernel, params[0], rows.substitute(back), cols.value)
    return None if epilogue is None else FusedCall(product, step, epilogue)


def _same(view: View, out: View) -> bool:
    return (view.buffer, view.offset, view.dtype) == (out.buffer, out.offset, out.dtype)
