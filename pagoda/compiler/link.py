"""Kernels to one program: a dispatcher, the kernels' code, and the call list they run from.

A launch runs a call list that the host writes to DRAM. Its records are fetched one ahead into two
small buffers at the top of SRAM, so neither code size nor launch arguments grow with the calls.

Record (32-bit words, padded to a multiple of 16 words = one DRAM atom):

    word 0    address of the kernel's code in IMEM, 0 = end of the list: exit
    word 1    bytes of the following record
    word 2..  the kernel's argument words (`Kernel.words()`)

Launch arguments: slot of the call list, byte offset of its first record in the slot (a multiple of
64), bytes of that record. The last record is the end record, so nothing is read beyond the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from pagoda.compiler.codegen import I32, VOID, Blob, FunctionEmitter, compile_blob
from pagoda.compiler.errors import CompileError
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.commands import COMMANDS, CONTROL, CONTROL_BANK
from pagoda.isa.memory_map import DMEM, SRAM
from pagoda.isa.numbers import DType
from pagoda.isa.program import LineEntry, Program

MAX_RECORD_BYTES = 512
RECORD_AREA_BYTES = 2 * MAX_RECORD_BYTES  # at the top of SRAM
RECORD_HEADER_WORDS = 2
MAX_ARGUMENT_WORDS = MAX_RECORD_BYTES // 4 - RECORD_HEADER_WORDS
LAUNCH_ARGUMENTS = 3
STACK_BYTES = 512  # of DMEM, beyond the launch arguments, that must exist


def kernel_sram(chip: Chip) -> tuple[int, int]:
    """The SRAM interval kernels may use: all but the record area."""
    return 0, chip.sram_bytes - RECORD_AREA_BYTES


@dataclass(frozen=True)
class LinkedProgram:
    """A program and where its kernels begin: `entries[i]` belongs to the i-th linked kernel."""

    program: Program
    entries: tuple[int, ...]


def dispatcher_llvm(chip: Chip) -> str:
    """LLVM IR of the dispatcher; it never returns, since an end record exits."""
    emitter = FunctionEmitter("dispatcher")
    builder, load = emitter.builder, COMMANDS["load"]
    area = chip.sram_bytes - RECORD_AREA_BYTES
    slot, first_offset, first_bytes = (emitter.word(DMEM.base + 4 * n) for n in range(3))

    def fetch(offset: ir.Value, nbytes: ir.Value, address: ir.Value) -> None:
        values = {
            "slot": slot, "offset": offset, "address": address,
            "cols": builder.lshr(nbytes, ir.Constant(I32, 2)), "rows": 1, "planes": 1,
            "mem_row_stride": 0, "mem_plane_stride": 0, "row_stride": 0, "plane_stride": 0,
        }  # fmt: skip
        for name, value in values.items():
            emitter.port(load.bank, load.by_name[name].word, value)
        for word in {f.word for f in load.fields if f.kind == "pad"}:
            emitter.port(load.bank, word, 0)
        formats = load.by_name["mem"].insert(DType.I32) | load.by_name["local"].insert(DType.I32)
        emitter.port(load.bank, 0, formats)

    entry = builder.block
    fetch(first_offset, first_bytes, ir.Constant(I32, area))
    record = builder.append_basic_block("record")
    call = builder.append_basic_block("call")
    end = builder.append_basic_block("end")
    builder.branch(record)

    builder.position_at_end(record)
    offset, nbytes, here = (builder.phi(I32, name) for name in ("offset", "nbytes", "here"))
    window = builder.add(here, ir.Constant(I32, SRAM.base))
    target = emitter.word(window)
    builder.cbranch(builder.icmp_unsigned("==", target, ir.Constant(I32, 0)), end, call)

    builder.position_at_end(call)
    next_bytes = emitter.word(builder.add(window, ir.Constant(I32, 4)))
    next_offset = builder.add(offset, nbytes)
    there = builder.sub(ir.Constant(I32, 2 * area + MAX_RECORD_BYTES), here)
    fetch(next_offset, next_bytes, there)
    kernel = builder.inttoptr(target, ir.FunctionType(VOID, [I32]).as_pointer())
    builder.call(kernel, [builder.add(window, ir.Constant(I32, 4 * RECORD_HEADER_WORDS))])
    if chip.cores > 1:  # the next kernel may read what another core has written
        emitter.port(CONTROL_BANK, CONTROL["barrier"], 0)
    after = builder.block
    builder.branch(record)
    for phi, first, following in (
        (offset, first_offset, next_offset),
        (nbytes, first_bytes, next_bytes),
        (here, ir.Constant(I32, area), there),
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(following, after)

    builder.position_at_end(end)
    emitter.port(CONTROL_BANK, CONTROL["exit"], 0)
    builder.unreachable()
    return str(emitter.module)


def dispatcher_bytes(chip: Chip) -> int:
    """IMEM that the dispatcher takes; the rest is for kernels."""
    return len(compile_blob(dispatcher_llvm(chip), []).code)


def link(name: str, kernels: Sequence[tuple[str, Blob]], chip: Chip) -> LinkedProgram:
    """One program of (name, code) kernels for a chip.

    Raises CompileError when the code exceeds IMEM.
    """
    dispatcher = compile_blob(dispatcher_llvm(chip), [])
    code = bytearray(dispatcher.code)
    entries: list[int] = []
    lines: list[LineEntry] = [LineEntry(0, "dispatcher", 0, "dispatcher")]
    for kernel_name, blob in kernels:
        entries.append(len(code))
        for offset, place in blob.lines:
            lines.append(LineEntry(len(code) + offset, place.file, place.line, kernel_name))
        code += blob.code
    if len(code) > chip.imem_bytes:
        raise CompileError(
            f"program {name}",
            f"its code fits the {chip.imem_bytes} bytes of IMEM of chip {chip.name}",
            f"{len(kernels)} kernels and the dispatcher take {len(code)} bytes",
            "split the region over several launches",
        )
    if LAUNCH_ARGUMENTS * 4 + STACK_BYTES > chip.dmem_bytes:
        raise CompileError(
            f"program {name}",
            f"its arguments and stack need {LAUNCH_ARGUMENTS * 4 + STACK_BYTES} bytes of DMEM",
            f"chip {chip.name} has {chip.dmem_bytes}",
            "use a chip with more DMEM",
        )
    image = Program(
        name, bytes(code), 0, LAUNCH_ARGUMENTS * 4, tuple(lines), chip=chip
    )
    return LinkedProgram(image, tuple(entries))


@dataclass(frozen=True)
class TensorArgument:
    """Where a tensor is and how it is laid out: sizes in elements, strides in bytes."""

    slot: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def argument_words(
    kernel: Kernel, arguments: Mapping[str, TensorArgument | int]
) -> tuple[int, ...]:
    """A call's argument words; scalars are ints (a float32 as its bits).

    Raises CompileError for a missing argument and for a size or stride that differs from the one
    the kernel was compiled for.
    """
    for tensor in kernel.tensors:
        given = arguments.get(tensor.name)
        if not isinstance(given, TensorArgument) or len(given.sizes) != tensor.rank:
            raise CompileError(
                f"call of {kernel.name}", f"{tensor.name} is a tensor of rank {tensor.rank}",
                f"the argument is {given!r}", "pass a TensorArgument of that rank",
            )  # fmt: skip
        for what, fixed, found in (
            ("sizes", tensor.sizes, given.sizes), ("strides", tensor.strides, given.strides),
        ):  # fmt: skip
            matters = [what == "sizes" or _stride_matters(given, d) for d in range(tensor.rank)]
            checked = zip(fixed, found, matters, strict=True)
            if any(f is not None and f != g for f, g, matter in checked if matter):
                raise CompileError(
                    f"call of {kernel.name}", f"{tensor.name} has the {what} {fixed}",
                    f"the argument has {found}", "compile the kernel for this layout",
                )  # fmt: skip
    words = []
    for name, what, dim in kernel.words():
        given = arguments.get(name)
        if what == "scalar":
            if not isinstance(given, int):
                raise CompileError(
                    f"call of {kernel.name}", f"{name} is a scalar", f"the argument is {given!r}",
                    "pass an int",
                )  # fmt: skip
            words.append(given)
        elif what in ("slot", "offset"):
            words.append(getattr(given, what))
        else:
            words.append(getattr(given, f"{what}s")[dim])
    return tuple(words)


def _stride_matters(tensor: TensorArgument, dim: int) -> bool:
    """Does any access use the stride? Not along one element, nor in an empty tensor."""
    return tensor.sizes[dim] > 1 and 0 not in tensor.sizes


def record_bytes(arguments: int) -> int:
    """Bytes of a record with that many argument words."""
    nbytes = 4 * (RECORD_HEADER_WORDS + arguments)
    return -(-nbytes // DRAM_ATOM_BYTES) * DRAM_ATOM_BYTES


def pack_records(calls: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
    """The call list as uint32 words: calls are (kernel entry address, argument words).

    Argument words may be signed or unsigned 32-bit integers. The end record is appended; the
    launch arguments are (slot, offset of the list, `record_bytes(len(first call's arguments))`).
    Raises CompileError for a call with more than MAX_ARGUMENT_WORDS arguments.
    """
    for entry, arguments in calls:
        if len(arguments) > MAX_ARGUMENT_WORDS:
            raise CompileError(
                f"call of the kernel at {entry:#x}",
                f"a call has at most {MAX_ARGUMENT_WORDS} argument words",
                f"it has {len(arguments)}",
                "fix sizes or strides at compile time, or split the kernel",
            )
    sizes = [record_bytes(len(arguments)) for _, arguments in calls] + [record_bytes(0)]
    words = np.zeros(sum(sizes) // 4, np.uint32)
    position = 0
    for (entry, arguments), size, following in zip(calls, sizes, sizes[1:], strict=False):
        words[position : position + 2] = entry, following
        values = np.array([a & 0xFFFFFFFF for a in arguments], np.uint32)
        first = position + RECORD_HEADER_WORDS
        words[first : first + len(values)] = values
        position += size // 4
    return words


def launch_arguments(
    slot: int, offset: int, calls: Sequence[tuple[int, Sequence[int]]]
) -> tuple[int, int, int]:
    """The launch arguments that run a packed call list stored at a slot's byte offset."""
    first = len(calls[0][1]) if calls else 0
    return slot, offset, record_bytes(first)


def argument_positions(counts: Sequence[int]) -> list[int]:
    """Word index of each call's first argument in the packed list; counts: words per call."""
    positions, record = [], 0
    for count in counts:
        positions.append(record + RECORD_HEADER_WORDS)
        record += record_bytes(count) // 4
    return positions
