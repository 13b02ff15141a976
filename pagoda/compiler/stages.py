"""The stages of compilation by name, each as text: what `pagoda dump` prints.

    ir         tile IR, as the front end built it
    commands   loops around the stores that fill fields and issue commands
    llvm       LLVM IR before optimisation
    asm        RV32 assembly
"""

from __future__ import annotations

from collections.abc import Callable

from pagoda.compiler.codegen import assembly
from pagoda.compiler.command_ir import command_text
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.errors import CompileError
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip

STAGES: dict[str, Callable[[Kernel, Chip], str]] = {
    "ir": lambda kernel, chip: str(kernel),
    "commands": lambda kernel, chip: command_text(compile_kernel(kernel, chip).commands),
    "llvm": lambda kernel, chip: compile_kernel(kernel, chip).llvm,
    "asm": lambda kernel, chip: assembly(compile_kernel(kernel, chip).llvm),
}


def stage_text(kernel: Kernel, chip: Chip, stage: str) -> str:
    """One stage's text. Raises CompileError for an unknown stage."""
    if stage not in STAGES:
        raise CompileError(
            f"stage {stage!r}", f"the stages are {', '.join(STAGES)}", "it is none of them",
            "name one of those",
        )  # fmt: skip
    return STAGES[stage](kernel, chip)
