"""The first half of a load: from a plan to requests, and from DRAM's atoms to a stream of bytes.

    walker --> DRAM --> atoms that arrived --> pieces of `piece_bytes` --> narrowed --> data

Elements that are narrower locally are converted here, so that the stream is no longer than the
tile; those that are wider locally travel as they are. A piece is taken every cycle, which keeps up
with the slots. Requests wait when the atoms under way and not yet taken would not fit.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from pagoda.chip.formats import BF16_NAN
from pagoda.chip.interfaces import ATOM_BITS, DramPort, Side, dram_slot_ratio
from pagoda.chip.launch_signals import Overflow
from pagoda.chip.transfer import Plan, local_shift, mem_shift
from pagoda.chip.walkers import ROW_OFFSET_BITS, PieceWalker
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.numbers import DType

ATOM_REGISTERS = 12  # cycles beside the latency from an atom's slot until it is taken, or more


def piece_bytes(chip: Chip) -> int:
    """A power of two, at least what DRAM gives in a cycle; and a bank port's width, so that an
    atom that comes late for one word is late for that one only."""
    dram = 1 << ceil_log2(-(-chip.dram_share.numerator // chip.dram_share.denominator))
    return min(max(dram, chip.port_bytes), DRAM_ATOM_BYTES)


def atoms_under_way(chip: Chip) -> int:
    """So many that a slot is never missed: an atom is taken within the latency and some cycles of
    the time that the contract gives it, and the slots are X cycles apart."""
    numerator, denominator = dram_slot_ratio(chip)
    return -(-(chip.dram_latency + ATOM_REGISTERS) * denominator // numerator) + 3


class _Command(data.StructLayout):
    """What becomes of an atom's elements; at most one of the conversions, none of them copies."""

    def __init__(self):
        super().__init__({
            "to_bf16": 1, "to_i8": 1, "saturated": 1,  # int64 as int32
            "long": 1,  # elements are int64
            "narrower": 2,  # log2 of how much shorter the stream is than the atom
            "pc": 32, "index": 32,
        })  # fmt: skip


class AtomStream(wiring.Component):
    """valid, plan, late_slot, row_valid, row_offset, row_next
                  as in `DmaFront`
    room          two pieces would still find place behind `size`
    size, data    bytes of the stream
    left          lanes that `data` have to move up in a `ByteQueue` of `width` lanes
    launch        clears `overflow`
    """

    def __init__(self, chip: Chip, width: int):
        self.chip, self.piece_bytes, self.width = chip, piece_bytes(chip), width
        super().__init__({
            "valid": In(1), "plan": In(Plan()), "late_slot": In(1), "row_valid": In(1),
            "row_offset": In(signed(ROW_OFFSET_BITS)), "row_next": Out(1),
            "dram": Out(DramPort()), "room": In(1), "size": Out(range(self.piece_bytes + 1)),
            "data": Out(8 * self.piece_bytes), "left": Out(range(width)),
            "launch": In(1), "overflow": Out(Overflow()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        size, bits = self.piece_bytes, (self.piece_bytes - 1).bit_length()
        walker = self._walk(m)
        # Where an atom's bytes begin and end, as piece and byte in it.
        place_bits = 6 - bits
        place = data.StructLayout({
            "first": place_bits, "low": bits, "end": place_bits, "high": bits, "last": 1,
        })  # fmt: skip
        places = SyncFIFO(width=place.size, depth=atoms_under_way(self.chip))
        atoms = SyncFIFO(width=ATOM_BITS, depth=places.depth)
        commands = SyncFIFO(width=_Command().size, depth=self.chip.window)
        m.submodules.places, m.submodules.atoms, m.submodules.commands = places, atoms, commands

        last_byte = Signal(6)
        m.d.comb += [
            walker.step.eq(self.late_slot & places.w_rdy),
            self.dram.read.eq(walker.active & walker.step),
            self.dram.read_address.eq(walker.address & -DRAM_ATOM_BYTES),
            last_byte.eq(walker.address[:6] + walker.size - 1),
            places.w_en.eq(self.dram.read),
            places.w_data.eq(
                Cat(walker.address[bits:6], walker.address[:bits], last_byte[bits:],
                    last_byte[:bits], walker.last)
            ),
            commands.w_en.eq(self.valid & self.plan.atoms),
            commands.w_data.eq(self._entering(m)),
        ]  # fmt: skip

        # Take the next piece of the oldest atom, which may just arrive.
        atom, command = data.View(place, places.r_data), data.View(_Command(), commands.r_data)
        begun, number, next_number = Signal(), Signal(place_bits), Signal(place_bits)
        take, atom_ends, taken = Signal(), Signal(), Signal()
        low, count = Signal(bits), Signal(range(size + 1))
        m.d.comb += [
            take.eq((atoms.r_rdy | self.dram.valid) & self.room),
            number.eq(Mux(begun, next_number, atom.first)),
            atom_ends.eq(number == atom.end),
            low.eq(Mux(begun, 0, atom.low)),
            count.eq(Mux(atom_ends, atom.high, size - 1) - low + 1),
            taken.eq(take & atom_ends), atoms.r_en.eq(taken),
            atoms.w_en.eq(self.dram.valid & (atoms.r_rdy | ~taken)),
            atoms.w_data.eq(self.dram.data),
            places.r_en.eq(taken), commands.r_en.eq(taken & atom.last),
        ]  # fmt: skip
        with m.If(take):
            m.d.sync += [begun.eq(~atom_ends), next_number.eq(number + 1)]
        chosen = Signal(8 * size)
        m.d.comb += chosen.eq(
            Mux(
                atoms.r_rdy, atoms.r_data.word_select(number, 8 * size),
                self.dram.data.word_select(number, 8 * size),
            )
        )  # fmt: skip

        # Its bytes go into the queue in the next cycle, right behind those of the piece before.
        taken_size = Signal(range(size + 1))
        lane = Signal(range(self.width))  # of the first byte behind what was taken
        now = Signal(_Command(), reset_less=True)
        m.d.sync += [
            taken_size.eq(Mux(take, count >> command.narrower, 0)),
            self.left.eq(lane + taken_size - (low >> command.narrower)),
            lane.eq(lane + taken_size), now.eq(command),
        ]
        m.d.comb += self.size.eq(taken_size)
        lost = self._narrow(m, chosen, low, count, now)
        overflowed = Signal()
        pc, index = Signal(32, reset_less=True), Signal(32, reset_less=True)
        m.d.sync += [
            overflowed.eq(lost & (taken_size != 0)), pc.eq(now.pc), index.eq(now.index)
        ]  # fmt: skip
        with m.If(self.launch):
            m.d.sync += self.overflow.valid.eq(0)
        with m.Elif(overflowed & ~self.overflow.valid):
            m.d.sync += [
                self.overflow.valid.eq(1), self.overflow.pc.eq(pc),
                self.overflow.command.eq(index),
            ]  # fmt: skip
        return m

    def _entering(self, m: Module) -> Signal:
        """The command of a plan."""
        command, plan = Signal(_Command()), self.plan
        mem, local, narrows = Signal(3), Signal(3), Signal()
        m.d.comb += [
            mem.eq(mem_shift(plan.mem_code)), local.eq(local_shift(plan.local_code) + 1),
            narrows.eq(mem > local), command.narrower.eq(Mux(narrows, mem - local, 0)),
            command.long.eq(plan.mem_code == DType.I64),
            command.to_bf16.eq(narrows & (plan.local_code == DType.BF16)),
            command.to_i8.eq(narrows & (plan.local_code == DType.I8)),
            command.saturated.eq(narrows & (plan.local_code == DType.I32)),
            command.pc.eq(plan.pc), command.index.eq(plan.index),
        ]  # fmt: skip
        return command

    def _walk(self, m: Module) -> PieceWalker:
        """The walker through the plans' atoms. The one before is through when a plan comes: its
        slots are over. Should it ever be late, one plan waits."""
        chip = self.chip
        walker = m.submodules.walker = PieceWalker(
            DRAM_ATOM_BYTES, True, ceil_log2(chip.dram_bytes),
            max(chip.sram_bytes, chip.acc_bytes).bit_length() + 3,
        )
        what = data.StructLayout({"side": Side(), "indexed": 1})
        arriving, kept, shown = Signal(what), Signal(what), Signal(what)
        arrives, waits = Signal(), Signal()
        m.d.comb += [
            arriving.side.eq(self.plan.mem), arriving.indexed.eq(self.plan.indexed),
            arrives.eq(self.valid & self.plan.atoms),
            shown.eq(Mux(waits, kept, arriving)),
            walker.go.eq(walker.ready & (waits | arrives)),
            walker.side.eq(shown.side), walker.indexed.eq(shown.indexed),
            walker.row_valid.eq(self.row_valid), walker.row_offset.eq(self.row_offset),
            self.row_next.eq(walker.row_next),
        ]  # fmt: skip
        with m.If(arrives):
            m.d.sync += [kept.eq(arriving), waits.eq(waits | ~walker.go)]
        with m.Elif(walker.go):
            m.d.sync += waits.eq(0)
        return walker

    def _narrow(self, m: Module, chosen: Signal, low: Signal, count: Signal, command) -> Value:
        """Drives `data`, one cycle after a piece was chosen; whether an int64 of it did not fit.

        What has to be known of the elements is found out in the first cycle: float32 rounded to
        BF16 and which ones are NaN, and which integers fit.
        """
        words, longs = self.piece_bytes // 4, self.piece_bytes // 8
        piece = Signal.like(chosen, reset_less=True)
        m.d.sync += piece.eq(chosen)

        def known(name: str, value: Value) -> Signal:
            register = Signal.like(value, name=name, reset_less=True)
            m.d.sync += register.eq(value)
            return register

        halves, byte_fits = [], []
        for i in range(words):
            lane = chosen.word_select(i, 32)
            up = lane[15] & (lane[:15].any() | lane[16])
            rounded = known(f"rounded_{i}", Mux(up, (lane[16:] + 1)[:16], lane[16:]))
            is_nan = known(f"nan_{i}", lane[23:31].all() & lane[:23].any())
            halves.append(Mux(is_nan, C(BF16_NAN, 16), rounded))
            byte_fits.append(known(f"byte_fits_{i}", lane[7:31] == lane[31].replicate(24)))
        word_fits, lost = [], []
        end = Signal(range(self.piece_bytes + 1))
        m.d.comb += end.eq(low + count)
        for i in range(longs):
            long = chosen.word_select(i, 64)
            word_fits.append(known(f"word_fits_{i}", long[31:63] == long[63].replicate(32)))
            inside = known(f"inside_{i}", (low <= 8 * i) & (end > 8 * i))
            lost.append(inside & ~word_fits[i])

        def saturated(fits: Value, low_bits: Value, sign: Value) -> Value:
            return Mux(fits, low_bits, Cat((~sign).replicate(len(low_bits) - 1), sign))

        saturated_words = Cat(
            saturated(fits, piece.word_select(i, 64)[:32], piece[64 * i + 63])
            for i, fits in enumerate(word_fits)
        )
        bytes_of_words = [
            saturated(fits, piece.word_select(i, 32)[:8], piece[32 * i + 31])
            for i, fits in enumerate(byte_fits)
        ]
        bytes_of_longs = [
            saturated(
                fits & byte_fits[2 * i], piece.word_select(i, 64)[:8], piece[64 * i + 63]
            )
            for i, fits in enumerate(word_fits)
        ]  # fmt: skip
        copied = ~(command.to_bf16 | command.to_i8 | command.saturated)
        from_longs = command.to_i8 & command.long
        from_words = command.to_i8 & ~command.long
        sources = (
            (copied, piece), (command.to_bf16, Cat(halves)),
            (command.saturated, saturated_words), (from_words, Cat(bytes_of_words)),
            (from_longs, Cat(bytes_of_longs)),
        )  # fmt: skip
        total: Value = C(0, 1)
        for is_it, value in sources:
            total = total | (value & is_it.replicate(len(value)))
        m.d.comb += self.data.eq(total)
        return command.long & Cat(lost).any()
