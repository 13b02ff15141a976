"""Faults as Python exceptions."""

from pagoda.isa import Fault


class DeviceFault(RuntimeError):
    """A launch stopped; the message names kernel, source line, tensor and offset where known.

    The device stays usable: memory keeps what the launch had written before.
    """

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault
