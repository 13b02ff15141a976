"""pagoda.llm.generate and session: the choice of tokens, conversations that keep their cache."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pagoda.llm import (
    Generation,
    ModelError,
    ModelFile,
    Sampler,
    Sampling,
    Tokenizer,
    TorchSession,
    build_model,
    extend,
    load_model,
)
from pagoda.llm.tiny_model import random_state, tiny_config

FLOATS = st.floats(-50, 50, width=32)
LOGITS = arrays.arrays(np.float32, st.integers(1, 40), elements=FLOATS)


class Counting:
    """A session without a model: after token t it prefers t + 1, and it records its steps."""

    def __init__(self, context=16, vocabulary=10):
        self.tokens, self.context, self.vocabulary, self.steps = [], context, vocabulary, []

    def step(self, ids):
        self.steps.append(list(ids))
        self.tokens.extend(ids)
        logits = np.zeros(self.vocabulary, np.float32)
        logits[(ids[-1] + 1) % self.vocabulary] = 5
        return logits

    def truncate(self, length):
        del self.tokens[length:]


@pytest.fixture(scope="module")
def tiny():
    return build_model(tiny_config(), random_state(tiny_config()))


def test_greedy_takes_the_lowest_of_equals():
    assert Sampler(Sampling())(np.array([1, 3, 3, 2], np.float32)) == 1


@given(LOGITS, st.integers(0, 2**32))
def test_greedy_ignores_everything_else(logits, seed):
    greedy = Sampling(temperature=0, top_k=3, top_p=0.5, seed=seed)
    assert Sampler(greedy)(logits) == np.argmax(logits)


@given(LOGITS, st.integers(0, 99))
def test_one_candidate_is_greedy(logits, seed):
    assert Sampler(Sampling(1.0, top_k=1, seed=seed))(logits) == np.argmax(logits)
    assert Sampler(Sampling(1.0, top_p=1e-9, seed=seed))(logits) == np.argmax(logits)


@given(LOGITS, st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 99))
def test_only_candidates_are_drawn(logits, top_k, top_p, seed):
    """The set kept, computed the plain way: sort, keep k, keep until the probability reaches p."""
    order = sorted(range(len(logits)), key=lambda id_: (-logits[id_], id_))[:top_k]
    weights = np.exp(logits[order].astype(np.float64) - float(logits[order[0]]))
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities
    allowed = {id_ for id_, sum_ in zip(order, before, strict=True) if sum_ < top_p + 1e-12}
    sampler = Sampler(Sampling(1.0, top_k, top_p, seed))
    assert {sampler(logits) for _ in range(20)} <= allowed


def test_frequencies_follow_the_temperature():
    logits = np.log(np.array([8, 4, 2, 1], np.float32))
    for temperature in (0.5, 1.0, 2.0):
        sampler = Sampler(Sampling(temperature, seed=1))
        counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4)
        weights = np.array([8.0, 4, 2, 1]) ** (1 / temperature)
        np.testing.assert_allclose(counts / 4000, weights / weights.sum(), atol=0.03)


def test_a_seed_fixes_the_draws():
    logits = np.linspace(0, 3, 50, dtype=np.float32)

    def draws(seed):
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert draws(3) == draws(3) != draws(4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "temperature: must be a number, 0 or more, but it is -1."),
        ({"temperature": float("nan")}, "temperature: must be a number, 0 or more, but it is nan."),
        ({"top_k": -1}, "top_k: must be 0 (all) or more, but it is -1."),
        ({"top_p": 0}, "top_p: must be above 0 and at most 1, but it is 0."),
        ({"seed": -5}, "seed: must be 0 or more, but it is -5."),
    ],
)
def test_impossible_settings(setting, message):
    with pytest.raises(ModelError) as caught:
        Sampling(**setting)
    assert str(caught.value) == f"{message} Choose a value in that range."


def test_nan_logits_are_refused():
    with pytest.raises(ModelError) as caught:
        Sampler(Sampling())(np.array([0, np.nan], np.float32))
    assert str(caught.value) == (
        "logits: must be numbers, but some are NaN. The model's weights are damaged: download or "
        "copy the file again."
    )


def test_generation_stops_at_a_stop_token():
    session = Counting()
    answer = Generation(session, [1, 2], stop_ids={6})
    assert list(answer) == [3, 4, 5]
    assert answer.finish == "stop"
    assert session.steps == [[1, 2], [3], [4], [5]]


def test_generation_stops_at_its_length():
    session = Counting()
    answer = Generation(session, [1], max_tokens=3)
    assert list(answer) == [2, 3, 4]
    assert answer.finish == "length"
    assert session.steps == [[1], [2], [3]]  # no logits are computed in vain


def test_generation_stops_at_the_context():
    answer = Generation(Counting(context=4), [1, 2])
    assert list(answer) == [3, 4, 5]
    assert answer.finish == "context"


@pytest.mark.parametrize("prompt", [[], list(range(5))])
def test_a_prompt_must_fit(prompt):
    with pytest.raises(ModelError) as caught:
        list(Generation(Counting(context=4), prompt))
    assert str(caught.value) == (
        "the prompt: must have 1 to 4 tokens, the model's context length, but it has "
        f"{len(prompt)}. Shorten the conversation."
    )


def test_max_tokens_must_be_positive():
    with pytest.raises(ModelError) as caught:
        list(Generation(Counting(), [1], max_tokens=0))
    assert str(caught.value) == (
        "max_tokens: must be 1 or more, but it is 0. Ask for at least one."
    )


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_extend_computes_only_what_differs(held, wanted):
    session = Counting()
    if held:
        session.step(held)
    session.steps.clear()
    extend(session, wanted)
    assert session.tokens == wanted
    (computed,) = session.steps
    kept = len(wanted) - len(computed)
    assert held[:kept] == wanted[:kept]
    assert kept == len(wanted) - 1 or held[: kept + 1] != wanted[: kept + 1]


def test_a_torch_session_equals_one_forward_pass(tiny):
    ids = [5, 17, 200, 33, 80, 2, 9]
    session = TorchSession(tiny)
    stepped = [session.step(ids[:3]), *(session.step([id_]) for id_ in ids[3:])]
    assert session.tokens == ids
    with torch.no_grad():
        whole = tiny(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(np.array(stepped), whole[2:], rtol=0, atol=1e-4)


def test_greedy_generation_is_transformers_own(tiny):
    prompt = [5, 17, 200, 33]
    theirs = tiny.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert list(Generation(TorchSession(tiny), prompt, max_tokens=12)) == theirs[0, 4:].tolist()


def test_a_kept_cache_changes_nothing(tiny):
    kept = TorchSession(tiny)
    list(Generation(kept, [5, 17, 200], max_tokens=6))
    continued = list(Generation(kept, [5, 17, 200, 40, 41], max_tokens=6))
    assert continued == list(Generation(TorchSession(tiny), [5, 17, 200, 40, 41], max_tokens=6))


def test_an_interrupted_step_leaves_a_usable_session(tiny, monkeypatch):
    session = TorchSession(tiny)
    session.step([5, 17, 200])
    with monkeypatch.context() as patch:
        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(tiny.model.layers[1].mlp, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.step([40])
    expected = TorchSession(tiny).step([5, 17, 200, 40])
    np.testing.assert_array_equal(extend(session, [5, 17, 200, 40]), expected)


def test_smollm2_answers(smollm2_path):
    tokenizer = Tokenizer(ModelFile(smollm2_path).tokenizer_parts())
    session = TorchSession(load_model(smollm2_path, torch.float32))
    prompt = tokenizer.encode("The capital of France is")
    answer = Generation(session, prompt, stop_ids=tokenizer.stop_ids, max_tokens=2)
    assert "".join(tokenizer.stream(answer)) == " Paris."
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = Generation(
        session, tokenizer.encode_chat(question), stop_ids=tokenizer.stop_ids, max_tokens=20
    )
    assert "".join(tokenizer.stream(answer)).startswith("The capital of France is Paris.")
