"""The command port of one core: field registers, checks, descriptions, index pass.

    t + 3  the go is on the bus: operands and the checks of fields are registered at its end
    t + 4  hulls and the remaining checks; from now on, in each cycle, what is on the bus
    e      valid & ready: e = t + 4 unless the window is full
    e + 1  `enter` with description and job, unless a rule is broken
    e + 2  the pulse of a fault

A gather or scatter is checked in its first cycle, t + 4, as if it entered there; then its indices
are read (`IndexPass`), and the rows they name are checked in the cycle after the pass is done.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.checks import FieldChecks
from pagoda.chip.description import Describe
from pagoda.chip.field_registers import BANK, FieldRegisters
from pagoda.chip.index_pass import IndexPass
from pagoda.chip.interfaces import (
    Description,
    Job,
    PortStore,
    SideRead,
    SlotTable,
    WriterQuery,
)
from pagoda.chip.operands import Operands, OperandSelect
from pagoda.chip.product_schedule import COUNT_BITS, TARGET
from pagoda.chip.products import ProductUnit, at
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS, CONTROL_BANK, WORDS_PER_BANK
from pagoda.isa.fault import FaultKind

INDEXED = (BANK["gather"], BANK["scatter"])


class CommandPort(wiring.Component):
    """store: from the control core. full, empty: the window's state; enter: a strobe, in e + 1,
    with `description` and `job`. query, side: the index tile. launch: a new launch begins."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "store": In(PortStore()), "cycle": In(48), "launch": In(1), "slots": Out(SlotTable()),
            "query": Out(WriterQuery()), "side": Out(SideRead(chip)),
            "full": In(1), "empty": In(1), "enter": Out(1),
            "description": Out(Description(chip)), "job": Out(Job()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        chip, store = self.chip, self.store
        m.submodules.fields = fields = FieldRegisters()
        m.submodules.products = products = ProductUnit(chip)
        m.submodules.checks = checks = FieldChecks(chip)
        m.submodules.select = select = OperandSelect(chip)
        m.submodules.describe = describe = Describe(chip)
        m.submodules.indices = indices = IndexPass(chip)

        # Decoded while the store is on its way.
        rows, cols = (COMMANDS["gather"].by_name[name].word for name in ("rows", "cols"))
        words = fields.words
        is_control, is_go, sets, indexed, passing = (
            Signal(name=name, reset_less=True)
            for name in ("is_control", "is_go", "sets", "indexed", "passing")
        )
        commands, moves = store.bank != CONTROL_BANK, store.bank.matches(*INDEXED)
        m.d.sync += [
            is_control.eq(~commands), is_go.eq(commands & (store.word == 0)),
            sets.eq(commands & (store.word != 0)), indexed.eq(moves),
            passing.eq(moves & words[rows].nonzero & words[cols].nonzero),  # reads indices
        ]  # fmt: skip
        set_field = Signal()
        m.d.comb += set_field.eq(store.valid & sets)
        for unit in (fields, products, checks, select):
            m.d.comb += unit.bank.eq(store.bank)
        for unit in (fields, products):
            m.d.comb += [unit.word.eq(store.word), unit.value.eq(store.value)]
        m.d.comb += [fields.write.eq(set_field), products.store.eq(set_field)]
        for unit in (products, checks, select):
            m.d.comb += unit.words.eq(words)
        for unit in (checks, select):
            m.d.comb += [
                unit.go.eq(store.value), unit.products.eq(products.products),
                unit.extents.eq(products.extents),
            ]  # fmt: skip
        wiring.connect(m, wiring.flipped(self.slots), select.slots)

        # When a go is taken.
        stopped, waited, reading, done = Signal(), Signal(), Signal(), Signal()
        go, accept = Signal(), Signal()
        m.d.comb += [
            go.eq(store.valid & is_go & ~store.drop & ~stopped),
            accept.eq(go & ~self.full & (~passing | indices.done)),
            store.ready.eq(store.valid & Mux(is_control, self.empty, ~is_go | accept)),
        ]  # fmt: skip
        final, probing, checking = Signal(), Signal(), Signal()
        m.d.sync += [
            waited.eq(go & ~accept), final.eq(accept),
            probing.eq(go & indexed & ~waited), done.eq(go & indices.done),
            checking.eq(go & indices.done & ~done),
        ]  # fmt: skip
        self._read_indices(m, go & passing, reading, words, indices, products)

        # Between the cycle before and this one.
        operands = Signal(Operands(chip), reset_less=True)
        reserved, illegal, empty, misaligned, misshapen = (
            Signal(name=name, reset_less=True)
            for name in ("reserved", "illegal", "empty_command", "misaligned", "misshapen")
        )
        m.d.sync += [
            operands.eq(select.operands), reserved.eq(checks.reserved), illegal.eq(checks.illegal),
            empty.eq(checks.empty), misaligned.eq(checks.misaligned),
            misshapen.eq(checks.misshapen),
        ]  # fmt: skip
        m.d.comb += [
            describe.bank.eq(store.bank), describe.empty.eq(empty),
            describe.functions.eq(store.value[:16]), describe.operands.eq(operands),
            describe.target.eq(at(products.products, TARGET)),
            describe.product.eq(products.product), describe.previous.eq(products.previous),
        ]  # fmt: skip

        # Between this cycle and the next one. From the first rule to the last: kind, whether slot
        # and offset mean something, and whether it takes long to work out.
        breaches = describe.breaches
        found = [
            (illegal | reserved, FaultKind.BAD_FIELD, False, False),
            (misaligned, FaultKind.MISALIGNED, False, False),
            (misshapen | breaches.rows_overlap, FaultKind.BAD_FIELD, False, False),
            (breaches.no_slot, FaultKind.BAD_SLOT, True, False),
            (breaches.no_permission, FaultKind.NO_PERMISSION, True, False),
            (breaches.out_of_slot, FaultKind.OUT_OF_SLOT, True, False),
            (breaches.out_of_range, FaultKind.LOCAL_OUT_OF_RANGE, False, False),
            (breaches.target_out_of_range, FaultKind.LOCAL_OUT_OF_RANGE, False, True),
            (breaches.bad_operand, FaultKind.BAD_FIELD, False, False),
            (breaches.clash, FaultKind.BAD_FIELD, False, True),
        ]
        rules, early, late = [], [], []
        for number, (rule, kind, place, slow) in enumerate(found):
            kept = Signal(name=f"breaks_{number}", reset_less=True)
            m.d.sync += kept.eq(rule)
            rules.append((kept, kind, place))
            if slow:
                late.append(kept)
            elif number:
                early.append(rule)
        was_broken, was_empty, cycle = (
            Signal(width, name=name, reset_less=True)
            for name, width in (("was_broken", 1), ("was_empty", 1), ("entry_cycle", 48))
        )
        broken, fault, issued = Signal(), Signal(), Signal(32)
        m.d.sync += [
            was_broken.eq(illegal | reserved | (~empty & Cat(early).any())), was_empty.eq(empty),
            cycle.eq(self.cycle),
        ]  # fmt: skip
        m.d.comb += broken.eq(was_broken | (~was_empty & Cat(late).any()))
        m.d.comb += [
            fault.eq(
                ~stopped & (((probing | final) & broken) | (checking & describe.index_breach))
            ),
            self.enter.eq(final & ~stopped & ~fault),
        ]  # fmt: skip
        m.d.sync += store.fault.eq(fault)
        with m.If(fault):
            m.d.sync += stopped.eq(1)
            self._report(m, rules, words, cycle, issued)
        with m.Elif(~store.valid):
            m.d.sync += stopped.eq(0)
        with m.If(self.enter):
            m.d.sync += issued.eq(issued + 1)
        with m.If(self.launch):
            m.d.sync += [issued.eq(0), stopped.eq(0)]

        job, sharing, base = self.job, describe.sharing, Signal.like(operands.base)
        m.d.sync += base.eq(operands.base)
        m.d.comb += [
            self.description.eq(describe.description),
            job.bank.eq(store.bank), job.empty.eq(was_empty), job.words[0].eq(store.value),
            *(job.words[i].eq(words[i].value) for i in range(1, WORDS_PER_BANK)),
            job.base.eq(base), job.shared_ab.eq(sharing.ab), job.shared_ac.eq(sharing.ac),
            job.shared_bc.eq(sharing.bc), job.per_bank.eq(sharing.per_bank), job.pc.eq(store.pc),
            job.index.eq(issued),
        ]  # fmt: skip
        return m

    def _read_indices(
        self, m: Module, wanted: Value, reading: Signal, words: data.View, indices: IndexPass,
        products: ProductUnit,
    ) -> None:  # fmt: skip
        """Start the pass in the first cycle in which no command in flight writes the tile."""
        gather = {field.name: field.word for field in COMMANDS["gather"].fields}
        address, rows = words[gather["indices"]].value[:31], words[gather["rows"]].value
        stride, extents = words[gather["mem_row_stride"]].value, products.extents
        is_gather = self.store.bank == BANK["gather"]
        wiring.connect(m, wiring.flipped(self.side), indices.side)
        start = Signal()
        m.d.comb += [
            self.query.first.eq(address),
            self.query.last.eq(Mux(is_gather, extents.gather_last, extents.scatter_last)),
            start.eq(wanted & ~reading & ~self.query.busy), indices.start.eq(start),
            indices.address.eq(address), indices.rows.eq(rows[:COUNT_BITS]),
            indices.abort.eq(~wanted),
            products.index_enable.eq(indices.index_enable), products.index.eq(indices.index),
            products.index_stride.eq(stride),
        ]  # fmt: skip
        m.d.sync += reading.eq(wanted & (reading | start))

    def _report(
        self, m: Module, rules: list[tuple[Value, FaultKind, bool]], words: data.View, cycle: Value,
        issued: Value,
    ) -> None:  # fmt: skip
        """The first broken rule's fault; with none broken, an index was wrong."""
        info, load = self.store.fault_info, COMMANDS["load"].by_name
        m.d.sync += [
            info.cycle.eq(cycle), info.pc.eq(self.store.pc), info.is_command.eq(1),
            info.command.eq(issued),
            info.slot.eq(words[load["slot"].word].value),
            info.offset.eq(words[load["offset"].word].value),
            info.kind.eq(FaultKind.GATHER_INDEX), info.place.eq(1),
        ]  # fmt: skip
        chosen = m.If
        for found, kind, place in rules:
            with chosen(found):
                m.d.sync += [info.kind.eq(kind), info.place.eq(place)]
            chosen = m.Elif
