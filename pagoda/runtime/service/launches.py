"""Launches and their results as bytes: small and quick to pack, for they are the hot path.

A launch names its program by the number that the service gave it. All words little endian:

    program, flags, arguments, slots   uint32 each; flags: 1 = keep a trace
    watchdog                           uint64, cycles
    the arguments                      uint32 each
    the slots                          uint64 base, uint32 size, uint32 permissions each

A result is its outcome, cycles, counters, where the trace is, and the fault if there is one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from fractions import Fraction
from typing import Any

import msgpack
import numpy as np

from pagoda.isa import Chip, Counters, Fault, FaultKind, Launch, Result, Slot
from pagoda.isa.chip import SLOTS, ChipError
from pagoda.isa.machine import TRACE_DTYPE, InFlight
from pagoda.runtime.service.protocol import ProtocolError

_LAUNCH = struct.Struct("<IIIIQ")
_SLOT = struct.Struct("<QII")
_RESULT = struct.Struct("<IIq9qQ")
_TRACING, _READABLE, _WRITABLE = 1, 1, 2
_WORD = 0xFFFFFFFF
_INLINE_TRACE_BYTES = 1 << 16


class Outcome(IntEnum):
    """How a launch ended."""

    FINISHED = 0  # by itself, also with a fault
    UNKNOWN_PROGRAM = 1  # the service has forgotten the program: send it again
    INTERRUPTED = 2  # by its own context


_OUTCOMES = dict(enumerate(Outcome))


@dataclass(frozen=True)
class PackedLaunch:
    """A launch as it comes from a client, its ranges not yet checked."""

    program: int
    tracing: bool
    watchdog: int
    args: tuple[int, ...]
    slots: tuple[Slot, ...]


def pack_launch(number: int, tracing: bool, launch: Launch) -> bytes:
    args, slots = launch.args, launch.slots
    head = _LAUNCH.pack(number, tracing, len(args), len(slots), min(launch.watchdog, 1 << 63))
    words = struct.pack(f"<{len(args)}I", *[arg & _WORD for arg in args])
    table = [
        _SLOT.pack(s.base, s.size, _READABLE * s.readable + _WRITABLE * s.writable) for s in slots
    ]
    return b"".join((head, words, *table))


def unpack_launch(body: bytes) -> PackedLaunch:
    """Raises ProtocolError for bytes that are no launch."""
    if len(body) < _LAUNCH.size:
        raise ProtocolError("LAUNCH: the body is too short")
    program, flags, arg_count, slot_count, watchdog = _LAUNCH.unpack_from(body)
    start = _LAUNCH.size + 4 * arg_count
    if flags > 1 or slot_count > SLOTS or len(body) != start + _SLOT.size * slot_count:
        raise ProtocolError("LAUNCH: flags, number of slots or length of the body are wrong")
    args = struct.unpack_from(f"<{arg_count}I", body, _LAUNCH.size)
    slots = []
    for base, size, permissions in _SLOT.iter_unpack(body[start:]):
        if permissions > _READABLE + _WRITABLE:
            raise ProtocolError(f"LAUNCH: there are no permissions {permissions}")
        try:
            readable, writable = bool(permissions & _READABLE), bool(permissions & _WRITABLE)
            slots.append(Slot(base, size, readable, writable))
        except ValueError as error:
            raise ProtocolError(f"LAUNCH: {error}") from None
    if not watchdog:
        raise ProtocolError("LAUNCH: a watchdog of 0 cycles")
    return PackedLaunch(program, bool(flags), watchdog, args, tuple(slots))


def pack_result(outcome: Outcome, result: Result | None = None) -> tuple[bytes, int | None]:
    """The body, and a descriptor of memory with the trace if it is too long for the body."""
    if result is None:
        return _RESULT.pack(outcome, 0, *[0] * 11), None
    c = result.counters
    fault = _fault_bytes(result)
    trace = b"" if result.trace is None else result.trace.tobytes()
    apart = _in_memory(trace) if len(trace) > _INLINE_TRACE_BYTES else None
    head = _RESULT.pack(
        outcome, len(fault), result.cycles, c.instructions, c.commands, c.macs,
        c.dram_read_bytes, c.dram_write_bytes, *c.busy, len(trace),
    )  # fmt: skip
    return head + fault + (b"" if apart is not None else trace), apart


def unpack_result(body: bytes, fds: Sequence[int], traced: bool) -> tuple[Outcome, Result]:
    """traced: whether a trace was asked for. Raises ProtocolError."""
    if len(body) < _RESULT.size:
        raise ProtocolError("RESULT: the body is too short")
    outcome, fault_bytes, cycles, *sums, trace_bytes = _RESULT.unpack_from(body)
    if outcome not in _OUTCOMES:
        raise ProtocolError(f"RESULT: there is no outcome {outcome}")
    start = _RESULT.size + fault_bytes
    fault, in_flight = _fault(body[_RESULT.size : start]) if fault_bytes else (None, ())
    trace = None
    if traced:
        data = body[start:]
        if fds:
            with open(fds[0], "rb", closefd=False) as memory:
                memory.seek(0)
                data = memory.read()
        if len(data) != trace_bytes or trace_bytes % TRACE_DTYPE.itemsize:
            raise ProtocolError("RESULT: the trace is not as long as it should be")
        trace = np.frombuffer(data, TRACE_DTYPE)
    counters = Counters(*sums[:5], tuple(sums[5:]))
    return _OUTCOMES[outcome], Result(cycles, fault, counters, trace, in_flight)


def _fault_bytes(result: Result) -> bytes:
    """The fault, and what was in flight; nothing if there is no fault."""
    fault = result.fault
    if fault is None:
        return b""
    return msgpack.packb(
        [int(fault.kind), fault.core, fault.pc, fault.cycle, fault.command, fault.slot,
         fault.offset, fault.detail, [astuple(each) for each in result.in_flight]]
    )  # fmt: skip


def _fault(data: bytes) -> tuple[Fault, tuple[InFlight, ...]]:
    try:
        kind, *rest, in_flight = msgpack.unpackb(data)
        return Fault(FaultKind(kind), *rest), tuple(InFlight(*each) for each in in_flight)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"RESULT: its fault is none ({error})") from None


def _in_memory(data: bytes) -> int:
    """A descriptor of memory that holds the bytes."""
    fd = os.memfd_create("pagoda trace", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as memory:
        memory.write(data)
    return fd


def pack_chip(chip: Chip) -> dict[str, Any]:
    """A chip as a map of plain values."""
    found = dict(vars(chip))
    fields = {name: found[name] for name in Chip.__dataclass_fields__}
    fields["matrix_types"] = list(chip.matrix_types)
    fields["dram_bytes_per_cycle"] = str(chip.dram_bytes_per_cycle)
    return fields


def unpack_chip(fields: dict[str, Any]) -> Chip:
    """Raises ProtocolError."""
    try:
        values = dict(fields)
        values["matrix_types"] = tuple(values["matrix_types"])
        values["dram_bytes_per_cycle"] = Fraction(values["dram_bytes_per_cycle"])
        return Chip(**values)
    except (ChipError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ProtocolError(f"a chip that is none ({error})") from None
