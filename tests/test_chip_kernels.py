"""Kernels of the library and a decoder layer on the RTL: the simulator's bytes and cycles."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("amaranth")
import torch
import transformers
from rich.console import Console

import pagoda
from pagoda.chip.machine import RtlMachine
from pagoda.cli.bench_rtl import cases
from pagoda.cli.library import problem
from pagoda.cli.run import execute
from pagoda.compiler.cache import Cache
from pagoda.isa.chip import MIB, PRESETS
from pagoda.pytorch.chip import use_device
from pagoda.runtime import Device
from pagoda.sim import Simulator

CHIP = replace(PRESETS["tiny"], dram_bytes=MIB)
MANY_CORES = {
    cores: replace(CHIP, name=f"tiny x {cores}", cores=cores, dram_bytes_per_cycle=16 * cores)
    for cores in (2, 4)
}


class Twins:
    """A `Machine` that runs every launch on the simulator and on the RTL, and compares them."""

    def __init__(self, chip):
        self.chip, self.tracing = chip, True
        self._simulator, self._rtl = Simulator(chip, trace=True), RtlMachine(chip, trace=True)
        self.dram = self._simulator.dram
        self.launches = self.cycles = 0

    def read(self, address, nbytes):
        return self._simulator.read(address, nbytes)

    def write(self, address, data):
        self._simulator.write(address, data)

    def start(self, launch):
        self._rtl.dram[:] = self.dram
        for machine in (self._simulator, self._rtl):
            machine.start(launch)

    def wait(self):
        expected, found = self._simulator.wait(), self._rtl.wait()
        assert found.fault == expected.fault
        assert found.cycles == expected.cycles
        for name in ("core", "index", "pc", "entry", "start", "free", "finish", "cause"):
            assert np.array_equal(found.trace[name], expected.trace[name]), name
        assert found.counters == expected.counters
        assert np.array_equal(self._rtl.dram, self.dram)
        self.launches += 1
        self.cycles += expected.cycles
        return expected


@pytest.fixture(scope="module")
def twins():
    return Twins(CHIP)


@pytest.mark.parametrize("number", range(15))
def test_a_kernel_of_the_library(twins, number):
    name, settings = cases(CHIP, 15, seed=1)[number]
    run = execute(problem(name, settings), name, CHIP, 0, Console(quiet=True), lambda _: twins)
    assert run.verdict.wrong == 0


@pytest.mark.slow
@pytest.mark.parametrize("cores", MANY_CORES)
def test_kernels_on_several_cores(cores):
    chip = MANY_CORES[cores]
    machine = Twins(chip)
    for name, settings in cases(chip, 10, seed=cores):
        quiet = Console(quiet=True)
        run = execute(problem(name, settings), name, chip, 0, quiet, lambda _: machine)
        assert run.verdict.wrong == 0


def test_a_decoder_layer(twins):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.arange(7)[None]
    use_device(Device(CHIP, twins), Cache(None))
    try:
        before = twins.launches
        compiled = torch.compile(model.to("pagoda"), backend="pagoda")
        with torch.no_grad():
            logits = compiled(tokens.to("pagoda")).logits.cpu()
        assert twins.launches > before
        assert torch.isfinite(logits.float()).all()
    finally:
        pagoda.use_chip("tiny")
