"""Executables: a region compiled for one chip, as plain data that runs without torch or compiler.

An `Executable` is a list of launches. Each has a program image and the kernel calls to make on it
in order: an entry address and argument words. A word is known, or depends on where a tensor lies
(`SlotWord`, `OffsetWord`), or on a size (an `Expr` over the region's symbols). The runtime fills
those in before a launch.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from pagoda.compiler.index_expr import Expr
from pagoda.compiler.region import NOWHERE, Place, Region, View
from pagoda.isa.chip import Chip
from pagoda.isa.program import Program


@dataclass(frozen=True)
class SlotWord:
    """The slot through which the launch reaches `buffer`."""

    buffer: int


@dataclass(frozen=True)
class OffsetWord:
    """Byte offset, within its slot, of the byte `offset` of `buffer`."""

    buffer: int
    offset: Expr


Word = int | Expr | SlotWord | OffsetWord


@dataclass(frozen=True)
class Call:
    """One kernel call: its name, IMEM address, argument words, what it came from (`KernelCall`),
    and the tensors it writes and reads."""

    kernel: str
    entry: int
    words: tuple[Word, ...]
    origin: str = ""
    place: Place = NOWHERE
    writes: tuple[View, ...] = ()
    reads: tuple[View, ...] = ()


@dataclass(frozen=True)
class PlannedLaunch:
    """Calls that one program image serves."""

    program: Program
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Executable:
    """See the module's docstring. `region.steps` is empty: the launches replace it.

    A region is one launch unless its code exceeds the chip's IMEM.
    """

    region: Region
    chip: Chip
    launches: tuple[PlannedLaunch, ...]

    def lifetimes(self) -> list[tuple[int, int, int]]:
        """(temporary buffer, number of the first call that touches it, of the last)."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        calls = (call for launch in self.launches for call in launch.calls)
        for number, call in enumerate(calls):
            for word in call.words:
                if isinstance(word, OffsetWord):
                    first.setdefault(word.buffer, number)
                    last[word.buffer] = number
        return [
            (buffer, first[buffer], last[buffer])
            for buffer in first
            if self.region.buffers[buffer].kind == "temporary"
        ]

    def to_bytes(self) -> bytes:
        """For the disk cache; `from_bytes` of the same version of Pagoda reads it."""
        return pickle.dumps(self, protocol=5)

    @staticmethod
    def from_bytes(data: bytes) -> Executable:
        found = pickle.loads(data)
        if not isinstance(found, Executable):
            raise TypeError(f"not an executable: {type(found).__name__}; rebuild it")
        return found
