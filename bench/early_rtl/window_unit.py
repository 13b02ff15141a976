"""The command port and the window of one core: field registers, hulls, hazards, starts.

In cycle e a go is accepted; the entry's registers show it from e+1 on, hazards are compared there,
and e+2 is the first cycle in which it may start. Starts are decided in the cycle itself, from
registers and from the engines' `free`.
"""

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from dma_engines import Transfer

LOAD, STORE, MATRIX = 0, 1, 2
BANKS = {LOAD: 1, STORE: 2, MATRIX: 5}
SRAM, ACC, DRAM = 0, 1, 2
SLOTS = 4
ELEMENT_BYTES = {0: 4, 1: 2, 2: 4, 3: 1}  # local and memory codes that the bench uses

Range = data.StructLayout({"valid": 1, "space": 2, "first": 32, "last": 32})


class WindowUnit(wiring.Component):
    def __init__(self, chip, tails: dict[int, int]):
        self.chip, self.tails = chip, tails
        super().__init__({
            "valid": In(1), "bank": In(4), "word": In(4), "value": In(32), "ready": Out(1),
            "slot_base": In(32).array(SLOTS),
            "engine_free": In(1).array(3), "engine_start": Out(1).array(3),
            "transfer": Out(Transfer), "fields": Out(32).array(16), "shared": Out(1),
            "entered": Out(1), "start": Out(1), "start_index": Out(16),
            "freed": Out(1).array(3), "freed_index": Out(16).array(3),
            "finished": Out(1).array(chip.window), "entry_index": Out(16).array(chip.window),
        })

    def elaborate(self, platform):
        m = Module()
        chip, W = self.chip, self.chip.window
        fields = {e: [Signal(32, name=f"bank{b}_{i}") for i in range(16)]
                  for e, b in BANKS.items()}

        # Entries. The oldest has the smallest index (16 bits suffice for the bench).
        entry = [{
            "valid": Signal(name=f"valid{i}"), "settled": Signal(name=f"settled{i}"),
            "started": Signal(name=f"started{i}"), "draining": Signal(name=f"draining{i}"),
            "engine": Signal(2, name=f"engine{i}"), "index": Signal(16, name=f"index{i}"),
            "left": Signal(16, name=f"left{i}"), "shared": Signal(name=f"shared{i}"),
            "read_ports": Signal(chip.sram_banks + chip.acc_banks, name=f"read_ports{i}"),
            "write_ports": Signal(chip.sram_banks + chip.acc_banks, name=f"write_ports{i}"),
            "reads": [Signal(Range, name=f"read{i}_{k}") for k in range(3)],
            "write": Signal(Range, name=f"write{i}"),
            "transfer": Signal(Transfer, name=f"transfer{i}"),
            "fields": [Signal(32, name=f"field{i}_{k}") for k in range(16)],
        } for i in range(W)]

        # Accepting stores: a go needs a free entry.
        full = Cat(*[e["valid"] for e in entry]).all()
        is_go = self.word == 0
        accept = Signal()
        m.d.comb += [self.ready.eq(~(is_go & full)), accept.eq(self.valid & self.ready),
                     self.entered.eq(accept & is_go)]
        for engine, bank in BANKS.items():
            for i in range(16):
                with m.If(accept & (self.bank == bank) & (self.word == i)):
                    m.d.sync += fields[engine][i].eq(self.value)
        described = {LOAD: self._dma(m, fields[LOAD], self.value, True),
                     STORE: self._dma(m, fields[STORE], self.value, False),
                     MATRIX: self._matmul(m, fields[MATRIX], self.value)}
        following = Signal(16)
        slot_taken = C(0, 1)
        for i, e in enumerate(entry):
            here = Signal(name=f"here{i}")
            m.d.comb += here.eq(self.entered & ~e["valid"] & ~slot_taken)
            slot_taken = slot_taken | ~e["valid"]
            m.d.sync += e["settled"].eq(e["valid"])
            with m.If(here):
                m.d.sync += [e["valid"].eq(1), e["settled"].eq(0), e["started"].eq(0),
                             e["draining"].eq(0), e["index"].eq(following),
                             following.eq(following + 1)]
                for engine, bank in BANKS.items():
                    d = described[engine]
                    with m.If(self.bank == bank):
                        m.d.sync += [
                            e["engine"].eq(engine), e["shared"].eq(d["shared"]),
                            e["read_ports"].eq(d["read_ports"]),
                            e["write_ports"].eq(d["write_ports"]), e["write"].eq(d["write"]),
                            e["transfer"].eq(d["transfer"]),
                            *(x.eq(y) for x, y in zip(e["reads"], d["reads"], strict=True)),
                            e["fields"][0].eq(self.value),
                            *(x.eq(y) for x, y in
                              zip(e["fields"][1:], fields[engine][1:], strict=True)),
                        ]

        # Readiness.
        dma_free = self.engine_free[LOAD] & self.engine_free[STORE]
        ready = Signal(W)
        for i, e in enumerate(entry):
            blocked = []
            for j, other in enumerate(entry):
                if i == j:
                    continue
                older = other["valid"] & (other["index"] < e["index"])
                same = other["engine"] == e["engine"]
                hazard = Signal(name=f"hazard{i}_{j}")
                m.d.comb += hazard.eq(self._conflict(other, e))
                ports = ((other["read_ports"] & e["read_ports"])
                         | (other["write_ports"] & e["write_ports"])).any()
                blocked += [older & same & ~other["started"], older & hazard,
                            other["valid"] & other["started"] & ~same & ports]
            is_dma = e["engine"] != MATRIX
            m.d.comb += ready[i].eq(
                e["valid"] & e["settled"] & ~e["started"] & ~Cat(*blocked).any()
                & Mux(is_dma, dma_free, self.engine_free[MATRIX]))
        for i, e in enumerate(entry):
            older_ready = Cat(*[ready[j] & (o["index"] < e["index"])
                                for j, o in enumerate(entry) if j != i]).any()
            with m.If(ready[i] & ~older_ready):
                m.d.sync += e["started"].eq(1)
                m.d.comb += [
                    self.start.eq(1), self.start_index.eq(e["index"]),
                    self.shared.eq(e["shared"]), self.transfer.eq(e["transfer"]),
                    *(x.eq(y) for x, y in zip(self.fields, e["fields"], strict=True)),
                ]
                for engine in BANKS:
                    m.d.comb += self.engine_start[engine].eq(e["engine"] == engine)

        # Ends: the engine frees the command that runs on it; its tail is counted down.
        for i, e in enumerate(entry):
            for engine, tail in self.tails.items():
                with m.If(e["valid"] & e["started"] & ~e["draining"] & (e["engine"] == engine)
                          & self.engine_free[engine]):
                    m.d.sync += [e["draining"].eq(1), e["left"].eq(tail - 1)]
                    m.d.comb += [self.freed[engine].eq(1),
                                 self.freed_index[engine].eq(e["index"])]
            with m.If(e["draining"] & e["valid"]):
                m.d.sync += e["left"].eq(e["left"] - 1)
                with m.If(e["left"] == 1):
                    m.d.sync += [e["valid"].eq(0), e["settled"].eq(0)]
                    m.d.comb += self.finished[i].eq(1)  # the finish cycle is the next one
            m.d.comb += self.entry_index[i].eq(e["index"])
        return m

    def _conflict(self, older, younger):
        def overlap(x, y):
            return (x.valid & y.valid & (x.space == y.space) & (x.first <= y.last)
                    & (y.first <= x.last))

        pairs = [(older["write"], younger["write"])]
        pairs += [(older["write"], r) for r in younger["reads"]]
        pairs += [(r, younger["write"]) for r in older["reads"]]
        return Cat(*[overlap(x, y) for x, y in pairs]).any()

    def _ports(self, r):
        """Bank mask of a range."""
        bits = []
        for space, count, size in ((SRAM, self.chip.sram_banks, self.chip.bank_bytes("sram")),
                                   (ACC, self.chip.acc_banks, self.chip.bank_bytes("acc"))):
            for bank in range(count):
                bits.append(r.valid & (r.space == space) & (r.first < (bank + 1) * size)
                            & (r.last >= bank * size))
        return Cat(*bits)

    def _range(self, m, name, valid, space, first, last):
        r = Signal(Range, name=name)
        m.d.comb += [r.valid.eq(valid), r.space.eq(space), r.first.eq(first), r.last.eq(last)]
        return r

    def _matmul(self, m, f, go):
        a, m0, s0, m1, s1, m2, s2, ki, ko, ks, b, bs, n, acc, accs = f[1:]
        ta, tb = go[5], go[6]
        k = Signal(32, name="matmul_k")
        rows = Signal(32, name="matmul_rows")
        m.d.comb += [k.eq(ki * ko), rows.eq(m0 * m1 * m2)]
        a_last = Mux(ta, (ki - 1) * s0 + 2 * m0,
                     (m0 - 1) * s0 + (m1 - 1) * s1 + (m2 - 1) * s2 + (ko - 1) * ks + 2 * ki)
        b_last = Mux(tb, (n - 1) * bs + 2 * k, (k - 1) * bs + 2 * n)
        local = acc[:31]
        ranges = [self._range(m, "mm_a", k != 0, SRAM, a, (a + a_last - 1)[:32]),
                  self._range(m, "mm_b", k != 0, SRAM, b, (b + b_last - 1)[:32]),
                  self._range(m, "mm_acc", 1, ACC, local,
                              (local + (rows - 1) * accs + 4 * n - 1)[:32])]
        a_ports, b_ports, acc_ports = (self._ports(r) for r in ranges)
        return {"reads": ranges, "write": ranges[2], "read_ports": a_ports | b_ports | acc_ports,
                "write_ports": acc_ports, "shared": (a_ports & b_ports).any(),
                "transfer": C(0, Transfer.size)}

    def _dma(self, m, f, go, loads):
        slot, offset, address, cols, rows, planes, mrs, mps, lrs, lps = f[1:11]
        prefix = "ld" if loads else "st"

        def size(code):
            return Mux(code == 1, 2, Mux(code == 3, 1, 4))

        mem_row, local_row = cols * size(go[0:4]), cols * size(go[4:8])
        base = Array(self.slot_base)[slot[:2]] + offset
        t = Signal(Transfer, name=f"{prefix}_transfer")
        for side, row, start, stride, plane_stride in (
            (t.mem, mem_row, base, mrs, mps), (t.local, local_row, address, lrs, lps),
        ):
            flat = Signal(32, name=f"{prefix}_flat")
            one = (rows == 1) | (stride == row[:32])
            m.d.comb += flat.eq(row * rows)
            both = one & ((planes == 1) | (plane_stride == flat))
            m.d.comb += [
                side.base.eq(start),
                side.row_bytes.eq(Mux(both, flat * planes, Mux(one, flat, row))),
                side.rows.eq(Mux(both, 1, Mux(one, planes, rows))),
                side.row_stride.eq(Mux(one, plane_stride, stride)),
                side.planes.eq(Mux(one, 1, planes)), side.plane_stride.eq(plane_stride),
            ]
        m.d.comb += [t.convert.eq(go[0:4] != go[4:8]),
                     t.lead.eq(f[14]), t.cycles.eq(f[15])]  # words 14 and 15: bench only
        low, high = Signal(signed(48), name=f"{prefix}_low"), Signal(signed(48))
        reaches = [((rows - 1).as_signed()[:24].as_signed() * mrs.as_signed()),
                   ((planes - 1).as_signed()[:24].as_signed() * mps.as_signed())]
        m.d.comb += [
            low.eq(base + sum(Mux(r < 0, r, 0) for r in reaches)),
            high.eq(base + sum(Mux(r < 0, 0, r) for r in reaches) + mem_row - 1),
        ]
        dram = self._range(m, f"{prefix}_dram", 1, DRAM, low[:32], high[:32])
        first = address[:31]
        local = self._range(
            m, f"{prefix}_local", 1, Mux(address[31], ACC, SRAM), first,
            (first + (rows - 1) * lrs + (planes - 1) * lps + local_row - 1)[:32])
        read, write = (dram, local) if loads else (local, dram)
        none = C(0, Range.size)
        ports = self._ports(local)
        return {"reads": [read, none, none], "write": write, "shared": 0, "transfer": t,
                "read_ports": 0 if loads else ports, "write_ports": ports if loads else 0}
