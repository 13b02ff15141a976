"""The terminal view of `pagoda top`: devices, cores and processes as rich renderables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pagoda.cli.device_load import CoreLoad, DeviceLoad, ProcessLoad

_CORE_WIDTH = 36  # of a core's cell: number, bar, load, process
_FEW_CORES = 4  # as many stand below one another
_LONGEST_QUEUE = 6  # of which the processes are named
_COLOURS = ((0.9, "red"), (0.6, "yellow"), (0.0, "green"))
_STATES = {"running": "green", "waiting": "yellow", "lost": "red"}


def screen(devices: Sequence[DeviceLoad], problems: Sequence[str] = ()) -> RenderableType:
    """Everything, one device below the other. problems: of services that give no figures."""
    parts: list[RenderableType] = [Text(problem, "red") for problem in problems]
    for device in devices:
        parts += [_device(device), _Cores(device.cores), _Processes(device.processes), ""]
    return Group(*parts[:-1] if devices else parts)


def _device(device: DeviceLoad) -> RenderableType:
    title = Text.assemble((device.chip, "bold"), "  ", device.device, overflow="fold")
    sums = Table.grid(padding=(0, 2))
    sums.add_column(style="dim", no_wrap=True)
    sums.add_column(overflow="fold")
    sums.add_row(
        "service",
        f"process {device.pid}, user {device.user}, up {_duration(device.uptime_seconds)}",
    )
    load = f" {_percent(device.load)} of {_some(len(device.cores), 'core')}"
    sums.add_row("load", Text.assemble(_bar(device.load), load))
    memory = f" {_bytes(device.memory_bytes)} of {_bytes(device.memory_total_bytes)}"
    full = device.memory_bytes / device.memory_total_bytes
    sums.add_row("memory", Text.assemble(_bar(full), memory))
    sums.add_row("queue", _queue(device.queue))
    pace = f"{_count(device.cycles_per_second)} cycles/s"
    if device.cycles_per_second:
        slower = device.clock_hz / device.cycles_per_second
        pace += f"; the chip's clock is {_count(slower)} times as fast"
    sums.add_row("speed", pace)
    sums.add_row(
        "so far",
        f"{_count(device.cycles)} cycles, {_some(device.launches, 'launch', 'launches')}, "
        f"{_some(device.faults, 'fault')}, {_some(device.resets, 'reset')}",
    )
    problems = [Text(f"problem: {problem}", "red") for problem in device.problems]
    return Group(Rule(title, align="left", characters="-"), sums, *problems)


def _queue(pids: Sequence[int]) -> str:
    if not pids:
        return "empty"
    shown = ", ".join(str(pid) for pid in pids[:_LONGEST_QUEUE])
    return f"{len(pids)} waiting: {shown}{', ...' if pids[_LONGEST_QUEUE:] else ''}"


class _Cores:
    """The cores as cells, in as many columns as the width allows."""

    def __init__(self, cores: Sequence[CoreLoad]) -> None:
        self._cores = cores

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = 1
        if len(self._cores) > _FEW_CORES:
            columns = max((options.max_width - 2) // _CORE_WIDTH, 1)
        rows = -(-len(self._cores) // columns)
        grid = Table.grid(padding=(0, 2, 0, 0))
        for row in range(rows):
            grid.add_row(*(_core(core) for core in self._cores[row::rows]))
        yield Padding(grid, (1, 0))


def _core(core: CoreLoad) -> Text:
    occupant = "" if core.pid is None else str(core.pid)
    return Text.assemble(
        (f"core {core.core:<3} ", "dim"),
        _bar(core.load, 10),
        f" {_percent(core.load):>5} ",
        (f"{occupant:<8}", "cyan"),
    )


class _Processes:
    """The table of processes, without some columns where the terminal is narrow."""

    def __init__(self, processes: Sequence[ProcessLoad]) -> None:
        self._processes = processes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._processes:
            yield Text("no programs", "dim")
            return
        columns = {
            heading: [cell(process) for process in self._processes]
            for heading, cell in _COLUMNS.items()
        }
        dropped = iter(_DROPPED)
        while (room := options.max_width - _width(columns)) < 0:
            heading = next(dropped, None)
            if heading is None:
                break
            del columns[heading]
        table = Table(box=None, header_style="bold", padding=(0, _GAP, 0, 0), pad_edge=False)
        for heading in columns:
            if heading == "name":
                longest = _NAME_WIDTH + max(room, 0)
                table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=longest)
            else:
                left = heading in ("user", "state")
                table.add_column(heading, justify="left" if left else "right", no_wrap=True)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        yield table


_NAME_WIDTH = 12  # at least
_GAP = 2
_COLUMNS: dict[str, Callable[[ProcessLoad], Text]] = {
    "pid": lambda p: Text(str(p.pid)),
    "user": lambda p: Text(p.user),
    "name": lambda p: Text(p.name),
    "state": lambda p: Text(p.state, _STATES.get(p.state, "dim")),
    "prio": lambda p: Text(str(p.priority)),
    "weight": lambda p: Text(f"{p.weight:g}"),
    "cores": lambda p: Text(str(p.cores)),
    "memory": lambda p: Text(_bytes(p.memory_bytes)),
    "limit": lambda p: Text(_bytes(p.memory_limit_bytes)),
    "time": lambda p: Text(_percent(p.share)),
    "cycles": lambda p: Text(_count(p.cycles)),
    "cycles/s": lambda p: Text(_count(p.cycles_per_second)),
    "launches": lambda p: Text(_count(p.launches)),
    "faults": lambda p: Text(str(p.faults), "red" if p.faults else ""),
}
_DROPPED = ("weight", "prio", "limit", "launches", "cores", "cycles", "user", "cycles/s", "state")


def _width(columns: Mapping[str, Sequence[Text]]) -> int:
    """Of a table in which names have as little room as they may."""
    widths = {
        heading: max(len(heading), *(cell.cell_len for cell in cells))
        for heading, cells in columns.items()
    }
    widths["name"] = _NAME_WIDTH
    return sum(widths.values()) + _GAP * (len(widths) - 1)


def _bar(part: float, width: int = 20) -> Text:
    full = round(part * width)
    colour = next(colour for least, colour in _COLOURS if part >= least)
    return Text.assemble("[", ("|" * full, colour), " " * (width - full), "]")


def _some(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _percent(part: float) -> str:
    return f"{part * 100:.0f} %"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            value = count / size
            return f"{value:.1f} {unit}" if value < 100 else f"{value:,.0f} {unit}"
    return f"{count} B"


def _count(count: float) -> str:
    """Three digits or more, with a letter for the magnitude."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 100 * size:
            return f"{count / size:,.0f}{letter}"
        if count >= 10 * size:
            return f"{count / size:.1f}{letter}"
        if count >= size:
            return f"{count / size:.2f}{letter}"
    return f"{count:.0f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
