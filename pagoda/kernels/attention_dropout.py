"""Dropout inside attention's kernels: which weights fall away, from a seed per row and per column.

    z = (row_seed[b,h,i] + column_seed[b,s]) * 0x85EBCA6B       int32, modulo 2^32
    z = z ^ (z >> 13)                                           zeros shifted in
    dropped where z * 0xC2B2AE35 < threshold                    signed

with threshold = round(p * 2^32) - 2^31, for a probability p below 1. (The multipliers and the shift
are from MurmurHash3's finaliser.) The seeds are random numbers; the hash sees to it that sums of
seeds do not show. Nothing as large as the scores is stored: the backward pass makes the same choice
anew. A generator proper, with a draw per weight, would take some forty times the time.
"""

from __future__ import annotations

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.scalar import Scalar
from pagoda.compiler.tile_ir import Column, Read, Row, Tile, Tree, apply, splat
from pagoda.isa.numbers import DType

FIRST, SHIFT, SECOND = 0x85EBCA6B - (1 << 32), 13, 0xC2B2AE35 - (1 << 32)


class Dropout:
    """The parameters of a kernel with dropout, and the choice for a tile of weights.

    Tensors row_seeds[b,h,i] and column_seeds[b,s] (I32, the latter contiguous along s), scalars
    `threshold` and `kept_scale`, the float32 bits of 1 / (1 - p).
    """

    def __init__(self, b: KernelBuilder):
        self.b = b
        self.row_seeds = b.tensor("row_seeds", DType.I32, 3)
        self.column_seeds = b.tensor("column_seeds", DType.I32, 2, strides=(None, 4))
        self.threshold, self.kept_scale = b.scalar("threshold"), b.scalar("kept_scale")

    def load_rows(
        self, most: int, place: tuple[Scalar, Scalar, Scalar], rows: Scalar, heads: Scalar | int = 1
    ) -> Tile:
        """The seeds of `rows` rows of each of `heads` heads, from (batch, head, query) on."""
        tile = self.b.tile(DType.I32, most, 1, name="row_seeds_tile")
        window = self.row_seeds.at(*place, rows=2, planes=1)
        self.b.load(tile, window, rows, 1, heads, plane_stride=rows * tile.row_bytes)
        return tile

    def choose(
        self,
        row_seeds: Tile,
        batch: Scalar,
        first: Scalar,
        rows: Scalar,
        columns: Scalar,
        most_columns: int,
    ) -> Tile:
        """A tile that is not 0 where a weight is dropped, of columns from `first` on."""
        b = self.b
        seeds = b.tile(DType.I32, 1, most_columns, name="column_seeds_tile")
        b.load(seeds, self.column_seeds.at(batch, first), 1, columns)
        z = b.tile(DType.I32, row_seeds.rows, most_columns, name="dropped", buffers=1)
        here = Read(z.view())
        total = apply("iadd", Row(seeds.view()), Column(row_seeds.view()))
        b.elementwise(z, apply("imul", total, splat(FIRST)), rows, columns)
        b.elementwise(z, apply("xor", apply("shr", here, splat(SHIFT)), here), rows, columns)
        chosen = apply("ilt", apply("imul", here, splat(SECOND)), splat(self.threshold))
        b.elementwise(z, chosen, rows, columns)
        return z

    def scale(self) -> Tree:
        """What is kept is multiplied by this."""
        return splat(self.kept_scale, "float")


def dropout_threshold(probability: float) -> int:
    """`threshold` for a probability below 1."""
    return min(round(probability * 2**32), 2**32 - 1) - 2**31


def kept(dropped: Tile, values: Tree) -> Tree:
    """The values where nothing is dropped, 0 elsewhere."""
    return apply("select", Read(dropped.view()), splat(0.0), values)
