"""What a command works on, from its fields, products and go: the first of two cycles.

`OperandSelect` is combinational, in the cycle before a go is offered (t + 3). Its `Operands` are
registered at the end of it; `description` finishes the hulls in the next one. All ten commands
share four tile units:

    a   store, scatter: address   matmul, vector: a   reduce, transpose: src   finish: state
    b   matmul, vector: b         gather, scatter: indices
    c   vector: c
    d   what is written: load, gather: address; matmul: acc; reduce: state; the others: dst
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.field_registers import BANK, BankWords, CommandFields
from pagoda.chip.interfaces import DRAM_ADDRESS_BITS, SlotTable
from pagoda.chip.product_schedule import (
    B_K,
    B_N,
    COUNT_BITS,
    COUNTS,
    MEM_PLANES,
    MEM_ROWS,
    PLANES,
    ROWS,
    TRANSPOSED,
    M,
)
from pagoda.chip.products import Extents, Products, at, clip, local_bits
from pagoda.isa.accumulation import LANES, ReduceOp
from pagoda.isa.chip import Chip
from pagoda.isa.commands import ACC_BIT, COLUMN, COMMANDS, SCALAR, TILE
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.numbers import DType

ROW_BITS = COUNT_BITS + 3  # bytes of a row of the widest elements
OFFSET_BITS = 36  # of a sum of a 32-bit offset, two 33-bit reaches and a row, signed
TWO_OPERANDS = [code for code, f in VECTOR_FUNCTIONS.items() if f.operands == 2]


class Tile(data.StructLayout):
    """A local operand, last byte = reached + row_bytes + rest. `reached`: the byte before the last
    row, but for the `rest`; all of them are large where the operand leaves every memory."""

    def __init__(self, chip: Chip):
        local = local_bits(chip)
        super().__init__({
            "valid": 1, "acc": 1, "first": local, "reached": signed(local + 4),
            "row_bytes": local + 1, "rest": local + 2, "word": 1,
        })  # fmt: skip


class Operands(data.StructLayout):
    """The registers between the two cycles.

    targeted: the `rest` of d is the product TARGET.
    in_place: of a, b, c: source and destination at once, element by element.
    has_dram: rows in DRAM. first, last: the hull's offsets, less the last row's `row_last` + 1.
    separate: what `description` needs to see that the destination's rows lie apart.
    """

    def __init__(self, chip: Chip):
        super().__init__({
            "a": Tile(chip), "b": Tile(chip), "c": Tile(chip), "d": Tile(chip), "targeted": 1,
            "in_place": 3, "d_reads": 1,
            "has_dram": 1, "dram_reads": 1, "dram_writes": 1, "transfer": 1, "indexed": 1,
            "first": signed(OFFSET_BITS), "last": signed(OFFSET_BITS), "mem_row_last": ROW_BITS,
            "falling": 1, "base": DRAM_ADDRESS_BITS, "bytes": 32, "exists": 1, "permitted": 1,
            "separate": Separate(),
        })  # fmt: skip


class Separate(data.StructLayout):
    """Two loops over rows of `row_bytes`: which run more than once, their strides, and what is
    left of each when the other's reach is taken off; planes are `inner` if their stride is no
    greater."""

    def __init__(self):
        super().__init__({
            "rows_many": 1, "planes_many": 1, "row_stride": 32, "plane_stride": 32,
            "row_less": signed(34), "plane_less": signed(34), "planes_inner": 1,
            "row_bytes": ROW_BITS,
        })  # fmt: skip


def local_shift(dtype: Value) -> Value:
    """log2 of the bytes of a local element."""
    return Cat(dtype == DType.BF16, dtype.matches(DType.F32, DType.I32))


def mem_row_bytes(count: Value, dtype: Value) -> Value:
    """Bytes of `count` elements in DRAM."""
    wide, eight_bytes = dtype.matches(DType.F32, DType.I32), dtype == DType.I64
    exponent = Cat((dtype == DType.BF16) | eight_bytes, wide | eight_bytes)
    return Mux(dtype == DType.I4, count >> 1, (count << exponent)[:ROW_BITS])


class OperandSelect(wiring.Component):
    """Combinational: a bank's `words` and `products`, and the `go` being stored."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "bank": In(4), "go": In(32), "words": In(BankWords()), "products": In(Products(chip)),
            "extents": In(Extents()), "slots": Out(SlotTable()), "operands": Out(Operands(chip)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        self._units = {name: _TileUnit(self.chip, name) for name in "abcd"}
        with m.Switch(self.bank):
            for name, select in (
                ("load", self._transfer), ("store", self._transfer), ("gather", self._transfer),
                ("scatter", self._transfer), ("matmul", self._matmul), ("vector", self._vector),
                ("reduce", self._reduce), ("finish", self._finish),
                ("transpose", self._transpose), ("iota", self._iota),
            ):  # fmt: skip
                with m.Case(BANK[name]):
                    select(m, CommandFields(COMMANDS[name], self.go, self.words))
        for name, unit in self._units.items():
            unit.finish(m, self.operands[name])
        self._place(m)
        separate = self.operands.separate
        m.d.comb += [
            separate.row_less.eq(separate.row_stride - self._inner_reach(PLANES, MEM_PLANES)),
            separate.plane_less.eq(separate.plane_stride - self._inner_reach(ROWS, MEM_ROWS)),
            separate.planes_inner.eq(separate.plane_stride <= separate.row_stride),
        ]
        return m

    def _inner_reach(self, local: int, mem: int) -> Value:
        mem_side = self.bank == BANK["store"]
        return Mux(mem_side, at(self.products, mem), at(self.products, local))

    def _place(self, m: Module) -> None:
        """The slot, and how far the rows reach to both sides of the offset. The four commands with
        a slot have the same words; gather and scatter have no such products, which stay 0."""
        out, f = self.operands, CommandFields(COMMANDS["load"], self.go, self.words)
        down, up = [], []
        for stride, place in (("mem_row_stride", MEM_ROWS), ("mem_plane_stride", MEM_PLANES)):
            negative, moved = f[stride][31], at(self.products, place)
            down.append(Mux(negative, moved, 0))
            up.append(Mux(negative, 0, moved))
        m.d.comb += [
            self.slots.slot.eq(f["slot"]),
            out.base.eq(self.slots.base), out.bytes.eq(self.slots.bytes),
            out.exists.eq(self.slots.exists),
            out.first.eq(f["offset"] - (down[0] + down[1])),
            out.last.eq(f["offset"] + (up[0] + up[1])),
        ]  # fmt: skip

    # Commands. -----------------------------------------------------------------------------------

    def _transfer(self, m: Module, f: CommandFields) -> None:
        out, name = self.operands, f.command.name
        loads, indexed = name in ("load", "gather"), name in ("gather", "scatter")
        accumulate = 0 if loads else f["accumulate"]
        reach = [at(self.products, ROWS)] + ([] if indexed else [at(self.products, PLANES)])
        tile = self._units["d" if loads else "a"]
        tile.set(m, f["address"], reach, f["cols"], local_shift(f["local"]))
        if indexed:
            self._units["b"].set(m, f["indices"], [], f["rows"], 2, word=0)
        m.d.comb += [
            out.transfer.eq(1), out.indexed.eq(indexed),
            out.dram_reads.eq(accumulate | loads), out.dram_writes.eq(not loads),
            out.permitted.eq(
                self.slots.readable if loads
                else self.slots.writable & (self.slots.readable | ~accumulate)
            ),
        ]  # fmt: skip
        extents, has_rows, cols = self.extents, 1, f["cols"][:COUNT_BITS]
        if name == "load":
            cols = extents.data_cols.as_unsigned()[:COUNT_BITS]
            has_rows = (extents.data_rows > 0) & (extents.data_cols > 0)
        row_bytes = mem_row_bytes(cols, f["mem"])
        m.d.comb += [
            out.has_dram.eq(has_rows), out.mem_row_last.eq(row_bytes - 1),
            out.falling.eq(f["mem_row_stride"][31]),
        ]
        if name == "store":
            self._separate(m, f.many("rows"), extents.row_stride, row_bytes)
            self._separate_planes(m, f, extents.plane_stride)
        elif loads:
            self._separate(m, f.many("rows"), f["row_stride"], tile.row_bytes)
            if not indexed:
                self._separate_planes(m, f, f["plane_stride"])

    def _matmul(self, m: Module, f: CommandFields) -> None:
        products, shift = self.products, Mux(f["type"][0], 0, 1)
        has_k = f.nonzero("k_inner") & f.nonzero("k_outer")
        turned_a, turned_b = f["transpose_a"], f["transpose_b"]
        straight = [Mux(turned_a, 0, at(products, p)) for p in (PLANES, MEM_ROWS, MEM_PLANES)]
        innermost = Mux(turned_a, at(products, TRANSPOSED), at(products, ROWS))
        self._units["a"].set(
            m, f["a"], [innermost, straight[0]], Mux(turned_a, f["m0"], f["k_inner"]), shift,
            rest=straight[1:], valid=has_k, word=0,
        )  # fmt: skip
        self._units["b"].set(
            m, f["b"], [Mux(turned_b, at(products, B_N), at(products, B_K))],
            Mux(turned_b, at(products, COUNTS), f["n"]), shift, valid=has_k, word=0,
        )  # fmt: skip
        self._target(m, f["acc"] | ACC_BIT, f["n"], 2)
        self._separate(m, at(products, M)[1:].any(), f["acc_stride"], self._units["d"].row_bytes)
        m.d.comb += self.operands.d_reads.eq(1)

    def _vector(self, m: Module, f: CommandFields) -> None:
        dst_shift, places = local_shift(f["dst_dtype"]), (ROWS, PLANES, MEM_ROWS)
        used = (1, f["f1"].matches(*TWO_OPERANDS), f["f2"].matches(*TWO_OPERANDS))
        for number, (name, place) in enumerate(zip("abc", places, strict=True)):
            kind, stride, shift = f[f"{name}_kind"], f[f"{name}_stride"], local_shift(
                f[f"{name}_dtype"])  # fmt: skip
            self._units[name].set(
                m, f[name], [at(self.products, place)], Mux(kind == COLUMN, 1, f["cols"]), shift,
                valid=used[number] & (kind != SCALAR),
            )  # fmt: skip
            m.d.comb += self.operands.in_place[number].eq(
                (kind == TILE) & (f[name] == f["dst"]) & (stride == f["dst_stride"])
                & (shift == dst_shift)
            )  # fmt: skip
        self._target(m, f["dst"], f["cols"], dst_shift)
        self._separate(m, f.many("rows"), f["dst_stride"], self._units["d"].row_bytes)

    def _reduce(self, m: Module, f: CommandFields) -> None:
        self._units["a"].set(
            m, f["src"], [at(self.products, ROWS)], f["cols"], local_shift(f["dtype"]),
            valid=f.nonzero("cols"),
        )  # fmt: skip
        words = Mux(f["column"], f["cols"], _state_words(f["op"]))
        self._target(m, f["state"], words, 2, flat=f["column"])
        many = f.many("rows") & ~f["column"]
        self._separate(m, many, f["state_stride"], self._units["d"].row_bytes)
        m.d.comb += self.operands.d_reads.eq(~f["first"])

    def _finish(self, m: Module, f: CommandFields) -> None:
        self._units["a"].set(
            m, f["state"], [at(self.products, ROWS)], _state_words(f["op"]), 2
        )
        self._target(m, f["dst"], 1, local_shift(f["dtype"]))
        self._separate(m, f.many("rows"), f["dst_stride"], self._units["d"].row_bytes)

    def _transpose(self, m: Module, f: CommandFields) -> None:
        shift = local_shift(f["dtype"])
        self._units["a"].set(m, f["src"], [at(self.products, ROWS)], f["cols"], shift)
        self._target(m, f["dst"], f["rows"], shift)
        self._separate(m, f.many("cols"), f["dst_stride"], self._units["d"].row_bytes)

    def _iota(self, m: Module, f: CommandFields) -> None:
        self._target(m, f["dst"], f["cols"], 2)
        self._separate(m, f.many("rows"), f["dst_stride"], self._units["d"].row_bytes)

    # Parts. --------------------------------------------------------------------------------------

    def _target(
        self, m: Module, address: Value, count: Value | int, shift: Value | int,
        flat: Value | int = 0,
    ) -> None:  # fmt: skip
        """d, whose reach is the product TARGET, or 0 if it is flat."""
        self._units["d"].set(m, address, [], count, shift)
        m.d.comb += self.operands.targeted.eq(~Value.cast(flat)[0])

    def _separate(self, m: Module, many: Value, stride: Value, row_bytes: Value) -> None:
        separate = self.operands.separate
        m.d.comb += [
            separate.rows_many.eq(many), separate.row_stride.eq(stride),
            separate.row_bytes.eq(row_bytes),
        ]  # fmt: skip

    def _separate_planes(self, m: Module, f: CommandFields, stride: Value) -> None:
        separate = self.operands.separate
        m.d.comb += [separate.planes_many.eq(f.many("planes")), separate.plane_stride.eq(stride)]


def _state_words(op: Value) -> Value:
    return Mux(op == ReduceOp.ARGMAX, 2 * LANES, LANES)


class _TileUnit:
    """The selected inputs of one tile and the sums made of them."""

    def __init__(self, chip: Chip, name: str):
        self.local = local_bits(chip)
        self.address = Signal(32, name=f"{name}_address")
        self.reach = [Signal(self.local + 1, name=f"{name}_reach{i}") for i in range(4)]
        self.count = Signal(COUNT_BITS, name=f"{name}_count")
        self.shift = Signal(2, name=f"{name}_shift")
        self.row_bytes = Signal(ROW_BITS, name=f"{name}_row_bytes")
        self.valid = Signal(name=f"{name}_valid")
        self.word = Signal(name=f"{name}_word")

    def set(
        self, m: Module, address: Value, reach: list[Value], count: Value | int,
        shift: Value | int, *, rest: list[Value] | None = None, valid: Value | int = 1,
        word: Value | int | None = None,
    ) -> None:  # fmt: skip
        """word: elements of 32 bits, which ACC may hold."""
        clipped = [clip(Value.cast(part), self.local + 1) for part in reach]
        m.d.comb += [
            self.address.eq(address), self.count.eq(count), self.shift.eq(shift),
            self.valid.eq(valid), self.word.eq(self.shift == 2 if word is None else word),
            *(target.eq(part) for target, part in zip(self.reach, clipped, strict=False)),
        ]  # fmt: skip
        for target, part in zip(self.reach[2:], rest or [], strict=False):
            m.d.comb += target.eq(clip(Value.cast(part), self.local + 1))

    def finish(self, m: Module, tile: data.View) -> None:
        first = clip(self.address[:31], self.local + 1)
        m.d.comb += [
            self.row_bytes.eq(Mux(self.shift[1], self.count << 2,
                                  Mux(self.shift[0], self.count << 1, self.count))),
            tile.valid.eq(self.valid), tile.acc.eq(self.address[31]),
            tile.first.eq(self.address[: self.local]),
            tile.reached.eq(first + self.reach[0] + self.reach[1] - 1),
            tile.rest.eq(self.reach[2] + self.reach[3]),
            tile.row_bytes.eq(clip(self.row_bytes, self.local + 1)), tile.word.eq(self.word),
        ]  # fmt: skip
