"""The state of one simulated core: where each number lies in its array of int64.

Everything the compiled code needs is in one array per core, so compiled functions take one
argument and compile once. Host addresses of the memories are numbers in it too.

    0    chip parameters         set once
    48   run state               control core, window, faults
    128  command fields          16 words for each of 11 banks
    320  slots                   base, size, permissions
    576  window entries          17 of ENTRY_WORDS: up to 16 in flight, one being prepared
    1392 order                   entry numbers: those in flight, oldest first, then the free ones
"""

# Chip parameters ---------------------------------------------------------------------------------
(
    LANES,
    ROWS,
    COLS,
    PSUM_LATENCY,  # D of the contract
    PORT_BYTES,
    SRAM_BYTES,
    ACC_BYTES,
    SRAM_BANK_SHIFT,  # log2 of a bank's bytes
    ACC_BANK_SHIFT,
    IMEM_BYTES,
    DMEM_BYTES,
    WINDOW,
    PERIOD_NUMERATOR,  # cycles from one turn of the DRAM port to the next, a rational
    PERIOD_DENOMINATOR,
    DRAM_LATENCY,
    MATRIX_TYPES,  # bit 0 bf16, bit 1 int8
    CORE_ID,
    CORE_COUNT,
    # Host addresses.
    REGISTERS_AT,
    CODE_AT,
    DMEM_AT,
    SRAM_AT,
    ACC_AT,
    DRAM_AT,
    LANES_AT,  # scratch: LANE_BUFFERS of CHUNK lanes
    MATMUL_SCRATCH_AT,
    SRAM_WRITTEN_AT,  # checking mode: one byte per byte of SRAM, 1 once written
    ACC_WRITTEN_AT,
    CHECKING,
    TRACING,
    JOBS_AT,  # what the core shares with its helper (`values`)
) = range(31)

# Run state ---------------------------------------------------------------------------------------
(
    PC,
    CYCLE,  # start of the next instruction; the cycle of arrival, exit or fault after one
    LIMIT,  # a slice ends before an instruction that starts later
    WATCHDOG,
    STACK_LIMIT,
    SLOT_COUNT,
    IN_FLIGHT,
    LAST_START,
    LAST_FINISH,
    PORT_FREE,  # DRAM port
    RESULTS_FREE,  # last finish on the vector engine, whose results stay in order
    ENGINE_FREE,  # four: load, store, matrix, vector
    _ENGINE_FREE_1,
    _ENGINE_FREE_2,
    _ENGINE_FREE_3,
    BUSY,  # four
    _BUSY_1,
    _BUSY_2,
    _BUSY_3,
    INSTRUCTIONS,
    COMMANDS,
    MACS,
    READ_BYTES,
    WRITE_BYTES,
    WORK,  # host effort since the slice began, about one per nanosecond
    WORK_LIMIT,  # a slice ends after so much
    HELPED,  # 1: a helper executes the commands
    SERVING,  # 1: this is the helper's state, not a core's
    POSTED,  # commands left to the helper so far
    POSTED_BEFORE,  # of these, before this launch
    FAULT,  # FaultKind, 0 for none
    FAULT_CYCLE,
    FAULT_PC,
    FAULT_COMMAND,
    FAULT_SLOT,
    FAULT_OFFSET,
    FAULT_DETAIL,  # index into details.DETAILS
    FAULT_VALUE,
    FAULT_VALUE_2,
    OVERFLOW_PC,  # first command that saturated an int64; -1 for none
    OVERFLOW_COMMAND,
    TRACE_ROWS,  # rows that the trace array holds
    TRACE_AT,
    LOG_AT,  # checking mode: DRAM rows touched in this epoch
    LOG_ROWS,
    LOG_USED,
) = range(48, 94)

FIELDS = 128
BANKS = 11
SLOTS = 320  # three words each: base, size, permissions
SLOT_WORDS = 4
READABLE, WRITABLE = 1, 2

# Window entries ----------------------------------------------------------------------------------
ENTRIES = 576
ENTRY_WORDS = 48
MAX_WINDOW = 16
ORDER = ENTRIES + (MAX_WINDOW + 1) * ENTRY_WORDS
STATE_WORDS = ORDER + MAX_WINDOW + 1
(
    # The first eleven are a row of the trace, in its order.
    E_CORE,
    E_INDEX,
    E_PC,
    E_BANK,
    E_ENTRY,
    E_START,  # -1 while it waits
    E_FREE,
    E_FINISH,
    E_CAUSE,
    E_MACS,
    E_DRAM_BYTES,
    E_ENGINE,
    E_WAITS,  # bit i: entry i conflicts, is older and has not started
    E_HAZARD_FREE,  # finish of the last conflicting older command that has started
    E_READ_BANKS,  # bit i: bank i of SRAM; bit 16 + i: bank i of ACC; DRAM_BIT
    E_WRITE_BANKS,
    E_OCCUPANCY,  # of a command with a lead: from its first atom slot
    E_TAIL,
    E_LEAD,  # cycles from the start to the earliest atom slot; -1: moves no atoms
    E_READS,  # how many read ranges
    E_WRITE_FIRST,
    E_WRITE_LAST,  # below first: writes nothing
    E_READ_RANGES,  # first, last of each, up to four
) = range(23)
TRACE_WORDS = 11
MAX_READS = 4

# Ranges of all memories in one space.
ACC_SPACE = 1 << 40
DRAM_SPACE = 1 << 50
BANK_BITS = (1 << 32) - 1
DRAM_BIT = 1 << 32
INDEX_BIT = 1 << 33  # reads an index tile, which holds no bank port and so has no bank bits

LOAD, STORE, MATRIX, VECTOR = range(4)
CAUSE_ENTRY, CAUSE_ENGINE, CAUSE_HAZARD, CAUSE_PORT, CAUSE_BANK, CAUSE_SLOT = range(6)

# The word of the array at JOBS_AT that says: nobody wants this launch's values any more.
ABANDONED = 17

CHUNK = 512  # lanes of a scratch buffer
LANE_BUFFERS = 8
LANE_BUFFER_BYTES = 4 * CHUNK + 64  # apart, so that buffers do not share cache sets

NEVER = 1 << 62

# What ended a slice.
SLICE, BARRIER, EXIT, FAULTED, TRACE_FULL, LOG_FULL = range(6)
