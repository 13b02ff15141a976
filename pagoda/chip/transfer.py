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
            # Loads with padding; all 0 else.
            "padded": 1, "above": 16, "below": 16,
            "left": 18, "inner": 32,  # bytes of a local row before the data, and of the data
            "right_words": 18,  # port words of the columns padded after
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
        m.d.comb += valid.eq(self.start & ~self.job.empty)
        if self.lag >= 2:
            job, valid = Signal(Job(), reset_less=True), Signal()
            m.d.sync += valid.eq(self.start & ~self.job.empty)
            with m.If(self.start):
                m.d.sync += job.eq(self.job)
        rows = self._rows(m, job)
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

    def _rows(self, m: Module, job) -> dict[str, Value]:
        """Rows as the command has them; how many they and their elements are."""
        words, n = job.words, self.count_bits

        def value(name: str, shape, source) -> Signal:
            made = Signal(shape, name=name)
            m.d.comb += made.eq(source)
            return made

        indexed = value("indexed", 1, (job.bank == GATHER) | (job.bank == SCATTER))
        can_pad = (job.bank == _LOAD) if self.loads else C(0, 1)
        pads = [Mux(can_pad, word[low : low + 16], 0)
                for word in (words[11], words[12]) for low in (0, 16)]  # fmt: skip
        above, below, left, right = (
            value(name, 16, pad)
            for name, pad in zip(("above", "below", "left", "right"), pads, strict=True)
        )
        padded = value("padded", 1, Cat(above, below, left, right).any())
        mem, local = mem_shift(words[0][0:4]), local_shift(words[0][4:8])
        cols, rows = words[4][:n], words[5][:n]
        planes = value("planes", n, Mux(indexed, 1, words[6][:n]))
        inner_rows = value("inner_rows", n, rows - above - below)
        inner_cols = value("inner_cols", n, cols - left - right)
        mem_row = value("mem_row", n + 3, (inner_cols << mem) >> 1)
        local_row = value("local_row", n + 2, cols << local)
        return {
            "indexed": indexed, "padded": padded, "above": above, "below": below,
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
        mem, local = mem_shift(r["go"][0:4]), local_shift(r["go"][4:8])
        mem_plane = value("mem_plane", bits + 3, (r["elements"] << mem) >> 1)
        local_plane = value("local_plane", bits + 2, r["elements"] << local)
        one = r["planes"] == 1
        return {
            **{name: made for name, made in r.items() if name != "elements"},
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
        mem, local = mem_shift(r["go"][0:4]), local_shift(r["go"][4:8])
        for side, prefix, inner_rows, total in (
            (plan.mem, "mem", r["inner_rows"], (r["all_elements"] << mem) >> 1),
            (plan.local, "local", r["rows"], r["all_elements"] << local),
        ):
            strides = {
                "mem": (r["mem_row_stride"].as_signed(), r["mem_plane_stride"].as_signed()),
                "local": (r["row_stride"], r["plane_stride"]),
            }[prefix]
            with m.If(r[f"{prefix}_merges_planes"]):
                m.d.comb += [side.row_bytes.eq(total), side.rows.eq(1), side.planes.eq(1)]
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
        before_end, local_rows = Signal(40), Signal(COUNT_LIMIT.bit_length())
        port = (self.chip.port_bytes - 1).bit_length()
        m.d.comb += [
            plan.mem.base.eq(r["mem_base"]), plan.local.base.eq(r["local_base"][:31]),
            plan.acc.eq(r["local_base"][31]),
            plan.mem_code.eq(r["go"][0:4]), plan.local_code.eq(r["go"][4:8]),
            plan.accumulate.eq(C(0) if self.loads else r["go"][8]),
            plan.indexed.eq(r["indexed"]), plan.pc.eq(r["pc"]), plan.index.eq(r["index"]),
            plan.atoms.eq(r["atoms"]),
            plan.rows.eq(
                Mux(r["mem_merges_planes"], 1, Mux(r["mem_merges"], r["planes"], r["row_count"]))
            ),
            local_rows.eq(
                Mux(
                    r["local_merges_planes"], 1,
                    Mux(r["local_merges"], r["planes"], r["row_count"]),
                )
            ),
            before_end.eq(plan.mem.row_bytes - 1),
            plan.few.eq((before_end >> _ATOM_BITS) + 1), plan.ends.eq(before_end[:_ATOM_BITS]),
            plan.local_rows.eq(local_rows),
            plan.all_rows.eq(Mux(r["padded"], r["all_rows"], local_rows)),
            plan.row_words.eq((plan.local.row_bytes + self.chip.port_bytes - 1) >> port),
            plan.padded.eq(r["padded"]), plan.above.eq(r["above"]), plan.below.eq(r["below"]),
            plan.left.eq(r["left"]), plan.inner.eq(r["inner"]),
            plan.right_words.eq((r["right"] + self.chip.port_bytes - 1) >> port),
        ]  # fmt: skip
