"""Nothing that a program does on the simulator reaches what is not its own.

Every run tries ten thousand hostile programs. The slow test tries PAGODA_FUZZ_PROGRAMS of them, a
million unless told otherwise, with seeds from PAGODA_FUZZ_SEED on: `make test-isolation`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from guarded_simulator import VARIANTS

from pagoda.isa import tables
from pagoda.sim import numbers

ROOT = Path(__file__).parents[1]
CHILD = ROOT / "tests/guarded_simulator.py"
IN_CI = 10_000
MANY = int(os.environ.get("PAGODA_FUZZ_PROGRAMS", "1000000"))
FIRST_SEED = int(os.environ.get("PAGODA_FUZZ_SEED", "1000000"))
FAULTS_SEEN = {
    "ILLEGAL_INSTRUCTION", "FETCH_OUT_OF_RANGE", "MISALIGNED", "BAD_ADDRESS", "DMEM_OUT_OF_RANGE",
    "STACK_OVERFLOW", "BAD_FIELD", "BAD_SLOT", "OUT_OF_SLOT", "NO_PERMISSION",
    "LOCAL_OUT_OF_RANGE", "GATHER_INDEX", "WATCHDOG", "TRAP", "INT64_OVERFLOW", "UNINITIALISED",
    "RACE", "BARRIER_MISMATCH", "none",
}  # fmt: skip


def child(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=False,
        capture_output=True,
        text=True,
    )


def run_hostile(tmp_path, variants, seed: int, programs: int, judge_every: int) -> list[dict]:
    """Programs of each variant in a process of their own, which must live to tell."""
    progress = tmp_path / "progress"
    words = [*variants, "--seed", str(seed), "--programs", str(programs)]
    words += ["--judge-every", str(judge_every), "--progress", str(progress)]
    process = child(str(CHILD), *words)
    told = [json.loads(line) for line in process.stdout.splitlines()]
    wrong = [text for figures in told for text in figures["wrong"]]
    assert not wrong, wrong
    assert process.returncode == 0, (
        f"status {process.returncode} in {variants[len(told)]}, {progress.read_text()}:\n"
        f"{process.stderr[-4000:]}"
    )
    return told


def test_hostile_programs(tmp_path):
    variants = list(VARIANTS)
    told = run_hostile(tmp_path, variants, 0, IN_CI // len(variants) + 1, 50)
    assert sum(figures["programs"] for figures in told) >= IN_CI
    # Programs that all end at their first command would prove little.
    ends = {name for figures in told for name in figures["ends"]}
    assert ends >= FAULTS_SEEN - {"BARRIER_MISMATCH", "STACK_OVERFLOW", "RACE"}
    assert sum(figures["commands"] for figures in told) > IN_CI
    assert sum(figures["judged"] for figures in told) > 50


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_many_hostile_programs(tmp_path, variant):
    told = run_hostile(tmp_path, [variant], FIRST_SEED, -(-MANY // len(VARIANTS)), 200)
    print(json.dumps(told[0]))


LIES = {
    "SRAM": "machine.cores[0].state[at.SRAM_BYTES] *= 2",
    "ACC": "machine.cores[0].state[at.ACC_BYTES] *= 2",
    "DMEM": "machine.cores[0].state[at.DMEM_BYTES] += 4096",
    "IMEM": "machine.cores[0].state[at.IMEM_BYTES] += 4096",
    "index": "machine.cores[0].state[at.SRAM_AT] += 8",
}


@pytest.mark.parametrize("lie", LIES)
def test_the_guard_bites(lie):
    """A simulator that is told a wrong size or place touches what is not its own, and dies."""
    code = f"""
import guarded_simulator
from pagoda.sim import layout as at
truth = guarded_simulator.Guarded.begin
def begin(machine, seed, layout):
    truth(machine, seed, layout)
    {LIES[lie]}
guarded_simulator.Guarded.begin = begin
guarded_simulator.main(["small", "--programs", "3000", "--judge-every", "1000000"])
"""
    assert child("-c", code).returncode == -signal.SIGSEGV


def test_a_slot_too_long_is_noticed():
    code = """
from dataclasses import replace
import guarded_simulator
truth = guarded_simulator.Guarded.run
def run(machine, launch):
    slots = [replace(s, size=s.size + 4000 * (s.base < 1 << 19)) for s in launch.slots]
    return truth(machine, replace(launch, slots=tuple(slots)))
guarded_simulator.Guarded.run = run
guarded_simulator.main(["small", "--programs", "3000", "--judge-every", "1000000"])
"""
    process = child("-c", code)
    (figures,) = map(json.loads, process.stdout.splitlines())
    assert figures["wrong"], process.stderr


INDICES = {
    "exp2": tables.EXP2_TABLE, "log2": tables.LOG2_TABLE, "reciprocal": tables.RECIPROCAL_TABLE,
    "rsqrt": tables.RSQRT_TABLE, "sin2pi": tables.SIN2PI_TABLE,
}  # fmt: skip


@numba.njit
def _largest(index, patterns):
    low, high = np.int64(1) << 40, -(np.int64(1) << 40)
    for pattern in patterns:
        row = index(np.int64(pattern)) >> 32
        low, high = min(low, row), max(high, row)
    return low, high


@pytest.mark.parametrize("name", INDICES)
def test_rows_of_tables_exist(name):
    """Whatever pattern a lane holds, the row that its function looks up is in its table."""
    index = numba.njit(getattr(numbers, f"{name}_index").py_func)
    mantissas = np.r_[0:64, 0x400000 - 64 : 0x400000 + 64, 0x800000 - 64 : 0x800000, 0:0x800000:997]
    patterns = (np.arange(512)[:, None] << 23 | mantissas).astype(np.uint32).reshape(-1)
    low, high = _largest(index, patterns)
    assert (low, high) == (0, len(INDICES[name]) - 1)
