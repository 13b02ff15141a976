"""The AXI bridges against slow memories and hosts: same data, in the same contract cycles."""

from collections import deque
from dataclasses import replace
from random import Random

import pytest

pytest.importorskip("amaranth")
from pagoda.chip.axi import AxiLiteHost, AxiMemory
from pagoda.chip.verilate import Model
from pagoda.isa.chip import PRESETS

CHIP = replace(PRESETS["tiny"], cores=2, dram_latency=7)
ATOMS = 12  # few, so that reads often meet writes


class SlowMemory:
    """An AXI memory that takes its time, independently on every channel; answers in order."""

    def __init__(self, random, slowness):
        self.random, self.slowness = random, slowness
        self.atoms = {}
        self.reads, self.addresses, self.data = deque(), deque(), deque()
        self.acknowledged = 0

    def before_edge(self, model, prefix):
        """Set ready, valid and data for this cycle."""
        ready = self.random.random() > self.slowness
        for channel in ("ar", "aw", "w"):
            model[f"{prefix}{channel}ready"] = ready
        model[f"{prefix}rvalid"] = bool(self.reads) and ready
        model[f"{prefix}rdata"] = self.reads[0] if self.reads else 0
        model[f"{prefix}bvalid"] = self.acknowledged > 0 and ready

    def after_settling(self, model, prefix):
        """Take what was handed over."""
        if model[f"{prefix}rvalid"] and model[f"{prefix}rready"]:
            self.reads.popleft()
        if model[f"{prefix}bvalid"]:
            self.acknowledged -= 1
        if model[f"{prefix}arvalid"] and model[f"{prefix}arready"]:
            self.reads.append(self.atoms.get(model[f"{prefix}araddr"], 0))
        if model[f"{prefix}awvalid"] and model[f"{prefix}awready"]:
            self.addresses.append(model[f"{prefix}awaddr"])
        if model[f"{prefix}wvalid"] and model[f"{prefix}wready"]:
            self.data.append((model[f"{prefix}wdata"], model[f"{prefix}wstrb"]))
        if self.addresses and self.data:
            address, (value, strobes) = self.addresses.popleft(), self.data.popleft()
            self.atoms[address] = merge(self.atoms.get(address, 0), value, strobes)
            self.acknowledged += 1


def merge(old, value, strobes):
    mask = sum(255 << 8 * byte for byte in range(64) if strobes >> byte & 1)
    return old & ~mask | value & mask


@pytest.fixture(scope="module")
def bridge():
    return Model(AxiMemory(CHIP), "axi_memory")


@pytest.mark.parametrize("slowness", [0.0, 0.4, 0.9])
def test_data_come_in_their_contract_cycle_however_slow_the_memory(bridge, slowness):
    bridge.reset()
    random = Random(int(10 * slowness))
    memory = SlowMemory(random, slowness)
    memories = [memory, SlowMemory(random, slowness)]
    memories[1].atoms = memory.atoms
    expected, due = {}, [deque(), deque()]
    cycle = frozen = answered = 0
    while cycle < 400:
        for core in range(2):
            busy = {address for queue in due for _, address, _ in queue}
            read, write = random.random() < 0.5, random.random() < 0.3
            # No command writes what another still reads, nor two cores the same bytes.
            target = 64 * (2 * random.randrange(ATOMS // 2) + core)
            write = write and target not in busy
            prefix = f"dram__{core}__"
            bridge[prefix + "write"] = write
            bridge[prefix + "write_address"] = target
            value, mask = random.getrandbits(512), random.getrandbits(64)
            bridge[prefix + "write_data"], bridge[prefix + "write_mask"] = value, mask
            if write:
                expected[target] = merge(expected.get(target, 0), value, mask)
            source = 64 * random.randrange(ATOMS)
            bridge[prefix + "read"], bridge[prefix + "read_address"] = read, source
            if read:
                due[core].append((cycle + CHIP.dram_latency, source, core))
        snapshots = [expected.get(q[-1][1], 0) if q else 0 for q in due]
        for core in range(2):
            if due[core] and due[core][-1][0] == cycle + CHIP.dram_latency:
                when, address, _ = due[core].pop()
                due[core].append((when, address, snapshots[core]))
        while True:  # real cycles until the contract cycle passes
            for core in range(2):
                memories[core].before_edge(bridge, f"axi__{core}__")
            bridge["enable"] = 0
            bridge.settle()
            held = bridge["hold"]
            bridge["enable"] = not held
            bridge.settle()
            for core in range(2):
                memories[core].after_settling(bridge, f"axi__{core}__")
                if not held:
                    expects = bool(due[core]) and due[core][0][0] == cycle
                    assert bridge[f"dram__{core}__valid"] == expects
                    if expects:
                        assert bridge[f"dram__{core}__data"] == due[core].popleft()[2]
                        answered += 1
            bridge.tick()
            frozen += held
            if not held:
                break
        cycle += 1
    assert answered > 300
    assert frozen > 0 or slowness == 0


@pytest.fixture(scope="module")
def host():
    return Model(AxiLiteHost(), "axi_lite_host")


def test_the_host_writes_and_reads_registers(host):
    host["axi__awvalid"] = host["axi__wvalid"] = 1
    host.settle()
    assert (host["valid"], host["axi__awready"]) == (0, 0)  # the chip is frozen
    host["enable"] = 1
    host["axi__awaddr"], host["axi__wdata"] = 0x40, 0xCAFE
    host.settle()
    assert (host["valid"], host["write"]) == (1, 1)
    assert (host["address"], host["write_data"]) == (0x40, 0xCAFE)
    assert (host["axi__awready"], host["axi__wready"]) == (1, 1)
    host.tick()
    host["axi__awvalid"] = host["axi__wvalid"] = 0
    host.settle()
    assert (host["axi__bvalid"], host["axi__bresp"], host["valid"]) == (1, 0, 0)
    host.tick(3)  # the host is in no hurry to take the response
    assert host["axi__bvalid"] == 1
    host["axi__bready"] = 1
    host.tick()
    assert host["axi__bvalid"] == 0

    host["axi__arvalid"], host["axi__araddr"] = 1, 0x44
    host.settle()
    assert (host["valid"], host["write"], host["address"]) == (1, 0, 0x44)
    host.tick()
    host["axi__arvalid"], host["read_data"] = 0, 0xBEEF
    host.tick()
    host["read_data"] = 0
    host.settle()
    assert (host["axi__rvalid"], host["axi__rdata"]) == (1, 0xBEEF)
