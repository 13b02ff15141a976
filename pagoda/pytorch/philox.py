"""Random numbers inside a loop nest: Philox2x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011).

A draw depends on its seed and its position alone, so it is the same on every chip and for every
loop order. The seed is the key, the position the first word of the counter; the second is 0.
"""

from __future__ import annotations

import math

from pagoda.compiler.loop_nest import Builder

MULTIPLIER = 0xD256D193
WEYL = 0x9E3779B9  # what the key grows by, each round
ROUNDS = 10


class Philox:
    """Emits draws. seed, position: numbers of integer values of the builder."""

    def __init__(self, builder: Builder, seed: int, position: int) -> None:
        self._b = builder
        self._words = self._generate(builder.cast(seed, "int32"), builder.cast(position, "int32"))

    def uniform(self) -> int:
        """float32 in [0, 1), a multiple of 2**-24."""
        return self._fraction(self._words[0], 0.0)

    def normal(self) -> int:
        """float32, by Box and Muller's method from both words."""
        b = self._b
        radius = b.pointwise("log", self._fraction(self._words[0], 1.0))
        radius = b.pointwise("sqrt", b.pointwise("mul", radius, b.constant(-2.0, "float32")))
        turn = self._fraction(self._words[1], 0.0)
        angle = b.pointwise("mul", turn, b.constant(2 * math.pi, "float32"))
        return b.pointwise("mul", radius, b.pointwise("cos", angle))

    def below(self, span: int) -> int:
        """31 bits modulo the integer `span`."""
        bits = self._both("bitwise_and", self._words[0], 0x7FFFFFFF)
        return self._b.pointwise("remainder", bits, span)

    def _fraction(self, word: int, first: float) -> int:
        """The upper 24 bits, plus `first`, times 2**-24."""
        b = self._b
        bits = b.cast(self._high(word, 8), "float32")
        bits = b.pointwise("add", bits, b.constant(first, "float32")) if first else bits
        return b.pointwise("mul", bits, b.constant(2.0**-24, "float32"))

    def _generate(self, key: int, left: int) -> tuple[int, int]:
        right = self._b.constant(0, "int32")
        for number in range(ROUNDS):
            if number:
                key = self._both("add", key, WEYL)
            high = self._multiplied_high(left)
            mixed = self._b.pointwise("bitwise_xor", high, key)
            mixed = self._b.pointwise("bitwise_xor", mixed, right)
            left, right = mixed, self._both("mul", left, MULTIPLIER)
        return left, right

    def _multiplied_high(self, x: int) -> int:
        """The upper 32 of the 64 bits of x * MULTIPLIER, from products of halves: int32 arithmetic
        keeps the lower 32 bits."""
        b = self._b
        low, high = self._both("bitwise_and", x, 0xFFFF), self._high(x, 16)
        factor_low, factor_high = MULTIPLIER & 0xFFFF, MULTIPLIER >> 16
        middle = b.pointwise(
            "add", self._both("mul", high, factor_low),
            self._high(self._both("mul", low, factor_low), 16),
        )  # fmt: skip
        other = b.pointwise(
            "add", self._both("mul", low, factor_high), self._both("bitwise_and", middle, 0xFFFF)
        )
        carried = b.pointwise("add", self._high(middle, 16), self._high(other, 16))
        return b.pointwise("add", self._both("mul", high, factor_high), carried)

    def _high(self, x: int, bits: int) -> int:
        """Unsigned shift to the right."""
        shifted = self._both("shift_right", x, bits)
        return self._both("bitwise_and", shifted, (1 << (32 - bits)) - 1)

    def _both(self, name: str, x: int, constant: int) -> int:
        signed = constant - (1 << 32) if constant >= 1 << 31 else constant
        return self._b.pointwise(name, x, self._b.constant(signed, "int32"))
