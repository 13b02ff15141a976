"""From tile IR to code for one chip: the passes in order, each result kept for `pagoda dump`."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.compiler.allocate import Placement, allocate
from pagoda.compiler.codegen import Blob, compile_blob, emit_llvm
from pagoda.compiler.errors import Location
from pagoda.compiler.fields import hoist_fields
from pagoda.compiler.link import kernel_sram
from pagoda.compiler.lower import lower
from pagoda.compiler.schedule import pack_elementwise
from pagoda.compiler.tile_ir import Body, Kernel, Tile
from pagoda.isa.chip import Chip


@dataclass(frozen=True)
class Compiled:
    """A kernel on its way to code: what every pass left."""

    kernel: Kernel
    placements: dict[Tile, Placement]
    commands: Body
    llvm: str
    locations: tuple[Location, ...]

    def blob(self) -> Blob:
        """The position-independent code."""
        return compile_blob(self.llvm, list(self.locations))


def compile_kernel(kernel: Kernel, chip: Chip) -> Compiled:
    """Schedule, place and lower a kernel for a chip. Raises CompileError."""
    packed = pack_elementwise(kernel)
    placements = allocate(packed, chip, sram=kernel_sram(chip))
    commands = hoist_fields(lower(packed, placements))
    text, locations = emit_llvm(kernel, commands)
    return Compiled(packed, placements, commands, text, tuple(locations))
