"""Walks through the bytes of a transfer, piece by piece, without a gap between rows or commands.

A row is cut into pieces: DRAM rows at aligned 64-byte atoms, local rows every port width from
their start. Rows of gather and scatter come from an `IndexReader`.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

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
        bits, side, limit = self.address_bits, self.side, self.limit
        within = (limit - 1).bit_length()  # bits of a place in a piece
        row_bytes, left = Signal(self.size_bits), Signal(self.size_bits)
        base, row, plane = Signal(bits), Signal(bits), Signal(bits)
        row_stride, plane_stride = Signal(bits), Signal(bits)
        rows, rows_left, planes_left = (
            Signal(COUNT_BITS, name=name) for name in ("rows", "rows_left", "planes_left")
        )
        busy, indexed = Signal(), Signal()
        # What is asked of the counters, known when they change: the row fits a piece, it is the
        # plane's last one, all planes have one row, it is the last plane.
        short, row_last, one_row, plane_last = (
            Signal(name=name) for name in ("short", "row_last", "one_row", "plane_last")
        )
        piece_end, final = Signal(), Signal()
        m.d.comb += [
            final.eq(row_last & plane_last),
            self.last.eq(self.row_end & final),
            piece_end.eq(self.active & self.step),
            self.ready.eq(~busy | (piece_end & self.last)),
        ]

        # The row that may be entered: the first one of a side, or the next one.
        fresh, by_index = Signal(), Signal()
        new_row, length = Signal(bits), Signal(self.size_bits)
        start, distance = Signal(bits), Signal(bits)
        fits = Signal()
        m.d.comb += [
            fresh.eq(~busy | (self.active & self.last)),
            by_index.eq(Mux(fresh, self.indexed, indexed)),
            start.eq(Mux(fresh, side.base, Mux(indexed, base, Mux(row_last, plane, row)))),
            distance.eq(
                Mux(by_index, self.row_offset, Mux(row_last, plane_stride, row_stride))
            ),
            new_row.eq(start + Mux(fresh & ~self.indexed, 0, distance)),
            length.eq(Mux(fresh, side.row_bytes, row_bytes)),
            fits.eq(Mux(fresh, self._fits(side.row_bytes), short)),
        ]
        first = new_row[:within] if self.aligned else C(0, 1)
        whole = Signal()  # the row is one piece
        m.d.comb += whole.eq(fits & (length[: within + 1] + first <= limit))

        enters, ends_row = Signal(), Signal()
        m.d.comb += [
            ends_row.eq(piece_end & self.row_end),
            enters.eq(
                Mux(
                    self.go, ~self.indexed | self.row_valid,
                    Mux(indexed, self.row_valid & busy & (~self.active | ends_row), ends_row)
                    & ~(piece_end & self.last),
                )
            ),
            self.row_next.eq(enters & by_index),
        ]  # fmt: skip
        rest = Signal.like(left)
        m.d.comb += rest.eq(left - (self.size if self.aligned else limit))
        with m.If(enters):
            m.d.sync += [
                self.active.eq(1), self.address.eq(new_row), row.eq(new_row),
                self.row_start.eq(1), self.row_end.eq(whole), left.eq(length),
                self.size.eq(Mux(whole, length[: within + 1], limit - first)),
            ]  # fmt: skip
        with m.Elif(self.go | ends_row):
            m.d.sync += self.active.eq(0)
        with m.Elif(piece_end):
            low = C(0, within) if self.aligned else self.address[:within]
            m.d.sync += [
                self.address.eq(Cat(low, self.address[within:] + 1)), left.eq(rest),
                self.row_start.eq(0), self.row_end.eq(self._fits(rest)),
                self.size.eq(Mux(self._fits(rest), rest[: within + 1], limit)),
            ]  # fmt: skip

        with m.If(self.go):
            m.d.sync += [
                busy.eq(1), indexed.eq(self.indexed), base.eq(side.base),
                row_bytes.eq(side.row_bytes), short.eq(self._fits(side.row_bytes)),
                plane.eq(side.base), row_stride.eq(side.row_stride),
                plane_stride.eq(side.plane_stride), rows.eq(side.rows),
                rows_left.eq(side.rows), planes_left.eq(side.planes),
                row_last.eq(side.rows == 1), one_row.eq(side.rows == 1),
                plane_last.eq(side.planes == 1),
            ]  # fmt: skip
        with m.Elif(ends_row):
            with m.If(final):
                m.d.sync += busy.eq(0)
            with m.If(row_last):
                m.d.sync += [
                    rows_left.eq(rows), row_last.eq(one_row), plane.eq(new_row),
                    planes_left.eq(planes_left - 1), plane_last.eq(planes_left == 2),
                ]  # fmt: skip
            with m.Else():
                m.d.sync += [rows_left.eq(rows_left - 1), row_last.eq(rows_left == 2)]
        return m

    def _fits(self, size: Value) -> Value:
        """Whether so many bytes fit a piece that begins at a multiple of `limit`."""
        bits = (self.limit - 1).bit_length()
        size = Value.cast(size)
        return ~(size[bits + 1 :].any() | (size[bits] & size[:bits].any()))


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
        bits = min(ceil_log2(self.chip.dram_bytes), ROW_OFFSET_BITS)  # of an address at most
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
        products = m.submodules.products = SyncFIFO(width=bits, depth=INDEX_DEPTH)
        index = Signal(signed(32))
        product = Signal(signed(bits))
        take = Signal()
        m.d.comb += [
            index.eq(self.side.data.word_select(within, 32)),
            product.eq(index[:bits] * factor[:bits]),
            take.eq((left != 0) & products.w_rdy),
            products.w_en.eq(take), products.w_data.eq(product),
            self.scanned.eq(take), self.scanned_low.eq(product[:6]),
            self.row_valid.eq(products.r_rdy), self.row_offset.eq(products.r_data.as_signed()),
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
