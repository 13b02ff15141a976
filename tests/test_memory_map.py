"""The memory map: what lies where, and what each region permits."""

from __future__ import annotations

import pytest

from pagoda.isa.fault import FaultKind, FaultRaised
from pagoda.isa.memory_map import (
    COMMAND_PORT,
    CORE_COUNT,
    CORE_ID,
    CORE_REGISTERS,
    DMEM,
    IMEM,
    REGION_BYTES,
    REGIONS,
    SRAM,
    Access,
    check_access,
    lookup,
)


@pytest.mark.parametrize(
    ("address", "region"),
    [
        (0x0000_0000, IMEM),
        (0x0FFF_FFFF, IMEM),
        (0x1000_0000, DMEM),
        (0x1FFF_FFFC, DMEM),
        (0x2000_0000, SRAM),
        (0x2FFF_FFFF, SRAM),
        (0x3000_0000, None),
        (0x3FFF_FFFF, None),
        (0x4000_0000, COMMAND_PORT),
        (0x4000_0284, COMMAND_PORT),
        (0x5000_0000, CORE_REGISTERS),
        (0x5000_0007, CORE_REGISTERS),
        (0x5000_0008, None),
        (0x6000_0000, None),
        (0xFFFF_FFFF, None),
    ],
)
def test_lookup(address, region):
    assert lookup(address) is region


def test_core_registers():
    assert (CORE_ID, CORE_COUNT) == (0x5000_0000, 0x5000_0004)


def test_regions_start_on_boundaries_of_their_own():
    bases = [region.base for region in REGIONS]
    assert bases == sorted(set(bases))
    assert all(base % REGION_BYTES == 0 for base in bases)


@pytest.mark.parametrize(
    ("address", "size", "access"),
    [
        (0x0000_0000, 4, Access.FETCH),
        (0x1000_0001, 1, Access.READ),
        (0x1000_0002, 2, Access.WRITE),
        (0x2000_0040, 4, Access.READ),
        (0x4000_0040, 4, Access.WRITE),
        (CORE_ID, 4, Access.READ),
        (CORE_COUNT, 4, Access.READ),
    ],
)
def test_permitted(address, size, access):
    assert check_access(address, size, access) is lookup(address)


@pytest.mark.parametrize(
    ("address", "size", "access", "detail"),
    [
        (0x0, 4, Access.READ, "load of 4 bytes at 0x00000000: IMEM permits only fetch"),
        (0x4, 4, Access.WRITE, "store of 4 bytes at 0x00000004: IMEM permits only fetch"),
        (0x2000_0000, 4, Access.WRITE, "store of 4 bytes at 0x20000000: SRAM permits only load"),
        (0x2000_0002, 2, Access.READ, "load of 2 bytes at 0x20000002: SRAM permits only words"),
        (
            0x4000_0000,
            4,
            Access.READ,
            "load of 4 bytes at 0x40000000: command port permits only store",
        ),
        (
            0x4000_0001,
            1,
            Access.WRITE,
            "store of 1 bytes at 0x40000001: command port permits only words",
        ),
        (
            CORE_ID,
            4,
            Access.WRITE,
            "store of 4 bytes at 0x50000000: core registers permits only load",
        ),
        (
            0x5000_0008,
            4,
            Access.READ,
            "load of 4 bytes at 0x50000008: no region of the memory map",
        ),
        (
            0x3000_0000,
            4,
            Access.WRITE,
            "store of 4 bytes at 0x30000000: no region of the memory map",
        ),
    ],
)
def test_refused(address, size, access, detail):
    with pytest.raises(FaultRaised) as raised:
        check_access(address, size, access)
    assert (raised.value.kind, raised.value.detail) == (FaultKind.BAD_ADDRESS, detail)


def test_a_fetch_outside_imem_is_a_fetch_fault():
    with pytest.raises(FaultRaised) as raised:
        check_access(0x1000_0000, 4, Access.FETCH)
    assert raised.value.kind is FaultKind.FETCH_OUT_OF_RANGE
    assert raised.value.detail == (
        "fetch of 4 bytes at 0x10000000: DMEM permits only load and store"
    )
