"""Recurrent operators: LSTM, GRU, RNN, a step per time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pagoda.pytorch.onnx_import.operators import operator, require

_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
Step = Callable[..., tuple[torch.Tensor, ...]]


def _run(
    kind: str, x: Any, w: Any, r: Any, b: Any, lengths: Any, states: list[Any], step: Step,
    *, direction: str, layout: int, activations: Any, clip: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Outputs: all hidden states [time, directions, batch, hidden], then the last states."""
    require(lengths is None, "sequences of different lengths (sequence_lens)",
            "run them one by one")  # fmt: skip
    require(not clip, "clipped cells (clip)")
    count = 2 if direction == "bidirectional" else 1
    wanted = _DEFAULTS[kind] * count
    require(not activations or [a.lower() for a in activations] == [a.lower() for a in wanted],
            f"activations {activations}", f"use the default ones, {wanted}")  # fmt: skip
    if layout:
        x = x.transpose(0, 1)
        states = [None if s is None else s.transpose(0, 1) for s in states]
    hidden = r.shape[2]
    finished, lasts = [], []
    for d in range(count):
        backward = direction == "reverse" or d == 1
        gates = r.shape[1]
        bias = b[d] if b is not None else x.new_zeros(2 * gates)
        inputs = torch.matmul(x, w[d].t()) + bias[:gates]
        now = [x.new_zeros(x.shape[1], hidden) if state is None else state[d] for state in states]
        made: list[torch.Tensor] = []
        for t in reversed(range(x.shape[0])) if backward else range(x.shape[0]):
            now = list(step(inputs[t], now, r[d], bias[gates:]))
            made.append(now[0])
        finished.append(torch.stack(made[::-1] if backward else made))
        lasts.append(now)
    y = torch.stack(finished, 1)
    ends = [torch.stack(parts) for parts in zip(*lasts, strict=True)]
    if layout:
        return y.permute(2, 0, 1, 3), *(end.transpose(0, 1) for end in ends)
    return y, *ends


def _lstm(inputs: Any, now: list[Any], r: Any, b: Any) -> tuple[Any, ...]:
    hidden, cell = now
    i, o, f, c = (inputs + torch.matmul(hidden, r.t()) + b).chunk(4, 1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(c)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru(before: bool) -> Step:
    def step(inputs: Any, now: list[Any], r: Any, b: Any) -> tuple[Any, ...]:
        (hidden,) = now
        n = hidden.shape[1]
        z, reset = torch.sigmoid(
            inputs[:, : 2 * n] + torch.matmul(hidden, r[: 2 * n].t()) + b[: 2 * n]
        ).chunk(2, 1)
        if before:
            new = torch.matmul(reset * hidden, r[2 * n :].t()) + b[2 * n :]
        else:
            new = reset * (torch.matmul(hidden, r[2 * n :].t()) + b[2 * n :])
        new = torch.tanh(inputs[:, 2 * n :] + new)
        return ((1 - z) * new + z * hidden,)

    return step


def _rnn(inputs: Any, now: list[Any], r: Any, b: Any) -> tuple[Any, ...]:
    return (torch.tanh(inputs + torch.matmul(now[0], r.t()) + b),)


@operator("LSTM")
def lstm(
    x, w, r, b=None, sequence_lens=None, initial_h=None, initial_c=None, p=None, *,
    activation_alpha=None, activation_beta=None, activations=None, clip=None, direction="forward",
    hidden_size=None, input_forget=0, layout=0,
):  # fmt: skip
    require(p is None, "peepholes (input P)")
    require(not input_forget, "coupled gates (input_forget=1)")
    return _run(
        "LSTM", x, w, r, b, sequence_lens, [initial_h, initial_c], _lstm, direction=direction,
        layout=layout, activations=activations, clip=clip,
    )  # fmt: skip


@operator("GRU")
def gru(
    x, w, r, b=None, sequence_lens=None, initial_h=None, *, activation_alpha=None,
    activation_beta=None, activations=None, clip=None, direction="forward", hidden_size=None,
    layout=0, linear_before_reset=0,
):  # fmt: skip
    return _run(
        "GRU", x, w, r, b, sequence_lens, [initial_h], _gru(not linear_before_reset),
        direction=direction, layout=layout, activations=activations, clip=clip,
    )  # fmt: skip


@operator("RNN")
def rnn(
    x, w, r, b=None, sequence_lens=None, initial_h=None, *, activation_alpha=None,
    activation_beta=None, activations=None, clip=None, direction="forward", hidden_size=None,
    layout=0,
):  # fmt: skip
    return _run(
        "RNN", x, w, r, b, sequence_lens, [initial_h], _rnn, direction=direction,
        layout=layout, activations=activations, clip=clip,
    )  # fmt: skip
