"""Block sizes of the attention kernel: which of them are meaning, which are the chip's business."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.compiler.errors import CompileError
from pagoda.compiler.link import kernel_sram
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType

SOFTMAX_BLOCK = 512
"""Keys between two rescalings of the online softmax: part of the meaning, equal on every chip."""

SPAN_UNIT = 64  # a reduction may only be cut at multiples of its 64 lanes
KEY_BUFFERS = 4  # tiles of K on their way or in use, if operands are not split
LOAD_KEYS = (128, 64, 32)  # keys per load and matmul, best first
SMALL_LOAD_KEYS = (16, 8)  # for large head dimensions in little SRAM
ROWS_PER_ARRAY_ROW = 4  # with so many query rows, K and V loads hide behind the matrix engine


@dataclass(frozen=True)
class AttentionBlocks:
    """rows: query rows (of all heads that share K and V) worked on together. span: keys per vector
    command, a multiple of 64 that divides SOFTMAX_BLOCK. keys: keys per load and matmul, divides
    span. No bit of the result depends on them, but for `keys` where `float32_keys` fixes it."""

    rows: int
    span: int
    keys: int


def float32_keys(head_dim: int) -> int:
    """Keys per matmul when operands are split into terms: part of the meaning there, because the
    products of all terms of one run of keys are added before those of the next run."""
    return max(8, min(32, 1 << (2048 // head_dim).bit_length() - 1))


def choose_blocks(
    chip: Chip,
    head_dim: int,
    *,
    value_dim: int | None = None,
    mask: DType | None = None,
    terms: int = 1,
    dropout: bool = False,
) -> AttentionBlocks:
    """The blocks for a chip: as many rows as keep its matrix engine busy and fit, then large
    loads. Raises CompileError for a chip without bf16 products or with too little memory."""
    width = max(head_dim, value_dim or head_dim)
    if "bf16" not in chip.matrix_types:
        raise CompileError(
            "attention", "it needs a matrix engine that multiplies bf16",
            f"chip {chip.name} has {', '.join(chip.matrix_types)}", "use another chip",
        )  # fmt: skip
    low, high = kernel_sram(chip)
    room = (high - low) * 7 // 8  # the rest lets tiles be placed in banks of their own
    stages = (LOAD_KEYS, SMALL_LOAD_KEYS) if terms == 1 else ((float32_keys(width),),)
    most = max(ROWS_PER_ARRAY_ROW * chip.rows, 1)
    for loads in stages:
        rows = most
        while rows:
            for keys in loads:
                blocks = AttentionBlocks(rows, max(SPAN_UNIT, keys), keys)
                sram, acc = memory_bytes(blocks, width, mask, terms, dropout)
                if sram <= room and acc <= chip.acc_bytes:
                    return blocks
            rows //= 2
    raise CompileError(
        "attention", f"one query row with 8 keys fits the SRAM and ACC of chip {chip.name}",
        f"the head dimension is {width}", "use a smaller head dimension or a larger chip",
    )  # fmt: skip


def memory_bytes(
    blocks: AttentionBlocks, width: int, mask: DType | None, terms: int, dropout: bool = False
) -> tuple[int, int]:
    """About how many bytes of SRAM and of ACC the kernel's tiles take, with two buffers of what is
    loaded in a loop (with terms: one)."""
    rows, span, keys = blocks.rows, blocks.span, blocks.keys
    per_row = 4 * SOFTMAX_BLOCK + 2 * 4 * SPAN_UNIT + 5 * 64  # scores, two states, columns
    if terms == 1:
        per_row += 2 * 2 * width + 2 * 2 * span + 6 * width  # q, weights, result
        loaded = (KEY_BUFFERS + 2) * 2 * keys * width
    else:
        per_row += (4 + 4 + 2 * terms) * (width + span) + 4 * width
        loaded = (4 + 4 + 2 * terms) * keys * width  # K and V take turns
    if mask is not None:
        per_row += 2 * span * mask.bits // 8
    per_row += 4 * span * dropout
    per_row += span  # which keys of the diagonal a row sees
    acc_per_row = 2 * 4 * width + 2 * 4 * span
    return rows * per_row + loaded, rows * acc_per_row
