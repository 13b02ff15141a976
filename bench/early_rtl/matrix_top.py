"""The matrix engine with its memories, alone, for the first test."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from banked_memory import BankedMemory, ReadPort, WritePort
from matrix_engine import MatrixEngine


class MatrixTop(wiring.Component):
    def __init__(self, chip):
        self.chip = chip
        P = chip.port_bytes
        super().__init__({
            "start": In(1), "word": In(32).array(16), "shared": In(1), "free": Out(1),
            "conflict": Out(1),
            "a_enable": Out(1), "b_enable": Out(1), "psum_enable": Out(1), "write_enable": Out(1),
            "sram_write": In(WritePort(P)), "acc_write": In(WritePort(P)),
            "acc_read": In(ReadPort(P)),
        })

    def elaborate(self, platform):
        m = Module()
        chip, P = self.chip, self.chip.port_bytes
        engine = m.submodules.engine = MatrixEngine(chip.rows, chip.cols, P)
        sram = m.submodules.sram = BankedMemory(chip.sram_bytes, chip.sram_banks, P, 2, 1)
        acc = m.submodules.acc = BankedMemory(chip.acc_bytes, chip.acc_banks, P, 2, 2)
        connect(m, engine.a, sram.read[0])
        connect(m, engine.b, sram.read[1])
        connect(m, flipped(self.sram_write), sram.write[0])
        connect(m, engine.psum, acc.read[0])
        connect(m, flipped(self.acc_read), acc.read[1])
        connect(m, engine.result, acc.write[0])
        connect(m, flipped(self.acc_write), acc.write[1])
        m.d.comb += [
            engine.start.eq(self.start), engine.shared.eq(self.shared),
            *(x.eq(y) for x, y in zip(engine.word, self.word, strict=True)),
            self.free.eq(engine.free),
            self.conflict.eq(sram.conflict | acc.conflict),
            self.a_enable.eq(engine.a.enable), self.b_enable.eq(engine.b.enable),
            self.psum_enable.eq(engine.psum.enable), self.write_enable.eq(engine.result.enable),
        ]
        return m
