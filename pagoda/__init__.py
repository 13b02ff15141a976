"""Pagoda: the whole AI computing stack, from the chip to the chat, in one Python package.

    import pagoda, torch
    model.to("pagoda")                     # the simulated chip "edge"; pagoda.use_chip("car")
    compiled = pagoda.compile(model)       # or torch.compile(model, backend="pagoda")
    with pagoda.profile() as p:
        compiled(...)
    print(p)
    print(pagoda.coverage(model, inputs))  # which operations it has and how each runs

Importing this module loads nothing else: each storey is a folder of its own and is imported by
whoever needs it (`docs/reading.md` lists them from the ground up). Only if torch is there already,
the device is registered with it; a torch imported later does that itself, if Pagoda is installed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__version__ = "0.1.0"


def use_chip(chip: Any = None) -> Any:
    """Put the torch device "pagoda" on a new simulated chip; see `pagoda.pytorch.chip.use_chip`.

    chip: name of a preset, path of a chip file, a `Chip`, or what `Device` has opened; by default
    the chip of the device service, if one runs, else "edge". Raises ChipError, ServiceError.
    """
    from pagoda.pytorch.chip import use_chip

    return use_chip(chip)


def Device(chip: Any = None, **wishes: Any) -> Any:
    """A device for `use_chip`, opened with wishes: cores, priority, time_share, memory_limit; see
    `pagoda.runtime.open_device`.

    chip: as for `use_chip`. Raises ChipError, ServiceError.
    """
    from pagoda.isa.chip import load_chip
    from pagoda.runtime import open_device

    return open_device(load_chip(chip) if isinstance(chip, str) else chip, **wishes)


def compile(model: Any, **options: Any) -> Any:
    """torch.compile for device "pagoda"; see `pagoda.pytorch.repeated.compile`."""
    from pagoda.pytorch.repeated import compile

    return compile(model, **options)


def quantize(model: Any, calibration_inputs: Any = None, *, dynamic: bool = False) -> Any:
    """An int8 copy of a PyTorch model; see `pagoda.pytorch.quantisation.quantize`."""
    from pagoda.pytorch.quantisation import quantize

    return quantize(model, calibration_inputs, dynamic=dynamic)


def kernel_op(name: str, kernel: Any, result: Any, reference: Any = None, **values: Any) -> Any:
    """A kernel as a torch operation; see `pagoda.pytorch.kernel_op.kernel_op`, docs/kernels.md."""
    from pagoda.pytorch.kernel_op import kernel_op

    return kernel_op(name, kernel, result, reference, **values)


def profile() -> AbstractContextManager[Any]:
    """Where the chip's cycles go in the `with` block; see `pagoda.pytorch.chip.profile`."""
    from pagoda.pytorch.chip import profile

    return profile()


def coverage(model: Any, inputs: Any, **options: Any) -> Any:
    """Which operations a model has and how each runs on the device, without running it; see
    `pagoda.pytorch.coverage.coverage`."""
    from pagoda.pytorch.coverage import coverage

    return coverage(model, inputs, **options)


def detect_anomaly(infinities: bool = False) -> AbstractContextManager[None]:
    """Stop at the first kernel that writes NaN; see `pagoda.pytorch.anomaly.detect_anomaly`."""
    from pagoda.pytorch.anomaly import detect_anomaly

    return detect_anomaly(infinities)


def load_onnx(path: Any, **options: Any) -> Any:
    """An ONNX model as a torch module; see `pagoda.pytorch.onnx_import.load_onnx`."""
    from pagoda.pytorch.onnx_import import load_onnx

    return load_onnx(path, **options)


def autoload() -> None:
    """Register the device "pagoda" with torch, which calls this at the end of its own import.

    A failure is a warning: whoever imports torch may not even want the device.
    """
    import importlib
    import warnings

    try:
        importlib.import_module("pagoda.pytorch")
    except Exception as problem:  # noqa: BLE001 - whatever goes wrong in our code
        warnings.warn(
            f'device "pagoda" is not available: {type(problem).__name__}: {problem}; torch works '
            "without it. `import pagoda.pytorch` shows where it fails; reinstall Pagoda if need be",
            RuntimeWarning,
            stacklevel=2,
        )


if "torch" in sys.modules:
    autoload()
