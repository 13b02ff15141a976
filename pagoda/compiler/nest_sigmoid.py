"""Sigmoids in other words, in loop nests.

x / (1 + exp(-y)), the way silu arrives, is x * sigmoid(y): the quotient is no better than its
exponential, and the product takes half the time (error: `pointwise`).

Where a function of y that saturates meets 1, only its distance from 1 counts, and the relative
accuracy that it has near 0 is paid for in vain. With s(z) = 1 / (1 + 2^-z)

    1 + tanh(y)    is 2 s(2 y log2(e))
    1 - tanh(y)^2  is 4 s (1 - s), for the same s
    1 + erf(y)     is 2 s(v P(v^2)), v = y sqrt(2), with a polynomial P (weighted least squares on
                   Chebyshev points, reweighted to an even absolute error of s)

which take a third of the time or less. So gelu is within 1e-6, its derivative within 2.5e-6, either
kind. A function that has another use stays one.
"""

from __future__ import annotations

from math import frexp

from pagoda.compiler.loop_nest import Constant, LoopNest, Pointwise
from pagoda.compiler.nest_body import Body, with_body

ONE = Constant(1.0, "float32")
LOG2E = 1.4426950408889634
ODDS = tuple(-c for c in (
    2.3022093772888184, 0.10483512282371521, -9.404789307154715e-05, -0.00015958043513819575,
    1.143992631114088e-05, -3.8163918247846595e-07, 5.067480213227782e-09,
))  # fmt: skip


def recognise_sigmoids(nest: LoopNest) -> LoopNest:
    """See the module's docstring."""
    nest = _quotients(nest)
    without = _halves(nest)
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


def _halves(nest: LoopNest) -> LoopNest:
    """1 + tanh(y), 1 - tanh(y)^2 and 1 + erf(y), where a function is used for nothing else."""
    uses: dict[int, list[int]] = {}
    for number, op in enumerate(nest.body):
        for a in dict.fromkeys(op.args()):
            uses.setdefault(a, []).append(number)
    sums, differences, halves = {}, {}, {}
    for number, op in enumerate(nest.body):
        if not (_is(op, "tanh") or _is(op, "erf")):
            continue
        found = uses.get(number, [])
        plus = [u for u in found if _is(nest.body[u], "add", nest, number, ONE)]
        squares = [u for u in found if _is(nest.body[u], "mul")]
        squares = [u for u in squares if nest.body[u].args() == (number, number)]
        minus = [u for square in squares for u in uses.get(square, ())]
        ends = all(
            _is(nest.body[u], "sub")
            and nest.body[nest.body[u].args()[0]] == ONE
            and nest.body[u].args()[1] in squares
            for u in minus
        )
        if ends and len(plus) + len(squares) == len(found) and not (squares and _is(op, "erf")):
            halves[number] = _times_tanh if _is(op, "tanh") else _times_erf
            sums |= dict.fromkeys(plus, number)
            differences |= dict.fromkeys(minus, number)
    if not halves:
        return nest
    writer = _Writer()
    values = writer.values
    for number, op in enumerate(nest.body):
        if number in halves:
            exponent = halves[number](writer, values[op.args()[0]])
            values[number] = writer.apply("recip1p_exp2", exponent)
        elif number in sums:
            values[number] = writer.times(values[sums[number]], 2.0)
        elif number in differences:
            s = values[differences[number]]
            rest = writer.apply("sub", writer.constant(1.0), s)
            values[number] = writer.times(writer.apply("mul", s, rest), 4.0)
        else:
            writer.copy(number, op)
    return with_body(nest, writer)


def _times_tanh(writer: _Writer, y: int) -> int:
    """log2(e) * -2 y."""
    x, c = writer.scaled(y) or (y, 1.0)
    return writer.times(x, c * -2.0 * LOG2E)


def _times_erf(writer: _Writer, y: int) -> int:
    """-v P(min(v^2, 30)) for v = y sqrt(2): the logarithm to base 2 of the odds against a standard
    normal number below v. Beyond, where the distribution is within 3e-8 of 0 or 1, P stays."""
    x, c = writer.scaled(y) or (y, 1.0)
    c *= 2.0**0.5
    v = x if abs(c - 1) < 2.0**-25 else writer.times(x, c)
    square = writer.apply("minimum", writer.apply("mul", v, v), writer.constant(30.0))
    total = writer.constant(ODDS[-1])
    for coefficient in reversed(ODDS[:-1]):
        total = writer.apply("fma", total, square, writer.constant(coefficient))
    return writer.apply("mul", v, total)


class _Writer(Body):
    """A body being written, with float32 operations."""

    def apply(self, name: str, *operands: int) -> int:
        return self.add(Pointwise(name, operands, "float32"))

    def constant(self, value: float) -> int:
        return self.add(Constant(value, "float32"))

    def scaled(self, value: int) -> tuple[int, float] | None:
        """(x, c) of a value x c with a constant c."""
        op = self.ops[value]
        if not _is(op, "mul"):
            return None
        for x, c in (op.operands, op.operands[::-1]):
            factor = self.ops[c]
            if isinstance(factor, Constant) and factor.dtype == "float32":
                return x, float(factor.value)
        return None

    def times(self, x: int, c: float) -> int:
        return x if c == 1.0 else self.apply("mul", x, self.constant(c))


def _is(op: object, name: str, nest: LoopNest | None = None, a: int = 0, b: object = None) -> bool:
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
    body = _Writer()
    for number, op in enumerate(nest.body):
        body.copy(number, op)
        new = body.ops[-1]
        if not _is(new, "mul"):
            continue
        left, right = (body.scaled(value) for value in new.operands)
        whole = body.scaled(len(body.ops) - 1)
        if whole is not None and _is_power(whole[1]) and (inner := body.scaled(whole[0])):
            body.values[number] = body.times(inner[0], inner[1] * whole[1])
        elif left and right and _is_power(left[1]) and _is_power(right[1]):
            rest = body.times(right[0], left[1] * right[1])
            body.values[number] = body.apply("mul", left[0], rest)
    return with_body(nest, body)


def _is_power(c: float) -> bool:
    return abs(frexp(c)[0]) == 0.5
