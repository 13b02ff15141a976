"""The functions of one lane that round nothing: moves, comparisons, int32 sums, bits, shifts.

One adder of 33 bits serves sums and comparisons, one right shifter (its input mirrored for `shl`)
all shifts. Floats compare as the signed integers that order them (`float_add.order`).
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.float_format import INFINITY, Flow, operation_of, special_lane

LATENCY = 2


class Operation(data.StructLayout):
    """What a lane of `LaneLogic` is to do. The result is the or of four parts: a bitwise function
    of x and y (moves are among them), a shift, a sum, and a flag."""

    def __init__(self):
        super().__init__({
            "both": 1, "only_x": 1, "only_y": 1,  # the bits x & y, x & ~y, ~x & y count
            "clear_sign": 1, "flip_sign": 1,
            "is_shift": 1, "left": 1, "arithmetic": 1,
            "is_sum": 1, "invert_x": 1, "invert_y": 1,  # inverted for y - x, x - y
            "is_flag": 1, "nonzero": 1, "float": 1,
            "less": 1, "equal": 1, "greater": 1, "unordered": 1,  # relations that hold
            "is_extremum": 1, "is_choice": 1,  # x if the relation holds, if x is not 0; else y
        })  # fmt: skip


def _comparison(*relations: str) -> tuple[str, ...]:
    return ("invert_y", "is_flag", *relations)


_MOVE = ("both", "only_x")
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "flt": _comparison("float", "less"),
    "fle": _comparison("float", "less", "equal"),
    "feq": _comparison("float", "equal"),
    "fne": _comparison("float", "less", "greater", "unordered"),
    "fgt": _comparison("float", "greater"),
    "fge": _comparison("float", "greater", "equal"),
    "ilt": _comparison("less"),
    "ile": _comparison("less", "equal"),
    "ieq": _comparison("equal"),
    "ine": _comparison("less", "greater"),
    "i2b": ("is_flag", "nonzero"),
    "iadd": ("is_sum",),
    "isub": ("is_sum", "invert_y"),
    "irsub": ("is_sum", "invert_x"),
    "fmax": ("both", "is_extremum", "invert_y", "float", "greater"),
    "fmin": ("both", "is_extremum", "invert_y", "float", "less"),
    "imax": ("both", "is_extremum", "invert_y", "greater"),
    "imin": ("both", "is_extremum", "invert_y", "less"),
    "and": ("both",),
    "or": ("both", "only_x", "only_y"),
    "xor": ("only_x", "only_y"),
    "shl": ("is_shift", "left"),
    "shr": ("is_shift",),
    "sra": ("is_shift", "arithmetic"),
    "mov": _MOVE,
    "fneg": (*_MOVE, "flip_sign"),
    "fabs": (*_MOVE, "clear_sign"),
    "select": ("is_choice",),
}
"""Of an operation, by function: the bits that are 1."""


def decode(m: Module, code: Value, name: str, selects: bool = True) -> data.View:
    """The operation of a function code. selects: otherwise select is a move, since the first
    stage has made the choice."""
    functions = FUNCTIONS if selects else FUNCTIONS | {"select": _MOVE}
    return operation_of(m, code, Operation(), functions, name)


class LaneLogic(wiring.Component):
    """One lane; `result` comes LATENCY - 1 cycles after x and y, at the end of its cycle, and is 0
    if no bit of the operation is 1. `other`, which a lane that `selects` has, is what select gives
    where x is 0."""

    def __init__(self, selects: bool):
        self.selects = selects
        super().__init__({
            "operation": In(Operation()), "x": In(32), "y": In(32), "result": Out(32),
            **({"other": In(32)} if selects else {}),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        op, x, y = self.operation, self.x, self.y

        # Sum, or difference of what compares; large shifts.
        total = Signal(33)
        m.d.comb += total.eq(
            self._term(x, op.invert_x) + self._term(y, op.invert_y) + (op.invert_x | op.invert_y)
        )
        mirrored = Mux(op.left, x[::-1], x)
        flow = Flow(m)
        flow.add(
            op=op, x=x, y=y, total=total, nonzero=x.any(),
            nan=op.float & ((x[:31] > INFINITY) | (y[:31] > INFINITY)),
            zeros=op.float & ~(x[:31] | y[:31]).any(),
            fill=op.arithmetic & x[31],
            shifted=self._shift(m, mirrored, y, op.arithmetic & x[31], (4, 3)),
            **({"other": self.other} if self.selects else {}),
        )  # fmt: skip
        flow.step()

        # Relations; the bits of x and y that count; small shifts.
        op, x, y, total = flow.op, flow.x, flow.y, flow.total
        x_wins = Mux(total[32], op.less, op.greater)  # equal ones are the same
        chooses, gives_nan = op.is_extremum & ~flow.nan, op.is_extremum & flow.nan
        only_x = op.only_x | (chooses & x_wins)
        only_y = op.only_y | (chooses & ~x_wins)
        both = op.both & ~gives_nan
        bitwise = (
            (x & y & both.replicate(32))
            | (x & ~y & only_x.replicate(32))
            | (~x & y & only_y.replicate(32))
        )
        if self.selects:
            chosen = Mux(flow.nonzero, y, flow.other)
            bitwise = bitwise | (chosen & op.is_choice.replicate(32))
        picked = Cat(
            bitwise[:31] | special_lane(gives_nan, 0, 0)[:31],
            (bitwise[31] ^ op.flip_sign) & ~op.clear_sign,
        )
        equal, holds = Signal(), Signal()
        m.d.comb += [
            equal.eq(flow.zeros | ~total.any()),
            holds.eq(
                Mux(flow.nan, op.unordered,
                    Mux(equal, op.equal, Mux(total[32], op.less, op.greater)))
            ),
        ]  # fmt: skip
        flag = op.is_flag & Mux(op.nonzero, flow.nonzero, holds)
        shifted = self._shift(m, flow.shifted, y, flow.fill, (2, 1, 0))
        shifted = Mux(op.left, shifted[::-1], shifted) & op.is_shift.replicate(32)
        m.d.comb += self.result.eq(
            (total[:32] & op.is_sum.replicate(32)) | picked | shifted | flag
        )
        return m

    def _term(self, bits: Value, invert: Value) -> Value:
        """33 bits of a summand: sign-extended, a negative float ordered, then inverted."""
        flip = invert ^ (self.operation.float & bits[31])
        return Cat(bits[:31] ^ flip.replicate(31), (bits[31] ^ invert).replicate(2))

    @staticmethod
    def _shift(
        m: Module, value: Value, amount: Value, fill: Value, steps: tuple[int, ...]
    ) -> Value:
        """`value` shifted right by some bits of `amount`."""
        for step in steps:
            by = 1 << step
            moved = Signal(32, name=f"shifted_{by}")
            m.d.comb += moved.eq(Mux(amount[step], Cat(value[by:], fill.replicate(by)), value))
            value = moved
        return value
