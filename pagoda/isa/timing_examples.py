"""The duration formulas applied by hand, for the manual; a test computes every one again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A formula, its arguments, the arithmetic as text, and what it gives.

    result: cycles, or (occupancy, tail) of a command whose occupancy does not depend on its start.
    """

    chip: str
    function: str
    arguments: Mapping[str, int]
    working: str
    result: int | tuple[int, int]


def _example(
    chip: str, function: str, working: str, result: int | tuple[int, int], **arguments: int
) -> Example:
    return Example(chip, function, arguments, working, result)


EXAMPLES = (
    _example("tiny", "first_instruction", "100 + ceil(200 / 16) + 3", 116,
             code_bytes=200, resident=False, args=3),
    _example("tiny", "first_instruction", "100 + 3", 103, code_bytes=200, resident=True, args=3),
    _example("tiny", "drained", "max(70 + 5, 120 + 1)", 121, start=70, last_finish=120),
    _example("tiny", "index_cycles", "ceil(9 / 4) + 4", 7, rows=9),
    _example("tiny", "dram_slot_cycle", "ceil(3 * 64 / 16)", 12, slot=3),
    _example("edge", "dram_slot_cycle", "ceil(3 * 64 / 25.6) = ceil(3 * 2.5)", 8, slot=3),
    _example("car", "dram_slot_cycle", "ceil(3 * 64 * 4 / 200) = ceil(3 * 1.28)", 4, slot=3),
    _example("edge", "first_dram_slot", "slots open in 0, 3, 5, 8, ...", 2, cycle=4),
    _example("tiny", "local_cycles", "3 * ceil(40 / (4 * 4))", 9, rows=3, row_bytes=40),
    _example("tiny", "dma_cycles", "2 rows of 3 atoms: 2 * max(3 * 4, 18 / 2)", 24,
             rows=2, atoms=6, local=18),
    _example("tiny", "dma_cycles", "2 rows of 1 atom, 1 of 2: 2 * max(4, 6) + max(8, 6)", 20,
             rows=3, atoms=4, local=18),
    _example("tiny", "dma_cycles", "both ways: 2 * max(2 * 4, 6) + max(2 * 8, 6)", 32,
             rows=3, atoms=4, local=18, ways=2),
    _example("edge", "dma_cycles", "X = 5/2; rows of 1, 1, 2: ceil(2 * max(5/2, 7/3) + 5)", 10,
             rows=3, atoms=4, local=7),
    _example("car", "dma_cycles", "X = 32/25; rows of 1, 2: ceil(max(32/25, 3/2) + 64/25)", 5,
             rows=2, atoms=3, local=3),
    _example("tiny", "store_lead", "F32 to BF16: ceil(64 * 4 / 2 / 16)", 8,
             mem_bits=16, local_bits=32),
    _example("edge", "store_lead", "I8 to I64: ceil(64 * 1 / 8 / 64)", 1,
             mem_bits=64, local_bits=8),
    _example("tiny", "load", "T = max(24, 18); 20 + 8 + 4", (24, 32), rows=2, atoms=6, local=18),
    _example("tiny", "load", "1 of 3 rows of 6 cycles is padding: max(max(8, 12), 18); 32",
             (18, 32), rows=2, atoms=2, local=12, padding=6),
    _example("tiny", "load", "2 cycles of zeros behind the data: max(max(24, 12) + 2, 12); 32",
             (26, 32), rows=2, atoms=6, local=12, right=2),
    _example("tiny", "load", "only padding: 7; 32", (7, 32), rows=0, atoms=0, local=0, padding=7),
    _example("edge", "load", "ceil(3 * 5/2); 200 + 8 + ceil(5/2)", (8, 211),
             rows=1, atoms=3, local=3),
    _example("edge", "store", "ceil(3 * 5/2), from the first slot 2 cycles after the start or "
             "later; 12 + ceil(5/2)", (8, 15), rows=1, atoms=3, local=6, lead=2),
    _example("tiny", "store", "accumulates: max(2 * 3 * 4, 12) + 20 + 8 + 4; 12 + 4", (56, 16),
             rows=1, atoms=3, local=12, lead=4, accumulate=True),
    _example("tiny", "matmul", "4 + ceil(10 / 4) * max(ceil(6 / 4) * max(8, 4), D = 20); D + 4",
             (64, 24), m=8, n=6, k_outer=1, k_inner=10),
    _example("tiny", "matmul", "4 + 4 + 1 * max(2 * max(8, 4), 20); 24", (28, 24),
             m=5, n=6, k_outer=1, k_inner=4, transpose_a=True),
    _example("edge", "matmul", "w = 16; 16 + 16 + 4 * max(4 * max(64, 16), D = 68); D + 4",
             (1056, 72), m=64, n=64, k_outer=1, k_inner=64, transpose_b=True),
    _example("edge", "matmul", "one bank: 16 + 16 + 4 * max(4 * (64 + 16), 68); 72", (1312, 72),
             m=64, n=64, k_outer=1, k_inner=64, transpose_b=True, shared_bank=True),
    _example("edge", "matmul", "KP = 3 * ceil(20 / 16); 16 + 6 * max(1 * max(7, 16), 68); 72",
             (424, 72), m=7, n=10, k_outer=3, k_inner=20),
    _example("tiny", "vector", "fadd, mov: 3 * ceil(10 / 4) * 1; 4 + 7 + 2", (9, 13),
             rows=3, cols=10, f1=1, f2=0),
    _example("tiny", "vector", "two tiles in one bank: 3 * ceil(10 / 4) * 2; 4 + 7 + 2", (18, 13),
             rows=3, cols=10, f1=1, f2=0, per_bank=2),
    _example("edge", "vector", "fsub, exp2: 2 * ceil(40 / 16) * 2; 4 + 7 + 16", (12, 27),
             rows=2, cols=40, f1=2, f2=23),
    _example("edge", "vector", "fmul, fma: 2 * ceil(40 / 16) * 1; 4 + 7 + 7", (6, 18),
             rows=2, cols=40, f1=3, f2=56),
    _example("edge", "vector", "i2fmul, faddq: 2 * ceil(40 / 16) * 1; 4 + 7 + 7", (6, 18),
             rows=2, cols=40, f1=58, f2=59),
    _example("tiny", "reduce_rows", "L' = 4: 2 * (ceil(100 / 64) * max(16, 4) + 2 * 16)", (128, 8),
             rows=2, cols=100),
    _example("car", "reduce_rows", "L' = 64: 2 * (ceil(100 / 64) * max(1, 4) + 4 * 1)", (24, 8),
             rows=2, cols=100, argmax=True),
    _example("tiny", "reduce_columns", "5 * max(ceil(6 / 4), 4) + 2 * ceil(6 / 4)", (24, 8),
             rows=5, cols=6),
    _example("tiny", "finish", "3 * 2 * ceil(64 / 4) + 24", (120, 8), rows=3),
    _example("tiny", "transpose", "ceil(9 / 4) * ceil(6 / 4) * 4 + 4", (28, 8), rows=9, cols=6),
    _example("tiny", "iota", "3 * ceil(10 / 4)", (9, 8), rows=3, cols=10),
)  # fmt: skip
