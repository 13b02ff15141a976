"""Hulls, bank masks, bounds and overlaps of a command: the second of two cycles.

`Describe` works in the entry cycle e, from the `Operands` registered before. It makes the faults
of steps 3 to 7 of `pagoda.isa.checks` that need hulls, and from registers, in e + 1, the window's
`Description`. Only then the reach of a gather's or scatter's rows in DRAM is known.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.field_registers import BANK
from pagoda.chip.interfaces import (
    DRAM_ADDRESS_BITS,
    LOAD,
    MATRIX,
    STORE,
    VECTOR,
    Description,
    Range,
)
from pagoda.chip.operands import OFFSET_BITS, Operands
from pagoda.chip.products import local_bits
from pagoda.isa.access import ACC, DRAM, SRAM
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.machine import ENGINES
from pagoda.isa.timing import dram_slot_cycle

REACH_BITS = 36  # of a distance in DRAM that decides a fault, signed


class Breaches(data.StructLayout):
    """Which rules are broken, in the order of the checks; of `out_of_range` and `bad_operand` the
    parts that take longest to work out are apart."""

    def __init__(self):
        super().__init__(dict.fromkeys(
            ("rows_overlap", "no_slot", "no_permission", "out_of_slot", "out_of_range",
             "target_out_of_range", "bad_operand", "clash"), 1,
        ))  # fmt: skip


class Sharing(data.StructLayout):
    """Which source operands touch a common bank, and the most that touch one."""

    def __init__(self):
        super().__init__({"ab": 1, "ac": 1, "bc": 1, "per_bank": 2})


class Describe(wiring.Component):
    """In e: bank, empty, functions, operands, target (the product TARGET) and breaches.

    In e + 1: description and sharing; `product`, which with `previous` is the distance of the rows
    with the largest and the smallest index; index_breach: one of these rows leaves the slot.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "bank": In(4), "empty": In(1), "functions": In(16), "operands": In(Operands(chip)),
            "target": In(local_bits(chip) + 1), "breaches": Out(Breaches()),
            "product": In(signed(64)), "previous": In(signed(64)), "index_breach": Out(1),
            "description": Out(Description(chip)), "sharing": Out(Sharing()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        # The local ranges of two places of the description that a range in DRAM may take.
        self._third, self._written = Signal(Range()), Signal(Range())
        self._local(m)
        self._dram(m)
        self._separate(m)
        self._engine(m)
        return m

    # SRAM and ACC. --------------------------------------------------------------------------------

    def _local(self, m: Module) -> None:
        chip, operands, out = self.chip, self.operands, self.description
        bits = local_bits(chip)
        last, outside, masks = {}, {}, {}
        sizes = {"sram": chip.sram_bytes, "acc": chip.acc_bytes}
        for name in "abcd":
            tile = operands[name]
            rest = Mux(operands.targeted, self.target, 0) if name == "d" else tile.rest
            total = Signal(bits + 4, name=f"{name}_last")
            m.d.comb += total.eq(tile.reached + tile.row_bytes + rest)
            last[name] = total[:bits]
            sram, acc = (total[size.bit_length() - 1 :].any() for size in sizes.values())
            outside[name] = tile.valid & Mux(tile.acc, acc, sram)
            masks[name] = Signal(chip.sram_banks + chip.acc_banks, name=f"{name}_banks")
            m.d.comb += masks[name].eq(self._banks(tile, total))
        wrong_kind = [operands[n].valid & operands[n].acc & ~operands[n].word for n in "abcd"]
        clash = [
            operands[n].valid & operands.d.valid & (operands[n].acc == operands.d.acc)
            & (operands[n].first <= last["d"]) & (operands.d.first <= last[n])
            & ~operands.in_place[number]
            for number, n in enumerate("abc")
        ]  # fmt: skip
        m.d.comb += [
            self.breaches.target_out_of_range.eq(outside.pop("d")),
            self.breaches.out_of_range.eq(Cat(outside.values()).any()),
            self.breaches.bad_operand.eq(Cat(wrong_kind).any()),
            self.breaches.clash.eq(Cat(clash).any()),
        ]

        here = ~self.empty
        ranges = {n: self._tile_range(operands[n], last[n], here) for n in "abcd"}
        third = Mux(operands.d_reads, ranges["d"], ranges["c"])  # of no transfer
        m.d.sync += [
            out.reads[0].eq(ranges["a"]), out.reads[1].eq(ranges["b"]),
            self._third.eq(Mux(operands.transfer, 0, third)),
            self._written.eq(Mux(operands.dram_writes, 0, ranges["d"])),
        ]  # fmt: skip
        sources = masks["a"] | Mux(operands.indexed, 0, masks["b"]) | masks["c"]
        ab, ac, bc = ((masks[x] & masks[y]) for x, y in ("ab", "ac", "bc"))
        pair = (ab | ac | bc).any()
        m.d.sync += [
            out.read_ports.eq(Mux(here, sources | Mux(operands.d_reads, masks["d"], 0), 0)),
            out.write_ports.eq(Mux(here, masks["d"], 0)),
            self.sharing.ab.eq(ab.any()), self.sharing.ac.eq(ac.any()),
            self.sharing.bc.eq(bc.any()),
            self.sharing.per_bank.eq(Mux((ab & masks["c"]).any(), 3, Mux(pair, 2, 1))),
        ]  # fmt: skip

    def _banks(self, tile: data.View, last: Value) -> Value:
        """One bit per bank from the hull's first byte to its last; ACC banks follow SRAM's."""
        touched = []
        for acc, memory, banks in (
            (0, "sram", self.chip.sram_banks), (1, "acc", self.chip.acc_banks),
        ):  # fmt: skip
            shift = self.chip.bank_bytes(memory).bit_length() - 1
            low, high = tile.first[shift:], last[shift : local_bits(self.chip)]
            touched += [
                tile.valid & (tile.acc == acc) & (low <= bank) & (high >= bank)
                for bank in range(banks)
            ]
        return Cat(touched)

    def _tile_range(self, tile: data.View, last: Value, here: Value) -> Value:
        address = DRAM_ADDRESS_BITS
        return Cat(
            tile.valid & here, Mux(tile.acc, C(ACC, 2), C(SRAM, 2)),
            _widen(tile.first, address), _widen(last, address),
        )  # fmt: skip

    # DRAM. ----------------------------------------------------------------------------------------

    def _dram(self, m: Module) -> None:
        """Physical hull of the rows in the slot, and whether they leave the slot."""
        operands, breaches, out = self.operands, self.breaches, self.description
        row_last = Cat(operands.mem_row_last, C(0, 1)).as_signed()
        # Of the rows; a gather's or scatter's are farther by the distance of its indices.
        first, last = Signal(DRAM_ADDRESS_BITS), Signal(DRAM_ADDRESS_BITS)
        below, beyond = Signal(signed(OFFSET_BITS)), Signal(signed(OFFSET_BITS + 2))
        next_beyond = Signal.like(beyond)
        indexed, falling = Signal(), Signal()
        reads, writes = Signal(), Signal()
        here = ~self.empty & operands.has_dram
        m.d.comb += [
            next_beyond.eq(operands.last + row_last - operands.bytes),
            breaches.no_slot.eq(operands.transfer & ~operands.exists),
            breaches.no_permission.eq(operands.transfer & ~operands.permitted),
            breaches.out_of_slot.eq(
                operands.transfer & ~operands.indexed & operands.has_dram
                & ((operands.first < 0) | (next_beyond >= 0))
            ),
        ]  # fmt: skip
        m.d.sync += [
            first.eq(operands.base + operands.first),
            last.eq(operands.base + operands.last + row_last),
            below.eq(operands.first), beyond.eq(next_beyond), indexed.eq(operands.indexed),
            falling.eq(operands.falling), reads.eq(here & operands.dram_reads),
            writes.eq(here & operands.dram_writes),
        ]  # fmt: skip

        low, high = Signal(signed(64)), Signal(signed(64))
        m.d.comb += [
            low.eq(Mux(falling, self.product, self.previous)),
            high.eq(Mux(falling, self.previous, self.product)),
            self.index_breach.eq(
                _far(low) | _far(high) | (below + _near(low) < 0) | (beyond + _near(high) >= 0)
            ),
        ]  # fmt: skip
        dram = Cat(
            (first + Mux(indexed, low, 0))[:DRAM_ADDRESS_BITS],
            (last + Mux(indexed, high, 0))[:DRAM_ADDRESS_BITS],
        )
        for target, local, used in (
            (out.reads[2], self._third, reads), (out.write, self._written, writes),
        ):  # fmt: skip
            mine = Cat(used, C(DRAM, 2) & used.replicate(2), dram & used.replicate(len(dram)))
            m.d.comb += target.eq(Value.cast(local) | mine)

    # The destination's rows. ----------------------------------------------------------------------

    def _separate(self, m: Module) -> None:
        """Rows, or planes, must not reach into one another. With both, the larger stride must also
        get over what the smaller one covers; planes come first when the strides are equal."""
        s = self.operands.separate
        beyond = Mux(s.planes_inner, s.row_less, s.plane_less)
        m.d.comb += self.breaches.rows_overlap.eq(
            (s.rows_many & (s.row_stride < s.row_bytes))
            | (s.planes_many & (s.plane_stride < s.row_bytes))
            | (s.rows_many & s.planes_many & (beyond < s.row_bytes))
        )

    # Engine and tail. -----------------------------------------------------------------------------

    def _engine(self, m: Module) -> None:
        chip, out = self.chip, self.description
        late = dram_slot_cycle(chip, 1)
        tails = {
            "load": chip.dram_latency + 8 + late, "store": 12 + late,
            "matmul": chip.psum_latency + 4, "reduce": 8, "finish": 8, "transpose": 8, "iota": 8,
        }  # fmt: skip
        tails |= {"gather": tails["load"], "scatter": tails["store"]}
        first, second = _latency(self.functions[:8]), _latency(self.functions[8:])
        with m.Switch(self.bank):
            for name, command in COMMANDS.items():
                with m.Case(BANK[name]):
                    m.d.sync += [
                        out.engine.eq(ENGINE[command.engine]),
                        out.tail.eq(4 + first + second if name == "vector" else tails[name]),
                    ]
        with m.If(self.empty):
            m.d.sync += out.tail.eq(0)


ENGINE = dict(zip(ENGINES, (LOAD, STORE, MATRIX, VECTOR), strict=True))


def _latency(code: Value) -> Value:
    result: Value = C(0, 5)
    for latency in sorted({f.latency for f in VECTOR_FUNCTIONS.values()} - {0}):
        codes = [number for number, f in VECTOR_FUNCTIONS.items() if f.latency == latency]
        result = Mux(code.matches(*codes), latency, result)
    return result


def _widen(value: Value, width: int) -> Value:
    return Cat(value, C(0, width - len(value)))


def _near(distance: Value) -> Value:
    return distance[:REACH_BITS].as_signed()


def _far(distance: Value) -> Value:
    """The distance does not fit REACH_BITS: no slot reaches that far."""
    above = distance[REACH_BITS - 1 :]
    return above.any() & ~above.all()
