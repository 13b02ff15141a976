"""`pagoda chat`: a conversation with a language model that runs on the simulated chip."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from pagoda.cli.llm_session import open_session
from pagoda.cli.options import device_chip_option
from pagoda.isa.chip import Chip
from pagoda.llm import Generation, ModelError, Sampling, Tokenizer, figures
from pagoda.llm.chip_session import ChipSession

HELP = "/quit leaves, /new starts over, Ctrl-C stops an answer."


class _Chat:
    """One conversation; answers stream to standard output as they come."""

    def __init__(
        self,
        session: ChipSession,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_tokens: int,
        console: Console,
    ):
        self.session, self.tokenizer, self.console = session, tokenizer, console
        self.sampling, self.max_tokens = sampling, max_tokens
        self.messages: list[dict[str, str]] = []
        self.answered = 0  # tokens

    def answer(self, text: str) -> bool:
        """Answer one message; False if it was interrupted. What was said stays either way."""
        self.messages.append({"role": "user", "content": text})
        spoken: list[str] = []
        try:
            generation = Generation(
                self.session,
                self.tokenizer.encode_chat(self.messages),
                self.sampling,
                self.tokenizer.stop_ids,
                self.max_tokens,
            )
            for piece in self.tokenizer.stream(self._counted(generation)):
                spoken.append(piece)
                click.echo(piece, nl=False)
            click.echo()
            if generation.finish == "context":
                self.console.print(
                    f"(the conversation fills all {self.session.context} positions: /new)"
                )
            return True
        except KeyboardInterrupt:
            click.echo()
            return False
        except ModelError:
            self.messages.pop()
            raise
        finally:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.append({"role": "assistant", "content": "".join(spoken)})

    def _counted(self, tokens: Generation) -> Iterator[int]:
        """The tokens; a spinner covers the wait for the first one."""
        waiting = self.console.status("reading the prompt")
        waiting.start()
        try:
            for token in tokens:
                waiting.stop()
                self.answered += 1
                yield token
        finally:
            waiting.stop()

    def converse(self) -> None:
        """Messages from standard input until it ends, /quit, or Ctrl-C at the prompt."""
        self.console.print(HELP, style="dim")
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
            except UnicodeDecodeError as wrong:
                raise ModelError(
                    "standard input",
                    "messages must be UTF-8 text",
                    f"there is the byte {wrong.object[wrong.start]:#04x}",
                    "Give the text in UTF-8.",
                ) from None
            if text == "/quit":
                return
            if text == "/new":
                self.messages.clear()
            elif text:
                try:
                    self.answer(text)
                except ModelError as error:
                    self.console.print(f"error: {error}", markup=False)

    def report(self) -> None:
        """What the conversation took on the chip and on this computer."""
        steps, model = self.session.steps, self.session.model
        if not steps:
            return
        chip, longest = model.chip, max(step.position + step.count for step in steps)
        show = self.console.print
        show(
            f"\n{self.answered} tokens in {figures.cycles(steps):,} cycles on chip {chip.name} "
            f"({chip.clock_hz / 1e9:g} GHz), {model.dtype}, batch 1, sequence up to {longest}",
            style="dim",
        )
        for name, kind in (
            ("prompt", [step for step in steps if step.count > 1]),
            ("answer", [step for step in steps if step.count == 1]),
        ):
            if kind:
                show(
                    f"{name}: {sum(step.count for step in kind)} tokens, "
                    f"{figures.chip_tokens_per_second(model, kind):,.1f} tokens/s on the chip, "
                    f"DRAM {figures.dram_utilisation(model, kind):.1%}, "
                    f"matrix {figures.matrix_utilisation(model, kind):.1%}; "
                    f"{figures.host_tokens_per_second(kind):,.1f} tokens/s on this computer",
                    style="dim",
                )
        show(f"CPU fallbacks: {figures.fallbacks(model)}", style="dim")


@click.command()
@device_chip_option
@click.option("--prompt", metavar="TEXT", help="Answer this once and leave.")
@click.option(
    "--max-tokens", default=512, show_default=True, type=click.IntRange(1), help="Of one answer."
)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Keep the k likeliest; 0 keeps all.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest up to this.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same text.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="GGUF",
    help="A Llama-class model file; SmolLM2-135M-Instruct without.",
)
def chat(
    chip: Chip,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    model: Path | None,
) -> None:
    """Talk to a language model whose every operation runs on the simulated chip.

    Figures come at the end. Text goes to standard output, everything else to standard error.
    """
    console = Console(stderr=True, highlight=False)
    if prompt is None and sys.stdin is None:
        raise click.UsageError(
            "chat: messages come from standard input, but it is closed; give one with --prompt."
        )
    if prompt is not None and not prompt.strip():
        raise click.UsageError(
            "--prompt: it must have text, but it is empty; leave it out for a conversation."
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
    session, tokenizer, _ = open_session(model, chip, console)
    conversation = _Chat(session, tokenizer, sampling, max_tokens, console)
    finished = True
    if prompt is not None:
        finished = conversation.answer(prompt)
    else:
        conversation.converse()
    conversation.report()
    if not finished:
        sys.exit(130)
