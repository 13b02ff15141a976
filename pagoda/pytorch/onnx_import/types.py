"""ONNX's element types and torch's."""

from __future__ import annotations

import torch
from onnx import TensorProto

from pagoda.pytorch.onnx_import.operators import Refused

TYPES = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8, TensorProto.INT16: torch.int16, TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64, TensorProto.UINT8: torch.uint8, TensorProto.BOOL: torch.bool,
    TensorProto.UINT16: torch.uint16, TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
}  # fmt: skip


def type_of(number: int) -> torch.dtype:
    """torch's type. Raises Refused for one that torch lacks."""
    if number not in TYPES:
        name = TensorProto.DataType.Name(number) if number in TensorProto.DataType.values() else "?"
        raise Refused(f"tensors of type {name} are not read; export the model with float32, "
                      "bfloat16 or int8")  # fmt: skip
    return TYPES[number]
