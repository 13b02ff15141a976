"""Models on the simulated chip: same bits on every chip, right tokens, errors, profiles, cache."""

from __future__ import annotations

import copy
import importlib
import tomllib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from step_executor import StepExecutor

import pagoda
import pagoda.pytorch.inductor
from pagoda.compiler.cache import Cache
from pagoda.isa import Chip, ChipError, FaultKind, load_chip
from pagoda.pytorch import chip as chip_module
from pagoda.pytorch import device
from pagoda.runtime import Device, DeviceFault, OutOfDeviceMemory
from pagoda.sim import Simulator
from pagoda.sim import machine as sim_machine

transformers = pytest.importorskip("transformers")
P = "pagoda"
ODD = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
EVEN = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
STEPS = 4
SMALL_IMEM = replace(load_chip("tiny"), name="tiny with little IMEM", imem_bytes=8192)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True, scope="module")
def settings():
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.fixture(autouse=True)
def nothing_open():
    """Every test opens its own chip; what the process used before comes back."""
    before = (device.state.executor, device.state.allocator)
    device.state.executor = device.state.allocator = None
    torch.pagoda.reset_fallbacks()
    yield
    device.state.executor, device.state.allocator = before


@dataclass
class Greedy:
    """Tokens chosen, and the logits of every step, float32 [positions, vocabulary]."""

    tokens: list[int]
    logits: list[torch.Tensor]

    def bits(self) -> list[bytes]:
        return [step.view(torch.uint8).numpy().tobytes() for step in self.logits]

    def distance(self, exact: Greedy) -> float:
        pairs = zip(self.logits, exact.logits, strict=True)
        return sum(float((a - b).abs().mean()) for a, b in pairs)


class Llama:
    """A random model: what the CPU makes of it in float32 and bfloat16, and one compiled function
    that runs it on whatever chip is open."""

    def __init__(self, sizes: dict, layers: int = 2) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes)
        self.model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(4)  # so that logits differ by more than rounding
        self.ids = torch.randint(3, sizes["vocab_size"], (1, 9))
        self.exact = self._greedy(copy.deepcopy(self.model).float(), self.ids)
        self.host = self._greedy(self.model, self.ids)
        self.compiled = torch.compile(self.model, backend=P)

    def _greedy(self, forward, ids: torch.Tensor) -> Greedy:
        """A prefill, then one token at a time with a growing cache; the tokens fed are those that
        float32 chooses, so that steps stay comparable."""
        past = transformers.DynamicCache(config=self.model.config)
        found, x = Greedy([], []), ids
        for step in range(STEPS):
            with torch.no_grad():
                logits = forward(input_ids=x, past_key_values=past, use_cache=True).logits
            found.logits.append(logits[0].cpu().float())
            found.tokens.append(int(found.logits[-1][-1].argmax()))
            fed = self.exact.tokens if hasattr(self, "exact") else found.tokens
            x = torch.tensor([[fed[step]]]).to(ids.device)
        return found

    def on(self, opened: Device, cache: Cache) -> Greedy:
        chip_module.use_device(opened, cache)
        return self.on_device()

    def on_device(self) -> Greedy:
        self.model.to("cpu")
        self.model.to(P)
        return self._greedy(self.compiled, self.ids.to(P))


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama(ODD)


def checking(chip: Chip | str) -> Device:
    """A device that faults on races between cores and on reads of what was never written."""
    chip = load_chip(chip) if isinstance(chip, str) else chip
    return Device(chip, Simulator(chip, checking=True))


def check_same_bits(llama: Llama, cache: Cache) -> None:
    first = None
    for chip in ("tiny", SMALL_IMEM, "edge", "car"):
        opened = checking(chip)
        found = llama.on(opened, cache)
        assert found.tokens == llama.exact.tokens
        # Rounding is luck for one model: 0.6 to 1.4 times torch's distance, 0.9 on average.
        assert found.distance(llama.exact) <= 1.5 * llama.host.distance(llama.exact)
        first = first or found
        assert found.bits() == first.bits(), opened.chip.name
        # A graph is one launch, unless its code exceeds IMEM.
        if opened.chip.imem_bytes >= 1 << 16:
            assert opened.launches == STEPS
        assert chip is not SMALL_IMEM or opened.launches > STEPS
    assert torch.pagoda.fallbacks() == {}


def test_same_bits_on_every_chip(llama: Llama, cache: Cache) -> None:
    check_same_bits(llama, cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "hidden_size": 40},
        {"head_dim": 64, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"vocab_size": 1031, "intermediate_size": 17, "tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "hidden_size": 36},
    ],
    ids=["tied", "every head", "two wide heads", "primes", "rope"],
)
def test_same_bits_of_other_models(changes: dict, cache: Cache) -> None:
    torch._dynamo.reset()  # it compiles one forward only so many times, for whatever models
    check_same_bits(Llama({**EVEN, **changes}), cache)


def test_steps_agree_with_the_host(llama: Llama, cache: Cache) -> None:
    """Kernel by kernel, on equal inputs: a few units in the last place of bfloat16."""
    opened = checking("tiny")
    steps = StepExecutor(opened, cache)
    pagoda.pytorch.use(steps, chip_module.ChipExecutor(opened, cache))
    llama.on_device()
    assert len(steps.differences) > 100
    wrong = [d for d in steps.differences if d.error > d.scale * 2**-7]
    assert not wrong


def test_a_broken_matmul_breaks_the_text(
    llama: Llama, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All products come from the simulated matrix engine: without its accumulators, no sense."""
    run_slice = sim_machine._Core.run_slice

    def forgetful(core) -> bool:
        over = run_slice(core)
        core.acc[:] = 0
        return over

    monkeypatch.setattr(sim_machine, "_SLICE_CYCLES", 50)
    monkeypatch.setattr(sim_machine._Core, "run_slice", forgetful)
    found = llama.on(Device(load_chip("tiny")), cache)
    assert found.tokens != llama.exact.tokens
    assert found.distance(llama.exact) > 10 * llama.host.distance(llama.exact)


def generate(how: str, cache: Cache) -> None:
    model = Llama(EVEN, layers=1).model
    ids = torch.randint(3, 300, (1, 5))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    exact = copy.deepcopy(model).float()
    expected = exact.generate(ids, attention_mask=torch.ones_like(ids), **options)
    opened = Device(load_chip("edge"))
    chip_module.use_device(opened, cache)
    model.to(P)
    if how == "compile":
        model.compile(backend=P)
    runner = torch.compile(model, backend=P) if how == "wrapped" else model
    mask = torch.ones_like(ids).to(P)
    assert torch.equal(runner.generate(ids.to(P), attention_mask=mask, **options).cpu(), expected)
    assert torch.pagoda.fallbacks() == {}
    assert opened.counters.macs > 7 * sum(p.numel() for p in model.model.layers.parameters())


def test_generate(cache: Cache) -> None:
    generate("compile", cache)


@pytest.mark.slow
def test_generate_of_the_uncompiled_model(cache: Cache) -> None:
    """transformers runs it operation by operation; every one of them on the chip."""
    generate("wrapped", cache)


def test_empty_tensors(cache: Cache) -> None:
    chip_module.use_chip("tiny", cache)
    rows = torch.arange(6.0).view(2, 3)
    joined = torch.cat([torch.empty(0, 3).to(P), rows.to(P)])
    assert torch.equal(joined.cpu(), rows)
    assert (torch.empty(0, 3).to(P) + 1).cpu().shape == (0, 3)
    assert torch.empty(0, 3).to(P).sum(0).cpu().tolist() == [0, 0, 0]


def test_a_forward_that_dynamo_leaves_alone(cache: Cache) -> None:
    """Dynamo does not compile torch's own modules; nor may it compile ours, which run instead."""
    chip_module.use_chip("tiny", cache)
    linear, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    expected = linear(x)
    linear.to(P).compile(backend=P)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(linear(x.to(P)).cpu(), expected, rtol=1e-5, atol=1e-6)


# Which chip ---------------------------------------------------------------------------------------


def test_the_default_chip_is_opened_by_the_first_tensor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PAGODA_CACHE_DIR", str(tmp_path))
    assert (torch.ones(2).to(P) * 3).cpu().tolist() == [3, 3]
    opened = device.state.executor
    assert opened.device.chip == load_chip("edge") and opened.cache.directory == tmp_path
    assert list(tmp_path.iterdir())


def test_tensors_of_the_chip_before_are_refused(cache: Cache) -> None:
    chip_module.use_chip("tiny", cache)
    old = torch.ones(2, 3).to(P)
    assert torch.pagoda.use_chip("car").chip.name == "car"
    with pytest.raises(RuntimeError) as error:
        old + 1
    assert str(error.value) == (
        "argument 0 of the operation, a float32 tensor of shape (2, 3), is not in the memory of "
        'chip "car", which device pagoda uses now: it was made before the last use_chip. Move it '
        'with .cpu() and then .to("pagoda"), or call use_chip before anything is moved to the '
        "device."
    )
    assert torch.equal(old.cpu(), torch.ones(2, 3))


def test_unknown_chip() -> None:
    with pytest.raises(ChipError) as error:
        pagoda.use_chip("pyramid")
    assert "pyramid" in str(error.value) and "edge" in str(error.value)
    assert device.state.executor is None


def kept_in_float64(x: torch.Tensor) -> torch.Tensor:
    return x.double().sin()


def inverted(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(x) + 1


def test_unsupported_type_names_operation_and_chip(cache: Cache) -> None:
    chip_module.use_chip("edge", cache)
    with pytest.raises(RuntimeError) as error:
        torch.compile(kept_in_float64, backend=P)(torch.ones(2).to(P))
    assert str(error.value) == (
        'cannot compile for chip "edge" in the step _to_copy, sin: parameter p1: the chip computes '
        "in float32 and int32 and stores bfloat16, int8 and int64 besides, but the type is "
        "float64; convert it to float32 first"
    )


def test_unsupported_operation_names_its_line(cache: Cache) -> None:
    chip_module.use_chip("edge", cache)
    with pytest.raises(Exception) as error:
        torch.compile(inverted, backend=P)(torch.eye(3).to(P))
    line = inverted.__code__.co_firstlineno + 1
    assert (
        "operation linalg_inv_ex is not supported on device pagoda: it is neither a loop nest nor "
        "one of the library kernels (mm, bmm, addmm, scaled_dot_product_attention, convolution). "
        "Rewrite the model without it, or compute it on the CPU with .cpu(). It comes from file "
        f'"{__file__}", line {line}, in inverted: return torch.linalg.inv(x) + 1'
    ) in str(error.value)
    assert torch.pagoda.fallbacks() == {}


# Faults -------------------------------------------------------------------------------------------


def test_full_device_memory(cache: Cache) -> None:
    chip_module.use_chip(replace(load_chip("tiny"), dram_bytes=1 << 20), cache)
    with pytest.raises(OutOfDeviceMemory) as error:
        torch.zeros(1 << 20).to(P)
    assert str(error.value) == (
        "a float32 tensor of shape [1048576]: device memory is full: 4,194,304 bytes asked for, "
        "1,048,512 of 1,048,512 free (largest piece 1,048,512); free tensors, use a smaller batch "
        "or sequence, or choose a chip with more DRAM"
    )
    assert (torch.ones(3).to(P) + 1).cpu().tolist() == [2, 2, 2]


def test_watchdog(cache: Cache) -> None:
    opened = chip_module.use_chip("tiny", cache)
    x, whole = torch.ones(1000).to(P), opened.watchdog
    opened.watchdog = 300
    with pytest.raises(DeviceFault) as error:
        x.sin()
    assert error.value.fault.kind is FaultKind.WATCHDOG
    assert "limit 300 cycles" in str(error.value)
    opened.watchdog = whole
    torch.testing.assert_close(x.sin().cpu(), torch.ones(1000).sin())


# Profiles -----------------------------------------------------------------------------------------


def two_kernels(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ w, -1)


def test_profile(cache: Cache) -> None:
    opened = chip_module.use_chip("car", cache)
    x, w = (torch.randn(64, 64).to(torch.bfloat16).to(P) for _ in range(2))
    compiled = torch.compile(two_kernels, backend=P)
    compiled(x, w)
    before = opened.cycles
    with pagoda.profile() as p:
        compiled(x, w)
        compiled(x, w)
    compiled(x, w)
    assert p.launches == 2 and sum(row.cycles for row in p.rows) == p.cycles
    assert 2 * (opened.cycles - before) == 3 * p.cycles
    by_origin = {row.origin: row for row in p.rows}
    product, softmax = by_origin["mm"], by_origin["_softmax"]
    assert product.calls == softmax.calls == 2
    assert product.macs == 2 * 64**3 and softmax.macs == 0
    assert 0 < product.matrix_utilisation < 1 and product.busy["matrix"] > 0
    assert softmax.busy["matrix"] == 0 and softmax.bottleneck() == "vector"
    assert product.dram_bytes >= 2 * 2 * 2 * 64 * 64
    text = str(p)
    assert f"{p.cycles:,} cycles" in text and "2 launches on car" in text
    assert len(text.splitlines()) == 2 + len(p.rows)
    assert max(map(len, text.splitlines())) < 140


def test_profile_without_a_chip() -> None:
    pagoda.pytorch.use(executor=object())
    with pytest.raises(RuntimeError) as error, pagoda.profile():
        pass
    assert str(error.value) == (
        "profile: device pagoda runs on object, not on a chip, so there are no cycles to count. "
        "Call pagoda.use_chip first."
    )


# Compiled code that is kept -----------------------------------------------------------------------


def test_executables_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Cache(tmp_path)
    x = torch.randn(5)
    for _ in range(2):
        chip_module.use_chip("tiny", store)
        assert torch.equal((x.to(P) + 2).cpu(), x + 2)
        monkeypatch.setattr(chip_module, "build", None)  # from now on nothing is compiled
    chip_module.use_chip("edge", store)
    with pytest.raises(TypeError):
        x.to(P) + 2


# Registration -------------------------------------------------------------------------------------


def test_entry_points_exist() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    groups = tomllib.loads(path.read_text())["project"]["entry-points"]
    assert groups.keys() == {"torch.backends", "torch_dynamo_backends"}
    for entries in groups.values():
        module, name = entries["pagoda"].split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_a_failing_autoload_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("no such thing")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning) as caught:
        pagoda.autoload()
    assert str(caught[0].message) == (
        'device "pagoda" is not available: ImportError: no such thing; torch works without it. '
        "`import pagoda.pytorch` shows where it fails; reinstall Pagoda if need be"
    )


# What torch.pagoda tells --------------------------------------------------------------------------


def test_memory_and_chip_are_told() -> None:
    opened = chip_module.use_chip("tiny")
    before = torch.pagoda.memory_allocated()
    x = torch.empty(100, dtype=torch.float32, device=P)  # 400 bytes: seven atoms of 64
    assert torch.pagoda.memory_allocated() == torch.pagoda.memory_reserved() == before + 448
    del x
    assert torch.pagoda.memory_allocated() == before
    assert torch.pagoda.max_memory_allocated() == before + 448
    torch.pagoda.empty_cache()
    torch.pagoda.reset_peak_memory_stats()
    assert torch.pagoda.max_memory_reserved() == before
    free, total = torch.pagoda.mem_get_info()
    assert (free, total) == (opened.memory.size - before, opened.memory.size)
    stats = torch.pagoda.memory_stats()
    assert stats["allocated_bytes.all.current"] == stats["reserved_bytes.all.peak"] == before
    assert stats["free_pieces"] == opened.memory.free_ranges
    assert stats["largest_free_bytes"] == opened.memory.largest_free
    assert stats["fragmentation"] == opened.memory.fragmentation
    told = torch.pagoda.get_device_properties()
    assert told.name == torch.pagoda.get_device_name() == "tiny"
    assert (told.multi_processor_count, told.total_memory) == (1, opened.chip.dram_bytes)
    assert told.clock_rate == opened.chip.clock_hz // 1000
    assert torch.pagoda.cycles() == opened.cycles


def test_host_memory_is_no_chip(monkeypatch) -> None:
    monkeypatch.setattr(device.state, "allocator", device.HostAllocator())
    with pytest.raises(RuntimeError) as error:
        torch.pagoda.memory_allocated()
    assert str(error.value) == (
        "device pagoda lies in host memory now, not on a chip, so there is no chip to ask. Call "
        "pagoda.use_chip first."
    )
