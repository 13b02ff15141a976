"""The RTL as a `Machine`: launches run on the Verilated chip, cycle after cycle."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import amaranth
import numpy as np

from pagoda.chip.dma_front import front_lag
from pagoda.chip.host_map import HOST_REGIONS, HOST_REGISTERS, Control, FaultFlags
from pagoda.chip.interfaces import ENGINES, Job
from pagoda.chip.pagoda_chip import PagodaChip, check_buildable
from pagoda.chip.verilate import Model, Source
from pagoda.isa.access import access, is_empty, loop_count
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.commands import BY_BANK, COMMANDS, decode
from pagoda.isa.fault import Fault, FaultKind
from pagoda.isa.machine import ENGINES as ENGINE_NAMES
from pagoda.isa.machine import TRACE_DTYPE, Counters, MachineBase, Result
from pagoda.isa.program import Launch

SLICE_CLOCKS = 20_000  # between two looks at Ctrl-C
HUNG_CLOCKS = 100_000_000  # without an end beyond the watchdog: the RTL hangs
_ENTER, _START, _FREE, _FINISH = range(4)
_NOW, _FROZEN, _CONFLICTS, _READ_ATOMS, _WRITE_ATOMS, _EVENTS = range(6)
_MAX_WINDOW = 16
_GATHER, _SCATTER = COMMANDS["gather"].bank, COMMANDS["scatter"].bank
_FAR = 1 << 60  # a cycle that no launch reaches
_EVENT = np.dtype(
    [("cycle", "<i8"), ("core", "<i4"), ("kind", "<i4"), ("index", "<i4"), ("cause", "<i4"),
     ("reads", "<i8")]
)  # fmt: skip


class _CorePorts(ctypes.Structure):
    """`Core` of bench.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "read", "read_address", "valid", "data", "write", "write_address", "write_data",
            "write_mask", "enter", "job", "start", "start_index", "start_cause",
        )),
        ("freed", ctypes.c_void_p * ENGINES), ("freed_index", ctypes.c_void_p * ENGINES),
        ("finished", ctypes.c_void_p * _MAX_WINDOW),
        ("finished_index", ctypes.c_void_p * _MAX_WINDOW),
    ]  # fmt: skip


@dataclass(frozen=True)
class Wave:
    """Cycles `first` to `last` of a launch, dumped as VCD to `path`."""

    path: Path
    first: int
    last: int


class RtlMachine(MachineBase):
    """A `Machine` made of gates: slow, and the proof that the contract can be built.

    wave: dump these cycles of the first launch that reaches them.

    Raises ToolError when Verilator or a C++ compiler is missing, ValueError for a chip that the
    RTL cannot be (more than 64 bytes of DRAM a cycle and core).
    """

    def __init__(
        self, chip: Chip, *, trace: bool = False, wave: Wave | None = None, optimise: str = "-O1"
    ):
        check_buildable(chip)
        super().__init__(chip, np.zeros(chip.dram_bytes, np.uint8), trace)
        bench = Path(__file__).parent / "bench.cpp"
        source = Source(lambda: PagodaChip(chip), _identity(chip))
        self._model = Model(source, "pagoda_chip", optimise, bench, wave is not None)
        self._library = self._model.library
        self._world = self._make_world()
        self._resident = ""
        self._wave = wave
        self.clocks = 0  # of all launches, frozen ones too

    def _make_world(self) -> ctypes.c_void_p:
        library, address = self._library, self._model.address
        library.world_create.restype = ctypes.c_void_p
        library.world_counter.restype = library.world_writes.restype = ctypes.c_int64
        cores = (_CorePorts * self.chip.cores)()
        for number, core in enumerate(cores):
            dram, window = f"dram__{number}__", f"trace__{number}__window__"
            for name in ("read", "read_address", "valid", "data", "write", "write_address",
                         "write_data", "write_mask"):  # fmt: skip
                setattr(core, name, address(dram + name))
            core.enter, core.job = address(window + "entered"), address(f"trace__{number}__job")
            core.start = address(window + "started")
            core.start_index = address(window + "started_index")
            core.start_cause = address(window + "cause")
            for field, count in (("freed", ENGINES), ("finished", self.chip.window)):
                for k in range(count):
                    getattr(core, field)[k] = address(f"{window}{field}__{k}")
                    getattr(core, f"{field}_index")[k] = address(f"{window}{field}_index__{k}")
        return ctypes.c_void_p(
            library.world_create(
                cores, self.chip.cores,
                *(ctypes.c_void_p(address(name)) for name in ("enable", "busy", "begin")),
                ctypes.c_void_p(address("conflict")), ctypes.c_void_p(self.dram.ctypes.data),
                ctypes.c_uint64(self.chip.dram_bytes), ctypes.c_int64(self.chip.dram_latency),
                ctypes.c_int64(front_lag(self.chip) + 1),
                self.chip.window, -(-Job().size // 32),
            )
        )  # fmt: skip

    def wait(self) -> Result:
        """Run the accepted launch to its end."""
        launch = self._accepted()
        resident = launch.program.digest == self._resident
        self._load(launch, resident)
        self._resident = launch.program.digest
        self._library.world_begin(self._world, int(self.tracing))
        control = Control.START | (Control.RESIDENT if resident else 0)
        self._put(HOST_REGISTERS["control"].address, int(control), move=False)
        self._run(1)
        self._model["host__valid"] = 0
        if self._wave is not None:
            self._run_to(launch, self._wave.first)
            self._model.open_wave(self._wave.path)
            self._run_to(launch, self._wave.last)
            self._model.close_wave()
            self._wave = None
        self._run_to(launch, _FAR)
        self.clocks += self._counter(_NOW) + self._counter(_FROZEN)
        if self._counter(_CONFLICTS):
            raise RuntimeError(
                f"RTL of {self.chip.name}: launch of {launch.program.name!r}: two users of one "
                f"bank port in {self._counter(_CONFLICTS)} cycles: a bug of the RTL"
            )
        return self._result(launch)

    def _run(self, clocks: int, until: int = _FAR) -> bool:
        return bool(
            self._library.world_run(
                self._world, self._model.instance, ctypes.c_int64(clocks), ctypes.c_int64(until)
            )
        )

    def _run_to(self, launch: Launch, until: int) -> None:
        """Run to a contract cycle or the launch's end."""
        while self._counter(_NOW) < until and self._run(SLICE_CLOCKS, until):
            if self._counter(_NOW) > launch.watchdog + HUNG_CLOCKS:
                raise RuntimeError(
                    f"RTL of {self.chip.name}: launch of {launch.program.name!r} still runs in "
                    f"cycle {self._counter(_NOW)}, watchdog {launch.watchdog}: a bug of the RTL"
                )

    def _counter(self, which: int) -> int:
        return self._library.world_counter(self._world, which)

    # The host port. -------------------------------------------------------------------------------

    def _put(self, address: int, value: int, *, move: bool = True) -> None:
        model = self._model
        model["host__valid"], model["host__write"] = 1, 1
        model["host__address"], model["host__write_data"] = address, value
        if move:
            model.tick()
            model["host__valid"] = 0

    def _get(self, address: int) -> int:
        model = self._model
        model["host__valid"], model["host__write"], model["host__address"] = 1, 0, address
        model.tick()
        model["host__valid"] = 0
        return model["host__read_data"]

    def _set_register(self, name: str, value: int) -> None:
        register = HOST_REGISTERS[name]
        for word in range(register.words):
            self._put(register.address + 4 * word, value >> 32 * word & 0xFFFFFFFF)

    def _register(self, name: str) -> int:
        register = HOST_REGISTERS[name]
        words = (self._get(register.address + 4 * word) for word in range(register.words))
        return sum(word << 32 * position for position, word in enumerate(words))

    def _load(self, launch: Launch, resident: bool) -> None:
        program = launch.program
        if not resident:
            for offset in range(0, len(program.code), 4):
                word = int.from_bytes(program.code[offset : offset + 4], "little")
                self._put(HOST_REGIONS["imem"].base + offset, word)
        for number, word in enumerate(launch.args):
            self._put(HOST_REGIONS["arguments"].base + 4 * number, word & 0xFFFFFFFF)
        for number, slot in enumerate(launch.slots):
            base = HOST_REGIONS["slots"].base + HOST_REGIONS["slots"].item_bytes * number
            permissions = slot.readable | slot.writable << 1
            words = (slot.base & 0xFFFFFFFF, slot.base >> 32, slot.size, permissions)
            for position, word in enumerate(words):
                self._put(base + 4 * position, word)
        for name, value in (
            ("entry", program.entry), ("stack_limit", program.stack_limit),
            ("code_bytes", len(program.code)), ("arguments", len(launch.args)),
            ("slots", len(launch.slots)), ("watchdog", min(launch.watchdog, (1 << 47) - 1)),
        ):  # fmt: skip
            self._set_register(name, value)

    # What came out. -------------------------------------------------------------------------------

    def _result(self, launch: Launch) -> Result:
        instructions = commands = 0
        cores = HOST_REGIONS["cores"]
        for number in range(self.chip.cores):
            base = cores.base + cores.item_bytes * number
            instructions += self._get(base) | self._get(base + 4) << 32
            commands += self._get(base + 8)
        fault = self._fault()
        trace = self._trace() if self.tracing else None
        counters = Counters(
            instructions, commands,
            int(trace["macs"].sum()) if trace is not None else 0,
            DRAM_ATOM_BYTES * self._counter(_READ_ATOMS),
            DRAM_ATOM_BYTES * self._counter(_WRITE_ATOMS),
            self._busy(trace) if trace is not None else (0,) * ENGINES,
        )  # fmt: skip
        return Result(self._register("end_cycle"), fault, counters, trace)

    def _fault(self) -> Fault | None:
        kind = self._register("fault_kind")
        if kind == 0:
            return None
        flags = FaultFlags(self._register("fault_flags"))
        place = {}
        if flags & FaultFlags.PLACE:
            place = {"slot": self._register("fault_slot"), "offset": self._register("fault_offset")}
        command = self._register("fault_command") if flags & FaultFlags.COMMAND else -1
        return Fault(
            FaultKind(kind), self._register("fault_core"), self._register("fault_pc"),
            self._register("fault_cycle"), command, **place,
        )  # fmt: skip

    def _log(self) -> tuple[np.ndarray, Iterator[dict[str, int]]]:
        words = -(-Job().size // 32)
        events = np.zeros(self._counter(_EVENTS), _EVENT)
        jobs = np.zeros((len(events), words), np.uint32)
        self._library.world_log(
            self._world, ctypes.c_void_p(events.ctypes.data), ctypes.c_void_p(jobs.ctypes.data)
        )
        entered = int(np.count_nonzero(events["kind"] == _ENTER))
        return events, (_unpack(job) for job in jobs[:entered])

    def _trace(self) -> np.ndarray:
        events, jobs = self._log()
        rows: dict[tuple[int, int], dict[str, int]] = {}
        reads: dict[tuple[int, int], int] = {}
        for event in events:
            core, kind, cycle = int(event["core"]), int(event["kind"]), int(event["cycle"])
            if kind == _ENTER:
                job = next(jobs)
                rows[core, job["index"]] = {
                    "core": core, "index": job["index"], "pc": job["pc"], "bank": job["bank"],
                    "entry": cycle, **_work(job),
                }  # fmt: skip
                continue
            key = core, int(event["index"])
            row = rows[key]
            row[("", "start", "free", "finish")[kind]] = cycle
            if kind == _START:
                row["cause"] = int(event["cause"])
                reads[key] = int(event["reads"])
            elif kind == _FREE and row["bank"] == _GATHER:
                row["dram_bytes"] = DRAM_ATOM_BYTES * (int(event["reads"]) - reads[key])
        for core in range(self.chip.cores):
            self._count_writes(core, [row for key, row in sorted(rows.items()) if key[0] == core])
        ordered = [rows[key] for key in sorted(rows)]
        names = TRACE_DTYPE.names
        return np.array([tuple(row[name] for name in names) for row in ordered], TRACE_DTYPE)

    def _count_writes(self, core: int, rows: list[dict[str, int]]) -> None:
        """DRAM bytes of a core's scatters. Stores write in their order, each as many bytes as it
        has, so the atoms of one end where those bytes do."""
        sizes = np.zeros(self._library.world_writes(self._world, core), np.uint8)
        self._library.world_written(self._world, core, ctypes.c_void_p(sizes.ctypes.data))
        written = np.cumsum(sizes, dtype=np.int64)
        first = bytes_before = 0
        for row in rows:
            if row["stored"] == 0:
                continue
            bytes_before += row["stored"]
            end = int(np.searchsorted(written, bytes_before)) + 1
            if row["bank"] == _SCATTER:
                row["dram_bytes"] = DRAM_ATOM_BYTES * (end - first) * row["ways"]
            first = end

    def _busy(self, trace: np.ndarray) -> tuple[int, ...]:
        engine = np.array([_engine_of(bank) for bank in range(11)])[trace["bank"]]
        busy = trace["free"] - trace["start"]
        return tuple(int(busy[engine == number].sum()) for number in range(ENGINES))


def _identity(chip: Chip) -> str:
    """What determines the chip's Verilog: its parameters, and the sources that write it."""
    digest = hashlib.sha256(f"{chip} {amaranth.__version__}".encode())
    storeys = Path(__file__).parents[1]
    for storey in ("isa", "chip"):
        for source in sorted((storeys / storey).glob("*.py")):
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def _unpack(words: np.ndarray) -> dict[str, int]:
    """A job's fields; those of its bank's registers under "words"."""
    bits = int.from_bytes(words.astype("<u4").tobytes(), "little")
    found = {}
    for name, field in Job():
        found[name] = bits >> field.offset & (1 << field.width) - 1
    return found


def _work(job: dict[str, int]) -> dict[str, int]:
    """MACs and DRAM bytes of a command, as `pagoda.isa.core` counts them; those of gather and
    scatter depend on their indices and are 0 here.

    stored: bytes that it writes to DRAM, in atoms that are read and written (`ways` 2) or written.
    """
    work = {"macs": 0, "dram_bytes": 0, "stored": 0, "ways": 1}
    words = [job["words"] >> 32 * word & 0xFFFFFFFF for word in range(16)]
    command, fields = decode(job["bank"], words)
    if is_empty(command.name, fields):
        return work
    touched = access(command.name, fields)
    if command.name == "matmul":
        f = fields
        work["macs"] = f["m0"] * f["m1"] * f["m2"] * f["n"] * f["k_outer"] * f["k_inner"]
    dram = touched.dram
    if dram is None:
        return work
    work["ways"] = dram.reads + dram.writes
    if touched.indices is None:
        work["dram_bytes"] = DRAM_ATOM_BYTES * dram.atoms() * work["ways"]
    if dram.writes:
        rows = fields["rows"] if touched.indices is not None else loop_count(dram.loops)
        work["stored"] = rows * dram.row_bytes
    return work


def _engine_of(bank: int) -> int:
    return ENGINE_NAMES.index(BY_BANK[bank].engine) if bank in BY_BANK else 0
