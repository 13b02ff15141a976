"""Which fields a command may not hold: the first three steps of `pagoda.isa.checks`.

Combinational, in the cycle before the go is offered. What needs hulls (rows apart, slots, bounds,
overlaps) is worked out by `description` one cycle later.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Module, Mux, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.field_registers import BANK, BankWords, CommandFields
from pagoda.chip.product_schedule import COUNT_BITS, COUNTS, M
from pagoda.chip.products import Extents, Products, at
from pagoda.isa.accumulation import LANES, ReduceOp
from pagoda.isa.checks import LOCAL_DTYPES, LOCAL_FLOATS, LOCAL_INTS, START_LIMIT
from pagoda.isa.chip import Chip
from pagoda.isa.commands import COMMANDS, MATRIX_TYPES, SCALAR
from pagoda.isa.functions import (
    FMA,
    FMUL,
    ONLY_FIRST,
    ONLY_SECOND,
    SELECT,
    VECTOR_FUNCTIONS,
)
from pagoda.isa.numbers import DType

INTEGER_OPS = (ReduceOp.ISUM, ReduceOp.IMAX)
MEM_FLOATS = [dtype for dtype in DType if dtype.is_float]


class FieldChecks(wiring.Component):
    """reserved: bits without a field. illegal: codes, formats. empty: an extent is 0 (nothing more
    is checked). misaligned: addresses, offsets, strides. misshapen: counts, pads, start.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "bank": In(4), "go": In(32), "words": In(BankWords()), "products": In(Products(chip)),
            "extents": In(Extents()), "reserved": Out(1),
            "illegal": Out(1), "empty": Out(1), "misaligned": Out(1), "misshapen": Out(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        with m.Switch(self.bank):
            for name, command in COMMANDS.items():
                f = CommandFields(command, self.go, self.words)
                with m.Case(BANK[name]):
                    m.d.comb += [
                        self.reserved.eq(self._reserved(f)), self.illegal.eq(self._codes(name, f)),
                        self.empty.eq(_empty(name, f)),
                        self.misaligned.eq(_any(
                            (f[field][:3] & unit).any() for field, unit in _units(name, f).items()
                        )),
                        self.misshapen.eq(self._shape(name, f)),
                    ]  # fmt: skip
        return m

    # Step 1: codes and element formats. -----------------------------------------------------------

    def _reserved(self, f: CommandFields) -> Value:
        words = {word: self.words[word].value for word in f.command.words} | {0: self.go}
        return _any((words[w] & bits).any() for w, bits in f.command.reserved.items() if bits)

    def _codes(self, name: str, f: CommandFields) -> Value | int:
        match name:
            case "load" | "store" | "gather" | "scatter":
                mem, local = f["mem"], f["local"]
                mixed = mem.matches(*MEM_FLOATS) ^ local.matches(*LOCAL_FLOATS)
                wrong = ~mem.matches(*DType) | ~local.matches(*LOCAL_DTYPES) | mixed
                if "accumulate" in f:
                    wrong |= f["accumulate"] & ~mem.matches(DType.F32, DType.BF16, DType.I32)
                return wrong
            case "matmul":
                built = [code for code, t in enumerate(MATRIX_TYPES) if t in self.chip.matrix_types]
                return ~f["type"].matches(*built)
            case "vector":
                return _vector_codes(f)
            case "reduce":
                return _operator_codes(f) | (f["op"] == ReduceOp.ARGMAX) & f["column"]
            case "finish":
                argmax = f["op"] == ReduceOp.ARGMAX
                return Mux(argmax, f["dtype"] != DType.I32, _operator_codes(f))
            case "transpose":
                return ~f["dtype"].matches(*LOCAL_DTYPES)
        return 0

    # Step 3: counts. ------------------------------------------------------------------------------

    def _shape(self, name: str, f: CommandFields) -> Value:
        counts = [field.name for field in f.command.fields if field.kind == "count"]
        if name == "reduce":
            counts.remove("start")  # a column number, not an extent
        wrong = [f.over(count) for count in counts]
        match name:
            case "load" | "store":
                wrong.append(_over(at(self.products, COUNTS)))
            case "matmul":
                wrong += [_over(at(self.products, COUNTS)), _over(at(self.products, M))]
                one = [f.nonzero(n) & ~f.many(n) for n in ("m1", "m2", "k_outer")]
                wrong.append(f["transpose_a"] & ~Cat(*one).all())
            case "reduce":
                start = f["start"]
                wrong.append(~f["column"] & ((start % LANES != 0) | (start > START_LIMIT)))
        odd = f["cols"][0] if "cols" in f else 0
        if name == "load":
            wrong += [self.extents.data_rows < 0, self.extents.data_cols < 0]
            odd |= self.extents.odd_pad
        if "mem" in f:
            wrong.append((f["mem"] == DType.I4) & odd)
        return _any(wrong)


def _vector_codes(f: CommandFields) -> Value:
    wrong = []
    used = {"a": 1}
    for code, operand in ((f["f1"], "b"), (f["f2"], "c")):
        wrong.append(~code.matches(*VECTOR_FUNCTIONS))
        used[operand] = code.matches(*(c for c, v in VECTOR_FUNCTIONS.items() if v.operands == 2))
    f1, f2 = f["f1"], f["f2"]
    wrong += [f1.matches(*ONLY_SECOND), f2.matches(*ONLY_FIRST)]
    wrong += [(f2 == FMA) & (f1 != FMUL), (f1 == SELECT) ^ (f2 == SELECT)]
    for operand, needed in used.items():
        kind, dtype = f[f"{operand}_kind"], f[f"{operand}_dtype"]
        wrong.append(needed & ((kind > SCALAR) | ~dtype.matches(*LOCAL_DTYPES)))
    wrong.append(~f["dst_dtype"].matches(*LOCAL_DTYPES))
    return _any(wrong)


def _operator_codes(f: CommandFields) -> Value:
    integer = f["op"].matches(*INTEGER_OPS)
    ints, floats = f["dtype"].matches(*LOCAL_INTS), f["dtype"].matches(*LOCAL_FLOATS)
    return ~f["op"].matches(*ReduceOp) | ~Mux(integer, ints, floats)


def _empty(name: str, f: CommandFields) -> Value:
    if name == "reduce":
        starts_state = f["first"] & ~f["column"]
        return ~f.nonzero("rows") | (~f.nonzero("cols") & ~starts_state)
    extents = ("m0", "m1", "m2", "n") if name == "matmul" else ("rows", "cols", "planes")
    return _any(~f.nonzero(extent) for extent in extents if extent in f)


# Step 2: alignment. -------------------------------------------------------------------------------


def _unit(dtype: Value) -> Value:
    """The address bits that must be 0 for elements of this format."""
    eight, four = dtype == DType.I64, dtype.matches(DType.F32, DType.I32)
    return Cat(eight | four | (dtype == DType.BF16), eight | four, eight)


def _units(name: str, f: CommandFields) -> dict[str, Value | int]:
    """Field -> its address bits that must be 0."""
    match name:
        case "load" | "store" | "gather" | "scatter":
            mem, local = _unit(f["mem"]), _unit(f["local"])
            units = dict.fromkeys(("address", "row_stride", "plane_stride"), local)
            units |= dict.fromkeys(("offset", "mem_row_stride", "mem_plane_stride"), mem)
            units["indices"] = 3
            return {field: unit for field, unit in units.items() if field in f}
        case "matmul":
            operand = ~f["type"][0]  # bf16
            names = ("a", "m0_stride", "m1_stride", "m2_stride", "k_outer_stride", "b", "b_stride")
            return dict.fromkeys(names, operand) | {"acc": 3, "acc_stride": 3}
        case "vector":
            units = dict.fromkeys(("dst", "dst_stride"), _unit(f["dst_dtype"]))
            two = [code for code, v in VECTOR_FUNCTIONS.items() if v.operands == 2]
            used = {"a": 1, "b": f["f1"].matches(*two), "c": f["f2"].matches(*two)}
            for operand, needed in used.items():
                tile = needed & (f[f"{operand}_kind"] != SCALAR)
                unit = Mux(tile, _unit(f[f"{operand}_dtype"]), 0)
                units |= {operand: unit, f"{operand}_stride": unit}
            return units
        case "reduce":
            units = dict.fromkeys(("src", "src_stride"), _unit(f["dtype"]))
            return units | {"state": 3, "state_stride": 3}
        case "finish":
            units = dict.fromkeys(("dst", "dst_stride"), _unit(f["dtype"]))
            return units | {"state": 3, "state_stride": 3}
        case "transpose":
            return dict.fromkeys(("src", "src_stride", "dst", "dst_stride"), _unit(f["dtype"]))
    return {"dst": 3, "dst_stride": 3}


def _over(count: Value) -> Value:
    """A product of extents is above COUNT_LIMIT."""
    top = COUNT_BITS - 1
    return count[top + 1 :].any() | (count[top] & count[:top].any())


def _any(bits) -> Value:
    return reduce(or_, bits)
