"""The local memories of a core: SRAM and ACC, any byte address, and side reads that freeze time.

A bank has one read and one write port, `port_bytes` wide. It is two macros, of the even and of the
odd words, so that consecutive bytes at any address are at most one word of each; an access may
reach into the next bank.

    request   where the first word and its successor are (`Place`); writers rotate their bytes into
              the lanes (byte positions of a word) in which they are kept
    bank      takes over the request of its one user; in the next cycle it has an even and an odd
              word and takes from them, lane by lane, what its user asked for; other lanes are 0
    port      ORs the lanes of its one or two banks and rotates the first byte to the bottom

The window gives a bank port to one command at a time, so a bank ORs what its users ask;
`conflict` reports two users.

Side reads use the read ports of SRAM while everything else is frozen. This unit decides about
that, so it is outside the clock enable of the core:

    cycle c          enabled; engines read and write, k side ports ask
    c + 1            frozen; what the engines read is saved, the first side read is made
    c + 2 to c + k   frozen; one more side read in each
    c + k + 1        enabled; the engines see what was saved, the side ports their data
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import NamedTuple

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import LocalRead, LocalWrite, SideRead
from pagoda.isa.chip import Chip

SIDE_PORTS = 3
SRAM_READERS = ("store", "vector_a", "vector_b", "vector_c", "matrix_a", "matrix_b")
ACC_READERS = ("store", "vector_a", "vector_b", "vector_c", "psum")
SRAM_WRITERS = ("load_write", "vector_write")
ACC_WRITERS = ("load_write", "vector_write", "matrix_write")
SIDE_WAY = "store"  # the reader whose multiplexers serve side reads in frozen cycles
WORD_ALIGNED = ("psum", "matrix_write")  # addresses and sizes are multiples of 4: partial sums


class Place(data.StructLayout):
    """Where consecutive bytes are: from byte `offset` of a word on, and in the following word.

    Words are numbered from the memory's first; word 2 * pairs[p] + p is the one of the two that is
    even (p = 0) or odd (p = 1), and `used[p]` says that it is touched. `odd`: the first word is.
    """

    def __init__(self, chip: Chip):
        lane_bits = chip.port_bytes.bit_length() - 1
        words = max(chip.sram_bytes, chip.acc_bytes) // chip.port_bytes
        self.address_bits = lane_bits + words.bit_length() - 1
        self.lane_bits = lane_bits
        super().__init__({
            "used": 2, "pairs": data.ArrayLayout(max(words.bit_length() - 2, 1), 2), "odd": 1,
            "offset": lane_bits,
        })  # fmt: skip


class PlacedWrite(data.StructLayout):
    """A write in lanes: byte k of `data` is for lane k of the word p with `masks[p][k]`."""

    def __init__(self, chip: Chip):
        super().__init__({
            "place": Place(chip), "masks": data.ArrayLayout(chip.port_bytes, 2),
            "data": 8 * chip.port_bytes,
        })  # fmt: skip


class BankedMemory(wiring.Component):
    """The banks of SRAM or ACC. A request is taken in every cycle in which it uses a word.

    asked[r]: the banks that reader r uses, a bit each. lanes[b]: in the next cycle and until bank
    b's next read, the bytes that were asked of bank b, each in its lane; 0 in the other lanes.
    """

    def __init__(self, chip: Chip, memory: str, readers: int, writers: int):
        self.chip = chip
        self.banks = getattr(chip, f"{memory}_banks")
        self.words = chip.bank_bytes(memory) // chip.port_bytes  # of one bank
        super().__init__({
            "read": In(Place(chip)).array(readers), "write": In(PlacedWrite(chip)).array(writers),
            "asked": Out(self.banks).array(readers),
            "lanes": Out(8 * chip.port_bytes).array(self.banks), "conflict": Out(1),
        })  # fmt: skip

    def bank(self, place: data.View, parity: int) -> Value:
        """The bank of the even (0) or odd (1) word."""
        word = Cat(C(parity, 1), place.pairs[parity])
        low, bits = self.words.bit_length() - 1, self.banks.bit_length() - 1
        return word[low : low + bits] if bits else C(0)

    def elaborate(self, platform) -> Module:
        m = Module()
        conflicts = []
        for bank in range(self.banks):
            reads = self._hits(m, f"read_{bank}", bank, self.read)
            writes = self._hits(m, f"write_{bank}", bank, [port.place for port in self.write])
            readers = [hit.any() for hit in reads]
            conflicts += [_several(readers), _several([hit.any() for hit in writes])]
            m.d.comb += [self.asked[i][bank].eq(reader) for i, reader in enumerate(readers)]
            user, used = Signal(Place(self.chip), name=f"user_{bank}"), Cat(readers).any()
            with m.If(used):
                m.d.sync += user.eq(select(readers, [Value.cast(place) for place in self.read]))
            below = ~_from(user.offset)  # lanes of the user's second word
            shown = []
            for parity in (0, 1):
                if self.words == 1 and bank % 2 != parity:
                    continue  # a bank of one word has one macro
                macro = Memory(
                    shape=8 * self.chip.port_bytes, depth=max(self.words // 2, 1), init=[],
                    attrs={"no_rw_check": 1},
                )  # fmt: skip
                m.submodules[f"bank{bank}_{('even', 'odd')[parity]}"] = macro
                word = self._read(m, macro, parity, [hit[parity] for hit in reads])
                self._write(m, macro, parity, writes)
                asked = Signal(name=f"asked_{bank}_{parity}")
                with m.If(used):
                    m.d.sync += asked.eq(Cat(hit[parity] for hit in reads).any())
                own = Signal(self.chip.port_bytes, name=f"own_{bank}_{parity}")
                second = user.odd ^ parity
                m.d.comb += own.eq(Mux(asked, Mux(second, below, ~below), 0))
                shown.append(word & _bytes(own))
            m.d.comb += self.lanes[bank].eq(reduce(or_, shown))
        m.d.comb += self.conflict.eq(Cat(conflicts).any())
        return m

    def _hits(
        self, m: Module, name: str, bank: int, places: Iterable[data.View]
    ) -> list[Signal]:
        """Per place: it uses the even (bit 0) and the odd (bit 1) word of this bank."""
        hits = []
        for number, place in enumerate(places):
            hit = Signal(2, name=f"{name}_hit_{number}")
            m.d.comb += [
                hit[p].eq(place.used[p] & (self.bank(place, p) == bank)) for p in (0, 1)
            ]
            hits.append(hit)
        return hits

    def _row(self, place: data.View, parity: int) -> Value:
        return place.pairs[parity][: max(self.words.bit_length() - 2, 0)]

    def _read(self, m: Module, macro: Memory, parity: int, hits: list[Value]) -> Value:
        port = macro.read_port()
        rows = [self._row(place, parity) for place in self.read]
        m.d.comb += [port.en.eq(Cat(hits).any()), port.addr.eq(select(hits, rows))]
        return port.data

    def _write(self, m: Module, macro: Memory, parity: int, hits: list[Signal]) -> None:
        port = macro.write_port(granularity=8)
        mine = [hit[parity] for hit in hits]
        rows = [self._row(write.place, parity) for write in self.write]
        m.d.comb += [
            port.en.eq(select(mine, [write.masks[parity] for write in self.write])),
            port.addr.eq(select(mine, rows)), port.data.eq(self.write[0].data),
        ]  # fmt: skip
        for hit, write in zip(hits[1:], self.write[1:], strict=True):
            with m.If(hit.any()):  # of both macros: they share these multiplexers
                m.d.comb += port.data.eq(write.data)


def select(chosen: Iterable[Value], values: Iterable[Value]) -> Value:
    """OR of the chosen values."""
    return reduce(or_, (Mux(yes, value, 0) for yes, value in zip(chosen, values, strict=True)))


def _several(bits: list[Value]) -> Value:
    """More than one of the bits is set."""
    return sum(bits, C(0)) > 1


def _from(lane: Value) -> Value:
    """A bit for each of the 2 ** len(lane) lanes: ones from `lane` on."""
    return Cat(lane <= number for number in range(1 << len(lane)))


def _bytes(lanes: Value) -> Value:
    """Eight bits for each bit."""
    return Cat(lane.replicate(8) for lane in lanes)


def _rotated(m: Module, name: str, value: Value, lanes: Value, left: bool) -> Value:
    """The value turned by a number of bytes."""
    for stage, bit in enumerate(lanes):
        turned = Signal(len(value), name=f"{name}_turned_{stage}")
        distance = 8 << stage
        both = value.rotate_left(distance) if left else value.rotate_right(distance)
        m.d.comb += turned.eq(Mux(bit, both, value))
        value = turned
    return value


class _Request(NamedTuple):
    enable: Value
    acc: Value
    address: Value
    size: Value
    moving: Value  # the clock enable of what happens to the data in the next cycle


class LocalMemory(wiring.Component):
    """SRAM and ACC of a core with every port that engines and control core have to them.

    hold: somebody else freezes the core. freeze: this unit does. The core's clock enable is
    ~(hold | freeze); requests count in cycles in which it is high, and their data are there in the
    next such cycle. A side read sees all writes up to the cycle of its request. `conflict`: two
    users of a bank port in one cycle. Everything reads 0 until it is written.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        readers = dict.fromkeys((*SRAM_READERS, *ACC_READERS), In(LocalRead(chip)))
        writers = dict.fromkeys(ACC_WRITERS, In(LocalWrite(chip)))
        super().__init__({
            **readers, **writers, "side": In(SideRead(chip)).array(SIDE_PORTS),
            "hold": In(1), "freeze": Out(1), "conflict": Out(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        chip = self.chip
        m.submodules.sram = sram = BankedMemory(
            chip, "sram", len(SRAM_READERS), len(SRAM_WRITERS)
        )
        m.submodules.acc = acc = BankedMemory(chip, "acc", len(ACC_READERS), len(ACC_WRITERS))
        enabled = Signal()
        m.d.comb += [
            enabled.eq(~(self.hold | self.freeze)), self.conflict.eq(sram.conflict | acc.conflict),
        ]  # fmt: skip
        address, served = self._side_requests(m, enabled)
        self._show_side(m, served, self._reads(m, sram, acc, enabled, address))
        self._writes(m, sram, acc, enabled)
        return m

    def _place(self, m: Module, name: str, enable: Value, address: Value, size: Value) -> data.View:
        layout = Place(self.chip)
        place = Signal(layout, name=f"{name}_place")
        lanes = layout.lane_bits
        if name in WORD_ALIGNED:
            address, size = Cat(C(0, 2), address[2:]), Cat(C(0, 2), size[2:])
        word = address[lanes : layout.address_bits]
        beyond = Signal(name=f"{name}_beyond")  # some bytes are in the following word
        used = enable & size.any()
        m.d.comb += [
            beyond.eq(address[:lanes] + size > self.chip.port_bytes),
            place.used.eq(Cat(used & (~word[0] | beyond), used & (word[0] | beyond))),
            place.pairs[0].eq((word + 1) >> 1), place.pairs[1].eq(word >> 1),
            place.odd.eq(word[0]), place.offset.eq(address[:lanes]),
        ]  # fmt: skip
        return place

    def _side_requests(self, m: Module, enabled: Value) -> tuple[Value, Value]:
        """The address of this frozen cycle's side read; the port served in the cycle before."""
        pending, serve, served = Signal(SIDE_PORTS), Signal(SIDE_PORTS), Signal(SIDE_PORTS)
        m.d.comb += [serve.eq(pending & -pending), self.freeze.eq(pending.any())]
        m.d.sync += [
            pending.eq(Mux(enabled, Cat(port.enable for port in self.side), pending & ~serve)),
            served.eq(serve),
        ]
        addresses = []
        for number, port in enumerate(self.side):
            address = Signal(Place(self.chip).address_bits, name=f"side_address_{number}")
            with m.If(enabled):
                m.d.sync += address.eq(port.address)
            addresses.append(address)
        return select(serve, addresses), served

    def _show_side(self, m: Module, served: Value, read: Value) -> None:
        for number, port in enumerate(self.side):
            kept = Signal(len(port.data), name=f"side_kept_{number}")
            with m.If(served[number]):
                m.d.sync += kept.eq(read)
            m.d.comb += port.data.eq(Mux(served[number], read, kept))

    def _reads(
        self, m: Module, sram: BankedMemory, acc: BankedMemory, enabled: Value, side: Value
    ) -> Value:
        """Serve the engines and, in frozen cycles, the side read at address `side`; what it reads.
        It goes the way of the store engine, whose own data are saved by then."""
        # In the first frozen cycle, before side reads change what the banks show.
        saving, saved, after_enabled = Signal(), Signal(), Signal()
        m.d.comb += saving.eq(after_enabled & self.freeze)
        m.d.sync += [after_enabled.eq(enabled), saved.eq((saved | saving) & ~enabled)]
        for name in dict.fromkeys((*SRAM_READERS, *ACC_READERS)):
            port = getattr(self, name)
            request = _Request(enabled & port.enable, port.acc, port.address, port.size, enabled)
            if name == SIDE_WAY:
                request = _Request(
                    self.freeze | request.enable, ~self.freeze & port.acc,
                    Mux(self.freeze, side, port.address[: len(side)]),
                    Mux(self.freeze, self.chip.port_bytes, port.size), self.freeze | enabled,
                )  # fmt: skip
            lanes, late, asked = self._way(m, name, request, sram, acc)
            kept = Signal(len(port.data), name=f"{name}_kept")
            if name == SIDE_WAY:
                side_read = _rotated(m, name, lanes, late.offset, left=False)
                with m.If(saving):
                    m.d.sync += kept.eq(side_read)
                m.d.comb += port.data.eq(Mux(saved, kept, side_read))
                continue
            if name in SRAM_READERS:  # what is saved takes the place of the banks' lanes
                with m.If(enabled):
                    m.d.sync += kept.eq(0)
                with m.If(saving):
                    m.d.sync += [kept.eq(lanes), asked.eq(0)]
                lanes = lanes | kept
            m.d.comb += port.data.eq(_rotated(m, name, lanes, late.offset, left=False))
        return side_read

    def _way(
        self, m: Module, name: str, request: _Request, sram: BankedMemory, acc: BankedMemory
    ) -> tuple[Value, data.View, Signal]:
        """Ask the banks. What they show in the next cycle, each byte in its lane; the place that
        was asked for and the banks, in registers."""
        place = self._place(m, name, request.enable, request.address, request.size)
        late = Signal.like(place)
        now, shown = [], []
        for memory, names, others, here in (
            (sram, SRAM_READERS, ACC_READERS, ~request.acc),
            (acc, ACC_READERS, SRAM_READERS, request.acc),
        ):
            if name not in names:
                continue
            number = names.index(name)
            used = Mux(here, place.used, 0) if name in others else place.used
            m.d.comb += [memory.read[number].eq(place), memory.read[number].used.eq(used)]
            now.append(memory.asked[number])
            shown += memory.lanes
        asked = Signal(len(shown), name=f"{name}_asked")
        with m.If(request.moving):
            m.d.sync += [late.eq(place), asked.eq(Cat(now))]
        lanes = Signal(len(shown[0]), name=f"{name}_lanes")
        m.d.comb += lanes.eq(select(asked, shown))
        return lanes, late, asked

    def _writes(self, m: Module, sram: BankedMemory, acc: BankedMemory, enabled: Value) -> None:
        lanes = self.chip.port_bytes
        for name in ACC_WRITERS:
            port = getattr(self, name)
            place = self._place(m, name, port.enable & enabled, port.address, port.size)
            placed = Signal(PlacedWrite(self.chip), name=f"{name}_placed")
            size = Cat(C(0, 2), port.size[2:]) if name in WORD_ALIGNED else port.size
            # One bit more than there are lanes in a word: these are the lanes of two words.
            end = Signal(len(place.offset) + 1, name=f"{name}_end")
            below = Signal(2 * self.chip.port_bytes, name=f"{name}_below")
            first, second = below.word_select(0, lanes), below.word_select(1, lanes)
            first &= _from(place.offset)
            m.d.comb += [
                end.eq(place.offset + size), below.eq(~_from(end)), placed.place.eq(place),
                placed.masks[0].eq(Mux(place.odd, second, first)),
                placed.masks[1].eq(Mux(place.odd, first, second)),
                placed.data.eq(_rotated(m, name, port.data, place.offset, left=True)),
            ]  # fmt: skip
            for memory, names, to_acc in ((sram, SRAM_WRITERS, False), (acc, ACC_WRITERS, True)):
                if name in names:
                    request = memory.write[names.index(name)]
                    mine = 1 if name not in SRAM_WRITERS else port.acc == to_acc
                    m.d.comb += [
                        request.eq(placed), request.place.used.eq(Mux(mine, place.used, 0)),
                    ]  # fmt: skip
