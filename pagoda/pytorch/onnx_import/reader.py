"""ONNX files: read, checked, brought to one opset, dimensions given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
import onnx.version_converter
import torch

from pagoda.compiler.errors import ModelFileError
from pagoda.pytorch.onnx_import.operators import Refused
from pagoda.pytorch.onnx_import.types import type_of

OLDEST, NEWEST = 13, 28  # opsets whose operators the table holds


@dataclass(frozen=True)
class Input:
    """An input of a model. shape: a dimension that the file leaves open is its name, or None."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        if self.shape is None:
            return f"{self.name}: {kind} of any shape"
        return f"{self.name}: {kind}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"


def read(path: Path) -> onnx.ModelProto:
    """The model in a file, of an opset from OLDEST to NEWEST. Raises ModelFileError."""
    try:
        model = onnx.load(path)
    except FileNotFoundError as error:
        raise ModelFileError(_missing(path, error)) from error
    except onnx.checker.ValidationError as error:  # of external data
        raise ModelFileError(_missing(path, error)) from error
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from error
    except Exception as error:
        raise ModelFileError(
            f"{path}: must be an ONNX model (a protobuf message ModelProto), but it cannot be "
            f"decoded; the file may be damaged or of another kind: export or download it again"
        ) from error
    if not model.graph.node and not model.graph.output:
        raise ModelFileError(
            f"{path}: must be an ONNX model, but holds no graph; the file may be damaged or of "
            "another kind: export or download it again"
        )
    return converted(model, str(path))


def _missing(path: Path, error: Exception) -> str:
    if not path.exists():
        return f"{path}: no such file; check the path"
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return (
        f"{path}: keeps weights in files of their own (external data), and one is missing or "
        f"outside of its folder: {reason}; put them beside the model"
    )


def converted(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with functions inlined, in a known opset. Raises ModelFileError."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if version is None:
        domains = ", ".join(sorted(o.domain for o in model.opset_import)) or "none"
        raise ModelFileError(
            f"{name}: must use ONNX's own operators, but imports only the domains {domains}; "
            "export it with standard operators"
        )
    if version < OLDEST:
        model = _upgraded(model, name, version)
    elif version > NEWEST:
        raise ModelFileError(
            f"{name}: opset {version}; Pagoda reads ONNX opsets {OLDEST} to {NEWEST} and converts "
            f"older ones: export the model with opset_version={NEWEST}, or convert it with "
            "onnx.version_converter"
        )
    return model


def _upgraded(model: onnx.ModelProto, name: str, version: int) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(model, OLDEST)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelFileError(
            f"{name}: opset {version} could not be converted to {OLDEST}, the oldest that Pagoda "
            f"reads ({reason[0] if reason else type(error).__name__}); export the model again with "
            f"opset_version from {OLDEST} to {NEWEST}"
        ) from error


def inputs_of(graph: onnx.GraphProto, name: str) -> list[Input]:
    """The inputs that a caller gives: those without an initializer. Raises ModelFileError."""
    given = {tensor.name for tensor in graph.initializer}
    given |= {tensor.values.name for tensor in graph.sparse_initializer}
    found = []
    for value in graph.input:
        if value.name in given:
            continue
        kind = value.type
        if kind.WhichOneof("value") != "tensor_type":
            raise ModelFileError(
                f"{name}: input {value.name!r} must be a tensor, but is a "
                f"{(kind.WhichOneof('value') or 'value without type').removesuffix('_type')}; "
                "export the model with tensors as inputs"
            )
        tensor = kind.tensor_type
        try:
            dtype = type_of(tensor.elem_type)
        except Refused as error:
            raise ModelFileError(f"{name}: input {value.name!r}: {error}") from error
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or None
                for d in tensor.shape.dim
            )
        found.append(Input(value.name, dtype, shape))
    return found


def concrete(
    inputs: Sequence[Input],
    dims: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
    name: str,
) -> dict[str, tuple[int, ...]]:
    """Every input's shape. Raises ModelFileError for one that is not known, or contradicts."""
    shown = "; ".join(map(str, inputs)) or "none"
    for given in shapes:
        if given not in {i.name for i in inputs}:
            raise ModelFileError(f"{name}: has no input {given!r}; its inputs are {shown}")
    open_dims = {n for i in inputs for n in i.shape or () if isinstance(n, str)}
    for given in dims:
        if given not in open_dims:
            known = ", ".join(sorted(open_dims)) or "none"
            raise ModelFileError(
                f"{name}: has no open dimension {given!r}; its open dimensions are {known}"
            )
    found: dict[str, tuple[int, ...]] = {}
    for one in inputs:
        if one.name in shapes:
            found[one.name] = _matching(one, tuple(shapes[one.name]), name)
            continue
        stated = (None,) if one.shape is None else one.shape
        shape = [dims.get(n, n) if isinstance(n, str) else n for n in stated]
        unknown = [n for n in shape if not isinstance(n, int)]
        if unknown:
            named = [n for n in unknown if n]
            remedy = " ".join(f"--dim {n}=SIZE" for n in dict.fromkeys(named))
            raise ModelFileError(
                f"{name}: the file leaves the shape of its input {one} open; give "
                + (f"{remedy}, or " if remedy and len(named) == len(unknown) else "")
                + f"the input itself: --input {one.name}=FILE.npy"
            )
        found[one.name] = tuple(int(n) for n in shape)  # type: ignore[arg-type]
    return found


def _matching(one: Input, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    fits = one.shape is None or (
        len(shape) == len(one.shape)
        and all(not isinstance(n, int) or n == m for n, m in zip(one.shape, shape, strict=True))
    )
    if not fits:
        raise ModelFileError(
            f"{name}: the input given has shape {list(shape)}, but the model takes {one}; give an "
            "array of that shape"
        )
    return shape
