"""Where the cycles of a launch went: each engine's, by what its next command waited for last.

An engine is busy from a command's start until it is free again. The gap before a command is split:
up to the cycle in which the command could first have started it counts as `launch` (before the
first instruction) or `issue` (the control core had not issued it: it computed, or the window was
full), all the rest goes to the command's stall cause in the trace, the last thing it waited for:
a command that waited long for data and then one cycle for the start slot counts as `start slot`.
What follows the last command is `end`.
"""

from __future__ import annotations

import numpy as np

from pagoda.isa.commands import BY_BANK
from pagoda.isa.machine import CAUSES, ENGINES

IDLE = ("launch", "issue", *(cause for cause in CAUSES if cause not in ("entry", "engine")), "end")
_ENTRY_TO_START = 2  # a command that enters in cycle e starts in e + 2 at the earliest


def stalls(
    trace: np.ndarray, cycles: int, cores: int, first_instruction: int
) -> dict[str, dict[str, int]]:
    """Per engine: commands, busy cycles and idle cycles by cause, summed over the cores.

    trace: of a launch that took `cycles` (`Result.trace`). busy + the idle causes = cores * cycles.
    """
    engines = np.array([ENGINES.index(BY_BANK[int(b)].engine) for b in trace["bank"]], np.int64)
    found = {}
    for number, engine in enumerate(ENGINES):
        row = {"commands": 0, "busy": 0, **dict.fromkeys(IDLE, 0)}
        for core in range(cores):
            own = trace[(engines == number) & (trace["core"] == core)]
            _add(row, np.sort(own, order="start"), cycles, first_instruction)
        found[engine] = row
    return found


def _add(row: dict[str, int], own: np.ndarray, cycles: int, first_instruction: int) -> None:
    """Add one core's commands of one engine, in the order of their starts."""
    before = np.concatenate([[0], own["free"]])[: len(own)]
    possible = np.clip(own["entry"] + _ENTRY_TO_START, before, own["start"])
    late = possible - before
    waited = own["start"] - possible
    row["commands"] += len(own)
    row["busy"] += int((own["free"] - own["start"]).sum())
    launch = min(first_instruction, cycles if len(own) == 0 else int(late[0]))
    row["launch"] += launch
    row["issue"] += int(late.sum()) - (launch if len(own) else 0)
    for cause in IDLE:
        if cause in CAUSES:
            row[cause] += int(waited[own["cause"] == CAUSES.index(cause)].sum())
    row["end"] += cycles - (int(own["free"][-1]) if len(own) else launch)
