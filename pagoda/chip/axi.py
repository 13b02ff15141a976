"""The chip's two buses to the outside: AXI4 to DRAM, AXI4-Lite from the host.

A core expects data exactly `dram_latency` contract cycles after a read. What comes earlier waits
in a FIFO; when something comes later, `hold` stops the chip's clock enable until it is there, so
contract cycles never depend on the memory outside. AXI orders reads and writes apart from one
another: a read is therefore issued only when every write that left before it is acknowledged.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import ATOM_BITS, DRAM_ADDRESS_BITS, DramPort
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip

COUNT_BITS = 16  # of write counters, compared modulo 2^16
WRITE_DEPTH = 16
OKAY = 0


class AxiMaster(wiring.Signature):
    """AXI4 without the signals that stay constant: single beats of 64 bytes, one ID, INCR."""

    def __init__(self):
        super().__init__({
            "araddr": Out(DRAM_ADDRESS_BITS), "arvalid": Out(1), "arready": In(1),
            "rdata": In(ATOM_BITS), "rvalid": In(1), "rready": Out(1),
            "awaddr": Out(DRAM_ADDRESS_BITS), "awvalid": Out(1), "awready": In(1),
            "wdata": Out(ATOM_BITS), "wstrb": Out(DRAM_ATOM_BYTES), "wvalid": Out(1),
            "wready": In(1), "bvalid": In(1), "bready": Out(1),
        })  # fmt: skip


class AxiLite(wiring.Signature):
    """AXI4-Lite with 32-bit data, from the host's side; responses are always OKAY."""

    def __init__(self):
        super().__init__({
            "awaddr": Out(32), "awvalid": Out(1), "awready": In(1),
            "wdata": Out(32), "wvalid": Out(1), "wready": In(1),
            "bresp": In(2), "bvalid": In(1), "bready": Out(1),
            "araddr": Out(32), "arvalid": Out(1), "arready": In(1),
            "rdata": In(32), "rresp": In(2), "rvalid": In(1), "rready": Out(1),
        })  # fmt: skip


Write = data.StructLayout({"address": DRAM_ADDRESS_BITS, "data": ATOM_BITS,
                           "mask": DRAM_ATOM_BYTES})  # fmt: skip


class AxiMemory(wiring.Component):
    """All cores' DRAM ports on AXI4, one master per core. It runs on the free clock; `enable` is
    the chip's clock enable, which must be low whenever `hold` is high."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "dram": In(DramPort()).array(chip.cores), "axi": Out(AxiMaster()).array(chip.cores),
            "enable": In(1), "hold": Out(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        cores = range(self.chip.cores)
        left = [Signal(COUNT_BITS, name=f"left{k}") for k in cores]  # writes a core has sent
        acknowledged = [Signal(COUNT_BITS, name=f"acknowledged{k}") for k in cores]
        leaving = [Signal(COUNT_BITS, name=f"leaving{k}") for k in cores]
        for k in cores:
            m.d.comb += leaving[k].eq(left[k] + (self.dram[k].write & self.enable))
            m.d.sync += left[k].eq(leaving[k])
        holds = []
        for k in cores:
            holds.append(self._reads(m, k, leaving, acknowledged))
            holds.append(self._writes(m, k, acknowledged[k]))
        m.d.comb += self.hold.eq(Cat(*holds).any())
        return m

    def _reads(self, m: Module, k: int, leaving: list[Signal], acknowledged: list[Signal]):
        dram, axi, latency = self.dram[k], self.axi[k], self.chip.dram_latency
        cores = len(leaving)
        request = data.StructLayout({
            "address": DRAM_ADDRESS_BITS, "after": data.ArrayLayout(COUNT_BITS, cores),
        })  # fmt: skip
        waiting = SyncFIFOBuffered(width=request.size, depth=latency + 2)
        arrived = SyncFIFOBuffered(width=ATOM_BITS, depth=latency + 2)
        m.submodules[f"waiting{k}"], m.submodules[f"arrived{k}"] = waiting, arrived
        entry, head = Signal(request, name=f"entry{k}"), Signal(request, name=f"head{k}")
        m.d.comb += [
            entry.address.eq(dram.read_address),
            *(entry.after[c].eq(leaving[c]) for c in range(cores)),
            waiting.w_data.eq(entry), waiting.w_en.eq(dram.read & self.enable),
            head.eq(waiting.r_data),
        ]  # fmt: skip
        # Behind, modulo 2^16: the difference of the counters is at most what is in flight.
        behind = [(head.after[c] - acknowledged[c])[:COUNT_BITS] for c in range(cores)]
        settled = Cat(*[(b == 0) | b[-1] for b in behind]).all()
        m.d.comb += [
            axi.araddr.eq(head.address), axi.arvalid.eq(waiting.r_rdy & settled),
            waiting.r_en.eq(axi.arvalid & axi.arready),
            axi.rready.eq(arrived.w_rdy), arrived.w_en.eq(axi.rvalid & axi.rready),
            arrived.w_data.eq(axi.rdata),
        ]  # fmt: skip
        due = Signal(latency, name=f"due{k}")  # bit i: a read i + 1 cycles ago
        with m.If(self.enable):
            m.d.sync += due.eq(Cat(dram.read, due)[:latency])
        m.d.comb += [
            dram.valid.eq(due[-1]), dram.data.eq(arrived.r_data),
            arrived.r_en.eq(due[-1] & self.enable),
        ]  # fmt: skip
        return due[-1] & ~arrived.r_rdy

    def _writes(self, m: Module, k: int, acknowledged: Signal):
        dram, axi = self.dram[k], self.axi[k]
        queue = SyncFIFOBuffered(width=Write.size, depth=WRITE_DEPTH)
        m.submodules[f"writes{k}"] = queue
        entry, head = Signal(Write, name=f"write{k}"), Signal(Write, name=f"oldest{k}")
        m.d.comb += [
            entry.address.eq(dram.write_address), entry.data.eq(dram.write_data),
            entry.mask.eq(dram.write_mask), queue.w_data.eq(entry),
            queue.w_en.eq(dram.write & self.enable), head.eq(queue.r_data),
        ]  # fmt: skip
        # Address and data travel on channels of their own; the entry goes when both are taken.
        address_sent, data_sent = Signal(name=f"aw_sent{k}"), Signal(name=f"w_sent{k}")
        address_done = address_sent | (axi.awvalid & axi.awready)
        data_done = data_sent | (axi.wvalid & axi.wready)
        both = Signal(name=f"both{k}")
        m.d.comb += [
            axi.awaddr.eq(head.address), axi.awvalid.eq(queue.r_rdy & ~address_sent),
            axi.wdata.eq(head.data), axi.wstrb.eq(head.mask),
            axi.wvalid.eq(queue.r_rdy & ~data_sent), axi.bready.eq(1),
            both.eq(queue.r_rdy & address_done & data_done), queue.r_en.eq(both),
        ]  # fmt: skip
        m.d.sync += [
            address_sent.eq(address_done & ~both & queue.r_rdy),
            data_sent.eq(data_done & ~both & queue.r_rdy),
        ]
        with m.If(axi.bvalid):
            m.d.sync += acknowledged.eq(acknowledged + 1)
        return queue.w_level >= WRITE_DEPTH - 1


class AxiLiteHost(wiring.Component):
    """AXI4-Lite to the launcher's register port: one access at a time.

    The port is `valid` for one enabled cycle; a read's data come in the next cycle."""

    def __init__(self):
        super().__init__({
            "axi": In(AxiLite()), "enable": In(1), "valid": Out(1), "write": Out(1),
            "address": Out(32), "write_data": Out(32), "read_data": In(32),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        axi = self.axi
        m.d.comb += [axi.bresp.eq(OKAY), axi.rresp.eq(OKAY)]
        taken = Signal(32)
        with m.FSM():
            with m.State("idle"):
                writing = axi.awvalid & axi.wvalid & self.enable
                reading = axi.arvalid & ~writing & self.enable
                m.d.comb += [
                    self.valid.eq(writing | reading), self.write.eq(writing),
                    self.address.eq(Mux(writing, axi.awaddr, axi.araddr)),
                    self.write_data.eq(axi.wdata), axi.awready.eq(writing),
                    axi.wready.eq(writing), axi.arready.eq(reading),
                ]  # fmt: skip
                with m.If(writing):
                    m.next = "written"
                with m.Elif(reading):
                    m.next = "fetch"
            with m.State("written"):
                m.d.comb += axi.bvalid.eq(1)
                with m.If(axi.bready):
                    m.next = "idle"
            with m.State("fetch"):
                m.d.sync += taken.eq(self.read_data)
                m.next = "read"
            with m.State("read"):
                m.d.comb += [axi.rvalid.eq(1), axi.rdata.eq(taken)]
                with m.If(axi.rready):
                    m.next = "idle"
        return m
