"""What goes wrong on a device, as Python exceptions."""

from pagoda.isa import Fault


class DeviceFault(RuntimeError):
    """A launch stopped; the message names kernel, source line, tensor and offset where known.

    The device stays usable: memory keeps what the launch had written before.
    """

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault


class DeviceLost(RuntimeError):
    """The device can run nothing more for this process: it was reset, or its service is gone.

    What its tensors hold can still be copied to the host; to go on, open the device again.
    """


class ServiceError(RuntimeError):
    """The device service cannot be reached, or refuses; the message says why and what helps."""
