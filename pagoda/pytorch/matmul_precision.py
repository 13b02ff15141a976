"""How exactly torch's user wants float32 operands multiplied."""

from __future__ import annotations

import torch

from pagoda.compiler.region import Precision

_NEW_WORDS: dict[str, Precision] = {"tf32": "high", "bf16": "medium"}


def matmul_precision() -> Precision:
    """`torch.get_float32_matmul_precision()`: "highest" unless the user says otherwise.

    Where torch refuses to tell, because `torch.backends` was set instead, the setting there that is
    for all backends counts: tf32 (10 bits) is "high", bf16 "medium", everything else "highest".
    Compiled functions take up a change to or from "highest" at their next call; Dynamo does not
    tell "high" from "medium" (`torch._dynamo.reset()` makes them compile anew).
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return _NEW_WORDS.get(torch.backends.fp32_precision, "highest")
