"""Rows of elements to lanes and back: the storage formats of the contract.

Addresses are host addresses; a lane is 4 bytes. Source and target never overlap.
"""

from __future__ import annotations

import numpy as np

from pagoda.sim.emitter import VECTOR_LENGTH
from pagoda.sim.jit import (
    copy_bytes,
    jit,
    load_f32,
    load_i8,
    load_i32,
    load_i64,
    load_u8,
    load_u16,
    store_8,
    store_16,
    store_f32,
    store_i32,
    store_i64,
)
from pagoda.sim.lanes import encode_bf16
from pagoda.sim.layout import CHUNK
from pagoda.sim.numbers import F8_LANES, bf16_code, canonical, f8_code

F32, BF16, I32, I8, F8, I4, I64, BOOL, U8 = range(9)
HALF_BYTES = np.array([8, 4, 8, 2, 2, 1, 16, 2, 2])  # half bytes of an element, by dtype


@jit
def row_bytes(dtype, count):
    """Bytes of `count` elements; I4 counts are even."""
    return (count * HALF_BYTES[dtype]) >> 1


@jit
def element_bytes(dtype):
    """Bytes that addresses and strides are multiples of."""
    return max(HALF_BYTES[dtype] >> 1, 1)


@jit
def is_float(dtype):
    return (dtype == F32) | (dtype == BF16) | (dtype == F8)


@jit
def decode(source, dtype, lanes, count):
    """Elements to lanes. Returns whether an int64 did not fit."""
    if dtype == F32 or dtype == I32:
        copy_bytes(lanes, source, 4 * count)
    elif dtype == BF16:
        for i in range(count):
            store_i32(lanes, i, load_u16(source, i) << 16)
    elif dtype == I8:
        for i in range(count):
            store_i32(lanes, i, load_i8(source, i))
    elif dtype == U8:
        for i in range(count):
            store_i32(lanes, i, load_u8(source, i))
    elif dtype == F8:
        for i in range(count):
            store_i32(lanes, i, F8_LANES[np.uint8(load_u8(source, i))])
    elif dtype == I4:
        for i in range(count >> 1):
            pair = load_u8(source, i)
            store_i32(lanes, 2 * i, ((pair & 15) ^ 8) - 8)
            store_i32(lanes, 2 * i + 1, ((pair >> 4) ^ 8) - 8)
    elif dtype == BOOL:
        for i in range(count):
            store_i32(lanes, i, np.int32(load_u8(source, i) != 0))
    elif dtype == I64:
        overflow = np.int64(0)
        for i in range(count):
            wide = load_i64(source, i)
            lane = min(max(wide, -2147483648), 2147483647)
            overflow |= lane ^ wide
            store_i32(lanes, i, np.int32(lane))
        return overflow != 0
    return False


@jit
def encode(lanes, dtype, target, count):
    """Lanes to elements, rounded and saturated as the format says."""
    if dtype == F32 or dtype == I32:
        copy_bytes(target, lanes, 4 * count)
    elif dtype == BF16:
        vectors = count // VECTOR_LENGTH
        if vectors > 0:
            encode_bf16(target, lanes, vectors)
        for i in range(vectors * VECTOR_LENGTH, count):
            store_16(target, i, bf16_code(load_i32(lanes, i)))
    elif dtype == I8:
        for i in range(count):
            store_8(target, i, min(max(load_i32(lanes, i), np.int32(-128)), np.int32(127)))
    elif dtype == U8:
        for i in range(count):
            store_8(target, i, min(max(load_i32(lanes, i), np.int32(0)), np.int32(255)))
    elif dtype == F8:
        for i in range(count):
            store_8(target, i, f8_code(load_i32(lanes, i)))
    elif dtype == I4:
        for i in range(count >> 1):
            low = min(max(np.int64(load_i32(lanes, 2 * i)), -8), 7) & 15
            high = min(max(np.int64(load_i32(lanes, 2 * i + 1)), -8), 7) & 15
            store_8(target, i, np.int32(low | (high << 4)))
    elif dtype == BOOL:
        for i in range(count):
            store_8(target, i, np.int32(load_i32(lanes, i) != 0))
    elif dtype == I64:
        for i in range(count):
            store_i64(target, i, np.int64(load_i32(lanes, i)))


@jit
def convert_row(source, source_type, target, target_type, count, lanes):
    """Elements of one format to another. Returns whether an int64 did not fit.

    lanes: address of a scratch buffer of CHUNK lanes.
    """
    if source_type == target_type:
        copy_bytes(target, source, row_bytes(source_type, count))
        return False
    if target_type == F32 or target_type == I32:
        return decode(source, source_type, target, count)
    if source_type == F32 or source_type == I32:
        encode(source, target_type, target, count)
        return False
    overflow = False
    done = 0
    while done < count:
        part = min(count - done, CHUNK)
        from_here = source + row_bytes(source_type, done)
        overflow |= decode(from_here, source_type, lanes, part)
        encode(lanes, target_type, target + row_bytes(target_type, done), part)
        done += part
    return overflow


@jit
def add_row(source, source_type, target, target_type, count, lanes, old_lanes):
    """target := convert(target + source), element by element; both buffers hold CHUNK lanes."""
    done = 0
    while done < count:
        part = min(count - done, CHUNK)
        place = target + row_bytes(target_type, done)
        decode(source + row_bytes(source_type, done), source_type, lanes, part)
        decode(place, target_type, old_lanes, part)
        if is_float(target_type):
            for i in range(part):
                store_f32(lanes, i, canonical(load_f32(old_lanes, i) + load_f32(lanes, i)))
        else:
            for i in range(part):
                store_i32(lanes, i, np.int32(load_i32(old_lanes, i) + load_i32(lanes, i)))
        encode(lanes, target_type, place, part)
        done += part
