"""What a training step takes on the chip, beside torch in float32 on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import pagoda
from pagoda.runtime import Device
from pagoda.train.gpt import GPT, GPTConfig, training_macs

SEED, REPEATS = 0, 3
PARTS = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepFigures:
    """One training step: chip cycles and host seconds by part, loss in nats."""

    cycles: dict[str, int]
    seconds: dict[str, float]
    launches: int
    loss: float


def _step(
    model: GPT, call: Any, optimizer_step: Any, device: Device | None
) -> Callable[..., StepFigures]:
    """A training step as users write it; on the chip in bfloat16 by autocast."""

    def run(ids: torch.Tensor, targets: torch.Tensor) -> StepFigures:
        cycles, seconds = {}, {}
        launched = device.launches if device else 0
        loss = torch.zeros(())

        def forward() -> None:
            nonlocal loss
            with torch.autocast("pagoda", torch.bfloat16) if device else nullcontext():
                loss = call(ids, targets)

        parts = (forward, lambda: loss.backward(), optimizer_step)
        for name, part in zip(PARTS, parts, strict=True):
            begun, before = time.perf_counter(), device.cycles if device else 0
            part()
            seconds[name] = time.perf_counter() - begun
            cycles[name] = device.cycles - before if device else 0
        launches = device.launches - launched if device else 0
        model.zero_grad(set_to_none=True)
        return StepFigures(cycles, seconds, launches, float(loss.detach().cpu()))

    return run


def measure(chip: Any, config: GPTConfig, batch: int, length: int) -> dict[str, object]:
    """Training steps on the chip, and torch's in float32 on the host: by turns, after two of each,
    the median of REPEATS. The first compiles, and gives the optimizer its state; the second is the
    first to hold that state and all else at once, in memory that the host's system has to provide.

    Master weights, their gradients and AdamW's state are float32, products bfloat16.
    """
    device = pagoda.use_chip(chip)
    generator = torch.Generator().manual_seed(SEED)
    ids, targets = torch.randint(
        config.vocabulary, (2, batch, length), generator=generator
    ).unbind()
    torch.manual_seed(SEED)
    model = GPT(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("pagoda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, capturable=True)
    run = _step(
        model,
        pagoda.compile(model),
        torch.compile(optimizer.step, backend="pagoda"),
        device,
    )
    here = ids.to("pagoda"), targets.to("pagoda")
    first = run(*here)
    run(*here)

    reference = GPT(config)
    reference.load_state_dict(state)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-4)
    host = _step(reference, reference, theirs.step, None)
    expected = host(ids, targets)
    host(ids, targets)

    steps, theirs = [], []
    for _ in range(REPEATS):
        steps.append(run(*here))
        theirs.append(host(ids, targets))
    seconds, host_seconds = (
        statistics.median(sum(step.seconds.values()) for step in each) for each in (steps, theirs)
    )
    last = steps[-1]
    macs, cycles = training_macs(config, batch, length), sum(last.cycles.values())
    return {
        "chip": device.chip.name,
        "layers": config.layers,
        "tokens": batch * length,
        "macs": macs,
        "cycles": cycles,
        **{f"{name}_cycles": last.cycles[name] for name in PARTS},
        "utilisation": round(macs / (device.chip.macs_per_cycle * cycles), 4),
        "launches": last.launches,
        "loss": round(first.loss, 5),
        "torch_loss": round(expected.loss, 5),
        "first_step_s": round(sum(first.seconds.values()), 1),
        "step_s": round(seconds, 2),
        "torch_step_s": round(host_seconds, 2),
        "host_ratio": round(host_seconds / seconds, 3),
    }
