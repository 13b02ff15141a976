"""ONNX models as torch modules.

Enters: an ONNX file, or an `onnx.ModelProto`. Leaves: a `torch.fx.GraphModule` of ordinary torch
operations, so that it runs eagerly, compiled and in training, on any device. Only this folder
imports the onnx package: a file is parsed, checked and converted between opsets by it, what an
operator computes is said here (`operators.TABLE`). May import torch and what `pytorch` may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pagoda.compiler.errors import ModelFileError

__all__ = ["OnnxModel", "load_onnx"]


@dataclass(frozen=True)
class OnnxModel:
    """A model as read. shapes: of the inputs, by name, in the order of the module's arguments;
    dtypes, too. outputs: names of the results."""

    module: torch.fx.GraphModule
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    outputs: tuple[str, ...]


def load_onnx(
    source: str | Path | Any,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> OnnxModel:
    """Read an ONNX model: a path, or an `onnx.ModelProto`.

    The module computes on inputs of the shapes that the file states. dims: sizes of dimensions that
    it leaves open, by name; shapes: of whole inputs, by name. Raises ModelFileError for a file that
    is not a model, an open dimension without a size, and an operator that torch has nothing for.
    """
    try:
        import onnx
    except ImportError as error:
        raise ModelFileError(
            'reading ONNX models needs the package "onnx", which is not installed; '
            "install it with: pip install onnx"
        ) from error
    from pagoda.pytorch.onnx_import import reader
    from pagoda.pytorch.onnx_import.graph import GraphBuilder

    if isinstance(source, onnx.ModelProto):
        name, model = "the ONNX model", reader.converted(source, "the ONNX model")
    else:
        name, model = str(source), reader.read(Path(source))
    inputs = reader.inputs_of(model.graph, name)
    sizes = reader.concrete(inputs, dims or {}, shapes or {}, name)
    module = GraphBuilder(model, name).build(model.graph, inputs, sizes)
    return OnnxModel(
        module, sizes, {one.name: one.dtype for one in inputs},
        tuple(out.name for out in model.graph.output),
    )  # fmt: skip
