"""The operations of a loop nest's body, one block at a time: values, stores, what is needed.

`Operations` knows nothing of loops: whoever uses it sets the frame's extents and bounds and asks
for operations by number, in order.
"""

from __future__ import annotations

from pagoda.compiler.loop_nest import (
    LOW_PRECISION,
    Bitcast,
    Cast,
    Constant,
    IndexValue,
    Indirect,
    Load,
    Op,
    Pointwise,
    Reduce,
    Store,
)
from pagoda.compiler.nest_access import Accesses, window_of
from pagoda.compiler.nest_frame import MAX_TREE, Frame, Value, tree_size
from pagoda.compiler.nest_reduce import Reduction
from pagoda.compiler.pointwise import (
    bitcast,
    check_dtype,
    compose,
    convert,
    is_float,
    unsaturated,
)
from pagoda.compiler.tile_ir import Read, Splat, Tree, splat
from pagoda.isa.numbers import DType

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


class Operations:
    """names: a tensor name per parameter of the frame's nest. levels: values of different levels
    are computed at different places, so one that crosses levels becomes a tile."""

    def __init__(self, frame: Frame, names: list[str]):
        self.frame, self.plan, self.nest = frame, frame.plan, frame.plan.nest
        self.access = Accesses(frame, names)
        self.dims = self.nest.dims_of()
        self.levels = [0] * len(self.nest.body)
        self.users = self._users()

    def _args(self, op: Op) -> tuple[int, ...]:
        """Values an operation really uses: a mask that became bounds is not looked at."""
        if isinstance(op, Load) and window_of(self.plan, op) is not None:
            return tuple(op.index.refs())
        return op.args()

    def _users(self) -> list[list[int]]:
        users: list[list[int]] = [[] for _ in self.nest.body]
        for number, op in enumerate(self.nest.body):
            for a in self._args(op):
                users[a].append(number)
        needed = [isinstance(op, Store) for op in self.nest.body]
        for number in range(len(needed) - 1, -1, -1):
            needed[number] = needed[number] or any(needed[u] for u in users[number])
        self.needed = needed
        return [[u for u in found if needed[u]] for found in users]

    def emit(self, numbers: list[int]) -> None:
        for number in numbers:
            op = self.nest.body[number]
            if isinstance(op, Store):
                self.access.store(number, op)
            else:
                self.frame.values[number] = self._settled(number, self._made(number, op))

    def _value(self, number: int) -> Value:
        return self.frame.values[number]

    def _made(self, number: int, op: Op) -> Value:
        frame, shape = self.frame, self.plan.shape(self.dims[number])

        def keep(tree: Tree) -> Tree:
            return frame.keep(tree, shape)

        match op:
            case Constant(value, dtype):
                check_dtype(dtype, "a constant")
                if is_float(dtype):
                    return Value(splat(float(value)), None)
                return Value(splat(min(max(int(value), INT32_MIN), INT32_MAX)), None)
            case Load():
                return self.access.load(number, op)
            case IndexValue(index, dtype):
                tree = frame.index_tree(index, shape)
                tree = convert(tree, "int64", dtype)
                return Value(tree, None if isinstance(tree, Splat) else shape)
            case Indirect():
                return self.access.indirect(number, op)
            case Pointwise(name, operands, dtype):
                args = tuple(frame.operand(self._value(o), shape) for o in operands)
                source = self.nest.value_dtype(operands[-1])
                return Value(compose(name, dtype, source, args, keep), shape)
            case Cast(value, dtype):
                tree = frame.operand(self._value(value), shape)
                tree = convert(tree, self.nest.value_dtype(value), dtype)
                if dtype in LOW_PRECISION:  # a bfloat16 tile rounds
                    tree = Read(frame.whole(tree, shape, DType.BF16))
                return Value(tree, shape)
            case Bitcast(value, dtype):
                tree = frame.operand(self._value(value), shape)
                return Value(bitcast(tree, self.nest.value_dtype(value), dtype), shape)
            case Reduce(_, value, _):
                state = Reduction(frame, op, self.nest.value_dtype(value))
                state.whole(self._value(value))
                return state.result()
        raise TypeError(f"no such operation: {op!r}")

    def _settled(self, number: int, value: Value) -> Value:
        """A value as a tree where one later operation of its shape and level uses it, else as a
        tile."""
        if value.shape is None:
            return value
        users = self.users[number]
        if len(users) == 1 and tree_size(unsaturated(value.tree)) <= MAX_TREE:
            user = users[0]
            op = self.nest.body[user]
            inline = isinstance(op, (Pointwise, Cast, Bitcast, Store))
            same = self.plan.shape(self.dims[user]) == value.shape
            if inline and same and self.levels[user] == self.levels[number]:
                return value
        return Value(self.frame.keep(value.tree, value.shape), value.shape)
