"""The second half of a load: from the stream of bytes to rows in SRAM or ACC, with padding.

    plan --> queue of tiles --> walker through rows with data --> piece, as soon as its bytes came
         '-> queue of zeros --> walker through padding rows   --> piece, when no data want the port

One piece of at most a port's width is written every cycle. A command's data go before its zeros,
so that its atoms are always taken in time; a later command's data wait for an earlier one's zeros.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from pagoda.chip.formats import decode_element
from pagoda.chip.interfaces import LocalWrite
from pagoda.chip.transfer import Plan, local_shift, mem_shift
from pagoda.chip.walkers import COUNT_BITS, PieceWalker
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType

NUMBER_BITS = 5  # of a command's number: at most 16 are in flight


class _Rows(data.StructLayout):
    """Rows of a tile: as `Side`, in the bits that a local memory needs."""

    def __init__(self, bits: int):
        super().__init__({
            "base": bits, "row_bytes": bits + 1, "rows": COUNT_BITS, "row_stride": bits,
            "planes": COUNT_BITS, "plane_stride": bits,
        })  # fmt: skip


class _Tile(data.StructLayout):
    """Rows with data: `left` bytes of zeros, `inner` bytes of data, zeros to the end."""

    def __init__(self, bits: int):
        super().__init__({
            "rows": _Rows(bits), "left": 18, "inner": bits + 1, "acc": 1, "mem": 4, "local": 4,
            "wider": 2,  # log2 of how much longer the data are than in the stream
            "number": NUMBER_BITS,
        })  # fmt: skip


class _Zeros(data.StructLayout):
    """Padding rows: `rows` of each plane and then `below` more from `second` on."""

    def __init__(self, bits: int):
        super().__init__({
            "rows": _Rows(bits), "second": bits, "below": 16, "acc": 1, "number": NUMBER_BITS,
        })  # fmt: skip


class TileWriter(wiring.Component):
    """valid, plan   as in `DmaFront`
    level, read_size, read_lane, read_data
                  of the `ByteQueue` of `capacity` bytes that holds the stream
    """

    def __init__(self, chip: Chip, capacity: int):
        self.chip = chip
        self.address_bits = (max(chip.sram_bytes, chip.acc_bytes) - 1).bit_length()
        port = chip.port_bytes
        super().__init__({
            "valid": In(1), "plan": In(Plan()), "level": In(range(capacity + 1)),
            "read_size": Out(range(port + 1)),
            "read_lane": Out(range(port)), "read_data": In(8 * port),
            "write": Out(LocalWrite(chip)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        port, bits = self.chip.port_bytes, self.address_bits
        tile, zeros, has_tile, has_zeros = self._arrange(m)
        data_walker = m.submodules.data_walker = PieceWalker(port, False, bits, bits + 1)
        zero_walker = m.submodules.zero_walker = PieceWalker(port, False, bits, bits + 1)
        tile = self._tiles(m, data_walker, tile, has_tile)
        zeros = self._zeros(m, zero_walker, zeros, has_zeros)

        gap, count, half_late, ready = self._data_piece(m, data_walker, tile)
        behind = Signal(NUMBER_BITS)  # how much older the zeros' command is than the data's
        m.d.comb += [
            behind.eq(tile.number - zeros.number),
            data_walker.step.eq(
                ready & ~(zero_walker.active & (behind != 0) & ~behind[NUMBER_BITS - 1])
            ),
            zero_walker.step.eq(~(data_walker.active & data_walker.step)),
        ]
        takes = data_walker.active & data_walker.step

        # The piece is converted in the next cycle and written in the one after that.
        raw, late = Signal(8 * port, reset_less=True), Signal(reset_less=True)
        codes = Signal(data.StructLayout({"mem": 4, "local": 4}), reset_less=True)
        low, high = (Signal(range(port + 1), name=name) for name in ("low", "high"))
        piece = Signal(
            data.StructLayout({"acc": 1, "address": bits, "size": range(port + 1)}),
            reset_less=True,
        )
        enable = Signal()
        m.d.sync += [
            enable.eq(data_walker.active & data_walker.step | zero_walker.active),
            raw.eq(self.read_data), late.eq(half_late), codes.mem.eq(tile.mem),
            codes.local.eq(tile.local), low.eq(gap), high.eq(Mux(takes, gap + count, 0)),
            piece.acc.eq(Mux(takes, tile.acc, zeros.acc)),
            piece.address.eq(Mux(takes, data_walker.address, zero_walker.address)),
            piece.size.eq(Mux(takes, data_walker.size, zero_walker.size)),
        ]
        converted = self._widen(m, raw, late, codes)
        mask = ((1 << high) - 1)[:port] & ~((1 << low) - 1)[:port]
        m.d.sync += [
            self.write.enable.eq(enable), self.write.acc.eq(piece.acc),
            self.write.address.eq(piece.address), self.write.size.eq(piece.size),
            self.write.data.eq(
                Cat(converted.word_select(i, 8) & mask[i].replicate(8) for i in range(port))
            ),
        ]  # fmt: skip
        return m

    def _arrange(self, m: Module) -> tuple[Signal, Signal, Signal, Signal]:
        """A plan's tile and zeros, and whether they are there, two cycles after it."""
        plan, bits = self.plan, self.address_bits
        tile, zeros = Signal(_Tile(bits)), Signal(_Zeros(bits))
        local, stride = plan.local, plan.local.row_stride[:bits]
        has_tile, has_zeros = Signal(2), Signal(2)
        mem_size, local_size = Signal(3), Signal(3)
        number = Signal(NUMBER_BITS)
        above, inner_rows = Signal(COUNT_BITS), Signal(COUNT_BITS)
        m.d.comb += [
            above.eq(Mux(plan.atoms, plan.above, local.rows)),
            inner_rows.eq(local.rows - plan.above - plan.below),
            mem_size.eq(mem_shift(plan.mem_code)),
            local_size.eq(local_shift(plan.local_code) + 1),
        ]
        m.d.sync += [
            has_tile.eq(Cat(self.valid & plan.atoms, has_tile)),
            has_zeros.eq(
                Cat(self.valid & (~plan.atoms | (plan.above != 0) | (plan.below != 0)), has_zeros)
            ),
            number.eq(number + self.valid),
        ]  # fmt: skip
        early_tile, early_zeros = Signal(_Tile(bits)), Signal(_Zeros(bits))
        for rows in (early_tile.rows, early_zeros.rows):
            m.d.sync += [
                rows.base.eq(local.base), rows.row_bytes.eq(local.row_bytes),
                rows.row_stride.eq(stride), rows.planes.eq(local.planes),
                rows.plane_stride.eq(local.plane_stride),
            ]  # fmt: skip
        m.d.sync += [
            early_tile.rows.rows.eq(inner_rows), early_zeros.rows.rows.eq(above),
            early_tile.left.eq(plan.left), early_tile.acc.eq(plan.acc),
            early_tile.inner.eq(Mux(plan.padded, plan.inner, local.row_bytes)),
            early_tile.mem.eq(plan.mem_code), early_tile.local.eq(plan.local_code),
            early_tile.wider.eq(Mux(local_size > mem_size, local_size - mem_size, 0)),
            early_tile.number.eq(number), early_zeros.number.eq(number),
            early_zeros.below.eq(Mux(plan.atoms, plan.below, 0)), early_zeros.acc.eq(plan.acc),
        ]  # fmt: skip
        first, second = Signal(bits), Signal(bits)
        both = Signal(COUNT_BITS)
        m.d.sync += both.eq(plan.above + inner_rows)
        m.d.comb += [
            first.eq(early_zeros.rows.rows * early_tile.rows.row_stride),
            second.eq(both * early_tile.rows.row_stride),
        ]
        m.d.sync += [
            tile.eq(early_tile), tile.rows.base.eq(early_tile.rows.base + first),
            zeros.eq(early_zeros), zeros.second.eq(early_zeros.rows.base + second),
        ]
        return tile, zeros, has_tile[1], has_zeros[1]

    def _tiles(self, m: Module, walker: PieceWalker, tile: Signal, valid: Value):
        """Lead the walker from tile to tile; the one it is in."""
        layout = tile.shape()
        queue = m.submodules.tiles = SyncFIFO(width=layout.size, depth=self.chip.window)
        head, now = data.View(layout, queue.r_data), Signal(layout, name="tile_now")
        m.d.comb += [
            queue.w_en.eq(valid), queue.w_data.eq(tile), queue.r_en.eq(walker.go),
            walker.go.eq(queue.r_rdy & walker.ready),
        ]
        m.d.comb += _side(walker.side, head.rows)
        with m.If(walker.go):
            m.d.sync += now.eq(head)
        return now

    def _zeros(self, m: Module, walker: PieceWalker, zeros: Signal, valid: Value):
        """Lead the walker through the rows above, then those below; the command it is in."""
        layout = zeros.shape()
        queue = m.submodules.zeros = SyncFIFO(width=layout.size, depth=self.chip.window)
        head, now = data.View(layout, queue.r_data), Signal(layout, name="zeros_now")
        above_done, above = Signal(), Signal()
        m.d.comb += [
            queue.w_en.eq(valid), queue.w_data.eq(zeros),
            walker.go.eq(queue.r_rdy & walker.ready),
            above.eq(~above_done & (head.rows.rows != 0)),
            queue.r_en.eq(walker.go & (~above | (head.below == 0))),
        ]
        m.d.comb += _side(walker.side, head.rows)
        with m.If(~above):
            m.d.comb += [walker.side.base.eq(head.second), walker.side.rows.eq(head.below)]
        with m.If(walker.go):
            m.d.sync += [now.eq(head), above_done.eq(~queue.r_en)]
        return now

    def _data_piece(self, m: Module, walker: PieceWalker, tile) -> tuple[Signal, ...]:
        """Of the data walker's piece: zeros before the data, bytes of data, whether I4 elements
        lie half a byte higher than they should, and whether the data have come."""
        port = self.chip.port_bytes
        kept_left, kept_inner = Signal.like(tile.left), Signal.like(tile.inner)
        left, inner = Signal.like(tile.left), Signal.like(tile.inner)
        gap, count, free = (Signal(range(port + 1), name=name) for name in ("gap", "count", "free"))
        m.d.comb += [
            left.eq(Mux(walker.row_start, tile.left, kept_left)),
            inner.eq(Mux(walker.row_start, tile.inner, kept_inner)),
            gap.eq(Mux(left < walker.size, left, walker.size)),
            free.eq(walker.size - gap), count.eq(Mux(inner < free, inner, free)),
        ]
        # In half bytes of the stream. A piece may end with half an I4 byte, a row does not.
        half = Signal()
        nibbles, before = Signal(range(2 * port + 1)), Signal(range(2 * port + 1))
        end, half_late, ready = Signal(range(2 * port + 2)), Signal(), Signal()
        m.d.comb += [
            nibbles.eq((count << 1) >> tile.wider), before.eq((gap << 1) >> tile.wider),
            end.eq(nibbles + half), ready.eq((end + 1)[1:] <= self.level),
            self.read_lane.eq((before + 1 - half)[1:]), half_late.eq(before[0] ^ half),
        ]
        with m.If(walker.active & walker.step):
            m.d.comb += self.read_size.eq(end >> 1)
            m.d.sync += [
                kept_left.eq(left - gap), kept_inner.eq(inner - count), half.eq(end[0]),
            ]  # fmt: skip
        return gap, count, half_late, ready

    def _widen(self, m: Module, raw: Signal, late: Signal, codes) -> Signal:
        """A piece's bytes of the stream as local elements."""
        words = self.chip.port_bytes // 4
        byte = [raw.word_select(i, 8) for i in range(4 * words)]
        nibble = Mux(late, raw >> 4, raw)

        def lanes(dtype: DType, elements: list[Value]) -> list[Value]:
            name = dtype.name.lower()
            return [
                decode_element(m, element, C(int(dtype), 4), f"{name}_{i}", (dtype,))[0]
                for i, element in enumerate(elements)
            ]

        f8 = lanes(DType.F8E4M3, byte[: 2 * words])
        bf16 = lanes(DType.BF16, [raw.word_select(i, 16) for i in range(words)])
        i8 = lanes(DType.I8, byte[:words])
        i4 = lanes(DType.I4, [nibble.word_select(i, 4) for i in range(4 * words)])
        boolean = lanes(DType.BOOL, byte)
        # What a local format holds exactly are its lane's own bits; only U8 may have to saturate.
        u8_as_i8 = [Mux(value[7], C(0x7F, 8), value) for value in byte]
        u8 = lanes(DType.U8, byte[:words])
        converted = Signal.like(raw)
        m.d.comb += converted.eq(raw)
        with m.Switch(Cat(codes.mem, codes.local)):
            for mem, local, value in (
                (DType.BF16, DType.F32, Cat(bf16)),
                (DType.F8E4M3, DType.F32, Cat(f8[:words])),
                (DType.F8E4M3, DType.BF16, Cat(lane[16:] for lane in f8)),
                (DType.I8, DType.I32, Cat(i8)),
                (DType.I4, DType.I32, Cat(i4[:words])),
                (DType.BOOL, DType.I32, Cat(boolean[:words])),
                (DType.U8, DType.I32, Cat(u8)),
                (DType.I4, DType.I8, Cat(lane[:8] for lane in i4)),
                (DType.BOOL, DType.I8, Cat(lane[:8] for lane in boolean)),
                (DType.U8, DType.I8, Cat(u8_as_i8)),
            ):
                with m.Case(int(mem) | int(local) << 4):
                    m.d.comb += converted.eq(value)
        return converted


def _side(side, rows) -> list:
    return [side[name].eq(rows[name]) for name in rows.shape().members]
