"""What one context leaves behind is never readable by the next: a marker in every byte."""

from __future__ import annotations

import numpy as np
import pytest
from residue import MARK, look, look_at_field
from service_support import TINY, close, eventually, figures, kill, run_python, serving, shared

from pagoda.isa.commands import COMMANDS
from pagoda.runtime import Device

FIELDS = [(command, word) for command in COMMANDS.values() for word in command.words[1:]]
MIB = 1 << 20
# What a service would be whose machines hand on what the last one had.
LEAKY = """
from pagoda.sim import Simulator
from pagoda.sim import layout as at
first = []
def leaky(chip, dram):
    machine = Simulator(chip, dram=dram)
    for mine, left in zip(machine._cores, first[0]._cores if first else (), strict=False):
        mine.sram[:], mine.acc[:], mine.dmem[:] = left.sram, left.acc, left.dmem
        mine.state[at.FIELDS : at.SLOTS] = left.state[at.FIELDS : at.SLOTS]
    first.append(machine)
    return machine
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "device.sock"
    with serving(path):
        yield path


@pytest.fixture(scope="module")
def expected():
    """What there is to see on a device that nobody has used."""
    seen = dict(look(Device(TINY)))
    return seen | {(c.name, word): look_at_field(Device(TINY), c, word) for c, word in FIELDS}


KILLED = "time.sleep(60)"


def mark(path, end: str) -> None:
    """A process that fills everything with the marker and ends, by itself or by kill -9."""
    code = f"""
import os, time
from service_support import *
from residue import leave_marks
d = shared(Path({str(path)!r}))
leave_marks(d)
print("marked", flush=True)
{end}
"""
    process = run_python(code)
    assert process.stdout.readline() == "marked\n"
    if end != KILLED:
        process.wait(20)
    kill(process)
    eventually(lambda: not figures(path)["memory_bytes"])


def seen(path, fields=FIELDS) -> dict:
    """The same as `expected`, on a service: each field in a context of its own."""
    found = {}
    opened = shared(path)
    found |= dict(look(opened))
    close(opened)
    for command, word in fields:
        opened = shared(path)
        found[command.name, word] = look_at_field(opened, command, word)
        close(opened)
    return found


@pytest.mark.parametrize("end", ["close(d)", KILLED, "os._exit(1)"])
def test_nothing_is_left(path, expected, end):
    mark(path, end)
    assert seen(path) == expected
    assert expected["DRAM"] == b"\0"
    assert not any(bytes([MARK] * 4) in text for text in expected.values())


def test_a_leak_would_be_seen(tmp_path, expected):
    path = tmp_path / "s"
    with serving(path, options="machine=leaky", before=LEAKY):
        mark(path, KILLED)
        found = seen(path)
    same = {name for name in expected if found[name] == expected[name]}
    # What LEAKY does not hand on; all else is noticed, each field by itself.
    assert same == {"DRAM", "IMEM"}
    assert all(bytes([MARK] * 4) in found[name] for name in ("SRAM", "ACC", "DMEM"))


def test_what_a_context_gives_back_it_gets_as_zeros(path):
    opened = shared(path)
    machine, rng = opened.machine, np.random.default_rng(0)
    held = [machine.grant(int(n) * 2 * MIB, []) for n in rng.integers(1, 6, 20)]
    for _ in range(5):
        for start, nbytes in held:
            assert not machine.dram[start : start + nbytes].any()
            machine.dram[start : start + nbytes] = MARK
        given = [held.pop(int(rng.integers(len(held)))) for _ in range(10)]
        assert machine.release([list(pair) for pair in given[:5]])
        fresh = [machine.grant(given[5][1], [list(pair) for pair in given[5:]])]
        fresh += [machine.grant(int(n) * 2 * MIB, []) for n in rng.integers(1, 6, 9)]
        for start, nbytes in held:
            assert (machine.dram[start : start + nbytes] == MARK).all()
            machine.dram[start : start + nbytes] = 0
        held += fresh
    close(opened)
