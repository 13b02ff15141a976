"""matmul (bf16): the passes of one command over the array, timed by four copies of one walker.

A walker counts the slots of a command (k pass outer, n block inner), each `unit` cycles long, and
stretches the last slot of a k pass until it has lasted D. The same walker, started at different
distances from the command's start, reads A, reads B, reads partial sums and writes them:

    main    start + fill                the accounting: its end frees the engine
    psum    start + fill + 2            two cycles: the fields are registered, then compared
    a       psum - R if A passes the transposer (turned or only delayed), else psum
    b       psum - w - (R if B is transposed or A is delayed while both share a bank)
    out     psum + R * s + C + 2        the depth of the array and its registers

Read data reach the array three cycles after the walker's cycle: request register, memory, rotated
data register.
"""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from banked_memory import ReadPort, WritePort
from processing_element import STAGES
from processing_element import Array as SystolicArray

WORD = 32


class Walker(wiring.Component):
    go: In(1)  # the walk begins in the next cycle
    unit: In(32)
    blocks: In(32)  # n blocks of a k pass
    chunks: In(32)  # k passes of one k_outer
    outer: In(32)
    minimum: In(32)  # D
    active: Out(1)
    position: Out(32)  # cycle of the slot
    first_block: Out(1)
    slot_end: Out(1)
    pass_end: Out(1)
    outer_end: Out(1)
    end: Out(1)  # the last cycle of the walk
    first_pass: Out(1)

    def elaborate(self, platform):
        m = Module()
        block, chunk, outer, elapsed = (Signal(32, name=n) for n in
                                        ("block", "chunk", "outer_index", "elapsed"))
        block_done = self.position + 1 >= self.unit
        last_block = block + 1 == self.blocks
        m.d.comb += [
            self.first_block.eq(block == 0),
            self.pass_end.eq(self.active & block_done & last_block
                             & (elapsed + 1 >= self.minimum)),
            self.slot_end.eq(self.active & block_done & (~last_block | self.pass_end)),
            self.outer_end.eq(self.pass_end & (chunk + 1 >= self.chunks)),
            self.end.eq(self.outer_end & (outer + 1 >= self.outer)),
        ]
        with m.If(self.active):
            m.d.sync += [elapsed.eq(elapsed + 1), self.position.eq(self.position + 1)]
            with m.If(self.slot_end):
                m.d.sync += [self.position.eq(0), block.eq(block + 1)]
            with m.If(self.pass_end):
                m.d.sync += [block.eq(0), elapsed.eq(0), chunk.eq(chunk + 1),
                             self.first_pass.eq(0)]
            with m.If(self.outer_end):
                m.d.sync += [chunk.eq(0), outer.eq(outer + 1)]
            with m.If(self.end):
                m.d.sync += self.active.eq(0)
        with m.If(self.go):
            m.d.sync += [self.active.eq(1), self.position.eq(0), block.eq(0), chunk.eq(0),
                         outer.eq(0), elapsed.eq(0), self.first_pass.eq(1)]
        return m


class Transposer(wiring.Component):
    """Two buffers of n lines of n elements. Lines come in one a cycle, from `first` on; they leave
    either across (element by element of every line) or, as a delay, in the order they came."""

    def __init__(self, lines: int, length: int):
        self.lines, self.length = lines, length
        super().__init__({
            "put": In(1), "put_index": In(8), "put_swap": In(1), "line": In(16 * length),
            "take_index": In(8), "take_swap": In(1), "across": In(1),
            "out": Out(16 * max(lines, length)),
        })

    def elaborate(self, platform):
        m = Module()
        buffers = [[Signal(16 * self.length, name=f"line{b}_{i}") for i in range(self.lines)]
                   for b in (0, 1)]
        for b in (0, 1):
            for i in range(self.lines):
                with m.If(self.put & (self.put_swap == b) & (self.put_index == i)):
                    m.d.sync += buffers[b][i].eq(self.line)
        chosen = [Mux(self.take_swap, buffers[1][i], buffers[0][i]) for i in range(self.lines)]
        across = Cat(line.word_select(self.take_index[:4], 16) for line in chosen)
        m.d.comb += self.out.eq(Mux(self.across, across, Array(chosen)[self.take_index]))
        return m


class MatrixEngine(wiring.Component):
    """start: in the cycle of the start; `word` then holds the command's fields, `shared` whether
    the hulls of A and B touch a common bank. `free` is high from cycle `free` on."""

    def __init__(self, rows: int, cols: int, port_bytes: int):
        self.rows, self.cols, self.port_bytes = rows, cols, port_bytes
        self.latency = rows * STAGES + cols + 4
        super().__init__({
            "start": In(1), "word": In(WORD).array(16), "shared": In(1), "free": Out(1),
            "a": Out(ReadPort(port_bytes)), "b": Out(ReadPort(port_bytes)),
            "psum": Out(ReadPort(port_bytes)), "result": Out(WritePort(port_bytes)),
        })

    def elaborate(self, platform):
        m = Module()
        R, C, D = self.rows, self.cols, self.latency
        r_bits = R.bit_length() - 1

        # The command's registers, from the cycle after the start on. A walker copies them when it
        # sets out, because the next command may start before the walk has ended.
        live = self._derive(m, [Signal(WORD, name=f"word{i}") for i in range(16)],
                            Signal(name="shared_"), "live")
        age = Signal(32, init=0xFFFF)  # cycles since the start
        m.d.sync += age.eq(Mux(age == 0xFFFF, age, age + 1))
        with m.If(self.start):
            m.d.sync += [age.eq(1), live["shared"].eq(self.shared),
                         *(x.eq(y) for x, y in zip(live["word"], self.word, strict=True))]
        walkers, contexts = {}, {}
        for name, begin in (
            ("main", live["fill"]), ("sums", live["fill"] + 2),
            ("a", live["fill"] + 2 - live["early_a"]), ("b", live["fill"] + 2 - live["early_b"]),
            ("out", live["fill"] + 2 + R * STAGES + C + 2),
        ):
            walker = walkers[name] = m.submodules[name] = Walker()
            own = contexts[name] = self._derive(
                m, [Signal(WORD, name=f"{name}_word{i}") for i in range(16)],
                Signal(name=f"{name}_shared"), name)
            m.d.comb += [
                walker.go.eq(age == begin - 1), walker.unit.eq(own["unit"]),
                walker.blocks.eq(own["blocks"]), walker.chunks.eq(own["chunks"]),
                walker.outer.eq(own["outer"]), walker.minimum.eq(D),
            ]
            with m.If(walker.go):
                m.d.sync += [own["shared"].eq(live["shared"]),
                             *(x.eq(y) for x, y in zip(own["word"], live["word"], strict=True))]
        # Free is set by the walk's last cycle; a start (never in that cycle) clears it.
        idle = Signal(init=1)
        with m.If(self.start):
            m.d.sync += idle.eq(0)
        with m.Elif(walkers["main"].end):
            m.d.sync += idle.eq(1)
        m.d.comb += self.free.eq(idle)

        def late(value, cycles, name):
            for i in range(cycles):
                register = Signal(value.shape(), name=f"{name}_{i}")
                m.d.sync += register.eq(value)
                value = register
            return value

        def remaining(name):
            """Valid k of the current pass: 0..R."""
            walk, own = walkers[name], contexts[name]
            left = Signal(32, name=f"{name}_left")
            with m.If(walk.go):
                m.d.sync += left.eq(Mux(live["k_zero"], 0, live["k_inner"]))
            with m.Elif(walk.outer_end):
                m.d.sync += left.eq(Mux(own["k_zero"], 0, own["k_inner"]))
            with m.Elif(walk.pass_end):
                m.d.sync += left.eq(left - R)
            valid = Signal(16, name=f"{name}_valid_k")
            m.d.comb += valid.eq(Mux(left > R, R, left))
            return valid

        def columns(name):
            """The block's first column and its number of columns."""
            walk, own = walkers[name], contexts[name]
            column = Signal(32, name=f"{name}_column")
            with m.If(walk.go | walk.pass_end):
                m.d.sync += column.eq(0)
            with m.Elif(walk.slot_end):
                m.d.sync += column.eq(column + C)
            count = Signal(16, name=f"{name}_columns")
            m.d.comb += count.eq(Mux(own["n"] - column > C, C, own["n"] - column))
            return column, count

        # A: rows of k through three strides, or (transposed) rows of m, R at a time.
        walk, own = walkers["a"], contexts["a"]
        valid_k = remaining("a")
        pass_base, outer_base, next_base = Signal(32), Signal(32), Signal(32)
        p0, p1, p2, i0, i1, q = (Signal(32, name=x) for x in ("p0", "p1", "p2", "i0", "i1", "q"))
        first_m = Signal(32)
        m.d.comb += next_base.eq(pass_base)
        with m.If(walk.go):
            m.d.comb += next_base.eq(live["a"])
            m.d.sync += outer_base.eq(live["a"])
        with m.Elif(walk.outer_end):
            m.d.comb += next_base.eq(outer_base + own["k_stride"])
            m.d.sync += outer_base.eq(outer_base + own["k_stride"])
        with m.Elif(walk.pass_end):
            m.d.comb += next_base.eq(
                pass_base + Mux(own["transpose_a"], own["s0"] << r_bits, 2 * R))
        m.d.sync += pass_base.eq(next_base)
        in_block = walk.position[:r_bits]
        row_here = walk.active & (walk.position < own["streamed"])
        with m.If(walk.go | walk.slot_end):
            m.d.sync += [p0.eq(next_base), p1.eq(next_base), p2.eq(next_base), i0.eq(0),
                         i1.eq(0), q.eq(next_base), first_m.eq(0)]
        with m.Elif(row_here):
            m.d.sync += [i0.eq(i0 + 1), p0.eq(p0 + own["s0"])]
            with m.If(i0 + 1 == own["m0"]):
                m.d.sync += [i0.eq(0), i1.eq(i1 + 1), p0.eq(p1 + own["s1"]),
                             p1.eq(p1 + own["s1"])]
                with m.If(i1 + 1 == own["m1"]):
                    after = p2 + own["s2"]
                    m.d.sync += [i1.eq(0), p0.eq(after), p1.eq(after), p2.eq(after)]
            m.d.sync += q.eq(q + own["s0"])
            with m.If(in_block == R - 1):
                m.d.sync += [first_m.eq(first_m + R), q.eq(pass_base + ((first_m + R) << 1))]
        left_m = own["m0"] - first_m
        m.d.sync += [
            self.a.address.eq(Mux(own["transpose_a"], q, p0)),
            self.a.enable.eq(row_here & Mux(own["transpose_a"], in_block < valid_k, valid_k != 0)),
            self.a.size.eq(Mux(own["transpose_a"], Mux(left_m > R, R, left_m), valid_k) << 1),
        ]
        a_data = Signal(16 * R)
        m.d.sync += a_data.eq(self.a.data)
        # The transposer changes buffers after R rows, or when a slot ends within a block.
        buffer = Signal()
        partial = own["streamed"][:r_bits] != 0
        with m.If((row_here & (in_block == R - 1)) | (walk.slot_end & partial)):
            m.d.sync += buffer.eq(~buffer)
        put_index, put_swap = late(in_block, 3, "put_index"), late(buffer, 3, "put_swap")
        turn = m.submodules.a_transposer = Transposer(R, R)
        at_array = contexts["sums"]
        m.d.comb += [
            turn.put.eq(late(row_here, 3, "put")), turn.put_index.eq(put_index),
            turn.put_swap.eq(put_swap), turn.line.eq(a_data),
            turn.take_index.eq(late(put_index, R, "take_index")),
            turn.take_swap.eq(late(put_swap, R, "take_swap")),
            turn.across.eq(late(at_array["transpose_a"], 3, "across")),
        ]

        # Partial sums in, at the array's time.
        walk, own = walkers["sums"], contexts["sums"]
        column, count = columns("sums")
        row_address = Signal(32)
        row_now = walk.active & (walk.position < own["streamed"])
        with m.If(walk.go):
            m.d.sync += row_address.eq(live["acc"])
        with m.Elif(walk.slot_end):
            m.d.sync += row_address.eq(own["acc"])
        with m.Elif(row_now):
            m.d.sync += row_address.eq(row_address + own["acc_stride"])
        wanted = Signal()
        m.d.comb += wanted.eq(row_now & (walk.position < own["rows"])
                              & (own["accumulate"] | ~walk.first_pass))
        m.d.sync += [self.psum.enable.eq(wanted), self.psum.size.eq(count << 2),
                     self.psum.address.eq(row_address + (column << 2))]
        sums = Signal(32 * C)
        m.d.sync += sums.eq(Mux(late(wanted, 2, "wanted"), self.psum.data, 0))
        swap = late(walk.active & (walk.position == 0), 3, "swap")

        # Weights.
        walk, own = walkers["b"], contexts["b"]
        valid_k = remaining("b")
        column, count = columns("b")
        b_pass, b_row, after = Signal(32), Signal(32), Signal(32)
        reading = walk.active & (walk.position < own["weights"])
        m.d.comb += after.eq(b_pass)
        with m.If(walk.go):
            m.d.comb += after.eq(live["b"])
        with m.Elif(walk.pass_end):  # the last pass of one k_outer may be short
            m.d.comb += after.eq(
                b_pass + Mux(own["transpose_b"], valid_k << 1, valid_k * own["b_stride"]))
        m.d.sync += b_pass.eq(after)
        next_column = Signal(32)
        m.d.comb += next_column.eq(Mux(walk.pass_end, 0, column + C))
        with m.If(walk.go):
            m.d.sync += b_row.eq(after)
        with m.Elif(walk.slot_end):
            m.d.sync += b_row.eq(after + Mux(own["transpose_b"], next_column * own["b_stride"],
                                             next_column << 1))
        with m.Elif(reading):
            m.d.sync += b_row.eq(b_row + own["b_stride"])
        m.d.sync += [
            self.b.enable.eq(reading & (valid_k != 0) & Mux(
                own["transpose_b"], walk.position < count, walk.position < valid_k)),
            self.b.size.eq(Mux(own["transpose_b"], valid_k, count) << 1),
            self.b.address.eq(b_row),
        ]
        b_data = Signal(16 * max(R, C))
        m.d.sync += b_data.eq(self.b.data)
        flip = m.submodules.b_transposer = Transposer(C, R)
        b_buffer = Signal()
        with m.If(walk.slot_end):
            m.d.sync += b_buffer.eq(~b_buffer)
        position = Signal(8)
        m.d.comb += position.eq(walk.position)
        late_position = late(position, 3, "b_position")
        late_buffer = late(b_buffer, 3, "b_buffer")
        late_reading, late_valid = late(reading, 3, "b_reading"), late(valid_k, 3, "b_valid")
        late_turned = late(own["transpose_b"], 3, "b_turned")
        # A transposed block leaves in the R cycles after its window of max(R, C) cycles.
        wait = max(R, C)
        first_rows = late_reading & (late_position < R)
        m.d.comb += [
            flip.put.eq(late_reading & (late_position < C)), flip.put_index.eq(late_position),
            flip.put_swap.eq(late_buffer), flip.line.eq(b_data[:16 * R]), flip.across.eq(1),
            flip.take_index.eq(late(late_position, wait, "flip_index")),
            flip.take_swap.eq(late(late_buffer, wait, "flip_swap")),
        ]
        flip_valid = late(first_rows & late_turned, wait, "flip_valid")
        flip_k = late(late_valid, wait, "flip_k")

        array = m.submodules.array = SystolicArray(R, C)
        m.d.comb += [
            array.a.eq(Mux(late(at_array["early_a"] != 0, 3, "delayed"), turn.out, a_data)),
            array.swap.eq(swap), array.psum.eq(sums),
            array.w.eq(Mux(flip_valid, flip.out[:16 * C], b_data[:16 * C])),
            array.w_row.eq(Mux(flip_valid, flip.take_index, late_position)),
            array.w_valid.eq(flip_valid | (first_rows & ~late_turned)),
            array.w_bypass.eq(Mux(flip_valid, flip.take_index >= flip_k,
                                  late_position >= late_valid)),
        ]

        # Results.
        walk, own = walkers["out"], contexts["out"]
        column, count = columns("out")
        out_address = Signal(32)
        row_out = walk.active & (walk.position < own["streamed"])
        with m.If(walk.go):
            m.d.sync += out_address.eq(live["acc"])
        with m.Elif(walk.slot_end):
            m.d.sync += out_address.eq(own["acc"])
        with m.Elif(row_out):
            m.d.sync += out_address.eq(out_address + own["acc_stride"])
        m.d.sync += [
            self.result.enable.eq(row_out & (walk.position < own["rows"])),
            self.result.address.eq(out_address + (column << 2)),
            self.result.size.eq(count << 2), self.result.data.eq(array.out),
        ]
        return m

    def _derive(self, m: Module, word: list[Signal], shared: Signal, prefix: str) -> dict:
        """Names for the fields, and the contract's quantities that follow from them."""
        R, C = self.rows, self.cols
        names = ("a", "m0", "s0", "m1", "s1", "m2", "s2", "k_inner", "k_outer", "k_stride", "b",
                 "b_stride", "n", "acc", "acc_stride")
        d = dict(zip(names, word[1:], strict=True), word=word, shared=shared, accumulate=word[0][4],
                 transpose_a=word[0][5], transpose_b=word[0][6])
        ta, tb = d["transpose_a"], d["transpose_b"]
        k_zero = (d["k_inner"] == 0) | (d["k_outer"] == 0)

        def named(name, value):
            d[name] = Signal(32, name=f"{prefix}_{name}")
            m.d.comb += d[name].eq(value)
            return d[name]

        rows = named("rows", d["m0"] * d["m1"] * d["m2"])
        streamed = named("streamed", Mux(ta, (rows + R - 1) & ~(R - 1), rows))
        weights = named("weights", Mux(tb, max(R, C), R))
        named("unit", Mux(shared, streamed + weights,
                          Mux(streamed > weights, streamed, weights)))
        named("fill", weights + Mux(ta, R, 0) + Mux(tb, R, 0))
        named("blocks", (d["n"] + C - 1) >> (C.bit_length() - 1))
        named("k_zero", k_zero)
        named("chunks", Mux(k_zero, 1, (d["k_inner"] + R - 1) >> (R.bit_length() - 1)))
        named("outer", Mux(k_zero, 1, d["k_outer"]))
        # A goes through its transposer, or waits there so that B's window fits before it.
        delay_a = ta | (tb & shared)
        named("early_a", Mux(delay_a, R, 0))
        named("early_b", weights + Mux(tb | (delay_a & shared), R, 0))
        return d
