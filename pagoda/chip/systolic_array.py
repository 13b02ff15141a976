"""The systolic array: rows x cols elements, and the delays that skew its inputs."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.modules import once
from pagoda.chip.processing_element import (
    PE_MODULE,
    delay,
    operand_bits,
    processing_element,
    sum_lead,
)
from pagoda.isa.chip import Chip


class SystolicArray(wiring.Component):
    """Weight-stationary: C sums run down the columns and meet A, which runs along the rows.

    In one cycle T it takes a row of A, with `swap` if it is the first of a block, and in T + `lead`
    the C partial sums of that row; `out` shows their sums `latency` cycles later. The block's
    weights are at `w` from cycle T on, row after row: those of row r in T + r. a and w are operand
    codes.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        self.lead = sum_lead(chip)
        self.latency = chip.rows * chip.pe_stages + chip.cols - 1
        width = operand_bits(chip)
        super().__init__({
            "a": In(chip.rows * width), "swap": In(1), "w": In(chip.cols * width),
            "psum": In(chip.cols * 32), "out": Out(chip.cols * 32),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        chip, width = self.chip, operand_bits(self.chip)
        columns = range(chip.cols)
        sums = [delay(m, self.psum.word_select(c, 32), c, f"psum_{c}") for c in columns]
        weights = [delay(m, self.w.word_select(c, width), c, f"w_{c}") for c in columns]
        row_swap = self.swap
        for r in range(chip.rows):
            a = delay(m, self.a.word_select(r, width), r * chip.pe_stages, f"a_{r}")
            swap = row_swap = delay(m, row_swap, chip.pe_stages if r else 0, f"swap_{r}")
            for c in columns:
                cell = processing_element(chip)
                m.submodules[f"pe_{r}_{c}"] = once(platform, PE_MODULE, cell)
                m.d.comb += [
                    cell.a.eq(a), cell.swap.eq(swap), cell.w.eq(weights[c]), cell.psum.eq(sums[c]),
                ]
                a, swap, weights[c], sums[c] = (
                    cell.a_out, cell.swap_out, cell.w_out, cell.psum_out
                )  # fmt: skip
        for c in columns:
            straight = delay(m, sums[c], chip.cols - 1 - c, f"out_{c}")
            m.d.comb += self.out.word_select(c, 32).eq(straight)
        return m
