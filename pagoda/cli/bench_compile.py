"""`pagoda bench compile`: how long the first call of a compiled model takes, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pagoda.cli.figures import show_figures
from pagoda.cli.options import json_option
from pagoda.compiler.cache import VARIABLE
from pagoda.isa.chip import Chip, load_chip
from pagoda.llm import ModelFile, find_weights
from pagoda.runtime.service.discovery import VARIABLE as DEVICE_VARIABLE
from pagoda.runtime.service.paths import EMBEDDED

CHILD = "import sys; from pagoda.llm.first_call import main; main(*sys.argv[1:])"


def _in_fresh_process(arguments: list[str], cache: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            DEVICE_VARIABLE: EMBEDDED,  # what others do on a shared device is not to be measured
            "TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor"),
            VARIABLE: str(Path(cache) / "pagoda"),
        },
    )
    if done.returncode:
        raise click.ClickException(
            f"a fresh process must call the model and end with exit status 0, but it was "
            f"{done.returncode}. It said: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: Path, chip: Chip, name: str) -> dict[str, object]:
    """A first call with empty caches, one in a new process with full ones, and one whose number
    of tokens is marked as varying, after which another number must compile nothing."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_in_fresh_process([str(path), name, "static"], cache) for _ in range(2))
        varying = _in_fresh_process([str(path), name, "dynamic"], cache)
    return {
        "chip": chip.name,
        "tokens": cold["tokens"][0],
        "cold_s": cold["first"],
        "warm_s": warm["first"],
        "compiled_call_s": warm["again"],
        "dynamic_cold_s": varying["first"],
        "second_shape_tokens": varying["tokens"][1],
        "second_shape_s": varying["second_shape"],
        "second_shape_compiles": varying["second_shape_compiles"],
    }


@click.command()
@click.option("--chip", default="edge", show_default=True, metavar="NAME|FILE")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="GGUF",
    help="A Llama-class model file; SmolLM2-135M-Instruct without.",
)
@json_option
def compile(chip: str, model: Path | None, as_json: bool) -> None:
    """First calls of a compiled language model: nothing kept, everything kept, another shape.

    On a simulator of its own, whatever PAGODA_DEVICE says.
    """
    path = model if model is not None else find_weights()
    ModelFile(path)  # what is no model is said here, not by a child
    with Console(stderr=True).status("measuring first calls in fresh processes (minutes)"):
        row = measure(path, load_chip(chip), chip)
    show_figures(row, as_json)
