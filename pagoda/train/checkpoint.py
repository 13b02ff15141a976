"""Checkpoints: everything that training goes on from, in one file that is whole or not there."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pagoda.train.errors import TrainError
from pagoda.train.files import write_atomically

MAGIC = b"pagoda checkpoint 1\n"


@dataclass(frozen=True)
class Checkpoint:
    """settings: what must be the same to go on; step: how many are done; losses: of each, in
    nats; validation: (step, loss) pairs; tensors: the model's and the optimizer's state; random:
    the state of torch's generator."""

    settings: dict[str, Any]
    step: int
    losses: list[float]
    validation: list[tuple[int, float]]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random: torch.Tensor

    def save(self, path: Path) -> None:
        """Raises TrainError if it cannot be written; an older file is then left as it was."""
        buffer = io.BytesIO()
        torch.save({**asdict(self), "model": self.model, "optimizer": self.optimizer}, buffer)
        data = buffer.getvalue()
        write_atomically(path, MAGIC + hashlib.sha256(data).digest() + data)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> Checkpoint:
    """The checkpoint in a file, for training with these settings. Raises TrainError for a file
    that is missing, damaged or of other settings."""
    again = "Start anew in another folder (--out), without --resume."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainError(
            "--resume", f"it needs {path}", f"the system says: {error.strerror}",
            "Name the folder that was trained in with --out, or start without --resume.",
        ) from error  # fmt: skip
    digest, data = content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
    if not content.startswith(MAGIC) or hashlib.sha256(data).digest() != digest:
        raise TrainError(
            path, "a checkpoint has the checksum written at its start",
            "this file is damaged, or none", again,
        )  # fmt: skip
    found = Checkpoint(**torch.load(io.BytesIO(data), weights_only=True))
    for name, value in settings.items():
        if found.settings.get(name) != value:
            option = name.replace("_", "-")
            raise TrainError(
                "--resume", "training goes on with the settings that it began with",
                f"{option} was {found.settings.get(name)} and is {value} now",
                f"Give --{option} {found.settings.get(name)}. Or else: {again[0].lower()}"
                + again[1:],
            )  # fmt: skip
    return found
