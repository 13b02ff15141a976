"""What a convolution is, and the block sizes chosen for it: plain data and a cost model.

Time of a tile = the slower of its matmuls and its transfers (they overlap: the window of the next
tile is loaded and the last tile stored while this one is multiplied), by the contract's formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NoReturn

from pagoda.compiler.allocate import ALIGNMENT
from pagoda.compiler.cost import (
    ISSUE_CYCLES,
    SMALL_TILES,
    TILE_CYCLES,
    EpilogueCost,
    block_sizes,
    port_cycles,
)
from pagoda.compiler.errors import CompileError
from pagoda.compiler.link import kernel_sram
from pagoda.isa import timing
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip

Pair = tuple[int, int]
WEIGHT_BUFFERS = (4, 3, 2)
MAX_PAD = (1 << 16) - 1  # elements: what the load command's fields hold
MAX_COLS = 1 << 20
DEPENDENT_FMA = 24  # cycles from a vector command's end to the start of one that needs its result


@dataclass(frozen=True)
class WeightLayout:
    """Where a kernel's elements lie, in elements from the tensor's first: that of group g, output o
    and channel c of it, kernel row ky and column kx at start + g group + o output + c channel +
    ky row + kx column. Rows and columns may be negative: a kernel turned by half a turn."""

    start: int
    group: int
    output: int
    channel: int
    row: int
    column: int

    @property
    def turned(self) -> bool:
        """Does it enter the array as a transposed B, [outputs, channels]?"""
        return self.channel == 1


@dataclass(frozen=True)
class ConvolutionShape:
    """y[n, oh, ow, co] = x[n, h, w, ci] * weights (+ bias); extents in elements, channels last.

    padding: zeros (before, after) each of h and w; a negative number leaves out that many rows or
    columns of x. weights "ohwi": [co, kh, kw, ci / groups], what torch's channels_last makes of a
    Conv2d's; "hwio": [kh, kw, ci / groups, co]; or any layout whose channels in or out are
    contiguous. output_steps: elements from image to image, row to row and pixel to pixel of y,
    which is dense without them. cells: a pixel of x is a square of so many pixels each way, with
    the channels of one row of them after those of another; in memory whole rows of x lie apart.
    """

    n: int
    h: int
    w: int
    ci: int
    co: int
    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    groups: int = 1
    bias: bool = False
    weights: Literal["ohwi", "hwio"] | WeightLayout = "ohwi"
    operand_bytes: int = 2
    output_bytes: int = 2
    output_steps: tuple[int, int, int] | None = None
    cells: int = 1
    epilogue: EpilogueCost | None = None

    def __post_init__(self) -> None:
        def expect(holds: bool, rule: str, value: str, remedy: str) -> None:
            if not holds:
                raise CompileError("convolution", rule, value, remedy)

        steps = (*self.kernel, *self.stride, *self.dilation, self.groups)
        expect(
            min(steps) > 0, "kernel, stride, dilation and groups are positive",
            f"they are {self.kernel}, {self.stride}, {self.dilation} and {self.groups}",
            "pass 1 for none",
        )  # fmt: skip
        expect(
            self.ci % self.groups == 0 and self.co % self.groups == 0,
            "groups divides the channels in and out",
            f"{self.groups} groups of {self.ci} and {self.co} channels", "choose another number",
        )  # fmt: skip
        expect(
            self.oh > 0 and self.ow > 0, "the padded input is no smaller than the dilated kernel",
            f"the output would be {self.oh} x {self.ow}", "pad the input or use a smaller kernel",
        )  # fmt: skip

    def _extent(self, dim: int, size: int) -> int:
        span = (self.kernel[dim] - 1) * self.dilation[dim] + 1
        return (size + sum(self.padding[dim]) - span) // self.stride[dim] + 1

    @property
    def oh(self) -> int:
        return self._extent(0, self.h)

    @property
    def ow(self) -> int:
        return self._extent(1, self.w)

    @property
    def group_ci(self) -> int:
        return self.ci // self.groups

    @property
    def group_co(self) -> int:
        return self.co // self.groups

    @property
    def layout(self) -> WeightLayout:
        kw, ci, co = self.kernel[1], self.group_ci, self.co
        if self.weights == "ohwi":
            depth = self.kernel[0] * kw * ci
            return WeightLayout(0, self.group_co * depth, depth, 1, kw * ci, ci)
        if self.weights == "hwio":
            return WeightLayout(0, self.group_co, 1, co, kw * ci * co, ci * co)
        return self.weights

    @property
    def steps(self) -> tuple[int, int, int]:
        """Elements from image to image, row to row and pixel to pixel of y."""
        return self.output_steps or (self.oh * self.ow * self.co, self.ow * self.co, self.co)

    @property
    def macs(self) -> int:
        taps = self.kernel[0] * self.kernel[1]
        return self.n * self.oh * self.ow * self.co * taps * self.group_ci

    @property
    def pointwise(self) -> bool:
        """One tap and no padding: input pixels are either used as they are, or not at all."""
        still = self.padding == ((0, 0), (0, 0)) and not self.depthwise
        return self.kernel == (1, 1) and still

    @property
    def is_matmul(self) -> bool:
        """Is it a matrix product of [n h w, ci] pixels as they lie in memory?"""
        return self.pointwise and self.stride == (1, 1) and self.groups == 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.ci == self.co and self.ci > 1

    def window(self, bh: int, bw: int) -> Pair:
        """Input rows and columns under bh x bw outputs, as they are kept in SRAM."""
        if self.pointwise:
            return bh, bw
        rows, cols = (
            (count - 1) * self.stride[d] + (self.kernel[d] - 1) * self.dilation[d] + 1
            for d, count in enumerate((bh, bw))
        )
        return rows, cols

    @property
    def local_stride(self) -> Pair:
        """Strides of the outputs in the window: where one tap is all, the load picks the pixels."""
        return (1, 1) if self.pointwise else self.stride

    def pitch(self, bw: int) -> int:
        """Columns of a window's row in SRAM: whole steps of the stride."""
        step = self.local_stride[1]
        return -(-self.window(1, bw)[1] // step) * step


@dataclass(frozen=True)
class ConvolutionPlan:
    """images x rows x cols outputs of bn channels in a tile; the weights of a step: `run` taps of
    `bk` channels (run > 1: all of a kernel row, and bk all channels). parts: into how many jobs
    the channels are dealt out to the cores."""

    images: int
    rows: int
    cols: int
    bn: int
    run: int
    bk: int
    windows: int
    buffers: int
    parts: int = 1
    cycles: int = 0

    @property
    def pixels(self) -> int:
        return self.images * self.rows * self.cols


def ceildiv(value: int, divisor: int) -> int:
    return -(-value // divisor)


def window_bytes(shape: ConvolutionShape, plan: ConvolutionPlan) -> int:
    rows = plan.images * shape.window(plan.rows, plan.cols)[0]
    return rows * shape.pitch(plan.cols) * shape.ci * shape.operand_bytes


def output_sram(shape: ConvolutionShape, elements: int) -> int:
    """Bytes of SRAM that the end of a tile of outputs needs."""
    if shape.epilogue is not None:
        return elements * (shape.epilogue.tile_bytes + 4 * shape.bias)
    return 2 * elements * shape.output_bytes if shape.bias else 0


def fits(chip: Chip, shape: ConvolutionShape, plan: ConvolutionPlan) -> bool:
    low, high = kernel_sram(chip)
    bank = chip.bank_bytes("sram")

    def banks(buffers: int, nbytes: int) -> int:
        return ceildiv(buffers * ceildiv(nbytes, ALIGNMENT) * ALIGNMENT, bank) * bank

    sums = ceildiv(plan.pixels * plan.bn * 4, ALIGNMENT) * ALIGNMENT
    output = output_sram(shape, plan.pixels * plan.bn)
    weights = banks(plan.buffers, plan.run * plan.bk * plan.bn * shape.operand_bytes)
    needed = banks(plan.windows, window_bytes(shape, plan)) + weights + output + SMALL_TILES
    return 2 * sums <= chip.acc_bytes and needed <= high - low


def blocks(extent: int, block: int) -> Iterator[Pair]:
    """(size, how often) of the blocks that an extent falls into."""
    if extent // block:
        yield block, extent // block
    if extent % block:
        yield extent % block, 1


def convolution_cycles(chip: Chip, shape: ConvolutionShape, plan: ConvolutionPlan) -> int:
    """Estimated cycles of the core with the most work, launch excluded."""
    total = first = last = 0.0
    for images, n_images in blocks(shape.n, plan.images):
        for rows, n_rows in blocks(shape.oh, plan.rows):
            for cols, n_cols in blocks(shape.ow, plan.cols):
                window = _window_cycles(chip, shape, images, rows, cols)
                work, port, store = _tile_cycles(chip, shape, plan, images * rows * cols)
                wait = chip.dram_latency + 50
                if plan.windows == 1:
                    cycles = max(work, port) + (window + wait) * plan.parts
                else:
                    cycles = max(work, port + window * plan.parts)
                total += n_images * n_rows * n_cols * cycles
                first, last = max(first, window + wait), store
    jobs = ceildiv(shape.n, plan.images) * ceildiv(shape.oh, plan.rows)
    jobs *= ceildiv(shape.ow, plan.cols) * plan.parts
    return int(total / jobs * ceildiv(jobs, chip.cores) + first + last + chip.dram_latency)


def _window_cycles(chip: Chip, shape: ConvolutionShape, images: int, rows: int, cols: int) -> int:
    size, (high, wide) = shape.operand_bytes, shape.window(rows, cols)
    if shape.pointwise:
        pitch = shape.ci * shape.stride[1]
        return port_cycles(chip, images * high * wide, shape.ci, pitch, size)
    if shape.cells > 1:  # a square's rows are apart in SRAM: as many short rows
        row, pieces = shape.ci // shape.cells, images * high * shape.cells
        moved = port_cycles(chip, pieces, wide * row, shape.w * row, size)
        return max(moved, pieces * timing.local_cycles(chip, wide, row * size))
    high, wide = min(high, shape.h), min(wide, shape.w)
    return port_cycles(chip, images * high, wide * shape.ci, shape.w * shape.ci, size)


def _tile_cycles(
    chip: Chip, shape: ConvolutionShape, plan: ConvolutionPlan, m: int
) -> tuple[float, float, int]:
    """For m pixels and all channels: cycles of the matrix or the vector engine, which works longer,
    of the port for weights and outputs, and of the port for one store."""
    turned = shape.layout.turned
    size, taps = shape.operand_bytes, shape.kernel[0] * shape.kernel[1]
    matrix = port = vector = 0.0
    store = 0
    depth = shape.layout.output if turned else shape.layout.channel
    pitch = shape.steps[2]
    for n, count in blocks(shape.group_co, plan.bn):
        count *= shape.groups
        matrix += count * TILE_CYCLES / 4
        for bk, n_bk in blocks(shape.group_ci, plan.bk):
            merged = merges_run(shape)
            outer, inner = (1, plan.run * bk) if merged else (plan.run, bk)
            dot = timing.matmul(chip, m, n, outer, inner, False, turned)
            steps = count * n_bk * taps // plan.run
            matrix += steps * max(dot.occupancy + dot.tail, 2 * ISSUE_CYCLES)
            block = (n, plan.run * bk) if turned else (plan.run * bk, n)
            port += steps * port_cycles(chip, *block, depth, size)
        sizes, local = (shape.output_bytes,), shape.output_bytes if shape.bias else 4
        if shape.epilogue is not None:
            sizes, local = shape.epilogue.stored_bytes, None
            group = timing.vector(chip, m, n, 0, 0).occupancy
            vector += count * shape.epilogue.cycles * group
            if shape.epilogue.loaded_bytes:
                port += count * port_cycles(chip, m, n, pitch, shape.epilogue.loaded_bytes)
        store = sum(port_cycles(chip, m, n, pitch, size, local) for size in sizes)
        port += count * store
    return max(matrix, vector), port, store


def merges_run(shape: ConvolutionShape) -> bool:
    """Are the channels of neighbouring taps one contiguous run of the window?"""
    return shape.groups == 1 and (shape.dilation[1] == 1 or shape.kernel[1] == 1)


def legal_plans(chip: Chip, shape: ConvolutionShape) -> Iterator[ConvolutionPlan]:
    """Every plan worth trying whose tiles fit."""
    unit = max(chip.rows, DRAM_ATOM_BYTES // shape.operand_bytes)
    chunks = [(1, bk) for bk in block_sizes(shape.group_ci, unit, 1 << 12)]
    if shape.kernel[1] > 1:
        chunks.append((shape.kernel[1], shape.group_ci))
    most = chip.acc_bytes // (8 * min(chip.cols, shape.group_co))
    jobs = shape.groups * ceildiv(shape.group_co, chip.cols)
    for images, rows, cols in _tiles(shape, most):
        for bn in block_sizes(shape.group_co, chip.cols, 1024):
            if 8 * images * rows * cols * bn > chip.acc_bytes:
                break
            tiles = ceildiv(shape.n, images) * ceildiv(shape.oh, rows) * ceildiv(shape.ow, cols)
            blocks = shape.groups * ceildiv(shape.group_co, bn)
            parts = {1, min(ceildiv(chip.cores, tiles), blocks, jobs)}
            for run, bk in chunks:
                for windows in (2, 1):
                    for buffers in WEIGHT_BUFFERS:
                        plan = ConvolutionPlan(images, rows, cols, bn, run, bk, windows, buffers)
                        if fits(chip, shape, plan):
                            yield from (replace(plan, parts=p) for p in sorted(parts))
                            break


def _tiles(shape: ConvolutionShape, most: int) -> Iterator[tuple[int, int, int]]:
    """Images, rows and columns of tiles of at most so many outputs. A tile of several images or
    rows is a rectangle that one store reaches: several images only of full width."""
    if shape.pointwise or shape.ow > most:
        images: tuple[int, ...] = (1,)
    else:
        images = tuple(i for i in (1, 2, 3, 4, 6, 8, 16, 32) if i <= shape.n)
    for cols in block_sizes(shape.ow, 1, most):
        for rows in block_sizes(shape.oh, 1, most // cols):
            for count in images if cols == shape.ow and rows == shape.oh else (1,):
                # An epilogue counts outputs along the rows of one matrix: no gaps in a tile.
                gapless = cols == shape.ow or rows == 1 or shape.epilogue is None
                if count * rows * cols <= most and gapless:
                    yield count, rows, cols


@lru_cache(maxsize=1024)
def choose_convolution(chip: Chip, shape: ConvolutionShape) -> ConvolutionPlan:
    """The plan with the lowest estimate. Raises CompileError when none fits."""
    best: ConvolutionPlan | None = None
    lowest = 0
    for plan in legal_plans(chip, shape):
        cycles = convolution_cycles(chip, shape, plan)
        if best is None or cycles < lowest:
            best, lowest = plan, cycles
    return replace(best, cycles=lowest) if best else _nothing_fits(chip, shape)


# Depthwise ---------------------------------------------------------------------------------------


def depthwise_cycles(chip: Chip, shape: ConvolutionShape, plan: ConvolutionPlan) -> int:
    """Estimated cycles of a depthwise convolution, whose taps are vector commands."""
    taps, size = shape.kernel[0] * shape.kernel[1], shape.operand_bytes
    tiles = shape.n * ceildiv(shape.oh, plan.rows) * ceildiv(shape.ow, plan.cols)
    share = ceildiv(tiles, chip.cores) / tiles
    total = 0.0
    for n, n_n in blocks(shape.co, plan.bn):
        turn = 0 if shape.layout.group == 1 else timing.transpose(chip, n, taps).occupancy
        total += n_n * (turn + chip.dram_latency)
        for rows, n_rows in blocks(shape.oh, plan.rows):
            for cols, n_cols in blocks(shape.ow, plan.cols):
                high, wide = shape.window(rows, cols)
                issue = (high + taps * rows + 6) * ISSUE_CYCLES + 2 * TILE_CYCLES
                # A row's next tap needs its sums: the rows between hide what that takes.
                one = timing.vector(chip, cols, n, 0, 0).occupancy
                vector = taps * max(rows * (one + 2), one + DEPENDENT_FMA)
                port = high * port_cycles(chip, wide, n, shape.ci, size)
                port += port_cycles(chip, rows * cols, n, shape.steps[2], shape.output_bytes)
                cycles = max(issue, vector, port)
                total += shape.n * n_rows * n_cols * n_n * cycles * share
    return int(total)


@lru_cache(maxsize=1024)
def choose_depthwise(chip: Chip, shape: ConvolutionShape) -> ConvolutionPlan:
    """The plan with the lowest estimate. Raises CompileError when none fits."""
    low, high = kernel_sram(chip)
    best: ConvolutionPlan | None = None
    for cols in block_sizes(shape.ow, 1, 1 << 10):
        for rows in block_sizes(shape.oh, 1, 1 << 10):
            if shape.epilogue is not None and cols < shape.ow and rows > 1:
                break
            for bn in block_sizes(shape.co, chip.lanes, 1 << 12):
                plan = ConvolutionPlan(1, rows, cols, bn, 1, 1, 2, 2)
                sums, tall = plan.pixels * bn, shape.window(rows, cols)[0]
                window = tall * shape.pitch(cols) * bn * shape.operand_bytes
                weights = 2 * shape.kernel[0] * shape.kernel[1] * bn * shape.operand_bytes
                needed = 2 * (window + weights) + output_sram(shape, sums) + SMALL_TILES
                if 8 * sums > chip.acc_bytes or needed > high - low:
                    break
                plan = replace(plan, cycles=depthwise_cycles(chip, shape, plan))
                if best is None or plan.cycles < best.cycles:
                    best = plan
    return best or _nothing_fits(chip, shape)


def _nothing_fits(chip: Chip, shape: ConvolutionShape) -> NoReturn:
    kh, kw = shape.kernel
    raise CompileError(
        f"convolution {kh} x {kw} of {shape.ci} channels",
        f"the window of one output and two steps' weights fit the SRAM of chip {chip.name}",
        f"it has {chip.sram_bytes} bytes in {chip.sram_banks} banks",
        "use a chip with more SRAM",
    )  # fmt: skip
