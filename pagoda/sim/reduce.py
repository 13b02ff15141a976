"""Values of reduce and finish: the 64-lane state, the fixed tree, the column form."""

from __future__ import annotations

import numpy as np

from pagoda.sim.convert import F32, I32, decode, encode, row_bytes
from pagoda.sim.jit import copy_bytes, float_bits, jit, load_f32, load_i32, store_f32, store_i32
from pagoda.sim.layout import CHUNK, FIELDS, LANE_BUFFER_BYTES, LANES_AT
from pagoda.sim.numbers import argmax_prefers, canonical, float_max, float_min
from pagoda.sim.transfer import is_abandoned, local_at

FSUM, FMAX, FMIN, ISUM, IMAX, ARGMAX = range(6)
STATE_LANES = 64
_IDENTITY = np.array(
    [0x80000000, 0xFF800000, 0x7F800000, 0, 0x80000000, 0xFF800000], np.uint32
).view(np.int32)
_NO_INDEX = np.int32(0x7FFFFFFF)


@jit
def _combine(op, state, values, count):
    """state[i] := op(state[i], values[i]) for the first `count` lanes; not argmax."""
    if op == FSUM:
        for i in range(count):
            store_f32(state, i, canonical(load_f32(state, i) + load_f32(values, i)))
    elif op == FMAX:
        for i in range(count):
            store_f32(state, i, float_max(load_f32(state, i), load_f32(values, i)))
    elif op == FMIN:
        for i in range(count):
            store_f32(state, i, float_min(load_f32(state, i), load_f32(values, i)))
    elif op == ISUM:
        for i in range(count):
            store_i32(state, i, np.int32(load_i32(state, i) + load_i32(values, i)))
    else:
        for i in range(count):
            store_i32(state, i, max(load_i32(state, i), load_i32(values, i)))


@jit
def _combine_argmax(state, indices, values, value_indices, count):
    """The better of two (value, index) pairs, lane by lane."""
    for i in range(count):
        value, index = load_f32(state, i), load_i32(indices, i)
        other, other_index = load_f32(values, i), load_i32(value_indices, i)
        take = argmax_prefers(value, index, other, other_index)
        store_f32(state, i, canonical(other if take else value))
        store_i32(indices, i, other_index if take else index)


@jit
def _initialise(op, state, count):
    for i in range(count):
        store_i32(state, i, _IDENTITY[op])


@jit
def run_reduce(st):
    f = FIELDS + 16 * 7
    go = st[f]
    op, first, column, dtype = go & 15, (go >> 4) & 1, (go >> 5) & 1, (go >> 8) & 15
    source, source_row = local_at(st, st[f + 1]), st[f + 2]
    rows, cols = st[f + 3], st[f + 4]
    state, state_row, start = local_at(st, st[f + 5]), st[f + 6], st[f + 7]
    lanes = st[LANES_AT]
    if column:
        if first:
            _initialise(op, state, cols)
        for r in range(rows):
            if is_abandoned(st):
                return
            _reduce_run(op, 1, state, source + r * source_row, dtype, cols, start, lanes)
        return
    for r in range(rows):
        if is_abandoned(st):
            return
        here = state + r * state_row
        if first:
            _initialise(op, here, STATE_LANES)
            if op == ARGMAX:
                for i in range(STATE_LANES):
                    store_i32(here, STATE_LANES + i, _NO_INDEX)
        _reduce_run(op, 0, here, source + r * source_row, dtype, cols, start, lanes)


@jit
def _reduce_run(op, column, state, source, dtype, count, start, lanes):
    """Combine a row of elements into the state: element j into lane j, or lane j mod 64."""
    done = 0
    while done < count:
        part = min(count - done, CHUNK)
        values = source + row_bytes(dtype, done)
        if dtype != F32 and dtype != I32:
            decode(values, dtype, lanes, part)
            values = lanes
        if column:
            _combine(op, state + 4 * done, values, part)
        else:
            for j in range(0, part, STATE_LANES):
                some = min(part - j, STATE_LANES)
                if op == ARGMAX:
                    columns = lanes + LANE_BUFFER_BYTES
                    for i in range(some):
                        store_i32(columns, i, np.int32(start + done + j + i))
                    indices = state + 4 * STATE_LANES
                    _combine_argmax(state, indices, values + 4 * j, columns, some)
                else:
                    _combine(op, state, values + 4 * j, some)
        done += part


@jit
def run_finish(st):
    f = FIELDS + 16 * 8
    op, dtype = st[f] & 15, (st[f] >> 4) & 15
    state, state_row, rows = local_at(st, st[f + 1]), st[f + 2], st[f + 3]
    target, target_row = local_at(st, st[f + 4]), st[f + 5]
    lanes = st[LANES_AT]
    words = 2 * STATE_LANES if op == ARGMAX else STATE_LANES
    for r in range(rows):
        copy_bytes(lanes, state + r * state_row, 4 * words)
        half = STATE_LANES >> 1
        while half > 0:
            if op == ARGMAX:
                indices = lanes + 4 * STATE_LANES
                _combine_argmax(lanes, indices, lanes + 4 * half, indices + 4 * half, half)
            else:
                _combine(op, lanes, lanes + 4 * half, half)
            half >>= 1
        if op == FSUM:
            zero_added = canonical(load_f32(lanes, 0) + np.float32(0.0))
            store_i32(lanes, 0, float_bits(zero_added))
        if op == ARGMAX:
            store_i32(lanes, 0, load_i32(lanes, STATE_LANES))
        encode(lanes, dtype, target + r * target_row, 1)
