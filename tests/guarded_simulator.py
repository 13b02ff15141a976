"""Simulators whose every array lies alone, between pages that nobody may touch.

An access outside of any array of theirs, near or far, ends the process: so hostile programs run in
one that may end (`python tests/guarded_simulator.py`, started by `test_isolation`). Which program
it was can be read from the file that `--progress` names.

Each program runs on two machines that differ in all that it must not see: what DRAM holds outside
of its slots and in slots that it may not read, where the arrays lie, and how many host threads
work. What is left in memories, fields and slots has to be equal, and what is not the program's has
to be as it was. Of so many programs one also runs on the definition.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import mmap
import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
from hostile_programs import Author, Layout
from numpy.typing import NDArray

from pagoda.isa.chip import PRESETS, Chip
from pagoda.isa.commands import BY_BANK
from pagoda.isa.definition import Definition
from pagoda.isa.machine import Result
from pagoda.isa.program import Launch
from pagoda.sim import Simulator
from pagoda.sim import helper as sim_helper
from pagoda.sim import layout as at
from pagoda.sim import machine as sim_machine

SMALL = replace(
    PRESETS["tiny"], name="small", sram_bytes=8192, acc_bytes=4096, imem_bytes=4096,
    dmem_bytes=4096, dram_bytes=1 << 20,
)  # fmt: skip
TWO = replace(SMALL, name="two", cores=2)
CHIPS = {chip.name: chip for chip in (SMALL, TWO)}
PROGRAMS_PER_BATCH = 100
# Wider than any 32-bit offset from an array: what is computed wrongly once does not jump over it.
_GUARD_BYTES = 1 << 34
_SLACK = 0xA5
_PROT_NONE, _MAP_NORESERVE = 0, 0x4000


class Region:
    """Memory for one array, at one end of whole pages that are otherwise filled with a pattern."""

    def __init__(self, nbytes: int, at_end: bool) -> None:
        size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        start = libc.mmap(None, size + 2 * _GUARD_BYTES, _PROT_NONE, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "no address space for guarded memory")
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        inside = start + _GUARD_BYTES
        if libc.mprotect(inside, size, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "guarded memory cannot be made usable")
        pages = np.frombuffer((ctypes.c_uint8 * size).from_address(inside), np.uint8)
        first = size - nbytes if at_end else 0
        self.bytes = pages[first : first + nbytes]
        self._slack = pages[:first], pages[first + nbytes :]
        for part in self._slack:
            part[:] = _SLACK

    def is_intact(self) -> bool:
        return all((part == _SLACK).all() for part in self._slack)


class _GuardedNumpy(ModuleType):
    """numpy, whose new arrays lie in regions of their own, one end of them at a guard."""

    def __init__(self) -> None:
        super().__init__("numpy")
        self.regions: list[Region] = []
        self.at_end = True

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float64) -> NDArray:
        if np.dtype(dtype).names:  # a result, which no compiled code writes
            return np.zeros(shape, dtype)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.regions.append(Region(nbytes, self.at_end))
        return self.regions[-1].bytes.view(dtype).reshape(shape)

    def zeros_like(self, like: NDArray) -> NDArray:
        return self.zeros(like.shape, like.dtype)


_NUMPY = _GuardedNumpy()
_predecode, _last = sim_machine.predecode, (b"", np.zeros(0, np.int64))


def guard_everything() -> None:
    """From here on whatever simulators of this process allocate is guarded."""
    sim_machine.np = sim_helper.np = _NUMPY
    sim_machine._lazy_memory = lambda nbytes: _NUMPY.zeros(nbytes, np.uint8)


def _predecoded(code: bytes, imem_bytes: int) -> NDArray[np.int64]:
    """As `predecode`; the last one is remembered, since several machines run it."""
    global _last
    if _last[0] != code:
        _last = code, _predecode(code, imem_bytes)
    return _last[1]


class Guarded:
    """A simulator in guarded memory. foreign: seed of what its programs must not see."""

    def __init__(self, chip: Chip, at_end: bool, foreign: int, **options: Any) -> None:
        self.chip, self._foreign = chip, foreign
        _NUMPY.at_end = at_end
        dram = _NUMPY.zeros(chip.dram_bytes, np.uint8)
        self.simulator = Simulator(chip, dram=dram, **options)
        self.cores = self.simulator._cores
        self._code = _NUMPY.zeros(chip.imem_bytes // 4, np.int64)
        self._image = np.zeros(0, np.uint8)

    def _place_code(self, code: bytes, imem_bytes: int) -> NDArray[np.int64]:
        self._code[:] = _predecoded(code, imem_bytes)
        return self._code

    def begin(self, seed: int, layout: Layout) -> None:
        """Contents of all memories for a batch."""
        shared = np.random.default_rng(seed)
        for core in self.cores:
            core.sram[:] = shared.integers(0, 256, core.sram.size, np.uint8)
            core.acc[:] = shared.integers(0, 256, core.acc.size, np.uint8)
            core.dmem[:] = 0
            core.state[at.FIELDS : at.SLOTS] = 0
        self.simulator._resident = ""
        image = np.random.default_rng([seed, self._foreign]).integers(
            0, 256, self.chip.dram_bytes, np.uint8
        )
        for slot in layout.slots:
            content = shared.integers(0, 256, slot.size, np.uint8)
            words = content[: slot.size // 4 * 4].view(np.uint32)
            words[::3] &= 7  # small integers, which make usable indices
            if slot.readable:
                image[slot.base : slot.base + slot.size] = content
        self.simulator.dram[:] = self._image = image

    def run(self, launch: Launch) -> Result:
        sim_machine.predecode = self._place_code
        self.simulator.start(launch)
        return self.simulator.wait()

    def problems(self, layout: Layout) -> list[str]:
        """What the programs of a batch changed that is not theirs."""
        changed = self.simulator.dram != self._image
        for slot in layout.slots:
            if slot.writable:
                changed[slot.base : slot.base + slot.size] = False
        return [f"DRAM byte {int(changed.argmax()):#x}"] if changed.any() else []

    def visible(self, layout: Layout) -> dict[str, bytes]:
        """All that a program can see of what others left."""
        found = {
            f"slot at {slot.base:#x}": self.simulator.dram[slot.base : slot.base + slot.size]
            for slot in layout.slots
            if slot.readable
        }
        for n, core in enumerate(self.cores):
            fields = core.state[at.FIELDS : at.SLOTS]
            found |= {f"SRAM {n}": core.sram, f"ACC {n}": core.acc, f"DMEM {n}": core.dmem}
            found |= {f"fields {n}": fields, f"registers {n}": core._registers[:32]}
        return {name: part.tobytes() for name, part in found.items()}



# Batches. -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Machines that run the same programs; `compared`: whether they have to agree.

    Cores that run at once and write to the same bytes leave what the host's timing says.
    """

    chip: str
    options: tuple[dict[str, Any], dict[str, Any]]
    compared: bool = True
    judged: bool = True  # whether the definition is asked, too

    def machines(self) -> list[Guarded]:
        chip = CHIPS[self.chip]
        return [Guarded(chip, n == 0, n, **each) for n, each in enumerate(self.options)]


VARIANTS = {
    "small": Variant("small", ({}, {})),
    "two": Variant("two", ({}, {})),
    "helped": Variant("small", ({}, {"threads": 2})),
    "at once": Variant("two", ({"threads": 2}, {"threads": 2}), compared=False, judged=False),
    "checking": Variant("small", ({"checking": True, "trace": True},) * 2),
    "two checking": Variant("two", ({"checking": True},) * 2, judged=False),
}


@dataclass
class Findings:
    """What went wrong, and how programs ended."""

    wrong: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    commands: int = 0
    judged: int = 0


def run_batch(
    machines: list[Guarded], variant: Variant, seed: int, programs: int, judge_every: int,
    progress: int, found: Findings,
) -> None:  # fmt: skip
    """One batch on all machines. judge_every: of so many programs one is run on the definition.

    progress: a descriptor of the file that names the program which runs.
    """
    random = Random(seed)
    chip = CHIPS[variant.chip]
    layout = Layout.draw(random, chip.dram_bytes)
    author = Author(chip, random, layout)
    launches = [author.launch() for _ in range(programs)]
    # Those of the same code follow one another: decoding takes longer than running.
    launches.sort(key=lambda launch: launch.program.name)
    for machine in machines:
        machine.begin(seed, layout)
    for number, launch in enumerate(launches):
        os.pwrite(progress, b"seed %d, program %d  \n" % (seed, number), 0)
        judged = variant.judged and random.randrange(judge_every) == 0
        judge = Judge(machines[0], variant.options[0]) if judged else None
        results = [machine.run(launch) for machine in machines]
        place = f"seed {seed}, program {number} ({launch.program.name})"
        fault = results[0].fault
        found.ends[fault.kind.name if fault else "none"] += 1
        found.commands += results[0].counters.commands
        if variant.compared and not _equal(*results):
            found.wrong.append(f"{place}: {results[0]} and {results[1]}")
        if judge:
            found.judged += 1
            found.wrong += [f"{place}: {text}" for text in judge.differences(launch, results[0])]
    for n, machine in enumerate(machines):
        found.wrong += [f"seed {seed}, machine {n}: {text}" for text in machine.problems(layout)]
    first, second = (machine.visible(layout) for machine in machines)
    if variant.compared:
        found.wrong += [f"seed {seed}: {name}" for name in first if first[name] != second[name]]
    found.wrong += [
        f"seed {seed}: beside array {n}" for n, r in enumerate(_NUMPY.regions) if not r.is_intact()
    ]


def _equal(one: Result, other: Result) -> bool:
    return replace(one, trace=None) == replace(other, trace=None)


class Judge:
    """The definition, in the state of a machine before a launch."""

    def __init__(self, machine: Guarded, options: dict[str, Any]) -> None:
        self._machine = machine
        self._definition = Definition(machine.chip, checking=options.get("checking", False))
        self._definition.dram[:] = machine.simulator.dram
        self._definition._resident = machine.simulator._resident
        for ours, theirs in zip(machine.cores, self._definition._cores, strict=True):
            theirs.local[0][:], theirs.local[1][:] = ours.sram, ours.acc
            theirs.dmem[:] = ours.dmem
            for bank, words in theirs.banks.items():
                fields = at.FIELDS + 16 * bank
                words[:] = ours.state[fields : fields + 16].tolist()

    def differences(self, launch: Launch, result: Result) -> list[str]:
        """What the definition says that the machine, after the launch, does not."""
        self._definition.start(launch)
        expected = self._definition.wait()
        if result.fault is None or expected.fault is None:
            same = result.fault is expected.fault
        else:
            same = replace(result.fault, detail="") == replace(expected.fault, detail="")
        found = [] if same else [f"{result.fault}, not {expected.fault}"]
        if (result.cycles, result.counters) != (expected.cycles, expected.counters):
            found.append(f"{result.cycles} {result.counters}, not {expected}")
        pairs = [("DRAM", self._machine.simulator.dram, self._definition.dram)]
        for ours, theirs in zip(self._machine.cores, self._definition._cores, strict=True):
            # Word 0 is no register: the definition does not keep it.
            fields = np.array([theirs.banks[bank] for bank in BY_BANK])[:, 1:]
            mine = ours.state[at.FIELDS + 16 : at.SLOTS].reshape(-1, 16)[: len(fields), 1:]
            pairs += [("SRAM", ours.sram, theirs.local[0]), ("ACC", ours.acc, theirs.local[1])]
            pairs += [("DMEM", ours.dmem, theirs.dmem), ("fields", mine, fields)]
        return found + [f"{name} differs" for name, a, b in pairs if not np.array_equal(a, b)]


def run_variant(name: str, first_seed: int, programs: int, judge_every: int, progress: int) -> dict:
    """So many programs of a variant, or fewer if something is wrong; what there is to tell."""
    variant, found, began = VARIANTS[name], Findings(), time.monotonic()
    _NUMPY.regions.clear()
    machines = variant.machines()
    done = 0
    while done < programs and not found.wrong:
        count = min(PROGRAMS_PER_BATCH, programs - done)
        seed = first_seed + done // PROGRAMS_PER_BATCH
        run_batch(machines, variant, seed, count, judge_every, progress, found)
        done += count
    seconds = round(time.monotonic() - began, 3)
    return dict(
        variant=name, programs=done, seconds=seconds, commands=found.commands,
        judged=found.judged, ends=found.ends, wrong=found.wrong[:5],
    )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """Run batches; prints a line of JSON for each variant. Exit status 1: something is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", type=int, default=1000, help="of each variant")
    parser.add_argument("--judge-every", type=int, default=50)
    parser.add_argument("--progress", type=Path, default=Path(os.devnull))
    wanted = parser.parse_args(words)
    faulthandler.enable()
    np.seterr(invalid="ignore")  # the definition widens numbers that are none
    sim_machine.WORK_ALONE = -1  # or the helper would sleep through programs so short
    guard_everything()
    progress = os.open(wanted.progress, os.O_WRONLY | os.O_CREAT)
    wrong = False
    for name in wanted.variants:
        figures = run_variant(name, wanted.seed, wanted.programs, wanted.judge_every, progress)
        print(json.dumps(figures), flush=True)
        wrong |= bool(figures["wrong"])
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
