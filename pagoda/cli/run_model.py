"""`pagoda run` of a model file: what it computes, and a table of its layers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from pagoda.cli.library import LIBRARY
from pagoda.isa.chip import Chip

ENDINGS = (".py", ".onnx")


def is_model_file(name: str) -> bool:
    """Whether the name is that of a model file, not of a kernel."""
    return name.endswith(ENDINGS) or (name not in LIBRARY and Path(name).is_file())


def dimension(text: str) -> tuple[str, int]:
    """NAME=SIZE of a --dim option. Raises BadParameter."""
    name, _, size = text.rpartition("=")
    if not (name and size.isdecimal() and int(size) > 0):
        raise click.BadParameter(
            f"{text!r}: must be NAME=SIZE with a size of at least 1, as in batch=4",
            param_hint="--dim",
        )
    return name, int(size)


def run_model_file(
    path: Path, chip: Chip, seed: int, inputs: tuple[str, ...], dims: tuple[str, ...],
    check: bool, eager: bool, save: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run and report. Raises ModelFileError and what a device raises."""
    from pagoda.pytorch.model_file import load_model_file, read_arrays
    from pagoda.pytorch.model_run import run_model

    console = Console(stderr=True)
    sizes = dict(map(dimension, dims))
    with console.status(f"loading {path}") as status:
        model = load_model_file(path, read_arrays(inputs), sizes, seed)
        status.update(f"compiling for {chip.name} and running on the chip")
        done = run_model(model, chip, check, eager)
    if save is not None:
        try:
            np.savez(save, **done.outputs)
        except OSError as error:
            raise click.ClickException(
                f"{save}: cannot be written ({error.strerror}); choose another --save-outputs"
            ) from error
    utilisation = done.macs / (max(done.cycles, 1) * chip.macs_per_cycle)
    figures = {
        "model": str(path),
        "chip": chip.name,
        "seed": seed,
        "eager": eager,
        "cycles": done.cycles,
        "microseconds": round(done.cycles / chip.clock_hz * 1e6, 3),
        "launches": done.launches,
        "macs": done.macs,
        "utilisation": round(utilisation, 4),
        "dram_bytes": done.dram_bytes,
        "fallbacks": done.fallbacks,
        "outputs": {name: list(array.shape) for name, array in done.outputs.items()},
        "checks": [
            {"with": c.other, "elements": c.elements, "error": c.error, "tolerance": c.tolerance,
             "correct": c.good}
            for c in done.comparisons
        ],
        "layers": [
            {"layer": row.layer, "operation": row.operation,
             "shape": None if row.shape is None else list(row.shape), "cycles": row.cycles,
             "share": round(row.share, 4), "macs": row.macs,
             "utilisation": round(row.utilisation, 4), "dram_bytes": row.dram_bytes}
            for row in done.rows
        ],
    }  # fmt: skip
    _report(figures)
    if as_json:
        click.echo(json.dumps(figures))
    for c in done.comparisons:
        if not c.good:
            raise click.ClickException(
                f"{path} on {chip.name}: the result must equal {c.other} to {c.tolerance:g} of the "
                f"largest value, but is off by {c.error:.3g}; if the model computes in bfloat16, "
                "try float32, and report what remains"
            )


def _report(figures: dict) -> None:
    how = "operation by operation" if figures["eager"] else "compiled"
    click.echo(f"{figures['model']} on {figures['chip']}, {how}, seed {figures['seed']}")
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    common = _common([row["layer"] for row in figures["layers"] if row["shape"] is not None])
    table.add_column(f"layer, in {common[:-1]}" if common else "layer", overflow="fold")
    table.add_column("operation", overflow="fold")
    for heading in ("shape", "cycles", "share", "util.", "DRAM bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in figures["layers"]:
        table.add_row(
            row["layer"].removeprefix(common),
            row["operation"],
            "x".join(map(str, row["shape"] or ())),
            f"{row['cycles']:,}",
            f"{row['share']:.1%}",
            f"{row['utilisation']:.1%}" if row["macs"] else "",
            f"{row['dram_bytes']:,}",
        )
    table.add_row(
        "sum", "", "", f"{figures['cycles']:,}", "100.0%", f"{figures['utilisation']:.1%}",
        f"{figures['dram_bytes']:,}", style="bold",
    )  # fmt: skip
    Console().print(table)
    click.echo(
        f"{figures['microseconds']:,g} us in {figures['launches']:,} launches, {figures['macs']:,} "
        "multiply-adds"
    )
    for each in figures["checks"]:
        click.echo(
            f"{'equals' if each['correct'] else 'DIFFERS from'} {each['with']}: largest error "
            f"{each['error']:.3g} of the largest value, in {each['elements']:,} elements"
        )
    fallbacks = ", ".join(f"{op} ({n})" for op, n in figures["fallbacks"].items())
    click.echo(f"CPU fallbacks: {fallbacks or 0}")


def _common(layers: list[str]) -> str:
    """The modules that all layers are in, with a dot at the end: "model.encoder."."""
    *folders, _ = os.path.commonprefix([layer.split(".")[:-1] + [""] for layer in layers]) or [""]
    return "".join(f"{folder}." for folder in folders)
