"""The training loop: steps, validation, checkpoints, and going on from one with the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pagoda
from pagoda.train.checkpoint import Checkpoint, load_checkpoint
from pagoda.train.text import Windows

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Progress:
    """After a step: its number (from 1), its loss in nats, the last validation loss."""

    step: int
    loss: float
    validation: float | None


@dataclass
class Trainer:
    """Trains `model`, called as model(ids, targets) for the mean loss, on the chip in use.

    Trainable parameters are float32, products bfloat16 by autocast; AdamW. settings: what a
    checkpoint must agree with. The same settings give the same bits, on every chip, and in one go
    or in several.
    """

    model: nn.Module
    data: Windows
    settings: dict[str, Any]
    batch: int
    learning_rate: float
    folder: Path
    validate_every: int
    save_every: int
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to("pagoda")
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.learning_rate, foreach=False, capturable=True
        )
        self._call: Callable[..., torch.Tensor] = pagoda.compile(self.model)
        self._update = torch.compile(self.optimizer.step, backend="pagoda")

    @property
    def done(self) -> int:
        """Steps done so far."""
        return len(self.losses)

    def resume(self) -> None:
        """Go on from the folder's checkpoint. Raises TrainError."""
        found = load_checkpoint(self.folder / CHECKPOINT, self.settings)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(found.model[name])
        self.optimizer.load_state_dict(found.optimizer)
        torch.set_rng_state(found.random)
        self.losses, self.validation = list(found.losses), list(found.validation)

    def run(self, steps: int) -> Iterator[Progress]:
        """Train until `steps` are done, yielding after each. Raises TrainError."""
        self.model.train()
        while self.done < steps:
            ids, targets = self.data.batch(self.done, self.batch)
            with torch.autocast("pagoda"):
                loss = self._call(ids.to("pagoda"), targets.to("pagoda"))
            loss.backward()
            self._update()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())
            last = self.done == steps
            if last or self.done % self.validate_every == 0:
                self.validation.append((self.done, self.validation_loss()))
            if last or self.done % self.save_every == 0:
                self.save()
            known = self.validation[-1][1] if self.validation else None
            yield Progress(self.done, self.losses[-1], known)

    def validation_loss(self) -> float:
        """Mean loss over the validation windows, in nats."""
        ids, targets = self.data.validation_batch(self.batch)
        with torch.no_grad(), torch.autocast("pagoda"):
            return self._call(ids.to("pagoda"), targets.to("pagoda")).item()

    def save(self) -> None:
        """Write the checkpoint. Raises TrainError."""
        weights = {name: p.detach().cpu() for name, p in self.trained.items()}
        state = self.optimizer.state_dict()
        moved = {
            number: {name: value.cpu() for name, value in values.items()}
            for number, values in state["state"].items()
        }
        Checkpoint(
            self.settings, self.done, self.losses, self.validation, weights,
            {**state, "state": moved}, torch.get_rng_state(),
        ).save(self.folder / CHECKPOINT)  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 of the trained weights."""
        total = hashlib.sha256()
        for name in sorted(self.trained):
            total.update(self.trained[name].detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def sample(self, prompt: list[int], count: int, context: int, seed: int) -> list[int]:
        """`count` token ids drawn one after another from the model's distribution; what stands
        beyond the prompt in a window of `context` does not matter to a causal model."""
        generator = torch.Generator().manual_seed(seed)
        ids = list(prompt)
        for _ in range(count):
            recent = ids[-context:]
            window = torch.zeros(1, context, dtype=torch.int64)
            window[0, : len(recent)] = torch.tensor(recent)
            with torch.no_grad(), torch.autocast("pagoda"):
                logits = self._call(window.to("pagoda"))[0, len(recent) - 1].float().cpu()
            chances = torch.softmax(logits / 0.8, 0)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
        return ids[len(prompt) :]
