"""Hulls, bank masks, bounds and overlaps of a command: the second of two cycles.

`Describe` is combinational, in cycle e + 1, from the `Operands` registered in e. It makes the
window's `Description` and the faults of steps 3 to 7 of `pagoda.isa.checks` that need hulls.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.field_registers import BANK
from pagoda.chip.interfaces import DRAM_ADDRESS_BITS, LOAD, MATRIX, STORE, VECTOR, Description
from pagoda.chip.operands import Operands
from pagoda.chip.products import clip, local_bits
from pagoda.isa.access import ACC, DRAM, SRAM
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.machine import ENGINES
from pagoda.isa.timing import dram_slot_cycle

REACH_BITS = 36  # of a distance in DRAM that decides a fault, signed


class Breaches(data.StructLayout):
    """Which rules are broken, in the order of the checks; `index`: of gather and scatter, once
    the products of the extreme indices are there."""

    def __init__(self):
        super().__init__(dict.fromkeys(
            ("rows_overlap", "no_slot", "no_permission", "out_of_slot", "out_of_range",
             "bad_operand", "index"), 1,
        ))  # fmt: skip


class Sharing(data.StructLayout):
    """Which source operands touch a common bank, and the most that touch one."""

    def __init__(self):
        super().__init__({"ab": 1, "ac": 1, "bc": 1, "per_bank": 2})


class Describe(wiring.Component):
    """`product`: the last thing multiplied, TARGET's if `operands.late`. With `previous` it is the
    distance of the rows with the largest and the smallest index."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "bank": In(4), "empty": In(1), "functions": In(16), "operands": In(Operands(chip)),
            "product": In(signed(64)), "previous": In(signed(64)),
            "description": Out(Description(chip)), "breaches": Out(Breaches()),
            "sharing": Out(Sharing()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        self._local(m)
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
            rest = tile.rest
            if name == "d":
                rest = Mux(operands.late, clip(self.product.as_unsigned(), bits + 1), tile.rest)
            total = Signal(bits + 4, name=f"{name}_last")
            m.d.comb += total.eq(tile.reached + tile.row_last + rest)
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
            self.breaches.out_of_range.eq(Cat(outside.values()).any()),
            self.breaches.bad_operand.eq(Cat(wrong_kind, clash).any()),
        ]

        here, indexed = ~self.empty, operands.indexed
        ranges = {n: self._tile_range(operands[n], last[n], here) for n in "abcd"}
        d_read = operands.d.valid & operands.d_reads
        dram = self._dram_range(m, here)
        dram_first = operands.transfer & operands.d.valid  # load, gather: their d takes no read
        both = here & operands.dram_reads & operands.has_dram
        m.d.comb += [
            out.reads[0].eq(Mux(dram_first, dram, ranges["a"])),
            out.reads[1].eq(ranges["b"]),
            out.reads[2].eq(Mux(d_read, ranges["d"], Mux(operands.transfer, dram, ranges["c"]))),
            out.write.eq(Mux(operands.dram_writes, dram, ranges["d"])),
        ]
        with m.If(dram_first):
            m.d.comb += [out.reads[0].valid.eq(both), out.reads[2].valid.eq(0)]
        with m.Elif(operands.transfer):
            m.d.comb += out.reads[2].valid.eq(both)
        index_banks = Mux(indexed, 0, masks["b"])
        sources = masks["a"] | index_banks | masks["c"]
        m.d.comb += [
            out.read_ports.eq(Mux(here, sources | Mux(operands.d_reads, masks["d"], 0), 0)),
            out.write_ports.eq(Mux(here, masks["d"], 0)),
        ]
        ab, ac, bc = ((masks[x] & masks[y]) for x, y in ("ab", "ac", "bc"))
        pair = (ab | ac | bc).any()
        m.d.comb += [
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

    def _dram_range(self, m: Module, here: Value) -> Value:
        """Physical hull of the rows in the slot; also finds rows outside the slot."""
        operands, breaches = self.operands, self.breaches
        low, high = Signal(signed(64)), Signal(signed(64))
        with m.If(operands.indexed):
            m.d.comb += [
                low.eq(Mux(operands.falling, self.product, self.previous)),
                high.eq(Mux(operands.falling, self.previous, self.product)),
            ]
        first, last = Signal(DRAM_ADDRESS_BITS), Signal(DRAM_ADDRESS_BITS)
        row_last = Cat(operands.mem_row_last, C(0, 1)).as_signed()
        m.d.comb += [
            first.eq(operands.base + operands.first + low),
            last.eq(operands.base + operands.last + row_last + high),
        ]
        far = _far(low) | _far(high)
        below = operands.first + _near(low)
        beyond = operands.last + row_last + _near(high) - operands.bytes
        outside = (below < 0) | (beyond >= 0)
        m.d.comb += [
            breaches.no_slot.eq(operands.transfer & ~operands.exists),
            breaches.no_permission.eq(operands.transfer & ~operands.permitted),
            breaches.out_of_slot.eq(
                operands.transfer & ~operands.indexed & operands.has_dram & outside
            ),
            breaches.index.eq(far | outside),
        ]
        return Cat(here & operands.has_dram, C(DRAM, 2), first, last)

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
            "matmul": chip.psum_latency + 4, "reduce": 8, "finish": 8, "transpose": 4, "iota": 4,
        }  # fmt: skip
        tails |= {"gather": tails["load"], "scatter": tails["store"]}
        first, second = _latency(self.functions[:8]), _latency(self.functions[8:])
        with m.Switch(self.bank):
            for name, command in COMMANDS.items():
                with m.Case(BANK[name]):
                    m.d.comb += [
                        out.engine.eq(ENGINE[command.engine]),
                        out.tail.eq(4 + first + second if name == "vector" else tails[name]),
                    ]
        with m.If(self.empty):
            m.d.comb += out.tail.eq(0)


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
