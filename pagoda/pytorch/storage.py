"""Device memory as torch storage: plain `torch.Tensor`s on device "pagoda" over allocator memory.

PyTorch lets no Python code register an allocator for its PrivateUse1 device. But a DLPack capsule
of device type `kDLExtDev` becomes an ordinary strided tensor on that device, whose storage is the
capsule's memory and whose last reference calls the capsule's deleter. The capsule is numpy's, with
the device type changed: numpy's deleter drops a reference to an array, which drops its owner, whose
finalizer is the allocator's `free`. A deleter written in Python would not do: torch drops tensors
also while an exception is on its way, and only finalizers leave that exception alone.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from pagoda.compiler.region import Allocator
from pagoda.pytorch import streams

_KDL_EXT_DEV = 12
_DEVICE_TYPE_OFFSET = ctypes.sizeof(ctypes.c_void_p)  # DLTensor: data, then the device's type

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class HostAllocator:
    """Ordinary host memory, 64-byte aligned: what the device uses until a runtime gives its own."""

    def __init__(self) -> None:
        self._live: dict[int, np.ndarray] = {}

    def allocate(self, nbytes: int) -> int:
        memory = np.empty(max(nbytes, 1) + 63, np.uint8)
        pointer = (memory.ctypes.data + 63) // 64 * 64
        self._live[pointer] = memory
        return pointer

    def free(self, pointer: int) -> None:
        del self._live[pointer]


class _Memory:
    """Owns a block of an allocator; numpy arrays over it keep it alive."""

    live = 0

    def __init__(self, nbytes: int, allocator: Allocator) -> None:
        self._allocator = allocator
        self._pointer = allocator.allocate(max(nbytes, 1))
        self.__array_interface__ = {
            "version": 3,
            "data": (self._pointer, False),
            "shape": (nbytes,),
            "typestr": "|u1",
        }
        _Memory.live += 1

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):  # else `allocate` has raised
            _Memory.live -= 1
            self._allocator.free(self._pointer)


def live_buffers() -> int:
    """Number of device storages alive (tests look for leaks)."""
    return _Memory.live


def device_bytes(nbytes: int, allocator: Allocator) -> torch.Tensor:
    """A one-dimensional uint8 tensor on the device that owns `nbytes` of new memory."""
    capsule = np.asarray(_Memory(nbytes, allocator)).__dlpack__()
    managed = _capsule_pointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(managed + _DEVICE_TYPE_OFFSET).value = _KDL_EXT_DEV
    return torch.utils.dlpack.from_dlpack(capsule)


def host_alias(tensor: torch.Tensor, writes: bool = True) -> torch.Tensor:
    """A CPU tensor over the same bytes as a device tensor; a CPU tensor is returned unchanged.

    For copies between host and device only; nothing is computed through it but what
    `fallbacks` counts. It keeps the device tensor alive. Waits for queued work that uses the
    tensor; without `writes`, for what writes it. Raises what failed of that.
    """
    streams.wait_for(tensor, writes)
    return raw_alias(tensor)


def raw_alias(tensor: torch.Tensor) -> torch.Tensor:
    """As `host_alias`, but waits for nothing."""
    if tensor.device.type == "cpu":
        return tensor
    storage = tensor.untyped_storage()
    nbytes = storage.nbytes() // tensor.dtype.itemsize * tensor.dtype.itemsize
    if nbytes == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_uint8 * nbytes).from_address(storage.data_ptr())
    memory.keep = tensor  # frombuffer holds `memory`, which holds the storage
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
