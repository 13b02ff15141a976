"""From tile IR to code for one chip: the passes in order, each result kept for `pagoda dump`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pagoda.compiler.allocate import Placement, allocate
from pagoda.compiler.cache import Cache
from pagoda.compiler.codegen import Blob, codegen_version, compile_blob, emit_llvm
from pagoda.compiler.errors import CompileError, Location
from pagoda.compiler.fields import hoist_fields
from pagoda.compiler.link import MAX_ARGUMENT_WORDS, kernel_sram
from pagoda.compiler.lower import lower
from pagoda.compiler.pipeline import deepest, pipeline
from pagoda.compiler.schedule import pack_elementwise
from pagoda.compiler.tile_ir import Body, Dot, Kernel, Tile
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType


@dataclass(frozen=True)
class Compiled:
    """A kernel on its way to code: what every pass left."""

    kernel: Kernel
    placements: dict[Tile, Placement]
    commands: Body
    llvm: str
    locations: tuple[Location, ...]

    def blob(self, cache: Cache | None = None) -> Blob:
        """The position-independent code, from the cache if it is there.

        LLVM takes most of the time, so what is kept is its result, by its input.
        """
        cache = cache or Cache(None)
        key = Cache.key("blob", codegen_version(), self.llvm, repr(self.locations))
        stored = cache.get(key)
        if stored is not None:
            return _blob_from_json(stored)
        blob = compile_blob(self.llvm, list(self.locations))
        cache.put(key, _blob_to_json(blob))
        return blob


def compile_kernel(kernel: Kernel, chip: Chip) -> Compiled:
    """Schedule, place and lower a kernel for a chip. Raises CompileError."""
    _check(kernel, chip)
    packed, placements = _schedule(kernel, chip)
    commands = hoist_fields(lower(packed, placements))
    text, locations = emit_llvm(kernel, commands)
    return Compiled(packed, placements, commands, text, tuple(locations))


def _check(kernel: Kernel, chip: Chip) -> None:
    """What no schedule can help: operand types the array lacks, calls longer than a record."""
    for statement in kernel.walk():
        if isinstance(statement, Dot):
            wanted = "int8" if statement.a.tile.dtype == DType.I8 else "bf16"
            if wanted not in chip.matrix_types:
                raise CompileError(
                    "dot", f"the matrix engine of chip {chip.name} multiplies "
                    f"{' or '.join(chip.matrix_types)}", f"the operands are {wanted}",
                    "convert them, or use another chip", statement.location or kernel.location,
                )  # fmt: skip
    words = len(kernel.words())
    if words > MAX_ARGUMENT_WORDS:
        raise CompileError(
            f"kernel {kernel.name}", f"a call has at most {MAX_ARGUMENT_WORDS} argument words",
            f"its {len(kernel.tensors)} tensors and {len(kernel.scalars)} scalars take {words}",
            "fix sizes or strides at compile time, or split the kernel", kernel.location,
        )  # fmt: skip


def _schedule(kernel: Kernel, chip: Chip) -> tuple[Kernel, dict[Tile, Placement]]:
    """Vector commands, loads ahead and placements; fewer loads ahead where they do not fit."""
    packed = pack_elementwise(kernel)
    limit = deepest(kernel)
    while True:
        scheduled = pipeline(packed, limit)
        try:
            return scheduled, allocate(scheduled, chip, sram=kernel_sram(chip))
        except CompileError:
            if limit == 0:
                raise
            limit -= 1


def _blob_to_json(blob: Blob) -> bytes:
    lines = [(offset, at.file, at.line, at.column) for offset, at in blob.lines]
    return json.dumps({"code": blob.code.hex(), "lines": lines}).encode()


def _blob_from_json(data: bytes) -> Blob:
    found = json.loads(data)
    lines = tuple((offset, Location(*place)) for offset, *place in found["lines"])
    return Blob(bytes.fromhex(found["code"]), lines)
