"""What commands do to values: at once, or in program order on a helper thread.

The control core and the window need no values but those that a load instruction or a gather's
index reads. So with a helper the core's thread only works out cycles and posts each command in a
ring; the helper executes them in order. Whoever waits for the other takes chunks of long matmuls.
Neither values nor cycles depend on any of that.

Words that both threads look at, and the ring, are in the array `jobs`; commands are numbered from
1 on. `shared` is the array's address.
"""

from __future__ import annotations

import numpy as np

from pagoda.sim.jit import (
    atomic_add,
    atomic_load,
    atomic_store,
    give_way,
    jit,
    pause,
)
from pagoda.sim.layout import (
    E_INDEX,
    E_MACS,
    E_PC,
    E_READ_RANGES,
    E_READS,
    E_WRITE_FIRST,
    E_WRITE_LAST,
    FIELDS,
    JOBS_AT,
    MAX_READS,
    OVERFLOW_COMMAND,
    OVERFLOW_PC,
    POSTED,
)
from pagoda.sim.matmul import M0, M1, M2, N, run_matmul, run_matmul_range
from pagoda.sim.microkernel import TILE_COLUMNS
from pagoda.sim.reduce import run_finish, run_reduce
from pagoda.sim.transfer import run_gather, run_load, run_scatter, run_store
from pagoda.sim.vector import run_iota, run_transpose, run_vector

# On cache lines of their own: last command posted, last one executed; whether the helper is to
# stop; the ticket of the matmul that is shared now, and how many of its chunks are done.
_NEWEST, COMPLETED, STOP, _TICKET, _DONE = range(0, 40, 8)
_SHARED_MATMUL = 40  # the sixteen words of the command, then its MACs
_SHARED_MACS = 56
_RING = 64
_RING_SLOTS = 64
_SLOT_WORDS = 24
_BANK, _PC, _COMMAND, _MACS = range(4)
# The bytes that a command writes, and those that it reads: first and last of each range.
_WRITE_FIRST, _WRITE_LAST, _READS = range(4, 7)
_READ_RANGES = 7
_FIELDS_AT = _READ_RANGES + 2 * MAX_READS  # its sixteen words of 32 bits, two and two
JOB_WORDS = _RING + _RING_SLOTS * _SLOT_WORDS

_MATMUL = FIELDS + 16 * 5
_ACC_WORD = _MATMUL + 14
_COUNT_BITS = 20
_COUNT_MASK = (1 << _COUNT_BITS) - 1
# A chunk should take some microseconds: to claim one takes a tenth of one.
_CHUNK_MACS = 1 << 17
_LEAST_CHUNKS, _LEAST_ROWS = 2, 64
_IMPATIENT_TURNS = 1 << 12  # of a waiting loop, some tens of microseconds, before it gives way


@jit
def execute(st, bank, sram, acc, scratch):
    """The command in a bank's fields. Returns whether an int64 did not fit."""
    overflow = False
    if bank == 1:
        overflow = run_load(st, bank)
    elif bank == 2:
        run_store(st, bank)
    elif bank == 3:
        overflow = run_gather(st, bank)
    elif bank == 4:
        run_scatter(st, bank)
    elif bank == 5:
        st[_ACC_WORD] &= 0x7FFFFFFF  # bit 31 of the address means nothing
        run_matmul(sram, acc, st[_MATMUL : _MATMUL + 16], scratch)
    elif bank == 6:
        run_vector(st)
    elif bank == 7:
        run_reduce(st)
    elif bank == 8:
        run_finish(st)
    elif bank == 9:
        run_transpose(st)
    else:
        run_iota(st)
    return overflow


@jit
def note_overflow(st, pc, command):
    """An int64 of this command was saturated: the launch reports the first."""
    if st[OVERFLOW_PC] < 0:
        st[OVERFLOW_PC] = pc
        st[OVERFLOW_COMMAND] = command


# The core's thread -------------------------------------------------------------------------------


@jit
def post(st, e, bank, jobs, sram, acc, scratch):
    """Leave the command of a bank, prepared as entry `e`, to the helper."""
    number = st[POSTED] + 1
    wait_for(st, number - _RING_SLOTS, jobs, sram, acc, scratch)
    at = _RING + _SLOT_WORDS * (number % _RING_SLOTS)
    jobs[at + _BANK] = bank
    jobs[at + _PC] = st[e + E_PC]
    jobs[at + _COMMAND] = st[e + E_INDEX]
    jobs[at + _MACS] = st[e + E_MACS]
    jobs[at + _WRITE_FIRST] = st[e + E_WRITE_FIRST]
    jobs[at + _WRITE_LAST] = st[e + E_WRITE_LAST]
    jobs[at + _READS] = st[e + E_READS]
    for k in range(2 * st[e + E_READS]):
        jobs[at + _READ_RANGES + k] = st[e + E_READ_RANGES + k]
    for pair in range(8):
        field = FIELDS + 16 * bank + 2 * pair
        jobs[at + _FIELDS_AT + pair] = st[field] | (st[field + 1] << 32)
    st[POSTED] = number
    atomic_store(st[JOBS_AT] + 8 * _NEWEST, number)


@jit
def _conflicts(st, e, jobs, at):
    """Whether a load, prepared as entry `e`, has to come after the command at `at` of the ring."""
    target, target_last = st[e + E_WRITE_FIRST], st[e + E_WRITE_LAST]
    source, source_last = st[e + E_READ_RANGES], st[e + E_READ_RANGES + 1]
    first, last = jobs[at + _WRITE_FIRST], jobs[at + _WRITE_LAST]
    if (first <= source_last and source <= last) or (first <= target_last and target <= last):
        return True
    for k in range(jobs[at + _READS]):
        read = at + _READ_RANGES + 2 * k
        if jobs[read] <= target_last and target <= jobs[read + 1]:
            return True
    return False


@jit
def get_ahead(st, e, jobs, sram, acc, scratch):
    """Until nothing that a load, prepared as entry `e`, has to follow is left to the helper: the
    core's thread then executes it while the helper goes on."""
    number = st[POSTED]
    completed = atomic_load(st[JOBS_AT] + 8 * COMPLETED)
    while number > completed:
        if _conflicts(st, e, jobs, _RING + _SLOT_WORDS * (number % _RING_SLOTS)):
            wait_for(st, number, jobs, sram, acc, scratch)
            return
        number -= 1


@jit
def _wait(turns):
    """One turn of a loop that waits for another thread; returns how many that makes."""
    if turns < _IMPATIENT_TURNS:
        pause()
    else:
        give_way()
    return turns + 1


@jit
def wait_for(st, number, jobs, sram, acc, scratch):
    """Until the helper has executed this command; meanwhile, take part in its matmuls."""
    shared = st[JOBS_AT]
    turns = 0
    while atomic_load(shared + 8 * COMPLETED) < number:
        if _take_chunk(shared, jobs, sram, acc, scratch):
            turns = 0
        else:
            turns = _wait(turns)


@jit
def wait_for_writes(st, first, last, jobs, sram, acc, scratch):
    """Until no command is left to execute that writes to these bytes."""
    number = st[POSTED]
    completed = atomic_load(st[JOBS_AT] + 8 * COMPLETED)
    while number > completed:
        at = _RING + _SLOT_WORDS * (number % _RING_SLOTS)
        if jobs[at + _WRITE_FIRST] <= last and first <= jobs[at + _WRITE_LAST]:
            wait_for(st, number, jobs, sram, acc, scratch)
            return
        number -= 1


# The helper's thread -----------------------------------------------------------------------------


@jit
def serve(st, jobs, sram, acc, scratch):
    """Execute what is posted until STOP is set and nothing is left. st: the helper's own state."""
    shared = st[JOBS_AT]
    number = atomic_load(shared + 8 * COMPLETED)
    turns = 0
    while True:
        if number == atomic_load(shared + 8 * _NEWEST):
            if atomic_load(shared + 8 * STOP):
                return
            turns = _wait(turns)
            continue
        turns = 0
        number += 1
        at = _RING + _SLOT_WORDS * (number % _RING_SLOTS)
        bank = jobs[at + _BANK]
        for pair in range(8):
            field, words = FIELDS + 16 * bank + 2 * pair, jobs[at + _FIELDS_AT + pair]
            st[field] = words & 0xFFFFFFFF
            st[field + 1] = (words >> 32) & 0xFFFFFFFF
        if bank == 5 and jobs[at + _MACS] >= 2 * _CHUNK_MACS:
            _share_matmul(st, jobs[at + _MACS], jobs, sram, acc, scratch)
        elif execute(st, bank, sram, acc, scratch):
            note_overflow(st, jobs[at + _PC], jobs[at + _COMMAND])
        atomic_store(shared + 8 * COMPLETED, number)


# Shared matmuls: a ticket packs how many chunks there are and the next one to claim. One
# atomic add claims a chunk, and what comes back tells whether there was one.


@jit
def _chunk_size(rows, n, macs):
    """(rows, columns) of a chunk. A chunk packs its own operands, so it is no smaller than needed:
    columns are split first, and rows only if that leaves too few to share."""
    columns = max(n * _CHUNK_MACS // macs, 1)
    columns = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
    parts = max(_LEAST_CHUNKS // ((n + columns - 1) // columns), 1)
    return max((rows + parts - 1) // parts, _LEAST_ROWS), columns


@jit
def _share_matmul(st, macs, jobs, sram, acc, scratch):
    """Execute the matmul of bank 5 together with whoever waits for it."""
    shared = st[JOBS_AT]
    st[_ACC_WORD] &= 0x7FFFFFFF
    for word in range(16):
        jobs[_SHARED_MATMUL + word] = st[_MATMUL + word]
    jobs[_SHARED_MACS] = macs
    n = st[_MATMUL + N]
    m = st[_MATMUL + M0] * st[_MATMUL + M1] * st[_MATMUL + M2]
    rows, columns = _chunk_size(m, n, macs)
    chunks = ((m + rows - 1) // rows) * ((n + columns - 1) // columns)
    atomic_store(shared + 8 * _DONE, np.int64(0))
    atomic_store(shared + 8 * _TICKET, chunks << _COUNT_BITS)
    while _take_chunk(shared, jobs, sram, acc, scratch):
        pass
    turns = 0
    while atomic_load(shared + 8 * _DONE) < chunks:
        turns = _wait(turns)


@jit
def _take_chunk(shared, jobs, sram, acc, scratch):
    """Claim a chunk of the shared matmul and do it; False if none is left."""
    ticket = atomic_load(shared + 8 * _TICKET)
    if ticket & _COUNT_MASK >= ticket >> _COUNT_BITS:
        return False
    ticket = atomic_add(shared + 8 * _TICKET, np.int64(1))
    chunk = ticket & _COUNT_MASK
    if chunk >= ticket >> _COUNT_BITS:
        return False
    command = jobs[_SHARED_MATMUL : _SHARED_MATMUL + 16]
    m, n = command[M0] * command[M1] * command[M2], command[N]
    rows, columns = _chunk_size(m, n, jobs[_SHARED_MACS])
    across = (n + columns - 1) // columns
    first_row, first = chunk // across * rows, chunk % across * columns
    last_row, last = min(first_row + rows, m), min(first + columns, n)
    run_matmul_range(sram, acc, command, scratch, first_row, last_row, first, last)
    atomic_add(shared + 8 * _DONE, np.int64(1))
    return True
