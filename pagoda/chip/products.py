"""The products of fields that hulls and checks need, kept up to date behind the stores.

A command's extents and strides are stored at least STORE_CYCLES before its go. One multiplier uses
that time: a store triggers the products that depend on the word, one a cycle, and each lands in a
small memory that the bank addresses, as the fields themselves do. Then go only adds.

    c      a store takes effect (step 0). The product of an extent goes out at once: the extent is
           on the bus, so only its partner has to be fetched
    c + k  step k. The operands are latched at its end
    c+k+1  the multiplier works
    c+k+2  the product is in the register `product`, and written to its memory
    c + 5  at the earliest, the go

So a product of step 2 or before is in memory at the go. Only TARGET may be late: the matrix
product's result hull ends a chain of three (m0 * m1 * m2 * stride, steps 0, 2, 4), and the vector
engine's fourth operand is in step 3. `late` tells of the one that arrives after the go.

Extents above COUNT_LIMIT are a fault and extents of 0 an empty command, so products need not be
right for them. Every product is kept in as many bits as decide a fault, the top one standing for
all that lie above.
"""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Array, Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.field_registers import BANK, BANK_NUMBERS, BankWords, CommandFields
from pagoda.isa.chip import Chip
from pagoda.isa.commands import BY_BANK, COMMANDS, COUNT_LIMIT, WORDS_PER_BANK

# Where products are kept; a command uses some of these places.
PLACES = 11
(ROWS, PLANES, MEM_ROWS, MEM_PLANES, COUNTS, M0_M1, M, TRANSPOSED, B_K, B_N, TARGET) = range(PLACES)
LAST_STEP = 4
SETTLED_STEP = 2  # the last step whose product is in memory at the go
LATENCY = 2  # steps from a product to one that depends on it
DATA_ROWS = "rows - padding"  # a load's rows in DRAM, a sum of fields that is ready in step 2
SIGNED_STRIDES = ("mem_row_stride", "mem_plane_stride")  # multiplied by their magnitude
COUNT_BITS = COUNT_LIMIT.bit_length()


@dataclass(frozen=True)
class Product:
    """`count` * `factor`, or (`count` - 1) * `factor`; either may be the place of a product."""

    place: int
    count: str | int
    factor: str | int
    less_one: bool = True

    @property
    def operands(self) -> tuple[str | int, str | int]:
        return self.count, self.factor


def _counts(place: int, count: str | int, factor: str | int) -> Product:
    return Product(place, count, factor, False)


_PLANES = (
    Product(PLANES, "planes", "plane_stride"),
    Product(MEM_PLANES, "planes", "mem_plane_stride"),
    _counts(COUNTS, "planes", "rows"),
)
_ROWS = Product(ROWS, "rows", "row_stride")
PRODUCTS: dict[str, tuple[Product, ...]] = {
    "load": (_ROWS, Product(MEM_ROWS, DATA_ROWS, "mem_row_stride"), *_PLANES),
    "store": (_ROWS, Product(MEM_ROWS, "rows", "mem_row_stride"), *_PLANES),
    "gather": (_ROWS,),
    "scatter": (_ROWS,),
    "matmul": (
        _counts(M0_M1, "m0", "m1"),
        _counts(M, "m2", M0_M1),
        Product(TARGET, M, "acc_stride"),
        _counts(COUNTS, "k_outer", "k_inner"),
        Product(B_K, COUNTS, "b_stride"),
        Product(B_N, "n", "b_stride"),
        Product(ROWS, "m0", "m0_stride"),
        Product(PLANES, "m1", "m1_stride"),
        Product(MEM_ROWS, "m2", "m2_stride"),
        Product(MEM_PLANES, "k_outer", "k_outer_stride"),
        Product(TRANSPOSED, "k_inner", "m0_stride"),
    ),
    "vector": (
        Product(ROWS, "rows", "a_stride"),
        Product(PLANES, "rows", "b_stride"),
        Product(MEM_ROWS, "rows", "c_stride"),
        Product(TARGET, "rows", "dst_stride"),
    ),
    "reduce": (Product(ROWS, "rows", "src_stride"), Product(TARGET, "rows", "state_stride")),
    "finish": (Product(ROWS, "rows", "state_stride"), Product(TARGET, "rows", "dst_stride")),
    "transpose": (Product(ROWS, "rows", "src_stride"), Product(TARGET, "cols", "dst_stride")),
    "iota": (Product(TARGET, "rows", "dst_stride"),),
}


def schedule(command: str, word: int) -> dict[int, Product]:
    """Step -> product, for a store to a word of the command's bank.

    Longest chain first. An extent's product may go in step 0, but when its partner is the stride
    that was stored or has to lose its sign: then in step 1.
    """
    stored: set[str | int] = {f.name for f in COMMANDS[command].fields if f.word == word}
    ready: dict[str | int, int] = dict.fromkeys(stored, 0)
    if stored & {"rows", "pad_above"} and command == "load":
        ready[DATA_ROWS] = SETTLED_STEP
    waiting = _dependents(command, set(ready))
    steps: dict[int, Product] = {}
    for step in range(LAST_STEP + 1):
        possible = [p for p in waiting if _first_step(p, stored, ready, waiting) <= step]
        if possible:
            steps[step] = max(possible, key=lambda p: _chain(p, waiting))
            waiting.remove(steps[step])
            ready[steps[step].place] = step + LATENCY
    late = [step for step, p in steps.items() if step > SETTLED_STEP and p.place != TARGET]
    if waiting or late:
        raise AssertionError(f"{command}: word {word}: its products do not settle before the go")
    return steps


def _dependents(command: str, changed: set[str | int]) -> list[Product]:
    found: list[Product] = []
    for product in PRODUCTS[command]:  # products come before those that depend on them
        if changed & set(product.operands):
            found.append(product)
            changed.add(product.place)
    return found


def _first_step(
    product: Product, stored: set[str | int], ready: dict[str | int, int], waiting: list[Product]
) -> int:
    pending = {p.place for p in waiting}
    if pending & {o for o in product.operands if isinstance(o, int)}:
        return LAST_STEP + 1
    first = max(ready.get(operand, 0) for operand in product.operands)
    strided = product.factor in SIGNED_STRIDES or (product.less_one and product.factor in stored)
    return max(first, 1) if strided else first


def _chain(product: Product, waiting: list[Product]) -> int:
    after = [_chain(p, waiting) for p in waiting if product.place in p.operands]
    return 1 + max(after, default=0)


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
    """What one step multiplies: words by number, or what `a_from`, `b_place` say instead."""

    def __init__(self):
        super().__init__({
            "valid": 1, "place": range(PLACES), "less_one": 1, "magnitude": 1,
            "a_from": 2, "a_word": 4, "b_word": 4, "b_place": 1,
        })  # fmt: skip


A_WORD, A_DATA_ROWS, A_M, A_COUNTS = range(4)
_A_FROM = {DATA_ROWS: A_DATA_ROWS, M: A_M, COUNTS: A_COUNTS}


class ProductUnit(wiring.Component):
    """`bank`: whose `words` and `products` show; `store`: `word` of it is being set to `value`
    (`store_bank` is then the same, but comes earlier in the cycle).

    late: in the next cycle `product` will be the bank's TARGET, which is not in memory yet.
    index: with `index_enable` the multiplier takes `index` * `index_stride` instead, both signed;
    two cycles later it is in `product`, and the one before it in `previous`.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "bank": In(4), "store": In(1), "store_bank": In(4), "word": In(4), "value": In(32),
            "words": In(BankWords()), "products": Out(Products(chip)), "extents": Out(Extents()),
            "late": Out(1), "product": Out(signed(64)), "previous": Out(signed(64)),
            "index_enable": In(1), "index": In(signed(32)), "index_stride": In(signed(32)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        issue, first = self._issues(m)
        product_place = Signal(range(PLACES), reset_less=True)
        product_bank, product_valid = Signal(4, reset_less=True), Signal(reset_less=True)

        def recent(place: int) -> Value:
            """A place whose product may just have been worked out."""
            mine = at(self.products, place)
            now = product_valid & (product_place == place)
            return Mux(now, clip(self.product.as_unsigned(), len(mine)), mine)

        values = Array(self.words[word].value for word in range(WORDS_PER_BANK))
        chosen = Signal(COUNT_BITS + 1)
        with m.Switch(issue.a_from):
            for source, value in (
                (A_WORD, values[issue.a_word][:COUNT_BITS]),
                (A_DATA_ROWS, self.extents.data_rows.as_unsigned()[:COUNT_BITS]),
                (A_M, recent(M)), (A_COUNTS, recent(COUNTS)),
            ):  # fmt: skip
                with m.Case(source):
                    m.d.comb += chosen.eq(value)
        a, b = Signal(signed(33), reset_less=True), Signal(signed(33), reset_less=True)
        fetched, outer = Signal(32), recent(M0_M1)
        m.d.comb += fetched.eq(values[issue.b_word])
        negate = issue.magnitude & fetched[31]
        m.d.sync += [
            a.eq(chosen - issue.less_one),
            b.eq(Mux(issue.b_place, outer, (fetched ^ negate.replicate(32)) + negate)),
        ]
        with m.If(self.store):  # step 0 has less time: its decoding is not ahead, a needs none
            m.d.sync += [
                a.eq(self.value[:COUNT_BITS] - first.less_one),
                b.eq(Mux(first.b_place, outer, values[first.b_word])),
            ]
        with m.If(self.index_enable):
            m.d.sync += [a.eq(self.index), b.eq(self.index_stride)]

        working, indexing = Signal(reset_less=True), Signal(reset_less=True)
        place, bank = Signal(range(PLACES), reset_less=True), Signal(4, reset_less=True)
        m.d.sync += [
            working.eq(Mux(self.store, first.valid, issue.valid)), indexing.eq(self.index_enable),
            place.eq(Mux(self.store, first.place, issue.place)), bank.eq(self.bank),
            product_valid.eq(working), product_place.eq(place), product_bank.eq(bank),
        ]
        with m.If(working | indexing):
            m.d.sync += [self.product.eq(a * b), self.previous.eq(self.product)]
        m.d.comb += self.late.eq(working & (place == TARGET) & (bank == self.bank))

        for number in range(PLACES):
            kept = at(self.products, number)
            new = Signal(len(kept), name=f"new{number}")
            m.d.comb += new.eq(clip(self.product.as_unsigned(), len(kept)))
            write = product_valid & (product_place == number)
            if number == TARGET:  # may be asked for while it is written
                stored = Signal.like(kept, name="stored_target")
                self._keep(m, number, write, product_bank, new, stored)
                m.d.comb += kept.eq(Mux(write & (product_bank == self.bank), new, stored))
            else:
                self._keep(m, number, write, product_bank, new, kept)
        self._extents(m)
        magnitude = issue.valid & issue.magnitude & (self.bank == BANK["store"])
        for number, stride in ((MEM_ROWS, "row_stride"), (MEM_PLANES, "plane_stride")):
            kept = Signal(32, name=stride, reset_less=True)
            taken = Signal(name=f"{stride}_taken", reset_less=True)
            m.d.sync += taken.eq(magnitude & (issue.place == number) & ~self.store)
            with m.If(taken):
                m.d.sync += kept.eq(b)
            m.d.comb += self.extents[stride].eq(kept)
        return m

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

    def _issues(self, m: Module) -> tuple[data.View, data.View]:
        """What this step multiplies (decoded one cycle ahead), and what step 0 does."""
        first, following = Signal(Issue()), Signal(Issue())
        issue = Signal(Issue(), reset_less=True)
        step, word = Signal(range(LAST_STEP + 1), reset_less=True), Signal(4, reset_less=True)
        now_word, next_step = Mux(self.store, self.word, word), Signal(range(LAST_STEP + 2))
        m.d.comb += next_step.eq(Mux(self.store, 0, step) + 1)
        with m.If(self.store | ((step != 0) & (step != LAST_STEP))):
            m.d.sync += step.eq(next_step)
        with m.Else():
            m.d.sync += step.eq(0)
        running = self.store | (step != 0)
        m.d.sync += [issue.eq(following), word.eq(now_word)]
        schedules = {
            (bank << 4 | word): (command.name, word, schedule(command.name, word))
            for bank, command in BY_BANK.items()
            for word in command.words[1:]
        }
        with m.Switch(Cat(self.word, self.store_bank)):
            for address, (command, stored, steps) in schedules.items():
                if 0 in steps:
                    with m.Case(address):
                        self._decode(m, first, command, steps[0], stored)
        with m.Switch(Cat(now_word, self.bank)):
            for address, (command, _, steps) in schedules.items():
                with m.Case(address), m.Switch(next_step):
                    for number, product in steps.items():
                        if number:
                            with m.Case(number):
                                self._decode(m, following, command, product)
        with m.If(~running):
            m.d.comb += following.valid.eq(0)
        return issue, first

    def _decode(
        self, m: Module, issue: data.View, command: str, product: Product, stored: int | None = None
    ) -> None:
        """`stored`: the word on the bus in step 0, which takes the place of operand a."""
        words = {f.name: f.word for f in COMMANDS[command].fields}
        a, b = product.operands
        if stored is not None and words.get(b) == stored:
            a, b = b, a  # two extents
        m.d.comb += [
            issue.valid.eq(1), issue.place.eq(product.place), issue.less_one.eq(product.less_one),
            issue.magnitude.eq(product.factor in SIGNED_STRIDES),
            issue.a_from.eq(_A_FROM.get(a, A_WORD)), issue.a_word.eq(words.get(a, 0)),
            issue.b_place.eq(b == M0_M1), issue.b_word.eq(words.get(b, 0)),
        ]  # fmt: skip

    def _extents(self, m: Module) -> None:
        """Sums of fields: paddings in the cycle of their store, the rest one later."""
        stored = Signal(reset_less=True)
        m.d.sync += stored.eq(self.store)
        load = CommandFields(COMMANDS["load"], self.value, self.words)
        for extent, pads in (("rows", "pad_above"), ("cols", "pad_left")):
            pad, left = Signal(17, reset_less=True), Signal(signed(22), reset_less=True)
            pad_word = COMMANDS["load"].by_name[pads].word
            with m.If(self.store & (self.bank == BANK["load"]) & (self.word == pad_word)):
                m.d.sync += pad.eq(self.value[:16] + self.value[16:])
            with m.If(stored & (self.bank == BANK["load"])):
                m.d.sync += left.eq(load[extent][:COUNT_BITS] - pad)
            m.d.comb += self.extents[f"data_{extent}"].eq(left)
            if extent == "cols":
                m.d.comb += self.extents.odd_pad.eq(pad[0])
        for name in ("gather", "scatter"):
            f = CommandFields(COMMANDS[name], self.value, self.words)
            last = Signal(31, name=f"{name}_last", reset_less=True)
            with m.If(stored & (self.bank == BANK[name])):
                m.d.sync += last.eq(f["indices"][:31] + (f["rows"][:COUNT_BITS] << 2) - 1)
            m.d.comb += self.extents[f"{name}_last"].eq(last)
