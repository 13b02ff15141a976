"""The tile IR: what a kernel does, as tiles, commands and loops; frozen plain data without torch.

Both front ends (the kernel language, loop nests) build it, best through `builder.KernelBuilder`.
The meaning is sequential: statements take effect one after another, exactly as written.

    kernel    := Kernel(name, tensors, scalars, blocks, body)
    tensor    := Tensor(name, dtype, sizes, strides)    None = given at run time, int = fixed
    statement := For(variable, start, stop, step, body)
               | If(condition, then, otherwise)
               | Let(name, value)                       name := scalar; may be bound again
               | ReadWord(name, source)                 name := int32 word of an SRAM tile
               | Declare(tile)                          fresh storage each time it is reached
               | Load(tile view, access, rows, cols, planes, padding)
               | Store(tile view, access, rows, cols, planes, accumulate)
               | Gather / Scatter(tile view, access, index view, rows, cols)
               | Dot(acc, a, b, m, n, k, accumulate, transposes, convolution strides)
               | Elementwise(destination view, tree, rows, cols)
               | Reduce(op, state, source, rows, cols, axis, first, start)
               | Finish(op, destination, state, rows)
               | Transpose(destination, source, rows, cols)
               | Iota(destination, rows, cols, start, row_step, col_step)
               | Barrier() | Trap(code)
    tree      := Read(view) | Row(view) | Column(view) | Splat(value) | Apply(function, trees)
    view      := View(tile, row, col)                   the tile from element (row, col) on
    access    := Access(tensor, offset, row_stride, plane_stride)    bytes
    scalar    := see `scalar.py`

Tiles. A `Tile` has compile-time maximum extents `rows x cols` and a memory, "sram" or "acc"; an
operation's `rows`, `cols` say how much of it is meant this time, so tails need no masks. Elements
of a row are contiguous, rows are `row_bytes` apart. A tile lives from its `Declare` to the end of
the enclosing body. Its contents are undefined at first; a tile declared in a loop may rotate over
several buffers, so nothing carries over from one iteration to the next: declare what is carried
outside the loop. SRAM tiles hold F32, BF16, I32, I8; ACC tiles F32 or I32, and are what `Dot`
writes; every operation may read and write them, except as matmul operands or index tiles.

Lanes. Element-wise trees compute in float32 (tiles F32, BF16) or int32 (I32, I8); the destination's
dtype decides the one conversion at the end (BF16 rounds to nearest even, I8 saturates). Comparisons
give int32 0 or 1.

Argument words. A kernel is called with one block of 32-bit words, in the order of
`Kernel.words()`: for each tensor slot, byte offset, its run-time sizes (elements), its run-time
strides (bytes); then the scalar parameters.

Building a kernel that doubles x[rows, cols] (see `builder.py` for the rest):

    b = KernelBuilder("double")
    x, y = b.tensor("x", DType.F32, 2), b.tensor("y", DType.BF16, 2)
    with b.loop("i", 0, x.size(0), 16) as i, b.loop("j", 0, x.size(1), 64) as j:
        rows, cols = minimum(16, x.size(0) - i), minimum(64, x.size(1) - j)
        t, u = b.tile(DType.F32, 16, 64), b.tile(DType.BF16, 16, 64)
        b.load(t, x.at(i, j), rows, cols)
        b.elementwise(u, apply("fadd", Read(t.view()), Read(t.view())), rows, cols)
        b.store(u, y.at(i, j), rows, cols)
    kernel = b.build()
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from pagoda.compiler.errors import Location
from pagoda.compiler.scalar import ONE, ZERO, Int, Scalar, scalar
from pagoda.isa.numbers import DType

LOCAL_DTYPES = (DType.F32, DType.BF16, DType.I32, DType.I8)
STATE_LANES = 64  # words of one row's reduction state (twice that for argmax)


@dataclass(frozen=True)
class Tensor:
    """A tensor parameter. sizes (elements) and strides (bytes): per dimension an int when fixed
    at compile time, None when an argument word gives it. The rank is their length."""

    name: str
    dtype: DType
    sizes: tuple[int | None, ...]
    strides: tuple[int | None, ...]

    @property
    def rank(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Tile:
    """Local storage of rows x cols elements. buffers: how many copies a tile declared in a loop
    rotates over; None leaves it to the scheduler. cursor_of (the scheduler's): this tile walks over
    the buffers of that one."""

    name: str
    dtype: DType
    rows: int
    cols: int
    memory: Literal["sram", "acc"] = "sram"
    buffers: int | None = None
    cursor_of: Tile | None = None

    @property
    def storage(self) -> Tile:
        """The tile whose buffers these are."""
        return self.cursor_of or self

    @property
    def element_bytes(self) -> int:
        return self.dtype.bits // 8

    @property
    def row_bytes(self) -> int:
        return self.cols * self.element_bytes

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def view(self, row: Scalar | int = 0, col: Scalar | int = 0) -> View:
        """The tile from element (row, col) on."""
        return View(self, scalar(row), scalar(col))

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype.name.lower()}[{self.rows}, {self.cols}] {self.memory}"


@dataclass(frozen=True)
class View:
    tile: Tile
    row: Scalar = ZERO
    col: Scalar = ZERO

    def __str__(self) -> str:
        if self.row == ZERO and self.col == ZERO:
            return self.tile.name
        return f"{self.tile.name}[{self.row}, {self.col}]"


@dataclass(frozen=True)
class Access:
    """A 3-D window of a tensor parameter: `offset` bytes from the tensor's first element, rows
    `row_stride` and planes `plane_stride` bytes apart (signed); columns are contiguous."""

    tensor: str
    offset: Scalar = ZERO
    row_stride: Scalar = ZERO
    plane_stride: Scalar = ZERO

    def __str__(self) -> str:
        planes = "" if self.plane_stride == ZERO else f", planes {self.plane_stride}"
        return f"{self.tensor}[{self.offset} bytes; rows {self.row_stride}{planes}]"


# Element-wise trees ------------------------------------------------------------------------------

_F, _I = "float", "int"
# name -> (class of the arguments, class of the result)
FUNCTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("fadd", "fsub", "fmul", "fdiv", "fmax", "fmin"), ((_F, _F), _F)),
    **dict.fromkeys(("flt", "fle", "feq", "fne", "fgt", "fge"), ((_F, _F), _I)),
    **dict.fromkeys(("fneg", "fabs", "fsqrt", "ffloor", "fceil", "ftrunc", "fround"), ((_F,), _F)),
    **dict.fromkeys(("exp2", "log2", "recip", "rsqrt", "sin2pi"), ((_F,), _F)),
    "f2i": ((_F,), _I),
    "i2f": ((_I,), _F),
    "i2b": ((_I,), _I),
    **dict.fromkeys(("iadd", "isub", "imul", "imax", "imin", "and", "or", "xor"), ((_I, _I), _I)),
    **dict.fromkeys(("shl", "shr", "sra", "idiv", "imod"), ((_I, _I), _I)),
    **dict.fromkeys(("ilt", "ile", "ieq", "ine"), ((_I, _I), _I)),
    "fma": ((_F, _F, _F), _F),  # a * b + c, rounded once
    "i2fmul": ((_I, _F), _F),  # i2f, then fmul
    "faddq": ((_F, _F), _I),  # fadd, fround, and as an int8
    "as_int": ((_F,), _I),  # the same 32 bits
    "as_float": ((_I,), _F),
}


class Tree:
    """Base of the element-wise expressions. `kind`: "float" or "int", the class of its lanes."""

    kind: str

    def children(self) -> tuple[Tree, ...]:
        return ()

    def walk(self) -> Iterator[Tree]:
        """This node and all below it, children first; an object used twice comes once."""
        seen: set[int] = set()

        def visit(node: Tree) -> Iterator[Tree]:
            if id(node) not in seen:
                seen.add(id(node))
                for child in node.children():
                    yield from visit(child)
                yield node

        yield from visit(self)


@dataclass(frozen=True)
class _Operand(Tree):
    view: View

    @property
    def kind(self) -> str:
        return _F if self.view.tile.dtype.is_float else _I


@dataclass(frozen=True)
class Read(_Operand):
    """rows x cols elements of a tile."""

    def __str__(self) -> str:
        return str(self.view)


@dataclass(frozen=True)
class Row(_Operand):
    """One row of a tile, repeated for every row."""

    def __str__(self) -> str:
        return f"row({self.view})"


@dataclass(frozen=True)
class Column(_Operand):
    """The first element of each row of a tile, repeated along the row."""

    def __str__(self) -> str:
        return f"column({self.view})"


@dataclass(frozen=True)
class Splat(Tree):
    """One 32-bit lane pattern everywhere; `kind` says how to read it."""

    value: Scalar
    kind: str

    def __str__(self) -> str:
        if self.kind == _F and isinstance(self.value, Int):
            return f"{struct.unpack('<f', struct.pack('<i', self.value.value))[0]!r}"
        return str(self.value)


@dataclass(frozen=True)
class Apply(Tree):
    """`function` (a name in FUNCTIONS, or "select") of its arguments; build with `apply`."""

    function: str
    arguments: tuple[Tree, ...]

    @property
    def kind(self) -> str:
        return self.arguments[1].kind if self.function == "select" else FUNCTIONS[self.function][1]

    def children(self) -> tuple[Tree, ...]:
        return self.arguments

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(str, self.arguments))})"


def splat(value: Scalar | float, kind: str | None = None) -> Splat:
    """A constant tile: a Python float (rounded to float32), an int, or a run-time scalar.

    A run-time scalar with kind="float" holds the bits of a float32.
    """
    if isinstance(value, float) or (kind == _F and isinstance(value, int)):
        pattern = struct.unpack("<i", struct.pack("<f", round_to_float32(value)))[0]
        return Splat(Int(pattern), _F)
    return Splat(scalar(value), kind or _I)


def round_to_float32(value: float) -> float:
    """The nearest float32; magnitudes beyond its range become infinite, as in hardware."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def apply(function: str, *arguments: Tree) -> Tree:
    """A function of trees. Raises TypeError when the number or class of arguments is wrong."""
    found = tuple(argument.kind for argument in arguments)
    if function == "select":
        if len(found) != 3 or found[0] != _I or found[1] != found[2]:
            raise TypeError(f"select wants (int, T, T), not ({', '.join(found)})")
    elif function not in FUNCTIONS:
        raise TypeError(f"no element-wise function {function!r}")
    elif found != FUNCTIONS[function][0]:
        wanted = ", ".join(FUNCTIONS[function][0])
        raise TypeError(f"{function} wants ({wanted}), not ({', '.join(found)})")
    return Apply(function, arguments)


# Statements --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """Base. `location`: the source line it stems from; no part of its identity."""

    location: Location | None = field(default=None, compare=False, repr=False, kw_only=True)

    bodies_fields: ClassVar[tuple[str, ...]] = ()

    def bodies(self) -> tuple[tuple[Statement, ...], ...]:
        """The statement lists inside this statement."""
        return tuple(getattr(self, name) for name in self.bodies_fields)

    def views(self) -> Iterator[View]:
        """Every tile view that occurs, element-wise trees included."""
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, View):
                yield value
            elif isinstance(value, Tree):
                yield from (n.view for n in value.walk() if isinstance(n, _Operand))

    def scalars(self) -> Iterator[Scalar]:
        """Every scalar expression that occurs at the top level of a field or in a view."""
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Scalar):
                yield value
            elif isinstance(value, Access):
                yield from (value.offset, value.row_stride, value.plane_stride)
            elif isinstance(value, tuple) and part.name not in self.bodies_fields:
                yield from (item for item in value if isinstance(item, Scalar))
            elif isinstance(value, Tree):
                yield from (n.value for n in value.walk() if isinstance(n, Splat))
        for view in self.views():
            yield from (view.row, view.col)


Body = tuple[Statement, ...]


@dataclass(frozen=True)
class For(Statement):
    """`for variable in range(start, stop, step)`, signed, step > 0, evaluated once on entry.

    ahead: how many iterations early the loads of the innermost loop below may be issued (see
    `pipeline.py`): time only. It promises that nothing the loop stores, in whatever tensor, is what
    it loads ahead.
    """

    variable: str
    start: Scalar
    stop: Scalar
    step: Scalar
    body: Body
    ahead: int = 0
    bodies_fields: ClassVar = ("body",)


@dataclass(frozen=True)
class If(Statement):
    condition: Scalar
    then: Body
    otherwise: Body = ()
    bodies_fields: ClassVar = ("then", "otherwise")


@dataclass(frozen=True)
class Let(Statement):
    name: str
    value: Scalar


@dataclass(frozen=True)
class ReadWord(Statement):
    """name := the int32 element at the start of `source`, an I32 (or F32, as bits) SRAM tile."""

    name: str
    source: View


@dataclass(frozen=True)
class Declare(Statement):
    tile: Tile


@dataclass(frozen=True)
class Load(Statement):
    """tile := window of a tensor, converted from the tensor's dtype to the tile's.

    planes x rows x cols are the extents in the tile. pad_rows, pad_cols = (before, after): that
    many rows and columns of every plane are zeros and not read; the access' offset names the first
    element really read. row_stride, plane_stride: bytes between rows and planes in the tile; None =
    the tile's row_bytes, and planes stacked one after another.
    """

    destination: View
    source: Access
    rows: Scalar
    cols: Scalar
    planes: Scalar = ONE
    pad_rows: tuple[Scalar, Scalar] = (ZERO, ZERO)
    pad_cols: tuple[Scalar, Scalar] = (ZERO, ZERO)
    row_stride: Scalar | None = None
    plane_stride: Scalar | None = None


@dataclass(frozen=True)
class Store(Statement):
    """window of a tensor := tile, converted; accumulate: += (tensor F32, I32 or BF16)."""

    destination: Access
    source: View
    rows: Scalar
    cols: Scalar
    planes: Scalar = ONE
    accumulate: bool = False
    row_stride: Scalar | None = None
    plane_stride: Scalar | None = None


@dataclass(frozen=True)
class Gather(Statement):
    """Row r of the tile := `cols` elements at offset + index[r] * row_stride. `index`: an I32 SRAM
    tile whose elements, from the view's start on, are consecutive words."""

    destination: View
    source: Access
    index: View
    rows: Scalar
    cols: Scalar


@dataclass(frozen=True)
class Scatter(Statement):
    """`cols` elements at offset + index[r] * row_stride := (or +=) row r of the tile, in order."""

    destination: Access
    source: View
    index: View
    rows: Scalar
    cols: Scalar
    accumulate: bool = False


@dataclass(frozen=True)
class Dot(Statement):
    """acc[m, n] (+)= a[m, k] b[k, n], k in order, one fused multiply-add per step.

    a, b: SRAM tiles, both BF16 (acc F32) or both I8 (acc I32). transpose_a: `a` holds [k, m];
    transpose_b: `b` holds [n, k] (nn.Linear's weight). accumulate: a scalar, 0 = start from zero;
    it may be a run-time value such as `k.ne(0)`.
    a_outer: up to two (count, byte stride) pairs, inner first: the rows of A are count * ... * m,
    each group of m starting that many bytes after the one before (images without im2col).
    k_outer: (count, byte stride): k runs over `count` runs of `k` contiguous elements of A.
    """

    acc: View
    a: View
    b: View
    m: Scalar
    n: Scalar
    k: Scalar
    accumulate: Scalar = ZERO
    transpose_a: bool = False
    transpose_b: bool = False
    a_outer: tuple[tuple[Scalar, Scalar], ...] = ()
    k_outer: tuple[Scalar, Scalar] = (ONE, ZERO)


@dataclass(frozen=True)
class Elementwise(Statement):
    """destination[rows, cols] := tree. A tile may be both read and written only element for
    element (`Read` of the very view that is written)."""

    destination: View
    tree: Tree
    rows: Scalar
    cols: Scalar


REDUCTIONS = ("fsum", "fmax", "fmin", "isum", "imax", "argmax")


@dataclass(frozen=True)
class Reduce(Statement):
    """state := state combined with source[rows, cols].

    axis="row": `state` has a row of 64 words (argmax: 128) per source row; element j goes to lane
    (start + j) mod 64, `start` (a multiple of 64) being the global column of the first element, so
    any split of a row into chunks gives the same bits; `Finish` folds the lanes. argmax reports the
    global column. axis="col": `state` is one row of `cols` words, rows added in order; no Finish.
    first: a scalar, 1 = start from the operation's initial state instead of the old contents.
    op: fsum fmax fmin isum imax argmax; the state is F32 or I32 like the operation.
    """

    op: str
    state: View
    source: View
    rows: Scalar
    cols: Scalar
    axis: Literal["row", "col"] = "row"
    first: Scalar = ONE
    start: Scalar = ZERO


@dataclass(frozen=True)
class Finish(Statement):
    """destination (rows x 1 tile) := each row's folded state (argmax: the index, I32)."""

    op: str
    destination: View
    state: View
    rows: Scalar


@dataclass(frozen=True)
class Transpose(Statement):
    """destination[c, r] := source[r, c] for rows x cols of the source; equal element sizes."""

    destination: View
    source: View
    rows: Scalar
    cols: Scalar


@dataclass(frozen=True)
class Iota(Statement):
    """destination[r, c] := start + r * row_step + c * col_step, int32."""

    destination: View
    rows: Scalar
    cols: Scalar
    start: Scalar = ZERO
    row_step: Scalar = ZERO
    col_step: Scalar = ONE


@dataclass(frozen=True)
class Barrier(Statement):
    """All cores meet; after it each sees what the others stored before it."""


@dataclass(frozen=True)
class Trap(Statement):
    """Software fault with this code."""

    code: Scalar


@dataclass(frozen=True)
class Kernel:
    """A kernel with its blocks chosen. blocks: (name, value) of its compile-time parameters."""

    name: str
    tensors: tuple[Tensor, ...]
    scalars: tuple[str, ...]
    body: Body
    blocks: tuple[tuple[str, int], ...] = ()
    location: Location | None = field(default=None, compare=False, repr=False)

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)

    def words(self) -> tuple[tuple[str, str, int], ...]:
        """The argument words in order: (tensor, "slot" | "offset" | "size" | "stride", dim), and
        (name, "scalar", 0)."""
        found: list[tuple[str, str, int]] = []
        for t in self.tensors:
            found += [(t.name, "slot", 0), (t.name, "offset", 0)]
            found += [(t.name, "size", d) for d, size in enumerate(t.sizes) if size is None]
            found += [(t.name, "stride", d) for d, s in enumerate(t.strides) if s is None]
        return (*found, *((name, "scalar", 0) for name in self.scalars))

    def walk(self) -> Iterator[Statement]:
        """Every statement, in program order, outer before inner."""
        yield from walk(self.body)

    def __str__(self) -> str:
        from pagoda.compiler.tile_ir_text import kernel_text

        return kernel_text(self)


def walk(body: Body) -> Iterator[Statement]:
    for statement in body:
        yield statement
        for inner in statement.bodies():
            yield from walk(inner)
