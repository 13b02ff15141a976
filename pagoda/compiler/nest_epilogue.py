"""A pointwise loop nest as the end of a matrix product: applied to each output tile in SRAM.

    for i, j:  x[i, j] = a[i, :] b[:, j]          one kernel: tile by tile, the product is rounded
    for i, j:  y[i, j] = f(x[i, j], z[i, j])      to x's type, then f, and only y is stored

The product's elements are the ones that would have been stored, so the results are the same bits
with and without. What it saves: x never travels to DRAM and back (or, where others read it too,
only there), and the vector engine works on one tile while the matrix engine multiplies the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.cost import EpilogueCost
from pagoda.compiler.index_expr import Expr, Var
from pagoda.compiler.loop_nest import ITEMSIZE, Indirect, Load, LoopNest, Reduce, Store
from pagoda.compiler.nest_frame import Frame, Value, storage
from pagoda.compiler.nest_operations import Operations
from pagoda.compiler.nest_plan import FULL, Plan
from pagoda.compiler.nest_simplify import as_rows, simplify
from pagoda.compiler.scalar import Int
from pagoda.compiler.schedule import Vector, pack_elementwise, wanted_buffers
from pagoda.compiler.tile_ir import Declare, Read, Tile, walk
from pagoda.compiler.tile_ir import Load as TileLoad
from pagoda.compiler.values import Range
from pagoda.isa.functions import FUNCTION_CODES, VECTOR_FUNCTIONS
from pagoda.isa.numbers import DType


@dataclass(frozen=True)
class Epilogue:
    """nest: of two dimensions, rows and columns of the product; param: the one that is it; keep:
    the product is stored too."""

    nest: LoopNest
    param: int
    keep: bool = False

    def names(self) -> tuple[str | None, ...]:
        """Tensor name per parameter of the nest; None for the product."""
        count = len(self.nest.params)
        return tuple(None if k == self.param else f"e{k}" for k in range(count))

    def emit(self, b: KernelBuilder, product: Tile, rows: Range, cols: Range) -> None:
        """Declare the nest's tensors and scalars; emit its statements for one tile.

        product: the elements of `rows` and `cols` of the product, rounded to its type; or its sums,
        where they are of that type.
        """
        nest = self.nest
        for name, param in zip(self.names(), nest.params, strict=True):
            if name is not None:
                b.tensor(name, storage(param.dtype, f"parameter {name}"), 0)
        for symbol in nest.symbols:
            b.scalar(symbol)
        layout = Plan(nest, 0, 1, (), (), serial=False, parallel=None)
        frame = Frame(b, layout, None, product.rows, product.cols)
        frame.rows, frame.cols = rows.size, cols.size
        frame.bound = {0: rows.start, 1: cols.start}
        operations = Operations(frame, [name or "" for name in self.names()])
        for number, op in enumerate(nest.body):
            if isinstance(op, Load) and op.param == self.param:
                frame.values[number] = Value(Read(product.view()), FULL)
            elif operations.needed[number]:
                operations.emit([number])


def epilogue_of(
    nest: LoopNest, param: int, rows: Expr, cols: int, keep: bool = False
) -> Epilogue | None:
    """The nest as the end of a product of rows x cols elements which its parameter `param` holds in
    row-major order; None if it cannot be one. rows: in the nest's symbols. keep: see `Epilogue`."""
    if nest.reduced:
        return None
    small = as_rows(simplify(nest), cols)
    if small is None or small.dims[0] != rows:
        return None
    here = Var(0) * cols + Var(1)
    touched: dict[int, set[Expr]] = {}
    for number, op in enumerate(small.body):
        if isinstance(op, (Indirect, Reduce)):
            return None
        if isinstance(op, (Load, Store)):
            touched.setdefault(op.param, set()).add(op.index)
        if isinstance(op, Load):
            affine = op.index.affine()
            if op.mask is not None or affine is None or affine.refs:
                return None
        if isinstance(op, Store):
            rest = op.index - here
            if op.mode != "set" or rest.vars() or rest.refs() or op.param == param:
                return None
            if small.dims_of()[number] != {0, 1}:
                return None
    stored = {op.param for op in small.body if isinstance(op, Store)}
    if touched.get(param) != {here} or any(len(touched[p]) > 1 for p in stored):
        return None
    return Epilogue(small, param, keep)


@lru_cache(maxsize=256)
def epilogue_cost(epilogue: Epilogue, dtype: DType, bias: bool = False) -> EpilogueCost:
    """What the cost model needs to know about an epilogue. dtype: of the product, to which a bias
    may have been added; sums of 32 bits without one are taken as they are, from ACC."""
    rounds = bias or dtype.bits != 32
    edge = 64
    b = KernelBuilder("epilogue")
    with b.loop("tile", 0, 2) as tile:
        memory = "sram" if rounds else "acc"
        product = b.tile(dtype, edge, edge, name="product", memory=memory)
        rows, cols = Range(tile, Int(edge), edge), Range(tile, Int(edge), edge)
        epilogue.emit(b, product, rows, cols)
    packed = pack_elementwise(b.build())
    buffers = wanted_buffers(packed)
    commands, cycles, tiles, loaded = int(rounds), int(rounds), 0, 0
    for statement in walk(packed.body):
        match statement:
            case Vector(f1=f1, f2=f2):
                commands += 1
                cycles += max(VECTOR_FUNCTIONS[FUNCTION_CODES[f]].cost for f in (f1, f2))
            case Declare(tile=tile) if tile.rows == tile.cols == edge and tile.memory == "sram":
                tiles += tile.element_bytes * min(buffers[tile], 2)
            case TileLoad(destination=v, source=source) if v.tile.rows == v.tile.cols == edge:
                loaded += packed.tensor(source.tensor).dtype.bits // 8
    nest = epilogue.nest
    stored = [nest.params[op.param].dtype for op in nest.body if isinstance(op, Store)]
    sizes = [ITEMSIZE[name] for name in stored] + [dtype.bits // 8] * epilogue.keep
    return EpilogueCost(commands, cycles, tiles, loaded, tuple(sizes))
