"""The control core's table against LLVM (encodings, text) and the RISC-V manual (meanings)."""

from __future__ import annotations

import io
import multiprocessing
import random
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.isa.fault import FaultKind, FaultRaised
from pagoda.isa.rv32 import CYCLES, RV32, cycles, decode, disassemble, encode, step

MASK32 = 0xFFFFFFFF
INT_MIN = 0x80000000
DATA = 0x1000_0000

# Encodings and text: LLVM is the judge -----------------------------------------------------------

SHIFTS = ["shl", "lshr", "ashr"]
BINARY = [*SHIFTS, "add", "sub", "mul", "and", "or", "xor", "sdiv", "udiv", "srem", "urem"]
PREDICATES = ["eq", "ne", "slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge"]

# LLVM's assembly printer knows only the names of the RISC-V calling convention (psABI, chapter 1).
ABI_NAMES = [
    *("zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1"),
    *(f"a{k}" for k in range(8)),
    *(f"s{k}" for k in range(2, 12)),
    *(f"t{k}" for k in range(3, 7)),
]
REGISTER = re.compile(rf"\b({'|'.join(ABI_NAMES)})\b")


INDIRECT_CALL = """define i32 @indirect(ptr %f, i32 %a) {
  %r = call i32 %f(i32 %a)
  %s = add i32 %r, 1
  ret i32 %s
}"""

BREAKPOINT = """declare void @llvm.debugtrap()
define void @breakpoint() {
  call void @llvm.debugtrap()
  ret void
}"""

ENDLESS_LOOP = """define void @loop(ptr %p) {
entry:
  br label %body
body:
  store volatile i32 1, ptr %p
  br label %body
}"""


def every_operation() -> list[str]:
    """LLVM IR functions, each small, that between them need every instruction."""
    functions = [
        "define i32 @constant() { ret i32 305419896 }",
        "@word = global i32 7\ndefine ptr @address() { ret ptr @word }",
        INDIRECT_CALL,
        BREAKPOINT,
        ENDLESS_LOOP,
    ]
    for ordering in ("acquire", "release", "seq_cst"):
        functions.append(f"define void @fence_{ordering}() {{ fence {ordering}\n ret void }}")
    for operation in BINARY:
        constants = (5, 17, 31) if operation in SHIFTS else (5, 17, 31, 1023, -1, -7, -2048)
        for number, right in enumerate(("%b", *constants)):
            functions.append(
                f"define i32 @{operation}_{number}(i32 %a, i32 %b) {{\n"
                f"  %r = {operation} i32 %a, {right}\n  ret i32 %r\n}}"
            )
    for left, right in (("sext", "sext"), ("zext", "zext"), ("sext", "zext")):
        functions.append(
            f"define i32 @high_{left}_{right}(i32 %a, i32 %b) {{\n"
            f"  %x = {left} i32 %a to i64\n  %y = {right} i32 %b to i64\n"
            "  %p = mul i64 %x, %y\n  %h = lshr i64 %p, 32\n"
            "  %r = trunc i64 %h to i32\n  ret i32 %r\n}"
        )
    for predicate in PREDICATES:
        functions.append(
            f"define i32 @set_{predicate}(i32 %a, i32 %b) {{\n  %c = icmp {predicate} i32 %a, %b\n"
            f"  %d = icmp {predicate} i32 %b, -9\n  %e = xor i1 %c, %d\n"
            "  %r = zext i1 %e to i32\n  ret i32 %r\n}"
        )
        functions.append(
            f"define i32 @branch_{predicate}(i32 %a, i32 %b, ptr %p) {{\n"
            f"  %c = icmp {predicate} i32 %a, %b\n  br i1 %c, label %then, label %else\n"
            "then:\n  store volatile i32 %a, ptr %p\n  ret i32 1\nelse:\n  ret i32 %b\n}"
        )
    for bits in (8, 16, 32):
        functions.append(
            f"define void @store{bits}(ptr %p, i{bits} %v) {{\n"
            f"  %q = getelementptr i8, ptr %p, i32 -36\n  store i{bits} %v, ptr %q\n  ret void\n}}"
        )
        for extend in ("sext", "zext") if bits < 32 else ("bitcast",):
            functions.append(
                f"define i32 @load{bits}_{extend}(ptr %p) {{\n"
                f"  %q = getelementptr i8, ptr %p, i32 2044\n  %v = load i{bits}, ptr %q\n"
                f"  %w = {extend} i{bits} %v to i32\n  ret i32 %w\n}}"
            )
    return functions


def random_function(name: str, rng: random.Random) -> str:
    """Straight code with diamonds: values, memory and branches drawn at random."""
    values = ["%a", "%b", "%c", "%d"]
    lines: list[str] = []
    names = (f"v{k}" for k in count())

    def operand() -> str:
        constant = rng.choice((rng.randrange(-2048, 2048), rng.randrange(-(2**31), 2**31)))
        return rng.choice(values) if rng.random() < 0.7 else str(constant)

    def emit(text: str) -> str:
        result = next(names)
        lines.append(f"  %{result} = {text}")
        return f"%{result}"

    for k in range(40):
        kind = rng.random()
        if kind < 0.5:
            operation = rng.choice(BINARY)
            right = str(rng.randrange(32)) if operation in SHIFTS else operand()
            values.append(emit(f"{operation} i32 {rng.choice(values)}, {right}"))
        elif kind < 0.65:
            bits = rng.choice((8, 16, 32))
            offset = rng.randrange(-3000, 3000) // 4 * 4
            pointer = emit(f"getelementptr i8, ptr %p, i32 {offset}")
            if rng.random() < 0.5:
                low = values[-1] if bits == 32 else emit(f"trunc i32 {values[-1]} to i{bits}")
                lines.append(f"  store volatile i{bits} {low}, ptr {pointer}")
            else:
                loaded = emit(f"load volatile i{bits}, ptr {pointer}")
                extend = rng.choice(("sext", "zext"))
                values.append(loaded if bits == 32 else emit(f"{extend} i{bits} {loaded} to i32"))
        else:
            condition = emit(f"icmp {rng.choice(PREDICATES)} i32 {rng.choice(values)}, {operand()}")
            if kind < 0.8:
                values.append(emit(f"select i1 {condition}, i32 {values[-1]}, i32 {operand()}"))
            else:
                lines.append(f"  br i1 {condition}, label %then{k}, label %join{k}\nthen{k}:")
                lines.append(f"  store volatile i32 {rng.choice(values)}, ptr %p")
                lines.append(f"  br label %join{k}\njoin{k}:")
    body = "\n".join(lines)
    return (
        f"define i32 @{name}(i32 %a, i32 %b, i32 %c, i32 %d, ptr %p) {{\n{body}\n"
        f"  ret i32 {values[-1]}\n}}"
    )


def llvm_listing(source: str) -> tuple[str, bytes, set[int]]:
    """LLVM's assembly text of a module, its .text bytes, and the offsets that it relocates.

    Run in a process of its own: LLVM's printing options can be set only process-wide.
    """
    import llvmlite.binding as llvm
    from elftools.elf.elffile import ELFFile

    llvm.set_option("", "-riscv-no-aliases")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("riscv32-unknown-elf")
    machine = target.create_target_machine(
        features="+m,-relax", codemodel="medium", reloc="pic", opt=2
    )
    # Code generation rewrites the module, so each listing gets a fresh one.
    text = machine.emit_assembly(llvm.parse_assembly(source))
    elf = ELFFile(io.BytesIO(machine.emit_object(llvm.parse_assembly(source))))
    relocations = elf.get_section_by_name(".rela.text")
    relocated = {entry["r_offset"] for entry in relocations.iter_relocations()}
    return text, elf.get_section_by_name(".text").data(), relocated


@pytest.fixture(scope="module")
def listing() -> list[tuple[str, int, int, bool]]:
    """(LLVM's text, address, word, is relocated) of every instruction, labels made addresses."""
    rng = random.Random(2024)
    functions = every_operation() + [random_function(f"random{k}", rng) for k in range(30)]
    source = 'target triple = "riscv32-unknown-elf"\n' + "\n".join(functions)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        text, code, relocated = pool.submit(llvm_listing, source).result()
    instructions: list[str] = []
    labels: dict[str, int] = {}
    in_text = True
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if re.match(r"\.(text|data|section|bss)\b", line):
            in_text = line.startswith(".text")
        elif line.endswith(":"):
            labels[line[:-1]] = 4 * len(instructions)
        elif line and not line.startswith(".") and in_text:
            line = REGISTER.sub(lambda name: f"x{ABI_NAMES.index(name[0])}", line)
            instructions.append(" ".join(line.split()))
    rows = []
    for line, pc in zip(instructions, range(0, len(code), 4), strict=True):
        if pc not in relocated:
            line = re.sub(r"\.L\w+", lambda label: f"{labels[label[0]]:#x}", line)
        rows.append((line, pc, int.from_bytes(code[pc : pc + 4], "little"), pc in relocated))
    return rows


def test_text_agrees_with_llvm(listing):
    assert len(listing) > 2000
    for text, pc, word, relocated in listing:
        if relocated:  # the linker fills in the number: compare all else
            row, values = decode(word)
            assert re.split(r"\W+", text)[0] == row.name
            assert re.findall(r"\bx\d+", text) == [
                f"x{values[field.name]}" for field in row.fields if field.name[0] == "r"
            ]
        else:
            assert disassemble(word, pc) == text


def test_llvm_emits_every_row(listing):
    seen = Counter(decode(word)[0].name for _, _, word, _ in listing)
    assert set(RV32.rows) - set(seen) == {"ecall"}  # no LLVM IR asks for it
    assert encode("ecall") == 0x00000073  # the manual's own table


def test_encode_restores_llvms_words(listing):
    for _, _, word, _ in listing:
        row, values = decode(word)
        assert encode(row.name, **values) == word


def test_the_table_is_rv32i_and_m():
    assert len(RV32.rows) == 40 + 8


@given(st.data())
def test_round_trip(data):
    row = RV32.rows[data.draw(st.sampled_from(sorted(RV32.rows)))]
    values = {f.name: data.draw(st.sampled_from(f.values), label=f.name) for f in row.fields}
    word = encode(row.name, **values)
    assert decode(word) == (row, values)
    assert 0 <= word <= MASK32


@given(st.integers(0, MASK32))
def test_a_word_is_its_instruction_or_illegal(word):
    matching = [row for row in RV32.rows.values() if word & row.mask == row.match]
    assert RV32.find(word) == (matching[0] if matching else None)
    assert len(matching) <= 1
    if matching and matching[0].name != "fence":  # fence ignores some bits
        assert encode(matching[0].name, **matching[0].extract(word)) == word


def test_disassembly():
    assert disassemble(0x00C32283) == "lw x5, 12(x6)"
    assert disassemble(encode("beq", rs1=1, rs2=2, offset=-8)) == "beq x1, x2, -8"
    assert disassemble(encode("beq", rs1=1, rs2=2, offset=-8), pc=32) == "beq x1, x2, 0x18"
    assert disassemble(encode("fence", pred=0b1111, succ=0b0010)) == "fence iorw, r"
    assert disassemble(encode("fence", pred=0, succ=0)) == "fence 0, 0"
    assert disassemble(0x8330000F) == "fence rw, rw"  # fence.tso: its fm is ignored
    assert disassemble(0xC0001073) == ".word 0xc0001073"  # LLVM's unimp is a CSR write


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mulhs", {}, "RV32IM has no instruction 'mulhs'; did you mean mulhsu or mulh or mulhu?"),
        ("csrrw", {}, "RV32IM has no instruction 'csrrw'; see the table's rows."),
        (
            "lw",
            {"rd": 1, "offset": 4},
            (
                "lw takes the fields rd, imm, rs1, but was given rd, offset; "
                "its form is `lw rd, imm(rs1)`."
            ),
        ),
        ("ecall", {"rd": 1}, "ecall takes no fields, but was given rd; its form is `ecall`."),
        (
            "add",
            {"rd": 32, "rs1": 0, "rs2": 0},
            (
                "add: rd = 32 is not possible: the field is a register number, "
                "an integer from 0 to 31."
            ),
        ),
        (
            "addi",
            {"rd": 1, "rs1": 0, "imm": 2048},
            (
                "addi: imm = 2048 is not possible: the field is a two's complement number, "
                "an integer from -2048 to 2047."
            ),
        ),
        (
            "bne",
            {"rs1": 1, "rs2": 0, "offset": 3},
            (
                "bne: offset = 3 is not possible: the field is a signed distance in bytes from the "
                "instruction's address, an integer from -4096 to 4094 in steps of 2."
            ),
        ),
        (
            "lui",
            {"rd": 1, "uimm": "x"},
            (
                "lui: uimm = 'x' is not possible: the field is an unsigned number, "
                "an integer from 0 to 1048575."
            ),
        ),
    ],
)
def test_encode_errors(name, fields, message):
    with pytest.raises(ValueError) as error:
        encode(name, **fields)
    assert str(error.value) == message


def test_decode_error():
    with pytest.raises(ValueError) as error:
        decode(0)
    assert str(error.value) == "0x00000000 is no instruction of RV32IM"


# Meanings: the RISC-V manual is the judge --------------------------------------------------------


class Core:
    """A core with its code at the first pc and 64 bytes of data at DATA."""

    def __init__(self, code: list[int], registers: dict[int, int] | None = None, pc: int = 0):
        self.x = [0] * 32
        for number, value in (registers or {}).items():
            self.x[number] = value & MASK32
        self.pc = self.start = pc
        self.code = code
        self.data = bytearray(64)
        self.stores: list[tuple[int, int, int, int]] = []

    def fetch(self, address):
        return self.code[(address - self.start) // 4]

    def read(self, address, size, signed):
        start = address - DATA
        return int.from_bytes(self.data[start : start + size], "little", signed=signed)

    def write(self, address, size, value, base_register):
        self.stores.append((address, size, value, base_register))
        start = address - DATA
        self.data[start : start + size] = value.to_bytes(size, "little")


def binary(name: str, a: int, b: int) -> int:
    """x3 after `name x3, x1, x2` with x1 = a, x2 = b."""
    core = Core([encode(name, rd=3, rs1=1, rs2=2)], {1: a, 2: b})
    step(core)
    return core.x[3]


def immediate(name: str, a: int, **field: int) -> int:
    """x3 after `name x3, x1, field` with x1 = a."""
    core = Core([encode(name, rd=3, rs1=1, **field)], {1: a})
    step(core)
    return core.x[3]


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("add", MASK32, 1, 0),
        ("sub", 0, 1, MASK32),
        ("sll", 1, 31, INT_MIN),
        ("sll", 5, 32, 5),  # only 5 bits of the amount count
        ("sll", 0xC0000001, 33, 0x80000002),
        ("srl", INT_MIN, 31, 1),
        ("srl", INT_MIN, 0xFFFFFFE4, 0x08000000),
        ("sra", INT_MIN, 31, MASK32),
        ("sra", 0x40000000, 30, 1),
        ("slt", INT_MIN, 0, 1),
        ("slt", 0, INT_MIN, 0),
        ("slt", 7, 7, 0),
        ("sltu", INT_MIN, 0, 0),
        ("sltu", 0, 1, 1),
        ("xor", 0xFF00FF00, 0x0FF00FF0, 0xF0F0F0F0),
        ("or", 0xFF00FF00, 0x0FF00FF0, 0xFFF0FFF0),
        ("and", 0xFF00FF00, 0x0FF00FF0, 0x0F000F00),
        ("mul", MASK32, MASK32, 1),
        ("mul", 0x10000, 0x10000, 0),
        ("mulh", MASK32, MASK32, 0),
        ("mulh", INT_MIN, INT_MIN, 0x40000000),
        ("mulh", INT_MIN, 1, MASK32),
        ("mulhu", MASK32, MASK32, 0xFFFFFFFE),
        ("mulhsu", MASK32, MASK32, MASK32),
        ("mulhsu", 1, MASK32, 0),
        ("mulhsu", INT_MIN, MASK32, INT_MIN),
        ("div", 7, -2, -3),  # rounds towards zero
        ("div", -7, 2, -3),
        ("div", -7, -2, 3),
        ("div", 7, 0, -1),
        ("div", INT_MIN, 0, -1),
        ("div", INT_MIN, -1, INT_MIN),
        ("divu", 7, 0, MASK32),
        ("divu", INT_MIN, MASK32, 0),
        ("divu", MASK32, 2, 0x7FFFFFFF),
        ("rem", 7, -2, 1),
        ("rem", -7, 2, -1),
        ("rem", -7, 0, -7),
        ("rem", INT_MIN, -1, 0),
        ("rem", INT_MIN, 0, INT_MIN),
        ("remu", 7, 0, 7),
        ("remu", INT_MIN, MASK32, INT_MIN),
        ("remu", MASK32, 10, 5),
    ],
)
def test_register_operations(name, a, b, expected):
    assert binary(name, a, b) == expected & MASK32


words = st.integers(0, MASK32) | st.sampled_from([0, 1, 2, MASK32, INT_MIN, INT_MIN - 1])


@given(words, words)
def test_register_operations_follow_from_one_another(a, b):
    """Identities of the manual: division, widening products, shifts, carries."""
    import numpy as np

    sa, sb = (int(np.uint32(v).astype(np.int32)) for v in (a, b))
    assert binary("sub", binary("add", a, b), b) == a
    assert binary("mulh", a, b) << 32 | binary("mul", a, b) == sa * sb & (1 << 64) - 1
    assert binary("mulhu", a, b) << 32 | binary("mul", a, b) == a * b
    assert binary("mulhsu", a, b) << 32 | binary("mul", a, b) == sa * b & (1 << 64) - 1
    for quotient, remainder in (("div", "rem"), ("divu", "remu")):
        product = binary("mul", binary(quotient, a, b), b)
        assert binary("add", product, binary(remainder, a, b)) == a
    if b:
        q, r = np.divmod(a, b)
        assert (binary("divu", a, b), binary("remu", a, b)) == (q, r)
        remainder = binary("rem", a, b)
        assert remainder == int(np.fmod(sa, sb)) & MASK32
    assert binary("sra", a, b) == int(np.int32(sa) >> (b % 32)) & MASK32
    assert binary("srl", a, b) == a // 2 ** (b % 32)
    assert binary("sll", a, b) == a * 2 ** (b % 32) % 2**32
    assert (binary("slt", a, b), binary("sltu", a, b)) == (sa < sb, a < b)


@given(words, st.integers(-2048, 2047))
def test_immediate_operations_equal_register_operations(a, imm):
    for name in ("add", "slt", "xor", "or", "and"):
        assert immediate(f"{name}i", a, imm=imm) == binary(name, a, imm)
    assert immediate("sltiu", a, imm=imm) == binary("sltu", a, imm)
    for name in ("sll", "srl", "sra"):
        assert immediate(f"{name}i", a, shamt=imm % 32) == binary(name, a, imm)


def test_sltiu_extends_the_sign_first():
    assert immediate("sltiu", 5, imm=-1) == 1
    assert immediate("sltiu", MASK32, imm=-1) == 0


def test_upper_immediates():
    core = Core([encode("lui", rd=1, uimm=0xFFFFF), encode("auipc", rd=2, uimm=0xFFFFF)], pc=0x2000)
    step(core)
    step(core)
    assert core.x[1:3] == [0xFFFFF000, 0x1004]


@pytest.mark.parametrize(
    ("name", "offset", "expected"),
    [
        ("lb", 0, 0xFFFFFF80),
        ("lbu", 0, 0x80),
        ("lb", 1, 0x7F),
        ("lh", 0, 0x7F80),
        ("lh", 2, 0xFFFFFF01),
        ("lhu", 2, 0xFF01),
        ("lw", 0, 0xFF017F80),
    ],
)
def test_loads(name, offset, expected):
    core = Core([encode(name, rd=3, rs1=1, imm=offset - 8)], {1: DATA + 8})
    core.data[:4] = bytes.fromhex("80 7f 01 ff")
    assert step(core) == 5
    assert core.x[3] == expected


def test_stores():
    code = [encode(name, rs2=2, rs1=1, imm=imm) for name, imm in (("sb", 1), ("sh", 2), ("sw", 4))]
    core = Core(code, {1: DATA, 2: 0x89ABCDEF})
    assert [step(core) for _ in code] == [5, 5, 5]
    assert core.stores == [
        (DATA + 1, 1, 0xEF, 1),
        (DATA + 2, 2, 0xCDEF, 1),
        (DATA + 4, 4, 0x89ABCDEF, 1),
    ]
    assert core.data[:8] == bytes.fromhex("00 ef ef cd ef cd ab 89")


@pytest.mark.parametrize(
    ("name", "a", "b", "taken"),
    [
        ("beq", 5, 5, True),
        ("beq", 5, 6, False),
        ("bne", 5, 6, True),
        ("bne", 5, 5, False),
        ("blt", -1, 0, True),
        ("blt", 0, 0, False),
        ("bge", 0, -1, True),
        ("bge", -1, 0, False),
        ("bltu", 0, -1, True),
        ("bltu", -1, 0, False),
        ("bgeu", -1, 0, True),
        ("bgeu", 0, -1, False),
    ],
)
def test_branches(name, a, b, taken):
    core = Core([encode(name, rs1=1, rs2=2, offset=-16)], {1: a, 2: b}, pc=0x100)
    assert step(core) == (5 if taken else 3)
    assert core.pc == (0xF0 if taken else 0x104)


def test_a_branch_to_the_next_instruction_is_taken():
    core = Core([encode("beq", rs1=0, rs2=0, offset=4)])
    assert step(core) == 5
    assert core.pc == 4


def test_jumps():
    core = Core([encode("jal", rd=1, offset=-0x100)], pc=0x200)
    assert step(core) == 3
    assert (core.pc, core.x[1]) == (0x100, 0x204)
    core = Core([encode("jalr", rd=1, imm=-3, rs1=1)], {1: 0x404}, pc=0x200)
    assert step(core) == 6
    assert (core.pc, core.x[1]) == (0x400, 0x204)  # bit 0 of 0x401 cleared; rs1 read before rd


def test_addresses_wrap():
    core = Core([encode("jal", rd=1, offset=8)], pc=0xFFFFFFFC)
    step(core)
    assert (core.pc, core.x[1]) == (4, 0)
    core = Core([encode("lw", rd=3, imm=-4, rs1=1)], {1: DATA + 4 + 2**32})
    step(core)
    assert core.x[3] == 0


def test_x0_stays_zero():
    for row in RV32.rows.values():
        if any(field.name == "rd" for field in row.fields):
            values = {field.name: 4 for field in row.fields} | {"rd": 0}
            core = Core([encode(row.name, **values)], {4: DATA + 12})
            core.data[:] = b"\xff" * 64
            step(core)
            assert core.x[0] == 0, row.name


def test_fence_does_nothing():
    core = Core([encode("fence", pred=15, succ=15)], {1: 7})
    assert step(core) == 3
    assert (core.x[:3], core.pc, core.stores) == ([0, 7, 0], 4, [])


@pytest.mark.parametrize(
    ("word", "kind", "detail"),
    [
        (0, FaultKind.ILLEGAL_INSTRUCTION, "0x00000000 is no instruction"),
        (0xC0001073, FaultKind.ILLEGAL_INSTRUCTION, "0xc0001073 is no instruction"),
        (encode("ecall"), FaultKind.TRAP, "ecall"),
        (encode("ebreak"), FaultKind.TRAP, "ebreak"),
        (
            encode("lh", rd=1, imm=1, rs1=1),
            FaultKind.MISALIGNED,
            "access of 2 bytes at 0x10000001, no multiple of 2",
        ),
        (
            encode("sw", rs2=1, imm=2, rs1=1),
            FaultKind.MISALIGNED,
            "access of 4 bytes at 0x10000002, no multiple of 4",
        ),
        (
            encode("jal", rd=1, offset=6),
            FaultKind.MISALIGNED,
            "jump to 0x00000006, no multiple of 4",
        ),
        (
            encode("jalr", rd=1, imm=3, rs1=1),
            FaultKind.MISALIGNED,
            "jump to 0x10000002, no multiple of 4",
        ),
        (
            encode("beq", rs1=0, rs2=0, offset=-2),
            FaultKind.MISALIGNED,
            "jump to 0xfffffffe, no multiple of 4",
        ),
    ],
)
def test_faults_change_nothing(word, kind, detail):
    core = Core([word], {1: DATA})
    with pytest.raises(FaultRaised) as raised:
        step(core)
    assert (raised.value.kind, raised.value.detail) == (kind, detail)
    assert (core.x[:3], core.pc, core.stores) == ([0, DATA, 0], 0, [])


def test_a_misaligned_branch_that_is_not_taken_is_no_fault():
    core = Core([encode("bne", rs1=0, rs2=0, offset=2)])
    assert step(core) == 3
    assert core.pc == 4


def test_every_row_has_cycles_and_a_summary():
    for row in RV32.rows.values():
        assert row.summary.endswith("."), row.name
        if row.cycle_class != "trap":
            assert cycles(row) in CYCLES.values()
            assert cycles(row, taken=True) in CYCLES.values()


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (3, "lui auipc addi srai add sll jal fence beq bne blt bge bltu bgeu"),
        (5, "lb lh lw lbu lhu sb sh sw"),
        (6, "jalr mul mulh mulhsu mulhu"),
        (40, "div divu rem remu"),
    ],
)
def test_cycles(expected, names):
    assert {name: cycles(RV32.rows[name]) for name in names.split()} == dict.fromkeys(
        names.split(), expected
    )
    assert cycles(RV32.rows["beq"], taken=True) == 5
