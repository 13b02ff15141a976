"""The contract between software and chip, as tables and short Python: the living definition.

Enters: nothing. Leaves: plain data (`Chip`, `Program`, `Launch`, `Slot`, `Fault`, `Result`), the
tables with their encoders and printers (`rv32`, `commands`, `functions`), the arithmetic
(`numbers`, `tables`, `accumulation`), what commands touch, may not do, mean and take (`access`,
`checks`, `meaning`, `timing`, `window`), the `Machine` protocol and the machine that defines all
others, `Definition`. May import: the standard library and numpy.

The simulator and the RTL may import encodings and durations from here, never a meaning.
"""

from pagoda.isa.chip import PRESETS, Chip, ChipError, load_chip
from pagoda.isa.commands import COMMANDS
from pagoda.isa.definition import Definition
from pagoda.isa.fault import Fault, FaultKind
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.machine import (
    CAUSES,
    ENGINES,
    TRACE_DTYPE,
    Counters,
    Interrupted,
    Machine,
    Result,
)
from pagoda.isa.numbers import DType
from pagoda.isa.program import CONTRACT_VERSION, Launch, LineEntry, Program, Slot
from pagoda.isa.rv32 import RV32
from pagoda.isa.timing import Duration, duration
from pagoda.isa.window import Entry, Window

__all__ = [
    "CAUSES",
    "COMMANDS",
    "CONTRACT_VERSION",
    "ENGINES",
    "PRESETS",
    "RV32",
    "TRACE_DTYPE",
    "VECTOR_FUNCTIONS",
    "Chip",
    "ChipError",
    "Counters",
    "DType",
    "Definition",
    "Duration",
    "Entry",
    "Fault",
    "FaultKind",
    "Interrupted",
    "Launch",
    "LineEntry",
    "Machine",
    "Program",
    "Result",
    "Slot",
    "Window",
    "duration",
    "load_chip",
]
