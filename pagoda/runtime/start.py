"""The first launch of a device, apart from a user's own."""

from pagoda.compiler.link import launch_arguments, link, pack_records
from pagoda.isa.program import Slot
from pagoda.runtime.device import Device


def run_nothing(device: Device) -> None:
    """A launch without kernel calls: the first time ever the simulator's own code is compiled here,
    and not while the user waits for a first word."""
    words = pack_records([])
    address = device.place(words)
    program = link("start", [], device.chip).program
    device.launch(program, launch_arguments(0, 0, []), [Slot(address, words.nbytes)])
    device.memory.free(address)
