"""The torch.compile backend "pagoda": Inductor as front half, a `Region` as result."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends import registry
from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
from torch._inductor import config
from torch._inductor.codegen.common import (
    DeviceOpOverrides,
    register_backend_for_device,
    register_device_op_overrides,
)
from torch._inductor.compile_fx import compile_fx

from pagoda.pytorch import (
    compiled_mixing,
    decompositions,
    device,
    eager,
    guards,
    layouts,
    optimizers,
    qdq,
    scalars,
    tracing,
)
from pagoda.pytorch.graph_pass import BiasPass, GraphPass
from pagoda.pytorch.places import digest
from pagoda.pytorch.scheduling import PagodaScheduling
from pagoda.pytorch.wrapper import RegionWrapper

# Inductor settings for this device, in force only while it compiles for it.
SETTINGS: dict[str, Any] = {
    # The region plans memory itself.
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
    "memory_planning": False,
    # Loops stay as they are: no GPU-shaped rewriting of rows and reductions.
    "loop_ordering_after_fusion": False,
    "loop_reindexing_after_fusion": False,
    "split_reductions": False,
    "unroll_reductions_threshold": 1,
    "online_softmax": False,
    # A value used twice is computed once (fusion then keeps it on the chip where it can).
    "realize_reads_threshold": 0,
    "layout_optimization": False,
    "comprehensive_padding": False,
    "shape_padding": False,
    # Plain single graphs, in this process.
    "graph_partition": False,
    "compile_threads": 1,
    "benchmark_kernel": False,
    # One for the whole process, and constants of a graph are copied by a graph of their own.
    "bundle_triton_into_fx_graph_cache": False,
    "size_asserts": False,
    "alignment_asserts": False,
    "fallback_random": False,
}
SETTINGS = {name: value for name, value in SETTINGS.items() if hasattr(config, name)}


class _Overrides(DeviceOpOverrides):
    def import_get_raw_stream_as(self, name: str) -> str:
        return f"def {name}(_): return 0"

    def set_device(self, device_idx: int) -> str:
        return "pass"

    def synchronize(self) -> str:
        return "pass"

    def device_guard(self, device_idx: int) -> str:
        return "torch._ops.contextlib.nullcontext()"


# What Inductor asks for; graphs are the same for every chip.
_PROPERTIES = types.SimpleNamespace(name=device.NAME, multi_processor_count=1)


class _Interface(DeviceInterface):
    """What Dynamo asks of a device: there is one, without streams."""

    class device:
        def __init__(self, device: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *exc: object) -> bool:
            return False

    class Worker:
        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            return _PROPERTIES

        @staticmethod
        def current_device() -> int:
            return 0

        @staticmethod
        def set_device(device: Any) -> None:
            pass

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def get_raw_stream(device_idx: int) -> int:
        return 0

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return _PROPERTIES

    @staticmethod
    def exchange_device(device: int) -> int:
        return 0

    @staticmethod
    def maybe_exchange_device(device: int) -> int:
        return 0

    @staticmethod
    def is_bf16_supported(including_emulation: bool = False) -> bool:
        return True

    @classmethod
    def is_dtype_supported(cls, dtype: torch.dtype, including_emulation: bool = False) -> bool:
        return True

    @staticmethod
    def get_compute_capability(device: Any = None) -> str:
        return "pagoda"


def compile_graph(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
    """Compiles an FX graph of torch or ATen operations on device pagoda."""
    before = getattr(eager.compiling, "active", False)
    eager.compiling.active = True
    try:
        places = digest(gm.graph)
        settings = SETTINGS | {
            "post_grad_custom_pre_pass": GraphPass(places),
            "post_grad_custom_post_pass": BiasPass(places),
        }
        return compile_fx(
            gm,
            example_inputs,
            inner_compile=scalars.compile_inner,
            config_patches=settings,
            decompositions=decompositions.table(),
        )
    finally:
        eager.compiling.active = before


def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable:
    """`torch.compile(model, backend="pagoda")`. Raises RuntimeError for a model on the CPU."""
    compiled_mixing.require_one_device(gm, example_inputs)
    qdq.use_int8(gm, example_inputs)
    return compile_graph(gm, example_inputs)


def _register() -> None:
    guards.mend()
    tracing.mend()
    compiled_mixing.mend()
    layouts.register()
    optimizers.register()
    register_interface_for_device(device.NAME, _Interface)
    register_device_op_overrides(device.NAME, _Overrides())
    register_backend_for_device(device.NAME, PagodaScheduling, RegionWrapper, None, RegionWrapper)
    if registry._BACKENDS.get(device.NAME) is None:  # else torch loads it by its entry point
        registry.register_backend(backend, name=device.NAME)


_register()
