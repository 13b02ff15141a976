"""Units of which a chip has many, written once: all are instances of one Verilog module.

Amaranth writes a module for every component, also for equal ones. So whoever wants Verilog to read
gives a `SharedModules` as Amaranth's platform, and parents add such units by `once`. Without it, in
simulation, they are ordinary submodules.
"""

from __future__ import annotations

from collections.abc import Iterator

from amaranth.back import verilog
from amaranth.hdl import (
    C,
    ClockSignal,
    Elaboratable,
    EnableInserter,
    Fragment,
    Instance,
    Module,
    ResetSignal,
    Value,
)
from amaranth.hdl._ir import PortDirection
from amaranth.lib import wiring
from amaranth.lib.wiring import In, connect, flipped


def once(platform: object, name: str, unit: wiring.Component) -> Elaboratable:
    """What a parent adds as submodule for one of several equal units. Equal names mean equal units.

    The parent wires the ports of `unit`, whatever it is.
    """
    return platform.instance(name, unit) if isinstance(platform, SharedModules) else unit


class SharedModules:
    """The modules that instances name, as they are found; each has a port `enable`.

    An EnableInserter around an instance does not reach into it. So whoever puts one around units
    that contain such instances says here which signal it is.
    """

    def __init__(self) -> None:
        self.enable: Value = C(1, 1)
        self._units: dict[str, wiring.Component] = {}

    def instance(self, name: str, unit: wiring.Component) -> Instance:
        self._units.setdefault(name, unit)
        unit._MustUse__used = True  # by its ports: Amaranth need not warn that it is not elaborated
        ports = {
            ("i_" if direction is PortDirection.Input else "o_") + port: value
            for port, (value, direction) in ports_of(unit).items()
        }
        return Instance(
            name, i_clk=ClockSignal(), i_rst=ResetSignal(), i_enable=self.enable, **ports
        )

    def fragments(self) -> Iterator[tuple[str, wiring.Component, Fragment]]:
        """The modules' names, components and elaborated fragments. They may use one another."""
        made = 0
        while made < len(self._units):
            name, unit = list(self._units.items())[made]
            component = Enabled(unit)
            self.enable = component.enable
            yield name, component, Fragment.get(component, self)
            made += 1


class Enabled(wiring.Component):
    """A unit behind a clock enable, port `enable`; the others are as the unit's."""

    def __init__(self, unit: wiring.Component):
        self.unit = unit
        super().__init__({"enable": In(1), **unit.signature.members})

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.unit = EnableInserter(self.enable)(self.unit)
        for name, member in self.signature.members.items():
            if name == "enable":
                continue
            outer, inner = getattr(self, name), getattr(self.unit, name)
            if member.is_signature or member.dimensions:
                _join(m, member, outer, inner)
            elif member.flow == In:
                m.d.comb += inner.eq(outer)
            else:
                m.d.comb += outer.eq(inner)
        return m


def _join(m: Module, member: wiring.Member, outer: object, inner: object) -> None:
    """Interfaces and arrays of them, element by element."""
    if member.dimensions:
        single = wiring.Member(member.flow, member._description)
        for dimension in member.dimensions[1:]:
            single = single.array(dimension)
        for one, other in zip(outer, inner, strict=True):
            _join(m, single, one, other)
    elif member.is_signature:
        connect(m, flipped(outer), inner)
    else:
        m.d.comb += inner.eq(outer) if member.flow == In else outer.eq(inner)


def ports_of(component: wiring.Component) -> dict[str, tuple[Value, PortDirection]]:
    """Port name (parts joined by `__`) -> value and direction, as `verilog.convert` takes them."""
    return {
        "__".join(str(part) for part in path): (
            Value.cast(value), PortDirection.Input if member.flow == In else PortDirection.Output
        )
        for path, member, value in component.signature.flatten(component)
    }  # fmt: skip


def shared_verilog(name: str, component: wiring.Component) -> dict[str, str]:
    """Verilog of a component as module `name`, and of the modules it instantiates, by name."""
    shared = SharedModules()
    top = Fragment.get(component, shared)
    return {
        module: module_text(module, *rest)
        for module, *rest in ((name, component, top), *shared.fragments())
    }


def module_text(name: str, component: wiring.Component, fragment: Fragment) -> str:
    """Verilog of an elaborated component as module `name`."""
    return verilog.convert(fragment, name=name, ports=ports_of(component), emit_src=False)
