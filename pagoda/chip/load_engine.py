"""load and gather: from DRAM to SRAM or ACC, with conversion and padding.

    control --> DmaFront --> AtomStream --> ByteQueue --> TileWriter --> write
                                |  ^
                                v  |
                                dram

`DmaFront` frees the engine by the contract; requests go out in the slots that the contract gives
the command, a constant number of cycles later, and the last write is presented before its finish.
"""

from __future__ import annotations

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from pagoda.chip.atom_stream import AtomStream, piece_bytes
from pagoda.chip.byte_queue import ByteQueue
from pagoda.chip.dma_front import DmaFront
from pagoda.chip.interfaces import DramPort, EngineControl, LocalWrite, SideRead
from pagoda.chip.launch_signals import Overflow
from pagoda.chip.tile_writer import TileWriter
from pagoda.isa.chip import Chip


class LoadEngine(wiring.Component):
    """The load engine of one core.

    slot      the core's DRAM port opens in this cycle
    dram      only reads; what comes `valid` must be what this engine asked for
    launch    a new launch begins in the next cycle: clears `overflow`
    overflow  the launch's first command whose int64 did not fit int32
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "control": In(EngineControl()), "slot": In(1), "dram": Out(DramPort()),
            "write": Out(LocalWrite(chip)), "side": Out(SideRead(chip)),
            "launch": In(1), "overflow": Out(Overflow()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        port = self.chip.port_bytes
        front = m.submodules.front = DmaFront(self.chip, loads=True)
        # A piece counts in `level` two cycles after it was taken. With this much room the level
        # never falls below a word because pieces had to wait.
        pieces = piece_bytes(self.chip)
        capacity = 8 << ceil_log2(max(pieces, port))
        queue = m.submodules.queue = ByteQueue(pieces, port, capacity)
        stream = m.submodules.stream = AtomStream(self.chip, queue.width)
        writer = m.submodules.writer = TileWriter(self.chip, capacity, queue.width)
        connect(m, flipped(self.control), front.control)
        connect(m, flipped(self.side), front.side)
        connect(m, flipped(self.dram), stream.dram)
        connect(m, flipped(self.write), writer.write)
        m.d.comb += [
            front.slot.eq(self.slot),
            stream.valid.eq(front.valid), stream.plan.eq(front.plan),
            stream.late_slot.eq(front.late_slot), stream.row_valid.eq(front.row_valid),
            stream.row_offset.eq(front.row_offset), front.row_next.eq(stream.row_next),
            stream.launch.eq(self.launch), self.overflow.eq(stream.overflow),
            stream.room.eq(queue.level <= capacity - 2 * pieces),
            queue.write_size.eq(stream.size), queue.write_data.eq(stream.data),
            queue.write_left.eq(stream.left),
            writer.valid.eq(front.valid), writer.plan.eq(front.plan),
            writer.level.eq(queue.level), writer.read_data.eq(queue.read_data),
            queue.read.eq(writer.read), queue.read_size.eq(writer.read_size),
            queue.read_left.eq(writer.read_left),
        ]  # fmt: skip
        return m
