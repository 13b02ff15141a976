"""Hostile programs by the hundred thousand: what a tenant that wants to break out would launch.

Three families: words that are nothing in particular; valid instructions in registers that point to
the edges of everything; and commands whose operands end at the last byte of a memory or slot, or
just behind it, with now and then a field that holds something else altogether. Numbers come from
`random.Random`, which is many times faster here than drawing them with hypothesis.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from pagoda.isa import rv32
from pagoda.isa.chip import DRAM_ATOM_BYTES, SLOTS, Chip
from pagoda.isa.commands import ACC_BIT, BY_BANK, COMMANDS, CONTROL, SCALAR
from pagoda.isa.functions import FMA, FMUL, SELECT, VECTOR_FUNCTIONS
from pagoda.isa.memory_map import COMMAND_PORT, DMEM, SRAM
from pagoda.isa.program import Launch, Program, Slot

WORD = 0xFFFFFFFF
EDGES = (
    0, 1, 2, 3, 4, 7, 8, 63, 64, 65, 255, 256, 1 << 16, (1 << 20) - 1, 1 << 20, (1 << 20) + 1,
    1 << 24, (1 << 31) - 1, 1 << 31, (1 << 31) + 4, WORD - 63, WORD - 3, WORD - 1, WORD,
)  # fmt: skip
_COLS = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 511, 513)
_ROWS = (1, 1, 1, 2, 3, 4, 5, 8, 9, 17, 33)
_LOCAL_BYTES = (4, 2, 4, 1)  # by dtype
_HALF_BYTES = (8, 4, 8, 2, 2, 1, 16, 2, 2)  # of an element in DRAM, by dtype
_MEMORY_DTYPES = ((0, 1, 4), (0, 1, 4), (2, 3, 5, 6, 7, 8), (2, 3, 5, 6, 7, 8))  # by local dtype
_READ = 1 << 31  # of an address in a script: load from there
_PLACES = {
    name: {f.name: (f.word, f.low, (1 << f.width) - 1) for f in command.fields}
    for name, command in COMMANDS.items()
}
_FUNCTIONS = tuple(sorted(set(VECTOR_FUNCTIONS) - {FMA, SELECT}))
_ROWS_OF_TABLE = tuple(rv32.RV32.rows.values())
# Bits that make a branch or jump go a few instructions ahead, and an access stay near its register.
_NEAR = {"jal": 0x03C00FFF, "jalr": 0x00FFFFFF, "branch": 0x01FFFF7F, "load": 0x07FFFFFF,
         "store": 0x01FFFFFF}  # fmt: skip


def _script_program() -> Program:
    """Stores word after word to the addresses that its arguments name; see `Author.script`."""
    encode = rv32.encode
    code = [
        encode("lui", rd=5, uimm=DMEM.base >> 12),
        encode("lw", rd=6, rs1=5, imm=0),
        encode("addi", rd=5, rs1=5, imm=4),
        encode("bgeu", rs1=5, rs2=6, offset=44),
        encode("lw", rd=7, rs1=5, imm=0),
        encode("lw", rd=8, rs1=5, imm=4),
        encode("addi", rd=5, rs1=5, imm=8),
        encode("blt", rs1=7, rs2=0, offset=12),
        encode("sw", rs2=8, rs1=7, imm=0),
        encode("jal", rd=0, offset=-24),
        encode("slli", rd=7, rs1=7, shamt=1),
        encode("srli", rd=7, rs1=7, shamt=1),
        encode("lw", rd=9, rs1=7, imm=0),
        encode("jal", rd=0, offset=-40),
        encode("lui", rd=7, uimm=COMMAND_PORT.base >> 12),
        encode("sw", rs2=0, rs1=7, imm=4 * CONTROL["exit"]),
    ]
    return Program("script", _image(code))


def _image(words: list[int]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


SCRIPT = _script_program()


@dataclass(frozen=True)
class Layout:
    """Slots of a batch's launches: apart from one another, with memory of nobody between them."""

    slots: tuple[Slot, ...]

    @staticmethod
    def draw(random: Random, dram_bytes: int) -> Layout:
        """Slots of any size and permissions; the last one ends at the end of DRAM."""
        share = dram_bytes // 8
        slots = []
        for number in range(7):
            size = random.choice((0, 1, 63, 64, 100, 1000, 4096, 4099, share - 4096))
            base = share * number + DRAM_ATOM_BYTES * random.randrange(1, 32)
            readable, writable = random.random() < 0.9, random.random() < 0.9
            slots.append(Slot(base, size, readable, writable))
        last = random.choice((64, 256, 4096, share))
        slots.append(Slot(dram_bytes - last, last))
        random.shuffle(slots)
        return Layout(tuple(slots))


class Author:
    """Writes hostile launches for a chip. The same seed writes the same ones."""

    def __init__(self, chip: Chip, random: Random, layout: Layout) -> None:
        self.chip, self.random, self.layout = chip, random, layout
        self._words = {bank: [0] * 16 for bank in BY_BANK}

    def launch(self) -> Launch:
        """The next one: most are commands, for they have the longest way to go wrong."""
        kind = self.random.random()
        slots = self.layout.slots
        if self.random.random() < 0.1:
            slots = slots[: self.random.randrange(len(slots))]
        elif self.random.random() < 0.02:
            slots = (slots * SLOTS)[:SLOTS]
        if kind < 0.15:
            return Launch(self.noise(), slots=slots, watchdog=4000)
        if kind < 0.4:
            return Launch(self.instructions(), slots=slots, watchdog=6000)
        watchdog = self.random.choice((1 << 40, 1 << 40, 1 << 40, 5000))
        return Launch(SCRIPT, self.script(slots), slots, watchdog)

    # Code. ----------------------------------------------------------------------------------------

    def noise(self) -> Program:
        """Words at random."""
        count = self.random.choice((1, 4, 16, 64, self.chip.imem_bytes // 4))
        entry = 4 * self.random.choice((0, count - 1, count, self.random.randrange(count)))
        return Program("noise", self.random.randbytes(4 * count), entry, self._stack_limit())

    def instructions(self) -> Program:
        """Valid instructions, and registers that point where things end."""
        random, words = self.random, []
        for register in (2, *random.sample(range(1, 32), random.randrange(4, 12))):
            value = self._pointer()
            low = (value & 0xFFF ^ 0x800) - 0x800
            words.append(rv32.encode("lui", rd=register, uimm=(value - low) >> 12 & 0xFFFFF))
            words.append(rv32.encode("addi", rd=register, rs1=register, imm=low))
        tame = random.random() < 0.8
        for row in random.choices(_ROWS_OF_TABLE, k=random.randrange(4, 60)):
            free = random.getrandbits(32) & ~row.mask & WORD
            if tame:
                kind = row.name if row.name in _NEAR else row.cycle_class.split()[0]
                free &= _NEAR.get(kind, WORD)
                if row.name in ("ecall", "ebreak"):
                    continue
            words.append(row.match | free)
        return Program("instructions", _image(words), 0, self._stack_limit())

    def _stack_limit(self) -> int:
        size = self.chip.dmem_bytes
        return self.random.choice((0, 0, 1, size - 4, size - 1, size, size + 1, WORD))

    def _pointer(self) -> int:
        """An address at the edge of something."""
        chip, random = self.chip, self.random
        base, size = random.choice((
            (0, chip.imem_bytes), (DMEM.base, chip.dmem_bytes), (SRAM.base, chip.sram_bytes),
            (COMMAND_PORT.base, 64 * 11), (0x50000000, 8), (DMEM.base, 4 * random.randrange(1024)),
        ))  # fmt: skip
        address = base + random.choice((0, size // 2 & ~3, size - 4, size, 64 * (size // 99)))
        return address + random.choice((0, 0, 0, -1, 1, -4, 4, 2048, -2048)) & WORD

    # Commands. ------------------------------------------------------------------------------------

    def script(self, slots: tuple[Slot, ...]) -> tuple[int, ...]:
        """Arguments of SCRIPT: where they end, then addresses and the words stored there."""
        random, found = self.random, []
        for _ in range(random.randrange(1, 9)):
            name = random.choice(("load", "store", "matmul", "vector", *COMMANDS))
            if name in ("gather", "scatter") and random.random() < 0.6:
                fields = self._indices()
                found += self._stores("iota", fields)
                found += self._stores(name, self._indexed(name, slots, fields))
                continue
            fields = getattr(self, f"_{name}")(slots)
            times = 1 if random.random() < 0.8 else 3
            found += self._stores(name, fields) * times
            if random.random() < 0.08:
                found += self._aside()
        found = found[: self.chip.dmem_bytes // 4 - 1]
        return DMEM.base + 4 + 4 * len(found), *found

    def _aside(self) -> list[int]:
        """Something else between two commands."""
        random, port = self.random, COMMAND_PORT.base
        match random.randrange(5):
            case 0:
                return [port + 4 * CONTROL["fence"], 0]
            case 1:
                return [port + 4 * CONTROL["barrier"], 0]
            case 2:
                return [port + 4 * random.randrange(256), random.choice(EDGES)]
            case 3:
                inside = 4 * random.randrange(self.chip.sram_bytes // 4)
                return [_READ | SRAM.base + inside, 0]
            case _:
                return [_READ | self._pointer() & ~_READ, 0]

    def _stores(self, name: str, fields: dict[str, int]) -> list[int]:
        """What sets the fields and issues the command; a few words are not what they should be."""
        command, random = COMMANDS[name], self.random
        words = self._words[command.bank]
        for word in command.words:
            words[word] = 0
        for field, value in fields.items():
            word, low, mask = _PLACES[name][field]
            words[word] |= (value & mask) << low
        if random.random() < 0.1:
            wrong = random.choice(command.words)
            words[wrong] = self._wrong(words[wrong])
        found = []
        for word in (*command.words[1:], 0):
            if word == 0 or random.random() < 0.995:
                found += (command.address(word), words[word])
        return found

    def _wrong(self, value: int) -> int:
        """Another value for a word."""
        chip, random = self.chip, self.random
        match random.randrange(5):
            case 0:
                return random.choice(EDGES)
            case 1:
                return value ^ 1 << random.randrange(32)
            case 2:
                return value + random.choice((-64, -4, -2, -1, 1, 2, 4, 64)) & WORD
            case 3:
                size = random.choice((chip.sram_bytes, chip.acc_bytes, chip.dram_bytes))
                return size + random.choice((-4, -1, 0, 1, 4)) + random.choice((0, ACC_BIT)) & WORD
            case _:
                return random.getrandbits(32)

    def _shape(self, unit: int, most: int) -> tuple[int, int]:
        """(rows, cols) of `unit` bytes an element that mostly fit into `most` bytes."""
        random = self.random
        cols = random.choice(_COLS)
        while cols * unit > most and random.random() < 0.97:
            cols = max(cols // 4, 1)
        rows = random.choice(_ROWS)
        while rows * cols * unit > most and random.random() < 0.97:
            rows = max(rows // 2, 1)
        if random.random() < 0.01:
            return (0, cols) if random.random() < 0.5 else (rows, 0)
        return rows, cols

    def _stride(self, row: int, unit: int) -> int:
        return row + unit * self.random.choice((0, 0, 0, 1, 5, 16))

    def _local(self, extent: int, unit: int, acc: bool | None = None) -> int:
        """Where to put so many bytes: often so that they end with their memory."""
        random = self.random
        if acc is None:
            acc = unit == 4 and random.random() < 0.4
        size = self.chip.acc_bytes if acc else self.chip.sram_bytes
        last = max(size - extent, 0) // unit * unit
        kind = random.random()
        if kind < 0.45:
            address = last
        elif kind < 0.6:
            address = 0
        elif kind < 0.97:
            address = random.randrange(last // unit + 1) * unit
        else:
            address = last + random.choice((unit, 1, 64))
        return address | (ACC_BIT if acc else 0)

    def _transfer(self, slots: tuple[Slot, ...], writes: bool) -> dict[str, int]:
        random = self.random
        local = random.randrange(4)
        mem = random.choice(_MEMORY_DTYPES[local])
        f = {"mem": mem, "local": local}
        if writes and random.random() < (0.4 if mem < 3 else 0.02):
            f["accumulate"] = 1
        slot = len(slots)
        if slots and random.random() < 0.98:
            slot = max(random.sample(range(slot), min(slot, 2)), key=lambda n: slots[n].size)
        return f | {"slot": slot}

    def _in_slot(self, slots: tuple[Slot, ...], f: dict[str, int], low: int, high: int) -> int:
        """An offset such that bytes offset + low to offset + high - 1 mostly lie in the slot."""
        random = self.random
        unit = max(_HALF_BYTES[f["mem"]] // 2, 1)
        size = slots[f["slot"]].size if f["slot"] < len(slots) else 0
        last = max(size - high, -low) // unit * unit
        kind = random.random()
        if kind < 0.5:
            return last
        if kind < 0.65:
            return -low
        if kind < 0.97:
            return -low + unit * random.randrange(max((last + low) // unit, 0) + 1)
        return last + unit * random.choice((1, -1, 16))

    def _load(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        return self._blocks(self._transfer(slots, False), slots, True)

    def _store(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        return self._blocks(self._transfer(slots, True), slots, False)

    def _blocks(self, f: dict[str, int], slots: tuple[Slot, ...], load: bool) -> dict[str, int]:
        """The shape of a load or store."""
        random = self.random
        unit, half = _LOCAL_BYTES[f["local"]], _HALF_BYTES[f["mem"]]
        size = slots[f["slot"]].size if f["slot"] < len(slots) else 1000
        planes = random.choice((1, 1, 1, 2, 3))
        rows, cols = self._shape(max(unit, half // 2, 1), min(size // 2, 3000) // planes)
        cols *= 2 if half == 1 else 1
        above = below = left = right = 0
        if load and random.random() < 0.3:
            step = 2 if half == 1 else 1
            above, below = random.choice((0, 1, 2)), random.choice((0, 0, 1))
            left, right = step * random.choice((0, 1, 3)), step * random.choice((0, 0, 1))
        inner_rows, inner = rows, cols
        rows, cols = rows + above + below, cols + left + right
        row = self._stride(unit * cols, unit)
        plane = self._stride(row * (rows - 1) + unit * cols, unit)
        mem_unit = max(half // 2, 1)
        mem_row = self._stride(inner * half // 2, mem_unit)
        mem_plane = self._stride(mem_row * max(inner_rows - 1, 0) + inner * half // 2, mem_unit)
        if load and random.random() < 0.1:
            mem_row, mem_plane = random.choice((0, mem_unit, -mem_unit)), 0
        if random.random() < 0.2:
            mem_row = -mem_row
        if random.random() < 0.2:
            mem_plane = -mem_plane
        if random.random() < 0.1 and (rows == 1 or planes == 1):  # a stride that nobody uses
            row, mem_row = (random.choice(EDGES) & ~7,) * 2 if rows == 1 else (row, mem_row)
            plane, mem_plane = (1 << 31, -(1 << 31)) if planes == 1 else (plane, mem_plane)
        reaches = ((inner_rows - 1) * mem_row, (planes - 1) * mem_plane)
        low = sum(min(reach, 0) for reach in reaches)
        high = sum(max(reach, 0) for reach in reaches) + inner * half // 2
        extent = (planes - 1) * plane + (rows - 1) * row + unit * cols
        f |= {"rows": rows, "cols": cols, "planes": planes, "row_stride": row}
        f |= {"plane_stride": plane, "mem_row_stride": mem_row, "mem_plane_stride": mem_plane}
        f |= {"address": self._local(extent, unit), "offset": self._in_slot(slots, f, low, high)}
        if load:
            f |= {"pad_above": above, "pad_below": below, "pad_left": left, "pad_right": right}
        return f

    def _indices(self) -> dict[str, int]:
        """An iota that makes indices, in the last bytes of SRAM as often as elsewhere."""
        random = self.random
        rows = random.choice(_ROWS)
        dst = self._local(4 * rows, 4, False)
        start, step = random.choice((0, 0, 0, 1, 5, -1, WORD)), random.choice((0, 1, 1, 1, 2, -1))
        return {"dst": dst, "dst_stride": 4, "rows": rows, "cols": 1, "start": start,
                "row_step": step, "col_step": 0}  # fmt: skip

    def _gather(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        return self._indexed("gather", slots, self._indices())

    def _scatter(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        return self._indexed("scatter", slots, self._indices())

    def _indexed(
        self, name: str, slots: tuple[Slot, ...], indices: dict[str, int]
    ) -> dict[str, int]:
        random = self.random
        f = self._transfer(slots, name == "scatter")
        unit, half = _LOCAL_BYTES[f["local"]], _HALF_BYTES[f["mem"]]
        rows = indices["rows"]
        cols = random.choice(_COLS[:15]) * (2 if half == 1 else 1)
        mem_unit = max(half // 2, 1)
        stride = self._stride(cols * half // 2, mem_unit)
        if random.random() < 0.1:
            stride = random.choice((0, -stride, mem_unit, -(1 << 31)))
        reach = indices["row_step"] * (rows - 1)
        bounds = sorted((indices["start"] * stride, (indices["start"] + reach) * stride))
        row = self._stride(unit * cols, unit)
        f |= {"rows": rows, "cols": cols, "indices": indices["dst"], "mem_row_stride": stride}
        f |= {"row_stride": row, "address": self._local((rows - 1) * row + unit * cols, unit)}
        high = bounds[1] + cols * half // 2
        return f | {"offset": self._in_slot(slots, f, min(bounds[0], 0), high)}

    def _matmul(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        random = self.random
        f = {"type": random.randrange(2), "accumulate": random.randrange(2)}
        f |= {"transpose_a": int(random.random() < 0.3), "transpose_b": random.randrange(2)}
        size = 1 if f["type"] else 2
        m0, n = random.choice((1, 1, 2, 3, 4, 7, 8, 9, 13)), random.choice(_COLS[:19])
        inner, outer = random.choice(_COLS[:19]), random.choice((1, 1, 2, 3))
        m1, m2 = random.choice((1, 1, 2, 3)), random.choice((1, 1, 2))
        if f["transpose_a"]:
            m1 = m2 = outer = 1
        while inner * outer * n * size > 5000:
            inner, n = (inner // 2, n) if inner > n else (inner, n // 2)
        while m0 * m1 * m2 * n * 4 > self.chip.acc_bytes:
            n = max(n // 2, 1)
        if random.random() < 0.03:
            inner = random.choice((0, 600, 1000, 1 << 20))
        again = not f["transpose_a"] and random.random() < 0.04  # a long one, of the same bytes
        if again:
            outer, f["transpose_b"] = random.choice((50, 500)), 0
        k = inner * outer
        m0_stride = self._stride(size * (m0 if f["transpose_a"] else inner), size)
        m1_stride, m2_stride = size * random.choice((0, 1, 40)), size * random.choice((0, 3, 96))
        outer_stride = size * random.choice((inner, 0, 7))
        b_stride = self._stride(size * (k if f["transpose_b"] else n), size)
        if again:
            b_stride = outer_stride = 0
        elif random.random() < 0.15:
            b_stride = random.choice((0, size, 2 * size))
        if random.random() < 0.1:
            m0_stride = random.choice((0, size))
        acc_stride = self._stride(4 * n, 4)
        if f["transpose_a"]:
            a_extent = (inner - 1) * m0_stride + m0 * size
        else:
            a_extent = (m0 - 1) * m0_stride + (m1 - 1) * m1_stride + (m2 - 1) * m2_stride
            a_extent += (outer - 1) * outer_stride + inner * size
        if f["transpose_b"]:
            b_extent = (n - 1) * b_stride + k * size
        else:
            b_extent = (k - 1) * b_stride + n * size
        f |= {"m0": m0, "m1": m1, "m2": m2, "n": n, "k_inner": inner, "k_outer": outer}
        f |= {"m0_stride": m0_stride, "m1_stride": m1_stride, "m2_stride": m2_stride}
        f |= {"k_outer_stride": outer_stride, "b_stride": b_stride, "acc_stride": acc_stride}
        f |= {"a": self._local(a_extent, size, False), "b": self._local(b_extent, size, False)}
        return f | {"acc": self._local((m0 * m1 * m2 - 1) * acc_stride + 4 * n, 4, True)}

    def _vector(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        random = self.random
        f = {"f1": random.choice(_FUNCTIONS), "f2": random.choice((0, random.choice(_FUNCTIONS)))}
        special = random.random()
        if special < 0.1:
            f["f1"], f["f2"] = FMUL, FMA
        elif special < 0.2:
            f["f1"], f["f2"] = SELECT, SELECT
        rows, cols = self._shape(4, 1500)
        f |= {"rows": rows, "cols": cols}
        for operand in "abc":
            dtype, kind = random.randrange(4), random.choice((0, 0, 0, 0, 1, 2))
            unit = _LOCAL_BYTES[dtype]
            row = unit * (1 if kind else cols)
            stride = self._stride(row, unit) if random.random() < 0.85 else 0
            f |= {f"{operand}_dtype": dtype, f"{operand}_kind": kind, f"{operand}_stride": stride}
            f[operand] = self._local((rows - 1) * stride + row, unit)
            if kind == SCALAR:
                f[operand] = random.choice((0, 0x3F800000, 0xBFC00000, 0x7FC00001, WORD))
        dtype = random.randrange(4)
        unit = _LOCAL_BYTES[dtype]
        stride = self._stride(unit * cols, unit)
        f |= {"dst_dtype": dtype, "dst_stride": stride}
        f["dst"] = self._local((rows - 1) * stride + unit * cols, unit)
        if f["a_kind"] == 0 and f["a_stride"] and random.random() < 0.4:  # in place
            f |= {"dst_dtype": f["a_dtype"], "dst": f["a"], "dst_stride": f["a_stride"]}
        return f

    def _reduce(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        random = self.random
        op = random.randrange(6)
        column = 0 if op == 5 else int(random.random() < 0.3)
        dtype = random.choice((2, 3) if op in (3, 4) else (0, 1))
        unit, words = _LOCAL_BYTES[dtype], 128 if op == 5 else 64
        rows, cols = self._shape(unit, 2000)
        if not column:
            rows = min(rows, 6)
        source_row = self._stride(unit * cols, unit) if random.random() < 0.85 else 0
        state_row = self._stride(4 * words, 4)
        extent = 4 * cols if column else (rows - 1) * state_row + 4 * words
        if random.random() < 0.01 and cols < 4:
            rows, source_row = 1 << 18, 0
        f = {"op": op, "first": random.randrange(2), "column": column, "dtype": dtype}
        f |= {"rows": rows, "cols": cols, "src_stride": source_row, "state_stride": state_row}
        f["src"] = self._local((rows - 1) * source_row + unit * cols, unit)
        f["state"] = self._local(extent, 4)
        return f | {"start": random.choice((0, 64, 640, 1 << 30, 1))}

    def _finish(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        random = self.random
        op = random.randrange(6)
        dtype = 2 if op == 5 else random.choice((2, 3) if op in (3, 4) else (0, 1))
        unit, rows = _LOCAL_BYTES[dtype], random.choice((1, 2, 3, 5))
        state_row = self._stride(512 if op == 5 else 256, 4)
        if random.random() < 0.1:
            state_row = random.choice((0, 4))
        dst_row = self._stride(unit, unit)
        f = {"op": op, "dtype": dtype, "rows": rows, "state_stride": state_row}
        f["state"] = self._local((rows - 1) * state_row + (512 if op == 5 else 256), 4)
        return f | {"dst_stride": dst_row, "dst": self._local((rows - 1) * dst_row + unit, unit)}

    def _transpose(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        dtype = self.random.randrange(4)
        unit = _LOCAL_BYTES[dtype]
        rows, cols = self._shape(unit, 2000)
        row, dst_row = self._stride(unit * cols, unit), self._stride(unit * rows, unit)
        f = {"dtype": dtype, "rows": rows, "cols": cols, "src_stride": row, "dst_stride": dst_row}
        f["src"] = self._local((rows - 1) * row + unit * cols, unit)
        return f | {"dst": self._local((cols - 1) * dst_row + unit * rows, unit)}

    def _iota(self, slots: tuple[Slot, ...]) -> dict[str, int]:
        random = self.random
        rows, cols = self._shape(4, 3000)
        row = self._stride(4 * cols, 4)
        f = {"rows": rows, "cols": cols, "dst_stride": row}
        f |= {name: random.choice(EDGES) for name in ("start", "row_step", "col_step")}
        return f | {"dst": self._local((rows - 1) * row + 4 * cols, 4)}
