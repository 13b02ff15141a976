"""Races between cores: in one epoch, a byte of DRAM that one core writes and another touches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagoda.sim.checking import (
    LOG_BYTES,
    LOG_COMMAND,
    LOG_CYCLE,
    LOG_FIRST,
    LOG_PC,
    LOG_PLANE_STRIDE,
    LOG_PLANES,
    LOG_READS,
    LOG_ROW_STRIDE,
    LOG_ROWS_COUNT,
    LOG_WRITES,
)


@dataclass(frozen=True)
class Race:
    """The first command that touches what another core's command changed, or changes what it
    read; `address` is one of the bytes."""

    core: int
    cycle: int
    command: int
    pc: int
    address: int


@dataclass(frozen=True)
class _Rows:
    """Byte ranges [first, end) and whose they are; one element per row of DRAM."""

    first: NDArray[np.int64]
    end: NDArray[np.int64]
    core: NDArray[np.int64]
    entry: NDArray[np.int64]  # row of the log


def find_race(logs: list[NDArray[np.int64]]) -> Race | None:
    """The first race of an epoch by (cycle of entry, core); logs: per core, (n, LOG_WORDS)."""
    log = np.concatenate(logs)
    cores = np.repeat(np.arange(len(logs)), [len(part) for part in logs])
    rows = _rows(log, cores)
    if not len(rows.first):
        return None
    # Between two neighbouring bounds every byte has the same history: call that a segment.
    bounds = np.unique(np.concatenate([rows.first, rows.end]))
    first = np.searchsorted(bounds, rows.first)
    end = np.searchsorted(bounds, rows.end)
    suspects = _suspects(log, rows, first, end, len(logs), len(bounds))
    return _first_race(log, rows, first, end, bounds, suspects)


def _rows(log: NDArray, cores: NDArray) -> _Rows:
    counts = log[:, LOG_ROWS_COUNT] * log[:, LOG_PLANES]
    entry = np.repeat(np.arange(len(log)), counts)
    position = np.arange(len(entry)) - np.repeat(np.cumsum(counts) - counts, counts)
    each = log[entry]
    plane, row = np.divmod(position, each[:, LOG_ROWS_COUNT])
    first = each[:, LOG_FIRST] + row * each[:, LOG_ROW_STRIDE] + plane * each[:, LOG_PLANE_STRIDE]
    return _Rows(first, first + each[:, LOG_BYTES], cores[entry], entry)


def _suspects(
    log: NDArray, rows: _Rows, first: NDArray, end: NDArray, cores: int, segments: int
) -> NDArray[np.bool_]:
    """Segments that several cores touch and one writes."""
    touching = np.zeros(segments, np.int64)
    written = np.zeros(segments, bool)
    for core in range(cores):
        mine = rows.core == core
        touching += _covered(first[mine], end[mine], segments)
        writes = mine & (log[rows.entry, LOG_WRITES] != 0)
        written |= _covered(first[writes], end[writes], segments)
    return (touching > 1) & written


def _covered(first: NDArray, end: NDArray, segments: int) -> NDArray[np.bool_]:
    depth = np.zeros(segments, np.int64)
    np.add.at(depth, first, 1)
    np.add.at(depth, end, -1)
    return np.cumsum(depth) > 0


def _first_race(
    log: NDArray,
    rows: _Rows,
    first: NDArray,
    end: NDArray,
    bounds: NDArray,
    suspects: NDArray,
) -> Race | None:
    touched: dict[tuple[int, int, int], list[int]] = {}
    for i in np.nonzero(_any_suspect(suspects, first, end))[0]:
        entry, core = int(rows.entry[i]), int(rows.core[i])
        key = (int(log[entry, LOG_CYCLE]), core, int(log[entry, LOG_COMMAND]))
        touched.setdefault(key, []).append(int(i))
    reader: dict[int, int] = {}  # segment -> the core that read it, -1 for several
    writer: dict[int, int] = {}
    for cycle, core, command in sorted(touched):
        mine = touched[cycle, core, command]
        entry = log[rows.entry[mine[0]]]
        segments = [
            int(s) for i in mine for s in range(first[i], end[i]) if suspects[s]
        ]
        for segment in segments:
            clash = writer.get(segment, core) != core
            clash |= bool(entry[LOG_WRITES]) and reader.get(segment, core) != core
            if clash:
                return Race(core, cycle, command, int(entry[LOG_PC]), int(bounds[segment]))
        for segment in segments:
            if entry[LOG_READS]:
                reader[segment] = core if reader.get(segment, core) == core else -1
            if entry[LOG_WRITES]:
                writer[segment] = core
    return None


def _any_suspect(suspects: NDArray, first: NDArray, end: NDArray) -> NDArray[np.bool_]:
    before = np.concatenate([[0], np.cumsum(suspects)])
    return before[end] > before[first]
