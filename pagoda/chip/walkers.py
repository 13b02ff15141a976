"""Walks through the bytes of a transfer, piece by piece, without a gap between rows or commands.

A row is cut into pieces: DRAM rows at aligned 64-byte atoms, local rows every port width from
their start. Rows of gather and scatter come from an `IndexReader`.
"""

from __future__ import annotations

from amaranth.hdl import C, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import DRAM_ADDRESS_BITS, Side, SideRead
from pagoda.isa.chip import Chip

COUNT_BITS = 21  # of a count of rows: they are at most 2^20
ROW_OFFSET_BITS = 33  # of a row's distance from row 0 of an indexed tensor, signed
INDEX_DEPTH = 8  # rows that an index reader is ahead of the walker


class PieceWalker(wiring.Component):
    """Walks the rows of a `Side`, `limit` bytes a piece (a power of two).

    aligned: pieces end at multiples of `limit` (atoms), else every `limit` bytes of a row; always
    at the row's end. address_bits, size_bits: what addresses and bytes of a row need at most.

    go      takes `side` (and `indexed`); allowed while `ready`. The first piece shows in the next
            cycle.
    ready   nothing is being walked, or this cycle's step takes the last piece.
    active  a piece is there: `address`, `size` bytes; `row_start`: the row's first piece,
            `row_end`: its last piece; `last`: the transfer's last.
    step    takes the piece (ignored while not active); the next one shows in the next cycle.

    With `indexed`, row r starts at side.base plus the signed `row_offset`, one for each of
    side.rows rows; `row_next` takes one when `row_valid`. Without, leave the three unconnected.
    """

    def __init__(
        self, limit: int, aligned: bool, address_bits: int = DRAM_ADDRESS_BITS,
        size_bits: int = 40,
    ):  # fmt: skip
        self.limit, self.aligned = limit, aligned
        self.address_bits, self.size_bits = address_bits, size_bits
        super().__init__({
            "go": In(1), "side": In(Side()), "indexed": In(1), "ready": Out(1),
            "row_valid": In(1), "row_offset": In(signed(ROW_OFFSET_BITS)), "row_next": Out(1),
            "active": Out(1), "address": Out(address_bits), "size": Out(range(limit + 1)),
            "row_start": Out(1), "row_end": Out(1), "last": Out(1), "step": In(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        bits, side = self.address_bits, self.side
        row_bytes, left = Signal(self.size_bits), Signal(self.size_bits)
        base, row, plane = Signal(bits), Signal(bits), Signal(bits)
        row_stride, plane_stride = Signal(bits), Signal(bits)
        rows, rows_left, planes_left = (
            Signal(COUNT_BITS, name=name) for name in ("rows", "rows_left", "planes_left")
        )
        busy, indexed = Signal(), Signal()

        most = Signal(range(self.limit + 1))
        piece_end = Signal()
        if self.aligned:
            m.d.comb += most.eq(self.limit - self.address[: (self.limit - 1).bit_length()])
        else:
            m.d.comb += most.eq(self.limit)
        m.d.comb += [
            self.row_end.eq(left <= most),
            self.size.eq(Mux(self.row_end, left, most)),
            self.last.eq(self.row_end & (rows_left == 1) & (planes_left == 1)),
            piece_end.eq(self.active & self.step),
            self.ready.eq(~busy | (piece_end & self.last)),
        ]

        # The next row, if the row that ends is not the last one.
        wanted, next_row = Signal(), Signal(bits)
        with m.If(rows_left == 1):
            m.d.comb += next_row.eq(plane + plane_stride)
        with m.Else():
            m.d.comb += next_row.eq(row + row_stride)
        m.d.comb += wanted.eq(busy & indexed & (~self.active | (piece_end & self.row_end)))

        def enter_row(address) -> list:
            return [
                self.active.eq(1), self.address.eq(address), row.eq(address),
                self.row_start.eq(1),
            ]  # fmt: skip

        with m.If(piece_end):
            m.d.sync += [
                self.address.eq(self.address + self.size), left.eq(left - self.size),
                self.row_start.eq(0),
            ]  # fmt: skip
            with m.If(self.row_end):
                m.d.sync += left.eq(row_bytes)
                m.d.sync += rows_left.eq(rows_left - 1)
                with m.If(rows_left == 1):
                    m.d.sync += [
                        rows_left.eq(rows), planes_left.eq(planes_left - 1), plane.eq(next_row),
                    ]  # fmt: skip
                with m.If(indexed):
                    m.d.sync += self.active.eq(0)
                with m.Else():
                    m.d.sync += enter_row(next_row)
                with m.If(self.last):
                    m.d.sync += [busy.eq(0), self.active.eq(0)]
        with m.If(wanted & ~(piece_end & self.last) & self.row_valid):
            m.d.comb += self.row_next.eq(1)
            m.d.sync += enter_row(base + self.row_offset)
        with m.If(self.go):
            m.d.sync += [
                busy.eq(1), indexed.eq(self.indexed), base.eq(side.base),
                row_bytes.eq(side.row_bytes), left.eq(side.row_bytes), plane.eq(side.base),
                row_stride.eq(side.row_stride), plane_stride.eq(side.plane_stride),
                rows.eq(side.rows), rows_left.eq(side.rows), planes_left.eq(side.planes),
            ]  # fmt: skip
            with m.If(~self.indexed):
                m.d.sync += enter_row(side.base)
            with m.Elif(self.row_valid):
                m.d.comb += self.row_next.eq(1)
                m.d.sync += enter_row(side.base + self.row_offset)
            with m.Else():
                m.d.sync += self.active.eq(0)
        return m


class IndexReader(wiring.Component):
    """Reads the indices of a gather or scatter and multiplies them with the rows' distance.

    early: ask for the first indices in the cycle of `start` itself (the rows are known a cycle
    sooner), else one cycle later.

    start   with `indices` (address of the first), `rows` and `stride`; these must hold to the next
            cycle unless `early`.
    row_valid, row_offset, row_next: index * stride of one row after another, at most one a cycle.
    scanned pulses when a row is worked out, with `scanned_low`, its distance modulo 64: at the
            earliest 1 cycle (early) or 2 cycles after `start`; the row is valid a cycle later.
    """

    def __init__(self, chip: Chip, early: bool):
        self.chip, self.early = chip, early
        super().__init__({
            "start": In(1), "indices": In(31), "rows": In(COUNT_BITS), "stride": In(signed(32)),
            "side": Out(SideRead(chip)),
            "row_valid": Out(1), "row_offset": Out(signed(ROW_OFFSET_BITS)), "row_next": In(1),
            "scanned": Out(1), "scanned_low": Out(6),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        group = self.chip.port_bytes // 4
        begin, rows, stride, first = self.start, self.rows, self.stride, self.indices
        if not self.early:
            begin, rows = Signal(), Signal(COUNT_BITS)
            stride, first = Signal(signed(32)), Signal(31)
            m.d.sync += begin.eq(self.start)
            with m.If(self.start):
                m.d.sync += [
                    rows.eq(self.rows), stride.eq(self.stride), first.eq(self.indices)
                ]  # fmt: skip
        left, factor, address = Signal(COUNT_BITS), Signal(signed(32)), Signal(31)
        within = Signal(range(group))  # the next index in the words that were read
        products = m.submodules.products = SyncFIFO(width=ROW_OFFSET_BITS, depth=INDEX_DEPTH)
        index = Signal(signed(32))
        product = Signal(signed(ROW_OFFSET_BITS))
        take = Signal()
        m.d.comb += [
            index.eq(self.side.data.word_select(within, 32)),
            product.eq(index * factor),
            take.eq((left != 0) & products.w_rdy),
            products.w_en.eq(take), products.w_data.eq(product),
            self.scanned.eq(take), self.scanned_low.eq(product[:6]),
            self.row_valid.eq(products.r_rdy), self.row_offset.eq(products.r_data),
            products.r_en.eq(self.row_next),
        ]  # fmt: skip
        with m.If(take):
            m.d.sync += [left.eq(left - 1), within.eq(within + 1)]
            with m.If((within == group - 1) & (left != 1)):
                m.d.comb += [self.side.enable.eq(1), self.side.address.eq(address)]
                m.d.sync += address.eq(address + C(4 * group))
        with m.If(begin):
            m.d.comb += [self.side.enable.eq(1), self.side.address.eq(first)]
            m.d.sync += [
                left.eq(rows), factor.eq(stride), within.eq(0), address.eq(first + 4 * group)
            ]  # fmt: skip
        return m
