"""The simulator's two threads: whatever order they execute commands in, the bytes are the same.

Programs of long matmuls, vectors, loads and stores over a few buffers, so that most commands have
to follow some and are free of others; one thread is the judge.
"""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from command_programs import Assembler

from pagoda.isa.chip import PRESETS
from pagoda.isa.commands import SCALAR
from pagoda.isa.functions import FUNCTION_CODES
from pagoda.isa.numbers import DType
from pagoda.isa.program import Launch, Slot
from pagoda.sim import Simulator

CHIP = replace(PRESETS["edge"], dram_bytes=1 << 21)
ROWS, COLS, DEPTH = 128, 128, 256
TILE = 4 * ROWS * COLS  # bytes; of the operands too, which are bf16
OPERANDS, RESULTS = (0, TILE, 2 * TILE, 3 * TILE), (4 * TILE, 5 * TILE)  # in SRAM
SUMS = (1 << 31, (1 << 31) + TILE)  # in ACC
PLACES = range(0, CHIP.dram_bytes, TILE)
ELEMENTWISE = [FUNCTION_CODES[name] for name in ("fadd", "fmul", "fmax", "fsub")]


def random_program(random: Random, commands: int):
    assembler = Assembler()
    line = dict(rows=ROWS, cols=COLS, a_stride=4 * COLS, b_stride=4 * COLS, c_stride=4 * COLS,
                dst_stride=4 * COLS)  # fmt: skip
    transfer = dict(slot=0, cols=COLS, rows=ROWS, planes=1, mem_row_stride=4 * COLS,
                    row_stride=4 * COLS, mem=DType.F32, local=DType.F32)  # fmt: skip
    for _ in range(commands):
        name = random.choice(["load", "load", "matmul", "matmul", "vector", "vector", "store"])
        result, place = random.choice(RESULTS), random.choice(PLACES)
        if name == "load":
            target = random.choice(OPERANDS + RESULTS)
            assembler.command("load", offset=place, address=target, **transfer)
        elif name == "matmul":
            a, b = random.sample(OPERANDS, 2)
            assembler.command(
                "matmul", type=0, accumulate=random.randrange(2), transpose_b=random.randrange(2),
                a=a, m0=ROWS, m0_stride=2 * DEPTH, m1=1, m1_stride=0, m2=1, m2_stride=0,
                k_inner=DEPTH, k_outer=1, k_outer_stride=0, b=b, b_stride=2 * DEPTH, n=COLS,
                acc=random.choice(SUMS), acc_stride=4 * COLS,
            )  # fmt: skip
        elif name == "vector":
            assembler.command(
                "vector", f1=random.choice(ELEMENTWISE), f2=0, a=random.choice(SUMS + RESULTS),
                b=0x3F000000, b_kind=SCALAR, c=0, dst=result, **line,
            )  # fmt: skip
        else:
            assembler.command("store", offset=place, address=result, **transfer)
        if random.random() < 0.05:
            assembler.load_word(random.choice(RESULTS))
    assembler.control("exit")
    return assembler.program()


@pytest.mark.parametrize("seed", range(6))
def test_two_threads_give_the_bytes_and_cycles_of_one(seed):
    random = Random(seed)
    rng = np.random.default_rng(seed)
    alone, helped = Simulator(CHIP), Simulator(CHIP, threads=2)
    # Finite bf16 pairs; as float32 they are finite, too.
    image = (rng.integers(0x3E00, 0x4000, CHIP.dram_bytes // 2).astype(np.uint16)).tobytes()
    for _ in range(12):
        program = random_program(random, commands=60)
        outcomes = []
        for machine in (alone, helped):
            machine.write(0, image)
            machine.start(Launch(program, slots=(Slot(0, CHIP.dram_bytes),)))
            outcomes.append(machine.wait())
        assert outcomes[0] == outcomes[1]
        assert outcomes[0].fault is None
        assert np.array_equal(alone.dram, helped.dram)
        for one, two in zip(alone._cores, helped._cores, strict=True):
            assert np.array_equal(one.sram, two.sram)
            assert np.array_equal(one.acc, two.acc)
