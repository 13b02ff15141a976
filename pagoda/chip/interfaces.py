"""What the units of a core say to one another: layouts and port signatures.

Directions in a signature are those of the unit that asks. Cycles are contract cycles: while the
clock enable is low nothing in a core moves, so no unit ever sees a frozen cycle.
"""

from __future__ import annotations

from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip
from pagoda.isa.commands import WORDS_PER_BANK

DRAM_ADDRESS_BITS = 48
ATOM_BITS = 8 * DRAM_ATOM_BYTES
LOAD, STORE, MATRIX, VECTOR = range(4)  # engines, in the order of `pagoda.isa.machine.ENGINES`
ENGINES = 4


class LocalRead(wiring.Signature):
    """Read `size` consecutive bytes of SRAM or ACC from any address: `data` shows them in the next
    cycle, the first byte lowest; bytes beyond `size` are undefined."""

    def __init__(self, chip: Chip):
        super().__init__({
            "enable": Out(1), "acc": Out(1), "address": Out(31),
            "size": Out(range(chip.port_bytes + 1)), "data": In(8 * chip.port_bytes),
        })  # fmt: skip


class LocalWrite(wiring.Signature):
    """Write `size` consecutive bytes; a read in the next cycle sees them."""

    def __init__(self, chip: Chip):
        super().__init__({
            "enable": Out(1), "acc": Out(1), "address": Out(31),
            "size": Out(range(chip.port_bytes + 1)), "data": Out(8 * chip.port_bytes),
        })  # fmt: skip


class SideRead(wiring.Signature):
    """Read `port_bytes` bytes of SRAM from any address beside the engines' ports: the clock enable
    freezes everything while it is served, so `data` shows them in the next cycle and stays until
    the next request of this port."""

    def __init__(self, chip: Chip):
        super().__init__({
            "enable": Out(1), "address": Out(31), "data": In(8 * chip.port_bytes),
        })  # fmt: skip


class DramPort(wiring.Signature):
    """One core's way to DRAM, at most one read and one write a cycle, of aligned 64-byte atoms.

    A read's data are valid exactly `dram_latency` cycles after the cycle of its request, in order;
    they are what all writes up to that cycle left. A write changes the bytes whose mask bit is 1.
    """

    def __init__(self):
        super().__init__({
            "read": Out(1), "read_address": Out(DRAM_ADDRESS_BITS),
            "valid": In(1), "data": In(ATOM_BITS),
            "write": Out(1), "write_address": Out(DRAM_ADDRESS_BITS),
            "write_data": Out(ATOM_BITS), "write_mask": Out(DRAM_ATOM_BYTES),
        })  # fmt: skip


class Side(data.StructLayout):
    """Rows of a transfer in one memory, after merging: `planes` planes of `rows` rows of
    `row_bytes` bytes, the first at `base`. Strides in bytes, as two's complement of that width."""

    def __init__(self):
        super().__init__({
            "base": DRAM_ADDRESS_BITS, "row_bytes": 40, "rows": 21, "row_stride": 48,
            "planes": 21, "plane_stride": 48,
        })  # fmt: skip


class Job(data.StructLayout):
    """A command as its engine gets it: the bank's 16 registers (word 0: go) and what the command
    port worked out. `base`: physical address of the slot's byte 0 (DMA)."""

    def __init__(self):
        super().__init__({
            "bank": 4,
            "empty": 1,  # an extent is 0: occupancy 1, nothing moves
            "words": data.ArrayLayout(32, WORDS_PER_BANK),
            "base": DRAM_ADDRESS_BITS,
            "shared_ab": 1,  # matmul, vector: the hulls of a and b touch a common bank
            "shared_ac": 1,  # vector
            "shared_bc": 1,  # vector
            "per_bank": 2,  # vector: the most source operands that touch one bank; at least 1
            "pc": 32,  # of the store that issued it
            "index": 32,  # per core, in program order
        })  # fmt: skip


class EngineControl(wiring.Signature):
    """Window -> engine. `start` is high in the command's start cycle s, with its job; the engine
    holds `free` low from s + 1 and raises it in cycle s + occupancy, in which the next command may
    start; an idle engine keeps it high."""

    def __init__(self):
        super().__init__({"start": Out(1), "job": Out(Job()), "free": In(1)})


class Range(data.StructLayout):
    """Bytes `first` to `last`; space as in `pagoda.isa.access`: 0 SRAM, 1 ACC, 2 DRAM."""

    def __init__(self):
        super().__init__({
            "valid": 1, "space": 2, "first": DRAM_ADDRESS_BITS, "last": DRAM_ADDRESS_BITS,
        })  # fmt: skip


class Description(data.StructLayout):
    """What the window has to know of a command, beside its job."""

    def __init__(self, chip: Chip):
        banks = chip.sram_banks + chip.acc_banks
        super().__init__({
            "engine": 2,
            "reads": data.ArrayLayout(Range(), 3),
            "write": Range(),
            "read_ports": banks, "write_ports": banks,
            "tail": 18,  # cycles from free to finish
        })  # fmt: skip


class Fault(data.StructLayout):
    """`place`: slot and offset mean something. `command`: index of the command, if `is_command`."""

    def __init__(self):
        super().__init__({
            "kind": 5, "cycle": 48, "pc": 32, "is_command": 1, "command": 32, "place": 1,
            "slot": 32, "offset": 32,
        })  # fmt: skip


class PortStore(wiring.Signature):
    """Control core -> command port: a store that started in cycle t is valid from t + 4 on until
    `ready`. Bank, word, value and pc are there from t + 3 on; value and pc stay for two more cycles
    after the last valid one, bank and word for three.

    The cycle with valid and ready is the store's effect (the entry cycle e of a command; for fence,
    barrier and exit the cycle before they are through); the next instruction starts one later.

    Only words that exist are stored. `drop`: the watchdog ends the wait. A fault comes as a pulse
    of `fault`, at the latest in e + 2, or instead of `ready`."""

    def __init__(self):
        super().__init__({
            "valid": Out(1), "bank": Out(4), "word": Out(4), "value": Out(32), "pc": Out(32),
            "drop": Out(1), "ready": In(1), "fault": In(1), "fault_info": In(Fault()),
        })  # fmt: skip


class WriterQuery(wiring.Signature):
    """Asks the window: `busy` says in the same cycle whether a command in flight still writes one
    of the SRAM bytes `first` to `last`."""

    def __init__(self):
        super().__init__({"first": Out(31), "last": Out(31), "busy": In(1)})


class SlotTable(wiring.Signature):
    """Asynchronous read of the launch's slot table; `exists` is 0 beyond its end."""

    def __init__(self):
        super().__init__({
            "slot": Out(32), "exists": In(1), "base": In(DRAM_ADDRESS_BITS), "bytes": In(32),
            "readable": In(1), "writable": In(1),
        })  # fmt: skip


def dram_slot_ratio(chip: Chip) -> tuple[int, int]:
    """X, the cycles from one DRAM atom slot to the next, as (numerator, denominator)."""
    x = DRAM_ATOM_BYTES / chip.dram_share
    return x.numerator, x.denominator

