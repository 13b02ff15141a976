"""Control units and launcher in RTL against the definition: cycles, faults, DMEM, counts."""

import random
from dataclasses import replace

import pytest
from control_bench import (
    BARRIER,
    CHIP,
    DUMP,
    EXIT,
    FENCE,
    GO,
    IOTA,
    MASK32,
    RESERVED,
    SINGLE,
    SRAM_IMAGE,
    TEMPORARY,
    TRAP,
    Hardware,
    Oracle,
    Outcome,
    Script,
    code,
    immediate,
    op,
    port,
    program,
    store,
)

from pagoda.chip.host_map import HOST_REGIONS, HOST_REGISTERS, REGION_SHIFT
from pagoda.isa import FaultKind, Launch, Program, Slot, rv32
from pagoda.isa.memory_map import CORE_ID, DMEM, SRAM


@pytest.fixture(scope="module")
def pair() -> tuple[Hardware, Oracle]:
    return Hardware(CHIP), Oracle(CHIP)


@pytest.fixture(scope="module")
def single() -> tuple[Hardware, Oracle]:
    return Hardware(SINGLE), Oracle(SINGLE)


def compare(pair, launch: Launch, *scripts: Script, dmem: bool = False) -> Outcome:
    """Run on both sides; every core has its script, or all the same one."""
    hardware, oracle = pair
    chosen = list(scripts or (Script(),))
    chosen *= hardware.chip.cores // len(chosen)
    expected = oracle.run(launch, chosen)
    assert hardware.run(launch, chosen) == expected
    if dmem:
        assert hardware.dmem() == oracle.dmem()
        oracle.run(Launch(DUMP), chosen)  # the same code is resident again
    return expected


BASE = 31  # holds DMEM's base; random instructions leave it alone
# x1 to x30 to DMEM, from byte 512 on.
SAVE_REGISTERS = [
    *immediate(BASE, DMEM.base),
    *code(*(op("sw", rs2=k, rs1=BASE, imm=512 + 4 * k) for k in range(1, 31))),
]


def on_core(number: int, words: list[int]) -> list[int]:
    """Only this core executes these."""
    return [
        *immediate(TEMPORARY, CORE_ID),
        *code(
            op("lw", rd=TEMPORARY, rs1=TEMPORARY, imm=0),
            op("addi", rd=TEMPORARY, rs1=TEMPORARY, imm=-number),
            op("bne", rs1=TEMPORARY, rs2=0, offset=4 * len(words) + 4),
        ),
        *words,
    ]


# Launches. ----------------------------------------------------------------------------------------


def test_the_shortest_launch(pair):
    assert compare(pair, Launch(program(EXIT))).cycles == 2 + 1 + 3 + 3 + 5


def test_arguments_registers_and_resident_code(pair):
    launch = Launch(program([*SAVE_REGISTERS, *EXIT]), args=(1, 0xFFFFFFFF, 12345))
    first = compare(pair, launch)
    second = compare(pair, launch)
    assert second.cycles == first.cycles - 34 // 4 - 1
    assert pair[0].dmem() == pair[1].dmem()


def test_every_register_but_the_stack_pointer_starts_at_0(pair):
    fill = [word for k in range(1, 32) for word in immediate(k, 0x1234567 * k)]
    compare(pair, Launch(program([*fill, *EXIT])))
    compare(pair, Launch(program([*SAVE_REGISTERS, *EXIT])), dmem=True)
    words = pair[0].dmem()[0]
    assert [words[128 + k] for k in range(1, 30)] == [0, DMEM.base + 1024, *[0] * 27]


def test_entry_and_code_that_an_earlier_program_left(pair):
    compare(pair, Launch(program([*EXIT, *EXIT], entry=12)))
    # IMEM beyond a program's code is 0, although the last program's words are there.
    short = compare(pair, Launch(program(code(op("addi", rd=1, rs1=0, imm=1)) * 2)))
    assert short.fault[:3] == (FaultKind.ILLEGAL_INSTRUCTION, 0, 8)
    compare(pair, Launch(program(EXIT, entry=12)))


def test_a_launch_ends_when_the_windows_are_empty(pair):
    hardware, _ = pair
    for drained in (40, 300):
        hardware.drained = drained
        assert compare(pair, Launch(program([*GO, 0]))).fault[3] < 30
        assert drained < hardware.last_cycle < drained + 30
    hardware.drained = 0


def test_slots_reach_the_command_port(pair):
    hardware, _ = pair
    slots = tuple(Slot(64 * (n + 3), n << 20, n % 2 == 0, n % 3 == 0) for n in range(64))
    for count in (64, 5, 0):
        hardware.run(Launch(program(EXIT), slots=slots[:count]), [Script()] * 2)
        for number, core in ((0, 0), (4, 1), (63, 1), (64, 0), (MASK32, 1)):
            names = ("exists", "base", "bytes", "readable", "writable")
            hardware.model[f"slots__{core}__slot"] = number
            hardware.model.settle()
            found = [hardware.model[f"slots__{core}__{name}"] for name in names]
            if number < count:
                slot = slots[number]
                assert found == [1, slot.base, slot.size, slot.readable, slot.writable]
            else:
                assert found[0] == 0


# Instructions. ------------------------------------------------------------------------------------

VALUES = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF8000, 0x0001FFFF, 0x12345678, 31, 32)


def test_every_register_instruction_on_edge_values(pair):
    rng = random.Random(1)
    names = [row.name for row in rv32.RV32.rows.values() if {"rs1", "rs2", "rd"}
             == {f.name for f in row.fields}]  # fmt: skip
    assert len(names) == 18
    for a in VALUES:
        b = rng.choice((*VALUES, rng.getrandbits(32)))
        words = [*immediate(1, a), *immediate(3, b), *immediate(BASE, DMEM.base)]
        for number, name in enumerate(names):
            words += code(op(name, rd=4, rs1=1, rs2=3),
                          op("sw", rs1=BASE, rs2=4, imm=4 * number))  # fmt: skip
            words += code(op(name, rd=4, rs1=3, rs2=1),
                          op("sw", rs1=BASE, rs2=4, imm=128 + 4 * number))  # fmt: skip
        compare(pair, Launch(program([*words, *EXIT])), dmem=True)


def random_instruction(rng: random.Random, length: int, position: int) -> list[int]:
    """One instruction or a short idiom: any row, with values that matter now and then."""

    def register() -> int:
        return rng.randrange(16)

    kind = rng.random()
    if kind < 0.06:  # an access of DMEM, not always aligned, now and then through x2
        name = rng.choice(("lb", "lh", "lw", "lbu", "lhu", "sb", "sh", "sw"))
        step = {"b": 1, "h": 2, "w": 4}[name[1]]
        step = 1 if rng.random() < 0.03 else step
        offset = rng.randrange(0, 512 if rng.random() < 0.97 else 1030, step)
        if rng.random() < 0.15:
            base, offset = 2, offset - 512 if step > 1 else -offset
        else:
            base = BASE
        value = {"rs2": register()} if name[0] == "s" else {"rd": register()}
        return code(op(name, rs1=base, imm=offset, **value))
    if kind < 0.10:
        return rng.choice((FENCE, GO, store(port(6, rng.randrange(1, 12)), register())))
    if kind < 0.115:
        return [*immediate(TEMPORARY, CORE_ID), *code(op("lw", rd=register(), rs1=TEMPORARY,
                                                         imm=rng.choice((0, 4))))]  # fmt: skip
    if kind < 0.135:
        address = SRAM.base + rng.randrange(0, CHIP.sram_bytes, 4)
        return [*immediate(TEMPORARY, address), *code(op("lw", rd=register(), rs1=TEMPORARY,
                                                         imm=0))]  # fmt: skip
    if kind < 0.14:
        return rng.choice((
            [rng.getrandbits(32)], code(op(rng.choice(("ecall", "ebreak")))), TRAP,
            [*immediate(4, RESERVED), *store(port(IOTA), 4)], BARRIER, EXIT,
            store(rng.choice((0, 0x30000000, port(11), port(1, 13), CORE_ID, SRAM.base))),
        ))  # fmt: skip
    if kind < 0.16:
        return code(op("jalr", rd=register(), rs1=0,
                       imm=rng.randrange(0, 4 * length, 4) | rng.choice((0, 0, 0, 1))))  # fmt: skip
    rows = [row for row in rv32.RV32.rows.values()
            if row.cycle_class in ("alu", "branch", "jal", "mul", "div", "fence")]  # fmt: skip
    row = rng.choice(rows)
    fields = {}
    for each in row.fields:
        if each.name in ("rd", "rs1", "rs2"):
            fields[each.name] = register()
        elif each.name == "offset":
            target = rng.randrange(max(position - 4, 0), min(position + 12, length))
            fields["offset"] = 4 * (target - position) + (2 if rng.random() < 0.01 else 0)
        else:
            fields[each.name] = rng.choice(each.values)
    return [rv32.encode(row.name, **fields)]


def random_program(seed: int, length: int = 60) -> Program:
    rng = random.Random(seed)
    words = immediate(BASE, DMEM.base)
    for register in range(1, 16):
        if register != 2:
            words += immediate(register, rng.choice((rng.getrandbits(32), *VALUES)))
    end = len(words) + length
    while len(words) < end:
        words += random_instruction(rng, end, len(words))
    return program([*words, *SAVE_REGISTERS, *EXIT], stack_limit=rng.choice((0, 256, 600)))


def random_scripts(seed: int) -> list[Script]:
    rng = random.Random(seed)
    return [
        Script([rng.choice((0, 0, 1, 2, 7)) for _ in range(5)], rng.choice((-3, -2, -1, 0, 1, 2)),
               busy=rng.randrange(12))
        for _ in range(CHIP.cores)
    ]  # fmt: skip


def check_random(pair, seeds: range) -> None:
    for seed in seeds:
        launch = Launch(random_program(seed), watchdog=random.Random(seed).randrange(400, 3000))
        scripts = random_scripts(seed)[: pair[0].chip.cores]
        compare(pair, launch, *scripts, dmem=True)


def test_random_programs(pair):
    check_random(pair, range(40))


def test_random_programs_on_one_core(single):
    assert compare(single, Launch(program(EXIT), args=(5,))).cycles == 1 + 1 + 1 + 3 + 3 + 5
    check_random(single, range(100, 110))


@pytest.mark.slow
def test_many_random_programs(pair):
    check_random(pair, range(1000, 2000))


# Faults. ------------------------------------------------------------------------------------------


def load(address: int, name: str = "lw") -> list[int]:
    return [*immediate(TEMPORARY, address), *code(op(name, rd=1, rs1=TEMPORARY, imm=0))]


def narrow_store(address: int, name: str) -> list[int]:
    return [*immediate(TEMPORARY, address), *code(op(name, rs2=1, rs1=TEMPORARY, imm=0))]


def jump(address: int) -> list[int]:
    return [*immediate(TEMPORARY, address), *code(op("jalr", rd=1, rs1=TEMPORARY, imm=0))]


def stack_store(offset: int, name: str = "sw") -> list[int]:
    return [*immediate(2, DMEM.base + offset), *code(op(name, rs2=0, rs1=2, imm=0))]


FAULTS = [
    (FaultKind.ILLEGAL_INSTRUCTION, [0]),
    (FaultKind.ILLEGAL_INSTRUCTION, [0xC0001073]),
    (FaultKind.ILLEGAL_INSTRUCTION, jump(4092)),
    (FaultKind.FETCH_OUT_OF_RANGE, jump(4096)),
    (FaultKind.FETCH_OUT_OF_RANGE, jump(DMEM.base)),
    (FaultKind.FETCH_OUT_OF_RANGE, jump(MASK32 & -4)),
    (FaultKind.MISALIGNED, jump(10)),
    (FaultKind.MISALIGNED, code(op("jal", rd=1, offset=6))),
    (FaultKind.MISALIGNED, code(op("beq", rs1=0, rs2=0, offset=-2))),
    (None, code(op("bne", rs1=0, rs2=0, offset=-2))),
    (FaultKind.MISALIGNED, load(DMEM.base + 2)),
    (FaultKind.MISALIGNED, load(0x30000001, "lh")),
    (FaultKind.MISALIGNED, store(port(0, 2) + 2)),
    (FaultKind.BAD_ADDRESS, load(0)),
    (FaultKind.BAD_ADDRESS, load(0x30000000)),
    (FaultKind.BAD_ADDRESS, load(0xFFFFFFFC)),
    (FaultKind.BAD_ADDRESS, load(SRAM.base, "lb")),
    (FaultKind.BAD_ADDRESS, load(SRAM.base + CHIP.sram_bytes)),
    (None, load(SRAM.base + CHIP.sram_bytes - 4)),
    (FaultKind.BAD_ADDRESS, store(SRAM.base)),
    (FaultKind.BAD_ADDRESS, load(port(0))),
    (FaultKind.BAD_ADDRESS, narrow_store(port(1, 1), "sh")),
    (FaultKind.BAD_ADDRESS, narrow_store(port(0, 2), "sb")),
    (FaultKind.BAD_ADDRESS, store(CORE_ID)),
    (FaultKind.BAD_ADDRESS, load(CORE_ID + 8)),
    (FaultKind.BAD_ADDRESS, load(CORE_ID, "lhu")),
    (None, load(CORE_ID + 4)),
    (FaultKind.DMEM_OUT_OF_RANGE, load(DMEM.base + 1024)),
    (FaultKind.DMEM_OUT_OF_RANGE, store(DMEM.base + 0x0FFFFFFC)),
    (FaultKind.DMEM_OUT_OF_RANGE, stack_store(1024)),
    (FaultKind.STACK_OVERFLOW, stack_store(508)),
    (FaultKind.STACK_OVERFLOW, stack_store(511, "sb")),
    (None, stack_store(512)),
    (None, narrow_store(DMEM.base + 1023, "sb")),
    (FaultKind.TRAP, code(op("ecall"))),
    (FaultKind.TRAP, code(op("ebreak"))),
    (FaultKind.TRAP, TRAP),
    (FaultKind.BAD_FIELD, [*immediate(1, RESERVED), *GO, *store(port(IOTA), 1)]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_precise(pair, number):
    kind, words = FAULTS[number]
    for late in (-3, -2, -1, 0, 1, 2):
        launch = Launch(program([*words, *EXIT], stack_limit=512))
        expected = compare(pair, launch, Script([3], late))
        assert (expected.fault and expected.fault[0]) == kind
        if kind is not FaultKind.BAD_FIELD:
            break
    assert pair[0].dmem() == pair[1].dmem()


def test_only_words_that_exist_are_stored(pair):
    for bank in range(16):
        for word in range(16):
            value = 1 if word == 0 else 0  # a go faults, for its reserved bits are set
            words = [*immediate(1, MASK32), *store(port(bank, word), value), *EXIT]
            compare(pair, Launch(program(words)))
    compare(pair, Launch(program([*store(port(16)), *EXIT])))


def test_the_watchdog_in_every_cycle(pair):
    words = [
        *immediate(3, 7), *immediate(4, RESERVED), *store(DMEM.base + 8, 3), *GO,
        *store(port(1, 1), 3), *FENCE, *load(SRAM.base + 20),
        *code(op("div", rd=5, rs1=4, rs2=3)), *BARRIER,
        *code(op("jal", rd=1, offset=8)), 0, *on_core(1, [*store(DMEM.base, 4)]),
    ]  # fmt: skip
    for end in (TRAP, EXIT, store(port(IOTA), 4)):
        for late in (-3, 2):
            scripts = Script([2, 4, 0], late, busy=9), Script([0, 1, 3], late, busy=12)
            launch = Launch(program([*words, *end]))
            last = compare(pair, launch, *scripts).cycles
            for watchdog in range(1, last + 3, 1 if late < 0 else 7):
                compare(pair, replace(launch, watchdog=watchdog), *scripts)
    assert pair[0].dmem() == pair[1].dmem()


# Several cores. -----------------------------------------------------------------------------------


def test_barriers_hold_until_the_last_core_has_arrived(pair):
    words = [*on_core(1, [*GO, *FENCE]), *BARRIER, *on_core(0, [*GO] * 3), *BARRIER, *BARRIER]
    for waits in ([0], [5], [1, 0, 12]):
        compare(pair, Launch(program([*words, *EXIT])), Script(waits), Script())


def test_a_core_that_exits_before_a_barrier_faults(pair):
    for early in (0, 1):
        words = [*on_core(early, EXIT), *BARRIER, *EXIT]
        for waits in ([0], [30]):
            found = compare(pair, Launch(program(words)), Script(waits), Script())
            assert found.fault[:2] == (FaultKind.BARRIER_MISMATCH, early)


def test_of_several_faults_the_earliest_wins(pair):
    for body in (
        [*on_core(1, TRAP), 0], [*on_core(0, TRAP), 0], [0], [*on_core(1, [*EXIT]), *BARRIER],
        [*on_core(1, [*GO, *BARRIER]), *TRAP], [*on_core(0, [*GO, *BARRIER]), *EXIT],
    ):  # fmt: skip
        for waits in ([0], [9], [40]):
            compare(pair, Launch(program(body)), Script(waits), Script())


def test_an_overflow_is_reported_at_the_end(pair):
    launch = Launch(program([*GO, *GO, *GO, *EXIT]))
    for first, second in ((1, -1), (-1, 2), (0, 0), (2, 1)):
        for wait in (0, 5):
            scripts = Script([wait], overflow_at=first), Script([2], overflow_at=second)
            found = compare(pair, launch, *scripts)
            assert found.fault[0] == FaultKind.INT64_OVERFLOW
    stopped = Launch(program([*GO, 0]))
    assert compare(pair, stopped, Script(overflow_at=0)).fault[0] != FaultKind.INT64_OVERFLOW


# Loads from SRAM. ---------------------------------------------------------------------------------


def test_a_word_of_sram_waits_for_its_writers(pair):
    words = [*immediate(3, DMEM.base), *immediate(4, SRAM.base + 2044)]
    for number in range(20):  # `alu` instructions in between move the start through the period
        words += code(op("lw", rd=1, rs1=4, imm=4 * number), op("sw", rs1=3, rs2=1, imm=4 * number))
        words += code(op("addi", rd=0, rs1=0, imm=0)) * (number % 3)
    for busy in (0, 1, 2, 3, 4, 5, 8, 15):
        compare(pair, Launch(program([*words, *EXIT])), Script(busy=busy), Script(busy=15 - busy))
    assert pair[0].dmem() == pair[1].dmem()
    found = b"".join(word.to_bytes(4, "little") for word in pair[0].dmem()[0])
    assert found[:80] == SRAM_IMAGE[2044 : 2044 + 80]


# The host's map. ----------------------------------------------------------------------------------


def test_registers_and_regions_do_not_overlap():
    words = [
        register.address + 4 * word
        for register in HOST_REGISTERS.values()
        for word in range(register.words)
    ]
    assert len(set(words)) == len(words)
    assert all(word % 4 == 0 and word >> REGION_SHIFT == 0 for word in words)
    bases = [region.base for region in HOST_REGIONS.values()]
    assert len(set(bases)) == len(bases)
    assert all(base and base % (1 << REGION_SHIFT) == 0 for base in bases)
