"""Window, three engines, SRAM and ACC; outside are the control core's stores and the DRAM."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect
from banked_memory import BankedMemory
from dma_engines import ATOM, LoadEngine, SlotTimer, StoreEngine
from matrix_engine import MatrixEngine
from window_unit import LOAD, MATRIX, SLOTS, STORE, WindowUnit


class EnginesTop(wiring.Component):
    def __init__(self, chip, tails: dict[int, int]):
        self.chip, self.tails = chip, tails
        P, W = chip.port_bytes, chip.window
        super().__init__({
            "valid": In(1), "bank": In(4), "word": In(4), "value": In(32), "ready": Out(1),
            "slot_base": In(32).array(SLOTS),
            "entered": Out(1), "start": Out(1), "start_index": Out(16),
            "freed": Out(3), "freed_index": Out(48), "finished": Out(W),
            "entry_index": Out(16 * W), "conflict": Out(1),
            "request": Out(1), "request_address": Out(32), "response": In(1),
            "response_data": In(8 * ATOM),
            "send": Out(1), "send_address": Out(32), "send_size": Out(8),
            "send_data": Out(8 * ATOM),
            "seen_load_write": Out(1), "seen_store_read": Out(1), "seen_result": Out(1),
            "host": In(1), "host_acc": In(1), "host_write": In(1), "host_address": In(32),
            "host_in": In(8 * P), "host_out": Out(8 * P),
        })

    def elaborate(self, platform):
        m = Module()
        chip, P = self.chip, self.chip.port_bytes
        window = m.submodules.window = WindowUnit(chip, self.tails)
        matrix = m.submodules.matrix = MatrixEngine(chip.rows, chip.cols, P)
        load = m.submodules.load = LoadEngine(P)
        store = m.submodules.store = StoreEngine(P)
        sram = m.submodules.sram = BankedMemory(chip.sram_bytes, chip.sram_banks, P, 4, 2)
        acc = m.submodules.acc = BankedMemory(chip.acc_bytes, chip.acc_banks, P, 3, 3)
        timer = m.submodules.timer = SlotTimer(ATOM / chip.dram_share)

        m.d.comb += [
            window.valid.eq(self.valid), window.bank.eq(self.bank), window.word.eq(self.word),
            window.value.eq(self.value), self.ready.eq(window.ready),
            *(x.eq(y) for x, y in zip(window.slot_base, self.slot_base, strict=True)),
            self.entered.eq(window.entered), self.start.eq(window.start),
            self.start_index.eq(window.start_index), self.freed.eq(Cat(*window.freed)),
            self.freed_index.eq(Cat(*window.freed_index)),
            self.finished.eq(Cat(*window.finished)),
            self.entry_index.eq(Cat(*window.entry_index)),
            self.conflict.eq(sram.conflict | acc.conflict),
        ]
        for index, engine in ((LOAD, load), (STORE, store), (MATRIX, matrix)):
            m.d.comb += [engine.start.eq(window.engine_start[index]),
                         window.engine_free[index].eq(engine.free)]
        for engine in (load, store):
            m.d.comb += [engine.transfer.eq(window.transfer), engine.slot.eq(timer.slot)]
        m.d.comb += [matrix.shared.eq(window.shared),
                     *(x.eq(y) for x, y in zip(matrix.word, window.fields, strict=True))]

        connect(m, matrix.a, sram.read[0])
        connect(m, matrix.b, sram.read[1])
        connect(m, matrix.psum, acc.read[0])
        connect(m, matrix.result, acc.write[0])
        from_acc = Signal()
        m.d.sync += from_acc.eq(store.read.address[31])
        m.d.comb += store.read.data.eq(Mux(from_acc, acc.read[1].data, sram.read[2].data))
        for memory, bit, reader, writer in ((sram, 0, 2, 0), (acc, 1, 1, 1)):
            read, write = memory.read[reader], memory.write[writer]
            host_read, host_write = memory.read[reader + 1], memory.write[writer + 1]
            mine = self.host & (self.host_acc == bit)
            m.d.comb += [
                read.enable.eq(store.read.enable & (store.read.address[31] == bit)),
                read.address.eq(store.read.address[:31]), read.size.eq(store.read.size),
                write.enable.eq(load.write.enable & (load.write.address[31] == bit)),
                write.address.eq(load.write.address[:31]), write.size.eq(load.write.size),
                write.data.eq(load.write.data),
                host_read.enable.eq(mine & ~self.host_write),
                host_read.address.eq(self.host_address), host_read.size.eq(P),
                host_write.enable.eq(mine & self.host_write),
                host_write.address.eq(self.host_address), host_write.size.eq(P),
                host_write.data.eq(self.host_in),
            ]
        host_acc = Signal()
        m.d.sync += host_acc.eq(self.host_acc)
        m.d.comb += self.host_out.eq(Mux(host_acc, acc.read[2].data, sram.read[3].data))

        m.d.comb += [
            self.request.eq(load.request), self.request_address.eq(load.request_address),
            load.response.eq(self.response), load.response_data.eq(self.response_data),
            self.send.eq(store.send), self.send_address.eq(store.send_address),
            self.send_size.eq(store.send_size), self.send_data.eq(store.send_data),
            self.seen_load_write.eq(load.write.enable), self.seen_store_read.eq(store.read.enable),
            self.seen_result.eq(matrix.result.enable),
        ]
        return m
