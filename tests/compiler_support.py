"""Runs tile IR kernels on a machine: arrays in, arrays and cycles out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.link import (
    TensorArgument,
    argument_words,
    launch_arguments,
    link,
    pack_records,
)
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import Chip
from pagoda.isa.definition import Definition
from pagoda.isa.machine import Machine, Result
from pagoda.isa.program import Launch, Slot

bfloat16 = np.dtype(ml_dtypes.bfloat16)
Call = tuple[Kernel, Mapping[str, object]]


def run_calls(
    chip: Chip, calls: Sequence[Call], *, machine: Machine | None = None, checking: bool = True
) -> Result:
    """Runs kernels in one launch; arguments are arrays (any strides, changed in place) or ints.

    Equal arrays (by identity of the memory they view) share one slot. Fails on a fault.
    """
    machine = machine or Definition(chip, checking=checking, trace=True)
    bases: dict[int, tuple[int, np.ndarray, int]] = {}  # id of the owner -> slot, owner, address
    slots: list[Slot] = []
    top = 0

    def place(nbytes: int) -> tuple[int, int]:
        nonlocal top
        address, top = top, top + -(-nbytes // 64) * 64
        slots.append(Slot(address, nbytes))
        return len(slots) - 1, address

    def tensor(array: np.ndarray) -> TensorArgument:
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if id(owner) not in bases:
            slot, address = place(max(owner.nbytes, 1))
            machine.write(address, owner.tobytes(order="A"))
            bases[id(owner)] = slot, owner, address
        first = owner.__array_interface__["data"][0]
        offset = array.__array_interface__["data"][0] - first
        return TensorArgument(bases[id(owner)][0], offset, array.shape, array.strides)

    kernels = {id(kernel): kernel for kernel, _ in calls}
    blobs = [(k.name, compile_kernel(k, chip).blob()) for k in kernels.values()]
    linked = link("test", blobs, chip)
    entry = dict(zip(kernels, linked.entries, strict=True))
    records = []
    for kernel, arguments in calls:
        given = {n: tensor(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
        records.append((entry[id(kernel)], argument_words(kernel, given)))
    words = pack_records(records)
    slot, address = place(words.nbytes)
    machine.write(address, words.tobytes())
    launch = Launch(linked.program, launch_arguments(slot, 0, records), tuple(slots))
    machine.start(launch)
    result = machine.wait()
    fault = result.fault
    assert fault is None, f"{fault.describe()} at {linked.program.line_at(fault.pc)}"
    for _, owner, address in bases.values():
        data = np.frombuffer(machine.read(address, owner.nbytes), owner.dtype)
        order = "F" if owner.flags.f_contiguous and not owner.flags.c_contiguous else "C"
        owner[...] = data.reshape(owner.shape, order=order)
    return result


def run_kernel(
    chip: Chip, kernel: Kernel, machine: Machine | None = None, **arguments: object
) -> Result:
    """One call in one launch."""
    return run_calls(chip, [(kernel, arguments)], machine=machine)
