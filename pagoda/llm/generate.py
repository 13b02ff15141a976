"""Text generation: the choice of each token (policy), apart from how logits come about (mechanism).

Only numpy: a session may be a torch model (`session.TorchSession`) or a compiled program.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import ModelError


class Session(Protocol):
    """A model with the state of one conversation (its KV cache).

    tokens: ids the state holds, oldest first; context: the most it can hold.
    """

    tokens: list[int]
    context: int

    def step(self, ids: Sequence[int]) -> np.ndarray:
        """Append `ids` (at least one) and return the logits [vocabulary], binary32, of the last."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How to choose a token from logits.

    temperature: divides the logits; 0 is greedy, and nothing else matters then.
    top_k: keep the k likeliest; 0 keeps all. top_p: keep the smallest set of likeliest tokens
    whose probability reaches p; 1 keeps all. seed: the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "must be a number, 0 or more"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("seed", self.seed >= 0, "must be 0 or more"),
        ):
            if not valid:
                value = f"it is {getattr(self, name)}"
                raise ModelError(name, rule, value, "Choose a value in that range.")


class Sampler:
    """Draws tokens by a `Sampling`, from its own PCG64 stream: torch has no part in the result."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def __call__(self, logits: np.ndarray) -> int:
        """One token id for logits [vocabulary]; of equal logits the lowest id comes first."""
        if np.isnan(logits).any():
            remedy = "The model's weights are damaged: download or copy the file again."
            raise ModelError("logits", "must be numbers", "some are NaN", remedy)
        if self.sampling.temperature == 0:
            return int(np.argmax(logits))
        ids = np.argsort(-logits, kind="stable")
        if self.sampling.top_k:
            ids = ids[: self.sampling.top_k]
        scaled = logits[ids].astype(np.float64) / self.sampling.temperature
        cumulative = np.cumsum(np.exp(scaled - scaled[0]))
        if self.sampling.top_p < 1:
            kept = 1 + int(np.searchsorted(cumulative, self.sampling.top_p * cumulative[-1]))
            cumulative = cumulative[:kept]
        drawn = self._random.random() * cumulative[-1]
        place = int(np.searchsorted(cumulative, drawn, side="right"))
        return int(ids[min(place, len(cumulative) - 1)])


def extend(session: Session, ids: Sequence[int]) -> np.ndarray:
    """Bring the session's tokens to exactly `ids`; return the logits [vocabulary] of the last.

    What the session holds already is not computed again, except the last token, whose logits are
    asked for.
    """
    if not 0 < len(ids) <= session.context:
        rule = f"must have 1 to {session.context} tokens, the model's context length"
        raise ModelError("the prompt", rule, f"it has {len(ids)}", "Shorten the conversation.")
    shared = 0
    for held, wanted in zip(session.tokens, ids[:-1], strict=False):
        if held != wanted:
            break
        shared += 1
    session.truncate(shared)
    return session.step(ids[shared:])


class Generation:
    """One answer: iterate to get its token ids as they are chosen, the stop token left out.

    After the loop `finish` says why it ended: 'stop' (a stop token), 'length' (max_tokens) or
    'context' (the model's context is full). Logits are computed only for tokens that are needed.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: Sampling = Sampling(),
        stop_ids: Collection[int] = (),
        max_tokens: int = 512,
    ):
        self.session, self.prompt, self.stop_ids = session, list(prompt), stop_ids
        self.sampler, self.max_tokens = Sampler(sampling), max_tokens
        self.finish: str | None = None

    def __iter__(self) -> Iterator[int]:
        if self.max_tokens < 1:
            value = f"it is {self.max_tokens}"
            raise ModelError("max_tokens", "must be 1 or more", value, "Ask for at least one.")
        logits = extend(self.session, self.prompt)
        for count in range(1, self.max_tokens + 1):
            token = self.sampler(logits)
            if token in self.stop_ids:
                self.finish = "stop"
                return
            yield token
            if count == self.max_tokens:
                break
            if len(self.session.tokens) == self.session.context:
                self.finish = "context"
                return
            logits = self.session.step([token])
        self.finish = "length"
