"""The language-model engine: cache in place, programs as plain data, sessions without torch."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from pagoda.compiler.cache import Cache
from pagoda.compiler.loop_nest import LoopNest
from pagoda.isa import PRESETS
from pagoda.llm import (
    Generation,
    ModelError,
    ModelFile,
    TorchSession,
    build_model,
    figures,
    load_model,
)
from pagoda.llm.cache import KVCache
from pagoda.llm.chip_session import ChipSession, to_bfloat16
from pagoda.llm.compiled import compile_model
from pagoda.llm.program import key, load
from pagoda.llm.reference import counted_macs
from pagoda.llm.tiny_model import random_state, tiny_config, write_gguf
from pagoda.llm.trace import _Recorder, trace
from pagoda.pytorch import device
from pagoda.runtime import Device, OutOfDeviceMemory

CHIP = PRESETS["tiny"]
CAPACITY = 64
PROMPT = [5, 9, 77, 3, 120, 44, 8]
PACKAGE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's file (tiny.gguf) and the cache it was compiled into (code)."""
    folder = tmp_path_factory.mktemp("engine")
    config = tiny_config()
    write_gguf(folder / "tiny.gguf", config, random_state(config))
    return folder


@pytest.fixture(scope="module")
def file(folder):
    return ModelFile(folder / "tiny.gguf")


@pytest.fixture(scope="module")
def traced_and_compiled(folder, file):
    """The regions and the model compiled from them: tracing takes seconds, so once for all."""
    kept = []

    def keep(*args):
        kept.append(trace(*args))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagoda.llm.trace.trace", keep)
        model = compile_model(file.hyperparameters, CHIP, Cache(folder / "code"), CAPACITY)
    return *kept, model


@pytest.fixture(scope="module")
def compiled(traced_and_compiled):
    return traced_and_compiled[1]


@pytest.fixture
def session(compiled, file):
    return ChipSession(compiled, Device(CHIP), file.weights())


def greedy(session, count, prompt=PROMPT):
    return list(Generation(session, prompt, max_tokens=count))


def test_greedy_tokens_equal_those_of_the_model(session, file):
    assert greedy(session, 8) == greedy(TorchSession(load_model(file.path)), 8)


def test_logits_are_as_near_as_those_of_torch(session, file):
    """Of a first turn, single tokens, and a second turn on top of them."""
    exact = {name: t.float() for name, t in file.state_dict(torch.bfloat16).items()}
    exact = TorchSession(build_model(file.config(), exact))
    torch_bfloat16 = TorchSession(load_model(file.path))
    ours, theirs = [], []
    for ids in (PROMPT, [104], [7], [4, 7, 9], [240]):
        expected = exact.step(ids)
        ours.append(np.abs(session.step(ids) - expected).mean())
        theirs.append(np.abs(torch_bfloat16.step(ids) - expected).mean())
    assert np.mean(ours) <= np.mean(theirs)


def test_forgotten_tokens_leave_no_trace(session, compiled, file):
    session.step([1, 2, 3, 4, 5, 6, 7, 8, 9])
    session.truncate(0)
    fresh = ChipSession(compiled, Device(CHIP), file.weights())
    for ids in (PROMPT, [104], [7]):
        assert np.array_equal(session.step(ids), fresh.step(ids))
    session.truncate(5)
    fresh.truncate(5)
    assert session.tokens == fresh.tokens == PROMPT[:5]
    assert np.array_equal(session.step([3, 4]), fresh.step([3, 4]))


def test_the_context_can_be_filled(session):
    generation = Generation(session, PROMPT, max_tokens=1000)
    assert len(list(generation)) == CAPACITY - len(PROMPT) + 1
    assert generation.finish == "context"


def test_a_step_writes_the_cache_in_place(traced_and_compiled):
    """Only attention reads the cache; what writes it writes the new positions and no other."""
    traced, _ = traced_and_compiled
    for region, arguments in (
        (traced.prefill, traced.prefill_arguments),
        (traced.decode, traced.decode_arguments),
    ):
        cached = {
            entry.view.buffer: argument.kind
            for argument, entry in zip(arguments, region.inputs, strict=True)
            if argument.kind in ("keys", "values")
        }
        assert len(cached) == 4
        assert all(region.buffers[number].mutated for number in cached)
        sizes = {"count": 6, "shifted": 21}
        symbols = {s.name: sizes[arguments[s.input].kind] for s in region.symbols}
        for step in region.steps:
            if not isinstance(step.kernel, LoopNest):
                assert step.kernel.name in ("mm", "sdpa")
                continue
            touched = cached.keys() & {view.buffer for view in step.args}
            assert not touched & set(step.reads())
            if touched:
                values = [e.evaluate(symbols) for e in step.symbols]
                named = dict(zip(step.kernel.symbols, values, strict=True))
                points = np.prod([int(size.evaluate(named)) for size in step.kernel.dims])
                assert points <= 2 * 16 * 6  # heads, head size, tokens


def test_nothing_of_a_step_is_computed_on_the_host(compiled):
    assert compiled.fallbacks == {} and figures.fallbacks(compiled) == 0


def test_what_the_host_computes_in_a_step_is_counted(file, monkeypatch):
    def run_with_fallback(self, region, inputs, outputs, symbols):
        self.calls.append((region, list(inputs)))
        device.state.fallbacks["aten.sort.default"] += 1

    monkeypatch.setattr(_Recorder, "run", run_with_fallback)
    monkeypatch.setattr(device.state, "fallbacks", Counter({"aten.sort.default": 5}))
    traced = trace(LlamaConfig(**file.hyperparameters), CAPACITY)
    assert traced.fallbacks == {"aten.sort.default": 2}


def test_cache_of_an_unchanged_model_on_the_host(file):
    model = load_model(file.path, torch.float32)
    cache = KVCache(model.config, 16, torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids[:, :5], past_key_values=cache).logits, expected[:, :5])
        torch.testing.assert_close(model(ids[:, 5:6], past_key_values=cache).logits[:, 0],
                                   expected[:, 5])  # fmt: skip
        assert cache.get_seq_length() == 6
        cache.crop(-3)
        torch.testing.assert_close(model(ids[:, 3:], past_key_values=cache).logits, expected[:, 3:])


def test_programs_are_loaded_as_they_were_saved(compiled, folder, file):
    store = Cache(folder / "code")
    again = load(store, file.hyperparameters, CAPACITY, CHIP)
    assert (again.prefill, again.decode) == (compiled.prefill, compiled.decode)
    assert again.buffers.keys() == compiled.buffers.keys() == {"model.rotary_emb.inv_freq"}
    assert all(
        np.array_equal(again.buffers[name], compiled.buffers[name]) for name in again.buffers
    )
    assert {values.dtype for values in again.buffers.values()} == {np.dtype(np.float32)}
    assert load(store, file.hyperparameters, CAPACITY, PRESETS["edge"]) is None
    assert load(store, file.hyperparameters, CAPACITY - 1, CHIP) is None


@pytest.mark.parametrize("damage", ["cut", "other", "garbage"])
def test_a_damaged_entry_counts_as_absent(damage, compiled, tmp_path, file):
    store = Cache(tmp_path)
    name = key(file.hyperparameters, CAPACITY, CHIP)
    store.put(name, {"cut": compiled.to_bytes(), "other": b"\x80\x05N.", "garbage": b"x"}[damage])
    if damage == "cut":
        (entry,) = (path for path in tmp_path.rglob("*") if path.is_file())
        entry.write_bytes(entry.read_bytes()[:1000])
    assert load(store, file.hyperparameters, CAPACITY, CHIP) is None


WITHOUT_TORCH = """
import sys
from pathlib import Path
from pagoda.compiler.cache import Cache
from pagoda.isa import PRESETS
from pagoda.llm import Generation, ModelFile
from pagoda.llm.chip_session import ChipSession
from pagoda.llm.compiled import compile_model
from pagoda.runtime import Device
folder, chip = Path(sys.argv[1]), PRESETS["tiny"]
file = ModelFile(folder / "tiny.gguf")
model = compile_model(file.hyperparameters, chip, Cache(folder / "code"), int(sys.argv[2]))
session = ChipSession(model, Device(chip), file.weights())
print(list(Generation(session, [5, 9, 77, 3, 120, 44, 8], max_tokens=4)))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_a_saved_model_runs_without_torch(session, folder):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(CAPACITY)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=PACKAGE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == str(greedy(session, 4))


def test_the_chip_does_the_macs_that_torch_counts(session, file):
    config = file.config()
    for ids in (PROMPT, [104], [240]):
        session.step(ids)
    for step in session.steps:
        assert step.macs == counted_macs(config, step.count, step.position)
        program = session.model.decode if step.count == 1 else session.model.prefill
        assert step.launches == len(program.executable.launches)  # tiny's IMEM is too small for 1
    # Torch counts attention to keys that causality hides; the figures do not.
    hidden = len(PROMPT) * (len(PROMPT) - 1) // 2 * 2 * 64 * 2
    assert figures.macs(file.hyperparameters, 7, 0) == session.steps[0].macs - hidden
    assert figures.macs(file.hyperparameters, 1, 7) == session.steps[1].macs


def test_bytes_of_a_step(compiled, session, file):
    session.step(PROMPT)
    session.step([1])
    state = file.state_dict(torch.bfloat16)
    del state["lm_head.weight"]  # tied
    weights = sum(2 * tensor.numel() for tensor in state.values())
    keys_and_values = 2 * 2 * 2 * 16 * 2  # bytes, both, heads, size, layers
    assert figures.step_bytes(compiled, session.steps[0]) == weights + 7 * keys_and_values
    assert figures.step_bytes(compiled, session.steps[1]) == weights + 8 * keys_and_values


def test_a_model_that_does_not_fit(compiled, file):
    device = Device(CHIP)
    device.memory.allocate(CHIP.dram_bytes - 100_000)
    with pytest.raises(OutOfDeviceMemory):
        ChipSession(compiled, device, file.weights())


def test_bfloat16_rounds_to_nearest_even():
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = 1 + np.array([1, 2, 3, 5], np.float32) / 256
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(to_bfloat16(values), expected.view(torch.uint16).numpy())
    found = (to_bfloat16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert np.array_equal(found, expected.float().numpy())


def test_a_chip_too_small_is_refused_before_any_work(file, tmp_path):
    config = file.hyperparameters
    with pytest.raises(ModelError) as error:
        compile_model(config, PRESETS["tiny8"], Cache(tmp_path))
    assert str(error.value) == (
        "chip tiny8: a language model needs a matrix engine that multiplies bf16, but this one "
        "multiplies int8. Choose another chip: pagoda chips lists them."
    )
    with pytest.raises(ModelError) as error:
        compile_model({**config, "num_hidden_layers": 5000}, CHIP, Cache(tmp_path))
    assert str(error.value) == (
        "chip tiny: its memory must hold weights and cache, 390 MB in bfloat16, but it has 268 MB. "
        "Choose a chip with more DRAM (pagoda chips lists them), or a smaller model."
    )
