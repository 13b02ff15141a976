"""What is synthesised: a unit of a chip as Verilog, its memories as macros where the flow has none.

An ASIC's memories come from a memory compiler, and none is at hand: the larger ones become black
boxes without area, listed by their bits. An FPGA has block RAM; there they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from amaranth.back import verilog
from amaranth.hdl import Cat, ClockSignal, Fragment, Instance, Module, Signal, Value
from amaranth.hdl._ir import PortDirection
from amaranth.hdl._mem import MemoryInstance
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.command_port import CommandPort
from pagoda.chip.control_unit import ControlUnit
from pagoda.chip.core import Core
from pagoda.chip.load_engine import LoadEngine
from pagoda.chip.local_memory import LocalMemory
from pagoda.chip.matrix_engine import MatrixEngine
from pagoda.chip.pagoda_chip import AxiChip, check_buildable
from pagoda.chip.processing_element import element_signature, operand_bits
from pagoda.chip.store_engine import StoreEngine
from pagoda.chip.synth_result import Memory
from pagoda.chip.systolic_array import PE_MODULE, SystolicArray, pe_verilog
from pagoda.chip.vector_engine import VectorEngine
from pagoda.chip.window import Window
from pagoda.isa.chip import Chip, ChipError

# Unit -> what makes it, with the array's elements as instances of one module where it has them.
UNITS: dict[str, Callable[[Chip], wiring.Component]] = {
    "pe": lambda chip: _Element(chip),
    "array": lambda chip: SystolicArray(chip, black_box=True),
    "matrix": lambda chip: MatrixEngine(chip, black_box=True),
    "vector": VectorEngine,
    "load": LoadEngine,
    "store": StoreEngine,
    "window": Window,
    "command-port": CommandPort,
    "control": lambda chip: ControlUnit(chip, 0),
    "memory": LocalMemory,
    "core": lambda chip: Core(chip, 0, black_box=True),
    "chip": lambda chip: AxiChip(chip, black_box=True),
}
IDEAL_NETS = {"chip": ("chip/enable",)}
_WITH_ARRAY = ("array", "matrix", "core", "chip")
MACRO_BITS = 2048  # from this size on a memory is a macro; smaller ones are flip-flops
ELEMENTS_LIMIT = 1024  # of all arrays; more take hours


@dataclass(frozen=True)
class Design:
    """Verilog files by name, the module to synthesise, the memories that are black boxes.

    ideal_nets: those that reach every flip-flop, as a clock does, and are not timed."""

    top: str
    files: dict[str, str]
    macros: dict[str, Macro]  # module name -> its shape
    memories: tuple[Memory, ...]
    ideal_nets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Macro:
    """A memory with clocked ports: words x width, write enables of each write port."""

    words: int
    width: int
    reads: int
    enables: tuple[int, ...]

    @property
    def name(self) -> str:
        writes = "_".join(f"w{count}" for count in self.enables) or "rom"
        return f"memory_{self.words}x{self.width}_r{self.reads}_{writes}"

    def pins(self) -> dict[str, tuple[str, int]]:
        """Pin -> direction and bits."""
        address = max((self.words - 1).bit_length(), 1)
        pins = {"clk": ("input", 1)}
        for port in range(self.reads):
            pins[f"r{port}_en"] = ("input", 1)
            pins[f"r{port}_addr"] = ("input", address)
            pins[f"r{port}_data"] = ("output", self.width)
        for port, enables in enumerate(self.enables):
            pins[f"w{port}_en"] = ("input", enables)
            pins[f"w{port}_addr"] = ("input", address)
            pins[f"w{port}_data"] = ("input", self.width)
        return pins

    def verilog(self) -> str:
        """The module as a black box."""
        ports = ", ".join(
            f"{direction} [{bits - 1}:0] {pin}" for pin, (direction, bits) in self.pins().items()
        )
        return f"(* blackbox *) module {self.name}({ports}); endmodule\n"


def spoken(unit: str) -> str:
    """The unit in a message that has named the chip."""
    return "it" if unit == "chip" else f"its {unit}"


def check_synthesisable(chip: Chip, unit: str) -> None:
    """Raises ChipError for what the RTL cannot be or what would take hours."""
    elements = chip.rows * chip.cols * (chip.cores if unit == "chip" else 1)
    if unit in _WITH_ARRAY and elements > ELEMENTS_LIMIT:
        raise ChipError(
            f"chip {chip.name!r}: {spoken(unit)} has {elements} array elements: synthesis takes at "
            f"most {ELEMENTS_LIMIT}; choose a smaller chip, or --unit pe"
        )
    if unit != "pe":
        check_buildable(chip)


def design_of(chip: Chip, unit: str, *, macros: bool, few_pins: bool = False) -> Design:
    """The Verilog of a unit (a key of UNITS).

    macros: larger memories are black boxes. few_pins: inputs come from a shift register and outputs
    go to one, so that the unit fits a package. Raises ChipError.
    """
    check_synthesisable(chip, unit)
    try:
        element = pe_verilog(chip)
    except ValueError as error:  # too few stages
        raise ChipError(str(error)) from error
    if unit == "pe" and not few_pins:
        return Design(PE_MODULE, {f"{PE_MODULE}.v": element}, {}, ())
    component = UNITS[unit](chip)
    top = "pagoda_element" if unit == "pe" else f"pagoda_{unit.replace('-', '_')}"
    if few_pins:
        component = SerialPorts(component)
    fragment = Fragment.get(component, None)
    found: dict[str, Macro] = {}
    memories = list(_replace_memories(fragment, (), found)) if macros else []
    files = {
        f"{PE_MODULE}.v": element,
        f"{top}.v": verilog.convert(fragment, name=top, ports=_ports(component), emit_src=False),
    }
    if found:
        files["memories.v"] = "".join(macro.verilog() for macro in found.values())
    return Design(top, files, found, tuple(memories), IDEAL_NETS.get(unit, ()))


def _ports(component: wiring.Component) -> dict[str, tuple[Value, PortDirection]]:
    return {
        "__".join(str(part) for part in path): (
            Value.cast(value), PortDirection.Input if member.flow == In else PortDirection.Output
        )
        for path, member, value in component.signature.flatten(component)
    }  # fmt: skip


class _Element(wiring.Component):
    """The module of `pe_verilog` with the ports of an Amaranth component."""

    def __init__(self, chip: Chip):
        super().__init__({"enable": In(1), **element_signature(operand_bits(chip)).members})

    def elaborate(self, platform) -> Module:
        m = Module()
        ports = {
            ("i_" if member.flow == In else "o_") + name: getattr(self, name)
            for name, member in self.signature.members.items()
        }
        m.submodules.element = Instance(PE_MODULE, i_clk=ClockSignal(), i_rst=0, **ports)
        return m


class SerialPorts(wiring.Component):
    """A component behind four pins: its inputs are a shift register's bits, its outputs are folded
    into another one by XOR, so that no logic can be removed and every path is timed."""

    def __init__(self, inner: wiring.Component):
        self.inner = inner
        super().__init__({"serial_in": In(1), "serial_out": Out(1)})

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.unit = self.inner
        ports = [
            (member.flow, Value.cast(value))
            for _, member, value in self.inner.signature.flatten(self.inner)
        ]
        into = [value for flow, value in ports if flow == In]
        out = Cat(value for flow, value in ports if flow == Out)
        shift, fold = Signal(sum(map(len, into))), Signal(len(out))
        m.d.sync += [
            shift.eq(Cat(self.serial_in, shift)), fold.eq(Cat(shift[-1], fold) ^ out),
        ]  # fmt: skip
        at = 0
        for value in into:
            m.d.comb += value.eq(shift[at : at + len(value)])
            at += len(value)
        m.d.comb += self.serial_out.eq(fold[-1])
        return m


def _replace_memories(
    fragment: Fragment, path: tuple[str, ...], macros: dict[str, Macro]
) -> Iterator[Memory]:
    """Make the larger memories with clocked ports instances of black boxes, which are added to
    `macros`. It is done after elaboration: then clock enables have reached the ports."""
    for number, (child, name, source) in enumerate(fragment.subfragments):
        here = (*path, name or f"U${number}")
        if not isinstance(child, MemoryInstance):
            yield from _replace_memories(child, here, macros)
        elif (macro := _macro(child)) is not None:
            fragment.subfragments[number] = (_instance(child, macro), name, source)
            macros[macro.name] = macro
            yield Memory(".".join(here), macro.words, macro.width, bool(macro.enables))


def _macro(memory: MemoryInstance) -> Macro | None:
    width, words = len(Value.cast(memory._data[0])), memory._data.depth
    ports = [*memory._read_ports, *memory._write_ports]
    if words * width < MACRO_BITS or any(port._domain != "sync" for port in ports):
        return None
    enables = tuple(len(port._en) for port in memory._write_ports)
    return Macro(words, width, len(memory._read_ports), enables)


def _instance(memory: MemoryInstance, macro: Macro) -> Instance:
    ports: dict[str, Value] = {"i_clk": ClockSignal()}
    for letter, direction, several in (
        ("r", "o", memory._read_ports), ("w", "i", memory._write_ports),
    ):  # fmt: skip
        for number, port in enumerate(several):
            ports[f"i_{letter}{number}_en"] = port._en
            ports[f"i_{letter}{number}_addr"] = port._addr
            ports[f"{direction}_{letter}{number}_data"] = port._data
    return Instance(macro.name, **ports)
