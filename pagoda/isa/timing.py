"""How long everything takes: closed forms of command fields and chip parameters, in cycles.

A command that starts in cycle s frees its engine (and the DRAM port) in cycle s + occupancy and
finishes, freeing bank ports and window entry, `tail` cycles later. When it starts is the window
rule's business (`window`). `timing_examples` applies every formula by hand.

    P   width of a bank port in bytes: 4 * lanes      R, C   rows, columns of the systolic array
    D   cycles from reading a partial sum in ACC to writing it back: R * pe_stages + C + 4
    L   lanes of the vector engine                    L'     min(L, 64)
    X   cycles from one DRAM atom to the next: 64 * cores / bytes per cycle, a rational

An engine is a pipeline; its last access lies before the command's finish, whatever commands came
before. `bench/early_rtl` compares these forms with such pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pagoda.isa.access import Access, bank_mask, loop_count, merge, operands_per_bank
from pagoda.isa.accumulation import LANES, ReduceOp
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.functions import VECTOR_FUNCTIONS

# The control core at the command port; a store that starts in cycle t. ----------------------------

STORE_EFFECT = 4  # go, fence, barrier, exit and trap act in cycle t + 4 at the earliest
STORE_CYCLES = 5  # the next instruction starts in t + 5, or one cycle after a delayed entry
START_AFTER_ENTRY = 2  # a command that entered in cycle e may start in e + 2
LOAD_EFFECT = 3  # a word load from SRAM that starts in t takes the word in t + 3 at the earliest
LOAD_CYCLES = 5  # the next instruction starts 2 cycles after the word was taken
BARRIER_CYCLES = 10  # from the last core's arrival to the next instruction of every core
CODE_BYTES_PER_CYCLE = 16  # while a program is copied to IMEM


def first_instruction(chip: Chip, code_bytes: int, resident: bool, args: int) -> int:
    """Cycle in which every core starts its first instruction; cycle 0 accepts the launch."""
    copy = 0 if resident else ceil_div(code_bytes, CODE_BYTES_PER_CYCLE)
    return chip.launch_cycles + copy + args


def drained(start: int, last_finish: int) -> int:
    """Cycle in which a fence, barrier or exit that starts in `start` is through.

    That is the next instruction's start, the arrival at the barrier, or the core's end.
    """
    return max(start + STORE_CYCLES, last_finish + 1)


def index_cycles(chip: Chip, rows: int) -> int:
    """How long gather and scatter hold their entry to read `rows` indices."""
    return ceil_div(rows, chip.lanes) + 4


# DRAM port. Atom slots open in cycles ceil(j * X), j = 0, 1, 2, ..., counted from the launch; where
# X < 1, several of them in one cycle. -------------------------------------------------------------


def dram_slot_cycle(chip: Chip, slot: int) -> int:
    """The cycle in which atom slot j of a core's DRAM port opens: ceil(j * X)."""
    share = chip.dram_share
    return ceil_div(slot * DRAM_ATOM_BYTES * share.denominator, share.numerator)


def first_dram_slot(chip: Chip, cycle: int) -> int:
    """The first atom slot that opens in `cycle` or later."""
    if cycle <= 0:
        return 0
    share = chip.dram_share
    return (cycle - 1) * share.numerator // (DRAM_ATOM_BYTES * share.denominator) + 1


def local_cycles(chip: Chip, rows: int, row_bytes: int) -> int:
    """Cycles in which a DMA engine moves `rows` rows through a bank port."""
    return rows * ceil_div(row_bytes, chip.port_bytes)


def dma_cycles(chip: Chip, rows: int, atoms: int, local: int, ways: int = 1) -> int:
    """T: cycles from the first atom slot when every row takes the longer of its two sides.

    The `rows` DRAM rows are equally long, so each has `few` atoms or one more; `ways` slots an
    atom. The local side has `local` cycles for all rows together, an equal share for each.
    """
    share = chip.dram_share
    slot = ways * DRAM_ATOM_BYTES * share.denominator  # X = slot / unit
    unit = share.numerator
    few, many = divmod(atoms, rows)
    scaled = (rows - many) * max(few * slot * rows, local * unit)
    scaled += many * max((few + 1) * slot * rows, local * unit)
    return ceil_div(scaled, rows * unit)


def store_lead(chip: Chip, mem_bits: int, local_bits: int) -> int:
    """Cycles in which the elements of one atom are read from their bank."""
    return ceil_div(DRAM_ATOM_BYTES * local_bits, mem_bits * chip.port_bytes)


# Commands. ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duration:
    """Occupancy and tail. `lead` is None but for commands that move DRAM atoms: their occupancy
    counts from the first atom slot that opens `lead` cycles after the start or later."""

    occupancy: int
    tail: int
    lead: int | None = None

    def occupancy_from(self, chip: Chip, start: int) -> int:
        """Cycles from the start in cycle `start` until the engine is free."""
        if self.lead is None:
            return self.occupancy
        slot = first_dram_slot(chip, start + self.lead)
        return dram_slot_cycle(chip, slot) - start + self.occupancy


EMPTY = Duration(1, 0)


def load(
    chip: Chip, rows: int, atoms: int, local: int, padding: int = 0, right: int = 0
) -> Duration:
    """load and gather; `rows` DRAM rows. Without atoms everything is padding.

    local: cycles of the rows that hold data; padding: of the other rows, for which the port has
    time while data is on its way; right: of the zeros behind the last row's data.
    """
    tail = chip.dram_latency + 8 + dram_slot_cycle(chip, 1)
    if atoms == 0:
        return Duration(local + padding, tail)
    paced = dma_cycles(chip, rows, atoms, local) + right
    return Duration(max(paced, local + padding), tail, lead=0)


def store(
    chip: Chip, rows: int, atoms: int, local: int, lead: int, accumulate: bool = False
) -> Duration:
    """store and scatter. Accumulating takes a second slot for every atom, to read it; it is
    written back when it has arrived, so the port is needed for that much longer."""
    late = dram_slot_cycle(chip, 1)
    paced = dma_cycles(chip, rows, atoms, local, 2 if accumulate else 1)
    if accumulate:
        paced += chip.dram_latency + 8 + late
    return Duration(paced, 12 + late, lead)


def matmul(
    chip: Chip,
    m: int,
    n: int,
    k_outer: int,
    k_inner: int,
    transpose_a: bool = False,
    transpose_b: bool = False,
    shared_bank: bool = False,
) -> Duration:
    """One matmul; shared_bank: the hulls of A and B touch a common SRAM bank.

    KP passes over k, each over NP column blocks; while a block streams its Mt rows the next
    weights (w cycles) load behind it, unless A and B must take turns at a bank port.
    """
    rows, cols = chip.rows, chip.cols
    passes = max(k_outer * ceil_div(k_inner, rows), 1)
    blocks = ceil_div(n, cols)
    streamed = ceil_div(m, rows) * rows if transpose_a else m
    weights = max(rows, cols) if transpose_b else rows
    unit = streamed + weights if shared_bank else max(streamed, weights)
    fill = weights + rows * transpose_a + rows * transpose_b
    return Duration(fill + passes * max(blocks * unit, chip.psum_latency), chip.psum_latency + 4)


def vector(chip: Chip, rows: int, cols: int, f1: int, f2: int, per_bank: int = 1) -> Duration:
    """One vector command; per_bank: the most non-scalar source operands that touch one bank."""
    first, second = VECTOR_FUNCTIONS[f1], VECTOR_FUNCTIONS[f2]
    group = max(first.cost, second.cost, per_bank)
    return Duration(rows * ceil_div(cols, chip.lanes) * group, 4 + first.latency + second.latency)


def reduce_rows(chip: Chip, rows: int, cols: int, argmax: bool = False) -> Duration:
    """A row reduction: per 64 columns one pass over the lanes, and the state in and out."""
    groups = ceil_div(LANES, min(chip.lanes, LANES))
    per_row = ceil_div(cols, LANES) * max(groups, 4) + (4 if argmax else 2) * groups
    return Duration(rows * per_row, 8)


def reduce_columns(chip: Chip, rows: int, cols: int) -> Duration:
    """A column reduction: row after row, at least 4 cycles each, and the state in and out."""
    groups = ceil_div(cols, chip.lanes)
    return Duration(rows * max(groups, 4) + 2 * groups, 8)


def finish(chip: Chip, rows: int) -> Duration:
    """The tree that folds 64 lanes, once a row; the adders are free when the last row is through
    its levels."""
    return Duration(rows * 2 * ceil_div(LANES, min(chip.lanes, LANES)) + 24, 8)


def transpose(chip: Chip, rows: int, cols: int) -> Duration:
    """L x L blocks through a register array, filled by rows and emptied by columns."""
    lanes = chip.lanes
    return Duration(ceil_div(rows, lanes) * ceil_div(cols, lanes) * lanes + lanes, 8)


def iota(chip: Chip, rows: int, cols: int) -> Duration:
    """One group of lanes a cycle."""
    return Duration(rows * ceil_div(cols, chip.lanes), 8)


def duration(chip: Chip, touched: Access | None) -> Duration:
    """The duration of a checked command; None stands for an empty one."""
    if touched is None:
        return EMPTY
    f: Mapping[str, int] = touched.fields
    match touched.command:
        case "load":
            return _load(chip, touched)
        case "store":
            tile = touched.tiles[0]
            loops, row_bytes = merge(tile.loops, tile.row_bytes)
            return _store(chip, touched, local_cycles(chip, loop_count(loops), row_bytes))
        case "gather":
            local = local_cycles(chip, f["rows"], touched.tiles[0].row_bytes)
            return load(chip, f["rows"], touched.dram.atoms(), local)
        case "scatter":
            local = local_cycles(chip, f["rows"], touched.tiles[0].row_bytes)
            return _store(chip, touched, local)
        case "matmul":
            return matmul(
                chip, f["m0"] * f["m1"] * f["m2"], f["n"], f["k_outer"], f["k_inner"],
                bool(f["transpose_a"]), bool(f["transpose_b"]), _share_bank(chip, touched),
            )  # fmt: skip
        case "vector":
            sources = [tile for tile in touched.tiles if tile.reads]
            per_bank = operands_per_bank(chip, sources)
            return vector(chip, f["rows"], f["cols"], f["f1"], f["f2"], per_bank)
        case "reduce" if f["column"]:
            return reduce_columns(chip, f["rows"], f["cols"])
        case "reduce":
            return reduce_rows(chip, f["rows"], f["cols"], f["op"] == ReduceOp.ARGMAX)
        case "finish":
            return finish(chip, f["rows"])
        case "transpose":
            return transpose(chip, f["rows"], f["cols"])
        case _:
            return iota(chip, f["rows"], f["cols"])


def _load(chip: Chip, touched: Access) -> Duration:
    f, tile, dram = touched.fields, touched.tiles[0], touched.dram
    rows, atoms = (dram.rows(), dram.atoms()) if dram is not None else (0, 0)
    outside = f["pad_above"] + f["pad_below"]
    if outside or f["pad_left"] or f["pad_right"]:
        one_row = local_cycles(chip, f["planes"], tile.row_bytes)
        right = local_cycles(chip, 1, f["pad_right"] * tile.dtype.bits // 8)
        return load(chip, rows, atoms, (f["rows"] - outside) * one_row, outside * one_row, right)
    loops, row_bytes = merge(tile.loops, tile.row_bytes)
    return load(chip, rows, atoms, local_cycles(chip, loop_count(loops), row_bytes))


def _store(chip: Chip, touched: Access, local: int) -> Duration:
    dram, accumulate = touched.dram, bool(touched.fields["accumulate"])
    lead = store_lead(chip, dram.dtype.bits, touched.tiles[0].dtype.bits)
    return store(chip, dram.rows(), dram.atoms(), local, lead, accumulate)


def _share_bank(chip: Chip, touched: Access) -> bool:
    masks = [bank_mask(chip, tile.hull) for tile in touched.tiles if tile.name in ("a", "b")]
    return len(masks) == 2 and masks[0] & masks[1] != 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
