"""Faults: their numbers, their documented meanings, and the line that describes one."""

from __future__ import annotations

import dataclasses

import pytest

from pagoda.isa.fault import Fault, FaultKind, FaultRaised


def test_every_kind_has_a_number_and_a_meaning():
    assert [kind.value for kind in FaultKind] == list(range(1, 19))
    assert FaultKind(14) is FaultKind.TRAP
    meanings = [kind.meaning for kind in FaultKind]
    assert len(set(meanings)) == len(meanings)
    assert all(text[0].isupper() and text.endswith(".") for text in meanings)


def test_describe():
    fault = Fault(FaultKind.TRAP, core=2, pc=0x1C, cycle=940, detail="ebreak")
    assert fault.describe() == "core 2, cycle 940, pc 0x0000001c: TRAP: ebreak"
    fault = Fault(FaultKind.OUT_OF_SLOT, 0, 0x40, 77, 5, 3, 4096, "last byte 4223 of 4096")
    assert fault.describe() == (
        "core 0, cycle 77, pc 0x00000040, command 5, slot 3, offset 4096: "
        "OUT_OF_SLOT: last byte 4223 of 4096"
    )
    assert Fault(FaultKind.WATCHDOG, 1, 8, 1000).describe() == (
        "core 1, cycle 1000, pc 0x00000008: WATCHDOG: The launch exceeded its limit of cycles."
    )


def test_a_raised_fault_becomes_a_fault_when_told_where():
    raised = FaultRaised(FaultKind.BAD_SLOT, "slot 9 of 4", command=1, slot=9, offset=0)
    assert str(raised) == "BAD_SLOT: slot 9 of 4"
    assert raised.at(core=3, pc=16, cycle=50) == Fault(
        FaultKind.BAD_SLOT, 3, 16, 50, 1, 9, 0, "slot 9 of 4"
    )


def test_a_fault_is_frozen():
    fault = Fault(FaultKind.TRAP, 0, 0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fault.core = 1
