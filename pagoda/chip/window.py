"""The window of a core: commands in flight, and in each cycle the one that starts.

What enters is compared once with everything present. From then on each entry keeps masks with a
bit per other entry, cleared when that one starts or finishes, so the decision of a cycle is a few
levels of logic over registers and the engines' `free`:

    conflict   older entries that must finish first (hazards)
    ahead      older entries of the same engine that have not started
    older      older entries of any engine that have not started: the oldest ready one starts
    shares     entries of other engines that use one of its bank ports (a bit per pair of entries)

An entry is `valid` from the cycle after `enter` (its first possible start) to the cycle before its
finish. Tail 0 belongs to empty commands alone, which free their engine in the cycle after their
start; so such an entry goes with its start, and nothing but `start` depends on `free` in the cycle
itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from pagoda.chip.interfaces import (
    ENGINES,
    LOAD,
    STORE,
    VECTOR,
    Description,
    EngineControl,
    Job,
    WriterQuery,
)
from pagoda.isa import timing
from pagoda.isa.access import ACC, DRAM
from pagoda.isa.chip import Chip
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.machine import CAUSES

QUERIES = 2  # the control core's `lw` and the command port's index pass


class WindowTrace(wiring.Signature):
    """What a trace of commands needs; indices are those of the jobs. For simulation: unconnected,
    nothing of it is left.

    entered: in the cycle of `enter`, one after the entry cycle. started: in the start cycle;
    `cause` is a number into `pagoda.isa.machine.CAUSES`. freed (per engine) and finished (per
    entry): in the cycles of these names."""

    def __init__(self, chip: Chip):
        super().__init__({
            "entered": Out(1), "entered_index": Out(32),
            "started": Out(1), "started_index": Out(32), "cause": Out(range(len(CAUSES))),
            "freed": Out(1).array(ENGINES), "freed_index": Out(32).array(ENGINES),
            "finished": Out(1).array(chip.window), "finished_index": Out(32).array(chip.window),
        })  # fmt: skip


class _Ranges(data.StructLayout):
    """The ranges of a command in as few bits as the chip's memories need.

    The checks keep every range inside its memory. In SRAM and ACC the space is the top bit of an
    address, so that comparing addresses compares spaces too. In DRAM a command has one range at
    most, for an accumulating store reads what it writes: `dram`, written if `dram_write`.
    """

    def __init__(self, chip: Chip):
        self.local_bits = (max(chip.sram_bytes, chip.acc_bytes) - 1).bit_length()
        self.dram_bits = (chip.dram_bytes - 1).bit_length()
        self.local = _span(self.local_bits + 1)
        super().__init__({
            "reads": data.ArrayLayout(self.local, 3), "write": self.local,
            "dram": _span(self.dram_bits), "dram_write": 1,
        })  # fmt: skip

    def narrowed(self, m: Module, description: data.View) -> data.View:
        """The ranges of a description, in this layout."""
        narrow = Signal(self)
        pairs = list(zip(description.reads, narrow.reads, strict=True))
        pairs.append((description.write, narrow.write))
        in_dram = []
        for wide, local in pairs:
            m.d.comb += [
                local.valid.eq(wide.valid & (wide.space != DRAM)),
                local.first.eq(Cat(wide.first[: self.local_bits], wide.space == ACC)),
                local.last.eq(Cat(wide.last[: self.local_bits], wide.space == ACC)),
            ]
            in_dram.append(wide.valid & (wide.space == DRAM))
        ranges = [wide for wide, _ in pairs]
        m.d.comb += [
            narrow.dram.valid.eq(Cat(in_dram).any()), narrow.dram_write.eq(in_dram[-1]),
            narrow.dram.first.eq(_select(in_dram, [wide.first for wide in ranges])),
            narrow.dram.last.eq(_select(in_dram, [wide.last for wide in ranges])),
        ]  # fmt: skip
        return narrow


def _span(bits: int) -> data.StructLayout:
    return data.StructLayout({"valid": 1, "first": bits, "last": bits})


def _overlap(a: data.View, b: data.View) -> Value:
    return a.valid & b.valid & (a.first <= b.last) & (b.first <= a.last)


def _conflict(older: data.View, younger: data.View) -> Value:
    """One of two commands (`_Ranges`) writes bytes that the other reads or writes."""
    local = [_overlap(older.write, younger.write)]
    local += [_overlap(older.write, read) for read in younger.reads]
    local += [_overlap(read, younger.write) for read in older.reads]
    dram = _overlap(older.dram, younger.dram) & (older.dram_write | younger.dram_write)
    return Cat(local).any() | dram


def _select(chosen: Iterable[Value], values: Iterable[Value]) -> Value:
    """OR of the chosen values."""
    return reduce(or_, (Mux(yes, value, 0) for yes, value in zip(chosen, values, strict=True)))


def longest_tails(chip: Chip) -> tuple[int, int]:
    """The largest tail of any command, and of any vector-engine command, in cycles."""
    latency = max(function.latency for function in VECTOR_FUNCTIONS.values())
    vector = (
        timing.reduce_rows(chip, 1, 1), timing.reduce_columns(chip, 1, 1), timing.finish(chip, 1),
        timing.transpose(chip, 1, 1), timing.iota(chip, 1, 1), timing.Duration(1, 4 + 2 * latency),
    )  # fmt: skip
    others = (
        timing.load(chip, 1, 1, 1), timing.store(chip, 1, 1, 1, 1), timing.matmul(chip, 1, 1, 1, 1)
    )
    longest = max(duration.tail for duration in vector)
    return max(longest, *(duration.tail for duration in others)), longest


class Window(wiring.Component):
    """The window rule of `pagoda.isa.window` in hardware.

    enter: high in cycle e + 1 of a command that entered in e, with its description and job; e + 2
    is its first possible start. The window must have been not full in e.
    full: `window` commands are unfinished; empty: none is. Both count the command of `enter`, and
    no longer count one in its finish cycle.
    query: `WriterQuery`, of bytes that SRAM has; the command of `enter` counts.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "enter": In(1), "description": In(Description(chip)), "job": In(Job()),
            "full": Out(1), "empty": Out(1),
            "query": In(WriterQuery()).array(QUERIES),
            "engine": Out(EngineControl()).array(ENGINES),
            "trace": Out(WindowTrace(chip)),
        })  # fmt: skip
        size = chip.window
        self._entries = range(size)
        self._valid, self._started = Signal(size), Signal(size)
        self._running = Signal(size)  # started and not finished
        self._arrive = Signal(size)  # the entry that the arriving command takes: the lowest free
        self._start = Signal(size)  # the entry that starts
        self._leaving = Signal(size)  # entries that finish in the next cycle
        self._engine = [Signal(2, name=f"engine_{i}") for i in self._entries]
        # Cycles from free to finish: the tail, counted down once the engine is free.
        tail_bits = longest_tails(chip)[0].bit_length()
        self._left = [Signal(tail_bits, name=f"left_{i}") for i in self._entries]

    def elaborate(self, platform) -> Module:
        m = Module()
        valid, arrive = self._valid, self._arrive
        for i in self._entries:
            occupied = valid[:i].all() if i else 1
            m.d.comb += arrive[i].eq(self.enter & ~valid[i] & occupied)
            with m.If(arrive[i]):
                m.d.sync += self._engine[i].eq(self.description.engine)
        m.d.comb += [
            self._running.eq(valid & self._started),
            self.full.eq((valid | arrive).all()), self.empty.eq(~(valid.any() | self.enter)),
        ]  # fmt: skip
        m.d.sync += [
            valid.eq((valid | arrive) & ~self._leaving),
            self._started.eq((self._started | self._start) & ~arrive),
        ]
        self._finish(m)
        hazard, queries = self._compare_ranges(m)
        m.d.comb += [port.busy.eq(busy) for port, busy in zip(self.query, queries, strict=True)]
        self._decide(m, hazard, self._compare_ports(m))
        return m

    def _own_free(self, i: int) -> Value:
        return Array(engine.free for engine in self.engine)[self._engine[i]]

    def _finish(self, m: Module) -> None:
        """Count tails down: `leaving`."""
        draining = Signal(len(self._entries))  # the engine has been free since an earlier cycle
        last = Signal(len(self._entries))  # `left` is 1
        empty = Signal(len(self._entries))  # the tail was 0
        for i, left in enumerate(self._left):
            freed = self._own_free(i)
            counting = Signal(name=f"counting_{i}")
            m.d.comb += [
                counting.eq(self._running[i] & (draining[i] | freed)),
                self._leaving[i].eq((counting & last[i]) | (self._start[i] & empty[i])),
            ]
            with m.If(self._arrive[i]):
                tail = self.description.tail
                m.d.sync += [
                    left.eq(tail), last[i].eq(tail == 1), empty[i].eq(tail == 0),
                    draining[i].eq(0),
                ]  # fmt: skip
            with m.Elif(counting):
                m.d.sync += [left.eq(left - 1), last[i].eq(left == 2), draining[i].eq(1)]

    def _compare_ranges(self, m: Module) -> tuple[Value, list[Value]]:
        """Entries that conflict with the arriving command; whether each query is busy."""
        layout = _Ranges(self.chip)
        arriving = layout.narrowed(m, self.description)
        held = [Signal(layout, name=f"ranges_{i}") for i in self._entries]
        for i, ranges in enumerate(held):
            with m.If(self._arrive[i]):
                m.d.sync += ranges.eq(arriving)
        queries = []
        for port in self.query:
            asked = Signal(layout.local)
            m.d.comb += [
                asked.valid.eq(1), asked.first.eq(port.first[: layout.local_bits]),
                asked.last.eq(port.last[: layout.local_bits]),
            ]  # fmt: skip
            writers = [valid & _overlap(ranges.write, asked)
                       for valid, ranges in zip(self._valid, held, strict=True)]  # fmt: skip
            writers.append(self.enter & _overlap(arriving.write, asked))
            queries.append(Cat(writers).any())
        hazard = Signal(len(held))
        m.d.comb += hazard.eq(Cat(_conflict(ranges, arriving) for ranges in held))
        return hazard, queries

    def _compare_ports(self, m: Module) -> list[Value]:
        """Per entry: a command of another engine holds one of its bank ports."""
        new = self.description
        needed = Cat(new.read_ports, new.write_ports)
        held = [Signal(len(needed), name=f"ports_{i}") for i in self._entries]
        sharing = Signal(len(held))  # entries with which the arriving command shares one
        m.d.comb += sharing.eq(Cat(
            (needed & ports).any() & (new.engine != engine)
            for ports, engine in zip(held, self._engine, strict=True)
        ))  # fmt: skip
        taken = [[] for _ in self._entries]
        for i in self._entries:
            with m.If(self._arrive[i]):
                m.d.sync += held[i].eq(needed)
            for j in range(i):
                both = Signal(name=f"shares_{i}_{j}")
                with m.If(self._arrive[i]):
                    m.d.sync += both.eq(sharing[j])
                with m.Elif(self._arrive[j]):
                    m.d.sync += both.eq(sharing[i])
                taken[i].append(both & self._running[j])
                taken[j].append(both & self._running[i])
        return [Cat(blocking).any() for blocking in taken]

    def _decide(self, m: Module, hazard: Value, port_taken: list[Value]) -> None:
        """Start the oldest ready head."""
        size = len(self._entries)
        waiting, staying, same, dram_free = Signal(size), Signal(size), Signal(size), Signal()
        m.d.comb += [
            waiting.eq(self._valid & ~self._started & ~self._start),
            staying.eq(self._valid & ~self._leaving),
            same.eq(Cat(engine == self.description.engine for engine in self._engine)),
            dram_free.eq(self.engine[LOAD].free & self.engine[STORE].free),
        ]
        ordered, is_head = self._vector_order(m)
        ready, conditions = Signal(size), []
        for i in self._entries:
            conflict = Signal(size, name=f"conflict_{i}")  # older ones that must finish first
            ahead = Signal(size, name=f"ahead_{i}")  # older ones of this engine, not started
            older = Signal(size, name=f"older_{i}")  # older ones, not started
            with m.If(self._arrive[i]):
                m.d.sync += [
                    conflict.eq(hazard & staying), ahead.eq(same & waiting), older.eq(waiting),
                ]  # fmt: skip
            with m.Else():
                m.d.sync += [
                    conflict.eq(conflict & ~self._leaving), ahead.eq(ahead & ~self._start),
                    older.eq(older & ~self._start),
                ]  # fmt: skip
            is_dma = ~self._engine[i][1]
            conditions.append([
                self._valid[i], is_head[i] & self._own_free(i) & ordered[i], ~conflict.any(),
                ~is_dma | dram_free, ~port_taken[i],
            ])  # fmt: skip
            m.d.comb += [
                is_head[i].eq(~ahead.any()),
                ready[i].eq(Cat(conditions[i]).all() & ~self._started[i]),
                self._start[i].eq(ready[i] & ~(older & ready).any()),
            ]
        job = self._jobs(m)
        for number, engine in enumerate(self.engine):
            mine = Cat(kind == number for kind in self._engine)
            m.d.comb += [engine.start.eq((self._start & mine).any()), engine.job.eq(job)]
        self._trace(m, conditions, job)

    def _vector_order(self, m: Module) -> tuple[Value, Value]:
        """Results leave the vector engine in order: a command starts when the one before finishes
        no later than its own tail.

        Per entry: it holds, or this is no vector command; and, for the caller to drive: no older
        command of its engine has to start.
        """
        bits = longest_tails(self.chip)[1].bit_length()
        free, tail = self.engine[VECTOR].free, self.description.tail[:bits]
        is_vector = self.description.engine == VECTOR
        # Of the vector command that entered last: from free to finish, and then what is left.
        remaining, next_remaining, shortfall = Signal(bits), Signal(bits), Signal(bits)
        unstarted = [
            valid & ~started & (engine == VECTOR)
            for valid, started, engine in zip(
                self._valid, self._started, self._engine, strict=True
            )
        ]
        draining = free & ~Cat(unstarted).any() & (remaining != 0)
        m.d.comb += [
            next_remaining.eq(remaining - draining),
            # Cycles that the arriving command has to wait from there.
            shortfall.eq(Mux(is_vector & (next_remaining > tail), next_remaining - tail, 0)),
        ]
        m.d.sync += remaining.eq(Mux(self.enter & is_vector, tail, next_remaining))
        ordered, is_head = Signal(len(self._entries)), Signal(len(self._entries))
        for i in self._entries:
            wait = Signal(bits, name=f"order_wait_{i}")
            with m.If(self._arrive[i]):
                m.d.sync += [wait.eq(shortfall), ordered[i].eq(shortfall == 0)]
            with m.Elif(is_head[i] & free & ~ordered[i]):
                m.d.sync += [wait.eq(wait - 1), ordered[i].eq(wait == 1)]
        return ordered, is_head

    def _jobs(self, m: Module) -> Value:
        """The job of the entry that starts."""
        m.submodules.jobs = jobs = Memory(shape=Job(), depth=len(self._entries), init=[])
        write, read = jobs.write_port(), jobs.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(self.enter), write.addr.eq(_select(self._arrive, self._entries)),
            write.data.eq(self.job), read.addr.eq(_select(self._start, self._entries)),
        ]  # fmt: skip
        return read.data

    def _trace(self, m: Module, conditions: list[list[Value]], job: Value) -> None:
        """The cause is the first condition that did not hold in the cycle before the start."""
        trace = self.trace
        m.d.comb += [
            trace.entered.eq(self.enter), trace.entered_index.eq(self.job.index),
            trace.started.eq(self._start.any()), trace.started_index.eq(job.index),
        ]  # fmt: skip
        taken = self.engine[LOAD].start | self.engine[STORE].start
        for i, (entry, engine, hazard, dram_port, bank_port) in enumerate(conditions):
            # An empty command takes the port for one cycle, without lowering `free`.
            dram_port = dram_port & (self._engine[i][1] | ~taken)
            before = Signal(len(CAUSES) - 1, name=f"before_{i}")
            m.d.sync += before.eq(Cat(entry, engine, hazard, dram_port, bank_port))
            cause = C(CAUSES.index("start slot"))
            for number in reversed(range(len(before))):
                cause = Mux(before[number], cause, number)
            with m.If(self._start[i]):
                m.d.comb += trace.cause.eq(cause)
            index = trace.finished_index[i]
            with m.If(self._arrive[i]):
                m.d.sync += index.eq(self.job.index)
            m.d.sync += trace.finished[i].eq(self._leaving[i])
        for engine, freed, index in zip(self.engine, trace.freed, trace.freed_index, strict=True):
            busy = Signal()
            m.d.comb += freed.eq(busy & engine.free)
            with m.If(engine.start):
                m.d.sync += [busy.eq(1), index.eq(job.index)]
            with m.Elif(freed):
                m.d.sync += busy.eq(0)
