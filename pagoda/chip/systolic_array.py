"""The systolic array: rows x cols elements, and the delays that skew its inputs."""

from amaranth.hdl import C, ClockSignal, EnableInserter, Instance, Module, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.processing_element import (
    delay,
    element_signature,
    operand_bits,
    processing_element,
    sum_lead,
)
from pagoda.chip.verilate import to_verilog
from pagoda.isa.chip import Chip

PE_MODULE = "pagoda_pe"  # an element's name as a Verilog module of its own


class _Cell(wiring.Component):
    """An element behind a clock enable: as it is, or as an instance of the module `PE_MODULE`."""

    def __init__(self, chip: Chip, black_box: bool):
        self.chip, self.black_box = chip, black_box
        self.members = element_signature(operand_bits(chip)).members
        super().__init__({"enable": In(1), **self.members})

    def elaborate(self, platform) -> Module:
        element = None if self.black_box else processing_element(self.chip)
        m = Module()
        ports = {
            name: ("i_" if member.flow == In else "o_", getattr(self, name))
            for name, member in self.members.items()
        }
        if element is None:
            connections = {kind + name: port for name, (kind, port) in ports.items()}
            m.submodules.element = Instance(
                PE_MODULE, i_clk=ClockSignal(), i_rst=C(0, 1), i_enable=self.enable, **connections
            )
            return m
        m.submodules.element = EnableInserter(self.enable)(element)
        for name, (kind, port) in ports.items():
            inside = getattr(element, name)
            m.d.comb += inside.eq(port) if kind == "i_" else port.eq(inside)
        return m


def pe_verilog(chip: Chip) -> str:
    """Verilog of the module that a black-boxed array instantiates."""
    return to_verilog(_Cell(chip, black_box=False), PE_MODULE)


class SystolicArray(wiring.Component):
    """Weight-stationary: C sums run down the columns and meet A, which runs along the rows.

    In one cycle T it takes a row of A, with `swap` if it is the first of a block, and in T + `lead`
    the C partial sums of that row; `out` shows their sums `latency` cycles later. The block's
    weights are at `w` from cycle T on, row after row: those of row r in T + r. a and w are operand
    codes.

    black_box: elements are instances of the Verilog module of `pe_verilog`; such instances do not
    see an EnableInserter around the array, so the clock enable comes as `enable`.
    """

    def __init__(self, chip: Chip, black_box: bool = False, enable: Value | None = None):
        self.chip, self.black_box = chip, black_box
        self.enable = C(1, 1) if enable is None else enable
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
                cell = m.submodules[f"pe_{r}_{c}"] = _Cell(chip, self.black_box)
                m.d.comb += [
                    cell.enable.eq(self.enable), cell.a.eq(a), cell.swap.eq(swap),
                    cell.w.eq(weights[c]), cell.psum.eq(sums[c]),
                ]  # fmt: skip
                a, swap, weights[c], sums[c] = (
                    cell.a_out, cell.swap_out, cell.w_out, cell.psum_out
                )  # fmt: skip
        for c in columns:
            straight = delay(m, sums[c], chip.cols - 1 - c, f"out_{c}")
            m.d.comb += self.out.word_select(c, 32).eq(straight)
        return m
