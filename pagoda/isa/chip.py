"""What a chip is: its parameters, the rules they obey, the presets, and chip files.

A `Chip` is frozen plain data and checks itself: an impossible chip cannot be made. Everything above
(definition, simulator, compiler, RTL) takes the chip as a parameter; nothing reads a global one.
"""

import runpy
import tomllib
import traceback
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MATRIX_TYPES = ("bf16", "int8")
SLOTS = 64
DRAM_ATOM_BYTES = 64
CODE_FIELDS = (
    "cores", "rows", "cols", "matrix_types", "lanes", "sram_bytes", "acc_bytes", "imem_bytes",
    "dmem_bytes", "sram_banks", "acc_banks",
)  # fmt: skip


class ChipError(ValueError):
    """A chip description that breaks a rule; the message says field, value, rule and remedy."""


@dataclass(frozen=True)
class Chip:
    """One chip: `cores` identical cores, shared DRAM, a host port.

    Sizes are in bytes and per core unless said; bandwidth is per cycle for the whole chip.
    """

    name: str
    cores: int
    clock_hz: int
    rows: int  # systolic array: k extent of one pass
    cols: int  # systolic array: n extent of one pass
    matrix_types: tuple[str, ...]
    pe_stages: int  # pipeline stages of one processing element's multiply-add
    lanes: int  # vector lanes, 32 bit each
    sram_bytes: int
    acc_bytes: int
    imem_bytes: int
    dmem_bytes: int
    window: int  # commands in flight
    dram_bytes: int  # whole chip
    dram_bytes_per_cycle: Fraction  # whole chip
    dram_latency: int  # cycles
    launch_cycles: int
    sram_banks: int = 8
    acc_banks: int = 4

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "matrix_types", tuple(self.matrix_types))
        bandwidth = Fraction(self.dram_bytes_per_cycle).limit_denominator(1000)
        object.__setattr__(self, "dram_bytes_per_cycle", bandwidth)
        self._check_ranges()
        self._check_relations()

    def _refuse(self, field: str, rule: str, remedy: str) -> None:
        value = getattr(self, field)
        value = repr(value) if isinstance(value, str) else value
        raise ChipError(f"chip {self.name!r}: {field} = {value}: {rule}; {remedy}")

    def _check_types(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ChipError(f"chip: name = {self.name!r}: must be a non-empty string; give it one")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                self._refuse(field.name, "must be a whole number", "write digits only")
        if not isinstance(self.matrix_types, (tuple, list)):
            self._refuse("matrix_types", "must be a list", 'for example ["bf16", "int8"]')
        if isinstance(self.dram_bytes_per_cycle, bool) or not isinstance(
            self.dram_bytes_per_cycle, (int, float, Fraction)
        ):
            self._refuse("dram_bytes_per_cycle", "must be a number", "for example 25.6")

    def _check_ranges(self) -> None:
        for field, low, high in (
            ("cores", 1, 256),
            ("clock_hz", 1, 10**11),
            ("pe_stages", 1, 16),
            ("window", 2, 16),
            ("dram_latency", 1, 100_000),
            ("launch_cycles", 1, 1_000_000),
        ):
            if not low <= getattr(self, field) <= high:
                self._refuse(field, f"must be {low} to {high}", "choose a value in that range")
        for field, low, high in (
            ("rows", 2, 512),
            ("cols", 2, 512),
            ("lanes", 2, 512),
            ("sram_bytes", 4 * KIB, 256 * MIB),
            ("acc_bytes", 1 * KIB, 64 * MIB),
            ("imem_bytes", 4 * KIB, 1 * MIB),
            ("dmem_bytes", 1 * KIB, 1 * MIB),
            ("sram_banks", 1, 16),
            ("acc_banks", 1, 16),
            ("dram_bytes", 1 * MIB, 1 << 48),
        ):
            value = getattr(self, field)
            if not low <= value <= high or value & (value - 1):
                nearest = min(max(1 << max(value, 1).bit_length() - 1, low), high)
                self._refuse(
                    field, f"must be a power of two, {low} to {high}", f"try {nearest}"
                )
        if not 0 < self.dram_bytes_per_cycle <= 65536:
            self._refuse("dram_bytes_per_cycle", "must be above 0, at most 65536", "try 16")

    def _check_relations(self) -> None:
        unknown = [t for t in self.matrix_types if t not in MATRIX_TYPES]
        if unknown or not self.matrix_types:
            self._refuse(
                "matrix_types", f"must name one or more of {', '.join(MATRIX_TYPES)}", "fix it"
            )
        if self.lanes < self.cols:
            self._refuse(
                "lanes",
                f"must be at least the array's columns ({self.cols})",
                f"use {self.cols} or more lanes",
            )
        row_bytes = self.rows * (2 if "bf16" in self.matrix_types else 1)
        if self.port_bytes < row_bytes:
            self._refuse(
                "lanes",
                f"a port of 4 * lanes bytes must hold one row of A ({row_bytes} bytes)",
                f"use {row_bytes // 4} or more lanes",
            )
        for memory in ("sram", "acc"):
            if self.bank_bytes(memory) < max(64, self.port_bytes):
                self._refuse(
                    f"{memory}_banks",
                    f"a bank must hold at least {max(64, self.port_bytes)} bytes",
                    f"use fewer banks or a larger {memory}_bytes",
                )

    def bank_bytes(self, memory: str) -> int:
        """Bytes of one bank of `memory`, "sram" or "acc"."""
        return getattr(self, f"{memory}_bytes") // getattr(self, f"{memory}_banks")

    def code_differences(self, other: "Chip") -> list[str]:
        """The fields by which code built for `other` may not fit this chip: what it has to respect,
        not what only makes it faster or slower."""
        return [name for name in CODE_FIELDS if getattr(self, name) != getattr(other, name)]

    @property
    def port_bytes(self) -> int:
        """Width of one SRAM or ACC bank port: one 32-bit word per lane."""
        return 4 * self.lanes

    @property
    def psum_latency(self) -> int:
        """Cycles from reading a partial sum in ACC to writing it back (D in the manual)."""
        return self.rows * self.pe_stages + self.cols + 4

    @cached_property
    def dram_share(self) -> Fraction:
        """Bytes per cycle of one core's DRAM port: every core owns an equal share of the turns."""
        return self.dram_bytes_per_cycle / self.cores

    def partition(self, cores: int) -> "Chip":
        """So many of this chip's cores as a chip: they own the same DRAM turns as before, so their
        programs take the same cycles whoever uses the others. Raises ChipError."""
        if not 1 <= cores <= self.cores:
            raise ChipError(
                f"chip {self.name!r}: a partition of {cores} cores: the chip has {self.cores}; "
                f"ask for 1 to {self.cores}"
            )
        if cores == self.cores:
            return self
        part = replace(
            self, name=f"{self.name}:{cores}", cores=cores,
            dram_bytes_per_cycle=self.dram_share * cores,
        )  # fmt: skip
        if part.dram_share != self.dram_share:
            raise ChipError(
                f"chip {self.name!r}: a partition of {cores} cores: their bandwidth would be "
                f"{self.dram_share * cores} bytes per cycle, whose denominator exceeds 1000; "
                "use all cores, or another bandwidth"
            )
        return part

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates per cycle of all cores together, at best."""
        return self.cores * self.rows * self.cols

    @property
    def peak_macs_per_second(self) -> int:
        return self.macs_per_cycle * self.clock_hz

    @property
    def peak_dram_bytes_per_second(self) -> Fraction:
        return self.dram_bytes_per_cycle * self.clock_hz


def _preset(name: str, array: int, types: tuple[str, ...], **rest: object) -> Chip:
    stages = 3 if "bf16" in types else 1
    shape = dict(rows=array, cols=array, lanes=array)
    return Chip(name, matrix_types=types, pe_stages=stages, **shape, **rest)


_SMALL = dict(
    cores=1, clock_hz=100_000_000, sram_bytes=64 * KIB, acc_bytes=16 * KIB, imem_bytes=16 * KIB,
    dmem_bytes=4 * KIB, window=8, dram_bytes=256 * MIB, dram_bytes_per_cycle=Fraction(16),
    dram_latency=20, launch_cycles=100,
)
_LARGE = dict(
    clock_hz=1_000_000_000, imem_bytes=64 * KIB, dmem_bytes=16 * KIB, window=16,
    dram_latency=200, launch_cycles=500,
)

PRESETS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _preset("tiny", 4, ("bf16", "int8"), **_SMALL),
        _preset("tiny8", 8, ("int8",), **_SMALL),
        _preset(
            "edge", 16, ("bf16", "int8"), **_LARGE, cores=1, sram_bytes=512 * KIB,
            acc_bytes=128 * KIB, dram_bytes=4 * GIB, dram_bytes_per_cycle=Fraction(128, 5),
        ),
        _preset(
            "car", 64, ("bf16", "int8"), **_LARGE, cores=4, sram_bytes=2 * MIB,
            acc_bytes=1 * MIB, dram_bytes=16 * GIB, dram_bytes_per_cycle=Fraction(200),
        ),
        _preset(
            "cloud", 128, ("bf16", "int8"), **_LARGE, cores=32, sram_bytes=4 * MIB,
            acc_bytes=1 * MIB, dram_bytes=64 * GIB, dram_bytes_per_cycle=Fraction(3200),
        ),
    )
}


def load_chip(name_or_path: str) -> Chip:
    """A preset by name, or a chip file: TOML with `Chip`'s fields (and optionally `base`, the
    preset it starts from), or Python that defines `chip`.

    Raises ChipError: unknown name, unreadable file, unknown or missing field, broken rule.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path = Path(name_or_path)
    if path.suffix not in (".toml", ".py"):
        raise ChipError(
            f"chip {name_or_path!r}: unknown; presets are {', '.join(PRESETS)}; "
            "or give the path of a .toml or .py chip file"
        )
    try:
        if path.suffix == ".py":
            found = _run(path).get("chip")
            if not isinstance(found, Chip):
                raise ChipError(
                    f"chip file {path}: defines no `chip`; "
                    "end it with `chip = pagoda.isa.Chip(...)`"
                )
            return found
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ChipError(
            f"chip file {path}: cannot be read ({error.strerror}); check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ChipError(f"chip file {path}: not valid TOML ({error}); fix that line") from error
    return _from_table(path, table)


def _run(path: Path) -> dict[str, object]:
    with path.open("rb"):  # runpy would look for a package in a directory
        pass
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise ChipError(
            f"chip file {path}: it stopped in line {_line(path, error)} with "
            f"{type(error).__name__}: {error}; fix that line"
        ) from error


def _line(path: Path, error: BaseException) -> int:
    """Line of the file at which the exception left it."""
    if isinstance(error, SyntaxError):
        return error.lineno or 1
    calls = traceback.extract_tb(error.__traceback__)
    lines = [call.lineno for call in calls if call.filename == str(path)]
    return (lines[0] if lines else None) or 1


def _from_table(path: Path, table: dict[str, object]) -> Chip:
    known = {field.name for field in fields(Chip)}
    base = table.pop("base", None)
    unknown = sorted(set(table) - known)
    if unknown:
        raise ChipError(
            f"chip file {path}: unknown field {unknown[0]!r}; "
            f"the fields are {', '.join(sorted(known))}"
        )
    table.setdefault("name", path.stem)
    if base is not None:
        if base not in PRESETS:
            raise ChipError(
                f"chip file {path}: base = {base!r}: unknown; presets are {', '.join(PRESETS)}"
            )
        return replace(PRESETS[base], **table)
    required = {f.name for f in fields(Chip)} - {"sram_banks", "acc_banks"}
    missing = sorted(required - set(table))
    if missing:
        raise ChipError(
            f"chip file {path}: missing field {missing[0]!r}; "
            'give it, or start from a preset with base = "edge"'
        )
    return Chip(**table)
