"""Opening a language model on a simulated chip, every wait shown: for `chat` and `bench llm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pagoda.compiler.cache import Cache, default_directory
from pagoda.isa.chip import Chip
from pagoda.llm import ModelFile, Tokenizer, find_weights
from pagoda.llm.chip_session import ChipSession
from pagoda.llm.compiled import compile_model
from pagoda.runtime import open_device
from pagoda.runtime.start import run_nothing


def open_session(
    path: Path | None, chip: Chip, console: Console
) -> tuple[ChipSession, Tokenizer, ModelFile]:
    """A session with the model in a GGUF file; None is SmolLM2-135M-Instruct from its package.

    Raises ModelError, CompileError, OutOfDeviceMemory, ServiceError.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("opening the device", total=None)
        device = open_device(chip)  # first: whether it can be had is known at once
        progress.update(task, description="reading the model file")
        file = ModelFile(path if path is not None else find_weights())
        tokenizer = Tokenizer(file.tokenizer_parts())
        model = compile_model(
            file.hyperparameters,
            chip,
            Cache(default_directory() / "code"),
            progress=lambda stage: progress.update(task, description=_first_time(stage)),
        )
        progress.update(task, description=_first_time(f"starting chip {chip.name}"))
        run_nothing(device)
        progress.update(task, description="weights to the chip's memory")
        progress.update(task, total=len(file.tensors))

        def weights() -> Iterator:
            for item in file.weights():
                yield item
                progress.advance(task)

        return ChipSession(model, device, weights()), tokenizer, file


def _first_time(stage: str) -> str:
    return f"{stage} (what it takes is kept for next time)"
