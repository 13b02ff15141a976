"""The products of fields that hulls and checks need, kept up to date behind the stores.

A command's extents and strides are stored at least STORE_CYCLES before its go. One multiplier uses
that time: a store triggers the products that depend on the word, one a cycle, and each lands in a
small memory that the bank addresses, as the fields themselves do. Then go only adds.

    c - 1  step 0: the store is on the bus, but may not take effect. The product of an extent goes
           out at once: the extent is on the bus, so only its partner has to be fetched
    c      the store takes effect
    c+k-1  step k. The operands are latched at its end
    c + k  the multiplier works
    c+k+1  the product is in the register `product`, and written to its memory
    c + 4  at the earliest, the go is on the bus

So a product of step 2 or before is in memory when the go comes. Only TARGET may come one cycle
later: the matrix product's result hull ends a chain of three (m0 * m1 * m2 * stride, steps 0, 2,
4), and the vector engine's fourth operand is in step 3.

Extents above COUNT_LIMIT are a fault and extents of 0 an empty command, so products need not be
right for them. Every product is kept in as many bits as decide a fault, the top one standing for
all that lie above.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.field_registers import BANK, BANK_NUMBERS, BankWords, CommandFields
from pagoda.chip.product_schedule import (
    B_K,
    B_N,
    COUNT_BITS,
    COUNTS,
    COUNTS_AT,
    FACTORS_AT,
    FROM_BUS,
    FROM_COUNTS,
    FROM_DATA_ROWS,
    FROM_M,
    FROM_M0_M1,
    FROM_WORD,
    LAST_STEP,
    M0_M1,
    MEM_PLANES,
    MEM_ROWS,
    PLACES,
    PLANES,
    PRODUCTS,
    ROWS,
    SCHEDULES,
    SIGNED_STRIDES,
    TARGET,
    TRANSPOSED,
    M,
    Product,
    schedules_of,
    sources,
)
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS, WORDS_PER_BANK


def local_bits(chip: Chip) -> int:
    """Bits of a byte address in the larger of SRAM and ACC."""
    return (max(chip.sram_bytes, chip.acc_bytes) - 1).bit_length()


def clip(value: Value, width: int) -> Value:
    """The value in `width` bits; the top bit is set whenever it does not fit the bits below."""
    if len(value) < width:
        return value
    return Cat(value[: width - 1], value[width - 1 :].any())


def at(products: data.View, place: int) -> Value:
    return products[f"place{place}"]


class Products(data.StructLayout):
    """The products of one bank, by place. ROWS to MEM_PLANES: 2^32 and more are the top bit."""

    def __init__(self, chip: Chip):
        local = local_bits(chip) + 1
        widths = dict.fromkeys((ROWS, PLANES, MEM_ROWS, MEM_PLANES), 33)
        widths |= dict.fromkeys((COUNTS, M0_M1, M), COUNT_BITS + 1)
        widths |= dict.fromkeys((TRANSPOSED, B_K, B_N, TARGET), local)
        super().__init__({f"place{place}": widths[place] for place in range(PLACES)})


class Extents(data.StructLayout):
    """Of a load: rows and columns less padding (at most 0: all padding), odd column padding. Of a
    store: its DRAM strides' magnitudes. Of gather and scatter: the index tile's last byte."""

    def __init__(self):
        super().__init__({
            "data_rows": signed(COUNT_BITS + 1), "data_cols": signed(COUNT_BITS + 1),
            "odd_pad": 1, "row_stride": 32, "plane_stride": 32,
            "gather_last": 31, "scatter_last": 31,
        })  # fmt: skip


class Issue(data.StructLayout):
    """What one step multiplies: words by number, or what `a_from`, `b_from` say instead."""

    def __init__(self):
        super().__init__({
            "valid": 1, "place": range(PLACES), "less_one": 1, "magnitude": 1,
            "a_from": 3, "a_word": 4, "b_from": 2, "b_word": 4,
        })  # fmt: skip


class ProductUnit(wiring.Component):
    """`bank`: whose `words` and `products` show; `store`: `word` of it is being set to `value`.
    `bank`, `word` and `value` are there from the cycle before `store` on; bank and word stay for
    three cycles after it, value for two.

    products: TARGET is right one cycle later than the others.
    index: with `index_enable` the multiplier takes `index` * `index_stride` instead, both signed;
    two cycles later it is in `product`, and the one before it in `previous`.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "bank": In(4), "store": In(1), "word": In(4), "value": In(32),
            "words": In(BankWords()), "products": Out(Products(chip)), "extents": Out(Extents()),
            "product": Out(signed(64)), "previous": Out(signed(64)),
            "index_enable": In(1), "index": In(signed(32)), "index_stride": In(signed(32)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        running = Signal()  # from step 1 on: a store takes effect, or has done so
        issue, first = self._issues(m, running)
        product_place = Signal(range(PLACES), reset_less=True)
        product_bank, product_valid = Signal(4, reset_less=True), Signal()

        def recent(place: int) -> Value:
            """A place whose product may just have been worked out."""
            mine = at(self.products, place)
            now = product_valid & (product_place == place)
            return Mux(now, clip(self.product.as_unsigned(), len(mine)), mine)

        outer, fetched, chosen = recent(M0_M1), Signal(32), Signal(COUNT_BITS + 1)
        count = self._word(m, "a", issue.a_word, COUNTS_AT)
        with m.Switch(issue.a_from):
            for source, value in (
                (FROM_WORD, count), (FROM_BUS, self.value),
                (FROM_DATA_ROWS, self.extents.data_rows.as_unsigned()[:COUNT_BITS]),
                (FROM_M, recent(M)), (FROM_COUNTS, recent(COUNTS)),
            ):  # fmt: skip
                with m.Case(source):
                    bits = COUNT_BITS if source in (FROM_WORD, FROM_BUS) else len(value)
                    m.d.comb += chosen.eq(value[:bits])
        m.d.comb += fetched.eq(
            Mux(issue.b_from[0], self.value, self._word(m, "b", issue.b_word, FACTORS_AT))
        )
        negate = issue.magnitude & fetched[31]
        a, b = Signal(signed(33), reset_less=True), Signal(signed(33), reset_less=True)
        less_one, partner = self._first_operands(outer)
        with m.If(running):
            m.d.sync += [
                a.eq(chosen - issue.less_one),
                b.eq(Mux(issue.b_from[1], outer, (fetched ^ negate.replicate(32)) + negate)),
            ]
        with m.Else():
            m.d.sync += [a.eq(self.value[:COUNT_BITS] - less_one), b.eq(partner)]
        with m.If(self.index_enable):
            m.d.sync += [a.eq(self.index), b.eq(self.index_stride)]

        latched, certain, indexing = Signal(), Signal(reset_less=True), Signal()
        place, bank = Signal(range(PLACES), reset_less=True), Signal(4, reset_less=True)
        working = latched & (certain | self.store)
        m.d.sync += [
            latched.eq(Mux(running, issue.valid, first.valid)), certain.eq(running),
            place.eq(Mux(running, issue.place, first.place)), bank.eq(self.bank),
            indexing.eq(self.index_enable),
            product_valid.eq(working), product_place.eq(place), product_bank.eq(bank),
        ]
        with m.If(working | indexing):
            m.d.sync += [self.product.eq(a * b), self.previous.eq(self.product)]

        for number in range(PLACES):
            kept = at(self.products, number)
            new = Signal(len(kept), name=f"new{number}")
            m.d.comb += new.eq(clip(self.product.as_unsigned(), len(kept)))
            write = product_valid & (product_place == number)
            if number == TARGET:  # may be asked for while it is written
                stored, newest = Signal.like(kept, name="stored_target"), Signal()
                self._keep(m, number, write, product_bank, new, stored)
                m.d.sync += newest.eq(working & (place == TARGET) & (bank == self.bank))
                m.d.comb += kept.eq(Mux(newest, new, stored))
            else:
                self._keep(m, number, write, product_bank, new, kept)
        self._extents(m)
        magnitude = running & issue.valid & issue.magnitude & (self.bank == BANK["store"])
        for number, stride in ((MEM_ROWS, "row_stride"), (MEM_PLANES, "plane_stride")):
            kept = Signal(32, name=stride, reset_less=True)
            taken = Signal(name=f"{stride}_taken", reset_less=True)
            m.d.sync += taken.eq(magnitude & (issue.place == number))
            with m.If(taken):
                m.d.sync += kept.eq(b)
            m.d.comb += self.extents[stride].eq(kept)
        return m

    def _first_operands(self, outer: Value) -> tuple[Value, Value]:
        """Of the product in step 0, which has less time, for its decoding is not ahead: whether
        one is taken off the value on the bus, and the other factor. Both mean nothing if there is
        no product."""
        less_one: Value = C(0)
        factors = []
        for word in range(WORDS_PER_BANK):
            found = {
                bank: (steps[0].less_one, sources(command, steps[0], 0, word)[1])
                for bank, (command, steps) in schedules_of(word).items()
                if 0 in steps
            }
            for choice in sorted(set(found.values())):
                banks = [bank for bank, other in found.items() if other == choice]
                mine: Value = self.word == word
                if len(banks) < len(found):
                    mine = mine & self.bank.matches(*banks)
                (minus_one, (source, other)) = choice
                less_one = less_one | (mine & int(minus_one))
                value = outer if source == FROM_M0_M1 else self.words[other].value
                factors.append(Mux(mine, value, 0))
        return less_one, reduce(or_, factors)

    def _word(self, m: Module, name: str, number: Value, words: list[int]) -> Value:
        """The word of that number, which is one of `words`."""
        shown = Signal(32, name=f"{name}_fetched")
        *others, last = words
        with m.Switch(number):
            for word in others:
                with m.Case(word):
                    m.d.comb += shown.eq(self.words[word].value)
            with m.Default():
                m.d.comb += shown.eq(self.words[last].value)
        return shown

    def _keep(
        self, m: Module, place: int, write: Value, bank: Value, new: Value, shown: Value
    ) -> None:
        """The memory of one place; a place that one command uses is a register."""
        users = [name for name, found in PRODUCTS.items() if place in {p.place for p in found}]
        if len(users) == 1:
            register = Signal.like(shown, name=f"register{place}", reset_less=True)
            with m.If(write):
                m.d.sync += register.eq(new)
            m.d.comb += shown.eq(register)
            return
        cells = memory.Memory(shape=unsigned(len(shown)), depth=BANK_NUMBERS, init=[])
        m.submodules[f"place{place}"] = cells
        write_port, read_port = cells.write_port(), cells.read_port(domain="comb")
        m.d.comb += [
            write_port.en.eq(write), write_port.addr.eq(bank), write_port.data.eq(new),
            read_port.addr.eq(self.bank), shown.eq(read_port.data),
        ]  # fmt: skip

    def _issues(self, m: Module, running: Signal) -> tuple[data.View, data.View]:
        """What this step multiplies (decoded one cycle ahead), and what step 0 does."""
        first, following = Signal(Issue()), Signal(Issue())
        issue = Signal(Issue(), reset_less=True)
        step = Signal(range(LAST_STEP + 1))  # of a store that has taken effect, or 0
        next_step = Signal(range(LAST_STEP + 2))
        m.d.comb += [
            running.eq(self.store | (step != 0)),
            next_step.eq(Mux(self.store, 1, step) + 1),
        ]
        m.d.sync += [
            step.eq(Mux(running & (step != LAST_STEP), next_step, 0)), issue.eq(following),
        ]
        with m.Switch(Cat(self.word, self.bank)):
            for address, (command, word, steps) in SCHEDULES.items():
                with m.Case(address):
                    if 0 in steps:
                        self._decode(m, first, command, steps[0], 0, word)
                    with m.Switch(next_step):
                        for number, product in steps.items():
                            if number:
                                with m.Case(number):
                                    self._decode(m, following, command, product, number, word)
        return issue, first

    def _decode(
        self, m: Module, issue: data.View, command: str, product: Product, step: int, stored: int
    ) -> None:
        (a_from, a_word), (b_from, b_word) = sources(command, product, step, stored)
        m.d.comb += [
            issue.valid.eq(1), issue.place.eq(product.place), issue.less_one.eq(product.less_one),
            issue.magnitude.eq(product.factor in SIGNED_STRIDES),
            issue.a_from.eq(a_from), issue.a_word.eq(a_word),
            issue.b_from.eq(b_from), issue.b_word.eq(b_word),
        ]  # fmt: skip

    def _extents(self, m: Module) -> None:
        """Sums of fields: extents less padding at the end of their store, the rest one later."""
        stored, padding = Signal(reset_less=True), Signal(17, reset_less=True)
        words = {field.name: field.word for field in COMMANDS["load"].fields}
        m.d.sync += [stored.eq(self.store), padding.eq(self.value[:16] + self.value[16:])]
        for extent, pads in (("rows", "pad_above"), ("cols", "pad_left")):
            pad, left = Signal(17, reset_less=True), Signal(signed(22), reset_less=True)
            count, new = Signal(COUNT_BITS, name=f"new_{extent}"), Signal(17, name=f"new_{pads}")
            m.d.comb += [
                count.eq(Mux(self.word == words[extent], self.value,
                             self.words[words[extent]].value)),
                new.eq(Mux(self.word == words[pads], padding, pad)),
            ]  # fmt: skip
            with m.If(self.store & (self.bank == BANK["load"])):
                m.d.sync += [pad.eq(new), left.eq(count - new)]
            m.d.comb += self.extents[f"data_{extent}"].eq(left)
            if extent == "cols":
                m.d.comb += self.extents.odd_pad.eq(pad[0])
        for name in ("gather", "scatter"):
            f = CommandFields(COMMANDS[name], self.value, self.words)
            last = Signal(31, name=f"{name}_last", reset_less=True)
            with m.If(stored & (self.bank == BANK[name])):
                m.d.sync += last.eq(f["indices"][:31] + (f["rows"][:COUNT_BITS] << 2) - 1)
            m.d.comb += self.extents[f"{name}_last"].eq(last)
