"""The torch device "pagoda": storage, factories, views, copies, and what modules need of them.

Views are torch's own CPU view kernels, redispatched on device storage (they only compute sizes and
strides). Copies between host and device move bytes. Everything that computes goes to
`pagoda.pytorch.eager`, which compiles it for the chip.
"""

from __future__ import annotations

import importlib
import math
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pagoda.compiler.region import Allocator, Executor
from pagoda.pytorch import autocast, mixing, streams
from pagoda.pytorch.chip_queries import ChipQueries
from pagoda.pytorch.storage import HostAllocator, device_bytes, host_alias
from pagoda.runtime import Device
from pagoda.runtime.memory import OutOfDeviceMemory
from pagoda.runtime.work_queue import Queue

aten = torch.ops.aten
NAME = "pagoda"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutograd


class State:
    """What the device is made of at the moment; see `use`. Both None: nothing is open yet."""

    def __init__(self) -> None:
        self.allocator: Allocator | None = None
        self.executor: Executor | None = None
        self.fallbacks: Counter[str] = Counter()


state = State()


def use(executor: Executor | None = None, allocator: Allocator | None = None) -> None:
    """Gives the device the executor that runs its regions, and the allocator of its memory.

    Tensors made before keep the memory they have, and give it back to the allocator they got it
    from; an executor that only accepts its own memory must be set before any tensor is made. Until
    an allocator is given, tensors lie in ordinary host memory. What is queued for the executor
    before is finished, and what failed of that raised, when it returns.
    """
    before: Queue | None = getattr(state.executor, "queue", None)
    importlib.import_module("pagoda.pytorch.inductor")  # registers the torch.compile backend
    if executor is not None:
        state.executor = executor
    if allocator is not None:
        state.allocator = allocator
    elif state.allocator is None:
        state.allocator = HostAllocator()
    if before is not None:
        before.synchronize()


def _open_default() -> None:
    if state.executor is None and state.allocator is None:
        importlib.import_module("pagoda.pytorch.chip").use_chip()


def _allocator() -> Allocator:
    """The allocator; without one, the default chip is opened."""
    _open_default()
    assert state.allocator is not None
    return state.allocator


def executor() -> Executor:
    """The executor; without it and an allocator, the default chip is opened. Raises RuntimeError
    if only an allocator was given."""
    _open_default()
    if state.executor is None:
        raise RuntimeError(
            'device "pagoda" cannot compute: it needs an executor, and none was set. '
            "Call pagoda.pytorch.use(executor=...) first."
        )
    return state.executor


def opened() -> Device:
    """The runtime device; without one, the default chip is opened. Raises RuntimeError if tensors
    lie in host memory."""
    allocator = _allocator()
    if isinstance(allocator, HostAllocator):
        raise RuntimeError(  # noqa: TRY004 - the state is wrong, not an argument
            "device pagoda lies in host memory now, not on a chip, so there is no chip to ask. "
            "Call pagoda.use_chip first."
        )
    return allocator.device


class _Module(ChipQueries, streams.Streams, types.ModuleType):
    """`torch.pagoda`."""

    def _opened(self) -> Device:
        return opened()

    class device:
        """Context manager; there is one device, so it does nothing."""

        def __init__(self, device: Any = None) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *exc: object) -> bool:
            return False

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed(self, seed: int) -> None:
        """Seeds what the device draws from: the host's default generator, which gives every
        compiled call its Philox seeds."""
        torch.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()

    # Dynamo would compile these two, and cannot inside of no_dispatch, where torch calls them.
    @torch._disable_dynamo
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @torch._disable_dynamo
    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def fallbacks(self) -> dict[str, int]:
        """Operations computed on the host instead of the chip since the last `reset_fallbacks`:
        name -> count. Only those of a short allowlist ever are (`pagoda.pytorch.eager`)."""
        return dict(state.fallbacks)

    def reset_fallbacks(self) -> None:
        state.fallbacks.clear()

    def use_chip(self, chip: Any = None) -> Any:
        """See `pagoda.pytorch.chip.use_chip`."""
        return importlib.import_module("pagoda.pytorch.chip").use_chip(chip)

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass


def _contiguous_strides(size: Sequence[int]) -> list[int]:
    strides = [1] * len(size)
    for d in range(len(size) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(size[d + 1], 1)
    return strides


def _describe(dtype: torch.dtype, size: Sequence[int]) -> str:
    return f"a {str(dtype).removeprefix('torch.')} tensor of shape {list(map(int, size))}"


def _as_strided(t: torch.Tensor, size, stride, storage_offset=None) -> torch.Tensor:
    return aten.as_strided.default.redispatch(_CPU, t, size, stride, storage_offset)


def _require_the_one(device: torch.device | None) -> None:
    if device is not None and device.index:
        raise RuntimeError(
            f"device {str(device)!r}: its number must be below torch.pagoda.device_count(), which "
            f'is 1; use "{NAME}"'
        )


def empty_strided(
    size, stride, *, dtype=None, layout=None, device=None, pin_memory=None
) -> torch.Tensor:
    """A new uninitialised device tensor; the storage ends with its last element."""
    _require_the_one(device)
    dtype = dtype or torch.get_default_dtype()
    count = 0
    if all(size):
        count = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    try:
        memory = device_bytes(count * dtype.itemsize, _allocator())
    except OutOfDeviceMemory as error:
        raise OutOfDeviceMemory(f"{_describe(dtype, size)}: {error}") from None
    return _as_strided(aten.view.dtype.redispatch(_CPU, memory, dtype), size, stride, 0)


def _empty(
    size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None
) -> torch.Tensor:
    _require_the_one(device)
    if memory_format in (None, torch.contiguous_format):
        return empty_strided(size, _contiguous_strides(size), dtype=dtype)
    like = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)
    return empty_strided(like.shape, like.stride(), dtype=like.dtype)


def _resize_(t: torch.Tensor, size, *, memory_format=None) -> torch.Tensor:
    storage = t.untyped_storage()
    nbytes = math.prod(size) * t.dtype.itemsize
    if nbytes > storage.nbytes() - t.storage_offset() * t.dtype.itemsize:
        storage = device_bytes(nbytes, _allocator()).untyped_storage()
    return aten.set_.source_Storage_storage_offset.redispatch(
        _CPU, t, storage, 0, list(size), _contiguous_strides(size)
    )


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking=False) -> torch.Tensor:
    on_device = source.device.type == NAME and target.device.type == NAME
    if on_device and not (target.numel() <= 1 and source.dtype == target.dtype):
        from pagoda.pytorch import eager

        eager.run(aten.copy_.default, (target, source.expand(target.shape)), {})
    elif not ((non_blocking or on_device) and streams.queue_copy(source, target)):
        host_alias(target).copy_(host_alias(source, writes=False))
    return target


def _copy_from_and_resize(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if target.shape != source.shape:
        target.resize_(source.shape)
    return _copy_from(source, target)


def _local_scalar_dense(t: torch.Tensor) -> bool | int | float:
    return host_alias(t, writes=False).item()


def _to_copy(t: torch.Tensor, **options: Any) -> torch.Tensor:
    """torch's own would take page-locked memory for what comes to the CPU without blocking."""
    place = options.get("device")
    if place is None or place.type != "cpu":
        return aten._to_copy.default._op_dk(_EXPLICIT, t, **options)
    non_blocking = options.pop("non_blocking", False)
    return _copy_from(t, torch.empty_like(t, **options), non_blocking)


def _redispatched(op: Any) -> Callable:
    def view(*args: Any, **kwargs: Any) -> Any:
        return op.redispatch(_CPU, *args, **kwargs)

    return view


_VIEWS = {
    "view": aten.view.default,
    "_reshape_alias": aten._reshape_alias.default,
    "view.dtype": aten.view.dtype,
    "unfold": aten.unfold.default,
    "set_.source_Storage_storage_offset": aten.set_.source_Storage_storage_offset,
    "set_.source_Tensor": aten.set_.source_Tensor,
    "set_.source_Storage": aten.set_.source_Storage,
    "set_": aten.set_.default,
}


def _register_operations() -> list[torch.library.Library]:
    """Libraries must stay alive as long as their registrations.

    What torch calls here is out of bounds for Dynamo: inside a compiled module whose forward runs
    uncompiled, it would else take our code for the user's and compile that.
    """
    library = torch.library.Library("aten", "IMPL")
    for name, function in {
        "empty.memory_format": _empty,
        "empty_strided": empty_strided,
        "as_strided": _as_strided,
        "resize_": _resize_,
        "_copy_from": _copy_from,
        "_copy_from_and_resize": _copy_from_and_resize,
        "_local_scalar_dense": _local_scalar_dense,
        "_to_copy": _to_copy,
        **{name: _redispatched(op) for name, op in _VIEWS.items()},
    }.items():
        library.impl(name, torch._disable_dynamo(function), "PrivateUse1")
    rest = torch.library.Library("_", "IMPL")

    def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
        from pagoda.pytorch import eager

        return eager.run(op, args, kwargs)

    rest.fallback(torch._disable_dynamo(compute), "PrivateUse1")
    return [library, rest]


def _storage_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _new_storage(nbytes: int) -> torch.UntypedStorage:
    return device_bytes(nbytes, _allocator()).untyped_storage()


def _patch_storage() -> None:
    """`torch.UntypedStorage` on this device would need a C++ allocator: it would crash."""
    new, clone = torch._C.StorageBase.__new__, torch.UntypedStorage.clone

    def _new(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        sized = not args or isinstance(args[0], int)
        if device is not None and torch.device(device).type == NAME and sized:
            return _new_storage(args[0] if args else 0)
        placed = {} if device is None else {"device": device}
        return new(cls, *args, **placed, **kwargs)

    def _clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        return _to_device(self) if self.device.type == NAME else clone(self)

    def _to_device(self: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        copied = _new_storage(self.nbytes())
        source, target = _storage_bytes(self), _storage_bytes(copied)
        host_alias(target).copy_(host_alias(source, writes=False))
        return copied

    def _pagoda(self: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        return self if self.device.type == NAME else _to_device(self)

    torch.UntypedStorage.__new__ = staticmethod(_new)
    torch.UntypedStorage.clone = _clone
    torch.UntypedStorage.pagoda = _pagoda


def _named(module: torch.nn.Module, tensor: torch.Tensor) -> str:
    """"parameter 'fc.weight', ": which tensor of the module it is."""
    for kind, members in (
        ("parameter", module.named_parameters()), ("buffer", module.named_buffers()),
    ):  # fmt: skip
        for name, member in members:
            if member is tensor:
                return f"{kind} {name!r}, "
    return ""


def _patch_module_apply() -> None:
    """`Module.to` and `Module.cpu` move a parameter that several modules share once, and keep it
    shared.

    torch makes a new Parameter per owner when the device changes the tensor type, which would
    store tied weights twice and train them apart.
    """
    apply = torch.nn.Module._apply

    def _apply(self: torch.nn.Module, fn: Callable, recurse: bool = True) -> torch.nn.Module:
        if getattr(fn, "_moves_once", False):
            return apply(self, fn, recurse)
        moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def once(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in moved:
                try:
                    moved[id(tensor)] = (tensor, fn(tensor))
                except OutOfDeviceMemory as error:
                    raise OutOfDeviceMemory(f"{_named(self, tensor)}{error}") from None
            return moved[id(tensor)][1]

        once._moves_once = True  # type: ignore[attr-defined]
        owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append((module, name))
        apply(self, once, recurse)
        for (first, name), *others in owners.values():
            for module, other in others:
                module._parameters[other] = first._parameters[name]
        return self

    torch.nn.Module._apply = _apply


def _patch_record_stream() -> None:
    """There is nothing to record: queued work keeps the memory that it uses."""
    record = torch.Tensor.record_stream

    def _record_stream(self: torch.Tensor, stream: Any) -> None:
        if self.device.type != NAME:
            record(self, stream)

    torch.Tensor.record_stream = _record_stream


def _patch_printing() -> None:
    """Tensors are printed from a host copy, not by running a dozen small kernels."""
    from torch import _tensor_str

    show = _tensor_str._tensor_str

    def _show(self: torch.Tensor, indent: int) -> str:
        return show(self.cpu() if self.device.type == NAME else self, indent)

    _tensor_str._tensor_str = _show


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module("torch.pagoda"))
    libraries = [*_register_operations(), *autocast.register(), mixing.register()]
    _patch_storage()
    _patch_module_apply()
    _patch_record_stream()
    _patch_printing()
    # The fused encoder layer that nn.TransformerEncoderLayer takes for inference is one operation
    # that no decomposition opens.
    torch.backends.mha.set_fastpath_enabled(False)
    return libraries


_libraries = _register()
