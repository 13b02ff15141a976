"""What executes launches: the `Machine` protocol, what all machines share, and what they return.

The definition, the simulator and the RTL are three machines; whoever uses one never asks which.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pagoda.isa.chip import Chip
from pagoda.isa.fault import Fault
from pagoda.isa.program import CONTRACT_VERSION, Launch

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
class InFlight:
    """A command that was in the window when a fault stopped the launch.

    engine: index into ENGINES; pc: of the store that issued it; entry, start, finish: cycles, start
    and finish -1 for one that had not started.
    """

    core: int
    index: int
    command: str
    engine: int
    pc: int
    entry: int
    start: int
    finish: int

    def describe(self) -> str:
        """On one line."""
        work = "waits" if self.start < 0 else f"started {self.start}, until {self.finish}"
        return (
            f"core {self.core} {ENGINES[self.engine]:6} {self.command} (command {self.index}, pc "
            f"{self.pc:#x}): entered {self.entry}, {work}"
        )


@dataclass(frozen=True)
class Result:
    """What a launch did: `cycles` from acceptance to the last core's exit (or to the fault).

    trace: of TRACE_DTYPE, if the machine was asked to keep it. in_flight: what the engines were at
    when it faulted, oldest first, from machines that can tell (the simulator).
    """

    cycles: int
    fault: Fault | None = None
    counters: Counters = field(default_factory=Counters)
    trace: np.ndarray | None = None
    in_flight: tuple[InFlight, ...] = ()


class Interrupted(RuntimeError):
    """A launch was ended from outside before its end. DRAM keeps what it had written by then."""

    def __init__(self, cycles: int) -> None:
        super().__init__(f"the launch was interrupted after {cycles:,} cycles")
        self.cycles = cycles


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


class MachineBase:
    """What every machine does alike: the host's way to DRAM, and one launch at a time."""

    def __init__(self, chip: Chip, dram: np.ndarray, tracing: bool):
        self.chip, self.dram, self.tracing = chip, dram, tracing
        self._launch: Launch | None = None

    def read(self, address: int, nbytes: int) -> bytes:
        """Bytes of DRAM. Raises ValueError outside of it."""
        self._check_range(address, nbytes)
        return self.dram[address : address + nbytes].tobytes()

    def write(self, address: int, data: bytes) -> None:
        """Change bytes of DRAM. Raises ValueError outside of it."""
        self._check_range(address, len(data))
        self.dram[address : address + len(data)] = np.frombuffer(data, np.uint8)

    def _check_range(self, address: int, nbytes: int) -> None:
        if address < 0 or nbytes < 0 or address + nbytes > len(self.dram):
            raise ValueError(
                f"DRAM: {nbytes} bytes at {address:#x}: chip {self.chip.name} has "
                f"{len(self.dram)} bytes; stay below that"
            )

    def start(self, launch: Launch) -> None:
        """Accept a launch. Raises ValueError if the chip cannot run it or another one runs."""
        if self._launch is not None:
            raise ValueError(
                f"launch of {launch.program.name!r}: the last one is unfinished; wait first"
            )
        check_launch(self.chip, launch)
        self._launch = launch

    def _accepted(self) -> Launch:
        """The launch to run now; the next one may be accepted when it is through."""
        launch, self._launch = self._launch, None
        if launch is None:
            raise ValueError("wait: no launch was started; call start first")
        return launch


def check_launch(chip: Chip, launch: Launch) -> None:
    """Raises ValueError for a program of another contract version or chip, or one too large."""
    program = launch.program
    what = f"launch of {program.name!r}"
    if program.contract_version != CONTRACT_VERSION:
        raise ValueError(
            f"{what}: contract version {program.contract_version}: chip {chip.name} follows "
            f"version {CONTRACT_VERSION}; build the program again with this Pagoda"
        )
    differing = [] if program.chip is None else chip.code_differences(program.chip)
    if differing:
        field = differing[0]
        raise ValueError(
            f"{what}: built for chip {program.chip.name} with {field} = "
            f"{getattr(program.chip, field)}: chip {chip.name} has {getattr(chip, field)}; "
            "build the program for this chip"
        )
    for needed, quantity, available in (
        (len(program.code), "bytes of code", chip.imem_bytes),
        (4 * len(launch.args), "bytes of arguments", chip.dmem_bytes),
        (max([s.base + s.size for s in launch.slots], default=0), "as end of a slot",
         chip.dram_bytes),
    ):  # fmt: skip
        if needed > available:
            raise ValueError(
                f"{what}: {needed} {quantity}: chip {chip.name} has room for {available}; "
                "split the program or choose a larger chip"
            )
