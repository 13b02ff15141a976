"""RV32IM words to the form that the interpreter reads: one int64 per instruction.

Bits 0..7 operation, 8..15 rd (32 instead of x0: a register that nobody reads), 16..23 rs1,
24..31 rs2, 32..63 the immediate, signed. `auipc` becomes `lui`, since the address is known.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagoda.isa.rv32 import RV32
from pagoda.isa.table import FieldKind, Row

NOWHERE = 32  # the register that stands for x0 as a target

# Operations by frequency of use, roughly; LLVM makes a jump table of them.
(
    ILLEGAL,
    ADDI, ADD, LW, SW, LUI, BNE, BEQ, BLT, BLTU, BGE, BGEU, JAL, JALR,
    SLTI, SLTIU, XORI, ORI, ANDI, SLLI, SRLI, SRAI,
    SUB, SLL, SLT, SLTU, XOR, SRL, SRA, OR, AND,
    LB, LH, LBU, LHU, SB, SH,
    MUL, MULH, MULHSU, MULHU, DIV, DIVU, REM, REMU,
    FENCE, ECALL, EBREAK,
) = range(48)  # fmt: skip
_CODES = {
    name.lower(): code
    for name, code in list(globals().items())
    if name.isupper() and isinstance(code, int) and name not in ("NOWHERE", "ILLEGAL")
}
_AUIPC = "auipc"
assert set(RV32.rows) == {*_CODES, _AUIPC}


def predecode(code: bytes, imem_bytes: int) -> NDArray[np.int64]:
    """The instructions of an IMEM image, (imem_bytes / 4,); words beyond the image are 0."""
    words = np.frombuffer(code, "<u4").astype(np.int64)
    everything = np.full(imem_bytes // 4, ILLEGAL, np.int64)
    decoded = everything[: len(words)]
    # The word itself stands where the immediate would, for the fault's text.
    decoded |= words << 32
    for row in RV32.rows.values():
        found = np.nonzero(words & row.mask == row.match)[0]
        if len(found):
            decoded[found] = _decode_row(row, words[found], 4 * found)
    return everything


def _decode_row(row: Row, words: NDArray, addresses: NDArray) -> NDArray[np.int64]:
    registers = {"rd": np.full(len(words), NOWHERE), "rs1": 0 * words, "rs2": 0 * words}
    immediate = np.zeros(len(words), np.int64)
    for field in row.fields:
        value = np.zeros(len(words), np.int64)
        for piece in field.pieces:
            part = words >> piece.word_bit & (1 << piece.width) - 1
            value |= part << piece.value_bit
        value = np.where(value >= field.values.stop, value - 2 * field.values.stop, value)
        if field.kind is FieldKind.REGISTER:
            is_zero_target = (field.name == "rd") & (value == 0)
            registers[field.name] = np.where(is_zero_target, NOWHERE, value)
        elif field.kind is not FieldKind.ORDERING:
            immediate = value
    operation = _CODES.get(row.name, LUI)
    if operation == LUI:
        immediate = immediate << 12
        if row.name == _AUIPC:
            immediate = immediate + addresses
    immediate = (immediate & 0xFFFFFFFF) << 32  # the top bit becomes the sign
    fields = registers["rd"] << 8 | registers["rs1"] << 16 | registers["rs2"] << 24
    return operation | fields | immediate
