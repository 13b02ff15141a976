"""What executes launches: the `Machine` protocol and the plain data it returns.

The definition, the simulator and the RTL are three machines; whoever uses one never asks which.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pagoda.isa.chip import Chip
from pagoda.isa.fault import Fault
from pagoda.isa.program import Launch

ENGINES = ("load", "store", "matrix", "vector")

# Why a command started no earlier: it had just entered; its engine was busy; an older command
# had to finish first; the DRAM port was taken; a bank port was taken; another head started.
CAUSES = ("entry", "engine", "hazard", "dram port", "bank port", "start slot")

TRACE_DTYPE = np.dtype(
    [
        ("core", np.int32),
        ("index", np.int32),  # per core, in program order
        ("pc", np.int32),  # of the store that issued it
        ("bank", np.int32),  # which command
        ("entry", np.int64),
        ("start", np.int64),
        ("free", np.int64),  # the engine takes its next command
        ("finish", np.int64),  # its results are visible
        ("cause", np.int32),
        ("macs", np.int64),
        ("dram_bytes", np.int64),
    ]
)


@dataclass(frozen=True)
class Counters:
    """Sums over all cores of one launch; MACs and bytes as the commands name them."""

    instructions: int = 0
    commands: int = 0
    macs: int = 0
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0
    busy: tuple[int, ...] = (0, 0, 0, 0)  # cycles per engine, in the order of ENGINES

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(
            self.instructions + other.instructions,
            self.commands + other.commands,
            self.macs + other.macs,
            self.dram_read_bytes + other.dram_read_bytes,
            self.dram_write_bytes + other.dram_write_bytes,
            tuple(a + b for a, b in zip(self.busy, other.busy, strict=True)),
        )


@dataclass(frozen=True)
class Result:
    """What a launch did: `cycles` from acceptance to the last core's exit (or to the fault)."""

    cycles: int
    fault: Fault | None = None
    counters: Counters = field(default_factory=Counters)
    trace: np.ndarray | None = None  # of TRACE_DTYPE, if the machine was asked to keep it


class Machine(Protocol):
    """One chip that runs launches, one at a time."""

    chip: Chip
    dram: np.ndarray  # uint8, the chip's whole DRAM as host memory; pages are taken when touched
    tracing: bool  # launches that start now return a trace

    def read(self, address: int, nbytes: int) -> bytes:
        """Bytes of DRAM."""

    def write(self, address: int, data: bytes) -> None:
        """Change bytes of DRAM."""

    def start(self, launch: Launch) -> None:
        """Accept a launch; DRAM belongs to it until `wait` returns."""

    def wait(self) -> Result:
        """Finish the launch accepted last."""
