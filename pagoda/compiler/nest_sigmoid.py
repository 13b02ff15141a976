"""Sigmoids in other words, in loop nests.

x / (1 + exp(-y)), the way silu arrives, is x * sigmoid(y): the quotient is no better than its
exponential, and the product takes half the time (error: `pointwise`). 1 + tanh(y), of which the
approximated gelu is made, is 2 sigmoid(2 y), and 1 - tanh(y)^2 in its gradient is
4 sigmoid(2 y) (1 - sigmoid(2 y)): half the time, and nothing is lost where y is negative. So gelu is
within 1e-6 and its derivative within 2.5e-6. A hyperbolic tangent that has another use stays one.
"""

from __future__ import annotations

from math import frexp

from pagoda.compiler.loop_nest import Constant, LoopNest, Pointwise
from pagoda.compiler.nest_body import Body, with_body

ONE = Constant(1.0, "float32")


def recognise_sigmoids(nest: LoopNest) -> LoopNest:
    """See the module's docstring."""
    nest = _quotients(nest)
    without = _hyperbolic(nest)
    return nest if without is nest else _powers_of_two(without)


def _quotients(nest: LoopNest) -> LoopNest:
    """x / (1 + exp(-y)) as x * sigmoid(y), the way silu arrives."""
    body = Body()
    for number, op in enumerate(nest.body):
        y = None
        if isinstance(op, Pointwise) and op.name == "div" and op.dtype == "float32":
            y = _sigmoid_argument(nest, op.operands[1])
        if y is None:
            body.copy(number, op)
            continue
        factor = body.add(Pointwise("sigmoid", (body.values[y],), op.dtype))
        product = Pointwise("mul", (body.values[op.operands[0]], factor), op.dtype)
        body.values[number] = body.add(product)
    return with_body(nest, body)


def _sigmoid_argument(nest: LoopNest, denominator: int) -> int | None:
    """y if the value is 1 + exp(-y), or None."""
    total = nest.body[denominator]
    if not isinstance(total, Pointwise) or total.name != "add":
        return None
    for one, power in (total.operands, total.operands[::-1]):
        chain = nest.body[power]
        if nest.body[one] != Constant(1.0, "float32") or not isinstance(chain, Pointwise):
            continue
        minus = nest.body[chain.operands[0]]
        if chain.name == "exp" and isinstance(minus, Pointwise) and minus.name == "neg":
            return minus.operands[0]
    return None


def _hyperbolic(nest: LoopNest) -> LoopNest:
    """1 + tanh(y) and 1 - tanh(y)^2, where a tanh is used for nothing else."""
    uses: dict[int, list[int]] = {}
    for number, op in enumerate(nest.body):
        for a in dict.fromkeys(op.args()):
            uses.setdefault(a, []).append(number)
    sums, differences, tangents = {}, {}, set()
    for number, op in enumerate(nest.body):
        if not _is(op, "tanh"):
            continue
        plus = [u for u in uses.get(number, ()) if _is(nest.body[u], "add", nest, number, ONE)]
        squares = [u for u in uses.get(number, ()) if nest.body[u].args() == (number, number)]
        squares = [u for u in squares if _is(nest.body[u], "mul")]
        minus = [u for square in squares for u in uses.get(square, ())]
        ends = all(
            _is(nest.body[u], "sub")
            and nest.body[nest.body[u].args()[0]] == ONE
            and nest.body[u].args()[1] in squares
            for u in minus
        )
        if ends and len(plus) + len(squares) == len(uses.get(number, ())):
            tangents.add(number)
            sums |= dict.fromkeys(plus, number)
            differences |= dict.fromkeys(minus, number)
    if not tangents:
        return nest
    body = Body()

    def apply(name: str, *operands: int) -> int:
        return body.add(Pointwise(name, operands, "float32"))

    def constant(value: float) -> int:
        return body.add(Constant(value, "float32"))

    for number, op in enumerate(nest.body):
        if number in tangents:
            twice = apply("mul", body.values[op.args()[0]], constant(2.0))
            body.values[number] = apply("sigmoid", twice)
        elif number in sums:
            body.values[number] = apply("mul", body.values[sums[number]], constant(2.0))
        elif number in differences:
            s = body.values[differences[number]]
            rest = apply("sub", constant(1.0), s)
            body.values[number] = apply("mul", apply("mul", s, rest), constant(4.0))
        else:
            body.copy(number, op)
    return with_body(nest, body)


def _is(
    op: object, name: str, nest: LoopNest | None = None, a: int = 0, b: object = None
) -> bool:
    """Whether it is this operation in float32; with a nest, of value a and an operand equal to b,
    in either order."""
    if not isinstance(op, Pointwise) or op.name != name or op.dtype != "float32":
        return False
    if nest is None:
        return True
    x, y = op.operands
    return (x == a and nest.body[y] == b) or (y == a and nest.body[x] == b)


def _powers_of_two(nest: LoopNest) -> LoopNest:
    """(x a) (y b) with powers of two a and b is x (y a b), or x y where that is 1; (x c) a is
    x (c a) for any constant c. The same bits, unless x a or y b is subnormal or overflows."""
    body = Body()

    def scaled(value: int) -> tuple[int, float] | None:
        """(x, c) of a value x c with a constant c."""
        op = body.ops[value]
        if not _is(op, "mul"):
            return None
        for x, c in (op.operands, op.operands[::-1]):
            factor = body.ops[c]
            if isinstance(factor, Constant) and factor.dtype == "float32":
                return x, float(factor.value)
        return None

    def times(x: int, c: float) -> int:
        if c == 1.0:
            return x
        return body.add(Pointwise("mul", (x, body.add(Constant(c, "float32"))), "float32"))

    for number, op in enumerate(nest.body):
        body.copy(number, op)
        new = body.ops[-1]
        if not _is(new, "mul"):
            continue
        left, right = (scaled(value) for value in new.operands)
        whole = scaled(len(body.ops) - 1)
        if whole is not None and _is_power(whole[1]) and (inner := scaled(whole[0])):
            body.values[number] = times(inner[0], inner[1] * whole[1])
        elif left and right and _is_power(left[1]) and _is_power(right[1]):
            rest = times(right[0], left[1] * right[1])
            body.values[number] = body.add(Pointwise("mul", (left[0], rest), "float32"))
    return with_body(nest, body)


def _is_power(c: float) -> bool:
    return abs(frexp(c)[0]) == 0.5
