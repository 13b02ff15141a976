"""What is synthesised: a unit of a chip as Verilog, its memories as macros where the flow has none.

An ASIC's memories come from a memory compiler, and none is at hand: the larger ones become black
boxes without area, listed by their bits. An FPGA has block RAM; there they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from amaranth.hdl import Cat, ClockSignal, Fragment, Instance, Module, Signal, Value
from amaranth.hdl._mem import MemoryInstance
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from pagoda.chip.command_port import CommandPort
from pagoda.chip.control_unit import ControlUnit
from pagoda.chip.core import Core
from pagoda.chip.load_engine import LoadEngine
from pagoda.chip.local_memory import LocalMemory
from pagoda.chip.matrix_engine import MatrixEngine
from pagoda.chip.modules import Enabled, SharedModules, module_text
from pagoda.chip.pagoda_chip import AxiChip, check_buildable
from pagoda.chip.processing_element import processing_element
from pagoda.chip.store_engine import StoreEngine
from pagoda.chip.synth_result import Memory
from pagoda.chip.systolic_array import SystolicArray
from pagoda.chip.vector_engine import VectorEngine
from pagoda.chip.window import Window
from pagoda.isa.chip import Chip, ChipError

UNITS: dict[str, Callable[[Chip], wiring.Component]] = {
    "pe": lambda chip: Enabled(processing_element(chip)),
    "array": SystolicArray,
    "matrix": MatrixEngine,
    "vector": VectorEngine,
    "load": LoadEngine,
    "store": StoreEngine,
    "window": Window,
    "command-port": CommandPort,
    "control": ControlUnit,
    "memory": LocalMemory,
    "core": Core,
    "chip": AxiChip,
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
        component = UNITS[unit](chip)
    except ValueError as error:  # an element of too few stages
        raise ChipError(str(error)) from error
    top = f"pagoda_{unit.replace('-', '_')}"
    if few_pins:
        component = SerialPorts(component)
    shared = SharedModules()
    modules = [(top, component, Fragment.get(component, shared)), *shared.fragments()]
    found: dict[str, Macro] = {}
    if macros:
        for _, _, fragment in modules:
            _replace_memories(fragment, found)
    return Design(
        top,
        {f"{name}.v": module_text(name, *rest) for name, *rest in modules}
        | ({"memories.v": "".join(macro.verilog() for macro in found.values())} if found else {}),
        found,
        tuple(_memories({name: fragment for name, _, fragment in modules}, top, (), found)),
        IDEAL_NETS.get(unit, ()),
    )


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


def _replace_memories(fragment: Fragment, macros: dict[str, Macro]) -> None:
    """Make the larger memories with clocked ports instances of black boxes, which are added to
    `macros`. It is done after elaboration: then clock enables have reached the ports."""
    for number, (child, name, source) in enumerate(fragment.subfragments):
        if not isinstance(child, MemoryInstance):
            _replace_memories(child, macros)
        elif (macro := _macro(child)) is not None:
            fragment.subfragments[number] = (_instance(child, macro), name, source)
            macros[macro.name] = macro


def _memories(
    modules: dict[str, Fragment], module: str, path: tuple[str, ...], macros: dict[str, Macro]
) -> Iterator[Memory]:
    """Every instance of a macro below a module, one in each instance of a shared module."""

    def below(fragment: Fragment, path: tuple[str, ...]) -> Iterator[Memory]:
        for number, (child, name, _) in enumerate(fragment.subfragments):
            here = (*path, name or f"U${number}")
            if isinstance(child, Instance) and child.type in macros:
                macro = macros[child.type]
                yield Memory(".".join(here), macro.words, macro.width, bool(macro.enables))
            elif isinstance(child, Instance) and child.type in modules:
                yield from _memories(modules, child.type, here, macros)
            else:
                yield from below(child, here)

    return below(modules[module], path)


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
