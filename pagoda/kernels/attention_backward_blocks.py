"""Block sizes of attention's backward kernel, from a model of what a step costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from pagoda.compiler.errors import CompileError
from pagoda.compiler.link import kernel_sram
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.numbers import DType
from pagoda.isa.timing import matmul, vector
from pagoda.kernels.float32 import products

MOST = 256  # rows and keys of a block, at most: larger ones gain nothing
COMMAND_CYCLES = 120  # that the control core needs for a command, about


@dataclass(frozen=True)
class BackwardBlocks:
    """rows: queries, keys: keys of a step. No bit of the result depends on them; if operands are
    split into terms, both are multiples of `float32_run`."""

    rows: int
    keys: int


def float32_run(width: int) -> int:
    """Queries and keys per matmul when operands are split into terms: part of the meaning there,
    because the products of all terms of one run are added before those of the next. So few that
    the smallest chip has room for them."""
    return max(4, min(16, 1 << (1024 // width).bit_length() - 1))


def choose_backward_blocks(
    chip: Chip,
    head_dim: int,
    value_dim: int,
    *,
    mask: DType | None = None,
    terms: int = 1,
    dropout: bool = False,
) -> BackwardBlocks:
    """The blocks for a chip: of those that fit the ones with the fewest cycles per score, the
    smaller ones among equals. Raises CompileError for a chip without bf16 products or with too
    little memory."""
    if "bf16" not in chip.matrix_types:
        raise CompileError(
            "attention", "it needs a matrix engine that multiplies bf16",
            f"chip {chip.name} has {', '.join(chip.matrix_types)}", "use another chip",
        )  # fmt: skip
    least = float32_run(max(head_dim, value_dim)) if terms > 1 else 4
    sizes = [size for size in (4, 8, 16, 32, 64, 128, MOST) if size >= least]
    low, high = kernel_sram(chip)
    fitting = []
    for rows, keys in product(sizes, sizes):
        blocks = BackwardBlocks(rows, keys)
        sram, acc = memory_bytes(blocks, head_dim, value_dim, mask, terms, dropout)
        if sram <= (high - low) * 15 // 16 and acc <= chip.acc_bytes:
            fitting.append(blocks)
    if not fitting:
        raise CompileError(
            "attention", f"{least} queries and keys fit the SRAM and ACC of chip {chip.name}",
            f"the head dimension is {max(head_dim, value_dim)}",
            "use a smaller head dimension or a larger chip",
        )  # fmt: skip
    return min(fitting, key=lambda it: cycles_per_score(chip, it, head_dim, value_dim, mask, terms))


def cycles_per_score(
    chip: Chip,
    blocks: BackwardBlocks,
    head_dim: int,
    value_dim: int,
    mask: DType | None = None,
    terms: int = 1,
) -> float:
    """About how many cycles a step takes, by rows * keys: those of its slowest engine, or of all
    engines together if they take turns (with terms)."""
    rows, keys = blocks.rows, blocks.keys

    def array(m: int, n: int, k: int, **transposed: bool) -> int:
        return matmul(chip, m, n, 1, k, **transposed).occupancy

    def lanes(height: int, width: int, commands: int) -> int:
        return commands * vector(chip, height, width, 0, 0).occupancy

    def atoms(height: int, nbytes: int) -> int:
        return height * -(-nbytes // DRAM_ATOM_BYTES)

    forward = array(rows, keys, head_dim, transpose_b=True)
    forward += array(rows, keys, value_dim, transpose_b=True)
    run = float32_run(max(head_dim, value_dim)) if terms > 1 else max(rows, keys)
    by_rows, by_keys = -(-rows // run), -(-keys // run)
    back = by_rows * array(keys, head_dim, min(run, rows), transpose_a=True)
    back += by_rows * array(keys, value_dim, min(run, rows), transpose_a=True)
    back += by_keys * array(rows, head_dim, min(run, keys))
    matrix = (forward + back) * len(products(terms))
    # p in two or three commands, of which exp2 takes twice the time; p and ds rounded; dq twice.
    vectors = lanes(rows, keys, 5 + 2 * (mask is not None)) + lanes(rows, head_dim, 2)
    if terms > 1:  # `split_terms`, of p, ds, q and dout
        vectors += 8 * (lanes(rows, keys, 2) + lanes(rows, head_dim, 1) + lanes(rows, value_dim, 1))
    itemsize = 2 if terms == 1 else 4
    moved = atoms(rows, itemsize * head_dim) + atoms(rows, itemsize * value_dim)
    moved += 2 * atoms(rows, 4 * head_dim) + 2 * rows  # dq comes and goes; statistics and delta
    if mask is not None:
        moved += atoms(rows, keys * mask.bits // 8)
    memory = float(moved * DRAM_ATOM_BYTES / chip.dram_share)
    commands = COMMAND_CYCLES * (16 + (3 + by_rows * 2 + by_keys) * (len(products(terms)) - 1))
    engines = matrix, vectors, memory, commands
    return (max(engines) if terms == 1 else sum(engines)) / (rows * keys)


def memory_bytes(
    blocks: BackwardBlocks,
    head_dim: int,
    value_dim: int,
    mask: DType | None,
    terms: int,
    dropout: bool = False,
) -> tuple[int, int]:
    """About how many bytes of SRAM and of ACC the kernel's tiles take, with one buffer of each
    but those that hold several steps."""
    rows, keys, both = blocks.rows, blocks.keys, head_dim + value_dim
    loaded, made = (3, 2) if terms == 1 else (terms, terms)
    sram = 2 * loaded * (rows + keys) * both + 4 * made * rows * keys
    sram += 4 * rows * keys + 8 * rows * head_dim + 64 * rows  # p, dq as it comes and goes
    sram += keys * both * (2 if terms == 1 else 4)  # dk and dv rounded
    sram += 4 * rows * keys * dropout
    sram += rows * keys  # which keys of the diagonal a row sees
    if mask is not None:
        sram += 2 * rows * keys * mask.bits // 8
    if terms > 1:  # ds, and the bits of what is split
        sram += 8 * rows * keys + 8 * max(rows, keys) * max(head_dim, value_dim)

    def place(height: int, width: int) -> int:
        return 4 * height * (1 << (width - 1).bit_length())  # so that tiles fill banks

    acc = 2 * place(rows, keys) + place(rows, head_dim)
    return sram, acc + place(keys, head_dim) + place(keys, value_dim)
