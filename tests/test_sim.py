"""The simulator by itself: the control core, faults, memory, the cache of compiled code."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from command_programs import Assembler

from pagoda.isa.chip import PRESETS
from pagoda.isa.commands import ACC_BIT
from pagoda.isa.definition import Definition
from pagoda.isa.fault import FaultKind
from pagoda.isa.machine import Interrupted
from pagoda.isa.program import Launch, Program, Slot
from pagoda.isa.rv32 import RV32
from pagoda.sim import Simulator
from pagoda.sim.races import find_race

TINY = PRESETS["tiny"]
PORT = 0x40000  # upper immediate of the command port
EXIT = [("lui", {"rd": 31, "uimm": PORT}), ("sw", {"rs2": 0, "rs1": 31, "imm": 8})]


def assemble(*instructions):
    words = [RV32.encode(name, **fields) for name, fields in instructions]
    return b"".join(word.to_bytes(4, "little") for word in words)


def program(*instructions, **options):
    return Program("test", assemble(*instructions, *EXIT), **options)


def both(chip, launch, image=b""):
    """The result on the simulator, which must equal the definition's."""
    results = []
    for machine in (Definition(chip, trace=True), Simulator(chip, trace=True)):
        machine.write(0, image)
        machine.start(launch)
        results.append(machine.wait())
    expected, result = results
    assert result.cycles == expected.cycles
    assert result.counters == expected.counters
    assert (result.fault is None) == (expected.fault is None)
    if result.fault is not None:
        assert replace(result.fault, detail="") == replace(expected.fault, detail="")
    return result


SMALL = replace(TINY, dram_bytes=1 << 20)


def test_every_instruction_on_awkward_operands():
    """Results go to DMEM, where both machines must agree; also through x0 and with x0."""
    values = [0, 1, 2, 31, 32, 0x7FF, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xDEADBEEF]
    code = [("lui", {"rd": 5, "uimm": 0x10000}), ("addi", {"rd": 6, "rs1": 5, "imm": 256})]
    stored = 0

    def keep(register=9):
        nonlocal stored
        code.append(("sw", {"rs2": register, "rs1": 6, "imm": 4 * (stored % 256)}))
        stored += 1

    for i, a in enumerate(values):
        code.append(("lw", {"rd": 7, "rs1": 5, "imm": 4 * i}))
        for name, row in RV32.rows.items():
            fields = [field.name for field in row.fields]
            if fields == ["rd", "rs1", "imm"] and row.cycle_class == "alu":
                for imm in (0, 1, -1, 2047, -2048):
                    code.append((name, {"rd": 9, "rs1": 7, "imm": imm}))
                    keep()
            elif "shamt" in fields:
                code.append((name, {"rd": 9, "rs1": 7, "shamt": i}))
                keep()
            elif fields == ["rd", "rs1", "rs2"]:
                b = (3 * i + len(name)) % len(values)
                code.append(("lw", {"rd": 8, "rs1": 5, "imm": 4 * b}))
                code.append((name, {"rd": 9, "rs1": 7, "rs2": 8}))
                keep()
                code.append((name, {"rd": 0, "rs1": 7, "rs2": 8}))
                keep(0)
        code.append(("auipc", {"rd": 9, "uimm": a & 0xFFFFF}))
        keep()
        if a == values[4]:  # IMEM is small: go on in a second program
            break
    for name in ("lb", "lh", "lbu", "lhu"):
        code.append((name, {"rd": 9, "rs1": 5, "imm": 36}))
        keep()
    for name in ("sb", "sh"):
        code.append((name, {"rs2": 7, "rs1": 6, "imm": 1022}))
    code.append(("fence", {"pred": 15, "succ": 15}))
    launch = Launch(program(*code), args=tuple(values))
    machines = Definition(SMALL), Simulator(SMALL)
    results = []
    for machine in machines:
        machine.start(launch)
        results.append(machine.wait())
        assert results[-1].fault is None
    assert results[0].cycles == results[1].cycles
    expected, found = (machine._cores[0].dmem for machine in machines)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("name", ["beq", "bne", "blt", "bge", "bltu", "bgeu"])
def test_branches(name, taken):
    code = [
        ("addi", {"rd": 7, "rs1": 0, "imm": -1}),
        ("addi", {"rd": 8, "rs1": 0, "imm": -1 if taken else 1}),
        (name, {"rs1": 7, "rs2": 8, "offset": 8}),
        ("mul", {"rd": 9, "rs1": 7, "rs2": 8}),
        ("jal", {"rd": 1, "offset": 8}),
        ("div", {"rd": 9, "rs1": 7, "rs2": 8}),
        ("addi", {"rd": 4, "rs1": 1, "imm": 12}),
        ("jalr", {"rd": 1, "rs1": 4, "imm": 1}),
    ]
    assert both(SMALL, Launch(program(*code))).fault is None


FAULTS = {
    "illegal": ([], FaultKind.ILLEGAL_INSTRUCTION, "the word 0x00000000 is no instruction"),
    "fetch": (
        [("lui", {"rd": 5, "uimm": 4}), ("jalr", {"rd": 0, "rs1": 5, "imm": 0})],
        FaultKind.FETCH_OUT_OF_RANGE, "the chip's IMEM ends at 0x4000",
    ),
    "jump": ([("jal", {"rd": 0, "offset": 6})], FaultKind.MISALIGNED, "jump to 0x00000006"),
    "load": (
        [("lw", {"rd": 5, "rs1": 2, "imm": -2})], FaultKind.MISALIGNED, "no multiple of 4"
    ),
    "imem": ([("lw", {"rd": 5, "rs1": 0, "imm": 8})], FaultKind.BAD_ADDRESS, "not permit"),
    "hole": (
        [("lui", {"rd": 5, "uimm": 0x30000}), ("lw", {"rd": 5, "rs1": 5, "imm": 0})],
        FaultKind.BAD_ADDRESS, "no region",
    ),
    "bytes of SRAM": (
        [("lui", {"rd": 5, "uimm": 0x20000}), ("lb", {"rd": 5, "rs1": 5, "imm": 0})],
        FaultKind.BAD_ADDRESS, "only words",
    ),
    "beyond SRAM": (
        [("lui", {"rd": 5, "uimm": 0x20010}), ("lw", {"rd": 5, "rs1": 5, "imm": 0})],
        FaultKind.BAD_ADDRESS, "SRAM has 65536 bytes",
    ),
    "core register": (
        [("lui", {"rd": 5, "uimm": 0x50000}), ("sw", {"rs2": 5, "rs1": 5, "imm": 0})],
        FaultKind.BAD_ADDRESS, "not permit",
    ),
    "no word": (
        [("lui", {"rd": 5, "uimm": PORT}), ("sw", {"rs2": 0, "rs1": 5, "imm": 16})],
        FaultKind.BAD_ADDRESS, "no word of a command",
    ),
    "no bank": (
        [("lui", {"rd": 5, "uimm": PORT}), ("sw", {"rs2": 0, "rs1": 5, "imm": 64 * 11})],
        FaultKind.BAD_ADDRESS, "no word of a command",
    ),
    "beyond DMEM": (
        [("sh", {"rs2": 0, "rs1": 2, "imm": 0})], FaultKind.DMEM_OUT_OF_RANGE, "4096 bytes"
    ),
    "stack": (
        [("lui", {"rd": 2, "uimm": 0x10000}), ("sb", {"rs2": 0, "rs1": 2, "imm": 63})],
        FaultKind.STACK_OVERFLOW, "the stack ends at DMEM offset 64",
    ),
    "ecall": ([("ecall", {})], FaultKind.TRAP, "ecall or ebreak"),
    "trap": (
        [
            ("addi", {"rd": 6, "rs1": 0, "imm": 7}), ("lui", {"rd": 5, "uimm": PORT}),
            ("sw", {"rs2": 6, "rs1": 5, "imm": 12}),
        ],
        FaultKind.TRAP, "code 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_control_core(name):
    code, kind, text = FAULTS[name]
    image = assemble(*code) + bytes(4)
    fault = both(SMALL, Launch(Program("test", image, stack_limit=64))).fault
    assert fault.kind is kind
    assert text in fault.detail


def test_watchdog_ends_an_endless_loop():
    endless = Program("test", assemble(("jal", {"rd": 0, "offset": 0})))
    result = both(SMALL, Launch(endless, watchdog=1000))
    assert result.fault.kind is FaultKind.WATCHDOG
    assert result.cycles == 1000


def test_barrier_mismatch_and_core_registers():
    chip = replace(SMALL, name="three", cores=3)
    code = [
        ("lui", {"rd": 5, "uimm": 0x50000}),
        ("lw", {"rd": 6, "rs1": 5, "imm": 0}),
        ("lw", {"rd": 7, "rs1": 5, "imm": 4}),
        ("addi", {"rd": 7, "rs1": 7, "imm": -1}),
        ("lui", {"rd": 31, "uimm": PORT}),
        ("beq", {"rs1": 6, "rs2": 7, "offset": 8}),
        ("sw", {"rs2": 0, "rs1": 31, "imm": 4}),
    ]
    fault = both(chip, Launch(program(*code))).fault
    assert fault.kind is FaultKind.BARRIER_MISMATCH
    assert fault.core == 2


def vector_program():
    """Load, add, store; 64 elements."""
    assembler = Assembler()
    tile = {"cols": 16, "rows": 4, "planes": 1, "mem_row_stride": 64, "row_stride": 64}
    assembler.command("load", slot=0, offset=0, address=0, **tile)
    assembler.command(
        "vector", f1=1, f2=0, a=0, a_stride=64, b=0, b_stride=64, dst=8192, dst_stride=64,
        rows=4, cols=16,
    )  # fmt: skip
    assembler.command("store", slot=0, offset=1024, address=8192, **tile)
    assembler.control("exit")
    return assembler.program()


def test_values_reach_dram():
    values = np.arange(64, dtype=np.float32)
    simulator = Simulator(SMALL)
    simulator.write(0, values.tobytes())
    simulator.start(Launch(vector_program(), slots=(Slot(0, 4096),)))
    assert simulator.wait().fault is None
    assert np.array_equal(simulator.dram[1024:1280].view(np.float32), 2 * values)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    chip = replace(SMALL, name="four", cores=4)
    simulator = Simulator(chip, trace=True, threads=threads)
    for _ in range(3):
        simulator.start(Launch(vector_program(), slots=(Slot(0, 4096),)))
        result = simulator.wait()
    assert result.fault is None
    assert len(result.trace) == 12
    assert result.trace["core"].tolist() == [core for core in range(4) for _ in range(3)]


def test_long_traces_grow():
    assembler = Assembler()
    go = assembler.set_fields("iota", dst=0, dst_stride=4, rows=1, cols=1)
    assembler.load_immediate(10, 5000)
    assembler.burst([("iota", go)], 1)  # leaves the go value in register 10
    assembler.load_immediate(20, 5000)
    loop = len(assembler.code)
    assembler.code.append(RV32.encode("sw", rs2=10, rs1=5, imm=640))
    assembler.code.append(RV32.encode("addi", rd=20, rs1=20, imm=-1))
    assembler.code.append(RV32.encode("bne", rs1=20, rs2=0, offset=4 * (loop - 2 - loop)))
    assembler.control("exit")
    simulator = Simulator(SMALL, trace=True)
    simulator.start(Launch(assembler.program()))
    trace = simulator.wait().trace
    assert trace["index"].tolist() == list(range(5001))
    assert np.all(np.diff(trace["start"]) > 0)


def test_a_big_chip_costs_no_memory():
    simulator = Simulator(PRESETS["cloud"])
    assert simulator.dram.nbytes == 64 << 30
    simulator.write((64 << 30) - 4, b"last")
    assert simulator.read((64 << 30) - 4, 4) == b"last"
    with pytest.raises(ValueError, match="4 bytes at 0xffffffffe: chip cloud has 68719476736"):
        simulator.read((64 << 30) - 2, 4)


def test_threads_are_at_least_one():
    with pytest.raises(ValueError, match="threads = 0: must be 1 or more"):
        Simulator(SMALL, threads=0)


def test_a_share_with_awkward_fractions():
    """Late cycles and a share whose rational is long: the DRAM port's rule must not overflow."""
    chip = replace(SMALL, name="slow", dram_bytes_per_cycle=Fraction(997, 1000), dram_latency=7)
    wait = [("lui", {"rd": 6, "uimm": 40}), ("addi", {"rd": 6, "rs1": 6, "imm": -1}),
            ("bne", {"rs1": 6, "rs2": 0, "offset": -4})]  # fmt: skip
    code = assemble(*wait) + vector_program().code
    both(chip, Launch(Program("test", code), slots=(Slot(0, 4096),)))


def test_races_are_found_by_byte():
    """Rows that interleave without sharing a byte are no race; one shared byte is."""
    #        cycle command pc reads writes first bytes rows stride planes stride
    writer = [10, 0, 0, 0, 1, 0, 4, 8, 8, 1, 0]
    reader = [12, 0, 4, 1, 0, 4, 4, 8, 8, 1, 0]
    assert find_race([np.array([writer]), np.array([reader])]) is None
    reader[5] = 3
    race = find_race([np.array([writer]), np.array([reader])])
    assert (race.core, race.cycle, race.pc, race.address) == (1, 12, 4, 3)
    assert find_race([np.array([reader]), np.array([reader])]) is None


COMPILE = """
    import warnings
    import numpy as np
    from pagoda.sim import layout
    from pagoda.sim.core import settle
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settle(np.zeros(layout.STATE_WORDS, np.int64))
    print([str(w.message) for w in caught])
    print(sum(settle.stats.cache_hits.values()))
"""


def run_python(text, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, check=True,
        env={**os.environ, **environment}, cwd=os.getcwd(),
    )  # fmt: skip
    return done.stdout.splitlines()


def test_compiled_code_is_kept_and_a_bad_cache_is_no_obstacle(tmp_path):
    cache = tmp_path / "cache"
    assert run_python(COMPILE, PAGODA_CACHE_DIR=str(cache)) == ["[]", "0"]
    assert run_python(COMPILE, PAGODA_CACHE_DIR=str(cache)) == ["[]", "1"]
    for kept in (cache / "sim").iterdir():
        kept.write_bytes(b"damaged")
    assert run_python(COMPILE, PAGODA_CACHE_DIR=str(cache)) == ["[]", "0"]
    (tmp_path / "file").write_text("no folder can be made in here")
    warned, hits = run_python(COMPILE, PAGODA_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert "every start will compile again" in warned
    assert hits == "0"


@pytest.mark.parametrize("edited", ["sim/transfer.py", "isa/tables.py"])
def test_an_edited_source_makes_the_cache_stale(tmp_path, edited):
    package = tmp_path / "pagoda"
    for folder in ("", "isa", "sim"):
        (package / folder).mkdir()
        for source in Path("pagoda", folder).glob("*.py"):
            shutil.copy(source, package / folder)
    stamp = """
        from pagoda.sim.jit import source_stamp
        print(source_stamp())
    """
    (before,) = run_python(stamp, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    (again,) = run_python(stamp, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert again == before
    (package / edited).write_text((package / edited).read_text() + "# edited")
    (after,) = run_python(stamp, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert after != before


@pytest.fixture
def interruptible():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_long_launch_and_the_simulator_lives_on():
    simulator = Simulator(SMALL)
    endless = Program("test", assemble(("jal", {"rd": 0, "offset": 0})))
    simulator.start(Launch(endless))
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        simulator.wait()
    simulator.start(Launch(program()))
    assert simulator.wait().fault is None


# Each takes the host ten seconds and more: strides of 0, or one index again and again.
LARGE = replace(PRESETS["edge"], sram_bytes=1 << 22, acc_bytes=1 << 22)
LONG = {
    "reduce": dict(op=0, first=1, column=1, dtype=1, src=0, src_stride=0, rows=1 << 20,
                   cols=1 << 18, state=ACC_BIT, state_stride=0, start=0),
    "scatter": dict(mem=1, local=0, accumulate=1, slot=0, offset=0, address=1 << 20, cols=1 << 18,
                    rows=1 << 18, indices=0, mem_row_stride=0, row_stride=0),
    "matmul": dict(type=1, accumulate=0, a=0, m0=1 << 11, m0_stride=0, m1=1, m1_stride=0, m2=1,
                   m2_stride=0, k_inner=1 << 10, k_outer=1 << 10, k_outer_stride=0, b=0,
                   b_stride=0, n=1 << 9, acc=0, acc_stride=1 << 11),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LONG)
def test_an_interrupt_ends_a_long_command(name, threads):
    assembler = Assembler()
    assembler.burst([(name, assembler.set_fields(name, **LONG[name]))], 40)
    assembler.control("exit")
    simulator = Simulator(LARGE, threads=threads)
    simulator.start(Launch(program()))
    assert simulator.wait().fault is None  # compiled, now
    simulator.start(Launch(assembler.program(), slots=(Slot(0, 1 << 20),)))
    timer = threading.Timer(0.3, simulator.interrupt)
    timer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        simulator.wait()
    assert time.monotonic() - began < 8  # on a busy machine; a command takes longer than that
    simulator.start(Launch(program()))
    assert simulator.wait().fault is None


def test_no_warning_in_an_ordinary_launch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulator = Simulator(SMALL)
        simulator.start(Launch(program()))
        assert simulator.wait().fault is None
