"""The definition interpreter on small programs: values, cycles, faults, several cores."""

from dataclasses import replace

import numpy as np
from command_programs import PORT, VALUE, Assembler, programs
from hypothesis import given, settings

from pagoda.isa import CAUSES, PRESETS, Definition, FaultKind, Launch, Slot, rv32
from pagoda.isa.commands import ACC_BIT
from pagoda.isa.memory_map import CORE_ID, DMEM, SRAM

TINY = replace(PRESETS["tiny"], dram_bytes=1 << 20)
DUAL = replace(TINY, name="dual", cores=2)
SLOTS = (Slot(0, 1 << 16),)
START = 100  # cycles of a launch without arguments, beside the code


def launch(assembler, **parts):
    return Launch(assembler.program(), **{"slots": SLOTS} | parts)


def run(assembler, machine=None, **parts):
    machine = machine or Definition(TINY, trace=True)
    machine.start(launch(assembler, **parts))
    return machine.wait()


def first_cycle(assembler):
    return START + -(-4 * len(assembler.code) // 16)


def load(assembler, array, address, offset=0, name="load"):
    rows, cols = array.shape
    code = {"float32": 0, "int32": 2, "int8": 3, "uint16": 1}[array.dtype.name]
    assembler.command(
        name, mem=code, local=code, slot=0, offset=offset, address=address, cols=cols, rows=rows,
        planes=1, mem_row_stride=array.strides[0], row_stride=array.strides[0],
    )  # fmt: skip


def bf16(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


# Control core and cycles. -------------------------------------------------------------------------


def test_an_empty_program_costs_its_launch_and_its_exit():
    program = Assembler()
    program.control("exit")
    # lui, addi (port), lui, addi (value): 3 cycles each; sw: 5. Code: 20 bytes.
    result = run(program)
    assert (result.cycles, result.fault) == (100 + 2 + 4 * 3 + 5, None)
    assert result.counters.instructions == 5


def test_a_resident_program_is_not_copied_again_and_arguments_cost_a_cycle_each():
    program, machine = Assembler(), Definition(TINY)
    program.control("exit")
    cycles = [run(program, machine, args=args).cycles for args in ((), (), (7, 8, 9))]
    assert cycles == [119, 117, 120]


def test_cycles_of_one_load():
    program = Assembler()
    load(program, np.zeros((2, 8), np.float32), 0)
    issue = len(program.code) - 1
    program.control("exit")
    result = run(program)
    stores = sum(word & 0x7F == 0x23 for word in program.code[:issue])
    go = first_cycle(program) + 5 * stores + 3 * (issue - stores)
    (row,) = result.trace
    assert row["entry"] == go + 4
    assert row["start"] == go + 6
    slot = -(-(go + 6) // 4)  # one atom every 4 cycles; 64 bytes
    assert row["free"] == 4 * (slot + 1)
    assert row["finish"] == row["free"] + 20 + 8 + 4
    assert row["cause"] == CAUSES.index("entry")
    assert (row["pc"], row["bank"], row["dram_bytes"]) == (4 * issue, 1, 64)
    assert result.cycles == row["finish"] + 1
    assert result.counters.busy == (row["free"] - row["start"], 0, 0, 0)
    assert result.counters.dram_read_bytes == 64


def test_a_word_of_sram_waits_for_its_writer_and_arrives():
    program, machine = Assembler(), Definition(TINY, trace=True)
    program.command("iota", dst=0, dst_stride=4, rows=1, cols=4, start=5, col_step=3)
    program.load_immediate(7, SRAM.base + 8)
    program.code.append(rv32.encode("lw", rd=6, rs1=7, imm=0))
    program.load_immediate(7, DMEM.base)
    program.code.append(rv32.encode("sw", rs2=6, rs1=7, imm=64))
    program.control("exit")
    result = run(program, machine)
    assert machine._cores[0].dmem[64] == 11
    (row,) = result.trace
    # What follows the load starts 2 cycles after the finish: lui, addi, sw, lui, addi, sw.
    assert result.cycles == row["finish"] + 2 + 3 + 3 + 5 + 3 + 3 + 5


def test_a_fence_waits_for_the_last_finish():
    program = Assembler()
    load(program, np.zeros((1, 8), np.float32), 0)
    program.control("fence")
    program.control("exit")
    result = run(program)
    assert result.cycles == result.trace[0]["finish"] + 1 + 3 + 3 + 5


def test_the_ninth_command_waits_for_the_window_of_eight():
    program = Assembler()
    go = program.set_fields("transpose", rows=64, cols=4, src_stride=16, dst=8192, dst_stride=256,
                            dtype=0)  # fmt: skip
    program.burst([("transpose", go)], 10)
    program.control("exit")
    trace = run(program).trace
    gaps = np.diff(trace["entry"])
    assert list(gaps[:7]) == [5] * 7
    assert trace["entry"][8] == trace["finish"][0]
    assert trace["entry"][9] == trace["finish"][1]
    assert {CAUSES[cause] for cause in trace["cause"][1:]} == {"hazard"}


# Values. ------------------------------------------------------------------------------------------


def test_a_matmul_through_memory():
    random = np.random.default_rng(1)
    a, b = (bf16(random.integers(-4, 5, shape)) for shape in ((5, 7), (6, 7)))
    program, machine = Assembler(), Definition(TINY)
    machine.write(0, a.tobytes())
    machine.write(256, b.tobytes())
    load(program, a, 0)
    load(program, b, 8192, 256)
    for accumulate in (0, 1):
        program.command(
            "matmul", type=0, accumulate=accumulate, transpose_b=1, a=0, m0=5, m0_stride=14, m1=1,
            m2=1, k_inner=7, k_outer=1, b=8192, b_stride=14, n=6, acc=0, acc_stride=24,
        )  # fmt: skip
    load(program, np.zeros((5, 6), np.float32), ACC_BIT, 1024, "store")
    program.control("exit")
    assert run(program, machine).fault is None
    result = np.frombuffer(machine.read(1024, 120), np.float32).reshape(5, 6)
    wide = [(x.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
    np.testing.assert_array_equal(result, 2 * wide[0] @ wide[1].T)
    assert machine.read(1024 + 120, 8) == bytes(8)


def test_padding_gather_scatter_and_accumulation():
    data = np.arange(1, 13, dtype=np.int32).reshape(3, 4)
    program, machine = Assembler(), Definition(TINY)
    machine.write(0, data.tobytes())
    shape = {"mem": 2, "local": 2, "slot": 0, "cols": 4, "planes": 1, "mem_row_stride": 16}
    program.command("load", **shape | {"cols": 7}, rows=5, address=0, row_stride=28,
                    pad_above=1, pad_below=1, pad_left=2, pad_right=1)  # fmt: skip
    program.command("store", **shape | {"cols": 7, "mem_row_stride": 28}, offset=1024, rows=5,
                    address=0, row_stride=28)  # fmt: skip
    program.command("iota", dst=4096, dst_stride=4, rows=3, cols=1, start=2, row_step=-1)
    del shape["planes"]
    program.command("gather", **shape, rows=3, offset=0, indices=4096, address=512, row_stride=16)
    program.command("iota", dst=4096, dst_stride=4, rows=3, cols=1, start=1, row_step=0)
    program.command("scatter", **shape, rows=3, offset=2048, indices=4096, address=512,
                    accumulate=1, row_stride=16)  # fmt: skip
    program.control("exit")
    assert run(program, machine).fault is None
    padded = np.frombuffer(machine.read(1024, 140), np.int32).reshape(5, 7)
    np.testing.assert_array_equal(padded, np.pad(data, ((1, 1), (2, 1))))
    added = np.frombuffer(machine.read(2048, 32), np.int32).reshape(2, 4)
    np.testing.assert_array_equal(added, [[0] * 4, data.sum(0)])


def test_a_row_sum_and_an_argmax_in_two_chunks():
    values = np.random.default_rng(2).integers(-9, 9, (2, 100)).astype(np.float32)
    program, machine = Assembler(), Definition(TINY)
    machine.write(0, values.tobytes())
    load(program, values, 0)
    for op, dtype, offset in ((0, 0, 4096), (5, 2, 4104)):
        shape = {"op": op, "src_stride": 400, "rows": 2, "state": 8192, "state_stride": 512}
        program.command("reduce", **shape, first=1, src=0, cols=64, start=0)
        program.command("reduce", **shape, src=256, cols=36, start=64)
        program.command("finish", op=op, dtype=dtype, state=8192, state_stride=512, rows=2,
                        dst=16384, dst_stride=4)  # fmt: skip
        load(program, np.zeros((1, 2), np.float32), 16384, offset, "store")
    program.control("exit")
    assert run(program, machine).fault is None
    assert list(np.frombuffer(machine.read(4096, 8), np.float32)) == list(values.sum(1))
    assert list(np.frombuffer(machine.read(4104, 8), np.int32)) == list(values.argmax(1))


def test_vector_operands_and_transpose():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    program, machine = Assembler(), Definition(TINY)
    machine.write(0, values.tobytes())
    load(program, values, 0)
    # (values - first column) * 0.5, as bf16; then transposed
    program.command(
        "vector", f1=2, f2=3, a=0, a_stride=16, b=0, b_kind=1, b_stride=16, c=0x3F000000, c_kind=2,
        dst_dtype=1, dst=1024, dst_stride=8, rows=3, cols=4,
    )  # fmt: skip
    program.command("transpose", dtype=1, src=1024, src_stride=8, rows=3, cols=4, dst=2048,
                    dst_stride=6)  # fmt: skip
    load(program, np.zeros((4, 3), np.uint16), 2048, 4096, "store")
    program.control("exit")
    assert run(program, machine).fault is None
    result = np.frombuffer(machine.read(4096, 24), np.uint16).reshape(4, 3)
    np.testing.assert_array_equal(result, bf16((values - values[:, :1]) * 0.5).T)


# Faults. ------------------------------------------------------------------------------------------


def test_a_command_fault_is_precise():
    program, machine = Assembler(), Definition(TINY)
    machine.write(0, b"\7" * 64)
    load(program, np.zeros((1, 8), np.float32), 0)
    load(program, np.zeros((1, 8), np.float32), 0, 1024, "store")
    load(program, np.zeros((1, 8), np.float32), 0, (1 << 16) - 28, "store")
    bad = len(program.code) - 1
    load(program, np.zeros((1, 8), np.float32), 0, 2048, "store")
    program.control("exit")
    result = run(program, machine)
    fault = result.fault
    assert (fault.kind, fault.core, fault.pc, fault.command) == (
        FaultKind.OUT_OF_SLOT, 0, 4 * bad, 2,
    )  # fmt: skip
    assert (fault.slot, fault.offset) == (0, (1 << 16) - 28)
    assert fault.detail == "store: bytes 65508 to 65539 of slot 0, which has 65536"
    stores = sum(word & 0x7F == 0x23 for word in program.code[:bad])
    assert fault.cycle == result.cycles == first_cycle(program) + 3 * bad + 2 * stores + 4
    assert machine.read(1024, 32) == b"\7" * 32
    assert machine.read(2048, 32) == bytes(32)


def test_faults_of_the_command_port():
    for bank, word in ((0, 4), (11, 0), (3, 8), (8, 6)):
        program = Assembler()
        program.store(bank, word, 1)
        fault = run(program).fault
        assert (fault.kind, fault.command) == (FaultKind.BAD_ADDRESS, -1)
        assert fault.cycle == first_cycle(program) + 12
    program = Assembler()
    program.control("trap", 42)
    fault = run(program).fault
    assert (fault.kind, fault.detail) == (FaultKind.TRAP, "trap 42")
    assert fault.cycle == first_cycle(program) + 12 + 4


def test_faults_of_the_control_core():
    program = Assembler()
    fault = run(program).fault  # falls off its end into zeros
    assert (fault.kind, fault.pc) == (FaultKind.ILLEGAL_INSTRUCTION, 8)
    program.code.append(rv32.encode("sw", rs2=0, rs1=2, imm=-8))
    machine = Definition(TINY)
    limited = replace(program.program(), stack_limit=4096 - 4)
    machine.start(Launch(limited))
    assert machine.wait().fault.kind is FaultKind.STACK_OVERFLOW
    program.load_word(TINY.sram_bytes)
    assert run(program).fault.kind is FaultKind.BAD_ADDRESS


def test_the_watchdog_ends_what_would_happen_later():
    program = Assembler()
    load(program, np.zeros((1, 8), np.float32), 0)
    program.control("exit")
    end = run(program).cycles
    assert run(program, watchdog=end).fault is None
    fault = run(program, watchdog=end - 1).fault
    assert (fault.kind, fault.cycle, fault.pc) == (
        FaultKind.WATCHDOG, end - 1, 4 * len(program.code) - 4,
    )  # fmt: skip


def test_an_int64_that_does_not_fit_is_reported_at_the_end():
    program, machine = Assembler(), Definition(TINY)
    machine.write(0, np.array([1 << 40, -(1 << 40)], np.int64).tobytes())
    program.command("load", mem=6, local=2, slot=0, address=0, cols=2, rows=1, planes=1)
    issue = len(program.code) - 1
    load(program, np.zeros((1, 2), np.int32), 0, 64, "store")
    program.control("exit")
    result = run(program, machine)
    assert (result.fault.kind, result.fault.pc) == (FaultKind.INT64_OVERFLOW, 4 * issue)
    assert (result.fault.command, result.fault.cycle) == (0, result.cycles)
    saturated = np.frombuffer(machine.read(64, 8), np.int32)
    assert list(saturated) == [(1 << 31) - 1, -(1 << 31)]


def test_checking_mode_finds_what_was_never_written():
    program = Assembler()
    load(program, np.zeros((1, 8), np.float32), 0)
    load(program, np.zeros((1, 8), np.float32), 4, 64, "store")
    program.control("exit")
    assert run(program).fault is None
    fault = run(program, Definition(TINY, checking=True)).fault
    assert (fault.kind, fault.command) == (FaultKind.UNINITIALISED, 1)
    assert fault.detail == "address reads byte 32, never written"


# Several cores. -----------------------------------------------------------------------------------


def dual(body):
    """A program whose x9 is the core's number."""
    program = Assembler()
    program.load_immediate(7, CORE_ID)
    program.code.append(rv32.encode("lw", rd=9, rs1=7, imm=0))
    body(program)
    return program


def skip_on_core_0(program, body):
    at = len(program.code)
    program.code.append(0)
    body()
    distance = 4 * (len(program.code) - at)
    program.code[at] = rv32.encode("beq", rs1=9, rs2=0, offset=distance)


def test_a_barrier_holds_every_core_until_the_last_has_arrived():
    def body(program):
        skip_on_core_0(program, lambda: load(program, np.zeros((1, 8), np.float32), 0))
        program.control("barrier")
        program.control("exit")

    machine = Definition(DUAL, trace=True)
    result = run(dual(body), machine)
    (row,) = result.trace
    assert row["core"] == 1
    assert result.cycles == row["finish"] + 1 + 10 + 3 + 3 + 5
    assert [core.cycle for core in machine._cores] == [result.cycles] * 2


def test_a_core_that_exits_before_a_barrier_faults():
    def body(program):
        skip_on_core_0(program, lambda: program.control("barrier"))
        program.control("exit")

    program = dual(body)
    fault = run(program, Definition(DUAL)).fault
    assert (fault.kind, fault.core) == (FaultKind.BARRIER_MISMATCH, 0)
    assert fault.pc == 4 * len(program.code) - 4


def test_of_several_faults_the_earliest_wins():
    def body(program):
        skip_on_core_0(program, lambda: program.control("trap", 1))
        program.load_immediate(VALUE, 3)
        program.code.append(rv32.encode("sw", rs2=VALUE, rs1=PORT, imm=12))

    fault = run(dual(body), Definition(DUAL)).fault
    # core 0 takes the branch (5 cycles), core 1 does not (3) and traps first
    assert (fault.kind, fault.core, fault.detail) == (FaultKind.TRAP, 1, "trap 1")
    fault = run(dual(lambda program: program.control("trap", 2)), Definition(DUAL)).fault
    assert (fault.core, fault.detail) == (0, "trap 2")


def test_checking_mode_finds_a_race_and_a_barrier_ends_it():
    def shared(barrier):
        def body(program):
            load(program, np.zeros((1, 8), np.float32), 0)
            if barrier:
                program.control("barrier")
            skip_on_core_0(
                program, lambda: load(program, np.zeros((1, 8), np.float32), 0, 16, "store")
            )
            program.control("exit")

        return dual(body)

    assert run(shared(True), Definition(DUAL, checking=True)).fault is None
    fault = run(shared(False), Definition(DUAL, checking=True)).fault
    assert (fault.kind, fault.core, fault.command) == (FaultKind.RACE, 1, 1)


# Machine. -----------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(programs(TINY))
def test_random_programs_end_and_repeat(program):
    results = []
    for _ in range(2):
        machine = Definition(TINY, trace=True)
        machine.write(0, program.dram)
        machine.start(program.launch)
        result = machine.wait()
        results.append((result.cycles, result.fault, machine.read(0, len(program.dram))))
        if result.fault is None:
            assert result.cycles == max([result.cycles, *(result.trace["finish"] + 1)])
            assert (np.diff(result.trace["entry"]) >= 5).all()
    assert results[0] == results[1]
