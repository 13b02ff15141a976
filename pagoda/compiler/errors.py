"""What cannot be compiled, told to the user, and where in the user's source it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """A place in source text; line and column count from 1, column 0 = whole line."""

    file: str
    line: int
    column: int = 0

    def __str__(self) -> str:
        column = f":{self.column}" if self.column else ""
        return f"{self.file}:{self.line}{column}"


class CompileError(Exception):
    """A kernel that cannot be compiled: what is wrong, the rule, the value found, the remedy.

    The message reads `FILE:LINE:COLUMN: WHAT: RULE, but VALUE; REMEDY`, without the place when
    `location` is None.
    """

    def __init__(
        self, what: str, rule: str, value: str, remedy: str, location: Location | None = None
    ):
        place = f"{location}: " if location else ""
        super().__init__(f"{place}{what}: {rule}, but {value}; {remedy}")
        self.what, self.rule, self.value, self.remedy = what, rule, value, remedy
        self.location = location


class Unsupported(RuntimeError):
    """A PyTorch operation that cannot be compiled for the chip. It is raised by the PyTorch storey,
    and defined here so that whoever tells errors to the user need not load torch to know it."""


class ModelFileError(RuntimeError):
    """A model file that cannot be used; the message says which, why and what to do. Defined here
    for the same reason."""
