"""The chip: launcher and cores under one clock enable, their local memories beside it."""

from __future__ import annotations

from amaranth.hdl import Cat, EnableInserter, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from pagoda.chip.axi import AxiLite, AxiLiteHost, AxiMaster, AxiMemory
from pagoda.chip.core import READERS, WRITERS, Core, CoreTrace
from pagoda.chip.interfaces import DramPort
from pagoda.chip.launch_signals import HostPort
from pagoda.chip.launcher import Launcher
from pagoda.chip.local_memory import SIDE_PORTS, LocalMemory
from pagoda.chip.modules import SharedModules, once
from pagoda.chip.processing_element import FLOAT_STAGES
from pagoda.isa.chip import DRAM_ATOM_BYTES, Chip, ChipError


def check_buildable(chip: Chip) -> None:
    """Raises ChipError for a chip that the contract allows and the RTL cannot be."""
    if chip.dram_share > DRAM_ATOM_BYTES:
        raise ChipError(
            f"chip {chip.name!r}: dram_bytes_per_cycle = {float(chip.dram_bytes_per_cycle):g} for "
            f"{chip.cores} cores: the RTL moves at most one {DRAM_ATOM_BYTES}-byte atom a cycle "
            f"and core; choose at most {DRAM_ATOM_BYTES * chip.cores}"
        )
    if "bf16" in chip.matrix_types and chip.pe_stages < FLOAT_STAGES:
        raise ChipError(
            f"chip {chip.name!r}: pe_stages = {chip.pe_stages}: a bf16 element needs at least "
            f"{FLOAT_STAGES} in RTL; choose that"
        )


class PagodaChip(wiring.Component):
    """A chip with one DRAM port per core and the host's register port.

    hold: the world outside is late; everything stops. enable: a contract cycle passes. busy: a
    launch runs. begin: the next enabled cycle is a launch's cycle 0. conflict: two users of one
    bank port in a cycle, which never happens.
    """

    def __init__(self, chip: Chip):
        check_buildable(chip)
        self.chip = chip
        super().__init__({
            "host": In(HostPort()), "dram": Out(DramPort()).array(chip.cores),
            "hold": In(1), "enable": Out(1), "busy": Out(1), "begin": Out(1),
            "conflict": Out(1), "trace": Out(CoreTrace(chip)).array(chip.cores),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        chip = self.chip
        freezes, conflicts = Signal(chip.cores), Signal(chip.cores)
        m.d.comb += [
            self.enable.eq(~(self.hold | freezes.any())), self.conflict.eq(conflicts.any()),
        ]
        enabled = EnableInserter({"sync": self.enable})
        if isinstance(platform, SharedModules):
            platform.enable = self.enable
        launcher = Launcher(chip)
        m.submodules.launcher = enabled(launcher)
        connect(m, launcher.host, flipped(self.host))
        m.d.comb += [self.busy.eq(launcher.busy), self.begin.eq(launcher.launch.begin)]
        for number in range(chip.cores):
            core, local = Core(chip), LocalMemory(chip)
            # The ports for a trace, which nobody uses there, are the price of an own module.
            shared = once(platform, "pagoda_core", core) if chip.cores > 1 else core
            m.submodules[f"core{number}"] = enabled(shared)
            m.submodules[f"memory{number}"] = local
            m.d.comb += core.number.eq(number)
            self._join(m, number, launcher, core, local)
            others = [freezes[k] for k in range(chip.cores) if k != number]
            m.d.comb += [
                local.hold.eq(self.hold | Cat(*others).any()), freezes[number].eq(local.freeze),
                conflicts[number].eq(local.conflict),
            ]  # fmt: skip
        return m

    def _join(
        self, m: Module, number: int, launcher: Launcher, core: Core, local: LocalMemory
    ) -> None:
        bus = core.launch
        m.d.comb += [
            getattr(bus, name).eq(getattr(launcher.launch, name)) for name in bus.signature.members
        ]
        connect(m, core.status, launcher.status[number])
        m.d.comb += [
            launcher.overflow[number].eq(core.overflow), launcher.idle[number].eq(core.idle),
        ]  # fmt: skip
        connect(m, core.dram, flipped(self.dram[number]))
        connect(m, core.trace, flipped(self.trace[number]))
        for name in (*READERS, *WRITERS):
            connect(m, getattr(core, name), getattr(local, name))
        for port in range(SIDE_PORTS):
            connect(m, core.side[port], local.side[port])


class AxiChip(wiring.Component):
    """A chip on standard buses: AXI4-Lite from the host, one AXI4 master per core to DRAM.

    interrupt: a pulse when a launch has ended."""

    def __init__(self, chip: Chip):
        check_buildable(chip)
        self.chip = chip
        super().__init__({
            "host": In(AxiLite()), "memory": Out(AxiMaster()).array(chip.cores),
            "interrupt": Out(1),
        })  # fmt: skip

    def elaborate(self, platform) -> Module:
        m = Module()
        m.submodules.chip = inner = PagodaChip(self.chip)
        m.submodules.memory = memory = AxiMemory(self.chip)
        m.submodules.host = host = AxiLiteHost()
        connect(m, host.axi, flipped(self.host))
        was_busy = Signal()
        m.d.sync += was_busy.eq(inner.busy)
        m.d.comb += [
            inner.hold.eq(memory.hold), memory.enable.eq(inner.enable),
            host.enable.eq(inner.enable), inner.host.valid.eq(host.valid),
            inner.host.write.eq(host.write), inner.host.address.eq(host.address),
            inner.host.write_data.eq(host.write_data), host.read_data.eq(inner.host.read_data),
            self.interrupt.eq(was_busy & ~inner.busy),
        ]  # fmt: skip
        for number in range(self.chip.cores):
            connect(m, inner.dram[number], memory.dram[number])
            connect(m, memory.axi[number], flipped(self.memory[number]))
        return m
