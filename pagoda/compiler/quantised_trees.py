"""Element-wise trees in which `i2fmul` and `faddq` stand where their meaning occurs.

    i2f(x) * y                                          i2fmul(x, y)
    int8 of round(x + c)                                faddq(x, c)
    int8 of round(x)                                    faddq(x, 0)

int8 means saturated: by a store of int8, or between -128 and 127. Bounds between rounding and int8,
as of an activation, go where they leave room for both: rounding keeps the order of values, so it
may come before or behind a bound that is an integer. No result changes by a bit.
"""

from __future__ import annotations

import struct
from collections import Counter

from pagoda.compiler.scalar import Int
from pagoda.compiler.tile_ir import Apply, Splat, Tree, apply, splat

INT8_MIN, INT8_MAX = -128, 127
_BOUNDS = {"fmax": "imax", "fmin": "imin"}


def with_quantised_functions(tree: Tree, saturates: bool) -> Tree:
    """The tree; equal subtrees of it are one object. saturates: its int lanes are stored as int8,
    so what lies beyond makes no difference."""
    return _Rewriting(tree).rewritten(tree, saturates)


class _Rewriting:
    def __init__(self, tree: Tree):
        self.uses: Counter[int] = Counter()
        self.done: dict[tuple[int, bool], Tree] = {}
        pending, seen = [tree], {id(tree)}
        while pending:
            for child in pending.pop().children():
                self.uses[id(child)] += 1
                if id(child) not in seen:
                    seen.add(id(child))
                    pending.append(child)

    def rewritten(self, node: Tree, saturates: bool = False) -> Tree:
        if not isinstance(node, Apply):
            return node
        key = id(node), saturates
        if key not in self.done:
            self.done[key] = self._rewritten(node, saturates)
        return self.done[key]

    def _rewritten(self, node: Apply, saturates: bool) -> Tree:
        bounded = self._between_int8(node)
        if bounded is not None:
            inner = self.rewritten(bounded, True)
            if not _is_int8(inner):
                inner = apply("imin", apply("imax", inner, splat(INT8_MIN)), splat(INT8_MAX))
            return inner
        if node.function == "fmul":
            for x, y in (node.arguments, node.arguments[::-1]):
                if self._is(x, "i2f"):
                    return apply("i2fmul", self.rewritten(x.arguments[0]), self.rewritten(y))
        if saturates and node.function == "f2i":
            found = self._quantised(node)
            if found is not None:
                return found
        order = saturates and node.function in ("imax", "imin")  # they keep the order of values
        arguments = (self.rewritten(x, order and self.uses[id(x)] == 1) for x in node.arguments)
        return apply(node.function, *arguments)

    def _is(self, node: Tree, function: str) -> bool:
        """An application that nothing else reads."""
        return isinstance(node, Apply) and node.function == function and self.uses[id(node)] == 1

    def _between_int8(self, node: Apply) -> Tree | None:
        """x, if the node is x between -128 and 127."""
        missing = {"imax": INT8_MIN, "imin": INT8_MAX}
        x: Tree = node
        while missing:
            limit = missing.pop(x.function, None) if isinstance(x, Apply) else None
            if limit is None or (x is not node and self.uses[id(x)] != 1):
                return None
            left, right = x.arguments
            if splat(limit) not in (left, right):
                return None
            x = left if right == splat(limit) else right
        return x if self.uses[id(x)] == 1 else None

    def _quantised(self, node: Apply) -> Tree | None:
        """int8 of a float, if that was rounded: f2i(bounds(fround(x)))."""
        x, bounds = node.arguments[0], []
        while any(self._is(x, function) for function in _BOUNDS):
            value, limit = x.arguments
            if not isinstance(limit, Splat):
                value, limit = limit, value
            number = _integer(limit)
            if number is None:
                return None
            bounds.insert(0, (x.function, number))
            x = value
        if not self._is(x, "fround"):
            return None
        x = x.arguments[0]
        # Behind the conversion a bound turns 0, which a NaN becomes, into itself.
        keeps_zero = all(number <= 0 if f == "fmax" else number >= 0 for f, number in bounds)
        if self._is(x, "fadd") and keeps_zero:
            result = apply("faddq", *map(self.rewritten, x.arguments))
            for function, number in bounds:
                result = apply(_BOUNDS[function], result, splat(number))
            return result
        inner = self.rewritten(x)
        for function, number in bounds:
            inner = apply(function, inner, splat(float(number)))
        return apply("faddq", inner, splat(0.0))


def _is_int8(tree: Tree) -> bool:
    """Whether the values are certain to lie between -128 and 127."""
    if isinstance(tree, Splat):
        return isinstance(tree.value, Int) and INT8_MIN <= tree.value.value <= INT8_MAX
    if not isinstance(tree, Apply):
        return False
    chooses = tree.function in _BOUNDS.values()
    return tree.function == "faddq" or (chooses and all(map(_is_int8, tree.arguments)))


def _integer(limit: Tree) -> int | None:
    """The value of a constant float if it is an integer that int32 holds."""
    if not isinstance(limit, Splat) or limit.kind != "float" or not isinstance(limit.value, Int):
        return None
    value = struct.unpack("<f", struct.pack("<I", limit.value.value & 0xFFFFFFFF))[0]
    return int(value) if value.is_integer() and abs(value) < 2**31 else None
