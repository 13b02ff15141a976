"""The window of a core: commands in flight, and in each cycle the one that starts.

What enters is compared once with everything present. From then on each entry keeps masks with a
bit per other entry:

    hazards    older entries that must finish first; cleared when they do
    ahead      older entries of the same engine that have not started; cleared when they do
    shares     entries of other engines that use one of its bank ports (a bit per pair of entries)
    before     which of two entries is older (a bit per pair): the oldest ready one starts

An entry is valid from the cycle after `enter` (its first possible start) to the cycle before its
finish. Tail 0 belongs to empty commands alone, which free their engine in the cycle after their
start and touch nothing; so such an entry goes with its start.

All that a start depends on but the engines' `free` is known in the cycle before. So each entry has
a register, `able`, worked out with the masks as they will be. That takes an arriving command too
long: in its first cycle `new_start` is worked out from masks of its own, which the entry gets as
well. It is the youngest, so it waits for every other that can start.
"""

from __future__ import annotations

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from pagoda.chip.hazards import Ranges, conflict, overlap, select
from pagoda.chip.interfaces import (
    ENGINES,
    LOAD,
    MATRIX,
    STORE,
    VECTOR,
    Description,
    EngineControl,
    Job,
    WriterQuery,
)
from pagoda.isa import timing
from pagoda.isa.chip import Chip
from pagoda.isa.functions import VECTOR_FUNCTIONS
from pagoda.isa.machine import CAUSES
from pagoda.isa.machine import ENGINES as ENGINE_NAMES

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
        self._waiting = Signal(size)  # has not started
        self._running = Signal(size)  # started and not finished
        self._valid = Signal(size)
        self._arrive = Signal(size)  # the entry that the arriving command takes: the lowest free
        self._start = Signal(size)  # the entry that starts
        self._leaving = Signal(size)  # entries that finish in the next cycle, with a tail
        self._engine = [Signal(2, name=f"engine_{i}") for i in self._entries]
        # Cycles from free to finish: the tail, counted down once the engine is free.
        tail_bits = longest_tails(chip)[0].bit_length()
        self._left = [Signal(tail_bits, name=f"left_{i}") for i in self._entries]

    def elaborate(self, platform) -> Module:
        m = Module()
        valid, arrive, running = self._valid, self._arrive, self._running
        empty = Signal(len(self._entries))  # commands without a tail
        next_running = Signal(len(self._entries))
        for i in self._entries:
            occupied = valid[:i].all() if i else 1
            m.d.comb += arrive[i].eq(self.enter & ~valid[i] & occupied)
            with m.If(arrive[i]):
                m.d.sync += [
                    self._engine[i].eq(self.description.engine),
                    empty[i].eq(self.description.tail == 0),
                ]  # fmt: skip
        m.d.comb += [
            valid.eq(self._waiting | running),
            next_running.eq((running & ~self._leaving) | (self._start & ~empty)),
            self.full.eq((valid | arrive).all()), self.empty.eq(~(valid.any() | self.enter)),
        ]  # fmt: skip
        m.d.sync += [
            self._waiting.eq((self._waiting & ~self._start) | arrive), running.eq(next_running),
        ]  # fmt: skip
        self._finish(m)
        hazard, queries = self._compare_ranges(m)
        m.d.comb += [port.busy.eq(busy) for port, busy in zip(self.query, queries, strict=True)]
        self._decide(m, hazard, *self._compare_ports(m), empty)
        return m

    def _own_free(self, i: int) -> Value:
        return Array(engine.free for engine in self.engine)[self._engine[i]]

    def _finish(self, m: Module) -> None:
        """Count tails down: `leaving`."""
        draining = Signal(len(self._entries))  # the engine has been free since an earlier cycle
        last = Signal(len(self._entries))  # `left` is 1
        for i, left in enumerate(self._left):
            freed = self._own_free(i)
            counting = Signal(name=f"counting_{i}")
            m.d.comb += [
                counting.eq(self._running[i] & (draining[i] | freed)),
                self._leaving[i].eq(counting & last[i]),
            ]
            with m.If(self._arrive[i]):
                tail = self.description.tail
                m.d.sync += [left.eq(tail), last[i].eq(tail == 1), draining[i].eq(0)]
            with m.Elif(counting):
                m.d.sync += [left.eq(left - 1), last[i].eq(left == 2), draining[i].eq(1)]

    def _compare_ranges(self, m: Module) -> tuple[Value, list[Value]]:
        """Entries that conflict with the arriving command; whether each query is busy."""
        layout = Ranges(self.chip)
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
            writers = [valid & overlap(ranges.write, asked)
                       for valid, ranges in zip(self._valid, held, strict=True)]  # fmt: skip
            writers.append(self.enter & overlap(arriving.write, asked))
            queries.append(Cat(writers).any())
        hazard = Signal(len(held))
        m.d.comb += hazard.eq(Cat(conflict(ranges, arriving) for ranges in held))
        return hazard, queries

    def _compare_ports(self, m: Module) -> tuple[Value, list[Value]]:
        """The entries with which the arriving command shares a bank port, commands of another
        engine; and per entry what it shares one with."""
        new = self.description
        needed = Cat(new.read_ports, new.write_ports)
        held = [Signal(len(needed), name=f"ports_{i}") for i in self._entries]
        sharing = Signal(len(held))
        m.d.comb += sharing.eq(Cat(
            (needed & ports).any() & (new.engine != engine)
            for ports, engine in zip(held, self._engine, strict=True)
        ))  # fmt: skip
        for i in self._entries:
            with m.If(self._arrive[i]):
                m.d.sync += held[i].eq(needed)
        return sharing, self._pairs(m, "shares", sharing, sharing)

    def _pairs(self, m: Module, name: str, of_new: Value, of_old: Value) -> list[Value]:
        """A register for every two entries. of_new, of_old: what it becomes when one of them
        arrives, as seen from that one and from the other. Per entry: all of its own, with 0 for
        itself."""
        rows = [[C(0) for _ in self._entries] for _ in self._entries]
        for i in self._entries:
            for j in range(i):
                seen_by_i = Signal(name=f"{name}_{i}_{j}")
                seen_by_j = Signal(name=f"{name}_{j}_{i}")
                with m.If(self._arrive[i]):
                    m.d.sync += [seen_by_i.eq(of_new[j]), seen_by_j.eq(of_old[j])]
                with m.Elif(self._arrive[j]):
                    m.d.sync += [seen_by_i.eq(of_old[i]), seen_by_j.eq(of_new[i])]
                rows[i][j], rows[j][i] = seen_by_i, seen_by_j
        return [Cat(row) for row in rows]

    def _decide(
        self, m: Module, hazard: Value, sharing: Value, shares: list[Value], empty: Value
    ) -> None:
        """Start the oldest ready head."""
        size, engine = len(self._entries), self.description.engine
        running, start, leaving = self._running, self._start, self._leaving
        # Two engines use the DRAM port: theirs is one kind of `free`.
        dma = self.engine[LOAD].free & self.engine[STORE].free
        free = Cat(dma, self.engine[MATRIX].free, self.engine[VECTOR].free)
        kind = Cat(~engine[1], engine == MATRIX, engine == VECTOR)  # of the arriving command
        before = self._pairs(m, "before", ~C(0, size), C(0, size))  # the others, if they are older
        ordered, will_be_ordered, is_head, in_order = self._vector_order(m)

        hazards, queue = Signal(size), Signal(size)  # as the arriving command will find them
        m.d.comb += [
            hazards.eq(hazard & self._valid & ~leaving),
            queue.eq(Cat(own == engine for own in self._engine) & self._waiting & ~start),
        ]
        new = [Signal(size, name=f"new_{what}") for what in ("here", "hazards", "queue", "sharing")]
        new_here, new_hazards, new_queue, new_sharing = new
        new_kind, new_in_order, new_start = Signal(len(free)), Signal(), Signal()
        m.d.sync += [
            new_here.eq(self._arrive), new_hazards.eq(hazards), new_queue.eq(queue),
            new_sharing.eq(sharing), new_kind.eq(kind), new_in_order.eq(in_order),
        ]  # fmt: skip
        able = [Signal(size, name=f"able_{number}") for number in range(len(free))]
        others = Cat(able[number].any() & free[number] for number in range(len(free))).any()
        hindered = (new_hazards | new_queue | (new_sharing & running)).any()
        m.d.comb += new_start.eq(~hindered & new_in_order & (new_kind & free).any() & ~others)

        conditions = []
        for i in self._entries:
            own_hazards = Signal(size, name=f"hazards_{i}")  # older ones that must finish first
            ahead = Signal(size, name=f"ahead_{i}")  # older ones of this engine, not started
            own_kind = Signal(len(free), name=f"kind_{i}")  # one of them
            next_hazards, next_ahead = own_hazards & ~leaving, ahead & ~start
            with m.If(self._arrive[i]):
                m.d.sync += [own_hazards.eq(hazards), ahead.eq(queue), own_kind.eq(kind)]
            with m.Else():
                m.d.sync += [own_hazards.eq(next_hazards), ahead.eq(next_ahead)]
            taken = (shares[i] & ((running & ~leaving) | start)).any()
            next_able = (
                self._waiting[i] & ~start[i] & ~next_ahead.any() & ~next_hazards.any()
                & will_be_ordered[i] & ~taken
            )  # fmt: skip
            m.d.sync += [mine[i].eq(next_able & own_kind[n]) for n, mine in enumerate(able)]
            m.d.comb += is_head[i].eq(~ahead.any())
            older = [(before[i] & mine).any() for mine in able]
            blocked = Cat(free[number] & older[number] for number in range(len(free))).any()
            may = Cat(free[number] & able[number][i] for number in range(len(free))).any()
            m.d.comb += start[i].eq((may & ~blocked) | (new_here[i] & new_start))
            conditions.append([
                self._valid[i], is_head[i] & self._own_free(i) & ordered[i], ~own_hazards.any(),
                self._engine[i][1] | dma, ~(shares[i] & running).any(),
            ])  # fmt: skip
        job = self._jobs(m)
        for number, port in enumerate(self.engine):
            mine = Signal(size, name=f"is_{ENGINE_NAMES[number]}")
            for i in self._entries:
                with m.If(self._arrive[i]):
                    m.d.sync += mine[i].eq(engine == number)
            m.d.comb += [port.start.eq((start & mine).any()), port.job.eq(job)]
        self._trace(m, conditions, job, empty)

    def _vector_order(self, m: Module) -> tuple[Value, Value, Value, Value]:
        """Results leave the vector engine in order: a command starts when the one before finishes
        no later than its own tail.

        Per entry: it holds, or this is no vector command; it will in the next cycle; and, for the
        caller to drive: no older command of its engine has to start. Lastly, whether it will hold
        for the arriving command at once.
        """
        bits = longest_tails(self.chip)[1].bit_length()
        free, tail = self.engine[VECTOR].free, self.description.tail[:bits]
        is_vector = self.description.engine == VECTOR
        # Of the vector command that entered last: from free to finish, and then what is left.
        remaining, next_remaining, shortfall = Signal(bits), Signal(bits), Signal(bits)
        vectors = Cat(engine == VECTOR for engine in self._engine)
        draining = free & ~(self._waiting & vectors).any() & (remaining != 0)
        m.d.comb += [
            next_remaining.eq(remaining - draining),
            # Cycles that the arriving command has to wait from there.
            shortfall.eq(Mux(is_vector & (next_remaining > tail), next_remaining - tail, 0)),
        ]
        m.d.sync += remaining.eq(Mux(self.enter & is_vector, tail, next_remaining))
        ordered, is_head = Signal(len(self._entries)), Signal(len(self._entries))
        will_be = Signal(len(self._entries))  # unless it arrives
        for i in self._entries:
            wait = Signal(bits, name=f"order_wait_{i}")
            counting = is_head[i] & free & ~ordered[i]
            m.d.comb += will_be[i].eq(ordered[i] | (counting & (wait == 1)))
            with m.If(self._arrive[i]):
                m.d.sync += [wait.eq(shortfall), ordered[i].eq(shortfall == 0)]
            with m.Else():
                m.d.sync += [wait.eq(wait - counting), ordered[i].eq(will_be[i])]
        return ordered, will_be, is_head, shortfall == 0

    def _jobs(self, m: Module) -> Value:
        """The job of the entry that starts."""
        m.submodules.jobs = jobs = Memory(shape=Job(), depth=len(self._entries), init=[])
        write, read = jobs.write_port(), jobs.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(self.enter), write.addr.eq(select(self._arrive, self._entries)),
            write.data.eq(self.job), read.addr.eq(select(self._start, self._entries)),
        ]  # fmt: skip
        return read.data

    def _trace(
        self, m: Module, conditions: list[list[Value]], job: Value, empty: Value
    ) -> None:
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
            m.d.sync += trace.finished[i].eq(self._leaving[i] | (self._start[i] & empty[i]))
        for engine, freed, index in zip(self.engine, trace.freed, trace.freed_index, strict=True):
            busy = Signal()
            m.d.comb += freed.eq(busy & engine.free)
            with m.If(engine.start):
                m.d.sync += [busy.eq(1), index.eq(job.index)]
            with m.Elif(freed):
                m.d.sync += busy.eq(0)
