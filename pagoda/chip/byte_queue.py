"""A queue of bytes: any number of them enters and leaves in every cycle, up to its widths."""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2


class ByteQueue(wiring.Component):
    """Holds `capacity` bytes, a power of two.

    A write in one cycle counts in `level` from the next one on. `read` takes the oldest
    `read_size` bytes, which `read_data` shows in the same cycle; bytes before and beyond them are
    undefined. Nothing is checked: read and write only what `level` permits.

    Bytes lie in `width` lanes, one after another from lane 0 on, and again; who writes or reads
    says how many lanes they have to move up, modulo `width`:

    write_left  lane of the next byte that is written, less the place of the first one in write_data
    read_left   place that the oldest byte is to have in read_data, less its lane
    """

    def __init__(self, write_bytes: int, read_bytes: int, capacity: int):
        self.width = 1 << ceil_log2(max(write_bytes, read_bytes))
        if capacity < 4 * self.width or capacity & (capacity - 1):
            raise ValueError(
                f"ByteQueue: capacity {capacity}: must be a power of two of at least "
                f"{4 * self.width}, four of its words"
            )
        self.write_bytes, self.read_bytes, self.capacity = write_bytes, read_bytes, capacity
        super().__init__({
            "write_size": In(range(write_bytes + 1)), "write_left": In(range(self.width)),
            "write_data": In(8 * write_bytes), "level": Out(range(capacity + 1)),
            "read": In(1), "read_size": In(range(read_bytes + 1)),
            "read_left": In(range(self.width)), "read_data": Out(8 * read_bytes),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        width = self.width
        # Words lie alternately in two memories: bytes in a row touch at most one word of each.
        rows = self.capacity // (2 * width)
        head, tail = Signal(range(self.capacity)), Signal(range(self.capacity))
        more, change = Signal.like(self.level), Signal(range(-width, width + 1))
        m.d.comb += [
            more.eq(self.level + self.write_size), change.eq(self.write_size - self.read_size),
        ]  # fmt: skip
        m.d.sync += [
            tail.eq(tail + self.write_size),
            self.level.eq(Mux(self.read, self.level + change, more)),
        ]
        with m.If(self.read):
            m.d.sync += head.eq(head + self.read_size)
        lane_bits = ceil_log2(width)
        head_lane, head_word = head[:lane_bits], head[lane_bits:]
        tail_lane, tail_word = tail[:lane_bits], tail[lane_bits:]

        # Lanes from the tail's to the one before the new tail's, over the top if that is lower.
        end, wraps = Signal(lane_bits), Signal()
        m.d.comb += Cat(end, wraps).eq(tail_lane + self.write_size)
        written = _rotated_left(m, self.write_data, self.write_left, width, 8, "write")
        from_head = []
        for parity in range(2):
            bank = m.submodules[f"bank_{parity}"] = memory.Memory(
                shape=8 * width, depth=rows, init=[]
            )
            port = bank.write_port(granularity=8)
            enables = []
            for lane in range(width):
                # The bytes before the tail's lane belong to the word behind the tail's.
                behind, before_end = C(lane) < tail_lane, C(lane) < end
                mine = tail_word[0] ^ behind ^ (parity == 0)
                enables.append(mine & Mux(wraps, ~behind | before_end, ~behind & before_end))
            m.d.comb += [
                port.addr.eq((tail_word + (1 - parity)) >> 1),
                port.data.eq(written), port.en.eq(Cat(enables)),
            ]  # fmt: skip
            reader = bank.read_port(domain="comb")
            m.d.comb += reader.addr.eq((head_word + (1 - parity)) >> 1)
            from_head.append(reader.data)
        merged = Signal(8 * width)
        for lane in range(width):
            odd = head_word[0] ^ (C(lane) < head_lane)
            m.d.comb += merged.word_select(lane, 8).eq(
                Mux(odd, *(bank.word_select(lane, 8) for bank in reversed(from_head)))
            )
        m.d.comb += self.read_data.eq(_rotated_left(m, merged, self.read_left, width, 8, "read"))
        return m


def _rotated_left(
    m: Module, value: Value, places: Value, lanes: int, bits: int, name: str
) -> Signal:
    """`value` in `lanes` lanes of `bits` bits, moved up by `places` lanes; what leaves at the top
    enters at the bottom."""
    now = Signal(lanes * bits, name=f"{name}_rotated_0")
    m.d.comb += now.eq(value)
    for bit in range(len(places)):
        moved = Signal(lanes * bits, name=f"{name}_rotated_{bit + 1}")
        m.d.comb += moved.eq(Mux(places[bit], now.rotate_left(bits << bit), now))
        now = moved
    return now
