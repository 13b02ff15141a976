"""The matrix engine: matmul in the cycles of `pagoda.isa.timing.matmul`.

One walker (`matrix_walk`) runs through a command as early as its first read asks for; what happens
later follows delayed copies of its steps. With M = start + fill, R rows and w cycles to load the
weights, a slot that begins d cycles after the command's first begins

    B        M + d + 2 - w, and R earlier where transposed A shares its bank (the walker's own time)
    free     M + d
    A        M + d + 2, and R earlier where it is transposed
    sums     M + d + 2
    results  M + d + 2 + D

What a step of A or B asks for is presented to memory in the next cycle, arrives in the one after,
and then passes three registers: raw, chosen (from a transposer or not), coded. So the array takes
A 5 cycles after the step, and its sums `lead` cycles behind A. Weights pass their transposer
whether or not they are transposed: row r reaches the array in the r-th cycle of a slot. The sums
are read 2 + `lead` cycles after their step, and a result is written D + 2 cycles after it.

The walker and B have done with a command when the next one may start, A and the sums a cycle later:
so they read the fields from a copy a cycle late. The results have copies of their own.
"""

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import EngineControl, LocalRead, LocalWrite
from pagoda.chip.matrix_walk import MatmulFields, MatrixWalk, Step, fields_of, log2
from pagoda.chip.processing_element import (
    A_BIAS,
    B_BIAS,
    canonical,
    delay,
    encode_float,
    encode_int,
    operand_bits,
    zero_code,
)
from pagoda.chip.systolic_array import SystolicArray
from pagoda.chip.transposer import Transposer
from pagoda.isa.chip import Chip

A_TO_ARRAY = 5  # cycles from a step of A to the array
MOST_LEAD = 2  # of an element's sums behind A


class MatrixEngine(wiring.Component):
    """control: the window's starts. a, b: SRAM. psum, write: ACC."""

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "control": In(EngineControl()),
            "a": Out(LocalRead(chip)), "b": Out(LocalRead(chip)), "psum": Out(LocalRead(chip)),
            "write": Out(LocalWrite(chip)),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        chip = self.chip
        rows, slowest = chip.rows, max(chip.rows, chip.cols)
        self.element_bits = 16 if "bf16" in chip.matrix_types else 8
        f, late = Signal(MatmulFields(chip)), Signal(MatmulFields(chip))
        self.fields, self.late = f, late
        walk = m.submodules.walk = MatrixWalk(chip)
        m.d.comb += walk.fields.eq(f)
        self._accounting(m, walk)

        ahead = f.transpose_a & ~f.shared  # A's steps are `w - rows` behind B's, else w
        step_a = _delayed(m, walk.step, [
            (~ahead & ~f.transpose_b, rows), (~ahead & f.transpose_b, slowest),
            (ahead & ~f.transpose_b, 0), (ahead & f.transpose_b, slowest - rows),
        ], "step_a")  # fmt: skip
        across = late.transpose_a
        step = _delayed(m, step_a, [(~across, 0), (across, rows)], "step")

        array = m.submodules.array = SystolicArray(chip)
        self.lead = array.lead
        m.d.comb += [
            array.swap.eq(delay(m, step.first, A_TO_ARRAY, "swap")),
            array.a.eq(self._read_a(m, step_a, step)),
            array.w.eq(self._read_b(m, walk, step)),
            array.psum.eq(self._read_sums(m, step)),
        ]
        self._write_results(m, step, delay(m, array.out, MOST_LEAD - array.lead, "out"))
        return m

    def _accounting(self, m: Module, walk: MatrixWalk) -> None:
        """Take commands, start the walk, tell when the engine is free."""
        chip, f = self.chip, self.fields
        rows, slowest = chip.rows, max(chip.rows, chip.cols)
        new = fields_of(m, chip, self.control.job)
        start = self.control.start & ~self.control.job.empty
        idle, preparing = Signal(init=1), Signal()
        self.fresh, self.late_fresh = Signal(), Signal()
        wait, closing = Signal(range(2 * rows + 1)), Signal(range(slowest + rows))
        m.d.comb += [self.control.free.eq(idle), walk.go.eq(preparing & (wait == 0))]
        m.d.sync += [
            self.fresh.eq(start), self.late_fresh.eq(self.fresh), self.late.eq(f),
        ]  # fmt: skip
        with m.If(start):
            m.d.sync += [
                f.eq(new), idle.eq(0), preparing.eq(1),
                wait.eq(Mux(new.transpose_b, rows, 0)
                        + Mux(new.transpose_a & ~new.shared, rows, 0)),
            ]  # fmt: skip
        with m.Elif(preparing):
            m.d.sync += wait.eq(wait - 1)
            with m.If(walk.go):
                m.d.sync += preparing.eq(0)
        # How much later the accounted walk ends than the walker's.
        lead = Signal.like(closing)
        m.d.comb += lead.eq(Mux(f.transpose_b, slowest - 2, rows - 2)
                            + Mux(f.transpose_a & f.shared, rows, 0))  # fmt: skip
        with m.If(walk.end):
            m.d.sync += closing.eq(lead)
        with m.Elif(closing != 0):
            m.d.sync += closing.eq(closing - 1)
        with m.If((walk.end & (lead == 0)) | (closing == 1)):
            m.d.sync += idle.eq(1)

    def _bytes(self, f: data.View, elements: Value) -> Value:
        """Bytes of so many elements."""
        return Mux(f.integer, elements, elements << 1)

    def _raw(self, m: Module, data_: Value, count: int, integer: Value) -> Value:
        """The first elements of what a read brings, a cycle late; `integer` is as late."""
        bits = self.element_bits
        raw = Signal(count * bits, reset_less=True)
        m.d.sync += raw.eq(data_)
        if bits == 8:
            return raw
        return Cat(
            Mux(integer, raw.word_select(i, 8), raw.word_select(i, 16)) for i in range(count)
        )

    def _valid_k(self, f: data.View, last_pass: Value) -> Value:
        """k of a pass, 0 to R."""
        return Mux(last_pass, f.k_tail, self.chip.rows)

    def _columns(self, last_block: Value, tail: Value) -> Value:
        """Columns of a block, 1 to C."""
        return Mux(last_block, tail, self.chip.cols)

    def _coded(self, m: Module, elements: list[Value], bias: int, integer: Value, name: str):
        """Operand codes of raw elements."""
        if self.element_bits == 8:
            return elements
        codes = []
        for i, element in enumerate(elements):
            code = encode_float(m, element, bias, f"{name}_{i}")
            if "int8" in self.chip.matrix_types:
                code = Mux(integer, encode_int(element[:8]), code)
            codes.append(code)
        return codes

    def _read_a(self, m: Module, step_a: data.View, step: data.View) -> Value:
        """Ask for A and bring its rows to the array."""
        chip, f, rows = self.chip, self.late, self.chip.rows
        across = f.transpose_a
        # Where rows of m0, of m1 and of m2 begin, and a pass and a run of k.
        m0, m1, m2, pass_, run = (
            Signal.like(f.a, name=f"a_{name}") for name in ("m0", "m1", "m2", "pass", "run")
        )
        next_run, next_pass, next_m1, next_m2 = (
            Signal.like(f.a, name=f"a_next_{name}") for name in ("run", "pass", "m1", "m2")
        )
        row_of_block = self._bytes(f, rows)
        m.d.sync += [  # in time, since a slot has two cycles or more
            next_run.eq(run + f.k_outer_stride),
            next_pass.eq(pass_ + Mux(across, f.m0_stride << log2(rows), row_of_block)),
        ]
        m.d.comb += [
            next_m1.eq(m1 + Mux(across, row_of_block, f.m1_stride)),
            next_m2.eq(m2 + f.m2_stride),
        ]
        begin = Signal.like(f.a)  # of the next slot
        m.d.comb += begin.eq(pass_)
        with m.If(self.late_fresh):
            m.d.comb += begin.eq(f.a)
            m.d.sync += run.eq(f.a)
        with m.Elif(step_a.last_block):
            m.d.comb += begin.eq(Mux(step_a.last_pass, next_run, next_pass))
            with m.If(step_a.slot_end & step_a.last_pass):
                m.d.sync += run.eq(next_run)
        with m.If(self.late_fresh | step_a.slot_end):
            m.d.sync += [x.eq(begin) for x in (m0, m1, m2, pass_)]
        with m.Elif(step_a.row):
            m.d.sync += m0.eq(m0 + f.m0_stride)
            with m.If(step_a.wrap0):
                m.d.sync += [m0.eq(next_m1), m1.eq(next_m1)]
            with m.If(step_a.wrap1):
                m.d.sync += [m0.eq(next_m2), m1.eq(next_m2), m2.eq(next_m2)]

        valid_k = self._valid_k(f, step_a.last_pass)
        put_index, put_block = self._in_block(m, step_a, "put")
        size = Mux(across, Mux(step_a.last_rows, f.m_tail, rows), valid_k)
        m.d.sync += [
            self.a.enable.eq(step_a.row & Mux(across, put_index < valid_k, ~f.no_k)),
            self.a.address.eq(m0), self.a.size.eq(self._bytes(f, size)),
        ]
        raw = self._raw(m, self.a.data, rows, delay(m, f.integer, 3))

        turn = m.submodules.a_transposer = Transposer(rows, rows, self.element_bits)
        take_index, take_block = self._in_block(m, step, "take")
        chosen = Signal(rows * self.element_bits, reset_less=True)
        m.d.comb += [
            turn.put.eq(delay(m, step_a.row & across, 3)), turn.line.eq(raw),
            turn.put_index.eq(delay(m, put_index, 3)), turn.put_block.eq(delay(m, put_block, 3)),
            turn.take_index.eq(delay(m, take_index, 3)),
            turn.take_block.eq(delay(m, take_block, 3)),
        ]
        m.d.sync += chosen.eq(Mux(delay(m, across, 3), turn.row, raw))

        self.valid_k = delay(m, self._valid_k(f, step.last_pass), 4, "valid_k")
        self.integer = delay(m, f.integer, 4, "integer")
        elements = [chosen.word_select(i, self.element_bits) for i in range(rows)]
        nothing = zero_code(chip, 0, self.integer)
        coded = Signal(rows * operand_bits(chip), reset_less=True)
        m.d.sync += coded.eq(Cat(
            Mux(i < self.valid_k, code, nothing)
            for i, code in enumerate(self._coded(m, elements, A_BIAS, self.integer, "a"))
        ))  # fmt: skip
        return coded

    def _in_block(self, m: Module, step: data.View, name: str) -> tuple[Value, Value]:
        """Which of `rows` rows of transposed A a step streams, and into which half they go."""
        index = Signal(range(self.chip.rows), name=f"a_{name}_index")
        half = Signal(name=f"a_{name}_block")
        with m.If(step.slot_end):
            m.d.sync += index.eq(0)
        with m.Elif(step.row):
            m.d.sync += index.eq(index + 1)
        with m.If(step.wrap0 & self.late.transpose_a):
            m.d.sync += half.eq(~half)
        return index, half

    def _read_b(self, m: Module, walk: MatrixWalk, step: data.View) -> Value:
        """Ask for B and bring its rows to the array."""
        chip, f, early = self.chip, self.fields, walk.step
        rows, cols, across = chip.rows, chip.cols, f.transpose_b
        lines = Signal(range(max(rows, cols) + 1))  # asked for in this slot
        more = Signal()  # a line lies behind this one
        line, block, later, beside, below = (
            Signal.like(f.b, name=f"b_{name}")
            for name in ("line", "block", "next_pass", "beside", "below")
        )
        next_line, next_block, next_pass = (
            Signal.like(f.b, name=f"b_after_{name}") for name in ("line", "block", "pass")
        )
        first_block, put_block = Signal(), Signal()
        valid_k = self._valid_k(f, early.last_pass)
        columns = self._columns(early.last_block, f.n_tail)
        # The line behind a block's last is the next block's first where B is transposed, and else
        # the next pass's. The other way there is a register's: a slot has two cycles or more.
        m.d.sync += [
            beside.eq(block + self._bytes(f, cols)), below.eq(block + self._bytes(f, valid_k)),
        ]
        m.d.comb += [
            next_line.eq(line + (f.b_stride & more.replicate(len(line)))),
            next_pass.eq(Mux(first_block, Mux(across, below, next_line), later)),
            next_block.eq(Mux(early.last_block, next_pass, Mux(across, next_line, beside))),
        ]
        with m.If(self.fresh):
            m.d.sync += [line.eq(f.b), block.eq(f.b), first_block.eq(1)]
        with m.Elif(early.slot_end):
            m.d.sync += [
                line.eq(next_block), block.eq(next_block), later.eq(next_pass),
                first_block.eq(early.last_block), put_block.eq(~put_block),
            ]  # fmt: skip
        with m.Elif(walk.active):
            m.d.sync += line.eq(next_line)
        with m.If(self.fresh | early.slot_end):
            m.d.sync += [lines.eq(0), more.eq(across | ~f.no_k)]
        with m.Elif(walk.active & (lines != max(rows, cols))):
            m.d.sync += [lines.eq(lines + 1), more.eq(lines + 1 < Mux(across, cols, valid_k))]
        m.d.sync += [
            self.b.enable.eq(walk.active & ~f.no_k & (lines < Mux(across, columns, valid_k))),
            self.b.address.eq(line), self.b.size.eq(self._bytes(f, Mux(across, valid_k, columns))),
        ]
        width = max(rows, cols)
        raw = self._raw(m, self.b.data, width, delay(m, f.integer, 3))

        turn = m.submodules.b_transposer = Transposer(rows, cols, self.element_bits)
        row, take_block = Signal(range(rows)), Signal()
        m.d.sync += take_block.eq(take_block ^ step.slot_end)
        with m.If(delay(m, step.first, 2)):
            m.d.sync += row.eq(0)
        with m.Else():
            m.d.sync += row.eq(row + 1)
        m.d.comb += [
            turn.put.eq(delay(m, walk.active & (lines < Mux(across, cols, rows)), 3)),
            turn.put_index.eq(delay(m, lines, 3)), turn.put_block.eq(delay(m, put_block, 3)),
            turn.straight.eq(delay(m, ~across, 3)), turn.line.eq(raw),
            turn.take_index.eq(row), turn.take_block.eq(delay(m, take_block, 3)),
        ]
        chosen, valid = Signal.like(turn.row, reset_less=True), Signal()
        m.d.sync += [
            chosen.eq(turn.row),
            valid.eq(row < delay(m, self._valid_k(self.late, step.last_pass), 3, "b_valid_k")),
        ]
        elements = [chosen.word_select(i, self.element_bits) for i in range(cols)]
        codes = Cat(self._coded(m, elements, B_BIAS, self.integer, "b"))
        nothing = Cat(zero_code(chip, 1, self.integer) for _ in range(cols))
        coded = Signal(cols * operand_bits(chip), reset_less=True)
        m.d.sync += coded.eq(Mux(valid, codes, nothing))
        return coded

    def _row_address(
        self, m: Module, step: data.View, begin: Value, acc: Value, stride: Value, first: Value,
        name: str,
    ) -> Value:  # fmt: skip
        """Address of a step's row of sums; `begin` loads `first`, which then is `acc`."""
        row, block, next_block = (
            Signal.like(acc, name=f"{name}_{part}") for part in ("row", "block", "next_block")
        )
        m.d.comb += next_block.eq(Mux(step.last_block, acc, block + 4 * self.chip.cols))
        with m.If(begin):
            m.d.sync += [row.eq(first), block.eq(first)]
        with m.Elif(step.slot_end):
            m.d.sync += [row.eq(next_block), block.eq(next_block)]
        with m.Elif(step.real):
            m.d.sync += row.eq(row + stride)
        return row

    def _read_sums(self, m: Module, step: data.View) -> Value:
        """Ask for the partial sums, or begin with 0."""
        f, cols = self.late, self.chip.cols
        lead = self.lead
        address = self._row_address(m, step, self.late_fresh, f.acc, f.acc_stride, f.acc, "sum")
        wanted = step.real & (f.accumulate | ~step.first_pass)
        size = self._columns(step.last_block, f.n_tail) << 2
        raw, sums = (Signal(32 * cols, name=name, reset_less=True) for name in ("raw", "sums"))
        m.d.comb += self.psum.acc.eq(1)
        m.d.sync += [
            self.psum.enable.eq(delay(m, wanted, 1 + lead)),
            self.psum.address.eq(delay(m, address, 1 + lead)),
            self.psum.size.eq(delay(m, size, 1 + lead)), raw.eq(self.psum.data),
        ]
        arrived, integer = delay(m, wanted, 4 + lead), delay(m, self.integer, lead)
        for c in range(cols):
            word = raw.word_select(c, 32)
            if self.element_bits == 16:
                word = Mux(integer, word, canonical(word))
            m.d.sync += sums.word_select(c, 32).eq(word & arrived.replicate(32))
        return sums

    def _write_results(self, m: Module, step: data.View, out: Value) -> None:
        """Write what leaves the array, D + 2 cycles after the steps of the sums."""
        chip, f = self.chip, self.late
        layout = data.StructLayout({"go": 1, "real": 1, "slot_end": 1, "last_block": 1})
        bits = Cat(step[name] for name in ("go", "real", "slot_end", "last_block"))
        line = Signal(len(bits) * chip.psum_latency)
        m.d.sync += line.eq(Cat(bits, line))
        late = data.View(layout, line[-len(bits):])
        acc, stride, tail = (Signal.like(x) for x in (f.acc, f.acc_stride, f.n_tail))
        unchanged = Signal()  # no k: the sums stay, even a NaN that is not canonical
        with m.If(late.go):
            m.d.sync += [
                acc.eq(f.acc), stride.eq(f.acc_stride), tail.eq(f.n_tail),
                unchanged.eq(f.no_k & f.accumulate),
            ]  # fmt: skip
        row = self._row_address(m, late, late.go, acc, stride, f.acc, "result")
        size = self._columns(late.last_block, tail) << 2
        m.d.comb += [self.write.acc.eq(1), self.write.data.eq(out)]
        m.d.sync += [
            self.write.enable.eq(delay(m, late.real & ~unchanged, 1)),
            self.write.address.eq(delay(m, row, 1)), self.write.size.eq(delay(m, size, 1)),
        ]


def _delayed(
    m: Module, step: data.View, choices: list[tuple[Value, int]], name: str
) -> data.View:
    """The step some cycles later; which of the choices is taken may change from step to step, as
    long as no two meet."""
    bits, behind = step.as_value(), None
    for left in reversed(range(max(cycles for _, cycles in choices) + 1)):
        entering = [bits & on.replicate(len(bits)) for on, cycles in choices if cycles == left]
        node = Signal(len(bits), name=f"{name}_in_{left}")
        m.d.comb += node.eq(reduce(or_, entering if behind is None else [*entering, behind]))
        if left:
            behind = Signal(len(bits), name=f"{name}_{left}")
            m.d.sync += behind.eq(node)
    return data.View(Step(), node)
