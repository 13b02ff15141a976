"""Cycles of picorv32, per instruction class, against `pagoda.isa.rv32.CYCLES`.

An instruction starts in the cycle of `launch_next_insn`; its duration is the distance to the next
start. Random programs put every class behind and in front of every other one, so a class whose
duration depends on its neighbours would show more than one value.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pythondata_cpu_picorv32 as picorv32
from verilate import HERE, build

from pagoda.isa.rv32 import CYCLES, RV32, encode

FIELDS = ("launch", "pc", "valid", "instr", "addr", "wdata", "wstrb", "ready", "trap", "la_write")
WORDS = 1 << 14
PORT = 0x4000_0000


class Cycle(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in FIELDS]


def library() -> ctypes.CDLL:
    source = Path(picorv32.__file__).parent / "verilog" / "picorv32.v"
    return build("core_top", [HERE / "core_top.v", source], HERE / "core_bench.cpp")


def execute(lib: ctypes.CDLL, words: list[int], cycles: int = 4000, hold: tuple[int, ...] = ()):
    """Run a program from address 0; the log of every cycle, up to the trap."""
    memory = (ctypes.c_uint32 * WORDS)(*words)
    log = (Cycle * cycles)()
    holds = (ctypes.c_int * max(1, len(hold)))(*hold)
    used = lib.run(memory, WORDS, holds, len(hold), log, cycles)
    return log[:used], memory


def starts(log) -> list[tuple[int, int]]:
    """(cycle, pc) of every instruction start."""
    return [(t, c.pc) for t, c in enumerate(log) if c.launch]


def random_program(rng: random.Random, length: int) -> list[int]:
    """Straight-line code with forward jumps of one skipped instruction; ends with ebreak.

    x1 = data base, x2 = command port, x3 = address register of the jalr behind it.
    """
    code = [encode("lui", rd=1, uimm=8), encode("lui", rd=2, uimm=PORT >> 12)]
    for r in range(4, 16):
        code.append(encode("addi", rd=r, rs1=0, imm=rng.choice((0, 1, -1, rng.randint(-9, 9)))))
    rows = [r for r in RV32.rows.values() if r.cycle_class != "trap"]
    while len(code) < length:
        row = rng.choice(rows)
        fields = {}
        for f in row.fields:
            if f.name == "rd":
                fields["rd"] = rng.randint(4, 15)
            elif f.name in ("rs1", "rs2"):
                fields[f.name] = rng.randint(0, 15)
            else:
                fields[f.name] = rng.choice(f.values)
        if row.cycle_class in ("load", "store"):
            fields["rs1"] = rng.choice((1, 2)) if row.cycle_class == "store" else 1
            fields["imm"] = 4 * rng.randint(0, 100)
        if row.cycle_class == "jal" or row.cycle_class == "branch":
            fields["offset"] = rng.choice((4, 8))
        if row.cycle_class == "jalr":
            code.append(encode("addi", rd=0, rs1=0, imm=0))  # what a jump before it may skip
            code.append(encode("auipc", rd=3, uimm=0))
            fields.update(rs1=3, imm=rng.choice((8, 12)))
        code.append(encode(row.name, **fields))
    return [*code, encode("addi", rd=0, rs1=0, imm=0), encode("ebreak")]


def durations(lib, programs: int, hold_most: int) -> dict[str, Counter]:
    """Class -> how often each duration was seen (without the cycles a store was held)."""
    rng = random.Random(1)
    seen: dict[str, Counter] = defaultdict(Counter)
    for _ in range(programs):
        code = random_program(rng, 300)
        hold = tuple(rng.randint(0, hold_most) for _ in range(300))
        log, memory = execute(lib, code, 8000, hold)
        marks, stalls = starts(log), 0
        for (t, pc), (after, next_pc) in pairwise(marks):
            row = RV32.find(memory[pc // 4])
            name = row.cycle_class
            if name == "branch":
                taken = next_pc == pc + row.extract(memory[pc // 4])["offset"]
                # offset 4 is ambiguous from outside: skip
                if row.extract(memory[pc // 4])["offset"] == 4:
                    continue
                name += " taken" if taken else " not taken"
            if name == "alu" and row.name.startswith(("sll", "srl", "sra")):
                name = "shift"
            if name in ("div", "mul"):
                name = row.name
            held = sum(c.valid and c.wstrb != 0 and not c.ready for c in log[t:after])
            stalls += held
            seen[name][after - t - held] += 1
    return seen


def store_position(lib) -> list[str]:
    """When a command-port store is visible, relative to the start t of its sw."""
    lines = []
    for n in (0, 1, 2, 7):
        code = [encode("lui", rd=2, uimm=PORT >> 12), encode("addi", rd=5, rs1=0, imm=77),
                encode("sw", rs2=5, rs1=2, imm=64), encode("addi", rd=6, rs1=0, imm=1),
                encode("addi", rd=6, rs1=0, imm=1), encode("ebreak")]
        log, _ = execute(lib, code, hold=(n,))
        t = next(c for c, pc in starts(log) if pc == 8)
        after = next(c for c, pc in starts(log) if pc == 12)
        valid = [c - t for c in range(t, after) if log[c].valid and log[c].wstrb]
        ahead = [c - t for c in range(t, after) if log[c].la_write]
        lines.append(f"held {n}: mem_la_write at t+{ahead}, mem_valid & mem_wstrb at t+{valid}, "
                     f"next instruction at t+{after - t}")
    return lines


def load_position(lib) -> list[str]:
    """When a load's address is visible, and the first start after reset."""
    log, _ = execute(lib, [encode("lw", rd=5, rs1=0, imm=64), encode("ebreak")])
    t = starts(log)[0][0]
    valid = [c - t for c in range(t, len(log)) if log[c].valid and not log[c].instr
             and not log[c].wstrb]
    return [f"lw: mem_valid at t+{valid}; first start {t} cycles after resetn rises"]


def fault_position(lib) -> list[str]:
    """When `trap` rises, relative to the start t of the faulting instruction."""
    cases = {
        "illegal word 0": ([0], 0),
        "ebreak": ([encode("ebreak")], 0),
        "ecall": ([encode("ecall")], 0),
        "lw misaligned": ([encode("lw", rd=5, rs1=0, imm=2)], 0),
        "lh misaligned": ([encode("lh", rd=5, rs1=0, imm=1)], 0),
        "sw misaligned": ([encode("sw", rs2=5, rs1=0, imm=2)], 0),
        "sh misaligned": ([encode("sh", rs2=5, rs1=0, imm=1)], 0),
        "jal to pc+6": ([encode("jal", rd=5, offset=6)], 0),
        "jalr to +2":
            ([encode("addi", rd=7, rs1=0, imm=34), encode("jalr", rd=5, rs1=7, imm=0)], 4),
        "jalr to +1 (bit 0 cleared)":
            ([encode("addi", rd=7, rs1=0, imm=17), encode("jalr", rd=5, rs1=7, imm=0)], 4),
        "beq taken to pc+6": ([encode("beq", rs1=0, rs2=0, offset=6)], 0),
        "bne not taken to pc+6": ([encode("bne", rs1=0, rs2=0, offset=6)], 0),
    }
    lines = []
    for name, (code, pc) in cases.items():
        code = code + [encode("addi", rd=6, rs1=0, imm=1)] * 6 + [encode("ebreak")]
        log, _ = execute(lib, code, 200)
        marks = starts(log)
        t = next(c for c, at in marks if at == pc)
        trap = next((c for c, r in enumerate(log) if r.trap), None)
        later = [(c - t, hex(at)) for c, at in marks if c > t][:2]
        writes = [c - t for c, r in enumerate(log) if r.valid and r.wstrb and c > t]
        fetches = [(c - t, hex(r.addr)) for c, r in enumerate(log)
                   if r.valid and r.instr and c >= t][:3]
        lines.append(f"{name}: trap seen at t+{trap - t if trap is not None else None}; "
                     f"starts after it {later}; data writes at {writes}; fetches {fetches}")
    return lines


def legality(lib, count: int) -> list[str]:
    """Random words: does the core trap exactly where the table knows no instruction?"""
    rng = random.Random(2)
    opcodes = [r.match & 0x7F for r in RV32.rows.values()]
    differ: dict[str, int] = Counter()
    example = {}
    latency = Counter()
    for _ in range(count):
        word = rng.getrandbits(32)
        if rng.random() < 0.9:
            word = word & ~0x7F | rng.choice(opcodes)
        if rng.random() < 0.5:
            word &= 0x01FFFFFF
        if rng.random() < 0.1:
            word &= 0x00007FFF | word & 0xFFF00000
        row = RV32.find(word)
        if row is not None and row.cycle_class in ("jal", "jalr", "branch", "load", "store"):
            continue
        log, _ = execute(lib, [word] + [encode("addi", rd=0, rs1=0, imm=0)] * 20, 120)
        trapped = bool(log[-1].trap) and len(starts(log)) == 1
        wanted = row is None or row.cycle_class == "trap"
        if row is None and trapped:
            latency[len(log) - 1 - starts(log)[0][0]] += 1
        if trapped != wanted:
            kind = f"{'table: ' + row.name if row else 'table: illegal'}, core: " \
                   f"{'trap' if trapped else 'runs on'}, opcode {word & 0x7F:07b}"
            differ[kind] += 1
            example[kind] = f"{word:#010x}"
    lines = [f"illegal words that trapped: trap at t+n {dict(latency)}"]
    return lines + [f"{n} x {kind}, e.g. {example[kind]}" for kind, n in differ.items()]


def main() -> None:
    lib = library()
    print("== cycles per class (duration: times seen) ==")
    for hold in (0, 9):
        for name, count in sorted(durations(lib, 60, hold).items()):
            known = CYCLES.get(name, CYCLES.get("alu" if name == "shift" else
                               "mul" if name.startswith("mul") else "div"))
            flag = "" if set(count) == {known} else "   <-- DIFFERS"
            print(f"hold<= {hold}: {name:18} table {known:3}  measured {dict(count)}{flag}")
    print("== command port store ==", *store_position(lib), *load_position(lib), sep="\n")
    print("== faults ==", *fault_position(lib), sep="\n")
    print("== legality ==", *legality(lib, 6000), sep="\n")


if __name__ == "__main__":
    main()
