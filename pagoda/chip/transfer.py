"""From the job of a load, store, gather or scatter to what has to be moved: a `Plan`.

Rows whose stride equals their length become one, then planes likewise, in DRAM and locally, each
by its own strides; rows of gather and scatter do not merge, nor do local rows of a padded load.
"""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import Job, Side
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.commands import COMMANDS, COUNT_LIMIT
from pagoda.isa.numbers import DType

GATHER, SCATTER = COMMANDS["gather"].bank, COMMANDS["scatter"].bank
BRIEF = 4
MANY = 8  # stands for itself and every larger number in `Plan.small`
_LOAD = COMMANDS["load"].bank
_ATOM_BITS = (DRAM_ATOM_BYTES - 1).bit_length()


class Plan(data.StructLayout):
    """What a job moves. Counts of rows are after merging, sizes in bytes of their own memory.

    mem.base is a physical address; local.base lies in ACC if `acc`. local covers padding too.
    An indexed job has mem.rows rows of which each starts at mem.base + index * mem.row_stride.
    """

    def __init__(self):
        count = COUNT_LIMIT.bit_length()
        super().__init__({
            "mem": Side(), "local": Side(), "mem_code": 4, "local_code": 4, "acc": 1,
            "accumulate": 1, "indexed": 1, "pc": 32, "index": 32,
            "atoms": 1,  # something is read from or written to DRAM; 0: all is padding
            "rows": count,  # of DRAM: mem.rows * mem.planes
            "few": 34,  # atoms of a DRAM row that starts at an atom
            "ends": _ATOM_BITS,  # (mem.row_bytes - 1) modulo 64: a row has one atom more if its
            #                      start modulo 64 plus this reaches 64
            "local_rows": count,  # of the local side: those with data,
            "all_rows": count,  # and those that are padding too
            "row_words": 34,  # port words of a local row
            # Loads: one row, which fits an atom, and its local side at most `BRIEF` words.
            "brief": 1,
            # Loads with padding; all 0 else.
            "padded": 1, "above": 16, "below": 16,
            "left": 18, "inner": 32,  # bytes of a local row before the data, and of the data
            "right_words": 18,  # port words of the columns padded after
            # Loads: the local rows with data, where the first one begins and the row behind them.
            "data_rows": 21, "data_base": 31, "below_base": 31,
            # The same in few bits: MANY if more. `whole`: port words of a padded tile, else 0.
            "small": data.StructLayout(
                dict.fromkeys(("rows", "few", "words", "whole", "right"), 4)
            ),
        })  # fmt: skip


def plan_lag(chip: Chip) -> int:
    """Cycles from a start to its plan. Atoms may be so close that a command is over in one cycle,
    then the plan is made with fewer registers."""
    x = DRAM_ATOM_BYTES / chip.dram_share
    return 3 if x > 3 else 2 if x > 2 else 1


def mem_shift(code: Value) -> Value:
    """log2 of an element's half bytes, for every format code."""
    return _table(code, {dtype: (dtype.bits // 4).bit_length() - 1 for dtype in DType})


def local_shift(code: Value) -> Value:
    """log2 of an element's bytes, for the codes of local formats (F32, BF16, I32, I8)."""
    return _table(code, {DType.F32: 2, DType.I32: 2, DType.BF16: 1})


def _table(code: Value, values: dict[DType, int]) -> Value:
    result: Value = C(0, 3)
    for dtype, value in values.items():
        if value:
            result = Mux(code == int(dtype), C(value, 3), result)
    return result


def _quotient(value: Value, divisor: int) -> Value:
    """ceil(value / divisor), a power of two."""
    bits = (divisor - 1).bit_length()
    return (value >> bits) + value[:bits].any()


def _small(value: Value) -> Value:
    return Mux(Value.cast(value)[3:].any(), C(MANY, 4), value[:3])


def _small_quotient(value: Value, divisor: int) -> Value:
    """ceil(value / divisor), a power of two, as in `Plan.small`."""
    bits = (divisor - 1).bit_length()
    value = Value.cast(value)
    return Mux(value[bits + 3 :].any(), C(MANY, 4), value[bits : bits + 3] + value[:bits].any())


def _small_product(m: Module, a: Value, b: Value, name: str) -> Signal:
    """Of factors as in `Plan.small` that are not 0; few cases are small."""
    product = Signal(4, name=name, init=MANY)
    with m.Switch(Cat(a, b)):
        for left in range(1, MANY):
            for right in range(1, -(-MANY // left)):
                with m.Case(left | right << 4):
                    m.d.comb += product.eq(left * right)
    return product


class TransferPlan(wiring.Component):
    """Makes the plan of every job that is not empty, `plan_lag(chip)` cycles after its `start`.

    In that one cycle `valid` is high and `plan` right. A start in every cycle is permitted.
    loads: the engine's jobs are loads and gathers, else stores and scatters.
    """

    def __init__(self, chip: Chip, loads: bool):
        self.chip, self.loads, self.lag = chip, loads, plan_lag(chip)
        # Extents of a load are bounded by its destination, whose elements lie apart; of a store
        # by DRAM's, half a byte at least each.
        local_bits = max(chip.sram_bytes, chip.acc_bytes).bit_length()
        self.count_bits = min(COUNT_LIMIT.bit_length(), local_bits) if loads else 21
        self.element_bits = local_bits if loads else 34
        super().__init__({
            "start": In(1), "job": In(Job()), "valid": Out(1), "plan": Out(Plan()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        job, valid = self.job, Signal()
        can_pad = (self.job.bank == _LOAD) if self.loads else C(0, 1)
        m.d.comb += valid.eq(self.start & ~self.job.empty)
        if self.lag >= 2:
            job, valid = Signal(Job(), reset_less=True), Signal()
            m.d.sync += valid.eq(self.start & ~self.job.empty)
            is_load = Signal(reset_less=True)
            with m.If(self.start):
                m.d.sync += [job.eq(self.job), is_load.eq(can_pad)]
            can_pad = is_load
        rows = self._rows(m, job, can_pad)
        if self.lag >= 3:
            rows, valid = self._register(m, rows, valid, "rows")
        merged = self._merge(m, rows)
        merged, valid = self._register(m, merged, valid, "merged")
        self._select(m, merged)
        m.d.comb += self.valid.eq(valid)
        return m

    @staticmethod
    def _register(m: Module, values: dict[str, Value], valid: Signal, stage: str):
        later, later_valid = {}, Signal(name=f"{stage}_valid")
        m.d.sync += later_valid.eq(valid)
        for name, value in values.items():
            later[name] = Signal.like(value, name=f"{stage}_{name}", reset_less=True)
            m.d.sync += later[name].eq(value)
        return later, later_valid

    def _rows(self, m: Module, job, can_pad: Value) -> dict[str, Value]:
        """Rows as the command has them; how many they and their elements are."""
        words, n = job.words, self.count_bits

        def value(name: str, shape, source) -> Signal:
            made = Signal(shape, name=name)
            m.d.comb += made.eq(source)
            return made

        indexed = value("indexed", 1, (job.bank == GATHER) | (job.bank == SCATTER))
        pads = [Mux(can_pad, word[low : low + 16], 0)
                for word in (words[11], words[12]) for low in (0, 16)]  # fmt: skip
        above, below, left, right = (
            value(name, 16, pad)
            for name, pad in zip(("above", "below", "left", "right"), pads, strict=True)
        )
        padded = value("padded", 1, Cat(above, below, left, right).any())
        mem = value("mem_places", 3, mem_shift(words[0][0:4]))
        local = value("local_places", 3, local_shift(words[0][4:8]))
        cols, rows = words[4][:n], words[5][:n]
        planes = value("planes", n, Mux(indexed, 1, words[6][:n]))
        inner_rows = value("inner_rows", n, rows - above - below)
        inner_cols = value("inner_cols", n, cols - left - right)
        mem_row = value("mem_row", n + 3, (inner_cols << mem) >> 1)
        local_row = value("local_row", n + 2, cols << local)
        return {
            "mem_shift": mem, "local_shift": local, "indexed": indexed, "padded": padded,
            "above": above, "below": below,
            "left": value("left_bytes", 18, left << local),
            "right": value("right_bytes", 18, right << local),
            "inner": value("inner", n + 2, inner_cols << local),
            "atoms": value("atoms", 1, (inner_rows != 0) & (inner_cols != 0)),
            "planes": planes, "rows": value("plane_rows", n, rows), "inner_rows": inner_rows,
            "row_count": value("row_count", n, inner_rows * planes),
            "all_rows": value("all_rows", n, rows * planes if self.loads else 0),
            "elements": value("elements", self.element_bits, inner_rows * inner_cols),
            "mem_row": mem_row, "local_row": local_row,
            "mem_merges": value(
                "mem_merges", 1,
                ~indexed & ((inner_rows == 1) | (words[7].as_unsigned() == mem_row)),
            ),
            "local_merges": value(
                "local_merges", 1,
                ~indexed & ~padded & ((rows == 1) | (words[9].as_unsigned() == local_row)),
            ),
            "mem_base": value("mem_base", 48, job.base + words[2]),
            "mem_row_stride": words[7], "mem_plane_stride": words[8],
            "to_below": value("to_below", n, rows - below),
            "local_base": words[3], "row_stride": words[9], "plane_stride": words[10],
            "go": value("go", 9, words[0][:9]), "pc": job.pc, "index": job.index,
        }  # fmt: skip

    def _merge(self, m: Module, r: dict[str, Value]) -> dict[str, Value]:
        """Whether planes disappear too, and the elements of all planes."""
        def value(name: str, shape, source) -> Signal:
            made = Signal(shape, name=name)
            m.d.comb += made.eq(source)
            return made

        bits = self.element_bits
        mem, local = r["mem_shift"], r["local_shift"]
        mem_plane = value("mem_plane", bits + 3, (r["elements"] << mem) >> 1)
        local_plane = value("local_plane", bits + 2, r["elements"] << local)
        one = r["planes"] == 1
        local_bits = max(self.chip.sram_bytes, self.chip.acc_bytes).bit_length() - 1

        def offset(name: str, rows: Value) -> Value:
            product = rows[:local_bits] * r["row_stride"][:local_bits]
            return value(name, local_bits, product) if self.loads else C(0, 1)

        port = self.chip.port_bytes
        row_words = value("small_row_words", 4, _small_quotient(r["local_row"], port))
        plane_words = value("small_plane_words", 4, _small_quotient(local_plane, port))
        counts = {name: value(f"small_{name}", 4, _small(r[name]))
                  for name in ("row_count", "planes", "all_rows")}  # fmt: skip
        rows_small = _small_product(m, counts["row_count"], row_words, "small_words_of_rows")
        planes_small = _small_product(m, counts["planes"], plane_words, "small_words_of_planes")
        all_small = _small_product(m, counts["all_rows"], row_words, "small_words_of_all")
        return {
            **{name: made for name, made in r.items() if name != "elements"},
            "small_rows": counts["row_count"], "small_planes": counts["planes"],
            "rows_small": rows_small, "planes_small": planes_small,
            "whole_small": value("whole_small", 4, Mux(r["padded"], all_small, 0)),
            "right_small": value("right_small", 4, _small_quotient(r["right"], port)),
            "data_offset": offset("data_offset", r["above"]),
            "below_offset": offset("below_offset", r["to_below"]),
            "mem_plane": mem_plane, "local_plane": local_plane,
            "all_elements": value("all_elements", bits, r["elements"] * r["planes"]),
            "mem_merges_planes": value(
                "mem_merges_planes", 1,
                r["mem_merges"] & (one | (r["mem_plane_stride"].as_unsigned() == mem_plane)),
            ),
            "local_merges_planes": value(
                "local_merges_planes", 1,
                r["local_merges"] & (one | (r["plane_stride"].as_unsigned() == local_plane)),
            ),
        }  # fmt: skip

    def _select(self, m: Module, r: dict[str, Value]) -> None:
        plan = self.plan
        mem, local = r["mem_shift"], r["local_shift"]
        totals = {"mem": (r["all_elements"] << mem) >> 1, "local": r["all_elements"] << local}
        for side, prefix, inner_rows in (
            (plan.mem, "mem", r["inner_rows"]), (plan.local, "local", r["rows"]),
        ):  # fmt: skip
            strides = {
                "mem": (r["mem_row_stride"].as_signed(), r["mem_plane_stride"].as_signed()),
                "local": (r["row_stride"], r["plane_stride"]),
            }[prefix]
            with m.If(r[f"{prefix}_merges_planes"]):
                m.d.comb += [side.row_bytes.eq(totals[prefix]), side.rows.eq(1), side.planes.eq(1)]
            with m.Elif(r[f"{prefix}_merges"]):
                m.d.comb += [
                    side.row_bytes.eq(r[f"{prefix}_plane"]), side.rows.eq(r["planes"]),
                    side.planes.eq(1),
                ]  # fmt: skip
            with m.Else():
                m.d.comb += [
                    side.row_bytes.eq(r[f"{prefix}_row"]), side.rows.eq(inner_rows),
                    side.planes.eq(r["planes"]),
                ]  # fmt: skip
            merged = r[f"{prefix}_merges"]
            m.d.comb += [
                side.row_stride.eq(Mux(merged, strides[1], strides[0])),
                side.plane_stride.eq(strides[1]),
            ]  # fmt: skip
        port, atom = self.chip.port_bytes, DRAM_ATOM_BYTES
        row_bytes, local_bytes = plan.mem.row_bytes, plan.local.row_bytes
        whole_mem, whole_local = r["mem_merges_planes"], r["local_merges_planes"]
        local_rows = Signal(COUNT_LIMIT.bit_length())
        m.d.comb += [
            plan.mem.base.eq(r["mem_base"]), plan.local.base.eq(r["local_base"][:31]),
            plan.acc.eq(r["local_base"][31]),
            plan.mem_code.eq(r["go"][0:4]), plan.local_code.eq(r["go"][4:8]),
            plan.accumulate.eq(C(0) if self.loads else r["go"][8]),
            plan.indexed.eq(r["indexed"]), plan.pc.eq(r["pc"]), plan.index.eq(r["index"]),
            plan.atoms.eq(r["atoms"]),
            plan.rows.eq(Mux(whole_mem, 1, Mux(r["mem_merges"], r["planes"], r["row_count"]))),
            local_rows.eq(
                Mux(whole_local, 1, Mux(r["local_merges"], r["planes"], r["row_count"]))
            ),
            plan.few.eq((row_bytes >> _ATOM_BITS) + row_bytes[:_ATOM_BITS].any()),
            plan.ends.eq(row_bytes[:_ATOM_BITS] - 1),
            plan.local_rows.eq(local_rows),
            plan.all_rows.eq(Mux(r["padded"], r["all_rows"], local_rows)),
            plan.row_words.eq(_quotient(local_bytes, port)),
            plan.padded.eq(r["padded"]), plan.above.eq(r["above"]), plan.below.eq(r["below"]),
            plan.left.eq(r["left"]), plan.inner.eq(r["inner"]),
            plan.data_rows.eq(Mux(r["padded"], r["inner_rows"], plan.local.rows)),
            plan.data_base.eq(plan.local.base + r["data_offset"]),
            plan.below_base.eq(plan.local.base + r["below_offset"]),
            plan.right_words.eq(_quotient(r["right"], port)),
            plan.brief.eq(self._brief(r, totals["local"]) if self.loads else 0),
            plan.small.rows.eq(
                Mux(whole_mem, 1, Mux(r["mem_merges"], r["small_planes"], r["small_rows"]))
            ),
            plan.small.few.eq(_small_quotient(row_bytes, atom)),
            plan.small.words.eq(
                Mux(
                    whole_local, _small_quotient(totals["local"], port),
                    Mux(r["local_merges"], r["planes_small"], r["rows_small"]),
                )
            ),
            plan.small.whole.eq(r["whole_small"]), plan.small.right.eq(r["right_small"]),
        ]  # fmt: skip

    def _brief(self, r: dict[str, Value], local_total: Value) -> Value:
        most = BRIEF * self.chip.port_bytes
        one_row = r["mem_merges_planes"] | (r["indexed"] & (r["row_count"] == 1))
        local = Mux(
            r["local_merges_planes"], local_total <= most,
            Mux(r["local_merges"], r["planes_small"] <= BRIEF, r["rows_small"] <= BRIEF),
        )  # fmt: skip
        fits = self.plan.mem.row_bytes <= DRAM_ATOM_BYTES
        return one_row & fits & local & (r["right_small"] == 0) & (r["whole_small"] <= BRIEF)
