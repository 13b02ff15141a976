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


PIECES_AHEAD = 8  # of a tile or its zeros, worked out before their time comes
KINDS = (  # of elements that are wider locally
    (DType.BF16, DType.F32), (DType.F8E4M3, DType.F32), (DType.F8E4M3, DType.BF16),
    (DType.I8, DType.I32), (DType.I4, DType.I32), (DType.BOOL, DType.I32), (DType.U8, DType.I32),
    (DType.I4, DType.I8), (DType.BOOL, DType.I8), (DType.U8, DType.I8),
)  # fmt: skip


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
            "rows": _Rows(bits), "left": 18, "inner": bits + 1, "acc": 1,
            "kind": len(KINDS),  # one bit of it, or none: the elements are copied
            "wider": 2,  # log2 of how much longer the data are than in the stream
            "number": NUMBER_BITS,
        })  # fmt: skip


class _Zeros(data.StructLayout):
    """Padding rows: `rows` of each plane and then `below` more from `second` on."""

    def __init__(self, bits: int):
        super().__init__({
            "rows": _Rows(bits), "second": bits, "below": 16, "acc": 1, "number": NUMBER_BITS,
        })  # fmt: skip


class _Piece(data.StructLayout):
    """A piece of a row with data, in the order in which its parts are worked out."""

    def __init__(self, bits: int, port: int, width: int):
        super().__init__({
            "address": bits, "size": range(port + 1), "acc": 1, "kind": len(KINDS),
            "number": NUMBER_BITS,
            "row_start": 1, "inner": bits + 1, "wider": 2,
            "gap": range(port + 1),  # zeros before the data
            "free": range(port + 1),  # bytes behind those
            "count": range(port + 1),  # bytes of data
            "needed": range(port + 1),  # bytes of the stream that must have come,
            "taken": range(port + 1),  # and that the piece takes
            "half_late": 1,  # its I4 elements lie half a byte higher than they should
            "queue_left": range(width),
        })  # fmt: skip


class TileWriter(wiring.Component):
    """valid, plan   as in `DmaFront`
    level, read, read_size, read_left, read_data
                  of the `ByteQueue` of `capacity` bytes and `width` lanes that holds the stream
    """

    def __init__(self, chip: Chip, capacity: int, width: int):
        self.chip, self.width = chip, width
        self.address_bits = (max(chip.sram_bytes, chip.acc_bytes) - 1).bit_length()
        port = chip.port_bytes
        super().__init__({
            "valid": In(1), "plan": In(Plan()), "level": In(range(capacity + 1)),
            "read": Out(1), "read_size": Out(range(port + 1)),
            "read_left": Out(range(width)), "read_data": In(8 * port),
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

        takes = Signal()
        piece, piece_valid = self._pieces(m, data_walker, tile, takes)
        place = data.StructLayout({"acc": 1, "address": bits, "size": range(port + 1)})
        padding = data.StructLayout({"place": place, "number": NUMBER_BITS})
        paddings = m.submodules.paddings = SyncFIFO(width=padding.size, depth=PIECES_AHEAD)
        walked, zero = Signal(padding, name="walked_zeros"), data.View(padding, paddings.r_data)
        behind = Signal(NUMBER_BITS)  # how much older the zeros' command is than the data's
        waits = Signal()
        m.d.comb += [
            walked.place.acc.eq(zeros.acc), walked.place.address.eq(zero_walker.address),
            walked.place.size.eq(zero_walker.size), walked.number.eq(zeros.number),
            zero_walker.step.eq(paddings.w_rdy), paddings.w_en.eq(zero_walker.active),
            paddings.w_data.eq(walked), paddings.r_en.eq(~takes),
            behind.eq(piece.number - zero.number),
            waits.eq(paddings.r_rdy & (behind != 0) & ~behind[NUMBER_BITS - 1]),
            takes.eq(piece_valid & (piece.needed <= self.level) & ~waits),
            self.read.eq(takes), self.read_size.eq(piece.taken),
            self.read_left.eq(piece.queue_left),
        ]  # fmt: skip

        # The piece is converted in the next cycle and written in the one after that.
        raw, late = Signal(8 * port, reset_less=True), Signal(reset_less=True)
        kind = Signal(len(KINDS), reset_less=True)
        mask = Signal(port)
        high = Signal(range(port + 1))
        write = Signal(place, reset_less=True)
        enable = Signal()
        m.d.comb += high.eq(piece.gap + piece.count)
        m.d.sync += [
            enable.eq(takes | paddings.r_rdy),
            raw.eq(self.read_data), late.eq(piece.half_late), kind.eq(piece.kind),
            mask.eq(
                Mux(takes, Cat((piece.gap <= i) & (high > i) for i in range(port)), 0)
            ),
            write.acc.eq(Mux(takes, piece.acc, zero.place.acc)),
            write.address.eq(Mux(takes, piece.address, zero.place.address)),
            write.size.eq(Mux(takes, piece.size, zero.place.size)),
        ]
        converted = self._widen(m, raw, late, kind)
        m.d.sync += [
            self.write.enable.eq(enable), self.write.acc.eq(write.acc),
            self.write.address.eq(write.address), self.write.size.eq(write.size),
            self.write.data.eq(
                Cat(converted.word_select(i, 8) & mask[i].replicate(8) for i in range(port))
            ),
        ]  # fmt: skip
        return m

    def _arrange(self, m: Module) -> tuple[Signal, Signal, Signal, Signal]:
        """A plan's tile and zeros, and whether they are there."""
        plan, bits = self.plan, self.address_bits
        tile, zeros = Signal(_Tile(bits)), Signal(_Zeros(bits))
        local = plan.local
        has_tile, has_zeros = Signal(), Signal()
        mem_size, local_size = Signal(3), Signal(3)
        number = Signal(NUMBER_BITS)
        m.d.sync += number.eq(number + self.valid)
        m.d.comb += [
            mem_size.eq(mem_shift(plan.mem_code)),
            local_size.eq(local_shift(plan.local_code) + 1),
            has_tile.eq(self.valid & plan.atoms),
            has_zeros.eq(
                self.valid & (~plan.atoms | (plan.above != 0) | (plan.below != 0))
            ),
        ]  # fmt: skip
        for rows in (tile.rows, zeros.rows):
            m.d.comb += [
                rows.row_bytes.eq(local.row_bytes), rows.row_stride.eq(local.row_stride),
                rows.planes.eq(local.planes), rows.plane_stride.eq(local.plane_stride),
            ]  # fmt: skip
        m.d.comb += [
            tile.rows.base.eq(plan.data_base), zeros.rows.base.eq(local.base),
            zeros.second.eq(plan.below_base),
            tile.rows.rows.eq(plan.data_rows),
            zeros.rows.rows.eq(Mux(plan.atoms, plan.above, local.rows)),
            tile.left.eq(plan.left), tile.acc.eq(plan.acc), zeros.acc.eq(plan.acc),
            tile.inner.eq(Mux(plan.padded, plan.inner, local.row_bytes)),
            tile.kind.eq(
                Cat(
                    (plan.mem_code == mem) & (plan.local_code == local) for mem, local in KINDS
                )
            ),
            tile.wider.eq(Mux(local_size > mem_size, local_size - mem_size, 0)),
            tile.number.eq(number), zeros.number.eq(number),
            zeros.below.eq(Mux(plan.atoms, plan.below, 0)),
        ]  # fmt: skip
        return tile, zeros, has_tile, has_zeros

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

    def _pieces(
        self, m: Module, walker: PieceWalker, tile, takes: Value
    ) -> tuple[data.View, Value]:
        """The walker's pieces with all that depends on their order, worked out step by step while
        their bytes are on their way: the next one, and whether there is one."""
        layout = _Piece(self.address_bits, self.chip.port_bytes, self.width)
        walked = Signal(layout, name="walked")
        m.d.comb += [
            walked.address.eq(walker.address), walked.size.eq(walker.size),
            walked.acc.eq(tile.acc), walked.kind.eq(tile.kind), walked.number.eq(tile.number),
            walked.row_start.eq(walker.row_start), walked.inner.eq(tile.inner),
            walked.wider.eq(tile.wider),
        ]  # fmt: skip
        # Atoms that come in the next cycle leave no time for the first register.
        early = self.chip.dram_latency == 1
        done = m.submodules.pieces = SyncFIFO(width=layout.size, depth=PIECES_AHEAD)
        valid = [Signal(name=f"piece_{i}_valid") for i in range(2)]
        # At most two pieces are under way beside the one that starts.
        m.d.comb += walker.step.eq(done.level <= PIECES_AHEAD - 3)

        def later(number: int, piece: data.View) -> data.View:
            register = Signal(layout, name=f"piece_{number}", reset_less=True)
            m.d.sync += register.eq(piece)
            return register

        # The zeros before the data.
        kept_left, left = Signal.like(tile.left), Signal.like(tile.left)
        remains = Signal(len(left) + 1)
        padded = Signal(layout, name="padded_piece")
        m.d.comb += [
            left.eq(Mux(walker.row_start, tile.left, kept_left)),
            remains.eq(left - walker.size), padded.eq(walked),
            padded.gap.eq(Mux(remains[-1], left, walker.size)),
            padded.free.eq(Mux(remains[-1], walker.size - left[: len(walker.size)], 0)),
        ]
        with m.If(walker.active & walker.step):
            m.d.sync += kept_left.eq(Mux(remains[-1], 0, remains))
        if early:
            m.d.comb += valid[0].eq(walker.active & walker.step)
        else:
            padded = later(0, padded)
            m.d.sync += valid[0].eq(walker.active & walker.step)

        # The data.
        kept_inner, inner = Signal.like(tile.inner), Signal.like(tile.inner)
        rest = Signal(len(inner) + 1)
        counted = Signal(layout, name="counted_piece")
        m.d.comb += [
            inner.eq(Mux(padded.row_start, padded.inner, kept_inner)),
            rest.eq(inner - padded.free), counted.eq(padded),
            counted.count.eq(Mux(rest[-1], inner, padded.free)),
        ]
        with m.If(valid[0]):
            m.d.sync += kept_inner.eq(Mux(rest[-1], 0, rest))
        counted = later(1, counted)
        m.d.sync += valid[1].eq(valid[0])

        # Bytes of the stream. A piece may end with half an I4 byte, a row does not.
        port, lane = self.chip.port_bytes, Signal(range(self.width))
        half, before = Signal(), Signal(range(2 * port + 1))
        nibbles, end = Signal(range(2 * port + 1)), Signal(range(2 * port + 2))
        placed = Signal(layout, name="placed_piece")
        m.d.comb += [
            nibbles.eq((counted.count << 1) >> counted.wider),
            before.eq((counted.gap << 1) >> counted.wider),
            end.eq(nibbles + half), placed.eq(counted),
            placed.needed.eq((end + 1)[1:]), placed.taken.eq(end >> 1),
            placed.half_late.eq(before[0] ^ half),
            placed.queue_left.eq((before + 1 - half)[1:] - lane),
        ]  # fmt: skip
        with m.If(valid[1]):
            m.d.sync += [half.eq(end[0]), lane.eq(lane + placed.taken)]
        m.d.comb += [done.w_en.eq(valid[1]), done.w_data.eq(placed), done.r_en.eq(takes)]
        return data.View(layout, done.r_data), done.r_rdy

    def _widen(self, m: Module, raw: Signal, late: Signal, kind: Signal) -> Signal:
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
        wide = {
            (DType.BF16, DType.F32): bf16, (DType.F8E4M3, DType.F32): f8[:words],
            (DType.F8E4M3, DType.BF16): [lane[16:] for lane in f8],
            (DType.I8, DType.I32): i8, (DType.I4, DType.I32): i4[:words],
            (DType.BOOL, DType.I32): boolean[:words], (DType.U8, DType.I32): u8,
            (DType.I4, DType.I8): [lane[:8] for lane in i4],
            (DType.BOOL, DType.I8): [lane[:8] for lane in boolean],
            (DType.U8, DType.I8): u8_as_i8,
        }  # fmt: skip
        converted = Signal.like(raw)
        total = raw & (~kind.any()).replicate(len(raw))
        for which, pair in enumerate(KINDS):
            total = total | (Cat(wide[pair]) & kind[which].replicate(len(raw)))
        m.d.comb += converted.eq(total)
        return converted


def _side(side, rows) -> list:
    return [side[name].eq(rows[name]) for name in rows.shape().members]
