"""The slots of a matmul, cycle by cycle: what its reads, its sums and its writes all follow.

k comes in passes of at most `rows`, n in blocks of at most `cols`, m row after row:

    for each run of k_inner, for each pass over it:          a pass lasts at least D cycles
        for each block of n:                                 a slot
            for each row of m

A slot streams its rows in its first cycles; it lasts until the next weights are loaded too, `w`
cycles beside the rows or, where A and B take turns at a bank, behind them. One walker yields these
cycles; delayed copies of them time everything else.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS, COUNT_LIMIT

COUNT_BITS = (COUNT_LIMIT - 1).bit_length()  # of a count less one


def log2(power: int) -> int:
    """Exponent of a power of two."""
    return power.bit_length() - 1


class MatmulFields(data.StructLayout):
    """What the engine keeps of a command. Counts are less one; addresses and strides are modulo
    the memory's size, since the checks keep every address inside it."""

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
            "m_tail": r,  # rows of the last `rows`, of transposed A
            "k_outer": COUNT_BITS,
            "passes": COUNT_BITS,  # over one run of k_inner
            "k_tail": r,  # k of a run's last pass
            "blocks": COUNT_BITS,
            "n_tail": c,  # columns of the last block
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
        out.m1.eq(less_one("m1")), out.m2.eq(less_one("m2")), out.m_tail.eq(m0),
        out.k_outer.eq(Mux(no_k, 0, less_one("k_outer"))),
        out.passes.eq(Mux(no_k, 0, k_inner >> r)), out.k_tail.eq(k_inner),
        out.blocks.eq(n >> c), out.n_tail.eq(n),
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
        r, longest = log2(chip.rows), chip.psum_latency - 1
        m0, m1, m2, block, pass_, run = (
            Signal(COUNT_BITS, name=name) for name in ("m0", "m1", "m2", "block", "pass", "run")
        )  # each counts down
        rows_done, first, first_pass = Signal(), Signal(), Signal()
        loaded = Signal(range(max(chip.rows, chip.cols)))  # of the next weights, less one
        elapsed = Signal(range(longest + 1))  # since the pass began

        m0_over, m01_over = m0 == 0, (m0 == 0) & (m1 == 0)
        last_rows, in_rows = m0[r:] == 0, ~m0[:r]
        row = self.active & ~rows_done
        last_row = row & m01_over & (m2 == 0)
        all_loaded = loaded == Mux(f.transpose_b, max(chip.rows, chip.cols) - 1, chip.rows - 1)
        slot_over = (rows_done | (last_row & ~f.shared)) & all_loaded
        last_block = block == 0
        slot_end = self.active & slot_over & (~last_block | (elapsed == longest))
        pass_end, last_pass = slot_end & last_block, pass_ == 0
        m.d.comb += [
            step.go.eq(self.go), step.first.eq(first), step.row.eq(row),
            step.real.eq(row & ~(f.transpose_a & last_rows & (in_rows > f.m_tail))),
            step.wrap0.eq(row & Mux(f.transpose_a, in_rows.all(), m0_over)),
            step.wrap1.eq(row & ~f.transpose_a & m01_over),
            step.last_rows.eq(self.active & last_rows),
            step.first_pass.eq(self.active & first_pass),
            step.last_pass.eq(self.active & last_pass),
            step.last_block.eq(self.active & last_block),
            step.slot_end.eq(slot_end),
            self.end.eq(pass_end & last_pass & (run == 0)),
        ]

        rewind = [m0.eq(f.m0), m1.eq(f.m1), m2.eq(f.m2), rows_done.eq(0), loaded.eq(0), first.eq(1)]
        with m.If(self.go):
            m.d.sync += [
                *rewind, block.eq(f.blocks), pass_.eq(f.passes), run.eq(f.k_outer), elapsed.eq(0),
                first_pass.eq(1), self.active.eq(1),
            ]  # fmt: skip
        with m.Elif(self.active):
            m.d.sync += first.eq(0)
            with m.If(elapsed != longest):
                m.d.sync += elapsed.eq(elapsed + 1)
            with m.If((rows_done | ~f.shared) & ~all_loaded):
                m.d.sync += loaded.eq(loaded + 1)
            with m.If(row):
                m.d.sync += [m0.eq(m0 - 1), rows_done.eq(last_row)]
                with m.If(m0_over):
                    m.d.sync += [m0.eq(f.m0), m1.eq(m1 - 1)]
                with m.If(m01_over):
                    m.d.sync += [m1.eq(f.m1), m2.eq(m2 - 1)]
            with m.If(slot_end):
                m.d.sync += [*rewind, block.eq(block - 1)]
            with m.If(pass_end):
                m.d.sync += [
                    block.eq(f.blocks), pass_.eq(pass_ - 1), elapsed.eq(0), first_pass.eq(0),
                ]  # fmt: skip
                with m.If(last_pass):
                    m.d.sync += [pass_.eq(f.passes), run.eq(run - 1)]
            with m.If(self.end):
                m.d.sync += [self.active.eq(0), first.eq(0)]
        return m
