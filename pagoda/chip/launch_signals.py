"""What the launcher and the cores' control units say to one another, and the host to the launcher.

Cycles are contract cycles: cycle 0 accepts the launch, the one before is `begin`.
"""

from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import Fault

CYCLE_BITS = 48
LOAD_ADDRESS_BITS = 18  # words of the largest IMEM or DMEM


class Pause(enum.Enum, shape=2):
    """Why a core executes no instructions."""

    RUNNING = 0
    BARRIER = 1
    EXIT = 2
    FAULT = 3


class LoadTarget(enum.Enum, shape=2):
    """Which memory of every core a word on the load bus goes to."""

    NONE = 0
    IMEM = 1
    DMEM = 2
    SLOTS = 3


class Overflow(data.StructLayout):
    """A core's first command that saturated an int64, if `valid`; INT64_OVERFLOW."""

    def __init__(self):
        super().__init__({"valid": 1, "pc": 32, "command": 32})


class LaunchBus(wiring.Signature):
    """Launcher -> every core.

    `begin` is high in the cycle before cycle 0: whatever a launch resets shows its initial value
    in cycle 0. `release`: the cores start their next instruction in the following cycle. `due`
    and `over`: the cycle is at least, or greater than, the watchdog. From `code_words` on IMEM
    reads as 0. The load bus writes one word a cycle, while no instruction executes.
    """

    def __init__(self):
        super().__init__({
            "begin": Out(1), "release": Out(1), "cycle": Out(CYCLE_BITS),
            "watchdog": Out(CYCLE_BITS), "due": Out(1), "over": Out(1), "entry": Out(32),
            "stack_limit": Out(32), "code_words": Out(32), "slots": Out(7),
            "load_target": Out(LoadTarget), "load_address": Out(LOAD_ADDRESS_BITS),
            "load_data": Out(32),
        })  # fmt: skip


class ControlStatus(wiring.Signature):
    """A control unit -> launcher.

    `outcome`, valid while paused: the fault; of a barrier or an exit (kind 0) the cycle of the
    arrival or the end and the pc of its store. Both counters are those of this launch.
    """

    def __init__(self):
        super().__init__({
            "pause": Out(Pause), "outcome": Out(Fault()), "instructions": Out(CYCLE_BITS),
            "commands": Out(32),
        })  # fmt: skip


class HostPort(wiring.Signature):
    """Host -> launcher: a 32-bit word read or written at a byte address that is a multiple of 4.

    An access happens in every cycle with `valid`; `read_data` shows the word in the next cycle.
    `pagoda.chip.host_map` lists the addresses.
    """

    def __init__(self):
        super().__init__({
            "valid": Out(1), "write": Out(1), "address": Out(24), "write_data": Out(32),
            "read_data": In(32),
        })  # fmt: skip
