"""Where the cycles of a launch went: each engine's, by what its next command waited for last.

An engine is busy from a command's start until it is free again. The gap before a command is split:
up to the cycle in which the command could first have started it counts as `issue` (the control core
had not issued it: it computed, or the window was full), all the rest goes to the command's stall
cause in the trace, the last thing it waited for: a command that waited long for data and then one
cycle for the start slot counts as `start slot`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagoda.isa.commands import BY_BANK
from pagoda.isa.machine import CAUSES, ENGINES

WAITS = ("issue", *(cause for cause in CAUSES if cause not in ("entry", "engine")))
IDLE = ("launch", *WAITS, "end")  # with the time before the first instruction and at the end

_ENTRY_TO_START = 2  # a command that enters in cycle e starts in e + 2 at the earliest
_CAUSE_TO_WAIT = np.array([WAITS.index(c) if c in WAITS else 0 for c in CAUSES])


@dataclass(frozen=True)
class Gaps:
    """Per command of a trace, in its order: the number of its engine, the cycles the engine was
    busy with it, and before it had no command issued (`issue`) and waited with it (`waited`) for
    WAITS[wait]."""

    engine: np.ndarray
    busy: np.ndarray
    issue: np.ndarray
    waited: np.ndarray
    wait: np.ndarray

    def sums(self, group: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Busy cycles [group, engine] and idle ones [group, engine, wait]; group: per command."""
        busy = np.zeros((groups, len(ENGINES)), np.int64)
        idle = np.zeros((groups, len(ENGINES), len(WAITS)), np.int64)
        np.add.at(busy, (group, self.engine), self.busy)
        np.add.at(idle, (group, self.engine, 0), self.issue)
        np.add.at(idle, (group, self.engine, self.wait), self.waited)
        return busy, idle


def gaps(trace: np.ndarray, begin: int | None = None) -> Gaps:
    """trace: `Result.trace`. begin: the cycle from which engines count; by default that in which
    their core's first command enters the window."""
    of_bank = {bank: ENGINES.index(command.engine) for bank, command in BY_BANK.items()}
    engine = np.array([of_bank[int(bank)] for bank in trace["bank"]], np.int64)
    issue, waited = np.zeros((2, len(trace)), np.int64)
    for core in np.unique(trace["core"]):
        of_core = trace["core"] == core
        first = trace["entry"][of_core].min() if begin is None else begin
        for number in range(len(ENGINES)):
            mine = np.flatnonzero(of_core & (engine == number))
            mine = mine[np.argsort(trace["start"][mine], kind="stable")]
            own = trace[mine]
            before = np.concatenate([[first], own["free"]])[: len(own)]
            possible = np.clip(own["entry"] + _ENTRY_TO_START, before, own["start"])
            issue[mine] = possible - before
            waited[mine] = own["start"] - possible
    busy = trace["free"] - trace["start"]
    return Gaps(engine, busy, issue, waited, _CAUSE_TO_WAIT[trace["cause"]])


def stalls(
    trace: np.ndarray, cycles: int, cores: int, first_instruction: int
) -> dict[str, dict[str, int]]:
    """Per engine: commands, busy cycles and idle cycles by cause, summed over the cores.

    trace: of a launch that took `cycles`. busy + the idle causes = cores * cycles: `launch` is what
    comes before the first instruction, `end` what follows an engine's last command.
    """
    launch = min(first_instruction, cycles)
    found = gaps(trace, launch)
    busy, idle = found.sums(np.zeros(len(trace), np.int64), 1)
    last = np.full((cores, len(ENGINES)), launch, np.int64)
    np.maximum.at(last, (trace["core"], found.engine), trace["free"])
    return {
        engine: {
            "commands": int((found.engine == n).sum()),
            "busy": int(busy[0, n]),
            "launch": launch * cores,
            **dict(zip(WAITS, map(int, idle[0, n]), strict=True)),
            "end": int((cycles - last[:, n]).sum()),
        }
        for n, engine in enumerate(ENGINES)
    }
