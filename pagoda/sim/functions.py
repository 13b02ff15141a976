"""The vector engine's functions over a run of lanes, one loop per function code.

Each loop reads lanes at `x` (and `y`, `z`) and writes lanes at `r`; host addresses. `r` overlaps no
source, or LLVM's run-time check would choose the slow, unvectorised loop.
"""

from __future__ import annotations

import numpy as np

from pagoda.isa.tables import (
    EXP2_TABLE,
    LOG2_TABLE,
    RECIPROCAL_TABLE,
    RSQRT_TABLE,
    SIN2PI_TABLE,
)
from pagoda.sim.emitter import VECTOR_LENGTH
from pagoda.sim.jit import (
    ceil_f32,
    copy_bytes,
    float_bits,
    floor_f32,
    fma_f32,
    jit,
    load_f32,
    load_i32,
    load_i64,
    load_u32,
    round_even_f32,
    sqrt_f32,
    store_f32,
    store_i32,
    store_i64,
    trunc_f32,
)
from pagoda.sim.lanes import (
    EXP2_ROWS,
    RECIPROCAL_ROWS,
    exp2,
    maximum,
    minimum,
    reciprocal,
)
from pagoda.sim.numbers import (
    INFINITY,
    NAN,
    canonical,
    evaluate,
    exp2_index,
    exp2_result,
    float_max,
    float_min,
    float_to_int,
    float_to_int8,
    floor_quotient,
    floor_remainder,
    log2_index,
    log2_result,
    reciprocal_index,
    reciprocal_result,
    rsqrt_index,
    rsqrt_result,
    sin2pi_index,
    sin2pi_result,
)

MOV, FADD, FSUB, FMUL, FDIV, FMAX, FMIN, FRSUB, FRDIV, FLT, FLE, FEQ, FNE, FGT, FGE = range(15)
(
    FNEG, FABS, FSQRT, FFLOOR, FCEIL, FTRUNC, FROUND, EXP2, LOG2, RECIP, RSQRT, SIN2PI, F2I, I2F,
    I2B,
) = range(16, 31)  # fmt: skip
(
    IADD, ISUB, IMUL, IMAX, IMIN, AND, OR, XOR, SHL, SHR, SRA, ILT, ILE, IEQ, INE, IRSUB, IDIV,
    IMOD,
) = range(32, 50)  # fmt: skip
FMA, SELECT, I2FMUL, FADDQ = range(56, 60)


def _by_code(*groups: tuple[int, tuple[int, ...]]) -> np.ndarray:
    table = np.zeros(256, np.int64)
    for value, codes in groups:
        table[list(codes)] = value
    return table


UNARY_CODES = (MOV, *range(FNEG, I2B + 1))
BINARY_CODES = (*range(FADD, FGE + 1), *range(IADD, IMOD + 1), *range(FMA, FADDQ + 1))
# Operands of a code, 0 for no function; cycles a group of lanes takes; latency in the tail.
OPERANDS = _by_code((1, UNARY_CODES), (2, BINARY_CODES))
COST = _by_code(
    (1, (*UNARY_CODES, *BINARY_CODES)),
    (2, (EXP2, LOG2, RECIP, RSQRT, SIN2PI)),
    (8, (FDIV, FRDIV, FSQRT, IDIV, IMOD)),
)
LATENCY = _by_code(
    (2, (*UNARY_CODES, *BINARY_CODES)),
    (7, (FADD, FSUB, FRSUB, FMUL, FFLOOR, FCEIL, FTRUNC, FROUND, F2I, I2F, IMUL, FMA)),
    (7, (I2FMUL, FADDQ)),
    (16, (EXP2, LOG2, RECIP, RSQRT, SIN2PI)),
    (28, (FDIV, FRDIV, FSQRT, IDIV, IMOD)),
)


@jit
def _apply_table(code, r, x, n, work):
    vectors = n // VECTOR_LENGTH
    if vectors > 0 and (code == EXP2 or code == RECIP):
        if code == EXP2:
            exp2(EXP2_ROWS.ctypes.data, x, r, work, vectors)
        else:
            reciprocal(RECIPROCAL_ROWS.ctypes.data, x, r, work, vectors)
        done = vectors * VECTOR_LENGTH
        n -= done
        r += 4 * done
        x += 4 * done
    if code == EXP2:
        for i in range(n):
            store_i64(work, i, exp2_index(np.int64(load_u32(x, i))))
        evaluate(EXP2_TABLE, work, n, 23)
        for i in range(n):
            y = load_i64(work, i)
            store_i32(r, i, np.int32(exp2_result(np.int64(load_u32(x, i)), y)))
    elif code == LOG2:
        for i in range(n):
            store_i64(work, i, log2_index(np.int64(load_u32(x, i))))
        evaluate(LOG2_TABLE, work, n, 16)
        for i in range(n):
            y = load_i64(work, i)
            store_i32(r, i, np.int32(log2_result(np.int64(load_u32(x, i)), y)))
    elif code == RECIP:
        for i in range(n):
            store_i64(work, i, reciprocal_index(np.int64(load_u32(x, i))))
        evaluate(RECIPROCAL_TABLE, work, n, 15)
        for i in range(n):
            y = load_i64(work, i)
            store_i32(r, i, np.int32(reciprocal_result(np.int64(load_u32(x, i)), y)))
    elif code == RSQRT:
        for i in range(n):
            store_i64(work, i, rsqrt_index(np.int64(load_u32(x, i))))
        evaluate(RSQRT_TABLE, work, n, 16)
        for i in range(n):
            y = load_i64(work, i)
            store_i32(r, i, np.int32(rsqrt_result(np.int64(load_u32(x, i)), y)))
    elif code == SIN2PI:
        for i in range(n):
            store_i64(work, i, sin2pi_index(np.int64(load_u32(x, i))))
        evaluate(SIN2PI_TABLE, work, n, 21)
        for i in range(n):
            y = load_i64(work, i)
            store_i32(r, i, np.int32(sin2pi_result(np.int64(load_u32(x, i)), y)))


@jit
def _canonical_bits(bits):
    """`canonical` on a pattern. LLVM's code generator takes `NaN if isnan(sqrt(x)) else sqrt(x)`
    for sqrt(x), and x86 gives NaN with the sign set for a negative x."""
    return np.int32(NAN) if bits & 0x7FFFFFFF > INFINITY else bits


@jit
def apply_unary(code, r, x, n, work):
    """work: address of scratch for n int64."""
    if code == MOV:
        copy_bytes(r, x, 4 * n)
    elif code == FNEG:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) ^ -2147483648))
    elif code == FABS:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) & 0x7FFFFFFF))
    elif code == FSQRT:
        for i in range(n):
            store_i32(r, i, _canonical_bits(float_bits(sqrt_f32(load_f32(x, i)))))
    elif code == FFLOOR:
        for i in range(n):
            store_f32(r, i, canonical(floor_f32(load_f32(x, i))))
    elif code == FCEIL:
        for i in range(n):
            store_f32(r, i, canonical(ceil_f32(load_f32(x, i))))
    elif code == FTRUNC:
        for i in range(n):
            store_f32(r, i, canonical(trunc_f32(load_f32(x, i))))
    elif code == FROUND:
        for i in range(n):
            store_f32(r, i, canonical(round_even_f32(load_f32(x, i))))
    elif EXP2 <= code <= SIN2PI:
        _apply_table(code, r, x, n, work)
    elif code == F2I:
        for i in range(n):
            store_i32(r, i, float_to_int(load_f32(x, i)))
    elif code == I2F:
        for i in range(n):
            store_f32(r, i, np.float32(load_i32(x, i)))
    elif code == I2B:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) != 0))


@jit
def _apply_extreme(code, r, x, y, n):
    vectors = n // VECTOR_LENGTH
    done = vectors * VECTOR_LENGTH
    if code == FMAX:
        if vectors > 0:
            maximum(r, x, y, vectors)
        for i in range(done, n):
            store_f32(r, i, float_max(load_f32(x, i), load_f32(y, i)))
    else:
        if vectors > 0:
            minimum(r, x, y, vectors)
        for i in range(done, n):
            store_f32(r, i, float_min(load_f32(x, i), load_f32(y, i)))


@jit
def apply_float(code, r, x, y, n):
    if code == FADD:
        for i in range(n):
            store_f32(r, i, canonical(load_f32(x, i) + load_f32(y, i)))
    elif code == FSUB:
        for i in range(n):
            store_f32(r, i, canonical(load_f32(x, i) - load_f32(y, i)))
    elif code == FMUL:
        for i in range(n):
            store_f32(r, i, canonical(load_f32(x, i) * load_f32(y, i)))
    elif code == FDIV:
        for i in range(n):
            store_f32(r, i, canonical(load_f32(x, i) / load_f32(y, i)))
    elif code == FMAX or code == FMIN:
        _apply_extreme(code, r, x, y, n)
    elif code == FLT:
        for i in range(n):
            store_i32(r, i, np.int32(load_f32(x, i) < load_f32(y, i)))
    elif code == FLE:
        for i in range(n):
            store_i32(r, i, np.int32(load_f32(x, i) <= load_f32(y, i)))
    elif code == FEQ:
        for i in range(n):
            store_i32(r, i, np.int32(load_f32(x, i) == load_f32(y, i)))
    elif code == FNE:
        for i in range(n):
            store_i32(r, i, np.int32(load_f32(x, i) != load_f32(y, i)))
    elif code == I2FMUL:
        for i in range(n):
            store_f32(r, i, canonical(np.float32(load_i32(x, i)) * load_f32(y, i)))
    elif code == FADDQ:
        for i in range(n):
            store_i32(r, i, float_to_int8(load_f32(x, i) + load_f32(y, i)))


@jit
def apply_int(code, r, x, y, n):
    if code == IADD:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) + load_i32(y, i)))
    elif code == ISUB:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) - load_i32(y, i)))
    elif code == IMUL:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) * load_i32(y, i)))
    elif code == IMAX:
        for i in range(n):
            store_i32(r, i, max(load_i32(x, i), load_i32(y, i)))
    elif code == IMIN:
        for i in range(n):
            store_i32(r, i, min(load_i32(x, i), load_i32(y, i)))
    elif code == AND:
        for i in range(n):
            store_i32(r, i, load_i32(x, i) & load_i32(y, i))
    elif code == OR:
        for i in range(n):
            store_i32(r, i, load_i32(x, i) | load_i32(y, i))
    elif code == XOR:
        for i in range(n):
            store_i32(r, i, load_i32(x, i) ^ load_i32(y, i))
    elif code == SHL:
        for i in range(n):
            store_i32(r, i, np.int32(np.int64(load_u32(x, i)) << (load_i32(y, i) & 31)))
    elif code == SHR:
        for i in range(n):
            store_i32(r, i, np.int32(np.int64(load_u32(x, i)) >> (load_i32(y, i) & 31)))
    elif code == SRA:
        for i in range(n):
            store_i32(r, i, np.int32(np.int64(load_i32(x, i)) >> (load_i32(y, i) & 31)))
    elif code == ILT:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) < load_i32(y, i)))
    elif code == ILE:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) <= load_i32(y, i)))
    elif code == IEQ:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) == load_i32(y, i)))
    elif code == INE:
        for i in range(n):
            store_i32(r, i, np.int32(load_i32(x, i) != load_i32(y, i)))
    elif code == IDIV:
        for i in range(n):
            store_i32(r, i, np.int32(floor_quotient(load_i32(x, i), load_i32(y, i))))
    elif code == IMOD:
        for i in range(n):
            store_i32(r, i, np.int32(floor_remainder(load_i32(x, i), load_i32(y, i))))


@jit
def apply_binary(code, r, x, y, n):
    """Any function of two operands but fma and select; reversed ones swap x and y."""
    if code in (FRSUB, FRDIV, FGT, FGE, IRSUB):
        if code == FRSUB:
            code = FSUB
        elif code == FRDIV:
            code = FDIV
        elif code == FGT:
            code = FLT
        elif code == FGE:
            code = FLE
        else:
            code = ISUB
        x, y = y, x
    if code < IADD or code >= I2FMUL:
        apply_float(code, r, x, y, n)
    else:
        apply_int(code, r, x, y, n)


@jit
def apply_fma(r, x, y, z, n):
    for i in range(n):
        store_f32(r, i, canonical(fma_f32(load_f32(x, i), load_f32(y, i), load_f32(z, i))))


@jit
def apply_select(r, x, y, z, n):
    """Where x is nonzero as a pattern y, else z; no bit changes."""
    for i in range(n):
        chosen = load_i32(y, i) if load_i32(x, i) != 0 else load_i32(z, i)
        store_i32(r, i, chosen)
