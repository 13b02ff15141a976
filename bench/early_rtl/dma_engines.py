"""load and store: the contract's accounting beside engines that really move the bytes.

Accounting: from the first slot `lead` cycles after the start the engine and the DRAM port are held
for `cycles`. The load's atom walker asks for an atom in every slot. The real writer of a load and
the real reader and sender of a store run behind, on descriptors queued in FIFOs, and are late by
their registers and by what the streams make them wait.
"""

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out
from banked_memory import ReadPort, WritePort

ATOM = 64

Side = data.StructLayout({  # rows in one memory, after merging
    "base": 32, "row_bytes": 32, "rows": 32, "row_stride": 32, "planes": 32, "plane_stride": 32,
})
Transfer = data.StructLayout({"mem": Side, "local": Side, "convert": 1, "cycles": 32, "lead": 8})


class SlotTimer(wiring.Component):
    """High in the cycles ceil(j * X) since reset, X = numerator / denominator >= 1."""

    slot: Out(1)

    def __init__(self, x):
        self.x = x
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        phase = Signal(range(self.x.numerator + self.x.denominator))
        following = phase + self.x.denominator
        m.d.sync += phase.eq(Mux(following >= self.x.numerator,
                                 following - self.x.numerator, following))
        m.d.comb += self.slot.eq(phase < self.x.denominator)
        return m


class PieceWalker(wiring.Component):
    """Walks rows in pieces: `limit` bytes each, or up to the next multiple of it (aligned)."""

    go: In(1)
    side: In(Side)
    step: In(1)
    active: Out(1)
    address: Out(32)
    size: Out(16)
    last: Out(1)

    def __init__(self, limit: int, aligned: bool):
        self.limit, self.aligned = limit, aligned
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        own = Signal(Side)
        row_start, plane_start, left, row, plane = (
            Signal(32, name=n) for n in ("row_start", "plane_start", "left", "row", "plane"))
        most = self.limit - (self.address % self.limit if self.aligned else 0)
        row_end, plane_end = left <= most, row + 1 == own.rows
        m.d.comb += [
            self.size.eq(Mux(row_end, left, most)),
            self.last.eq(row_end & plane_end & (plane + 1 == own.planes)),
        ]
        with m.If(self.active & self.step):
            m.d.sync += [self.address.eq(self.address + self.size), left.eq(left - self.size)]
            with m.If(row_end):
                m.d.sync += [row.eq(row + 1), left.eq(own.row_bytes),
                             self.address.eq(row_start + own.row_stride),
                             row_start.eq(row_start + own.row_stride)]
                with m.If(plane_end):
                    m.d.sync += [plane.eq(plane + 1), row.eq(0),
                                 self.address.eq(plane_start + own.plane_stride),
                                 row_start.eq(plane_start + own.plane_stride),
                                 plane_start.eq(plane_start + own.plane_stride)]
            with m.If(self.last):
                m.d.sync += self.active.eq(0)
        with m.If(self.go):
            m.d.sync += [own.eq(self.side), self.active.eq(1), self.address.eq(self.side.base),
                         row_start.eq(self.side.base), plane_start.eq(self.side.base),
                         left.eq(self.side.row_bytes), row.eq(0), plane.eq(0)]
        return m


def accounting(m: Module, engine, transfer: Signal) -> None:
    """Decides `free`."""
    busy, begun, wait, left = Signal(), Signal(), Signal(8), Signal(32)
    m.d.comb += engine.free.eq(~busy | (begun & (left == 0)))
    with m.If(engine.start):
        first = engine.slot & (transfer.lead == 0)
        m.d.sync += [busy.eq(1), begun.eq(first), left.eq(transfer.cycles - first),
                     wait.eq(Mux(transfer.lead == 0, 0, transfer.lead - 1))]
    with m.Elif(engine.free):
        m.d.sync += busy.eq(0)
    with m.Elif(wait != 0):
        m.d.sync += wait.eq(wait - 1)
    with m.Elif(begun | engine.slot):
        m.d.sync += [begun.eq(1), left.eq(left - 1)]


def follow(m: Module, name: str, engine, transfer: Signal, walker: PieceWalker, side: str):
    """Feeds a walker from a FIFO of transfers, without a gap between them; returns `convert`."""
    fifo = m.submodules[f"{name}_fifo"] = SyncFIFO(width=Transfer.size, depth=16)
    head = data.View(Transfer, fifo.r_data)
    convert = Signal(name=f"{name}_convert")
    go = fifo.r_rdy & (~walker.active | (walker.last & walker.step))
    m.d.comb += [fifo.w_en.eq(engine.start), fifo.w_data.eq(transfer), walker.go.eq(go),
                 walker.side.eq(head[side]), fifo.r_en.eq(go)]
    with m.If(go):
        m.d.sync += convert.eq(head.convert)
    return convert


class LoadEngine(wiring.Component):
    """convert: BF16 in memory, F32 locally."""

    def __init__(self, port_bytes: int):
        self.port_bytes = port_bytes
        super().__init__({
            "start": In(1), "transfer": In(Transfer), "slot": In(1), "free": Out(1),
            "request": Out(1), "request_address": Out(32),
            "response": In(1), "response_data": In(8 * ATOM),
            "write": Out(WritePort(port_bytes)),
        })

    def elaborate(self, platform):
        m = Module()
        P = self.port_bytes
        accounting(m, self, self.transfer)
        atoms = m.submodules.atoms = PieceWalker(ATOM, True)
        late_slot = Signal()
        m.d.sync += late_slot.eq(self.slot)
        m.d.comb += [atoms.go.eq(self.start), atoms.side.eq(self.transfer.mem),
                     atoms.step.eq(late_slot)]
        meta = m.submodules.meta = SyncFIFO(width=16, depth=512)
        asked = atoms.active & atoms.step
        m.d.comb += [meta.w_en.eq(asked), meta.w_data.eq(Cat(atoms.address[:6], atoms.size[:8]))]
        m.d.sync += [self.request.eq(asked), self.request_address.eq(atoms.address & ~(ATOM - 1))]

        arrived = m.submodules.arrived = SyncFIFO(width=8 * ATOM, depth=512)
        m.d.comb += [arrived.w_en.eq(self.response), arrived.w_data.eq(self.response_data)]
        offset, size = meta.r_data[:6], meta.r_data[6:14]

        writer = m.submodules.writer = PieceWalker(P, False)
        convert = follow(m, "writer", self, self.transfer, writer, "local")
        held, count = Signal(8 * 2 * ATOM), Signal(9)
        needs = Mux(convert, writer.size >> 1, writer.size)
        m.d.comb += writer.step.eq(writer.active & (count >= needs))
        taken, added = Signal(8), Signal(8)
        m.d.comb += taken.eq(Mux(writer.step, needs, 0))
        take = arrived.r_rdy & (count <= ATOM)
        m.d.comb += [arrived.r_en.eq(take), meta.r_en.eq(take), added.eq(Mux(take, size, 0))]
        payload, rest = Signal(8 * ATOM), Signal(8 * 2 * ATOM)
        mask = Signal(8 * ATOM)
        m.d.comb += [
            mask.eq((C(1, 1) << (added[:7] << 3)) - 1),
            payload.eq((arrived.r_data >> (offset << 3)) & mask),
            rest.eq(held >> (taken << 3)),
        ]
        m.d.sync += [held.eq(rest | (payload << ((count - taken)[:8] << 3))),
                     count.eq(count - taken + added)]
        wide = Cat(Cat(C(0, 16), held.word_select(i, 16)) for i in range(P // 4))
        m.d.sync += [
            self.write.enable.eq(writer.step), self.write.address.eq(writer.address),
            self.write.size.eq(writer.size), self.write.data.eq(Mux(convert, wide, held[:8 * P])),
        ]
        return m


class StoreEngine(wiring.Component):
    """convert: F32 locally, BF16 in memory. Atoms leave `SEND_DELAY` cycles behind the slots."""

    SEND_DELAY = 9

    def __init__(self, port_bytes: int):
        self.port_bytes = port_bytes
        super().__init__({
            "start": In(1), "transfer": In(Transfer), "slot": In(1), "free": Out(1),
            "read": Out(ReadPort(port_bytes)), "read_acc": Out(1),
            "send": Out(1), "send_address": Out(32), "send_size": Out(8),
            "send_data": Out(8 * ATOM),
        })

    def elaborate(self, platform):
        m = Module()
        P = self.port_bytes
        accounting(m, self, self.transfer)
        capacity = 3 * ATOM
        reader = m.submodules.reader = PieceWalker(P, False)
        convert = follow(m, "reader", self, self.transfer, reader, "local")
        payload_size = Mux(convert, reader.size >> 1, reader.size)
        held, count, reserved = Signal(8 * capacity), Signal(9), Signal(9)
        m.d.comb += reader.step.eq(reader.active & (reserved <= capacity - P))
        m.d.sync += [self.read.enable.eq(reader.step), self.read.address.eq(reader.address),
                     self.read.size.eq(reader.size)]

        def late(value, cycles, name):
            for i in range(cycles):
                register = Signal(Value.cast(value).shape(), name=f"{name}_{i}")
                m.d.sync += register.eq(value)
                value = register
            return value

        arrives = late(Mux(reader.step, payload_size, 0)[:8], 3, "arrives")
        narrow_late = late(convert, 3, "narrow")
        word = Signal(8 * P)
        m.d.sync += word.eq(self.read.data)
        lanes = []
        for i in range(P // 4):
            lane = word.word_select(i, 32)
            rounded = (lane + 0x7FFF + lane[16])[16:32]
            lanes.append(Mux(lane[:31] > 0x7F800000, C(0x7FC0, 16), rounded))
        piece, mask = Signal(8 * P), Signal(8 * P)
        m.d.comb += [mask.eq((C(1, 1) << (arrives[:6] << 3)) - 1),
                     piece.eq(Mux(narrow_late, Cat(*lanes), word) & mask)]

        sender = m.submodules.sender = PieceWalker(ATOM, True)
        follow(m, "sender", self, self.transfer, sender, "mem")
        slot = late(self.slot, self.SEND_DELAY, "slot")
        m.d.comb += sender.step.eq(sender.active & slot & (count >= sender.size))
        taken = Signal(8)
        m.d.comb += taken.eq(Mux(sender.step, sender.size, 0))
        rest = Signal(8 * capacity)
        m.d.comb += rest.eq(held >> (taken << 3))
        m.d.sync += [
            held.eq(rest | (piece << ((count - taken)[:8] << 3))),
            count.eq(count - taken + arrives),
            reserved.eq(reserved - taken + Mux(reader.step, payload_size, 0)),
            self.send.eq(sender.step), self.send_address.eq(sender.address),
            self.send_size.eq(sender.size), self.send_data.eq(held[:8 * ATOM]),
        ]
        return m
