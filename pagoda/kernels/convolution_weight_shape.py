"""Block sizes for the gradient of a convolution's kernel, by the contract's formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from pagoda.compiler.allocate import ALIGNMENT
from pagoda.compiler.cost import (
    ISSUE_CYCLES,
    SMALL_TILES,
    TILE_CYCLES,
    block_sizes,
    port_cycles,
)
from pagoda.compiler.errors import CompileError
from pagoda.compiler.link import kernel_sram
from pagoda.isa import timing
from pagoda.isa.chip import Chip
from pagoda.kernels.convolution_shape import ConvolutionShape, blocks, ceildiv

RUN = 32  # columns of a depthwise kernel's sums; it shows in the bits
LINE_CYCLES = 3 * ISSUE_CYCLES  # of the control core to load one line of a tap's inputs


@dataclass(frozen=True)
class WeightPlan:
    """A job: one tap (depthwise: `taps` of them) of bo x bc channels. A step of it: `lines` rows of
    outputs, or `cols` outputs of one row."""

    bo: int
    bc: int
    lines: int
    cols: int
    taps: int = 1
    cycles: int = 0


def weight_cycles(chip: Chip, shape: ConvolutionShape, plan: WeightPlan) -> int:
    """Estimated cycles of the core with the most work, launch excluded."""
    size = shape.operand_bytes
    total = 0.0
    for bo, n_o in blocks(shape.group_co, plan.bo):
        for bc, n_c in blocks(shape.group_ci, plan.bc):
            job = TILE_CYCLES + port_cycles(chip, bo, bc, shape.layout.output, 4)
            for lines, n_lines in blocks(shape.n * shape.oh, plan.lines):
                for cols, n_cols in blocks(shape.ow, plan.cols):
                    dot = timing.matmul(chip, bo, bc, 1, lines * cols, True)
                    pitch = shape.ci * shape.stride[1]
                    loads = 1 if shape.pointwise and shape.stride == (1, 1) else lines
                    port = loads * port_cycles(chip, lines * cols // loads, bc, pitch, size)
                    port += port_cycles(chip, lines * cols, bo, shape.co, size)
                    issue = loads * LINE_CYCLES + 2 * ISSUE_CYCLES
                    job += n_lines * n_cols * max(dot.occupancy, port, issue)
            total += n_o * n_c * job
    jobs = shape.groups * shape.kernel[0] * shape.kernel[1]
    count = jobs * ceildiv(shape.group_co, plan.bo) * ceildiv(shape.group_ci, plan.bc)
    return int(total * jobs / count * ceildiv(count, chip.cores)) + 2 * chip.dram_latency


def legal_weight_plans(chip: Chip, shape: ConvolutionShape) -> Iterator[WeightPlan]:
    low, high = kernel_sram(chip)
    bank = chip.bank_bytes("sram")

    def banks(nbytes: int) -> int:
        return ceildiv(2 * ceildiv(nbytes, ALIGNMENT) * ALIGNMENT, bank) * bank

    even = chip.rows // gcd(shape.ow, chip.rows)  # rows of outputs that fill whole passes
    lines = {*block_sizes(shape.n * shape.oh, even, 256), 1, even}
    steps = [(count, shape.ow) for count in sorted(lines) if count <= shape.n * shape.oh]
    steps += [(1, cols) for cols in block_sizes(shape.ow, chip.rows, 4096) if cols < shape.ow]
    for bo in block_sizes(shape.group_co, chip.rows, 1024):
        for bc in block_sizes(shape.group_ci, chip.cols, 1024):
            if 2 * ceildiv(4 * bo * bc, ALIGNMENT) * ALIGNMENT > chip.acc_bytes:
                break
            for count, cols in steps:
                pixels = count * cols * shape.operand_bytes
                if banks(pixels * bo) + banks(pixels * bc) + SMALL_TILES <= high - low:
                    yield WeightPlan(bo, bc, count, cols)


@lru_cache(maxsize=1024)
def choose_weight(chip: Chip, shape: ConvolutionShape) -> WeightPlan:
    """The plan with the lowest estimate. Raises CompileError when none fits."""
    plans = legal_weight_plans(chip, shape)
    return _cheapest(chip, shape, (replace(p, cycles=weight_cycles(chip, shape, p)) for p in plans))


def _cheapest(chip: Chip, shape: ConvolutionShape, plans: Iterator[WeightPlan]) -> WeightPlan:
    best = min(plans, key=lambda plan: plan.cycles, default=None)
    if best is None:
        kh, kw = shape.kernel
        raise CompileError(
            f"gradient of a {kh} x {kw} kernel of {shape.ci} channels",
            f"two rows of operands fit the SRAM of chip {chip.name}",
            f"it has {chip.sram_bytes} bytes in {chip.sram_banks} banks",
            "use a chip with more SRAM",
        )  # fmt: skip
    return best


# Depthwise ----------------------------------------------------------------------------------------


def depthwise_weight_cycles(chip: Chip, shape: ConvolutionShape, plan: WeightPlan) -> int:
    """Estimated cycles of a depthwise one, whose taps are vector commands."""
    size, kernel = shape.operand_bytes, shape.kernel[0] * shape.kernel[1]
    total = 0.0
    for bc, n_c in blocks(shape.co, plan.bc):
        for taps, n_taps in blocks(kernel, plan.taps):
            job = TILE_CYCLES + taps * (RUN * ceildiv(bc, chip.lanes) + 100)
            for cols, n_cols in blocks(shape.ow, min(RUN, shape.ow)):
                one = timing.vector(chip, cols, bc, 0, 0).occupancy + 2
                high = plan.lines * shape.stride[0] + shape.kernel[0]
                wide = cols * shape.stride[1] + shape.kernel[1]
                port = high * port_cycles(chip, wide, bc, shape.ci, size) / plan.lines
                port += port_cycles(chip, cols, bc, shape.co, size)
                issue = taps * ISSUE_CYCLES + 2 * high * ISSUE_CYCLES / plan.lines
                job += shape.n * shape.oh * n_cols * max(taps * one, port, issue)
            total += n_c * n_taps * job
    jobs = ceildiv(shape.co, plan.bc) * ceildiv(kernel, plan.taps)
    return int(total / jobs * ceildiv(jobs, chip.cores)) + 2 * chip.dram_latency


def legal_depthwise_weight_plans(chip: Chip, shape: ConvolutionShape) -> Iterator[WeightPlan]:
    low, high = kernel_sram(chip)
    kernel, wide = shape.kernel[0] * shape.kernel[1], min(RUN, shape.ow)
    for bc in block_sizes(shape.co, chip.lanes, 1024):
        for taps in {kernel, *range(shape.kernel[1], kernel, shape.kernel[1]), 1}:
            if 4 * taps * wide * bc > chip.acc_bytes:
                continue
            for lines in (1, 2, 4, 8, 16, 32):
                rows, _ = shape.window(min(lines, shape.oh), wide)
                elements = rows * shape.pitch(wide) + min(lines, shape.oh) * wide
                held = 2 * elements * bc * shape.operand_bytes + 8 * (taps + 2) * (bc + 8)
                if held + SMALL_TILES + chip.bank_bytes("sram") <= high - low:
                    yield WeightPlan(1, bc, min(lines, shape.oh), wide, taps)


@lru_cache(maxsize=1024)
def choose_depthwise_weight(chip: Chip, shape: ConvolutionShape) -> WeightPlan:
    """The plan with the lowest estimate. Raises CompileError when none fits."""
    plans = legal_depthwise_weight_plans(chip, shape)
    return _cheapest(
        chip, shape, (replace(p, cycles=depthwise_weight_cycles(chip, shape, p)) for p in plans)
    )
