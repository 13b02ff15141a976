"""Which device a program gets: that of a running service, or one of its own.

The environment variable PAGODA_DEVICE decides: "embedded", the name of a service, or the path of
its socket. Without it, a program takes the service named "default" if that runs and has the chip
asked for, and else a device of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pagoda.isa import PRESETS, Chip
from pagoda.runtime.device import Device
from pagoda.runtime.errors import ServiceError
from pagoda.runtime.memory import GrantedAllocator
from pagoda.runtime.policy import PRIORITIES, WEIGHTS
from pagoda.runtime.service.grants import unit_bytes
from pagoda.runtime.service.limits import parse_bytes
from pagoda.runtime.service.paths import DEFAULT_NAME, EMBEDDED, socket_path
from pagoda.runtime.service.remote import Connection, NotRunning, RemoteMachine

VARIABLE = "PAGODA_DEVICE"
DEFAULT_CHIP = "edge"


def find_service(
    chip: Chip | None, environment: Mapping[str, str] = os.environ
) -> Connection | None:
    """A connection to the service that a program for `chip` (None: for any) has to use; None if it
    is to have a device of its own. Raises ServiceError: the service that PAGODA_DEVICE names does
    not run or has another chip, or a service refuses.
    """
    named = environment.get(VARIABLE, "")
    if named == EMBEDDED:
        return None
    path = socket_path(named or DEFAULT_NAME)
    try:
        connection = Connection(path, owners=None if named else (os.geteuid(), 0))
    except NotRunning:
        if named:
            raise
        return None
    if chip in (None, connection.chip):
        return connection
    found = connection.chip
    connection.close()
    if not named:
        return None
    raise ServiceError(
        f"chip {chip.name!r} was asked for, but {VARIABLE}={named} names a service whose chip "
        f"{found.name!r} differs; leave the chip out to use that one, or set {VARIABLE}={EMBEDDED} "
        "for a device of this program's own"
    )


def chip_of_service(environment: Mapping[str, str] = os.environ) -> Chip:
    """The chip of a program that asks for none: that of the service it would use, else "edge"."""
    connection = find_service(None, environment)
    if connection is None:
        return PRESETS[DEFAULT_CHIP]
    connection.close()
    return connection.chip


def open_device(
    chip: Chip | None = None,
    *,
    cores: int | None = None,
    priority: int = 0,
    time_share: float | None = None,
    memory_limit: int | str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Device:
    """The device for a program: a context on a running service, or an embedded one (see above).

    chip: None takes the service's, or "edge". cores: a partition of the chip with so many of its
    cores; None: all. memory_limit: bytes of DRAM, or a text such as "2 GiB". priority, time_share:
    before which others launches come, and what share of the time they get (a weight; others have
    1.0); a device of its own has no others. Raises ServiceError, ChipError, and ValueError for a
    memory_limit or time_share that is none.
    """
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    if time_share is not None and not WEIGHTS[0] <= time_share <= WEIGHTS[1]:
        raise ValueError(
            f"time_share = {time_share}: must be from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}; 2 is twice "
            "the share of those that ask for none"
        )
    if priority not in PRIORITIES:
        raise ValueError(
            f"priority = {priority}: must be a whole number from {PRIORITIES[0]} to "
            f"{PRIORITIES[-1]}; 0 is the usual one, and more goes first"
        )
    connection = find_service(chip, environment)
    if connection is None:
        chip = chip or PRESETS[DEFAULT_CHIP]
        return Device(chip.partition(cores or chip.cores), memory_limit=limit)
    try:
        machine = RemoteMachine(
            connection, cores=cores, priority=priority, time_share=time_share, memory_limit=limit
        )
    except BaseException:
        connection.close()
        raise
    unit = unit_bytes(machine.chip.dram_bytes)
    memory = GrantedAllocator(machine.memory_limit, unit, machine)
    return Device(machine.chip, machine, memory=memory)
