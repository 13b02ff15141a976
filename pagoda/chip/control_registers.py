"""The control core's registers: a memory, and a bit for each that says whether it counts."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out


class Registers(wiring.Component):
    """x0 to x31: two reads in the same cycle, one write. `clear` makes all of them read 0 but the
    one that the same cycle writes."""

    clear: In(1)
    first: In(5)
    first_data: Out(32)
    second: In(5)
    second_data: Out(32)
    write: In(1)
    target: In(5)
    data: In(32)

    def elaborate(self, platform) -> Module:
        m = Module()
        live = Signal(32)  # the others read 0, whatever the memory holds
        written = Signal(32)
        m.d.comb += written.eq((self.write << self.target) & ~1)
        m.d.sync += live.eq(Mux(self.clear, 0, live) | written)
        m.submodules.words = words = memory.Memory(shape=32, depth=32, init=[])
        port = words.write_port()
        m.d.comb += [port.addr.eq(self.target), port.data.eq(self.data), port.en.eq(self.write)]
        for number, data in ((self.first, self.first_data), (self.second, self.second_data)):
            read = words.read_port(domain="comb")
            m.d.comb += read.addr.eq(number)
            with m.If(live.bit_select(number, 1)):
                m.d.comb += data.eq(read.data)
        return m
