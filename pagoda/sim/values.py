"""What commands do to values: at once, or in program order on a helper thread.

The control core and the window need no values but those that a load instruction or a gather's
index reads. So with a helper the core's thread works out cycles and posts commands in a ring; the
helper executes them in order. When the core's thread has to wait, it looks in the ring for commands
that touch no byte of older ones that are left, and executes those; the helper passes over them.
Long matmuls are divided in chunks, which both threads take. Neither values nor cycles depend on any
of that.

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
    POSTED_BEFORE,
    SRAM_BYTES,
)
from pagoda.sim.matmul import (
    ACC,
    K_INNER,
    K_OUTER,
    M0,
    M1,
    M2,
    M_BLOCK,
    N_BLOCK,
    N,
    run_matmul,
    run_matmul_range,
)
from pagoda.sim.microkernel import TILE_COLUMNS
from pagoda.sim.reduce import run_finish, run_reduce
from pagoda.sim.transfer import is_abandoned, run_gather, run_load, run_scatter, run_store
from pagoda.sim.vector import run_iota, run_transpose, run_vector

# On cache lines of their own: last command posted, last one executed; whether the helper is to
# stop, and beside it whether the launch is abandoned; the ticket of the matmul that is shared now,
# and how many of its chunks are done; who may share the next one.
_NEWEST, COMPLETED, STOP, _TICKET, _DONE, _LOCK = range(0, 48, 8)
_SHARED_MATMUL = 48  # the sixteen words of the command, then its MACs, number, chunks, A's state
_SHARED_MACS, _SHARED_NUMBER, _SHARED_CHUNKS, _SHARED_STATE = range(64, 68)
_RING = 72
_RING_SLOTS = 64
_SLOT_WORDS = 48
# A command's claims, of which the first counts, and whether it was executed before its turn.
_CLAIMS, _EXECUTED, _BANK, _PC, _COMMAND, _MACS = range(6)
# The bytes that it writes, and those that it reads: first and last of each range.
_WRITE_FIRST, _WRITE_LAST, _READS = range(6, 9)
_READ_RANGES = 9
_FIELDS_AT = _READ_RANGES + 2 * MAX_READS  # its sixteen words of 32 bits, two and two
_SAVED = _FIELDS_AT + 8  # the fields of the thread that executes it before its turn
_STATE_OF_A = _SAVED + 16  # of a matmul: one more than the last command that wrote to A
# For each part of SRAM, the last command posted that wrote to it.
_WRITERS = _RING + _RING_SLOTS * _SLOT_WORDS
_PARTS = 256
JOB_WORDS = _WRITERS + _PARTS

_MATMUL_BANK = 5
_MATMUL = FIELDS + 16 * _MATMUL_BANK
_FORESIGHT = 24  # how many commands a thread that waits looks at
_COUNT_BITS = 20
_COUNT_MASK = (1 << _COUNT_BITS) - 1
# A chunk should take some microseconds: to claim one takes a tenth of one.
_CHUNK_MACS = 1 << 17
_LEAST_CHUNKS, _LEAST_ROWS = 2, 64
_UNBROKEN_MACS = 1 << 32  # about a tenth of a second
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
        address = st[_MATMUL + ACC]
        st[_MATMUL + ACC] &= 0x7FFFFFFF  # bit 31 of the address means nothing
        _run_matmul(st, sram, acc, scratch)
        st[_MATMUL + ACC] = address
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
def _run_matmul(st, sram, acc, scratch):
    """All of a matmul at once or, if it takes long, in parts between which it may be left."""
    command = st[_MATMUL : _MATMUL + 16]
    m, n = command[M0] * command[M1] * command[M2], command[N]
    if m * n * command[K_INNER] * command[K_OUTER] <= _UNBROKEN_MACS:
        run_matmul(sram, acc, command, scratch)
        return
    for i in range(0, m, M_BLOCK):
        for j in range(0, n, N_BLOCK):
            if is_abandoned(st):
                return
            last_row, last = min(i + M_BLOCK, m), min(j + N_BLOCK, n)
            run_matmul_range(sram, acc, command, scratch, i, last_row, j, last, np.int64(0))


@jit
def note_overflow(st, pc, command):
    """An int64 of this command was saturated: the launch reports the first."""
    if st[OVERFLOW_PC] < 0 or command < st[OVERFLOW_COMMAND]:
        st[OVERFLOW_PC] = pc
        st[OVERFLOW_COMMAND] = command


# The core's thread -------------------------------------------------------------------------------


@jit
def post(st, e, bank, jobs, sram, acc, scratch):
    """Leave the command of a bank, prepared as entry `e`, to the helper."""
    number = st[POSTED] + 1
    wait_for(st, number - _RING_SLOTS, jobs, sram, acc, scratch)
    at = _RING + _SLOT_WORDS * (number % _RING_SLOTS)
    jobs[at + _CLAIMS] = jobs[at + _EXECUTED] = 0
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
    if _is_long(bank, st[e + E_MACS]):
        jobs[at + _STATE_OF_A] = _last_writer(st, e, jobs) + 1
    if st[e + E_WRITE_FIRST] <= st[e + E_WRITE_LAST] < st[SRAM_BYTES]:
        first = st[e + E_WRITE_FIRST] * _PARTS // st[SRAM_BYTES]
        last = st[e + E_WRITE_LAST] * _PARTS // st[SRAM_BYTES]
        jobs[_WRITERS + first : _WRITERS + last + 1] = number
    st[POSTED] = number
    atomic_store(st[JOBS_AT] + 8 * _NEWEST, number)


@jit
def _last_writer(st, e, jobs):
    """The last command posted that wrote to the matrix A of entry `e`, or to a part of SRAM that it
    shares; if that was in an older launch, the last command of that launch."""
    first = st[e + E_READ_RANGES] * _PARTS // st[SRAM_BYTES]
    last = st[e + E_READ_RANGES + 1] * _PARTS // st[SRAM_BYTES]
    writer = st[POSTED_BEFORE]
    for part in range(first, last + 1):
        writer = max(writer, jobs[_WRITERS + part])
    return writer


@jit
def _wait(turns):
    """One turn of a loop that waits for another thread; returns how many that makes."""
    if turns < _IMPATIENT_TURNS:
        pause()
    else:
        give_way()
    return turns + 1


@jit
def _work_or_wait(st, turns, jobs, sram, acc, scratch):
    """One turn of a loop that waits for the other thread: do some of what is to be done, or
    nothing; returns how many turns of the second kind that makes in a row."""
    if _take_chunk(st, jobs, sram, acc, scratch):
        return 0
    if _work_ahead(st, jobs, sram, acc, scratch):
        return 0
    return _wait(turns)


@jit
def wait_for(st, number, jobs, sram, acc, scratch):
    """Until the helper has executed this command; meanwhile, take part in its matmuls."""
    shared = st[JOBS_AT]
    turns = 0
    while atomic_load(shared + 8 * COMPLETED) < number:
        turns = _work_or_wait(st, turns, jobs, sram, acc, scratch)


@jit
def _overlap(jobs, at, of):
    """Whether the commands at two places of the ring may not be executed in any order."""
    for k in range(jobs[at + _READS] + 1):
        read = at + _READ_RANGES + 2 * (k - 1) if k > 0 else at + _WRITE_FIRST
        if jobs[of + _WRITE_FIRST] <= jobs[read + 1] and jobs[read] <= jobs[of + _WRITE_LAST]:
            return True
    for k in range(jobs[of + _READS]):
        read = of + _READ_RANGES + 2 * k
        if jobs[at + _WRITE_FIRST] <= jobs[read + 1] and jobs[read] <= jobs[at + _WRITE_LAST]:
            return True
    return False


@jit
def _has_to_wait(jobs, shared, completed, number):
    """Whether a command must follow one that is left."""
    at = _RING + _SLOT_WORDS * (number % _RING_SLOTS)
    for older in range(completed + 1, number):
        of = _RING + _SLOT_WORDS * (older % _RING_SLOTS)
        if not _overlap(jobs, at, of) or atomic_load(shared + 8 * (of + _EXECUTED)):
            continue
        if atomic_load(shared + 8 * _SHARED_NUMBER) != older or not _is_shared_done(jobs, shared):
            return True
    return False


@jit
def _work_ahead(st, jobs, sram, acc, scratch):
    """Execute the oldest command of the ring that nobody does and that need not wait, or offer its
    chunks if it is a long matmul; False if there is none."""
    shared = st[JOBS_AT]
    completed = atomic_load(shared + 8 * COMPLETED)
    newest = atomic_load(shared + 8 * _NEWEST)
    shares = atomic_load(shared + 8 * _SHARED_NUMBER) > completed  # a matmul of these already
    for number in range(completed + 1, min(newest, completed + _FORESIGHT) + 1):
        at = _RING + _SLOT_WORDS * (number % _RING_SLOTS)
        bank = jobs[at + _BANK]
        long = _is_long(bank, jobs[at + _MACS])
        if long:
            busy, shares = shares, True  # the next one, if any: they are shared in order
        else:
            busy = atomic_load(shared + 8 * (at + _CLAIMS)) != 0
        if busy or _has_to_wait(jobs, shared, completed, number):
            continue
        if long:
            _share_matmul(shared, number, jobs)
            return True
        if atomic_add(shared + 8 * (at + _CLAIMS), np.int64(1)) != 0:
            continue
        fields = FIELDS + 16 * bank
        for word in range(16):
            jobs[at + _SAVED + word] = st[fields + word]
        _take_fields(st, bank, jobs, at)
        if execute(st, bank, sram, acc, scratch):
            note_overflow(st, jobs[at + _PC], jobs[at + _COMMAND])
        for word in range(16):
            st[fields + word] = jobs[at + _SAVED + word]
        atomic_store(shared + 8 * (at + _EXECUTED), np.int64(1))
        return True
    return False


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


@jit
def _take_fields(st, bank, jobs, at):
    """Set a bank's fields to those of the command at `at` of the ring."""
    for pair in range(8):
        field, words = FIELDS + 16 * bank + 2 * pair, jobs[at + _FIELDS_AT + pair]
        st[field] = words & 0xFFFFFFFF
        st[field + 1] = (words >> 32) & 0xFFFFFFFF


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
        if _is_long(bank, jobs[at + _MACS]):
            _share_matmul(shared, number, jobs)
            _finish_matmul(st, jobs, sram, acc, scratch)
        elif atomic_add(shared + 8 * (at + _CLAIMS), np.int64(1)) == 0:
            _take_fields(st, bank, jobs, at)
            if execute(st, bank, sram, acc, scratch):
                note_overflow(st, jobs[at + _PC], jobs[at + _COMMAND])
        else:
            while not atomic_load(shared + 8 * (at + _EXECUTED)):
                turns = _work_or_wait(st, turns, jobs, sram, acc, scratch)
        atomic_store(shared + 8 * COMPLETED, number)


# Shared matmuls: a ticket packs how many chunks there are and the next one to claim. One
# atomic add claims a chunk, and what comes back tells whether there was one. Either thread shares
# the next matmul, whoever needs it first; its number tells the other that it has been done.


@jit
def _is_long(bank, macs):
    return bank == _MATMUL_BANK and macs >= 2 * _CHUNK_MACS


@jit
def _chunk_size(rows, n, macs):
    """(rows, columns) of a chunk. A chunk packs its own operands, so it is no smaller than needed:
    columns are split first, and rows only if that leaves too few to share."""
    columns = max(n * _CHUNK_MACS // macs, 1)
    columns = (columns + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
    parts = max(_LEAST_CHUNKS // ((n + columns - 1) // columns), 1)
    return max((rows + parts - 1) // parts, _LEAST_ROWS), columns


@jit
def _share_matmul(shared, number, jobs):
    """Offer the chunks of a matmul in the ring, unless that has been done. The one before has been
    executed: there is one place."""
    while atomic_add(shared + 8 * _LOCK, np.int64(1)) != 0:
        atomic_add(shared + 8 * _LOCK, np.int64(-1))
        pause()
    if jobs[_SHARED_NUMBER] < number:
        at = _RING + _SLOT_WORDS * (number % _RING_SLOTS)
        for pair in range(8):
            words = jobs[at + _FIELDS_AT + pair]
            jobs[_SHARED_MATMUL + 2 * pair] = words & 0xFFFFFFFF
            jobs[_SHARED_MATMUL + 2 * pair + 1] = (words >> 32) & 0xFFFFFFFF
        command = jobs[_SHARED_MATMUL : _SHARED_MATMUL + 16]
        command[ACC] &= 0x7FFFFFFF  # bit 31 of the address means nothing
        m, n, macs = command[M0] * command[M1] * command[M2], command[N], jobs[at + _MACS]
        rows, columns = _chunk_size(m, n, macs)
        chunks = ((m + rows - 1) // rows) * ((n + columns - 1) // columns)
        jobs[_SHARED_MACS] = macs
        jobs[_SHARED_CHUNKS] = chunks
        jobs[_SHARED_STATE] = jobs[at + _STATE_OF_A]
        atomic_store(shared + 8 * _DONE, np.int64(0))
        # After DONE: who reads this number and then that all chunks are done means these chunks.
        atomic_store(shared + 8 * _SHARED_NUMBER, np.int64(number))
        atomic_store(shared + 8 * _TICKET, chunks << _COUNT_BITS)
    atomic_add(shared + 8 * _LOCK, np.int64(-1))


@jit
def _finish_matmul(st, jobs, sram, acc, scratch):
    """Execute the shared matmul together with whoever waits for it."""
    turns = 0
    while not _is_shared_done(jobs, st[JOBS_AT]):
        turns = _work_or_wait(st, turns, jobs, sram, acc, scratch)


@jit
def _is_shared_done(jobs, shared):
    """Whether all chunks of the shared matmul are done."""
    return atomic_load(shared + 8 * _DONE) >= jobs[_SHARED_CHUNKS]


@jit
def _take_chunk(st, jobs, sram, acc, scratch):
    """Claim a chunk of the shared matmul and do it; False if none is left."""
    shared = st[JOBS_AT]
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
    if not is_abandoned(st):
        state = jobs[_SHARED_STATE]
        run_matmul_range(sram, acc, command, scratch, first_row, last_row, first, last, state)
    atomic_add(shared + 8 * _DONE, np.int64(1))
    return True
