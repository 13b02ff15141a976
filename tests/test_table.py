"""What an instruction table accepts, and the errors by which it refuses a wrong row."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.isa.table import FieldKind, InstructionTable, Piece

KINDS = {
    "rd": FieldKind.REGISTER,
    "rs1": FieldKind.REGISTER,
    "imm": FieldKind.SIGNED,
    "offset": FieldKind.PC_OFFSET,
}

ADDI = ("imm[11:0] rs1 000 rd 0010011", "addi rd, rs1, imm", "alu")


def table() -> InstructionTable:
    """A table with the row `addi`."""
    scratch = InstructionTable("Scratch", KINDS)

    @scratch.row(*ADDI)
    def addi(state, rd, rs1, imm):
        """Add."""

    return scratch


def test_a_row_holds_what_its_layout_says():
    row = table().rows["addi"]
    assert row.pattern == "-" * 17 + "000" + "-" * 5 + "0010011"
    assert (row.mask, row.match) == (0x0000707F, 0x00000013)
    assert [field.name for field in row.fields] == ["rd", "rs1", "imm"]
    assert row.fields[2].pieces == (Piece(value_bit=0, word_bit=20, width=12),)
    assert row.fields[2].values == range(-2048, 2048)
    assert (row.summary, row.cycle_class) == ("Add.", "alu")


def test_split_fields_are_put_together():
    scratch = table()

    @scratch.row("offset[20|10:1|11|19:12] rd 1101111", "jal rd, offset", "jal")
    def jal(state, rd, offset):
        """Jump."""

    offset = scratch.rows["jal"].fields[1]
    assert offset.pieces == (Piece(20, 31, 1), Piece(1, 21, 10), Piece(11, 20, 1), Piece(12, 12, 8))
    assert offset.values == range(-(2**20), 2**20, 2)
    for bit, word_bit in ((1, 21), (10, 30), (11, 20), (12, 12), (19, 19)):
        word = scratch.encode("jal", rd=0, offset=1 << bit)
        assert word == 0b1101111 | 1 << word_bit
        assert scratch.decode(word) == (scratch.rows["jal"], {"rd": 0, "offset": 1 << bit})
    assert scratch.encode("jal", rd=0, offset=-(2**20)) == 0x8000006F


def test_numpy_integers_are_numbers_and_floats_are_not():
    scratch = table()
    word = scratch.encode("addi", rd=np.uint8(1), rs1=np.int64(2), imm=np.int32(-3))
    assert word == scratch.encode("addi", rd=1, rs1=2, imm=-3)
    assert type(word) is int
    with pytest.raises(ValueError, match="imm = 1.0 is not possible"):
        scratch.encode("addi", rd=1, rs1=2, imm=1.0)


def test_ignored_bits_match_anything_and_are_encoded_as_zero():
    scratch = table()

    @scratch.row("------- 00000 ----- 000 00000 0001111", "hint", "alu")
    def hint(state):
        """Nothing."""

    assert scratch.encode("hint") == 0x0000000F
    assert scratch.disassemble(0xFE0F800F) == "hint"
    assert scratch.find(0x0010000F) is None


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("imm[11:0] rs1 000 rd 010011", "addi: the layout accounts for 31 bits, not 32"),
        ("0 imm[11:0] rs1 000 rd 0010011", "addi: the layout accounts for 33 bits, not 32"),
        ("imm[11:0] rs1 00x rd 0010011", "addi: '00x' in the layout is neither bits nor a field"),
        (
            "imm[0:11] rs1 000 rd 0010011",
            "addi: imm[0:11]: 0:11 runs upwards; write the high bit first",
        ),
        ("imm[11:1|1] rs1 000 rd 0010011", "addi: imm has bits [1] more than once"),
        ("imm[12:7|5:0] rs1 00 rd 0010011 0", "addi: imm lacks bits [6]"),
        ("imm[12:1] rs1 000 rd 0010011", "addi: imm lacks bits [0]"),
        ("imm[11:0] rs1 000 0010011 rd", "addi: bits 6..0 are the opcode and must be fixed"),
        (
            "uimm[11:0] rs1 000 rd 0010011",
            "addi: field uimm has no kind; the table knows ['rd', 'rs1', 'imm', 'offset']",
        ),
        (
            "000000000000 rs1 000 rd 0010011",
            "addi: the layout has fields ['rs1', 'rd'], `addi rd, rs1, imm` ['rd', 'rs1', 'imm']",
        ),
    ],
)
def test_layouts_refused(layout, message):
    scratch = InstructionTable("Scratch", KINDS)

    def addi(state, rd, rs1, imm):
        """Add."""

    with pytest.raises(ValueError) as error:
        scratch.row(layout, "addi rd, rs1, imm", "alu")(addi)
    assert str(error.value) == message
    assert scratch.rows == {}


def test_a_meaning_must_fit_its_row():
    scratch = InstructionTable("Scratch", KINDS)

    def subi(state, rd, rs1, imm):
        """Subtract."""

    def addi(state, rd, rs1):
        """Add."""

    with pytest.raises(ValueError) as error:
        scratch.row(*ADDI)(subi)
    assert str(error.value) == "addi: its meaning is the function subi; rename one"
    with pytest.raises(ValueError) as error:
        scratch.row(*ADDI)(addi)
    assert str(error.value) == (
        "addi: the layout has fields ['imm', 'rs1', 'rd'], its meaning ['rd', 'rs1']"
    )


def test_overlaps_refused():
    scratch = table()

    def zero(state, rs1, rd):
        """A special case of addi."""

    with pytest.raises(ValueError) as error:
        scratch.row("000000000001 rs1 000 rd 0010011", "zero rd, rs1", "alu")(zero)
    assert str(error.value) == "zero: overlaps addi: 0x00100013 would mean both"

    def wide(state, rs1, rd):
        """More general than addi."""

    with pytest.raises(ValueError) as error:
        scratch.row("------------ rs1 --- rd 0010011", "wide rd, rs1", "alu")(wide)
    assert str(error.value) == "wide: overlaps addi: 0x00000013 would mean both"
    assert list(scratch.rows) == ["addi"]


def test_names_are_unique():
    scratch = table()

    def addi(state, rd, rs1, imm):
        """Add again, elsewhere."""

    with pytest.raises(ValueError) as error:
        scratch.row("imm[11:0] rs1 001 rd 0010011", "addi rd, rs1, imm", "alu")(addi)
    assert str(error.value) == "addi: Scratch already has a row of this name"
