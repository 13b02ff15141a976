"""Which bytes a command touches: its tiles in SRAM and ACC, its rows in DRAM.

`access` describes a command whose codes are legal and whose extents are not zero. Bounds checks,
hazards, bank ports, DRAM atoms and the meanings all read this one description. Ranges are *hulls*:
from the first byte to the last, gaps included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagoda.isa.accumulation import ReduceOp
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.commands import ACC_BIT, COLUMN, SCALAR, TILE
from pagoda.isa.functions import vector_operands
from pagoda.isa.numbers import DType

SRAM, ACC, DRAM = 0, 1, 2
SPACES = ("SRAM", "ACC", "DRAM")

Fields = Mapping[str, int]
Loops = tuple[tuple[int, int], ...]  # (count, stride in bytes), outermost first


class Range(NamedTuple):
    """Bytes `first` to `last`, both included, of SRAM, ACC or DRAM (a physical address)."""

    space: int
    first: int
    last: int

    def overlaps(self, other: Range) -> bool:
        return self.space == other.space and self.first <= other.last and other.first <= self.last


def element_bytes(dtype: DType) -> int:
    """What addresses and strides must be multiples of: an element's bytes, 1 for I4."""
    return max(dtype.bits // 8, 1)


def starts(loops: Loops) -> NDArray[np.int64]:
    """Byte distance of every row from the first one, in loop order: (product of counts,)."""
    total = np.zeros(1, np.int64)
    for count, stride in loops:
        total = (total[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return total


def loop_count(loops: Loops) -> int:
    """How many rows the loops place."""
    return math.prod(count for count, _ in loops)


def merge(loops: Loops, row_bytes: int) -> tuple[Loops, int]:
    """The same bytes as fewer, longer rows, and their length.

    From the inside out, a loop disappears into the row when its stride equals the row's length or
    it runs once; the first loop that does neither ends the merging.
    """
    remaining = list(loops)
    while remaining and (remaining[-1][0] == 1 or remaining[-1][1] == row_bytes):
        row_bytes *= remaining.pop()[0]
    return tuple(remaining), row_bytes


@dataclass(frozen=True)
class Tile:
    """A local operand: rows of `cols` elements, the rows placed by `loops`.

    in_place_stride: the row stride of an operand that may be source and destination at once.
    """

    name: str
    address: int  # as in the command: bit 31 set for ACC
    dtype: DType
    loops: Loops
    cols: int
    reads: bool = False
    writes: bool = False
    in_place_stride: int | None = None

    @property
    def space(self) -> int:
        return ACC if self.address & ACC_BIT else SRAM

    @property
    def row_bytes(self) -> int:
        return self.cols * self.dtype.bits // 8

    @property
    def hull(self) -> Range:
        first = self.address & ~ACC_BIT
        reach = sum((count - 1) * stride for count, stride in self.loops)
        return Range(self.space, first, first + reach + self.row_bytes - 1)

    def byte_index(self) -> NDArray[np.int64]:
        """Where each byte is in its memory: (rows, row_bytes)."""
        rows = (self.address & ~ACC_BIT) + starts(self.loops)
        return rows[:, None] + np.arange(self.row_bytes)


@dataclass(frozen=True)
class DramRows:
    """Rows in a slot: at `loops` from `offset` or, indexed, at `indices` * `stride` from it."""

    slot: int
    offset: int
    dtype: DType
    loops: Loops
    cols: int
    reads: bool
    writes: bool
    indices: tuple[int, ...] | None = None
    stride: int = 0

    @property
    def row_bytes(self) -> int:
        return self.cols * self.dtype.bits // 8

    def row_starts(self) -> NDArray[np.int64]:
        """Slot offset of every row's first byte, in transfer order."""
        if self.indices is not None:
            return self.offset + np.array(self.indices, np.int64) * self.stride
        return self.offset + starts(self.loops)

    def hull(self) -> tuple[int, int]:
        """First and last byte as offsets in the slot; the first may be negative."""
        if self.indices is not None:
            rows = self.row_starts()
            return int(rows.min()), int(rows.max()) + self.row_bytes - 1
        reaches = [(count - 1) * stride for count, stride in self.loops]
        first = self.offset + sum(min(reach, 0) for reach in reaches)
        last = self.offset + sum(max(reach, 0) for reach in reaches) + self.row_bytes - 1
        return first, last

    def rows(self) -> int:
        """Rows after merging."""
        if self.indices is not None:
            return len(self.indices)
        return loop_count(merge(self.loops, self.row_bytes)[0])

    def atoms(self) -> int:
        """Aligned 64-byte atoms touched, row by row after merging; indexed rows never merge.

        A slot's base is a multiple of 64, so offsets and physical addresses agree.
        """
        if self.indices is not None:
            first, row_bytes = self.row_starts(), self.row_bytes
        else:
            loops, row_bytes = merge(self.loops, self.row_bytes)
            first = self.offset + starts(loops)
        last = first + row_bytes - 1
        return int(np.sum(last // DRAM_ATOM_BYTES - first // DRAM_ATOM_BYTES + 1))


@dataclass(frozen=True)
class Access:
    """Everything a command touches. `alignment`: field -> what its value must be a multiple of.

    `indices` is the index tile of a gather or scatter: a range that is read, but which holds no
    bank port, for indices are read beside the ports.
    """

    command: str
    fields: Fields
    tiles: tuple[Tile, ...]
    alignment: Mapping[str, int] = field(default_factory=dict)
    dram: DramRows | None = None
    indices: Tile | None = None

    def tile(self, name: str) -> Tile:
        return next(tile for tile in self.tiles if tile.name == name)

    def ranges(self, slot_base: int = 0) -> tuple[list[Range], list[Range]]:
        """The hulls read and the hulls written; slot_base: physical address of the slot."""
        reads = [tile.hull for tile in self.tiles if tile.reads]
        writes = [tile.hull for tile in self.tiles if tile.writes]
        if self.indices is not None:
            reads.append(self.indices.hull)
        if self.dram is not None:
            first, last = self.dram.hull()
            hull = Range(DRAM, slot_base + first, slot_base + last)
            reads += [hull] * self.dram.reads
            writes += [hull] * self.dram.writes
        return reads, writes

    def ports(self, chip: Chip) -> tuple[int, int]:
        """Bank read ports and bank write ports held: bit k is SRAM bank k, then the ACC banks."""
        read = write = 0
        for tile in self.tiles:
            read |= bank_mask(chip, tile.hull) * tile.reads
            write |= bank_mask(chip, tile.hull) * tile.writes
        return read, write


def bank_mask(chip: Chip, hull: Range) -> int:
    """One bit per bank from the hull's first byte to its last; ACC banks follow SRAM's."""
    memory, shift = ("sram", 0) if hull.space == SRAM else ("acc", chip.sram_banks)
    bank_bytes = chip.bank_bytes(memory)
    first, last = hull.first // bank_bytes, hull.last // bank_bytes
    return ((1 << last - first + 1) - 1) << first + shift


def is_empty(command: str, f: Fields) -> bool:
    """True when a count of 0 leaves the command nothing to do."""
    if command == "matmul":
        return 0 in (f["m0"], f["m1"], f["m2"], f["n"])
    if command == "reduce":
        starts_state = f["first"] and not f["column"]
        return f["rows"] == 0 or (f["cols"] == 0 and not starts_state)
    return any(f.get(name) == 0 for name in ("rows", "cols", "planes"))


def access(command: str, f: Fields) -> Access:
    """What a command with these fields touches. Its codes are legal and it is not empty."""
    return _DESCRIBE[command](command, f)


def _load(command: str, f: Fields) -> Access:
    tile = _local_3d(f, writes=True)
    rows = f["rows"] - f["pad_above"] - f["pad_below"]
    cols = f["cols"] - f["pad_left"] - f["pad_right"]
    dram = None if rows <= 0 or cols <= 0 else _dram_3d(f, rows, cols, reads=True, writes=False)
    return Access(command, f, (tile,), _transfer_alignment(f), dram)


def _store(command: str, f: Fields) -> Access:
    dram = _dram_3d(f, f["rows"], f["cols"], reads=bool(f["accumulate"]), writes=True)
    return Access(command, f, (_local_3d(f, reads=True),), _transfer_alignment(f), dram)


def _local_3d(f: Fields, **use: bool) -> Tile:
    loops = ((f["planes"], f["plane_stride"]), (f["rows"], f["row_stride"]))
    return Tile("address", f["address"], DType(f["local"]), loops, f["cols"], **use)


def _dram_3d(f: Fields, rows: int, cols: int, **use: bool) -> DramRows:
    loops = ((f["planes"], f["mem_plane_stride"]), (rows, f["mem_row_stride"]))
    return DramRows(f["slot"], f["offset"], DType(f["mem"]), loops, cols, **use)


def _transfer_alignment(f: Fields) -> dict[str, int]:
    local, mem = element_bytes(DType(f["local"])), element_bytes(DType(f["mem"]))
    units = {"address": local, "row_stride": local, "plane_stride": local, "indices": 4}
    units |= {"offset": mem, "mem_row_stride": mem, "mem_plane_stride": mem}
    return {name: unit for name, unit in units.items() if name in f}


def _indexed(command: str, f: Fields) -> Access:
    loops = ((f["rows"], f["row_stride"]),)
    gathers = command == "gather"
    use = {"writes": True} if gathers else {"reads": True}
    tile = Tile("address", f["address"], DType(f["local"]), loops, f["cols"], **use)
    dram = DramRows(
        f["slot"], f["offset"], DType(f["mem"]), (), f["cols"],
        reads=gathers or bool(f["accumulate"]), writes=not gathers, indices=(),
        stride=f["mem_row_stride"],
    )  # fmt: skip
    indices = Tile("indices", f["indices"], DType.I32, (), f["rows"])
    return Access(command, f, (tile,), _transfer_alignment(f), dram, indices)


def _matmul(command: str, f: Fields) -> Access:
    operand, result = (DType.I8, DType.I32) if f["type"] else (DType.BF16, DType.F32)
    m, k = f["m0"] * f["m1"] * f["m2"], f["k_outer"] * f["k_inner"]
    if f["transpose_a"]:
        a_loops, a_cols = ((f["k_inner"], f["m0_stride"]),), f["m0"]
    else:
        rows = ((f["m2"], f["m2_stride"]), (f["m1"], f["m1_stride"]), (f["m0"], f["m0_stride"]))
        a_loops, a_cols = (*rows, (f["k_outer"], f["k_outer_stride"])), f["k_inner"]
    b_rows, b_cols = (f["n"], k) if f["transpose_b"] else (k, f["n"])
    tiles = [
        Tile("a", f["a"], operand, a_loops, a_cols, reads=True),
        Tile("b", f["b"], operand, ((b_rows, f["b_stride"]),), b_cols, reads=True),
    ]
    # Partial sums go through ACC between passes, so it is read whether or not old values count.
    acc = Tile(
        "acc", f["acc"] | ACC_BIT, result, ((m, f["acc_stride"]),), f["n"], reads=True, writes=True
    )
    unit = element_bytes(operand)
    names = ("a", "m0_stride", "m1_stride", "m2_stride", "k_outer_stride", "b", "b_stride")
    alignment = dict.fromkeys(names, unit) | {"acc": 4, "acc_stride": 4}
    return Access(command, f, (*(tiles if k else ()), acc), alignment)


def _vector(command: str, f: Fields) -> Access:
    tiles, alignment = [], {}
    for name in vector_operands(f["f1"], f["f2"]):
        kind, dtype = f[f"{name}_kind"], DType(f[f"{name}_dtype"])
        if kind == SCALAR:
            continue
        stride = f[f"{name}_stride"]
        cols = 1 if kind == COLUMN else f["cols"]
        in_place = stride if kind == TILE else None
        tiles.append(
            Tile(name, f[name], dtype, ((f["rows"], stride),), cols, True, False, in_place)
        )
        alignment |= {name: element_bytes(dtype), f"{name}_stride": element_bytes(dtype)}
    dtype, stride = DType(f["dst_dtype"]), f["dst_stride"]
    tiles.append(
        Tile("dst", f["dst"], dtype, ((f["rows"], stride),), f["cols"], False, True, stride)
    )
    alignment |= {"dst": element_bytes(dtype), "dst_stride": element_bytes(dtype)}
    return Access(command, f, tuple(tiles), alignment)


def _reduce(command: str, f: Fields) -> Access:
    dtype, op = DType(f["dtype"]), ReduceOp(f["op"])
    word = DType.I32 if op in (ReduceOp.ISUM, ReduceOp.IMAX) else DType.F32
    if f["column"]:
        loops, words = (), f["cols"]
    else:
        loops, words = ((f["rows"], f["state_stride"]),), op.state_words
    state = Tile("state", f["state"], word, loops, words, reads=not f["first"], writes=True)
    source = Tile("src", f["src"], dtype, ((f["rows"], f["src_stride"]),), f["cols"], reads=True)
    unit = element_bytes(dtype)
    alignment = {"src": unit, "src_stride": unit, "state": 4, "state_stride": 4}
    return Access(command, f, (source, state) if f["cols"] else (state,), alignment)


def _finish(command: str, f: Fields) -> Access:
    op, dtype = ReduceOp(f["op"]), DType(f["dtype"])
    word = DType.I32 if op in (ReduceOp.ISUM, ReduceOp.IMAX) else DType.F32
    rows = f["rows"]
    state = Tile(
        "state", f["state"], word, ((rows, f["state_stride"]),), op.state_words, reads=True
    )
    dst = Tile("dst", f["dst"], dtype, ((rows, f["dst_stride"]),), 1, writes=True)
    unit = element_bytes(dtype)
    alignment = {"state": 4, "state_stride": 4, "dst": unit, "dst_stride": unit}
    return Access(command, f, (state, dst), alignment)


def _transpose(command: str, f: Fields) -> Access:
    dtype = DType(f["dtype"])
    source = Tile("src", f["src"], dtype, ((f["rows"], f["src_stride"]),), f["cols"], reads=True)
    dst = Tile("dst", f["dst"], dtype, ((f["cols"], f["dst_stride"]),), f["rows"], writes=True)
    alignment = dict.fromkeys(("src", "src_stride", "dst", "dst_stride"), element_bytes(dtype))
    return Access(command, f, (source, dst), alignment)


def _iota(command: str, f: Fields) -> Access:
    dst = Tile("dst", f["dst"], DType.I32, ((f["rows"], f["dst_stride"]),), f["cols"], writes=True)
    return Access(command, f, (dst,), {"dst": 4, "dst_stride": 4})


_DESCRIBE = {
    "load": _load,
    "store": _store,
    "gather": _indexed,
    "scatter": _indexed,
    "matmul": _matmul,
    "vector": _vector,
    "reduce": _reduce,
    "finish": _finish,
    "transpose": _transpose,
    "iota": _iota,
}


def operands_per_bank(chip: Chip, sources: Sequence[Tile]) -> int:
    """The largest number of these operands whose hulls touch one and the same bank."""
    masks = [bank_mask(chip, tile.hull) for tile in sources]
    banks = chip.sram_banks + chip.acc_banks
    return max((sum(mask >> bank & 1 for mask in masks) for bank in range(banks)), default=0)
