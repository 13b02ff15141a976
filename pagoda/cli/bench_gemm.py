"""`pagoda bench gemm`: bf16 matrix products on the simulated chip against torch on the host."""

import json
import time
from collections.abc import Callable

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pagoda.cli.options import json_option
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.language import TensorType
from pagoda.compiler.link import (
    TensorArgument,
    argument_words,
    launch_arguments,
    link,
    pack_records,
)
from pagoda.isa import PRESETS, Chip, DType, Result, Slot
from pagoda.isa.chip import load_chip
from pagoda.isa.numbers import encode
from pagoda.kernels.matmul import build_matmul
from pagoda.runtime import Device

SEED = 0
REPEATS = 5  # of each timing, in turn; the best counts on both sides
SIZES = (1024, 512, 2048)
CASES = [(PRESETS["edge"], size) for size in SIZES] + [(PRESETS["car"], n) for n in (1024, 2048)]


def _bf16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal numbers as bf16 bit patterns."""
    values = rng.standard_normal(shape, np.float32)
    return encode(values.view(np.uint32), DType.BF16).view(np.uint16).reshape(shape)


def _product(chip: Chip, size: int) -> Callable[[], Result]:
    """A launch of c = a w^T, `w` stored [n, k] as nn.Linear stores it; sizes fixed."""
    device, rng = Device(chip, threads=1), np.random.default_rng(SEED)
    operand = (size, size)
    a, w = device.place(_bf16(rng, *operand)), device.place(_bf16(rng, *operand))
    c = device.memory.allocate(2 * size * size)
    row_major = TensorType.fixed(DType.BF16, 1, size, size)
    transposed = TensorType(DType.BF16, (1, size, size), (2 * size * size, 2, 2 * size))
    kernel = build_matmul(chip, row_major, row_major, transposed)
    linked = link(f"gemm{size}", [(kernel.name, compile_kernel(kernel, chip).blob())], chip)

    def tensor(slot: int, layout: TensorType) -> TensorArgument:
        return TensorArgument(slot, 0, layout.sizes, layout.strides)

    given = {"c": tensor(1, row_major), "a": tensor(2, row_major), "b": tensor(3, transposed)}
    calls = [(linked.entries[0], argument_words(kernel, given))]
    words = pack_records(calls)
    records = device.place(words)
    nbytes = 2 * size * size
    slots = [
        Slot(records, words.nbytes, writable=False),
        Slot(c, nbytes),
        Slot(a, nbytes, writable=False),
        Slot(w, nbytes, writable=False),
    ]
    arguments = launch_arguments(0, 0, calls)
    return lambda: device.launch(linked.program, arguments, slots)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(chip: Chip, size: int) -> dict[str, object]:
    """One square product: chip figures from the cycle count, host figures in one run."""
    from pagoda.pytorch.reference import product

    run, reference = _product(chip, size), product(size)
    cycles = run().cycles
    times = [(_seconds(run), _seconds(reference)) for _ in range(REPEATS)]
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    flops = 2 * size**3
    return {
        "chip": chip.name,
        "dtype": "bf16",
        "m": size,
        "n": size,
        "k": size,
        "cycles": cycles,
        "utilisation": round(size**3 / chip.macs_per_cycle / cycles, 4),
        "cycles_per_second": round(cycles / ours),
        "host_gflops": round(flops / ours / 1e9, 1),
        "torch_gflops": round(flops / theirs / 1e9, 1),
        "host_ratio": round(theirs / ours, 3),
        "host_threads": 1,
    }


@click.command()
@click.option(
    "--chip",
    metavar="NAME|FILE",
    callback=lambda context, parameter, value: None if value is None else load_chip(value),
    help="A preset, or a .toml or .py chip file; without: `edge`, and `car` among the others.",
)
@json_option
def gemm(chip: Chip | None, as_json: bool) -> None:
    """bf16 matrix products of seeded numbers: 1024 first, then the other sizes.

    On a simulator of its own, whatever PAGODA_DEVICE says.
    """
    console = Console(stderr=True)
    cases = CASES if chip is None else [(chip, size) for size in SIZES]
    rows = [
        measure(each, size)
        for each, size in track(cases, "measuring", console=console, transient=True)
    ]
    table = Table(box=None, header_style="bold")
    for heading in ("chip", "size", "cycles", "utilisation", "Mcycle/s", "GFLOP/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "chip" else "right")
    for row in rows:
        table.add_row(
            str(row["chip"]),
            f"{row['m']}^3",
            f"{row['cycles']:,}",
            f"{row['utilisation']:.3f}",
            f"{row['cycles_per_second'] / 1e6:,.0f}",
            f"{row['host_gflops']:,.0f}",
            f"{row['host_ratio']:.2f}",
        )
    Console().print(table)
    click.echo("bf16 in, f32 accumulation; ratio: simulation over torch fp32, one thread each")
    if as_json:
        click.echo(json.dumps({**rows[0], "others": rows[1:]}))
