"""Executables: a region compiled for one chip, as plain data that runs without torch or compiler.

An `Executable` holds one program image, the calls to make on it in order, and the region's own
description of its tensors. A call is the kernel's entry address and its argument words; a word is
known, or depends on where a tensor lies (`SlotWord`, `OffsetWord`), or on a size (an `Expr` over
the region's symbols). The runtime fills them in before each launch.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

from pagoda.compiler.index_expr import Expr
from pagoda.compiler.region import Region
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
    """One kernel call: IMEM address, argument words, and what it came from, for messages."""

    kernel: str
    entry: int
    words: tuple[Word, ...]
    origin: str = ""


@dataclass(frozen=True)
class Executable:
    """See the module's docstring. `region.steps` is empty: the calls replace it.

    `lifetimes`: for each temporary buffer the first and last call that touches it.
    """

    region: Region
    chip: Chip
    program: Program
    calls: tuple[Call, ...]
    lifetimes: tuple[tuple[int, int, int], ...]  # (buffer, first call, last call)

    @staticmethod
    def of(region: Region, chip: Chip, program: Program, calls: tuple[Call, ...]) -> Executable:
        """An executable of `region`; works the lifetimes out from the calls' words."""
        temporary = {k for k, b in enumerate(region.buffers) if b.kind == "temporary"}
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for number, call in enumerate(calls):
            for word in call.words:
                if isinstance(word, OffsetWord) and word.buffer in temporary:
                    first.setdefault(word.buffer, number)
                    last[word.buffer] = number
        lifetimes = tuple((buffer, first[buffer], last[buffer]) for buffer in first)
        return Executable(replace(region, steps=()), chip, program, calls, lifetimes)

    def to_bytes(self) -> bytes:
        """For the disk cache; `from_bytes` of the same version of Pagoda reads it."""
        return pickle.dumps(self, protocol=5)

    @staticmethod
    def from_bytes(data: bytes) -> Executable:
        found = pickle.loads(data)
        if not isinstance(found, Executable):
            raise TypeError(f"not an executable: {type(found).__name__}; rebuild it")
        return found
