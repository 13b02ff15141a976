"""The window rule: in which cycle each command of a core starts, and when it finishes.

Events are worked out lazily: a start is committed when the window needs space or the control core
waits. That gives the same cycles as committing at once, because a command that enters in cycle e
starts no earlier than e + 2 and so cannot take part in anything before.
"""

from __future__ import annotations

from pagoda.sim.jit import jit, store_i64
from pagoda.sim.layout import (
    BUSY,
    CAUSE_BANK,
    CAUSE_ENGINE,
    CAUSE_ENTRY,
    CAUSE_HAZARD,
    CAUSE_PORT,
    CAUSE_SLOT,
    DRAM_BIT,
    E_CAUSE,
    E_ENGINE,
    E_ENTRY,
    E_FINISH,
    E_FREE,
    E_HAZARD_FREE,
    E_INDEX,
    E_LEAD,
    E_OCCUPANCY,
    E_READ_BANKS,
    E_READ_RANGES,
    E_READS,
    E_START,
    E_TAIL,
    E_WAITS,
    E_WRITE_BANKS,
    E_WRITE_FIRST,
    E_WRITE_LAST,
    ENGINE_FREE,
    ENTRIES,
    ENTRY_WORDS,
    IN_FLIGHT,
    INDEX_BIT,
    LAST_FINISH,
    LAST_START,
    NEVER,
    ORDER,
    PERIOD_DENOMINATOR,
    PERIOD_NUMERATOR,
    PORT_FREE,
    RESULTS_FREE,
    STORE,
    TRACE_AT,
    TRACE_WORDS,
    TRACING,
    VECTOR,
    WINDOW,
)

BANK_PORTS = DRAM_BIT - 1


@jit
def entry_at(st, position):
    """Where the entry at a position of the order lies in the state."""
    return ENTRIES + ENTRY_WORDS * st[ORDER + position]


@jit
def first_turn(st, cycle):
    """The cycle in which the first turn of the DRAM port at `cycle` or later opens."""
    n, d = st[PERIOD_NUMERATOR], st[PERIOD_DENOMINATOR]
    turn = 0
    if cycle > 0:  # split so that no product overflows
        before = cycle - 1
        turn = before // n * d + before % n * d // n + 1
    return turn // d * n + (turn % d * n + d - 1) // d


@jit
def _bank_free(st, e):
    """First cycle in which no other engine's running command holds a bank port that `e` needs."""
    reads, writes = st[e + E_READ_BANKS] & BANK_PORTS, st[e + E_WRITE_BANKS] & BANK_PORTS
    free = 0
    for i in range(st[IN_FLIGHT]):
        o = entry_at(st, i)
        shared = (st[o + E_READ_BANKS] & reads) | (st[o + E_WRITE_BANKS] & writes)
        if shared and st[o + E_START] >= 0 and st[o + E_ENGINE] != st[e + E_ENGINE]:
            free = max(free, st[o + E_FINISH])
    return free


@jit
def _engine_free(st, e):
    """First cycle in which the engine takes `e`; the vector engine's results stay in order."""
    engine = st[e + E_ENGINE]
    free = st[ENGINE_FREE + engine]
    if engine == VECTOR:
        free = max(free, st[RESULTS_FREE] - st[e + E_TAIL])
    return free


@jit
def start_next(st, until):
    """Start the next command if that happens in cycle `until` or before; whether it did."""
    best = NEVER
    chosen = -1
    earliest = st[LAST_START] + 1
    seen = 0
    for i in range(st[IN_FLIGHT]):
        e = entry_at(st, i)
        engine = st[e + E_ENGINE]
        if st[e + E_START] >= 0 or (seen >> engine) & 1:
            continue
        seen |= 1 << engine
        if st[e + E_WAITS] != 0:
            continue
        cycle = max(earliest, st[e + E_ENTRY] + 2)
        cycle = max(cycle, max(_engine_free(st, e), st[e + E_HAZARD_FREE]))
        if engine <= STORE:
            cycle = max(cycle, st[PORT_FREE])
        if cycle >= best or cycle > until:
            continue
        cycle = max(cycle, _bank_free(st, e))
        if cycle < best and cycle <= until:
            best = cycle
            chosen = i
    if chosen < 0:
        return False
    _start(st, chosen, best)
    return True


@jit
def _start(st, position, cycle):
    e = entry_at(st, position)
    engine = st[e + E_ENGINE]
    if cycle == st[e + E_ENTRY] + 2:
        cause = CAUSE_ENTRY
    elif cycle == _engine_free(st, e):
        cause = CAUSE_ENGINE
    elif cycle == st[e + E_HAZARD_FREE]:
        cause = CAUSE_HAZARD
    elif engine <= STORE and cycle == st[PORT_FREE]:
        cause = CAUSE_PORT
    elif cycle == _bank_free(st, e):
        cause = CAUSE_BANK
    else:
        cause = CAUSE_SLOT
    occupancy = st[e + E_OCCUPANCY]
    if st[e + E_LEAD] >= 0:
        occupancy += first_turn(st, cycle + st[e + E_LEAD]) - cycle
    free = cycle + occupancy
    finish = free + st[e + E_TAIL]
    st[e + E_START] = cycle
    st[e + E_FREE] = free
    st[e + E_FINISH] = finish
    st[e + E_CAUSE] = cause
    st[ENGINE_FREE + engine] = free
    st[BUSY + engine] += occupancy
    if engine <= STORE:
        st[PORT_FREE] = free
    if engine == VECTOR:
        st[RESULTS_FREE] = finish
    st[LAST_START] = cycle
    st[LAST_FINISH] = max(st[LAST_FINISH], finish)
    bit = 1 << st[ORDER + position]
    for i in range(position + 1, st[IN_FLIGHT]):
        younger = entry_at(st, i)
        if st[younger + E_WAITS] & bit:
            st[younger + E_WAITS] ^= bit
            st[younger + E_HAZARD_FREE] = max(st[younger + E_HAZARD_FREE], finish)
    if st[TRACING]:
        row = st[TRACE_AT] + 8 * TRACE_WORDS * st[e + E_INDEX]
        for i in range(TRACE_WORDS):
            store_i64(row, i, st[e + i])


@jit
def _retire(st, cycle):
    """Commit the starts up to `cycle`; entries finished by then leave."""
    while start_next(st, cycle):
        pass
    # What still waits starts later: those that leave, and their ports, no longer matter.
    st[LAST_START] = max(st[LAST_START], cycle)
    kept = 0
    total = st[IN_FLIGHT]
    for i in range(total):
        number = st[ORDER + i]
        e = ENTRIES + ENTRY_WORDS * number
        if st[e + E_START] < 0 or st[e + E_FINISH] > cycle:
            st[ORDER + i] = st[ORDER + kept]
            st[ORDER + kept] = number
            kept += 1
    st[IN_FLIGHT] = kept


@jit
def space(st, cycle):
    """The first cycle from `cycle` on in which the window has space; it then has."""
    if st[IN_FLIGHT] < st[WINDOW]:
        return cycle
    _retire(st, cycle)
    if st[IN_FLIGHT] < st[WINDOW]:
        return cycle
    while True:
        first = NEVER
        for i in range(st[IN_FLIGHT]):
            e = entry_at(st, i)
            if st[e + E_START] >= 0:
                first = min(first, st[e + E_FINISH])
        if not start_next(st, first - 1):
            _retire(st, first)
            return first


@jit
def _conflict(st, x, y):
    """Whether the older entry x and the younger y may not run at the same time."""
    xr, xw = st[x + E_READ_BANKS], st[x + E_WRITE_BANKS]
    yr, yw = st[y + E_READ_BANKS], st[y + E_WRITE_BANKS]
    if (xw & (yr | yw)) | (xr & yw) == 0 and (xr | yr) & INDEX_BIT == 0:
        return False  # no bank in common, and not both in DRAM
    x_first, x_last = st[x + E_WRITE_FIRST], st[x + E_WRITE_LAST]
    y_first, y_last = st[y + E_WRITE_FIRST], st[y + E_WRITE_LAST]
    if x_first <= y_last and y_first <= x_last:
        return True
    for k in range(st[y + E_READS]):
        at = y + E_READ_RANGES + 2 * k
        if x_first <= st[at + 1] and st[at] <= x_last:
            return True
    for k in range(st[x + E_READS]):
        at = x + E_READ_RANGES + 2 * k
        if y_first <= st[at + 1] and st[at] <= y_last:
            return True
    return False


@jit
def enter(st, number, cycle):
    """Entry `number`, prepared, joins its queue in `cycle`; the window has space."""
    e = ENTRIES + ENTRY_WORDS * number
    total = st[IN_FLIGHT]
    waits = 0
    hazard_free = 0
    for i in range(total):
        older = entry_at(st, i)
        if st[older + E_START] >= 0:
            if st[older + E_FINISH] > cycle and _conflict(st, older, e):
                hazard_free = max(hazard_free, st[older + E_FINISH])
        elif _conflict(st, older, e):
            waits |= 1 << st[ORDER + i]
    st[e + E_WAITS] = waits
    st[e + E_HAZARD_FREE] = hazard_free
    st[e + E_ENTRY] = cycle
    st[e + E_START] = -1
    place = total
    while st[ORDER + place] != number:
        place += 1
    st[ORDER + place] = st[ORDER + total]
    st[ORDER + total] = number
    st[IN_FLIGHT] = total + 1


@jit
def written(st, first, last, cycle):
    """The first cycle from `cycle` on in which nothing in flight will still write the bytes."""
    done = cycle
    for i in range(st[IN_FLIGHT]):
        e = entry_at(st, i)
        if st[e + E_WRITE_FIRST] <= last and first <= st[e + E_WRITE_LAST]:
            while st[e + E_START] < 0:
                start_next(st, NEVER - 1)
            done = max(done, st[e + E_FINISH])
    return done


@jit
def drain(st):
    """Start everything; the cycle in which the last command so far finishes."""
    while start_next(st, NEVER - 1):
        pass
    return st[LAST_FINISH]
