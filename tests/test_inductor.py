"""torch.compile(backend="pagoda"): what becomes a region, and what the region computes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from region_executor import HostExecutor

import pagoda.pytorch
from pagoda.compiler.loop_nest import LoopNest
from pagoda.compiler.region import Region
from pagoda.pytorch import device

transformers = pytest.importorskip("transformers")
P = "pagoda"


@pytest.fixture(autouse=True)
def executor():
    """Runs regions on the host; puts back whatever the process used before."""
    before = (device.state.executor, device.state.allocator)
    host = HostExecutor()
    pagoda.pytorch.use(executor=host)
    torch.pagoda.reset_fallbacks()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        yield host
    device.state.executor, device.state.allocator = before


def largest(executor: HostExecutor) -> Region:
    return max(executor.regions.values(), key=lambda r: len(r.steps))


def norm_and_softmax(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w
    return torch.softmax(y * 2 + x.sin(), -1)


def test_reductions_over_the_same_rows_are_one_kernel(executor: HostExecutor) -> None:
    compiled = torch.compile(norm_and_softmax, backend=P, dynamic=True)
    for shape in ((3, 5, 8), (2, 7, 8)):
        x, w = torch.randn(shape), torch.randn(8)
        torch.testing.assert_close(compiled(x.to(P), w.to(P)).cpu(), norm_and_softmax(x, w))
    (region,) = executor.regions.values()
    ((kernel, count),) = region.kernels().items()
    assert count == 1 and kernel.reduced == 1
    assert [op for op in kernel.vocabulary() if op.startswith("reduce")] == [
        "reduce.max",
        "reduce.sum",
    ]


def test_linear_is_addmm(executor: HostExecutor) -> None:
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(2, 3, 8)
    expected = linear(x)
    got = torch.compile(linear.to(P), backend=P)(x.to(P))
    torch.testing.assert_close(got.cpu(), expected)
    (region,) = executor.regions.values()
    (step,) = region.steps
    assert str(step.kernel) == "addmm(alpha=1, beta=1)"
    a, b = step.args[2:]
    assert [str(s) for s in b.sizes] == ["8", "4"] and [str(s) for s in b.strides] == ["1", "8"]
    assert [region.buffers[v.buffer].weight for v in (a, b)] == [False, True]


def test_mutated_input_is_written_in_place() -> None:
    def step(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache[:, 1:3] = x
        return cache.sum(-1)

    cache, x = torch.zeros(2, 4), torch.randn(2, 2)
    on_device = cache.to(P)
    got = torch.compile(step, backend=P)(on_device, x.to(P))
    torch.testing.assert_close(got.cpu(), step(cache, x))
    torch.testing.assert_close(on_device.cpu(), cache)


def llama(dtype: torch.dtype = torch.float32, layers: int = 2) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.mul_(4)  # so that logits differ by more than rounding
    return model.to(dtype)


# What a Llama is made of, once masks and divisions in indices are split away.
VOCABULARY = {
    "add", "cast.float32", "constant", "cos", "div", "exp", "indexvalue", "indirect", "load", "mm",
    "mul", "neg", "reduce.sum", "rsqrt", "sdpa", "sin", "store",
}  # fmt: skip


def decode(model, forward, ids: torch.Tensor, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits: a prefill, then one token at a time, with a growing cache."""
    cache = transformers.DynamicCache(config=model.config)
    logits, chosen, x = [], [], ids
    for _ in range(steps):
        last = forward(input_ids=x, past_key_values=cache, use_cache=True).logits[:, -1]
        logits.append(last.float().cpu())
        chosen.append(int(last.argmax(-1).cpu()))
        x = torch.tensor([[chosen[-1]]]).to(ids.device)
    return chosen, torch.cat(logits)


def test_llama_decodes_as_on_the_cpu(executor: HostExecutor) -> None:
    model = llama()
    ids = torch.randint(0, 300, (1, 7))
    expected, logits = decode(model, model, ids, 6)
    model.to(P)
    executor.regions.clear()
    compiled = torch.compile(model, backend=P)
    got, device_logits = decode(model, compiled, ids.to(P), 6)
    assert got == expected
    torch.testing.assert_close(device_logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.pagoda.fallbacks() == {}
    models = [r for r in executor.regions.values() if len(r.steps) > 10]
    assert len(models) == 3  # prefill, first token, every later token
    for region in models:
        assert pickle.loads(pickle.dumps(region)) == region
        # Kernels are shared by the layers: their number does not grow with the model.
        assert len([k for k in region.kernels() if isinstance(k, LoopNest)]) <= 12
        assert set(region.vocabulary()) <= VOCABULARY


def test_llama_bfloat16_is_as_near_as_torch_bfloat16() -> None:
    model = llama(torch.bfloat16)
    ids = torch.randint(0, 300, (1, 16))
    exact = copy.deepcopy(model).float()(ids).logits
    host = model(ids).logits.float()
    chip = torch.compile(model.to(P), backend=P)(ids.to(P)).logits.cpu().float()
    assert (chip - exact).abs().mean() <= (host - exact).abs().mean()


def test_masked_attention_keeps_grouped_heads(executor: HostExecutor) -> None:
    model = llama()
    ids = torch.randint(3, 300, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    compiled = torch.compile(model.to(P), backend=P)
    got = compiled(ids.to(P), attention_mask=mask.to(P)).logits.cpu()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[0, 3:], expected[0, 3:], rtol=1e-4, atol=1e-4)
    calls = [s for s in largest(executor).steps if str(s.kernel).startswith("sdpa")]
    assert [str(v.sizes[1]) for v in calls[0].args[1:4]] == ["4", "2", "2"]
    assert calls[0].args[4].dtype == "bool"


@pytest.mark.parametrize("how", ["compile", "wrapped"])
def test_generate(how: str) -> None:
    """`torch.compile(model).generate` runs the uncompiled model, operation by operation."""
    model = llama(layers=1)
    ids = torch.randint(3, 300, (1, 5))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model.to(P)
    if how == "compile":
        model.compile(backend=P)
    runner = torch.compile(model, backend=P) if how == "wrapped" else model
    mask = torch.ones_like(ids).to(P)
    assert torch.equal(runner.generate(ids.to(P), attention_mask=mask, **options).cpu(), expected)
    assert torch.pagoda.fallbacks() == {}


def test_model_on_the_cpu_is_refused() -> None:
    compiled = torch.compile(torch.nn.Linear(2, 2), backend=P)
    with pytest.raises(Exception) as error:
        compiled(torch.ones(1, 2))
    assert (
        'torch.compile(..., backend="pagoda") compiles for device "pagoda", but the model or its '
        'inputs are on the CPU. Call model.to("pagoda") first, and move the inputs with '
        '.to("pagoda").'
    ) in str(error.value)


def gathered(x: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return x[i, j] * 2


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: torch.nn.functional.unfold(x, 3, padding=1),
        lambda x: torch.nn.functional.interpolate(x, scale_factor=2),
        lambda x: torch.nn.functional.interpolate(x, size=(7, 5), mode="bilinear"),
    ],
    ids=["unfold", "nearest", "bilinear"],
)
@torch.enable_grad()
def test_several_indices_from_memory_in_training(forward) -> None:
    """Loop bodies with more than one indirect index, forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    expected = forward(x)
    weight = torch.randn_like(expected)
    expected.backward(weight)
    twin = x.detach().to(P).requires_grad_()
    got = torch.compile(forward, backend=P)(twin)
    got.backward(weight.to(P))
    torch.testing.assert_close(got.detach().cpu(), expected.detach())
    torch.testing.assert_close(twin.grad.cpu(), x.grad)


def test_two_index_tensors() -> None:
    x, i, j = torch.randn(4, 6), torch.randint(0, 4, (5,)), torch.randint(0, 6, (5,))
    got = torch.compile(gathered, backend=P)(x.to(P), i.to(P), j.to(P))
    assert torch.equal(got.cpu(), gathered(x, i, j))


def test_unsupported_operation_is_named() -> None:
    compiled = torch.compile(lambda x: torch.linalg.inv(x) + 1, backend=P)
    with pytest.raises(Exception) as error:
        compiled(torch.eye(3).to(P))
    assert "operation linalg_inv_ex is not supported on device pagoda" in str(error.value)


def test_describe(executor: HostExecutor) -> None:
    torch.compile(lambda x: torch.relu(x) + 1, backend=P)(torch.randn(3, 4).to(P))
    (region,) = executor.regions.values()
    tensor = "float32[3, 4] strides [4, 1]"
    assert region.describe().splitlines()[1:] == [
        f"  argument 0: arg0: {tensor}",
        f"  0: nest0(arg0: {tensor}; buf0: {tensor})  # add.Tensor, relu",
        f"  result 0: buf0: {tensor}",
        "",
        "nest0: loop_nest(p0: read float32, p1: write float32; )",
        "for i0 in 12:",
        "  %0 = load p0[i0] : float32",
        "  %1 = const 0.0 : float32",
        "  %2 = maximum %0 %1 : float32",
        "  %3 = const 1.0 : float32",
        "  %4 = add %2 %3 : float32",
        "  store p1[i0] = %4",
    ]


def dtypes(executor: HostExecutor) -> dict[str, list[str]]:
    """Of the largest region, by kind of buffer."""
    found: dict[str, list[str]] = {}
    for buffer in largest(executor).buffers:
        found.setdefault(buffer.kind, []).append(buffer.dtype)
    return found


def test_a_residual_stream_is_kept_in_float32(executor: HostExecutor) -> None:
    """It goes from nest to nest; what the products read stays bfloat16."""
    torch.manual_seed(0)
    depth = 16
    w = (torch.randn(depth, 8, 8) / 64).bfloat16()

    def layers(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for k in range(depth):
            x = x + torch.rms_norm(x, (8,)) @ w[k]
        return torch.rms_norm(x, (8,)).float()

    x = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    got = torch.compile(layers, backend=P)(x.to(P), w.to(P)).cpu()
    assert "float32" in dtypes(executor)["temporary"]
    products = [s for s in largest(executor).steps if not isinstance(s.kernel, LoopNest)]
    operands = [[view.dtype for view in step.args[1:]] for step in products]
    assert operands == [["bfloat16"] * 2] * depth
    exact = layers(x.float(), w.float())
    assert 2 * torch.dist(got, exact) < torch.dist(layers(x, w), exact)


def test_a_product_that_goes_on_in_float32_is_not_rounded(executor: HostExecutor) -> None:
    def logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x @ w).float() * 3

    x, w = torch.randn(4, 64).bfloat16(), torch.randn(64, 5).bfloat16()
    got = torch.compile(logits, backend=P)(x.to(P), w.to(P)).cpu()
    assert dtypes(executor)["temporary"] == ["float32"]
    torch.testing.assert_close(got, logits(x.float(), w.float()))
