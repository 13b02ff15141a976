"""Builds the atoms of a store from the stream of its bytes, a granule a cycle.

Every atom takes the same cycles, whether the store covers it or one byte of it: 64 / granule, or
twice that when it accumulates. So an atom that follows another of the same address finds every
granule of it finished, and an atom never takes longer than its DRAM slots.

    cover     which bytes of the granule are covered
    plan      how many bytes of the stream those are
    take      takes them from the stream; of an accumulating store the old bytes beside them
    widen     elements as they are in DRAM, or as lanes to add
    add       accumulating only: `SumLane`, then back to memory's format
    collect   granules to an atom, which waits for its DRAM slot
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, memory, wiring
from amaranth.lib.fifo import SyncFIFO, SyncFIFOBuffered
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from pagoda.chip.atom_table import Atom
from pagoda.chip.formats import decode_element, encode_element
from pagoda.chip.interfaces import ATOM_BITS, dram_slot_ratio
from pagoda.chip.modules import once
from pagoda.chip.sum_lane import STEPS, SumLane
from pagoda.chip.tile_stream import Mode, width_code
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.numbers import DType

ATOMS_INSIDE = 8  # begun and not yet sent


def granule_bytes(chip: Chip) -> int:
    """The least power of two of bytes a cycle that keeps up with the DRAM port; 8 to 64."""
    numerator, denominator = dram_slot_ratio(chip)
    share = -(-DRAM_ATOM_BYTES * denominator // numerator)
    return 1 << ceil_log2(max(share, 8))


def sum_stages(chip: Chip) -> int:
    """Depth of the adders, with registers before and behind them where there is time: at most one
    cycle less than an atom takes."""
    return min(STEPS + 2, 2 * DRAM_ATOM_BYTES // granule_bytes(chip) - 1)


class _Granule(data.StructLayout):
    """A granule on its way; the first stage has the stream's view of it, the later ones not."""

    def __init__(self, granule: int, places: int, width: int):
        super().__init__({
            "begin": range(granule + 1), "end": range(granule + 1),
            "mask": granule,  # bytes of DRAM that the store covers: `begin` to `end` - 1
            "mode": Mode(), "part": range(2 * DRAM_ATOM_BYTES // granule),  # in half granules
            "first": 1, "last": 1,  # of its atom
            "follows": 1, "source": range(places), "place": range(places),
            "count": range(granule + 1),  # bytes of the stream,
            "left": range(width),  # which have to move up so many lanes of their queue
        })  # fmt: skip


class AtomBuilder(wiring.Component):
    """Atoms come from an `AtomTable` of `places` places, the stream's bytes from a `ByteQueue` of
    `capacity` bytes and `width` lanes.

    arrived   data of one read after another, in the order of the atoms that accumulate
    ready     the oldest finished atom shows in `data`; `sent` takes it
    """

    def __init__(self, chip: Chip, places: int, capacity: int, width: int):
        self.chip, self.places, self.width = chip, places, width
        self.granule = granule_bytes(chip)
        super().__init__({
            "waiting": In(1), "building": In(Atom(chip)), "place": In(range(places)),
            "follows": In(1), "source": In(range(places)), "built": Out(1),
            "level": In(range(capacity + 1)), "read": Out(1),
            "read_size": Out(range(self.granule + 1)), "read_left": Out(range(width)),
            "read_data": In(8 * self.granule),
            "arrived": In(1), "arrived_data": In(ATOM_BITS),
            "ready": Out(1), "data": Out(ATOM_BITS), "sent": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        layout = _Granule(self.granule, self.places, self.width)
        half = self.granule // 2

        # Cover, plan.
        covered, covered_valid = Signal(layout), Signal()
        planned, planned_valid, take = Signal(layout), Signal(), Signal()
        part = Signal.like(planned.part)
        step, moves = Signal(), Signal()
        m.d.comb += [
            moves.eq(~planned_valid | take),
            step.eq(self.waiting & (~covered_valid | moves)),
        ]
        head = Signal(range(self.width))  # the lane of the first byte behind what is planned
        granule = self._cover(m, part, layout)
        m.d.comb += self.built.eq(step & granule.last)
        with m.If(step):
            m.d.sync += [
                covered.eq(granule), covered_valid.eq(1),
                part.eq(part + Mux(granule.mode.accumulate, 1, 2)),
            ]  # fmt: skip
        with m.Elif(moves):
            m.d.sync += covered_valid.eq(0)
        plan = self._plan(m, covered, head)
        with m.If(moves):
            m.d.sync += [planned.eq(plan), planned_valid.eq(covered_valid)]
            with m.If(covered_valid):
                m.d.sync += head.eq(head + plan.count)

        # Take.
        old_atoms = m.submodules.old_atoms = SyncFIFOBuffered(width=ATOM_BITS, depth=self.places)
        adds = planned.mode.accumulate
        adding = Signal()  # something is on its way through the adders
        inside = Signal(range(ATOMS_INSIDE + 1))
        m.d.comb += [
            take.eq(
                planned_valid & (self.level >= planned.count)
                & ~(planned.first & (inside == ATOMS_INSIDE))
                & Mux(adds, old_atoms.r_rdy, ~adding)
            ),
            self.read.eq(take), self.read_size.eq(planned.count),
            self.read_left.eq(planned.left),
            old_atoms.w_en.eq(self.arrived), old_atoms.w_data.eq(self.arrived_data),
            old_atoms.r_en.eq(take & adds & planned.last),
        ]  # fmt: skip
        m.d.sync += inside.eq(inside + (take & planned.first) - self.sent)
        results = m.submodules.results = memory.Memory(
            shape=8 * half, depth=self.places * (2 * DRAM_ATOM_BYTES // self.granule), init=[]
        )
        followed = results.read_port(domain="comb")
        from_dram = old_atoms.r_data.word_select(planned.part, 8 * half)
        m.d.comb += followed.addr.eq(Cat(planned.part, planned.source))
        taken, taken_valid = Signal(layout), Signal()
        stream, old = Signal(8 * self.granule), Signal(8 * half)
        m.d.sync += [
            taken_valid.eq(take), taken.eq(planned), stream.eq(self.read_data),
            old.eq(Mux(planned.follows, followed.data, from_dram)),
        ]  # fmt: skip

        # Widen, add.
        widened = self._widened(m, stream, taken.mode)
        total = self._totals(m, platform, stream, old, taken.mode)
        added, added_valid, old_late = taken, taken_valid & taken.mode.accumulate, old
        in_flight = added_valid
        for i in range(sum_stages(self.chip) - 1):
            behind, behind_valid = Signal(layout, name=f"add_{i}"), Signal(name=f"add_valid_{i}")
            behind_old = Signal.like(old, name=f"add_old_{i}")
            m.d.sync += [behind.eq(added), behind_valid.eq(added_valid), behind_old.eq(old_late)]
            added, added_valid, old_late = behind, behind_valid, behind_old
            in_flight = in_flight | behind_valid
        m.d.comb += adding.eq(in_flight)
        new = self._stored(m, total, added.mode)
        merged = Signal(8 * half)
        for i in range(half):
            m.d.comb += merged.word_select(i, 8).eq(
                Mux(added.mask[i], new.word_select(i, 8), old_late.word_select(i, 8))
            )
        keep = results.write_port()
        m.d.comb += [
            keep.en.eq(added_valid),
            keep.addr.eq(Cat(added.part, added.place)),
            keep.data.eq(merged),
        ]

        # Collect.
        finished = m.submodules.finished = SyncFIFO(width=ATOM_BITS, depth=ATOMS_INSIDE)
        collected, atom = Signal(ATOM_BITS), Signal(ATOM_BITS)
        copied = taken_valid & ~taken.mode.accumulate
        m.d.comb += [
            atom.eq(
                Mux(added_valid, Cat(collected[8 * half :], merged),
                    Cat(collected, widened)[8 * self.granule :])
            ),
            finished.w_en.eq(Mux(added_valid, added.last, copied & taken.last)),
            finished.w_data.eq(atom), finished.r_en.eq(self.sent),
            self.ready.eq(finished.r_rdy), self.data.eq(finished.r_data),
        ]  # fmt: skip
        with m.If(added_valid | copied):
            m.d.sync += collected.eq(atom)
        return m

    def _cover(self, m: Module, part: Signal, layout: _Granule) -> data.View:
        """The granule `part` of the oldest atom that waits: the places where the covered bytes
        begin and end."""
        granule, atom = Signal(layout, name="granule"), self.building
        half, half_bits = self.granule // 2, ceil_log2(self.granule // 2)
        accumulate = atom.mode.accumulate
        start = Cat(C(0, half_bits), part)
        length = Mux(accumulate, half, self.granule)
        for inside, place in (
            (granule.begin, atom.first), (granule.end, atom.first + atom.size)
        ):  # fmt: skip
            with m.If(place > start + length):
                m.d.comb += inside.eq(length)
            with m.Elif(place > start):
                m.d.comb += inside.eq(place - start)
        parts = 2 * DRAM_ATOM_BYTES // self.granule
        m.d.comb += [
            granule.mode.eq(atom.mode), granule.part.eq(part), granule.first.eq(part == 0),
            granule.last.eq(Mux(accumulate, part == parts - 1, part == parts - 2)),
            granule.follows.eq(self.follows), granule.source.eq(self.source),
            granule.place.eq(self.place),
        ]  # fmt: skip
        return granule

    def _plan(self, m: Module, covered: data.View, head: Signal) -> data.View:
        """The bytes of the stream for a granule."""
        granule = Signal(covered.shape(), name="plan")
        begin, end, accumulate = covered.begin, covered.end, covered.mode.accumulate
        local, mem = (
            width_code(m, covered.mode[side], f"planned_{side}") for side in ("local", "mem")
        )
        count, lane = end - begin, Signal(range(self.granule))
        m.d.comb += granule.eq(covered)
        with m.If(accumulate & (local > mem)):  # F32 into BF16
            m.d.comb += [granule.count.eq(count << 1), lane.eq(begin << 1)]
        with m.Elif(mem > local):
            shift = (mem - local)[:2]
            m.d.comb += [granule.count.eq(count[: len(end)] >> shift), lane.eq(begin >> shift)]
        with m.Else():
            m.d.comb += [granule.count.eq(count), lane.eq(begin)]
        m.d.comb += [
            granule.left.eq(lane - head),
            granule.mask.eq(((1 << end) - 1) & ~((1 << begin) - 1)),
        ]
        return granule

    def _widened(self, m: Module, stream: Signal, mode: data.View) -> Signal:
        """The granule of a store that does not accumulate."""
        widened = Signal.like(stream)
        m.d.comb += widened.eq(stream)
        with m.Switch(Cat(mode.mem, mode.local)):
            for local, mem in (
                (DType.BF16, DType.F32), (DType.I32, DType.I64), (DType.I8, DType.I32),
                (DType.I8, DType.I64),
            ):  # fmt: skip
                with m.Case(int(mem) | int(local) << 4):
                    count, gap = 8 * self.granule // mem.bits, mem.bits - local.bits
                    elements = [stream.word_select(i, local.bits) for i in range(count)]
                    m.d.comb += widened.eq(
                        Cat(
                            Cat(C(0, gap), x) if local.is_float else Cat(x, x[-1].replicate(gap))
                            for x in elements
                        )
                    )
        return widened

    def _totals(
        self, m: Module, platform: object, stream: Signal, old: Signal, mode: data.View
    ) -> list[Value]:
        """Lanes of old + stream, some cycles later: 4 bytes of the stream or less a lane."""
        totals = []
        lanes, stages = self.granule // 4, sum_stages(self.chip)
        before, behind = (m.d.sync if stages > STEPS + i else m.d.comb for i in (1, 0))
        for i in range(lanes):
            lane = SumLane(min(stages, STEPS))
            m.submodules[f"lane_{i}"] = once(platform, "pagoda_sum_lane", lane)
            raw = Signal(32, name=f"tile_{i}")
            with m.Switch(mode.local):
                for dtype in (DType.BF16, DType.I8):
                    with m.Case(int(dtype)):
                        m.d.comb += raw.eq(stream.word_select(i, dtype.bits))
                with m.Default():
                    m.d.comb += raw.eq(stream.word_select(i, 32))
            added, _ = decode_element(
                m, raw, mode.local, f"added_{i}", (DType.F32, DType.BF16, DType.I32, DType.I8)
            )
            old_element, total = Signal(32, name=f"old_{i}"), Signal(32, name=f"total_{i}")
            before += [
                lane.added.eq(added), lane.integer.eq(mode.mem == DType.I32),
                lane.old.eq(old_element),
            ]  # fmt: skip
            behind += total.eq(lane.total)
            m.d.comb += old_element.eq(Cat(C(0, 16), old.word_select(i, 16)))
            # Lanes of the upper half are there for BF16 alone, of which twice as many fit.
            if 2 * i < lanes:
                with m.If(mode.mem != DType.BF16):
                    m.d.comb += old_element.eq(old.word_select(i, 32))
            totals.append(total)
        return totals

    def _stored(self, m: Module, totals: list[Value], mode: data.View) -> Signal:
        """Totals as they are in memory: half a granule."""
        halves = [
            encode_element(m, total, C(int(DType.BF16), 4), f"total_{i}", (DType.BF16,))[:16]
            for i, total in enumerate(totals)
        ]
        stored = Signal(4 * self.granule)
        m.d.comb += stored.eq(
            Mux(mode.mem == DType.BF16, Cat(halves), Cat(totals[: len(totals) // 2]))
        )
        return stored
