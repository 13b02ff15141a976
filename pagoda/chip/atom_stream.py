"""The first half of a load: from a plan to requests, and from DRAM's atoms to a stream of bytes.

    walker --> DRAM --> atoms that arrived --> pieces of `piece_bytes` --> narrowed --> data

Elements that are narrower locally are converted here, so that the stream is no longer than the
tile; those that are wider locally travel as they are. A piece is taken every cycle, which keeps up
with the slots. Requests wait when the atoms under way and not yet taken would not fit.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from pagoda.chip.formats import decode_element, encode_element
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


class AtomStream(wiring.Component):
    """valid, plan, late_slot, row_valid, row_offset, row_next
                  as in `DmaFront`
    room          two pieces would still find place behind `size`
    size, data    bytes of the stream, the first one lowest
    launch        clears `overflow`
    """

    def __init__(self, chip: Chip):
        self.chip, self.piece_bytes = chip, piece_bytes(chip)
        super().__init__({
            "valid": In(1), "plan": In(Plan()), "late_slot": In(1), "row_valid": In(1),
            "row_offset": In(signed(ROW_OFFSET_BITS)), "row_next": Out(1),
            "dram": Out(DramPort()), "room": In(1), "size": Out(range(self.piece_bytes + 1)),
            "data": Out(8 * self.piece_bytes), "launch": In(1), "overflow": Out(Overflow()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        walker = self._walk(m)
        places = SyncFIFO(width=14, depth=atoms_under_way(self.chip))
        atoms = SyncFIFO(width=ATOM_BITS, depth=places.depth)
        command = data.StructLayout({"mem": 4, "local": 4, "pc": 32, "index": 32})
        commands = SyncFIFO(width=command.size, depth=self.chip.window)
        m.submodules.places, m.submodules.atoms, m.submodules.commands = places, atoms, commands

        entering = Signal(command)
        m.d.comb += [
            walker.step.eq(self.late_slot & places.w_rdy),
            self.dram.read.eq(walker.active & walker.step),
            self.dram.read_address.eq(walker.address & -DRAM_ATOM_BYTES),
            places.w_en.eq(self.dram.read),
            places.w_data.eq(Cat(walker.address[:6], walker.size, walker.last)),
            entering.mem.eq(self.plan.mem_code), entering.local.eq(self.plan.local_code),
            entering.pc.eq(self.plan.pc), entering.index.eq(self.plan.index),
            commands.w_en.eq(self.valid & self.plan.atoms), commands.w_data.eq(entering),
        ]  # fmt: skip

        # Take the next aligned piece of the oldest atom, which may just arrive; its first byte
        # goes to the lowest place.
        size, bits = self.piece_bytes, (self.piece_bytes - 1).bit_length()
        first, atom_size, last = places.r_data[:6], places.r_data[6:13], places.r_data[13]
        begun, number, next_number = Signal(), Signal(7 - bits), Signal(7 - bits)
        end, low, count = Signal(6), Signal(bits), Signal(range(size + 1))
        take, atom_ends, taken = Signal(), Signal(), Signal()
        m.d.comb += [
            take.eq((atoms.r_rdy | self.dram.valid) & self.room), end.eq(first + atom_size - 1),
            number.eq(Mux(begun, next_number, first[bits:])),
            low.eq(Mux(begun, 0, first[:bits])),
            atom_ends.eq(number == end[bits:]),
            count.eq(Mux(atom_ends, end[:bits] + 1, size) - low),
            taken.eq(take & atom_ends), atoms.r_en.eq(taken),
            atoms.w_en.eq(self.dram.valid & (atoms.r_rdy | ~taken)),
            atoms.w_data.eq(self.dram.data),
            places.r_en.eq(taken), commands.r_en.eq(taken & last),
        ]  # fmt: skip
        with m.If(take):
            m.d.sync += [begun.eq(~atom_ends), next_number.eq(number + 1)]
        piece, piece_size = Signal(8 * size, reset_less=True), Signal(range(size + 1))
        now = Signal(command, reset_less=True)
        chosen = Mux(
            atoms.r_rdy, atoms.r_data.word_select(number, 8 * size),
            self.dram.data.word_select(number, 8 * size),
        )  # fmt: skip
        m.d.sync += [
            piece_size.eq(Mux(take, count, 0)), piece.eq(chosen >> (low << 3)),
            now.eq(commands.r_data),
        ]
        overflowed = self._narrow(m, piece, piece_size, now)
        with m.If(self.launch):
            m.d.sync += self.overflow.valid.eq(0)
        with m.Elif(overflowed & ~self.overflow.valid):
            m.d.sync += [
                self.overflow.valid.eq(1), self.overflow.pc.eq(now.pc),
                self.overflow.command.eq(now.index),
            ]  # fmt: skip
        return m

    def _walk(self, m: Module) -> PieceWalker:
        """The walker through the plans' atoms. The one before is through when a plan comes: its
        slots are over. Should it ever be late, one plan waits."""
        chip = self.chip
        walker = m.submodules.walker = PieceWalker(
            DRAM_ATOM_BYTES, True, max(ceil_log2(chip.dram_bytes), 32),
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

    def _narrow(self, m: Module, piece: Signal, size: Signal, command) -> Value:
        """Drives `size` and `data`; whether an int64 of the piece did not fit."""
        words, longs = self.piece_bytes // 4, self.piece_bytes // 8
        small, saturated, lost = [], [], []
        is_long = command.mem == DType.I64
        for i in range(longs):
            lane, over = decode_element(
                m, piece.word_select(i, 64), command.mem, f"long_{i}", (DType.I64,)
            )
            saturated.append(lane)
            lost.append(over & (size > 8 * i))
        for i in range(words):
            lane = piece.word_select(i, 32)
            if i < longs:
                lane = Mux(is_long, saturated[i], lane)
            small.append(
                encode_element(m, lane, command.local, f"word_{i}", (DType.BF16, DType.I8))
            )
        mem, local = Signal(3), Signal(3)
        m.d.comb += [
            mem.eq(mem_shift(command.mem)), local.eq(local_shift(command.local) + 1),
            self.size.eq(size), self.data.eq(piece),
        ]  # fmt: skip
        with m.If(mem > local):
            m.d.comb += self.size.eq(size >> (mem - local)[:2])
            with m.Switch(command.local):
                with m.Case(DType.BF16):
                    m.d.comb += self.data.eq(Cat(raw[:16] for raw in small))
                with m.Case(DType.I8):
                    m.d.comb += self.data.eq(Cat(raw[:8] for raw in small))
                with m.Default():
                    m.d.comb += self.data.eq(Cat(saturated))
        return is_long & Cat(lost).any()
