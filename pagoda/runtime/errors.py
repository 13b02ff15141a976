"""What goes wrong on a device, as Python exceptions."""

from collections.abc import Sequence

from pagoda.isa import Fault
from pagoda.isa.machine import InFlight


class DeviceFault(RuntimeError):
    """A launch stopped; the message names kernel, source line, tensor and offset where known.

    The device stays usable: memory keeps what the launch had written before. in_flight: what the
    engines were at; a note of the exception, which tracebacks show, lists it.
    """

    def __init__(self, message: str, fault: Fault, in_flight: Sequence[InFlight] = ()) -> None:
        super().__init__(message)
        self.fault, self.in_flight = fault, tuple(in_flight)
        if in_flight:
            lines = "".join(f"\n  {each.describe()}" for each in in_flight)
            self.add_note(f"engines at cycle {fault.cycle}:{lines}")


class DeviceLost(RuntimeError):
    """The device can run nothing more for this process: it was reset, or its service is gone.

    What its tensors hold can still be copied to the host; to go on, open the device again.
    """


class ServiceError(RuntimeError):
    """The device service cannot be reached, or refuses; the message says why and what helps."""
