"""The DRAM atoms that a store is about to write, oldest first, and which of them follow another.

An accumulating store reads an atom long before it writes it. If an older atom of the table has the
same address when the read is asked for, what DRAM answers may lack it; then the newer atom is
built from the older one's bytes (its `source`). An atom's place is kept until it is written and
the atom that follows it is built.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from pagoda.chip.tile_stream import Mode
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip


class Atom(data.StructLayout):
    """Bytes `first` to `first + size - 1` of the atom at `address` (in atoms)."""

    def __init__(self, chip: Chip):
        super().__init__({
            "address": ceil_log2(chip.dram_bytes // DRAM_ATOM_BYTES), "first": 6, "size": 7,
            "mode": Mode(),
        })  # fmt: skip


class AtomTable(wiring.Component):
    """A ring of `places` atoms (a power of two).

    enter    puts `atom` in; allowed while `space`.
    built    takes the oldest atom not yet built (`building`, if `waiting`): place `place`; if
             `follows`, its bytes are based on those of place `source`.
    written  takes the oldest atom, `writing`; it must have been built.
    """

    def __init__(self, chip: Chip, places: int):
        self.chip, self.places = chip, places
        atom, place = Atom(chip), range(places)
        super().__init__({
            "enter": In(1), "atom": In(atom), "space": Out(1),
            "waiting": Out(1), "building": Out(atom), "place": Out(place), "follows": Out(1),
            "source": Out(place), "built": In(1),
            "writing": Out(atom), "written": In(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        places = self.places
        head, build, write = (Signal(range(places), name=n) for n in ("head", "build", "write"))
        # Unwritten; accumulates and has no follower yet; its follower is not yet built.
        used, newest, held = (Signal(places, name=n) for n in ("used", "newest", "held"))
        addresses = [Signal.like(self.atom.address, name=f"address_{i}") for i in range(places)]
        accumulate = self.atom.mode.accumulate

        # Among atoms of one address only one has no follower, so at most one is found.
        found = Signal(places)
        same = Cat(address == self.atom.address for address in addresses)
        m.d.comb += [
            found.eq(used & newest & same & accumulate.replicate(places)),
            self.space.eq(~(used | held).bit_select(head, 1)),
        ]
        found_late, entered_late, place_late = (
            Signal.like(found), Signal(), Signal.like(head)
        )  # fmt: skip
        m.d.sync += [entered_late.eq(self.enter), found_late.eq(found), place_late.eq(head)]
        with m.If(self.enter):
            m.d.sync += head.eq(head + 1)
        for i, address in enumerate(addresses):
            entering = self.enter & (head == i)
            with m.If(entering):
                m.d.sync += [address.eq(self.atom.address), used[i].eq(1), newest[i].eq(accumulate)]
            with m.Elif(self.written & (write == i)):
                m.d.sync += used[i].eq(0)
            with m.If(self.enter & found[i]):
                m.d.sync += [newest[i].eq(0), held[i].eq(1)]
            with m.If(self.built & self.follows & (self.source == i)):
                m.d.sync += held[i].eq(0)

        atoms = m.submodules.atoms = memory.Memory(shape=self.atom.shape(), depth=places, init=[])
        entering = atoms.write_port()
        building, writing = (atoms.read_port(domain="comb") for _ in range(2))
        m.d.comb += [
            entering.en.eq(self.enter), entering.addr.eq(head), entering.data.eq(self.atom),
            building.addr.eq(build), self.building.eq(building.data),
            writing.addr.eq(write), self.writing.eq(writing.data),
        ]  # fmt: skip

        # Who an atom follows is known one cycle after it has entered.
        link = data.StructLayout({"follows": 1, "source": range(places)})
        links = m.submodules.links = memory.Memory(shape=link, depth=places, init=[])
        linking, linked = links.write_port(), links.read_port(domain="comb")
        number = Signal(range(places))
        for i in range(places):
            with m.If(found_late[i]):
                m.d.comb += number.eq(i)
        m.d.comb += [
            linking.en.eq(entered_late), linking.addr.eq(place_late),
            linking.data.follows.eq(found_late.any()), linking.data.source.eq(number),
            linked.addr.eq(build), self.follows.eq(linked.data.follows),
            self.source.eq(linked.data.source), self.place.eq(build),
        ]  # fmt: skip
        unbuilt = Signal(range(places + 1))
        m.d.comb += self.waiting.eq(unbuilt != Const(0))
        m.d.sync += unbuilt.eq(unbuilt + entered_late - self.built)
        with m.If(self.built):
            m.d.sync += build.eq(build + 1)
        with m.If(self.written):
            m.d.sync += write.eq(write + 1)
        return m
