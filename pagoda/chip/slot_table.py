"""The slot table of a launch: written over the load bus, read by one core's command port."""

from amaranth.hdl import Module
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In

from pagoda.chip.interfaces import DRAM_ADDRESS_BITS, SlotTable
from pagoda.chip.launch_signals import LaunchBus, LoadTarget
from pagoda.isa.chip import DRAM_ATOM_BYTES, SLOTS, Chip

ATOM_ADDRESS_BITS = DRAM_ATOM_BYTES.bit_length() - 1


class SlotMemory(wiring.Component):
    """`SLOTS` entries. Word 4 * slot + k of the load bus holds

    k = 0  base, bits 31..0 (a multiple of 64)      k = 2  bytes
    k = 1  base, bits 47..32                        k = 3  bit 0 readable, bit 1 writable
    """

    def __init__(self, chip: Chip):
        # An empty slot may lie at the very end of DRAM, hence one more bit.
        self.base_bits = min(chip.dram_bytes.bit_length(), DRAM_ADDRESS_BITS)
        super().__init__({"launch": In(LaunchBus()), "table": In(SlotTable())})

    def elaborate(self, platform) -> Module:
        m = Module()
        launch, table = self.launch, self.table
        selected = launch.load_target == LoadTarget.SLOTS
        number, word = launch.load_address[2:], launch.load_address[:2]
        low_bits = min(self.base_bits, 32)
        columns = [
            (0, ATOM_ADDRESS_BITS, low_bits, table.base[ATOM_ADDRESS_BITS:low_bits]),
            (1, 0, self.base_bits - low_bits, table.base[low_bits : self.base_bits]),
            (2, 0, 32, table.bytes),
            (3, 0, 1, table.readable),
            (3, 1, 2, table.writable),
        ]
        for k, low, high, column in columns:
            if high == low:
                continue
            m.submodules += (words := memory.Memory(shape=high - low, depth=SLOTS, init=[]))
            write, read = words.write_port(), words.read_port(domain="comb")
            m.d.comb += [
                write.addr.eq(number), write.data.eq(launch.load_data[low:high]),
                write.en.eq(selected & (word == k)),
                read.addr.eq(table.slot), column.eq(read.data),
            ]  # fmt: skip
        m.d.comb += table.exists.eq(table.slot < launch.slots)
        return m
