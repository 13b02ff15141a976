"""`pagoda.detect_anomaly`: stops at the first kernel that writes NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pagoda.pytorch import device
from pagoda.pytorch.chip import ChipExecutor
from pagoda.pytorch.places import user_place
from pagoda.runtime.anomaly import AnomalyCheck, AnomalyError

__all__ = ["AnomalyError", "detect_anomaly"]

@contextmanager
def detect_anomaly(infinities: bool = False) -> Iterator[None]:
    """Inside the `with` block the first kernel that writes NaN (`infinities`: or infinity) raises
    AnomalyError: its name, the torch operation, layer and line it comes from, tensor and index.

    For eager and compiled code, forward and backward. Each kernel is launched on its own and its
    results are read back, so it is slow and its cycles are not those of normal runs; in a stream,
    too, an operation is finished when its call returns. Results are the same. Opens the default
    chip if none is open.
    """
    executor = device.executor()
    if not isinstance(executor, ChipExecutor):
        raise RuntimeError(  # noqa: TRY004 - the state is wrong, not an argument
            f"detect_anomaly: device pagoda runs on {type(executor).__name__}, not on a chip, so "
            "there are no kernels to look at. Call pagoda.use_chip first."
        )
    opened = executor.device
    opened.queue.finish()
    before, opened.anomaly = opened.anomaly, AnomalyCheck(infinities, lambda: user_place()())
    try:
        yield
    finally:
        opened.anomaly = before
