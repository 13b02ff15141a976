"""The ISA manual, generated from the tables: `python -m pagoda.isa.manual` writes docs/isa.md."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from types import ModuleType

from pagoda.isa import accumulation, checks, memory_map, numbers, tables, timing, window
from pagoda.isa.chip import DRAM_ATOM_BYTES, PRESETS, SLOTS
from pagoda.isa.commands import ACC_BIT, COMMANDS, CONTROL, KINDS, Command
from pagoda.isa.fault import FaultKind
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.machine import CAUSES
from pagoda.isa.meaning import MEANINGS
from pagoda.isa.numbers import DType
from pagoda.isa.program import CONTRACT_VERSION
from pagoda.isa.rv32 import CYCLES, RV32
from pagoda.isa.timing_examples import EXAMPLES

PATH = Path(__file__).parents[2] / "docs" / "isa.md"

FORMULAS = {  # command -> the function of `timing` that gives its duration
    "load": timing.load,
    "store": timing.store,
    "gather": timing.load,
    "scatter": timing.store,
    "matmul": timing.matmul,
    "vector": timing.vector,
    "reduce": timing.reduce_rows,
    "finish": timing.finish,
    "transpose": timing.transpose,
    "iota": timing.iota,
}


def manual() -> str:
    """The whole manual as Markdown."""
    parts = [
        f"# The Pagoda instruction set, version {CONTRACT_VERSION}",
        (
            "Generated from the tables in `pagoda/isa/` by `python -m pagoda.isa.manual`; do not "
            "edit. The definition (`pagoda/isa/definition.py`) is what these words describe."
        ),
        *_chip(),
        *_memory(),
        *_launch(),
        *_control_core(),
        *_commands(),
        *_vector_functions(),
        *_checks(),
        *_durations(),
        *_window(),
        *_numbers(),
        *_faults(),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: str, rows: Iterable[Iterable[object]]) -> str:
    titles = [title.strip() for title in header.split("|")]
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _documentation(thing: Callable | ModuleType) -> str:
    return inspect.getdoc(thing) or ""


def _body(module: ModuleType) -> str:
    """A module's docstring without its first paragraph."""
    return _documentation(module).partition("\n\n")[2]


def _chip() -> list[str]:
    names = [field.name for field in fields(next(iter(PRESETS.values())))][1:]
    chips = PRESETS.values()
    shown = [[name, *(_value(getattr(chip, name)) for chip in chips)] for name in names]
    derived = ("port_bytes", "psum_latency", "dram_share", "macs_per_cycle")
    shown += [[f"{name} (derived)", *(_value(getattr(c, name)) for c in chips)] for name in derived]
    return [
        "## Chip parameters",
        (
            "A chip is a set of these parameters; the presets are fixed. Every core owns an equal "
            "share of the DRAM turns (`dram_share` bytes a cycle), whatever the other cores do."
        ),
        _table("parameter | " + " | ".join(PRESETS), shown),
    ]


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _memory() -> list[str]:
    return [
        "## Memory map of the control core",
        "```\n" + textwrap.dedent(_documentation(memory_map).split("\n\n")[1]) + "\n```",
        _table(
            "region | base | permits | what it is",
            [
                (
                    region.name, f"`{region.base:#010x}`",
                    " and ".join(flag.name.lower() for flag in region.permissions)
                    + (" of words" if region.words_only else ""),
                    region.description,
                )
                for region in memory_map.REGIONS
            ],
        ),
        "## Local memories and DRAM",
        (f"Commands name local bytes by address; bit 31 (`{ACC_BIT:#x}`) chooses ACC, otherwise "
        "SRAM. ACC holds only 32-bit elements. Memory is divided into equal banks (byte address / "
        "bank bytes), each with one read port and one write port. What was never written reads 0."),
        (f"DRAM is named by slot and byte offset. A launch has up to {SLOTS} slots: a base (a "
        f"multiple of {DRAM_ATOM_BYTES}), a size below 2^32, permission to read and to write."),
    ]  # fmt: skip


def _launch() -> list[str]:
    return [
        "## Launch",
        (
            "Cycle 0 accepts the launch. Code is copied to IMEM unless the same image is there "
            f"already, {timing.CODE_BYTES_PER_CYCLE} bytes a cycle; arguments to DMEM offset 0, "
            "one word a cycle: the first instruction of every core starts in cycle\n\n"
            "    launch_cycles + (0 if resident else ceil(code bytes / 16)) + argument words\n\n"
            "with the pc at the program's entry, x2 at the end of DMEM and every other register 0. "
            "SRAM, ACC, DMEM and command fields keep their contents from launch to launch. The "
            "launch ends in the cycle in which the last core exits, or with a fault."
        ),
    ]


def _control_core() -> list[str]:
    return [
        "## Control core: RV32IM",
        (
            "In order. An instruction that starts in cycle t is followed by the next one in cycle "
            "t + cycles:"
        ),
        _table("class | cycles", CYCLES.items()),
        _table(
            "instruction | encoding, bit 31 first | class | meaning",
            [
                (f"`{row.assembly}`", f"`{row.layout}`", row.cycle_class, row.summary)
                for row in RV32.rows.values()
            ],
        ),
    ]


def _commands() -> list[str]:
    port = memory_map.COMMAND_PORT.base
    control = "\n".join(f"- word {word}: `{name}`" for name, word in CONTROL.items())
    return [
        "## Commands",
        (
            f"Word w of bank k is at `{port:#x} + 64 * k + 4 * w`. A store to a word other than 0 "
            "sets fields, which keep their values, and takes 5 cycles. A store to word 0 of banks "
            "1 to 10 (go) issues the bank's command. It acts in cycle e = t + "
            f"{timing.STORE_EFFECT} or, if the window is full, in the first cycle in which a "
            "command has finished: then the command is checked, executed (values are those of "
            "sequential execution) and enters the window, and the next instruction starts in e + "
            "1. Bits without a field must be 0."
        ),
        (
            f"A `lw` from SRAM that starts in t takes the word in max(t + {timing.LOAD_EFFECT}, "
            "finish of every older command in flight whose written hull holds a byte of it); the "
            f"next instruction starts {timing.LOAD_CYCLES - timing.LOAD_EFFECT} cycles later."
        ),
        "### Bank 0: control\n\n" + control,
        (
            "`fence`, `barrier` and `exit` are through in cycle max(t + 5, last finish + 1): there "
            "the next instruction starts, the core has arrived, or the core is done. All cores "
            f"leave a barrier {timing.BARRIER_CYCLES} cycles after the last arrival. `trap` is a "
            "fault in t + 4. Values stored to the other three are ignored."
        ),
        _table("kind of field | meaning", KINDS.items()),
        _table("element format | code | bits", [(d.name, int(d), d.bits) for d in DType]),
        *(_command(command) for command in COMMANDS.values()),
    ]


def _command(command: Command) -> str:
    rows = []
    for field in command.fields:
        high = field.low + field.width - 1
        bits = f"{high}:{field.low}" if field.width > 1 else f"{high}"
        rows.append((field.word, bits, f"`{field.name}`", field.kind, field.text))
    return "\n\n".join(
        [
            f"### Bank {command.bank}: {command.name} (engine: {command.engine})",
            _documentation(MEANINGS[command.name]),
            _table("word | bits | field | kind | text", rows),
        ]
    )


def _vector_functions() -> list[str]:
    rows = [
        (f.code, f"`{f.name}`", f.operands, f.cost, f.latency, f.text)
        for f in VECTOR_FUNCTIONS.values()
    ]
    return [
        "### Vector functions",
        (
            "x, y are a, b for f1, and f1's result, c for f2. Operands that neither function reads "
            "are not accessed and not checked."
        ),
        _table("code | name | operands | cost | latency | result", rows),
    ]


def _checks() -> list[str]:
    return ["## Checks", _body(checks)]


def _durations() -> list[str]:
    parts = ["## Durations", _documentation(timing)]
    parts.append(
        "DMA: b = `dram_share`; X = 64 / b; atom slot j opens in cycle ceil(j * X), so where X < 1 "
        "several slots share a cycle. A load that starts in s takes slots from the first that "
        "opens in s or later, a store from the first that opens in s + lead or later, when its "
        "first atom has been read: say port(j0). Occupancy = port(j0) - s + the first number "
        "below; a load without atoms (all padding) waits for no slot."
    )
    parts.append(
        "The atoms of a DRAM row are the aligned 64-byte atoms it touches. Rows whose stride "
        "equals their length count as one, then planes likewise, in DRAM and locally, each by its "
        "own strides; rows of gather and scatter do not. Local cycles = local rows * ceil(bytes "
        "of a row / P). A load with any padding merges no local rows: `local` are the cycles of "
        "the rows that are read, padded columns included, `padding` those of the rows that are "
        "not, and `right` = ceil(bytes of the columns padded after / P)."
    )
    parts.append(
        "The DRAM port serves its requests in order, and what has left one core's port is seen by "
        "every later request of any core: a load that starts when a store has finished reads what "
        "it stored, although the store's tail holds no dram_latency. `dram_latency` is the time "
        "from a load's slot to its data. Other formulas are the Python below; an empty command "
        "has occupancy 1 and tail 0."
    )
    helpers = (timing.dma_cycles, timing.store_lead)
    others = (timing.reduce_columns, timing.dram_slot_cycle, timing.ceil_div)
    formulas = dict.fromkeys([*helpers, *FORMULAS.values(), *others])
    code = "\n\n".join(inspect.getsource(formula).rstrip() for formula in formulas)
    parts.append(f"```python\n{code}\n```")
    rows = [
        (
            example.chip, f"`{example.function}`",
            ", ".join(f"{name} = {value}" for name, value in example.arguments.items()),
            example.working,
            _value(example.result),
        )
        for example in EXAMPLES
    ]  # fmt: skip
    parts.append("Worked by hand; of commands the result is occupancy, tail:")
    parts.append(_table("chip | formula | arguments | working | result", rows))
    return parts


def _window() -> list[str]:
    causes = "; ".join(f"{code} {cause}" for code, cause in enumerate(CAUSES))
    return [
        "## The window rule",
        _documentation(window),
        (
            "An operand's range is its hull, from its first byte to its last. A matmul holds the "
            "read port of its ACC banks too, since partial sums pass through them. The indices of "
            "gather and scatter are read before entry: the control core waits for their older "
            "writers, then ceil(rows / L) + 4 cycles; only then the indices are checked and the "
            "command enters. They are read again, beside the bank ports, while the command runs, "
            "so the index tile is one of its ranges but holds no port."
        ),
        f"A trace names why a command started no earlier than it did: {causes}.",
    ]


def _numbers() -> list[str]:
    return [
        "## Numbers",
        _body(numbers),
        "Memory to lanes:\n\n" + _documentation(numbers.decode).partition("\n\n")[2],
        "Lanes to memory:\n\n" + _documentation(numbers.encode).partition("\n\n")[2],
        "### Order of additions",
        _body(accumulation),
        _documentation(accumulation.finish),
        "### Table functions",
        _documentation(tables),
    ]


def _faults() -> list[str]:
    return [
        "## Faults",
        (
            "What faults changes nothing. A fault of an instruction has the cycle in which it "
            "starts; one of a command the cycle in which the command would enter (of a gather or "
            "scatter: t + 4, or the cycle in which the indices were read). An instruction whose "
            "start or effect would lie beyond the launch's watchdog does not happen: WATCHDOG, in "
            "that very cycle. Of several cores' faults the earliest cycle wins, then the lowest "
            "core."
        ),
        _table(
            "code | fault | meaning",
            [(int(kind), kind.name, kind.meaning) for kind in FaultKind],
        ),
    ]


def main() -> None:
    """Write docs/isa.md."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(manual())
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
