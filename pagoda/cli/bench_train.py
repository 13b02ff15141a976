"""`pagoda bench train`: a training step of GPT-2 on the simulated chip."""

from __future__ import annotations

import click
from rich.console import Console

from pagoda.cli.figures import show_figures
from pagoda.cli.options import device_chip_option, json_option
from pagoda.cli.terminal import drop_profiler_warning
from pagoda.isa.chip import Chip

BATCH, LENGTH = 1, 1024


@click.command()
@device_chip_option
@click.option("--layers", type=click.IntRange(min=1), default=12, show_default=True)
@json_option
def train(chip: Chip, layers: int, as_json: bool) -> None:
    """One step of GPT-2 (124 M parameters) with 1024 tokens: forward, backward, AdamW."""
    from pagoda.train.figures import measure
    from pagoda.train.gpt import GPTConfig

    drop_profiler_warning()
    with Console(stderr=True).status("measuring two steps, and torch's"):
        row = measure(chip, GPTConfig(layers=layers), BATCH, LENGTH)
    show_figures(row, as_json)
