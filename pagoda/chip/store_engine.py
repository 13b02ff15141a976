"""store and scatter: from SRAM or ACC to DRAM, also adding to what is there.

    job -> DmaFront -> reader: pieces of the tile -> TileStream -> ByteQueue -----,
                    -> walker: atoms in DRAM -> AtomTable ------------------------+-> AtomBuilder
                          '-> reads of an accumulating store -> DRAM -------------'       -> DRAM

`DmaFront` decides when the engine is free. The data run behind it: an atom is sent `send_delay`
cycles after the slot that the contract gives it: that long its bytes take at the least.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from pagoda.chip.atom_builder import AtomBuilder, granule_bytes, sum_stages
from pagoda.chip.atom_table import AtomTable
from pagoda.chip.byte_queue import ByteQueue
from pagoda.chip.dma_front import DmaFront
from pagoda.chip.interfaces import (
    DramPort,
    EngineControl,
    LocalRead,
    Side,
    SideRead,
    dram_slot_ratio,
)
from pagoda.chip.tile_stream import Mode, TileStream, narrowing
from pagoda.chip.transfer import plan_lag
from pagoda.chip.walkers import PieceWalker
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.timing import ceil_div


def send_delay(chip: Chip) -> int:
    """Cycles from an atom's slot to its write: those from a start until all bytes of an atom are
    built that are read in one cycle, less one. Plan, walker, tile stream (3), byte queue, builder
    (1) and a granule a cycle. One more: the builder knows what to take two cycles after an atom."""
    return plan_lag(chip) + 6 + DRAM_ATOM_BYTES // granule_bytes(chip)


def table_places(chip: Chip) -> int:
    """Atoms between read and write at full speed, and as many that wait for a follower.

    An atom has two slots. From its read to its write it takes the DRAM latency, the registers
    between, its granules twice at most (its own and those of the atom before) and two slots.
    """
    numerator, denominator = dram_slot_ratio(chip)
    granules = 2 * DRAM_ATOM_BYTES // granule_bytes(chip)
    life = chip.dram_latency + 10 + sum_stages(chip) + 2 * granules
    return 1 << ceil_log2(2 * ceil_div(life * denominator, 2 * numerator) + 2)


class StoreEngine(wiring.Component):
    """The store engine of one core. `slot`: the core's DRAM port opens in this cycle."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "control": In(EngineControl()), "slot": In(1), "read": Out(LocalRead(chip)),
            "dram": Out(DramPort()), "side": Out(SideRead(chip)),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        chip, port = self.chip, self.chip.port_bytes
        granule, places = granule_bytes(chip), table_places(chip)
        capacity = 1 << ceil_log2(max(8 * port + 3 * DRAM_ATOM_BYTES, 4 * granule))

        front = m.submodules.front = DmaFront(chip, loads=False)
        wiring.connect(m, wiring.flipped(self.control), front.control)
        wiring.connect(m, wiring.flipped(self.side), front.side)
        m.d.comb += front.slot.eq(self.slot)
        plan = front.plan
        mode = Signal(Mode())
        m.d.comb += [
            mode.mem.eq(plan.mem_code), mode.local.eq(plan.local_code),
            mode.accumulate.eq(plan.accumulate),
        ]  # fmt: skip

        # The tile's bytes. `promised` counts those asked for and not yet taken for an atom.
        reader = m.submodules.reader = PieceWalker(
            port, False, 31, max(chip.sram_bytes, chip.acc_bytes).bit_length()
        )
        tile_job = data.StructLayout({"side": Side(), "acc": 1, "mode": Mode()})
        tile = self._follow(m, "tile", front, reader, tile_job, {
            "side": plan.local, "acc": plan.acc, "mode": mode,
        })  # fmt: skip
        stream = m.submodules.stream = TileStream(chip)
        queue = m.submodules.queue = ByteQueue(port, granule, capacity)
        builder = m.submodules.builder = AtomBuilder(
            chip, places, capacity, queue.width
        )
        promised = Signal(range(capacity + 1))
        asked = Signal.like(reader.size)
        tail = Signal(range(queue.width))  # the queue's lane for the next byte
        m.d.comb += [
            reader.step.eq(promised <= capacity - port),
            self.read.enable.eq(reader.active & reader.step), self.read.acc.eq(tile.acc),
            self.read.address.eq(reader.address), self.read.size.eq(reader.size),
            asked.eq(Mux(self.read.enable, reader.size, 0)),
            stream.asked_size.eq(asked), stream.asked_mode.eq(tile.mode),
            stream.read_data.eq(self.read.data),
            queue.write_size.eq(stream.size), queue.write_data.eq(stream.data),
            queue.write_left.eq(tail), queue.read.eq(builder.read),
            queue.read_size.eq(builder.read_size), queue.read_left.eq(builder.read_left),
            builder.read_data.eq(queue.read_data), builder.level.eq(queue.level),
        ]  # fmt: skip
        m.d.sync += [
            promised.eq(
                promised + (asked >> narrowing(m, tile.mode, "asked"))
                - Mux(builder.read, builder.read_size, 0)
            ),
            tail.eq(tail + stream.size),
        ]  # fmt: skip

        # Slots on their way: the reads of an accumulating store use some, the others send atoms.
        # Of two slots that follow one another at most one reads, so that reads never starve sends.
        delay, read_delay = send_delay(chip), plan_lag(chip)
        slots = Signal(delay)
        reads, rested = Signal(), Signal(init=1)
        read_slot, send_slot = slots[read_delay - 1], slots[-1]
        m.d.sync += [slots.eq(Cat(self.slot, slots)), slots[read_delay].eq(read_slot & ~reads)]
        with m.If(read_slot):
            m.d.sync += rested.eq(~reads)

        # The atoms.
        address_bits = ceil_log2(chip.dram_bytes)
        walker = m.submodules.walker = PieceWalker(
            DRAM_ATOM_BYTES, True, address_bits, min(address_bits + 1, 40)
        )
        rows_job = data.StructLayout({"side": Side(), "indexed": 1, "mode": Mode()})
        rows = self._follow(m, "rows", front, walker, rows_job, {
            "side": plan.mem, "indexed": plan.indexed, "mode": mode,
        })  # fmt: skip
        table = m.submodules.table = AtomTable(chip, places)
        m.d.comb += [
            walker.row_valid.eq(front.row_valid), walker.row_offset.eq(front.row_offset),
            front.row_next.eq(walker.row_next),
            walker.step.eq(table.space & (~rows.mode.accumulate | (read_slot & rested))),
            table.enter.eq(walker.active & walker.step),
            reads.eq(table.enter & rows.mode.accumulate),
            table.atom.address.eq(walker.address[6:]), table.atom.first.eq(walker.address[:6]),
            table.atom.size.eq(walker.size), table.atom.mode.eq(rows.mode),
            builder.waiting.eq(table.waiting), builder.building.eq(table.building),
            builder.place.eq(table.place), builder.follows.eq(table.follows),
            builder.source.eq(table.source), table.built.eq(builder.built),
            builder.arrived.eq(self.dram.valid), builder.arrived_data.eq(self.dram.data),
        ]  # fmt: skip
        m.d.sync += [
            self.dram.read.eq(reads),
            self.dram.read_address.eq(Cat(C(0, 6), table.atom.address)),
        ]
        sends = Signal()
        end = table.writing.first + table.writing.size
        m.d.comb += [
            sends.eq(send_slot & builder.ready),
            builder.sent.eq(sends), table.written.eq(sends), self.dram.write.eq(sends),
            self.dram.write_address.eq(Cat(C(0, 6), table.writing.address)),
            self.dram.write_data.eq(builder.data),
            self.dram.write_mask.eq(((1 << end) - 1) & ~((1 << table.writing.first) - 1)),
        ]  # fmt: skip
        return m

    def _follow(self, m: Module, name: str, front, walker, layout, parts) -> data.View:
        """Feed a walker with plans, without a gap between them; those that come while it walks
        wait in a queue. Returns what of the plan holds for the pieces it shows."""
        queue = m.submodules[f"{name}_jobs"] = SyncFIFO(width=layout.size, depth=self.chip.window)
        coming, head, now = (
            Signal(layout, name=f"{name}_{part}") for part in ("coming", "head", "now")
        )
        m.d.comb += [coming[part].eq(value) for part, value in parts.items()]
        m.d.comb += [
            head.eq(Mux(queue.r_rdy, queue.r_data, coming.as_value())),
            walker.go.eq(walker.ready & (queue.r_rdy | front.valid)),
            queue.w_en.eq(front.valid & (queue.r_rdy | ~walker.ready)),
            queue.w_data.eq(coming), queue.r_en.eq(walker.go),
            walker.side.eq(head.side),
        ]  # fmt: skip
        if "indexed" in parts:
            m.d.comb += walker.indexed.eq(head.indexed)
        with m.If(walker.go):
            m.d.sync += now.eq(head)
        return now
