"""What a command may not do, in the order in which it is checked.

1. reserved bits, codes, element formats: BAD_FIELD; a command with an empty extent stops here
2. addresses, offsets and strides are multiples of the element size: MISALIGNED
3. counts, pads, destination rows that would overlap: BAD_FIELD
4. the slot exists: BAD_SLOT; permits the access: NO_PERMISSION; holds the bytes: OUT_OF_SLOT
5. operands lie inside SRAM and ACC: LOCAL_OUT_OF_RANGE; ACC holds only 32-bit elements and no
   indices: BAD_FIELD
6. no source overlaps the destination, but for element-by-element work in place: BAD_FIELD
7. (gather and scatter, once the indices are read) every row lies in the slot: GATHER_INDEX

Everything is checked when the command enters the window, before it changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pagoda.isa.access import ACC, SPACES, SRAM, Access, DramRows, Fields, Loops, access, is_empty
from pagoda.isa.accumulation import LANES, ReduceOp
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COUNT_LIMIT, MATRIX_TYPES, SCALAR, Command
from pagoda.isa.commands import disassemble as command_text
from pagoda.isa.fault import FaultKind, FaultRaised
from pagoda.isa.functions import (
    FMA,
    FMUL,
    ONLY_FIRST,
    ONLY_SECOND,
    SELECT,
    VECTOR_FUNCTIONS,
    vector_operands,
)
from pagoda.isa.numbers import DType
from pagoda.isa.program import Slot

START_LIMIT = 1 << 30  # the largest column number that a row reduction starts at
LOCAL_FLOATS = (DType.F32, DType.BF16)
LOCAL_INTS = (DType.I32, DType.I8)
LOCAL_DTYPES = LOCAL_FLOATS + LOCAL_INTS


def check(
    chip: Chip, command: Command, words: Sequence[int], slots: Sequence[Slot]
) -> Access | None:
    """Steps 1 to 6 for a bank's 16 registers; what the command touches, or None if it is empty.

    Raises FaultRaised with the first rule broken.
    """
    f = {field.name: field.extract(words[field.word]) for field in command.fields}
    for word, bits in command.reserved.items():
        if words[word] & bits:
            _bad(command.name, f"word {word} = {words[word]:#010x} has reserved bits set")
    _CODES[command.name](chip, command.name, f)
    if is_empty(command.name, f):
        return None
    return _check_access(chip, command, f, slots)


def _check_access(chip: Chip, command: Command, f: Fields, slots: Sequence[Slot]) -> Access:
    touched = access(command.name, f)
    for name, unit in touched.alignment.items():
        if f[name] % unit:
            shown = command_text(command.name, {name: f[name]})
            raise FaultRaised(FaultKind.MISALIGNED, f"{shown}: must be a multiple of {unit}")
    _check_counts(command, f)
    for tile in touched.tiles:
        if tile.writes:
            _check_destination(command.name, tile.name, tile.loops, tile.row_bytes)
    if command.name == "store":
        loops = tuple((count, abs(stride)) for count, stride in touched.dram.loops)
        _check_destination(command.name, "slot", loops, touched.dram.row_bytes)
    if "slot" in f:
        _check_slot(f, touched, slots)
    _check_local(chip, touched)
    _check_overlap(touched)
    return touched


def _bad(name: str, problem: str) -> None:
    raise FaultRaised(FaultKind.BAD_FIELD, f"{name}: {problem}")


# Step 1: codes and element formats. ---------------------------------------------------------------


def _transfer_codes(chip: Chip, name: str, f: Fields) -> None:
    if f["mem"] not in list(DType) or f["local"] not in LOCAL_DTYPES:
        _bad(name, f"element formats {f['mem']} and {f['local']}: must be codes of both memories")
    mem, local = DType(f["mem"]), DType(f["local"])
    if mem.is_float != local.is_float:
        _bad(name, f"{mem.name} and {local.name}: must both be floats or both integers")
    if f.get("accumulate") and mem not in (DType.F32, DType.BF16, DType.I32):
        _bad(name, f"accumulate into {mem.name}: must be F32, BF16 or I32")


def _matmul_codes(chip: Chip, name: str, f: Fields) -> None:
    types = dict(enumerate(MATRIX_TYPES))
    if types.get(f["type"]) not in chip.matrix_types:
        _bad(name, f"type {f['type']}: the chip multiplies {', '.join(chip.matrix_types)}")


def _vector_codes(chip: Chip, name: str, f: Fields) -> None:
    f1, f2 = f["f1"], f["f2"]
    for code in (f1, f2):
        if code not in VECTOR_FUNCTIONS:
            _bad(name, f"function {code}: no such function")
    if f1 in ONLY_SECOND or f2 in ONLY_FIRST:
        _bad(name, f"functions {f1}, {f2}: fma and faddq are no f1, i2fmul is no f2")
    if (f2 == FMA and f1 != FMUL) or (f1 == SELECT) != (f2 == SELECT):
        _bad(name, f"functions {f1}, {f2}: fma follows fmul, select stands in both places")
    for operand in vector_operands(f1, f2):
        if f[f"{operand}_kind"] > SCALAR:
            _bad(name, f"{operand}_kind = {f[f'{operand}_kind']}: must be 0, 1 or 2")
        _local_dtype(name, f"{operand}_dtype", f[f"{operand}_dtype"], LOCAL_DTYPES)
    _local_dtype(name, "dst_dtype", f["dst_dtype"], LOCAL_DTYPES)


def _reduce_codes(chip: Chip, name: str, f: Fields) -> None:
    op = _operator(name, f)
    integer = op in (ReduceOp.ISUM, ReduceOp.IMAX)
    _local_dtype(name, "dtype", f["dtype"], LOCAL_INTS if integer else LOCAL_FLOATS)
    if op is ReduceOp.ARGMAX and f["column"]:
        _bad(name, "argmax along columns: only rows have an argmax")


def _finish_codes(chip: Chip, name: str, f: Fields) -> None:
    op = _operator(name, f)
    if op is ReduceOp.ARGMAX:
        allowed: tuple[DType, ...] = (DType.I32,)
    else:
        allowed = LOCAL_INTS if op in (ReduceOp.ISUM, ReduceOp.IMAX) else LOCAL_FLOATS
    _local_dtype(name, "dtype", f["dtype"], allowed)


def _transpose_codes(chip: Chip, name: str, f: Fields) -> None:
    _local_dtype(name, "dtype", f["dtype"], LOCAL_DTYPES)


def _no_codes(chip: Chip, name: str, f: Fields) -> None:
    """A command whose fields are all numbers."""


def _operator(name: str, f: Fields) -> ReduceOp:
    if f["op"] not in list(ReduceOp):
        _bad(name, f"op = {f['op']}: no such operator")
    return ReduceOp(f["op"])


def _local_dtype(name: str, field: str, code: int, allowed: tuple[DType, ...]) -> None:
    if code not in allowed:
        _bad(name, f"{field} = {code}: must be one of {', '.join(d.name for d in allowed)}")


_CODES: dict[str, Callable[[Chip, str, Fields], None]] = {
    "load": _transfer_codes,
    "store": _transfer_codes,
    "gather": _transfer_codes,
    "scatter": _transfer_codes,
    "matmul": _matmul_codes,
    "vector": _vector_codes,
    "reduce": _reduce_codes,
    "finish": _finish_codes,
    "transpose": _transpose_codes,
    "iota": _no_codes,
}


# Step 3: counts and the shape of destinations. ----------------------------------------------------


def _check_counts(command: Command, f: Fields) -> None:
    name = command.name
    counts = {field.name: f[field.name] for field in command.fields if field.kind == "count"}
    if name == "reduce":
        del counts["start"]  # a column number, not an extent
    if name == "matmul":
        counts |= {"m0 * m1 * m2": f["m0"] * f["m1"] * f["m2"]}
        counts |= {"k_outer * k_inner": f["k_outer"] * f["k_inner"]}
    if "planes" in f:
        counts |= {"planes * rows": f["planes"] * f["rows"]}
    for count, value in counts.items():
        if value > COUNT_LIMIT:
            _bad(name, f"{count} = {value}: must be at most {COUNT_LIMIT}")
    if f.get("transpose_a") and (f["m1"], f["m2"], f["k_outer"]) != (1, 1, 1):
        _bad(name, "transpose_a: m1, m2 and k_outer must be 1")
    if name == "reduce" and not f["column"] and (f["start"] % LANES or f["start"] > START_LIMIT):
        _bad(name, f"start = {f['start']}: must be a multiple of {LANES} up to {START_LIMIT}")
    _check_pads(name, f)


def _check_pads(name: str, f: Fields) -> None:
    pads = {"rows": ("pad_above", "pad_below"), "cols": ("pad_left", "pad_right")}
    padding = {extent: sum(f.get(pad, 0) for pad in pair) for extent, pair in pads.items()}
    for extent, total in padding.items():
        if total > f.get(extent, total):
            _bad(name, f"{total} padding {extent} of {f[extent]}: more than there are")
    if f.get("mem") == DType.I4 and (f["cols"] % 2 or padding["cols"] % 2):
        _bad(name, f"{f['cols']} I4 elements, {padding['cols']} of them padding: must be even")


def _check_destination(name: str, operand: str, loops: Loops, row_bytes: int) -> None:
    """Rows must lie apart: from the smallest stride to the largest, each reaches over what the
    smaller ones cover. So planes may interleave with rows, as heads do in [token, head, element].
    """
    extent = row_bytes
    for count, stride in sorted((loop for loop in loops if loop[0] > 1), key=lambda loop: loop[1]):
        if stride < extent:
            _bad(name, f"{operand}: stride {stride} is less than the {extent} bytes of a row")
        extent += (count - 1) * stride


# Steps 4 to 6: bounds and overlap. ----------------------------------------------------------------


def _check_slot(f: Fields, touched: Access, slots: Sequence[Slot]) -> None:
    slot, offset = f["slot"], f["offset"]
    place = {"slot": slot, "offset": offset}
    if slot >= len(slots):
        detail = f"{touched.command}: slot {slot}; the launch has {len(slots)}"
        raise FaultRaised(FaultKind.BAD_SLOT, detail, **place)
    reads = touched.command in ("load", "gather") or f["accumulate"]
    writes = touched.command in ("store", "scatter")
    if (reads and not slots[slot].readable) or (writes and not slots[slot].writable):
        detail = f"{touched.command}: slot {slot} permits no such access"
        raise FaultRaised(FaultKind.NO_PERMISSION, detail, **place)
    if touched.dram is None or touched.indices is not None:
        return
    first, last = touched.dram.hull()
    if first < 0 or last >= slots[slot].size:
        detail = (
            f"{touched.command}: bytes {first} to {last} of slot {slot}, "
            f"which has {slots[slot].size}"
        )
        raise FaultRaised(FaultKind.OUT_OF_SLOT, detail, **place)


def _check_local(chip: Chip, touched: Access) -> None:
    size = {SRAM: chip.sram_bytes, ACC: chip.acc_bytes}
    tiles = touched.tiles if touched.indices is None else (*touched.tiles, touched.indices)
    for tile in tiles:
        if tile.hull.last >= size[tile.space]:
            detail = (
                f"{touched.command}: {tile.name}: bytes {tile.hull.first} to {tile.hull.last} "
                f"of {SPACES[tile.space]}, which has {size[tile.space]}"
            )
            raise FaultRaised(FaultKind.LOCAL_OUT_OF_RANGE, detail)
    for tile in tiles:
        if tile.space == ACC and (tile.dtype.bits != 32 or tile is touched.indices):
            _bad(touched.command, f"{tile.name}: ACC holds F32 and I32 operands, no {tile.name}")


def _check_overlap(touched: Access) -> None:
    sources = [tile for tile in touched.tiles if not tile.writes]
    if touched.indices is not None:
        sources.append(touched.indices)
    for target in touched.tiles:
        for source in sources if target.writes else ():
            in_place = (
                source.in_place_stride is not None
                and source.in_place_stride == target.in_place_stride
                and source.address == target.address
                and source.dtype.bits == target.dtype.bits
            )
            if source.hull.overlaps(target.hull) and not in_place:
                _bad(touched.command, f"{source.name} overlaps {target.name}")


# Step 7: indices. ---------------------------------------------------------------------------------


def check_indices(touched: Access, indices: Sequence[int], slots: Sequence[Slot]) -> Access:
    """A gather or scatter whose indices are now known. Raises FaultRaised: GATHER_INDEX."""
    dram: DramRows = touched.dram
    size = slots[dram.slot].size
    for index in indices:
        first = dram.offset + index * dram.stride
        if first < 0 or first + dram.row_bytes > size:
            raise FaultRaised(
                FaultKind.GATHER_INDEX,
                f"{touched.command}: index {index}: bytes {first} to {first + dram.row_bytes - 1} "
                f"of slot {dram.slot}, which has {size}",
                slot=dram.slot,
                offset=dram.offset,
            )
    return replace(touched, dram=replace(dram, indices=tuple(indices)))
