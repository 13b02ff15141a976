"""The slots of a matmul, cycle by cycle: what its reads, its sums and its writes all follow.

k comes in passes of at most `rows`, n in blocks of at most `cols`, m row after row:

    for each run of k_inner, for each pass over it:          a pass lasts at least D cycles
        for each block of n:                                 a slot
            for each row of m

A slot streams its rows in its first cycles; it lasts until the next weights are loaded too, `w`
cycles beside the rows or, where A and B take turns at a bank, behind them. One walker yields these
cycles; delayed copies of them time everything else.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS, COUNT_LIMIT

COUNT_BITS = (COUNT_LIMIT - 1).bit_length()  # of a count less one


def log2(power: int) -> int:
    """Exponent of a power of two."""
    return power.bit_length() - 1


class MatmulFields(data.StructLayout):
    """What the engine keeps of a command. Counts that are walked are less one; addresses and
    strides are modulo the memory's size, since the checks keep every address inside it."""

    def __init__(self, chip: Chip):
        sram, acc = log2(chip.sram_bytes), log2(chip.acc_bytes)
        r, c = log2(chip.rows), log2(chip.cols)
        super().__init__({
            "integer": 1, "accumulate": 1, "transpose_a": 1, "transpose_b": 1,
            "shared": 1,  # A and B touch a common bank
            "no_k": 1,
            "a": sram, "m0_stride": sram, "m1_stride": sram, "m2_stride": sram,
            "k_outer_stride": sram, "b": sram, "b_stride": sram,
            "acc": acc, "acc_stride": acc,
            "m0": COUNT_BITS,  # with transpose_a the padded count
            "m1": COUNT_BITS, "m2": COUNT_BITS,
            "m_tail": r + 1,  # rows of the last `rows`, of transposed A: 1 to `rows`
            "k_outer": COUNT_BITS,
            "passes": COUNT_BITS,  # over one run of k_inner
            "k_tail": r + 1,  # k of a run's last pass: 1 to `rows`, or none
            "blocks": COUNT_BITS,
            "n_tail": c + 1,  # columns of the last block: 1 to `cols`
        })  # fmt: skip


def fields_of(m: Module, chip: Chip, job: data.View) -> data.View:
    """The fields of a job of the matrix engine."""
    out = Signal(MatmulFields(chip))
    r, c = log2(chip.rows), log2(chip.cols)

    def field(name: str) -> Value:
        place = COMMANDS["matmul"].by_name[name]
        return job.words[place.word][place.low : place.low + place.width]

    def less_one(name: str) -> Value:
        return (field(name)[: COUNT_BITS + 1] - 1)[:COUNT_BITS]

    def tail(name: str, exponent: int) -> Value:
        """What is left of a count in its last group of so many, a power of two."""
        low = field(name)[:exponent]
        return Cat(low, low == 0)

    flags = ("accumulate", "transpose_a", "transpose_b")
    places = ("a", "m0_stride", "m1_stride", "m2_stride", "k_outer_stride", "b", "b_stride", "acc",
              "acc_stride")  # fmt: skip
    m0, k_inner, n = (less_one(name) for name in ("m0", "k_inner", "n"))
    no_k = (field("k_inner") == 0) | (field("k_outer") == 0)
    m.d.comb += [
        *(out[name].eq(field(name)) for name in (*flags, *places)),
        out.integer.eq(field("type")[0] if len(chip.matrix_types) > 1
                       else chip.matrix_types[0] == "int8"),
        out.shared.eq(job.shared_ab), out.no_k.eq(no_k),
        out.m0.eq(Cat(m0[:r] | field("transpose_a").replicate(r), m0[r:])),
        out.m1.eq(less_one("m1")), out.m2.eq(less_one("m2")),
        out.m_tail.eq(tail("m0", r)), out.n_tail.eq(tail("n", c)),
        out.k_outer.eq(Mux(no_k, 0, less_one("k_outer"))),
        out.passes.eq(Mux(no_k, 0, k_inner >> r)),
        out.k_tail.eq(Mux(no_k, 0, tail("k_inner", r))), out.blocks.eq(n >> c),
    ]  # fmt: skip
    return out


class Step(data.StructLayout):
    """One cycle of the walk; all 0 outside of it, but for `go` in the cycle before."""

    def __init__(self):
        super().__init__({
            "go": 1,
            "first": 1,  # of a slot
            "row": 1,  # a row streams
            "real": 1,  # and is none that pads transposed A
            "wrap0": 1, "wrap1": 1,  # the last row of m0 (of `rows` rows), of m0 and m1
            "last_rows": 1,  # transposed A: among the last `rows` rows
            "first_pass": 1,
            "last_pass": 1,  # over a run of k_inner
            "last_block": 1,
            "slot_end": 1,
        })  # fmt: skip


class _Countdown:
    """Counts down, by the statements that its methods return; `over`, at 0, comes from a register,
    so that a long count costs no time."""

    def __init__(self, name: str, bits: int = COUNT_BITS):
        self.value, self.over = Signal(bits, name=name), Signal(name=f"{name}_over")

    def load(self, count: Value) -> list:
        return [self.value.eq(count), self.over.eq(count == 0)]

    def down(self) -> list:
        """Of a count that is not over."""
        return [self.value.eq(self.value - 1), self.over.eq(self.value == 1)]


class MatrixWalk(wiring.Component):
    """The walk starts in the cycle after `go`; `end` is high in its last cycle."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "go": In(1), "fields": In(MatmulFields(chip)), "active": Out(1), "step": Out(Step()),
            "end": Out(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        chip, f, step = self.chip, self.fields, self.step
        rows, slowest = chip.rows, max(chip.rows, chip.cols)
        r, longest = log2(rows), Const(chip.psum_latency - 1)
        m0, m1, m2, block, pass_, run = (
            _Countdown(name) for name in ("m0", "m1", "m2", "block", "pass", "run")
        )
        row, first, first_pass, last_rows = Signal(), Signal(), Signal(), Signal()
        loading = _Countdown("loading", (slowest - 1).bit_length())  # the next weights
        rest = _Countdown("rest", len(longest))  # of a pass's shortest time

        in_rows = ~m0.value[:r]
        m01_over = m0.over & m1.over
        last_row = row & m01_over & m2.over
        rows_over = (self.active & ~row) | (last_row & ~f.shared)
        slot_end = rows_over & loading.over & (~block.over | rest.over)
        pass_end = slot_end & block.over
        m.d.comb += [
            step.go.eq(self.go), step.first.eq(first), step.row.eq(row),
            step.real.eq(row & ~(f.transpose_a & last_rows & (in_rows >= f.m_tail))),
            step.wrap0.eq(row & Mux(f.transpose_a, in_rows.all(), m0.over)),
            step.wrap1.eq(row & ~f.transpose_a & m01_over),
            step.last_rows.eq(self.active & last_rows),
            step.first_pass.eq(self.active & first_pass),
            step.last_pass.eq(self.active & pass_.over),
            step.last_block.eq(self.active & block.over),
            step.slot_end.eq(slot_end),
            self.end.eq(pass_end & pass_.over & run.over),
        ]

        first_row = [*m0.load(f.m0), last_rows.eq(f.m0[r:] == 0)]
        rewind = [
            *first_row, *m1.load(f.m1), *m2.load(f.m2), row.eq(1), first.eq(1),
            *loading.load(Mux(f.transpose_b, slowest - 1, rows - 1)),
        ]  # fmt: skip
        new_pass = [*block.load(f.blocks), *rest.load(longest)]
        with m.If(self.go):
            m.d.sync += [
                *rewind, *new_pass, *pass_.load(f.passes), *run.load(f.k_outer),
                first_pass.eq(1), self.active.eq(1),
            ]  # fmt: skip
        with m.Elif(self.active):
            m.d.sync += first.eq(0)
            with m.If(~rest.over):
                m.d.sync += rest.down()
            with m.If((~row | ~f.shared) & ~loading.over):
                m.d.sync += loading.down()
            with m.If(row):
                m.d.sync += [*m0.down(), row.eq(~last_row)]
                with m.If(m0.value[:r] == 0):  # the row above is one of the last?
                    m.d.sync += last_rows.eq(m0.value[r:] == 1)
                with m.If(m0.over):
                    m.d.sync += [*first_row, *m1.down()]
                with m.If(m01_over):
                    m.d.sync += [*m1.load(f.m1), *m2.down()]
            with m.If(slot_end):
                m.d.sync += [*rewind, *block.down()]
            with m.If(pass_end):
                m.d.sync += [*new_pass, *pass_.down(), first_pass.eq(0)]
                with m.If(pass_.over):
                    m.d.sync += [*pass_.load(f.passes), *run.down()]
            with m.If(self.end):
                m.d.sync += [self.active.eq(0), row.eq(0), first.eq(0)]
        return m
