"""What every machine refuses, in the same words: access outside of DRAM, launches it cannot run."""

from dataclasses import replace

import pytest

from pagoda.isa.chip import MIB, PRESETS
from pagoda.isa.definition import Definition
from pagoda.isa.program import Launch, Program, Slot
from pagoda.sim import Simulator

TINY = replace(PRESETS["tiny"], dram_bytes=MIB)
PROGRAM = Program("sum", bytes(64))
FASTER = replace(TINY, name="faster", clock_hz=2, dram_latency=9, launch_cycles=5, window=4)
WIDER = replace(TINY, name="wider", lanes=8)

REFUSED = {
    "contract version 7: chip tiny follows version 2; build the program again with this Pagoda":
        Launch(replace(PROGRAM, contract_version=7)),
    "built for chip wider with lanes = 8: chip tiny has 4; build the program for this chip":
        Launch(replace(PROGRAM, chip=WIDER)),
    "20000 bytes of code: chip tiny has room for 16384; split the program or choose a larger chip":
        Launch(Program("sum", bytes(20000))),
    "4100 bytes of arguments: chip tiny has room for 4096; split the program or choose a larger "
    "chip":
        Launch(PROGRAM, args=(0,) * 1025),
    "1048640 as end of a slot: chip tiny has room for 1048576; split the program or choose a "
    "larger chip":
        Launch(PROGRAM, slots=(Slot(64, MIB),)),
}  # fmt: skip


@pytest.fixture(params=[Definition, Simulator])
def machine(request):
    return request.param(TINY)


@pytest.mark.parametrize("message", REFUSED)
def test_launches_it_cannot_run(machine, message):
    with pytest.raises(ValueError) as raised:
        machine.start(REFUSED[message])
    assert str(raised.value) == f"launch of 'sum': {message}"
    with pytest.raises(ValueError) as raised:  # nothing was accepted
        machine.wait()
    assert str(raised.value) == "wait: no launch was started; call start first"


def test_one_launch_at_a_time(machine):
    machine.start(Launch(replace(PROGRAM, chip=FASTER)))  # the code fits, only times differ
    with pytest.raises(ValueError) as raised:
        machine.start(Launch(PROGRAM))
    assert str(raised.value) == "launch of 'sum': the last one is unfinished; wait first"


@pytest.mark.parametrize(("address", "nbytes"), [(MIB - 4, 8), (-4, 4), (8, -4), (MIB, 1)])
def test_dram_has_an_end(machine, address, nbytes):
    with pytest.raises(ValueError) as raised:
        machine.read(address, nbytes)
    assert str(raised.value) == (
        f"DRAM: {nbytes} bytes at {address:#x}: chip tiny has 1048576 bytes; stay below that"
    )


def test_writing_beyond_the_end_changes_nothing(machine):
    with pytest.raises(ValueError):
        machine.write(MIB - 2, b"1234")
    assert machine.read(MIB - 2, 2) == bytes(2)
    machine.write(MIB - 2, b"12")
    assert machine.read(MIB - 2, 2) == b"12"
