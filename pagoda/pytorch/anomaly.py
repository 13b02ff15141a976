"""`pagoda.detect_anomaly`: stops at the first kernel that writes NaN."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pagoda.pytorch import device
from pagoda.pytorch.chip import ChipExecutor
from pagoda.runtime.anomaly import AnomalyCheck, AnomalyError

__all__ = ["AnomalyError", "detect_anomaly"]

_OWN = (Path(__file__).parents[1], Path(torch.__file__).parent)


@contextmanager
def detect_anomaly(infinities: bool = False) -> Iterator[None]:
    """Inside the `with` block the first kernel that writes NaN (`infinities`: or infinity) raises
    AnomalyError: its name, the torch operation, layer and line it comes from, tensor and index.

    For eager and compiled code, forward and backward. Each kernel is launched on its own and its
    results are read back, so it is slow and its cycles are not those of normal runs. Results are
    the same. Opens the default chip if none is open.
    """
    executor = device.executor()
    if not isinstance(executor, ChipExecutor):
        raise RuntimeError(  # noqa: TRY004 - the state is wrong, not an argument
            f"detect_anomaly: device pagoda runs on {type(executor).__name__}, not on a chip, so "
            "there are no kernels to look at. Call pagoda.use_chip first."
        )
    opened = executor.device
    before, opened.anomaly = opened.anomaly, AnomalyCheck(infinities, _user_line)
    try:
        yield
    finally:
        opened.anomaly = before


def _user_line() -> str:
    """The innermost line outside of this package and torch, as places show it."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_file() and not any(path.is_relative_to(own) for own in _OWN):
            (found,) = traceback.StackSummary.extract([(frame, frame.f_lineno)])
            return f'file "{found.filename}", line {found.lineno}, in {found.name}: {found.line}'
        frame = frame.f_back
    return ""
