"""From a Llama-class configuration to the two regions of its steps, through torch.compile.

The unchanged transformers model is traced with its weights and its key/value cache as uninitialised
memory, so tracing costs no arithmetic: an executor in place of the chip's keeps what it is given.
By their addresses the tensors are recognised again; what is left is plain data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pagoda.compiler.region import LibraryCall, Region, TensorArg
from pagoda.pytorch import device
from pagoda.pytorch.storage import HostAllocator, host_alias

from .attention import NAME as ATTENTION
from .cache import KVCache, KVLayer
from .program import SHIFT, Argument, Traced

TRACED_TOKENS, TRACED_POSITION = 7, 11  # any values, but no two sizes of the graph may be equal


class _Recorder:
    """An executor that computes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Region, list[TensorArg | int]]] = []

    def run(
        self,
        region: Region,
        inputs: Sequence[TensorArg | int],
        outputs: Sequence[TensorArg],
        symbols: Mapping[str, int],
    ) -> None:
        self.calls.append((region, list(inputs)))


@contextmanager
def _recording():
    """The device with host memory and a `_Recorder`; what it was before comes back afterwards."""
    before = device.state.executor, device.state.allocator
    recorder = _Recorder()
    device.use(recorder, HostAllocator())
    try:
        yield recorder
    finally:
        device.state.executor, device.state.allocator = before


def _empty_model(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model on the device, weights uninitialised, rotary frequencies in float32."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device.NAME)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device.NAME)
    model.set_attn_implementation(ATTENTION)
    return model.requires_grad_(False).eval()


def trace(
    config: LlamaConfig,
    capacity: int,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[str], None] = lambda stage: None,
) -> Traced:
    """The prefill region (any number of tokens from 2 on) and the decode region (1 token) of a
    model whose cache holds `capacity` positions.

    progress: called with the name of each stage when it begins.
    """
    with _recording() as recorder, torch.no_grad():
        model = _empty_model(config, dtype)
        cache = KVCache(config, capacity, dtype, device.NAME)
        known = _addresses(model, cache)
        for layer in cache.layers:
            torch._dynamo.mark_static(layer.keys)
            torch._dynamo.mark_static(layer.values)

        def step(ids: torch.Tensor, shifted: int) -> torch.Tensor:
            """`shifted`: the position of the first token, plus SHIFT."""
            length = shifted - SHIFT
            layers = [KVLayer(layer.keys, layer.values, length) for layer in cache.layers]
            return model(
                input_ids=ids,
                past_key_values=KVCache.of(layers),
                use_cache=True,
                logits_to_keep=1,
            ).logits

        regions = []
        # A session runs the regions and nothing else. So what it would leave out or take from the
        # trace is counted here: operations that the host computes while a step is traced and run.
        fallbacks: Counter[str] = Counter()
        # Python floats (epsilons) are constants, not inputs.
        with torch._dynamo.config.patch(specialize_float=True):
            for stage, count in (("prefill", TRACED_TOKENS), ("decode", 1)):
                progress(f"tracing {stage}")
                ids = torch.zeros(1, count, dtype=torch.int64).to(device.NAME)
                known[ids.data_ptr()] = Argument("ids")
                compiled = torch.compile(step, backend="pagoda", dynamic=True, fullgraph=True)
                host, calls = Counter(device.state.fallbacks), len(recorder.calls)
                compiled(ids, TRACED_POSITION + SHIFT)
                fallbacks += Counter(device.state.fallbacks) - host
                ((region, inputs),) = recorder.calls[calls:]
                arguments = tuple(_argument(each, known) for each in inputs)
                regions.append((_float32_logits(region), arguments))
        torch._dynamo.reset_code(step.__code__)  # it would hold the model
        used = {a.name for _, arguments in regions for a in arguments if a.kind == "weight"}
        buffers = {
            name: host_alias(tensor, writes=False).numpy().copy()
            for name, tensor in model.named_buffers()
            if name in used
        }
    return Traced(*regions[0], *regions[1], buffers, dict(fallbacks))


def _float32_logits(region: Region) -> Region:
    """The region with logits as the last product accumulates them, not rounded to bfloat16: there
    the best tokens often tie (a step is 1/8 at 25)."""
    (logits,) = region.outputs
    number = logits.buffer
    (writer,) = (step for step in region.steps if number in step.writes())
    assert isinstance(writer.kernel, LibraryCall) and writer.kernel.name == "mm", writer
    out, *operands = writer.args
    wide = replace(writer, args=(replace(out, dtype="float32"), *operands))
    buffers = list(region.buffers)
    buffers[number] = replace(buffers[number], dtype="float32")
    return replace(
        region,
        outputs=(replace(logits, dtype="float32"),),
        buffers=tuple(buffers),
        steps=tuple(wide if step is writer else step for step in region.steps),
    )


def _addresses(model: LlamaForCausalLM, cache: KVCache) -> dict[int, Argument]:
    known = {}
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        known[tensor.data_ptr()] = Argument("weight", name)
    for number, layer in enumerate(cache.layers):
        known[layer.keys.data_ptr()] = Argument("keys", layer=number)
        known[layer.values.data_ptr()] = Argument("values", layer=number)
    return known


def _argument(given: TensorArg | int, known: Mapping[int, Argument]) -> Argument:
    if isinstance(given, TensorArg):
        return known[given.pointer]
    return {
        TRACED_TOKENS: Argument("count"),
        TRACED_POSITION + SHIFT: Argument("shifted"),
    }.get(given, Argument("constant", value=given))
