"""The command port against the definition: faults, descriptions and jobs of random commands.

Only fields that differ from the bank's last command are stored, in random order and as close
together as the control core can, so that products are asked for as soon as the contract allows.
"""

import random
from dataclasses import dataclass

import pytest
from test_commands import BASE, REFUSALS
from test_commands import SLOTS as CHECKED_SLOTS

from pagoda.chip.command_port import CommandPort
from pagoda.chip.interfaces import Description, Fault, Job
from pagoda.chip.product_schedule import SETTLED_STEP, TARGET, schedule
from pagoda.chip.verilate import Model
from pagoda.isa import COMMANDS, PRESETS, Slot
from pagoda.isa.access import bank_mask, operands_per_bank
from pagoda.isa.checks import check, check_indices
from pagoda.isa.commands import ACC_BIT, BY_BANK, CONTROL, COUNT_LIMIT, Command, encode
from pagoda.isa.fault import FaultKind, FaultRaised
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.machine import ENGINES
from pagoda.isa.numbers import DType
from pagoda.isa.timing import STORE_CYCLES, duration, index_cycles

TINY = PRESETS["tiny"]
SLOTS = (
    Slot(0, 4096), Slot(1 << 20, 1 << 16), Slot(4096, 4096, writable=False),
    Slot(8192, 4096, readable=False), Slot(1 << 40, (1 << 32) - 1), Slot(0, 0),
)  # fmt: skip
EDGES = (
    0, 1, 2, 3, 64, COUNT_LIMIT - 1, COUNT_LIMIT, COUNT_LIMIT + 1, 1 << 30, (1 << 30) + 64,
    (1 << 31) - 4, 1 << 31, (1 << 32) - 4, (1 << 32) - 1, 1 << 16, (1 << 16) - 4, 1 << 14,
    ACC_BIT | (1 << 14) - 4, 1 << 12,
)  # fmt: skip


# Driving the port. --------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What the port did with a go; cycles count from the one in which it was first offered."""

    entered: int | None = None
    ready: int | None = None
    description: object = None
    job: object = None
    fault: object = None
    fault_seen: int | None = None


class Bench:
    """The port with a slot table, SRAM and a window that is full and busy for as long as told."""

    def __init__(self, chip):
        self.chip, self.model, self.cycle = chip, Model(CommandPort(chip), "command_port"), 1000
        self.sram = bytearray(chip.sram_bytes)
        self.words = {bank: [0] * 16 for bank in BY_BANK}
        self.index = 0
        self.issue_cycle = -STORE_CYCLES
        self.slots = SLOTS
        self.reads = []  # (cycle, address) of every side read
        self.offered = 0  # the last cycle in which a store was offered
        self.noise = random.Random("noise")

    def begin(self):
        """A new launch; fields and products stay."""
        self.index, self.slots = 0, SLOTS
        for port in ("store__valid", "store__drop", "full"):
            self.model[port] = 0
        self.model["launch"], self.model["empty"] = 1, 1
        self.step()
        self.model["launch"] = 0
        for _ in range(STORE_CYCLES):
            self.step()

    def step(self, busy=0, coming=False):
        """One cycle with the inputs as they are. coming: the next store is already on the bus."""
        model = self.model
        model["cycle"] = self.cycle
        if model["store__valid"]:
            self.offered = self.cycle
        # Another instruction's operands, and then its address.
        for port, bits, kept in (("value", 32, 2), ("pc", 32, 2), ("bank", 4, 3), ("word", 4, 3)):
            if self.cycle > self.offered + kept and not coming:
                model[f"store__{port}"] = self.noise.getrandbits(bits)
        model.settle()
        number = model["slots__slot"]
        slot = self.slots[number] if number < len(self.slots) else None
        model["slots__exists"] = slot is not None
        if slot is not None:
            model["slots__base"], model["slots__bytes"] = slot.base, slot.size
            model["slots__readable"], model["slots__writable"] = slot.readable, slot.writable
        model["query__busy"] = busy
        model.settle()
        self.query = model["query__first"], model["query__last"]
        self.ready, self.enter, self.fault = (
            model[port] for port in ("store__ready", "enter", "store__fault")
        )
        if self.enter:
            self.entered = model["description"], model["job"]
        address = model["side__address"] if model["side__enable"] else None
        model.tick()
        if address is not None:
            self.reads.append((self.cycle, address))
            data = self.sram[address : address + self.chip.port_bytes]
            model["side__data"] = int.from_bytes(data, "little")
        self.cycle += 1

    def offer(self, bank, word, value, pc=0):
        """Offer a store as soon as the control core can; it is on the bus one cycle before."""
        for now in range(self.cycle, earliest := self.earliest):
            if coming := now + 1 == earliest:
                for port, driven in (("bank", bank), ("word", word), ("value", value), ("pc", pc)):
                    self.model[f"store__{port}"] = driven
            self.step(coming=coming)
            assert not self.enter and not self.fault
        self.issue_cycle = self.cycle
        self.model["store__valid"] = 1

    @property
    def earliest(self):
        """The first cycle in which the next store can be offered."""
        return max(self.cycle + 1, self.issue_cycle + STORE_CYCLES)

    def set_field(self, bank, word, value):
        self.offer(bank, word, value)
        self.step()
        assert self.ready and not self.fault
        self.model["store__valid"] = 0
        self.words[bank][word] = value

    def go(self, bank, value, pc, full=0, busy=0, drop=None):
        """Offer a go; the window is full for `full` cycles and the index tile busy for `busy`."""
        self.offer(bank, 0, value, pc)
        begin, done, after, outcome = self.cycle, False, 0, Outcome()
        while after < 4:
            now = self.cycle - begin
            self.model["full"], self.model["store__drop"] = now < full, now == drop
            self.step(busy=now < busy)
            if self.ready:
                outcome.ready, self.issue_cycle = now, self.cycle - 1
            if self.enter:
                assert outcome.entered is None
                outcome.entered = now
                outcome.description = Description(self.chip).from_bits(self.entered[0])
                outcome.job = Job().from_bits(self.entered[1])
            if self.fault:
                assert outcome.fault is None
                outcome.fault_seen = now
                outcome.fault = Fault().from_bits(self.model["store__fault_info"])
            done = done or bool(self.ready or self.fault) or now == drop
            self.model["store__valid"] = not done
            after += done
            assert now < 5000
        return outcome


# What the definition says. ------------------------------------------------------------------------


@dataclass
class Expected:
    fault: FaultRaised | None = None
    cycle: int = 0  # of the fault, or of the entry
    touched: object = None


def expect(bench, command, words, full, busy):
    indexed = command.name in ("gather", "scatter")
    cycle = 0 if indexed else full
    touched = None
    try:
        touched = check(bench.chip, command, words, bench.slots)
        if touched is not None and touched.indices is not None:
            tile = touched.indices
            cycle = busy + index_cycles(bench.chip, tile.cols)
            raw = bench.sram[tile.hull.first : tile.hull.last + 1]
            rows = [
                int.from_bytes(raw[4 * i : 4 * i + 4], "little", signed=True)
                for i in range(tile.cols)
            ]
            touched = check_indices(touched, rows, bench.slots)
    except FaultRaised as raised:
        return Expected(raised, cycle)
    return Expected(None, max(cycle, full), touched)


def compare(bench, command, words, pc, outcome, expected, begin):
    if expected.fault is not None:
        raised, fault = expected.fault, outcome.fault
        assert outcome.entered is None and fault is not None
        assert FaultKind(fault.kind) == raised.kind
        assert fault.cycle - begin == expected.cycle
        assert expected.cycle < outcome.fault_seen <= expected.cycle + 2
        assert (fault.pc, fault.is_command, fault.command) == (pc, 1, bench.index)
        assert fault.place == (raised.slot >= 0)
        if fault.place:
            assert (fault.slot, fault.offset) == (raised.slot, raised.offset)
        return
    assert outcome.fault is None
    assert outcome.ready == expected.cycle and outcome.entered == expected.cycle + 1
    description, job, touched = outcome.description, outcome.job, expected.touched
    assert (job.bank, job.pc, job.index) == (command.bank, pc, bench.index)
    assert job.empty == (touched is None)
    assert [job.words[i] for i in range(16)] == words
    assert ENGINES[description.engine] == command.engine
    assert description.tail == duration(bench.chip, touched).tail
    reads, writes, ports = [], [], (0, 0)
    if touched is not None:
        base = bench.slots[touched.dram.slot].base if touched.dram is not None else 0
        reads, writes = touched.ranges(base)
        if touched.indices is not None and touched.indices.hull not in reads:
            reads.append(touched.indices.hull)
        ports = touched.ports(bench.chip)
        if touched.dram is not None:
            assert job.base == base
    shown = [description.reads[i] for i in range(3)]
    assert sorted(as_tuple(r) for r in shown if r.valid) == sorted(map(tuple, reads))
    written = [as_tuple(description.write)] if description.write.valid else []
    assert written == list(map(tuple, writes))
    assert (description.read_ports, description.write_ports) == ports
    if touched is not None and command.name in ("matmul", "vector"):
        compare_sharing(bench.chip, command, job, touched)


def compare_sharing(chip, command, job, touched):
    sources = {tile.name: tile for tile in touched.tiles if tile.reads and tile.name != "acc"}
    masks = {name: bank_mask(chip, tile.hull) for name, tile in sources.items()}
    for one, two in ("ab", "ac", "bc") if command.name == "vector" else ("ab",):
        both = masks.get(one, 0) & masks.get(two, 0) != 0
        assert job[f"shared_{one}{two}"] == both
    if command.name == "vector":
        assert job.per_bank == max(operands_per_bank(chip, list(sources.values())), 1)


def as_tuple(found):
    return found.space, found.first, found.last


# Random commands, mostly legal. -------------------------------------------------------------------


class Commands:
    def __init__(self, seed, chip):
        self.random, self.chip = random.Random(seed), chip

    def address(self, reach=0, acc=None):
        acc = self.random.random() < 0.3 if acc is None else acc
        size = self.chip.acc_bytes if acc else self.chip.sram_bytes
        room = max(size - reach, 4)
        place = self.random.choice((0, room & ~3, self.random.randrange(room) & ~3))
        return place | ACC_BIT * acc

    def count(self, most):
        return self.random.choice((1, 2, self.random.randint(1, most), self.random.randint(1, 8)))

    def stride(self, least, unit=4):
        extra = self.random.choice((0, unit, unit * self.random.randint(0, 40)))
        return -(-least // unit) * unit + extra

    def transfer(self, name):
        r = self.random
        floats = r.random() < 0.5
        mems = [d for d in DType if d.is_float == floats]
        local = r.choice([DType.F32, DType.BF16] if floats else [DType.I32, DType.I8])
        mem = r.choice(mems)
        f = {"mem": mem, "local": local, "cols": self.count(40), "rows": self.count(12)}
        if mem == DType.I4:
            f["cols"] += f["cols"] % 2
        if name in ("store", "scatter"):
            f["accumulate"] = mem in (0, 1, 2) and r.random() < 0.5
        row, mem_row = f["cols"] * local.bits // 8, f["cols"] * mem.bits // 8
        f["slot"] = r.choice((0, 1, 1, 1, 4, 4, r.randrange(7)))
        f["offset"] = r.randrange(512) * 8
        f["row_stride"] = self.stride(row)
        f["mem_row_stride"] = self.stride(mem_row, 8) * r.choice((1, 1, -1))
        reach = f["rows"] * f["row_stride"]
        if name in ("load", "store"):
            f["planes"] = self.count(4)
            f["plane_stride"] = self.stride(f["rows"] * f["row_stride"])
            f["mem_plane_stride"] = self.stride(f["rows"] * abs(f["mem_row_stride"]), 8)
            f["mem_plane_stride"] *= r.choice((1, 1, -1))
            if r.random() < 0.3:  # planes inside rows
                f["row_stride"], f["plane_stride"] = f["plane_stride"], f["row_stride"]
            reach = f["planes"] * f["plane_stride"]
            f["offset"] += r.choice((0, 0, 1 << 14))
        else:
            f["indices"] = self.address(4 * f["rows"], False)
        if name == "load":
            f["pad_above"], f["pad_below"] = r.choice(((0, 0), (1, 0), (0, 2), (1, 1)))
            f["pad_left"], f["pad_right"] = r.choice(((0, 0), (1, 1), (2, 0), (1, 3)))
        f["address"] = self.address(reach, None if local.bits == 32 else False)
        return f

    def matmul(self):
        r = self.random
        turned = r.random() < 0.3
        f = {"type": r.randrange(2), "accumulate": r.randrange(2), "transpose_a": turned}
        f |= {"transpose_b": r.randrange(2), "n": self.count(12), "k_inner": self.count(20)}
        f |= {"m0": self.count(10), "m1": 1 if turned else self.count(4)}
        f |= {"m2": 1 if turned else self.count(3), "k_outer": 1 if turned else self.count(3)}
        if r.random() < 0.1:
            f["k_inner"] = 0
        for name in ("m0", "m1", "m2", "k_outer"):
            f[f"{name}_stride"] = self.stride(r.randrange(64), 2)
        f["b_stride"] = self.stride(r.randrange(64), 2)
        f["acc_stride"] = self.stride(4 * f["n"])
        f |= {"a": self.address(2048, False), "b": self.address(2048, False)}
        return f | {"acc": self.address(f["acc_stride"] * f["m0"] * f["m1"] * f["m2"], True)}

    def vector(self):
        r = self.random
        f = {"rows": self.count(10), "cols": self.count(20)}
        if r.random() < 0.8:
            plain = [c for c in VECTOR_FUNCTIONS if c < 56]
            f |= {"f1": r.choice(plain), "f2": r.choice(plain)}
        else:
            f |= dict(zip(("f1", "f2"), r.choice(((3, 56), (57, 57), (1, 56))), strict=True))
        for name in ("a", "b", "c", "dst"):
            dtype = r.choice((DType.F32, DType.BF16, DType.I32, DType.I8))
            f[f"{name}_dtype"] = dtype
            f[f"{name}_stride"] = self.stride(f["cols"] * dtype.bits // 8)
            f[name] = self.address(f["rows"] * f[f"{name}_stride"], dtype.bits == 32 and None)
            if name != "dst":
                f[f"{name}_kind"] = r.choice((0, 0, 1, 2))
        if r.random() < 0.4:
            same = r.choice("abc")
            for part in ("", "_dtype", "_stride"):
                f[same + part] = f["dst" + part]
        return f

    def reduce(self):
        r = self.random
        f = {"op": r.randrange(6), "first": r.randrange(2), "rows": self.count(10)}
        f |= {"column": r.random() < 0.4, "cols": self.count(80), "start": 64 * r.randrange(9)}
        f["dtype"] = r.choice((2, 3) if f["op"] in (3, 4) else (0, 1))
        f["src_stride"] = self.stride(f["cols"] * DType(f["dtype"]).bits // 8)
        f["state_stride"] = self.stride(512 if f["op"] == 5 else 256)
        f["src"] = self.address(f["rows"] * f["src_stride"], None if f["dtype"] in (0, 2) else 0)
        return f | {"state": self.address(f["rows"] * f["state_stride"])}

    def finish(self):
        r = self.random
        f = {"op": r.randrange(6), "rows": self.count(10)}
        f["dtype"] = {3: r.choice((2, 3)), 4: 2, 5: 2}.get(f["op"], r.choice((0, 1)))
        f |= {"state_stride": self.stride(256), "dst_stride": self.stride(4)}
        f["state"] = self.address(f["rows"] * f["state_stride"])
        acc = None if f["dtype"] in (0, 2) else False
        return f | {"dst": self.address(f["rows"] * f["dst_stride"], acc)}

    def transpose(self):
        dtype = DType(self.random.randrange(4))
        f = {"dtype": dtype, "rows": self.count(12), "cols": self.count(12)}
        f["src_stride"] = self.stride(f["cols"] * dtype.bits // 8)
        f["dst_stride"] = self.stride(f["rows"] * dtype.bits // 8)
        for name in ("src", "dst"):
            f[name] = self.address(512, dtype.bits == 32 and None)
        return f

    def iota(self):
        f = {"rows": self.count(12), "cols": self.count(20)}
        f |= {name: self.random.getrandbits(32) for name in ("start", "row_step", "col_step")}
        f["dst_stride"] = self.stride(4 * f["cols"])
        return f | {"dst": self.address(f["rows"] * f["dst_stride"])}

    def words(self, command, old):
        """The 16 registers of a new command; sometimes only a few differ from the old ones."""
        r = self.random
        words = list(old)
        if r.random() < 0.75:
            make = getattr(self, command.name, None)
            fields = make() if make else self.transfer(command.name)
            words = [0] * 16
            for name, value in fields.items():
                field = command.by_name[name]
                words[field.word] |= field.insert(int(value))
        for _ in range(r.choice((0, 0, 0, 1, 1, 2))):
            self.disturb(command, words)
        return words

    def disturb(self, command: Command, words):
        r = self.random
        field = r.choice(command.fields)
        if r.random() < 0.1:
            field = r.choice([field for field in command.fields if field.kind == "count"])
            words[field.word] = r.choice(EDGES[:4])
            return
        old = field.extract(words[field.word])
        value = r.choice((
            r.choice(EDGES), r.choice(EDGES), old + r.choice((-4, -2, -1, 1, 2, 4)), old << 1,
            r.getrandbits(field.width), r.getrandbits(8), r.getrandbits(16) & ~3,
        ))  # fmt: skip
        words[field.word] &= ~field.insert(-1)
        words[field.word] |= field.insert(value)
        if r.random() < 0.05:
            words[r.choice(command.words)] ^= 1 << r.randrange(32)


def issue(bench, commands, command):
    """One random command through the port and the definition."""
    r, bank = commands.random, command.bank
    words = commands.words(command, bench.words[bank])
    if command.name in ("gather", "scatter"):
        place_indices(bench, commands, command, words)
    changed = [w for w in command.words[1:] if words[w] != bench.words[bank][w]]
    r.shuffle(changed)
    for word in changed:
        bench.set_field(bank, word, words[word])
    full, busy = r.choice((0, 0, 0, 1, 2, 7, 20)), r.choice((0, 0, 1, 2, 9))
    expected = expect(bench, command, words, full, busy)
    pc = r.randrange(1 << 14) * 4
    bench.words[bank][0] = 0
    begin = bench.earliest
    outcome = bench.go(bank, words[0], pc, full, busy)
    compare(bench, command, words, pc, outcome, expected, begin)
    bench.index += expected.fault is None
    return expected.fault.kind.name if expected.fault is not None else (
        "entered" if expected.touched is not None else "empty"
    )  # fmt: skip


def place_indices(bench, commands, command, words):
    r = commands.random
    f = {field.name: field.extract(words[field.word]) for field in command.fields}
    first, rows = f["indices"], f["rows"]
    if first & ACC_BIT or first + 4 * rows > bench.chip.sram_bytes:
        return
    most = r.choice((3, 3, 8, 100, 1 << 31))
    least = r.choice((0, 0, 0, -1, -most))
    if r.random() < 0.05:  # far, but in a slot of 2^32 - 1 bytes
        least, most = (1 << 31) // 65536, (1 << 31) // 32768
    for row in range(rows):
        at = first + 4 * row
        index = r.randint(least, most - 1)
        bench.sram[at : at + 4] = index.to_bytes(4, "little", signed=True)


# Tests. -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def powered():
    return Bench(TINY)


@pytest.fixture
def bench(powered):
    """The same port for every test, in a launch of its own."""
    powered.begin()
    return powered


def test_products_settle_before_the_go():
    late = set()
    for name, command in COMMANDS.items():
        for word in command.words[1:]:
            steps = schedule(name, word)
            late |= {(name, p.place, step) for step, p in steps.items() if step > SETTLED_STEP}
    assert late == {("matmul", TARGET, 4), ("vector", TARGET, 3)}
    assert schedule("load", 2) == {}
    assert [p.place for p in schedule("iota", 2).values()] == [TARGET]


@pytest.mark.parametrize("name", COMMANDS)
def test_random_commands(bench, name):
    outcomes = run(bench, [name], 250, f"alone {name}")
    assert outcomes["entered"] > 60
    assert outcomes["empty"] > 0 and outcomes["BAD_FIELD"] > 5
    if name in ("gather", "scatter"):
        assert outcomes["GATHER_INDEX"] > 5


def test_banks_keep_their_fields_and_products(bench):
    outcomes = run(bench, list(COMMANDS), 500, "mixed")
    assert outcomes["entered"] > 200


def test_every_rule_of_the_checks(bench):
    bench.slots = CHECKED_SLOTS
    for name, changes, kind in REFUSALS:
        outcome = issue_fields(bench, name, **BASE[name] | changes)
        assert FaultKind(outcome.fault.kind).name == kind


@pytest.mark.parametrize("name, fields", [
    ("store", dict(slot=4, cols=1, rows=COUNT_LIMIT, planes=1, mem_row_stride=4)),
    ("store", dict(slot=4, cols=1, rows=COUNT_LIMIT, planes=1, mem_row_stride=4094 & ~3)),
    ("store", dict(slot=4, cols=1, rows=2, planes=1, offset=1 << 31, mem_row_stride=-1 << 31)),
    ("store", dict(slot=4, cols=1, rows=2, planes=1, offset=0x7FFF_FFFC, mem_row_stride=-1 << 31)),
    ("store", dict(slot=4, cols=1, rows=1 << 10, planes=1 << 10, mem_row_stride=-4,
                   mem_plane_stride=4096, offset=4092)),
    ("store", dict(slot=4, cols=1, rows=3, planes=2, mem_row_stride=(1 << 31) - 4)),
    ("load", dict(mem=6, local=2, slot=4, cols=1, rows=1, planes=1, offset=0xFFFF_FFF0)),
    ("load", dict(mem=6, local=2, slot=4, cols=1, rows=1, planes=1, offset=0xFFFF_FFF8)),
    ("load", dict(mem=5, local=3, slot=4, cols=30, rows=1, planes=1, offset=0xFFFF_FFF0)),
    ("load", dict(mem=5, local=3, slot=4, cols=32, rows=1, planes=1, offset=0xFFFF_FFF0)),
    ("load", dict(slot=1, cols=4, rows=3, planes=1, pad_above=2, pad_below=1, offset=1 << 31,
                  row_stride=16)),
    ("load", dict(slot=9, cols=4, rows=3, planes=1, pad_left=4, row_stride=16)),
    ("matmul", dict(m0=1, m1=1, m2=1, n=1, k_outer=1 << 10, k_inner=1 << 10)),
    ("matmul", dict(m0=1, m1=1, m2=1, n=1, k_outer=1 << 10, k_inner=1 << 6, b_stride=2)),
    ("matmul", dict(m0=1 << 7, m1=1 << 7, m2=1 << 6, n=1, k_outer=1, k_inner=1, acc_stride=4)),
    ("matmul", dict(m0=1 << 4, m1=1 << 4, m2=1 << 4, n=1, k_outer=1, k_inner=1, acc_stride=4)),
    ("matmul", dict(m0=1 << 7, m1=1 << 7, m2=(1 << 6) + 1, n=1, k_outer=1, k_inner=1)),
    ("matmul", dict(m0=COUNT_LIMIT, m1=COUNT_LIMIT, m2=0, n=1, k_outer=1, k_inner=1)),
    ("matmul", dict(m0=1, m1=1, m2=1, n=4, k_outer=COUNT_LIMIT, k_inner=0, b=3 << 29)),
    ("reduce", dict(op=0, first=1, rows=2, cols=0, src=1 << 30, state_stride=256)),
    ("reduce", dict(op=0, first=0, rows=2, cols=0, state_stride=256)),
    ("vector", dict(rows=COUNT_LIMIT, cols=1, dst_stride=4, f1=1)),
    ("iota", dict(rows=1, cols=1 << 14)),
    ("iota", dict(rows=1, cols=1 << 12, dst=ACC_BIT)),
    ("iota", dict(rows=1, cols=1 << 12, dst=ACC_BIT | 4)),
])  # fmt: skip
def test_largest_extents_and_last_bytes(bench, name, fields):
    issue_fields(bench, name, **fields)


@pytest.mark.parametrize("stride, indices", [
    (1, (1 << 31, 5)), (-1, (-1 << 31, 0)), (1, (-1 << 31, 0)), (-(1 << 31), (-1, 0)),
    ((1 << 31) - 1, (1, 2)), ((1 << 31) - 1, (-1, -2)), (-(1 << 31), (-1 << 31, -1 << 31)),
    (0, (-1 << 31, (1 << 31) - 1)), (1, ((1 << 31) - 1, 7, 3, 9, -1)), (2, (3, 2, 1, 0, 9, 8, 7)),
])  # fmt: skip
def test_far_indices(bench, stride, indices):
    for row, index in enumerate(indices):
        bench.sram[4 * row : 4 * row + 4] = (index & 0xFFFFFFFF).to_bytes(4, "little")
    issue_fields(
        bench, "gather", mem=3, local=3, slot=4, cols=1, rows=len(indices), indices=0,
        address=4096, row_stride=1, mem_row_stride=stride,
    )  # fmt: skip


def test_an_index_tile_is_read_once_when_its_writers_have_finished(bench):
    fields = GATHER | dict(indices=20, rows=9)
    bench.sram[20:56] = bytes(36)
    issue_fields(bench, "gather", **fields)
    bench.reads.clear()
    outcome = issue_fields(bench, "gather", busy=3, **fields)
    assert bench.query == (20, 55)
    first = bench.issue_cycle - outcome.ready + 3
    assert bench.reads == [(first, 20), (first + 1, 36), (first + 2, 52)]
    assert outcome.ready == 3 + 3 + 4


def test_fence_barrier_and_exit_wait_until_the_window_is_empty(bench):
    for word in (CONTROL["fence"], CONTROL["barrier"], CONTROL["exit"]):
        bench.offer(0, word, 0)
        bench.model["empty"] = 0
        for _ in range(3):
            bench.step()
            assert not bench.ready
        bench.model["empty"] = 1
        bench.step()
        assert bench.ready and not bench.enter
        bench.model["store__valid"] = 0
        bench.issue_cycle = bench.cycle - 1


def test_the_watchdog_ends_a_wait(bench):
    iota, gather = words_of("iota", **BASE["iota"]), words_of("gather", **GATHER)
    bench.sram[0:12] = bytes(12)
    for words, command, full in ((iota, "iota", 9), (gather, "gather", 0), (gather, "gather", 9)):
        bank = COMMANDS[command].bank
        issue_fields(bench, command, **(GATHER if command == "gather" else BASE[command]))
        outcome = bench.go(bank, words[0], 0, full=full, drop=4)
        assert (outcome.ready, outcome.entered, outcome.fault) == (None, None, None)
        issue_fields(bench, command, **(GATHER if command == "gather" else BASE[command]))


def test_a_fault_of_the_last_cycle_before_the_watchdog_is_reported(bench):
    issue_fields(bench, "gather", **GATHER)
    bench.sram[0:4] = b"\xff" * 4
    for drop, seen in ((5, None), (6, 7)):
        outcome = bench.go(3, 0, 0, full=99, drop=drop)
        assert outcome.ready is None and outcome.fault_seen == seen
    assert outcome.fault.kind == FaultKind.GATHER_INDEX
    bench.sram[0:4] = bytes(4)


def test_a_launch_counts_its_commands_from_0(bench):
    issue_fields(bench, "iota", **BASE["iota"])
    bench.begin()
    assert issue_fields(bench, "iota", **BASE["iota"]).job.index == 0


GATHER = BASE["gather"]


def words_of(name, **fields):
    words = [0] * 16
    for word, value in encode(name, **fields):
        words[word] = value
    return words


def issue_fields(bench, name, full=0, busy=0, **fields):
    """A command with these fields, the others 0, through the port and the definition."""
    command, words = COMMANDS[name], words_of(name, **fields)
    expected = expect(bench, command, words, full, busy)
    for word in command.words[1:]:
        bench.set_field(command.bank, word, words[word])
    begin = bench.earliest
    outcome = bench.go(command.bank, words[0], 4, full, busy)
    compare(bench, command, words, 4, outcome, expected, begin)
    bench.index += expected.fault is None
    return outcome


def run(bench, names, count, seed):
    commands = Commands(seed, bench.chip)
    outcomes = dict.fromkeys(("entered", "empty", *(kind.name for kind in FaultKind)), 0)
    for number in range(count):
        name = commands.random.choice(names)
        try:
            outcomes[issue(bench, commands, COMMANDS[name])] += 1
        except AssertionError as error:
            raise AssertionError(f"{name}, command {number} of {seed!r}: {error}") from error
    return outcomes
