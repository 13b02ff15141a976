"""Model files: a Python file or an ONNX file becomes a module with inputs to run it on.

A Python file defines `model`, a module, and `inputs`; or `load()`, which returns the module, its
inputs and perhaps the expected result. Inputs are a tensor, a tuple of arguments, or a dictionary
of named ones.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pagoda.compiler.errors import ModelFileError
from pagoda.pytorch.onnx_import import load_onnx

_DEFINE = (
    "define `model` (a torch.nn.Module) and `inputs` (a tensor, a tuple of arguments or a "
    "dictionary of named ones), or load() -> (module, inputs) or (module, inputs, expected)"
)
_INDEX_LIMIT = 2  # random integers are 0 or 1: indices that any table has


@dataclass
class ModelFile:
    """A module on the CPU, in evaluation mode, and the arguments of one call. expected: tensors
    that the result must equal. inputs, outputs: names of args and results, where it has some."""

    path: Path
    module: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    expected: Any = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def load_model_file(
    path: Path,
    arrays: Mapping[str, np.ndarray] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
) -> ModelFile:
    """Load a .py or .onnx file. arrays: inputs by name (or arr_0, arr_1, ... by position); what an
    ONNX model lacks then is random. dims: open dimensions of an ONNX model. seed: of random weights
    and inputs. Raises ModelFileError."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ModelFileError(f"{path}: {what}; give the path of a .py or .onnx model file")
    torch.manual_seed(seed)
    if path.suffix == ".onnx":
        found = _load_onnx(path, arrays or {}, dims or {})
    elif path.suffix == ".py":
        if dims:
            raise ModelFileError(
                f"{path}: --dim sets open dimensions of ONNX models; a Python file states its "
                "inputs: change them there, or give them with --input"
            )
        found = _load_python(path, arrays or {})
    else:
        raise ModelFileError(
            f"{path}: a model file ends in .py or .onnx, but this one in "
            f"{path.suffix or 'neither'!r}; export the model to ONNX, or write a Python file that "
            "loads it"
        )
    found.module.eval()
    _require_no_float64(found)
    return found


def read_arrays(given: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of `--input` options: FILE.npz or NAME=FILE.npy. Raises ModelFileError."""
    found: dict[str, np.ndarray] = {}
    for one in given:
        name, equals, file = one.rpartition("=")
        path = Path(file)
        try:
            if path.suffix == ".npz" and not equals:
                with np.load(path, allow_pickle=False) as archive:
                    found.update({key: archive[key] for key in archive.files})
                continue
            if path.suffix != ".npy" or not name:
                raise ModelFileError(
                    f"--input {one}: must be FILE.npz or NAME=FILE.npy; write such a file with "
                    "numpy.savez or numpy.save"
                )
            found[name] = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise ModelFileError(f"--input {one}: no such file; check the path") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ModelFileError(
                f"--input {one}: is not a file of numpy arrays; write it with "
                "numpy.savez or numpy.save"
            ) from error
    return found


# ONNX --------------------------------------------------------------------------------------------


def _load_onnx(path: Path, arrays: Mapping[str, np.ndarray], dims: Mapping[str, int]) -> ModelFile:
    shapes = {name: array.shape for name, array in arrays.items()}
    model = load_onnx(path, dims, shapes)
    args = []
    for name, shape in model.shapes.items():
        dtype = model.dtypes[name]
        if name not in arrays:
            args.append(_random(shape, dtype))
            continue
        tensor = _tensor(arrays[name], name, path)
        if tensor.dtype != dtype:
            raise ModelFileError(
                f"{path}: input {name!r} must be {_name(dtype)}, but the array given is "
                f"{_name(tensor.dtype)}; convert it: array.astype({_name(dtype)!r})"
            )
        args.append(tensor)
    return ModelFile(
        path, model.module, tuple(args), inputs=tuple(model.shapes), outputs=model.outputs
    )


def _random(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(tuple(shape)).to(dtype)
    return torch.randint(_INDEX_LIMIT, tuple(shape)).to(dtype)


def _tensor(array: np.ndarray, name: str, path: Path) -> torch.Tensor:
    try:
        return torch.tensor(array)
    except TypeError as error:
        raise ModelFileError(
            f"{path}: input {name!r} must hold numbers, but the array given has type "
            f"{array.dtype}; convert it with array.astype"
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Python ------------------------------------------------------------------------------------------


def _load_python(path: Path, arrays: Mapping[str, np.ndarray]) -> ModelFile:
    space = vars(_imported(path))
    if callable(space.get("load")):
        with _told(path):
            returned = space["load"]()
        parts = returned if isinstance(returned, tuple) else (returned,)
        module, inputs, expected = (*parts, None, None)[:3]
        made = "load() returns"
    elif "model" in space:
        module, inputs, expected = (space.get(name) for name in ("model", "inputs", "expected"))
        made = "`model` is"
    else:
        raise ModelFileError(f"{path}: defines no model; {_DEFINE}")
    if not isinstance(module, torch.nn.Module):
        raise ModelFileError(
            f"{path}: {made} a {type(module).__name__}, not a torch.nn.Module; {_DEFINE}"
        )
    found = ModelFile(path, module, expected=expected)
    if arrays:
        _give(found, arrays)
    elif isinstance(inputs, Mapping):
        found.kwargs = dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        found.args = tuple(inputs)
    elif inputs is not None:
        found.args = (inputs,)
    else:
        raise ModelFileError(f"{path}: states no inputs to run the model on; {_DEFINE}")
    if arrays:
        found.expected = None  # that was of other inputs
    return found


def _give(found: ModelFile, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays as the arguments of the module's forward."""
    tensors = {name: _tensor(array, name, found.path) for name, array in arrays.items()}
    positions = [f"arr_{n}" for n in range(len(tensors))]
    if list(tensors) == positions:
        found.args = tuple(tensors.values())
        return
    parameters = inspect.signature(found.module.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in tensors:
        if name not in parameters and not anything:
            raise ModelFileError(
                f"{found.path}: has no input {name!r}; the parameters of the module's forward are "
                f"{', '.join(parameters) or 'none'}"
            )
    found.kwargs = dict(tensors)


def _imported(path: Path) -> Any:
    """The file as a module; it may import files beside it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules.setdefault(path.stem, module)
    try:
        with _told(path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what the user's file raises into one message with its line."""
    try:
        yield
    except ModelFileError:
        raise
    except SyntaxError as error:
        code = (error.text or "").strip()
        raise ModelFileError(
            f"{error.filename}, line {error.lineno}: is not Python: {error.msg}: {code}"
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        where = f"{path}, line {own[-1].lineno}" if own else str(path)
        code = f" at `{own[-1].line}`" if own and own[-1].line else ""
        raise ModelFileError(
            f"{where}: the file itself failed{code}: {type(error).__name__}: {error}"
        ) from error


def _require_no_float64(found: ModelFile) -> None:
    inputs = [*zip(found.inputs or range(len(found.args)), found.args, strict=False)]
    named = {
        **{f"parameter {n!r}": t for n, t in found.module.named_parameters()},
        **{f"buffer {n!r}": t for n, t in found.module.named_buffers()},
        **{f"input {n!r}": t for n, t in (*inputs, *found.kwargs.items())},
    }
    double = [name for name, value in named.items() if _is_float64(value)]
    if double:
        more = f" (and {len(double) - 1} more)" if len(double) > 1 else ""
        remedy = "convert model and inputs to float32: model.float(), x.float()"
        if found.path.suffix == ".onnx":
            remedy = "export the model in float32"
        raise ModelFileError(
            f"{found.path}: {double[0]}{more} is float64, which the chip stores but cannot compute "
            f"with; {remedy}"
        )


def _is_float64(value: Any) -> bool:
    return any(
        isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in pytree.tree_leaves(value)
    )
