"""The device's operating system: memory, launches, faults, accounting, for one process or many.

Enters: programs and executables (plain data), tensors as DRAM addresses. Leaves: results in DRAM,
`Result`s, faults as exceptions. `open_device` gives a device of the process's own, or a share of
the one that a device service runs for all (`service`). May import isa, sim and compiler.
"""

from pagoda.runtime.device import Device, LaunchRecord, host_threads
from pagoda.runtime.errors import DeviceFault, DeviceLost, ServiceError
from pagoda.runtime.memory import Allocator, OutOfDeviceMemory
from pagoda.runtime.service.discovery import open_device

__all__ = [
    "Allocator",
    "Device",
    "DeviceFault",
    "DeviceLost",
    "LaunchRecord",
    "OutOfDeviceMemory",
    "ServiceError",
    "host_threads",
    "open_device",
]
