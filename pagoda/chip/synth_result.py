"""What synthesis finds, as plain data, and how a design's cells are summed up by unit.

A module's name is its path (`chip.core0.matrix`), since Amaranth names modules so; each module is
instantiated once, except the array's element.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

UNITS_SHOWN = 20  # at most about so many rows
WORTH_DIVIDING = 0.06  # of the whole: a larger unit is shown by its parts
OWN = "(own logic)"


@dataclass(frozen=True)
class Origin:
    """Where a figure comes from."""

    tools: dict[str, str]  # name -> version
    library: str
    node: str
    stage: str

    def text(self) -> str:
        tools = ", ".join(f"{name} {version}" for name, version in self.tools.items())
        return f"{tools}; {self.library}; {self.node}; {self.stage}"


@dataclass(frozen=True)
class Unit:
    """Instances of one unit together; amounts: resource -> how much of it."""

    name: str
    instances: int
    amounts: dict[str, float]


@dataclass(frozen=True)
class Memory:
    """A memory that is a macro, or a ROM where nothing writes it."""

    name: str
    words: int
    width: int
    written: bool

    @property
    def bits(self) -> int:
        return self.words * self.width


@dataclass(frozen=True)
class Step:
    """A cell, or a wire, on a path and the delay it adds, in ns."""

    cell: str
    kind: str
    ns: float


@dataclass(frozen=True)
class CriticalPath:
    """The slowest path between registers; `ns` includes the last register's setup time."""

    start: str
    end: str
    ns: float
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Synthesis:
    """A unit of a chip on a target.

    main: the resource that areas are compared in. limits: resource -> what the device has. notes:
    what the figures do not include.
    """

    chip: str
    unit: str
    target: str
    origin: Origin
    main: str
    totals: dict[str, float]
    units: tuple[Unit, ...]
    limits: dict[str, float]
    memories: tuple[Memory, ...]
    clock_mhz: float | None
    critical_path: CriticalPath | None
    notes: tuple[str, ...]
    seconds: float

    def excess(self) -> list[str]:
        """The resources of which the device has too little, each with its amounts."""
        return [
            f"{self.totals[name]:,.0f} {name} of {limit:,}"
            for name, limit in self.limits.items() if self.totals[name] > limit
        ]  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        found = asdict(self)
        found["memory_bits"] = sum(memory.bits for memory in self.memories)
        return found


@dataclass(frozen=True)
class Layout:
    """A placed and routed element; sizes in micrometres, area in square micrometres."""

    chip: str
    unit: str
    target: str
    origin: Origin
    cells: int
    width_um: float
    height_um: float
    failed_routes: int
    clock_mhz: float | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def area_um2(self) -> float:
        return self.width_um * self.height_um

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "area_um2": round(self.area_um2, 1)}


def publish(folder: Path, fill: Callable[[Path], object]) -> object:
    """What `fill` returns for a new folder beside `folder`, which takes its name when done.

    So `folder` holds all of a result, or what it held before. Raises OSError.
    """
    is_new = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        found = fill(work)
        work.chmod(0o755)
        old = work.with_name(work.name + ".old")
        if folder.exists():
            folder.rename(old)
        work.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return found
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # there is a result in it
                folder.parent.rmdir()


def statistics(text: str) -> dict[str, Counter[str]]:
    """Module -> its cells by type, from the output of yosys' `stat`.

    (Its JSON is not always valid: in version 0.23 a comma can be missing.)
    """
    modules: dict[str, Counter[str]] = {}
    for part in re.split(r"^=== ", text, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition(" ===\n")
        _, _, cells = rest.partition("Number of cells:")
        if name != "design hierarchy":
            rows = re.findall(r"^     (\S+) +(\d+)$", cells, re.MULTILINE)
            modules[name] = Counter({kind: int(count) for kind, count in rows})
    return modules


class Hierarchy:
    """Modules with their own cells and those below; `amounts` values the cells of a module."""

    def __init__(
        self, modules: dict[str, Counter[str]], top: str,
        amounts: Callable[[Counter[str]], dict[str, float]],
    ):  # fmt: skip
        self._modules, self._top, self._amounts = modules, top, amounts
        self._below: dict[str, Counter[str]] = {}

    def cells(self, module: str) -> Counter[str]:
        """Cells of the module and of those below it."""
        if module not in self._below:
            total: Counter[str] = Counter()
            for kind, count in self._modules[module].items():
                inner = self.cells(kind) if kind in self._modules else Counter({kind: 1})
                for name, number in inner.items():
                    total[name] += count * number
            self._below[module] = total
        return self._below[module]

    def totals(self) -> dict[str, float]:
        return self._amounts(self.cells(self._top))

    def units(self, main: str) -> tuple[Unit, ...]:
        """The parts worth a row, the largest (in resource `main`) first.

        A part is divided as long as it is large; parts that differ in digits alone are one row. If
        there is just one part, its cells by type.
        """
        whole = self.totals().get(main) or 1
        rows = {"": Counter({self._top: 1})}  # name -> modules of it and how many of each
        final: dict[str, Unit] = {}
        while rows and len(rows) + len(final) < UNITS_SHOWN:
            name = max(rows, key=lambda row: self._unit(row, rows[row]).amounts.get(main, 0))
            modules = rows.pop(name)
            unit = self._unit(name, modules)
            parts, own = self._parts(name, modules)
            if not parts or (name and unit.amounts.get(main, 0) < WORTH_DIVIDING * whole):
                final[name] = unit
                continue
            rows.update(parts)
            amounts = self._amounts(own)
            if any(amounts.values()):
                label = f"{name} {OWN}".strip()
                final[label] = Unit(label, sum(modules.values()), amounts)
        for name, modules in rows.items():
            final[name] = self._unit(name, modules)
        if len(final) < 2:
            final = self._kinds()
        found = [unit for unit in final.values() if any(unit.amounts.values())]
        return tuple(sorted(found, key=lambda unit: -unit.amounts.get(main, 0)))

    def _kinds(self) -> dict[str, Unit]:
        """The cells by type: all there is to tell of a design of one part."""
        return {
            kind: Unit(kind, count, self._amounts(Counter({kind: count})))
            for kind, count in self.cells(self._top).items()
        }

    def _unit(self, name: str, modules: Counter[str]) -> Unit:
        cells: Counter[str] = Counter()
        for module, count in modules.items():
            for kind, number in self.cells(module).items():
                cells[kind] += count * number
        return Unit(name or self._top, sum(modules.values()), self._amounts(cells))

    def _parts(
        self, name: str, modules: Counter[str]
    ) -> tuple[dict[str, Counter[str]], Counter[str]]:
        """The modules below by name, and the cells that are in none of them.

        Where each module is but a shell around another, that one takes the name.
        """
        parts: dict[str, Counter[str]] = {}
        own: Counter[str] = Counter()
        is_shell = True
        for module, count in modules.items():
            inner = 0
            for kind, number in self._modules[module].items():
                if kind in self._modules:
                    parts.setdefault(_without_digits(kind), Counter())[kind] += count * number
                    inner += number
                else:
                    own[kind] += count * number
            is_shell = is_shell and inner == 1
        if is_shell and not own:
            return {name: sum(parts.values(), Counter())}, own
        named = {}
        for stem, kinds in parts.items():
            last = _last_name(next(iter(kinds))) if len(kinds) == 1 else stem
            named[f"{name}.{last}".strip(".")] = kinds
        return named, own


def _last_name(module: str) -> str:
    """`chip.core0.indices$46` -> `indices`."""
    return re.sub(r"\$\d+$", "", module.rsplit(".", 1)[-1])


def _without_digits(module: str) -> str:
    """`chip.core0.matrix.array.pe_0_1` -> `pe_*_*`."""
    return re.sub(r"\d+", "*", _last_name(module))
