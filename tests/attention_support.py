"""What the tests of attention's kernels share: tensors, views of them, compilation once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from pagoda.compiler.codegen import Blob
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.index_expr import Const
from pagoda.compiler.region import LIBRARY, KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import PRESETS, Chip
from pagoda.isa.numbers import DType

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
TINY, EDGE = PRESETS["tiny"], PRESETS["edge"]
CAR = replace(PRESETS["car"], dram_bytes=1 << 26)
NAMES = {BF16: "bfloat16", F32: "float32", np.dtype(bool): "bool", np.dtype(np.int32): "int32"}
CODES = {BF16: DType.BF16, F32: DType.F32, np.dtype(bool): DType.BOOL}


def view(buffer: int, array: np.ndarray) -> View:
    item = array.itemsize
    laid_out = array if array.size else np.empty(np.maximum(array.shape, 1), array.dtype)
    strides = tuple(Const(stride // item) for stride in laid_out.strides)
    return View(buffer, Const(0), tuple(map(Const, array.shape)), strides, NAMES[array.dtype])


@cache
def blob_of(kernel: Kernel, chip: Chip) -> Blob:
    return compile_kernel(kernel, chip).blob()


@contextmanager
def compiled_once() -> Iterator[None]:
    """Many tests share a kernel; compiling takes longer than running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "compiler_support.compile_kernel",
            lambda kernel, chip: SimpleNamespace(blob=partial(blob_of, kernel, chip)),
        )
        yield


def library_call(
    name: str,
    arrays: tuple[np.ndarray | None, ...],
    causal: bool | str,
    scale: float,
    terms: int,
    dropout: float = 0.0,
) -> KernelCall:
    """A step on arrays, which become buffers 0, 1, ...; of the last ones some may be missing."""
    arrays += (None,) * (len(LIBRARY[name][0]) - len(arrays))
    args = tuple(None if a is None else view(n, a) for n, a in enumerate(arrays))
    attributes = (("causal", causal), ("scale", scale), ("dropout", dropout))
    precision = ("medium", "high", "highest")[terms - 1]
    return KernelCall(LibraryCall(name, attributes[: len(LIBRARY[name][1])], precision), args)


def windowed(array: np.ndarray, found: View) -> np.ndarray:
    """The view's elements, as a numpy view of the array that owns the memory."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    sizes = [int(size.evaluate({})) for size in found.sizes]
    strides = [int(s.evaluate({})) * array.itemsize for s in found.strides]
    memory = owner.reshape(-1, order="A").view(np.uint8)
    return np.ndarray(sizes, array.dtype, memory, start, strides)


def tensors(b=1, h=1, g=1, q=1, s=1, d=16, e=None, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((b, h, q, d), (b, g, s, d), (b, g, s, e or d))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def bool_mask(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5
