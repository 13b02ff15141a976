"""`pagoda bench llm`: SmolLM2 on the simulated chip: use of the chip, speed on the host."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from pagoda.cli.figures import show_figures
from pagoda.cli.llm_session import open_session
from pagoda.cli.options import device_chip_option, json_option
from pagoda.compiler.cache import VARIABLE
from pagoda.isa.chip import PRESETS, Chip
from pagoda.llm import ModelFile, find_weights
from pagoda.llm import figures as of
from pagoda.llm.chip_session import ChipSession, Step
from pagoda.runtime import host_threads

SEED = 0
PREFILL = 128  # tokens
DECODE = 16  # steps after them, twice; the host times of the best half count
PROMPT = "The capital of France is"
CHAT = "import sys; from pagoda.cli import main; sys.argv[0] = 'pagoda'; main()"


def _seconds_to_first_token(arguments: list[str], cache: str) -> float:
    """A fresh `pagoda chat` process, from its start to the first character of its answer."""
    inductor = {"TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor")}
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", CHAT, "chat", "--max-tokens", "2", "--prompt", PROMPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **inductor, VARIABLE: cache},
    ) as process:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begun
        process.stdout.read()  # to its end: a pipe closed early would be an error there
    if not first or process.returncode:
        raise click.ClickException(
            f"pagoda chat gave no answer: a start must end with exit status 0, but it was "
            f"{process.returncode}. Run it by hand to see why: pagoda chat --prompt '{PROMPT}'"
        )
    return seconds


def _starts(arguments: list[str]) -> dict[str, float]:
    """Seconds to the first token without anything compiled, and once more with all of it."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_seconds_to_first_token(arguments, cache) for _ in range(2))
    return {"cold_start_s": round(cold, 1), "warm_start_s": round(warm, 1)}


def _best_half(seconds: list[float]) -> float:
    """Their mean: other work on the machine only ever makes a step slower."""
    chosen = sorted(seconds)[: max(len(seconds) // 2, 1)]
    return sum(chosen) / len(chosen)


def _random_ids(session: ChipSession, count: int) -> list[int]:
    random = np.random.Generator(np.random.PCG64(SEED))
    return [int(each) for each in random.integers(0, session.model.config["vocab_size"], count)]


def _macs(session: ChipSession, file: ModelFile, step: Step) -> float:
    """MACs that the chip did over those that torch counts for the same step."""
    from pagoda.llm.reference import counted_macs

    return step.macs / counted_macs(file.config(), step.count, step.position)


def measure(session: ChipSession, file: ModelFile) -> dict[str, object]:
    """A prompt of PREFILL tokens, then greedy steps, DECODE of them and torch's of the same tokens
    in turn: as long as in a conversation, for torch's threads spin for a while after each."""
    from pagoda.llm.reference import TorchReference

    model, reference = session.model, TorchReference(file)
    ids = _random_ids(session, PREFILL)
    logits = session.step(ids)
    torch_prefill = reference.step(ids)
    theirs = []
    for _ in range(2):
        tokens = []
        for _ in range(DECODE):
            tokens.append(int(np.argmax(logits)))
            logits = session.step(tokens[-1:])
        theirs += [reference.step([token]) for token in tokens]
    prefill, *decode = session.steps
    ours = _best_half([step.seconds for step in decode])
    torch_decode = _best_half(theirs)
    last = decode[-1]
    return {
        "chip": model.chip.name,
        "dtype": model.dtype,
        "batch": 1,
        "prefill_tokens": prefill.count,
        "decode_positions": [decode[0].position, last.position],
        "prefill_cycles": prefill.cycles,
        "decode_cycles_per_token": round(of.cycles(decode) / len(decode)),
        "decode_launches_per_token": sum(step.launches for step in decode) / len(decode),
        "decode_dram_utilisation": round(of.dram_utilisation(model, decode), 4),
        "prefill_roofline": round(of.roofline(model, prefill), 4),
        "chip_tokens_per_second": round(of.chip_tokens_per_second(model, decode), 1),
        "host_tokens_per_second": round(1 / ours, 2),
        "torch_host_tokens_per_second": round(1 / torch_decode, 2),
        "host_ratio": round(torch_decode / ours, 3),
        "host_prefill_ratio": round(torch_prefill / prefill.seconds, 3),
        "host_threads": host_threads(),
        "fallbacks": of.fallbacks(model),  # counted by torch's device in the trace of both steps
        "chip_mac_share": round(_macs(session, file, last), 4),
        "prefill_mac_share": round(_macs(session, file, prefill), 4),
    }


@click.command()
@device_chip_option
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="GGUF",
    help="A Llama-class model file; SmolLM2-135M-Instruct without.",
)
@click.option("--starts/--no-starts", default=True, help="Also measure starts (presets only).")
@json_option
def llm(chip: Chip, model: Path | None, starts: bool, as_json: bool) -> None:
    """A language model on the chip: decoding, a prompt of 128 tokens, starts."""
    console = Console(stderr=True)
    path = model if model is not None else find_weights()
    session, _, file = open_session(path, chip, console)
    with console.status("measuring beside torch"):
        row = measure(session, file)
    if starts and PRESETS.get(chip.name) == chip:  # the name is all that the process is given
        with console.status("measuring a start without anything compiled, then with everything"):
            row |= _starts(["--model", str(path), "--chip", chip.name])
    show_figures(row, as_json)
