"""RV32IM as one table: the control core's instructions, their bits, text, cycles and meaning.

Source: The RISC-V Instruction Set Manual, volume I, chapters RV32I (2.1) and M (2.0). There are no
CSRs, no compressed instructions and no `fence.i` (IMEM cannot be written by the program).

A meaning is short plain Python over a `State`. It is called with the row's field values, checks
everything before it changes anything, and returns the address of the next instruction if it jumps
or branches, else None. Register values are unsigned 32-bit ints; `write_register` wraps.
"""

from __future__ import annotations

from typing import Protocol

from pagoda.isa.fault import FaultKind, FaultRaised
from pagoda.isa.table import FieldKind, InstructionTable, Row

MASK32 = 0xFFFFFFFF

# Cycles of each class, from the start of an instruction to the start of the next. A store to the
# command port or a load from SRAM that has to wait n cycles takes n more. An instruction that
# raises a fault never ends, hence no number for ecall and ebreak.
CYCLES = {
    "alu": 3,
    "branch not taken": 3,
    "branch taken": 5,
    "jal": 3,
    "jalr": 6,
    "load": 5,
    "store": 5,
    "mul": 6,
    "div": 40,
    "fence": 3,
}

RV32 = InstructionTable(
    "RV32IM",
    {
        "rd": FieldKind.REGISTER,
        "rs1": FieldKind.REGISTER,
        "rs2": FieldKind.REGISTER,
        "imm": FieldKind.SIGNED,
        "uimm": FieldKind.UNSIGNED,
        "shamt": FieldKind.UNSIGNED,
        "offset": FieldKind.PC_OFFSET,
        "pred": FieldKind.ORDERING,
        "succ": FieldKind.ORDERING,
    },
)


class State(Protocol):
    """What a meaning sees of a core."""

    x: list[int]  # 32 registers, unsigned 32-bit; x[0] is always 0
    pc: int  # address of the instruction being executed

    def fetch(self, address: int) -> int:
        """The instruction word at an aligned address. Raises FaultRaised."""

    def read(self, address: int, size: int, signed: bool) -> int:
        """`size` bytes (1, 2, 4) at an aligned address, little-endian. Raises FaultRaised."""

    def write(self, address: int, size: int, value: int, base_register: int) -> None:
        """Store the low `size` bytes of an unsigned value; base_register x2 marks the stack."""


def signed(value: int) -> int:
    """An unsigned 32-bit value read as two's complement."""
    return value - (1 << 32) if value >> 31 else value


def write_register(state: State, rd: int, value: int) -> None:
    if rd != 0:
        state.x[rd] = value & MASK32


def data_address(state: State, rs1: int, imm: int, size: int) -> int:
    address = (state.x[rs1] + imm) & MASK32
    if address % size:
        problem = f"access of {size} bytes at {address:#010x}, no multiple of {size}"
        raise FaultRaised(FaultKind.MISALIGNED, problem)
    return address


def load(state: State, rd: int, rs1: int, imm: int, size: int, *, signed: bool) -> None:
    write_register(state, rd, state.read(data_address(state, rs1, imm, size), size, signed))


def store(state: State, rs2: int, rs1: int, imm: int, size: int) -> None:
    value = state.x[rs2] & (1 << 8 * size) - 1
    state.write(data_address(state, rs1, imm, size), size, value, rs1)


def jump_target(address: int) -> int:
    address &= MASK32
    if address % 4:
        raise FaultRaised(FaultKind.MISALIGNED, f"jump to {address:#010x}, no multiple of 4")
    return address


def branch(state: State, taken: bool, offset: int) -> int | None:
    return jump_target(state.pc + offset) if taken else None


def truncated_quotient(dividend: int, divisor: int) -> int:
    """Quotient of two signed values, rounded towards zero (Python's // rounds downwards)."""
    quotient = abs(dividend) // abs(divisor)
    return quotient if (dividend < 0) == (divisor < 0) else -quotient


# Upper immediates and jumps ----------------------------------------------------------------------


@RV32.row("uimm[19:0] rd 0110111", "lui rd, uimm", "alu")
def lui(state, rd, uimm):
    """Load upper immediate: rd = uimm << 12."""
    write_register(state, rd, uimm << 12)


@RV32.row("uimm[19:0] rd 0010111", "auipc rd, uimm", "alu")
def auipc(state, rd, uimm):
    """Add upper immediate to pc: rd = pc + (uimm << 12)."""
    write_register(state, rd, state.pc + (uimm << 12))


@RV32.row("offset[20|10:1|11|19:12] rd 1101111", "jal rd, offset", "jal")
def jal(state, rd, offset):
    """Jump and link: rd = pc + 4, go to pc + offset."""
    target = jump_target(state.pc + offset)
    write_register(state, rd, state.pc + 4)
    return target


@RV32.row("imm[11:0] rs1 000 rd 1100111", "jalr rd, imm(rs1)", "jalr")
def jalr(state, rd, imm, rs1):
    """Jump and link register: rd = pc + 4, go to rs1 + imm with bit 0 cleared."""
    target = jump_target(state.x[rs1] + imm & ~1)
    write_register(state, rd, state.pc + 4)
    return target


# Branches ----------------------------------------------------------------------------------------


@RV32.row("offset[12|10:5] rs2 rs1 000 offset[4:1|11] 1100011", "beq rs1, rs2, offset", "branch")
def beq(state, rs1, rs2, offset):
    """Branch to pc + offset if rs1 = rs2."""
    return branch(state, state.x[rs1] == state.x[rs2], offset)


@RV32.row("offset[12|10:5] rs2 rs1 001 offset[4:1|11] 1100011", "bne rs1, rs2, offset", "branch")
def bne(state, rs1, rs2, offset):
    """Branch to pc + offset if rs1 differs from rs2."""
    return branch(state, state.x[rs1] != state.x[rs2], offset)


@RV32.row("offset[12|10:5] rs2 rs1 100 offset[4:1|11] 1100011", "blt rs1, rs2, offset", "branch")
def blt(state, rs1, rs2, offset):
    """Branch to pc + offset if rs1 < rs2, signed."""
    return branch(state, signed(state.x[rs1]) < signed(state.x[rs2]), offset)


@RV32.row("offset[12|10:5] rs2 rs1 101 offset[4:1|11] 1100011", "bge rs1, rs2, offset", "branch")
def bge(state, rs1, rs2, offset):
    """Branch to pc + offset if rs1 >= rs2, signed."""
    return branch(state, signed(state.x[rs1]) >= signed(state.x[rs2]), offset)


@RV32.row("offset[12|10:5] rs2 rs1 110 offset[4:1|11] 1100011", "bltu rs1, rs2, offset", "branch")
def bltu(state, rs1, rs2, offset):
    """Branch to pc + offset if rs1 < rs2, unsigned."""
    return branch(state, state.x[rs1] < state.x[rs2], offset)


@RV32.row("offset[12|10:5] rs2 rs1 111 offset[4:1|11] 1100011", "bgeu rs1, rs2, offset", "branch")
def bgeu(state, rs1, rs2, offset):
    """Branch to pc + offset if rs1 >= rs2, unsigned."""
    return branch(state, state.x[rs1] >= state.x[rs2], offset)


# Loads and stores --------------------------------------------------------------------------------


@RV32.row("imm[11:0] rs1 000 rd 0000011", "lb rd, imm(rs1)", "load")
def lb(state, rd, imm, rs1):
    """Load a byte from rs1 + imm, sign-extended."""
    load(state, rd, rs1, imm, 1, signed=True)


@RV32.row("imm[11:0] rs1 001 rd 0000011", "lh rd, imm(rs1)", "load")
def lh(state, rd, imm, rs1):
    """Load two bytes from rs1 + imm, sign-extended."""
    load(state, rd, rs1, imm, 2, signed=True)


@RV32.row("imm[11:0] rs1 010 rd 0000011", "lw rd, imm(rs1)", "load")
def lw(state, rd, imm, rs1):
    """Load a word from rs1 + imm."""
    load(state, rd, rs1, imm, 4, signed=False)


@RV32.row("imm[11:0] rs1 100 rd 0000011", "lbu rd, imm(rs1)", "load")
def lbu(state, rd, imm, rs1):
    """Load a byte from rs1 + imm, zero-extended."""
    load(state, rd, rs1, imm, 1, signed=False)


@RV32.row("imm[11:0] rs1 101 rd 0000011", "lhu rd, imm(rs1)", "load")
def lhu(state, rd, imm, rs1):
    """Load two bytes from rs1 + imm, zero-extended."""
    load(state, rd, rs1, imm, 2, signed=False)


@RV32.row("imm[11:5] rs2 rs1 000 imm[4:0] 0100011", "sb rs2, imm(rs1)", "store")
def sb(state, rs2, imm, rs1):
    """Store the low byte of rs2 at rs1 + imm."""
    store(state, rs2, rs1, imm, 1)


@RV32.row("imm[11:5] rs2 rs1 001 imm[4:0] 0100011", "sh rs2, imm(rs1)", "store")
def sh(state, rs2, imm, rs1):
    """Store the low two bytes of rs2 at rs1 + imm."""
    store(state, rs2, rs1, imm, 2)


@RV32.row("imm[11:5] rs2 rs1 010 imm[4:0] 0100011", "sw rs2, imm(rs1)", "store")
def sw(state, rs2, imm, rs1):
    """Store rs2 at rs1 + imm."""
    store(state, rs2, rs1, imm, 4)


# Register and immediate --------------------------------------------------------------------------


@RV32.row("imm[11:0] rs1 000 rd 0010011", "addi rd, rs1, imm", "alu")
def addi(state, rd, rs1, imm):
    """rd = rs1 + imm."""
    write_register(state, rd, state.x[rs1] + imm)


@RV32.row("imm[11:0] rs1 010 rd 0010011", "slti rd, rs1, imm", "alu")
def slti(state, rd, rs1, imm):
    """rd = 1 if rs1 < imm, signed, else 0."""
    write_register(state, rd, signed(state.x[rs1]) < imm)


@RV32.row("imm[11:0] rs1 011 rd 0010011", "sltiu rd, rs1, imm", "alu")
def sltiu(state, rd, rs1, imm):
    """rd = 1 if rs1 < imm, the sign-extended imm taken as unsigned, else 0."""
    write_register(state, rd, state.x[rs1] < imm & MASK32)


@RV32.row("imm[11:0] rs1 100 rd 0010011", "xori rd, rs1, imm", "alu")
def xori(state, rd, rs1, imm):
    """rd = rs1 xor imm."""
    write_register(state, rd, state.x[rs1] ^ imm)


@RV32.row("imm[11:0] rs1 110 rd 0010011", "ori rd, rs1, imm", "alu")
def ori(state, rd, rs1, imm):
    """rd = rs1 or imm."""
    write_register(state, rd, state.x[rs1] | imm)


@RV32.row("imm[11:0] rs1 111 rd 0010011", "andi rd, rs1, imm", "alu")
def andi(state, rd, rs1, imm):
    """rd = rs1 and imm."""
    write_register(state, rd, state.x[rs1] & imm)


@RV32.row("0000000 shamt[4:0] rs1 001 rd 0010011", "slli rd, rs1, shamt", "alu")
def slli(state, rd, rs1, shamt):
    """rd = rs1 << shamt."""
    write_register(state, rd, state.x[rs1] << shamt)


@RV32.row("0000000 shamt[4:0] rs1 101 rd 0010011", "srli rd, rs1, shamt", "alu")
def srli(state, rd, rs1, shamt):
    """rd = rs1 >> shamt, zeros shifted in."""
    write_register(state, rd, state.x[rs1] >> shamt)


@RV32.row("0100000 shamt[4:0] rs1 101 rd 0010011", "srai rd, rs1, shamt", "alu")
def srai(state, rd, rs1, shamt):
    """rd = rs1 >> shamt, copies of the sign shifted in."""
    write_register(state, rd, signed(state.x[rs1]) >> shamt)


# Register and register ---------------------------------------------------------------------------


@RV32.row("0000000 rs2 rs1 000 rd 0110011", "add rd, rs1, rs2", "alu")
def add(state, rd, rs1, rs2):
    """rd = rs1 + rs2."""
    write_register(state, rd, state.x[rs1] + state.x[rs2])


@RV32.row("0100000 rs2 rs1 000 rd 0110011", "sub rd, rs1, rs2", "alu")
def sub(state, rd, rs1, rs2):
    """rd = rs1 - rs2."""
    write_register(state, rd, state.x[rs1] - state.x[rs2])


@RV32.row("0000000 rs2 rs1 001 rd 0110011", "sll rd, rs1, rs2", "alu")
def sll(state, rd, rs1, rs2):
    """rd = rs1 << the low 5 bits of rs2."""
    write_register(state, rd, state.x[rs1] << (state.x[rs2] & 31))


@RV32.row("0000000 rs2 rs1 010 rd 0110011", "slt rd, rs1, rs2", "alu")
def slt(state, rd, rs1, rs2):
    """rd = 1 if rs1 < rs2, signed, else 0."""
    write_register(state, rd, signed(state.x[rs1]) < signed(state.x[rs2]))


@RV32.row("0000000 rs2 rs1 011 rd 0110011", "sltu rd, rs1, rs2", "alu")
def sltu(state, rd, rs1, rs2):
    """rd = 1 if rs1 < rs2, unsigned, else 0."""
    write_register(state, rd, state.x[rs1] < state.x[rs2])


@RV32.row("0000000 rs2 rs1 100 rd 0110011", "xor rd, rs1, rs2", "alu")
def xor(state, rd, rs1, rs2):
    """rd = rs1 xor rs2."""
    write_register(state, rd, state.x[rs1] ^ state.x[rs2])


@RV32.row("0000000 rs2 rs1 101 rd 0110011", "srl rd, rs1, rs2", "alu")
def srl(state, rd, rs1, rs2):
    """rd = rs1 >> the low 5 bits of rs2, zeros shifted in."""
    write_register(state, rd, state.x[rs1] >> (state.x[rs2] & 31))


@RV32.row("0100000 rs2 rs1 101 rd 0110011", "sra rd, rs1, rs2", "alu")
def sra(state, rd, rs1, rs2):
    """rd = rs1 >> the low 5 bits of rs2, copies of the sign shifted in."""
    write_register(state, rd, signed(state.x[rs1]) >> (state.x[rs2] & 31))


@RV32.row("0000000 rs2 rs1 110 rd 0110011", "or rd, rs1, rs2", "alu")
def or_(state, rd, rs1, rs2):
    """rd = rs1 or rs2."""
    write_register(state, rd, state.x[rs1] | state.x[rs2])


@RV32.row("0000000 rs2 rs1 111 rd 0110011", "and rd, rs1, rs2", "alu")
def and_(state, rd, rs1, rs2):
    """rd = rs1 and rs2."""
    write_register(state, rd, state.x[rs1] & state.x[rs2])


# Multiplication and division ---------------------------------------------------------------------


@RV32.row("0000001 rs2 rs1 000 rd 0110011", "mul rd, rs1, rs2", "mul")
def mul(state, rd, rs1, rs2):
    """rd = low word of rs1 * rs2."""
    write_register(state, rd, state.x[rs1] * state.x[rs2])


@RV32.row("0000001 rs2 rs1 001 rd 0110011", "mulh rd, rs1, rs2", "mul")
def mulh(state, rd, rs1, rs2):
    """rd = high word of rs1 * rs2, both signed."""
    write_register(state, rd, signed(state.x[rs1]) * signed(state.x[rs2]) >> 32)


@RV32.row("0000001 rs2 rs1 010 rd 0110011", "mulhsu rd, rs1, rs2", "mul")
def mulhsu(state, rd, rs1, rs2):
    """rd = high word of rs1 * rs2, rs1 signed and rs2 unsigned."""
    write_register(state, rd, signed(state.x[rs1]) * state.x[rs2] >> 32)


@RV32.row("0000001 rs2 rs1 011 rd 0110011", "mulhu rd, rs1, rs2", "mul")
def mulhu(state, rd, rs1, rs2):
    """rd = high word of rs1 * rs2, both unsigned."""
    write_register(state, rd, state.x[rs1] * state.x[rs2] >> 32)


@RV32.row("0000001 rs2 rs1 100 rd 0110011", "div rd, rs1, rs2", "div")
def div(state, rd, rs1, rs2):
    """rd = rs1 / rs2, signed, rounded towards zero; by 0: -1; -2^31 / -1: -2^31."""
    dividend, divisor = signed(state.x[rs1]), signed(state.x[rs2])
    write_register(state, rd, truncated_quotient(dividend, divisor) if divisor else -1)


@RV32.row("0000001 rs2 rs1 101 rd 0110011", "divu rd, rs1, rs2", "div")
def divu(state, rd, rs1, rs2):
    """rd = rs1 / rs2, unsigned; by 0: 2^32 - 1."""
    dividend, divisor = state.x[rs1], state.x[rs2]
    write_register(state, rd, dividend // divisor if divisor else MASK32)


@RV32.row("0000001 rs2 rs1 110 rd 0110011", "rem rd, rs1, rs2", "div")
def rem(state, rd, rs1, rs2):
    """rd = remainder of div, with the sign of rs1; by 0: rs1; -2^31 / -1: 0."""
    dividend, divisor = signed(state.x[rs1]), signed(state.x[rs2])
    whole = truncated_quotient(dividend, divisor) * divisor if divisor else 0
    write_register(state, rd, dividend - whole)


@RV32.row("0000001 rs2 rs1 111 rd 0110011", "remu rd, rs1, rs2", "div")
def remu(state, rd, rs1, rs2):
    """rd = remainder of divu; by 0: rs1."""
    dividend, divisor = state.x[rs1], state.x[rs2]
    write_register(state, rd, dividend % divisor if divisor else dividend)


# Fence and environment ---------------------------------------------------------------------------


# The manual tells simple cores to ignore fm, rs1 and rd: fence.tso is an ordinary fence here.
@RV32.row("---- pred[3:0] succ[3:0] ----- 000 ----- 0001111", "fence pred, succ", "fence")
def fence(state, pred, succ):
    """Nothing: the core's accesses happen in program order. Commands have a fence of their own."""


@RV32.row("000000000000 00000 000 00000 1110011", "ecall", "trap")
def ecall(state):
    """Fault TRAP: there is no environment to call."""
    raise FaultRaised(FaultKind.TRAP, "ecall")


@RV32.row("000000000001 00000 000 00000 1110011", "ebreak", "trap")
def ebreak(state):
    """Fault TRAP: there is no debugger to enter."""
    raise FaultRaised(FaultKind.TRAP, "ebreak")


encode = RV32.encode
decode = RV32.decode
disassemble = RV32.disassemble


def cycles(row: Row, taken: bool = False) -> int:
    """Cycles of an instruction that completes; `taken` matters for branches only."""
    if row.cycle_class == "branch":
        return CYCLES["branch taken" if taken else "branch not taken"]
    return CYCLES[row.cycle_class]


def step(state: State) -> int:
    """Execute the instruction at state.pc, move the pc on, and return the cycles it takes.

    Raises FaultRaised with registers, memory and pc as they were before the instruction.
    """
    word = state.fetch(state.pc)
    row = RV32.find(word)
    if row is None:
        raise FaultRaised(FaultKind.ILLEGAL_INSTRUCTION, f"{word:#010x} is no instruction")
    target = row.meaning(state, **row.extract(word))
    state.pc = (state.pc + 4) & MASK32 if target is None else target
    return cycles(row, target is not None)
