"""The definition interpreter: the machine that says what is right, slowly.

Values are sequential: every command is executed when it is issued. Cycles come from the window
rule. Cores run one after another from barrier to barrier, which is legal because between two
barriers no core may touch bytes that another one writes (checking mode: RACE).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pagoda.isa import timing
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.core import Core
from pagoda.isa.fault import Fault, FaultKind
from pagoda.isa.machine import CAUSES, ENGINES, TRACE_DTYPE, Counters, MachineBase, Result


class Definition(MachineBase):
    """A `Machine`. trace: keep every command's cycles; checking: fault on RACE, UNINITIALISED."""

    def __init__(self, chip: Chip, *, trace: bool = False, checking: bool = False):
        super().__init__(chip, np.zeros(chip.dram_bytes, np.uint8), trace)
        self._checking = checking
        self._cores = [Core(chip, number, self.dram, checking) for number in range(chip.cores)]
        self._resident = ""

    def wait(self) -> Result:
        """Run the accepted launch to its end."""
        launch = self._accepted()
        program = launch.program
        resident = program.digest == self._resident
        self._resident = program.digest
        first = timing.first_instruction(self.chip, len(program.code), resident, len(launch.args))
        for core in self._cores:
            core.begin(launch, program.code, first)
        fault = self._run_epochs()
        for core in self._cores:
            core.window.drain()
        ends = [core.cycle for core in self._cores]
        stopped = fault is not None and fault.kind is not FaultKind.INT64_OVERFLOW
        return Result(
            fault.cycle if stopped else max(ends), fault, self._counters(), self._make_trace()
        )

    def _run_epochs(self) -> Fault | None:
        """Run all cores from barrier to barrier; the launch's fault, if any."""
        while True:
            done = [len(core.issued) for core in self._cores]
            for core in self._cores:
                core.run()
            faults = [core.fault for core in self._cores if core.fault is not None]
            faults += self._barrier_mismatches()
            if self._checking and len(self._cores) > 1:
                faults += self._races(done)
            if faults:
                return min(faults, key=lambda fault: (fault.cycle, fault.core))
            if self._cores[0].pause == "exit":
                return self._deferred()
            leave = max(core.cycle for core in self._cores) + timing.BARRIER_CYCLES
            for core in self._cores:
                core.cycle = leave

    def _barrier_mismatches(self) -> list[Fault]:
        arrivals = [core.cycle for core in self._cores if core.pause == "barrier"]
        if not arrivals:
            return []
        detail = f"{len(arrivals)} of {self.chip.cores} cores wait at a barrier"
        return [
            Fault(
                FaultKind.BARRIER_MISMATCH, core.number, core.pc - 4,
                max(core.cycle, min(arrivals)), detail=detail,
            )
            for core in self._cores
            if core.pause == "exit"
        ]  # fmt: skip

    def _deferred(self) -> Fault | None:
        late = [replace(c.overflow, cycle=c.cycle) for c in self._cores if c.overflow is not None]
        return min(late, key=lambda fault: (fault.cycle, fault.core), default=None)

    def _races(self, done: list[int]) -> list[Fault]:
        """The first command, by entry and core, that touches what another core's one changed.

        done: how many commands each core had issued when the epoch began.
        """
        reader: dict[int, int] = {}  # DRAM byte -> the core that read it, -1 for several
        writer: dict[int, int] = {}
        epoch = (
            (issued.entry.entry, core.number, issued)
            for core, before in zip(self._cores, done, strict=True)
            for issued in core.issued[before:]
        )
        for cycle, core, issued in sorted(epoch, key=lambda item: item[:2]):
            reads = [int(byte) for part in issued.read for byte in part]
            writes = [int(byte) for part in issued.written for byte in part]
            clash = [byte for byte in reads + writes if writer.get(byte, core) != core]
            clash += [byte for byte in writes if reader.get(byte, core) != core]
            if clash:
                detail = f"DRAM byte {clash[0]:#x}: another core touched it since the last barrier"
                index = issued.entry.index
                return [Fault(FaultKind.RACE, core, issued.pc, cycle, index, detail=detail)]
            for byte in reads:
                reader[byte] = core if reader.get(byte, core) == core else -1
            for byte in writes:
                writer[byte] = core
        return []

    def _counters(self) -> Counters:
        total = Counters()
        for core in self._cores:
            entries = [issued.entry for issued in core.issued]
            total += Counters(
                core.instructions,
                len(entries),
                sum(issued.macs for issued in core.issued),
                DRAM_ATOM_BYTES * sum(issued.read_atoms for issued in core.issued),
                DRAM_ATOM_BYTES * sum(issued.write_atoms for issued in core.issued),
                tuple(sum(e.free - e.start for e in entries if e.engine == n) for n in ENGINES),
            )
        return total

    def _make_trace(self) -> np.ndarray | None:
        if not self.tracing:
            return None
        rows = [
            (
                core.number, e.index, issued.pc, issued.bank, e.entry, e.start, e.free, e.finish,
                CAUSES.index(e.cause), issued.macs,
                DRAM_ATOM_BYTES * (issued.read_atoms + issued.write_atoms),
            )
            for core in self._cores
            for issued in core.issued
            for e in (issued.entry,)
        ]  # fmt: skip
        return np.array(rows, TRACE_DTYPE)
