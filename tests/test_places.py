"""Places: kernel calls know the layer and the line of the model that they come from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pagoda
from pagoda.compiler.region import Place
from pagoda.pytorch.call import compiled
from pagoda.pytorch.places import digest
from pagoda.runtime.profile import LAUNCH

P = "pagoda"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.norm(self.dense(x)).relu()


def model() -> nn.Module:
    layers = {"blocks": nn.Sequential(Block(), Block()), "head": nn.Linear(8, 4)}
    return nn.Sequential(nn.ModuleDict(layers)["blocks"], layers["head"]).eval().to(P)


@pytest.mark.parametrize("how", [torch.compile, pagoda.compile])
def test_a_profile_names_layers(how):
    options = {"backend": P} if how is torch.compile else {}
    run = how(model(), **options)
    with torch.no_grad(), pagoda.profile() as found:
        run(torch.randn(4, 8, device=P))
    layers = {layer.name: layer for layer in found.layers}
    named = {name.split(".norm")[0] for name in layers if name not in ("", LAUNCH)}
    assert {"0.0.dense", "0.1.dense", "1"} <= named
    assert sum(layer.cycles for layer in found.layers) == found.cycles
    fused = {other for layer in found.layers for other in (layer.name, *layer.fused)}
    assert {"0.0.norm", "0.1.norm"} <= fused
    if how is torch.compile:
        lines = {line for step in compiled[-1].steps for line in step.place.lines}
        assert any(line.endswith("return x + self.norm(self.dense(x)).relu()") for line in lines)
        assert all(line.startswith(f'file "{__file__}", line ') for line in lines)


def test_places_add_up():
    first, second = Place(("a", "b"), ("x",)), Place(("b", "c"), ("y", "x"))
    assert first + second == Place(("a", "b", "c"), ("x", "y"))


def test_digest_tells_lines_apart():
    def graph(line: int) -> torch.fx.Graph:
        made = torch.fx.Graph()
        made.call_function(torch.ops.aten.relu.default, (made.placeholder("x"),)).meta.update(
            stack_trace=f'  File "m.py", line {line}, in forward\n    return x.relu()\n'
        )
        return made

    assert digest(graph(1)) == digest(graph(1)) != digest(graph(2))
