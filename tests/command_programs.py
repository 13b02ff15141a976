"""Random command programs: what the executions of the contract are compared on.

`programs(chip)` is a hypothesis strategy of `CommandProgram`: field writes and issues of every
command, with small extents, buffers that overlap (so that hazards and bank ports matter), fields
that keep old values, and now and then a value just outside what is allowed. The program itself is
made of `lui`, `addi`, `sw` and a few `lw`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from random import Random

from hypothesis import strategies as st

from pagoda.isa import rv32
from pagoda.isa.chip import Chip
from pagoda.isa.commands import ACC_BIT, COMMANDS, CONTROL, disassemble, encode
from pagoda.isa.functions import FADDQ, FMA, FMUL, I2FMUL, SELECT, VECTOR_FUNCTIONS
from pagoda.isa.memory_map import COMMAND_PORT, CORE_ID, SRAM
from pagoda.isa.numbers import DType
from pagoda.isa.program import Launch, Program, Slot

PORT, VALUE, ADDRESS, CORE_OFFSET = 5, 6, 7, 8  # registers the programs use
FIRST_GO = 10  # go values of a burst, in this register and the next ones
CORE_STEP = 1 << 16  # a core's share of every slot: core k works at offset k * CORE_STEP
REGION = 2048  # local buffers start in multiples of this
LOCAL_DTYPES = (DType.F32, DType.BF16, DType.I32, DType.I8)
MEMORY_DTYPES = {
    True: (DType.F32, DType.BF16, DType.F8E4M3),
    False: (DType.I32, DType.I8, DType.I4, DType.I64, DType.BOOL, DType.U8),
}


@dataclass
class Assembler:
    """Builds a program from commands; a field that already has its value is not written."""

    code: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    _registers: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.load_immediate(PORT, COMMAND_PORT.base)

    def load_immediate(self, register: int, value: int) -> None:
        low = (value & 0xFFF ^ 0x800) - 0x800
        upper = (value - low) >> 12 & 0xFFFFF
        self.code.append(rv32.encode("lui", rd=register, uimm=upper))
        self.code.append(rv32.encode("addi", rd=register, rs1=register, imm=low))

    def store(self, bank: int, word: int, value: int) -> None:
        """Store a word to the command port."""
        self.load_immediate(VALUE, value)
        self.code.append(rv32.encode("sw", rs2=VALUE, rs1=PORT, imm=64 * bank + 4 * word))

    def prepare_core_offset(self) -> None:
        """Put core_id * CORE_STEP into a register; `command` then adds it to offsets."""
        self.load_immediate(ADDRESS, CORE_ID)
        self.code.append(rv32.encode("lw", rd=CORE_OFFSET, rs1=ADDRESS, imm=0))
        shift = CORE_STEP.bit_length() - 1
        self.code.append(rv32.encode("slli", rd=CORE_OFFSET, rs1=CORE_OFFSET, shamt=shift))

    def set_fields(self, name: str, per_core: bool = False, **fields: int) -> int:
        """Write a command's fields; returns the value that issues it."""
        command, go = COMMANDS[name], 0
        for word, value in encode(name, **fields):
            if word == 0:
                go = value
            elif per_core and word == command.by_name.get("offset", command.fields[0]).word:
                self.load_immediate(VALUE, value)
                self.code.append(rv32.encode("add", rd=VALUE, rs1=VALUE, rs2=CORE_OFFSET))
                imm = 64 * command.bank + 4 * word
                self.code.append(rv32.encode("sw", rs2=VALUE, rs1=PORT, imm=imm))
            elif self._registers.get((command.bank, word)) != value:
                self._registers[command.bank, word] = value
                self.store(command.bank, word, value)
        self.text.append(disassemble(name, fields))
        return go

    def command(self, name: str, per_core: bool = False, **fields: int) -> None:
        """Write a command's fields and issue it."""
        self.store(COMMANDS[name].bank, 0, self.set_fields(name, per_core, **fields))

    def burst(self, prepared: list[tuple[str, int]], times: int) -> None:
        """Issue commands with the given go values one right after another, `times` times."""
        for number, (_, go) in enumerate(prepared):
            self.load_immediate(FIRST_GO + number, go)
        for _ in range(times):
            for number, (name, _) in enumerate(prepared):
                imm = 64 * COMMANDS[name].bank
                self.code.append(rv32.encode("sw", rs2=FIRST_GO + number, rs1=PORT, imm=imm))
        self.text.append(f"issue {', '.join(f'{n} {go:#x}' for n, go in prepared)} x {times}")

    def control(self, name: str, value: int = 0) -> None:
        """fence, barrier, exit or trap."""
        self.store(0, CONTROL[name], value)
        self.text.append(f"{name} {value}" if name == "trap" else name)

    def load_word(self, address: int) -> None:
        """Read a word of SRAM, which waits for its writers."""
        self.load_immediate(ADDRESS, SRAM.base + address)
        self.code.append(rv32.encode("lw", rd=ADDRESS, rs1=ADDRESS, imm=0))
        self.text.append(f"lw SRAM {address:#x}")

    def program(self, name: str = "commands") -> Program:
        return Program(name, b"".join(word.to_bytes(4, "little") for word in self.code))


@dataclass(frozen=True)
class CommandProgram:
    """A launch, what DRAM holds from address 0 on before it, and the commands as text."""

    launch: Launch
    dram: bytes
    text: tuple[str, ...]

    def __repr__(self) -> str:
        slots = [(s.base, s.size, s.readable, s.writable) for s in self.launch.slots]
        lines = "\n  ".join(self.text)
        return f"CommandProgram(watchdog={self.launch.watchdog}, slots={slots},\n  {lines})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))


@cache
def dram_image(nbytes: int, seed: int) -> bytes:
    """DRAM contents: stretches of small floats, small integers and arbitrary bits."""
    random = Random(seed)
    image = bytearray()
    while len(image) < nbytes:
        match random.randrange(4):
            case 0:  # bf16 values around 1, which are ordinary floats in pairs, too
                for _ in range(32):
                    pattern = random.choice((0x3F80, 0xBF80, 0x4000, 0x3E80, 0xC040))
                    image += (pattern + random.randrange(64)).to_bytes(2, "little")
            case 1:
                for _ in range(16):
                    image += random.randrange(-9, 10).to_bytes(4, "little", signed=True)
            case 2:
                for _ in range(8):
                    image += random.randrange(-9, 10).to_bytes(8, "little", signed=True)
            case _:
                image += random.randbytes(64)
    return bytes(image[:nbytes])


class _Chooser:
    """Draws the fields of one command."""

    def __init__(self, draw: st.DrawFn, chip: Chip):
        self.draw, self.chip = draw, chip

    def pick(self, *options: int) -> int:
        return self.draw(st.sampled_from(options))

    def flag(self) -> int:
        return self.pick(0, 1)

    def rarely(self) -> bool:
        return self.draw(st.integers(0, 39)) == 17

    def rows(self) -> int:
        return self.pick(1, 2, 3, 5, 1, 2, 3, 4, 7, 0)

    def cols(self) -> int:
        return self.pick(1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 1, 2, 4, 8, 66, 0)

    def stride(self, row_bytes: int, element: int) -> int:
        return row_bytes + element * self.pick(0, 0, 1, 3, 8)

    def local(self, dtype: DType, regions: tuple[int, ...]) -> int:
        """A local address in one of these regions; ACC only for 32-bit elements."""
        element = dtype.bits // 8
        address = REGION * self.pick(*regions) + element * self.pick(0, 0, 1, 5, 16)
        if self.rarely():
            address = self.chip.sram_bytes - element * self.pick(1, 4, 64)
        if dtype.bits == 32 and self.flag():
            return address % (2 * self.chip.acc_bytes) | ACC_BIT
        return address

    def fields(self, name: str) -> dict[str, int]:
        """Fields of a command; now and then one is off by little or much."""
        shapes = {
            "load": self.three_dimensional, "store": self.three_dimensional,
            "gather": self.indexed, "scatter": self.indexed,
        }  # fmt: skip
        fields = shapes.get(name, getattr(self, name, None))(name)
        if self.rarely():
            wrong = self.draw(st.sampled_from(sorted(fields)))
            fields[wrong] += self.pick(1, -1, 2, 3, 64, 4096, 1 << 20)
        for field_name, value in fields.items():
            place = COMMANDS[name].by_name[field_name]
            if not place.accepts(value):
                fields[field_name] = value & (1 << place.width) - 1
        return fields

    def transfer(self, name: str) -> dict[str, int]:
        local = self.pick(*LOCAL_DTYPES)
        mem = self.draw(st.sampled_from(MEMORY_DTYPES[DType(local).is_float]))
        f = {"mem": int(mem), "local": int(local), "rows": self.rows()}
        f["cols"] = self.cols() * (2 if mem is DType.I4 else 1)
        row_bytes = f["cols"] * DType(local).bits // 8
        f["address"] = self.local(DType(local), (0, 1, 2, 3, 4, 5))
        f["row_stride"] = self.stride(row_bytes, DType(local).bits // 8)
        writable = name in ("store", "scatter")
        f["slot"] = self.pick(*((0, 1, 3) if writable else (0, 1, 2)), 0, 1)
        if self.rarely():
            f["slot"] = self.pick(2, 3, 4, 63)
        element = max(mem.bits // 8, 1)
        f["offset"] = element * self.pick(0, 1, 8, 32, 100)
        mem_row_bytes = f["cols"] * mem.bits // 8
        f["mem_row_stride"] = self.stride(mem_row_bytes, element)
        if writable and mem in (DType.F32, DType.BF16, DType.I32):
            f["accumulate"] = self.pick(0, 0, 1)
            if f["accumulate"] and f["slot"] == 3:
                f["slot"] = 0
        return f

    def three_dimensional(self, name: str) -> dict[str, int]:
        f = self.transfer(name)
        local, mem = DType(f["local"]), DType(f["mem"])
        element = max(mem.bits // 8, 1)
        f["planes"] = self.pick(1, 1, 1, 2, 3)
        f["plane_stride"] = self.stride(f["row_stride"] * f["rows"], local.bits // 8)
        f["mem_plane_stride"] = self.stride(f["mem_row_stride"] * f["rows"], element)
        if f["rows"] > 1 and self.pick(0, 0, 1):  # bottom row first
            f["offset"] += f["mem_row_stride"] * (f["rows"] - 1)
            f["mem_row_stride"] = -f["mem_row_stride"]
        if name == "load" and self.pick(0, 0, 1):
            step = 2 if mem is DType.I4 else 1
            f["pad_left"] = step * self.pick(0, 1, 2)
            f["pad_right"] = step * self.pick(0, 1)
            f["pad_above"], f["pad_below"] = self.pick(0, 1), self.pick(0, 1)
            f["cols"] += f["pad_left"] + f["pad_right"]
            f["row_stride"] = self.stride(f["cols"] * local.bits // 8, local.bits // 8)
            f["plane_stride"] = self.stride(f["row_stride"] * f["rows"], local.bits // 8)
            if f["pad_above"] + f["pad_below"] > f["rows"] and not self.rarely():
                f["pad_above"] = f["pad_below"] = 0
        elif name == "load":
            f |= {"pad_left": 0, "pad_above": 0}
        return f

    def indexed(self, name: str) -> dict[str, int]:
        f = self.transfer(name)
        f["indices"] = REGION * 7 + 4 * self.pick(0, 0, 1)
        return f

    def matmul(self, name: str) -> dict[str, int]:
        types = [{"bf16": 0, "int8": 1}[t] for t in sorted(self.chip.matrix_types)]
        f = {"type": self.pick(*types), "accumulate": self.flag()}
        element = 1 if f["type"] else 2
        f["transpose_a"], f["transpose_b"] = self.pick(0, 0, 1), self.flag()
        f["m0"], f["n"] = self.pick(1, 2, 3, 5, 8, 9), self.pick(1, 2, 4, 5, 9, 17)
        f["k_inner"] = self.pick(1, 2, 4, 5, 8, 13, 0)
        f["m1"] = f["m2"] = f["k_outer"] = 1
        f["m0_stride"] = element * (self.pick(0, 2, 20) + f["k_inner"])
        if f["transpose_a"]:
            f["m0_stride"] = element * (f["m0"] + self.pick(0, 3))
        else:
            f["m1"], f["m2"] = self.pick(1, 1, 2), self.pick(1, 1, 3, 0)
            f["k_outer"] = self.pick(1, 1, 2, 3)
        f["m1_stride"], f["m2_stride"] = element * self.pick(0, 1, 40), element * 96
        f["k_outer_stride"] = element * self.pick(f["k_inner"], 0, 7)
        k = f["k_inner"] * f["k_outer"]
        f["a"] = REGION * self.pick(0, 1, 2, 3, 4, 5) + element * self.pick(0, 1, 16)
        f["b"] = REGION * self.pick(0, 1, 2, 3, 4, 5) + element * self.pick(0, 1, 16)
        f["b_stride"] = self.stride(element * (k if f["transpose_b"] else f["n"]), element)
        f["acc"] = REGION * self.pick(0, 1, 2) + self.pick(0, 4, 64)
        f["acc_stride"] = self.stride(4 * f["n"], 4)
        return f

    def vector(self, name: str) -> dict[str, int]:
        codes = sorted(set(VECTOR_FUNCTIONS) - {FMA, SELECT})
        first, second = (sorted(set(codes) - {never}) for never in (FADDQ, I2FMUL))
        f = {"f1": self.draw(st.sampled_from(first)), "f2": self.pick(0, *second)}
        special = self.pick(None, None, None, (FMUL, FMA), (SELECT, SELECT), (I2FMUL, FADDQ))
        if special:
            f["f1"], f["f2"] = special
        if self.rarely():
            f["f2"] = self.pick(15, 31, 50, FMA, SELECT, I2FMUL, 255)
        if self.rarely():
            f["f1"] = self.pick(FMA, FADDQ)
        f["rows"], f["cols"] = self.rows(), self.cols()
        for operand in "abc":
            dtype = DType(self.pick(*LOCAL_DTYPES))
            kind = self.pick(0, 0, 0, 1, 2)
            f |= {f"{operand}_dtype": int(dtype), f"{operand}_kind": kind}
            f[operand] = self.local(dtype, (0, 1, 2))
            element = dtype.bits // 8
            row_bytes = element * (f["cols"] if kind == 0 else 1)
            f[f"{operand}_stride"] = self.stride(row_bytes, element)
            if kind == 0 and self.pick(0, 0, 0, 1):
                f[f"{operand}_stride"] = 0
            if kind == 2:
                f[operand] = self.pick(0, 0x3F800000, 0xBFC00000, 3, 0x7FC00001, 0xFFFFFFFF)
        dtype = DType(self.pick(*LOCAL_DTYPES))
        f |= {"dst_dtype": int(dtype), "dst": self.local(dtype, (3, 4, 5))}
        f["dst_stride"] = self.stride(f["cols"] * dtype.bits // 8, dtype.bits // 8)
        if f["a_kind"] == 0 and f["a_stride"] and self.pick(0, 0, 1):  # in place
            f |= {"dst_dtype": f["a_dtype"], "dst": f["a"], "dst_stride": f["a_stride"]}
        return f

    def reduce(self, name: str) -> dict[str, int]:
        op = self.draw(st.integers(0, 5))
        column = self.pick(0, 0, 1) if op < 5 or self.rarely() else 0
        f = {"op": op, "first": self.flag(), "column": column}
        options = (DType.I32, DType.I8) if op in (3, 4) else (DType.F32, DType.BF16)
        dtype = DType(self.pick(*options))
        f |= {"dtype": int(dtype), "rows": self.rows(), "cols": self.cols()}
        f["src"] = self.local(dtype, (0, 1, 2))
        f["src_stride"] = self.stride(f["cols"] * dtype.bits // 8, dtype.bits // 8)
        f["state"] = self.local(DType.F32, (3, 4))
        f["state_stride"] = self.stride(512 if op == 5 else 256, 4)
        f["start"] = self.pick(0, 64, 640, 0, 64, 128)
        if self.rarely():
            f["start"] = self.pick(1, 32, 1 << 30, (1 << 30) + 64)
        return f

    def finish(self, name: str) -> dict[str, int]:
        op = self.draw(st.integers(0, 5))
        options = (DType.F32, DType.BF16) if op < 3 else (DType.I32, DType.I8)
        dtype = DType.I32 if op == 5 else DType(self.pick(*options))
        f = {"op": op, "dtype": int(dtype), "rows": self.rows()}
        f["state"], f["state_stride"] = self.local(DType.F32, (3, 4)), self.stride(512, 4)
        f["dst"] = self.local(dtype, (0, 1, 2))
        f["dst_stride"] = self.stride(dtype.bits // 8, dtype.bits // 8)
        return f

    def transpose(self, name: str) -> dict[str, int]:
        dtype = DType(self.pick(*LOCAL_DTYPES))
        element = dtype.bits // 8
        f = {"dtype": int(dtype), "rows": self.rows(), "cols": self.cols()}
        f["src"], f["dst"] = self.local(dtype, (0, 1, 2)), self.local(dtype, (3, 4, 5))
        f["src_stride"] = self.stride(f["cols"] * element, element)
        f["dst_stride"] = self.stride(f["rows"] * element, element)
        return f

    def iota(self, name: str) -> dict[str, int]:
        f = {"dst": self.local(DType.I32, (0, 3, 5)), "rows": self.rows(), "cols": self.cols()}
        f["dst_stride"] = self.stride(4 * f["cols"], 4)
        f |= {"start": self.pick(0, -7, 1 << 30), "row_step": self.pick(1, -3, 1 << 30)}
        return f | {"col_step": self.pick(0, 1, -1)}


@st.composite
def programs(draw: st.DrawFn, chip: Chip, most_bursts: int = 4) -> CommandProgram:
    """Command programs for a chip; with several cores each works on its share of the slots.

    Commands come in bursts: the fields of a few are set, then they are issued one right after
    another, perhaps several times, so that the window fills and commands overtake one another.
    """
    assembler, chooser = Assembler(), _Chooser(draw, chip)
    if chip.cores > 1:
        assembler.prepare_core_offset()
    names = st.sampled_from(["load", "matmul", "store", "vector", *COMMANDS])
    burst = st.lists(names, min_size=1, max_size=5, unique=True)
    for members in draw(st.lists(burst, min_size=1, max_size=most_bursts)):
        if {"gather", "scatter"} & set(members) and not chooser.rarely():
            _make_indices(assembler, chooser)
        prepared = []
        for name in members:
            fields = chooser.fields(name)
            go = assembler.set_fields(name, chip.cores > 1, **fields)
            flipped = 1 << draw(st.integers(0, 31)) if chooser.rarely() else 0
            prepared.append((name, go ^ flipped))
        assembler.burst(prepared, chooser.pick(1, 1, 2, 3))
        _between_bursts(assembler, chooser)
    assembler.control("exit")
    per_core = CORE_STEP * (chip.cores - 1)
    slots = (
        Slot(0, 16384 + per_core),
        Slot(4096, 16384 + per_core),
        Slot(24576, 4096 + per_core, writable=False),
        Slot(28672, 4096 + per_core, readable=False),
    )
    watchdog = 1 << 40
    if chooser.rarely():
        watchdog = chip.launch_cycles + draw(st.integers(1, 4000))
    image = dram_image(32768, draw(st.integers(0, 7)))
    image = b"".join([image.ljust(CORE_STEP, b"\0")] * (chip.cores - 1) + [image])
    launch = Launch(assembler.program(), slots=slots, watchdog=watchdog)
    return CommandProgram(launch, image, tuple(assembler.text))


def _make_indices(assembler: Assembler, chooser: _Chooser) -> None:
    """Fill the index tile of gather and scatter, by a command that is still in flight then."""
    start, step = chooser.pick(0, 0, 1, 5, 9), chooser.pick(1, 0, 2, -1, 1)
    assembler.command(
        "iota", dst=REGION * 7, dst_stride=4, rows=10, cols=1, start=9 if step < 0 else start,
        row_step=step, col_step=0,
    )  # fmt: skip


def _between_bursts(assembler: Assembler, chooser: _Chooser) -> None:
    match chooser.draw(st.integers(0, 19)):
        case 1:
            assembler.control("fence")
        case 2:
            assembler.control("barrier")
        case 3 | 4:
            region, word = chooser.pick(0, 3, 4, 7), chooser.pick(0, 1, 9)
            assembler.load_word(REGION * region + 4 * word)
        case 5 if chooser.rarely():
            assembler.control("trap", 42)
