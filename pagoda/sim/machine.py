"""The fast simulator: a `Machine` whose values and cycles are the definition's, in compiled code.

Values are computed when a command enters the window, in program order; cycles come from the window
rule. Cores run one after another, or on host threads, from barrier to barrier: between barriers
neither their values nor their cycles depend on one another.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pagoda.isa import timing
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.commands import COMMANDS
from pagoda.isa.fault import Fault, FaultKind
from pagoda.isa.machine import (
    TRACE_DTYPE,
    Counters,
    InFlight,
    Interrupted,
    MachineBase,
    Result,
)
from pagoda.isa.program import Launch
from pagoda.sim import layout as at
from pagoda.sim.checking import LOG_WORDS
from pagoda.sim.core import run, settle
from pagoda.sim.decode import predecode
from pagoda.sim.details import detail
from pagoda.sim.helper import Helper
from pagoda.sim.matmul import SCRATCH_BYTES
from pagoda.sim.races import find_race
from pagoda.sim.values import JOB_WORDS

_COMMAND_NAMES = {command.bank: name for name, command in COMMANDS.items()}
_FIRST_TRACE_ROWS = 1 << 12
_FIRST_LOG_ROWS = 1 << 12
_DMEM_BASE = 0x1000_0000
_SLICE_CYCLES = 60_000_000  # about a tenth of a second of plain instructions
_SLICE_WORK = 50_000_000  # about 50 ms
WORK_ALONE = 200_000  # launches of less are over before a helper thread has woken


class TraceTooLong(ValueError):
    """A launch's trace does not fit; the machine is usable again."""


class Simulator(MachineBase):
    """A `Machine`. trace: keep every command's cycles; checking: fault on RACE, UNINITIALISED.

    threads: host threads. The cores of the chip are spread over them; the values of a single core
    are worked out on a second one. Neither values nor cycles depend on that. dram: the memory to
    work on, as many bytes as the chip has; by default new memory. trace_room: asked whether the
    trace of a core may take so many bytes; if not, the launch ends with TraceTooLong.
    """

    def __init__(
        self,
        chip: Chip,
        *,
        trace: bool = False,
        checking: bool = False,
        threads: int = 1,
        dram: NDArray[np.uint8] | None = None,
        trace_room: Callable[[int], bool] | None = None,
    ):
        if threads < 1:
            raise ValueError(f"simulator: threads = {threads}: must be 1 or more; leave it out")
        _require_subnormals()
        super().__init__(chip, _lazy_memory(chip.dram_bytes) if dram is None else dram, trace)
        self._checking = checking
        helped = threads > 1 and chip.cores == 1
        room = trace_room or (lambda nbytes: True)
        self._cores = [
            _Core(chip, number, self.dram, checking, helped, room) for number in range(chip.cores)
        ]
        self._threads = min(threads, chip.cores)
        self._pool: ThreadPoolExecutor | None = None  # when it is first needed
        self._resident = ""
        self._code = np.zeros(0, np.int64)
        self._interrupted = False

    def start(self, launch: Launch) -> None:
        """See `MachineBase.start`."""
        super().start(launch)
        self._interrupted = False
        for core in self._cores:
            core.abandon(False)

    def interrupt(self) -> None:
        """End the launch that was accepted last, from another thread: `wait` leaves between two
        slices of work, within about a tenth of a second, with Interrupted."""
        self._interrupted = True
        for core in self._cores:
            core.abandon(True)

    def wait(self) -> Result:
        """Run the accepted launch to its end. Ctrl-C leaves between two slices of work, and so
        does `interrupt`, with Interrupted."""
        launch = self._accepted()
        program = launch.program
        resident = program.digest == self._resident
        if not resident:
            self._code = predecode(program.code, self.chip.imem_bytes)
            self._resident = program.digest
        first = timing.first_instruction(
            self.chip, len(program.code), resident, len(launch.args)
        )
        for core in self._cores:
            core.begin(launch, self._code, first, self.tracing)
        try:
            fault = self._run_epochs()
        finally:
            for core in self._cores:
                core.end()
        for core in self._cores:
            settle(core.state)
        stopped = fault is not None and fault.kind is not FaultKind.INT64_OVERFLOW
        cycles = fault.cycle if stopped else max(core.cycle for core in self._cores)
        counters = sum((core.counters() for core in self._cores), Counters())
        trace = np.concatenate([c.trace_rows() for c in self._cores]) if self.tracing else None
        in_flight: list[InFlight] = []
        if stopped:
            for core in self._cores:
                in_flight += core.in_flight(cycles)
        return Result(cycles, fault, counters, trace, tuple(in_flight))

    def _run_epochs(self) -> Fault | None:
        """Run all cores from barrier to barrier; the launch's fault, if any."""
        while True:
            self._run_cores()
            self._leave_if_interrupted()  # before anything: values may be missing
            faults = [core.fault() for core in self._cores if core.reason == at.FAULTED]
            faults += self._barrier_mismatches()
            if self._checking and len(self._cores) > 1:
                faults += self._races()
            if faults:
                return min(faults, key=lambda fault: (fault.cycle, fault.core))
            if self._cores[0].reason == at.EXIT:
                late = [c.overflow() for c in self._cores if c.state[at.OVERFLOW_PC] >= 0]
                return min(late, key=lambda fault: (fault.cycle, fault.core), default=None)
            leave = max(core.cycle for core in self._cores) + timing.BARRIER_CYCLES
            for core in self._cores:
                core.state[at.CYCLE] = leave

    def _run_cores(self) -> None:
        if self._threads == 1:
            for core in self._cores:
                while not core.run_slice():
                    self._leave_if_interrupted()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "pagoda core")
        waiting = list(self._cores)
        while waiting:  # slice by slice, so that Ctrl-C need not wait for the epoch's end
            ended = list(self._pool.map(_Core.run_slice, waiting))
            waiting = [core for core, over in zip(waiting, ended, strict=True) if not over]
            self._leave_if_interrupted()

    def _leave_if_interrupted(self) -> None:
        if self._interrupted:
            raise Interrupted(max(core.cycle for core in self._cores))

    def _barrier_mismatches(self) -> list[Fault]:
        arrivals = [core.cycle for core in self._cores if core.reason == at.BARRIER]
        if not arrivals:
            return []
        text = f"{len(arrivals)} of {self.chip.cores} cores wait at a barrier"
        return [
            Fault(
                FaultKind.BARRIER_MISMATCH, core.number, int(core.state[at.PC]) - 4,
                max(core.cycle, min(arrivals)), detail=text,
            )
            for core in self._cores
            if core.reason == at.EXIT
        ]  # fmt: skip

    def _races(self) -> list[Fault]:
        race = find_race([core.take_log() for core in self._cores])
        if race is None:
            return []
        text = f"DRAM byte {race.address:#x}: another core touched it since the last barrier"
        return [
            Fault(FaultKind.RACE, race.core, race.pc, race.cycle, race.command, detail=text)
        ]


class _Core:
    """One core: its memories, which outlive launches, and the state that compiled code works on."""

    def __init__(
        self,
        chip: Chip,
        number: int,
        dram: NDArray,
        checking: bool,
        helped: bool,
        trace_room: Callable[[int], bool],
    ):
        self.chip, self.number, self._trace_room = chip, number, trace_room
        self._tracing, self._checking = False, checking
        self.state = np.zeros(at.STATE_WORDS, np.int64)
        self.sram = _lazy_memory(chip.sram_bytes)
        self.acc = _lazy_memory(chip.acc_bytes)
        self.dmem = np.zeros(chip.dmem_bytes, np.uint8)
        self._registers = np.zeros(33, np.int32)
        self._lanes = np.zeros(at.LANE_BUFFERS * at.LANE_BUFFER_BYTES, np.uint8)
        self._scratch = np.zeros(SCRATCH_BYTES, np.uint8)
        self._written = (
            np.zeros(chip.sram_bytes if checking else 1, np.uint8),
            np.zeros(chip.acc_bytes if checking else 1, np.uint8),
        )
        self._trace = np.zeros((1, at.TRACE_WORDS), np.int64)
        self._log = np.zeros((_FIRST_LOG_ROWS if checking else 1, LOG_WORDS), np.int64)
        self.reason = at.SLICE
        self._jobs = _aligned_words(JOB_WORDS)
        self._set_chip(dram)
        self._helper = Helper(self.state, self._jobs, self.sram, self.acc) if helped else None

    def _set_chip(self, dram: NDArray) -> None:
        chip, st = self.chip, self.state
        share = chip.dram_share
        matrix_types = ("bf16" in chip.matrix_types) + 2 * ("int8" in chip.matrix_types)
        for index, value in (
            (at.LANES, chip.lanes),
            (at.ROWS, chip.rows),
            (at.COLS, chip.cols),
            (at.PSUM_LATENCY, chip.psum_latency),
            (at.PORT_BYTES, chip.port_bytes),
            (at.SRAM_BYTES, chip.sram_bytes),
            (at.ACC_BYTES, chip.acc_bytes),
            (at.SRAM_BANK_SHIFT, chip.bank_bytes("sram").bit_length() - 1),
            (at.ACC_BANK_SHIFT, chip.bank_bytes("acc").bit_length() - 1),
            (at.IMEM_BYTES, chip.imem_bytes),
            (at.DMEM_BYTES, chip.dmem_bytes),
            (at.WINDOW, chip.window),
            (at.PERIOD_NUMERATOR, DRAM_ATOM_BYTES * share.denominator),
            (at.PERIOD_DENOMINATOR, share.numerator),
            (at.DRAM_LATENCY, chip.dram_latency),
            (at.MATRIX_TYPES, matrix_types),
            (at.CORE_ID, self.number),
            (at.CORE_COUNT, chip.cores),
            (at.REGISTERS_AT, self._registers.ctypes.data),
            (at.DMEM_AT, self.dmem.ctypes.data),
            (at.SRAM_AT, self.sram.ctypes.data),
            (at.ACC_AT, self.acc.ctypes.data),
            (at.DRAM_AT, dram.ctypes.data),
            (at.LANES_AT, self._lanes.ctypes.data),
            (at.SRAM_WRITTEN_AT, self._written[0].ctypes.data),
            (at.ACC_WRITTEN_AT, self._written[1].ctypes.data),
            (at.CHECKING, self._checking),
            (at.JOBS_AT, self._jobs.ctypes.data),
        ):
            st[index] = value

    def begin(
        self, launch: Launch, code: NDArray[np.int64], first_cycle: int, tracing: bool
    ) -> None:
        """Set the launch's initial state; command fields and memories keep their contents."""
        st = self.state
        st[at.TRACING] = self._tracing = tracing
        if tracing and len(self._trace) < _FIRST_TRACE_ROWS:
            self._trace = np.zeros((_FIRST_TRACE_ROWS, at.TRACE_WORDS), np.int64)
        args = np.array([arg & 0xFFFFFFFF for arg in launch.args], "<u4").view(np.uint8)
        self.dmem[: len(args)] = args
        self._registers[:] = 0
        self._registers[2] = _DMEM_BASE + self.chip.dmem_bytes
        st[at.PC : at.FIELDS] = 0
        st[at.CODE_AT] = code.ctypes.data
        st[at.PC] = launch.program.entry
        st[at.CYCLE] = first_cycle
        st[at.WATCHDOG] = min(launch.watchdog, at.NEVER >> 1)
        st[at.STACK_LIMIT] = launch.program.stack_limit
        st[at.LAST_START] = -1
        st[at.OVERFLOW_PC] = -1
        st[at.SLOT_COUNT] = len(launch.slots)
        for number, slot in enumerate(launch.slots):
            place = at.SLOTS + at.SLOT_WORDS * number
            permissions = at.READABLE * slot.readable + at.WRITABLE * slot.writable
            st[place : place + 3] = slot.base, slot.size, permissions
        st[at.ORDER : at.ORDER + at.MAX_WINDOW + 1] = range(at.MAX_WINDOW + 1)
        for written in self._written:
            written[:] = 0
        st[at.WORK_LIMIT] = _SLICE_WORK if self._helper is None else WORK_ALONE
        self._point_at_buffers()

    def _point_at_buffers(self) -> None:
        st = self.state
        st[at.TRACE_AT] = self._trace.ctypes.data
        st[at.TRACE_ROWS] = len(self._trace) if self._tracing else at.NEVER
        st[at.LOG_AT] = self._log.ctypes.data
        st[at.LOG_ROWS] = len(self._log)

    def run_slice(self) -> bool:
        """Run for a while; whether the core reached a barrier, its exit or a fault."""
        st = self.state
        st[at.LIMIT] = st[at.CYCLE] + _SLICE_CYCLES
        self.reason = run(st, self.sram, self.acc, self._scratch, self._jobs)
        if self._helper is not None:
            self._helper.merge()
        if self.reason == at.TRACE_FULL:
            if not self._trace_room(2 * self._trace.nbytes):
                rows, self._trace = len(self._trace), self._trace[:1].copy()
                raise TraceTooLong(
                    f"the trace of core {self.number} has {rows:,} commands, and there is no room "
                    "for more; trace shorter launches, or fewer"
                )
            self._trace = np.concatenate([self._trace, np.zeros_like(self._trace)])
        elif self.reason == at.LOG_FULL:
            room = np.zeros((max(len(self._log), 1 << 20), LOG_WORDS), np.int64)
            self._log = np.concatenate([self._log, room])
        elif self.reason != at.SLICE:
            return True
        elif self._helper is not None and not st[at.HELPED]:
            st[at.WORK_LIMIT] = _SLICE_WORK
            self._helper.start()
        self._point_at_buffers()
        return False

    def abandon(self, abandoned: bool) -> None:
        """Whether what the launch computes is wanted no more; for any thread."""
        self._jobs[at.ABANDONED] = abandoned

    def end(self) -> None:
        """The launch is over, or was left."""
        if self._helper is not None:
            self._helper.stop()

    @property
    def cycle(self) -> int:
        """Cycle of the arrival, exit or fault that ended the last epoch."""
        return int(self.state[at.CYCLE])

    def fault(self) -> Fault:
        kind, cycle, pc, command, slot, offset, code, value, value_2 = (
            int(word) for word in self.state[at.FAULT : at.FAULT_VALUE_2 + 1]
        )
        text = detail(code, value, value_2)
        return Fault(FaultKind(kind), self.number, pc, cycle, command, slot, offset, text)

    def in_flight(self, cycle: int) -> list[InFlight]:
        """The window's commands that had not finished by then, oldest first; after `settle`."""
        found = []
        for number in self.state[at.ORDER : at.ORDER + self.state[at.IN_FLIGHT]].tolist():
            first = at.ENTRIES + at.ENTRY_WORDS * number
            entry = self.state[first : first + at.ENTRY_WORDS].tolist()
            start, finish = entry[at.E_START], entry[at.E_FINISH]
            if finish <= cycle:
                continue
            what = (self.number, entry[at.E_INDEX], _COMMAND_NAMES[entry[at.E_BANK]],
                    entry[at.E_ENGINE], entry[at.E_PC], entry[at.E_ENTRY])  # fmt: skip
            times = (start, finish) if start <= cycle else (-1, -1)
            found.append(InFlight(*what, *times))
        return found

    def overflow(self) -> Fault:
        pc, command = (int(self.state[i]) for i in (at.OVERFLOW_PC, at.OVERFLOW_COMMAND))
        text = "an int64 value was saturated to int32"
        return Fault(
            FaultKind.INT64_OVERFLOW, self.number, pc, self.cycle, command, detail=text
        )

    def counters(self) -> Counters:
        st = self.state
        numbers = (at.INSTRUCTIONS, at.COMMANDS, at.MACS, at.READ_BYTES, at.WRITE_BYTES)
        busy = tuple(int(cycles) for cycles in st[at.BUSY : at.BUSY + 4])
        return Counters(*(int(st[index]) for index in numbers), busy)

    def trace_rows(self) -> NDArray:
        rows = self._trace[: self.state[at.COMMANDS]]
        result = np.zeros(len(rows), TRACE_DTYPE)
        for column, name in enumerate(TRACE_DTYPE.names):
            result[name] = rows[:, column]
        return result

    def take_log(self) -> NDArray[np.int64]:
        """The epoch's DRAM accesses (checking mode), which are forgotten."""
        used, self.state[at.LOG_USED] = int(self.state[at.LOG_USED]), 0
        return self._log[:used].copy()


def _aligned_words(count: int) -> NDArray[np.int64]:
    """Zeros that begin on a cache line."""
    words = np.zeros(count + 7, np.int64)
    skipped = -words.ctypes.data % 64 // 8
    return words[skipped : skipped + count]


def _lazy_memory(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that the host commits page by page, when it is first touched."""
    options = {}
    if hasattr(mmap, "MAP_ANONYMOUS"):
        # No reservation, or a chip's DRAM larger than the host's memory is refused.
        linux = 0x4000 if sys.platform == "linux" else 0  # the module names it from 3.12 on
        reserve_nothing = getattr(mmap, "MAP_NORESERVE", linux)
        options["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = mmap.mmap(-1, nbytes, **options)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Weights are read once per token: with small pages half the time goes to page walks.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _require_subnormals() -> None:
    """Raise if this process flushes subnormal numbers: every result would be suspect."""
    smallest = np.array([1], np.uint32).view(np.float32)
    half = np.array([0.5], np.float32)
    normal = np.array([2.0**-126], np.float32)
    if (smallest + smallest)[0] == 0 or (normal * half)[0] == 0:
        raise RuntimeError(
            "simulator: this process flushes subnormal numbers to zero, which the chip does not; "
            "some library was built with -ffast-math: do not import it, or import pagoda first"
        )
