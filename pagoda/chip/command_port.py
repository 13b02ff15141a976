"""The command port of one core: field registers, checks, descriptions, index pass.

    e      valid & ready of a go: operands and the checks of fields are registered at its end
    e + 1  hulls and the remaining checks; `enter` with description and job, unless a rule is broken
    e + 2  the pulse of a fault

A gather or scatter is checked in its first cycle, t + 4, as if it entered there; then its indices
are read (`IndexPass`), and the rows they name are checked in the cycle after the pass is done.
"""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value
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
from pagoda.chip.products import COUNT_BITS, ProductUnit
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS, CONTROL_BANK, WORDS_PER_BANK
from pagoda.isa.fault import FaultKind


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

        # The bank on the bus, which stays selected until the next store.
        bank, held_bank = Signal(4), Signal(4, reset_less=True)
        m.d.comb += bank.eq(Mux(store.valid, store.bank, held_bank))
        m.d.sync += held_bank.eq(bank)
        is_go = (store.word == 0) & (store.bank != CONTROL_BANK)
        set_field = store.valid & (store.word != 0) & (store.bank != CONTROL_BANK)
        for unit in (fields, products, checks, select):
            m.d.comb += unit.bank.eq(bank)
        for unit in (fields, products):
            m.d.comb += [unit.word.eq(store.word), unit.value.eq(store.value)]
        m.d.comb += [
            fields.write.eq(set_field), products.store.eq(set_field),
            products.store_bank.eq(store.bank),
        ]  # fmt: skip
        for unit in (products, checks, select):
            m.d.comb += unit.words.eq(fields.words)
        for unit in (checks, select):
            m.d.comb += [
                unit.go.eq(store.value), unit.products.eq(products.products),
                unit.extents.eq(products.extents),
            ]  # fmt: skip
        m.d.comb += select.late.eq(products.late)
        wiring.connect(m, wiring.flipped(self.slots), select.slots)

        # When a go is taken. Only a gather or scatter that is not empty reads indices.
        rows, cols = (COMMANDS["gather"].by_name[name].word for name in ("rows", "cols"))
        stopped, waited, reading, done = Signal(), Signal(), Signal(), Signal()
        go, indexed, passing, accept = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            go.eq(store.valid & is_go & ~store.drop & ~stopped),
            indexed.eq(store.bank.matches(BANK["gather"], BANK["scatter"])),
            passing.eq(indexed & fields.words[rows].nonzero & fields.words[cols].nonzero),
            accept.eq(go & ~self.full & (~passing | indices.done)),
            store.ready.eq(store.valid & Mux(
                store.bank == CONTROL_BANK, self.empty, Mux(is_go, accept, 1)
            )),
        ]  # fmt: skip
        final, probing, checking = Signal(), Signal(), Signal()
        m.d.sync += [
            waited.eq(go & ~accept), final.eq(accept),
            probing.eq(go & indexed & ~waited), done.eq(go & indices.done),
            checking.eq(go & indices.done & ~done),
        ]  # fmt: skip
        self._read_indices(m, go & passing, reading, fields.words, indices, products)

        # Between the two cycles.
        operands, value = Signal(Operands(chip), reset_less=True), Signal(32, reset_less=True)
        pc, cycle = Signal(32, reset_less=True), Signal(48, reset_less=True)
        illegal, empty, misaligned, misshapen = (
            Signal(name=name, reset_less=True)
            for name in ("illegal", "empty_command", "misaligned", "misshapen")
        )
        m.d.sync += [
            operands.eq(select.operands), value.eq(store.value), pc.eq(store.pc),
            cycle.eq(self.cycle), illegal.eq(checks.illegal), empty.eq(checks.empty),
            misaligned.eq(checks.misaligned), misshapen.eq(checks.misshapen),
        ]  # fmt: skip
        m.d.comb += [
            describe.bank.eq(held_bank), describe.empty.eq(empty),
            describe.functions.eq(value[:16]), describe.operands.eq(operands),
            describe.product.eq(products.product), describe.previous.eq(products.previous),
        ]  # fmt: skip

        breaches = describe.breaches
        shape = misshapen | breaches.rows_overlap
        rules = [  # from the first to the last
            (illegal, FaultKind.BAD_FIELD, False),
            (misaligned, FaultKind.MISALIGNED, False),
            (shape, FaultKind.BAD_FIELD, False),
            (breaches.no_slot, FaultKind.BAD_SLOT, True),
            (breaches.no_permission, FaultKind.NO_PERMISSION, True),
            (breaches.out_of_slot, FaultKind.OUT_OF_SLOT, True),
            (breaches.out_of_range, FaultKind.LOCAL_OUT_OF_RANGE, False),
            (breaches.bad_operand, FaultKind.BAD_FIELD, False),
        ]
        broken, fault, issued = Signal(), Signal(), Signal(32)
        later = rules[1][0]
        for found, _, _ in rules[2:]:
            later = later | found
        m.d.comb += [
            broken.eq(illegal | (~empty & later)),
            fault.eq(
                ~stopped & (((probing | final) & broken) | (checking & breaches.index))
            ),
            self.enter.eq(final & ~stopped & ~fault),
        ]  # fmt: skip
        m.d.sync += store.fault.eq(fault)
        with m.If(fault):
            m.d.sync += stopped.eq(1)
            self._report(m, rules, fields.words, cycle, pc, issued)
        with m.Elif(~store.valid):
            m.d.sync += stopped.eq(0)
        with m.If(self.enter):
            m.d.sync += issued.eq(issued + 1)
        with m.If(self.launch):
            m.d.sync += [issued.eq(0), stopped.eq(0)]

        job, sharing = self.job, describe.sharing
        m.d.comb += [
            self.description.eq(describe.description),
            job.bank.eq(held_bank), job.empty.eq(empty), job.words[0].eq(value),
            *(job.words[i].eq(fields.words[i].value) for i in range(1, WORDS_PER_BANK)),
            job.base.eq(operands.base), job.shared_ab.eq(sharing.ab), job.shared_ac.eq(sharing.ac),
            job.shared_bc.eq(sharing.bc), job.per_bank.eq(sharing.per_bank), job.pc.eq(pc),
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
        pc: Value, issued: Value,
    ) -> None:  # fmt: skip
        """The first broken rule's fault; with none broken, an index was wrong."""
        info, load = self.store.fault_info, COMMANDS["load"].by_name
        m.d.sync += [
            info.cycle.eq(cycle), info.pc.eq(pc), info.is_command.eq(1), info.command.eq(issued),
            info.slot.eq(words[load["slot"].word].value),
            info.offset.eq(words[load["offset"].word].value),
            info.kind.eq(FaultKind.GATHER_INDEX), info.place.eq(1),
        ]  # fmt: skip
        chosen = m.If
        for found, kind, place in rules:
            with chosen(found):
                m.d.sync += [info.kind.eq(kind), info.place.eq(place)]
            chosen = m.Elif
