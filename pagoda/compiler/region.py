"""Regions: a whole compiled graph as plain data; what the PyTorch storey hands down.

A `Region` lists tensors (`Buffer`), what the caller passes (`inputs`), what it gets back
(`outputs`) and the kernels to run in order (`steps`). Sizes may be symbolic: index expressions over
`symbols`, each of which is read from an input when the region is called, so one region serves every
sequence length. There is no torch object inside; a region can be pickled, cached on disk and run
by a process that never imports torch.

Meaning: run the steps in order. Each step applies its kernel to views of buffers. Temporaries
have no value before the step that first writes them. Steps never overlap in meaning; a step's
outputs and inputs are the same memory only where its kernel parameter says `readwrite`.

The caller owns inputs and outputs: it reads the symbols, allocates every buffer of kind "output"
(`size` elements), runs the region through an `Executor`, and makes tensors of `outputs`. The
executor owns temporaries and constants.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from pagoda.compiler.index_expr import Const, Expr
from pagoda.compiler.loop_nest import ITEMSIZE, LoopNest, Store

# Library kernels: name -> (argument names in order, attribute names). The output comes first (of
# those in `OUTPUTS`, several); an argument with "?" may be None. Shapes are the views' sizes,
# transposes are visible as strides.
#
# copy     out[...] = a[...]           same sizes, any strides; converts to out's type
# mm       out[m,n] = a[m,k] b[k,n]
# bmm      out[g,m,n] = a[g,m,k] b[g,k,n]
# addmm    out[m,n] = beta*bias + alpha * a[m,k] b[k,n]; bias is a view of sizes [m,n] (a bias row
#          has stride 0), or of sizes [n]
# sdpa     out[b,h,q,d] = softmax(scale * q[b,h,q,e] k[b,g,s,e]^T + mask) v[b,g,s,d]; query head h
#          uses key/value head h // (h_count / g_count). mask[b,h,q,s] (dimensions of size 1 are
#          broadcast): bool true = visible, float = added. causal: False, or True: position s is
#          visible to query q if s <= q, both counted from 0 (torch's upper left corner), or
#          "lower right": if s <= q + S - Q, so that the last query sees all. A row that sees
#          nothing is 0.
# sdpa_training   sdpa, with statistics[b,h,q,2] (float32): what sdpa_backward needs to know about a
#          row. Which two numbers is the kernel's business. With row_seeds[b,h,q] and
#          column_seeds[b,s] (int32) softmax weights are dropped with probability `dropout`, the
#          others divided by 1 - dropout; which ones, the seeds alone decide.
# sdpa_backward   the gradients of sdpa_training for that of its result, dout: dk and dv as given;
#          dq is float32 and still lacks the factor `scale`. delta[b,h,q] (float32) is the sum of
#          dout * out over d.
# convolution   out[n,o,y,x] = bias[o] + sum over ky, kx, c of w[o,c,ky,kx]
#          * x[n, c, y stride_h + ky dilation_h - pad_top, x stride_w + kx dilation_w - pad_left]
#          in torch's order of dimensions, zeros outside; group g of `groups` takes its share of the
#          channels c to its share of o. out and x lie with channels last (out perhaps with gaps
#          between pixels), w with c or o contiguous. As many y and x as out has; pad_top and
#          pad_left may be negative. transposed: w is given as for a transposed convolution, [c, o
#          of a group, ky, kx] and turned by half a turn: kernel row ky is the last but ky. cells:
#          unless 1, x has 1 / cells^2 of the channels and `cells` times the rows and columns; what
#          counts as its pixels above are squares of these, their channels row after row of them.
# convolution_transposed   out[n,o,y,x] = bias[o] + sum over c and all iy stride_h + ky dilation_h
#          - pad_top = y, ix stride_w + kx dilation_w - pad_left = x of x[n,c,iy,ix] w[c,o,ky,kx],
#          with groups and layouts as above
# convolution_weight   out[o,c,ky,kx] = sum over n, y, x of g[n,o,y,x] * x[n, c, y stride_h +
#          ky dilation_h - pad_top, x stride_w + kx dilation_w - pad_left]: the gradient for w where
#          g is that for the result; x and g with channels last, out with c contiguous
# user_kernel   what the kernel of that name in `kernels.user` does, whose source has that hash
#
# All but that accumulate in float32 and round once, on the way out (the weights of softmax may be
# rounded to the type of v before they meet it: a kernel's choice). How exactly they multiply
# float32 operands is the call's `precision`; a convolution of them is depthwise or has one tap.
LIBRARY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "copy": (("out", "a"), ()),
    "mm": (("out", "a", "b"), ()),
    "bmm": (("out", "a", "b"), ()),
    "addmm": (("out", "bias", "a", "b"), ("alpha", "beta")),
    "grouped_mm": (("out", "a", "b", "ends"), ()),
    "convolution": (
        ("out", "x", "w", "bias?"),
        (
            "stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups",
            "transposed", "cells",
        ),
    ),
    "convolution_transposed": (
        ("out", "x", "w", "bias?"),
        ("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups"),
    ),
    "convolution_weight": (
        ("out", "x", "g"),
        ("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups"),
    ),
    "sdpa": (("out", "q", "k", "v", "mask?"), ("causal", "scale")),
    "sdpa_training": (
        ("out", "statistics", "q", "k", "v", "mask?", "row_seeds?", "column_seeds?"),
        ("causal", "scale", "dropout"),
    ),
    "sdpa_backward": (
        ("dq", "dk", "dv", "dout", "q", "k", "v", "statistics", "delta",
         "mask?", "row_seeds?", "column_seeds?"),
        ("causal", "scale", "dropout"),
    ),
    "user_kernel": (("out", "..."), ("kernel", "source")),
}
OUTPUTS = {"sdpa_training": 2, "sdpa_backward": 3}
"""How many arguments are outputs, where it is not one."""

Precision = Literal["highest", "high", "medium"]


@dataclass(frozen=True)
class LibraryCall:
    """A kernel of the kernel library, by name, with its static attributes (see `LIBRARY`).

    precision: of products of float32 operands, in the words of torch's float32 matmul precision
    (what they mean here: `kernels.float32.TERMS`). Of other operands it is always "highest".
    """

    name: str
    attributes: tuple[tuple[str, bool | int | float | str], ...] = ()
    precision: Precision = "highest"

    def __post_init__(self) -> None:
        known = LIBRARY[self.name][1]
        assert tuple(name for name, _ in self.attributes) == known, (self, known)

    @property
    def outputs(self) -> int:
        """How many of the arguments, the first ones, are written."""
        return OUTPUTS.get(self.name, 1)

    def attribute(self, name: str) -> bool | int | float | str:
        return dict(self.attributes)[name]

    def __str__(self) -> str:
        named = self.attributes
        if self.precision != "highest":
            named += (("precision", self.precision),)
        shown = ", ".join(f"{name}={value}" for name, value in named)
        return f"{self.name}({shown})" if shown else self.name


@dataclass(frozen=True)
class Buffer:
    """One tensor's memory. `size` is in elements of `dtype`.

    kind: "input" (given by the caller; `mutated` if a step writes it), "output" (allocated by the
    caller, written by the region), "temporary" (lives inside one call), "constant" (`data` holds
    its bytes).
    `weight`: an input that stays the same from call to call (a module's parameter or buffer).
    """

    name: str
    dtype: str
    size: Expr
    kind: Literal["input", "output", "temporary", "constant"]
    mutated: bool = False
    weight: bool = False
    data: bytes | None = None

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class View:
    """Elements of `buffers[buffer]`, as `dtype`: `offset` and `strides` in elements of `dtype`.

    For a loop nest's parameter the sizes and strides are those of the whole buffer, for information
    only: the nest holds its own index expressions, counted from `offset`.
    """

    buffer: int
    offset: Expr
    sizes: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    dtype: str


@dataclass(frozen=True)
class Place:
    """Where in the user's model a step comes from. layers: paths of modules, as in a state dict;
    lines: of the source, as text. Both in the graph's order; of a product's step its own first."""

    layers: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    def __add__(self, other: Place) -> Place:
        return Place(
            tuple(dict.fromkeys((*self.layers, *other.layers))),
            tuple(dict.fromkeys((*self.lines, *other.lines))),
        )


NOWHERE = Place()


@dataclass(frozen=True)
class KernelCall:
    """One step. `args`: a view per parameter of the loop nest, or per library argument (None for an
    absent optional one). `symbols`: a value per symbol of the loop nest, over the region's symbols.
    `origin`: the torch operations it came from, `place`: where these stand in the user's model; for
    messages and profiles."""

    kernel: LoopNest | LibraryCall
    args: tuple[View | None, ...]
    symbols: tuple[Expr, ...] = ()
    origin: str = ""
    place: Place = NOWHERE

    def writes(self) -> tuple[int, ...]:
        """Buffers this step writes."""
        if isinstance(self.kernel, LibraryCall):
            written = self.args[: self.kernel.outputs]
            return tuple(a.buffer for a in written if a is not None)
        stored = dict.fromkeys(op.param for op in self.kernel.body if isinstance(op, Store))
        return tuple(self.args[p].buffer for p in stored)  # type: ignore[union-attr]

    def reads(self) -> tuple[int, ...]:
        """Buffers this step reads; one that is accumulated into counts as read."""
        if isinstance(self.kernel, LibraryCall):
            return tuple(a.buffer for a in self.args[self.kernel.outputs :] if a is not None)
        return tuple(
            arg.buffer
            for param, arg in zip(self.kernel.params, self.args, strict=True)
            if arg is not None and param.access != "write"
        )

    def written(self) -> tuple[View, ...]:
        """The tensors it writes: of each buffer the first argument that lies in it."""
        return self._first(self.writes())

    def read(self) -> tuple[View, ...]:
        return self._first(self.reads())

    def _first(self, buffers: Iterable[int]) -> tuple[View, ...]:
        views = {arg.buffer: arg for arg in reversed(self.args) if arg is not None}
        return tuple(views[buffer] for buffer in dict.fromkeys(buffers))


@dataclass(frozen=True)
class TensorInput:
    """An argument that is a tensor: `view` describes it (offset 0: the caller passes the address
    of its first element)."""

    view: View


@dataclass(frozen=True)
class IntInput:
    """An argument that is a Python integer and becomes the symbol `name`. An unnamed one does not;
    symbols may still be read from it."""

    name: str | None


@dataclass(frozen=True)
class SymbolSource:
    """Where a symbol's value is read when the region is called: size or stride `dim` of tensor
    argument number `input`, or integer argument number `input` itself. `value` turns what was
    read (the symbol "x" in it) into the symbol's value: it undoes sizes such as 2*s0."""

    name: str
    what: Literal["size", "stride", "int"]
    input: int
    dim: int
    value: Expr


@dataclass(frozen=True)
class Region:
    """See the module's docstring.

    inputs: one entry per argument of the call, in order. outputs: one per result, in order: a view
    (of an output buffer; of an input for a result that aliases one), an integer expression, or
    None. Buffers of kind "input" and "output" are in the order of first use in `inputs` and
    `outputs`. The last inputs, one for each of `seeds`, are not passed by the caller: each is that
    many random int64 in [0, 2**31), drawn anew for every call.
    """

    name: str
    inputs: tuple[TensorInput | IntInput, ...]
    outputs: tuple[View | Expr | None, ...]
    symbols: tuple[SymbolSource, ...]
    buffers: tuple[Buffer, ...]
    steps: tuple[KernelCall, ...]
    seeds: tuple[int, ...] = ()

    @cached_property
    def key(self) -> str:
        """SHA-256 of the region without its name: equal keys mean equal regions."""
        parts = (self.inputs, self.outputs, self.symbols, self.buffers, self.steps, self.seeds)
        return hashlib.sha256(pickle.dumps([repr(p) for p in parts])).hexdigest()

    def output_buffers(self) -> tuple[int, ...]:
        """Numbers of the buffers the caller must allocate."""
        return tuple(k for k, b in enumerate(self.buffers) if b.kind == "output")

    def read_symbols(self, args: Sequence[TensorArg | int]) -> dict[str, int]:
        """Values of all symbols for one call's arguments."""
        values: dict[str, int] = {}
        for source in self.symbols:
            arg = args[source.input]
            if source.what == "int":
                read = int(arg)  # type: ignore[arg-type]
            else:
                assert isinstance(arg, TensorArg)
                read = (arg.sizes if source.what == "size" else arg.strides)[source.dim]
            values[source.name] = source.value.evaluate({**values, "x": read})
        return values

    def kernels(self) -> Counter[LoopNest | LibraryCall]:
        """How often each distinct kernel is called."""
        return Counter(step.kernel for step in self.steps)

    def last_uses(self) -> dict[int, int]:
        """For each buffer the number of the last step that touches it."""
        last: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for arg in step.args:
                if arg is not None:
                    last[arg.buffer] = number
        return last

    def vocabulary(self) -> list[str]:
        """Operations that the steps use: those of the loop nests and the library calls' names."""
        names: set[str] = set()
        for kernel in self.kernels():
            names |= set(kernel.vocabulary() if isinstance(kernel, LoopNest) else [kernel.name])
        return sorted(names)

    def describe(self, kernels: bool = True) -> str:
        """The region as text: tensors, steps, then (unless `kernels` is False) each distinct loop
        nest once."""
        names: dict[LoopNest, str] = {}
        for kernel in self.kernels():
            if isinstance(kernel, LoopNest):
                names[kernel] = f"nest{len(names)}"
        lines = [f"region {self.name}"]
        for source in self.symbols:
            origin = f"argument {source.input}"
            if source.what != "int":
                origin = f"{source.what} {source.dim} of {origin}"
            lines.append(f"  symbol {source.name} = {source.value} where x is {origin}")
        for number, arg in enumerate(self.inputs):
            shown = self._show(arg.view) if isinstance(arg, TensorInput) else f"int {arg.name}"
            flags = ""
            if isinstance(arg, TensorInput):
                buffer = self.buffers[arg.view.buffer]
                flags = " weight" * buffer.weight + " mutated" * buffer.mutated
            lines.append(f"  argument {number}: {shown}{flags}")
        for number, step in enumerate(self.steps):
            kernel = step.kernel
            label = names[kernel] if isinstance(kernel, LoopNest) else str(kernel)
            args = "; ".join("none" if a is None else self._show(a) for a in step.args)
            symbols = f" [{_list(step.symbols)}]" if step.symbols else ""
            origin = f"  # {step.origin}" if step.origin else ""
            lines.append(f"  {number}: {label}{symbols}({args}){origin}")
        for number, out in enumerate(self.outputs):
            shown = self._show(out) if isinstance(out, View) else str(out)
            lines.append(f"  result {number}: {shown}")
        if kernels:
            lines.extend(f"\n{name}: {kernel}" for kernel, name in names.items())
        return "\n".join(lines)

    def _show(self, view: View) -> str:
        offset = "" if view.offset == Const(0) else f" + {view.offset}"
        strides = f" strides [{_list(view.strides)}]" if view.strides else ""
        name = self.buffers[view.buffer].name
        return f"{name}{offset}: {view.dtype}[{_list(view.sizes)}]{strides}"


def _list(values: Iterable[Expr]) -> str:
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class TensorArg:
    """One tensor in host memory: address of its first element, sizes and strides in elements."""

    pointer: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Executor(Protocol):
    """Runs regions; given to the PyTorch storey at registration.

    `inputs`: one entry per `region.inputs`. `outputs`: one flat `TensorArg` per
    `region.output_buffers()`. All memory comes from the allocator given along with the executor.
    When `run` returns, the results are in place. It may keep what it compiled, by `region.key`.
    """

    def run(
        self,
        region: Region,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> None: ...


class Allocator(Protocol):
    """Device memory, seen from the host."""

    def allocate(self, nbytes: int) -> int:
        """Address of `nbytes` of new memory, aligned to 64 bytes; raises MemoryError."""
        ...

    def free(self, pointer: int) -> None:
        """Gives memory back; `pointer` is what `allocate` returned."""
        ...
