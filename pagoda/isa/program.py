"""What a machine runs, as frozen plain data: `Program` (code image), `Slot`, `Launch`."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from pagoda.isa.chip import DRAM_ATOM_BYTES, SLOTS, Chip

CONTRACT_VERSION = 2
MAX_SLOT_BYTES = (1 << 32) - 1


@dataclass(frozen=True)
class LineEntry:
    """From byte address `pc` on (to the next entry's) the code stems from this source line."""

    pc: int
    file: str
    line: int
    kernel: str


@dataclass(frozen=True)
class Program:
    """An IMEM image, loaded at address 0.

    `stack_limit`: a store through the stack pointer below DMEM offset `stack_limit` is a stack
    overflow. `lines` is sorted by pc. `chip`: what the code was built for, if it depends on that.
    """

    name: str
    code: bytes
    entry: int = 0
    stack_limit: int = 0
    lines: tuple[LineEntry, ...] = ()
    contract_version: int = CONTRACT_VERSION
    chip: Chip | None = None

    def __post_init__(self) -> None:
        if len(self.code) % 4 or self.entry % 4 or not 0 <= self.entry <= len(self.code):
            raise ValueError(
                f"program {self.name!r}: {len(self.code)} bytes of code, entry {self.entry}: "
                "both must be multiples of 4 and the entry inside the code; rebuild the program"
            )

    @cached_property
    def digest(self) -> str:
        """Identity of the image: equal digests are equal code."""
        return hashlib.sha256(self.code + self.entry.to_bytes(4, "little")).hexdigest()

    def line_at(self, pc: int) -> LineEntry | None:
        """The source line of the instruction at `pc`, or None."""
        found = None
        for entry in self.lines:
            if entry.pc > pc:
                break
            found = entry
        return found


@dataclass(frozen=True)
class Slot:
    """A window of DRAM a launch may touch: byte address `base`, `size` bytes, permissions."""

    base: int
    size: int
    readable: bool = True
    writable: bool = True

    def __post_init__(self) -> None:
        if self.base < 0 or self.base % DRAM_ATOM_BYTES:
            raise ValueError(
                f"slot base {self.base:#x}: must be a non-negative multiple of "
                f"{DRAM_ATOM_BYTES}; align the allocation"
            )
        if not 0 <= self.size <= MAX_SLOT_BYTES:
            raise ValueError(
                f"slot size {self.size}: must be 0 to {MAX_SLOT_BYTES} bytes; "
                "split the tensor over several slots"
            )


@dataclass(frozen=True)
class Launch:
    """One run of a program on all cores of a chip.

    `args` are 32-bit words placed at DMEM offset 0; `watchdog` is in cycles.
    """

    program: Program
    args: tuple[int, ...] = ()
    slots: tuple[Slot, ...] = field(default=())
    watchdog: int = 1 << 40

    def __post_init__(self) -> None:
        if len(self.slots) > SLOTS:
            raise ValueError(
                f"launch of {self.program.name!r}: {len(self.slots)} slots; a launch has at most "
                f"{SLOTS}; put several tensors into one slot"
            )
        if self.watchdog < 1:
            raise ValueError(
                f"launch of {self.program.name!r}: watchdog = {self.watchdog} cycles: must be "
                "positive; leave it out for the default"
            )
