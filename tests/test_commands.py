"""The command table: encoding, printing, checks in their order, ranges, ports, atoms."""

import re

import pytest
from command_programs import programs
from hypothesis import given
from hypothesis import strategies as st

from pagoda.isa import COMMANDS, PRESETS, Slot
from pagoda.isa.access import ACC, DRAM, SRAM, Range, access, merge
from pagoda.isa.checks import check, check_indices
from pagoda.isa.commands import ACC_BIT, BY_BANK, _command, decode, disassemble, encode
from pagoda.isa.fault import FaultKind, FaultRaised
from pagoda.isa.numbers import DType

TINY = PRESETS["tiny"]
SLOTS = (Slot(0, 4096), Slot(4096, 4096, writable=False), Slot(8192, 4096, readable=False))

LOAD = {"mem": 0, "local": 0, "slot": 0, "offset": 64, "address": 0, "cols": 8, "rows": 3}
LOAD |= {"planes": 2, "mem_row_stride": 100, "mem_plane_stride": 400}
LOAD |= {"row_stride": 32, "plane_stride": 96}
GATHER = {"slot": 0, "offset": 0, "address": 256, "cols": 4, "rows": 3, "indices": 0}
GATHER |= {"mem_row_stride": 16, "row_stride": 16}
MATMUL = {"a": 0, "m0": 4, "m0_stride": 16, "m1": 1, "m2": 1, "k_inner": 8, "k_outer": 1}
MATMUL |= {"b": 8192, "b_stride": 8, "n": 4, "acc": 0, "acc_stride": 16}
VECTOR = {"f1": 1, "a": 0, "a_stride": 32, "b": 1024, "b_stride": 32, "dst": 2048}
VECTOR |= {"dst_stride": 32, "rows": 4, "cols": 8}
REDUCE = {"src": 0, "src_stride": 64, "rows": 2, "cols": 16, "state": 1024, "state_stride": 256}
FINISH = {"state": 0, "state_stride": 256, "rows": 2, "dst": 2048, "dst_stride": 4}
TRANSPOSE = {"src": 0, "src_stride": 32, "rows": 2, "cols": 8, "dst": 1024, "dst_stride": 8}
IOTA = {"dst": 0, "dst_stride": 32, "rows": 2, "cols": 8}
BASE = {
    "load": LOAD, "store": LOAD, "gather": GATHER, "scatter": GATHER, "matmul": MATMUL,
    "vector": VECTOR, "reduce": REDUCE, "finish": FINISH, "transpose": TRANSPOSE, "iota": IOTA,
}  # fmt: skip


def registers(name, **fields):
    words = [0] * 16
    for word, value in encode(name, **fields):
        words[word] = value
    return words


def checked(name, chip=TINY, slots=SLOTS, **changes):
    return check(chip, COMMANDS[name], registers(name, **BASE[name] | changes), slots)


def refused(name, **changes):
    with pytest.raises(FaultRaised) as raised:
        checked(name, **changes)
    return raised.value


# Encoding. ----------------------------------------------------------------------------------------


@given(st.data())
def test_decoding_gives_what_was_encoded(data):
    command = COMMANDS[data.draw(st.sampled_from(sorted(COMMANDS)))]
    fields = {}
    for field in command.fields:
        low = -(1 << field.width - 1) if field.signed else 0
        high = (1 << field.width - 1) - 1 if field.signed else (1 << field.width) - 1
        fields[field.name] = data.draw(st.integers(low, high))
    assert decode(command.bank, registers(command.name, **fields)) == (command, fields)


def test_only_words_with_a_named_field_are_written_and_go_is_last():
    assert encode("iota", rows=2, start=-1) == [(3, 2), (5, 0xFFFFFFFF), (0, 0)]
    assert encode("vector", f1=1, f2=2, a_kind=2, b_dtype=3) == [(1, 0x20030), (0, 0x201)]


def test_encoding_refuses_what_the_bits_cannot_hold():
    with pytest.raises(ValueError, match=re.escape(
        "matmul: type = 4: the field has 2 bits and takes 0 to 3; choose a value in that range"
    )):  # fmt: skip
        encode("matmul", type=4)
    with pytest.raises(ValueError, match=r"^no command 'laod'; did you mean load\?$"):
        encode("laod")
    with pytest.raises(ValueError, match=r"^no iota field 'step'; did you mean row_step or col_st"):
        encode("iota", step=1)
    with pytest.raises(ValueError, match=r"^bank 11: no command; the banks are 1 to 10$"):
        decode(11, [0] * 16)


def test_printing():
    text = disassemble("reduce", {"op": 5, "first": 1, "dtype": 1, "src": 64, "rows": 2})
    assert text == "reduce op=argmax first=1 dtype=BF16 src=0x40 rows=2"
    text = disassemble("vector", {"f1": 3, "f2": 56, "a_kind": 2, "b_kind": 1, "c_kind": 0})
    assert text == "vector f1=fmul f2=fma a_kind=scalar b_kind=column c_kind=tile"


def test_a_table_that_gives_a_bit_twice_is_refused():
    with pytest.raises(ValueError, match="b lies outside the bank or overlaps a field"):
        _command("bad", 11, "load", "1 a[3:0] dtype x\n1 b[4:3] count y")
    with pytest.raises(ValueError, match="is no line of a command table"):
        _command("bad", 11, "load", "1 a colour x")


def test_banks_and_words():
    assert sorted(BY_BANK) == list(range(1, 11))
    assert COMMANDS["gather"].words == (0, 1, 2, 3, 4, 5, 6, 7, 9)
    assert COMMANDS["matmul"].reserved[0] == 0xFFFFFF8C
    assert COMMANDS["iota"].reserved[0] == 0xFFFFFFFF
    assert COMMANDS["store"].address(3) == 0x4000_008C


# Checks. ------------------------------------------------------------------------------------------

ACCUMULATE = {"accumulate": 1, "local": 0}
REFUSALS = [
    ("load", {"mem": 9}, "BAD_FIELD"),
    ("load", {"local": 4}, "BAD_FIELD"),
    ("load", {"mem": 2}, "BAD_FIELD"),
    ("store", {"mem": 4, **ACCUMULATE}, "BAD_FIELD"),
    ("matmul", {"type": 2}, "BAD_FIELD"),
    ("matmul", {"transpose_a": 1, "m1": 2}, "BAD_FIELD"),
    ("vector", {"f1": 15}, "BAD_FIELD"),
    ("vector", {"f2": 56}, "BAD_FIELD"),
    ("vector", {"f2": 57}, "BAD_FIELD"),
    ("vector", {"f2": 58}, "BAD_FIELD"),
    ("vector", {"f1": 59}, "BAD_FIELD"),
    ("vector", {"b_kind": 3}, "BAD_FIELD"),
    ("vector", {"dst_dtype": 4}, "BAD_FIELD"),
    ("reduce", {"op": 6}, "BAD_FIELD"),
    ("reduce", {"op": 5, "column": 1}, "BAD_FIELD"),
    ("reduce", {"op": 3}, "BAD_FIELD"),
    ("reduce", {"start": 32}, "BAD_FIELD"),
    ("finish", {"op": 5}, "BAD_FIELD"),
    ("transpose", {"dtype": 4}, "BAD_FIELD"),
    ("load", {"offset": 2}, "MISALIGNED"),
    ("load", {"mem_plane_stride": -2}, "MISALIGNED"),
    ("load", {"address": 2}, "MISALIGNED"),
    ("gather", {"indices": 2}, "MISALIGNED"),
    ("matmul", {"acc": 2}, "MISALIGNED"),
    ("vector", {"a_kind": 1, "a_stride": 2}, "MISALIGNED"),
    ("reduce", {"column": 1, "state_stride": 2}, "MISALIGNED"),
    ("load", {"rows": (1 << 20) + 1}, "BAD_FIELD"),
    ("load", {"planes": 1 << 11, "rows": 1 << 10}, "BAD_FIELD"),
    ("matmul", {"m0": 1 << 11, "m1": 1 << 10}, "BAD_FIELD"),
    ("load", {"pad_left": 5, "pad_right": 4}, "BAD_FIELD"),
    ("load", {"mem": 5, "local": 2, "cols": 7, "row_stride": 32}, "BAD_FIELD"),
    ("load", {"row_stride": 28}, "BAD_FIELD"),
    ("load", {"plane_stride": 92}, "BAD_FIELD"),
    ("store", {"mem_row_stride": -28, "offset": 512}, "BAD_FIELD"),
    ("transpose", {"dst_stride": 4}, "BAD_FIELD"),
    ("load", {"slot": 3}, "BAD_SLOT"),
    ("load", {"slot": 2}, "NO_PERMISSION"),
    ("store", {"slot": 1}, "NO_PERMISSION"),
    ("store", {"slot": 2, "accumulate": 1}, "NO_PERMISSION"),
    ("load", {"offset": 4096 - 632 + 4}, "OUT_OF_SLOT"),
    ("load", {"mem_plane_stride": -80}, "OUT_OF_SLOT"),
    ("load", {"address": 65536 - 192 + 4}, "LOCAL_OUT_OF_RANGE"),
    ("load", {"address": ACC_BIT | 16384 - 192 + 4}, "LOCAL_OUT_OF_RANGE"),
    ("matmul", {"a": ACC_BIT}, "BAD_FIELD"),
    ("gather", {"indices": ACC_BIT}, "BAD_FIELD"),
    ("load", {"local": 1, "address": ACC_BIT}, "BAD_FIELD"),
    ("gather", {"indices": 292}, "BAD_FIELD"),
    ("vector", {"dst": 4}, "BAD_FIELD"),
    ("vector", {"a_kind": 1, "dst": 0}, "BAD_FIELD"),
    ("transpose", {"dst": 0}, "BAD_FIELD"),
    ("finish", {"dst": 256}, "BAD_FIELD"),
]


@pytest.mark.parametrize(("name", "changes", "kind"), REFUSALS)
def test_each_rule_refuses(name, changes, kind):
    assert refused(name, **changes).kind is FaultKind[kind]


@pytest.mark.parametrize("name", BASE)
def test_the_base_commands_are_legal(name):
    assert checked(name) is not None


def test_limits_are_still_legal():
    assert checked("load", offset=4096 - 632)
    assert checked("load", address=65536 - 192)
    assert checked("load", address=ACC_BIT | 16384 - 192)
    assert checked("vector", dst=0)
    assert checked("vector", a_kind=2, a=3, a_stride=3)
    assert checked("vector", f1=0, b=1, b_dtype=9, b_kind=3)
    assert checked("vector", f1=3, f2=56, c=4096, c_stride=0)
    assert checked("reduce", start=1 << 30)
    assert checked("load", pad_left=4, pad_right=4).dram is None


def test_the_earlier_rule_wins():
    wrong = {"mem": 2, "offset": 2, "rows": (1 << 20) + 1, "slot": 9, "address": 65534}
    order = ["BAD_FIELD", "MISALIGNED", "MISALIGNED", "BAD_FIELD", "BAD_SLOT"]
    remedies = [{}, {"mem": 0}, {"offset": 0}, {"address": 1 << 24}, {"rows": 3}]
    for expected, remedy in zip(order, remedies, strict=True):
        wrong |= remedy
        assert refused("load", **wrong).kind is FaultKind[expected]
    assert refused("load", **wrong | {"slot": 0}).kind is FaultKind.LOCAL_OUT_OF_RANGE


def test_an_empty_command_is_checked_for_codes_only():
    assert checked("load", rows=0, slot=9, offset=2, cols=1 << 31) is None
    assert checked("matmul", n=0, a=1) is None
    assert checked("reduce", cols=0) is None
    assert checked("reduce", cols=0, first=1).tiles[0].name == "state"
    assert refused("load", rows=0, mem=9).kind is FaultKind.BAD_FIELD


def test_a_fault_says_slot_and_offset():
    fault = refused("load", offset=4092)
    assert (fault.slot, fault.offset) == (0, 4092)
    assert fault.detail == "load: bytes 4092 to 4723 of slot 0, which has 4096"


def test_indices():
    touched = checked("gather")
    known = check_indices(touched, (0, 255, 7), SLOTS)
    assert known.ranges(0)[0] == [known.indices.hull, Range(DRAM, 0, 4095)]
    assert known.ports(TINY)[0] == 0  # indices are read beside the ports
    assert known.dram.atoms() == 3
    for index in (256, -1):
        with pytest.raises(FaultRaised) as raised:
            check_indices(touched, (0, index), SLOTS)
        assert raised.value.kind is FaultKind.GATHER_INDEX
        assert f"index {index}:" in raised.value.detail


# Ranges, ports, atoms. ----------------------------------------------------------------------------


def test_hulls_and_ports_of_a_matmul():
    touched = checked("matmul", acc=4096)
    reads, writes = touched.ranges()
    assert reads == [Range(SRAM, 0, 63), Range(SRAM, 8192, 8255), Range(ACC, 4096, 4159)]
    assert writes == [Range(ACC, 4096, 4159)]
    assert touched.ports(TINY) == (0b10_00000011, 0b10_00000000)
    assert checked("matmul", k_inner=0).ranges()[0] == [Range(ACC, 0, 63)]


def test_hulls_of_dma():
    touched = checked("load")
    assert touched.ranges(1024) == ([Range(DRAM, 1088, 1719)], [Range(SRAM, 0, 191)])
    backwards = checked("load", offset=1000, mem_row_stride=-100)
    assert backwards.ranges(0)[0] == [Range(DRAM, 800, 1431)]
    reads, writes = checked("store", accumulate=1).ranges(0)
    assert reads == [Range(SRAM, 0, 191), Range(DRAM, 64, 695)]
    assert writes == [Range(DRAM, 64, 695)]


def test_a_broadcast_row_is_one_row():
    touched = access("vector", decode(6, registers("vector", **VECTOR | {"a_stride": 0}))[1])
    assert touched.tile("a").hull == Range(SRAM, 0, 31)


def test_atoms():
    assert checked("load", rows=1, planes=1, offset=60, cols=2).dram.atoms() == 2
    # 6 rows of 32 bytes, none adjacent: offsets 64, 164, 264, 464, 564, 664
    assert checked("load").dram.atoms() == 1 + 2 + 1 + 1 + 2 + 1
    assert checked("load", mem_row_stride=32, mem_plane_stride=96).dram.atoms() == 3
    assert checked("load", mem_row_stride=32, mem_plane_stride=128).dram.atoms() == 2 + 2
    assert checked("store", accumulate=1).dram.atoms() == 8
    assert checked("load", pad_above=1, pad_left=2).dram.atoms() == 1 + 1 + 1 + 2


def test_rows_merge_from_the_inside_out():
    assert merge(((2, 96), (3, 32)), 32) == ((), 192)
    assert merge(((2, 128), (3, 32)), 32) == (((2, 128),), 96)
    assert merge(((2, 96), (3, 36)), 32) == (((2, 96), (3, 36)), 32)
    assert merge(((2, 32), (1, 500)), 32) == ((), 64)


@given(programs(TINY))
def test_generated_programs_hold_printable_commands(program):
    assert program.text[-1] == "exit"
    assert len(program.launch.program.code) <= TINY.imem_bytes
    assert DType.F32.name in repr(program) or len(program.text) > 1
