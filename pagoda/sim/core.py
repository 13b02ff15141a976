"""The control core: predecoded RV32IM and the command port, until something ends the slice."""

from __future__ import annotations

import numpy as np

from pagoda.isa.fault import FaultKind
from pagoda.sim import decode as op
from pagoda.sim import details
from pagoda.sim.checking import (
    check_indices,
    check_reads,
    check_word,
    log_dram,
    log_space,
    mark_writes,
)
from pagoda.sim.entry import prepare
from pagoda.sim.entry_checks import EMPTY, fail
from pagoda.sim.jit import (
    cached_jit,
    jit,
    load_i8,
    load_i16,
    load_i32,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    store_8,
    store_16,
    store_i32,
)
from pagoda.sim.layout import (
    BARRIER,
    CHECKING,
    CODE_AT,
    COMMANDS,
    CORE_COUNT,
    CORE_ID,
    CYCLE,
    DMEM_AT,
    DMEM_BYTES,
    DRAM_BIT,
    E_BANK,
    E_CORE,
    E_DRAM_BYTES,
    E_ENGINE,
    E_INDEX,
    E_MACS,
    E_OCCUPANCY,
    E_PC,
    E_READ_BANKS,
    E_WRITE_BANKS,
    ENTRIES,
    ENTRY_WORDS,
    EXIT,
    FAULT,
    FAULT_COMMAND,
    FAULT_CYCLE,
    FAULT_OFFSET,
    FAULT_PC,
    FAULT_SLOT,
    FAULTED,
    FIELDS,
    HELPED,
    IMEM_BYTES,
    IN_FLIGHT,
    INSTRUCTIONS,
    LANES,
    LIMIT,
    LOAD,
    LOG_FULL,
    LOG_ROWS,
    LOG_USED,
    MACS,
    MATRIX,
    ORDER,
    PC,
    POSTED,
    READ_BYTES,
    REGISTERS_AT,
    SERVING,
    SLICE,
    SRAM_AT,
    SRAM_BYTES,
    STACK_LIMIT,
    STORE,
    TRACE_FULL,
    TRACE_ROWS,
    VECTOR,
    WATCHDOG,
    WORK,
    WORK_LIMIT,
    WRITE_BYTES,
)
from pagoda.sim.transfer_entry import finish_indexed
from pagoda.sim.values import (
    execute,
    note_overflow,
    post,
    serve,
    wait_for,
    wait_for_writes,
)
from pagoda.sim.window import drain, enter, space, written

ILLEGAL_INSTRUCTION = int(FaultKind.ILLEGAL_INSTRUCTION)
FETCH_OUT_OF_RANGE = int(FaultKind.FETCH_OUT_OF_RANGE)
MISALIGNED = int(FaultKind.MISALIGNED)
BAD_ADDRESS = int(FaultKind.BAD_ADDRESS)
DMEM_OUT_OF_RANGE = int(FaultKind.DMEM_OUT_OF_RANGE)
STACK_OVERFLOW = int(FaultKind.STACK_OVERFLOW)
BAD_SLOT = int(FaultKind.BAD_SLOT)
OUT_OF_SLOT = int(FaultKind.OUT_OF_SLOT)
NO_PERMISSION = int(FaultKind.NO_PERMISSION)
GATHER_INDEX = int(FaultKind.GATHER_INDEX)
TRAP = int(FaultKind.TRAP)
OUT_OF_TIME = int(FaultKind.WATCHDOG)

# Words of each bank that exist, one bit a word, and the engine that a bank's commands join.
WORDS = np.array(
    [0xF, 0x1FFF, 0x7FF, 0x2FF, 0x2FF, 0xFFFF, 0xFFF, 0xFF, 0x3F, 0x7F, 0xFF], np.int64
)
ENGINES = np.array(
    [0, LOAD, STORE, LOAD, STORE, MATRIX, VECTOR, VECTOR, VECTOR, VECTOR, VECTOR], np.int64
)
FENCE_WORD, BARRIER_WORD, EXIT_WORD, TRAP_WORD = range(4)
# What a store to the command port led to.
WENT_ON, AT_BARRIER, AT_EXIT, AT_FAULT, TO_EXECUTE = range(5)


@jit
def _fault(st, kind, cycle, detail, value, value_2):
    """Record a fault that no command caused."""
    st[FAULT] = fail(st, kind, detail, value, value_2)
    st[FAULT_CYCLE] = cycle
    st[FAULT_COMMAND] = -1
    st[FAULT_SLOT] = -1
    st[FAULT_OFFSET] = -1
    return AT_FAULT


@jit
def _out_of_time(st):
    return _fault(st, OUT_OF_TIME, st[WATCHDOG], details.WATCHDOG, st[WATCHDOG], 0)


@jit
def _command_fault(st, bank, kind, cycle):
    """Record a fault of a command; the detail is set already."""
    st[FAULT] = kind
    st[FAULT_CYCLE] = cycle
    st[FAULT_COMMAND] = st[COMMANDS]
    st[FAULT_SLOT] = -1
    st[FAULT_OFFSET] = -1
    if kind == BAD_SLOT or kind == OUT_OF_SLOT or kind == NO_PERMISSION or kind == GATHER_INDEX:
        st[FAULT_SLOT] = st[FIELDS + 16 * bank + 1]
        st[FAULT_OFFSET] = st[FIELDS + 16 * bank + 2]
    return AT_FAULT


@jit
def _go(st, bank):
    """Issue the command of a bank. st[CYCLE]: the store's start, then the next instruction's.

    The values are the caller's business: compiling them in here would make LLVM optimise them
    once more for every level of calls.
    """
    cycle = st[CYCLE] + 4
    indexed = bank == 3 or bank == 4
    if not indexed:
        cycle = space(st, cycle)
    if cycle > st[WATCHDOG]:
        return _out_of_time(st)
    number = st[ORDER + st[IN_FLIGHT]]
    e = ENTRIES + ENTRY_WORDS * number
    kind = prepare(st, e, bank)
    if kind > 0:
        return _command_fault(st, bank, kind, cycle)
    if indexed:
        if kind != EMPTY:
            f = FIELDS + 16 * bank
            rows, indices = st[f + 5], st[f + 6]
            cycle = written(st, indices, indices + 4 * rows - 1, cycle)
            cycle += (rows + st[LANES] - 1) // st[LANES] + 4
            if cycle > st[WATCHDOG]:
                return _out_of_time(st)
            if st[CHECKING]:
                kind = check_indices(st, bank)
                if kind > 0:
                    return _command_fault(st, bank, kind, cycle)
            kind = finish_indexed(st, e, bank)
            if kind > 0:
                return _command_fault(st, bank, kind, cycle)
        cycle = space(st, cycle)
        if cycle > st[WATCHDOG]:
            return _out_of_time(st)
    if kind != EMPTY and st[CHECKING]:
        kind = check_reads(st, bank)
        if kind > 0:
            return _command_fault(st, bank, kind, cycle)
        mark_writes(st, bank)
        log_dram(st, bank, cycle)
    st[e + E_CORE] = st[CORE_ID]
    st[e + E_INDEX] = st[COMMANDS]
    st[e + E_PC] = st[PC]
    st[e + E_BANK] = bank
    st[e + E_ENGINE] = ENGINES[bank]
    _account(st, e)
    enter(st, number, cycle)
    st[COMMANDS] += 1
    st[CYCLE] = cycle + 1
    return WENT_ON if kind == EMPTY else TO_EXECUTE


@jit
def _account(st, e):
    """Add a command to the counters."""
    st[MACS] += st[e + E_MACS]
    moved = st[e + E_DRAM_BYTES]
    if st[e + E_WRITE_BANKS] & DRAM_BIT:
        if st[e + E_READ_BANKS] & DRAM_BIT:
            st[READ_BYTES] += moved >> 1
            moved >>= 1
        st[WRITE_BYTES] += moved
    else:
        st[READ_BYTES] += moved
    st[WORK] += 500 + (st[e + E_MACS] >> 4) + (st[e + E_DRAM_BYTES] >> 3)
    if st[e + E_ENGINE] == VECTOR:
        st[WORK] += 8 * st[e + E_OCCUPANCY]


@jit
def _port(st, address, value):
    """A store of a word to the command port, starting in st[CYCLE], which moves on."""
    offset = address - 0x40000000
    bank, word = offset >> 6, (offset >> 2) & 15
    if bank > 10 or not (WORDS[bank] >> word) & 1:
        cycle = st[CYCLE]
        return _fault(st, BAD_ADDRESS, cycle, details.NO_COMMAND_WORD, address, 0)
    if bank > 0:
        st[FIELDS + 16 * bank + word] = value
        if word > 0:
            st[CYCLE] += 5
            return WENT_ON
        return _go(st, bank)
    if word == TRAP_WORD:
        cycle = st[CYCLE] + 4
        if cycle > st[WATCHDOG]:
            return _out_of_time(st)
        return _fault(st, TRAP, cycle, details.TRAP, value, 0)
    through = max(st[CYCLE] + 5, drain(st) + 1)
    if through > st[WATCHDOG]:
        return _out_of_time(st)
    st[CYCLE] = through
    if word == BARRIER_WORD:
        return AT_BARRIER
    if word == EXIT_WORD:
        return AT_EXIT
    return WENT_ON


@jit
def _bus_fault(st, address, size, cycle, store):
    """What is wrong with a load or store that no fast path took."""
    if address & (size - 1):
        return _fault(st, MISALIGNED, cycle, details.MISALIGNED_ACCESS, address, size)
    region = address >> 28
    known = region <= 2 or region == 4 or (region == 5 and address < 0x50000008)
    if not known:
        return _fault(st, BAD_ADDRESS, cycle, details.NO_REGION, address, 0)
    if region == 0 or (region != 1 and store != (region == 4)):
        return _fault(st, BAD_ADDRESS, cycle, details.NO_ACCESS, address, 0)
    if region != 1 and size != 4:
        return _fault(st, BAD_ADDRESS, cycle, details.WORDS_ONLY, address, size)
    if region == 2:
        return _fault(st, BAD_ADDRESS, cycle, details.BEYOND_SRAM, address, st[SRAM_BYTES])
    if (address & 0xFFFFFFF) + size > st[DMEM_BYTES]:
        return _fault(st, DMEM_OUT_OF_RANGE, cycle, details.BEYOND_DMEM, address, st[DMEM_BYTES])
    return _fault(st, STACK_OVERFLOW, cycle, details.STACK, address, st[STACK_LIMIT])


@jit
def _load_word(st, address):
    """A word load from SRAM or a core register, starting in st[CYCLE], which moves on.

    Returns the word, or -1 after a fault.
    """
    cycle = st[CYCLE]
    offset = address - 0x20000000
    if address & 3 == 0 and 0 <= offset and offset + 4 <= st[SRAM_BYTES]:
        if st[CHECKING]:
            kind = check_word(st, offset)
            if kind > 0:
                _command_fault(st, 0, kind, cycle)
                st[FAULT_COMMAND] = -1
                return -1
        taken = written(st, offset, offset + 3, cycle + 3)
        if taken > st[WATCHDOG]:
            _out_of_time(st)
            return -1
        st[CYCLE] = taken + 2
        return np.int64(load_u32(st[SRAM_AT] + offset, 0))
    if address == 0x50000000 or address == 0x50000004:
        st[CYCLE] = cycle + 5
        return st[CORE_ID] if address == 0x50000000 else st[CORE_COUNT]
    _bus_fault(st, address, 4, cycle, False)
    return -1


@jit
def _divide(operation, a, b):
    """DIV, DIVU, REM, REMU on operands widened as the instruction reads them."""
    if b == 0:
        return np.int64(-1) if operation == op.DIV or operation == op.DIVU else a
    if operation == op.DIVU:
        return a // b
    if operation == op.REMU:
        return a % b
    quotient = abs(a) // abs(b)
    if (a < 0) != (b < 0):
        quotient = -quotient
    return quotient if operation == op.DIV else a - quotient * b


@jit
def _last_entry(st):
    """The window entry of the command that entered last."""
    return ENTRIES + ENTRY_WORDS * st[ORDER + st[IN_FLIGHT] - 1]


@cached_jit
def run(st, sram, acc, scratch, jobs):
    """Run a core until the slice, the epoch or the launch ends for it: SLICE ... LOG_FULL.

    st: the core's state (`layout`). sram, acc, scratch: its memories and the scratch of matmul,
    which also are at SRAM_AT, ACC_AT. jobs: what it shares with its helper (`values`), which calls
    this function too, with a state and a scratch of its own, and returns when told to.
    """
    if st[SERVING]:
        serve(st, jobs, sram, acc, scratch)
        return SLICE
    helped = st[HELPED] != 0
    x = st[REGISTERS_AT]
    code = st[CODE_AT]
    dmem = st[DMEM_AT]
    dmem_bytes = st[DMEM_BYTES]
    imem_bytes = st[IMEM_BYTES]
    stack_limit = st[STACK_LIMIT]
    limit = min(st[LIMIT], st[WATCHDOG])
    pc = st[PC]
    t = st[CYCLE]
    done = np.int64(0)
    reason = SLICE
    st[WORK] = 0
    while True:
        if t > limit:
            if t > st[WATCHDOG]:
                _out_of_time(st)
                reason = FAULTED
            break
        if pc >= imem_bytes or pc < 0:
            _fault(st, FETCH_OUT_OF_RANGE, t, details.FETCH, imem_bytes, 0)
            reason = FAULTED
            break
        word = load_i64(code, pc >> 2)
        operation = word & 0xFF
        rd = (word >> 8) & 0xFF
        a = load_i32(x, (word >> 16) & 0xFF)
        b = load_i32(x, (word >> 24) & 0xFF)
        imm = np.int32(word >> 32)
        cycles = 3
        following = pc + 4
        if operation == op.ADDI:
            store_i32(x, rd, np.int32(a + imm))
        elif operation == op.ADD:
            store_i32(x, rd, np.int32(a + b))
        elif operation == op.LW:
            cycles = 5
            address = np.int64(np.uint32(np.int64(a) + imm))
            offset = address - 0x10000000
            if 0 <= offset <= dmem_bytes - 4 and offset & 3 == 0:
                store_i32(x, rd, load_i32(dmem + offset, 0))
            else:
                if helped:
                    read = address - 0x20000000
                    wait_for_writes(st, read, read + 3, jobs, sram, acc, scratch)
                st[PC], st[CYCLE] = pc, t
                value = _load_word(st, address)
                if value < 0:
                    reason = FAULTED
                    break
                store_i32(x, rd, np.int32(value))
                t = st[CYCLE]
                cycles = 0
        elif operation == op.SW:
            cycles = 5
            address = np.int64(np.uint32(np.int64(a) + imm))
            offset = address - 0x10000000
            if 0 <= offset <= dmem_bytes - 4 and offset & 3 == 0 and (
                offset >= stack_limit or (word >> 16) & 0xFF != 2
            ):
                store_i32(dmem + offset, 0, b)
            elif address >> 28 == 4 and address & 3 == 0:
                if st[COMMANDS] >= st[TRACE_ROWS]:
                    reason = TRACE_FULL
                    break
                if st[CHECKING] and st[LOG_USED] + log_space(st) > st[LOG_ROWS]:
                    reason = LOG_FULL
                    break
                bank = (address >> 6) & 15
                if helped and (bank == 3 or bank == 4):  # they look at their indices early
                    wait_for(st, st[POSTED], jobs, sram, acc, scratch)
                st[PC], st[CYCLE] = pc, t
                answer = _port(st, address, np.int64(np.uint32(b)))
                t = st[CYCLE]
                cycles = 0
                if answer == TO_EXECUTE:
                    if helped:
                        post(st, _last_entry(st), bank, jobs, sram, acc, scratch)
                    elif execute(st, bank, sram, acc, scratch):
                        note_overflow(st, pc, st[COMMANDS] - 1)
                elif answer != WENT_ON:
                    if answer == AT_FAULT:
                        reason = FAULTED
                        break
                    reason = BARRIER if answer == AT_BARRIER else EXIT
                    pc = following
                    done += 1
                    break
                if st[WORK] > st[WORK_LIMIT]:  # give the caller a chance
                    limit = min(limit, t)
            else:
                _bus_fault(st, address, 4, t, True)
                reason = FAULTED
                break
        elif operation == op.LUI:
            store_i32(x, rd, imm)
        elif op.BNE <= operation <= op.BGEU:
            taken = False
            if operation == op.BNE:
                taken = a != b
            elif operation == op.BEQ:
                taken = a == b
            elif operation == op.BLT:
                taken = a < b
            elif operation == op.BLTU:
                taken = np.uint32(a) < np.uint32(b)
            elif operation == op.BGE:
                taken = a >= b
            else:
                taken = np.uint32(a) >= np.uint32(b)
            if taken:
                cycles = 5
                following = np.int64(np.uint32(pc + imm))
                if following & 3:
                    _fault(st, MISALIGNED, t, details.MISALIGNED_JUMP, following, 0)
                    reason = FAULTED
                    break
        elif operation == op.JAL or operation == op.JALR:
            if operation == op.JAL:
                target = np.int64(np.uint32(pc + imm))
            else:
                target = np.int64(np.uint32(np.int64(a) + imm)) & 0xFFFFFFFE
                cycles = 6
            if target & 3:
                _fault(st, MISALIGNED, t, details.MISALIGNED_JUMP, target, 0)
                reason = FAULTED
                break
            store_i32(x, rd, np.int32(following))
            following = target
        elif operation == op.SLTI:
            store_i32(x, rd, np.int32(a < imm))
        elif operation == op.SLTIU:
            store_i32(x, rd, np.int32(np.uint32(a) < np.uint32(imm)))
        elif operation == op.XORI:
            store_i32(x, rd, a ^ imm)
        elif operation == op.ORI:
            store_i32(x, rd, a | imm)
        elif operation == op.ANDI:
            store_i32(x, rd, a & imm)
        elif operation == op.SLLI:
            store_i32(x, rd, np.int32(np.int64(a) << (imm & 31)))
        elif operation == op.SRLI:
            store_i32(x, rd, np.int32(np.int64(np.uint32(a)) >> (imm & 31)))
        elif operation == op.SRAI:
            store_i32(x, rd, np.int32(np.int64(a) >> (imm & 31)))
        elif operation == op.SUB:
            store_i32(x, rd, np.int32(a - b))
        elif operation == op.SLL:
            store_i32(x, rd, np.int32(np.int64(a) << (b & 31)))
        elif operation == op.SLT:
            store_i32(x, rd, np.int32(a < b))
        elif operation == op.SLTU:
            store_i32(x, rd, np.int32(np.uint32(a) < np.uint32(b)))
        elif operation == op.XOR:
            store_i32(x, rd, a ^ b)
        elif operation == op.SRL:
            store_i32(x, rd, np.int32(np.int64(np.uint32(a)) >> (b & 31)))
        elif operation == op.SRA:
            store_i32(x, rd, np.int32(np.int64(a) >> (b & 31)))
        elif operation == op.OR:
            store_i32(x, rd, a | b)
        elif operation == op.AND:
            store_i32(x, rd, a & b)
        elif op.LB <= operation <= op.LHU:
            cycles = 5
            size = 1 if operation == op.LB or operation == op.LBU else 2
            address = np.int64(np.uint32(np.int64(a) + imm))
            offset = address - 0x10000000
            if 0 > offset or offset > dmem_bytes - size or offset & (size - 1):
                _bus_fault(st, address, size, t, False)
                reason = FAULTED
                break
            if operation == op.LB:
                store_i32(x, rd, load_i8(dmem + offset, 0))
            elif operation == op.LBU:
                store_i32(x, rd, load_u8(dmem + offset, 0))
            elif operation == op.LH:
                store_i32(x, rd, load_i16(dmem + offset, 0))
            else:
                store_i32(x, rd, load_u16(dmem + offset, 0))
        elif operation == op.SB or operation == op.SH:
            cycles = 5
            size = 1 if operation == op.SB else 2
            address = np.int64(np.uint32(np.int64(a) + imm))
            offset = address - 0x10000000
            if 0 > offset or offset > dmem_bytes - size or offset & (size - 1) or (
                offset < stack_limit and (word >> 16) & 0xFF == 2
            ):
                _bus_fault(st, address, size, t, True)
                reason = FAULTED
                break
            if size == 1:
                store_8(dmem + offset, 0, b)
            else:
                store_16(dmem + offset, 0, b)
        elif op.MUL <= operation <= op.MULHU:
            cycles = 6
            if operation == op.MUL:
                store_i32(x, rd, np.int32(np.int64(a) * np.int64(b)))
            elif operation == op.MULH:
                store_i32(x, rd, np.int32((np.int64(a) * np.int64(b)) >> 32))
            elif operation == op.MULHSU:
                store_i32(x, rd, np.int32((np.int64(a) * np.int64(np.uint32(b))) >> 32))
            else:
                product = np.uint64(np.uint32(a)) * np.uint64(np.uint32(b))
                store_i32(x, rd, np.int32(product >> np.uint64(32)))
        elif op.DIV <= operation <= op.REMU:
            cycles = 40
            if operation == op.DIV or operation == op.REM:
                result = _divide(operation, np.int64(a), np.int64(b))
            else:
                result = _divide(operation, np.int64(np.uint32(a)), np.int64(np.uint32(b)))
            store_i32(x, rd, np.int32(result))
        elif operation == op.FENCE:
            cycles = 3
        else:
            if operation == op.ILLEGAL:
                value = np.int64(np.uint32(imm))
                _fault(st, ILLEGAL_INSTRUCTION, t, details.NO_INSTRUCTION, value, 0)
            else:
                _fault(st, TRAP, t, details.ENVIRONMENT, 0, 0)
            reason = FAULTED
            break
        pc = following
        t += cycles
        done += 1
    if helped:
        wait_for(st, st[POSTED], jobs, sram, acc, scratch)
    st[PC] = pc
    st[INSTRUCTIONS] += done
    if reason == FAULTED:
        st[FAULT_PC] = pc
        t = st[FAULT_CYCLE]
    st[CYCLE] = t
    return reason


@cached_jit
def settle(st):
    """Let every command in flight start, so that the trace and the counters are complete."""
    drain(st)
