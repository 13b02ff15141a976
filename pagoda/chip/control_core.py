"""The control core: RV32IM in order, with exactly the contract's cycles for each class.

An instruction that starts in cycle t goes through these states:

    t      FETCH     IMEM shows its word (the address was set before); the one before writes rd
    t + 1  DECODE    operands are read, the pc moves on
    t + 2  EXECUTE   adder, logic, first half of a shift, comparison; early faults
    t + 3  FETCH of the next, or JUMP (jalr), MEMORY (load, store), TAIL (mul, div)

A branch is decided in EXECUTE; the word after it is fetched meanwhile and dropped if the branch is
taken. Nothing is written before the next FETCH, so what faults changes nothing.
"""

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, Value
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from pagoda.chip.control_arithmetic import Divider, Multiplier
from pagoda.chip.control_registers import Registers
from pagoda.isa.chip import Chip
from pagoda.isa.core import STACK_POINTER
from pagoda.isa.fault import FaultKind
from pagoda.isa.memory_map import DMEM
from pagoda.isa.rv32 import CYCLES, RV32
from pagoda.isa.table import OPCODE_MASK

FAULT_KIND_BITS = 5
OPCODE_BITS = OPCODE_MASK.bit_length()


class ControlBus(wiring.Signature):
    """Loads and stores of the control core.

    `request` is high in t + 3; address and the rest stay until the access ends. The cycle with
    `done` is its last one, the next instruction starts in the following; there `loaded` is read.
    With `pause` it ends, too, but the next instruction waits for `start`.
    """

    def __init__(self):
        super().__init__({
            "request": Out(1), "store": Out(1), "size": Out(2), "address": Out(32),
            "data": Out(32), "from_stack": Out(1), "done": In(1), "pause": In(1),
            "loaded": In(32),
        })  # fmt: skip


class State(enum.Enum, shape=3):
    """What the core does in this cycle."""

    PAUSED = 0
    FETCH = 1
    DECODE = 2
    EXECUTE = 3
    JUMP = 4
    MEMORY = 5
    TAIL = 6  # nothing is left to do, but the class's cycles are not over


class _Result(enum.Enum, shape=3):
    """What the next FETCH writes to rd."""

    SUM = 0
    PART = 1  # logic and shifts
    LESS = 2
    LOADED = 3
    PRODUCT_LOW = 4
    PRODUCT_HIGH = 5
    DIVISION = 6


# TAIL counts down to 0; its cycles follow EXECUTE, or JUMP and the dropped FETCH.
_TAILS = {
    "branch": CYCLES["branch taken"] - 5,
    "jalr": CYCLES["jalr"] - 5,
    "mul": CYCLES["mul"] - 4,
    "div": CYCLES["div"] - 4,
}


class ControlCore(wiring.Component):
    """RV32IM. `fetch` is the pc; `instruction` shows that word of IMEM one cycle later.

    `clear`: pc and registers as a launch begins. `start`, while paused: the instruction at the pc
    starts in the next cycle. `stop`: pause at once, the instruction in flight changes nothing
    more. `over`: this cycle lies beyond the watchdog, no instruction starts. `code_words`: words
    of IMEM from there on are 0. `fault` is a pulse: `fault_kind`, of the instruction at `pc` that
    started `fault_age` cycles ago. `retired` is a pulse for every instruction that completed.
    """

    def __init__(self, chip: Chip):
        self.chip = chip
        super().__init__({
            "clear": In(1), "entry": In(32), "start": In(1), "stop": In(1), "over": In(1),
            "code_words": In(32), "fetch": Out(32), "instruction": In(32), "pc": Out(32),
            "fault": Out(1), "fault_kind": Out(FAULT_KIND_BITS), "fault_age": Out(2),
            "retired": Out(1), "bus": Out(ControlBus()),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        self._declare()
        m.submodules.registers = self.registers = Registers()
        m.submodules.multiplier = self.multiplier = Multiplier()
        m.submodules.divider = self.divider = Divider()
        self._decode(m)
        self._select_result(m)
        with m.Switch(self.state):
            for state, body in (
                (State.PAUSED, self._paused), (State.FETCH, self._fetch_state),
                (State.DECODE, self._decode_state), (State.EXECUTE, self._execute_state),
                (State.JUMP, self._jump_state), (State.MEMORY, self._memory_state),
                (State.TAIL, self._tail_state),
            ):  # fmt: skip
                with m.Case(state):
                    body(m)
        self._count(m)
        with m.If(self.stop):
            m.d.sync += self.state.eq(State.PAUSED)
        with m.If(self.clear):
            m.d.sync += [self.next_pc.eq(self.entry), self.writes.eq(0), self.taken.eq(0)]
        m.d.comb += self.fetch.eq(self.next_pc)
        return m

    def _declare(self) -> None:
        self.state = Signal(State)
        self.next_pc = Signal(32)  # of the instruction in FETCH, from its DECODE on of the next
        self.word = Signal(32)  # the instruction, from DECODE to the next FETCH
        # Found in FETCH: the start lies beyond the watchdog, the pc beyond IMEM or the code.
        self.late, self.outside, self.blank = Signal(), Signal(), Signal()
        # From DECODE on.
        self.illegal, self.trap, self.misaligned = Signal(), Signal(), Signal()
        self.a, self.b, self.stored = Signal(32), Signal(32), Signal(32)
        self.subtract, self.unsigned = Signal(), Signal()
        self.is_branch, self.is_store, self.from_stack = Signal(), Signal(), Signal()
        self.follows = Signal(State)  # the state after EXECUTE
        self.result = Signal(_Result)
        self.will_write = Signal()
        # From EXECUTE on.
        self.sum, self.part, self.less = Signal(32), Signal(32), Signal()
        self.part_fill, self.part_left, self.part_shift = Signal(), Signal(), Signal(3)
        self.taken = Signal()  # a branch is; for one cycle
        self.remaining = Signal(range(CYCLES["div"]))
        self.writes = Signal()  # the next FETCH writes rd
        self.requesting = Signal()
        self.completed = Signal()  # an instruction did, but it is not yet counted

    # Decoding. ------------------------------------------------------------------------------------

    def _decode(self, m: Module) -> None:
        """`self.opcode`: whether the word has the opcode of that row of the table."""
        word = self.word
        opcodes = {name: row.match & OPCODE_MASK for name, row in RV32.rows.items()}
        # The two lowest bits are 1 in every row.
        self.opcode = {
            name: word[2:OPCODE_BITS] == opcodes[name] >> 2
            for name in ("lui", "auipc", "jal", "jalr", "beq", "lw", "sw", "add", "fence", "ecall")
        }
        self.is_muldiv = self.opcode["add"] & word[25]
        sign = word[31]
        self.immediate_i = Cat(word[20:32], sign.replicate(20))
        self.immediate_s = Cat(word[7:12], word[25:32], sign.replicate(20))
        self.immediate_b = Cat(C(0, 1), word[8:12], word[25:31], word[7], sign.replicate(20))
        self.immediate_u = Cat(C(0, 12), word[12:32])
        self.immediate_j = Cat(C(0, 1), word[21:31], word[20], word[12:20], sign.replicate(12))
        self.funct3 = word[12:15]

    # States. --------------------------------------------------------------------------------------

    def _paused(self, m: Module) -> None:
        with m.If(self.start):
            m.d.sync += self.state.eq(State.FETCH)

    def _fetch_state(self, m: Module) -> None:
        imem_bits = ceil_log2(self.chip.imem_bytes)
        m.d.sync += [
            self.word.eq(self.instruction),
            self.late.eq(self.over),
            self.outside.eq(self.next_pc[imem_bits:].any()),
            self.blank.eq(self.next_pc[2:] >= self.code_words),
            self.writes.eq(0),
            self.taken.eq(0),
            self.state.eq(State.DECODE),
        ]
        with m.If(self.taken):
            with m.If(self.immediate_b[1]):
                self._fail(m, FaultKind.MISALIGNED, 3)
            with m.Else():
                m.d.sync += [
                    self.next_pc.eq(self.pc + self.immediate_b),
                    self.remaining.eq(_TAILS["branch"]),
                    self.state.eq(State.TAIL),
                ]

    def _decode_state(self, m: Module) -> None:
        word, opcode = self.word, self.opcode
        m.d.comb += [
            self.registers.first.eq(word[15:20]), self.registers.second.eq(word[20:25]),
        ]  # fmt: skip
        is_slt = ~opcode["beq"] & (self.funct3[1:] == 1)  # and sltu; else it adds or combines
        m.d.sync += [
            self.state.eq(State.EXECUTE),
            self.pc.eq(self.next_pc),
            self.next_pc.eq(self.next_pc + Mux(opcode["jal"], self.immediate_j, 4)),
            self.stored.eq(self.registers.second_data),
            self.is_branch.eq(opcode["beq"]),
            self.is_store.eq(opcode["sw"]),
            self.from_stack.eq(word[15:20] == STACK_POINTER),
            self.unsigned.eq(Mux(opcode["beq"], word[13], word[12])),
            self.will_write.eq(~(opcode["beq"] | opcode["sw"] | opcode["fence"])),
            # sub, slt, sltu, slti, sltiu and branches
            self.subtract.eq(
                opcode["beq"]
                | (opcode["add"] & ((self.funct3 == 0) & word[30] | is_slt))
                | (self._is_immediate() & is_slt)
            ),
        ]
        self._choose_operands(m)
        self._choose_result(m)
        self._find_faults(m)

    def _is_immediate(self) -> Value:
        return self.word[2:OPCODE_BITS] == (RV32.rows["addi"].match & OPCODE_MASK) >> 2

    def _choose_operands(self, m: Module) -> None:
        opcode = self.opcode
        m.d.sync += [self.a.eq(self.registers.first_data), self.b.eq(self.immediate_i)]
        with m.If(opcode["auipc"] | opcode["jal"]):
            m.d.sync += self.a.eq(self.next_pc)
        with m.If(opcode["lui"]):
            m.d.sync += self.a.eq(0)
        with m.If(opcode["add"] | opcode["beq"]):
            m.d.sync += self.b.eq(self.registers.second_data)
        with m.If(opcode["sw"]):
            m.d.sync += self.b.eq(self.immediate_s)
        with m.If(opcode["lui"] | opcode["auipc"]):
            m.d.sync += self.b.eq(self.immediate_u)
        with m.If(opcode["jal"]):
            m.d.sync += self.b.eq(4)

    def _choose_result(self, m: Module) -> None:
        """What rd gets, and what follows EXECUTE."""
        opcode, funct3 = self.opcode, self.funct3
        m.d.sync += [self.result.eq(_Result.SUM), self.follows.eq(State.FETCH)]
        with m.If(self.is_muldiv):
            product = Mux(funct3 == 0, _Result.PRODUCT_LOW, _Result.PRODUCT_HIGH)
            m.d.sync += [
                self.result.eq(Mux(funct3[2], _Result.DIVISION, product)),
                self.follows.eq(State.TAIL),
            ]
        with m.Elif(opcode["add"] | self._is_immediate()):
            with m.If(funct3[1:] == 1):
                m.d.sync += self.result.eq(_Result.LESS)
            with m.Elif(funct3.any()):
                m.d.sync += self.result.eq(_Result.PART)
        with m.If(opcode["lw"]):
            m.d.sync += self.result.eq(_Result.LOADED)
        with m.If(opcode["lw"] | opcode["sw"]):
            m.d.sync += self.follows.eq(State.MEMORY)
        with m.If(opcode["jalr"]):
            m.d.sync += self.follows.eq(State.JUMP)

    def _find_faults(self, m: Module) -> None:
        patterns = [row.pattern for row in RV32.rows.values()]
        m.d.sync += [
            self.illegal.eq(~self.word.matches(*patterns)),
            self.trap.eq(self.opcode["ecall"]),
            self.misaligned.eq(self.opcode["jal"] & self.immediate_j[1]),
        ]

    def _execute_state(self, m: Module) -> None:
        b = self.b ^ self.subtract.replicate(32)
        total = Signal(34)  # one adder with a carry in; its last bit is the carry out
        less = Signal()
        m.d.comb += [
            total.eq(Cat(C(1, 1), self.a) + Cat(self.subtract, b)),
            less.eq(Mux(self.a[31] ^ self.b[31], self.a[31] ^ self.unsigned, ~total[33])),
        ]
        # funct3 of a branch: 0 equal, 4 less, 6 less unsigned; bit 0 inverts.
        taken = Mux(self.funct3[2], less, self.a == self.b) ^ self.funct3[0]
        m.d.sync += [
            self.sum.eq(total[1:33]), self.less.eq(less),
            self.state.eq(self.follows), self.writes.eq(self.will_write),
            self.taken.eq(taken & self.is_branch),
            self.requesting.eq(self.follows == State.MEMORY),
            self.remaining.eq(Mux(self.funct3[2], _TAILS["div"], _TAILS["mul"])),
        ]  # fmt: skip
        self._shift_or_combine(m)
        with m.If(self._early_fault()):
            m.d.sync += [self.taken.eq(0), self.requesting.eq(0), self.writes.eq(0)]
            chosen = m.If
            for found, kind in (
                (self.late, FaultKind.WATCHDOG),
                (self.outside, FaultKind.FETCH_OUT_OF_RANGE),
                (self.blank | self.illegal, FaultKind.ILLEGAL_INSTRUCTION),
                (self.trap, FaultKind.TRAP),
                (self.misaligned, FaultKind.MISALIGNED),
            ):
                with chosen(found):
                    self._fail(m, kind, 2)
                chosen = m.Elif

    def _early_fault(self) -> Value:
        return Cat(
            self.late, self.outside, self.blank, self.illegal, self.trap, self.misaligned
        ).any()

    def _shift_or_combine(self, m: Module) -> None:
        """A shift to the right by whole bytes; to the left is to the right, reversed. Logic goes
        the same way, by no bits."""
        left = self.funct3 == 1
        amount = self.b[:5]
        fill = self.word[30] & self.a[31] & ~left
        ordered = Mux(left, self.a[::-1], self.a)
        shifted = Cat(ordered, fill.replicate(24)).bit_select(amount[3:5] << 3, 32)
        m.d.sync += [
            self.part.eq(shifted), self.part_fill.eq(fill), self.part_left.eq(left),
            self.part_shift.eq(amount[:3]),
        ]  # fmt: skip
        for code, value in ((4, self.a ^ self.b), (6, self.a | self.b), (7, self.a & self.b)):
            with m.If(self.funct3 == code):
                m.d.sync += [
                    self.part.eq(value), self.part_left.eq(0), self.part_shift.eq(0),
                ]  # fmt: skip

    def _jump_state(self, m: Module) -> None:
        m.d.sync += [
            self.next_pc.eq(Cat(C(0, 1), self.sum[1:])),
            self.sum.eq(self.next_pc),  # the link
            self.remaining.eq(_TAILS["jalr"]),
            self.state.eq(State.TAIL),
        ]
        with m.If(self.sum[1]):
            self._fail(m, FaultKind.MISALIGNED, 3)

    def _memory_state(self, m: Module) -> None:
        m.d.sync += self.requesting.eq(0)
        with m.If(self.bus.done):
            m.d.sync += self.state.eq(Mux(self.bus.pause, State.PAUSED, State.FETCH))

    def _tail_state(self, m: Module) -> None:
        m.d.sync += self.remaining.eq(self.remaining - 1)
        with m.If(self.remaining == 0):
            m.d.sync += self.state.eq(State.FETCH)

    def _fail(self, m: Module, kind: FaultKind | Value, age: int) -> None:
        m.d.comb += [self.fault.eq(1), self.fault_kind.eq(kind), self.fault_age.eq(age)]
        m.d.sync += self.state.eq(State.PAUSED)

    # What goes out. -------------------------------------------------------------------------------

    def _select_result(self, m: Module) -> None:
        registers, divider, multiplier = self.registers, self.divider, self.multiplier
        shifted = Signal(32)
        m.d.comb += shifted.eq(Cat(self.part, self.part_fill.replicate(7)) >> self.part_shift)
        data = Signal(32)
        with m.Switch(self.result):
            for result, value in (
                (_Result.SUM, self.sum),
                (_Result.PART, Mux(self.part_left, shifted[::-1], shifted)),
                (_Result.LESS, self.less),
                (_Result.LOADED, self._loaded()),
                (_Result.PRODUCT_LOW, multiplier.low),
                (_Result.PRODUCT_HIGH, multiplier.high),
                (_Result.DIVISION, divider.result),
            ):
                with m.Case(result):
                    m.d.comb += data.eq(value)
        m.d.comb += [
            registers.clear.eq(self.clear),
            registers.write.eq(self.clear | (self.state == State.FETCH) & self.writes),
            registers.target.eq(Mux(self.clear, STACK_POINTER, self.word[7:12])),
            registers.data.eq(Mux(self.clear, DMEM.base + self.chip.dmem_bytes, data)),
            multiplier.a.eq(self.a), multiplier.b.eq(self.b),
            # mulh 1, mulhsu 2, mulhu 3
            multiplier.a_signed.eq(~self.funct3[:2].all()), multiplier.b_signed.eq(~self.funct3[1]),
            divider.start.eq(self.state == State.EXECUTE),
            divider.a.eq(self.a), divider.b.eq(self.b),
            divider.is_signed.eq(~self.funct3[0]), divider.is_remainder.eq(self.funct3[1]),
            self.bus.request.eq(self.requesting), self.bus.store.eq(self.is_store),
            self.bus.size.eq(self.funct3[:2]), self.bus.address.eq(self.sum),
            self.bus.data.eq(self.stored),
            self.bus.from_stack.eq(self.from_stack),
        ]  # fmt: skip

    def _loaded(self) -> Value:
        """The bytes of the word that a load asked for, extended."""
        word = self.bus.loaded
        half = word.word_select(self.sum[1], 16)
        byte = half.word_select(self.sum[0], 8)
        is_signed = ~self.funct3[2]
        return Array([
            Cat(byte, (byte[7] & is_signed).replicate(24)),
            Cat(half, (half[15] & is_signed).replicate(16)),
            word, word,
        ])[self.funct3[:2]]  # fmt: skip

    def _count(self, m: Module) -> None:
        """An instruction is counted in the next one's EXECUTE, or when the core pauses: a command
        may still fault after the next instruction's start."""
        m.d.comb += self.retired.eq(
            self.completed & ((self.state == State.EXECUTE) | (self.state == State.PAUSED))
        )
        with m.If(self.retired):
            m.d.sync += self.completed.eq(0)
        ends = (self.state == State.EXECUTE) & (self.follows == State.FETCH)
        ends &= ~self._early_fault()
        ends |= (self.state == State.MEMORY) & self.bus.done
        ends |= (self.state == State.TAIL) & (self.remaining == 0)
        with m.If(ends):
            m.d.sync += self.completed.eq(1)
        with m.If(self.stop | self.clear | (self.fault & (self.fault_age == 3))):
            m.d.sync += self.completed.eq(0)
