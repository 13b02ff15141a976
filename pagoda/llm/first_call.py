"""The first calls of a compiled model, timed: a process of its own for `pagoda bench compile`."""

from __future__ import annotations

import json
import time

import torch
from torch._dynamo.utils import counters

import pagoda
from pagoda.compiler.cache import default_directory
from pagoda.llm.model import load_model
from pagoda.pytorch import call
from pagoda.runtime.start import run_nothing

SHAPES = (16, 24)  # tokens of the first call, and of the one that must compile nothing


def main(path: str, chip: str, dynamic: str) -> None:
    """Prints one JSON object: the seconds of the first call of the model in a GGUF file, after
    imports, weights and the simulator's own code, and what a call of another shape compiled.

    dynamic: "dynamic" marks the number of tokens with `mark_dynamic`.
    """
    run_nothing(pagoda.use_chip(chip))
    model = load_model(path).to("pagoda")
    compiled = pagoda.compile(model)
    vocabulary = model.config.vocab_size

    def run(tokens: int) -> float:
        ids = torch.arange(tokens)[None].remainder(vocabulary).to("pagoda")
        if dynamic == "dynamic":
            torch._dynamo.mark_dynamic(ids, 1)
        begun = time.perf_counter()
        with torch.no_grad():
            compiled(ids, use_cache=False).logits[0, -1, :4].cpu()
        return round(time.perf_counter() - begun, 2)

    found = {"tokens": SHAPES, "first": run(SHAPES[0]), "again": run(SHAPES[0])}
    before = _compiled(call.compiled)
    found["second_shape"] = run(SHAPES[1])
    found["second_shape_compiles"] = _compiled(call.compiled) - before
    print(json.dumps(found))


def _compiled(regions: list) -> int:
    """Graphs that Dynamo captured, regions that were loaded and files of the compile cache."""
    kept = sum(1 for path in default_directory().rglob("*") if path.is_file())
    return counters["stats"]["unique_graphs"] + len(regions) + kept
