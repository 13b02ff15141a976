"""The curve of the loss as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from pagoda.train.files import write_atomically


def write_loss_curve(
    path: Path, losses: Sequence[float], validation: Sequence[tuple[int, float]], title: str
) -> None:
    """A PNG: training loss by step, thin as it was and averaged over 20 steps, validation as dots.
    losses in nats per token."""
    from matplotlib.figure import Figure  # late: it takes a second

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9ab7d3", linewidth=0.8, label="training")
    window = min(20, len(losses))
    if window > 1:
        smooth = [sum(losses[k - window : k]) / window for k in range(window, len(losses) + 1)]
        axes.plot(range(window, len(losses) + 1), smooth, color="#1f5b99", label="average")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#c8553d", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
