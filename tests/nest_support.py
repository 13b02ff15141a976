"""Loop nests for tests, and running their kernels beside the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tile_ir_oracle import run

from pagoda.compiler.loop_nest import LoopNest
from pagoda.compiler.loop_nest_oracle import (
    STORAGE,
    bfloat16_to_float32,
    evaluate,
    float32_to_bfloat16,
)
from pagoda.compiler.nest_lowering import Blocks, LoweredNest, lower


def random_array(dtype: str, size: int, seed: int = 0, limit: int = 100) -> np.ndarray:
    """A flat array in storage type: normal floats, integers of 0 ... limit - 1."""
    random = np.random.default_rng(seed)
    if dtype == "bfloat16":
        return float32_to_bfloat16(random.standard_normal(size, np.float32))
    if dtype == "float32":
        return random.standard_normal(size, np.float32)
    return random.integers(0, 2 if dtype == "bool" else limit, size).astype(STORAGE[dtype])


def execute(
    lowered: LoweredNest, arrays: Sequence[np.ndarray], symbols: Sequence[int], cores: int = 1
) -> list[np.ndarray]:
    """What the kernel leaves in copies of the arrays."""
    copies = [array.copy() for array in arrays]
    tensors = {f"p{k}": copy.view(np.uint8) for k, copy in enumerate(copies)}
    scalars = {f"n{k}": int(value) for k, value in enumerate(symbols)}
    run(lowered.kernel, tensors, scalars, cores=cores)
    return copies


def reference(nest: LoopNest, arrays: Sequence[np.ndarray], symbols: Sequence[int]):
    copies = [array.copy() for array in arrays]
    evaluate(nest, copies, symbols)
    return copies


def assert_close(nest: LoopNest, found, wanted, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    for k, param in enumerate(nest.params):
        a, b = found[k], wanted[k]
        if param.dtype == "bfloat16":
            a, b = bfloat16_to_float32(a), bfloat16_to_float32(b)
            np.testing.assert_allclose(a, b, rtol=8e-3, atol=1e-3, err_msg=f"p{k}")
        elif param.dtype == "float32":
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=f"p{k}")
        else:
            np.testing.assert_array_equal(a, b, err_msg=f"p{k}")


def check(
    nest: LoopNest,
    arrays: Sequence[np.ndarray],
    symbols: Sequence[int] = (),
    blocks: Sequence[tuple[int, int]] = ((3, 64), (16, 128), (64, 2048)),
    cores: Sequence[int] = (1, 3),
    **tolerance: float,
) -> list[np.ndarray]:
    """Runs the nest with every block size and number of cores: close to the oracle, and the same
    bits every time."""
    wanted = reference(nest, arrays, symbols)
    first = None
    for rows, cols in blocks:
        lowered = lower(nest, Blocks(rows, cols))
        for count in cores:
            found = execute(lowered, arrays, symbols, count)
            assert_close(nest, found, wanted, **tolerance)
            bits = [f.tobytes() for f in found]
            first = first or bits
            assert bits == first, f"blocks {rows} x {cols}, {count} cores: other bits"
    return found
