"""The DRAM of a context: host memory that the service and one client map."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import numpy as np

from pagoda.runtime.errors import ServiceError

_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4  # no more seals, not shorter, not longer
_MAP_NORESERVE = 0x4000  # or a DRAM larger than the host's memory is refused


class SharedMemory:
    """A context's DRAM: memory that the service and one client map. Nobody can change its size.

    Pages are zero until they are first written. Raises ServiceError if there is no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.fd = -1
        try:
            self.fd = os.memfd_create("pagoda device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, nbytes)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEALS)
            self._map = map_shared(self.fd, nbytes)
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise ServiceError(
                f"no shared memory of {nbytes:,} bytes for the device's DRAM: "
                f"{os.strerror(error.errno or 0)}; raise the limits of the service on memory and "
                "file size (ulimit -v, ulimit -f), or choose a chip with less DRAM"
            ) from None
        self.array = np.frombuffer(self._map, np.uint8)

    def erase(self, start: int, nbytes: int) -> None:
        """Give the pages of a range back to the host; whoever reads them reads zeros."""
        self._map.madvise(mmap.MADV_REMOVE, start, nbytes)

    def taken(self) -> int:
        """Bytes that the host has given so far, whoever touched them."""
        return os.fstat(self.fd).st_blocks * 512 if self.fd >= 0 else 0

    def close(self) -> None:
        """Forget the memory; its pages live as long as somebody maps them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_shared(fd: int, nbytes: int) -> mmap.mmap:
    """Raises OSError."""
    mapped = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | _MAP_NORESERVE)
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:  # a kernel without large pages
        if error.errno != errno.EINVAL:
            raise
    return mapped
