"""SRAM or ACC: banks of one read and one write port, any byte alignment, any bank crossing.

A bank is two macros, one port word wide, of the even and the odd words; so `port_bytes`
consecutive bytes at any address are at most one word of each. Every requester of a side shares the
bank ports of that side; two of them in one bank in one cycle are a conflict, which the window rule
must make impossible: `conflict` reports it.
"""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out


class ReadPort(wiring.Signature):
    """data: in the cycle after the request, `size` bytes from `address` on, first byte lowest."""

    def __init__(self, port_bytes: int):
        super().__init__({"enable": Out(1), "address": Out(32), "size": Out(16),
                          "data": In(8 * port_bytes)})


class WritePort(wiring.Signature):
    def __init__(self, port_bytes: int):
        super().__init__({"enable": Out(1), "address": Out(32), "size": Out(16),
                          "data": Out(8 * port_bytes)})


class BankedMemory(wiring.Component):
    def __init__(self, nbytes: int, banks: int, port_bytes: int, readers: int, writers: int):
        self.nbytes, self.banks, self.port_bytes = nbytes, banks, port_bytes
        self.readers, self.writers = readers, writers
        super().__init__({
            "read": In(ReadPort(port_bytes)).array(readers),
            "write": In(WritePort(port_bytes)).array(writers),
            "conflict": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        width = self.port_bytes
        shift = width.bit_length() - 1
        words = self.nbytes // self.banks // width  # of a bank, both macros
        word_bits, bank_bits = words.bit_length() - 1, self.banks.bit_length() - 1
        conflict = []

        def placed(port, name):
            """Per parity: (used, bank, row in the macro); and the byte offset."""
            word = Signal(32, name=f"{name}_word")
            offset = Signal(shift, name=f"{name}_offset")
            m.d.comb += [word.eq(port.address >> shift), offset.eq(port.address)]
            second = Signal(name=f"{name}_second")
            m.d.comb += second.eq(offset + port.size > width)
            half = []
            for parity in (0, 1):
                mine = Signal(32, name=f"{name}_word{parity}")
                used = Signal(name=f"{name}_used{parity}")
                here = word[0] == parity
                m.d.comb += [mine.eq(Mux(here, word, word + 1)),
                             used.eq(port.enable & (port.size != 0) & (here | second))]
                half.append((used, mine[word_bits:word_bits + bank_bits], mine[1:word_bits]))
            return half, offset, word[0]

        reads = [placed(self.read[i], f"r{i}") for i in range(self.readers)]
        writes = [placed(self.write[i], f"w{i}") for i in range(self.writers)]
        outputs = [[], []]
        for bank in range(self.banks):
            for side in (reads, writes):
                users = [(h[0][0] & (h[0][1] == bank)) | (h[1][0] & (h[1][1] == bank))
                         for h, _, _ in side]
                clash = Signal(name=f"clash_{'r' if side is reads else 'w'}{bank}")
                m.d.comb += clash.eq(sum(users) > 1)
                conflict.append(clash)
            for parity in (0, 1):
                macro = Memory(shape=8 * width, depth=words // 2, init=[])
                m.submodules[f"bank{bank}_{parity}"] = macro
                port = macro.read_port(domain="sync")
                m.d.comb += port.en.eq(1)
                outputs[parity].append(port.data)
                for half, _, _ in reads:
                    used, where, row = half[parity]
                    with m.If(used & (where == bank)):
                        m.d.comb += port.addr.eq(row)
                port = macro.write_port(domain="sync", granularity=8)
                for i, (half, offset, odd) in enumerate(writes):
                    used, where, row = half[parity]
                    source = self.write[i]
                    mask = Signal(2 * width, name=f"mask{bank}_{parity}_{i}")
                    wide = Signal(16 * width, name=f"wide{bank}_{parity}_{i}")
                    m.d.comb += [mask.eq(((1 << source.size[:shift + 1]) - 1)[:width] << offset),
                                 wide.eq(source.data << (offset << 3))]
                    with m.If(used & (where == bank)):
                        upper = odd != parity  # this macro holds the second word
                        m.d.comb += [
                            port.addr.eq(row),
                            port.en.eq(Mux(upper, mask[width:], mask[:width])),
                            port.data.eq(Mux(upper, wide[8 * width:], wide[:8 * width])),
                        ]
        for i, (half, offset, odd) in enumerate(reads):
            words_read = []
            for parity in (0, 1):
                where = Signal(bank_bits, name=f"from{i}_{parity}")
                m.d.sync += where.eq(half[parity][1])
                words_read.append(Array(outputs[parity])[where])
            late_offset, late_odd = Signal(shift, name=f"lo{i}"), Signal(name=f"odd{i}")
            m.d.sync += [late_offset.eq(offset), late_odd.eq(odd)]
            pair = Mux(late_odd, Cat(words_read[1], words_read[0]), Cat(*words_read))
            m.d.comb += self.read[i].data.eq(pair >> (late_offset << 3))
        m.d.comb += self.conflict.eq(Cat(*conflict).any())
        return m
