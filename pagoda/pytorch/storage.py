"""Device memory as torch storage: plain `torch.Tensor`s on device "pagoda" over allocator memory.

PyTorch lets no Python code register an allocator for its PrivateUse1 device. But a DLPack capsule
of device type `kDLExtDev` becomes an ordinary strided tensor on that device, whose storage is the
capsule's memory and whose last reference calls the capsule's deleter: that deleter is the
allocator's `free`.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from pagoda.compiler.region import Allocator

_KDL_EXT_DEV = 12
_KDL_UINT = 1


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [
    ("dl_tensor", _Tensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
]

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


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


# Address of each live capsule -> what must outlive it, and how to give its memory back.
_live: dict[int, tuple[_Managed, object, object, Allocator | None, int]] = {}


@_Deleter
def _release(managed: ctypes._Pointer) -> None:
    entry = _live.pop(ctypes.addressof(managed.contents), None)
    if entry is not None and entry[3] is not None:
        entry[3].free(entry[4])


def live_buffers() -> int:
    """Number of device storages alive (tests look for leaks)."""
    return len(_live)


def _wrap(pointer: int, nbytes: int, keep: object, allocator: Allocator | None) -> torch.Tensor:
    managed = _Managed()
    shape, strides = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
    managed.dl_tensor = _Tensor(
        pointer, _Device(_KDL_EXT_DEV, 0), 1, _DataType(_KDL_UINT, 8, 1), shape, strides, 0
    )
    managed.deleter = _release
    address = ctypes.addressof(managed)
    _live[address] = (managed, (shape, strides), keep, allocator, pointer)
    return torch.utils.dlpack.from_dlpack(_new_capsule(address, b"dltensor", None))


def device_bytes(nbytes: int, allocator: Allocator) -> torch.Tensor:
    """A one-dimensional uint8 tensor on the device that owns `nbytes` of new memory."""
    return _wrap(allocator.allocate(max(nbytes, 1)), nbytes, None, allocator)


def host_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same bytes as a device tensor; a CPU tensor is returned unchanged.

    For copies between host and device only; nothing is computed through it but what
    `fallbacks` counts. It keeps the device tensor alive.
    """
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
