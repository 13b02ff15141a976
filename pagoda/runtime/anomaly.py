"""Looks for NaN in what kernels write: each call is launched on its own, and its results are read.

Only what a call has written counts. NaN that lies in its results before it runs is replaced by a
NaN of a pattern that the chip never makes, and put back where it is still there afterwards. In a
tensor that the call reads, too, an element that was NaN before does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pagoda.compiler.executable import Call
from pagoda.compiler.region import Buffer, View

_SIGN_AND_INFINITY = {
    "float32": (np.uint32(1 << 31), np.uint32(0x7F800000)),
    "bfloat16": (np.uint16(1 << 15), np.uint16(0x7F80)),
}


class AnomalyError(RuntimeError):
    """A kernel wrote NaN (or infinity, if asked for); the message names it, the line and the
    element. The device stays usable."""


@dataclass(frozen=True)
class AnomalyCheck:
    """infinities: whether they count, too. user_line: says which line of the user's runs now, for
    kernels that do not know where they come from."""

    infinities: bool = False
    user_line: Callable[[], str] = lambda: ""

    def bad(self, values: np.ndarray, dtype: str) -> np.ndarray:
        """Which elements count; values as words."""
        sign, infinity = _SIGN_AND_INFINITY[dtype]
        return (values & ~sign) >= infinity + (not self.infinities)

    @property
    def name(self) -> str:
        return "NaN or infinity" if self.infinities else "NaN"


_STORED = {"float32": np.uint32, "bfloat16": np.uint16}
_MARK = {"float32": 0x7FA5A5A5, "bfloat16": 0x7FA5}  # signalling NaNs: arithmetic gives quiet ones


class WatchedCall:
    """One kernel call: `before` it runs, then `after` it. array: a flat buffer in device memory."""

    def __init__(
        self,
        check: AnomalyCheck,
        call: Call,
        buffers: Sequence[Buffer],
        symbols: Mapping[str, int],
        array: Callable[[int, type], np.ndarray],
    ) -> None:
        self.check, self.call, self.buffers = check, call, buffers
        self.symbols, self.array = symbols, array
        self._old: list[tuple[np.ndarray, np.ndarray] | None] = []  # which, and their values

    def before(self) -> None:
        read = {view.buffer for view in self.call.reads}
        for view in self.call.writes:
            values = self._values(view)
            if values is None:
                self._old.append(None)
                continue
            bad = self.check.bad(values, view.dtype)
            self._old.append((bad, values[bad]))
            if view.buffer not in read:
                values[bad] = _MARK[view.dtype]

    def after(self) -> None:
        """Raises AnomalyError."""
        read = {view.buffer for view in self.call.reads}
        for view, old in zip(self.call.writes, self._old, strict=True):
            values = self._values(view)
            if values is None or old is None:
                continue
            bad, kept = old
            still = bad.copy()
            if view.buffer not in read:
                still &= values == _MARK[view.dtype]
                values[still] = kept[still[bad]]
            new = self.check.bad(values, view.dtype) & ~still
            if new.any():
                raise AnomalyError(self._explain(view, new))

    def _values(self, view: View) -> np.ndarray | None:
        """The elements of a view as words, in place; None for types without NaN."""
        if view.dtype not in _STORED:
            return None
        flat = self.array(view.buffer, _STORED[view.dtype])
        sizes = [int(size.evaluate(self.symbols)) for size in view.sizes]
        if 0 in sizes:
            return None
        strides = [int(s.evaluate(self.symbols)) * flat.itemsize for s in view.strides]
        start = flat[int(view.offset.evaluate(self.symbols)) :]
        return np.lib.stride_tricks.as_strided(start, sizes, strides)

    def _holds(self, view: View) -> bool:
        values = self._values(view)
        return values is not None and bool(self.check.bad(values, view.dtype).any())

    def _explain(self, view: View, new: np.ndarray) -> str:
        call, what = self.call, self.check.name
        index = tuple(map(int, np.unravel_index(int(np.argmax(new)), new.shape)))
        held = [view for view in call.reads if self._holds(view)]
        given = ", ".join(dict.fromkeys(self._tensor(view) for view in held))
        layers = f" in layer {', '.join(call.place.layers)}" if call.place.layers else ""
        lines = " and ".join(call.place.lines) or self.check.user_line()
        remedy = (
            "follow it back to where it comes from"
            if held
            else "look there for a division by zero, a logarithm or root of a negative number, "
            "or an overflow"
        )
        return (
            f"kernel {call.kernel!r} ({call.origin or 'no origin known'}){layers} wrote {what}: "
            f"{int(new.sum()):,} of {new.size:,} elements of {self._tensor(view)}, the first at "
            f"index {list(index)}; "
            + (f"it computes what stands in {lines}; " if lines else "")
            + (f"{what} was in its operand {given} already; " if held else "no operand held any; ")
            + remedy
        )

    def _tensor(self, view: View) -> str:
        buffer = self.buffers[view.buffer]
        kinds = {"input": "argument", "output": "result", "temporary": "intermediate result"}
        kind = "weight" if buffer.weight else kinds.get(buffer.kind, buffer.kind)
        sizes = [int(size.evaluate(self.symbols)) for size in view.sizes]
        return f"{kind} {buffer.name!r} ({view.dtype}{sizes})"
