"""The device operating system of one process: memory, launches, faults, accounting.

Enters: programs and executables (plain data), tensors as DRAM addresses. Leaves: results in DRAM,
`Result`s, faults as exceptions. May import isa, sim and compiler.
"""

from pagoda.runtime.device import Device, LaunchRecord, host_threads
from pagoda.runtime.errors import DeviceFault
from pagoda.runtime.memory import Allocator, OutOfDeviceMemory

__all__ = [
    "Allocator",
    "Device",
    "DeviceFault",
    "LaunchRecord",
    "OutOfDeviceMemory",
    "host_threads",
]
