"""Command IR to RV32 code: LLVM IR through llvmlite, an object file, a position-independent blob.

A kernel becomes one function `kernel(a0)`; a0 is the address of its argument words. Names are
stack slots that LLVM turns into registers; command port writes are volatile stores. The blob is the
object's .text: nothing in it may need a linker, so there are no data sections, no calls and no
relocations, and it runs at any address.

Line table: every statement with a distinct location gets a line number of its own in the debug
information (1, 2, ...), an index into the blob's own list of locations, so files and columns need
no DWARF string tables.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import llvmlite
from elftools.elf.elffile import ELFFile
from llvmlite import binding as llvm
from llvmlite import ir

from pagoda.compiler.command_ir import Control, Go, LoadWord, SetField
from pagoda.compiler.errors import Location
from pagoda.compiler.scalar import (
    Argument,
    Binary,
    CoreCount,
    CoreId,
    Int,
    Offset,
    Scalar,
    Select,
    Size,
    Slot,
    Stride,
    Variable,
)
from pagoda.compiler.tile_ir import Body, For, If, Kernel, Let, Statement, walk
from pagoda.isa.commands import BANK_BYTES
from pagoda.isa.memory_map import COMMAND_PORT, CORE_COUNT, CORE_ID, SRAM

TRIPLE = "riscv32-unknown-elf"
I32 = ir.IntType(32)
VOID = ir.VoidType()


@dataclass(frozen=True)
class Blob:
    """Position-independent code. lines: (byte offset, location), sorted by offset."""

    code: bytes
    lines: tuple[tuple[int, Location], ...]


class _VolatileLoad(ir.LoadInstr):
    """llvmlite's IR layer has no volatile accesses."""

    def descr(self, buf: list[str]) -> None:
        super().descr(buf)
        buf[-1] = buf[-1].replace("load", "load volatile", 1)


class _VolatileStore(ir.StoreInstr):
    def __init__(self, parent: ir.Block, value: ir.Value, pointer: ir.Value):
        super().__init__(parent, value, pointer)
        self.align = None

    def descr(self, buf: list[str]) -> None:
        super().descr(buf)
        buf[-1] = buf[-1].replace("store", "store volatile", 1)


class FunctionEmitter:
    """LLVM IR of one function over i32 scalars; also what the dispatcher is written with."""

    def __init__(self, name: str):
        self.module = ir.Module(name)
        self.module.triple = TRIPLE
        self.function = ir.Function(self.module, ir.FunctionType(VOID, [I32]), name)
        self.function.attributes.add("nounwind")
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))

    def word(self, address: ir.Value | int) -> ir.Value:
        """lw: a volatile load, in program order with the port's stores."""
        return self._insert(_VolatileLoad(self.builder.block, self._pointer(address)))

    def constant_word(self, address: ir.Value) -> ir.Value:
        """A load that nothing changes while the function runs."""
        value = self.builder.load(self._pointer(address))
        value.set_metadata("invariant.load", self.module.add_metadata([]))
        return value

    def port(self, bank: int, word: int, value: ir.Value | int) -> None:
        """sw to a word of the command port."""
        address = COMMAND_PORT.base + BANK_BYTES * bank + 4 * word
        pointer = self._pointer(address)
        self._insert(_VolatileStore(self.builder.block, self.constant(value), pointer))

    def _insert(self, instruction: ir.Instruction) -> ir.Instruction:
        self.builder._insert(instruction)
        return instruction

    def constant(self, value: ir.Value | int) -> ir.Value:
        return ir.Constant(I32, value) if isinstance(value, int) else value

    def _pointer(self, address: ir.Value | int) -> ir.Value:
        return self.builder.inttoptr(self.constant(address), I32.as_pointer())


class _KernelEmitter(FunctionEmitter):
    def __init__(self, kernel: Kernel, body: Body):
        super().__init__("kernel")
        self.kernel = kernel
        self.locations: list[Location] = []
        self.scope = self._debug_scope()
        self.arguments = self._load_arguments(body)
        names = dict.fromkeys(
            s.variable if isinstance(s, For) else s.name
            for s in walk(body)
            if isinstance(s, (For, Let, LoadWord))
        )
        self.slots = {name: self.builder.alloca(I32, name=name) for name in names}
        for slot in self.slots.values():
            self.builder.store(ir.Constant(I32, 0), slot)
        self.body(body)
        self.builder.ret_void()

    def _debug_scope(self) -> ir.Value:
        module = self.module
        file = module.add_debug_info("DIFile", {"filename": "kernel", "directory": ""})
        unit = module.add_debug_info(
            "DICompileUnit",
            {
                "language": ir.DIToken("DW_LANG_C"), "file": file, "isOptimized": True,
                "runtimeVersion": 0, "emissionKind": ir.DIToken("LineTablesOnly"),
            },
            is_distinct=True,
        )  # fmt: skip
        kind = module.add_debug_info("DISubroutineType", {"types": module.add_metadata([None])})
        scope = module.add_debug_info(
            "DISubprogram",
            {
                "name": "kernel", "file": file, "line": 1, "type": kind, "isLocal": False,
                "unit": unit,
            },
            is_distinct=True,
        )  # fmt: skip
        self.function.set_metadata("dbg", scope)
        version = [ir.Constant(I32, 2), "Debug Info Version", ir.Constant(I32, 3)]
        module.add_named_metadata("llvm.module.flags", version)
        module.add_named_metadata("llvm.dbg.cu", unit)
        return scope

    def _load_arguments(self, body: Body) -> dict[Scalar, ir.Value]:
        """Every argument word that is used, loaded once at the start."""
        used = {node for s in walk(body) for value in s.scalars() for node in value.walk()}
        arguments: dict[Scalar, ir.Value] = {}
        for index, (name, what, dim) in enumerate(self.kernel.words()):
            kinds = {"slot": Slot(name), "offset": Offset(name), "scalar": Argument(name)}
            kinds |= {"size": Size(name, dim), "stride": Stride(name, dim)}
            if kinds[what] in used:
                address = self.builder.add(self.function.args[0], ir.Constant(I32, 4 * index))
                arguments[kinds[what]] = self.constant_word(address)
        for tensor in self.kernel.tensors:
            for dim in range(tensor.rank):
                for node, fixed in (
                    (Size(tensor.name, dim), tensor.sizes[dim]),
                    (Stride(tensor.name, dim), tensor.strides[dim]),
                ):
                    if fixed is not None:
                        arguments[node] = ir.Constant(I32, fixed)
        for node, register in ((CoreId(), CORE_ID), (CoreCount(), CORE_COUNT)):
            if node in used:
                arguments[node] = self.constant_word(ir.Constant(I32, register))
        return arguments

    # Statements ----------------------------------------------------------------------------------

    def body(self, body: Body) -> None:
        for statement in body:
            self._mark(statement.location)
            self.statement(statement)

    def _mark(self, location: Location | None) -> None:
        location = location or self.kernel.location or Location(self.kernel.name, 0)
        if location not in self.locations:
            self.locations.append(location)
        line = self.locations.index(location) + 1
        self.builder.debug_metadata = self.module.add_debug_info(
            "DILocation", {"line": line, "column": 0, "scope": self.scope}
        )

    def statement(self, statement: Statement) -> None:
        match statement:
            case SetField(bank, word, value):
                self.port(bank, word, self.scalar(value))
            case Go(bank, value):
                self.port(bank, 0, self.scalar(value))
            case Control(word, value):
                self.port(0, word, self.scalar(value))
            case Let(name, value):
                self.builder.store(self.scalar(value), self.slots[name])
            case LoadWord(name, address):
                window = self.builder.add(self.scalar(address), ir.Constant(I32, SRAM.base))
                self.builder.store(self.word(window), self.slots[name])
            case If():
                self._if(statement)
            case For():
                self._for(statement)
            case _:
                raise TypeError(f"no such command IR statement: {statement!r}")

    def _if(self, statement: If) -> None:
        zero = ir.Constant(I32, 0)
        condition = self.builder.icmp_signed("!=", self.scalar(statement.condition), zero)
        with self.builder.if_else(condition) as (then, otherwise):
            with then:
                self.body(statement.then)
            with otherwise:
                self.body(statement.otherwise)

    def _for(self, loop: For) -> None:
        builder, slot = self.builder, self.slots[loop.variable]
        start, stop = self.scalar(loop.start), self.scalar(loop.stop)
        step = self.scalar(loop.step)
        test = builder.append_basic_block("test")
        body = builder.append_basic_block("body")
        done = builder.append_basic_block("done")
        builder.store(start, slot)
        builder.branch(test)
        builder.position_at_end(test)
        builder.cbranch(builder.icmp_signed("<", builder.load(slot), stop), body, done)
        builder.position_at_end(body)
        self.body(loop.body)
        self._mark(loop.location)
        builder.store(builder.add(builder.load(slot), step), slot)
        builder.branch(test)
        builder.position_at_end(done)

    # Scalars -------------------------------------------------------------------------------------

    def scalar(self, value: Scalar) -> ir.Value:
        match value:
            case Int(number):
                return ir.Constant(I32, number)
            case Variable(name):
                return self.builder.load(self.slots[name])
            case Binary(op, left, right):
                return self._binary(op, left, right)
            case Select(condition, yes, no):
                zero = ir.Constant(I32, 0)
                test = self.builder.icmp_signed("!=", self.scalar(condition), zero)
                return self.builder.select(test, self.scalar(yes), self.scalar(no))
        return self.arguments[value]

    def _binary(self, op: str, left: Scalar, right: Scalar) -> ir.Value:
        builder = self.builder
        x, y = self.scalar(left), self.scalar(right)
        match op:
            case "+":
                return builder.add(x, y)
            case "-":
                return builder.sub(x, y)
            case "*":
                return builder.mul(x, y)
            case "min" | "max":
                less = builder.icmp_signed("<" if op == "min" else ">", x, y)
                return builder.select(less, x, y)
            case "//" | "%":
                return self._divide(op, x, y)
        return builder.zext(builder.icmp_signed(op, x, y), I32)

    def _divide(self, op: str, x: ir.Value, y: ir.Value) -> ir.Value:
        """Quotient or remainder rounded to minus infinity; a divisor of 0 counts as 1, because
        LLVM may evaluate a division before the branch that guards it."""
        builder, zero = self.builder, ir.Constant(I32, 0)
        if isinstance(y, ir.Constant) and y.constant & (y.constant - 1) == 0 < y.constant:
            if op == "%":
                return builder.and_(x, ir.Constant(I32, y.constant - 1))
            return builder.ashr(x, ir.Constant(I32, y.constant.bit_length() - 1))
        if not isinstance(y, ir.Constant):
            y = builder.select(builder.icmp_signed("==", y, zero), ir.Constant(I32, 1), y)
        remainder = builder.srem(x, y)
        opposite = builder.icmp_signed("<", builder.xor(remainder, y), zero)
        inexact = builder.icmp_signed("!=", remainder, zero)
        adjust = builder.and_(opposite, inexact)
        if op == "%":
            return builder.add(remainder, builder.select(adjust, y, zero))
        return builder.sub(builder.sdiv(x, y), builder.zext(adjust, I32))


def emit_llvm(kernel: Kernel, body: Body) -> tuple[str, list[Location]]:
    """LLVM IR text of a kernel's command IR, and the locations its line numbers stand for."""
    emitter = _KernelEmitter(kernel, body)
    return str(emitter.module), emitter.locations


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(TRIPLE)
    return target.create_target_machine(
        cpu="generic-rv32", features="+m,-relax", opt=3, reloc="static", codemodel="medium"
    )


def optimise(text: str) -> tuple[llvm.ModuleRef, llvm.TargetMachine]:
    """Parse, verify and optimise LLVM IR for the control core (small code: no unrolling)."""
    module = llvm.parse_assembly(text)
    module.verify()
    machine = _target_machine()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = False
    options.loop_vectorization = False
    options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module, machine


def assembly(text: str) -> str:
    """The `asm` stage: RV32 assembly of LLVM IR, without directives and debug sections."""
    module, machine = optimise(text)
    kept = []
    for line in machine.emit_assembly(module).splitlines():
        if line.strip().startswith(".section\t.debug"):
            break
        label = line.endswith(":") and not line.startswith((".Ltmp", ".Lfunc", ".Lsec"))
        if label or (line.startswith("\t") and not line.startswith("\t.")):
            kept.append(line)
    return "\n".join(kept) + "\n"


@lru_cache(maxsize=1)
def codegen_version() -> str:
    """Changes whenever this module or LLVM may turn the same LLVM IR into other code."""
    source = Path(__file__).read_bytes()
    return f"{llvmlite.__version__} {hashlib.sha256(source).hexdigest()}"


def compile_blob(text: str, locations: list[Location]) -> Blob:
    """LLVM IR to a position-independent blob.

    Raises AssertionError if LLVM produced data or a relocation: a bug of this module.
    """
    module, machine = optimise(text)
    elf = ELFFile(io.BytesIO(machine.emit_object(module)))
    code = elf.get_section_by_name(".text").data()
    for section in elf.iter_sections():
        name = section.name
        assert not name.startswith(".rela.text"), f"unresolved references in {name}"
        data = name.startswith((".data", ".rodata", ".sdata", ".bss", ".sbss", ".srodata"))
        assert not (data and section.data_size), f"kernel code needs the data section {name}"
    return Blob(code, _line_table(elf, locations))


def _line_table(elf: ELFFile, locations: list[Location]) -> tuple[tuple[int, Location], ...]:
    """(offset, location) from .debug_line; one function at offset 0, so no relocation matters."""
    found: list[tuple[int, Location]] = []
    if not elf.has_dwarf_info():
        return ()
    info = elf.get_dwarf_info(relocate_dwarf_sections=False)
    for unit in info.iter_CUs():
        program = info.line_program_for_CU(unit)
        for entry in program.get_entries() if program else ():
            state = entry.state
            if state is None or state.end_sequence or not 0 < state.line <= len(locations):
                continue
            place = locations[state.line - 1]
            if found and found[-1][0] == state.address:
                found[-1] = (state.address, place)
            elif not found or found[-1][1] != place:
                found.append((state.address, place))
    return tuple(found)
