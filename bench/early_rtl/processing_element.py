"""One element of the systolic array: psum + a * w with one rounding, gradual underflow.

bf16 operands are unpacked (and subnormals normalised) once at the array's edge, so the element
sees an 8-bit significand with its leading one and a wider exponent. Three pipeline stages: multiply
and compare exponents; align and add; normalise and round.
"""

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

STAGES = 3

Operand = data.StructLayout({
    "significand": 8,  # value = significand * 2^(exponent - 134); 0 for zero
    "exponent": signed(10),
    "sign": 1,
    "inf": 1,
    "nan": 1,
})
Weight = data.StructLayout({
    "value": Operand,
    "row": 8,  # the row that keeps it
    "valid": 1,
    "bypass": 1,  # no such k: the row passes the partial sum on unchanged
})


def leading_zeros(m: Module, value: Value, name: str) -> Value:
    count = Signal(range(len(value) + 1), name=name)
    m.d.comb += count.eq(len(value))
    for i in range(len(value)):  # the last assignment, of the highest set bit, wins
        with m.If(value[i]):
            m.d.comb += count.eq(len(value) - 1 - i)
    return count


def unpack(m: Module, bits: Value, name: str) -> data.View:
    """bf16 pattern -> Operand."""
    out = Signal(Operand, name=f"{name}_unpacked")
    exponent, fraction = bits[7:15], bits[:7]
    zeros = leading_zeros(m, Cat(fraction, 0), f"{name}_lz")
    subnormal = exponent == 0
    m.d.comb += [
        out.sign.eq(bits[15]),
        out.inf.eq((exponent == 255) & (fraction == 0)),
        out.nan.eq((exponent == 255) & (fraction != 0)),
        out.significand.eq(Mux(subnormal, Cat(fraction, 0) << zeros, Cat(fraction, 1))),
        out.exponent.eq(Mux(subnormal, 1 - zeros, exponent)),
    ]
    return out


class ProcessingElement(wiring.Component):
    a: In(Operand)
    swap: In(1)  # this a is the first of a pass: take the waiting weight
    w: In(Weight)
    psum: In(32)
    a_out: Out(Operand)
    swap_out: Out(1)
    w_out: Out(Weight)
    psum_out: Out(32)

    def __init__(self, row: int):
        self.row = row
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.d.sync += [self.a_out.eq(self.a), self.swap_out.eq(self.swap)]

        # Weights travel as fast as partial sums (STAGES cycles a row), behind the swap wave.
        stage = self.w
        for i in range(STAGES):
            register = self.w_out if i == STAGES - 1 else Signal(Weight, name=f"w{i}")
            m.d.sync += register.eq(stage)
            stage = register
        waiting, active, weight = (Signal(Weight, name=n) for n in ("waiting", "active", "weight"))
        m.d.comb += weight.eq(Mux(self.swap, waiting.as_value(), active.as_value()))
        m.d.sync += active.eq(weight)
        with m.If(self.w.valid & (self.w.row == self.row)):
            m.d.sync += waiting.eq(self.w)

        # Stage 1.
        a, w, ps = self.a, weight.value, self.psum
        ps_exponent, ps_fraction = ps[23:31], ps[:23]
        product, p_sign, distance = Signal(16), Signal(), Signal(signed(12))
        s_sig, s_sign, s_exp = Signal(24), Signal(), Signal(8)
        nan, inf, inf_sign = Signal(), Signal(), Signal()
        bypass1, raw1 = Signal(), Signal(32)
        full = Signal(16)
        a_zero, w_zero = a.significand == 0, w.significand == 0
        p_inf, ps_inf = a.inf | w.inf, (ps_exponent == 255) & (ps_fraction == 0)
        ps_nan = (ps_exponent == 255) & (ps_fraction != 0)
        sign = Signal(name="product_sign")
        low = Signal(8)
        m.d.comb += [
            full.eq(a.significand * w.significand), sign.eq(a.sign ^ w.sign),
            low.eq(Mux(ps_exponent == 0, 1, ps_exponent)),
        ]
        # inf keeps a nonzero significand (128), so inf * 0 shows as a zero operand
        m.d.sync += [
            product.eq(full), p_sign.eq(sign), s_exp.eq(low),
            distance.eq(Mux(full == 0, 0, a.exponent + w.exponent - low - 118)),
            s_sig.eq(Cat(ps_fraction, ps_exponent != 0)), s_sign.eq(ps[31]),
            nan.eq(a.nan | w.nan | ps_nan | (a.inf & w_zero) | (w.inf & a_zero)
                   | (p_inf & ps_inf & (sign ^ ps[31]))),
            inf.eq(p_inf | ps_inf), inf_sign.eq(Mux(p_inf, sign, ps[31])),
            bypass1.eq(weight.bypass), raw1.eq(ps),
        ]

        # Stage 2: a frame of 71 bits whose bit 18 weighs as much as the partial sum's last bit.
        # What lies beyond its ends cannot touch the rounded result but as a sticky bit.
        far_above, far_below = distance > 36, distance < -18
        p_frame, s_frame = Signal(71), Signal(71)
        shift = Signal(6)
        m.d.comb += [
            shift.eq(Mux(far_above, 54, distance + 18)),
            p_frame.eq(Mux(far_below, product != 0, product << shift)),
            s_frame.eq(Mux(far_above, s_sig != 0, s_sig << 18)),
        ]
        total, t_sign, t_exp = Signal(71), Signal(), Signal(signed(12))
        nan2, inf2, inf_sign2, bypass2, raw2 = (
            Signal(name=n) if n != "raw2" else Signal(32, name=n)
            for n in ("nan2", "inf2", "inf_sign2", "bypass2", "raw2")
        )
        subtract, p_less = p_sign ^ s_sign, p_frame < s_frame
        m.d.sync += [
            total.eq(Mux(subtract, Mux(p_less, s_frame - p_frame, p_frame - s_frame),
                         p_frame + s_frame)),
            t_sign.eq(Mux(subtract, Mux(p_frame == s_frame, 0, Mux(p_less, s_sign, p_sign)),
                          s_sign)),
            t_exp.eq(Mux(far_above, s_exp + distance - 36, s_exp)),
            nan2.eq(nan), inf2.eq(inf), inf_sign2.eq(inf_sign),
            bypass2.eq(bypass1), raw2.eq(raw1),
        ]

        # Stage 3. The shift stops where the result becomes subnormal.
        zeros = leading_zeros(m, total, "zeros")
        by, normal = Signal(9), Signal(71)
        room = Signal(signed(13))
        rounded, result = Signal(25), Signal(36)
        m.d.comb += [
            room.eq(t_exp + 28),
            by.eq(Mux((room < zeros) | (total == 0), room, zeros)),
            normal.eq(total << by[:7]),
            rounded.eq(normal[47:] + (normal[46] & (normal[:46].any() | normal[47]))),
            result.eq(((room - by) << 23) + rounded),
        ]
        with m.If(bypass2):
            m.d.sync += self.psum_out.eq(raw2)
        with m.Elif(nan2):
            m.d.sync += self.psum_out.eq(0x7FC00000)
        with m.Elif(inf2 | (result[23:] >= 255)):
            m.d.sync += self.psum_out.eq(Cat(C(0, 23), C(255, 8), Mux(inf2, inf_sign2, t_sign)))
        with m.Else():
            m.d.sync += self.psum_out.eq(Cat(result[:31], t_sign))
        return m


class Array(wiring.Component):
    """rows x cols elements with the delays that skew their inputs and straighten the output.

    In a cycle it takes one row of A (with `swap` for the first of a pass), the row's partial sums
    and one row of weights; `out` shows the sums rows * STAGES + cols - 1 cycles later.
    """

    def __init__(self, rows: int, cols: int):
        self.rows, self.cols = rows, cols
        super().__init__({
            "a": In(rows * 16), "swap": In(1), "psum": In(cols * 32),
            "w": In(cols * 16), "w_row": In(8), "w_valid": In(1), "w_bypass": In(1),
            "out": Out(cols * 32),
        })

    def elaborate(self, platform):
        m = Module()

        def delay(value, cycles, name):
            for i in range(cycles):
                register = Signal(value.shape(), name=f"{name}_{i}")
                m.d.sync += register.eq(value)
                value = register
            return value

        grid = [[ProcessingElement(r) for _ in range(self.cols)] for r in range(self.rows)]
        for r, row in enumerate(grid):
            a = delay(unpack(m, self.a.word_select(r, 16), f"a{r}"), r * STAGES, f"a{r}")
            swap = delay(self.swap, r * STAGES, f"swap{r}")
            for c, element in enumerate(row):
                m.submodules[f"pe_{r}_{c}"] = element
                m.d.comb += [element.a.eq(a), element.swap.eq(swap)]
                a, swap = element.a_out, element.swap_out
        for c in range(self.cols):
            weight = Signal(Weight, name=f"weight{c}")
            m.d.comb += [
                weight.value.eq(unpack(m, self.w.word_select(c, 16), f"w{c}")),
                weight.row.eq(self.w_row), weight.valid.eq(self.w_valid),
                weight.bypass.eq(self.w_bypass),
            ]
            weight = delay(weight, c, f"weight{c}")
            psum = delay(self.psum.word_select(c, 32), c, f"psum{c}")
            for r in range(self.rows):
                element = grid[r][c]
                m.d.comb += [element.w.eq(weight), element.psum.eq(psum)]
                weight, psum = element.w_out, element.psum_out
            m.d.comb += self.out.word_select(c, 32).eq(delay(psum, self.cols - 1 - c, f"out{c}"))
        return m
