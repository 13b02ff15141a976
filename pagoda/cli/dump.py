"""`pagoda dump`: a kernel of the library or of a user's file, at every compiler stage."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pagoda.cli.library import library_help, problem, split_settings
from pagoda.cli.options import chip_option
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.errors import CompileError
from pagoda.compiler.language import KernelFunction, TensorType
from pagoda.compiler.stages import STAGES, stage_text
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType

EVERY_STAGE = "all"
_SUMMARIES = {
    "ir": "tile IR, as the front end built it",
    "commands": "loops around the stores that fill fields and issue commands",
    "llvm": "LLVM IR before optimisation",
    "asm": "RV32 assembly",
}
_DTYPES = {dtype.name.lower(): dtype for dtype in DType}
_TENSOR_FORM = "DTYPE:SIZExSIZE..., like bf16:Nx64, where a capital letter is a run-time size"


def _from_library(name: str, settings: Sequence[str], chip: Chip) -> Kernel:
    return problem(name, settings).build(chip)[0]


def _from_file(place: str, settings: Sequence[str]) -> Kernel:
    file, _, name = place.rpartition(":")
    found = getattr(_load(Path(file)), name, None)
    if isinstance(found, Kernel):
        if settings:
            raise click.UsageError(
                f"{place}: it is a built kernel and takes no settings; leave {settings[0]!r} out."
            )
        return found
    if not isinstance(found, KernelFunction):
        what = "is not there" if found is None else f"is a {type(found).__name__}"
        raise CompileError(
            f"{place}", "it names an @kernel function or what its build(...) returned",
            f"{name!r} {what}", "check the name after the colon",
        )  # fmt: skip
    given = {key: _value(found, key, text) for key, text in split_settings(settings).items()}
    for key in found.annotations:
        if found.is_optional(key):
            given.setdefault(key, None)
    return found.build(**given)


def _load(path: Path) -> object:
    """Run a Python file as a module. Raises CompileError for whatever goes wrong in it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CompileError(
            f"kernel file {path}", "it is a Python file", "its name does not end in .py",
            "write FILE.py:NAME",
        )  # fmt: skip
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # so that it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except CompileError:
        raise
    except (Exception, SystemExit) as error:
        raise CompileError(
            f"kernel file {path}", "it can be imported",
            f"that raised {type(error).__name__}: {error}", "correct the file or the path",
        ) from error  # fmt: skip
    finally:
        sys.path.remove(str(path.parent))
    return module


def _value(function: KernelFunction, key: str, text: str) -> TensorType | DType | int | None:
    """A setting: a tensor's layout for a tensor, a number or a dtype for the rest."""
    if key in function.annotations and function.is_tensor(key):
        if function.is_optional(key) and text == "none":
            return None
        return _tensor(function.name, key, text)
    if key in function.annotations:
        raise click.UsageError(
            f"{function.name}: {key} is a run-time scalar and has no value yet; leave it out."
        )
    if text in _DTYPES:
        return _DTYPES[text]
    if re.fullmatch(r"-?[0-9]+", text):
        return int(text)
    raise click.UsageError(
        f"{function.name}: {key} is a whole number or one of {', '.join(_DTYPES)}, but it is "
        f"{text!r}; write for example {key}=16."
    )


def _tensor(function: str, key: str, text: str) -> TensorType:
    """`bf16:Nx64` as a row-major tensor. A stride is known if all sizes inside of it are."""
    dtype, colon, shape = text.partition(":")
    sizes = shape.split("x")
    if not colon or dtype not in _DTYPES or not all(re.fullmatch("[0-9]+|[A-Z]", s) for s in sizes):
        raise click.UsageError(
            f"{function}: {key} is a tensor, {_TENSOR_FORM}, but it is {text!r}; "
            f"the dtypes are {', '.join(_DTYPES)}."
        )
    known = [int(size) if size.isdigit() else None for size in sizes]
    strides: list[int | None] = []
    step: int | None = max(_DTYPES[dtype].bits // 8, 1)
    for size in reversed(known):
        strides.append(step)
        step = None if step is None or size is None else step * size
    return TensorType(_DTYPES[dtype], tuple(known), tuple(reversed(strides)))


def _overview(kernel: Kernel, chip: Chip) -> None:
    blocks = ", ".join(f"{name}={value}" for name, value in kernel.blocks)
    code = compile_kernel(kernel, chip).blob().code
    click.echo(f"{kernel.name} for {chip.name}{f' ({blocks})' if blocks else ''}")
    for stage in STAGES:
        lines = len(stage_text(kernel, chip, stage).splitlines())
        click.echo(f"  {stage:9} {lines:6,} lines  {_SUMMARIES[stage]}")
    click.echo(f"  {'code':9} {len(code):6,} bytes of {chip.imem_bytes:,} of instruction memory")
    click.echo(f"Show one with --stage {'|'.join(STAGES)}, or all of them with --stage all.")


@click.command(
    help=f"""Show a kernel at every compiler stage; without --stage, a summary.

KERNEL is one of the library, or FILE.py:NAME for one of your own: an @kernel function, whose
tensors and compile-time values are given as NAME=VALUE, or a kernel that the file has built.
A tensor is {_TENSOR_FORM}.

\b
Examples:
  pagoda dump matmul m=64 n=64 k=64 --stage commands --chip tiny
  pagoda dump scale.py:scale y=bf16:Nx64 x=bf16:Nx64 ROWS=16 --stage asm

{library_help()}
"""
)
@click.argument("kernel")
@click.argument("settings", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--stage", type=click.Choice([*STAGES, EVERY_STAGE]), help="What to show.")
@chip_option
def dump(kernel: str, settings: tuple[str, ...], stage: str | None, chip: Chip) -> None:
    in_file = ".py:" in kernel
    built = _from_file(kernel, settings) if in_file else _from_library(kernel, settings, chip)
    if stage is None:
        _overview(built, chip)
    elif stage == EVERY_STAGE:
        for name in STAGES:
            click.echo(f"---- {name}: {_SUMMARIES[name]}")
            click.echo(stage_text(built, chip, name).rstrip("\n"))
    else:
        click.echo(stage_text(built, chip, stage).rstrip("\n"))
