"""What a tenant can leave behind in every memory of a device, and all the places to look for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from command_programs import PORT, VALUE, Assembler

from pagoda.isa import rv32
from pagoda.isa.commands import ACC_BIT, COMMANDS, Command
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.memory_map import DMEM
from pagoda.isa.numbers import DType
from pagoda.isa.program import Program, Slot
from pagoda.runtime import Device, DeviceFault

IADD = next(code for code, function in VECTOR_FUNCTIONS.items() if function.name == "iadd")
MARK = 0x5A
MARK_WORD = 0x5A5A5A5A
_INT = dict(mem=DType.I32, local=DType.I32, slot=0, rows=1, planes=1, mem_row_stride=0)
_INT |= dict(mem_plane_stride=0, row_stride=0, plane_stride=0)
# A small valid command of each kind, in which no field is without effect.
SMALL: dict[str, dict[str, int]] = {
    "load": _INT | dict(offset=0, address=0, cols=4, rows=2, planes=2, mem_row_stride=16,
                        mem_plane_stride=32, row_stride=16, plane_stride=32),
    "store": _INT | dict(offset=0, address=0, cols=4, rows=2, planes=2, mem_row_stride=16,
                         mem_plane_stride=32, row_stride=16, plane_stride=32),
    "gather": dict(mem=DType.I32, local=DType.I32, slot=0, offset=0, address=64, cols=4, rows=2,
                   indices=0, mem_row_stride=16, row_stride=16),
    "scatter": dict(mem=DType.I32, local=DType.I32, slot=0, offset=0, address=64, cols=4, rows=2,
                    indices=0, mem_row_stride=16, row_stride=16),
    "matmul": dict(type=0, a=0, m0=2, m0_stride=8, m1=2, m1_stride=16, m2=2, m2_stride=32,
                   k_inner=2, k_outer=2, k_outer_stride=4, b=64, b_stride=8, n=4, acc=0,
                   acc_stride=16),
    "vector": dict(f1=IADD, f2=IADD, a_dtype=2, b_dtype=2, c_dtype=2, dst_dtype=2, a=0,
                   a_stride=16, b=0, b_stride=16, c=0, c_stride=16, dst=1024, dst_stride=16,
                   rows=2, cols=4),
    "reduce": dict(op=0, first=1, column=0, dtype=0, src=0, src_stride=16, rows=2, cols=4,
                   state=1024, state_stride=256, start=0),
    "finish": dict(op=0, dtype=0, state=1024, state_stride=256, rows=2, dst=0, dst_stride=4),
    "transpose": dict(dtype=0, src=0, src_stride=16, rows=2, cols=4, dst=1024, dst_stride=8),
    "iota": dict(dst=0, dst_stride=16, rows=2, cols=4, start=0, row_step=0, col_step=0),
}  # fmt: skip


def leave_marks(device: Device) -> None:
    """Fill SRAM, ACC, DMEM, IMEM, registers and command fields, and most of DRAM."""
    chip = device.chip
    nbytes = chip.dram_bytes - (16 << 20)  # the device's allocator keeps some for itself
    address = device.memory.allocate(nbytes)
    device.array(address, (nbytes,), np.uint8)[:] = MARK
    assembler = Assembler()
    for place, size in ((0, chip.sram_bytes), (ACC_BIT, chip.acc_bytes)):
        assembler.command("load", **_INT | dict(address=place, cols=size // 4, offset=0))
    assembler.control("fence")
    for command in COMMANDS.values():
        for word in command.words[1:]:
            assembler.store(command.bank, word, MARK_WORD)
    for register in range(1, 32):
        if register != PORT:
            assembler.load_immediate(register, MARK_WORD)
    assembler.control("exit")
    room = chip.imem_bytes // 4 - len(assembler.code)
    assembler.code += [MARK_WORD] * room
    words = [MARK_WORD] * (chip.dmem_bytes // 4)
    device.launch(assembler.program("marks"), words, [Slot(address, nbytes)])


def look(device: Device) -> Iterator[tuple[str, bytes]]:
    """What a new context can read without having written it."""
    chip = device.chip
    nbytes = chip.dram_bytes - (16 << 20)
    address = device.memory.allocate(nbytes)
    yield "DRAM", bytes([bool(device.array(address, (nbytes // 8,), np.int64).any())])
    for name, place, size in (("SRAM", 0, chip.sram_bytes), ("ACC", ACC_BIT, chip.acc_bytes)):
        assembler = Assembler()
        assembler.command("store", **_INT | dict(address=place, cols=size // 4, offset=0))
        yield name, _dump(device, assembler, address, size)
    yield "registers", _dump(device, _registers(), address, 4 * 32)
    yield "DMEM", _dump(device, _dmem(chip.dmem_bytes), address, chip.dmem_bytes)
    beyond = Program("beyond", rv32.encode("jal", rd=0, offset=1024).to_bytes(4, "little"))
    yield "IMEM", _dump(device, beyond, address, 0)


def look_at_field(device: Device, command: Command, word: int) -> bytes:
    """What a command does if one word of its fields was never set, and what it leaves in SRAM."""
    assembler = Assembler()
    if command.name != "iota":  # some numbers to work on
        assembler.command("iota", **SMALL["iota"] | dict(rows=1, cols=1024, start=1))
    values = [0] * 16
    for name, value in SMALL[command.name].items():
        field = command.by_name[name]
        values[field.word] |= field.insert(int(value))
    for each in (*command.words[1:], 0):
        if each != word:
            assembler.store(command.bank, each, values[each])
    if command.name != "store":
        assembler.command("store", **_INT | dict(address=0, cols=64, offset=0))
    address = device.memory.allocate(4096)
    return _dump(device, assembler, address, 256)


def _dump(device: Device, program: Assembler | Program, address: int, nbytes: int) -> bytes:
    """The bytes that a program leaves at an address of DRAM, or how it fails; and its cycles."""
    if isinstance(program, Assembler):
        program.control("exit")
        program = program.program("look")
    slot = Slot(address, max(nbytes, 4096))
    try:
        result = device.launch(program, (), [slot])
    except DeviceFault as fault:
        return str(fault).encode()
    dumped = device.array(address, (nbytes,), np.uint8).tobytes()
    device.array(address, (slot.size,), np.uint8)[:] = 0
    return dumped + result.cycles.to_bytes(8, "little")


def _registers() -> Assembler:
    """Writes the registers that it does not need itself to SRAM, then to the slot."""
    assembler = Assembler()
    iota = COMMANDS["iota"]
    fixed = dict(dst_stride=4, rows=1, cols=1, row_step=0, col_step=0)
    assembler.set_fields("iota", **fixed)
    for register in range(1, 32):
        if register in (2, PORT, VALUE):  # the stack pointer is what the contract says
            continue
        start = 64 * iota.bank + 4 * iota.by_name["start"].word
        assembler.code.append(rv32.encode("sw", rs2=register, rs1=PORT, imm=start))
        assembler.store(iota.bank, iota.by_name["dst"].word, 4 * register)
        assembler.store(iota.bank, 0, 0)
    assembler.command("store", **_INT | dict(address=0, cols=32, offset=0))
    return assembler


def _dmem(nbytes: int) -> Assembler:
    """Writes DMEM word by word to SRAM, then to the slot."""
    assembler = Assembler()
    assembler.set_fields("iota", dst_stride=4, rows=1, cols=1, row_step=0, col_step=0)
    iota = COMMANDS["iota"]
    start, dst = (64 * iota.bank + 4 * iota.by_name[name].word for name in ("start", "dst"))
    assembler.load_immediate(10, DMEM.base)
    assembler.load_immediate(11, DMEM.base + nbytes)
    assembler.code += [
        rv32.encode("lw", rd=12, rs1=10, imm=0),
        rv32.encode("sw", rs2=12, rs1=PORT, imm=start),
        rv32.encode("sw", rs2=13, rs1=PORT, imm=dst),
        rv32.encode("sw", rs2=0, rs1=PORT, imm=64 * iota.bank),
        rv32.encode("addi", rd=10, rs1=10, imm=4),
        rv32.encode("addi", rd=13, rs1=13, imm=4),
        rv32.encode("bltu", rs1=10, rs2=11, offset=-24),
    ]
    assembler.command("store", **_INT | dict(address=0, cols=nbytes // 4, offset=0))
    return assembler

